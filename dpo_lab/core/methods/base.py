"""The base classes of methods: the traits that each states, and the table of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dpo_lab.core.registry import add_to_table
from dpo_lab.errors import check_at_least

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float, Int
    from torch import Tensor

    from dpo_lab.core.rollouts import Rollouts

METHODS: dict[str, type[Method]] = {}  # by name in configs


@dataclass
class Method:
    """The base class of methods.

    A subclass that a config may name states its name there; uses_loss: whether it trains with `loss=`, a loss of pairs.
    """

    name: ClassVar[str]
    uses_loss: ClassVar[bool]

    def __init_subclass__(cls, *, name: str | None = None, uses_loss: bool = False) -> None:
        cls.uses_loss = uses_loss
        if name is not None:
            cls.name = name
            add_to_table(METHODS, name, cls)

    @property
    def is_online(self) -> bool:
        """Whether it trains on responses that the policy samples while it trains, and not on given pairs."""
        return isinstance(self, Online)

    @property
    def has_critic(self) -> bool:
        """Whether it trains a critic beside the policy."""
        return False


@dataclass
class Online(Method):
    """The base class of methods that train on responses of the policy itself.

    prompts: of one rollout, to each of which the policy of now samples `samples` responses of at most max_new_tokens
    tokens (None: as many as the task's, else those of the evaluation). An optimizer step trains on a minibatch, prompts /
    minibatches of the prompts; each prompt is trained on `epochs` times before the next rollout. missing_end_penalty: what
    the reward of a response that reached its length limit without an end token is lowered by, in units of the reward.
    """

    prompts: int = 16
    samples: int = 4
    epochs: int = 1
    minibatches: int = 1
    max_new_tokens: int | None = None
    missing_end_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name, least in {"prompts": 1, "samples": 2, "epochs": 1, "minibatches": 1}.items():
            check_at_least(f"method.{name}", getattr(self, name), least, least)
        if self.max_new_tokens is not None:
            check_at_least("method.max_new_tokens", self.max_new_tokens, 1, 48)
        check_at_least("method.missing_end_penalty", self.missing_end_penalty, 0, 1)
        if self.prompts % self.minibatches:
            raise ValueError(
                f"method.minibatches={self.minibatches}: must divide method.prompts={self.prompts}; type"
                f" method.prompts={self.minibatches * (self.prompts // self.minibatches + 1)}"
            )

    @property
    def updates(self) -> int:
        """Number of optimizer steps between two rollouts."""
        return self.epochs * self.minibatches

    @property
    def prompts_per_step(self) -> int:
        """Number of prompts that an optimizer step trains on."""
        return self.prompts // self.minibatches


@dataclass
class PolicyGradient(Online):
    """The base class of methods that raise the log-probability of each response by its advantage.

    beta: the price of a nat of KL divergence from the reference, in units of the reward, so that the optimum is
    reference x exp(reward / beta) / Z, as in DPO. clip: the ratio of the policy's probability to that at sampling earns no
    more beyond 1 + clip for a good response, and below 1 - clip for a bad one (Schulman et al. 2017, arXiv:1707.06347,
    equation 7); it matters from the second optimizer step after a rollout on.
    """

    beta: float = 0.1
    clip: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta={self.beta}: must be a positive number; type e.g. beta=0.1")
        if not self.clip > 0:
            raise ValueError(f"method.clip={self.clip}: must be above 0; type e.g. method.clip=0.2")

    def advantages(
        self, rollouts: Rollouts
    ) -> tuple[Float[Tensor, " response_tokens"], Float[Tensor, " response_tokens"] | None]:
        """Return the advantage of each response token, and what the critic should have said before it, if there is one."""
        raise NotImplementedError

    def token_weights(
        self, lengths: Int[np.ndarray, "prompts responses"], longest: int
    ) -> Float[np.ndarray, "prompts responses"]:
        """Return what the losses of each response's tokens are multiplied with; lengths: of the responses of an optimizer
        step, in tokens; longest: the length limit of sampling.
        """
        raise NotImplementedError

    def log_ratios(
        self, logps: Float[Tensor, " response_tokens"], rollouts: Rollouts
    ) -> Float[Tensor, " response_tokens"]:
        """Return the logarithm of the ratio that is clipped, of each response token."""
        return logps - rollouts.behaviour

    def loss(self, logps: Float[Tensor, " response_tokens"], rollouts: Rollouts) -> Tensor:
        """Return losses whose sum over an optimizer step, divided by its number of responses, is minimised.

        logps: log-probabilities under the policy of now, in nats, differentiable; rollouts: with advantages and weights.
        """
        raise NotImplementedError

    def next_beta(self, beta: float, kl: float) -> float:
        """Return the beta of the next rollout, after one of beta `beta` with a KL divergence of `kl` nats a response."""
        return beta


def clipped(log_ratios: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Return min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), see PolicyGradient."""
    import torch

    ratios = log_ratios.clamp(max=40).exp()
    return torch.minimum(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages)


def clipped_share(log_ratios: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Return for each ratio whether `clipped` has no gradient there."""
    return ((advantages > 0) & (log_ratios.exp() > 1 + clip)) | ((advantages < 0) & (log_ratios.exp() < 1 - clip))
