"""The model card of a trained policy, written from its run's record."""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_lab.reporting.html_page import environment
from dpo_lab.reporting.run_summary import COLUMNS, metric_rows
from dpo_lab.runs.commands import command_of
from dpo_lab.runs.renamed_keys import ADDED_KEYS
from dpo_lab.stats.estimates import Estimate


@dataclass(frozen=True)
class Work:
    """How a card describes a kind of run: the hub's tag, the method, the source of the data, and its unit."""

    tag: str
    method: str
    source: str
    unit: str
    task: str = "text-generation"  # as the hub names it


BY_PAIRS = Work("dpo", "preference optimization", "preference pairs", "pairs")
BY_RESPONSES = Work("sft", "supervised fine-tuning", "the chosen responses of preference pairs", "responses")
BY_REWARDS = replace(BY_PAIRS, tag="reward-model", method="reward modelling", task="text-classification")
BY_ROLLOUTS = replace(BY_PAIRS, source="responses of the policy itself to the prompts of preference pairs")
BY_TEXTS = replace(BY_RESPONSES, source="plain texts", unit="texts")


def model_card(record: Mapping[str, Any]) -> str:
    """Return the card as Markdown, with the front matter that the Hugging Face hub reads.

    record: of a run with metrics; one without a `loss` in its config trained a reward model, or was supervised
    fine-tuning.
    """
    from markupsafe import Markup

    config, versions = record["config"], record["versions"]
    policy, data = config["policy"], config["data"]
    metrics = {name: Estimate.from_record(m) for name, m in record["metrics"].items()}
    lora = policy.get("lora") or {}
    rank = lora.get("r")
    work, method = _work(config), config.get("method", {})
    is_online = "samples" in method
    batch = f"{method['prompts'] // method['minibatches']} prompts," if is_online else data["batch_size"]
    with_adapters = rank is not None and not policy["merge"] and work is not BY_REWARDS
    matter = {"library_name": "peft" if with_adapters else "transformers", "pipeline_tag": work.task}
    if with_adapters:
        matter["base_model"] = policy["path"]
    paths = [str(each["path"]) for each in data.get("sources", {}).values()]
    facts = {
        "data": data["path"] or ", ".join(paths) or f"task {data['task']['kind']}",
        "pairs": ", ".join(f"{what} {count:,}" for what, count in record["data"].items() if count),
        "method": _settings(config["method"], "method") if is_online else None,
        "reward": _settings(config.get("reward"), "reward"),
        "loss": _settings(config.get("loss"), "loss") if work.method == BY_PAIRS.method else None,
        "reference": _settings(config.get("reference"), "reference"),
        "label noise": _settings(config.get("noise"), "noise"),
        "seed": config["seed"],
        "initial policy": f"{policy.get('path') or policy['kind']}, weights {record['initial_policy']}",
        "adapters": f"rank {rank}, alpha {lora['lora_alpha']}" if rank is not None else None,
        "steps": f"{record['steps']} of {batch} {work.unit}, learning rate {config['optim']['lr']}",
        "commit": (record["git"] or {}).get("commit"),
    }
    command = f"python -m dpo_lab.{command_of(config)} {shlex.join(record['overrides'])}"
    card = environment().get_template("model_card.md").render(
        matter={key: Markup(json.dumps(value)) for key, value in matter.items()},  # a JSON string is a YAML one
        work=work,
        name=Markup(cell(str(config["name"]))),
        versions=versions,
        facts=_table(("", ""), [(what, str(fact)) for what, fact in facts.items() if fact is not None]),
        metrics=_table(COLUMNS, metric_rows(metrics, record.get("metric_labels", {}))),
        command=Markup(" ".join(command.split())),  # always one line
    )  # fmt: skip
    return f"{card}\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Any:
    from markupsafe import Markup

    return Markup("\n".join(markdown_table(head, rows)))


def cell(text: str) -> str:
    """Return text escaped for a Markdown table cell."""
    escaped = html.escape(text)
    for mark in "|[]`*_":
        escaped = escaped.replace(mark, f"&#{ord(mark)};")
    return " ".join(escaped.split())


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], escape: Callable[[str], str] = cell
) -> list[str]:
    """Return the lines of a Markdown table. escape: returns the text of a cell with its markup escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(escape, line)) + " |" for line in lines]


def _work(config: Mapping[str, Any]) -> Work:
    method = config.get("method", {})
    if "samples" in method:
        by_loss = method["kind"] == "online_dpo"
        how = BY_PAIRS.method if by_loss else "reinforcement learning"
        unit = f"{method['samples']} responses each"
        return replace(BY_ROLLOUTS, tag=method["kind"].replace("_", "-"), method=how, unit=unit)
    if "loss" in config:
        return BY_PAIRS
    if "reward_model" in config:
        return BY_REWARDS
    of_texts = config["sft"]["text_column"] is not None or config["data"]["format"] == "text"
    return BY_TEXTS if of_texts else BY_RESPONSES


def _settings(node: Mapping[str, Any] | None, group: str) -> str | None:
    """Return the settings of a config group as text, `dpo, beta 0.1`, without options that are not in use."""
    if node is None:
        return None
    in_use = {key: value for key, value in node.items() if ADDED_KEYS.get(f"{group}.{key}", node) != value}
    return ", ".join(str(value) if key == "kind" else f"{key} {value}" for key, value in in_use.items())
