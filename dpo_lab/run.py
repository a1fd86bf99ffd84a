"""One run's life: hold the folder, prepare policy, pairs and reference, check step 0, fit, evaluate, record, summarise."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig
from rich.console import Console
from rich.logging import RichHandler
from transformers.utils.logging import disable_progress_bar

from dpo_lab.config import ConfigError, RunConfig, as_record
from dpo_lab.data.advice import advice
from dpo_lab.data.collate import collate
from dpo_lab.data.module import PreferenceDataModule
from dpo_lab.data.splits import HELD_OUT
from dpo_lab.evals.evaluation import evaluate
from dpo_lab.evals.subject import Subject
from dpo_lab.models.policy import Policy, TinyPolicy, to_train, weights_digest
from dpo_lab.prepare import Forward, Material, prepare
from dpo_lab.results import runs
from dpo_lab.results.cache import CACHE
from dpo_lab.results.card import model_card, table
from dpo_lab.results.estimates import Estimate
from dpo_lab.results.summary import print_summary
from dpo_lab.training.callbacks import HParams
from dpo_lab.training.checks import check_step_zero
from dpo_lab.training.module import DPOModule
from dpo_lab.training.process import set_up_process
from dpo_lab.training.sft import initial_policy

log = logging.getLogger("dpo_lab")


def run(cfg: DictConfig, config: RunConfig, folder: Path) -> None:
    """Run `config` in `folder`; a finished run is left alone."""
    plain = as_record(cfg, config)
    _set_up(config)
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:  # a further rank of a run that rank 0 holds
        trainer = _trainer(config, plain, folder)
        _fit(config, trainer, prepare(config, CACHE, _forward(trainer)), Clock())
        return
    with runs.hold(folder, plain, list(HydraConfig.get().overrides.task)) as held, _logging(folder):
        if held is None:
            print(f"{folder}: this run is done already. Type name=another for a second one; its figures:")
            _report_again(folder, config)
            return
        _whole_run(config, plain, held)


def make_initial_policy(config: RunConfig) -> None:
    """The embedded initial policy alone, made unless the cache has it."""
    if not isinstance(config.policy, TinyPolicy):
        raise ConfigError("only the embedded policy is made here; type policy=tiny, or give yours to dpo_lab.train")
    _set_up(config)
    policy, folder = initial_policy(config.policy, config.sft, config.data.world, config.seed, CACHE)
    print(f"initial policy of {policy.model.num_parameters():,} parameters: {folder}")


def _set_up(config: RunConfig) -> None:
    if config.data.is_world:
        config.data.world.check()
    disable_progress_bar()  # transformers' own bars, of milliseconds here
    set_up_process(config.threads, on_cpu=config.trainer.get("accelerator") == "cpu")


def _whole_run(config: RunConfig, plain: dict[str, Any], held: runs.Run) -> None:
    clock = Clock()
    trainer = _trainer(config, plain, held.folder)
    material = prepare(config, CACHE, _forward(trainer))
    quality = material.quality()
    for line in advice(quality):
        log.warning("data: %s", line)
    held.update(
        data=dict(material.counts),
        data_quality=quality.as_record(),
        initial_policy=weights_digest(material.initial.model),
        seconds=clock.lap("prepare"),
    )
    module, step_zero_loss = _fit(config, trainer, material, clock)
    held.update(step_zero_loss=step_zero_loss, steps=trainer.global_step, seconds=clock.lap("dpo"))
    trained = Policy(module.model.eval(), material.initial.tokenizer)
    config.policy.to_save(trained).save(held.folder / "policy")
    subject = _subject(config, material, trained, trainer.precision_plugin.forward_context)
    metrics = evaluate(subject)
    samples = [
        {"prompt": prompt, "initial": before, "trained": after}
        for prompt, before, after in zip(
            subject.prompts,
            subject.responses(subject.initial_samples),
            subject.responses(subject.samples),
            strict=True,
        )
    ]
    _to_tensorboard(trainer, metrics, samples)
    held.update(
        metrics={name: estimate.as_record() for name, estimate in metrics.items()},
        trained_policy=weights_digest(trained.model),
        samples=samples[:16],
        seconds=clock.lap("evaluate"),
    )
    (held.folder / "policy" / "README.md").write_text(model_card(held.record))
    log.info("CPU seconds: %s", ", ".join(f"{k} {v['cpu']:.0f}" for k, v in held.record["seconds"].items()))
    print_summary(Console(), metrics, samples, held.folder, _next_commands(config))


def _forward(trainer: Trainer) -> Forward:
    return Forward(trainer.strategy.root_device, trainer.precision_plugin.forward_context)


def _fit(config: RunConfig, trainer: Trainer, material: Material, clock: Clock) -> tuple[DPOModule, float | None]:
    """Train; gives the module and the loss before the first step (None without a starting reference)."""
    seed_everything(config.seed, workers=True, verbose=False)
    forward = _forward(trainer)
    model = to_train(material.initial.model).to(forward.device)  # type: ignore[arg-type]
    pairs = material.train.joined(material.held_out)
    reference = config.reference.prepare(model, pairs, CACHE, forward.context, config.data.tokens_per_microbatch)
    step_zero_loss = None
    if config.reference.starts_at_policy:
        with forward.context():
            batch = collate(material.train[: config.data.batch_size]).to(forward.device)
            step_zero_loss = check_step_zero(model, config.loss, reference, batch)
        log.info("step 0: loss %.6f, policy and reference agree", step_zero_loss)
    clock.lap("reference")
    data = PreferenceDataModule(
        material.train,
        material.held_out,
        batch_size=config.data.batch_size,
        num_workers=config.data.num_workers,
        seed=config.seed,
    )
    if config.policy.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    module = DPOModule(
        model,
        config.loss,
        reference,
        config.optim,
        total_steps=trainer.max_steps,
        batch_size=config.data.batch_size,
        tokens_per_microbatch=config.data.tokens_per_microbatch,
    )
    trainer.fit(module, datamodule=data)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # evaluation is rank 0's alone
    return module, step_zero_loss


def _trainer(config: RunConfig, plain: dict[str, Any], folder: Path) -> Trainer:
    """Lightning's Trainer from its node, with loggers and callbacks."""
    settings = dict(plain["trainer"])
    try:
        loggers = [instantiate(node, save_dir=folder) for node in plain["logger"].values()]
        callbacks = [instantiate(node) for node in plain["callbacks"].values()]
        callbacks.append(HParams(_hparams(plain)))
        plan = {"default_root_dir": folder, "use_distributed_sampler": False}
        trainer = instantiate(settings, logger=loggers, callbacks=callbacks, **plan)
    except HydraException as error:
        raise ConfigError(f"the trainer, a logger or a callback can't be made: {_last_line(error)}") from error
    except MisconfigurationException as error:
        raise ConfigError(f"the trainer can't be made: {_last_line(error)}") from error
    if config.data.batch_size < trainer.world_size:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size}: {trainer.world_size} devices need a pair each in every step;"
            f" type data.batch_size={trainer.world_size} or more"
        )
    return trainer


