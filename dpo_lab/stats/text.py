"""Statistics as text: percentages, p values and intervals."""

from __future__ import annotations

from collections.abc import Callable

from dpo_lab.stats.estimates import Estimate


def percent(share: float, decimals: int = 0) -> str:
    """Return a share as text, `12 %`."""
    return f"{100 * share:.{decimals}f} %"


def format_p(p: float | None) -> str:
    """Return a p value as text, `.021` or `< .001`; empty if there was no test."""
    if p is None:
        return ""
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def format_interval(interval: tuple[float, float] | None, spell: Callable[[float], str]) -> str:
    """Return an interval as text, `0.1 .. 0.3`, its ends as `spell` writes them; empty if there is none."""
    return f"{spell(interval[0])} .. {spell(interval[1])}" if interval else ""


def format_estimate(estimate: Estimate, spell: Callable[[float], str]) -> str:
    """Return a value with its interval, `0.52 (0.37 .. 0.67)`; the value alone if it has none, or one of width 0."""
    low, high = estimate.interval or (0.0, 0.0)
    return spell(estimate.value) + (f" ({format_interval((low, high), spell)})" if low != high else "")
