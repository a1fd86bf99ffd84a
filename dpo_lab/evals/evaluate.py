"""The settings of the evaluators, and `evaluate`, which runs them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dpo_lab.errors import check_at_least
from dpo_lab.evals.calibration import Calibration
from dpo_lab.evals.displacement import Displacement
from dpo_lab.evals.judge import Judge
from dpo_lab.evals.kl import KL
from dpo_lab.evals.language import Language
from dpo_lab.evals.optimum import Optimum
from dpo_lab.evals.preference import Preference
from dpo_lab.evals.reward import Reward
from dpo_lab.evals.win_rate import WinRate

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext, Evaluator
    from dpo_lab.stats.estimates import Estimate

EVALUATORS: dict[str, Any] = {
    "preference": Preference,
    "calibration": Calibration,
    "displacement": Displacement,
    "kl": KL,
    "reward": Reward,
    "win_rate": WinRate,
    "language": Language,
    "optimum": Optimum,
}
ON_REQUEST = ("optimum",)  # evaluators that are not in the default of evals.run


@dataclass
class Evals:
    """Settings of the evaluation after training.

    run: names of EVALUATORS. samples: number of prompts, with one response each; texts: number of held-out texts;
    train_pairs: number of training pairs, chosen by their keys, so that runs on the same pairs measure the same ones.
    batch_size: samples generated per batch; with several ranks there should be a batch for each.
    """

    run: list[str] = field(default_factory=lambda: [name for name in EVALUATORS if name not in ON_REQUEST])
    samples: int = 512
    max_new_tokens: int = 48
    texts: int = 256
    train_pairs: int = 512
    batch_size: int = 128
    calibration: Calibration = field(default_factory=Calibration)
    optimum: Optimum = field(default_factory=Optimum)
    judge: Judge = field(default_factory=Judge)

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "texts", "batch_size"):
            check_at_least(f"evals.{name}", getattr(self, name), 1, 256)
        check_at_least("evals.train_pairs", self.train_pairs, 0, 256)
        for name in self.run:
            if name not in EVALUATORS:
                near = difflib.get_close_matches(name, EVALUATORS, n=1, cutoff=0)[0]
                raise ValueError(f"evals.run: no evaluator is called '{name}'; type evals.run=[{near}]")

    @property
    def samples_responses(self) -> bool:
        """Whether any of the evaluators may need samples of the policy."""
        return not {"preference", "calibration", "displacement"}.issuperset(self.run)

    def evaluators(self) -> list[Evaluator]:
        """Return the evaluators to run, with their settings."""
        return [getattr(self, name, None) or EVALUATORS[name]() for name in self.run]


def evaluate(context: EvalContext, evaluators: Iterable[Evaluator] | None = None) -> dict[str, Estimate]:
    """Run the evaluators, by default those of `Evals()`, and return their estimates by name; {} if no pair is held out.

    Values per example are in context.examples afterwards. All ranks have to call it, see EvalContext; all get the same
    result.
    """
    if not len(context.pairs):
        return {}
    evaluators = Evals().evaluators() if evaluators is None else evaluators
    estimates = {name: estimate for evaluator in evaluators for name, estimate in evaluator.run(context)}
    context.keep_texts()
    return estimates
