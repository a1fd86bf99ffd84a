"""The life of a DPO run: prepare inputs, check step 0, train, evaluate, record, summarise."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import seed_everything
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
from dpo_lab.models.sharding import on_device
from dpo_lab.pipelines.eval_inputs import build_eval_context, load_judge
from dpo_lab.pipelines.inputs import TrainingInputs, prepare_pairs
from dpo_lab.pipelines.session import Session, open_session
from dpo_lab.runs.cache import CACHE
from dpo_lab.runs.examples import EXAMPLES
from dpo_lab.training.callbacks.throughput import throughput
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.memory import MemoryTracker
from dpo_lab.training.step_level_module import module_for
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
    with open_session(config, as_record(cfg, config), folder) as session:
        if session is not None:
            _run_stages(session)


def _run_stages(session: Session) -> None:
    """Prepare the inputs, train, gather the policy, evaluate, and write the run's record."""
    config, run, trainer, forward = session.config, session.run, session.trainer, session.forward
    judge = load_judge(config, forward.device)  # before training, so that a judge that can't be loaded is an error now
    inputs = prepare_pairs(config, CACHE, forward)
    quality = inputs.quality()
    for line in data_warnings(quality):
        log.warning("data: %s", line)
    session.record_inputs(inputs)
    traits = config.loss.traits()
    run.update(data_quality=quality.as_record(), loss_traits=traits, seconds=session.timer.stop("prepare"))
    train, held_out = config.loss.prepare(inputs.train), config.loss.prepare(inputs.held_out)
    of_loss = replace(inputs, train=train, held_out=held_out)
    module, memory = _prepare_training(session, of_loss)
    try:
        session.train(module, of_loss)
    except BaseException:
        run.update(health=[finding.as_record() for finding in of_folder(run.folder, run.record)])
        raise
    measured = memory.as_record()
    # A resumed run with no step left to train has measured nothing: it keeps the values recorded earlier.
    if throughput(trainer) or "memory" not in run.record:
        run.update(memory=measured)
    run.update(steps=trainer.global_step, seconds=session.timer.stop("dpo"), **throughput(trainer))
    trained = session.save_trained_policy(module, inputs)
    context = build_eval_context(config, inputs, trained, forward, judge)
    metrics = evaluate(context, config.evals.selected())
    if run.writes:
        context.examples.write(run.folder / EXAMPLES)
    session.finish(metrics, labels_of(metrics), trained, after_training, context.side_by_side)


def _prepare_training(session: Session, inputs: TrainingInputs) -> tuple[DPOModule, MemoryTracker]:
    """Prepare the reference, check the loss at step 0, and return the module to train, and the measure of its memory.

    Records the loss at step 0, None if the reference is not the initial policy.
    """
    config, run, forward = session.config, session.run, session.forward
    seed_everything(config.seed, workers=True, verbose=False)
    memory = MemoryTracker(forward.device)
    if config.policy.has_adapters:  # the base is held once on the device
        on_device(inputs.initial.model, forward.device)
    model = on_device(trainable_copy(inputs.initial.model), forward.device)
    tokens = config.data.forward_tokens
    pairs = inputs.train.concat(inputs.held_out)
    scored = pairs if pairs.unrelated is None else pairs.concat(pairs.unrelated)
    reference = config.reference.prepare(model, scored, CACHE, forward.context, tokens)
    memory.count_weights(model, reference_model(reference))
    step_zero_loss = None
    batch = collate(inputs.train[: config.data.batch_size]).to(forward.device)
    with forward.context():
        if config.reference.starts_at_policy:
            step_zero_loss = check_step_zero(model, config.loss, reference, batch, tokens)
            log.info("step 0: loss %.6f, policy and reference agree", step_zero_loss)
        else:
            run.update(first_batch=first_batch(model, config.loss, reference, batch, tokens))
    run.update(step_zero_loss=step_zero_loss, seconds=session.timer.stop("reference"))
    module = module_for(config.loss)(
        model,
        config.loss,
        reference,
        config.optim,
        total_steps=session.trainer.max_steps,
        batch_size=config.data.batch_size,
        tokens_per_microbatch=tokens,
    )
    return module, memory
