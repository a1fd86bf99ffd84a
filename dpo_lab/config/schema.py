"""The typed schema of a run's config, its cross-field checks, and error messages that say what to type.

Most fields are the objects that a run uses: loss, reference and label noise are dataclasses defined next to their code.
Lightning's trainer, loggers and callbacks are `_target_` nodes, see allowed_targets.py. This module does not import
torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import reduce
from itertools import chain
from operator import attrgetter, getitem
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dpo_lab import plugins
from dpo_lab.config import plugin_choices
from dpo_lab.config.allowed_targets import check_targets
from dpo_lab.config.checks import check_run
from dpo_lab.config.choices import describe_choices
from dpo_lab.config.logger_packages import check_packages
from dpo_lab.config.paths import check_paths
from dpo_lab.config.trainer_arguments import advice, check_trainer
from dpo_lab.core.losses import LOSSES, Loss
from dpo_lab.core.methods import METHODS, Method
from dpo_lab.core.noise import NOISES, LabelNoise
from dpo_lab.data.sources import Data
from dpo_lab.data.tasks.base import TASKS
from dpo_lab.errors import LabError
from dpo_lab.evals import evaluate
from dpo_lab.evals.engines import ENGINES
from dpo_lab.evals.evaluate import SharedSettings
from dpo_lab.evals.evaluators.base import default_evaluators
from dpo_lab.evals.judges import JUDGES
from dpo_lab.models.policy import POLICIES, PolicyConfig, TinyPolicy
from dpo_lab.models.reference import REFERENCES, Reference
from dpo_lab.rewards import REWARDS, Reward
from dpo_lab.runs import run_record
from dpo_lab.runs.fingerprint import NOT_IN_FOLDER_NAMES
from dpo_lab.runs.renamed_keys import RENAMED_KEYS, RENAMED_VALUES, is_renamed, present_key
from dpo_lab.training.initial_policy import SFT
from dpo_lab.training.optim import Optim

PREFERENCE_KEYS = ("beta", "method", "loss", "reference", "noise", "evals")  # not used in supervised fine-tuning
# Errors that Hydra raises before it calls the command.
ConfigErrors = (HydraException, OmegaConfBaseException, YAMLError)


class IfExists(str, Enum):
    """What happens if the run's folder holds another run."""

    error = "error"
    restart = "restart"  # the other run is moved to `earlier-N` inside the folder


class ConfigError(LabError):
    """A setting is invalid; the message is one line that names the key and says what to type."""


@dataclass
class RunConfig:
    """The settings of a run. beta and seed are at the root because most sweeps vary them."""

    name: str = "dpo"
    beta: float = 0.1
    seed: int = 0
    threads: int | None = 1  # torch's intra-op threads per process; None: torch's default
    if_exists: IfExists = IfExists.error
    figures: bool = True
    optimized_metric: str | None = None  # the metric that a sweeper such as Optuna optimizes
    method: Method = MISSING
    loss: Loss = MISSING
    reference: Reference = MISSING
    noise: LabelNoise = MISSING
    reward: Reward = MISSING  # used, and recorded, by methods that sample
    policy: PolicyConfig = MISSING
    sft: SFT = field(default_factory=SFT)
    data: Data = field(default_factory=lambda: Data(task=MISSING))
    optim: Optim = field(default_factory=Optim)
    evals: SharedSettings = field(default_factory=lambda: evaluate.Evals(engine=MISSING, judge=MISSING))
    trainer: dict[str, Any] = MISSING
    logger: dict[str, Any] = MISSING
    callbacks: dict[str, Any] = MISSING

    def __post_init__(self) -> None:
        check_run(self)
        for node in (self.trainer, self.logger, self.callbacks):
            check_targets(node)
        check_packages(self.logger)
        check_trainer(self.trainer)

    @property
    def is_embedded(self) -> bool:
        """Whether the policy is the embedded one and the pairs are those of a task: no input is the user's."""
        return isinstance(self.policy, TinyPolicy) and self.data.uses_task


# Config groups whose options are different dataclasses, each with its own settings.
KINDS: dict[str, dict[str, Any]] = {
    "method": METHODS,
    "loss": LOSSES,
    "reference": REFERENCES,
    "noise": NOISES,
    "reward": REWARDS,
    "policy": POLICIES,
    "data.task": TASKS,
    "evals.engine": ENGINES,
    "evals.judge": JUDGES,
}


