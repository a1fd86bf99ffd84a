"""Trajectories: what a point is, that training does not notice it, and that a killed fit has each point once."""

from __future__ import annotations

import json
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.evals.context import EvalContext
from dpo_lab.evals.trajectory import TrajectoryMeter, _own_logps, gain
from dpo_lab.models.forward import select_forward
from dpo_lab.models.policy import Policy, TinyPolicy
from dpo_lab.runs import metrics_log
from dpo_lab.runs.trajectory import GROUP, points_of
from dpo_lab.training.callbacks.trajectory import Trajectory
from tests.support import small_fit
from tests.support.kill_points import fork, told
from tests.support.ranks import become_rank, run_in_ranks
from tests.support.small_fit import IGNORED, difference, left

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(*IGNORED)]

EVERY, COUNT = 2, 5  # steps and prompts of the trajectory
NAMES = {"kl", "length", "reward", "reward_gain", "stopped"}


def even(prompts, responses) -> np.ndarray:
    """The share of even tokens."""
    return np.array([np.mean(np.asarray(response) % 2 == 0) for response in responses])


def tiny(scale: float = 0.0) -> Policy:
    """The policy that small_fit starts from, or one whose weights are moved from it."""
    model = TinyPolicy(hidden_size=8, layers=1, heads=2, intermediate_size=8).build(small_fit.TOKENIZER, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += scale * torch.randn(weight.shape, generator=generator)
    select_forward(model)
    return Policy(model.eval(), small_fit.TOKENIZER)


def meter(prompts: int = 9, count: int = COUNT, reward=even) -> TrajectoryMeter:
    encoder, ids = (
        PairTokenizer(small_fit.TOKENIZER, 64, 32, True),
        [[5 + n, 7, 9 + n][: 1 + n % 3] for n in range(prompts)],
    )
    initial = tiny()
    texts = [encoder.prompt_text(each) for each in ids]
    context = EvalContext(
        trained=initial,
        initial=initial,
        encoder=encoder,
        pairs=(),
        prompts=texts,
        prompt_ids=ids,
        texts=(),
        task=None,
        max_new_tokens=6,
        tokens=40,
        batch_size=4,
        seed=1,
    )
    return TrajectoryMeter(context, count, torch.device("cpu"), reward)


def fit(folder: Path) -> None:
    small_fit.run(folder, callbacks=[Trajectory(meter(), EVERY, nullcontext)])


def points_in(folder: Path) -> list[dict]:
    return points_of(metrics_log.rows(folder / metrics_log.METRICS_LOG))


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    fit(folder)
    return folder


def test_there_is_a_point_at_the_start_and_after_every_so_many_steps(measured):
    points = points_in(measured)
    assert [point["step"] for point in points] == [0, 2, 4, 6]
    assert points[0]["kl"] == points[0]["reward_gain"] == 0
    assert all(point.keys() >= NAMES for point in points)
    assert len({point["kl"] for point in points}) == 4


def test_training_does_not_notice_it(measured, whole):
    """`Noisy` draws from every random generator in every micro-batch."""
    with_it, without = left(measured), left(whole)
    rows = [json.loads(line) for line in with_it.pop("journal").splitlines()]
    others = [json.loads(line) for line in without.pop("journal").splitlines()]
    assert [row for row in rows if not any(name.startswith(GROUP) for name in row)] == others
    of_ranks = [state.pop("dpo_lab") for state in (with_it, without)]
    for each in of_ranks:
        del each["journal"]  # its length
    assert difference(*of_ranks) is None
    assert difference(with_it, without) is None


def test_killed_before_any_row_it_has_each_point_once(measured, tmp_path):
    ticks: list[str] = []
    with told(ticks.append):
        fit(tmp_path / "counted")
    chosen = [at for at, what in enumerate(ticks) if what == "append"]
    assert len(chosen) >= 9
    seen = set()
    for kill_at in chosen:
        folder, counted = tmp_path / str(kill_at), iter(range(len(ticks)))

        def tick(what: str, counted=counted, kill_at=kill_at) -> None:
            if next(counted) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        def killed(tick=tick, folder=folder) -> None:
            folder.mkdir()
            with told(tick):
                fit(folder)

        assert fork(killed) == -signal.SIGKILL
        log = folder / metrics_log.METRICS_LOG
        if (state := (*small_fit.saved(folder), log.read_bytes() if log.exists() else b"")) not in seen:
            seen.add(state)
            fit(folder)
            assert difference(left(folder), left(measured)) is None, ticks[kill_at]
    assert len(seen) >= 6


def test_log_probabilities_of_samples_are_measured_where_they_are_not_those_of_the_draw():
    """Of an engine whose samples come without them, and in 16 bits, where sampling with a cache rounds otherwise."""
    trained = tiny(0.05)
    for without, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        context = replace(meter().context, trained=trained)
        samples = [replace(each, logps=() if without else [9.0] * len(each.tokens)) for each in context.samples]
        vars(context)["samples"] = samples
        trained.model.to(dtype)  # type: ignore[arg-type]
        assert _own_logps(context) == pytest.approx(context.sample_logps[0], abs=1e-6)


def test_a_point_is_what_the_final_evaluation_says_of_the_same_prompts():
    """Its samples of the first prompts are not drawn again; nor do they differ if they are."""
    of_path, trained = meter(), tiny(0.05)
    final = replace(of_path.final, trained=trained)
    assert of_path.context.prompt_ids == final.prompt_ids[:COUNT]
    drawn = of_path.measure(trained)
    trained_logps, initial_logps = final.sample_logps
    assert drawn["kl"] == pytest.approx(float((trained_logps - initial_logps)[:COUNT].mean()), abs=1e-5)
    assert drawn["length"] == np.mean([len(sample.tokens) for sample in final.samples[:COUNT]])
    assert of_path.last(final) == pytest.approx(drawn, abs=1e-5)
    other = meter()
    assert other.last(final) == pytest.approx(drawn, abs=1e-5)  # of a run that goes on when all its steps are trained
    of_path.share_samples(fresh := replace(of_path.final, trained=trained))
    assert fresh.initial_samples is of_path.final.initial_samples


def test_a_gain_is_over_all_samples_of_the_initial_policy_without_the_luck_of_the_random_numbers():
    of_path, trained = meter(), tiny(0.05)
    point, context = of_path.measure(trained), of_path.context
    now, before = (replace(context, trained=policy).samples for policy in (trained, context.initial))
    rewards, start = (even(context.prompt_ids, [sample.tokens for sample in found]) for found in (now, before))
    baseline = even(of_path.final.prompt_ids, [sample.tokens for sample in of_path.final.initial_samples])
    slope = np.polyfit(start, rewards, 1)[0]
    gained = rewards.mean() - slope * (start.mean() - baseline.mean()) - baseline.mean()
    assert point["reward"] == pytest.approx(rewards.mean())
    assert point["reward_gain"] == pytest.approx(gained / baseline.std())


def test_the_control_variate_makes_a_gain_surer_and_no_other():
    """Rewards of two policies that the same random numbers move alike: simulated, against the plain difference."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        luck, baseline = draw.normal(size=64), draw.normal(size=512)
        rewards = 1 + 0.8 * luck + 0.6 * draw.normal(size=64)
        gained = gain(rewards, luck, baseline)
        assert gained is not None
        found.append((gained, (rewards.mean() - baseline.mean()) / baseline.std()))
    adjusted, plain = np.array(found).T
    assert adjusted.mean() == pytest.approx(1, abs=0.01)
    assert adjusted.std() < 0.75 * plain.std()
    assert gain(np.ones(3), np.ones(3), np.ones(5)) is None


def test_without_a_reward_there_are_kl_and_length_and_modes_are_left_as_they_were():
    of_path, policy = meter(reward=None), tiny(0.05)
    policy.model.train()
    point = of_path.measure(policy)
    assert {"kl", "kl_per_token", "length", "stopped"} <= point.keys()
    assert not {"gold", "judge", "reward"} & point.keys()
    assert all(module.training for module in policy.model.modules())


def measure_in_ranks(rank: int, world_size: int, folder: str) -> None:
    from torch import distributed

    become_rank(rank, world_size)
    distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    of_path = meter()
    points = [of_path.first, of_path.measure(tiny(0.05))]
    Path(folder, f"{rank}.json").write_text(json.dumps(points))
    distributed.destroy_process_group()


@pytest.mark.ranks
def test_two_ranks_measure_what_one_process_does(tmp_path):
    run_in_ranks("tests.training.test_trajectory", "measure_in_ranks", 2, str(tmp_path))
    one = meter()
    alone = [one.first, one.measure(tiny(0.05))]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == [pytest.approx(point, abs=1e-5) for point in alone]
