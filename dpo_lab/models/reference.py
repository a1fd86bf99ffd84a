"""References: what the policy's log-probabilities are compared with while it trains.

Each kind is a dataclass whose `prepare` returns a `ReferenceLogps`, a function from a batch of pairs to their
log-probabilities under the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dpo_lab.core.pairs import EncodedPair, PairBatch, PairLogps
from dpo_lab.core.registry import add_to_table
from dpo_lab.errors import check_at_least
from dpo_lab.models.copies import trainable_copy
from dpo_lab.models.policy import PolicyConfig, Pretrained

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel

ReferenceLogps = Callable[[PairBatch], PairLogps]
TOKENS = 2048  # default number of tokens per forward pass
REFERENCES: dict[str, type[Reference]] = {}  # by name in configs


@dataclass
class Reference:
    """The base class of references. A subclass defines `prepare` and states its name in configs and starts_at_policy:
    whether the reference equals the policy before the first step.
    """

    starts_at_policy: ClassVar[bool]

    def __init_subclass__(cls, *, name: str, starts_at_policy: bool) -> None:
        cls.starts_at_policy = starts_at_policy
        add_to_table(REFERENCES, name, cls)

    def check(self, policy: PolicyConfig, is_sharded: bool) -> None:
        """Raise ValueError if a policy, or one that is sharded over ranks, can't be trained with this reference."""

    def of_fresh_responses(self) -> Reference:
        """Return the same reference for responses that are sampled while the policy trains."""
        return self

    def prepare(
        self,
        initial: PreTrainedModel,
        pairs: Sequence[EncodedPair],
        cache: Path,
        context: Callable[[], AbstractContextManager] = nullcontext,
        tokens: int = TOKENS,
    ) -> ReferenceLogps:
        """Return a function that computes reference log-probabilities of batches of `pairs`.

        initial: the policy before training, the same model object that will be trained; cache: folder of cached
        results; context: context manager of forward passes (autocast), the same as the policy's; tokens: approximate
        number of tokens per forward pass.
        """
        raise NotImplementedError


@dataclass
class Frozen(Reference, name="frozen", starts_at_policy=True):
    """A frozen copy of the initial policy: costs a forward pass per step, and memory for a second model.

    Of a policy with adapters only the adapters are copied, trained ones included; the base model is shared.
    """

    def prepare(self, initial, pairs, cache, context=nullcontext, tokens=TOKENS) -> ReferenceLogps:
        from dpo_lab.models.sharding import sharded_of

        sharded = sharded_of(initial)
        if sharded is not None and sharded.origin is not None:
            return FrozenModel(sharded.origin)  # which is kept for the evaluation anyway
        return FrozenModel(trainable_copy(initial))


@dataclass
class Moving(Reference, name="moving", starts_at_policy=True):
    """A copy of the policy that follows it (TR-DPO): every `every` steps the copy's weights become (1 - mixup) times
    themselves plus mixup times the policy's. mixup=1 is the hard update, a small one at every=1 the soft update.

    Gorbatovski et al. 2024 (arXiv:2404.09656), equations 5 and 6. It needs the memory of `frozen`, and its weights are in
    checkpoints. Rewards and margins that are logged in training are against it; evaluation is against the initial policy.
    """

    every: int = 64
    mixup: float = 1.0

    def __post_init__(self) -> None:
        check_at_least("reference.every", self.every, 1, 64)
        if not 0 < self.mixup <= 1:
            raise ValueError(f"reference.mixup={self.mixup}: must lie in (0, 1]; type e.g. reference.mixup=0.6")

    def check(self, policy: PolicyConfig, is_sharded: bool) -> None:
        if is_sharded:
            raise ValueError("reference=moving: does not follow a policy sharded over the ranks; type trainer=ddp")

    def prepare(self, initial, pairs, cache, context=nullcontext, tokens=TOKENS) -> ReferenceLogps:
        return MovingModel(trainable_copy(initial), self.every, self.mixup)


@dataclass
class Cached(Reference, name="cached", starts_at_policy=True):
    """The initial policy's log-probabilities, computed once, stored on disk and looked up by pair; no second model.

    Responses that are sampled while the policy trains are in no cache: there it is `frozen`.
    """

    def of_fresh_responses(self) -> Reference:
        return Frozen()

    def prepare(self, initial, pairs, cache, context=nullcontext, tokens=TOKENS) -> ReferenceLogps:
        from dpo_lab.models.reference_cache import cached_logps

        return cached_logps(initial, pairs, cache, context, tokens)


