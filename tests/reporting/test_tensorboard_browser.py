"""TensorBoard over a finished sweep of three runs, one of which crashed: what it answers, and what a browser shows of it."""

from __future__ import annotations

import json
import re
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image
from omegaconf import OmegaConf

from tests.conftest import REPOSITORY, SMALL, python_m
from tests.support.browser import MISSING, asked, chromium, page, tensorboard
from tests.support.sweeping import until

pytestmark = [
    pytest.mark.browser,
    pytest.mark.extended,  # in make test: what a run writes for TensorBoard, in tests/cli and tests/training
]

SCREENSHOTS = REPOSITORY / "outputs" / "screenshots"  # to be looked at; none of it is committed
JOBS = {"uniform": "reference: uniform", "noisy": "noise: symmetric", "crash": "loss: dpo"}
SETTINGS = {"uniform": "beta=0.2", "noisy": "noise.rate=0.25", "crash": "optim.lr=1e30"}
SHOWN = ["trainer.log_every_n_steps=1", "figures=true"]
RUNS = {f"desk/ablation={job}/seed=0" for job in JOBS}
ANY = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]


@pytest.fixture(scope="module")
def browser():
    with chromium():
        yield


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A real sweep, and its outputs."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "mine" / "ablation").mkdir(parents=True)
    for job, choice in JOBS.items():
        settings = OmegaConf.to_yaml(OmegaConf.from_dotlist([*SMALL, *SHOWN, SETTINGS[job]]))
        head = f"# @package _global_\ndefaults:\n  - override /{choice}\n  - _self_\n"
        (folder / "mine" / "ablation" / f"{job}.yaml").write_text(head + settings)
    jobs = f"+ablation={','.join(JOBS)}"
    result = python_m("dpo_lab.train", "--config-dir", "mine", "--multirun", "name=desk", jobs, cwd=folder)
    return result, folder / "outputs"


@pytest.fixture(scope="module")
def logdir(swept) -> Path:
    return swept[1]


@pytest.fixture(scope="module")
def desk(logdir):
    with tensorboard(logdir) as address:
        yield address


@pytest.fixture(scope="module")
def columns(desk) -> dict[str, Any]:
    return asked(f"{desk}/data/plugin/hparams/experiment", {"experimentName": ""})


def test_each_job_is_a_run_and_a_failing_one_fails_the_sweep_and_no_other(swept):
    result, outputs = swept
    assert result.returncode == 1, result.stdout + result.stderr
    assert "3 jobs: 2 done, 1 failed" in result.stdout
    assert "is not finite" in result.stdout
    records = {run: json.loads((outputs / run / "run.json").read_text()) for run in RUNS}
    crash, noisy, uniform = (records[run] for run in sorted(RUNS))
    assert [record["status"] for record in (crash, noisy, uniform)] == ["failed", "done", "done"]
    assert (uniform["config"]["beta"], uniform["config"]["reference"]["kind"]) == (0.2, "uniform")
    assert (noisy["config"]["beta"], noisy["config"]["noise"]["rate"]) == (0.1, 0.25)
    assert noisy["initial_policy"] == uniform["initial_policy"]
    assert noisy["data"]["flipped by label noise"] > 0
    assert uniform["data"]["flipped by label noise"] == 0


def test_a_sweep_is_its_runs_and_nothing_else(desk):
    assert set(asked(f"{desk}/data/runs")) == RUNS


def test_hparams_has_a_column_for_whatever_varies(columns):
    infos = {info["name"]: info for info in columns["hparamInfos"]}
    assert {name for name, info in infos.items() if info["differs"]} == {
        "beta",
        "reference.kind",
        "noise.rate",
        "optim.lr",
    }
    types = {name: infos[name]["type"] for name in ("beta", "reference.kind", "data.as_chat", "reference.over")}
    assert types == {
        "beta": "DATA_TYPE_FLOAT64",
        "reference.kind": "DATA_TYPE_STRING",
        "data.as_chat": "DATA_TYPE_BOOL",
        "reference.over": "DATA_TYPE_STRING",  # of one run alone
    }
    names = {info["name"]["tag"] for info in columns["metricInfos"]}
    assert {"train-end/kl", "train-end/accuracy", "val/rewards/margins", "train/loss"} <= names


