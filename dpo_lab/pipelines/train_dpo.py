"""The life of a run: prepare inputs, train by the method, evaluate, record, summarise."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from dpo_lab.cli.next_steps import after_training
from dpo_lab.config.schema import ConfigError, RunConfig, as_record
from dpo_lab.data.warnings import data_warnings
from dpo_lab.evals.evaluate import evaluate
from dpo_lab.evals.evaluators.above_best import AboveBest
from dpo_lab.evals.evaluators.base import Evaluator, labels_of
from dpo_lab.evals.evaluators.reward import Reward
from dpo_lab.health.diagnose import of_folder
from dpo_lab.pipelines.eval_inputs import build_eval_context, load_judge, read_eval_inputs
from dpo_lab.pipelines.inputs import prepare_pairs
from dpo_lab.pipelines.offline import prepare_offline
from dpo_lab.pipelines.online import prepare_online
from dpo_lab.pipelines.reward_inputs import ensure_reward_model
from dpo_lab.pipelines.session import Session, open_session
from dpo_lab.pipelines.trajectory import add_trajectory, end_trajectory
from dpo_lab.runs.cache import CACHE
from dpo_lab.runs.examples import EXAMPLES

log = logging.getLogger("dpo_lab")


def train_dpo(cfg: DictConfig, config: RunConfig, folder: Path) -> None:
    """Train and evaluate `config` in `folder`, in one process or as one rank of several.

    A run that is finished already is not started again. Raises ConfigError if the data are plain texts.
    """
    if config.sft.text_column is not None or config.data.has_texts:
        raise ConfigError(
            "sft.text_column, data.format=text: plain texts hold no preference; type python -m dpo_lab.sft to use them"
        )
    if config.method.is_online:
        config = ensure_reward_model(cfg, config)
    with open_session(config, as_record(cfg, config), folder) as session:
        if session is not None:
            _run_stages(session)


def evaluators_of(config: RunConfig) -> list[Evaluator]:
    """Return the evaluators of a run: those of its settings and, of a method that samples, the share of best samples."""
    selected = config.evals.selected()
    is_asked = any(isinstance(evaluator, Reward) for evaluator in selected)
    return selected + [AboveBest()] * (config.method.is_online and is_asked)


def _run_stages(session: Session) -> None:
    """Prepare the inputs, train, gather the policy, evaluate, and write the run's record."""
    config, run, forward = session.config, session.run, session.forward
    config.evals.check()
    judge = load_judge(config, forward.device)  # before training, so that a judge that can't be loaded is an error now
    inputs = prepare_pairs(config, CACHE, forward)
    more = read_eval_inputs(config, inputs, forward)  # before training, likewise
    quality = inputs.quality()
    for line in data_warnings(quality):
        log.warning("data: %s", line)
    session.record_inputs(inputs)
    traits = config.loss.traits()
    run.update(data_quality=quality.as_record(), loss_traits=traits, seconds=session.timer.stop("prepare"))
    prepare = prepare_online if config.method.is_online else prepare_offline
    training = prepare(session, inputs)
    module = training.module
    trajectory = add_trajectory(session, inputs, "dpo", judge, more.prompts, training.reward)
    try:
        session.train(module, inputs, training.data)
    except BaseException:
        run.update(health=[finding.as_record() for finding in of_folder(run.folder, run.record)])
        raise
    session.record_training("dpo", training.memory, **training.costs())
    trained = session.save_trained(module, inputs)
    context = build_eval_context(config, inputs, trained, forward, judge, more)
    if trajectory is not None:
        trajectory.meter.share_samples(context)
    metrics = evaluate(context, evaluators_of(config))
    if trajectory is not None:
        end_trajectory(session, trajectory, context)
    if judge is not None and (costs := judge.costs()):
        run.update(judge=costs)
    if measured_with := more.record():
        run.update(measured_with=measured_with)
    if run.writes:
        context.examples.write(run.folder / EXAMPLES)
    session.finish(metrics, labels_of(metrics, context.prompt_file), trained, after_training, context.side_by_side)
