"""The typed schema of a run's config, its cross-field checks, and error messages that say what to type.

Most fields are the very objects that run: a loss, a reference, label noise are dataclasses next to their code. Lightning's
own (trainer, loggers, callbacks) are `_target_` nodes, see targets.py. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import reduce
from operator import attrgetter, getitem
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dpo_lab.config.allowed_targets import FSDP2, check_targets, target_of
from dpo_lab.config.logger_packages import check_packages
from dpo_lab.config.precision import check_precision
from dpo_lab.config.trainer_arguments import advice, check_trainer
from dpo_lab.core.losses import LOSSES, Loss
from dpo_lab.core.noise import NOISES, LabelNoise
from dpo_lab.data.sources import TASKS, Data
from dpo_lab.evals.evaluate import Evals
from dpo_lab.models.policy import POLICIES, PolicyConfig, Pretrained, TinyPolicy
from dpo_lab.models.reference import REFERENCES, AdapterOff, Reference
from dpo_lab.runs import run_record
from dpo_lab.training.initial_policy import SFT
from dpo_lab.training.optim import Optim

PREFERENCE_KEYS = ("beta", "loss", "reference", "noise", "evals")  # settings without a say in supervised fine-tuning
ConfigErrors = (HydraException, OmegaConfBaseException, YAMLError)  # what Hydra raises before `main` is entered


class IfExists(str, Enum):
    """What happens where another run lies in the run's folder."""

    refuse = "refuse"
    restart = "restart"  # it is set aside, inside the folder


class ConfigError(Exception):
    """A setting that can't be; the message is one line that names the key and says what to type."""


@dataclass
class RunConfig:
    """One run. beta and seed stand at the root because everything is swept over them."""

    name: str = "dpo"
    beta: float = 0.1
    seed: int = 0
    threads: int | None = 1  # torch's intra-op threads a process; none: torch's own choice
    on_change: IfExists = IfExists.refuse
    figures: bool = True
    objective: str | None = None  # the metric that a sweeper which looks for the best run is told
    loss: Loss = MISSING
    reference: Reference = MISSING
    noise: LabelNoise = MISSING
    policy: PolicyConfig = MISSING
    sft: SFT = field(default_factory=SFT)
    data: Data = field(default_factory=lambda: Data(world=MISSING))
    optim: Optim = field(default_factory=Optim)
    evals: Evals = field(default_factory=Evals)
    trainer: dict[str, Any] = MISSING
    logger: dict[str, Any] = MISSING
    callbacks: dict[str, Any] = MISSING

    def __post_init__(self) -> None:
        if (wants := self.loss.wants_reference) not in (None, self.reference.starts_at_policy):
            loss = next(f"loss={name}" for name, kind in LOSSES.items() if kind is type(self.loss))
            says = "measures drift from the initial policy" if wants else "has no reference"
            raise ValueError(f"{loss} {says}; type {loss} reference={'cached' if wants else 'uniform'}")
        if isinstance(self.reference, AdapterOff):
            if not self.policy.has_adapters:
                raise ValueError(
                    "reference=adapter_off: the policy has no adapters; type policy=lora, or reference=cached"
                )
            if isinstance(self.policy, Pretrained) and self.policy.goes_on:
                raise ValueError(
                    "reference=adapter_off: without its trained adapters the policy is their base, not where training"
                    " starts; type reference=frozen (a frozen copy of the adapters) or reference=cached"
                )
            if target_of(self.trainer.get("strategy")) == FSDP2:
                raise ValueError(
                    "reference=adapter_off: a policy that is cut over the ranks makes one pass a micro-batch, not a"
                    " second one without adapters; type reference=cached, or trainer=ddp"
                )
        check_precision(self.trainer)
        for key, seed in (("seed", self.seed), ("noise.seed", self.noise.seed)):
            if not 0 <= seed < 2**32:
                raise ValueError(f"{key}={seed}: must lie in 0 to {2**32 - 1}; type e.g. {key}=0")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads={self.threads}: must be 1 or more; type e.g. threads=1")
        for node in (self.trainer, self.logger, self.callbacks):
            check_targets(node)
        check_packages(self.logger)
        check_trainer(self.trainer)

    @property
    def is_embedded(self) -> bool:
        """Whether the policy is the embedded one and the pairs are of a world: nothing is the user's."""
        return isinstance(self.policy, TinyPolicy) and self.data.is_world


@dataclass
class InspectConfig(RunConfig):
    """A run's settings, to look at its pairs. show: pairs that are printed token by token; page: a file to write, too."""

    show: int = 3
    page: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.show < 0:
            raise ValueError(f"show={self.show}: must be 0 or more; type e.g. show=3")
        if self.page is not None and Path(self.page).suffix not in (".html", ".png"):
            raise ValueError(f"page={self.page}: must end in .html or .png; type e.g. page=report.html")


# Groups whose choices are of different kinds, each with settings of its own.
KINDS: dict[str, dict[str, Any]] = {
    "loss": LOSSES,
    "reference": REFERENCES,
    "noise": NOISES,
    "policy": POLICIES,
    "data.world": TASKS,
}