def test_hparams_has_a_row_for_each_run_and_one_of_them_failed(desk, columns):
    metrics = [{"metric": info["name"]} for info in columns["metricInfos"]]
    wanted = {"experimentName": "", "allowedStatuses": ANY, "colParams": metrics, "startIndex": 0, "sliceSize": 99}
    groups = asked(f"{desk}/data/plugin/hparams/session_groups", wanted)["sessionGroups"]
    rows = {group["name"]: group for group in groups}
    assert {name: [s["status"] for s in row["sessions"]] for name, row in rows.items()} == {
        "desk/ablation=uniform/seed=0": ["STATUS_SUCCESS"],
        "desk/ablation=noisy/seed=0": ["STATUS_SUCCESS"],
        "desk/ablation=crash/seed=0": ["STATUS_FAILURE"],
    }
    measured = {name: {m["name"]["tag"] for m in row["metricValues"]} for name, row in rows.items()}
    assert {name for name, seen in measured.items() if "train-end/kl" in seen} == {
        "desk/ablation=uniform/seed=0",
        "desk/ablation=noisy/seed=0",
    }
    assert "train/loss" in measured["desk/ablation=crash/seed=0"]  # what it saw before it crashed
    assert rows["desk/ablation=noisy/seed=0"]["hparams"]["noise.rate"] == 0.25
    assert rows["desk/ablation=uniform/seed=0"]["hparams"]["reference.kind"] == "uniform"


def test_charts_histograms_and_samples_are_there(desk):
    layout = asked(f"{desk}/data/plugin/custom_scalars/layout")
    charts = {
        f"{group['title']}/{chart['title']}": chart["multiline"]["tag"]
        for group in layout["category"]
        for chart in group["chart"]
    }
    assert charts["rewards/held out: chosen and rejected"] == ["val/rewards/chosen$", "val/rewards/rejected$"]
    assert charts["logps/training: chosen and rejected"] == ["train/logps/chosen$", "train/logps/rejected$"]
    assert {place.split("/")[0] for place in charts} == {"loss", "rewards", "logps", "margins", "accuracies"}
    run = "desk/ablation=noisy/seed=0"
    assert set(asked(f"{desk}/data/plugin/histograms/tags")[run]) == {"val/margins"}
    drawn = asked(f"{desk}/data/plugin/histograms/histograms?run={run}&tag=val/margins")
    assert [step for _, step, _ in drawn] == [3, 6]
    assert {"samples/text_summary", "health/text_summary"} <= set(asked(f"{desk}/data/plugin/text/tags")[run])
    assert {"curves", "margins"} <= {tag.split("/")[-1] for tag in asked(f"{desk}/data/plugin/images/tags")[run]}


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.usefixtures("browser")
def test_a_browser_shows_the_table_and_one_failure_in_it(desk):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with page() as shown:
        shown.goto(f"{desk}/#hparams")
        cells = shown.locator("tf-hparams-table-view vaadin-grid-cell-content:visible")
        names = cells.filter(has_text="desk/ablation=")
        names.nth(2).wait_for()
        assert {name.strip() for name in names.all_inner_texts()} == RUNS
        texts = [text.strip() for text in cells.all_inner_texts()]
        assert {"beta", "noise.rate", "optim.lr", "reference.kind", "train-end/accuracy"} <= set(texts)
        assert {"0.20000", "0.25000", "1.0000e+30", "uniform"} <= set(texts)
        shown.screenshot(path=SCREENSHOTS / "hparams.png")
        shown.locator("tf-hparams-query-pane paper-checkbox").filter(has_text="Success").click()
        names.nth(1).wait_for(state="hidden")
        assert [name.strip() for name in names.all_inner_texts()] == ["desk/ablation=crash/seed=0"]
        shown.screenshot(path=SCREENSHOTS / "failed.png")


def coloured(png: bytes) -> int:
    """How many pixels of a picture are neither grey nor nearly so."""
    pixels = image.imread(BytesIO(png))[..., :3]
    return int((pixels.max(-1) - pixels.min(-1) > 0.3).sum())


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.usefixtures("browser")
def test_a_browser_overlays_the_runs_by_name(desk):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with page() as shown:
        shown.goto(f"{desk}/#timeseries")
        groups = shown.locator(".group-title")
        groups.get_by_text("val", exact=True).wait_for()
        titles = [title.strip() for title in groups.all_inner_texts()]
        assert titles.index("train") < titles.index("train-end")  # behind the curves of training, single dots
        shown.get_by_role("combobox", name="Filter tags (regex)").fill("^train/loss$")
        card = shown.locator("card-view").filter(has=shown.locator("scalar-card")).first
        for run in RUNS:
            card.get_by_text(re.compile(re.escape(run))).wait_for()
        shown.keyboard.press("Escape")
        until(lambda: coloured(card.locator("line-chart").screenshot()) > 100)
        shown.screenshot(path=SCREENSHOTS / "scalars.png")
        shown.goto(f"{desk}/#custom_scalars")
        shown.get_by_text("held out: chosen and rejected").first.wait_for()
        shown.screenshot(path=SCREENSHOTS / "charts.png")
