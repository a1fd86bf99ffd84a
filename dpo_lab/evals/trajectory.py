"""Trajectories: metrics of the policy while it trains, of the same prompts with the same random numbers at each point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_lab.distributed.collectives import rank_and_world_size
from dpo_lab.evals.evaluators.kl import KL
from dpo_lab.evals.evaluators.language import Language
from dpo_lab.evals.evaluators.reward import Reward
from dpo_lab.models.sampling import evaluating
from dpo_lab.models.sharding import device_of, on_device
from dpo_lab.runs.examples import Examples
from dpo_lab.terminal.progress import without_bars

if TYPE_CHECKING:
    import torch

    from dpo_lab.core.pairs import Tokens
    from dpo_lab.evals.context import EvalContext
    from dpo_lab.models.policy import Policy

EVALUATORS = (Reward(), KL(), Language())
NO_TEXTS = np.empty(0)


@dataclass
class TrajectoryMeter:
    """Measures policies on the first prompts of an evaluation: reward, KL to the initial policy, length, and what else
    EVALUATORS measure of samples, under the names of the final metrics.

    context: the evaluation of the initial policy; count: the number of prompts; device: of its passes; reward: the reward
    that a method trains on, `reward` of a point. Each prompt has the random numbers that the final evaluation has for it.
    Gains are over the initial policy's responses with these random numbers, in standard deviations of their rewards, so
    that the first point is at a KL and a gain of 0. All ranks have to call it; each samples its share of the prompts.
    """

    context: EvalContext
    count: int
    device: torch.device
    reward: Callable[[Sequence[Tokens], Sequence[Tokens]], np.ndarray] | None = None

    def __post_init__(self) -> None:
        context, count = self.context, min(self.count, len(self.context.prompts))
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
        known = vars(final)
        if "samples" in known:
            vars(point)["samples"] = final.samples[: len(point.prompts)]
        with self._running(final.trained):
            return self._metrics(point)

    @cached_property
    def _start(self) -> EvalContext:
        """The evaluation of the initial policy with the random numbers of all points."""
        start = replace(self.context, trained=self.context.initial, examples=Examples())
        responses = [sample.tokens for sample in start.samples]
        logps = start.response_logps(start.initial.model, start.prompt_ids, responses)[0].double().numpy()
        vars(start)["sample_logps"] = logps, logps
        return start

    @cached_property
    def _start_rewards(self) -> dict[str, Any]:
        return self._rewards(self._start)

    def _rewards(self, point: EvalContext) -> dict[str, Any]:
        """Return the rewards of a point's samples, [N] each, by source."""
        rewards: dict[str, Any] = point.score_texts(point.complete_texts(point.samples))
        if self.reward is not None:
            rewards["reward"] = self.reward(point.prompt_ids, [sample.tokens for sample in point.samples])
        return rewards

    def _metrics(self, point: EvalContext) -> dict[str, float]:
        start, initial = self._start, self._start_rewards
        known = {
            "initial_samples": start.samples,
            "initial_sample_logps": start.sample_logps[1],
            "text_logps": (NO_TEXTS, NO_TEXTS),
            "rewards": {name: (values, initial[name]) for name, values in self._rewards(point).items()},
        }
        vars(point).update(known)  # in the place of its cached properties
        measured = (each for evaluator in EVALUATORS for each in evaluator.run(point))
        return {name: estimate.value for name, estimate in measured if not name.startswith("initial/")}

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
