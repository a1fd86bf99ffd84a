"""Checks of rows, devices and reward models that depend on the method."""

from __future__ import annotations

import pytest

from dpo_lab.config.schema import ConfigError, validate
from dpo_lab.pipelines import reward_inputs
from dpo_lab.pipelines.setup import make_trainer
from tests.data.test_prompts_alone import PAIR, checked, splits_of
from tests.support.configs import composed, recorded, settled


def test_a_method_without_a_loss_of_pairs_names_no_loss_for_single_responses(tmp_path, monkeypatch):
    rows = [PAIR] * 40 + [{"prompt": "why", "completion": "so", "label": True}]
    splits = splits_of(rows, tmp_path, monkeypatch)
    with pytest.raises(
        ConfigError, match=r"method=rloo: it takes prompts.* and .*rows.jsonl:41 is .*; type data.path="
    ):
        checked(splits, "method=rloo")
    with pytest.raises(ConfigError, match="type loss=bco or loss=kto"):
        checked(splits)


def test_errors_of_the_reward_model_that_a_run_trains_name_the_settings_of_the_run(monkeypatch):
    def refuse(*args, **settings):
        raise ConfigError("data.batch_size=16: only 3 training pairs; type data.batch_size=3, or a lower optim.lr")

    monkeypatch.setattr(reward_inputs, "train_reward", refuse)
    cfg = composed("method=rloo")
    with pytest.raises(ConfigError, match="^reward.batch_size=16: .* type reward.batch_size=3, or a lower reward.lr$"):
        reward_inputs.ensure_reward_model(cfg, validate(cfg))


def test_the_batch_of_given_pairs_does_not_limit_the_devices_of_a_method_that_samples(tmp_path):
    two = ("trainer=ddp_cpu", "trainer.devices=2", "data.batch_size=1")
    with pytest.raises(ConfigError, match=r"data.batch_size=1: 2 devices need a pair each .* type data.batch_size=2"):
        make_trainer(settled(*two), recorded(*two), tmp_path)
    make_trainer(settled(*two, "method=rloo"), recorded(*two, "method=rloo"), tmp_path)
