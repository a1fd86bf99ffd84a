"""Overrides of a call, and the config that they compose, as on the command line."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict, read_write

from dpo_lab.cli.entry_point import load_plugins
from dpo_lab.cli.next_steps import quoted
from dpo_lab.config import from_run, reward_model, schema
from dpo_lab.config.allowed_targets import check_hydra
from dpo_lab.config.schema import ConfigError, ConfigErrors
from dpo_lab.runs import run_record

Overrides = Sequence[str] | Mapping[str, Any]

for register in (schema.register, from_run.register, reward_model.register):
    register()


def without_plugins(overrides: Overrides, *, swept: bool = False) -> list[str]:
    """Load the plugins that overrides name, `plugins=[my_lab,./my_losses.py]`, and return the others as they are typed.

    Plugins stay loaded for as long as the process lives, and are part of its further runs.
    """
    return load_plugins(as_typed(overrides, swept=swept))


def as_typed(overrides: Overrides, *, swept: bool = False) -> list[str]:
    """Return overrides as they are typed on a command line.

    overrides: as typed, `["beta=0.3", "loss=ipo"]`; or a mapping, whose keys may be nested, `{"beta": 0.3, "optim":
    {"lr": 1e-4}}`. swept: a list in a mapping holds the values of a sweep, otherwise it is the value.
    """
    if isinstance(overrides, str):
        return [overrides]
    if not isinstance(overrides, Mapping):
        return list(map(str, overrides))
    words: list[str] = []
    for key, value in overrides.items():
        if isinstance(value, Mapping) and not key.startswith("+"):
            words += as_typed({f"{key}.{inner}": each for inner, each in value.items()}, swept=swept)
        elif swept and isinstance(value, list | tuple):
            words.append(f"{key}={','.join(map(_text, value))}")
        else:
            words.append(f"{key}={_text(value)}")
    return words


def _text(value: Any) -> str:
    """Return a value as Hydra reads it."""
    match value:
        case None:
            return "null"
        case Enum():
            return quoted(str(value.value))
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case Mapping():
            return f"{{{', '.join(f'{key}: {_text(each)}' for key, each in value.items())}}}"
        case list() | tuple():
            return f"[{','.join(map(_text, value))}]"
    return quoted(str(value))


@contextmanager
def composed(config_name: str, overrides: Sequence[str]) -> Iterator[tuple[DictConfig, Path]]:
    """Compose a command's config, and yield it and the folder of its run. Inside the context the config is Hydra's.

    config_name: of its file in conf/. Raises ConfigError for overrides that can't be composed.
    """
    singleton = HydraConfig.instance()
    before = singleton.cfg
    try:
        cfg, folder = _compose(singleton, config_name, overrides)
        yield cfg, folder
    finally:
        singleton.cfg = before


def _compose(singleton: HydraConfig, config_name: str, overrides: Sequence[str]) -> tuple[DictConfig, Path]:
    try:
        with initialize_config_dir(schema.conf_dir(), version_base="1.3"):
            cfg = compose(config_name, list(overrides), return_hydra_config=True)
        check_hydra(cfg.hydra)
        singleton.set_config(cfg)
        folder = str(cfg.hydra.run.dir)
        with read_write(cfg.hydra), open_dict(cfg.hydra):
            cfg.hydra.runtime.output_dir = os.path.abspath(folder)
        singleton.set_config(cfg)
        settings = copy.deepcopy(cfg)
        with read_write(settings), open_dict(settings):
            del settings["hydra"]
    except ConfigErrors as error:
        if found := re.search(r"Ambiguous value for argument '(.*?)'", str(error)):
            raise ConfigError(f"{found[1]}: several values; type api.sweep([...]), or one value") from None
        raise ConfigError(schema.explain(error)) from None
    run_record.refuse_outside(Path(folder))
    return settings, Path(os.path.relpath(folder))
