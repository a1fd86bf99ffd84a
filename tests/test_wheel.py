"""The wheel: built, installed into an empty environment, and run from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from tests.conftest import REPOSITORY, SMALL

pytestmark = pytest.mark.slow


def test_wheel_runs_from_an_empty_folder(tmp_path):
    """Its dependencies are lent by this environment (a path file), the package itself only by the wheel."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(REPOSITORY)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("dpo_lab-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"dpo_lab/conf/train.yaml", "dpo_lab/conf/ablation/uniform_ref.yaml", "dpo_lab/train.py"} <= set(names)
    templates = {
        p.relative_to(REPOSITORY).as_posix() for p in (REPOSITORY / "dpo_lab" / "new_project").rglob("*.template")
    }
    assert templates
    assert templates <= set(names)
    assert not [n for n in names if n.startswith(("tests/", "outputs/"))]

    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python*/site-packages")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
    empty = tmp_path / "empty"
    empty.mkdir()
    run = subprocess.run(
        [environment / "bin" / "python", "-m", "dpo_lab.train", *SMALL, "figures=true", "trainer.max_steps=1"],
        cwd=empty,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    where = subprocess.run(
        [environment / "bin" / "python", "-c", "import dpo_lab; print(dpo_lab.__file__)"],
        cwd=empty,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(site))
    assert (empty / "outputs").is_dir()
    assert list(empty.rglob("run.json"))
