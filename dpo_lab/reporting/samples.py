"""Samples of the arms for the same prompts, side by side, from the records of one seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_lab.reporting.formatting import format_value
from dpo_lab.runs.examples import EXAMPLES, ExamplesError, rows_of
from dpo_lab.studies.run_data import RunData, RunSet

PROMPTS = 8
START = b'{"kind": "prompt"'


@dataclass(frozen=True)
class Response:
    """A response: who wrote it, its text, and its score as text."""

    by: str
    text: str
    worth: str = ""


@dataclass(frozen=True)
class Prompt:
    """A prompt with the responses of the arms."""

    text: str
    responses: Sequence[Response]


def side_by_side(collection: RunSet, notes: list[str]) -> tuple[int, list[Prompt]] | None:
    """Return the seed for which most arms have samples, and its first prompts; None if no run has samples.

    notes: errors of examples that can't be read are added to it; their samples have no scores.
    """
    counts = {seed: sum(_has_samples(run) for run in collection.runs if run.seed == seed) for seed in collection.seeds}
    seed = max(counts, key=counts.__getitem__, default=None)
    if seed is None or not counts[seed]:
        return None
    by_prompt: dict[str, list[Response]] = {}
    for arm in collection.arms:
        run = collection.run(arm.name, seed)
        if run is None or not _has_samples(run):
            continue
        try:
            scores = _scores(run)
        except ExamplesError as error:
            scores = {}
            notes.append(str(error))
        seen: set[str] = set()
        for sample in run.record["samples"]:
            prompt = str(sample["prompt"])
            if prompt in seen or (prompt not in by_prompt and len(by_prompt) == PROMPTS):
                continue
            seen.add(prompt)
            responses = by_prompt.setdefault(prompt, [])
            for who in (who for who in ("initial", "third") if who in sample):  # of several arms each text once
                other = Response(f"{who} policy", str(sample[who]), scores.get((prompt, who), ""))
                if other.text not in [r.text for r in responses if r.by == other.by]:
                    responses.append(other)
            responses.append(Response(arm.name, str(sample["trained"]), scores.get((prompt, "trained"), "")))
    return seed, [Prompt(text, responses) for text, responses in by_prompt.items()]


def _has_samples(run: RunData) -> bool:
    return run.is_done and bool(run.record.get("samples"))


def _scores(run: RunData) -> dict[tuple[str, str], str]:
    """Return gold reward or judge score of a run's samples from its examples: (prompt, initial, trained or third) -> text."""
    path = Path(run.folder) / EXAMPLES
    wanted: dict[str, tuple[str, str]] = {}
    for sample in run.record["samples"]:  # of one prompt the first, which is shown
        wanted.setdefault(str(sample["prompt"]), (str(sample["initial"]), str(sample["trained"])))
    found: dict[tuple[str, str], str] = {}
    if not path.is_file():
        return found
    for row in rows_of(path, START):
        texts = wanted.get(str(row.get("prompt")))
        if texts == (row.get("initial_response"), row.get("response")):
            for who, prefix in (("initial", "initial_"), ("trained", ""), ("third", "third/")):
                if score := _score(row, prefix):
                    found.setdefault((row["prompt"], who), score)
    return found


def _score(row: Mapping[str, Any], prefix: str) -> str:
    for name in ("gold", "judge"):
        value = row.get(f"{prefix}{name}")
        if value is not None:
            return f"{name} {format_value(value)}"
    return ""
