"""Kill training and sweeps for a while, at moments drawn, and compare what comes of it with twins that nothing disturbed.

    python -m benchmarks.soak --minutes 10
    python -m benchmarks.soak --kills 20 --only train --seed 7

Two workers at a time. Processes are forks of one that has loaded what runs import, but where it says fresh, and but for the
jobs of stand-ins. `train` and what follows are the real command `dpo_lab.train`; `fit` is the small fit of the tests. A kill
counts where its process was alive, as how it ended tells; `early` are starts that were done before their signal came,
`faults` those that met a full disk, a locked folder or another sweep, `resumes` those that found an earlier one's work.
Exit code 1: something differed, or a start ended as it may not; its folder is kept.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dpo_lab.distributed.fork_server import fast_imports

with fast_imports():
    from benchmarks.results import context
    from benchmarks.soak import sweeps, trainings
    from benchmarks.soak.place import Place
    from benchmarks.soak.processes import adopt_orphans, gone

    import tests.support.loaded  # noqa: F401  isort: skip

WORKERS = 2
KINDS: Mapping[str, tuple[Callable[[Place], None], float]] = {  # and their shares of the time
    "train": (trainings.one_process, 0.38),
    "fit": (trainings.small, 0.18),
    "clock-jumps": (trainings.wrong_clock, 0.08),
    "2-ranks": (trainings.ranks, 0.10),
    "2-ranks-fresh": (trainings.fresh_ranks, 0.04),
    "disk-full": (trainings.full_disk, 0.06),
    "read-only": (trainings.read_only, 0.03),
    "sweep": (sweeps.real, 0.05),
    "sweep-stand-ins": (sweeps.stand_in, 0.05),
    "two-sweeps": (sweeps.two_at_once, 0.03),
}


@dataclass
class Counts:
    """What happened to one kind of run, see above. compared: folders that were held against the twin's; reports: as well."""

    starts: int = 0
    SIGKILL: int = 0
    SIGTERM: int = 0
    early: int = 0
    faults: int = 0
    resumes: int = 0
    compared: int = 0
    reports: int = 0
    differences: list[str] = field(default_factory=list)
    skipped: str | None = None

    @property
    def kills(self) -> int:
        return self.SIGKILL + self.SIGTERM

    def hear(self, told: Mapping[str, Any]) -> None:
        self.starts += told.get("start", False)
        self.SIGKILL += told.get("hit") == "SIGKILL"
        self.SIGTERM += told.get("hit") == "SIGTERM"
        self.early += told.get("missed", False)
        self.faults += told.get("fault", False)
        self.resumes += told.get("resumes", False)
        self.compared += told.get("compared", False)
        self.reports += told.get("reports", False)
        if "difference" in told:
            self.differences.append(told["difference"])
        self.skipped = told.get("skipped", self.skipped)


def work(place: Place, kinds: Sequence[str]) -> None:
    """One worker: whichever kind has had the least of its share of the time is next; the second starts at the other end."""
    adopt_orphans()
    spent = dict.fromkeys(kinds if place.worker else reversed(kinds), 0.0)
    while not place.is_over():
        kind = min(spent, key=lambda kind: spent[kind] / KINDS[kind][1])
        began = time.monotonic()
        KINDS[kind][0](place)
        spent[kind] += time.monotonic() - began
    place.clear()


