"""Warnings about preference data before training, each with its threshold and what to type."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_lab.data.quality import Quality
from dpo_lab.data.row_faults import DESCRIPTIONS
from dpo_lab.stats.text import percent

LENGTH_BIAS = 0.65  # share of training labels that length predicts
TRUNCATED = 0.20  # share of prompts, of chosen or of rejected
DROPPED_SHARE = 0.20  # share of rows
FEWEST_HELD_OUT = 100  # pairs
FEWEST_TRAIN = 30  # pairs; the interval of a share of fewer pairs is at least +-18 percentage points
ONE_PROMPT = 0.50  # share of a split's pairs
AGAINST_SCORES = 0.05  # share of training pairs with scores

NAMES = {"train": "training", "held-out": "held-out"}


def data_warnings(quality: Quality) -> list[str]:
    """Return one line for each warning."""
    return [
        *_on_labels(quality),
        *_on_truncation(quality),
        *_on_splits(quality),
        *_on_rows(quality),
        *(said.format(n=_count_of(quality, what)) for what, said in DESCRIPTIONS.items() if quality.counts.get(what)),
    ]


def _count_of(quality: Quality, what: str) -> str:
    return f"{quality.counts[what]:,} {what}"


def _on_labels(quality: Quality) -> Iterator[str]:
    longer = quality.train.chosen_longer
    low, high = (longer and longer.interval) or (0.0, 1.0)
    if longer is None:
        yield from _on_single_labels(quality.train.unpaired)
    elif (pairs := quality.train.pairs) < FEWEST_TRAIN:
        yield (
            f"only {_count(pairs, 'training pair')} (under {FEWEST_TRAIN}): too few to show anything about their source,"
            f" where chosen may be the longer one in anything from {100 * low:.0f} to {100 * high:.0f} % of the pairs;"
            " look at more pairs"
        )
    elif abs(longer.value - 0.5) > LENGTH_BIAS - 0.5 and not low <= 0.5 <= high:
        word, share = ("longer", longer.value) if longer.value > 0.5 else ("shorter", 1 - longer.value)
        least, most = sorted((low, high) if longer.value > 0.5 else (1 - high, 1 - low))
        yield (
            f"length alone predicts {percent(share)} of the training labels (over {percent(LENGTH_BIAS)}),"
            f" {100 * least:.0f} to {100 * most:.0f} % with 95 % confidence: the chosen response is the {word} one, and a"
            " policy may learn only that; compare with a length-normalised loss (type loss=ipo_mean, or +ablation=simpo),"
            " and watch `length` in the results"
        )
    if found := _contradictions(quality):
        yield (
            f"{_count(found, 'contradiction')} (A over B beside B over A): training stops at those of your rows; type"
            " data.contradictions=drop to leave both out, or data.contradictions=keep"
        )
    scores = quality.train.scores
    if scores and scores.negative > AGAINST_SCORES and not quality.noise.total:
        yield (
            f"{percent(scores.negative)} of the training pairs with scores (over {percent(AGAINST_SCORES)}) have the"
            " higher score on the rejected side: are chosen and rejected swapped? Look at data.label_is and data.columns"
        )


def _on_single_labels(unpaired: tuple[int, int]) -> Iterator[str]:
    if not any(unpaired):
        return  # prompts alone
    if (rows := sum(unpaired)) < FEWEST_TRAIN:
        yield (
            f"only {_count(rows, 'training row')} (under {FEWEST_TRAIN}): too few to show anything about their source; look"
            " at more rows"
        )
    if not all(unpaired):
        yield (
            f"all training rows are {'desirable' if unpaired[0] else 'undesirable'} ones: the other label is never learned;"
            " look at data.columns"
        )


def _contradictions(quality: Quality) -> int:
    """Return the number of contradictions among rows that are not left out, or of those that truncation created."""
    of_rows = quality.counts.get("contradictions", 0) if not quality.counts.get("dropped: contradiction") else 0
    return max(of_rows, sum(side.contradictions for side in quality.sides.values()))


def _on_truncation(quality: Quality) -> Iterator[str]:
    lengths, limit, room = quality.train.lengths, quality.max_prompt_length, quality.max_length
    for part in ("chosen", "rejected"):
        if (cut := lengths[part].truncated) > TRUNCATED:
            yield (
                f"{percent(cut)} of the {part} responses (over {percent(TRUNCATED)}) are truncated at their end, so their"
                f" end is not learned; type data.max_length={2 * room}"
            )
    if (cut := lengths["prompt"].truncated) > TRUNCATED:
        yield (
            f"{percent(cut)} of the prompts (over {percent(TRUNCATED)}) fill data.max_prompt_length={limit}: they are"
            f" truncated at their start; type data.max_prompt_length={2 * limit} data.max_length={room + limit}"
        )


def _on_splits(quality: Quality) -> Iterator[str]:
    if quality.leaks:
        yield (
            f"{_count(quality.leaks, 'training pair')} with a prompt that, after truncation, is held out too:"
            " such prompts differ only in the truncated part; type a larger data.max_prompt_length="
        )
    held_out = quality.held_out
    if held_out is not None and held_out.responses and (pairs := held_out.pairs) < FEWEST_HELD_OUT:
        points = 196 * (0.75 * 0.25 / pairs) ** 0.5
        yield (
            f"only {_count(pairs, 'held-out pair')} (under {FEWEST_HELD_OUT}): an accuracy of 75 % is uncertain by"
            f" {points:.0f} points either way; type a larger data.validation_fraction= or data.validation_pairs="
        )
    for name, side in quality.sides.items():
        if side.pairs > 1 and side.most_of_a_prompt > ONE_PROMPT * side.pairs:
            yield (
                f"one prompt has {percent(side.most_of_a_prompt / side.pairs)} of the {NAMES[name]} pairs (over"
                f" {percent(ONE_PROMPT)}), and these are not independent: give rows of more prompts, or expect less"
            )


def _on_rows(quality: Quality) -> Iterator[str]:
    dropped = {what: count for what, count in quality.counts.items() if what.startswith("dropped: ") and count}
    rows, total = quality.counts.get("rows", 0), sum(dropped.values())
    if total > DROPPED_SHARE * rows > 0:
        most = max(dropped, key=dropped.__getitem__)
        yield (
            f"{percent(total / rows)} of the rows are dropped (over {percent(DROPPED_SHARE)}), most of them as"
            f" '{most.removeprefix('dropped: ')}'; look at the rows"
        )
    if inside := sum(side.special_inside for side in quality.sides.values()):
        yield (
            f"{_count(inside, 'response')} with special tokens before the end: was a chat template, or an end token,"
            " written into the text? Give the bare text; a response with two end tokens teaches to continue after an end"
        )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
