"""The base class of evaluators: what each states of itself, and the table of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dpo_lab.core.registry import add_to_table

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext
    from dpo_lab.stats.estimates import Estimate

EVALUATORS: dict[str, type[Evaluator]] = {}  # by name in configs


@dataclass
class Evaluator:
    """The base class of evaluators. The fields of a subclass are its settings, `evals.NAME.FIELD=`.

    A subclass defines `run` and states its traits, of which needs_pairs and of_texts alone have defaults. name: its name
    in configs. order: its place among the evaluators of a run and in the table of results. is_default: whether runs use
    it unless evals.evaluators says otherwise. needs_samples: whether it samples responses. needs_pairs: whether it is
    left out without held-out pairs; by default only if it does not sample. of_texts: which of its metrics are of held-out
    texts, and not of samples. needs_reward: whether it measures nothing without the gold reward of a task or a judge.
    labels: its rows in the table of results, metric -> label; `initial/METRIC`, if it is measured, is shown beside
    METRIC, and a metric without a label is recorded, but not shown.
    """

    order: ClassVar[int]
    is_default: ClassVar[bool]
    needs_samples: ClassVar[bool]
    needs_pairs: ClassVar[bool]
    needs_reward: ClassVar[bool]
    of_texts: ClassVar[Sequence[str]] = ()
    labels: ClassVar[Mapping[str, str]]

    def __init_subclass__(
        cls,
        *,
        name: str,
        order: int,
        is_default: bool,
        needs_samples: bool,
        needs_reward: bool,
        needs_pairs: bool | None = None,
    ) -> None:
        if "labels" not in vars(cls):
            raise TypeError(f"{cls.__qualname__}: states no labels; give it labels = {{metric: label}}")
        cls.order, cls.is_default = order, is_default
        cls.needs_samples, cls.needs_reward = needs_samples, needs_reward
        cls.needs_pairs = not needs_samples if needs_pairs is None else needs_pairs
        add_to_table(EVALUATORS, name, cls)

    @classmethod
    def labels_for(cls, metrics: Iterable[str]) -> dict[str, str]:
        """Return the labels of those metrics that it has measured and labels, in their order."""
        measured = set(metrics)
        return {metric: label for metric, label in cls.labels.items() if metric in measured}

    @classmethod
    def is_implied(cls, settings: Any) -> bool:
        """Whether the settings of the evaluation, `Evals`, name what it alone measures, so that it runs unlisted."""
        return False

    def check(self) -> None:
        """Raise LabError if it can't run; called before training."""

    def run(self, context: EvalContext) -> Iterator[tuple[str, Estimate]]:
        """Yield (metric, estimate) and add the values per example to context.examples.

        A metric is named `metric` or `metric/part`, the same in every run.
        """
        raise NotImplementedError


def in_order() -> list[str]:
    """Return the names of all evaluators in their order."""
    return sorted(EVALUATORS, key=lambda name: (EVALUATORS[name].order, name))


def default_evaluators(*more: str) -> list[str]:
    """Return the names of the default evaluators and of those in `more`, in their order."""
    return [name for name in in_order() if EVALUATORS[name].is_default or name in more]


def labels_of(metrics: Iterable[str], prompt_file: str = "") -> dict[str, str]:
    """Return the labels of those metrics that have one, in the order of the table of results.

    prompt_file: the file that the prompts are from, named in the labels of what is measured on them.
    """
    metrics, labels = list(metrics), {}
    for cls in (EVALUATORS[name] for name in in_order()):
        for metric, label in cls.labels_for(metrics).items():
            is_of_file = prompt_file and cls.needs_samples and metric not in cls.of_texts and not label.startswith(" ")
            labels[metric] = f"{label}, {prompt_file}" if is_of_file else label
    return labels
