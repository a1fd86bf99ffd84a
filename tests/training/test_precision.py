"""Precision: what is refused, unscaling before clipping, float32 masters of 16-bit weights, metric state that is exact."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from dpo_lab.config import precision
from dpo_lab.config.allowed_targets import FSDP2
from dpo_lab.config.schema import ConfigError, validate
from dpo_lab.core.losses import DPO
from dpo_lab.core.metrics import PreferenceMetrics, Values
from dpo_lab.models.policy import Dtype, Pretrained, TinyPolicy
from dpo_lab.pipelines import setup
from dpo_lab.training.master_weights import MasterAdamW, moved_weights
from dpo_lab.training.optim import Optim
from dpo_lab.training.sft_module import TokenLoss
from tests.core.test_metrics import BATCH, POLICY, REFERENCE
from tests.support import small_fit
from tests.support.configs import composed, settled
from tests.support.fits import Seen, flat, initial_policy, make_data, make_module, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore::FutureWarning:lightning")


CPU, GPU = {"accelerator": "cpu"}, {"accelerator": "gpu"}
FSDP = GPU | {"strategy": {"_target_": FSDP2}}


@pytest.mark.parametrize(
    ("trainer", "asked", "remedy"),
    [
        (CPU, "bf16-true", "bf16-mixed"),
        (GPU, "16-true", "bf16-mixed"),
        (GPU, "transformer-engine", "bf16-mixed"),
        (CPU, 64, "32-true"),
        (CPU, "16-mixed", "bf16-mixed"),
        (CPU, 16, "bf16-mixed"),
        (FSDP, "16-mixed", "bf16-mixed"),
    ],
)
def test_a_precision_that_would_train_something_else_is_refused(trainer, asked, remedy):
    with pytest.raises(ValueError, match=rf"^trainer\.precision=.*; type trainer\.precision={remedy}") as refused:
        precision.check_precision(trainer | {"precision": asked})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("trainer", "asked"), [(CPU, "bf16"), (GPU, "16-mixed"), (FSDP, "bf16-mixed"), (CPU, None)])
def test_other_precisions_are_taken(trainer, asked):
    precision.check_precision(trainer | {"precision": asked})


def test_a_config_with_such_a_precision_is_refused():
    with pytest.raises(ConfigError, match="bf16-true: weights would be converted"):
        settled("trainer.precision=bf16-true")


@pytest.mark.filterwarnings("ignore:You passed .*AMP with fp16 is not supported on CPU")
def test_a_precision_that_the_device_found_does_not_have_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = composed("trainer.accelerator=auto", "trainer.precision=16-mixed")
    config = validate(cfg)
    with pytest.raises(ConfigError, match=r"16-mixed: .*computes in bf16-mixed; type trainer.precision=bf16-mixed"):
        setup.make_trainer(config, {"trainer": dict(config.trainer), "callbacks": {}}, tmp_path)


def in_half_precision(folder, max_grad_norm: float, scaler: torch.amp.GradScaler | None, steps: int = 1):
    """Fit under float16 with the loss scaled, or in float32; gives the clipped gradient of the first step and the weights."""
    module, seen = make_module(initial_policy().model, folder, steps), Seen()
    module.optim = replace(module.optim, max_grad_norm=max_grad_norm)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scaler else []
    trainer = make_trainer(steps, plugins=plugins, callbacks=[seen])
    trainer.fit(module, datamodule=make_data())
    assert seen.gradient is not None
    return seen.gradient, flat(module.model.parameters())


def test_a_scaled_loss_is_clipped_by_the_norm_of_its_true_gradient(tmp_path):
    expected, trained = in_half_precision(tmp_path, 0.1, None)
    gradient, weights = in_half_precision(tmp_path, 0.1, torch.amp.GradScaler("cpu", init_scale=2.0**12))
    assert [gradient.norm().item(), expected.norm().item()] == pytest.approx([0.1, 0.1], rel=1e-3)
    assert (gradient - expected).norm() < 0.02 * expected.norm()
    start = flat(initial_policy().model.parameters())
    assert (weights - start).norm().item() == pytest.approx((trained - start).norm().item(), rel=0.05)


def test_a_step_whose_scaled_gradient_overflows_is_left_out(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    _, weights = in_half_precision(tmp_path, 1.0, scaler)
    assert torch.equal(weights, flat(initial_policy().model.parameters()))
    assert scaler.get_scale() == 2.0**39


def test_master_weights_are_adamw_in_float32():
    """The same gradients give the same weights to the last bit, rounded once; and what is too small for bf16 adds up."""
    torch.manual_seed(0)
    short = nn.Parameter((0.5 + torch.rand(40, 8) / 2).bfloat16())  # 1/256 lies between two neighbours
    start, full = short.detach().clone(), nn.Parameter(short.detach().float())
    optim = Optim(lr=1e-4, weight_decay=0.1, warmup_steps=3)
    (of_short, one), (of_full, other) = (optim.build([p], 60) for p in (short, full))
    for _ in range(60):
        short.grad = (1 + 0.3 * torch.randn(40, 8)).bfloat16()
        full.grad = short.grad.float()
        before = full.detach().clone()
        for thing in (of_short, of_full, one, other):
            thing.step()
        assert torch.equal(start + (full - before).bfloat16(), start)  # each update alone is lost
        assert torch.equal(of_short.state[short]["master"], full)
        assert torch.equal(short, full.bfloat16())
    assert type(of_short) is MasterAdamW
    assert type(of_full) is torch.optim.AdamW
    assert (short < start).float().mean() > 0.9


def test_weights_of_both_kinds_train_side_by_side():
    long, short = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer, _ = Optim(lr=1e-2, warmup_steps=0).build([long, short], 10)
    for weight in (long, short):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert set(optimizer.state[long]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(optimizer.state[short]) == {"step", "exp_avg", "exp_avg_sq", "master"}
    assert (long == 0.99).all()
    assert torch.equal(short, torch.full((4,), 0.99).bfloat16())


class InBfloat16(small_fit.Noisy):
    """Weights kept in bfloat16."""

    def __init__(self, model, *arguments, **settings) -> None:
        super().__init__(model.to(torch.bfloat16), *arguments, **settings)


@pytest.mark.filterwarnings(*small_fit.IGNORED)
def test_bf16_weights_go_on_bit_by_bit(tmp_path):
    small_fit.run(tmp_path / "whole", kind=InBfloat16)
    small_fit.cut(tmp_path / "cut", 4, kind=InBfloat16)
    small_fit.run(tmp_path / "cut", kind=InBfloat16)
    whole, cut = (small_fit.left(tmp_path / name) for name in ("whole", "cut"))
    assert small_fit.difference(whole, cut) is None
    states = cut["optimizer_states"][0]["state"].values()
    assert {value.dtype for state in states for value in state.values()} == {torch.float32}
    assert all("master" in state for state in states)


def test_the_share_of_weights_that_moved_is_counted():
    initial = initial_policy().model
    assert moved_weights(copy.deepcopy(initial), initial) is None  # float32 keeps every update
    initial.to(torch.bfloat16)  # type: ignore[arg-type]
    trained = copy.deepcopy(initial)
    still = moved_weights(trained, initial)
    assert still is not None
    assert (still["moved"], still["share"], still["dtype"]) == (0, 0, "bfloat16")
    with torch.no_grad():
        trained.lm_head.weight += 1
    moved = moved_weights(trained, initial)
    assert moved is not None
    assert moved["trained"] == initial.num_parameters()
    assert moved["share"] == initial.lm_head.weight.numel() / initial.num_parameters()


def figures(cast) -> list:
    """What all metrics come to that are cast between two updates."""
    metrics, margins, tokens = PreferenceMetrics(), Values(), TokenLoss()
    module = nn.ModuleList([metrics, margins, tokens])
    for number in range(40):
        if number in (0, 20):
            cast(module)
        metrics.update(DPO(0.5), DPO(0.5)(POLICY, REFERENCE), POLICY, REFERENCE, BATCH)
        margins.update(POLICY.margin + number / 7)
        tokens.update(POLICY.chosen.sum(), BATCH)
    return [metrics.compute(), margins.compute().tolist(), tokens.compute()]


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float16),
        lambda module: module.half(),
        lambda module: module.type(torch.float32),
        lambda module: [metric.set_dtype(torch.float16) for metric in module],
    ],
)
def test_metric_state_is_exact_whatever_the_module_is_cast_to(cast):
    assert figures(cast) == figures(lambda module: None)


def trainer_on(device: str, computes: str) -> Any:
    plugin, strategy = SimpleNamespace(precision=computes), SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(precision_plugin=plugin, strategy=strategy)


@pytest.mark.parametrize(
    ("computes", "policy", "factor", "warned"),
    [
        ("bf16-mixed", TinyPolicy(), 17.3, True),
        ("32-true", Pretrained(path="x", dtype=Dtype.bfloat16), 4.0, True),
        ("bf16-mixed", TinyPolicy(), 0.6, False),
    ],
)
def test_a_cpu_that_is_slow_at_bf16_says_so(computes, policy, factor, warned, monkeypatch, caplog):
    monkeypatch.setattr(precision, "bf16_slowdown", lambda: factor)
    precision.warn_of_slow_bf16(trainer_on("cpu", computes), policy)
    assert (f"takes {factor} times as long as in float32" in caplog.text) == bool(caplog.text) == warned


def test_no_trial_is_made_where_nothing_computes_in_bf16_on_a_cpu(monkeypatch):
    monkeypatch.setattr(precision, "bf16_slowdown", None)  # any trial would fail
    precision.warn_of_slow_bf16(trainer_on("cpu", "32-true"), TinyPolicy())
    precision.warn_of_slow_bf16(trainer_on("cuda", "bf16-mixed"), TinyPolicy())


def test_a_trial_gives_a_factor():
    assert 0 < precision.bf16_slowdown() < float("inf")
