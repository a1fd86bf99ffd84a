"""The classes that a config may instantiate: an allow-list, checked by name before anything is imported, then by
object.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.plugins import Plugins
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


class TargetRefused(ValueError):
    """A config names something to be made that it may not; the message names key and value and says what to type."""


FSDP2 = "dpo_lab.training.strategies.fsdp.FSDP2Strategy"  # shards the policy over ranks

# What a run's config may instantiate, by the one name that is taken. All else of ours is built from dataclasses.
ALLOWED = frozenset(
    {
        "dpo_lab.training.callbacks.progress_bar.ProgressBar",
        "dpo_lab.training.callbacks.early_stopping.EarlyStopping",
        "dpo_lab.training.callbacks.health.Health",
        "dpo_lab.training.callbacks.checkpointing.Checkpointing",
        FSDP2,
        "lightning.pytorch.Trainer",
        "lightning.pytorch.callbacks.LearningRateMonitor",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.loggers.CSVLogger",
        "lightning.pytorch.loggers.MLFlowLogger",
        "lightning.pytorch.loggers.TensorBoardLogger",
        "lightning.pytorch.loggers.WandbLogger",
        "lightning.pytorch.strategies.DDPStrategy",
    }
)
OWNERS = ("dpo_lab.", "lightning.")  # of the modules that those classes are defined in
OURS = frozenset(f"hydra_plugins.dpo_lab.{name}" for name in ("CellSweeper", "StudySweeper", "RayLauncher"))
SAMPLERS = re.compile(r"optuna\.samplers\.\w+Sampler")  # what Optuna's sweeper is told, below hydra.sweeper
SPECIAL = ("_args_", "_partial_", "_recursive_", "_convert_")  # what else Hydra reads of a node; no config of ours does
NUMBERED = re.compile(r"\$\{\s*\.*(hydra\s*[.:]\s*)?job\.(num|id)\b")  # an interpolation of a job's number or id
# What a config may set of the environment: names that decide how it computes; others decide which code is loaded.
ENVIRONMENT = frozenset(
    "CUDA_VISIBLE_DEVICES GLOO_SOCKET_IFNAME HF_HUB_OFFLINE MKL_NUM_THREADS NCCL_DEBUG NCCL_IB_DISABLE NCCL_P2P_DISABLE"
    " NCCL_SOCKET_IFNAME OMP_NUM_THREADS TOKENIZERS_PARALLELISM TORCH_DISTRIBUTED_DEBUG WANDB_MODE".split()
)


def target_of(node: Any) -> Any:
    return node.get("_target_") if isinstance(node, (dict, DictConfig)) else None


def check_targets(node: Any) -> None:
    """Refuse any `_target_` that is not on the list, at any depth of the resolved config. Raises TargetRefused."""
    for _, inner in _nodes(node):
        target = inner.get("_target_")
        if target is not None and target not in ALLOWED:
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
    """The object that a node of a checked config names, of a class that is what its name on the list says.

    Raises TargetRefused where the name leads to anything else, and what Hydra's instantiate does.
    """
    check_targets(node)
    for path, inner in _nodes(node):
        if target := inner.get("_target_"):
            found: Any = get_class(target)
            if not f"{found.__module__}.".startswith(OWNERS) or not (path or issubclass(found, kind)):
                what = f"{found.__module__}.{found.__qualname__}"
                raise TargetRefused(
                    f"_target_={target}: leads to {what}, which is no {kind.__name__} of ours or Lightning's"
                )
    return instantiate(node, **settings)


@contextmanager
def only_plugins() -> Iterator[None]:
    """Inside it Hydra composes no config whose `hydra` node names more than an installed launcher and sweeper.

    Hydra makes those, and its callbacks and logging, before a run's own config is validated. There is no hook in between; its
    loader of configs is the one place that all of them pass. Raises TargetRefused.
    """
    real: Callable[..., DictConfig] = ConfigLoaderImpl.load_configuration

    def load(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
        cfg = real(self, *args, **kwargs)
        _check_hydra(cfg)
        return cfg

    ConfigLoaderImpl.load_configuration = load  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = real  # type: ignore[method-assign]


def _check_hydra(cfg: DictConfig) -> None:
    hydra = cfg.get("hydra")
    if hydra is None:
        return
    if hydra.job.get("chdir"):
        raise TargetRefused(
            "hydra.job.chdir=true: paths are those of the folder where the command is typed, and a run's results go to its"
            " own folder without it; type hydra.job.chdir=false, or leave it out"
        )
    of_sweeps = ("sweep.dir", "sweep.subdir") if target_of(hydra.get("sweeper")) in OURS else ()
    for key in ("run.dir", *of_sweeps):
        group, leaf = key.split(".")
        if NUMBERED.search(str(hydra[group]._get_node(leaf))):
            raise TargetRefused(
                f"hydra.{key}: a job's number or id is not known before it starts and changes with the sweep, so the same"
                " command would not find its runs again; leave it out, and a folder is named by its overrides"
            )
    for key in ("callbacks", "job_logging.handlers", "hydra_logging.handlers"):
        if OmegaConf.select(hydra, key):
            raise TargetRefused(f"hydra.{key}: Hydra is given nothing to call and no file to log to; leave it out")
    for name in hydra.job.get("env_set") or {}:
        if name not in ENVIRONMENT:
            known = ", ".join(sorted(ENVIRONMENT))
            raise TargetRefused(
                f"hydra.job.env_set.{name}: a config may set {known}; type it before the command instead"
            )
    installed = Plugins.instance().class_name_to_class
    for key in ("launcher", "sweeper"):
        for path, node in _nodes(hydra.get(key), f"hydra.{key}"):
            target = node.get("_target_")
            is_plugin = path == f"hydra.{key}" and (target in OURS or target in installed)
            if target is not None and not is_plugin and not SAMPLERS.fullmatch(str(target)):
                raise TargetRefused(
                    f"{path}._target_={target}: no {key} that is installed; leave it out, or type launcher=local"
                )


def _nodes(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every mapping in a config with its dotted path. Raises TargetRefused for a value that can't be known yet."""
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
