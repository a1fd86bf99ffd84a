"""The project that the tests of this folder share, and a run of it that uses all its parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugins.project import TINY, make
from tests.support.warm import run_module

OWN = [
    "plugins=my_lab",
    "+ablation=my_lab_wide",
    "data=my_lab_colours",
    "evals=my_lab_openings",
    "callbacks=my_lab_norm",
    "name=own",
]


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("users"))


@pytest.fixture(scope="session")
def done(project) -> Path:
    """The folder of a finished run with the project's loss, by its ablation, and its task, evaluator and callback."""
    told = run_module("dpo_lab.train", *OWN, *TINY, cwd=project)
    assert told.returncode == 0, told.stdout + told.stderr
    (path,) = (project / "outputs" / "own").rglob("run.json")
    return path.parent
