"""Config keys and record keys of earlier versions, with their present names: refused when typed, translated when read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

# Config keys by their earlier name. A key of a list may be a group: all keys under it are renamed with it.
RENAMED_KEYS = {
    "on_change": "if_exists",
    "objective": "optimized_metric",
    "data.workers": "data.tokenize_workers",
    "data.world": "data.task",
    "evals.run": "evals.evaluators",
    "evals.samples": "evals.num_prompts",
    "evals.texts": "evals.num_texts",
    "evals.train_pairs": "evals.num_train_pairs",
    "evals.optimum.prompts": "evals.optimum.num_prompts",
    "evals.optimum.candidates": "evals.optimum.num_candidates",
    "policy.start": "policy.init",
    "policy.rank": "policy.lora.r",
    "policy.alpha": "policy.lora.lora_alpha",
    "policy.targets": "policy.lora.target_modules",
    "policy.pickled_weights": "policy.allow_pickle",
    "callbacks.checkpoint.keep": "callbacks.checkpoint.save_total_limit",
    "noise.only": "noise.side",
}
# Values by present key and earlier value.
RENAMED_VALUES = {
    ("if_exists", "refuse"): "error",
    ("data", "world"): "embedded",
    ("trainer.strategy._target_", "dpo_lab.training.sharding.Sharded"): (
        "dpo_lab.training.strategies.fsdp.FSDP2Strategy"
    ),
}
# Config keys that were added, with the value for what was done before; those of policies are not the embedded one's.
ADDED_KEYS = {
    "optim.kind": "adamw",
    "sft.optim.kind": "adamw",
    "policy.quantize": None,
    "loss.divergence": "reverse_kl",
    "loss.divergence_alpha": 0.5,
    "loss.ld_alpha": 1.0,
    "loss.weighting": "none",
    "data.unpair": False,
    "evals.pairs": {},
    "method.missing_end_penalty": 0.0,
    "evals.harness": {
        "tasks": [],
        "include_path": None,
        "num_fewshot": None,
        "limit": None,
        "batch_size": 16,
        "chat_template": False,
    },
    "evals.judge.kind": "classifier",
    "evals.prompts": None,
    "evals.third": None,
    "evals.engine": {"kind": "exact"},
    "evals.every": 0,
    "evals.num_trajectory_prompts": 128,
}
# Groups that were added to the configs of runs that have a loss, likewise.
ADDED_GROUPS = {"method": {"kind": "dpo"}}
WITHOUT_ADDED = (("policy", "tiny"), ("method", "dpo"))  # choices that have none of the added keys
# Keys of run.json, and of each finding in its `health`.
RENAMED_RECORD_KEYS = {"starts": "attempts"}
RENAMED_FINDING_KEYS = {"says": "message", "tries": "suggestion"}

OVERRIDE = re.compile(r"(?P<sign>[+~]{0,2})(?P<key>[^=@]+)(?P<rest>.*)", re.S)


def present_key(key: str) -> str:
    """Return the present name of a dotted config key, which is the key itself unless it was renamed."""
    for earlier, present in RENAMED_KEYS.items():
        if key == earlier or key.startswith(f"{earlier}."):
            return present + key[len(earlier) :]
    return key


def is_renamed(key: str) -> bool:
    """Return whether a dotted config key is the name of an earlier version."""
    return present_key(key) != key


def present_override(override: str) -> str:
    """Return an override, `key=value` with Hydra's + or ~, with the present names of its key and value."""
    parts = OVERRIDE.fullmatch(override)
    if parts is None:
        return override
    key, value = present_key(parts["key"]), parts["rest"].removeprefix("=")
    rest = f"={present}" if (present := RENAMED_VALUES.get((key, value))) else parts["rest"]
    return f"{parts['sign']}{key}{rest}"


def present_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded config, nested mappings, with the present names of its keys and values, and added keys."""
    config_dict: dict[str, Any] = {}
    for path, value in _leaves(config):
        key = ".".join(path)
        present = present_key(key)
        *parents, leaf = path if present == key else present.split(".")
        node = config_dict
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = RENAMED_VALUES.get((present, value), value) if isinstance(value, str) else value
    for key, value in ADDED_KEYS.items():
        *parents, leaf = key.split(".")
        node = reduce(lambda node, parent: node.get(parent, {}), parents, config_dict)
        if node and (parents[0], node.get("kind")) not in WITHOUT_ADDED:
            node.setdefault(leaf, value)
    return {**ADDED_GROUPS, **config_dict} if "loss" in config_dict else config_dict


def _leaves(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield path and value of everything in nested mappings that is not a mapping with entries."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def present_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a run with the present names of its keys, its config's and its overrides'."""
    record = renamed(record, RENAMED_RECORD_KEYS)
    if "config" in record:
        record["config"] = present_config(record["config"])
    if "overrides" in record:
        record["overrides"] = [present_override(override) for override in record["overrides"]]
    if "health" in record:
        record["health"] = [present_finding(finding) for finding in record["health"]]
    return record


def present_finding(finding: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded finding of run health with the present names of its keys."""
    return renamed(finding, RENAMED_FINDING_KEYS)


def renamed(mapping: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a mapping whose keys are replaced by those that `names` gives for them."""
    return {names.get(key, key): value for key, value in mapping.items()}
