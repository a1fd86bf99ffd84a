"""Paths that a config names and that do not exist: found before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_lab.config import schema
from tests.support.configs import composed
from tests.support.warm import run_module

OWN = ["policy=pretrained", "policy.path=model"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=nope.jsonl"], "data.path=nope.jsonl: no such file"),
        (["data.path=[pairs.jsonl,nope.csv]"], "data.path=nope.csv: no such file"),
        (["data.path=a*.jsonl"], r"data.path=a\*.jsonl: no file matches"),
        (["data.path=pairs.jsonl", "data.validation_path=./held"], "data.validation_path=./held: no such file"),
        (["data=mix", "+data.sources={a: {path: nope.jsonl}}"], "data.sources.a.path=nope.jsonl: no such file"),
        (["evals.judge.path=nope"], "evals.judge.path=nope: no such folder; type the folder of a classifier"),
        (["method=rloo", "reward=learned", "reward.path=nope"], "reward.path=nope: no such folder"),
        (["policy=pretrained", "policy.path=./nope"], "policy.path=./nope: no such folder"),
        (["policy=pretrained", "policy.path=model/nope"], "policy.path=model/nope: no such folder"),
        ([*OWN, "policy.adapter=/nope"], "policy.adapter=/nope: no such folder"),
        ([*OWN, "policy.chat_template=nope.jinja"], "policy.chat_template=nope.jinja: no such file"),
    ],
)
def test_a_path_that_is_missing_is_named_with_its_key(overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("pairs.jsonl").touch()
    with pytest.raises(schema.ConfigError, match=f"^{message}"):
        schema.check_files(schema.validate(composed(*overrides)))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.path=pairs.jsonl", "data.validation_path=p*.jsonl"],
        ["data.path=owner/name"],
        [*OWN, "data.path=pairs.jsonl"],
        ["policy=pretrained", "policy.path=gpt2"],
        ["policy=pretrained", "policy.path=owner/name", "policy.adapter=owner/adapter"],
    ],
)
def test_what_exists_or_may_be_on_the_hub_is_not_refused(overrides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("pairs.jsonl").touch()
    schema.check_files(schema.validate(composed(*overrides)))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "sft", "reward", "inspect"])
def test_every_command_looks_first(command, tmp_path):
    result = run_module(f"dpo_lab.{command}", "data.path=nope.jsonl", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: data.path=nope.jsonl: no such file; type the path of a file, or a data set's name on the hub"
    ]
    assert not list(tmp_path.glob("outputs/cache/*"))  # no initial policy was made
