"""Rollouts: responses that a policy sampled, with their rewards and what was measured when they were sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dpo_lab.core.pairs import chunk_by_size, to_device

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

OF_PROMPTS = ("rewards", "gold", "stopped")
OF_TOKENS = ("behaviour", "reference", "values", "advantages", "returns", "weights")


@dataclass
class Rollouts:
    """K sampled responses to each of P prompts, R response tokens together.

    keys: one a prompt; tokens: the prompt and the K responses of prompt 0, then of prompt 1, ...; lengths: of each, in
    tokens; rewards: of each response; gold: the reward that the task defines, NaN where there is none; stopped: whether the
    response ended by itself.

    Of the response tokens [R], in the order of the stream, None where a method does not need them: behaviour, reference: log-
    probabilities in nats under the policy that sampled them and under the reference; values: the critic's; advantages,
    returns: see PolicyGradient; weights: what the loss of a token is multiplied with. beta: the price of a nat then.
    """

    keys: list[str]
    tokens: Int[Tensor, " tokens"]
    lengths: Int[np.ndarray, "prompts parts"]
    rewards: Float[Tensor, "prompts responses"]
    gold: Float[Tensor, "prompts responses"]
    stopped: Bool[Tensor, "prompts responses"]
    beta: float = 0.0
    behaviour: Tensor = None  # type: ignore[assignment]  # where a method does not need it
    reference: Tensor = None  # type: ignore[assignment]
    values: Tensor = None  # type: ignore[assignment]
    advantages: Tensor = None  # type: ignore[assignment]
    returns: Tensor = None  # type: ignore[assignment]
    weights: Tensor = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def response_lengths(self) -> Int[np.ndarray, "prompts responses"]:
        return self.lengths[:, 1:]

    @property
    def log_ratios(self) -> Float[Tensor, " response_tokens"]:
        """log(pi / ref) of each token under the policy that sampled it."""
        assert self.behaviour is not None
        assert self.reference is not None
        return self.behaviour - self.reference

    @property
    def sizes(self) -> list[int]:
        """Number of tokens of each prompt with its responses."""
        return self.lengths.sum(1).tolist()

    def part(self, prompts: slice, rows: slice) -> Rollouts:
        """Return the rollouts of consecutive prompts, whose response tokens are `rows`."""
        ends = self.lengths.sum(1).cumsum()[prompts]
        begin = int(ends[0] - self.lengths[prompts][0].sum()) if len(ends) else 0
        own = {name: getattr(self, name)[prompts] for name in ("keys", "lengths", *OF_PROMPTS)}
        of_tokens = {name: None if (x := getattr(self, name)) is None else x[rows] for name in OF_TOKENS}
        return replace(self, tokens=self.tokens[begin : int(ends[-1]) if len(ends) else 0], **own, **of_tokens)

    def split(self, tokens: int) -> list[Rollouts]:
        """Split into micro-batches of consecutive prompts, see `chunk_by_size`."""
        ends = np.concatenate(([0], self.response_lengths.sum(1).cumsum()))
        parts = chunk_by_size(self.sizes, tokens)
        return [self.part(part, slice(int(ends[part.start]), int(ends[part.stop]))) for part in parts]

    def take(self, prompts: Sequence[int]) -> Rollouts:
        """Return the rollouts of some prompts, in the given order."""
        stream, rows = (_places(counts, prompts) for counts in (self.lengths.sum(1), self.response_lengths.sum(1)))
        own: dict[str, Any] = {name: getattr(self, name)[list(prompts)] for name in ("lengths", *OF_PROMPTS)}
        of_tokens = {name: None if (x := getattr(self, name)) is None else x[rows] for name in OF_TOKENS}
        keys = [self.keys[prompt] for prompt in prompts]
        return replace(self, keys=keys, tokens=self.tokens[stream], **own, **of_tokens)

    def to(self, device: torch.device | str) -> Rollouts:
        """Copy the tensors to a device, see `to_device`."""
        found = {name: getattr(self, name) for name in ("tokens", *OF_PROMPTS, *OF_TOKENS)}
        return replace(self, **{name: to_device(x, device) for name, x in found.items() if x is not None})

    def state_dict(self) -> dict[str, Any]:
        """Return the rollouts as plain values and tensors, for a checkpoint."""
        return {**vars(self), "lengths": torch.from_numpy(self.lengths)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Rollouts:
        return cls(**{**state, "lengths": state["lengths"].cpu().numpy()}).to("cpu")


def spread(
    of_responses: Float[Tensor, "prompts responses"], lengths: Int[np.ndarray, "prompts responses"]
) -> Float[Tensor, " response_tokens"]:
    """Repeat the value of each response for each of its tokens, in the order of the stream."""
    counts = to_device(torch.from_numpy(np.ascontiguousarray(lengths).ravel()), of_responses.device)
    return of_responses.flatten().repeat_interleave(counts, output_size=int(lengths.sum()))


def _places(counts: np.ndarray, items: Sequence[int]) -> Tensor:
    """Return the places of the given items in a stream of which item i has counts[i] places."""
    begins = counts.cumsum() - counts
    own = [np.arange(begins[item], begins[item] + counts[item]) for item in items]
    return torch.from_numpy(np.concatenate(own) if own else np.zeros(0, int))
