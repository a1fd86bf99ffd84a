"""What a run tells to type next is the user's own run with one thing changed, and can be pasted into a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from dpo_lab.cli.next_steps import after_sft, after_training
from dpo_lab.config import schema
from dpo_lab.config.from_run import load_finished_run
from dpo_lab.runs.fingerprint import difference
from dpo_lab.runs.run_record import RunRefused
from dpo_lab.sweeps.plan import combinations
from tests.support.configs import composed, recorded, settled

FOLDER = Path("outputs/dpo/default/seed=0")
OWN = ["policy=pretrained", "policy.path=my model", "data.path=[./my pairs.jsonl,b.jsonl]"]

# what was typed -> the keys that differ in what is printed, by the first word of the change
TYPED = {
    "nothing": ([], {"reference", "beta"}),
    "a model and pairs of the user's": (OWN, {"reference", "beta"}),
    "adapters and a reference": (
        ["policy=lora", "policy.path=m", "data.path=p.jsonl", "reference=frozen"],
        {"reference", "beta"},
    ),
    "two interventions, then a third": (["+ablation=[ipo,label_noise]", "beta=0.5", *OWN], {"reference", "beta"}),
    "a loss that wants its reference": (["loss=dpo_kl", "loss.kl_weight=0.2"], {"beta"}),
    "a loss without beta": (["+ablation=sft_chosen", *OWN], set()),
    "a name, a restart and a time limit": (
        ["name=mine", "if_exists=restart", "+trainer.max_time=00:01:00:00", "trainer=ddp_cpu"],
        {"reference", "beta"},
    ),
}


class Loader:
    """What Hydra's parser asks of a loader of configs: whether a key is a group. None of a sweep over beta is."""

    def get_group_options(self, *args, **kwargs) -> list[str]:
        return []


def arguments_of(line: str, command: str = "train") -> list[str]:
    """The arguments of a printed command, as a shell reads them."""
    python, m, module, *arguments = shlex.split(line)
    assert (python, m, module) == ("python", "-m", f"dpo_lab.{command}")
    return arguments


@pytest.mark.parametrize("typed", TYPED)
def test_after_training_each_command_is_the_same_run_with_one_thing_changed(typed):
    overrides, changes = TYPED[typed]
    cfg = composed(*overrides)
    settings = schema.validate(cfg)
    first, *commands = after_training(settings, overrides, FOLDER)
    assert shlex.split(first) == ["tensorboard", "--logdir", "outputs"]
    assert len(commands) == len(changes)
    was = schema.as_record(cfg, settings)
    for line in commands:
        arguments = arguments_of(line)
        assert not [a for a in arguments if a.startswith("if_exists")]  # it would set the run aside
        if arguments[0] == "--multirun":
            jobs = combinations(arguments[1:], Loader())  # type: ignore[arg-type]
            betas = [float(own[-1].removeprefix("beta=")) for own in (wanted.overrides for wanted in jobs)]
            assert betas == pytest.approx([was["beta"] / 10, was["beta"], was["beta"] * 10])
            assert difference(was, recorded(*jobs[1].overrides)) == {}
        else:
            now = recorded(*arguments)
            assert now["reference"]["kind"] == "uniform"
            assert {key.partition(".")[0] for key in difference(was, now)} == {"reference"}


def test_curves_are_named_where_there_are_some():
    settings = settled("logger=csv")
    assert not any("tensorboard" in line for line in after_training(settings, ["logger=csv"], FOLDER))
    assert after_training(settled(), [], Path("/else where/run"))[0] == "tensorboard --logdir '/else where/run'"


@pytest.mark.parametrize(
    "overrides",
    [
        [*OWN, "trainer=fsdp_cpu", "trainer.max_steps=7", "+trainer.max_time=00:01:00:00", "optim.lr=1", "logger=csv"],
        ["policy=lora", "policy.path=a b", "policy.lora.r=4", "data=hh_rlhf", "data.tokenize_workers=2", "threads=2"],
    ],
)
def test_after_sft_the_command_trains_its_policy_on_the_same_data_and_machine(overrides):
    (line,) = after_sft(settled(*overrides), overrides, FOLDER)
    now, was = recorded(*arguments_of(line)), recorded(*overrides)
    assert now["policy"]["path"] == str(FOLDER / "policy")
    for same in ("data", "logger", "threads"):
        assert now[same] == was[same]
    for record in (now, was):
        record["trainer"] = {k: v for k, v in record["trainer"].items() if k not in ("max_steps", "max_time")}
    assert now["trainer"] == was["trainer"]  # but for its length


@pytest.mark.parametrize(("kind", "command"), [({"loss": {}}, "train"), ({}, "sft")])
def test_what_is_to_be_finished_first_is_the_run_itself(kind, command, tmp_path, monkeypatch):
    record = {"status": "stopped", "config": kind, "overrides": ["data.path=[my pairs.jsonl]", "beta=1"]}
    monkeypatch.setattr("dpo_lab.runs.run_record.read_record", lambda folder: record)
    with pytest.raises(RunRefused, match="its status is stopped; finish it first: type") as refused:
        load_finished_run(tmp_path)
    assert arguments_of(str(refused.value).split("type ")[1], command) == record["overrides"]
