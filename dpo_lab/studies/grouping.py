"""Group runs into arms: runs whose settings differ in nothing but seeds are one arm."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_lab.runs.fingerprint import EXECUTION_KEYS, LOGGING_KEYS, RECORD_KEYS, effective_config, is_under, override_key

SEEDS = ("seed", "noise.seed")  # settings that differ between the runs of one arm
IGNORED_OVERRIDES = (*SEEDS, *RECORD_KEYS, *LOGGING_KEYS, *EXECUTION_KEYS, "plugins")  # overrides that define no arm
DEFAULT_ARM = "default"  # the arm without an override of its own


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that distinguish arms, by dotted key."""
    found = {key: value for key, value in effective_config(config).items() if key not in SEEDS}
    steps = (config.get("trainer") or {}).get("max_steps")
    return found if steps is None else found | {"trainer.max_steps": steps}


def names(typed: Sequence[Sequence[str]], configs: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Return the arm name of each run: the overrides that not all runs share, and the settings that differ between runs
    with equal overrides.

    typed: each run's overrides; configs: each run's settings, None if only its overrides are known.
    """
    kept, shared = _kept(typed), shared_overrides(typed)
    candidates = [", ".join(each for each in own if each not in shared) or DEFAULT_ARM for own in kept]
    texts = [None if config is None else json.dumps(config, sort_keys=True) for config in configs]
    shortest: dict[str, str] = {}  # settings -> shortest name among runs with them
    for text, name in zip(texts, candidates, strict=True):
        if text is not None:
            shortest[text] = min(shortest.get(text, name), name, key=lambda it: (len(it), it))
    alike: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for text, name in shortest.items():
        alike[name].append(json.loads(text))
    found = []
    for text, name in zip(texts, candidates, strict=True):
        name = name if text is None else shortest[text]
        if text is not None and len(alike[name]) > 1:
            own = json.loads(text)
            name += f" ({', '.join(f'{key}={own.get(key)}' for key in _varying(alike[name]))})"
        found.append(name)
    return found


def shared_overrides(typed: Sequence[Sequence[str]]) -> list[str]:
    """Return the overrides that all runs have, which name no arm; none where they all have the same."""
    kept = _kept(typed)
    is_varied = len({tuple(sorted(own)) for own in kept}) > 1
    return [each for each in kept[0] if all(each in own for own in kept)] if is_varied else []


def default_arm(arms: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any]) -> str | None:
    """Return the arm that has the default of every setting by which the arms differ; None if none has.

    arms: settings by arm; defaults: of all settings, by dotted key.
    """
    keys = _varying(list(arms.values()))
    found = [arm for arm, own in arms.items() if all(own.get(key) == defaults.get(key) for key in keys)]
    return found[0] if keys and found else None


def axes(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the numeric settings that vary: arm -> setting -> value. Of two settings with equal values the shorter is
    kept.
    """
    columns = {
        key: column
        for key, column in varying_columns(list(configs.values())).items()
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in column if v is not None)
    }
    return {
        arm: {key: float(column[number]) for key, column in columns.items() if column[number] is not None}
        for number, arm in enumerate(configs)
    }


def varying_columns(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the settings that vary: setting -> its value in each config, None where it has none. Of two settings with
    equal values the shorter is kept.
    """
    columns: dict[str, list[Any]] = {}
    for key in sorted(_varying(configs), key=lambda key: (key.count("."), key)):
        column = [config.get(key) for config in configs]
        if column not in columns.values():
            columns[key] = column
    return columns


def in_order(name: str) -> tuple[Any, ...]:
    """Return a sort key for names: numbers by value, the arm without overrides first."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", name)
    return (
        name != DEFAULT_ARM,
        *((float(part), "") if number % 2 else (0.0, part) for number, part in enumerate(parts)),
    )


def _varying(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = {key for config in configs for key in config}
    return sorted(key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1)


def _kept(typed: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the overrides of each run that define its arm."""
    return [[each.lstrip("+") for each in own if not is_under(_key(each), IGNORED_OVERRIDES)] for own in typed]


def _key(override: str) -> str:
    key = override_key(override)
    return "launcher" if key.startswith("hydra.") else key
