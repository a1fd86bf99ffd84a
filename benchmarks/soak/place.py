"""Where a worker of the soak works, with what luck, and whom it tells; the undisturbed twins that all share."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks.soak.processes import Ended, start

BY = {signal.SIGKILL: "SIGKILL", signal.SIGTERM: "SIGTERM"}
ENDS = {  # how a start may end that was sent a signal: by it, or done before it came
    signal.SIGKILL: {-signal.SIGKILL, 128 + signal.SIGKILL},
    signal.SIGTERM: {-signal.SIGTERM, 128 + signal.SIGTERM},
}


@dataclass
class Place:
    """One worker's part of the soak's folder. is_over: whether no more is to be killed; tell: what happened, to the table."""

    root: Path
    worker: int
    seed: int
    is_over: Callable[[], bool]
    tell: Callable[[dict[str, Any]], object]
    trials: int = 0
    latest: Trial | None = None

    def trial(self, kind: str) -> Trial:
        """A new folder for a run that will be disturbed; the one before goes, unless it is to be looked at."""
        self.clear()
        self.trials += 1
        name = f"{re.sub(r'[^a-z0-9]+', '-', kind)}-{self.worker}-{self.trials}"
        self.latest = Trial(self, kind, _folder(self.root, self.root / name), random.Random(f"{self.seed} {name}"))
        return self.latest

    def clear(self) -> None:
        if self.latest is not None and not self.latest.troubles:
            shutil.rmtree(self.latest.cwd)
        self.latest = None

    def twin(self, kind: str, *commands: Sequence[str], **settings: Any) -> tuple[Path, float]:
        """The folder where nothing disturbed the commands, and how long the last of them took (s)."""
        folder = self.root / "twins" / kind.replace(" ", "-")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            kept = folder / "seconds.json"
            if not kept.exists():
                shutil.rmtree(folder, ignore_errors=True)
                _folder(self.root, folder)
                seconds = 0.0
                for command in commands:
                    began = time.monotonic()
                    ended = start(command, folder, **settings)
                    seconds = time.monotonic() - began
                    if ended.code != 0 or ended.left:
                        raise RuntimeError(
                            f"twin of {kind}: ended with {ended.code}: {ended.errors[-2000:]}{ended.left}"
                        )
                kept.write_text(json.dumps(seconds))
            return folder, json.loads(kept.read_text())


@dataclass
class Trial:
    """A run that is disturbed again and again until it is done. Nothing of it is kept unless it differs from its twin."""

    place: Place
    kind: str
    cwd: Path
    random: random.Random
    quiet: bool = True  # no traceback may be seen, however a start ends
    troubles: list[str] = field(default_factory=list)

    def disturb(
        self,
        command: Sequence[str],
        duration: float,
        *,
        aim: Callable[[int], int] = lambda pid: pid,
        resumes: Callable[[], bool] = lambda: False,
        **settings: Any,
    ) -> Ended:
        """One start, which a signal meets somewhere in the `duration` (s) of the twin's; when all is over, none does.

        aim(process started): whom it meets; resumes(): whether an earlier start left something to go on from.
        """
        signum, after = self.random.choice(list(BY)), self.random.uniform(0, duration)
        goes_on = resumes()
        if self.place.is_over():
            ended = start(command, self.cwd, **settings)
            self.note(ended, {0}, resumes=goes_on)
            return ended
        ended = start(command, self.cwd, strike=lambda pid: os.kill(aim(pid), signum), after=after, **settings)
        is_hit = ended.code in ENDS[signum]
        self.note(
            ended,
            {0} | ENDS[signum],
            resumes=goes_on,
            hit=BY[signum] if is_hit else None,
            missed=not is_hit,
        )
        return ended

    def note(self, ended: Ended, may_end: set[int], *, resumes: bool = False, **more: Any) -> None:
        """A start is over. It may end with these exit codes, and may leave no process behind."""
        if ended.code not in may_end:
            last = ended.errors.strip().splitlines()[-1:]
            self.trouble(f"{self.cwd}: a start ended with {ended.code}: {last}")
        elif self.quiet and "Traceback" in ended.errors + ended.said:
            self.trouble(f"{self.cwd}: a start that ended with {ended.code} showed a traceback: see its errors.txt")
        for each in ended.left:
            self.trouble(f"{self.cwd}: {each}")
        self.place.tell({"kind": self.kind, "start": True, "resumes": resumes} | more)

    def trouble(self, what: str) -> None:
        self.troubles.append(what)
        self.place.tell({"kind": self.kind, "difference": what})

    def compared(self, found: Iterable[str], what: str = "compared") -> None:
        """All is done, and this was found where it was held against the twin."""
        for difference in found:
            self.trouble(difference)
        self.place.tell({"kind": self.kind, what: True})

    def is_hopeless(self) -> bool:
        """Whether to go on says no more."""
        return bool(self.troubles)


def _folder(root: Path, folder: Path) -> Path:
    """A folder to start runs in, which share one cache."""
    cache = root / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    (folder / "outputs").mkdir(parents=True)
    (folder / "outputs" / "cache").symlink_to(cache)
    return folder
