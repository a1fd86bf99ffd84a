"""The actor: samples responses from the policy in training, and measures them when they are sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_lab.core.methods import Online
from dpo_lab.core.methods.base import PolicyGradient
from dpo_lab.core.pairs import Tokens
from dpo_lab.core.rollouts import Rollouts
from dpo_lab.data.collate import collate_responses
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.distributed.collectives import map_across_ranks
from dpo_lab.evals.candidates import sampling_explained
from dpo_lab.models.critic import Critic
from dpo_lab.models.forward import token_logps_of
from dpo_lab.models.reference import reference_model
from dpo_lab.models.sampling import sample
from dpo_lab.models.sharding import device_of, own_passes
from dpo_lab.models.trial import draws_exactly
from dpo_lab.rewards.base import ScoreTokens
from dpo_lab.training.nonfinite import NotFinite

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass
class Actor:
    """Samples from `model` and measures samples; all ranks have to call it, and get the same rollouts.

    reference: a ReferenceLogps with `of_tokens`, which the KL divergence is measured from; gold: the task's reward, None if
    there is none; context: the autocast context of forward passes; longest: the length limit of responses, in tokens;
    tokens: of a forward pass; batch_size: samples that are generated together; source: the name of the reward.
    """

    model: PreTrainedModel
    method: Online
    reward: ScoreTokens
    gold: ScoreTokens | None
    encoder: PairTokenizer
    context: Callable[[], AbstractContextManager]
    longest: int
    tokens: int
    reference: Any = None
    critic: Critic | None = None
    batch_size: int = 512
    source: str = ""

    def roll_out(self, keys: Sequence[str], prompts: Sequence[Tokens], seed: int) -> Rollouts:
        """Sample `method.samples` responses to each prompt, with random numbers from the seed, and measure them."""
        each = self.method.samples
        repeated = [prompt for prompt in prompts for _ in range(each)]
        with self.context(), sampling_explained(self.batch_size, len(repeated)):
            samples = sample(
                self.model,
                repeated,
                max_new_tokens=self.longest,
                end_ids=self.encoder.end_ids,
                pad_id=self.encoder.pad_id,
                seed=seed,
                batch_size=self.batch_size,
                shares_prompts=True,
            )
        responses = [found.tokens for found in samples]
        stopped = torch.tensor([found.stopped for found in samples])
        rewards = torch.from_numpy(np.asarray(self.reward(repeated, responses), np.float32))
        self._check(rewards, repeated)
        rewards = rewards - self.method.missing_end_penalty * ~stopped
        gold = torch.full_like(rewards, torch.nan)
        if self.gold is not None:
            gold = torch.from_numpy(np.asarray(self.gold(repeated, responses), np.float32))
        tokens, lengths = collate_responses(prompts, responses)
        rollouts = Rollouts(
            list(keys),
            tokens,
            lengths,
            rewards.view(-1, each),
            gold.view(-1, each),
            stopped.view(-1, each),
        )
        if not isinstance(self.method, PolicyGradient):
            return rollouts
        return self._measure(rollouts, torch.tensor([logp for found in samples for logp in found.logps]))

    def _check(self, rewards: Float[Tensor, " samples"], prompts: Sequence[Tokens]) -> None:
        """Raise NotFinite if a reward is not finite."""
        if len(bad := torch.nonzero(~rewards.isfinite())):
            at = int(bad[0])
            prompt = self.encoder.prompt_text(list(prompts[at]))
            raise NotFinite(
                f"reward={self.source}: {len(bad)} of {len(rewards)} rewards are not finite; that of a response to"
                f" {prompt[:80]!r} is {rewards[at].item()}. Type another reward="
            )

    @property
    def measures_policy(self) -> bool:
        """Whether a pass of training could find other log-probabilities than those that tokens were drawn with."""
        with self.context():
            return not draws_exactly(self.model)

    @property
    def reward_model(self) -> torch.nn.Module | None:
        """The model that gives the rewards, if there is one."""
        return getattr(self.reward, "model", None)

    @torch.no_grad()
    def _measure(self, rollouts: Rollouts, drawn_with: Float[Tensor, " response_tokens"]) -> Rollouts:
        """Add the log-probabilities under policy and reference, and the critic's values.

        The policy's are those that tokens were drawn with, unless a pass of training could find others. One model after the
        other runs its passes, since ranks that share its weights take part in each other's passes.
        """
        device, parts = device_of(self.model), rollouts.split(self.tokens)
        work = [float(sum(part.sizes)) for part in parts]

        def over_tokens(
            model: PreTrainedModel | None, compute: Callable[[Tensor, np.ndarray], Tensor]
        ) -> Float[Tensor, " response_tokens"]:
            def of_part(part: Rollouts) -> Tensor:
                return compute(part.tokens.to(device), part.lengths).float().cpu()

            with self.context():
                return torch.cat(map_across_ranks(parts, work, of_part, own_passes(model)))

        found = {"behaviour": drawn_with}
        if self.measures_policy:
            found["behaviour"] = over_tokens(self.model, partial(token_logps_of, self.model))
        found["reference"] = over_tokens(reference_model(self.reference), self.reference.of_tokens)
        if self.critic is not None:
            found["values"] = over_tokens(self.critic.model, self.critic)
        return replace(rollouts, **found)