@dataclass
class AdapterOff(Reference, name="adapter_off", starts_at_policy=True):
    """The policy in training with its adapters disabled, which is their base model; no second model in memory."""

    def check(self, policy: PolicyConfig, is_sharded: bool) -> None:
        if not policy.has_adapters:
            raise ValueError("reference=adapter_off: the policy has no adapters; type policy=lora, or reference=cached")
        if isinstance(policy, Pretrained) and policy.starts_from_adapter:
            raise ValueError(
                "reference=adapter_off: without its trained adapters the policy is the base model, not the initial"
                " policy; type reference=frozen (a frozen copy of the adapters) or reference=cached"
            )
        if is_sharded:
            raise ValueError(
                "reference=adapter_off: the adapters of a policy that is sharded over ranks can't be disabled for a pass;"
                " type reference=cached, or trainer=ddp"
            )

    def prepare(self, initial, pairs, cache, context=nullcontext, tokens=TOKENS) -> ReferenceLogps:
        return WithoutAdapters(initial)


class UniformOver(str, Enum):
    """The set that a uniform reference is uniform over."""

    sequences = "sequences"
    tokens = "tokens"


@dataclass
class Uniform(Reference, name="uniform", starts_at_policy=False):
    """A uniform distribution instead of a model: costs no forward pass and no memory.

    over=sequences: all responses have the same log-probability, which cancels, so that DPO becomes a ranking loss on
    the policy's log-probabilities. over=tokens: all tokens have the same probability, so that a response's
    log-probability is -|y| ln V, which does not cancel where lengths differ.
    """

    over: UniformOver = UniformOver.sequences

    def prepare(self, initial, pairs, cache, context=nullcontext, tokens=TOKENS) -> ReferenceLogps:
        return UniformLogps((self.over == UniformOver.tokens) * math.log(initial.config.get_text_config().vocab_size))


@dataclass
class UniformLogps:
    """Log-probabilities under a uniform reference: -nats_per_token for every scored token, times its weight."""

    nats_per_token: float

    def __call__(self, batch: PairBatch) -> PairLogps:
        from dpo_lab.core.logps import sum_responses

        weighted = batch.response_lengths
        if batch.weights is not None:
            weighted = sum_responses(batch.weights, batch.lengths)
        return PairLogps.of(-self.nats_per_token * weighted, batch.response_lengths)

    def of_tokens(self, tokens: Tensor, lengths: np.ndarray) -> Tensor:
        """Return the log-probability of each response token of a stream."""
        import torch

        return torch.full((int(lengths[:, 1:].sum()),), -self.nats_per_token, device=tokens.device)


def score_reference(reference: ReferenceLogps, batch: PairBatch) -> PairLogps:
    """Return the reference's log-probabilities of a batch, with the difference in scores of its pairs if it has it."""
    return replace(reference(batch), score_gap=batch.score_gap)


class FrozenModel:
    """Log-probabilities under a frozen model, which is moved to the device of its batches and is in no checkpoint."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    def __call__(self, batch: PairBatch) -> PairLogps:
        import torch

        from dpo_lab.models.forward import pair_logps
        from dpo_lab.models.sharding import on_device

        on_device(self.model, batch.tokens.device)
        with torch.no_grad():
            return pair_logps(self.model, batch)

    def of_tokens(self, tokens: Tensor, lengths: np.ndarray) -> Tensor:
        """Return the log-probability of each response token of a stream."""
        import torch

        from dpo_lab.models.forward import token_logps_of
        from dpo_lab.models.sharding import on_device

        on_device(self.model, tokens.device)
        with torch.no_grad():
            return token_logps_of(self.model, tokens, lengths)


class MovingModel(FrozenModel):
    """Log-probabilities under a model that follows the policy, see Moving."""

    def __init__(self, model: PreTrainedModel, every: int, mixup: float) -> None:
        names = [name for name, weight in model.named_parameters() if weight.requires_grad]
        super().__init__(model)
        self.every, self.mixup, self.names = every, mixup, names

    def follow(self, policy: PreTrainedModel, step: int) -> bool:
        """Update the weights after an optimizer step, counted from 1; return whether this step is one of every `every`."""
        import torch

        if step % self.every:
            return False
        theirs = dict(policy.named_parameters())
        mine = self.state_dict()
        with torch.no_grad():
            for name, weight in mine.items():
                weight.lerp_(theirs[name].detach(), self.mixup)
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights that move, which are those that the policy trains."""
        weights = dict(self.model.named_parameters())
        return {name: weights[name].detach() for name in self.names}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, weight in self.state_dict().items():
            weight.copy_(state[name])


class WithoutAdapters:
    """Log-probabilities under the model in training with its adapters disabled."""

    def __init__(self, model) -> None:
        self.model = model

    def __call__(self, batch: PairBatch) -> PairLogps:
        import torch

        from dpo_lab.models.forward import pair_logps

        with torch.no_grad(), self.model.disable_adapter():
            return pair_logps(self.model, batch)

    def of_tokens(self, tokens: Tensor, lengths: np.ndarray) -> Tensor:
        """Return the log-probability of each response token of a stream."""
        import torch

        from dpo_lab.models.forward import token_logps_of

        with torch.no_grad(), self.model.disable_adapter():
            return token_logps_of(self.model, tokens, lengths)


def reference_model(reference: ReferenceLogps) -> PreTrainedModel | None:
    """Return the model that a reference runs in every step, which may share weights with the policy; None if there is
    none.
    """
    return getattr(reference, "model", None)
