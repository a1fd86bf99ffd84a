"""Which evaluators run, and on how many samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpo_lab.evals.subject import Subject
    from dpo_lab.results.estimates import Estimate


@dataclass
class Evals:
    """Settings of the evaluation after training.

    batch_size: samples made side by side. Several ranks share whole batches out: give them one each at least.
    """

    samples: int = 512
    max_new_tokens: int = 48
    texts: int = 256
    batch_size: int = 128

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "texts", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"evals.{name}={getattr(self, name)}: must be 1 or more; type e.g. evals.{name}=256")


def evaluate(subject: Subject) -> dict[str, Estimate]:
    """All that is measured of a policy, by name; nothing where no pair is held out.

    All ranks have to call it, see Subject; all get the same.
    """
    if not len(subject.pairs):
        return {}
    from dpo_lab.evals.gold_correlation import GoldCorrelation
    from dpo_lab.evals.kl import KL
    from dpo_lab.evals.language import Language
    from dpo_lab.evals.preference import Preference
    from dpo_lab.evals.reward import GoldReward

    return {
        name: estimate
        for evaluator in (Preference(), GoldCorrelation(), KL(), GoldReward(), Language())
        for name, estimate in evaluator.run(subject)
    }
