"""A later evaluation: load the trained policy, rebuild the inputs of its run, measure, record, summarise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dpo_lab import plugins
from dpo_lab.cli.next_steps import print_finished_run
from dpo_lab.config.from_run import EvaluateConfig, config_from_run, evaluation_record, load_finished_run
from dpo_lab.config.schema import RunConfig, input_files
from dpo_lab.evals.context import EvalContext
from dpo_lab.evals.evaluate import evaluate
from dpo_lab.evals.evaluators.base import labels_of
from dpo_lab.models.policy import PolicyConfig, weights_digest
from dpo_lab.pipelines.eval_inputs import build_eval_context, load_judge, read_eval_inputs
from dpo_lab.pipelines.inputs import TrainingInputs, prepare_pairs, select_on_device
from dpo_lab.pipelines.setup import forward_settings, logging_to, make_trainer, memory_explained, setup_process
from dpo_lab.pipelines.stage_timer import StageTimer
from dpo_lab.pipelines.trained_policy import check_folder, load_trained
from dpo_lab.reporting.figures import draw_run
from dpo_lab.reporting.run_summary import print_summary
from dpo_lab.runs import evaluations, run_record
from dpo_lab.runs.cache import CACHE
from dpo_lab.runs.examples import EXAMPLES
from dpo_lab.runs.redact import redact_override
from dpo_lab.runs.run_record import acquire_run
from dpo_lab.stats.estimates import Estimate
from dpo_lab.terminal.progress import plain_console


def run_evaluation(cfg: DictConfig, config: EvaluateConfig) -> None:
    """Evaluate a finished run again, or a policy that another trainer made, as the config says."""
    if config.run is not None:
        _evaluate_run(cfg, config, Path(config.run))
    else:
        _evaluate_trained(cfg, config, Path(str(config.trained)), config.folder)


def _evaluate_run(cfg: DictConfig, config: EvaluateConfig, folder: Path) -> None:
    """Evaluate the policy of the run in `folder` with the run's settings, and write the result to its `evaluations`.

    Raises RunRefused if data, tokenizer or a policy have changed since that run.
    """
    record, overrides = load_finished_run(folder), list(HydraConfig.get().overrides.task)
    of_run, into, trained = config_from_run(record, cfg, overrides), folder / "evaluations", folder / "policy"
    evaluations.check(into, config.name)
    with _prepared(of_run, trained, into) as found:
        _check_identity(record, found.identity, of_run.policy)
        metrics = found.measure()
    result = {
        "run": str(folder),
        "trained": str(trained),
        "overrides": [redact_override(override) for override in (*plugins.words(), *overrides)],
        **plugins.as_record(),
        "evals": asdict(of_run.evals),
        **found.results(metrics),
        **run_record.provenance(),
    }
    path = evaluations.commit(into, config.name, result, found.context.examples)
    print_summary(
        plain_console(), metrics, labels_of(metrics, found.context.prompt_file), found.context.side_by_side, path, ()
    )


def _evaluate_trained(cfg: DictConfig, config: EvaluateConfig, trained: Path, folder: Path) -> None:
    """Evaluate the policy in `trained` against the initial policy of `config`, on its held-out pairs, and record it in
    `folder` as a run that trained nothing. A finished one is not measured again.
    """
    check_folder(trained)
    files = [*input_files(config), *sorted(file for file in trained.iterdir() if file.is_file())]
    with acquire_run(folder, evaluation_record(cfg, config), HydraConfig.get().overrides.task, files) as run:
        if run is None:
            print_finished_run(run_record.read_record(folder) or {}, folder, ())
            return
        with _prepared(config, trained, folder) as found:
            run.check_inputs_unchanged(**found.identity)
            metrics = found.measure()
        found.context.examples.write(folder / EXAMPLES)
        labels = labels_of(metrics, found.context.prompt_file)
        run.update(
            data=dict(found.inputs.counts),
            initial_policy=found.identity["initial_policy"],
            trained_policy=found.identity["trained_policy"],
            metric_labels=labels,
            **found.results(metrics),
        )
        if config.figures:
            draw_run(folder)
    print_summary(plain_console(), metrics, labels, found.context.side_by_side, folder, ())


@dataclass(frozen=True)
class _Prepared:
    """What an evaluation is made of, before it is measured."""

    config: RunConfig
    inputs: TrainingInputs
    identity: dict[str, str]
    context: EvalContext
    timer: StageTimer
    measured_with: Mapping[str, Any]

    def measure(self) -> dict[str, Estimate]:
        """Return the metrics of the config's evaluators."""
        return evaluate(self.context, self.config.evals.selected())

    def results(self, metrics: Mapping[str, Estimate]) -> dict[str, Any]:
        """Return what is recorded of an evaluation that is over."""
        return {
            "identity": self.identity,
            "metrics": {name: estimate.as_record() for name, estimate in metrics.items()},
            **({"judge": costs} if (judge := self.context.judge) is not None and (costs := judge.costs()) else {}),
            **({"measured_with": dict(self.measured_with)} if self.measured_with else {}),
            "samples": self.context.side_by_side[:16],
            "seconds": self.timer.stop("evaluate"),
        }


@contextmanager
def _prepared(config: RunConfig, trained: Path, folder: Path) -> Iterator[_Prepared]:
    """Load both policies and the pairs of an evaluation; inside the context the log is in `folder`."""
    setup_process(config)
    one_process = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    trainer = make_trainer(config, {"trainer": config.trainer | one_process, "callbacks": {}}, folder)
    forward, timer = forward_settings(trainer), StageTimer()
    config.evals.check()
    judge = load_judge(config, forward.device)
    policy = load_trained(config.policy, trained)
    folder.mkdir(parents=True, exist_ok=True)
    with logging_to(folder), memory_explained(config, "the evaluation"):
        select_on_device(policy, CACHE, forward)
        inputs = prepare_pairs(config, CACHE, forward)
        identity = inputs.identity() | {"trained_policy": weights_digest(policy.model)}
        timer.stop("prepare")
        more = read_eval_inputs(config, inputs, forward)
        context = build_eval_context(config, inputs, policy, forward, judge, more)
        yield _Prepared(config, inputs, identity, context, timer, more.record())


def _check_identity(record: Mapping[str, Any], now: Mapping[str, str], policy: PolicyConfig) -> None:
    """Raise RunRefused if the hashes of the inputs differ from the recorded ones."""
    was = dict(record["identity"])
    if policy.is_quantized or not policy.has_adapters:  # else adapters are merged here, separate in the run
        was["trained_policy"] = record["trained_policy"]
    if changed := [f"{name} was {value}, is {now[name]}" for name, value in was.items() if now[name] != value]:
        raise run_record.RunRefused(
            f"the run had other inputs: {'; '.join(changed)}; restore them, or type trained= in place of run="
        )
