"""The timer of a run's stages: wall and CPU seconds of each, over all attempts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class StageTimer:
    """Wall and CPU seconds of each stage, of this process and its threads, over all attempts of the run."""

    def __init__(self, before: Mapping[str, Mapping[str, float]] | None = None) -> None:
        self.stages: dict[str, dict[str, float]] = {stage: dict(spent) for stage, spent in (before or {}).items()}
        self.last = (time.perf_counter(), time.process_time())

    def stop(self, stage: str) -> dict[str, dict[str, float]]:
        """End a stage and return the times of all stages so far."""
        now = (time.perf_counter(), time.process_time())
        before = self.stages.get(stage, {"wall": 0.0, "cpu": 0.0})
        spent = zip(("wall", "cpu"), now, self.last, strict=True)
        self.stages[stage] = {kind: round(before[kind] + end - start, 2) for kind, end, start in spent}
        self.last = now
        return dict(self.stages)

    @contextmanager
    def inside(self, outer: str, stage: str) -> Iterator[None]:
        """Count what runs inside as `stage`, in the midst of the stage `outer`."""
        self.stop(outer)
        yield
        self.stop(stage)
