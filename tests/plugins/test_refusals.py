"""Plugins that can't be used are refused in one line; and no config brings one in, or names a class of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dpo_lab import plugins
from dpo_lab.core.losses import LOSSES
from dpo_lab.plugins import PluginError
from tests.faults.canaries import CODE, MARK
from tests.plugins.project import TINY
from tests.support.warm import run_module

pytestmark = pytest.mark.slow

LOSS = """
from dataclasses import dataclass
from dpo_lab.core.losses.base import Loss

@dataclass
class {cls}(Loss, name="{name}", requires_reference=None, is_bradley_terry=True, is_per_token=False, is_margin_only=True):
    def __call__(self, policy, reference):
        return self.log_ratios(policy, reference).margin
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty current folder; what a plugin that is loaded changes of this process is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.setenv(plugins.INHERITED, "")
    monkeypatch.setenv(MARK, str(tmp_path / "fired"))
    return tmp_path


@pytest.mark.parametrize(
    ("files", "typed", "says"),
    [
        (
            {},
            "nope",
            "plugins=[nope]: Python finds no such module from here; type the path of one, such as ./nope.py, or",
        ),
        ({}, "./nope.py", "plugins=[./nope.py]: no .py file and no folder with an __init__.py; type the path of one"),
        ({"bare/x.txt": ""}, "./bare", "plugins=[./bare]: no .py file and no folder with an __init__.py"),
        ({"my-lab.py": ""}, "./my-lab.py", "plugins=[./my-lab.py]: my-lab is no name of a Python module; rename it"),
        ({"bad_a.py": "x = 1\ny = z\n"}, "bad_a", "plugins=[bad_a]: bad_a.py:2: NameError: name 'z' is not defined"),
        ({"bad_b.py": "def f(:\n"}, "bad_b", "plugins=[bad_b]: bad_b.py:1: SyntaxError: "),
        ({"bad_c.py": "raise SystemExit(3)"}, "bad_c", "plugins=[bad_c]: bad_c.py:1: SystemExit: 3"),
        (
            {"bad_d/__init__.py": "from bad_d import deep", "bad_d/deep.py": "\nimport no_such_module_at_all\n"},
            "bad_d",
            "plugins=[bad_d]: bad_d/deep.py:2: ModuleNotFoundError: No module named 'no_such_module_at_all'",
        ),
        (
            {"bad_e.py": LOSS.format(cls="Mine", name="dpo")},
            "./bad_e.py",
            "plugins=[./bad_e.py]: bad_e.py:6: TypeError: Mine: the name 'dpo' is taken by DPO; choose another",
        ),
        ({"deep/json.py": ""}, "deep/json.py", "plugins=[deep/json.py]: Python imports "),
    ],
)
def test_a_plugin_that_cannot_be_used_is_refused_in_one_line(files, typed, says, folder):
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    dpo = LOSSES["dpo"]
    with pytest.raises(PluginError) as refused:
        plugins.load([typed])
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)
    assert LOSSES["dpo"] is dpo


def test_a_file_that_changes_after_it_was_imported_is_refused(folder):
    (folder / "changing.py").write_text("x = 1\n")
    assert plugins.load(["./changing.py"])
    assert not plugins.load(["./changing.py", "changing"])  # it is loaded already, whatever it is called
    (folder / "changing.py").write_text("x = 2\n")
    with pytest.raises(PluginError, match=r"changing.py has changed since it was imported; start Python again"):
        plugins.load(["./changing.py"])


def test_two_plugins_of_one_name_are_refused(folder):
    for place in ("a", "b"):
        (folder / place).mkdir()
        (folder / place / "twins.py").write_text("")
    plugins.load(["a/twins.py"])
    with pytest.raises(PluginError, match=r"a/twins.py has the same name; rename one of them"):
        plugins.load(["b/twins.py"])


def lab(folder: Path, name: str, files: dict[str, str]) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(LOSS.format(cls="Own", name=f"{name}_loss"))
    for path, text in files.items():
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / path).write_text(text)


@pytest.mark.parametrize(
    ("labs", "says"),
    [
        ({"one": {"conf/loss/dpo.yaml": "{}"}}, "loss=dpo is a choice of dpo_lab already; rename the file"),
        ({"one": {"conf/train.yaml": "{}"}}, "=train is a choice of dpo_lab already; rename the file"),
        ({"one": {"conf/schema/loss/x.yaml": "{}"}}, "is a choice of dpo_lab already; rename the file"),
        (
            {"one": {"conf/ablation/x.yaml": "{}"}, "two": {"conf/ablation/x.yaml": "{}"}},
            "ablation=x is a choice of ",
        ),
        (
            {"one": {"__init__.py": "import dpo_lab\ndpo_lab.register_callback('early_stopping', 'one.X')"}},
            "one: callbacks=early_stopping is a choice of dpo_lab already; choose another name",
        ),
    ],
)
def test_choices_of_one_name_are_refused(labs, says, tmp_path):
    for name, files in labs.items():
        lab(tmp_path, name, files)
    told = run_module("dpo_lab.train", f"plugins=[{','.join(labs)}]", "--cfg", "job", cwd=tmp_path)
    assert (told.returncode, told.stderr.count("\n")) == (2, 1), told.stderr
    assert says in told.stderr


