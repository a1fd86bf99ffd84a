"""Faults 39 to 45 of the matrix: configs, checkpoints, templates, names, rows and settings that are meant to do harm."""

from __future__ import annotations

import csv
import json
import os
import pickle
import subprocess
import sys
import time
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from hydra.errors import HydraException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_lab import report
from dpo_lab.config import schema
from dpo_lab.config.allowed_targets import TargetRefused, instantiate_checked
from dpo_lab.data import chat as chat_module
from dpo_lab.data.chat import BadChat, Chat, NoTemplate
from dpo_lab.data.rows import BadData
from dpo_lab.models.policy import PolicyError, Pretrained, load_policy
from dpo_lab.models.reference import Cached
from dpo_lab.reporting import comparison_text
from dpo_lab.runs import cache, run_record
from dpo_lab.runs.redact import redact_yaml
from dpo_lab.studies.spec import StudyError
from dpo_lab.sweeps.study_file import read
from dpo_lab.training.checkpoint_io import CheckpointError, VerifiedCheckpointIO, newest
from tests.conftest import OFFLINE, REPOSITORY, make_pairs, python_m
from tests.data.test_tokenized_cache import store_of
from tests.faults.canaries import CODE, MARK, SHELL, Payload
from tests.support import a_study
from tests.support.configs import composed
from tests.support.study_runs import HOSTILE, write_study
from tests.support.templates import tokenizer_of
from tests.support.warm import run_module

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    """No payload of a test may have fired when it is over. The test stands in a folder of its own."""
    mark = tmp_path / "fired"
    monkeypatch.setenv(MARK, str(mark))
    monkeypatch.chdir(tmp_path)
    yield mark
    assert not mark.exists()


# --- 39: what a config may make

