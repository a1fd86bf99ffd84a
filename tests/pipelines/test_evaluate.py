"""The command of evaluation, as a user types it, on a run that is done and on a policy of anybody's; and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from dpo_lab.config import schema
from dpo_lab.config.from_run import config_from_run, from_record, load_finished_run
from dpo_lab.evaluate import as_path
from dpo_lab.runs import evaluations
from dpo_lab.runs.examples import Examples, read
from dpo_lab.runs.run_record import RunRefused
from tests.conftest import SMALL, python_m
from tests.support.configs import composed, recorded, settled
from tests.support.warm import run_module

pytestmark = pytest.mark.slow


def evaluate(workshop: Path, *overrides: str, code: int = 0, start=run_module) -> subprocess.CompletedProcess:
    result = start("dpo_lab.evaluate", *overrides, cwd=workshop)
    assert result.returncode == code, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def run(workshop) -> Path:
    """The folder of a finished run with label noise."""
    result = run_module("dpo_lab.train", *SMALL, "name=evaluated", "noise=symmetric", "noise.rate=0.3", cwd=workshop)
    assert result.returncode == 0, result.stdout + result.stderr
    return workshop / result.stdout.splitlines()[0].removeprefix("dpo_lab: ")


def test_with_the_same_settings_it_says_what_the_run_said(run, workshop):
    before = (run / "run.json").read_bytes()
    shown = evaluate(workshop, f"run={run.relative_to(workshop)}", "name=same", start=python_m).stdout
    record, result = json.loads(before), json.loads((run / "evaluations" / "same.json").read_text())
    assert result["metrics"] == record["metrics"]  # to the last bit
    assert result["samples"] == record["samples"]
    assert {"train/clean/accuracy", "train/flipped/accuracy"} <= set(record["metrics"])
    assert (run / "evaluations" / "same.examples.jsonl").read_bytes() == (run / "examples.jsonl").read_bytes()
    assert (run / "run.json").read_bytes() == before
    assert "KL to initial" in shown
    assert "evaluations/same.json" in shown


def test_other_evaluators_and_more_samples(run, workshop):
    evaluate(workshop, f"run={run.relative_to(workshop)}", "evals.evaluators=[kl,displacement]", "evals.num_prompts=40")
    result = json.loads((run / "evaluations" / "1.json").read_text())
    assert set(result["metrics"]) == {
        "kl",
        "kl_per_token",
        "kl_forward_text",
        "chosen_fell",
        "chosen_change",
        "rejected_change",
    }
    assert result["metrics"]["kl"]["n"] == len(read(run / "evaluations" / "1.examples.jsonl")["prompt"]) == 40
    assert result["evals"]["num_texts"] == 8  # as the run had it
    assert result["versions"]["torch"]


def test_prompts_of_ones_own_and_a_third_policy(run, workshop):
    """The run itself as the third policy: its samples are the trained policy's, by another engine too."""
    (workshop / "own.txt").write_text("The plot was\nThe music was\nI saw it twice and\n")
    for engine in ("exact", "continuous"):
        typed = ["evals.prompts=own.txt", f"evals.third={run.relative_to(workshop)}", f"evals/engine={engine}"]
        typed += ["evals.evaluators=[kl,reward,win_rate,language]", f"name=own-{engine}"]
        shown = evaluate(workshop, f"run={run.relative_to(workshop)}", *typed).stdout
        result = json.loads((run / "evaluations" / f"own-{engine}.json").read_text())
        assert {result["metrics"][name]["n"] for name in ("kl", "gold", "win_rate", "length")} == {3}
        apart = {name: m["value"] for name, m in result["metrics"].items() if name.endswith("_difference")}
        assert len(apart) == 5
        assert set(apart.values()) == {0}
        assert result["metrics"]["perplexity"]["n"] == 8  # of the data's texts
        assert [row["prompt"] for row in result["samples"]] == ["The plot was", "The music was", "I saw it twice and"]
        assert all(row["third"] == row["trained"] for row in result["samples"])
        digest = hashlib.sha256((workshop / "own.txt").read_bytes()).hexdigest()
        assert result["measured_with"]["prompts"] == {"sha256": digest, "count": 3}
        assert result["measured_with"]["third"] == {"weights": result["identity"]["trained_policy"]}
        assert "gold reward, own.txt" in " ".join(shown.split())
        assert "third policy" in shown
        rows = read(run / "evaluations" / f"own-{engine}.examples.jsonl")["prompt"]
        assert all(row["third_response"] == row["response"] for row in rows.values())


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["evals.prompts=none.txt"], "evals.prompts=none.txt: no such file"),
        (["evals.prompts=bad.jsonl"], "bad.jsonl:2: field 'prompt' is missing"),
        (["evals.third=none"], "evals.third=none: holds no policy; type the folder of a policy, or of a run"),
        (["evals.third=damaged"], "evals.third=damaged: "),
        (["evals/engine=vllm"], "evals/engine=vllm: needs "),
    ],
)
def test_what_cannot_be_measured_with_is_said_in_one_line(typed, said, run, workshop):
    (workshop / "bad.jsonl").write_text('{"prompt": "The plot was"}\n{"text": "The plot was"}\n')
    (workshop / "damaged").mkdir(exist_ok=True)
    (workshop / "damaged" / "config.json").write_text("{}")
    refused = evaluate(workshop, f"run={run.relative_to(workshop)}", *typed, code=2)
    assert said in refused.stderr
    assert refused.stderr.strip().count("\n") == 0


