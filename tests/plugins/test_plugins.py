"""Plugins: a user's project in a folder of its own; its choices, its runs, their records, and when they may go on."""

from __future__ import annotations

import json
import shutil

import pytest

from dpo_lab import new, plugins
from dpo_lab.plugins import content_hash
from tests.plugins.conftest import OWN
from tests.plugins.project import EXAMPLE, PAGE, TINY, commands, make
from tests.support.warm import run_module

pytestmark = pytest.mark.slow

JUDGE = '''
from dataclasses import dataclass

from dpo_lab.evals.judges import Judge


@dataclass
class Strict(Judge, name="strict"):
    """Prefers the shorter response."""

    strictness: int = 3
'''


def test_the_project_s_own_tests_pass(project):
    told = run_module("pytest", "-q", "-p", "no:cacheprovider", cwd=project)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "2 passed" in told.stdout


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("taken", "taken: exists already and is not overwritten; type another name"),
        ("torch", "torch: Python finds another module of this name; type another name"),
        ("My-Lab", "My-Lab: must be the name of a Python package, of small letters, digits and _; type e.g. my_lab"),
        ("../up", "../up: must be the name of a Python package"),
        ("class", "class: must be the name of a Python package"),
    ],
)
def test_new_refuses_a_name_that_is_taken_or_none(name, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("mine")
    assert new.main([name]) == 2
    assert capsys.readouterr().err.startswith(f"error: {says}")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("taken", "mine")]