FIRE = "tests.faults.canaries.fire"
ALIAS = "dpo_lab.training.callbacks.checkpointing.os.system"  # a function that a module of ours imports
TARGETS = {
    "the trainer": [f"trainer._target_={FIRE}"],
    "in the trainer": [f"+trainer.x._target_={FIRE}"],
    "its strategy": [f"trainer.strategy={{_target_:{FIRE}}}"],
    "in its strategy": [
        f"trainer.strategy={{_target_:lightning.pytorch.strategies.DDPStrategy,x:{{_target_:{FIRE}}}}}"
    ],
    "its plugins": [f"+trainer.plugins=[{{_target_:{FIRE}}}]"],
    "a callback": [f"+callbacks.x._target_={FIRE}"],
    "in a callback": [f"+callbacks.checkpoint.x={{a:[{{b:{{_target_:{FIRE}}}}}]}}"],
    "a logger": [f"+logger.x._target_={FIRE}"],
    "in a logger": [f"+logger.tensorboard.x._target_={FIRE}"],
    "by interpolation": ["+callbacks.x._target_=${trainer.y}", f"+trainer.y={FIRE}"],
    "by interpolation of a node": ["+callbacks.x=${trainer.y}", f"+trainer.y={{_target_:{FIRE}}}"],
    "by the environment": ["+callbacks.x._target_=${oc.env:HOSTILE}"],
    "by a decoded text": [f"+callbacks.x=${{oc.decode:'{{_target_:{FIRE}}}'}}"],
    "in parts": ["+callbacks.x._target_=tests.${trainer.y}", "+trainer.y=faults.canaries.fire"],
    "by a partial": [f"+callbacks.x={{_target_:{FIRE},_partial_:true}}"],
    "a partial trainer": ["+trainer._partial_=true"],
    "positional arguments": ["+callbacks.checkpoint._args_=[1]"],
    "without recursion": ["+callbacks.checkpoint._recursive_=false"],
    "by an alias": [f"+callbacks.x={{_target_:{ALIAS},command:'{SHELL}'}}"],
    "by an alias of Lightning's": ["+callbacks.x._target_=lightning.pytorch.trainer.trainer.os.system"],
    "a method": ["+callbacks.x._target_=lightning.pytorch.Trainer.save_checkpoint"],
    "a class of ours that is not listed": ["+callbacks.x._target_=dpo_lab.training.loggers.jsonl.JSONLLogger"],
    "os.system": [f"+callbacks.x={{_target_:os.system,command:'{SHELL}'}}"],
    "posix.system": [f"+callbacks.x={{_target_:posix.system,command:'{SHELL}'}}"],
    "subprocess": [f"+callbacks.x={{_target_:subprocess.run,args:'{SHELL}',shell:true}}"],
    "exec": ["+callbacks.x={_target_:builtins.exec,_args_:[x]}"],
    "get_method": [f"+callbacks.x={{_target_:hydra.utils.get_method,path:{FIRE}}}"],
    "torch.load": ["+callbacks.x={_target_:torch.load,f:x,weights_only:false}"],
    "functools.partial": [f"+callbacks.x={{_target_:functools.partial,_args_:[{{_target_:{FIRE}}}]}}"],
    "the loss": [f"+loss._target_={FIRE}"],
    "the policy": [f"+policy._target_={FIRE}"],
    "the task": [f"+data.task._target_={FIRE}"],
    "an evaluator": [f"+evals.kl._target_={FIRE}"],
}
OF_HYDRA = {
    "Hydra's launcher": [f"hydra.launcher._target_={FIRE}"],
    "in Hydra's launcher": [f"+hydra.launcher.x._target_={FIRE}"],
    "Hydra's sweeper": [f"hydra.sweeper._target_={FIRE}"],
    "in Hydra's sweeper": [f"+hydra.sweeper.sampler._target_={FIRE}"],
    "past a sampler": ["+hydra.sweeper.sampler._target_=optuna.samplers.os.system"],
    "a launcher that can't be known": ["hydra.launcher._target_=${hydra:job.name}"],
    "a callback of Hydra's": [f"+hydra.callbacks.x._target_={FIRE}"],
    "a file of logging": ["+hydra.hydra_logging.handlers.x={class:logging.FileHandler,filename:fired}"],
    "the environment of a job": ["+hydra.job.env_set.PYTHONPATH=evil"],
    "what a job preloads": ["+hydra.job.env_set.LD_PRELOAD=evil.so"],
    "what its network loads": ["+hydra.job.env_set.NCCL_NET_PLUGIN=evil.so"],
    "what its GPU loads": ["+hydra.job.env_set.CUDA_INJECTION64_PATH=evil.so"],
}
LOGGING = {  # what a line of a command can't spell
    "a handler": {"handlers": {"x": {"()": FIRE}}},
    "a formatter": {"root": {"level": "INFO"}, "formatters": {"x": {"()": FIRE}}},
    "a formatter's class": {"root": {"level": "INFO"}, "formatters": {"x": {"class": FIRE}}},
    "a filter": {"root": {"level": "INFO"}, "filters": {"x": {"()": FIRE}}},
}
REFUSALS = (TargetRefused, schema.ConfigError, HydraException, OmegaConfBaseException)


@pytest.mark.parametrize("overrides", TARGETS.values(), ids=TARGETS)
def test_39_a_config_makes_nothing_that_is_not_on_the_list(overrides, monkeypatch):
    monkeypatch.setenv("HOSTILE", FIRE)
    with pytest.raises(REFUSALS) as refused:
        cfg = composed(*overrides)
        settings = schema.validate(cfg)
        plain = schema.as_record(cfg, settings)
        for kind, nodes in (
            (Callback, plain["callbacks"]),
            (Logger, plain["logger"]),
            (Trainer, {"": plain["trainer"]}),
        ):
            for node in nodes.values():
                instantiate_checked(node, kind)
    said = schema.explain(refused.value) if isinstance(refused.value, schema.ConfigErrors) else str(refused.value)
    assert "\n" not in said


@pytest.mark.parametrize("overrides", OF_HYDRA.values(), ids=OF_HYDRA)
def test_39_what_hydra_itself_would_make_is_refused_before_it_does(overrides, tmp_path):
    told = run_module("tests.support.standin", *overrides, cwd=tmp_path)
    assert (told.returncode, told.stderr.count("\n")) == (2, 1), told.stderr
    assert told.stderr.startswith("error: ")
    assert not (tmp_path / "starts.log").exists()