HOSTILE = {
    "a key": {"plugins": ["./evil.py"]},
    "Hydra's list of what was typed": {"hydra": {"overrides": {"task": ["plugins=[./evil.py]"]}}},
    "the same, of Hydra's settings": {"hydra": {"overrides": {"hydra": ["plugins=[./evil.py]"]}}},
    "a sweep": {"hydra": {"sweeper": {"params": {"plugins": "./evil.py"}}}},
    "the environment": {"hydra": {"job": {"env_set": {"DPO_LAB_PLUGINS": '{"./evil.py": ["./evil.py", ""]}'}}}},
    "a class": {"callbacks": {"x": {"_target_": "evil.Callback"}}},
}


@pytest.mark.parametrize(
    ("hostile", "mode", "more"),
    [
        *((hostile, "--run", []) for hostile in HOSTILE if hostile != "a sweep"),
        ("a sweep", "--multirun", []),
        *(
            pytest.param(hostile, "--multirun", [], marks=pytest.mark.extended)
            for hostile in HOSTILE
            if hostile != "a sweep"
        ),
        pytest.param("a sweep", "--multirun", ["hydra/sweeper=basic"], marks=pytest.mark.extended),
    ],
)
def test_39_no_config_brings_a_plugin_in(hostile, mode, more, tmp_path):
    (tmp_path / "evil.py").write_text(CODE)
    (tmp_path / "theirs" / "ablation").mkdir(parents=True)
    (tmp_path / "theirs" / "ablation" / "better.yaml").write_text(
        f"# @package _global_\n{yaml.safe_dump(HOSTILE[hostile])}"
    )
    words = [mode, "--config-dir", "theirs", *more, "+ablation=better", "trainer=ddp_cpu", *TINY]
    told = run_module("dpo_lab.train", *words, cwd=tmp_path, **{MARK: str(tmp_path / "fired")})
    assert told.returncode in (1, 2), told.stdout
    assert "error: " in told.stderr or "failed" in told.stdout
    assert not (tmp_path / "fired").exists()
    assert not list(tmp_path.rglob("run.json"))


def test_39_a_rank_imports_no_plugin_that_its_command_line_names(tmp_path):
    """What a command starts its processes with may come from a config; they have their plugins from its environment."""
    (tmp_path / "evil.py").write_text(CODE)
    variables = {MARK: str(tmp_path / "fired"), "DPO_LAB_PARENT": "1"}
    told = run_module("dpo_lab.train", "plugins=[./evil.py]", cwd=tmp_path, **variables)
    says = "error: plugins=[./evil.py]: not a plugin of the command that started this process; type it there\n"
    assert (told.returncode, told.stderr) == (2, says)
    assert not (tmp_path / "fired").exists()


def test_39_a_study_s_arm_brings_no_plugin_in(tmp_path):
    (tmp_path / "evil.py").write_text(CODE)
    arms = [{"name": "a", "overrides": ["loss=dpo"]}, {"name": "b", "overrides": ["plugins=[./evil.py]"]}]
    prediction = {"description": "x", "measure": "difference", "metric": "kl", "treatment": "b", "control": "a"}
    study = {"title": "t", "question": "q", "claim": "c", "source": "s", "baseline": "a", "arms": arms}
    study |= {"predictions": [prediction | {"direction": "more", "min_effect": 1.1}], "metrics": ["kl"]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | {"budgets": {"full": {"seeds": [0, 1]}}}))
    told = run_module("dpo_lab.study", "study.yaml", cwd=tmp_path, **{MARK: str(tmp_path / "fired")})
    assert told.returncode == 2
    assert "plugins" in told.stderr
    assert not (tmp_path / "fired").exists()


def test_39_a_config_names_no_class_of_a_plugin_that_it_did_not_register(tmp_path):
    lab(tmp_path, "one", {"script.py": CODE, "more.py": "from lightning.pytorch import Callback\n"})
    for target in ("one.script.Callback", "one.more.Callback", "one.Own"):
        told = run_module(
            *("dpo_lab.train", "plugins=one", f"+callbacks.x._target_={target}"),
            cwd=tmp_path,
            **{MARK: str(tmp_path / "fired")},
        )
        assert told.returncode == 2
        assert told.stderr.startswith(f"error: _target_={target}: not among the classes that a config may name; ")
    assert not (tmp_path / "fired").exists()