def register() -> None:
    """Register the schemas that conf/*.yaml refers to, and the resolvers that name run folders."""
    # Hydra copies the store once for each group of choices that it lists; it only reads it
    ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[reportAttributeAccessIssue]
    store = ConfigStore.instance()
    store.store(name="run", group="schema", node=RunConfig)
    for group, schemas in KINDS.items():
        for name, schema in schemas.items():
            store.store(name=name, group=f"schema/{group.replace('.', '/')}", node=schema)
    OmegaConf.register_new_resolver("default_evaluators", default_evaluators, replace=True)
    OmegaConf.register_new_resolver("run_slug", run_record.slug, replace=True)
    OmegaConf.register_new_resolver("run_name", run_record.name_of_folder, replace=True)
    OmegaConf.register_new_resolver("not_in_folder_names", lambda: list(NOT_IN_FOLDER_NAMES), replace=True)
    plugin_choices.register(KINDS, Path(conf_dir()))
    added = plugin_choices.choices(KINDS)
    OmegaConf.register_new_resolver("describe_choices", lambda: describe_choices(Path(conf_dir()), added), replace=True)


def conf_dir() -> str:
    """Return the folder of YAML files: beside the package in a checkout, inside the package when installed."""
    here = Path(__file__).resolve().parent.parent
    return str(next(c for c in (here / "conf", here.parent / "conf") if (c / "train.yaml").exists()))


def validate(cfg: DictConfig) -> RunConfig:
    """Convert the composed config to a RunConfig. Raise ConfigError for an invalid setting."""
    for key, known in chain(_unknown_keys(cfg), ((key, ()) for key in RENAMED_KEYS if OmegaConf.select(cfg, key))):
        raise ConfigError(_unknown(key, known))
    try:
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    assert isinstance(config, RunConfig)
    return config


