"""Run folders and their record `run.json`: names, locks, status, resume. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dpo_lab import plugins
from dpo_lab.distributed.signals import StopSignal
from dpo_lab.errors import LabError, first_line
from dpo_lab.runs.atomic_write import remove_leftovers, write_atomic
from dpo_lab.runs.fingerprint import changed_files, config_digest, difference, fingerprint
from dpo_lab.runs.redact import redact, redact_override, redact_text
from dpo_lab.runs.renamed_keys import present_config, present_record

OUTPUTS = Path("outputs")
RECORD = "run.json"
CHECKPOINTS = "checkpoints"
_BUSY = "{} is being written by another process; wait for it, or type name=another"
RESUMED = ("identity", "seconds", "step_zero_loss", "throughput", "started")  # entries that a resumed run takes over
LOGS = re.compile(r"\.lock|run\.log|output\.log|\.?rank-\d+\.\w+")  # files in use while a previous run is archived


class RunRefused(LabError):
    """The folder can't be used for this run; the message says why and what to type."""


class RunBusy(RunRefused):
    """Another process holds the lock on the folder."""


class RunFailed(LabError):
    """The run can't continue; the message is one line with the file or the pair and what to type."""


class RunStatus(str, Enum):
    """How far a run in a folder is: not started, started but not finished, or finished."""

    new = "new"
    unfinished = "unfinished"
    done = "done"


def slug(overrides: str, limit: int = 100) -> str:
    """Return a folder name for overrides (`a=1,b=2`): readable, at most `limit` characters, unique by a hash."""
    overrides = ",".join(redact_override(override) for override in overrides.split(","))
    plain = re.sub(r"(^|,)\+", r"\1", overrides)
    clean = re.sub(r"[^\w.=,-]+", "_", plain).strip("_.")
    if clean != plain or len(clean) > limit:
        clean = f"{clean[: limit - 9]}-{hashlib.blake2b(overrides.encode(), digest_size=4).hexdigest()}"
    return clean or "default"


def name_of_folder(name: str) -> str:
    """Return the folder under OUTPUTS of all runs of a name, which may have parts as in `studies/runs/full`."""
    return "/".join(slug(part) for part in name.split("/") if part) or "default"


def refuse_outside(folder: Path) -> None:
    """Raise RunRefused if a folder under OUTPUTS leads outside of OUTPUTS by a symbolic link."""
    if Path(os.path.relpath(folder)).parts[0] == OUTPUTS.name and not folder.resolve().is_relative_to(
        OUTPUTS.resolve()
    ):
        raise RunRefused(
            f"{folder}: a link in it leads to {folder.resolve()}, outside of {OUTPUTS}; type name=another, or make"
            f" {OUTPUTS} itself the link"
        )


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the folder's record, None if there is none. Raise RunRefused if it can't be read.

    Keys of earlier versions get their present names.
    """
    try:
        return present_record(json.loads((folder / RECORD).read_text()))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunRefused(f"{folder / RECORD}: can't be read ({error}); type name=another, or delete {folder}") from None


class Run:
    """A run in progress: its folder and its record, which rank 0 writes atomically at every `update`.

    resumes: whether it continues an earlier attempt; writes: whether this process is rank 0, which holds the lock.
    """

    def __init__(self, folder: Path, record: dict[str, Any], resumes: bool = False, writes: bool = True) -> None:
        self.folder, self.record, self.resumes, self.writes = folder, record, resumes, writes

    def update(self, **entries: Any) -> None:
        """Add entries to the record and write it, if this process writes."""
        self.record |= entries
        if self.writes:
            _commit(self.folder, self.record)

    def check_inputs_unchanged(self, **identity: str) -> None:
        """Record hashes of the run's inputs, and check them against those of the attempt that it resumes.

        Raises RunRefused if they differ; with if_exists=restart the earlier attempt is archived instead.
        """
        was = self.record.get("identity") or {}
        changed = [f"{name} was {was[name]}, is {now}" for name, now in identity.items() if was.get(name, now) != now]
        if self.resumes and changed:
            if self.record["config"]["if_exists"] != "restart":
                raise RunRefused(_refusal(self.folder, changed))
            _archive_previous(self.folder)
            self.resumes = False
            for name in (*RESUMED, "steps", "attempts"):  # of the archived attempt
                self.record.pop(name, None)
            self.record["started"] = now()
        self.update(identity=was | identity)


@contextmanager
def acquire_run(
    folder: Path, config: Mapping[str, Any], overrides: Sequence[str], files: Sequence[Path] = ()
) -> Iterator[Run | None]:
    """Lock a folder for a run of `config` that reads `files`; yield None if that run is done already.

    The record's status is `running` until the context ends, then `done`, `stopped`, `preempted`, `interrupted`, or
    `failed` with the error. An earlier attempt of the same run is resumed; another run is never overwritten. Raises
    RunRefused if another process holds the lock or another run is in the folder, see `run_status`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", _BUSY.format(folder)):
        status = run_status(folder, config, files)
        if status is RunStatus.done:
            yield None
            return
        remove_leftovers(folder / RECORD)
        resumes = status is RunStatus.unfinished
        earlier = read_record(folder)
        if not resumes and earlier is not None and _is_worth_keeping(folder, earlier):
            _archive_previous(folder)
            earlier = None
        record = _new_record(config, overrides, files)
        if earlier is not None:
            record |= _resumed_entries(earlier, record) if resumes else {}
            record["attempts"] = [*earlier.get("attempts", ()), _attempt(earlier)]
        run = Run(folder, record, resumes)
        run.update(status="running")
        try:
            yield run
        except BaseException as error:
            with suppress(OSError):  # if the record can't be written, the run's own error is the one to raise
                status, text = ending(error)
                run.update(status=status, error=text, finished=now())
            raise
        run.update(status="done", finished=now())


