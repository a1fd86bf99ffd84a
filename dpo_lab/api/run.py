"""A run as an object: its config, metrics, history, examples, figures and policies, read from its folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_lab.config.from_run import from_record
from dpo_lab.config.reward_model import REWARD_MODEL
from dpo_lab.config.schema import RunConfig, validate
from dpo_lab.errors import LabError
from dpo_lab.reporting import figures
from dpo_lab.runs.cache import CACHE
from dpo_lab.stats.estimates import Estimate
from dpo_lab.studies.load import load_run_data
from dpo_lab.studies.run_data import RunData

if TYPE_CHECKING:
    from pandas import DataFrame

    from dpo_lab.models.policy import Policy


class Run:
    """A run that lies in a folder, whatever started it. Everything is read when it is asked for."""

    def __init__(self, data: RunData) -> None:
        self._data = data

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self._data.folder

    @property
    def status(self) -> str:
        """`done`, `running`, `failed`, `interrupted`, `preempted`, `stopped`, or `missing` if it has not started."""
        return self._data.status

    @property
    def record(self) -> Mapping[str, Any]:
        """The content of run.json: config, versions, data counts, metrics, health, timings, memory."""
        return self._data.record

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the run as nested dictionaries, without secrets."""
        return copy.deepcopy(dict(self.record["config"]))

    @property
    def metrics(self) -> dict[str, Estimate]:
        """The final metrics by name: `value`, `se`, `n` and the 95 % `interval` of each; empty if it is not done."""
        return dict(self._data.metrics)

    @cached_property
    def history(self) -> DataFrame:
        """What was logged, from metrics.jsonl: a row for each logged step, `step` and a column for each metric."""
        from pandas import DataFrame

        steps: dict[int, dict[str, Any]] = {}
        for row in self._data.log_rows():
            steps.setdefault(row["step"], {}).update(row)
        return DataFrame(list(steps.values()))

    @cached_property
    def trajectory(self) -> DataFrame:
        """The policy while it trained, see evals.every: a row for each point, `step` and a column for each metric, named as
        in `metrics`; empty if the run has none.
        """
        from pandas import DataFrame

        return DataFrame(self._data.trajectory())

    @cached_property
    def examples(self) -> DataFrame:
        """The values of each pair, prompt and text, from examples.jsonl: columns `kind`, `key`, and those of the kinds, which
        dpo_lab/runs/examples.py describes. One kind: `examples.query("kind == 'prompt'").dropna(axis=1, how="all")`.
        """
        from pandas import DataFrame

        found = self._data.examples()
        return DataFrame(
            [{"kind": kind, "key": key, **row} for kind, rows in found.items() for key, row in rows.items()]
        )

    @property
    def figures(self) -> list[Path]:
        """The paths of its figures as PNG files; they are drawn first if the run left it out."""
        drawn = self.folder / figures.FOLDER
        return sorted(drawn.glob("*.png")) or [each for each in figures.draw_run(self.folder) if each.suffix == ".png"]

    def policy(self) -> Policy:
        """Load the trained policy: `.model`, in evaluation mode, with adapters merged, and `.tokenizer`.

        Raises LabError if the run has none.
        """
        from dpo_lab.pipelines.evaluate_run import load_trained

        if REWARD_MODEL in self.record["config"]:
            raise LabError(
                f"{self.folder}: this run trained a reward model; load it by transformers'"
                f' AutoModelForSequenceClassification.from_pretrained("{self.folder}/reward_model")'
            )
        if self.status != "done":
            raise LabError(f"{self.folder}: its status is {self.status}, so no policy is there yet; run it again first")
        return load_trained(self._settings.policy, self.trained)

    def initial_policy(self) -> Policy:
        """Load the policy that training started from, as `policy` does; that of the embedded task is made again if it is no
        longer in the cache. Raises LabError if it has changed since.
        """
        from dpo_lab.models.policy import weights_digest
        from dpo_lab.pipelines.inputs import policies

        policy, _ = policies(self._settings, CACHE)
        policy.model.eval()
        was = self.record.get("initial_policy")
        if was not in (None, weights_digest(policy.model)):
            raise LabError(f"{self.folder}: the initial policy is not that of the run any more; restore its files")
        return policy

    @property
    def trained(self) -> Path:
        """The folder of the trained policy."""
        return Path(self.record["config"].get("trained") or self.folder / "policy")

    @cached_property
    def _settings(self) -> RunConfig:
        return validate(from_record(self.record["config"]))

    def __repr__(self) -> str:
        metrics = ", ".join(f"{name} {each.value:.4g}" for name, each in list(self.metrics.items())[:4])
        return f"<Run {self.folder}: {self.status}{f'; {metrics}' if metrics else ''}>"


def load_run(folder: str | Path) -> Run:
    """Load the run in a folder, finished or not. Raise LabError if the folder holds none."""
    data = load_run_data(Path(folder))
    if data.status == "missing":
        raise LabError(f"{folder}: holds no run.json; type the folder of a run, e.g. outputs/dpo/default/seed=0")
    if data.status == "unreadable":
        raise LabError(str(data.error))
    return Run(data)
