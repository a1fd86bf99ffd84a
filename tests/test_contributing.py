"""CONTRIBUTING.md: what it says is done in a copy of the repository, and the files that it takes are counted."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OFFLINE, REPOSITORY, SMALL
from tests.support import processes

PAGE = (REPOSITORY / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^## (An? \w+)\n(.*?)(?=^## )", PAGE, re.S | re.M))
PLACE = re.compile(r"`([^`]+)`, a new file|add to the end of `([^`]+)`")
# Tests that hold for every file and setting: they pass with the examples added.
OF_ALL_FILES = [
    "tests/test_architecture.py::test_imports_only_go_down",
    "tests/test_architecture.py::test_config_and_commands_load_nothing_heavy",
    "tests/test_architecture.py::test_files_open_with_what_they_are_for_and_are_short",
    "tests/test_readme.py::test_the_file_map_is_true",
    *(
        f"tests/config/test_config.py::test_every_choice_composes[{choice}]"
        for choice in (
            "loss-squared_hinge",
            "reference-tempered",
            "noise-long_prompts",
            "evals-openings",
            "data-colours",
        )
    ),
    *(
        f"tests/config/test_config.py::test_every_kind_has_a_choice[{kind}]"
        for kind in ("loss", "reference", "noise", "data.task")
    ),
    "tests/core/test_losses.py",
    "tests/evals/test_evals.py",
]

# Commands as `python -m` runs them, one after the other in one process, which has to import torch once.
RUNNER = """
import runpy, shlex, sys
for command in sys.argv[1:]:
    _, _, module, *arguments = shlex.split(command)
    print("RUNS", command, flush=True)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
"""

pytestmark = pytest.mark.slow


@dataclass
class Done:
    """What is left after all sections of the page were followed, in their order. touched: files by section."""

    folder: Path
    touched: dict[str, set[str]]
    trained: subprocess.CompletedProcess[str]
    tested: subprocess.CompletedProcess[str]

    def record(self, section: str) -> dict[str, Any]:
        (path,) = (self.folder / "outputs" / name_of(section)).rglob("run.json")
        return json.loads(path.read_text())


def name_of(section: str) -> str:
    return section.split()[1]


def commands(section: str) -> list[str]:
    return [line for block in re.findall(r"```sh\n(.*?)```", SECTIONS[section], re.S) for line in block.splitlines()]


def follow(section: str, folder: Path) -> None:
    """Write the files of a section's examples where the text before each says."""
    before = 0
    for block in re.finditer(r"```(\w+)\n(.*?)```", SECTIONS[section], re.S):
        if block[1] != "sh":
            ((new, extended),) = PLACE.findall(SECTIONS[section][before : block.start()])
            path = folder / (new or extended)
            assert path.exists() == bool(extended)
            path.write_text(f"{path.read_text()}\n\n{block[2]}" if extended else block[2])
        before = block.end()


def files(folder: Path) -> dict[str, bytes]:
    kept = [path for path in folder.rglob("*") if path.is_file() and "outputs" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Done:
    folder = tmp_path_factory.mktemp("copy")
    for name in ("dpo_lab", "conf", "tests", "ablations", "docs"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
        shutil.copy(REPOSITORY / name, folder)
    touched = {}
    for section in SECTIONS:
        before = files(folder)
        follow(section, folder)
        after = files(folder)
        assert before.keys() <= after.keys()
        touched[section] = {name for name in after if before.get(name) != after[name]}
    environment = os.environ | OFFLINE | {"PYTHONPATH": str(folder)}
    typed = {section: commands(section) for section in SECTIONS}
    trains = [
        shlex.join([*shlex.split(command), *SMALL, f"name={name_of(section)}"])
        for section, typed_here in typed.items()
        for command in typed_here
        if " dpo_lab.train " in command
    ]
    studies = [c for typed_here in typed.values() for c in typed_here if " dpo_lab.study " in c]
    tests = [c.split()[-1] for typed_here in typed.values() for c in typed_here if " pytest " in c]
    assert len(trains) + len(studies) + len(tests) == sum(map(len, typed.values()))
    runner = [sys.executable, "-c", RUNNER, *trains, *studies]
    trained = processes.run(runner, cwd=folder, env=environment, timeout=400)
    pytest_command = [sys.executable, "-m", "pytest", "-n", "0", "-vv", "-p", "no:cacheprovider", *tests, *OF_ALL_FILES]
    tested = processes.run(pytest_command, cwd=folder, env=environment, timeout=400)
    assert files(folder) == after, "a command changed files of the copy"
    return Done(folder, touched, trained, tested)


def test_the_page_has_an_example_of_each():
    assert list(SECTIONS) == ["A loss", "A reference", "A noise", "An evaluator", "A task", "A study"]


@pytest.mark.parametrize("section", SECTIONS)
def test_an_example_is_a_class_a_yaml_and_a_test_and_nothing_else(section, done):
    kinds = sorted(path.split("/")[0] for path in done.touched[section])
    assert kinds == (["ablations"] if section == "A study" else ["conf", "dpo_lab", "tests"])


def test_the_commands_run(done):
    assert done.trained.returncode == 0, done.trained.stdout + done.trained.stderr
    assert done.trained.stdout.count("RUNS ") == 6
    assert "warm-up 80" in done.trained.stdout


def test_the_tests_pass_and_those_of_all_files_still_do(done):
    assert done.tested.returncode == 0, done.tested.stdout + done.tested.stderr
    for section in list(SECTIONS)[:-1]:
        (own,) = (path for path in done.touched[section] if path.startswith("tests/"))
        assert re.search(rf"{re.escape(own)}::\w+ PASSED", done.tested.stdout)


@pytest.mark.parametrize(
    ("section", "group", "expected"),
    [
        ("A loss", ("loss",), {"kind": "squared_hinge", "beta": 0.1}),
        ("A reference", ("reference",), {"kind": "tempered", "power": 0.8}),
        ("A noise", ("noise",), {"kind": "long_prompts", "rate": 0.3, "tokens": 6, "seed": 0}),
        ("An evaluator", ("evals", "openings"), {"words": 1}),
        ("A task", ("data", "task"), {"kind": "colours", "temperature": 0.1, "colours": 8}),
    ],
)
def test_the_record_of_a_run_holds_the_settings(section, group, expected, done):
    record = done.record(section)
    assert record["status"] == "done"
    found = record["config"]
    for key in group:
        found = found[key]
    assert found.items() >= expected.items()


def test_the_record_holds_what_each_example_does(done):
    traits = {"requires_reference": None, "is_bradley_terry": True, "is_per_token": False, "loss_at_zero_margin": 1.0}
    assert done.record("A loss")["loss_traits"] == traits
    assert done.record("A loss")["step_zero_loss"] == 1
    reference = done.record("A reference")
    assert reference["first_batch"]["pairs"] == 8
    assert reference["metrics"]["calibration_error"]["value"] > 0  # of margins to that reference
    assert done.record("A noise")["data"]["flipped by label noise"] > 0
    openings = done.record("An evaluator")
    assert 0 < openings["metrics"]["distinct_openings"]["value"] <= 1
    assert openings["metric_labels"]["distinct_openings"] == "distinct openings"
    assert re.search(r"^ *distinct openings +[\d.]+ +[\d.]+ ", done.trained.stdout, re.M)
    assert 0 <= done.record("A task")["metrics"]["gold"]["value"] <= 1
