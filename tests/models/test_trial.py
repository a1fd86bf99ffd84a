"""The trial of forward paths: kept by fingerprint, applied without another trial, tried where passes run."""

from __future__ import annotations

import copy
from dataclasses import asdict

import pytest
import torch

from dpo_lab.models import trial
from dpo_lab.models.forward import forward_name, response_logps
from dpo_lab.models.paths import ForwardPath, apply_path, path_of
from dpo_lab.models.trial import path_for, try_paths
from tests.support.architectures import CACHED, made
from tests.support.path_table import batch


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def test_a_trial_is_made_once_for_a_model_a_device_and_a_dtype(tmp_path, monkeypatch):
    made_for = []
    monkeypatch.setattr(trial, "try_paths", lambda model: made_for.append(model) or try_paths(model))
    model, other = made(*CACHED["Llama"]), made(*CACHED["Llama"], seed=1)
    first = path_for(model, tmp_path)
    assert path_for(copy.deepcopy(model), tmp_path) == first
    assert len(made_for) == 1
    path_for(other, tmp_path)
    path_for(model, tmp_path, context=bf16)
    assert len(made_for) == 3
    assert path_for(model, tmp_path, context=bf16).shares_prompts


def test_a_path_is_plain_values_that_another_process_can_apply():
    model = made(*CACHED["Cohere"])
    found = try_paths(model)
    copied = copy.deepcopy(model)
    apply_path(copied, ForwardPath(**asdict(found)))
    assert path_of(copied) == found
    assert forward_name(copied) == "shared prompt"
    with torch.no_grad():
        torch.testing.assert_close(response_logps(copied, *batch()), response_logps(model, *batch()))


@pytest.mark.parametrize("name", ["Llama", "Mistral, window", "Qwen3 MoE"])
def test_a_model_whose_attention_is_wrong_over_streams_takes_padded_rows(name, monkeypatch):
    """Also by a little: a window that is one token shorter."""
    model = made(*CACHED[name], scale=3.0)
    real = trial.shared_prompt_attention
    seen = {"sliding_window": 3} if name == "Mistral, window" else {"scaling": 0.3}
    monkeypatch.setattr(trial, "shared_prompt_attention", lambda *args, **how: real(*args, **(how | seen)))
    path = try_paths(model)
    assert not path.shares_prompts
    assert "differ by" in path.why
    assert path.vocabulary is not None


def test_an_error_in_a_trial_is_its_reason(monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("of a kernel")

    monkeypatch.setattr(trial, "shared_prompt_attention", fail)
    model = made(*CACHED["Llama"])
    path = try_paths(model)
    assert not path.shares_prompts
    assert "ZeroDivisionError: of a kernel" in path.why
    assert model.config._attn_implementation == "sdpa"
