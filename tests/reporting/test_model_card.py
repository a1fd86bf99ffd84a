"""The model card: the run's own facts and figures, readable by the hub, and no markup from data in it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import yaml

from dpo_lab.models.weight_settings import Lora
from dpo_lab.reporting.comparison_tables import commands_table
from dpo_lab.reporting.model_card import cell, markdown_table, model_card
from dpo_lab.runs.commands import command_of
from dpo_lab.stats.estimates import share
from dpo_lab.studies.run_data import RunData, RunSet
from dpo_lab.studies.spec import Arm

RECORD = {
    "config": {
        "name": "mine",
        "seed": 7,
        "loss": {"kind": "cdpo", "beta": 0.3, "label_smoothing": 0.1},
        "reference": {"kind": "cached"},
        "noise": {"rate": 0.2, "seed": 7},
        "policy": {"kind": "pretrained", "path": "org/model"},
        "data": {"path": "pairs.jsonl", "batch_size": 16},
        "optim": {"lr": 1e-5},
    },
    "overrides": ["loss=cdpo", "data.path='my pairs.jsonl'"],
    "versions": {"dpo_lab": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    "git": None,
    "data": {"train pairs": 1234, "dropped: duplicate": 0},
    "initial_policy": "abcdef",
    "steps": 40,
    "metrics": {
        "accuracy": share([1, 1, 0, 1]).as_record(),
        "perplexity": {"value": 9.5, "se": None, "n": 4, "interval": None},
        "initial/perplexity": {"value": 8.25, "se": None, "n": 4, "interval": None},
    },
    "metric_labels": {"accuracy": "accuracy, labels (held-out)", "perplexity": "perplexity of real text"},
}


def front_matter(card: str) -> dict:
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


@pytest.mark.parametrize(
    ("keys", "command"),
    [
        (["trained", "reward_model", "loss"], "evaluate"),
        (["reward_model", "loss"], "reward"),
        (["loss"], "train"),
        (["sft"], "sft"),
    ],
)
def test_the_command_of_a_run_is_told_by_its_config(keys, command, tmp_path):
    config = {key: {} for key in keys}
    assert command_of(config) == command
    run = RunData(tmp_path, "a", 0, "done", record={"config": config, "overrides": ["x=1"]})
    table = commands_table(RunSet("runs", tmp_path, [Arm("a", [])], [0], [run]))
    assert table.rows[0][-1].text == f"python -m dpo_lab.{command} x=1"


def test_it_states_what_the_run_was():
    card = model_card(RECORD)
    for fact in (
        "| data | pairs.jsonl |",
        "| pairs | train pairs 1,234 |",
        "| loss | cdpo, beta 0.3, label&#95;smoothing 0.1 |",
        "| reference | cached |",
        "| label noise | rate 0.2, seed 7 |",
        "| seed | 7 |",
        "| initial policy | org/model, weights abcdef |",
        "| steps | 40 of 16 pairs, learning rate 1e-05 |",
        "| accuracy, labels (held-out) |  | 0.750 | 0.301 .. 0.954 | 4 |",
        "| perplexity of real text | 8.250 | 9.500 |  | 4 |",
        "    python -m dpo_lab.train loss=cdpo 'data.path='\"'\"'my pairs.jsonl'\"'\"''",
    ):
        assert fact in card
    assert "dropped" not in card
    assert "adapters" not in card
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "dpo-lab"],
    }


def test_adapters_name_their_base_and_a_merged_model_none():
    record = copy.deepcopy(RECORD)
    lora = {"r": 8, "lora_alpha": 16}
    assert {*lora} <= {field.name for field in dataclasses.fields(Lora)}  # as a run records them
    record["config"]["policy"] = {"kind": "pretrained", "path": 'org/"x"\n- y', "merge": False, "lora": lora}
    assert front_matter(model_card(record))["base_model"] == 'org/"x"\n- y'
    assert "| adapters | rank 8, alpha 16 |" in model_card(record)
    record["config"]["policy"]["merge"] = True
    assert front_matter(model_card(record))["library_name"] == "transformers"
    assert "base_model" not in front_matter(model_card(record))


def test_a_policy_of_its_own_samples_is_called_that():
    record = copy.deepcopy(RECORD)
    record["config"]["method"] = {"kind": "rloo", "prompts": 16, "minibatches": 2, "samples": 4, "beta": 0.1}
    record["config"]["reward"] = {"kind": "learned", "path": None}
    card = model_card(record)
    assert front_matter(card)["tags"] == ["rloo", "dpo-lab"]
    assert "Trained by reinforcement learning" in card
    assert "on responses of the policy itself to the prompts of preference pairs. The numbers are" in card
    assert "| steps | 40 of 8 prompts, 4 responses each, learning rate 1e-05 |" in card
    assert "| loss |" not in card
    assert "| reward | learned" in card
    record["config"]["method"]["kind"] = "online_dpo"
    assert "Trained by preference optimization" in model_card(record)
    assert "| loss |" in model_card(record)


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "a|b", "[x](javascript:alert(1))", "`x`", "a\nb", "**x**"]
)
def test_nothing_in_a_cell_is_markup(text):
    made = cell(text)
    assert not set("<>|[]`*\n") & set(made)
    assert len(markdown_table(("head",), [(text,)])) == 3


@pytest.mark.parametrize(
    ("column", "source", "unit"),
    [(None, "the chosen responses of preference pairs", "responses"), ("body", "plain texts", "texts")],
)
def test_supervised_fine_tuning_is_called_that(column, source, unit):
    record = copy.deepcopy(RECORD)
    for axis in ("loss", "reference", "noise"):
        del record["config"][axis]
    record["config"]["sft"] = {"text_column": column}
    record["config"]["data"]["format"] = "auto"
    card = model_card(record)
    assert front_matter(card)["tags"] == ["sft", "dpo-lab"]
    assert "Trained by supervised fine-tuning" in card
    assert f"on {source}. The numbers are" in card
    assert f"| steps | 40 of 16 {unit}, learning rate 1e-05 |" in card
    assert "    python -m dpo_lab.sft loss=" in card
    assert "reference |" not in card


def test_hostile_names_and_paths_stay_text():
    record = copy.deepcopy(RECORD)
    record["config"]["name"] = "x\n<script>"
    record["config"]["data"]["path"] = "a|b\n# heading"
    record["overrides"] = ["name=x\n\n<script>alert(1)</script>"]
    lines = model_card(record).splitlines()
    assert not any(line.startswith(("<script>", "# heading")) for line in lines)
    assert "| data | a&#124;b # heading |" in lines
