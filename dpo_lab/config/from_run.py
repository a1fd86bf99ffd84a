"""The config of a later evaluation: the one that its run recorded, with the few keys that may differ."""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_lab import plugins
from dpo_lab.config.reward_model import REWARD_MODEL
from dpo_lab.config.schema import KINDS, ConfigError, RunConfig, as_record, explain, training_files, validate
from dpo_lab.evals.evaluate import measured_files
from dpo_lab.runs import run_record
from dpo_lab.runs.commands import command_of
from dpo_lab.runs.fingerprint import changed_files, override_key
from dpo_lab.training.optim import OptimKind

OVERRIDABLE_KEYS = ("evals", "trainer", "threads", "data.tokens_per_microbatch")
COMMAND_KEYS = ("run", "trained", "name")
EVALUATIONS = "evaluations"  # the name of evaluations that are given none
# The option of a group that a record lacks, since the run did not use it.
ABSENT = {
    "method": "dpo",
    "loss": "dpo",
    "reference": "frozen",
    "noise": "symmetric",
    "reward": "learned",
    "evals.engine": "exact",
}


@dataclass
class EvaluateConfig(RunConfig):
    """The settings of a later evaluation.

    run: the folder of a finished run; or trained: the folder of a policy, where the other settings name the initial
    policy and the data. name: the name of the result, by default the next number; of a policy that of the folder in
    outputs/, by default `evaluations`.
    """

    run: str | None = None
    trained: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.run is None) == (self.trained is None):
            raise ValueError(
                "run, trained: give exactly one of them; type run=RUN_FOLDER, or trained=FOLDER policy=pretrained"
                " policy.path=INITIAL data.path=PAIRS.jsonl"
            )

    @property
    def folder(self) -> Path:
        """The folder of the run that is evaluated, or that an evaluation of a policy is recorded in."""
        if self.run is not None:
            return Path(self.run)
        settings = run_record.slug(HydraConfig.get().job.override_dirname)
        return run_record.OUTPUTS / run_record.name_of_folder(self.name or EVALUATIONS) / settings / f"seed={self.seed}"


def register() -> None:
    """Register the schema with Hydra."""
    ConfigStore.instance().store(name="evaluate", group="schema", node=EvaluateConfig)


def evaluation_record(cfg: DictConfig, config: EvaluateConfig) -> dict[str, Any]:
    """Return the config of an evaluation of a policy as nested dicts: that of a run with its settings, and `trained`."""
    config_dict = {
        key: value for key, value in as_record(cfg, config).items() if key not in ("run", "logger", "callbacks")
    }
    return config_dict | {"logger": {}, "callbacks": {}, "name": config.name or EVALUATIONS}


def load_finished_run(folder: Path) -> dict[str, Any]:
    """Return the record of a finished DPO run. Raise RunRefused if the folder holds none."""
    record = run_record.read_record(folder)
    if record is None:
        raise run_record.RunRefused(
            f"run={folder}: holds no {run_record.RECORD}; type the folder that a run printed, run=outputs/..."
        )
    if record["status"] != "done":
        module = command_of(record["config"])
        raise run_record.RunRefused(
            f"run={folder}: its status is {record['status']}; finish it first: type"
            f" {shlex.join(['python', '-m', f'dpo_lab.{module}', *record['overrides']])}"
        )
    if REWARD_MODEL in record["config"]:
        raise run_record.RunRefused(
            f"run={folder}: this run trained a reward model; type evals.judge.path={folder}/reward_model with run= of a"
            " policy"
        )
    if "trained" in record["config"]:
        raise run_record.RunRefused(
            f"run={folder}: this is an evaluation of {record['config']['trained']}; type trained= of that folder, and another"
            " name="
        )
    if "loss" not in record["config"]:
        raise run_record.RunRefused(
            f"run={folder}: this run was supervised fine-tuning, without preferences; type trained={folder}/policy with"
            " policy.path= and data.path= of the policy and the pairs to compare it with"
        )
    return record


def config_from_run(record: Mapping[str, Any], cfg: DictConfig, overrides: Sequence[str]) -> RunConfig:
    """Return a run's settings with overrides of OVERRIDABLE_KEYS. cfg: the config composed from `overrides`.

    Raises ConfigError if other keys are overridden, if another version of this package wrote the record, or if an input
    file has changed.
    """
    _check_plugins(record)
    recorded = from_record(record["config"])
    # nothing is trained here, so neither a package nor a GPU is needed for it
    recorded.optim.kind, recorded.policy.activation_offload = OptimKind.adamw, False
    for override in overrides:
        key = override_key(override).replace("/", ".")
        group = key.partition(".")[0]
        if {group, key} & {*OVERRIDABLE_KEYS}:
            value = OmegaConf.select(cfg, key)
            if key in KINDS:  # another option, with settings of its own
                OmegaConf.update(recorded, key, value, merge=False)
                continue
            value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value  # interpolations unresolved
            if key == "trainer":
                recorded.trainer = {}  # replaced, not merged
            OmegaConf.update(recorded, key, value, merge=True, force_add=True)
        elif group not in COMMAND_KEYS:
            raise ConfigError(
                f"{key}: a run is evaluated with its own settings; type run= with evals..., trainer..., threads= or"
                " data.tokens_per_microbatch= alone, or trained=FOLDER in place of run="
            )
    config = validate(recorded)
    ignored = set(map(str, measured_files(record["config"]["evals"])))
    files = {name: each for name, each in record.get("files", {}).items() if name not in ignored}
    if changed := changed_files(files, training_files(config)):
        raise ConfigError(
            f"run: {'; '.join(changed)}; restore the files that it was trained on, or type trained= in place of run="
        )
    return config


def _check_plugins(record: Mapping[str, Any]) -> None:
    """Raise ConfigError if a plugin that made a run is not loaded; warn if it has changed since.

    What a changed plugin makes of the data is checked later, by the hashes of the run's inputs.
    """
    now = {plugin.name: plugin.digest for plugin in plugins.loaded()}
    for name, digest in record["config"].get("plugins", {}).items():
        if name not in now:
            raise ConfigError(f"run: made with {plugins.word_of(record)}; type it too, after run=")
        if now[name] != digest:
            print(f"warning: plugin {name} has changed since this run was made", file=sys.stderr)


def from_record(config_dict: Mapping[str, Any]) -> DictConfig:
    """Return a recorded config as a typed config; settings that it does not have get their defaults."""
    config_dict = copy.deepcopy(dict(config_dict)) | {"logger": {}, "callbacks": {}}
    for key in ("trained", "plugins", REWARD_MODEL):  # beside the settings of a run
        config_dict.pop(key, None)
    cfg = OmegaConf.structured(RunConfig)
    for group, table in KINDS.items():
        *parents, leaf = group.split(".")
        node = reduce(getitem, parents, config_dict).setdefault(leaf, {"kind": ABSENT.get(group)})
        OmegaConf.update(cfg, group, OmegaConf.structured(table[node.pop("kind")]))
    try:
        merged = OmegaConf.merge(cfg, config_dict)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"run: recorded by another version of dpo_lab ({explain(error)}); type trained= with it"
        ) from None
    assert isinstance(merged, DictConfig)
    return merged
