"""The command dpo_lab.reward as a user types it, and the reward model that a run with reward=learned makes for itself."""

from __future__ import annotations

import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_lab.config import from_run
from dpo_lab.evals.judges.classifier import Classifier
from dpo_lab.rewards.learned import FACTS
from dpo_lab.runs.run_record import RunRefused
from tests.pipelines.test_cuda_runs import QUIET, make_shop, record_of
from tests.support import warm
from tests.support.configs import composed

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("reward")]

NOISY = ["noise=symmetric", "noise.rate=0.3", "callbacks.checkpoint.every_n_steps=1", *QUIET]
TYPED = ["data.batch_size=8", "optim.lr=3e-3", "reward.centring=0.01"]


@pytest.fixture(scope="module")
def shop(policy, tmp_path_factory) -> Path:
    return make_shop(tmp_path_factory.mktemp("shop"), policy)


@pytest.fixture(scope="module")
def told(shop) -> str:
    done = warm.run_module("dpo_lab.reward", "name=rm", *NOISY, *TYPED, cwd=shop)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights(folder: Path) -> torch.Tensor:
    found = load_file(folder / "reward_model" / "model.safetensors")
    return torch.cat([found[name].flatten() for name in sorted(found)])


def made_by(shop: Path) -> Path:
    (folder,) = (path.parent for path in (shop / "outputs/rm").glob("*/*/run.json"))
    return folder


def test_a_run_leaves_what_others_take(told, shop):
    record, folder = record_of(shop, "rm"), made_by(shop)
    assert record["status"] == "done"
    assert not {"loss", "beta", "reference", "reward"} & record["config"].keys()
    assert record["config"]["reward_model"] == {"centring": 0.01}
    assert record["data"]["flipped by label noise"] > 0
    assert record["steps"] == 3
    metrics = record["metrics"]
    measured = {"accuracy", "loss", "margin", "calibration_error", "train/clean/accuracy", "train/flipped/accuracy"}
    assert measured | {"reward_mean", "reward_sd"} <= metrics.keys()
    assert metrics["accuracy"]["interval"] is not None
    assert "sample_correlation" not in metrics  # no gold reward here
    assert [found["name"] for found in record["health"] if "chance" in found["name"]] == ["reward model at chance"]
    facts = json.loads((folder / "reward_model" / FACTS).read_text())
    assert facts["mean"] == metrics["reward_mean"]["value"]
    assert facts["judged_alike"] == 1
    card = (folder / "reward_model/README.md").read_text()
    assert "text-classification" in card
    assert "python -m dpo_lab.reward" in card
    scores = Classifier(str(folder / "reward_model")).load().score(["the plot was good", "the music was odd"])  # type: ignore[misc]
    assert scores.shape == (2,)
    assert scores[0] != scores[1]
    assert "reward=learned" in told
    assert "evals.judge.path=" in told
    names = {name for line in (folder / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert {"train/loss", "val/rewards/accuracies", "train/flipped/rewards/margins"} <= names
    with pytest.raises(RunRefused, match="this run trained a reward model; type evals.judge.path="):
        from_run.load_finished_run(folder)


def test_a_finished_run_is_not_started_again(told, shop):
    again = warm.run_module("dpo_lab.reward", "name=rm", *NOISY, *TYPED, cwd=shop)
    assert again.returncode == 0
    assert "this run is done already" in again.stdout
    assert "training tokens per second" in again.stdout


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["reward=gold"], "reward: only a learned one is trained; type reward=learned"),
        (["reward.centring=-1"], "reward.centring=-1"),
        (["data.format=text"], "plain texts hold no preference"),
    ],
)
def test_what_can_not_be_trained_is_refused_in_one_line(shop, typed, message):
    refused = warm.run_module("dpo_lab.reward", "name=refused", *QUIET, *typed, cwd=shop)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr


def ensured(kill_at: str) -> None:
    """A run that needs a reward model: prints its folder; killed after a step, if one is given."""
    from dpo_lab.config import schema
    from dpo_lab.pipelines.reward_inputs import ensure_reward_model
    from dpo_lab.training.reward_module import RewardModule

    def finish_step(module: RewardModule) -> None:
        if module.global_step == int(kill_at or -1):
            os.kill(os.getpid(), signal.SIGKILL)

    RewardModule.finish_step = finish_step  # type: ignore[method-assign]
    own = ["reward.steps=3", "reward.batch_size=8", "reward.lr=3e-3", "reward.centring=0.01"]
    others = ["loss=ipo", "beta=0.7", "optim.lr=1", "trainer.max_steps=50", "data.batch_size=2"]
    cfg = composed(*NOISY, *own, *others)
    print("made", ensure_reward_model(cfg, schema.validate(cfg)).reward.path)  # type: ignore[attr-defined]


def test_the_reward_model_that_a_run_makes_is_that_of_the_command(told, shop):
    """Killed in the middle; then two runs at once need it: one goes on with it while the other waits."""
    with warm.Warm(ensured, "2", cwd=shop) as process:
        assert process.wait(120)[0] == -signal.SIGKILL
    (unfinished,) = (shop / "outputs/cache").glob("reward-*")
    assert sorted(path.name for path in (unfinished / "checkpoints").glob("*.ckpt")) == ["step=1.ckpt"]
    with ExitStack() as stack:
        both = [stack.enter_context(warm.Warm(ensured, "", cwd=shop)) for _ in range(2)]
        results = [process.wait(120) for process in both]
    for code, output, errors in results:
        assert code == 0, errors
        assert f"made {unfinished.relative_to(shop)}/reward_model" in output
    assert [f"resuming from {unfinished.relative_to(shop)}" in output for _, output, _ in results].count(True) == 1
    record = json.loads((unfinished / "run.json").read_text())
    assert record["status"] == "done"
    assert len(record["attempts"]) == 1
    assert torch.equal(weights(unfinished), weights(made_by(shop)))
    assert "optim.lr=0.003" in record["overrides"]
    assert not {"loss=ipo", "beta=0.7", "optim.lr=1"} & {*record["overrides"]}
