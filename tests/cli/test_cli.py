"""The commands as a user types them: real processes, real files, a few seconds each; most are forked from a warm one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lab.pipelines import session
from dpo_lab.reporting.figures import draw_run
from dpo_lab.runs.examples import pair_examples, read
from tests.conftest import SMALL, python_m
from tests.support import warm
from tests.support.sweeping import until
from tests.support.warm import run_module

pytestmark = pytest.mark.slow


def train(workshop: Path, *overrides: str, code: int = 0, start=run_module) -> subprocess.CompletedProcess:
    result = start("dpo_lab.train", *SMALL, *overrides, cwd=workshop)
    assert result.returncode == code, result.stdout + result.stderr
    return result


def folder_of(result: subprocess.CompletedProcess, workshop: Path) -> Path:
    return workshop / result.stdout.splitlines()[0].removeprefix("dpo_lab: ")


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def baseline(workshop) -> Path:
    return folder_of(train(workshop, "name=base", "figures=true"), workshop)


def test_a_run_leaves_its_record(baseline):
    record = record_of(baseline)
    assert record["status"] == "done"
    assert record["step_zero_loss"] == pytest.approx(0.693147, abs=1e-4)
    assert record["steps"] == 6
    assert record["data"]["rows"] == 96 + 24
    assert {"kind": "dpo", "beta": 0.1}.items() <= record["config"]["loss"].items()
    assert {
        "accuracy",
        "true_accuracy",
        "kl",
        "gold",
        "win_rate",
        "perplexity",
        "well_formed",
        "distinct_2",
        "length",
    } <= set(record["metrics"])
    assert record["metrics"]["kl"]["n"] == 16
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert [key in record["samples"][0] for key in ("prompt", "initial", "trained")] == [True] * 3


def test_a_run_leaves_its_pairs_figures_and_cost(baseline):
    record, pairs = record_of(baseline), pair_examples(read(baseline / "examples.jsonl"))
    held_out = [pair for pair in pairs if pair.split == "held-out"]
    assert len(held_out) == record["data"]["held-out pairs"]
    assert len(pairs) - len(held_out) == record["data"]["train pairs"]  # all of so few
    mean = sum(pair.margin for pair in held_out) / len(held_out)
    assert record["metrics"]["margin"]["value"] == pytest.approx(mean, abs=1e-6)
    assert -1 <= record["metrics"]["gold_correlation"]["value"] <= 1
    before = {path.name: path.read_bytes() for path in (baseline / "figures").iterdir()}
    assert {path.name for path in draw_run(baseline)} == set(before)
    assert {path.name: path.read_bytes() for path in (baseline / "figures").iterdir()} == before  # the folder is enough
    spent = record["seconds"]["dpo"]["wall"]
    assert record["throughput"]["pairs_per_second"] > 6 * 8 / spent  # of the steps alone
    assert 100 << 20 < record["peak_memory_bytes"] < 4 << 30
    assert record["memory"]["weights"] == 1  # the reference is cached
    saved = (baseline / "policy" / "model.safetensors").stat().st_size
    assert 0 < saved - record["memory"]["policy_bytes"] < 8192  # the file's header


def test_the_trained_policy_loads_by_transformers(baseline):
    model = AutoModelForCausalLM.from_pretrained(baseline / "policy", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(baseline / "policy", local_files_only=True)
    ids = tokenizer("The plot was", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).logits.isfinite().all()


def test_the_trained_policy_has_its_card(baseline):
    card, record = (baseline / "policy" / "README.md").read_text(), record_of(baseline)
    assert f"weights {record['initial_policy']}" in card
    assert f"| KL to initial policy (nats) |  | {record['metrics']['kl']['value']:.3f} |" in card
    assert "| loss | dpo, beta 0.1 |" in card


def test_checkpoint_holds_the_policy_and_no_reference(baseline):
    checkpoint = torch.load(baseline / "checkpoints" / "step=6.ckpt", weights_only=True)
    weights = load_file(baseline / "policy" / "model.safetensors")
    kept = {name.removeprefix("model."): w for name, w in checkpoint["state_dict"].items()}
    assert set(weights) <= set(kept)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"model"}


def test_tensorboard_shows_it(baseline):
    events = EventAccumulator(str(baseline)).Reload()
    names = set(events.Tags()["scalars"])
    for split in ("train", "val"):
        assert {
            f"{split}/loss",
            f"{split}/rewards/margins",
            f"{split}/rewards/accuracies",
            f"{split}/logps/chosen",
        } <= names
    assert {"train-end/kl", "train-end/gold", "train-end/true_accuracy"} <= names
    assert [e.step for e in events.Scalars("train/loss")] == [2, 4, 6]
    assert events.Scalars("train-end/kl")[-1].value == pytest.approx(record_of(baseline)["metrics"]["kl"]["value"])
    assert "samples/text_summary" in events.Tags()["tensors"]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_microbatches_change_neither_the_run_nor_its_schedule(baseline, workshop):
    cut = folder_of(train(workshop, "name=cut_up", "data.tokens_per_microbatch=100"), workshop)
    one, four = (EventAccumulator(str(folder)).Reload() for folder in (baseline, cut))
    for name in ("train/loss", "val/loss"):
        assert [e.step for e in four.Scalars(name)] == [e.step for e in one.Scalars(name)]
        expected = [e.value for e in one.Scalars(name)]
        assert [e.value for e in four.Scalars(name)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="here the device is there")
def test_a_device_that_is_not_there_is_refused_in_one_line(workshop):
    result = train(workshop, "name=gpu", "trainer=gpu", code=2)
    assert result.stderr.splitlines()[-1].startswith("error: the trainer")


def test_summary_says_what_where_and_what_next(workshop):
    again = train(workshop, "name=base")
    for needle in (
        "KL to initial",
        "accuracy, truth",
        "trained policy",
        "Run folder: outputs/base/",
        "tensorboard --logdir outputs",
    ):
        assert needle in again.stdout


def test_running_a_finished_run_again_changes_nothing(baseline, workshop):
    before = {
        p: (p.stat().st_mtime_ns, p.read_bytes()) for p in baseline.rglob("*") if p.is_file() and p.name != ".lock"
    }
    result = python_m("dpo_lab.train", *SMALL, "name=base", cwd=workshop, PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 0
    assert "done already" in result.stdout
    assert "Task responses" not in result.stdout
    assert "hydra" in result.stderr
    assert "| torch\n" not in result.stderr  # it answers from the record
    after = {
        p: (p.stat().st_mtime_ns, p.read_bytes()) for p in baseline.rglob("*") if p.is_file() and p.name != ".lock"
    }
    assert after == before


def test_another_config_under_its_folder_is_refused(baseline, workshop):
    before = (baseline / "run.json").read_bytes()
    result = train(workshop, "name=base", "optim.lr=1e-5", f"hydra.run.dir='{baseline.relative_to(workshop)}'", code=2)
    assert "optim.lr" in result.stderr
    assert "name=another" in result.stderr
    assert (baseline / "run.json").read_bytes() == before


def test_same_seed_same_everything(baseline, workshop):
    same = folder_of(train(workshop, "name=same", "data.num_workers=1"), workshop)
    assert record_of(same)["metrics"] == record_of(baseline)["metrics"]
    assert record_of(same)["trained_policy"] == record_of(baseline)["trained_policy"]


@pytest.mark.extended  # in make test: tests/core/test_seeds.py
def test_another_seed_is_another_run(baseline, workshop):
    other = folder_of(train(workshop, "name=other", "seed=1"), workshop)
    assert record_of(other)["trained_policy"] != record_of(baseline)["trained_policy"]
    assert record_of(other)["metrics"]["kl"] != record_of(baseline)["metrics"]["kl"]


def test_two_ddp_ranks_give_the_run_of_one(workshop, baseline):
    """Lightning starts the second rank by repeating our command line."""
    ranks = folder_of(train(workshop, "name=ddp", "trainer=ddp_cpu"), workshop)
    one, two = record_of(baseline), record_of(ranks)
    assert two["status"] == "done"
    for name in ("accuracy", "margin", "perplexity"):
        assert two["metrics"][name]["value"] == pytest.approx(one["metrics"][name]["value"], abs=1e-4)


@pytest.mark.parametrize("ablation", ["[uniform_tokens_ref,label_noise]", "simpo", "no_sft"])
def test_ablations_run(ablation, workshop):
    record = record_of(folder_of(train(workshop, f"+ablation={ablation}", "name=arm", "trainer.max_steps=2"), workshop))
    assert record["status"] == "done"
    if ablation == "no_sft":
        assert record["metrics"]["initial/perplexity"]["value"] > 100  # random weights
        assert record["step_zero_loss"] == pytest.approx(0.693147, abs=1e-4)
    else:
        assert record["step_zero_loss"] is None  # nothing to agree with


def test_sft_makes_the_policy_that_train_finds(tmp_path):
    made = run_module("dpo_lab.sft", *SMALL, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    folder = tmp_path / made.stdout.splitlines()[-1].split(": ")[-1]
    assert (folder / "model.safetensors").exists()
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["cache"]  # no run folder
    before = (folder / "model.safetensors").stat().st_mtime_ns
    train(tmp_path, "trainer.max_steps=1")
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert len(list((tmp_path / "outputs" / "cache").glob("policy-*/"))) == 1


def rows(count: int) -> list[dict]:
    rng = random.Random(0)
    words = "the a some every dog house river song answer quick slow blue of to".split()
    say = lambda n: " ".join(rng.choices(words, k=n))  # noqa: E731
    return [{"prompt": say(6) + f" {i}?", "chosen": say(12), "rejected": say(9)} for i in range(count)]


def test_own_pairs_train_and_long_ones_are_truncated(workshop):
    data = rows(80)
    data[3]["chosen"] = "word " * 400
    data[5]["rejected"] = data[5]["chosen"]
    (workshop / "pairs.jsonl").write_text("\n".join(map(json.dumps, data)))
    result = train(workshop, "name=own", "data.path=pairs.jsonl", "data.max_length=200", "data.max_prompt_length=100")
    record = record_of(folder_of(result, workshop))
    assert record["data"]["dropped: identical sides"] == 1
    assert record["data"]["responses truncated"] == 1
    assert record["data"]["train pairs"] + record["data"]["held-out pairs"] == 79
    assert record["metrics"]["accuracy"]["interval"] is not None
    assert "gold" not in record["metrics"]
    assert "true_accuracy" not in record["metrics"]


def test_an_interrupted_run_goes_on_where_it_was(workshop, baseline):
    """SIGTERM while it trains: saved, not done, exit code 143; the same command goes on, and ends as if nothing had been."""
    longer = ["trainer.max_steps=20", "trainer.val_check_interval=10", "callbacks.checkpoint.every_n_steps=1000"]
    whole = folder_of(train(workshop, *longer, "name=whole"), workshop)
    with warm.Warm(warm.main, "dpo_lab.train", *SMALL, *longer, "name=cut", cwd=workshop) as process:
        (journal,) = until(lambda: list(workshop.glob("outputs/cut/*/*/metrics.jsonl")))  # then it trains
        os.kill(process.process.pid, signal.SIGTERM)
        assert process.wait(60)[0] == 143
    folder = journal.parent
    record = record_of(folder)
    assert (record["status"], record["error"]) == ("preempted", "stopped by SIGTERM")
    train(workshop, *longer, "name=cut")
    again, undisturbed = record_of(folder), record_of(whole)
    assert again["status"] == "done"
    assert again["attempts"][0]["status"] == "preempted"
    for what in ("metrics", "trained_policy", "samples", "identity"):
        assert again[what] == undisturbed[what]
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name in EventAccumulator(str(folder)).Reload().Tags()["scalars"]:
        cut, one = (EventAccumulator(str(f)).Reload().Scalars(name) for f in (folder, whole))
        assert [(e.step, e.value) for e in cut] == [(e.step, e.value) for e in one]


def cut_short_in_a_library(*arguments: str) -> None:
    """The command in a process whose library fails where it is asked to stop, as an extension module that was being loaded."""

    def draw(folder: Path) -> NoReturn:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as stopped:
            raise ImportError("initialization failed") from stopped
        raise AssertionError("not asked")

    session.draw_run = draw
    warm.main("dpo_lab.train", *arguments)


def test_a_library_that_fails_because_it_was_cut_short_has_not_failed(workshop, baseline):
    settings = [*SMALL, "name=short"]
    with warm.Warm(cut_short_in_a_library, *settings, "figures=true", cwd=workshop) as process:
        code, said, errors = process.wait(240)
    assert (code, errors) == (143, "")
    assert "Traceback" not in said
    (folder,) = (path.parent for path in (workshop / "outputs" / "short").rglob("run.json"))
    assert (record_of(folder)["status"], record_of(folder)["error"]) == ("preempted", "stopped by SIGTERM")
    train(workshop, "name=short")
    assert record_of(folder)["metrics"] == record_of(baseline)["metrics"]


def test_more_steps_go_on_from_the_last(workshop, baseline):
    longer = ["name=longer", "trainer.max_steps=12"]
    folder = folder_of(train(workshop, "name=longer", "figures=true"), workshop)
    record = record_of(folder)
    assert (folder / "figures" / "curves.png").exists()
    (folder / "figures" / "mine.png").touch()
    assert folder_of(train(workshop, *longer), workshop) == folder
    assert [path.name for path in (folder / "figures").iterdir()] == ["mine.png"]  # those of 6 steps are gone
    assert (record_of(folder)["steps"], record_of(folder)["status"]) == (12, "done")
    assert record_of(folder)["attempts"][0]["metrics"] == record["metrics"]
    refused = train(workshop, "name=longer", code=2)  # of 6 steps
    assert "trainer.max_steps: was 12, now 6" in refused.stderr


def test_a_run_that_was_killed_while_it_was_evaluated_is_not_trained_again(workshop, baseline):
    settings = ["name=early", "callbacks=early_stopping", "optim.lr=0", "trainer.max_steps=60"]
    folder = folder_of(train(workshop, *settings), workshop)
    before, journal = record_of(folder), (folder / "metrics.jsonl").read_bytes()
    assert before["steps"] == 12  # no better after the first of four validations
    left = {name: value for name, value in before.items() if name not in ("metrics", "samples", "trained_policy")}
    (folder / "run.json").write_text(json.dumps(left | {"status": "running"}))
    policy = {path.name: path.read_bytes() for path in (folder / "policy").iterdir()}
    (folder / "policy" / "model.safetensors").write_bytes(b"half")
    (folder / "policy" / ".tmp1no8TE").touch()  # as safetensors leaves them
    (folder / ".policy.4711").mkdir()
    train(workshop, *settings)
    assert {path.name: path.read_bytes() for path in (folder / "policy").iterdir()} == policy
    assert not (folder / ".policy.4711").exists()
    after = record_of(folder)
    for what in ("status", "steps", "metrics", "samples", "trained_policy"):
        assert after[what] == before[what]
    assert (folder / "metrics.jsonl").read_bytes() == journal
