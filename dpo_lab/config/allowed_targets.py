"""The classes that a config may instantiate: an allow-list, checked by name before anything is imported, then by
object.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from hydra.core.plugins import Plugins
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_lab import plugins
from dpo_lab.config import lightning_targets
from dpo_lab.errors import LabError

T = TypeVar("T")


class TargetRefused(LabError, ValueError):
    """A config names a class that it may not instantiate; the message names key and value and says what to type."""


FSDP2 = "dpo_lab.training.strategies.fsdp.FSDP2Strategy"  # shards the policy over ranks

# The classes that a run's config may instantiate, by full name, besides the callbacks that plugins register. Other
# objects are built from dataclasses.
ALLOWED = frozenset(
    {
        "dpo_lab.training.callbacks.progress_bar.ProgressBar",
        "dpo_lab.training.callbacks.early_stopping.EarlyStopping",
        "dpo_lab.training.callbacks.health.Health",
        "dpo_lab.training.callbacks.checkpointing.Checkpointing",
        FSDP2,
        "lightning.pytorch.Trainer",
        *lightning_targets.names(),
    }
)
OWNERS = ("dpo_lab.", "lightning.")  # packages in which those classes are defined
OURS = frozenset(f"hydra_plugins.dpo_lab.{name}" for name in ("JobSweeper", "StudySweeper", "RayLauncher"))
SAMPLERS = re.compile(r"optuna\.samplers\.\w+Sampler")  # a setting of Optuna's sweeper, below hydra.sweeper
# Other keys that Hydra interprets; no config of this package has them.
SPECIAL = ("_args_", "_partial_", "_recursive_", "_convert_")
NUMBERED = re.compile(r"\$\{\s*\.*(hydra\s*[.:]\s*)?job\.(num|id)\b")  # an interpolation of a job's number or id
# The two configs of logging, and the keys in them that create no object.
LOGGING, LOGGING_KEYS = ("job_logging", "hydra_logging"), ("version", "disable_existing_loggers", "incremental")
# The environment variables that a config may set: those of computing. Others decide which code is loaded.
ENVIRONMENT = frozenset(
    "CUDA_VISIBLE_DEVICES GLOO_SOCKET_IFNAME HF_HUB_OFFLINE MKL_NUM_THREADS NCCL_DEBUG NCCL_IB_DISABLE NCCL_P2P_DISABLE"
    " NCCL_SOCKET_IFNAME OMP_NUM_THREADS TOKENIZERS_PARALLELISM TORCH_DISTRIBUTED_DEBUG WANDB_MODE".split()
)


def target_of(node: Any) -> Any:
    """Return the `_target_` of a config node; None if it has none or is no mapping."""
    return node.get("_target_") if isinstance(node, (dict, DictConfig)) else None


def is_sharded(trainer: Any) -> bool:
    """Return whether the settings of a trainer shard models over ranks."""
    return target_of(trainer.get("strategy")) == FSDP2


def check_targets(node: Any) -> None:
    """Raise TargetRefused if a `_target_` at any depth of the resolved config is neither in ALLOWED nor a plugin's
    callback.
    """
    of_plugins = _of_plugins()
    for _, inner in _nodes(node):
        target = inner.get("_target_")
        if target is not None and target not in ALLOWED and target not in of_plugins:
            if reason := lightning_targets.reason(str(target)):
                raise TargetRefused(f"_target_={target}: {reason}")
            near = difflib.get_close_matches(str(target), ALLOWED, n=1, cutoff=0)
            raise TargetRefused(
                f"_target_={target}: not among the classes that a config may name; the nearest is {near[0]}"
            )
        for key in SPECIAL:
            if target is not None and key in inner:
                raise TargetRefused(
                    f"{key}={inner[key]} under _target_={target}: a config may only give settings by name"
                )


def instantiate_checked(node: Mapping[str, Any], kind: type[T], **settings: Any) -> T:
    """Instantiate a config node after checking its targets by name and, once imported, by class.

    Raises TargetRefused if a name is not allowed or resolves to a class that is not a `kind` of this package or
    Lightning, and whatever Hydra's `instantiate` raises.
    """
    check_targets(node)
    for path, inner in _nodes(node):
        if target := inner.get("_target_"):
            found: Any = get_class(target)
            is_known = target in _of_plugins() or f"{found.__module__}.".startswith(OWNERS)
            if not is_known or not (path or issubclass(found, kind)):
                what = f"{found.__module__}.{found.__qualname__}"
                raise TargetRefused(
                    f"_target_={target}: resolves to {what}, which is no {kind.__name__} of dpo_lab or Lightning"
                )
    return instantiate(node, **settings)


def _of_plugins() -> set[str]:
    """Return the full names of the classes that plugins registered as callbacks."""
    return {node["_target_"] for node in plugins.callbacks().values()}


def check_hydra(hydra: Any) -> None:
    """Raise TargetRefused if the `hydra` node of a composed config sets what it may not.

    Hydra instantiates what this node names: callbacks, logging, a launcher and a sweeper.
    """
    if hydra.job.get("chdir"):
        raise TargetRefused(
            "hydra.job.chdir=true: paths are relative to the folder where the command is typed, and a run's results go"
            " to its own folder anyway; type hydra.job.chdir=false, or leave it out"
        )
    overrides: Any = OmegaConf.to_container(hydra.overrides, resolve=False)
    names, _ = plugins.take([*overrides["task"], *overrides["hydra"]])
    if names:  # they were taken out of what was typed
        raise TargetRefused(
            f"hydra.overrides: a config names the plugin {names[0]}; plugins are typed, so leave it out"
        )
    of_sweeps = ("sweep.dir", "sweep.subdir") if target_of(hydra.get("sweeper")) in OURS else ()
    for key in ("run.dir", *of_sweeps):
        group, leaf = key.split(".")
        if NUMBERED.search(str(hydra[group]._get_node(leaf))):
            raise TargetRefused(
                f"hydra.{key}: a job's number or id is not known before it starts and changes with the sweep, so the"
                " same command would not find its runs again; leave it out: folders are named by their overrides"
            )
    logs = [f"{log}.{key}" for log in LOGGING for key in hydra.get(log) or () if key not in LOGGING_KEYS]
    for key in ("callbacks", *logs):
        if OmegaConf.select(hydra, key):
            raise TargetRefused(f"hydra.{key}: a config may give Hydra no callback and no log file; leave it out")
    for name in hydra.job.get("env_set") or {}:
        if name not in ENVIRONMENT:
            known = ", ".join(sorted(ENVIRONMENT))
            raise TargetRefused(
                f"hydra.job.env_set.{name}: a config may set {known}; type it before the command instead"
            )
    for key in hydra.sweeper.get("params") or {}:
        if str(key).lstrip("+~").startswith("hydra"):
            raise TargetRefused(f"hydra.sweeper.params: {key} can't be swept; type it with one value instead")
    installed = Plugins.instance().class_name_to_class
    for key in ("launcher", "sweeper"):
        for path, node in _nodes(hydra.get(key), f"hydra.{key}"):
            target = node.get("_target_")
            is_plugin = path == f"hydra.{key}" and (target in OURS or target in installed)
            if target is not None and not is_plugin and not SAMPLERS.fullmatch(str(target)):
                raise TargetRefused(
                    f"{path}._target_={target}: not an installed {key}; leave it out, or type launcher=local"
                )


def _nodes(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every mapping in a config with its dotted path. Raise TargetRefused for a value that can't be resolved."""
    if isinstance(node, (dict, DictConfig)):
        yield path, node
        for key in node:
            at = f"{path}.{key}" if path else str(key)
            yield from _nodes(_value(node, key, at), at)
    elif isinstance(node, (list, tuple, ListConfig)):
        for key in range(len(node)):
            yield from _nodes(_value(node, key, f"{path}[{key}]"), f"{path}[{key}]")


def _value(node: Any, key: Any, path: str) -> Any:
    if isinstance(node, (DictConfig, ListConfig)) and OmegaConf.is_missing(node, key):
        return None
    try:
        return node[key]
    except OmegaConfBaseException as error:
        raise TargetRefused(f"{path}: can't be resolved ({' '.join(str(error).split())}); type its value") from None
