"""Runs of online methods as a user types them: on the task, on files with adapters, killed and gone on with, refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from tests.conftest import SMALL
from tests.pipelines.test_cuda_runs import QUIET, make_shop, record_of
from tests.support import warm

pytestmark = pytest.mark.slow

ONLINE = [*SMALL, "method.prompts=4", "method.samples=2", "evals.num_train_pairs=8", "logger={}"]


def folder_of(workshop: Path, name: str) -> Path:
    return next((workshop / "outputs" / name).glob("*/seed=0"))


def charts_of(folder: Path) -> dict[str, list[str]]:
    """The charts of several curves in TensorBoard: group/title -> names of scalars."""
    events = EventAccumulator(str(folder)).Reload()
    (layout,) = events.Tensors("custom_scalars__config__")
    return {
        f"{group.title}/{chart.title}": [tag.removesuffix("$") for tag in chart.multiline.tag]
        for group in Layout.FromString(layout.tensor_proto.string_val[0]).category
        for chart in group.chart
    }


def test_a_learned_reward_is_made_once_and_trained_on(workshop):
    settings = [*ONLINE, "reward.steps=7", "reward.batch_size=8", "noise=symmetric", "noise.rate=0.2"]
    told = warm.run_module("dpo_lab.train", "method=rloo", "name=rl", *settings, "evals.every=3", cwd=workshop)
    assert told.returncode == 0, told.stdout + told.stderr
    record = record_of(workshop, "rl")
    assert record["status"] == "done"
    assert record["rollouts"]["samples"] == 6 * 8
    assert all({"reward", "reward_gain", "gold_gain", "kl"} <= point.keys() for point in record["trajectory"])
    assert record["rollouts"]["reward_queries"] >= 6 * 8
    assert record["memory"]["weights"] == pytest.approx(3, abs=0.01)  # policy, reference, reward model
    assert {"gold_gain", "kl", "accuracy", "above_best"} <= record["metrics"].keys()
    assert record["rollouts"]["forward_passes"] == dict.fromkeys(("policy", "reference", "reward_model"), 48)
    assert record["reward_model"]["metrics"].keys() == {"accuracy", "true_accuracy"}
    rows = [json.loads(line) for line in (folder_of(workshop, "rl") / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row}
    assert {"train/rollout/reward", "train/rollout/gold", "train/rollout/kl", "train/policy_loss", "val/loss"} <= names
    assert "train/loss" not in names
    made = [path for path in (workshop / "outputs/cache").glob("reward-*/run.json") if '"steps": 7' in path.read_text()]
    assert len(made) == 1
    before = made[0].read_bytes()
    shown = [*settings, "logger=tensorboard", "evals.num_prompts=5"]
    told = warm.run_module("dpo_lab.train", "method=grpo", "name=rl2", *shown, cwd=workshop)
    assert told.returncode == 0, told.stdout + told.stderr
    charts = charts_of(folder_of(workshop, "rl2"))
    assert charts["rollout/reward and gold"] == ["train/rollout/reward", "train/rollout/gold"]
    assert all(names.intersection(scalars) for scalars in charts.values())  # none is empty
    assert made[0].read_bytes() == before
    told = warm.run_module("dpo_lab.evaluate", f"run={folder_of(workshop, 'rl')}", "evals.num_prompts=4", cwd=workshop)
    assert told.returncode == 0, told.stdout + told.stderr


@pytest.mark.parametrize("method", ["ppo", pytest.param("online_dpo", marks=pytest.mark.extended)])
def test_killed_it_goes_on_as_if_it_had_not_been(method, workshop):
    """kill -9 once a checkpoint is there; PPO's lies within a rollout."""
    settings = [
        f"method={method}",
        *ONLINE,
        "reward=gold",
        "callbacks.checkpoint.every_n_steps=3",
        "trainer.max_steps=9",
        "evals.every=2",
    ]
    settings += ["method.minibatches=2"] if method == "ppo" else []
    whole, cut = (f"{method}-{name}" for name in ("whole", "cut"))
    told = warm.run_module("dpo_lab.train", f"name={whole}", *settings, cwd=workshop)
    assert told.returncode == 0, told.stdout + told.stderr
    with warm.Warm(warm.main, "dpo_lab.train", f"name={cut}", *settings, cwd=workshop) as started:
        until = time.monotonic() + 120
        while not list((workshop / "outputs" / cut).glob("*/*/checkpoints/step=3.ckpt")):
            assert time.monotonic() < until
            time.sleep(0.01)
        started.process.kill()
    told = warm.run_module("dpo_lab.train", f"name={cut}", *settings, cwd=workshop)
    assert told.returncode == 0, told.stdout + told.stderr
    one, other = (record_of(workshop, name) for name in (whole, cut))
    assert one["trained_policy"] == other["trained_policy"]
    assert one["metrics"] == other["metrics"]
    logs = [(folder_of(workshop, name) / "metrics.jsonl").read_bytes() for name in (whole, cut)]
    assert logs[0] == logs[1]
    assert [point["step"] for point in one["trajectory"]] == [0, 2, 4, 6, 8, 9]


