"""The settings of the evaluators, and `evaluate`, which runs them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
ON_REQUEST = ("optimum",)  # the others run unless told otherwise


@dataclass
class Evals:
    """Settings of the evaluation after training.

    run: names of EVALUATORS. samples: prompts answered; texts: held-out texts; train_pairs: training pairs, chosen by their
    keys, so that runs on the same pairs look at the same ones. batch_size: samples made side by side. Several ranks share
    whole batches out: give them one each at least.
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
            if getattr(self, name) < 1:
                raise ValueError(f"evals.{name}={getattr(self, name)}: must be 1 or more; type e.g. evals.{name}=256")
        if self.train_pairs < 0:
            raise ValueError(
                f"evals.train_pairs={self.train_pairs}: must be 0 or more; type e.g. evals.train_pairs=256"
            )
        for name in self.run:
            if name not in EVALUATORS:
                near = difflib.get_close_matches(name, EVALUATORS, n=1, cutoff=0)[0]
                raise ValueError(f"evals.run: no evaluator is called '{name}'; type evals.run=[{near}]")

    @property
    def samples_responses(self) -> bool:
        """Whether any that run may look at samples of the policy."""
        return not {"preference", "calibration", "displacement"}.issuperset(self.run)

    def evaluators(self) -> list[Evaluator]:
        """Those that run, with their settings."""
        return [getattr(self, name, None) or EVALUATORS[name]() for name in self.run]


def evaluate(subject: EvalContext, evaluators: Iterable[Evaluator] | None = None) -> dict[str, Estimate]:
    """All that is measured of a policy, by name; nothing where no pair is held out. evaluators: none given, those that run
    unless told otherwise.

    What was measured of each example is in subject.examples afterwards. All ranks have to call it, see EvalContext; all get the
    same.
    """
    if not len(subject.pairs):
        return {}
    chosen = Evals().evaluators() if evaluators is None else evaluators
    found = {name: estimate for evaluator in chosen for name, estimate in evaluator.run(subject)}
    subject.keep_texts()
    return found