MODES = ("--multirun", "--help", "--hydra-help", "--cfg=all")
LOGGED = [
    *((name, "--run", "job_logging") for name in LOGGING),
    *(("a formatter", mode, "job_logging") for mode in MODES),
]
LOGGED += [
    pytest.param(name, mode, "hydra_logging", marks=[pytest.mark.extended] if name != "a handler" else [])
    for name, mode, _ in LOGGED
]


@pytest.mark.parametrize(("name", "mode", "log"), LOGGED)
def test_39_what_hydra_s_logging_would_make_is_refused(name, mode, log, tmp_path):
    write_ablation(tmp_path / "theirs", "evil", {log: LOGGING[name]})
    told = run_module("tests.support.standin", mode, "--config-dir", "theirs", "+ablation=evil", cwd=tmp_path)
    assert told.returncode == 2
    assert told.stderr.startswith(f"error: hydra.{log}.")
    assert told.stderr.count("\n") == 1


def write_ablation(folder: Path, name: str, hydra: dict) -> None:
    (folder / "ablation").mkdir(parents=True, exist_ok=True)
    (folder / "ablation" / f"{name}.yaml").write_text(f"# @package _global_\n{yaml.safe_dump({'hydra': hydra})}")


def test_39_a_file_sweeps_no_setting_of_hydra_s(tmp_path):
    write_ablation(tmp_path / "theirs", "evil", {"sweeper": {"params": {"hydra.job_logging.root": "a,b"}}})
    arguments = ["--config-dir", "theirs", "hydra/sweeper=basic", "+ablation=evil"]
    told = run_module("tests.support.standin", "--multirun", *arguments, cwd=tmp_path)
    assert told.returncode == 2
    assert told.stderr.startswith("error: hydra.sweeper.params: hydra.job_logging.root can't be swept")


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_39_another_sweeper_s_jobs_make_nothing_either(launcher, tmp_path):
    """Their configs are composed when they start: what their own files add to Hydra's logging is never set up."""
    write_ablation(tmp_path / "theirs", "logs", {"job_logging": LOGGING["a formatter"]})
    write_ablation(tmp_path / "theirs", "environment", {"job": {"env_set": {"LD_PRELOAD": "evil.so"}}})
    arguments = ["--config-dir", "theirs", "--multirun", "hydra/sweeper=basic", f"hydra/launcher={launcher}"]
    told = python_m("tests.support.standin", *arguments, "+ablation=logs,environment", cwd=tmp_path)
    assert told.returncode == 1
    assert not (tmp_path / "starts.log").exists()


def test_39_a_name_of_the_list_that_leads_elsewhere_makes_nothing(monkeypatch):
    """The object decides: were the name of a logger bound to something else by now, it would not be called."""
    monkeypatch.setattr("lightning.pytorch.loggers.CSVLogger", Payload)
    with pytest.raises(
        TargetRefused, match=r"CSVLogger: resolves to tests.faults.canaries.Payload, which is no Logger"
    ):
        instantiate_checked({"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "x"}, Logger)
    with pytest.raises(TargetRefused, match="which is no Callback"):  # one of the list, where another kind is wanted
        instantiate_checked({"_target_": "lightning.pytorch.Trainer"}, Callback)


def test_39_what_stands_in_a_shared_file_is_refused_as_what_is_typed(tmp_path):
    """A folder of ablations that someone sent, and a study of theirs: by the commands a user types."""
    (tmp_path / "theirs" / "ablation").mkdir(parents=True)
    (tmp_path / "theirs" / "ablation" / "better.yaml").write_text(
        f"# @package _global_\nhydra:\n  callbacks:\n    x:\n      _target_: {FIRE}\n"
    )
    (tmp_path / "theirs" / "ablation" / "best.yaml").write_text(
        f"# @package _global_\ncallbacks:\n  x:\n    _target_: {FIRE}\n"
    )
    for ablation, says in (("better", "hydra.callbacks: "), ("best", f"_target_={FIRE}: not among the classes")):
        told = run_module("dpo_lab.train", "--config-dir", "theirs", f"+ablation={ablation}", cwd=tmp_path)
        assert (told.returncode, told.stderr.count("\n")) == (2, 1)
        assert told.stderr.startswith(f"error: {says}")
    study = REPOSITORY / "ablations" / "displacement.yaml"
    hostile = study.read_text().replace(
        "overrides: [beta=0.1", f"overrides: ['+callbacks.x._target_={FIRE}', beta=0.1", 1
    )
    assert hostile != study.read_text()
    (tmp_path / "study.yaml").write_text(hostile)
    told = run_module("dpo_lab.study", "study.yaml", "--plan", cwd=tmp_path)
    assert told.returncode == 2
    assert f"_target_={FIRE}: not among the classes" in told.stderr


# --- 40: pickles and code where data is expected


def archive(path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}, "evil": Payload()}, path)


