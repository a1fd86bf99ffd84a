"""Verdicts: a prediction's effect over all seeds, and what it says of the prediction.

A prediction is *supported* if the effect has the predicted sign, is at least as large as `min_effect`, and its
Holm-corrected p is below 5 %; *not supported* if the 95 % interval excludes every effect of that size; otherwise
*inconclusive*. `same` is supported if the interval lies within plus or minus `min_effect`, not supported if it lies
outside. Seeds are paired: an effect is a difference between runs of one seed, and n is the number of seeds.

Of a study with fixed seeds intervals and p are Student's t; of one that adds seeds until it is decided they are
anytime-valid (`sequential`), so that a look after every seed costs no validity. Seeds whose runs have ended without an
effect are outcomes, and follow the study's rule for them (`Missing`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dpo_lab.stats import paired_tests
from dpo_lab.stats.estimates import Estimate
from dpo_lab.stats.paired_tests import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, Verdict
from dpo_lab.studies import sequential
from dpo_lab.studies.arm_differences import Comparison, by_prompt, share_from_prompts, versus_baseline
from dpo_lab.studies.effects import check, describe, effect_per_seed
from dpo_lab.studies.run_data import RunSet
from dpo_lab.studies.scales import mean_over_seeds
from dpo_lab.studies.seed_effects import SeedEffects, arms_of, is_anytime, seed_effects
from dpo_lab.studies.spec import Direction, Measure, Missing, Prediction

__all__ = [
    "Comparison",
    "arms_of",
    "by_prompt",
    "check",
    "claims_text",
    "decide",
    "describe",
    "effect_per_seed",
    "is_anytime",
    "mean_over_seeds",
    "share_from_prompts",
    "study_verdict",
    "versus_baseline",
]

COUNTED = "memory/"  # metrics counted in bytes: exact, the same in every seed
# Kinds of interval.
FIXED, ANYTIME, EXACT, EXACT_SHARE = "t, fixed seeds", "anytime-valid", "exact count", "exact binomial, fixed seeds"


def decide(collection: RunSet) -> list[tuple[Prediction, Verdict]]:
    """Return a verdict for every prediction of a study. Raises ValueError if the runs belong to no study.

    p values of primary predictions are Holm-corrected over the primary predictions, those of the others over all
    predictions. With fixed seeds a verdict stays inconclusive until all its runs have ended: stopping early when the
    result pleases is no test.
    """
    study = collection.study
    if study is None:
        raise ValueError(f"{collection.title}: not a study, so it has no predictions")
    known = [seed_effects(prediction, collection) for prediction in study.predictions]
    is_over = _ended(collection, known)
    is_complete = study.missing is Missing.left_out or not any(each.absent for each in known)
    cases = {}
    for side in (0,) if is_complete else (0, -1, 1):
        measured = [_measured(*each, side) for each in zip(study.predictions, known, strict=True)]
        corrected = _holm(study.predictions, measured)
        each_one = zip(study.predictions, known, measured, corrected, is_over, strict=True)
        cases[side] = [_with_word(*each) for each in each_one]
    by_prediction = [dict(zip(cases, each, strict=True)) for each in zip(*cases.values(), strict=True)]
    judged = []
    for prediction, of_seeds, of_cases in zip(study.predictions, known, by_prediction, strict=True):
        verdict = _combined(study.missing, of_seeds, of_cases)
        notes = [note for note in (verdict.note, _unequal_groups(prediction, collection)) if note]
        judged.append((prediction, replace(verdict, note="; ".join(notes))))
    return judged


def study_verdict(judged: Sequence[tuple[Prediction, Verdict]]) -> str:
    """Return a study's verdict: supported if all primary predictions are, not supported if one is not, else
    inconclusive.
    """
    words = [verdict.word for prediction, verdict in judged if prediction.primary]
    if NOT_SUPPORTED in words:
        return NOT_SUPPORTED
    return SUPPORTED if words and set(words) == {SUPPORTED} else INCONCLUSIVE


def claims_text(judged: Sequence[tuple[Prediction, Verdict]]) -> str:
    """Return which of a study's claims, its primary predictions, hold: `4 of 5 claims supported, 1 inconclusive`."""
    words = [verdict.word for prediction, verdict in judged if prediction.primary]
    others = [f"{count} {word}" for word in (NOT_SUPPORTED, INCONCLUSIVE) if (count := words.count(word))]
    first = f"{words.count(SUPPORTED)} of {len(words)} claim{'s' if len(words) > 1 else ''} supported"
    return ", ".join([first, *others]) if words else "no claim"


