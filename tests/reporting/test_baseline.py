"""The baseline of a report that nobody named: the arm of default settings, and what the report says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_lab import report
from dpo_lab.config.default_settings import default_settings
from tests.studies.test_load import write_run


def sweep(folder: Path, *arms: str) -> Path:
    for n, arm in enumerate(arms):
        for seed in (0, 1):
            overrides = [*arm.split(), "trainer.max_steps=100", "if_exists=error", f"seed={seed}"]
            write_run(folder / f"sweep/{n}/seed={seed}", overrides, {"kl": n + 0.1 * seed})
    return folder / "sweep"


@pytest.mark.parametrize(
    ("arms", "baseline", "reason"),
    [
        (["beta=0.3", "beta=0.1", "beta=1.0"], "beta=0.1", "the arm of default settings"),
        (["beta=0.3 optim.lr=0.2", "beta=0.1 optim.lr=0.2"], "beta=0.1", "the arm of default settings"),
        (["+ablation=none", "beta=0.3"], "ablation=none", "the arm without an intervention"),
        (["optim.lr=0.2", "optim.lr=0.0003"], "optim.lr=0.0003", "the arm of default settings"),
    ],
)
def test_the_arm_of_default_settings_is_the_baseline_and_the_report_says_so(arms, baseline, reason, tmp_path, capsys):
    folder = sweep(tmp_path, *arms)
    assert report.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert f"baseline: {baseline} ({reason}; type --baseline ARM for another); paired by seed" in printed
    shared = "optim.lr=0.2 trainer.max_steps=100" if "optim.lr=0.2" in arms[1] else "trainer.max_steps=100"
    assert f"all runs: {shared}\n" in printed
    page = (folder / "report.html").read_text()
    assert f"{baseline} ({reason}; type --baseline ARM for another)" in page
    assert report.main([str(folder), "--markdown"]) == 0
    assert f"Baseline: {baseline} ({reason}" in capsys.readouterr().out


def test_where_no_arm_has_the_default_settings_there_is_no_baseline_until_one_is_typed(tmp_path, capsys):
    folder = sweep(tmp_path, "beta=0.3", "beta=1.0")
    assert report.main([str(folder)]) == 0
    assert "baseline: none; type --baseline ARM\n" in capsys.readouterr().out
    assert report.main([str(folder), "--baseline", "beta=0.3"]) == 0
    assert "baseline: beta=0.3; paired by seed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value"), [("beta", 0.1), ("sft.text_column", None), ("reward_model.centring", 0.01), ("noise.kind", "?")]
)
def test_defaults_are_those_of_the_command_that_records_such_settings(key, value):
    found = default_settings({key: value})
    assert (key in found) == (value != "?")
    assert ("beta" in found) == (key == "beta")
