"""What anytime-valid verdicts promise and cost: false finds, and seeds until an effect is found.

python -m benchmarks.sequential        writes benchmarks/SEQUENTIAL.md; simulations alone, half a minute of CPU
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import special

from dpo_lab.reporting.model_card import markdown_table
from dpo_lab.stats.paired_tests import ALPHA, POWER, min_detectable_effect
from dpo_lab.stats.text import percent
from dpo_lab.studies import sequential

PAGE = Path(__file__).parent / "SEQUENTIAL.md"
STUDIES, LOOKS, FIXED, ARMS = 20_000, 40, 8, 10
SIZES = (0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0)  # effects in sd between seeds
MOST = 400  # seeds
LAWS = {
    "normal": lambda rng, size: rng.normal(size=size),
    "Student t, 3 degrees": lambda rng, size: rng.standard_t(3, size),
    "uniform": lambda rng, size: rng.uniform(-1, 1, size),
    "exponential (skewed)": lambda rng, size: rng.exponential(size=size) - 1,
    "log-normal, sd 1 (skewed)": lambda rng, size: rng.lognormal(size=size) - math.exp(0.5),
    "its logarithm": lambda rng, size: np.log(rng.lognormal(size=size)),
}
INTRO = f"""# Anytime-valid verdicts, by simulation

Written by `python -m benchmarks.sequential`: {STUDIES:,} studies a row, fixed seeds of the generator. Intervals and p values
are those of `dpo_lab/studies/sequential.py` (g = 1), see [docs/statistics.md](../docs/statistics.md).
"""
FALSE = f"""
## False finds when nothing is there

Share of studies with p < {ALPHA:g} for an effect of mean 0. *t, {FIXED} seeds*: one t-test, as in a study with fixed seeds.
*t, at every look*: a t-test after each seed from the second to number {LOOKS}, stopping at the first that pleases.
*anytime*: the e-value, a look after each of the {LOOKS} seeds. *of them skewed*: the share of its false finds that the
warning of skew marks, at the look at which they were found.
"""
FAMILY = """
## {arms} arms that do nothing, against a shared baseline

Holm over the arms, a look after each of {looks} seeds: at least one arm wins in {wins} of {studies:,} studies; without
Holm in {raw}.
"""
SEEDS = f"""
## Seeds until an effect is found

Normal effects. *fixed*: the least number of seeds at which a t-test has power {POWER:g}, which one has to know beforehand.
*anytime*: mean, median, and the number by which {percent(POWER)} of studies have found it. The last columns are for the
first of five predictions (Holm: p below {ALPHA / 5:g}).
"""


def false_finds() -> list[Sequence[str]]:
    """Return a row for each distribution of effects."""
    rows = []
    for number, (law, draw) in enumerate(LAWS.items()):
        effects = draw(np.random.default_rng(number), (STUDIES, LOOKS))
        found = sequential.log_e_values(effects) >= -math.log(ALPHA)
        first = found.argmax(1)[found.any(1)]
        marked = [
            sequential.is_skewed(list(each[: look + 1]))
            for each, look in zip(effects[found.any(1)], first, strict=True)
        ]
        t = [_t_finds(effects[:, :n]) for n in range(2, LOOKS + 1)]
        shares = (t[FIXED - 2].mean(), np.any(t, axis=0).mean(), found.any(1).mean(), np.mean(marked))
        rows.append((law, *(percent(float(share), 1) for share in shares)))
    return rows


def family() -> str:
    """Return the sentence on null arms that share a baseline."""
    rng = np.random.default_rng(100)
    studies = STUDIES // 2
    wins = raw = 0
    for _ in range(10):  # bounds memory
        size = studies // 10
        effects = rng.normal(size=(size, ARMS, LOOKS)) - rng.normal(size=(size, 1, LOOKS))
        best = sequential.log_e_values(effects).max((1, 2))
        wins += int((best >= math.log(ARMS / ALPHA)).sum())
        raw += int((best >= -math.log(ALPHA)).sum())
    return FAMILY.format(
        arms=ARMS, looks=LOOKS, studies=studies, wins=percent(wins / studies, 1), raw=percent(raw / studies, 1)
    )


def seeds_needed() -> list[Sequence[str]]:
    """Return a row for each effect size."""
    rows = []
    for number, size in enumerate(SIZES):
        effects = np.random.default_rng(200 + number).normal(size, 1.0, (STUDIES, min(MOST, round(60 / size**2) + 30)))
        logs = sequential.log_e_values(effects)
        row = [f"{size:g}"]
        for alpha in (ALPHA, ALPHA / 5):
            fixed = next(n for n in range(2, MOST) if min_detectable_effect(1.0, n, alpha=alpha) <= size)
            found = logs >= -math.log(alpha)
            stops = np.sort(np.where(found.any(1), found.argmax(1) + 1, np.inf))
            assert np.isfinite(stops[-STUDIES // 100])
            reached = np.minimum(stops, effects.shape[1])
            row += [str(fixed), f"{reached.mean():.1f}", *(f"{stops[int(q * STUDIES)]:.0f}" for q in (0.5, POWER))]
        rows.append(row)
    return rows


def page() -> str:
    """Return the page as Markdown."""
    head = ("effects", f"t, {FIXED} seeds", "t, at every look", "anytime", "of them skewed")
    each = ("fixed", "anytime, mean", "median", percent(POWER))
    return "\n".join(
        [
            *(INTRO.rstrip(), FALSE, *markdown_table(head, false_finds()), family().rstrip(), SEEDS),
            *markdown_table(("effect / sd", *each, *(f"{name}, of five" for name in each)), seeds_needed()),
            "",
        ]
    )


def _t_finds(effects: np.ndarray) -> np.ndarray:
    n = effects.shape[1]
    t = effects.mean(1) / effects.std(1, ddof=1) * math.sqrt(n)
    return 2 * special.stdtr(n - 1, -np.abs(t)) < ALPHA


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE.read_text())