def bare(path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload()))


def sealed(path: Path) -> None:
    VerifiedCheckpointIO().save_checkpoint({"state_dict": {}, "evil": Payload()}, path)


@pytest.mark.parametrize("write", [archive, bare, sealed])
def test_40_a_checkpoint_runs_nothing(write, tmp_path):
    path = tmp_path / "checkpoints" / "step=1.ckpt"
    path.parent.mkdir()
    write(path)
    with pytest.raises(CheckpointError):
        VerifiedCheckpointIO().load_checkpoint(newest(path.parent) or path)


@pytest.mark.parametrize("write", [archive, bare])
def test_40_a_reference_cache_runs_nothing_though_its_seal_is_right(write, policy, tmp_path):
    path = Cached().prepare(policy.model, make_pairs(6), tmp_path).path
    write(path)
    cache.write_checksum(path)
    with pytest.raises(Exception, match="[Hh]eader"):  # of safetensors: whoever writes seals can break a cache, no more
        Cached().prepare(policy.model, make_pairs(6), tmp_path)


@pytest.mark.parametrize("write", [archive, bare])
@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:Detected pickle protocol"
)  # of peft
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "adapter_model.bin", "training_args.bin"])
def test_40_a_model_s_folder_runs_nothing(write, name, policy, tmp_path):
    policy.save(tmp_path / "model")
    write(tmp_path / "model" / name)
    if name == "pytorch_model.bin":
        (tmp_path / "model" / "model.safetensors").unlink()
    if name == "adapter_model.bin":
        settings = {
            "base_model_name_or_path": str(tmp_path / "model"),
            "peft_type": "LORA",
            "r": 4,
            "target_modules": ["q_proj"],
        }
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"task_type": "CAUSAL_LM"}))
        (tmp_path / "model" / name).rename(tmp_path / "adapter" / name)
    folder = tmp_path / ("adapter" if name == "adapter_model.bin" else "model")
    if name == "training_args.bin":
        load_policy(folder)  # it is not read at all
    else:
        with pytest.raises(PolicyError):
            Pretrained(path=str(folder)).load()


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "rows.jsonl", "rows.parquet"])
def test_40_data_runs_nothing(name, tmp_path):
    bare(tmp_path / name)
    with pytest.raises(BadData):
        store_of(tmp_path / "cache", tmp_path / name)


def test_40_a_data_set_s_own_script_is_not_run(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(CODE)
    with pytest.raises(BadData):
        store_of(tmp_path / "cache", tmp_path / "set")


# --- 41: chat templates

HANDLES = (
    "cycler",
    "lipsum",
    "joiner",
    "namespace",
    "raise_exception",
    "strftime_now",
    "messages.append",
    "self._TemplateReference__context",
)
INJECTED = [
    *(f"{{{{ {name}.__globals__['os'].system('{SHELL}') }}}}" for name in HANDLES),
    *(f"{{{{ {name}.__init__.__globals__.__builtins__.exec('{SHELL}') }}}}" for name in HANDLES[:4]),
    "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{{ c }}{% endfor %}",
    "{{ (''|attr('__class__'))|attr('mro') }}",
    "{{ ['']|map(attribute='__class__')|list }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages[0]) }}",
    "{{ ''.__class__ }}{{ messages.__class__.__base__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('x') }}",
    "{% set _ = messages.append({'role': 'user', 'content': 'x'}) %}{{ messages|length }}",
    "{% set _ = messages[0].update({'content': 'x'}) %}",
    "{{ messages[0].__setitem__('content', 'x') }}",
]


@pytest.mark.parametrize("template", INJECTED)
def test_41_a_chat_template_reaches_nothing_outside_of_it(template):
    tokenizer = tokenizer_of("plain")
    tokenizer.chat_template = template
    messages = [{"role": "user", "content": "hello"}]
    try:
        text = Chat(tokenizer).render(messages)
    except BadChat:
        text = ""
    assert not any(word in text for word in ("<class", "root:", "<module", "posix"))
    assert messages == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{% for i in range(99999) %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}",
        "{% for m in messages %}{{ (9 + m.content|length) ** (10 ** (m.content|length * 9)) }}{% endfor %}",
        "{% for m in messages %}{{ 'a' * (20000000 * m.content|length) }}{% endfor %}",
    ],
    ids=["loops", "recursion", "a power", "a long text"],
)
def test_41_a_chat_template_has_so_much_time_and_room(template, monkeypatch):
    monkeypatch.setattr(chat_module, "SECONDS", 0.2)
    tokenizer = tokenizer_of("plain")
    tokenizer.chat_template = template
    begun = time.monotonic()
    with pytest.raises((NoTemplate, BadChat), match=r"chat template (takes more|writes \d|fails|can't render it)"):
        Chat(tokenizer).render([{"role": "user", "content": "a"}])
    assert time.monotonic() - begun < 30  # it would take hours


