"""Exported pairs are those that a run trains on: the same texts, messages, tokens, flips and splits, in the same order."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from pyarrow import parquet

from dpo_lab.config.inspection import InspectConfig
from dpo_lab.config.schema import ConfigError
from dpo_lab.core.pair_table import PairTable
from dpo_lab.inspection.export import check_target, export_pairs
from dpo_lab.pipelines.inputs import Forward, TrainingInputs, prepare_pairs
from tests.conftest import SMALL
from tests.support.configs import composed
from tests.support.templates import CHATML

FORWARD = Forward(torch.device("cpu"), nullcontext)
CHATS = [
    {
        "prompt": [{"role": "user", "content": f"What is {i}?"}],
        "chosen": [{"role": "assistant", "content": f"It is {i}."}],
        "rejected": [{"role": "assistant", "content": f"Not {i + 1}."}],
    }
    for i in range(40)
]
TEXTS = [{"prompt": f"the plot {i}", "chosen": f" was good {i}", "rejected": f" was bad {i}"} for i in range(40)]


def settings(*overrides: str) -> InspectConfig:
    config = OmegaConf.to_object(composed(*overrides, name="inspect"))
    assert isinstance(config, InspectConfig)
    return config


@pytest.fixture
def model(policy, tmp_path) -> str:
    """A folder of a small policy whose tokenizer has a chat template."""
    policy.model.save_pretrained(tmp_path / "model")
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def exported(config: InspectConfig, cache: Path, file: Path) -> list[dict[str, Any]]:
    export_pairs(config, cache, file)
    if file.suffix == ".parquet":
        return parquet.read_table(file).to_pylist()
    return [json.loads(line) for line in file.read_text().splitlines()]


def trained_on(config: InspectConfig, cache: Path) -> TrainingInputs:
    return prepare_pairs(config, cache, FORWARD)


def ids(table: PairTable) -> list[tuple]:
    return [(pair.key, *map(list, (pair.prompt, pair.chosen, pair.rejected)), pair.flipped) for pair in table]


NAMES = ("key", "prompt_ids", "chosen_ids", "rejected_ids", "flipped")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_pairs_of_the_task(split, suffix, tmp_path, workshop):
    cache = workshop / "outputs" / "cache"
    common = [*SMALL, "noise=symmetric", "noise.rate=0.3"]
    config = settings(*common, f"export_split={split}", "export_tokens=true")
    rows = exported(config, cache, tmp_path / f"pairs{suffix}")
    inputs = trained_on(config, cache)
    table = inputs.train if split == "train" else inputs.held_out
    assert [tuple(row[name] for name in NAMES) for row in rows] == ids(table)
    assert sum(row["flipped"] for row in rows) == table.flipped.sum()
    assert (split == "train") is bool(table.flipped.any())
    for row, pair in zip(rows, table, strict=True):
        assert row["gold_margin"] == pytest.approx(pair.gold_margin, nan_ok=True)
        prompt = inputs.encoder.prompt(row["prompt"])
        assert prompt == list(pair.prompt)
        assert inputs.encoder.response(row["chosen"], prompt) == list(pair.chosen)
        assert inputs.encoder.response(row["rejected"], prompt) == list(pair.rejected)


@pytest.mark.parametrize("given", [TEXTS, CHATS], ids=["text", "chat"])
def test_the_pairs_of_rows_are_read_back_as_the_same_pairs(given, model, tmp_path):
    """Both splits, of a fraction of the rows: what is left out stays out, and what was text or messages stays so."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    of_policy = ["policy=pretrained", f"policy.path={model}", "data.batch_size=4"]
    first = [*of_policy, f"data.path={tmp_path}/pairs.jsonl", "data.fraction=0.7", "data.validation_fraction=0.3"]
    for split in ("train", "held_out"):
        rows = exported(settings(*first, f"export_split={split}"), tmp_path, tmp_path / f"{split}.parquet")
        assert all({name: row[name] for name in ("prompt", "chosen", "rejected")} in given for row in rows)
    again = settings(
        *of_policy, f"data.path={tmp_path}/train.parquet", f"data.validation_path={tmp_path}/held_out.parquet"
    )
    here, there = trained_on(settings(*first), tmp_path), trained_on(again, tmp_path)
    assert 0 < len(here.train) < 40
    assert here.identity() == there.identity()


def test_single_responses_are_rows_of_a_completion_and_a_label(model, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    noise = ["noise=symmetric", "noise.rate=0.4", "data.unpair=true", "loss=bco"]
    config = settings(
        "policy=pretrained", f"policy.path={model}", f"data.path={tmp_path}/pairs.jsonl", *noise, "export_tokens=true"
    )
    rows = exported(config, tmp_path, tmp_path / "single.jsonl")
    inputs = trained_on(config, tmp_path)
    assert len(rows) == len(inputs.train)
    for row, pair in zip(rows, inputs.train, strict=True):
        assert row["completion_ids"] == list(pair.chosen) + list(pair.rejected)
        assert (row["key"], row["label"]) == (pair.key, len(pair.chosen) > 0)
        assert row["label"] is (row["completion"].startswith(" was good") is not row["flipped"])
    assert any(row["flipped"] for row in rows)


def test_truncated_pairs_are_marked(model, tmp_path):
    rows = [*TEXTS[:30], {"prompt": "the plot", "chosen": " was good" * 40, "rejected": " was bad"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(
        *("policy=pretrained", f"policy.path={model}", f"data.path={tmp_path}/pairs.jsonl"),
        *("data.max_length=40", "data.max_prompt_length=30", "data.validation_fraction=0.01"),
    )
    cut = [row for row in exported(config, tmp_path, tmp_path / "cut.jsonl") if row["truncated"]]
    assert [row["chosen"] for row in cut] == [" was good" * 40]


def test_nothing_is_overwritten_or_exported_otherwise(tmp_path):
    (tmp_path / "mine.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=r"mine.jsonl: exists already; type another export="):
        check_target(str(tmp_path / "mine.jsonl"))
    assert check_target(None) is None
    with pytest.raises(ValueError, match=r"export=pairs.csv: must end in .parquet or .jsonl"):
        settings("export=pairs.csv")