def register() -> None:
    """Put the schemas where conf/*.yaml finds them, and the resolvers that run folders are named with."""
    store = ConfigStore.instance()
    store.store(name="run", group="schema", node=RunConfig)
    store.store(name="inspect", group="schema", node=InspectConfig)
    for group, schemas in KINDS.items():
        for name, schema in schemas.items():
            store.store(name=name, group=f"schema/{group.replace('.', '/')}", node=schema)
    OmegaConf.register_new_resolver("run_slug", run_record.slug, replace=True)
    OmegaConf.register_new_resolver("run_name", run_record.name_of_folder, replace=True)


def conf_dir() -> str:
    """The folder of YAML files: beside the package in a checkout, inside it when installed."""
    here = Path(__file__).resolve().parent.parent
    return str(next(c for c in (here / "conf", here.parent / "conf") if (c / "train.yaml").exists()))


def validate(cfg: DictConfig) -> RunConfig:
    """The composed config as the objects that run. Raises ConfigError for anything that can't be."""
    for key, known in _unknown_keys(cfg):
        raise ConfigError(f"unknown key '{key}'{_suggestion(key, known)}")
    try:
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    assert isinstance(config, RunConfig)
    return config


def as_record(cfg: DictConfig, config: RunConfig) -> dict[str, Any]:
    """The resolved config as plain values, with `kind` naming the loss, the reference, the policy: fields alone don't."""
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)  # type: ignore[assignment]
    for group, table in KINDS.items():
        chosen = attrgetter(group)(config)
        (kind,) = (name for name, schema in table.items() if type(chosen) is schema)
        *parents, leaf = group.split(".")
        node = reduce(getitem, parents, plain)
        node[leaf] = {"kind": kind, **node[leaf]}
    return plain


def sft_record(cfg: DictConfig, config: RunConfig) -> dict[str, Any]:
    """The same of supervised fine-tuning, without the settings that have no say there."""
    plain = {key: value for key, value in as_record(cfg, config).items() if key not in PREFERENCE_KEYS}
    if not isinstance(config.policy, TinyPolicy):
        plain["sft"] = {"text_column": config.sft.text_column}  # the rest is how the embedded policy is made
    return plain


def input_files(config: RunConfig) -> list[Path]:
    """The files of the user's that the run reads, as far as they lie on this machine."""
    return [*config.data.files(), *config.policy.files()]


def explain(error: Exception) -> str:
    """What Hydra or OmegaConf says in five lines, in one line that names the key and says what to type."""
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
    if isinstance(error, YAMLError):
        return f"a config file can't be read as YAML: {' '.join(text.split())}; mend it"
    if isinstance(error, OverrideParseException):
        return f"can't read '{error.override}': type key=value, quoted where the value holds commas, brackets or spaces"
    if found := re.search(r"To append to your default list use (\S+)", text):
        return f"{found[1].removeprefix('+')}: this group is added, not replaced; type {found[1]}"
    if found := re.search(r"Could not find 'hydra/launcher/(?:submitit_)?(\w+)'", text):
        extra = "slurm" if found[1] == "local" else found[1]
        return f"launcher={found[1]}: its package is not installed; type pip install 'dpo_lab[{extra}]'"
    if found := re.search(r"Could not find '([\w/@.]+)/([^']*)'", text):
        options = re.findall(r"^\t(\w+)$", text, re.M)
        return f"{found[1]}={found[2]}: no such choice; type {found[1]}= one of {', '.join(options)}"
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
            return f"{found[1]}: its entries are added to those that are there; type +{found[1]}=..."
        return f"unknown key '{found[1]}'{_suggestion(found[1], _known_keys())}"
    return " ".join(text.split())


def _full_key(text: str) -> str:
    found = re.search(r"full_key: (\S+)", text)
    return found[1] if found else "a key"


def _suggestion(key: str, known: list[str]) -> str:
    group, _, leaf = key.rpartition(".")
    schemas = KINDS.get(group, {}).items()
    owners = [f"{group}={name}" for name, schema in schemas if leaf in {f.name for f in dataclasses.fields(schema)}]
    if owners:
        return f" under this {group}; type {' or '.join(owners)} with it"
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f": did you mean '{close[0]}'? type {close[0]}=..." if close else "; --help lists the keys"


def _known_keys() -> list[str]:
    """Every dotted key of the schema, with those of every kind."""
    keys = list(_keys_of(RunConfig, ""))
    for group, schemas in KINDS.items():
        keys += [f"{group}.{f.name}" for schema in schemas.values() for f in dataclasses.fields(schema)]
    keys += [f"trainer.{key}" for key in OmegaConf.load(Path(conf_dir()) / "trainer" / "cpu.yaml")]
    return sorted(set(keys))


def _keys_of(schema: type, prefix: str) -> Iterator[str]:
    for spec in dataclasses.fields(schema):
        yield prefix + spec.name
        made = None if spec.default_factory is dataclasses.MISSING else spec.default_factory()
        if dataclasses.is_dataclass(made):
            yield from _keys_of(type(made), f"{prefix}{spec.name}.")


def _unknown_keys(node: Any, path: str = "") -> Iterator[tuple[str, list[str]]]:
    """Keys that `+key=value` smuggled into a typed node, with the keys that stand there."""
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