# --- 42: names

NAMES = [
    "../x",
    "../../../x",
    "/abs/x",
    "a/../../x",
    "..",
    ".",
    "a\0b",
    "~/x",
    "a//..//..//x",
    "..\\x",
    "%2e%2e/x",
    f"$({SHELL})",
]
NAMES += ["x" * 400, "a\nb", "con/../..", "a/./../../b"]


@pytest.mark.parametrize("name", NAMES)
def test_42_a_run_s_name_leads_nowhere(name, tmp_path):
    folder = tmp_path / "outputs" / run_record.name_of_folder(name) / run_record.slug(name) / "seed=0"
    assert folder.resolve().is_relative_to((tmp_path / "outputs").resolve())
    assert all(len(part) <= 255 and part not in ("", ".", "..") and part.isprintable() for part in folder.parts[1:])
    folder.mkdir(parents=True)


def test_42_no_two_names_share_a_folder():
    names = {*NAMES, "x", "a/b", "a b", "a_b"} - {"/abs/x", "a//..//..//x"}  # empty parts count for nothing
    assert len({run_record.name_of_folder(name) for name in names}) == len(names)
    assert run_record.name_of_folder("studies/runs/full") == "studies/runs/full"


def test_42_by_the_command_a_user_types(tmp_path):
    (tmp_path / "here").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    told = run_module("dpo_lab.train", "name='../../x'", "trainer.devices=[0,0]", cwd=tmp_path / "here")
    assert (told.returncode, told.stderr) != (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"here", "outside"}
    (tmp_path / "here" / "outputs" / "linked").symlink_to(outside)
    for more in ([], ["--multirun"]):
        told = run_module("dpo_lab.train", "name=linked", *more, cwd=tmp_path / "here")
        assert told.returncode == 2
        assert f"a link in it leads to {outside}" in told.stderr
        assert "type name=another" in told.stderr
    assert not [path for path in outside.rglob("*") if path.is_file()]


# --- 43: rows and samples that are shown


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_43_a_report_of_hostile_samples_runs_and_loads_nothing(tmp_path, capsys):
    folder = write_study(tmp_path / "outputs", seeds=2, steps=4)
    assert report.main([str(folder), "--page", "page.html"]) == 0
    page = (tmp_path / "page.html").read_text()
    found = Elements(page).found
    scripts = [attributes for tag, attributes in found if tag == "script"]
    data = {"type": "application/json"}  # of a chart: not run
    assert [each for each in scripts if each != data] == [{}] * 4  # d3, Plot and its own two, allowed by their hashes
    assert {tag for tag, _ in found} & {"img", "iframe", "link", "base", "object", "embed", "form"} == set()
    values = [(name, value or "") for _, attributes in found for name, value in attributes.items()]
    assert not [name for name, _ in values if name.startswith("on")]
    links = [value for name, value in values if name in ("href", "src", "srcset", "action", "xlink:href", "data")]
    assert not [link for link in links if not link.startswith("#")]
    assert not [value for name, value in values if name == "style" and ("url(" in value or "expression" in value)]
    assert all(text.split("<")[0][:20] in page for text in HOSTILE if not text.startswith("<"))  # it is shown, though
    assert "\x1b" not in page
    capsys.readouterr()


