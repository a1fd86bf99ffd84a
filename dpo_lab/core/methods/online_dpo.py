"""Online DPO: `loss=` on pairs of fresh responses, labelled by a reward."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from dpo_lab.core.methods.base import Online

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Generator, Tensor


class Labels(str, Enum):
    """How a pair of fresh responses is labelled."""

    sampled = "sampled"  # by Bradley-Terry: the first is chosen with probability sigma(its reward - the other's)
    sign = "sign"  # the response of higher reward is chosen


class Candidates(str, Enum):
    """Which of the K responses to a prompt are compared."""

    extremes = "extremes"  # the best and the worst
    first_two = "first_two"


@dataclass
class OnlineDPO(Online, name="online_dpo", uses_loss=True):
    """Trains with a loss of pairs on pairs of the policy's own responses. Guo et al. 2024 (arXiv:2402.04792).

    labels, candidates: see there. With sampled labels of the first two responses the optimum is that of DPO.
    """

    prompts: int = 32
    samples: int = 2
    labels: Labels = Labels.sampled
    candidates: Candidates = Candidates.first_two

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples > 2 and self.candidates is Candidates.first_two:
            raise ValueError(
                f"method.samples={self.samples}: method.candidates=first_two compares 2 of them; type method.samples=2, or"
                " method.candidates=extremes"
            )

    def choose(
        self, rewards: Float[Tensor, "prompts responses"], generator: Generator
    ) -> tuple[Int[Tensor, " prompts"], Int[Tensor, " prompts"]]:
        """Return which response of each prompt is chosen and which is rejected."""
        import torch

        if self.candidates is Candidates.extremes:
            first, second = rewards.argmax(1), rewards.argmin(1)
        else:
            first, second = torch.zeros(len(rewards), dtype=torch.long), torch.ones(len(rewards), dtype=torch.long)
        margins = (rewards.gather(1, first[:, None]) - rewards.gather(1, second[:, None]))[:, 0].double()
        uniforms = torch.rand(len(rewards), generator=generator, dtype=torch.float64)
        is_first = margins >= 0 if self.labels is Labels.sign else uniforms < margins.sigmoid()
        return torch.where(is_first, first, second), torch.where(is_first, second, first)
