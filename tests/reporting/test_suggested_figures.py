"""The figures that a comparison of runs has where no study names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_lab.reporting.figures.arm_lines import lines_of, shared_axis, steps_along_axes
from dpo_lab.reporting.figures.comparison_figures import study_figures
from dpo_lab.reporting.figures.reward_kl import against
from dpo_lab.stats.estimates import Estimate
from dpo_lab.studies.run_data import RunData, RunSet
from dpo_lab.studies.spec import Arm

FOUND = {"kl": 2.0, "gold_gain": 0.7, "length": 20.0, "well_formed": 0.8}


def test_without_a_study_figures_are_along_settings_of_which_arms_differ_in_nothing_else(tmp_path):
    """A method's own settings differ between methods too, and say nothing of them."""
    estimates = {"kl": Estimate(1.0, n=1)}

    def panels(*arms: Arm) -> set[str]:
        runs = [RunData(Path("nowhere"), arm.name, 0, "done", record={}, metrics=estimates) for arm in arms]
        charts = study_figures(RunSet("t", tmp_path, [*arms], [0], runs), ["kl"], lambda arm: [])
        return {panel.xlabel for chart in charts for panel in chart.panels}

    grpo = Arm("method=grpo", axes={"method.prompts": 16, "method.samples": 4})
    dpo = Arm("method=online_dpo", axes={"method.prompts": 32, "method.samples": 2})
    assert not panels(grpo, dpo) & {"method.prompts", "method.samples"}
    more = Arm("method=grpo, method.samples=8", axes={"method.prompts": 16, "method.samples": 8})
    assert panels(grpo, dpo, more) == {"method.samples"}
    assert panels(Arm("default", axes={"beta": 0.1}), Arm("beta=0.5", axes={"beta": 0.5})) == {"beta"}


def test_arms_of_a_group_at_one_place_are_on_lines_of_their_own():
    def arm(group: str, **axes: float) -> Arm:
        return Arm(", ".join([group, *(f"{key}={value:g}" for key, value in axes.items())]), [], group, axes)

    of_two = [arm("A", rate=rate, beta=beta) for rate in (0.2, 0) for beta in (0.1, 0.3)]
    of_one = [arm("B", rate=rate, beta=0.1) for rate in (0.2, 0)]
    names = {name: [each.name for each in line] for name, line in lines_of([*of_two, *of_one], "rate").items()}
    assert names == {
        "A, beta=0.1": ["A, rate=0, beta=0.1", "A, rate=0.2, beta=0.1"],
        "A, beta=0.3": ["A, rate=0, beta=0.3", "A, rate=0.2, beta=0.3"],
        "B": ["B, rate=0, beta=0.1", "B, rate=0.2, beta=0.1"],
    }


def test_arms_without_an_axis_do_not_count_against_it():
    along = [Arm(f"dpo, beta={beta:g}", [], "dpo", {"beta": beta}) for beta in (0.1, 0.5, 2)]
    others = [Arm(name, [], name, {"lr": 1e-3}) for name in ("sft", "unlikelihood", "ranking")]
    assert steps_along_axes([*along, *others]) == {"beta": 2}
    assert shared_axis([*along, *others]) == "beta"
    assert steps_along_axes(others) == {}
    assert shared_axis(others) == ""


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_a_ratio_quantity_has_a_log_axis_against_another_metric_too(tmp_path, seeds):
    arm = Arm("dpo")
    runs = [
        RunData(
            Path("nowhere"),
            "dpo",
            seed,
            "done",
            record={},
            metrics={n: Estimate(v * (1 + seed / 10), n=9) for n, v in FOUND.items()},
        )
        for seed in seeds
    ]
    found = against(RunSet("t", tmp_path, [arm], seeds, runs), [arm], "gold_gain", ["kl", "length", "well_formed"])
    assert [(panel.x, panel.y) for panel in found.panels] == [
        ("linear", "log"),
        ("linear", "log"),
        ("linear", "linear"),
    ]
    found = against(RunSet("t", tmp_path, [arm], seeds, runs), [arm], "kl", ["gold_gain"])
    assert [(panel.x, panel.y) for panel in found.panels] == [("log", "linear")]