def test_43_no_cell_of_a_csv_is_a_formula():
    arms = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "fine"]
    of = a_study.measured(a_study.study(arms, seeds=2), lambda arm, seed: {"kl": 1.0 + seed})
    rows = list(csv.reader(comparison_text.as_csv([of], ["kl"]).splitlines()))
    assert [row[1] for row in rows[1:]] == ["'=1+1", "'+1", "'-1", "'@SUM(A1)", "'\t=1", "fine"]
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "@", "\t"))]


# --- 44: secrets

TOKEN, OF_ENVIRONMENT, PASSWORD = "hf_" + "s3cr3tC4n4ry" * 2, "an-environment-canary", "pa55word-canary"


def test_44_secrets_are_in_no_file_and_on_no_terminal(tmp_path):
    """Of a sweep of stand-in runs that fail, and of real runs that are refused with a secret in what is wrong."""
    (tmp_path / "behaviour.json").write_text(json.dumps({"seed=0": "fails"}))
    typed = [f"+logger.tensorboard.api_token={PASSWORD}", "+logger.tensorboard.comment=${oc.env:SOME_API_KEY}"]
    typed += [f"+logger.tensorboard.note=https://me:{PASSWORD}@example.org/x", f"+trainer.x=of {TOKEN}"]
    secrets = {"SOME_API_KEY": OF_ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
    said = []
    sweep = run_module("tests.support.standin", "--multirun", "beta=0.1,0.2", *typed, cwd=tmp_path, **secrets)
    assert sweep.returncode == 1
    said.append(sweep)
    for wrong in (
        f"data.path=https://me:{PASSWORD}@example.org/x.jsonl",
        f"beta={TOKEN}",
        "optimized_metric=${oc.env:SOME_API_KEY}",
    ):
        said.append(run_module("dpo_lab.train", wrong, "trainer.max_steps=0", cwd=tmp_path, **secrets))
        assert said[-1].returncode == 2
    for dump in (["-call"], ["--cfg", "job", "--resolve"], ["--info=all"]):
        said.append(run_module("dpo_lab.train", *dump, *typed, cwd=tmp_path, **secrets))
        assert said[-1].returncode == 0
        assert "api_token: <redacted>" in said[-1].stdout
    for each in said:
        for secret in (TOKEN, OF_ENVIRONMENT, PASSWORD):
            assert secret not in each.stdout + each.stderr
    files = list((tmp_path / "outputs").rglob("*"))
    assert any(path.name == "sweep.json" for path in files)
    assert sum(path.name == "run.json" for path in files) == 2
    for path in files:
        held = str(path).encode() + (path.read_bytes() if path.is_file() else b"")
        assert not [secret for secret in (TOKEN, OF_ENVIRONMENT, PASSWORD) if secret.encode() in held], path
    record = json.loads(next(path for path in files if path.name == "run.json").read_text())
    assert record["config"]["logger"]["tensorboard"]["api_token"] == "<redacted>"


def test_44_a_printed_config_loses_its_secrets_and_nothing_else():
    key = f'-----BEGIN\n\n  it\'s "{PASSWORD}"\n'
    hidden = {"api_token": PASSWORD, "Private_Key": key, "password": f"'{PASSWORD}'", "secret": [], "token": None}
    plain = {"tokens": 3, "tokenizer": "secret: no", "text": "two\n\nlines", "beta": 0.1}
    config = {**hidden, "nested": {**plain, **hidden}, **plain}
    typed = ["beta=0.1", f"a.token={PASSWORD},b.x=1"]
    shown = redact_yaml(OmegaConf.to_yaml(OmegaConf.create({**config, "overrides": typed})))
    assert PASSWORD not in shown
    without = dict.fromkeys(["api_token", "Private_Key", "password", "secret"], "<redacted>")
    expected = {
        **config,
        "nested": config["nested"] | without,
        "overrides": ["beta=0.1", "a.token=<redacted>"],
    } | without
    assert yaml.safe_load(shown) == expected


# --- 45: code of a model's own, tags of YAML, servers


@pytest.mark.parametrize("part", ["config.json", "tokenizer_config.json"])
def test_45_a_model_s_own_code_is_not_run(part, policy, tmp_path):
    policy.save(tmp_path)
    settings = json.loads((tmp_path / part).read_text())
    names = {"AutoConfig": "evil.X", "AutoModelForCausalLM": "evil.X", "AutoTokenizer": ["evil.X", "evil.X"]}
    settings |= {"auto_map": names, "model_type": "evil", "tokenizer_class": "Evil"}
    (tmp_path / part).write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text(CODE)
    assert Pretrained(path=str(tmp_path)).trust_remote_code is False
    with suppress(PolicyError):  # a tokenizer is read by its file, whatever class it says it is
        Pretrained(path=str(tmp_path)).load()


@pytest.mark.parametrize(
    "setting",
    [
        {"_attn_implementation_internal": "evil/kernel"},
        {"_attn_implementation": "evil/kernel"},
        {"attn_implementation": "evil/kernel"},
        {"trust_remote_code": True, "auto_map": {"AutoModelForCausalLM": "evil.X"}},
        {"quantization_config": {"quant_method": "evil", "trust_remote_code": True}},
    ],
    ids=str,
)
def test_45_a_model_s_settings_fetch_no_code(setting, policy, tmp_path, monkeypatch):
    """What earlier versions of transformers let a config.json decide; nothing may ask the hub either."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it went to the network"))
    policy.save(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | setting))
    (tmp_path / "evil.py").write_text(CODE)
    with suppress(PolicyError):
        Pretrained(path=str(tmp_path)).load()


TAGS = [
    "!!python/object/apply:tests.faults.canaries.fire []",
    "!!python/name:tests.faults.canaries.fire",
    "!!python/object/new:os.system [x]",
]


@pytest.mark.parametrize("tag", TAGS)
def test_45_tags_of_yaml_make_nothing(tag, tmp_path):
    (tmp_path / "study.yaml").write_text(f"title: {tag}\n")
    with pytest.raises(StudyError, match="study.yaml: can't be read as YAML"):
        read(tmp_path / "study.yaml")
    (tmp_path / "theirs" / "ablation").mkdir(parents=True)
    (tmp_path / "theirs" / "ablation" / "evil.yaml").write_text(f"# @package _global_\nname: {tag}\n")
    told = run_module("dpo_lab.train", "--config-dir", "theirs", "+ablation=evil", cwd=tmp_path)
    assert told.returncode == 2


LISTENS = """
import os, sys
from pathlib import Path
from dpo_lab.distributed.launcher import run_ranks
code = "from tests.faults.test_hostile import meet; meet()"
ended = run_ranks([sys.executable, "-c", code], 2, folder=Path("ranks"), cwd=Path.cwd())
sys.exit(ended.code)
"""


def meet() -> None:
    """What a rank does: get ready, meet the other, say where this process can be reached from."""
    from dpo_lab.training.torch_setup import setup_torch

    setup_torch(1, on_cpu=True)
    torch.distributed.init_process_group("gloo")
    sum_of_ones = torch.ones(1)
    torch.distributed.all_reduce(sum_of_ones)
    mine = {
        os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if Path(f"/proc/self/fd/{fd}").exists()
    }
    lines = [
        line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]
    ]
    opened = [line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in mine]
    Path(f"opened-{os.environ['RANK']}.json").write_text(json.dumps([opened, sum_of_ones.item()]))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_45_ranks_of_this_machine_can_be_reached_from_this_machine_alone(tmp_path):
    environment = os.environ | OFFLINE | {"PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        [sys.executable, "-c", LISTENS], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    for rank in range(2):
        opened, total = json.loads((tmp_path / f"opened-{rank}.json").read_text())
        assert total == 2
        assert set(opened) == {"0100007F"}  # 127.0.0.1; rank 0's store and gloo's own


def test_45_no_server_of_ours_is_opened_by_default():
    ray = yaml.safe_load((REPOSITORY / "conf" / "hydra" / "launcher" / "ray.yaml").read_text())
    assert ray["init"]["include_dashboard"] is False
    servers = [path for path in (REPOSITORY / "dpo_lab").rglob("*.py") if "0.0.0.0" in path.read_text()]
    assert servers == []
