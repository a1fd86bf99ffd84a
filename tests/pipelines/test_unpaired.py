"""Rows of one labelled response, as a user types it: trained on by bco with label noise, resumed, measured; and refused."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path

import pytest

from dpo_lab.core.noise import Symmetric
from dpo_lab.runs.examples import read
from tests.pipelines.test_cuda_runs import QUIET, make_shop, record_of
from tests.support import warm

pytestmark = [pytest.mark.slow, pytest.mark.extended]

WORDS = "the plot was good bad dull great acting story".split()
SMALL = [*(each for each in QUIET if not each.startswith("data.path=")), "loss=bco", "data.path=unpaired.jsonl"]
CHECKPOINTS = ["callbacks.checkpoint.every_n_steps=2"]


@pytest.fixture(scope="module")
def shop(policy, tmp_path_factory) -> Path:
    folder = make_shop(tmp_path_factory.mktemp("shop"), policy)
    draw = random.Random(1)
    rows = [
        {
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(2, 6))) + f" {i}",
            "completion": " " + " ".join(draw.choices(WORDS, k=draw.randint(1, 5))),
            "label": bool(draw.randrange(2)),
        }
        for i in range(60)
    ]
    (folder / "unpaired.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def trained(shop) -> Path:
    told = warm.run_module(
        "dpo_lab.train", "name=rows", "noise=symmetric", "noise.rate=0.3", *SMALL, *CHECKPOINTS, cwd=shop
    )
    assert told.returncode == 0, told.stdout + told.stderr
    return shop


def test_a_run_measures_what_single_responses_have(trained):
    record = record_of(trained, "rows")
    assert record["status"] == "done"
    assert record["step_zero_loss"] == pytest.approx(math.log(2), abs=1e-4)  # one term a row, the shift 0
    metrics = record["metrics"]
    assert {"auc", "chosen_fell", "chosen_change", "rejected_change", "kl", "perplexity"} <= metrics.keys()
    assert 0 <= metrics["auc"]["value"] <= 1
    assert not {name for name in metrics if "accuracy" in name or "margin" in name or "calibration" in name}
    rows = read(next((trained / "outputs/rows").glob("*/*/examples.jsonl")))["response"].values()
    assert len(rows) == record["data"]["held-out pairs"]
    assert 0 < sum(row["desirable"] for row in rows) < len(rows)
    ratios = [[row["trained"] - row["initial"] for row in rows if row["desirable"] is label] for label in (True, False)]
    ranked = [(good > bad) + (good == bad) / 2 for good in ratios[0] for bad in ratios[1]]
    assert sum(ranked) / len(ranked) == pytest.approx(metrics["auc"]["value"])
    desirable, undesirable = record["data_quality"]["train"]["unpaired"]
    assert desirable + undesirable == record["data"]["train pairs"] > 40
    assert record["data_quality"]["train"]["chosen_longer"] is None
    lines = next((trained / "outputs/rows").glob("*/*/metrics.jsonl")).read_text().splitlines()
    names = {name for line in lines for name in json.loads(line)}
    assert {"train/rewards/chosen", "train/rewards/rejected", "train/flipped/rewards/chosen", "val/loss"} <= names
    assert not {name for name in names if "accuracies" in name or "margins" in name}


def test_label_noise_flips_labels_by_the_keys_of_rows(trained):
    """A flipped row is scored on the other side; which rows those are depends on their keys alone."""
    record = record_of(trained, "rows")
    flipped = record["data"]["flipped by label noise"]
    kinds = record["data_quality"]["noise"]["flipped"]
    assert sum(n for _, n in (kinds["desirable"], kinds["undesirable"])) == flipped > 5
    assert kinds["chosen longer"] == [0, 0]
    own = [*SMALL[1:4], "data.path=unpaired.jsonl", "policy=pretrained", "policy.path=mine"]
    noise = ["noise=symmetric", "noise.rate=0.3"]
    told = warm.run_module("dpo_lab.inspect", *own, *noise, "show=60", "page=page.html", cwd=trained)
    assert told.returncode == 0, told.stderr
    shown = [line for line in told.stdout.splitlines() if line.startswith("unpaired.jsonl:")]
    labels = [json.loads(line)["label"] for line in (trained / "unpaired.jsonl").read_text().splitlines()]
    swapped = [line for line in shown if line.endswith("the label swapped by label noise")]
    assert len(swapped) == flipped
    page = (trained / "page.html").read_text()
    assert page.count("the label swapped by label noise") == flipped
    assert "rows of one undesirable response, rejected" in page
    for line in shown:
        place, key, label = line.split()[:3]
        was_desirable = labels[int(place.rpartition(":")[2]) - 1]
        is_flipped = Symmetric(rate=0.3)._draw(key.rstrip(",").encode()) < 0.3 * 2**64
        assert (label.rstrip(",") == "desirable") == (was_desirable != is_flipped)
        assert is_flipped == (line in swapped)


def test_a_killed_run_goes_on(trained):
    command = ["name=killed", "noise=symmetric", "noise.rate=0.3", *SMALL, *CHECKPOINTS, "trainer.max_steps=40"]
    with warm.Warm(warm.main, "dpo_lab.train", *command, cwd=trained) as process:
        deadline = time.monotonic() + warm.patience(120)
        while not list((trained / "outputs/killed").glob("*/*/checkpoints/*.ckpt")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.process.kill()
    whole = ["name=whole", *command[1:]]
    for again in (command, whole):
        told = warm.run_module("dpo_lab.train", *again, cwd=trained)
        assert told.returncode == 0, told.stderr
    killed, other = record_of(trained, "killed"), record_of(trained, "whole")
    assert len(killed["attempts"]) == 1
    assert "attempts" not in other
    assert killed["trained_policy"] == other["trained_policy"]
    assert killed["metrics"] == other["metrics"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["loss=dpo"],
            "loss=dpo: it compares two responses, and unpaired.jsonl:1 is one response with a label; type loss=bco or loss=kto",
        ),
        (
            ["loss=ipo", "data.path=pairs.jsonl", "data.unpair=true"],
            "loss=ipo: it compares two responses, and data.unpair=true",
        ),
        (
            ["loss=odpo", "data.path=pairs.jsonl"],
            " pairs came without the scores that it takes; type loss=dpo, or name their columns, e.g. '+data.columns=",
        ),
        (["noise=one_sided"], "noise: this kind compares the two responses of a pair, and "),
    ],
)
def test_what_compares_two_responses_is_refused(overrides, said, shop):
    told = warm.run_module("dpo_lab.train", "name=refused", *SMALL, *overrides, cwd=shop)
    assert told.returncode == 2
    assert said in told.stderr.splitlines()[-1]


def test_pairs_train_as_rows_and_are_held_out_as_pairs(shop):
    """The held-out pairs are those of a run on the pairs."""
    path = "data.path=pairs.jsonl"
    for name, more in (("split", ["data.unpair=true"]), ("pairs", [])):
        told = warm.run_module("dpo_lab.train", f"name={name}", *SMALL, path, *more, cwd=shop)
        assert told.returncode == 0, told.stderr
    split, pairs = record_of(shop, "split"), record_of(shop, "pairs")
    assert (
        split["data"]["train pairs"]
        == 2 * pairs["data"]["train pairs"]
        == 2 * split["data"]["training pairs split in two"]
    )
    assert split["identity"]["data"].split()[1] == pairs["identity"]["data"].split()[1]
    assert {"accuracy", "margin"} <= split["metrics"].keys()
    assert "auc" not in split["metrics"]
    assert split["data_quality"]["train"]["unpaired"] == [pairs["data"]["train pairs"]] * 2


def test_sft_learns_the_desirable_ones(shop):
    told = warm.run_module("dpo_lab.sft", "name=sft", *SMALL[:-2], "data.path=unpaired.jsonl", cwd=shop)
    assert told.returncode == 0, told.stderr
    record = record_of(shop, "sft")
    rows = [json.loads(line) for line in (shop / "unpaired.jsonl").read_text().splitlines()]
    assert record["data"]["train responses"] + record["data"]["held-out responses"] == sum(row["label"] for row in rows)
