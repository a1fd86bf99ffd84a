"""The settings of an evaluation, and `evaluate`, which runs its evaluators."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_lab.data.rows import local_files
from dpo_lab.errors import check_at_least
from dpo_lab.evals.engines import Engine
from dpo_lab.evals.engines.exact import Exact
from dpo_lab.evals.evaluators.base import EVALUATORS, Evaluator, default_evaluators, in_order
from dpo_lab.evals.judges import Judge
from dpo_lab.evals.judges.classifier import Classifier
from dpo_lab.runs.run_record import RECORD

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext
    from dpo_lab.stats.estimates import Estimate


@dataclass
class SharedSettings:
    """Settings that evaluators share. evaluators: the names of those to run.

    num_prompts: number of prompts, with one sampled response each; num_texts: number of held-out texts;
    num_train_pairs: number of training pairs, chosen by their keys, so that runs on the same pairs measure the same
    ones. batch_size: samples generated per batch; with several ranks there should be a batch for each. pairs: further
    files of preference pairs to measure accuracy on, by name. prompts: a file of prompts, in place of those of the data.
    third: the folder of a further policy, or of its run, to compare the trained one with. engine: samples the responses.
    judge: the judge of all evaluators that use one.

    every: the policy in training is measured every so many optimizer steps, on the first `num_trajectory_prompts` of the
    prompts; 0: only when it is trained. See evals/trajectory.py; neither changes training or final metrics.
    """

    evaluators: list[str] = field(default_factory=default_evaluators)
    num_prompts: int = 512
    max_new_tokens: int = 48
    num_texts: int = 256
    num_train_pairs: int = 512
    batch_size: int = 128
    pairs: dict[str, str] = field(default_factory=dict)
    prompts: str | None = None
    third: str | None = None
    engine: Engine = field(default_factory=Exact)
    judge: Judge = field(default_factory=Classifier)
    every: int = 0
    num_trajectory_prompts: int = 128

    def __post_init__(self) -> None:
        for name in ("num_prompts", "max_new_tokens", "num_texts", "batch_size"):
            check_at_least(f"evals.{name}", getattr(self, name), 1, 256)
        check_at_least("evals.num_train_pairs", self.num_train_pairs, 0, 256)
        check_at_least("evals.every", self.every, 0, 40)
        check_at_least("evals.num_trajectory_prompts", self.num_trajectory_prompts, 2, 128)
        for name in self.evaluators:
            if name not in EVALUATORS:
                near = difflib.get_close_matches(name, EVALUATORS, n=1, cutoff=0)[0]
                raise ValueError(f"evals.evaluators: no evaluator is called '{name}'; type evals.evaluators=[{near}]")

    def selected(self) -> list[Evaluator]:
        """Return the evaluators to run, with their settings: those listed, and those that other settings imply."""
        names = [*self.evaluators, *(name for name in in_order() if EVALUATORS[name].is_implied(self))]
        return [getattr(self, name, None) or EVALUATORS[name]() for name in dict.fromkeys(names)]

    def check(self) -> None:
        """Raise LabError if an evaluator or the engine can't run; called before training."""
        selected = self.selected()
        for each in selected:
            each.check()
        if any(evaluator.needs_samples for evaluator in selected):
            self.engine.check()

    def files(self) -> list[Path]:
        """Return the local files that only the evaluation reads."""
        return measured_files(vars(self))

    @property
    def samples(self) -> bool:
        """Whether responses are sampled, in training or when it is over."""
        return self.every > 0 or any(evaluator.needs_samples for evaluator in self.selected())

    @property
    def uses_judge(self) -> bool:
        """Whether the judge is asked, if there is one."""
        is_compared = bool(self.pairs) or self.third is not None
        return is_compared or self.every > 0 or any(evaluator.needs_reward for evaluator in self.selected())


def measured_files(evals: Mapping[str, Any]) -> list[Path]:
    """Return the local files that `evals.pairs`, `evals.prompts` and `evals.third` name. evals: the settings by name."""
    third = evals.get("third")
    paths = [*evals.get("pairs", {}).values(), evals.get("prompts"), str(policy_folder(third)) if third else None]
    return [file for path in paths if path for file in local_files(path)]


def policy_folder(path: str) -> Path:
    """Return the folder of the policy of a run, or the folder itself if it is not that of a run."""
    return Path(path, "policy") if Path(path, RECORD).is_file() else Path(path)


def define_settings() -> None:
    """Define `Evals`, the settings `evals.key=`: the shared ones and, under their names, those of evaluators with fields.

    Called again when plugins have added evaluators.
    """
    with_fields = [(name, kind, field(default_factory=kind)) for name, kind in EVALUATORS.items() if fields(kind)]
    globals()["Evals"] = make_dataclass(
        "Evals", with_fields, bases=(SharedSettings,), namespace={"__module__": __name__}
    )


Evals: type[SharedSettings]
define_settings()


def evaluate(context: EvalContext, evaluators: Iterable[Evaluator] | None = None) -> dict[str, Estimate]:
    """Run the evaluators, by default the default ones, and return their estimates by name.

    Those that need held-out pairs, or samples, are left out if there are no held-out pairs, or no prompts to sample from.
    Values per example are in context.examples afterwards. All ranks have to call it, see EvalContext; all get the same
    result.
    """
    evaluators = SharedSettings().selected() if evaluators is None else evaluators
    if not len(context.pairs):
        evaluators = [
            each for each in evaluators if not each.needs_pairs and (context.prompts or not each.needs_samples)
        ]
    estimates = {name: estimate for evaluator in evaluators for name, estimate in evaluator.run(context)}
    context.add_texts()
    return estimates
