"""Trajectories: metrics of the policy while it trains, of the same prompts with the same random numbers at each point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from dpo_lab.distributed.collectives import rank_and_world_size
from dpo_lab.evals.evaluators.kl import KL
from dpo_lab.evals.evaluators.language import Language
from dpo_lab.models.sampling import Sample, evaluating
from dpo_lab.models.sharding import device_of, on_device
from dpo_lab.models.trial import draws_exactly
from dpo_lab.runs.examples import Examples
from dpo_lab.terminal.progress import without_bars

if TYPE_CHECKING:
    import torch

    from dpo_lab.core.pairs import Tokens
    from dpo_lab.evals.context import EvalContext
    from dpo_lab.models.policy import Policy

EVALUATORS = (KL(), Language())
NO_TEXTS = np.empty(0)


@dataclass
class TrajectoryMeter:
    """Measures policies on the first prompts of an evaluation: reward, KL to the initial policy, length, and what else
    EVALUATORS measure of samples, under the names of the final metrics.

    final: the evaluation of the initial policy on all prompts, whose baseline and unit gains have, see `gain`; count: the
    number of prompts; device: of passes; reward: the reward that a method trains on, `reward` of a point. Each prompt
    has the random numbers that the final evaluation has for it. All ranks have to call it; each samples its share of the
    prompts.
    """

    final: EvalContext
    count: int
    device: torch.device
    reward: Callable[[Sequence[Tokens], Sequence[Tokens]], np.ndarray] | None = None
    context: EvalContext = field(init=False)  # of the first prompts

    def __post_init__(self) -> None:
        context, count = self.final, min(self.count, len(self.final.prompts))
        each = -(-count // rank_and_world_size()[1])  # of a rank
        self.context = replace(
            context,
            prompts=context.prompts[:count],
            prompt_ids=context.prompt_ids[:count],
            texts=(),
            batch_size=max(1, min(context.batch_size, each)),
        )

    @cached_property
    def first(self) -> dict[str, float]:
        """The metrics of the initial policy."""
        with self._running(self.context.initial):
            return self._metrics(self._start)

    def measure(self, policy: Policy) -> dict[str, float]:
        """Return the metrics of a policy, which may be in training."""
        with self._running(policy):
            return self._metrics(replace(self.context, trained=policy, examples=Examples()))

    def last(self, final: EvalContext) -> dict[str, float]:
        """Return the metrics of the policy that a final evaluation measured; its samples are not drawn again."""
        point = replace(self.context, trained=final.trained, examples=Examples())
        if "samples" in vars(final) and final.engine == self.final.engine:
            vars(point)["samples"] = final.samples[: len(point.prompts)]
        self.share_samples(final)
        with self._running(final.trained):
            return self._metrics(point)

    def share_samples(self, final: EvalContext) -> None:
        """Let this and the final evaluation draw the initial policy's samples once, whichever needs them first, unless that
        one has another engine.
        """
        for one, other in ((self.final, final), (final, self.final)):
            if "initial_samples" in vars(one) and one.engine == other.engine:
                vars(other)["initial_samples"] = one.initial_samples

    @cached_property
    def _start(self) -> EvalContext:
        """The evaluation of the initial policy with the random numbers of all points."""
        start = replace(self.context, trained=self.context.initial, examples=Examples())
        vars(start)["sample_logps"] = (_own_logps(start),) * 2
        return start

    @cached_property
    def _start_rewards(self) -> dict[str, np.ndarray]:
        return self._rewards(self._start, self._start.samples)

    @cached_property
    def _baseline(self) -> dict[str, np.ndarray]:
        """The rewards of the initial policy's samples of all prompts, those of the final evaluation."""
        return self._rewards(self.final, self.final.initial_samples)

    def _rewards(self, context: EvalContext, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """Return the rewards of samples, [N] each, by source."""
        if not context.gives_rewards and self.reward is None:
            return {}
        rewards = context.score_texts(context.complete_texts(samples))
        if self.reward is not None:
            rewards["reward"] = self.reward(context.prompt_ids, [sample.tokens for sample in samples])
        return rewards

    def _metrics(self, point: EvalContext) -> dict[str, float]:
        start, found = self._start, dict[str, float]()
        if point is not start:
            (initial,) = point.logps_under([point.initial], point.prompt_ids, [each.tokens for each in point.samples])
            vars(point)["sample_logps"] = _own_logps(point), initial
        for name, values in self._rewards(point, point.samples).items():
            found[name] = float(values.mean())
            if (gained := gain(values, self._start_rewards[name], self._baseline[name])) is not None:
                found[f"{name}_gain"] = gained
        known = {
            "initial_samples": start.samples,
            "initial_sample_logps": start.sample_logps[1],
            "text_logps": (NO_TEXTS, NO_TEXTS),
        }
        vars(point).update(known)  # in the place of its cached properties
        measured = (each for evaluator in EVALUATORS for each in evaluator.run(point))
        return found | {name: estimate.value for name, estimate in measured if not name.startswith("initial/")}

    @contextmanager
    def _running(self, policy: Policy) -> Iterator[None]:
        """Prepare both policies for passes, and leave them as they were."""
        initial = self.context.initial.model
        before = device_of(initial)
        on_device(initial, self.device)
        try:
            with without_bars(), evaluating(policy.model):
                yield
        finally:
            if before != self.device:
                on_device(initial, before)


def _own_logps(context: EvalContext) -> np.ndarray:
    """Return the log-probabilities (nats) of the trained policy's samples under itself, [N]: those that their tokens were
    drawn with, unless a forward pass could find others.
    """
    samples, policy = context.samples, context.trained
    with context.context():
        is_known = draws_exactly(policy.model) and all(len(each.logps) == len(each.tokens) for each in samples)
    if is_known:
        return np.array([math.fsum(each.logps) for each in samples])
    (found,) = context.logps_under([policy], context.prompt_ids, [each.tokens for each in samples])
    return found


def gain(rewards: np.ndarray, start: np.ndarray, baseline: np.ndarray) -> float | None:
    """Return the gain in reward over the initial policy, in standard deviations of its rewards; None if these are equal.

    rewards, start: of the trained and the initial policy's samples of the same prompts with the same random numbers, [K];
    baseline: of more samples of the initial policy, [N], whose mean is subtracted. `start` is the control variate: as far
    as rewards depend on it, they are corrected for the difference of its mean to the baseline's. So the initial policy has a
    gain of 0, and luck that random numbers bring to both policies cancels.

    >>> gain(np.array([0.0, 2.0]), np.array([0.0, 2.0]), np.array([2.0, 4.0, 6.0]))
    0.0
    """
    sd = float(baseline.std())
    if not sd > 0:
        return None
    lucky = start - start.mean()
    spread = float((lucky * lucky).mean())
    slope = float(((rewards - rewards.mean()) * lucky).mean()) / spread if spread > 0 else 0.0
    return float(rewards.mean() - baseline.mean() - slope * (start.mean() - baseline.mean())) / sd
