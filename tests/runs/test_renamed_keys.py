"""Keys of earlier versions: refused in one line when typed, and translated in the records that hold them."""

from __future__ import annotations

import dataclasses
import json
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
from hydra.errors import HydraException

from dpo_lab.config import schema
from dpo_lab.config.from_run import from_record
from dpo_lab.models.policy import Lora
from dpo_lab.runs import renamed_keys
from dpo_lab.runs.fingerprint import difference
from dpo_lab.runs.run_record import read_record
from tests.support.configs import composed, recorded

CONTEXT = {
    "policy.rank": ("policy=lora", "policy.path=x"),
    "policy.alpha": ("policy=lora", "policy.path=x"),
    "policy.targets": ("policy=lora", "policy.path=x"),
    "policy.pickled_weights": ("policy=pretrained", "policy.path=x"),
    "noise.only": ("noise=one_sided",),
}


def refusal(*overrides: str) -> str:
    try:
        schema.validate(composed(*overrides))
    except HydraException as error:
        return schema.explain(error)
    except schema.ConfigError as error:
        return str(error)
    raise AssertionError("not refused")


@pytest.mark.parametrize("sign", ["", "+"])
@pytest.mark.parametrize("earlier", renamed_keys.RENAMED_KEYS)
def test_an_earlier_key_is_refused_with_the_present_one(earlier, sign):
    present = renamed_keys.RENAMED_KEYS[earlier]
    assert refusal(*CONTEXT.get(earlier, ()), f"{sign}{earlier}=1") == f"{earlier}: renamed; type {present}=..."


def test_present_keys_exist():
    """A refusal never sends anyone to a key that is refused, too."""
    known = {*schema._known_keys(), *(f"policy.lora.{field.name}" for field in dataclasses.fields(Lora))}
    missing = {present for present in renamed_keys.RENAMED_KEYS.values() if present not in known}
    assert missing == {"callbacks.checkpoint.save_total_limit"}  # not in the schema, but in the default config
    assert composed().callbacks.checkpoint.save_total_limit == 2


def test_a_record_from_before_a_key_was_added_is_that_of_its_default():
    typed = ("policy=pretrained", "policy.path=folder")
    before = recorded(*typed)
    for key in renamed_keys.ADDED_KEYS:
        *parents, leaf = key.split(".")
        if parents == ["method"]:  # method=dpo has none
            continue
        del reduce(getitem, parents, before)[leaf]
    for group in renamed_keys.ADDED_GROUPS:
        del before[group]
    assert difference(renamed_keys.present_config(before), recorded(*typed)) == {}
    assert renamed_keys.present_config(before) == recorded(*typed)
    assert set(difference(renamed_keys.present_config(before), recorded(*typed, "optim.lr=1"))) == {"optim.lr"}
    assert renamed_keys.present_config(recorded()) == recorded()  # the embedded policy has no such keys
    assert renamed_keys.present_config({"sft": {"text_column": "text"}}) == {"sft": {"text_column": "text"}}


def test_a_record_of_a_method_that_samples_gets_the_keys_that_were_added_to_methods():
    before = recorded("method=rloo")
    for key in renamed_keys.ADDED_KEYS:
        if key.startswith("method."):
            del before["method"][key.removeprefix("method.")]
    assert before != recorded("method=rloo")
    assert renamed_keys.present_config(before) == recorded("method=rloo")


def test_an_earlier_choice_is_refused_with_the_present_one():
    assert refusal("data=world") == "data=world: renamed; type data=embedded"


@pytest.mark.parametrize(
    ("earlier", "present"),
    [
        ("on_change=restart", "if_exists=restart"),
        ("on_change=refuse", "if_exists=error"),
        ("data=world", "data=embedded"),
        ("+data.world.reward=sum", "+data.task.reward=sum"),
        ("policy.rank=16", "policy.lora.r=16"),
        ("policy.ranks=16", "policy.ranks=16"),
        ("~noise.only", "~noise.side"),
        ("beta=0.1", "beta=0.1"),
        ("name=on_change=refuse", "name=on_change=refuse"),
        ("odd", "odd"),
    ],
)
def test_overrides_are_translated(earlier, present):
    assert renamed_keys.present_override(earlier) == present


def test_a_record_of_an_earlier_version_is_read(tmp_path: Path):
    config = schema.as_record(cfg := composed("policy=lora", "policy.path=x"), schema.validate(cfg))
    earlier = json.loads(json.dumps(config))
    for key, value in (("on_change", "refuse"), ("objective", None)):
        earlier[key] = value
    del earlier["if_exists"], earlier["optimized_metric"]
    lora = earlier["policy"].pop("lora")
    earlier["policy"] |= {"rank": lora["r"], "alpha": lora["lora_alpha"], "targets": lora["target_modules"]}
    earlier["policy"]["pickled_weights"] = earlier["policy"].pop("allow_pickle")
    earlier["data"]["world"] = earlier["data"].pop("task")
    earlier["data"]["workers"] = earlier["data"].pop("tokenize_workers")
    evals, names = earlier["evals"], ("prompts", "texts", "train_pairs")
    evals["run"] = evals.pop("evaluators")
    evals |= {"samples" if name == "prompts" else name: evals.pop(f"num_{name}") for name in names}
    evals["optimum"] = {name: evals["optimum"][f"num_{name}"] for name in ("candidates", "prompts")}
    checkpoint = earlier["callbacks"]["checkpoint"]
    checkpoint["keep"] = checkpoint.pop("save_total_limit")
    record = {
        "status": "done",
        "config": earlier,
        "overrides": ["policy=lora", "data.workers=2", "evals.optimum.prompts=128"],
        "starts": [{"status": "failed"}],
        "health": [{"name": "too easy", "says": "it is", "tries": "more"}],
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    read = read_record(tmp_path)
    assert read == {
        "status": "done",
        "config": config,
        "overrides": ["policy=lora", "data.tokenize_workers=2", "evals.optimum.num_prompts=128"],
        "attempts": [{"status": "failed"}],
        "health": [{"name": "too easy", "message": "it is", "suggestion": "more"}],
    }
    again, first = schema.validate(from_record(read["config"])), schema.validate(cfg)
    assert (again.policy, again.evals) == (first.policy, first.evals)


def test_a_moved_class_is_found():
    sharded = {"trainer": {"strategy": {"_target_": "dpo_lab.training.sharding.Sharded", "cpu_offload": True}}}
    assert renamed_keys.present_config(sharded) == {
        "trainer": {"strategy": {"_target_": "dpo_lab.training.strategies.fsdp.FSDP2Strategy", "cpu_offload": True}}
    }