def test_any_policy_against_any_other_on_given_data(run, workshop):
    words = "the a some every dog house river song answer quick slow blue of to".split()
    rows = [{"prompt": f"{words[i % 14]} {i}", "chosen": words[i % 13], "rejected": words[i % 11]} for i in range(80)]
    (workshop / "given.jsonl").write_text(
        "\n".join(json.dumps(row) for row in rows if row["chosen"] != row["rejected"])
    )
    policy = str(run.relative_to(workshop) / "policy")
    evaluate(
        workshop,
        f"trained={policy}",
        "policy=pretrained",
        f"policy.path='{policy}'",  # a folder with commas
        "data.path=given.jsonl",
        "data.batch_size=8",
        "evals.max_new_tokens=8",
        "name=itself",
    )
    (found,) = (workshop / "outputs" / "itself").glob("*/seed=0/run.json")
    result = json.loads(found.read_text())
    assert result["metrics"]["kl"]["value"] == 0
    assert result["metrics"]["ties"]["value"] == 1
    assert result["status"] == "done"
    assert result["config"]["trained"] == policy
    assert result["identity"]["trained_policy"] == result["identity"]["initial_policy"]


def test_other_weights_than_the_runs_are_refused(run, workshop):
    other = workshop / "outputs" / "tampered"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("evaluations"))
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(record | {"trained_policy": "0" * 32}))
    refused = evaluate(workshop, f"run={other.relative_to(workshop)}", code=2)
    assert "trained_policy was 00000000" in refused.stderr
    assert not list(other.glob("evaluations/*.json"))


@pytest.mark.parametrize("folder", ["outputs/a=1,b=2/seed=0", "it's [here]", "plain", "'quoted, already'"])
def test_folders_are_read_whole(folder):
    typed = as_path(f"run={folder}")
    assert composed(typed, name="evaluate").run == folder.strip("'" if folder[0] == "'" else "")
    assert as_path("evals.evaluators=[kl,reward]") == "evals.evaluators=[kl,reward]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "type run=RUN_FOLDER"),
        (["run=outputs/nothing"], "holds no run.json; type the folder that a run printed"),
        (["trained=nothing"], "nothing: no such folder; type trained=FOLDER"),
    ],
)
def test_refused_by_the_command(arguments, said, workshop):
    refused = evaluate(workshop, *arguments, code=2)
    assert said in refused.stderr
    assert refused.stderr.count("\n") == 1


def record_in(folder: Path, *overrides: str, **entries) -> Path:
    record = {"status": "done", "overrides": list(overrides), "files": {}, "config": recorded(*overrides)} | entries
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_an_unfinished_run_is_refused_with_what_finishes_it(tmp_path):
    with pytest.raises(
        RunRefused, match=r"status is preempted; finish it first: type python -m dpo_lab.train beta=0.3$"
    ):
        load_finished_run(record_in(tmp_path, "beta=0.3", status="preempted"))


