"""One run of supervised fine-tuning: prepare policy and responses, fit, measure the held-out loss, record, say what is next."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig
from rich.console import Console

from dpo_lab.config import ConfigError, RunConfig, as_record
from dpo_lab.core.noise import Symmetric
from dpo_lab.evals.held_out import held_out_loss
from dpo_lab.fit import Clock, fit, forward_of, live, make_trainer, set_up, to_tensorboard
from dpo_lab.models.policy import Policy, Pretrained, TinyPolicy, to_train, weights_digest
from dpo_lab.prepare import Material, prepare_responses
from dpo_lab.results import runs
from dpo_lab.results.cache import CACHE
from dpo_lab.results.card import model_card
from dpo_lab.results.estimates import Estimate
from dpo_lab.results.summary import print_summary
from dpo_lab.training.sft import initial_policy
from dpo_lab.training.sft_module import SFTModule

log = logging.getLogger("dpo_lab")

OF_PREFERENCES = ("beta", "loss", "reference", "noise", "evals")  # settings that have no say here
KEPT = ("dtype", "attention", "trust_remote_code", "gradient_checkpointing")  # that loading the result needs again
OF_BASE = ("package", "gguf_file", "revision", "chat_template")  # the same of adapters, whose base is read as before


def run_sft(cfg: DictConfig, config: RunConfig, folder: Path) -> None:
    """Run `config` in `folder`, a finished run is left alone; the embedded policy is kept in the cache instead."""
    if config.sft.text_column is not None and config.data.is_world:
        raise ConfigError(
            f"sft.text_column={config.sft.text_column}: a world has no columns; type data.path=FILE.jsonl with it"
        )
    if config.is_embedded:
        with suppress(OSError):
            os.removedirs(folder)  # Hydra made it, and nothing will lie in it
        _make_initial_policy(config)
        return
    if config.noise != Symmetric(seed=config.noise.seed):
        raise ConfigError(
            "noise: responses are learned as the annotator chose them, without label noise; type noise=none"
        )
    plain = {key: value for key, value in as_record(cfg, config).items() if key not in OF_PREFERENCES}
    if not isinstance(config.policy, TinyPolicy):
        plain["sft"] = {"text_column": config.sft.text_column}  # the rest is how the embedded policy is made

    def as_rank() -> None:
        _fit(config, make_trainer(config, plain, folder), prepare_responses(config, CACHE))

    def again(record: Mapping[str, Any]) -> None:
        metrics = {name: Estimate.from_record(m) for name, m in record["metrics"].items()}
        print_summary(Console(), metrics, [], folder, [next_command(config, record["overrides"], folder)])

    live(config, plain, folder, whole=lambda held: _whole_run(config, plain, held), as_rank=as_rank, again=again)


def _make_initial_policy(config: RunConfig) -> None:
    """The embedded initial policy alone, made unless the cache has it."""
    assert isinstance(config.policy, TinyPolicy)
    set_up(config)
    policy, folder = initial_policy(config.policy, config.sft, config.data.world, config.seed, CACHE)
    print(f"initial policy of {policy.model.num_parameters():,} parameters: {folder}")


def _whole_run(config: RunConfig, plain: dict[str, Any], held: runs.Run) -> None:
    clock = Clock()
    trainer = make_trainer(config, plain, held.folder)
    material = prepare_responses(config, CACHE)
    held.update(
        data=dict(material.counts),
        initial_policy=weights_digest(material.initial.model),
        seconds=clock.lap("prepare"),
    )
    module = _fit(config, trainer, material)
    held.update(steps=trainer.global_step, tokens=module.tokens, seconds=clock.lap("sft"))
    trained = Policy(module.model.eval(), material.initial.tokenizer)
    config.policy.to_save(trained).save(held.folder / "policy")
    context, tokens = forward_of(trainer).context, config.data.tokens_per_microbatch
    material.initial.model.to(trained.model.device)  # type: ignore[arg-type]
    metrics = held_out_loss(trained.model, material.initial.model, material.held_out, tokens, context)
    to_tensorboard(trainer, metrics)
    held.update(
        metrics={name: estimate.as_record() for name, estimate in metrics.items()},
        trained_policy=weights_digest(trained.model),
        seconds=clock.lap("evaluate"),
    )
    (held.folder / "policy" / "README.md").write_text(model_card(held.record))
    log.info("CPU seconds: %s", ", ".join(f"{k} {v['cpu']:.0f}" for k, v in held.record["seconds"].items()))
    print_summary(Console(), metrics, [], held.folder, [next_command(config, held.record["overrides"], held.folder)])


def _fit(config: RunConfig, trainer: Trainer, material: Material) -> SFTModule:
    seed_everything(config.seed, workers=True, verbose=False)
    model = to_train(material.initial.model).to(forward_of(trainer).device)  # type: ignore[arg-type]
    module = SFTModule(
        model,
        config.optim,
        total_steps=trainer.max_steps,
        tokens_per_microbatch=config.data.tokens_per_microbatch,
    )
    fit(config, trainer, module, material)
    return module


def next_command(config: RunConfig, overrides: Sequence[str], folder: Path) -> str:
    """What trains the policy that a run left in `folder` by preferences, on the same pairs."""
    policy, settings = config.policy, {"policy": "pretrained", "policy.path": folder / "policy"}
    kept = KEPT
    if isinstance(policy, Pretrained) and policy.has_adapters and not policy.merge:
        settings |= {"policy": "lora", "policy.rank": policy.rank, "reference": "frozen"}
        kept += OF_BASE
        if policy.package is not None:  # it comes before any path
            settings |= {"policy.path": policy.path, "policy.adapter": folder / "policy"}
    if isinstance(policy, Pretrained):
        settings |= _changed(policy, kept)
    data = [override for override in overrides if re.match(r"\+*data[.=]", override)]
    if config.sft.text_column is not None or config.data.has_texts:
        data = ["data.path=PAIRS.jsonl"]
    said = [f"{key}={_quoted(str(value))}" for key, value in settings.items()]
    return f"python -m dpo_lab.train {shlex.join([*said, *data])}"


def _changed(policy: Pretrained, names: Sequence[str]) -> dict[str, Any]:
    """Those of these settings that are not their defaults."""
    values = {spec.name: (getattr(policy, spec.name), spec.default) for spec in fields(policy) if spec.name in names}
    return {
        f"policy.{name}": value.value if isinstance(value, Enum) else value
        for name, (value, default) in values.items()
        if value != default
    }


def _quoted(value: str) -> str:
    """A value as Hydra reads it back whole: folders of runs hold commas."""
    return value if re.fullmatch(r"[\w./-]+", value) else json.dumps(value, ensure_ascii=False)
