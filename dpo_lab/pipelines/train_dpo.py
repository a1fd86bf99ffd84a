"""The life of a DPO run: prepare inputs, check step 0, train, evaluate, record, summarise."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig

from dpo_lab.cli.next_steps import after_training
from dpo_lab.config.schema import ConfigError, RunConfig, as_record
from dpo_lab.data.collate import collate
from dpo_lab.data.warnings import data_warnings
from dpo_lab.evals.evaluate import evaluate
from dpo_lab.evals.evaluators.base import labels_of
from dpo_lab.health.diagnose import of_folder
from dpo_lab.models.policy import trainable_copy
from dpo_lab.models.reference import reference_model
from dpo_lab.pipelines.eval_inputs import build_eval_context, load_judge, save_trained_policy
from dpo_lab.pipelines.inputs import TrainingInputs, prepare_pairs
from dpo_lab.pipelines.session import finalize_run, forward_settings, open_session, record_inputs, train
from dpo_lab.pipelines.stage_timer import StageTimer
from dpo_lab.runs import run_record
from dpo_lab.runs.cache import CACHE
from dpo_lab.runs.examples import EXAMPLES
from dpo_lab.training.callbacks.throughput import throughput
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.memory import MemoryTracker, peak_memory
from dpo_lab.training.step_zero import check_step_zero, first_batch

log = logging.getLogger("dpo_lab")


def train_dpo(cfg: DictConfig, config: RunConfig, folder: Path) -> None:
    """Train and evaluate `config` in `folder`, in one process or as one rank of several.

    A run that is finished already is not started again. Raises ConfigError if the data are plain texts.
    """
    if config.sft.text_column is not None or config.data.has_texts:
        raise ConfigError(
            "sft.text_column, data.format=text: plain texts hold no preference; type python -m dpo_lab.sft to use them"
        )
    config_dict = as_record(cfg, config)
    open_session(config, config_dict, folder, lambda run, trainer: _run_pipeline(config, config_dict, run, trainer))


def _run_pipeline(config: RunConfig, config_dict: dict[str, Any], run: run_record.Run, trainer: Trainer) -> None:
    """Prepare the inputs, train, gather the policy, evaluate, and write the run's record; every rank calls it."""
    timer = StageTimer(run.record.get("seconds"))
    forward = forward_settings(trainer)
    judge = load_judge(config, forward.device)  # before training, so that a judge that can't be loaded is an error now
    inputs = prepare_pairs(config, CACHE, forward)
    quality = inputs.quality()
    for line in data_warnings(quality):
        log.warning("data: %s", line)
    record_inputs(run, trainer, inputs)
    run.update(data_quality=quality.as_record(), loss_traits=config.loss.traits(), seconds=timer.stop("prepare"))
    module = _fit(config, config_dict, run, trainer, inputs, timer)
    run.update(steps=trainer.global_step, seconds=timer.stop("dpo"), **throughput(trainer))
    trained = save_trained_policy(config, run, trainer, module, inputs, forward)
    context = build_eval_context(config, inputs, trained, forward, judge)
    metrics, samples = evaluate(context, config.evals.selected()), context.side_by_side
    peak = peak_memory(forward.device)
    if run.writes:
        context.examples.write(run.folder / EXAMPLES)
        commands = after_training(config, run.record["overrides"], run.folder)
        finalize_run(run, trainer, metrics, labels_of(metrics), trained, timer, peak, commands, samples)


def _fit(
    config: RunConfig,
    config_dict: dict[str, Any],
    run: run_record.Run,
    trainer: Trainer,
    inputs: TrainingInputs,
    timer: StageTimer,
) -> DPOModule:
    """Prepare the reference, check the loss at step 0, train, and return the module.

    Records the loss at step 0, None if the reference is not the initial policy; the memory in use; and, if training
    raises, the health findings so far.
    """
    seed_everything(config.seed, workers=True, verbose=False)
    forward = forward_settings(trainer)
    memory = MemoryTracker(forward.device)
    model = trainable_copy(inputs.initial.model).to(forward.device)  # type: ignore[arg-type]
    pairs, tokens = inputs.train.concat(inputs.held_out), config.data.tokens_per_microbatch
    reference = config.reference.prepare(model, pairs, CACHE, forward.context, tokens)
    memory.count_weights(model, reference_model(reference))
    step_zero_loss = None
    batch = collate(inputs.train[: config.data.batch_size]).to(forward.device)
    with forward.context():
        if config.reference.starts_at_policy:
            step_zero_loss = check_step_zero(model, config.loss, reference, batch, tokens)
            log.info("step 0: loss %.6f, policy and reference agree", step_zero_loss)
        else:
            run.update(first_batch=first_batch(model, config.loss, reference, batch, tokens))
    run.update(step_zero_loss=step_zero_loss, seconds=timer.stop("reference"))
    module = DPOModule(
        model,
        config.loss,
        reference,
        config.optim,
        total_steps=trainer.max_steps,
        batch_size=config.data.batch_size,
        tokens_per_microbatch=tokens,
    )
    try:
        train(config, config_dict, run, trainer, module, inputs)
    except BaseException:
        run.update(health=[finding.as_record() for finding in of_folder(run.folder, run.record)])
        raise
    measured = memory.as_record()
    # A resumed run with no step left to train has measured nothing: it keeps the values recorded earlier.
    if throughput(trainer) or "memory" not in run.record:
        run.update(memory=measured)
    return module