def run_status(folder: Path, config: Mapping[str, Any], files: Sequence[Path] = ()) -> RunStatus:
    """Return whether a run of `config` that reads `files` is new in the folder, unfinished, or done.

    A run with a larger trainer.max_steps than recorded is the same run, unfinished. Raises RunRefused if the folder
    holds another run, unless if_exists=restart.
    """
    record = read_record(folder)
    if record is None or not _is_worth_keeping(folder, record):
        return RunStatus.new
    changes = difference(record["config"], present_config(redact(config)))
    changed = [plugins.change(key, was, now, record) for key, (was, now) in changes.items()]
    changed += changed_files(record.get("files", {}), files)
    old_steps, new_steps = (int(each["trainer"]["max_steps"]) for each in (record["config"], config))
    if new_steps < old_steps:
        changed.append(f"trainer.max_steps: was {old_steps}, now {new_steps}")
    if changed:
        if config["if_exists"] == "restart":
            return RunStatus.new
        raise RunRefused(_refusal(folder, changed))
    return RunStatus.done if record["status"] == "done" and new_steps == old_steps else RunStatus.unfinished


def mark_ended(folder: Path, status: str, error: str) -> None:
    """Record how a run ended if its rank 0 could not, or did not know because another rank failed first."""
    with locked(folder / ".lock", _BUSY.format(folder)):
        record = read_record(folder)
        if record is not None and record["status"] != "done":
            _commit(folder, record | {"status": status, "error": redact_text(error), "finished": now()})


@contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Hold a file lock. Raise RunBusy with the message `refusal` if another process holds it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunBusy(refusal) from None
    try:
        yield
    finally:
        lock.release()


def _is_worth_keeping(folder: Path, record: Mapping[str, Any]) -> bool:
    """Return whether a run is done or has a checkpoint, so that another one may not replace it."""
    return record["status"] == "done" or any((folder / CHECKPOINTS).glob("*.ckpt"))


def _refusal(folder: Path, changed: Sequence[str]) -> str:
    return (
        f"{folder} holds another run ({'; '.join(changed)}); type name=another, or if_exists=restart to archive it and"
        " start again"
    )


def _resumed_entries(earlier: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that a resumed run's record takes over from its earlier attempts."""
    entries = {name: earlier[name] for name in RESUMED if name in earlier}
    old_steps, new_steps = (each["config"]["trainer"]["max_steps"] for each in (earlier, record))
    if "steps" in earlier and old_steps == new_steps:
        entries["steps"] = earlier["steps"]  # training had finished
    return entries


def _attempt(earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of an earlier attempt: how it ended and, if the run gets more steps, its results."""
    names = ("status", "error", "started", "finished", "steps", "metrics", "versions", "git")
    entries = {name: earlier[name] for name in names if name in earlier}
    return entries | {"max_steps": earlier["config"]["trainer"]["max_steps"]}


def ending(error: BaseException) -> tuple[str, str]:
    """Return status and error of a run that an exception ended."""
    if isinstance(error, StopSignal):
        return error.status, f"stopped by {error}"
    if isinstance(error, SystemExit):  # how a scheduler's handler exits after it has requeued the job
        return "preempted", "requeued by the scheduler"
    what = first_line(f"{type(error).__name__}: {error}")
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed", redact_text(what)


def _new_record(config: Mapping[str, Any], overrides: Sequence[str], files: Sequence[Path]) -> dict[str, Any]:
    return {
        "status": "running",
        "started": now(),
        "config": redact(config),
        "config_digest": config_digest(config),
        "overrides": [redact_override(override) for override in (*plugins.words(), *overrides)],
        "files": fingerprint(files),
        **plugins.as_record(),
        **provenance(),
    }


def provenance() -> dict[str, Any]:
    """Return the versions of the packages and the git commit that a result comes from."""
    return {"versions": _versions(), "git": _git_state()}


def _commit(folder: Path, record: Mapping[str, Any]) -> None:
    write_atomic(folder / RECORD, json.dumps(record, indent=1, allow_nan=False))


def _archive_previous(folder: Path) -> None:
    """Move what an earlier run left to `earlier-N` inside the folder."""
    left = [p for p in folder.iterdir() if not (LOGS.fullmatch(p.name) or p.name.startswith("earlier-"))]
    numbers = [int(p.name.removeprefix("earlier-")) for p in folder.iterdir() if re.fullmatch(r"earlier-\d+", p.name)]
    (aside := folder / f"earlier-{1 + max(numbers, default=0)}").mkdir()
    for path in left:
        os.replace(path, aside / path.name)


def now() -> str:
    """Return the current time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    names = ("dpo_lab", "torch", "lightning", "transformers", "tokenizers", "hydra-core", "torchmetrics")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def _git_state() -> dict[str, Any] | None:
    """Return the commit of the package's checkout and whether it has changes; None outside of a checkout."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", ".", "../conf"))}
    except (OSError, subprocess.SubprocessError):
        return None