def test_supervised_fine_tuning_is_refused(tmp_path):
    plain = {key: value for key, value in recorded().items() if key != "loss"}
    with pytest.raises(RunRefused, match="supervised fine-tuning"):
        load_finished_run(record_in(tmp_path, config=plain))


EACH = [
    [],
    ["loss=ipo", "beta=0.3", "reference=uniform", "noise=uncertainty"],
    ["policy=lora", "policy.path=folder", "reference=adapter_off", "data.path=pairs.jsonl", "trainer=ddp_cpu"],
    ["data=mix", "+data.sources={a: {path: a.jsonl, weight: 2}}", "loss=simpo", "reference=uniform"],
]


@pytest.mark.parametrize("overrides", EACH)
def test_a_recorded_config_is_the_config(overrides):
    again, first = schema.validate(from_record(json.loads(json.dumps(recorded(*overrides))))), settled(*overrides)
    first.logger, first.callbacks = {}, {}
    assert again == first


def test_what_is_typed_now_comes_before_what_was_recorded():
    record = {"config": recorded("evals.num_prompts=7", "evals.num_texts=3", "beta=0.4"), "files": {}}
    typed = ["run=folder", "evals.num_texts=5", "evals.calibration.bins=4", "threads=2"]
    found = config_from_run(record, composed(*typed, name="evaluate"), typed)
    assert (found.evals.num_prompts, found.evals.num_texts, found.evals.calibration.bins) == (7, 5, 4)
    assert (found.beta, found.loss.beta, found.threads) == (0.4, 0.4, 2)
    typed = ["run=folder", "evals=imdb"]
    found = config_from_run(record, composed(*typed, name="evaluate"), typed)
    assert (found.evals.num_prompts, found.evals.max_new_tokens) == (256, found.data.task.max_new_tokens)


def test_settings_newer_than_the_record_get_their_defaults():
    plain = recorded()
    del plain["evals"]["evaluators"], plain["evals"]["calibration"]
    assert schema.validate(from_record(plain)).evals == settled().evals


@pytest.mark.parametrize("typed", ["beta=0.5", "data.path=other.jsonl", "policy=lora"])
def test_a_runs_own_settings_are_not_changed(typed):
    overrides = ["run=folder", typed, *(["policy.path=x"] if "lora" in typed else [])]
    with pytest.raises(schema.ConfigError, match="a run is evaluated with its own settings; type run="):
        config_from_run({"config": recorded()}, composed(*overrides, name="evaluate"), overrides)


def test_what_bounds_memory_may_be_changed():
    overrides = ["run=folder", "data.tokens_per_microbatch=77", "evals.batch_size=5"]
    found = config_from_run({"config": recorded("beta=0.3")}, composed(*overrides, name="evaluate"), overrides)
    assert (found.data.tokens_per_microbatch, found.evals.batch_size, found.beta) == (77, 5, 0.3)


def test_a_file_that_changed_since_is_refused(tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("{}")
    record = {
        "config": recorded(f"data.path={data}"),
        "files": {str(data): {"bytes": 9, "mtime_ns": 1, "blake2b": "x"}},
    }
    with pytest.raises(schema.ConfigError, match=r"pairs.jsonl has changed since; restore the files"):
        config_from_run(record, composed("run=folder", name="evaluate"), ["run=folder"])


def test_results_are_numbered_and_never_overwritten(tmp_path):
    for name in ("", "mine", ""):
        evaluations.commit(tmp_path, name, {"metrics": {}}, Examples())
    assert {path.name for path in tmp_path.glob("*.json")} == {"1.json", "2.json", "mine.json"}
    with pytest.raises(RunRefused, match=r"mine.json exists already; type name=another"):
        evaluations.check(tmp_path, "mine")
    with pytest.raises(RunRefused, match=r"not a valid file name; type name="):
        evaluations.check(tmp_path, "../mine")
