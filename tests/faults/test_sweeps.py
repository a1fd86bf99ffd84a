"""Faults 33 to 35 of the matrix: sweeps that meet each other, jobs that end badly, a driver that is killed."""

from __future__ import annotations

import pytest

from tests.support.processes import patience
from tests.support.sweeping import (
    behaves,
    contents,
    is_alive,
    record,
    said,
    started,
    starts,
    statuses,
    sweep,
    told,
    until,
)

pytestmark = pytest.mark.slow


def test_33_a_second_sweep_in_the_folder_is_refused_and_changes_no_byte(tmp_path):
    behaves(tmp_path, beta_0="waits")
    with started(tmp_path, "beta=0.1,0.2") as first:
        until(lambda: "waiting" in said(tmp_path, "beta=0.1/seed=0"))
        before = contents(tmp_path / "outputs" / "dpo")
        second = sweep(tmp_path, "beta=0.2")
        assert second.returncode == 2
        assert second.stderr.splitlines() == [
            "error: outputs/dpo: another sweep is at work here; wait for it, or type name=another"
        ]
        assert contents(tmp_path / "outputs" / "dpo") == before
        (tmp_path / "go").touch()
        assert first.wait(patience(60)) == 0
    assert statuses(tmp_path) == ["done", "done"]


def test_34_jobs_that_raise_or_are_killed_or_exit_0_early_fail_alone_and_are_named(tmp_path):
    behaves(tmp_path, **{"beta_0.1/": "fails", "beta_0.2/": "killed", "beta_0.3/": "leaves"})
    result = sweep(tmp_path, "beta=0.1,0.2,0.3,0.4")
    assert result.returncode == 1
    assert statuses(tmp_path) == ["failed", "failed", "failed", "done"]
    errors = ["ValueError: the loss is not finite", "killed by SIGKILL", "ended without a result"]
    for job, error in zip(told(tmp_path)["jobs"], errors, strict=False):
        assert job["error"] == error
        assert f"{job['overrides'][0]}: {error}\n  {job['log']}\n" in result.stdout
        assert (tmp_path / job["log"]).exists()
    assert "4 jobs: 3 failed, 1 done." in result.stdout
    behaves(tmp_path)
    again = sweep(tmp_path, "beta=0.1,0.2,0.3,0.4")
    assert again.returncode == 0
    assert "4 jobs: 3 resumed, 1 skipped." in again.stdout
    assert len(starts(tmp_path)) == 7


def test_34_a_job_whose_folder_is_taken_fails_with_that_error(tmp_path):
    behaves(tmp_path, beta_0="waits")
    with started(tmp_path, "beta=0.1"):
        until(lambda: "waiting" in said(tmp_path, "beta=0.1/seed=0"))
        (tmp_path / "outputs/dpo/.sweep/lock").unlink()  # or the second sweep would not come so far
        second = sweep(tmp_path, "beta=0.1")
    assert second.returncode == 1
    assert "beta=0.1: outputs/dpo/beta=0.1/seed=0 is being written by another process" in second.stdout


def test_35_after_the_driver_was_killed_what_is_done_is_kept_and_the_rest_resumes(tmp_path):
    behaves(tmp_path, **{"beta_0.2/": "waits"})
    with started(tmp_path, "beta=0.1,0.2,0.3") as driver:
        until(lambda: "waiting" in said(tmp_path, "beta=0.2/seed=0"))
        driver.kill()
        until(lambda: not is_alive(starts(tmp_path)[1]["pid"]), 10)
    assert record(tmp_path, "beta=0.2/seed=0")["status"] == "preempted"
    assert (tmp_path / "outputs/dpo/.sweep/lock").exists()  # stale
    done = contents(tmp_path / "outputs/dpo/beta=0.1")
    (tmp_path / "go").touch()
    result = sweep(tmp_path, "beta=0.1,0.2,0.3")
    assert result.returncode == 0
    assert "3 jobs: 1 skipped, 1 resumed, 1 done." in result.stdout
    assert contents(tmp_path / "outputs/dpo/beta=0.1") == done
    assert [s["argv"][2] for s in starts(tmp_path)] == ["beta=0.1", "beta=0.2", "beta=0.2", "beta=0.3"]
