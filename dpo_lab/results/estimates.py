"""A measured number with what is known of its error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean over n examples; se is its standard error (None where n or the spread says nothing of it)."""

    value: float
    se: float | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"a metric came out as {self.value}: something before it is broken")

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean, by Student's t; None without a standard error."""
        if self.se is None or self.n is None:
            return None
        half = float(stats.t.ppf(0.975, self.n - 1)) * self.se
        return self.value - half, self.value + half

    def as_record(self) -> dict[str, float | int | list[float] | None]:
        """For a run's record."""
        interval = self.interval
        return {"value": self.value, "se": self.se, "n": self.n, "interval": list(interval) if interval else None}


def mean(values: Iterable[float]) -> Estimate:
    """Mean of independent examples with its standard error."""
    values = [float(v) for v in values]
    if not values:
        raise ValueError("a mean over no examples")
    average = math.fsum(values) / len(values)
    spread = math.fsum((v - average) ** 2 for v in values)
    se = math.sqrt(spread / (len(values) - 1) / len(values)) if len(values) > 1 and spread > 0 else None
    return Estimate(average, se, len(values))