def _measured(prediction: Prediction, of: SeedEffects, side: int) -> Verdict:
    """Return a verdict with effect and p; its word is set by `_with_word`. side: 0 leaves absent seeds out, -1 counts
    them against the prediction, 1 in its favour.
    """
    values, n = of.filled(prediction, side), len(of.effects)
    verdict = Verdict(INCONCLUSIVE, seeds=list(of.effects), missing=of.missing)
    if n == 0:
        return replace(verdict, note="not measured")
    if of.is_yes_no:
        return _share(prediction, verdict, [value + prediction.value for value in values], of.is_anytime)
    effect, p = sequential.tested(values, of.is_anytime)
    if len(values) > 1 and paired_tests.is_constant(values):
        if prediction.metric.startswith(COUNTED):
            exact = Estimate(effect.value, None, n, (effect.value, effect.value))
            return replace(verdict, effect=exact, note="exact count, equal for every seed", interval_kind=EXACT)
        return replace(verdict, effect=effect, note="zero variance between seeds, so no interval")
    note = "one seed" if n == 1 else ""
    if of.is_anytime:
        note = "effects are skewed over seeds, which can break the interval" if sequential.is_skewed(values) else ""
    return replace(verdict, effect=effect, p=p, note=note, interval_kind=ANYTIME if of.is_anytime else FIXED)


def _share(prediction: Prediction, verdict: Verdict, occurred: Sequence[float], anytime: bool) -> Verdict:
    """Return a verdict on the share of seeds in which something occurred, against the prediction's value."""
    if anytime:
        low, high = sequential.share_confidence_sequence(occurred)
        value, kind = math.fsum(occurred) / len(occurred), ANYTIME
        p = math.exp(-max(0.0, float(sequential.share_log_e_values(occurred, prediction.value).max())))
    else:
        share, p = paired_tests.binomial_test(occurred, prediction.value)
        (low, high), value, kind = share.interval or (0.0, 1.0), share.value, EXACT_SHARE
    shifted = (low - prediction.value, high - prediction.value)
    effect = Estimate(value - prediction.value, None, len(occurred), shifted)
    return replace(verdict, effect=effect, p=p, interval_kind=kind)


def _ended(collection: RunSet, known: Sequence[SeedEffects]) -> list[bool]:
    """Return of each prediction whether all runs have ended whose p values its own is corrected with, see _holm.

    Where seeds are added, effects are those of ended runs alone.
    """
    assert collection.study is not None
    predictions = collection.study.predictions
    going = [prediction.primary for prediction, of in zip(predictions, known, strict=True) if of.going]
    anytime = is_anytime(collection.record)
    return [anytime or not (any(going) if prediction.primary else going) for prediction in predictions]


def _unequal_groups(prediction: Prediction, collection: RunSet) -> str:
    """Return a note on a difference of areas under the frontiers of groups of unequal size, else an empty text."""
    if prediction.measure is not Measure.area or not prediction.control:
        return ""
    counts = [len(collection.members(named)) for named in (prediction.treatment, prediction.control)]
    if counts[0] == counts[1]:
        return ""
    return f"{counts[0]} arms against {counts[1]}: a frontier of more arms can only be higher"


