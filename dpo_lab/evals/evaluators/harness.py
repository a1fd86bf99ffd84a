"""Benchmarks of the Language Model Evaluation Harness on both policies, compared item by item."""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dpo_lab.errors import LabError, check_at_least, first_line
from dpo_lab.evals.evaluators.base import Evaluator
from dpo_lab.stats.estimates import Estimate, mean, share

if TYPE_CHECKING:
    from dpo_lab.evals.context import EvalContext
    from dpo_lab.models.policy import Policy

PREFIX = "harness/"
Items = dict[tuple[str, str], dict[str, float]]  # (task, metric) -> key of an item -> value


class HarnessError(LabError, ValueError):
    """Raised where the harness can't run a task; the message is one line that says what to type."""


@dataclass
class Harness(
    Evaluator, name="harness", order=95, is_default=False, needs_samples=False, needs_reward=False, needs_pairs=False
):
    """Tasks of EleutherAI's lm-evaluation-harness, as `harness/TASK/METRIC` of the trained policy and under `initial/` of
    the initial one; `.../METRIC_change` is the mean difference over the same items. Intervals are over items, those of
    changes from the paired differences. A metric that is not a mean over items has no interval. Items on which only one
    policy has a finite value are no pairs: `.../METRIC_left_out` counts them.

    tasks: their names, groups too; runs whenever there are any. include_path: a folder of further task files; num_fewshot,
    limit: as the harness takes them, None for the task's own and for all items; batch_size: rows of a forward pass;
    chat_template: whether questions are rendered as chat. Rank 0 runs the tasks. Needs the package lm-eval.
    """

    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 16
    chat_template: bool = False

    labels = {}

    def __post_init__(self) -> None:
        check_at_least("evals.harness.batch_size", self.batch_size, 1, 16)
        if self.tasks and find_spec("lm_eval") is None:
            raise ValueError("evals.harness.tasks: needs lm-eval; type pip install 'dpo_lab[harness]'")

    @classmethod
    def labels_for(cls, metrics: Iterable[str]) -> dict[str, str]:
        names = [m for m in metrics if m.startswith(PREFIX)]
        ends = {"_change": "  change", "_left_out": "  items left out"}
        parts = {m: label for m in names for end, label in ends.items() if m.endswith(end)}
        return {m: parts.get(m, m.removeprefix(PREFIX).replace("/", ": ", 1)) for m in names}

    @classmethod
    def is_implied(cls, settings) -> bool:
        return bool(getattr(settings, "harness", cls()).tasks)

    def check(self) -> None:
        if self.tasks:
            self._manager()

    def run(self, context: EvalContext) -> Iterator[tuple[str, Estimate]]:
        from dpo_lab.distributed.collectives import broadcast_object, rank_and_world_size
        from dpo_lab.models.sharding import sharded_of

        if not self.tasks:
            return
        if sharded_of(context.trained.model) is not None:
            raise HarnessError(
                "evals.harness: does not run a policy that is sharded over ranks; leave evals.harness.tasks out, and type"
                " python -m dpo_lab.evaluate run=FOLDER evals.harness.tasks=[...] afterwards"
            )
        results: Any = None
        if rank_and_world_size()[0] == 0:
            manager = self._manager()
            results = self._results(context.trained, manager), self._results(context.initial, manager)
        (trained, of_trained), (initial, of_initial) = broadcast_object(results)
        for task, metric in dict.fromkeys([*trained, *initial]):
            values, before = (found.get((task, metric), {}) for found in (trained, initial))
            name = f"{PREFIX}{task}/{metric}"
            items = list(dict.fromkeys([*values, *before]))
            columns = {metric: values, f"initial_{metric}": before}
            lists = {column: [found.get(item) for item in items] for column, found in columns.items()}
            context.examples.add("harness", [f"{task}/{item}" for item in items], **lists)
            if values:
                yield name, _over_items([*values.values()])
            if before:
                yield f"initial/{name}", _over_items([*before.values()])
            if pairs := [(values[item], before[item]) for item in items if item in values and item in before]:
                yield f"{name}_change", mean(a - b for a, b in pairs)
            if left_out := len(items) - len(pairs):
                yield f"{name}_left_out", Estimate(left_out)
        for (task, metric), value in of_trained.items():
            if (task, metric) not in trained:
                yield f"{PREFIX}{task}/{metric}", Estimate(value)
                if (task, metric) in of_initial:
                    yield f"initial/{PREFIX}{task}/{metric}", Estimate(of_initial[task, metric])

    def _results(self, policy: Policy, manager: Any) -> tuple[Items, dict[tuple[str, str], float]]:
        """Return the values of all items, and the harness's own figures of its tasks. manager: its index of tasks."""
        import lm_eval  # type: ignore
        from lm_eval.models.huggingface import HFLM  # type: ignore

        from dpo_lab.terminal.progress import track

        try:
            with track(f"Harness ({', '.join(self.tasks)})", 1) as advance:
                model = HFLM(pretrained=policy.model, tokenizer=policy.tokenizer, batch_size=self.batch_size)
                found = lm_eval.simple_evaluate(
                    model=model,
                    tasks=list(self.tasks),
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    task_manager=manager,
                    bootstrap_iters=0,
                    apply_chat_template=self.chat_template,
                )
                advance(1)
        except Exception as error:  # many types, from data sets, network and task files
            raise HarnessError(
                f"evals.harness.tasks={self.tasks}: {type(error).__name__}: {first_line(error)}; its data have to be on this"
                " machine or reachable, else leave the task out"
            ) from error
        assert found is not None
        items: Items = {}
        for task, samples in found["samples"].items():
            for sample in samples:
                for metric in sample["metrics"]:
                    if isinstance(value := sample[metric], (bool, int, float)) and math.isfinite(value):
                        name = _metric(metric, sample["filter"])
                        items.setdefault((task, name), {})[str(sample["doc_id"])] = float(value)
        figures: dict[tuple[str, str], float] = {}
        for task, values in found["results"].items():
            for key, value in values.items():
                metric, _, chosen = key.partition(",")
                if (
                    chosen
                    and not metric.endswith("_stderr")
                    and isinstance(value, (int, float))
                    and math.isfinite(value)
                ):
                    figures[task, _metric(metric, chosen)] = float(value)
        return items, figures

    def _manager(self) -> Any:
        """Return the harness's index of tasks: those of include_path, and its own if these are not all."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from lm_eval.tasks import TaskManager  # type: ignore

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        for defaults in (False, True) if self.include_path else (True,):
            manager = TaskManager(include_path=self.include_path, include_defaults=defaults)
            known = set(manager.all_tasks)
            if not (missing := [task for task in self.tasks if task not in known]):
                return manager
        near = difflib.get_close_matches(missing[0], sorted(known), n=1, cutoff=0)[0]
        raise HarnessError(f"evals.harness.tasks: no task is called '{missing[0]}'; type evals.harness.tasks=[{near}]")


def _metric(name: str, chosen: str) -> str:
    """Return the name of a metric; chosen: the filter of answers that it was computed from."""
    return name if chosen == "none" else f"{name}.{chosen}"


def _over_items(values: list[float]) -> Estimate:
    return share(values) if all(0 <= value <= 1 for value in values) else mean(values)
