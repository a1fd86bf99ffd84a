"""The settings of an evaluation, and `evaluate`, which runs its evaluators."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_lab.data.rows import local_files
from dpo_lab.errors import check_at_least
from dpo_lab.evals.evaluators.base import EVALUATORS, Evaluator, default_evaluators, in_order
from dpo_lab.evals.judges import Judge
from dpo_lab.evals.judges.classifier import Classifier

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext
    from dpo_lab.stats.estimates import Estimate


@dataclass
class SharedSettings:
    """Settings that evaluators share. evaluators: the names of those to run.

    num_prompts: number of prompts, with one sampled response each; num_texts: number of held-out texts;
    num_train_pairs: number of training pairs, chosen by their keys, so that runs on the same pairs measure the same
    ones. batch_size: samples generated per batch; with several ranks there should be a batch for each. pairs: further
    files of preference pairs to measure accuracy on, by name. judge: the judge of all evaluators that use one.
    """

    evaluators: list[str] = field(default_factory=default_evaluators)
    num_prompts: int = 512
    max_new_tokens: int = 48
    num_texts: int = 256
    num_train_pairs: int = 512
    batch_size: int = 128
    pairs: dict[str, str] = field(default_factory=dict)
    judge: Judge = field(default_factory=Classifier)

    def __post_init__(self) -> None:
        for name in ("num_prompts", "max_new_tokens", "num_texts", "batch_size"):
            check_at_least(f"evals.{name}", getattr(self, name), 1, 256)
        check_at_least("evals.num_train_pairs", self.num_train_pairs, 0, 256)
        for name in self.evaluators:
            if name not in EVALUATORS:
                near = difflib.get_close_matches(name, EVALUATORS, n=1, cutoff=0)[0]
                raise ValueError(f"evals.evaluators: no evaluator is called '{name}'; type evals.evaluators=[{near}]")

    def selected(self) -> list[Evaluator]:
        """Return the evaluators to run, with their settings: those listed, and those that other settings imply."""
        names = [*self.evaluators, *(name for name in in_order() if EVALUATORS[name].is_implied(self))]
        return [getattr(self, name, None) or EVALUATORS[name]() for name in dict.fromkeys(names)]

    def files(self) -> list[Path]:
        """Return the local files that evals.pairs names."""
        return [file for path in self.pairs.values() for file in local_files(path)]

    @property
    def uses_judge(self) -> bool:
        """Whether an evaluator asks the judge, if there is one."""
        return bool(self.pairs) or any(evaluator.needs_reward for evaluator in self.selected())


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

    Without held-out pairs only those run that measure samples, and without held-out prompts, which then stand alone, none.
    Values per example are in context.examples afterwards. All ranks have to call it, see EvalContext; all get the same
    result.
    """
    evaluators = SharedSettings().selected() if evaluators is None else evaluators
    if not len(context.pairs):
        evaluators = [each for each in evaluators if each.needs_samples] if context.prompts else []
    estimates = {name: estimate for evaluator in evaluators for name, estimate in evaluator.run(context)}
    context.add_texts()
    return estimates
