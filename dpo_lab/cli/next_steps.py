"""The `Next:` lines of a finished run: its figures once more, and the commands to type next."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from dpo_lab import plugins
from dpo_lab.config.allowed_targets import target_of
from dpo_lab.config.schema import RunConfig
from dpo_lab.models.policy import Pretrained
from dpo_lab.runs.cache import CACHE
from dpo_lab.runs.fingerprint import override_key
from dpo_lab.runs.run_record import OUTPUTS

# Settings of the policy that loading the result needs too.
KEPT = ("dtype", "attention", "trust_remote_code", "gradient_checkpointing")
# With adapters also these, which say how to load the base model.
OF_BASE = ("package", "gguf_file", "revision", "chat_template", "quantize", "key_prefix", "allow_pickle")
# Groups of overrides that are carried over: how this machine computes and logs.
OF_MACHINE = ("trainer", "logger", "threads")
# Of those groups, the keys of a run's length, which are not carried over.
OF_LENGTH = tuple(f"trainer.{name}" for name in ("max_steps", "max_time", "val_check_interval", "log_every_n_steps"))


def print_finished_run(record: Mapping[str, Any], folder: Path, commands: Sequence[str]) -> None:
    """Print the summary of a run that is done already, from its record, and the commands to type next."""
    from dpo_lab.health.diagnose import print_health
    from dpo_lab.health.finding import Finding
    from dpo_lab.reporting.run_summary import cost_rows, print_summary
    from dpo_lab.stats.estimates import Estimate
    from dpo_lab.terminal.progress import plain_console

    print(f"{folder}: this run is done already. Type name=another to run it again. Its results:")
    metrics = {name: Estimate.from_record(m) for name, m in record["metrics"].items()}
    if "health" in record:
        print_health(plain_console(), [Finding.from_record(finding) for finding in record["health"]])
    labels, samples = record.get("metric_labels", {}), record.get("samples", [])
    print_summary(plain_console(), metrics, labels, samples, folder, commands, cost_rows(record))


def after_training(config: RunConfig, overrides: Sequence[str], folder: Path) -> list[str]:
    """Return the commands to type after a run of dpo_lab.train: its curves, and the same run with one setting changed.

    overrides: the overrides of the run; the commands repeat those that they do not change.
    """
    commands = []
    if any("TensorBoard" in str(target_of(node)) for node in config.logger.values()):
        inside = folder.is_relative_to(OUTPUTS)
        commands.append(shlex.join(["tensorboard", "--logdir", str(OUTPUTS if inside else folder)]))
    if config.reference.starts_at_policy and config.loss.requires_reference is None:
        others = _without(overrides, "reference", "ablation", "if_exists")
        ablations = [
            name for o in overrides if _key(o) == "ablation" for name in o.partition("=")[2].strip("[]").split(",")
        ]
        chosen = f"[{','.join([*ablations, 'uniform_ref'])}]" if ablations else "uniform_ref"
        commands.append(command("train", *others, f"+ablation={chosen}"))
    if config.loss.is_bradley_terry:
        betas = ",".join(str(float(f"{config.beta * factor:.4g}")) for factor in (0.1, 1, 10))
        commands.append(command("train", "--multirun", *_without(overrides, "beta", "if_exists"), f"beta={betas}"))
    return commands


def after_sft(config: RunConfig, overrides: Sequence[str], folder: Path) -> list[str]:
    """Return the command that trains the policy in `folder` of an SFT run by DPO, on the same pairs."""
    policy, settings = config.policy, {"policy": "pretrained", "policy.path": folder / "policy"}
    names = KEPT
    if isinstance(policy, Pretrained) and policy.has_adapters and not policy.merge:
        settings |= {"policy": "lora", "policy.lora.r": policy.lora.r, "reference": "frozen"}
        names += OF_BASE
        if policy.package is not None:  # a package takes precedence over the path
            settings |= {"policy.path": policy.path, "policy.adapter": folder / "policy"}
    if isinstance(policy, Pretrained):
        settings |= _changed(policy, names)
    data = [override for override in overrides if _key(override).partition(".")[0] == "data"]
    if config.sft.text_column is not None or config.data.has_texts:
        data = ["data.path=PAIRS.jsonl"]
    typed = [f"{key}={quoted(str(value))}" for key, value in settings.items()]
    machine = [o for o in overrides if _key(o).partition(".")[0] in OF_MACHINE and _key(o) not in OF_LENGTH]
    return [command("train", *typed, *data, *machine)]


def after_reward(config: RunConfig, overrides: Sequence[str], folder: Path) -> list[str]:
    """Return the commands to type after a run of dpo_lab.reward: training on its rewards, and DPO judged by it.

    None for a reward model that another run made for itself.
    """
    if folder.parent == CACHE:
        return []
    model, kept = quoted(str(folder / "reward_model")), _without(overrides, "name", "if_exists", "reward", "optim")
    kept = [override for override in kept if _key(override) not in OF_LENGTH]
    return [
        command("train", "method=rloo", "reward=learned", f"reward.path={model}", *_without(kept, "noise")),
        command("train", *kept, f"evals.judge.path={model}"),
    ]


def command(module: str, *arguments: str) -> str:
    """Return the shell command that runs dpo_lab.`module`, with the plugins and `--config-dir` folders of this command."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else ()
    searched = [part for s in sources if s.provider == "command-line" for part in ("--config-dir", s.path)]
    typed = [word for word in plugins.words() if word not in arguments]
    return shlex.join(["python", "-m", f"dpo_lab.{module}", *searched, *typed, *arguments])


def _key(override: str) -> str:
    return override_key(override).partition("@")[0]


def _without(overrides: Sequence[str], *keys: str) -> list[str]:
    """Return the overrides without those of `keys` and of keys under them."""
    return [o for o in overrides if _key(o) not in keys and _key(o).partition(".")[0] not in keys]


def _changed(policy: Pretrained, names: Sequence[str]) -> dict[str, Any]:
    """Return the overrides of the policy's fields in `names` that differ from their defaults."""
    values = {spec.name: (getattr(policy, spec.name), spec.default) for spec in fields(policy) if spec.name in names}
    return {
        f"policy.{name}": value.value if isinstance(value, Enum) else value
        for name, (value, default) in values.items()
        if value != default
    }


def quoted(value: str) -> str:
    """Quote a value where Hydra would not read it as one: run folders contain commas."""
    return value if re.fullmatch(r"[\w./-]+", value) else json.dumps(value, ensure_ascii=False)