def test_ppo_with_adapters_on_files_holds_one_body(policy, tmp_path):
    """Policy, reference and critic share the base model; the reward model is another."""
    shop = make_shop(tmp_path, policy)
    settings = [
        *QUIET,
        "policy.lora.r=2",
        "optim=lora",
        "reference=adapter_off",
    ]
    settings += ["method=ppo", "method.prompts=4", "method.samples=2", "method.max_new_tokens=6"]
    told = warm.run_module("dpo_lab.train", "name=ppo", *settings, "reward.steps=3", "reward.batch_size=8", cwd=shop)
    assert told.returncode == 0, told.stdout + told.stderr
    record = record_of(shop, "ppo")
    assert record["memory"]["weights"] < 2.2
    assert record["rollouts"]["samples"] == 8  # three steps of one rollout
    told = warm.run_module("dpo_lab.train", "name=no", *settings, "reward=gold", cwd=shop)
    assert told.returncode == 2
    assert "reward=gold: these data have no gold reward; type reward=learned" in told.stderr
    told = warm.run_module("dpo_lab.train", "name=no", *settings, "method.prompts=1000", cwd=shop)
    assert told.returncode == 2
    assert "method.prompts=1000: there are only" in told.stderr


def test_a_file_of_prompts_is_sampled_from_with_a_reward_model_and_refused_without_samples(policy, tmp_path):
    shop = make_shop(tmp_path, policy)
    rows = [json.loads(line) for line in (shop / "pairs.jsonl").read_text().splitlines()]
    (shop / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    told = warm.run_module("dpo_lab.reward", "name=rm", *QUIET, cwd=shop)
    assert told.returncode == 0, told.stdout + told.stderr
    prompts = [*QUIET, "data.path=prompts.jsonl"]
    settings = [*prompts, "method=grpo", "method.prompts=4", "method.samples=2", "method.max_new_tokens=6"]
    path = folder_of(shop, "rm") / "reward_model"
    told = warm.run_module("dpo_lab.train", "name=rl", *settings, f"reward.path='{path}'", cwd=shop)
    assert told.returncode == 0, told.stdout + told.stderr
    record = record_of(shop, "rl")
    assert record["rollouts"]["samples"] == 3 * 8
    assert record["rollouts"]["forward_passes"] == {"policy": 24, "reference": 24, "reward_model": 24}
    assert {"kl", "length", "stopped"} <= record["metrics"].keys()
    assert not {"accuracy", "margin", "perplexity"} & record["metrics"].keys()
    scored = json.loads((path / "reward.json").read_text())["accuracy"]
    assert record["reward_model"] == {"weights": record_of(shop, "rm")["trained_policy"], "metrics": scored}
    for module, what in (
        ("train", "method=dpo trains on pairs of responses"),
        ("reward", "a reward model is trained on pairs of responses"),
        ("sft", "supervised fine-tuning trains on responses"),
    ):
        told = warm.run_module(f"dpo_lab.{module}", "name=no", *prompts, cwd=shop)
        assert told.returncode == 2, told.stdout + told.stderr
        assert f"error: prompts.jsonl:1 is a prompt alone, and {what}; type data.path=" in told.stderr
