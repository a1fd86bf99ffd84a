"""The config of a later evaluation: the one that its run recorded, with the few keys that may differ."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_lab.config.schema import KINDS, ConfigError, RunConfig, explain, input_files, validate
from dpo_lab.runs import run_record
from dpo_lab.runs.fingerprint import changed_files

OVERRIDABLE_KEYS = ("evals", "trainer", "threads")
COMMAND_KEYS = ("run", "trained", "name")


@dataclass
class EvaluateConfig(RunConfig):
    """run: the folder of a finished run; or trained: the folder of a policy, the other settings saying what it is compared
    with and on what data. name: of the result; empty: the next number.
    """

    run: str | None = None
    trained: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.run is None) == (self.trained is None):
            raise ValueError(
                "run, trained: one of the two; type run=RUN_FOLDER, or trained=FOLDER policy=pretrained policy.path=INITIAL"
                " data.path=PAIRS.jsonl"
            )


def register() -> None:
    ConfigStore.instance().store(name="evaluate", group="schema", node=EvaluateConfig)


def load_finished_run(folder: Path) -> dict[str, Any]:
    """The record of a run that can be evaluated again. Raises RunRefused where there is none."""
    record = run_record.read_record(folder)
    if record is None:
        raise run_record.RunRefused(
            f"run={folder}: holds no {run_record.RECORD}; type the folder that a run printed, run=outputs/..."
        )
    if record["status"] != "done":
        door = "train" if "loss" in record["config"] else "sft"
        raise run_record.RunRefused(
            f"run={folder}: its status is {record['status']}; finish it first: type"
            f" {shlex.join(['python', '-m', f'dpo_lab.{door}', *record['overrides']])}"
        )
    if "loss" not in record["config"]:
        raise run_record.RunRefused(
            f"run={folder}: was supervised fine-tuning, which holds no preference; type trained={folder}/policy with the"
            " policy.path= and data.path= to compare it on"
        )
    return record


def config_from_run(record: Mapping[str, Any], cfg: DictConfig, overrides: Sequence[str]) -> RunConfig:
    """A run's settings, with those of MAY_DIFFER that were typed now. cfg: what was composed of `overrides`.

    Raises ConfigError where others were typed, where the record is of another version, and where a file changed since.
    """
    recorded = from_record(record["config"])
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        group = key.partition(".")[0]
        if group in OVERRIDABLE_KEYS:
            value = OmegaConf.select(cfg, key)
            plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value  # interpolations as they are
            if key == "trainer":
                recorded.trainer = {}  # not a mixture of two
            OmegaConf.update(recorded, key, plain, merge=True, force_add=True)
        elif group not in COMMAND_KEYS:
            raise ConfigError(
                f"{key}: a run is evaluated with its own settings; type run= with evals..., trainer... or threads= alone,"
                " or trained=FOLDER in place of run="
            )
    config = validate(recorded)
    if changed := changed_files(record.get("files", {}), input_files(config)):
        raise ConfigError(
            f"run: {'; '.join(changed)}; put back what it was trained on, or type trained= in place of run="
        )
    return config


def from_record(plain: Mapping[str, Any]) -> DictConfig:
    """A recorded config, typed as it was when it was composed; settings that are newer than it get their defaults."""
    plain = copy.deepcopy(dict(plain)) | {"logger": {}, "callbacks": {}}
    cfg = OmegaConf.structured(RunConfig)
    for group, table in KINDS.items():
        *parents, leaf = group.split(".")
        node = reduce(getitem, parents, plain)[leaf]
        OmegaConf.update(cfg, group, OmegaConf.structured(table[node.pop("kind")]))
    try:
        merged = OmegaConf.merge(cfg, plain)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"run: recorded by another version of dpo_lab ({explain(error)}); type trained= with it"
        ) from None
    assert isinstance(merged, DictConfig)
    return merged
