"""The notebooks of docs/notebooks run from their first cell to their last, in a kernel of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dpo_lab import api
from tests.conftest import OFFLINE, REPOSITORY

NOTEBOOKS = REPOSITORY / "docs" / "notebooks"
NAMES = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))


def read(name: str) -> dict:
    return json.loads((NOTEBOOKS / name).read_text())


def test_both_are_there():
    assert NAMES == ["a_first_ablation.ipynb", "my_own_loss.ipynb"]


@pytest.mark.parametrize("name", NAMES)
def test_they_are_kept_without_outputs(name):
    cells = [cell for cell in read(name)["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def executed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a notebook in a folder, and return the text of all its outputs."""
    nbclient = pytest.importorskip("nbclient", reason="needs pip install -c constraints.txt -e '.[dev]'")
    nbformat = pytest.importorskip("nbformat")
    for variable, value in OFFLINE.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(folder / ".ipython"))
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(str(each.get("text") or each.get("data", {}).get("text/plain", "")) for each in outputs)


@pytest.mark.slow
@pytest.mark.extended  # five runs, four of them processes: about 50 CPU seconds
@pytest.mark.filterwarnings("ignore")  # of the kernel's transport
def test_a_first_ablation(tmp_path, monkeypatch):
    said = executed("a_first_ablation.ipynb", tmp_path, monkeypatch)
    assert "\u2501\u2501 16/16" in said  # the progress bar of training, redrawn in place
    assert "4 jobs: 4 done" in said
    monkeypatch.chdir(tmp_path)
    runs = api.load_runs("outputs/notebook-beta")
    means = runs.table(["kl"]).groupby("beta")["kl"].mean()
    assert f"mean KL: {means[0.03]:.3f} nats at beta 0.03, {means[0.3]:.3f} at beta 0.3" in said


@pytest.mark.slow
@pytest.mark.extended  # five runs, four of them processes: about 50 CPU seconds
@pytest.mark.filterwarnings("ignore")
def test_my_own_loss(tmp_path, monkeypatch):
    said = executed("my_own_loss.ipynb", tmp_path, monkeypatch)
    assert "loss.targets" in said  # a key that the loss lacks is refused
    monkeypatch.chdir(tmp_path)
    (study,) = Path("outputs").glob("my-loss/my_study/*/study.json")
    verdicts = api.load_runs(study.parent).verdicts()
    assert list(verdicts["claim"]) == ["the policy drifts less"]
    assert verdicts["verdict"][0] in said