def fork_worker(
    number: int, root: Path, seed: int, is_over: Callable[[], bool], kinds: Sequence[str]
) -> tuple[int, int]:
    """The pipe through which a new worker tells what happens, a line of JSON each time, and its process."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reads)
            os.setsid()
            tell = lambda told: os.write(writes, (json.dumps(told) + "\n").encode())  # noqa: E731
            work(Place(root, number, seed, is_over, tell), kinds)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            gone(0)
            os._exit(code)
    os.close(writes)
    return reads, pid


def soak(
    root: Path, seed: int, seconds: float, kills: int | None, kinds: Sequence[str], console: Console
) -> dict[str, Counts]:
    """Let the workers work until the time is over or enough was killed; gives what happened, by kind."""
    enough, end = mmap.mmap(-1, 1), time.monotonic() + seconds
    is_over = lambda: enough[0] != 0 or time.monotonic() > end  # noqa: E731
    workers = dict(fork_worker(number, root, seed, is_over, kinds) for number in range(WORKERS))
    counts: dict[str, Counts] = {}
    rests = dict.fromkeys(workers, b"")
    began = shown = time.monotonic()
    try:
        with console.status("twins that nothing disturbs") as status:
            while rests:
                for reads in select.select(list(rests), [], [], 1.0)[0]:
                    *lines, rests[reads] = (rests[reads] + (new := os.read(reads, 1 << 16))).split(b"\n")
                    for told in map(json.loads, lines):
                        counts.setdefault(told["kind"], Counts()).hear(told)
                        if "difference" in told:
                            console.print(f"difference {told['difference']}", style="red", markup=False, soft_wrap=True)
                    if not new:
                        del rests[reads]
                if kills is not None and total(counts).kills >= kills:
                    enough[0] = 1
                if counts:
                    status.update(line(counts, time.monotonic() - began))
                if not console.is_terminal and time.monotonic() - shown > 30:
                    shown = time.monotonic()
                    console.print(line(counts, shown - began), highlight=False)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers.values()]
        workers.clear()
        if any(codes):
            raise SystemExit("a worker failed; its error stands above")
    finally:
        for pid in workers.values():
            os.killpg(pid, signal.SIGTERM)
    return counts


def total(counts: Mapping[str, Counts]) -> Counts:
    everything = Counts()
    for one in counts.values():
        for name in asdict(one).keys() - {"skipped"}:
            setattr(everything, name, getattr(everything, name) + getattr(one, name))
    return everything


def line(counts: Mapping[str, Counts], seconds: float) -> str:
    all_of = total(counts)
    return (
        f"{int(seconds) // 60}:{int(seconds) % 60:02}  kills {all_of.kills}  resumes {all_of.resumes}"
        f"  compared {all_of.compared}  differences {len(all_of.differences)}"
    )


def show(console: Console, counts: Mapping[str, Counts], seconds: float, seed: int) -> None:
    columns = ("starts", "kill -9", "SIGTERM", "early", "faults", "resumes", "compared", "reports", "differences")
    table = Table("what", *columns, box=None, header_style="dim", pad_edge=False)
    for kind, one in (*sorted(counts.items()), ("all", total(counts))):
        if one.skipped:
            table.add_row(f"{kind} (skipped)")
            continue
        numbers = (one.starts, one.SIGKILL, one.SIGTERM, one.early, one.faults, one.resumes, one.compared, one.reports)
        table.add_row(kind, *map(str, numbers), str(len(one.differences)), style="bold" if kind == "all" else None)
    console.print(table)
    for kind, one in counts.items():
        if one.skipped:
            console.print(f"{kind} was skipped: {one.skipped}", highlight=False)
    all_of = total(counts)
    console.print(
        f"{all_of.kills} kills, {all_of.resumes} resumes, {len(all_of.differences)} differences in {seconds / 60:.1f} min"
        f" ({all_of.kills * 60 / seconds:.0f} kills a minute), seed {seed}",
        highlight=False,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="what is at work then is brought to its end")
    parser.add_argument("--kills", type=int, help="end after so many")
    parser.add_argument("--only", choices=KINDS, action="append", help="kinds of runs (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, signals and limits that are drawn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the counts there")
    parser.add_argument("--folder", type=Path, help="work there, use the twins that lie there, and keep it")
    chosen = parser.parse_args()
    root = chosen.folder.absolute() if chosen.folder else Path(tempfile.mkdtemp(prefix="dpo-lab-soak-"))
    root.mkdir(parents=True, exist_ok=True)
    console, began = Console(soft_wrap=not sys.stdout.isatty()), time.monotonic()
    console.print(f"seed {chosen.seed}, in {root}", highlight=False)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        counts = soak(root, chosen.seed, 60 * chosen.minutes, chosen.kills, chosen.only or list(KINDS), console)
    except KeyboardInterrupt:
        return 130
    seconds = time.monotonic() - began
    show(console, counts, seconds, chosen.seed)
    if chosen.json:
        found = {kind: asdict(one) | {"kills": one.kills} for kind, one in (*counts.items(), ("all", total(counts)))}
        measured = {"seed": chosen.seed, "seconds": round(seconds, 1), "kinds": found}
        chosen.json.write_text(json.dumps(context() | measured, indent=1) + "\n")
    is_well = not total(counts).differences
    if is_well and not chosen.folder:
        shutil.rmtree(root)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