def _hparams(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a reader of HPARAMS compares runs by: choices and numbers, no classes."""
    shown = {k: v for k, v in plain.items() if k not in ("trainer", "logger", "callbacks", "name")}
    return {k: v for k, v in runs.flatten(shown).items() if v is not None}


def _subject(
    config: RunConfig, material: Material, trained: Policy, context: Callable[[], AbstractContextManager]
) -> Subject:
    """What evaluation looks at: held-out prompts and texts, from the world or from the user's held-out rows."""
    device = trained.model.device
    material.initial.model.to(device)  # type: ignore[arg-type]
    encoder, evals = material.encoder, config.evals
    if config.data.is_world:
        world = config.data.world
        prompts = world.prompts(HELD_OUT, evals.samples, config.seed)
        prompt_ids = [encoder.prompt(prompt) for prompt in prompts]
        begin = encoder.prompt("")
        texts = [(begin, encoder.response(text, begin)) for text in world.reviews(HELD_OUT, evals.texts, config.seed)]
    else:
        world = None
        prompt_ids = list({tuple(pair.prompt): list(pair.prompt) for pair in material.held_out}.values())[
            : evals.samples
        ]
        prompts = [encoder.prompt_text(ids) for ids in prompt_ids]
        texts = [(pair.prompt, pair.chosen) for pair in material.held_out[: evals.texts]]
    return Subject(
        trained=trained,
        initial=material.initial,
        encoder=encoder,
        pairs=material.held_out,
        prompts=prompts,
        prompt_ids=prompt_ids,
        texts=texts,
        world=world,
        max_new_tokens=config.evals.max_new_tokens,
        tokens=config.data.tokens_per_microbatch,
        batch_size=config.evals.batch_size,
        context=context,
        seed=config.seed,
    )


def _to_tensorboard(trainer: Trainer, metrics: Mapping[str, Estimate], samples: Sequence[Mapping[str, str]]) -> None:
    """Final metrics under eval/ for every logger; samples as a table where the logger takes text."""
    for logger in trainer.loggers:
        logger.log_metrics({f"eval/{name}": e.value for name, e in metrics.items()}, step=trainer.global_step)
        if isinstance(logger, TensorBoardLogger):
            rows = [[row[key] for key in ("prompt", "initial", "trained")] for row in samples[:16]]
            lines = table(("prompt", "initial policy", "trained policy"), rows)
            logger.experiment.add_text("samples", "\n".join(lines), trainer.global_step)
        logger.save()
        logger.finalize("success")


def _next_commands(config: RunConfig) -> list[str]:
    commands = ["tensorboard --logdir outputs"]
    if config.reference.starts_at_policy:
        commands.append("python -m dpo_lab.train +ablation=uniform_ref")
    return [*commands, "python -m dpo_lab.train --multirun beta=0.01,0.1,1.0"]


def _report_again(folder: Path, config: RunConfig) -> None:
    """The summary of a finished run, from its record."""
    record = runs.read_record(folder)
    assert record is not None
    metrics = {name: Estimate.from_record(m) for name, m in record["metrics"].items()}
    print_summary(Console(), metrics, record["samples"], folder, _next_commands(config))


@contextmanager
def _logging(folder: Path) -> Iterator[None]:
    """Our own lines on the terminal and in the run's log file."""
    console, file = RichHandler(show_path=False, log_time_format="%X"), logging.FileHandler(folder / "run.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for handler in (console, file):
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.captureWarnings(True)  # libraries' warnings go to the file, not between the bars
    logging.getLogger("py.warnings").addHandler(file)
    logging.getLogger("py.warnings").propagate = False
    try:
        yield
    except ConfigError:
        raise  # the door says it in one line
    except Exception:
        log.exception("the run failed")
        raise
    finally:
        for handler in (console, file):
            log.removeHandler(handler)
            handler.close()
        logging.captureWarnings(False)


class Clock:
    """Wall and CPU seconds of each stage, of this process and its threads."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self.last = (time.perf_counter(), time.process_time())

    def lap(self, stage: str) -> dict[str, dict[str, float]]:
        """End a stage; gives all stages so far."""
        now = (time.perf_counter(), time.process_time())
        self.stages[stage] = {"wall": round(now[0] - self.last[0], 2), "cpu": round(now[1] - self.last[1], 2)}
        self.last = now
        return dict(self.stages)


def _last_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return str(cause).strip().splitlines()[-1]
