"""References: what the policy's log-probabilities are compared with while it trains.

Each kind is a dataclass that `prepare`s a `ReferenceLogps`: a batch of pairs in, their reference log-probabilities out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dpo_lab.core.pairs import EncodedPair, PairBatch, PairLogps
from dpo_lab.models.policy import trainable_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ReferenceLogps = Callable[[PairBatch], PairLogps]
TOKENS = 2048  # a forward, unless told otherwise


@dataclass
class Reference:
    """What all kinds share. starts_at_policy: whether reference and policy agree before the first step."""

    starts_at_policy: ClassVar[bool] = True

    def prepare(
        self,
        initial: PreTrainedModel,
        pairs: Sequence[EncodedPair],
        cache: Path,
        context: Callable[[], AbstractContextManager] = nullcontext,
        tokens: int = TOKENS,
    ) -> ReferenceLogps:
        """Get ready for batches of `pairs`.

        initial: the policy before training, the very model that will be trained; cache: a folder to keep results in;
        context: what forwards run under (autocast), the same as the policy's; tokens: about how many a forward may take.
        """
        raise NotImplementedError


@dataclass
class Frozen(Reference):
    """A frozen copy of the initial policy, run beside it: one more forward a step, and a second model in memory.

    Of a policy with adapters only these are copied, trained ones included: their base stands in memory once.
    """

    def prepare(self, initial, pairs, cache, context=nullcontext, tokens=TOKENS) -> ReferenceLogps:
        return FrozenModel(trainable_copy(initial))


@dataclass
class Cached(Reference):
    """The initial policy's log-probabilities, computed once, kept on disk and looked up by pair: one model in memory."""

    def prepare(self, initial, pairs, cache, context=nullcontext, tokens=TOKENS) -> ReferenceLogps:
        from dpo_lab.models.reference_cache import cached_logps

        return cached_logps(initial, pairs, cache, context, tokens)


@dataclass
class AdapterOff(Reference):
    """The policy in training with its adapters switched off, which is the model that they were put on: no second model."""

    def prepare(self, initial, pairs, cache, context=nullcontext, tokens=TOKENS) -> ReferenceLogps:
        return WithoutAdapters(initial)


class UniformOver(str, Enum):
    """What a uniform reference is uniform over."""

    sequences = "sequences"
    tokens = "tokens"


@dataclass
class Uniform(Reference):
    """No model: every response is as likely as any other. Costs no forward and no memory.

    over=sequences: one constant for all responses, which cancels: DPO becomes a ranking loss on log-probabilities alone.
    over=tokens: -|y| ln V, every token as likely as any other; does not cancel where lengths differ.
    """

    over: UniformOver = UniformOver.sequences
    starts_at_policy: ClassVar[bool] = False

    def prepare(self, initial, pairs, cache, context=nullcontext, tokens=TOKENS) -> ReferenceLogps:
        return UniformLogps(0.0 if self.over is UniformOver.sequences else math.log(initial.config.vocab_size))


@dataclass
class UniformLogps:
    """-nats_per_token for every response token."""

    nats_per_token: float

    def __call__(self, batch: PairBatch) -> PairLogps:
        _, chosen, rejected = batch.lengths.unbind(1)
        return PairLogps(-self.nats_per_token * chosen, -self.nats_per_token * rejected, chosen, rejected)


class FrozenModel:
    """A model that nothing trains, moves into a checkpoint or switches to train mode; it follows its batches' device."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    def __call__(self, batch: PairBatch) -> PairLogps:
        import torch

        from dpo_lab.models.forward import pair_logps

        self.model.to(batch.tokens.device)  # type: ignore[arg-type]
        with torch.no_grad():
            return pair_logps(self.model, batch)


class WithoutAdapters:
    """A model in training, seen without what it has learned since its fresh adapters were put on."""

    def __init__(self, model) -> None:
        self.model = model

    def __call__(self, batch: PairBatch) -> PairLogps:
        import torch

        from dpo_lab.models.forward import pair_logps

        with torch.no_grad(), self.model.disable_adapter():
            return pair_logps(self.model, batch)


def reference_model(reference: ReferenceLogps) -> PreTrainedModel | None:
    """The model that a reference runs in every step, which may share weights with the policy; None where it runs none."""
    return getattr(reference, "model", None)


REFERENCES: dict[str, type[Reference]] = {
    "cached": Cached,
    "frozen": Frozen,
    "adapter_off": AdapterOff,
    "uniform": Uniform,
}