def check_files(config: RunConfig) -> None:
    """Raise ConfigError if a path of the config does not exist."""
    try:
        check_paths(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def as_record(cfg: DictConfig, config: RunConfig) -> dict[str, Any]:
    """Return the resolved config as nested dicts, with the name of each KINDS option under `kind`."""
    config_dict: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    for group, table in KINDS.items():
        chosen = attrgetter(group)(config)
        (kind,) = (name for name, schema in table.items() if type(chosen) is schema)
        *parents, leaf = group.split(".")
        node = reduce(getitem, parents, config_dict)
        node[leaf] = {"kind": kind, **node[leaf]}
    if not config.method.is_online:
        del config_dict["reward"]
    plugins.check()
    if plugins.loaded():
        config_dict["plugins"] = {plugin.name: plugin.digest for plugin in plugins.loaded()}
    return config_dict


def sft_record(cfg: DictConfig, config: RunConfig) -> dict[str, Any]:
    """Return the config of supervised fine-tuning as nested dicts, without the settings that it does not use."""
    config_dict = {key: value for key, value in as_record(cfg, config).items() if key not in PREFERENCE_KEYS}
    if not isinstance(config.policy, TinyPolicy):
        config_dict["sft"] = {"text_column": config.sft.text_column}  # the others are those of the embedded policy
    return config_dict


def training_files(config: RunConfig) -> list[Path]:
    """Return the user's files that the run is trained from and that exist on this machine."""
    return [*config.data.files(), *config.policy.files(), *config.reward.files()]


def input_files(config: RunConfig) -> list[Path]:
    """Return the user's files that the run reads, for training or evaluation, and that exist on this machine."""
    return [*training_files(config), *config.evals.files()]


def explain(error: Exception) -> str:
    """Return an error of Hydra or OmegaConf as one line that names the key and says what to type."""
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
    if isinstance(error, YAMLError):
        return f"a config file can't be read as YAML: {' '.join(text.split())}; fix it"
    if isinstance(error, OverrideParseException):
        return f"can't read '{error.override}': type key=value, quoted where the value holds commas, brackets or spaces"
    if found := re.search(r"To append to your default list use (\S+)", text):
        return f"{found[1].removeprefix('+')}: this group is not in the defaults list; type {found[1]} to add it"
    if found := re.search(r"Could not find 'hydra/launcher/(?:submitit_)?(\w+)'", text):
        extra = "slurm" if found[1] == "local" else found[1]
        return f"launcher={found[1]}: its package is not installed; type pip install 'dpo_lab[{extra}]'"
    if found := re.search(r"Could not find '([\w/@.]+)/([^']*)'", text):
        options = re.findall(r"^\t(\w+)$", text, re.M)
        if present := RENAMED_VALUES.get((found[1], found[2])):
            return f"{found[1]}={found[2]}: renamed; type {found[1]}={present}"
        hint = plugin_choices.hint(found[1], found[2])
        return f"{found[1]}={found[2]}: no such choice; type {found[1]}= one of {', '.join(options)}{hint}"
    if found := re.search(r"Value '(.*?)' .*?could not be converted to (\w+)", text, re.S):
        kind = {"Float": "a number", "Integer": "a whole number", "Boolean": "true or false"}.get(found[2], found[2])
        return f"{_full_key(text)}={found[1]}: must be {kind}; type {_full_key(text)}=..."
    if found := re.search(r"Invalid value '(.*?)', expected one of \[(.*?)\]", text):
        return f"{_full_key(text)}={found[1]}: must be one of {found[2]}"
    if found := re.search(r"Could not override '([^']+)'", text):
        group, _, leaf = found[1].partition(".")
        typed = re.search(rf"{re.escape(found[1])}=(\S+)", text)
        if group == "trainer" and (instead := advice(leaf, typed[1] if typed else "")):
            return f"{found[1]}: {instead}"
        if f"{found[1]}={{" in text and found[1] in _known_keys():
            return f"{found[1]}: its entries are added to the existing ones; type +{found[1]}=..."
        return _unknown(found[1], _known_keys())
    if found := re.search(r"override (evals\.\w+)=(\S+)\s+Invalid type assigned: str", text):
        return f"{found[1]}={found[2]}: has settings of its own; type {found[1].replace('.', '/')}={found[2]}"
    if found := re.search(r"In '([^']+)': .*Key '[^']+' not in", text, re.S):
        return f"{found[1]}.yaml: {_unknown(_full_key(text), _known_keys())}"
    return " ".join(text.split())


def _unknown(key: str, known: Sequence[str]) -> str:
    """Return the message about a key that the schema lacks: its present name, or the nearest of the known keys."""
    if key == "plugins":
        return "plugins: typed on the command line alone, as plugins=[NAME_OR_PATH,...]; leave it out of the config"
    return (
        f"{key}: renamed; type {present_key(key)}=..."
        if is_renamed(key)
        else f"unknown key '{key}'{_suggestion(key, known)}"
    )


def _full_key(text: str) -> str:
    """Return the key that a message of OmegaConf names."""
    found = re.search(r"full_key: (\S+)", text)
    return found[1] if found else "a key"


def _suggestion(key: str, known: Sequence[str]) -> str:
    """Return the end of the message about an unknown key: what to type instead."""
    group, _, leaf = key.rpartition(".")
    schemas = KINDS.get(group, {}).items()
    typed = group.replace(".", "/")  # a choice within a group
    owners = [f"{typed}={name}" for name, schema in schemas if leaf in {f.name for f in dataclasses.fields(schema)}]
    if owners:
        return f" under this {group}; type {' or '.join(owners)} with it"
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f": did you mean '{close[0]}'? type {close[0]}=..." if close else "; --help lists the keys"


def _known_keys() -> list[str]:
    """Return every dotted key of the schema, with those of every option in KINDS."""
    keys = list(_keys_of(RunConfig, ""))
    for group, schemas in KINDS.items():
        keys += [f"{group}.{f.name}" for schema in schemas.values() for f in dataclasses.fields(schema)]
    keys += [f"trainer.{key}" for key in OmegaConf.load(Path(conf_dir()) / "trainer" / "cpu.yaml")]
    return sorted(set(keys))


def _keys_of(schema: type, prefix: str) -> Iterator[str]:
    for spec in dataclasses.fields(schema):
        yield prefix + spec.name
        default = None if spec.default_factory is dataclasses.MISSING else spec.default_factory()
        if dataclasses.is_dataclass(default):
            yield from _keys_of(type(default), f"{prefix}{spec.name}.")


def _unknown_keys(node: Any, path: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield each key that `+key=value` added to a typed node but its schema lacks, with the keys of the schema."""
    if not isinstance(node, DictConfig) or node._is_missing() or node._is_none():
        return
    schema = OmegaConf.get_type(node)
    if schema is not None and dataclasses.is_dataclass(schema):
        known = [path + f.name for f in dataclasses.fields(schema)]
        for key in node:
            if path + str(key) not in known:
                yield path + str(key), known
        for key in node:
            yield from _unknown_keys(node._get_node(key), f"{path}{key}.")
