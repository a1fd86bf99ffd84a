"""The README and the documents beside it: every command runs, every link and every file on the map is there."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import OWN_MODEL, REPOSITORY, SMALL, python_m
from tests.support.warm import run_module

README = (REPOSITORY / "README.md").read_text()
DOCUMENTS = ["README.md", "docs/models.md", "docs/runs.md", "docs/architecture.md"]
TEXT = "\n".join((REPOSITORY / name).read_text() for name in DOCUMENTS)
COMMANDS = list(
    dict.fromkeys(
        line.split("#")[0].strip()
        for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S)
        for line in block.splitlines()
        if line.strip() and not line.startswith("#")
    )
)
PYTHON_COMMANDS = [c for c in COMMANDS if c.startswith("python -m ")]
MAKE_COMMANDS = [c for c in COMMANDS if c.startswith("make ")]
OTHERS = [c for c in COMMANDS if c not in PYTHON_COMMANDS + MAKE_COMMANDS]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(policy, tmp_path_factory) -> Path:
    """Where the README's reader stands, with a model and pairs of their own."""
    folder = tmp_path_factory.mktemp("reader")
    policy.save(folder / "my-model")
    rows = [{"prompt": f"what is {i}?", "chosen": f"it is {i}", "rejected": f"not {i}"} for i in range(60)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copytree(REPOSITORY / "ablations", folder / "ablations")
    return folder


def test_the_commands_are_all_known_kinds():
    assert len(PYTHON_COMMANDS) >= 5
    assert {"make train", "make test", "make check"} <= set(MAKE_COMMANDS)
    assert set(OTHERS) == {"tensorboard --logdir outputs"}


@pytest.mark.parametrize("command", PYTHON_COMMANDS)
def test_python_commands_run(command, folder):
    _, _, module, *arguments = shlex.split(command)
    if "seed=0,1,2" in arguments:  # 18 and 30 jobs: one of each
        arguments = [re.sub(r"^(seed|beta|\+ablation)=([^,]+),.*", r"\1=\2", argument) for argument in arguments]
    elif "--multirun" in arguments:  # two jobs
        arguments = [re.sub(r"^(beta=[^,]+,[^,]+),.*", r"\1", argument) for argument in arguments]
    if module == "dpo_lab.study":  # many jobs: what they would be; tests/studies/test_studies.py runs them
        arguments = [argument for argument in arguments if not argument.startswith(("launcher", "hydra"))] + ["--plan"]
        if not any(argument.startswith("budget=") for argument in arguments):
            arguments.append("budget=quick")
    if module in ("dpo_lab.evaluate", "dpo_lab.report") and "--results" not in arguments:
        # the reader's first run, whose folder is named by the settings that make it small
        if not list(folder.glob("outputs/dpo/*/seed=0/policy")):
            assert run_module("dpo_lab.train", *SMALL, cwd=folder).returncode == 0
        made = next(folder.glob("outputs/dpo/*/seed=0/policy")).parent.relative_to(folder)
        arguments = [f"run={made}" if argument.startswith("run=") else argument for argument in arguments]
    settings = OWN_MODEL if any(a.startswith("policy=") for a in arguments) else SMALL
    small = settings if module in ("dpo_lab.train", "dpo_lab.sft") and "--help" not in arguments else []
    start = python_m if "--multirun" in arguments else run_module
    result = start(module, *arguments, *small, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("command", MAKE_COMMANDS)
def test_make_commands_call_what_they_say(command):
    """make test would run this test again, so the recipes are printed, not run; train's is run below."""
    shown = subprocess.run(
        [*shlex.split(command), "-n"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    wanted = {
        "train": "python -m dpo_lab.train",
        "test": "python -m pytest",
        "quick": '-m "not (slow',
        "check": "pyright",
    }[command.split()[1]]
    assert wanted in shown
    if "ARGS=" in command:
        assert "+ablation=uniform_ref" in shown


def test_make_train_runs(folder):
    """In this environment instead of a new one; the Makefile installs into a new one when there is none."""
    virtual = Path(sys.prefix)
    stamp = virtual / ".installed"
    made = not stamp.exists()
    stamp.touch()
    try:
        result = subprocess.run(
            [
                "make",
                "-f",
                str(REPOSITORY / "Makefile"),
                "-o",
                str(stamp),
                "train",
                f"VENV={virtual}",
                f"ARGS={' '.join(SMALL)}",
            ],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    finally:
        if made:
            stamp.unlink()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "What it learned" in result.stdout


def test_tensorboard_is_installed():
    assert (
        subprocess.run([Path(sys.executable).parent / "tensorboard", "--version"], capture_output=True).returncode == 0
    )


def test_the_readme_is_short_and_its_folders_exist():
    assert README.count("\n") <= 150
    (block,) = re.findall(r"```text\n(.*?)```", README, re.S)
    listed = [line.split()[0] for line in block.splitlines()]
    assert all((REPOSITORY / name).is_dir() for name in listed)
    packages = [path.parent for path in (REPOSITORY / "dpo_lab").glob("*/__init__.py")]
    assert {f"{path.relative_to(REPOSITORY)}/" for path in packages} <= set(listed)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_modules_that_a_document_names_exist(name):
    named = set(re.findall(r"`(dpo_lab/[\w/]+\.py)`", (REPOSITORY / name).read_text()))
    assert {path for path in named if not (REPOSITORY / path).is_file()} == set()
    assert named or name != "docs/architecture.md"


def test_the_file_map_is_true():
    """Every file of the package is on the map with the sentence that opens it, and nothing else is."""
    (block,) = re.findall(r"```text\n(.*?)```", (REPOSITORY / "docs/architecture.md").read_text(), re.S)
    on_map = {path: sentence.strip() for path, _, sentence in (line.partition("  ") for line in block.splitlines())}
    openings = {
        str(path.relative_to(REPOSITORY)): str(ast.get_docstring(ast.parse(path.read_text()))).split("\n\n")[0]
        for path in (REPOSITORY / "dpo_lab").rglob("*.py")
        if path.name != "__init__.py"
    }
    assert on_map.items() <= {path: opening.replace("\n", " ") for path, opening in openings.items()}.items()
    seams = ("dpo_lab/core/losses/", "dpo_lab/data/tasks/", "dpo_lab/evals/evaluators/")  # see CONTRIBUTING.md
    assert [path for path in openings if path not in on_map and not path.startswith(seams)] == []


def test_links_lead_somewhere():
    for name in [*DOCUMENTS, "CONTRIBUTING.md"]:
        text = re.sub(r"```.*?```", "", (REPOSITORY / name).read_text(), flags=re.S)
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            here = (REPOSITORY / name).parent / target
            assert target.startswith("https://arxiv.org/") or here.exists(), f"{name}: {target}"
