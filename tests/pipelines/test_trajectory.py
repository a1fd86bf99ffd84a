"""A run with evals.every as a user types it: its metrics are those of a run without, and its path is shown everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpo_lab.api.run import load_run
from dpo_lab.reporting.comparison_page import page
from dpo_lab.reporting.figures.trajectory import LEAST_KL
from dpo_lab.reporting.formatting import format_value
from dpo_lab.runs.examples import read
from dpo_lab.studies.load import gather
from tests.conftest import SMALL
from tests.support import warm

pytestmark = [pytest.mark.slow, pytest.mark.extended]  # in make test: tests/training/test_trajectory.py

COUNT = 6
PATH = ["evals.every=2", f"evals.num_trajectory_prompts={COUNT}"]


def trained(workshop: Path, name: str, *settings: str) -> Path:
    told = warm.run_module("dpo_lab.train", f"name={name}", *SMALL, *settings, cwd=workshop)
    assert told.returncode == 0, told.stdout + told.stderr
    folder = next((workshop / "outputs" / name).glob("*/seed=0"))
    (folder / "terminal").write_text(told.stdout)
    return folder


@pytest.fixture(scope="module")
def runs(workshop) -> tuple[Path, Path]:
    """With a trajectory, and without."""
    return trained(workshop, "path", *PATH), trained(workshop, "no-path")


def record_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_what_is_trained_and_measured_at_the_end_is_the_same(runs):
    one, other = map(record_of, runs)
    assert one["trained_policy"] == other["trained_policy"]
    assert one["metrics"] == other["metrics"]
    assert "trajectory" not in other
    assert one["config_digest"] == other["config_digest"]


def test_the_path_ends_at_the_final_evaluation_of_the_same_prompts(runs):
    points = record_of(runs[0])["trajectory"]
    assert [point["step"] for point in points] == [0, 2, 4, 6]
    assert points[0]["kl"] == points[0]["gold_gain"] == 0
    prompts = list(read(runs[0] / "examples.jsonl")["prompt"].values())[:COUNT]
    for name, column in {"kl": "kl", "gold": "gold", "length": "tokens"}.items():
        mean = sum(row[column] for row in prompts) / COUNT
        assert points[-1][name] == pytest.approx(mean, abs=1e-5)
    assert {"well_formed", "entropy", "distinct_2"} <= points[-1].keys()


def test_it_is_in_the_api_in_tensorboard_on_the_terminal_in_figures_and_on_the_page(runs):
    folder, points = runs[0], record_of(runs[0])["trajectory"]
    run = load_run(folder)
    assert run.trajectory.to_dict("records") == points
    assert load_run(runs[1]).trajectory.empty
    assert run.history["trajectory/kl"].dropna().tolist() == [point["kl"] for point in points]
    events = EventAccumulator(str(folder)).Reload()
    for name in ("kl", "gold_gain"):
        logged = [(each.step, each.value) for each in events.Scalars(f"trajectory/{name}")]
        assert logged == [(point["step"], pytest.approx(point[name], rel=1e-6)) for point in points]
    text = (folder / "terminal").read_text()
    assert all(f"step {point['step']}: gold {point['gold']:.3g}" in text for point in points)
    assert "trajectory" in record_of(folder)["seconds"]
    assert "trajectory.png" in [path.name for path in run.figures]
    text = page(gather([folder]), folder)
    assert "Trajectories, gold_gain" in text
    drawn = [point for point in points if point["kl"] >= LEAST_KL]
    assert drawn
    assert all(f"step {point['step']}: gold_gain {format_value(point['gold_gain'])}" in text for point in drawn)
    assert "Trajectories" not in page(gather([runs[1]]), folder)
