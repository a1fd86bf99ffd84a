"""The folder of each job of a sweep: named by what is swept, or where the same run was started before."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_lab.runs.fingerprint import (
    EXECUTION_KEYS,
    LOGGING_KEYS,
    TRAJECTORY_KEYS,
    changed_files,
    config_digest,
    flatten,
    is_under,
    override_key,
)
from dpo_lab.runs.redact import redact_override
from dpo_lab.runs.renamed_keys import present_config
from dpo_lab.runs.run_record import RECORD, RunRefused, read_record, slug

# `hydra.sweep.subdir` in conf/*.yaml; a user's own is followed as it is.
SUBDIR = "${run_slug:${hydra:job.override_dirname}}/seed=${seed}"
TYPED = re.compile(r"[\w.=,/-]+")  # paths that can stand in an override
STEPS = "trainer.max_steps"
Earlier = tuple[int, Path, Mapping[str, Any]]  # steps, folder and record of a run


def named(swept: Sequence[str], shared: Sequence[str], left_out: Sequence[str]) -> str | None:
    """Return the folder name of a job, its swept overrides and a hash of those that all jobs share; None if no more
    than the seed is swept.

    left_out: keys of shared overrides that are not hashed.
    """
    own = sorted(override for override in swept if override_key(override) not in ("seed", "name"))
    common = sorted(redact_override(override) for override in shared if override_key(override) not in left_out)
    if not own or not common:
        return slug(",".join(own)) if own else None
    return f"{slug(','.join(own))}-{hashlib.blake2b(','.join(common).encode(), digest_size=4).hexdigest()}"


class JobFolders:
    """Chooses the folders of the jobs of one sweep, in `sweep`.

    A run that was started before is continued in its folder, whatever that is called: those of earlier versions were
    named by all overrides. others: further folders of sweeps, in which only runs that are the same in every setting
    and file are looked for. records: the settings of all jobs. extends: whether a run with fewer steps is the same run.
    shares: whether jobs with equal settings share one folder; otherwise each gets one of its own.
    """

    def __init__(
        self,
        sweep: Path,
        records: Sequence[Mapping[str, Any]],
        others: Sequence[Path] = (),
        *,
        extends: bool,
        shares: bool,
    ) -> None:
        self._sweep, self._others, self._extends, self._shares = sweep, others, extends, shares
        self._earlier: dict[int, dict[str, list[Earlier]]] = {}
        self._chosen: dict[tuple[str, int, int], Path] = {}
        every = [_without_effect(record) for record in records]
        varying = {key for own in every for key, value in own.items() if value != every[0].get(key)}
        self._varying = sorted(
            varying | {*TRAJECTORY_KEYS}
        )  # an earlier run may lack the trajectory that this one asks for

    def choose(self, name: str, record: Mapping[str, Any], files: Sequence[Path]) -> Path:
        """Return the folder of the job with these settings. name: of its folder, if it is new; files: that it reads."""
        seed, steps = int(record["seed"]), int(record["trainer"]["max_steps"])
        digest = self._digest(present_config(record))
        if self._shares and (shared := self._chosen.get((digest, seed, steps))):
            return shared
        folder = self._sweep / name / f"seed={seed}"
        if not (folder / RECORD).exists():
            same = [each for each in self._started(seed).get(digest, ()) if self._is_same(each, steps, files)]
            # the farthest one; of equal ones that which is done
            same.sort(key=lambda each: (each[0], each[2]["status"] == "done", str(each[1])))
            folder = same[-1][1] if same else folder
        self._chosen[digest, seed, steps] = folder
        return folder

    def _digest(self, config: Mapping[str, Any]) -> str:
        """Return a hash of the settings, also of those without effect on results if jobs of this sweep differ by them."""
        own = _without_effect(config)
        return config_digest(config) + "".join(f" {own.get(key)}" for key in self._varying)

    def _is_same(self, run: Earlier, steps: int, files: Sequence[Path]) -> bool:
        other_steps, folder, record = run
        if not self._shares and folder in self._chosen.values():
            return False
        if folder.is_relative_to(self._sweep):
            return other_steps == steps or (self._extends and other_steps < steps)
        return other_steps == steps and not changed_files(record.get("files", {}), files)

    def _started(self, seed: int) -> dict[str, list[Earlier]]:
        """Return steps, folder and record of all runs of a seed, by the digest of their settings."""
        if seed not in self._earlier:
            found = defaultdict(list)
            for path in (p for sweep in (self._sweep, *self._others) for p in sweep.glob(f"*/seed={seed}/{RECORD}")):
                try:
                    record = read_record(path.parent)
                    assert record is not None
                    entry = int(record["config"]["trainer"]["max_steps"]), path.parent, record
                    found[self._digest(record["config"])].append(entry)
                except (RunRefused, KeyError, TypeError, AssertionError):
                    continue  # whoever asks for that folder is told
            self._earlier[seed] = dict(found)
        return self._earlier[seed]


def as_override(folder: Path, sweep: Path) -> str:
    """Return the override that puts a job of `sweep` into `folder`."""
    return f"hydra.sweep.subdir='{os.path.relpath(folder, sweep)}'"


def _without_effect(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flatten(config).items() if is_under(key, (*EXECUTION_KEYS, *LOGGING_KEYS))}
