"""Configs composed in this process, as the commands compose them."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dpo_lab.config import from_run, inspection, reward_model, schema
from tests.conftest import REPOSITORY

CONF = REPOSITORY / "conf"
schema.register()
from_run.register()
reward_model.register()
inspection.register()


def composed(*overrides: str, name: str = "train") -> DictConfig:
    return deepcopy(_composed(name, overrides))


@lru_cache(maxsize=256)
def _composed(name: str, overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))


def settled(*overrides: str) -> schema.RunConfig:
    return schema.validate(composed(*overrides))


def recorded(*overrides: str) -> dict:
    cfg = composed(*overrides)
    return schema.as_record(cfg, schema.validate(cfg))
