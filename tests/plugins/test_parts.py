"""A plugin's reference, noise, reward and method in runs, and its task in the commands sft and reward."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.plugins.project import TINY
from tests.support.warm import run_module

pytestmark = [pytest.mark.slow, pytest.mark.extended]

PARTS = '''
"""One part of each kind that the project has none of."""

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from dpo_lab.core.pairs import PairLogps
from dpo_lab.core.methods.rloo import RLOO
from dpo_lab.core.noise import LabelNoise
from dpo_lab.models.reference import TOKENS, Cached, Reference
from dpo_lab.rewards.base import Reward


@dataclass
class Halved(Reference, name="halved", starts_at_policy=False):
    """The initial policy's log-probabilities times `power`."""

    power: float = 0.5

    def prepare(self, initial, pairs, cache, context=nullcontext, tokens=TOKENS):
        logps_of = Cached().prepare(initial, pairs, cache, context, tokens)

        def halved(batch):
            logps = logps_of(batch)
            chosen, rejected = self.power * logps.chosen, self.power * logps.rejected
            return PairLogps(chosen, rejected, logps.chosen_length, logps.rejected_length)

        return halved


@dataclass
class All(LabelNoise, name="all"):
    """Every pair is flipped."""

    def rates(self, pairs, reference_margins=None):
        return np.ones(len(pairs))


@dataclass
class Short(Reward, name="short"):
    """Minus `price` for each token of the response."""

    price: float = 1.0

    def load(self, inputs):
        return lambda prompts, responses: np.array([-self.price * len(response) for response in responses])


@dataclass
class Steep(RLOO, name="steep"):
    """RLOO whose advantages are multiplied by `steepness`."""

    steepness: float = 2.0

    def advantages(self, rollouts):
        advantages, returns = super().advantages(rollouts)
        return self.steepness * advantages, returns
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("parts")
    (path / "parts.py").write_text(PARTS)
    return path


def run_of(command: str, *words: str, cwd: Path) -> tuple[dict, list[dict]]:
    """Run a command; return its record and the lines of its journal."""
    told = run_module(f"dpo_lab.{command}", *words, *TINY, "name=parts", "if_exists=restart", cwd=cwd)
    assert told.returncode == 0, told.stdout + told.stderr
    (path,) = (cwd / "outputs" / "parts").rglob("run.json")
    record = json.loads(path.read_text())
    assert record["status"] == "done"
    lines = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    path.unlink()  # the next command's is the only one
    return record, lines


def test_a_reference_and_a_noise_train_by_dpo(folder):
    record, lines = run_of(
        "train", "plugins=./parts.py", "reference=halved", "reference.power=0.25", "noise=all", cwd=folder
    )
    assert record["config"]["reference"] == {"kind": "halved", "power": 0.25}
    assert record["data"]["flipped by label noise"] == record["data"]["train pairs"] > 0
    first = next(line for line in lines if "train/loss" in line)
    # at the start the policy is the initial one, and three quarters of its log-probability are left of the log-ratio
    assert first["train/logratio/chosen"] == pytest.approx(0.75 * first["train/logps/chosen"], rel=0.05)


def test_a_method_and_a_reward_train_on_samples(folder):
    words = ["method=steep", "method.steepness=3", "reward=short", "reward.price=2", "method.prompts=2"]
    record, lines = run_of("train", "plugins=./parts.py", *words, cwd=folder)
    assert (record["config"]["method"]["kind"], record["config"]["method"]["steepness"]) == ("steep", 3.0)
    rollouts = [line for line in lines if "train/rollout/reward" in line]
    assert rollouts
    for line in rollouts:
        assert line["train/rollout/reward"] == pytest.approx(-2 * line["train/rollout/length"])
    samples = 6 * 2 * 4
    passes = {"policy": samples, "reference": samples}  # of training
    assert record["rollouts"] == {"samples": samples, "reward_queries": samples, "forward_passes": passes}


def test_a_reward_model_is_trained_on_a_task(project):
    record, _ = run_of("reward", "plugins=my_lab", "data=my_lab_colours", cwd=project)
    assert record["config"]["data"]["task"]["kind"] == "my_lab_colours"
    assert record["plugins"]["my_lab"]["sha256"]
    assert "accuracy" in record["metrics"]


def test_sft_makes_the_initial_policy_of_a_task(project):
    told = run_module("dpo_lab.sft", "plugins=my_lab", "data=my_lab_colours", *TINY, "name=sft", cwd=project)
    assert told.returncode == 0, told.stderr
    made = re.search(r"initial policy of [\d,]+ parameters: (\S+)", told.stdout)
    assert made
    assert json.loads((project / made[1] / "config.json").read_text())["hidden_size"] == 64