def test_new_writes_a_project_of_the_name_that_is_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert new.main(["our_lab"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("Next: ")]
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert sorted(printed) == files
    assert "our_lab/our_lab/losses.py" in files
    assert not any("my_lab" in f"{name} {(tmp_path / name).read_text()}" for name in files)


@pytest.mark.extended
def test_help_lists_choices_with_where_they_are_from(project):
    told = run_module("dpo_lab.train", "plugins=my_lab", "--help", cwd=project)
    assert told.returncode == 0, told.stderr
    for line in (
        "  my_lab_hinge   max(0, margin - beta h)^2, zero where the margin is met [my_lab]",
        "  my_lab_colours Lists of colours, rewarded by the share of warm ones [my_lab]",
        "  my_lab_openings Distinct openings, the first `words` words, over all openings of the samples [my_lab]",
        "  my_lab_norm    the default ones and my_lab.callbacks.WeightNorm [my_lab]",
        "  my_lab_wide    My hinge with twice the margin. [my_lab]",
    ):
        assert line in told.stdout.splitlines()


def test_a_judge_of_a_file_is_a_choice_with_its_settings(tmp_path):
    (tmp_path / "judges.py").write_text(JUDGE)
    told = run_module("dpo_lab.train", "plugins=[./judges.py]", "evals/judge=strict", "--cfg", "job", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert "strictness: 3" in told.stdout
    told = run_module("dpo_lab.train", "plugins=[./judges.py]", "--help", cwd=tmp_path)
    assert "  strict         Prefers the shorter response [./judges.py]" in told.stdout.splitlines()


def test_a_run_uses_the_parts_and_records_the_plugin(project, done):
    record = json.loads((done / "run.json").read_text())
    assert record["status"] == "done"
    config = record["config"]
    assert (config["loss"]["kind"], config["loss"]["margin"], config["loss"]["beta"]) == ("my_lab_hinge", 2.0, 0.1)
    assert config["data"]["task"]["kind"] == "my_lab_colours"
    assert config["evals"]["my_lab_openings"] == {"words": 3}
    assert record["loss_traits"]["loss_at_zero_margin"] == 4  # (2 - 0)^2
    assert 0 < record["metrics"]["distinct_openings"]["value"] <= 1
    assert 0 <= record["metrics"]["gold"]["value"] <= 1
    rows = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "weight_norm" in row] == [2, 4, 6]
    sha256 = content_hash(project / "my_lab")
    assert record["plugins"] == {"my_lab": {"typed": "my_lab", "path": str(project / "my_lab"), "sha256": sha256}}
    assert config["plugins"] == {"my_lab": sha256[:16]}
    assert record["overrides"][0] == "plugins=[my_lab]"


def test_the_same_command_finds_its_run_and_a_changed_file_makes_another(done, project, tmp_path):
    again = run_module("dpo_lab.train", *OWN, *TINY, cwd=project)
    assert again.returncode == 0, again.stderr
    assert "this run is done already" in again.stdout
    assert "python -m dpo_lab.train 'plugins=[my_lab]' " in again.stdout  # among the commands to type next
    copy = shutil.copytree(project, tmp_path / "copy")
    with (copy / "my_lab" / "losses.py").open("a") as file:
        file.write("\n# changed\n")
    changed = run_module("dpo_lab.train", *OWN, *TINY, cwd=copy)
    assert changed.returncode == 2
    assert (
        "holds another run (plugin my_lab has changed since); type name=another, or if_exists=restart" in changed.stderr
    )


def test_a_command_without_the_plugin_says_what_to_type(done, project):
    without = run_module("dpo_lab.train", "loss=my_lab_hinge", cwd=project)
    assert (without.returncode, without.stderr.count("\n")) == (2, 1)
    assert without.stderr.startswith("error: loss=my_lab_hinge: no such choice; type loss= one of ")
    run = done.relative_to(project)
    without = run_module("dpo_lab.train", "+ablation=my_lab_wide", cwd=project)
    assert without.stderr.endswith(f"; {run} was made with plugins=[my_lab]: type it too\n")
    without = run_module("dpo_lab.evaluate", f"run={run}", cwd=project)
    assert (without.returncode, without.stderr) == (
        2,
        "error: run: made with plugins=[my_lab]; type it too, after run=\n",
    )


def test_a_finished_run_is_evaluated_again_with_it_and_reported_without(done, project):
    run = str(done.relative_to(project))
    told = run_module("dpo_lab.evaluate", f"run={run}", "plugins=my_lab", "evals.my_lab_openings.words=1", cwd=project)
    assert told.returncode == 0, told.stderr
    result = json.loads((done / "evaluations" / "1.json").read_text())
    assert result["evals"]["my_lab_openings"] == {"words": 1}
    assert result["plugins"]["my_lab"]["sha256"] == content_hash(project / "my_lab")
    told = run_module("dpo_lab.report", run, "--csv", "--metrics", "distinct_openings", cwd=project)
    assert told.returncode == 0, told.stderr
    assert "distinct_openings" in told.stdout


def test_what_is_not_typed_is_not_loaded_though_it_is_installed(tmp_path):
    """An entry point is listed by its name; its module leaves a trace when it is imported."""
    (tmp_path / "their_lab-1.0.dist-info").mkdir()
    (tmp_path / "their_lab-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: their-lab\nVersion: 1.0\n"
    )
    (tmp_path / "their_lab-1.0.dist-info" / "entry_points.txt").write_text("[dpo_lab.plugins]\ntheirs = their_lab\n")
    (tmp_path / "their_lab.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    told = run_module("dpo_lab.train", "--help", cwd=tmp_path)
    assert "plugins that are installed: theirs; type plugins=[theirs] for its choices" in told.stdout.splitlines()
    told = run_module("dpo_lab.train", "loss=theirs", "--cfg", "job", cwd=tmp_path)
    assert told.stderr.endswith("; or with a plugin that has it, of those installed: plugins=[theirs]\n")
    assert not (tmp_path / "imported").exists()
    assert run_module("dpo_lab.train", "plugins=theirs", "--cfg", "job", cwd=tmp_path).returncode == 0
    assert (tmp_path / "imported").exists()


def test_the_hash_is_of_python_and_yaml_files_and_their_names(tmp_path):
    package = make(tmp_path) / "my_lab"
    before = content_hash(package)
    (package / "notes.txt").write_text("not read")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "losses.cpython-311.pyc").write_bytes(b"x")
    assert content_hash(package) == before
    seen = {before}
    for change in (
        lambda: (package / "conf" / "ablation" / "my_lab_wide.yaml").write_text("{}"),
        lambda: (package / "losses.py").write_text("x = 1\n"),
        lambda: (package / "losses.py").rename(package / "others.py"),
    ):
        change()
        seen.add(content_hash(package))
    assert len(seen) == 4


def test_a_run_without_plugins_has_no_entry_for_them():
    from tests.support.configs import recorded

    assert "plugins" not in recorded()
    assert plugins.as_record() == {}
    assert plugins.words() == []


@pytest.mark.parametrize("words", commands(PAGE), ids=" ".join)
def test_the_page_s_commands_are_those_of_these_tests(words, project):
    """Each is run by the tests of this folder or composes: of a training the config alone is made here."""
    _, _, module, *arguments = words if words[0] == "python" else ("", "", *words)
    if module != "dpo_lab.train":
        assert " ".join(words) in {
            "python -m dpo_lab.new my_lab",
            "cd my_lab",
            "python -m pytest",
            "python -m dpo_lab.study studies/my_lab_hinge.yaml plugins=my_lab budget=quick",
        }
    elif "--help" not in arguments:
        told = run_module(module, *arguments, "--cfg", "job", cwd=project)
        assert told.returncode == 0, told.stderr


def test_the_page_has_an_evaluator_a_callback_and_their_package():
    assert [name for name, _ in EXAMPLE.findall(PAGE)] == [
        "my_lab/evaluators.py",
        "my_lab/callbacks.py",
        "my_lab/__init__.py",
    ]