def _holm(predictions: Sequence[Prediction], found: Sequence[Verdict]) -> list[tuple[float | None, int]]:
    """Return for each prediction its p, corrected over its family, and the number of tests of that family.

    A test without p, say because an arm failed, stays in its family as one of p 1: else a broken arm would make the other
    claims easier. Exact counts, which need no p, are left out.
    """
    every = range(len(predictions))
    adjusted: dict[int, tuple[float | None, int]] = {}
    for family in (every, [number for number in every if predictions[number].primary]):
        tests = [number for number in family if predictions[number].direction is not Direction.same]
        ps = {number: found[number].p for number in tests if found[number].interval_kind != EXACT}
        corrected = paired_tests.holm([1.0 if p is None else p for p in ps.values()])
        adjusted |= {number: (None, len(tests)) for number in family}
        adjusted |= {
            number: (None if ps[number] is None else p, len(tests)) for number, p in zip(ps, corrected, strict=True)
        }
    return [adjusted[number] for number in every]


def _with_word(
    prediction: Prediction, of: SeedEffects, found: Verdict, corrected: tuple[float | None, int], is_over: bool
) -> Verdict:
    """Return a verdict with its word and notes. corrected: p, and the number of tests it is corrected for; is_over: whether
    all runs have ended whose p values it is corrected with.
    """
    p_holm, tests = corrected
    total = len(of.seeds)
    notes = [found.note] if found.note else []
    notes += [f"{len(of.absent)} of {total} seeds missing"] * bool(of.absent)
    notes += [f"{len(of.going)} of {total} seeds not finished"] * bool(of.going)
    effect, detectable = found.effect, None
    if effect is not None and effect.se is not None and effect.n and found.interval_kind == FIXED:
        alpha = paired_tests.ALPHA if prediction.direction is Direction.same else paired_tests.ALPHA / tests
        detectable = paired_tests.min_detectable_effect(effect.se * math.sqrt(effect.n), effect.n, alpha=alpha)
    is_enough = is_over and not of.going and 2 * len(of.effects) > total
    word = _word(prediction, effect, p_holm) if effect is not None and is_enough else INCONCLUSIVE
    return replace(found, word=word, p_holm=p_holm, detectable=detectable, note="; ".join(notes))


def _combined(rule: Missing, of: SeedEffects, cases: Mapping[int, Verdict]) -> Verdict:
    """Return the verdict under the rule for missing seeds, with a note on what it would be otherwise.

    Under `bounds` the effect is that of the seeds that have one, and the interval covers those with the missing seeds on
    either side.
    """
    found = cases[0]
    if len(cases) == 1 or found.effect is None:
        return found
    words = {verdict.word for verdict in cases.values()}
    each = (
        f"{found.word} without them, {cases[-1].word} with them against the prediction,"
        f" {cases[1].word} with them in its favour"
    )
    told = found.note
    if of.absent:  # else only its p differs, which is corrected with those of predictions that have missing seeds
        told += f" ({rule.value}): {each if len(words) > 1 else f'{found.word} however they count'}"
    if rule is Missing.worst:
        return replace(cases[-1], note=told)
    intervals = [verdict.effect.interval for verdict in cases.values() if verdict.effect and verdict.effect.interval]
    interval = None
    if len(intervals) == len(cases):
        interval = min(low for low, _ in intervals), max(high for _, high in intervals)
    ps, corrected = ([p for v in cases.values() if (p := getattr(v, name)) is not None] for name in ("p", "p_holm"))
    return replace(
        found,
        word=words.pop() if len(words) == 1 else INCONCLUSIVE,
        effect=replace(found.effect, interval=interval),
        p=max(ps, default=None),
        p_holm=max(corrected, default=None),
        note=told,
    )


def _word(prediction: Prediction, effect: Estimate, p: float | None) -> str:
    if effect.interval is None:
        return INCONCLUSIVE
    low, high, least = *effect.interval, prediction.least
    if prediction.direction is Direction.same:
        if -least <= low and high <= least:
            return SUPPORTED
        return NOT_SUPPORTED if low > least or high < -least else INCONCLUSIVE
    sign = 1 if prediction.direction is Direction.more else -1
    value, most = sign * effect.value, high if sign > 0 else -low
    is_there = value > 0 and value >= least
    if low == high:  # an exact count
        return SUPPORTED if is_there else NOT_SUPPORTED
    if is_there and p is not None and p < paired_tests.ALPHA:
        return SUPPORTED
    return NOT_SUPPORTED if most < least else INCONCLUSIVE
