"""Training and sweeping from Python: the same runs as the commands make, in this process, with exceptions for errors."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

from dpo_lab import api
from dpo_lab.api import commands
from dpo_lab.api.overrides import as_typed
from dpo_lab.models.policy import weights_digest
from dpo_lab.training.callbacks.progress_bar import ProgressBar
from tests.conftest import SMALL
from tests.support.small_fit import IGNORED
from tests.support.warm import run_module

pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(line) for line in IGNORED)]


@pytest.fixture
def here(workshop, monkeypatch) -> Path:
    monkeypatch.chdir(workshop)
    return workshop


@pytest.fixture(scope="module")
def by_command(workshop) -> dict:
    """The record of the run as its command makes it."""
    result = run_module("dpo_lab.train", *SMALL, "name=by-command", cwd=workshop)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads((workshop / result.stdout.splitlines()[0].removeprefix("dpo_lab: ") / "run.json").read_text())


def test_a_call_makes_the_run_of_the_command(by_command, here, monkeypatch):
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    run = api.train([*SMALL, "name=by-call"])
    assert {name: each.as_record() for name, each in run.metrics.items()} == by_command["metrics"]
    assert run.record["trained_policy"] == by_command["trained_policy"]
    assert run.record["overrides"] == [*SMALL, "name=by-call"]
    assert run.config["name"] == "by-call"
    assert {signum: signal.getsignal(signum) for signum in before} == before
    assert not HydraConfig.initialized()
    assert weights_digest(run.policy().model) == run.record["trained_policy"]
    initial = run.initial_policy()
    assert weights_digest(initial.model) == run.record["initial_policy"]
    assert initial.tokenizer.decode(initial.tokenizer("the plot", add_special_tokens=False)["input_ids"]) == "the plot"
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", None)
    assert api.train([*SMALL, "name=by-call"]).folder == run.folder  # it is done: nothing trains


def test_an_interrupt_saves_and_the_same_call_resumes(by_command, here, monkeypatch):
    end = ProgressBar.on_train_batch_end

    def interrupted(self, trainer, *args) -> None:
        end(self, trainer, *args)
        if trainer.global_step == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(ProgressBar, "on_train_batch_end", interrupted)
        with pytest.raises(KeyboardInterrupt, match="the same call resumes"):
            api.train([*SMALL, "name=interrupted"])
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
    (record,) = here.glob("outputs/interrupted/*/seed=0/run.json")
    assert api.load_run(record.parent).status == "interrupted"
    run = api.train([*SMALL, "name=interrupted"])
    assert {name: each.as_record() for name, each in run.metrics.items()} == by_command["metrics"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: api.train(["betas=0.3"]), "unknown key 'betas': did you mean 'beta'"),
        (lambda: api.train({"beta": "much"}), "beta=much: must be a number"),
        (lambda: api.train(["beta=0.1,0.2"]), "beta=0.1,0.2: several values; type api.sweep"),
        (lambda: api.train(["noise=symmetric", "noise.rate=2"]), r"noise.rate=2.0: must lie in \[0, 1\]"),
        (lambda: api.train([*SMALL, "data.path=nope.jsonl"]), "nope.jsonl"),
        (lambda: api.train(["+callbacks.x._target_=os.system"]), "os.system"),
        (lambda: api.train(["hydra.run.dir=a/../../b", "hydra.sweeper._target_=os.system"]), "os.system"),
        (lambda: api.sft(SMALL), "the embedded policy is made when a run needs it"),
        (lambda: api.evaluate(["trained=nothing"]), "nothing: no such folder"),
        (lambda: api.evaluate([]), "type run=RUN_FOLDER"),
        (lambda: api.study("nope.yaml"), "nope.yaml"),
    ],
)
def test_errors_are_raised_in_one_line(call, said, here):
    with pytest.raises(api.LabError, match=said) as error:
        call()
    assert "\n" not in str(error.value)
    assert not HydraConfig.initialized()


def test_a_policy_that_is_evaluated_has_a_record_of_its_own(by_command, here):
    """What the run itself measured, to the last bit; a second call measures nothing."""
    trained = next(here.glob("outputs/by-command/*/seed=0/policy")).relative_to(here)
    typed = [*SMALL, f"trained='{trained}'", "name=measured"]
    run = api.evaluate(typed)
    assert {name: each.as_record() for name, each in run.metrics.items()} == by_command["metrics"]
    assert run.record["identity"]["data"] == by_command["identity"]["data"]
    assert run.trained == trained
    written = os.stat(run.folder / "run.json").st_mtime_ns
    assert api.evaluate(typed).metrics == run.metrics
    assert os.stat(run.folder / "run.json").st_mtime_ns == written
    table = api.load_runs("outputs/measured", "outputs/by-command").table(["kl"])
    assert list(table["trained"].notna()) == [False, True]
    assert table["kl"].nunique() == 1


def test_overrides_as_a_mapping():
    given = {"beta": 0.3, "optim": {"lr": 1e-4}, "figures": False, "data.path": None, "name": "a,b"}
    words = ["beta=0.3", "optim.lr=0.0001", "figures=false", "data.path=null", 'name="a,b"']
    assert as_typed(given) == words
    assert as_typed({"+data.columns": {"prompt": "q"}, "data.path": ["a.jsonl", "b c"]}) == [
        "+data.columns={prompt: q}",
        'data.path=[a.jsonl,"b c"]',
    ]
    assert as_typed({"seed": [0, 1], "loss": ["dpo", "ipo"]}, swept=True) == ["seed=0,1", "loss=dpo,ipo"]


def test_a_sweep_returns_its_runs(tmp_path, monkeypatch, capsys):
    """By jobs that train nothing: see tests/support/standin.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setattr(commands, "TRAIN", replace(commands.TRAIN, module="tests.support.standin"))
    runs = api.sweep({"beta": [0.1, 0.2], "name": "swept"})
    assert "2 jobs: 2 done" in capsys.readouterr().out
    assert [run.config["beta"] for run in runs] == list(runs.table()["beta"]) == [0.1, 0.2]
    assert list(runs.compare("beta=0.1", ["accuracy"])["difference"])[1] == pytest.approx(0.1)
    assert [run.config["beta"] for run in api.sweep({"beta": [0.2], "name": "swept"})] == [0.2]  # of this sweep alone
    (tmp_path / "behaviour.json").write_text(json.dumps({"beta=0.9": "fails"}))
    with pytest.raises(api.LabError, match="not everything is done; the same call runs the rest"):
        api.sweep({"beta": [0.1, 0.9], "name": "swept"})
    with pytest.raises(api.LabError, match="job beta=x: beta=x: must be a number"):
        api.sweep({"beta": [0.1, "x"], "name": "swept"})


@pytest.mark.ranks
@pytest.mark.extended  # two ranks start and train: 15 CPU seconds
def test_several_devices_are_ranks_of_their_own(by_command, here):
    run = api.train([*SMALL, "trainer=ddp_cpu", "name=ranks"])
    assert len(run.record["ranks"]) == 2
    assert run.metrics["kl"].value == pytest.approx(by_command["metrics"]["kl"]["value"], rel=1e-3)
