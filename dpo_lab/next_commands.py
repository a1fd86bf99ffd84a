"""What a finished run has to say: its figures once more, and what to type next."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from dpo_lab.config import RunConfig
from dpo_lab.models.policy import Pretrained

KEPT = ("dtype", "attention", "trust_remote_code", "gradient_checkpointing")  # that loading the result needs again
OF_BASE = ("package", "gguf_file", "revision", "chat_template")  # the same of adapters, whose base is read as before


def say_again(record: Mapping[str, Any], folder: Path, commands: Sequence[str]) -> None:
    """The summary of a run that is done already, from its record."""
    from dpo_lab.results.estimates import Estimate
    from dpo_lab.results.finding import Finding
    from dpo_lab.results.health import print_health
    from dpo_lab.results.progress import plain_console
    from dpo_lab.results.summary import print_summary

    print(f"{folder}: this run is done already. Type name=another for a second one; its figures:")
    metrics = {name: Estimate.from_record(m) for name, m in record["metrics"].items()}
    if "health" in record:
        print_health(plain_console(), [Finding.from_record(finding) for finding in record["health"]])
    print_summary(plain_console(), metrics, record.get("samples", []), folder, commands)


def after_training(config: RunConfig) -> list[str]:
    """What to type after a run of the door of training."""
    commands = ["tensorboard --logdir outputs"]
    if config.reference.starts_at_policy:
        commands.append("python -m dpo_lab.train +ablation=uniform_ref")
    return [*commands, "python -m dpo_lab.train --multirun beta=0.01,0.1,1.0"]


def after_sft(config: RunConfig, overrides: Sequence[str], folder: Path) -> list[str]:
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
    return [f"python -m dpo_lab.train {shlex.join([*said, *data])}"]


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
