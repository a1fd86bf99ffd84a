"""Health of rollouts: each rule finds what it is for in a log made for it, and is silent on a healthy one."""

from __future__ import annotations

import pytest

from dpo_lab.health.diagnose import findings

RECORD = {
    "config": {
        "method": {"kind": "ppo", "prompts": 32, "samples": 4, "minibatches": 2, "epochs": 2},
        "data": {"batch_size": 32},
        "trainer": {"max_steps": 100},
        "optim": {"lr": 3e-4, "warmup_steps": 20},
        "loss": {"kind": "dpo"},
        "reference": {"kind": "cached"},
    },
    "data": {"train pairs": 100, "held-out pairs": 50},
    "loss_traits": None,
    "step_zero_loss": None,
}
HEALTHY = {
    "ratio/clipped": [0.1] * 10,
    "critic/explained": [i / 20 for i in range(10)],
    "rollout/reward": [i / 10 for i in range(10)],
    "rollout/gold": [i / 20 for i in range(10)],
    "rollout/kl": [i / 2 for i in range(10)],
    "rollout/entropy": [1.6 - i / 20 for i in range(10)],
}


def found(**changed) -> dict[str, str]:
    """The findings on a log of ten rows, by name."""
    columns = HEALTHY | {name.replace("_", "/", 1): values for name, values in changed.items()}
    rows = [
        {"step": 10 * (i + 1), **{f"train/{name}": values[i] for name, values in columns.items()}} for i in range(10)
    ]
    return {finding.name: str(finding) for finding in findings(RECORD, rows)}


@pytest.mark.parametrize(("low", "speaks"), [(0.48, True), (0.52, False)])
@pytest.mark.parametrize("known", ["accuracy", "true_accuracy"])
def test_a_reward_model_at_chance_is_told_by_the_run_that_follows_it(known, low, speaks):
    metrics = {"accuracy": {"value": 0.7, "interval": [0.6, 0.8]}} | {known: {"value": 0.55, "interval": [low, 0.6]}}
    told = findings(RECORD | {"reward_model": {"weights": "a", "metrics": metrics}}, [])
    assert [finding.name for finding in told] == ["reward model at chance"] * speaks


def test_a_healthy_run_has_no_findings():
    assert found() == {}


@pytest.mark.parametrize(
    ("name", "changed", "part"),
    [
        (
            "reward over-optimised",
            {"rollout_gold": [0, 1, 2, 3, 4, 4, 3, 2, 1, 1]},
            "was 4.00 around step 60 and is 1.00 now",
        ),
        ("KL running away", {"rollout_kl": [4 * i for i in range(10)]}, "36.0 nats from the reference at step 100"),
        ("entropy collapsed", {"rollout_entropy": [1.6 / (i + 1) for i in range(10)]}, "0.16 nats at step 100"),
        ("ratios clipped", {"ratio_clipped": [0.1] * 5 + [0.4, 0.5] + [0.1] * 3}, "up to 40 %"),
        ("critic explains nothing", {"critic_explained": [0.01] * 10}, "explains 1 %"),
        ("diverging", {"rollout_reward": [float("nan")] * 10}, "rollout/reward is nan at step 10"),
    ],
)
def test_what_goes_wrong_is_found(name, changed, part):
    assert part in found(**changed)[name]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"rollout_gold": [0, 1, 2, 3, 4, 4, 4, 4, 3.9, 3.8]}, "a fall within what one sees without one"),
        (
            {"rollout_gold": [0, 1, 2, 3, 4, 4, 3, 2, 1, 1], "rollout_reward": [0, 1, 2, 3, 4, 4, 3, 2, 1, 1]},
            "both fell",
        ),
        ({"rollout_kl": [40] * 10}, "far away, but no further"),
        ({"ratio_clipped": [0.1] * 5 + [0.9] + [0.1] * 4}, "one row"),
        ({"critic_explained": [0.01] * 8 + [0.3, 0.3]}, "it explains something in the end"),
    ],
)
def test_what_is_not_sure_is_not_reported(changed, why):
    assert found(**changed) == {}, why
