"""Faults 7 and 9 of the matrix: ranks that are asked to stop, fail or are killed. Each test bears its row's number."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from dpo_lab.distributed import supervisor
from dpo_lab.distributed.launcher import ExitStatus, run_ranks
from tests.support.ranks import REPOSITORY
from tests.support.supervised import RANK, Group, Post, has_ended

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("asked", ["supervisor", "0", "1", "0 1", "supervisor 0 1"])
def test_07_sigterm_to_the_supervisor_or_to_any_rank_ends_all_with_143(asked, tmp_path):
    with Group(tmp_path / "run", "agrees", "agrees") as group:
        for one in asked.split():
            os.kill(group.supervisor.pid if one == "supervisor" else group.pids[int(one)], signal.SIGTERM)
        code, output, errors = group.gone()
    assert code == 143
    assert "Traceback" not in errors
    if "supervisor" not in asked:
        ended = json.loads(output)
        assert ended["error"] == f"rank {ended['failed_rank']} was asked to stop by SIGTERM"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_07_ranks_that_save_are_waited_for_and_asked_once(signum, code, tmp_path):
    with Group(tmp_path / "run", "saves", "saves") as group:
        group.supervisor.send_signal(signum)
        group.supervisor.send_signal(signum)  # as `timeout` does: to the process, then to its group
        assert {(r["rank"], r["signum"]) for r in (group.post.next("asked"), group.post.next("asked"))} == {
            (0, signum),
            (1, signum),
        }
        group.go(0)
        assert group.post.next("saved")["rank"] == 0
        assert group.supervisor.poll() is None
        group.go(1)
        assert group.post.next("saved")["rank"] == 1  # a second SIGINT would have ended it before
        assert group.gone()[0] == code


def test_07_a_second_signal_kills_ranks_that_are_stuck(tmp_path):
    with Group(tmp_path / "run", "is_stuck", "is_stuck") as group:
        watched = os.pidfd_open(group.supervisor.pid)
        group.supervisor.send_signal(signal.SIGTERM)
        assert {group.post.next("asked")["rank"] for _ in range(2)} == {0, 1}
        for _ in range(50):
            if has_ended(watched, 0.1):
                break
            group.supervisor.send_signal(signal.SIGTERM)
        os.close(watched)
        code, _, errors = group.gone(5)
    assert code == 143
    assert "rank 1 had not ended when it was asked to stop, and was killed" in errors


def test_07_ranks_that_are_stuck_are_killed_after_the_grace(tmp_path):
    with Group(tmp_path / "run", "is_stuck", "agrees", grace=0.5) as group:
        group.supervisor.send_signal(signal.SIGTERM)
        code, _, errors = group.gone()
    assert code == 143
    assert errors == "rank 0 had not ended when it was asked to stop, and was killed\n"


def test_07_a_rank_that_stops_alone_takes_the_stuck_one_with_it(tmp_path, monkeypatch):
    """As one that is asked to stop while the other waits for it at the start."""
    assert supervisor.TERM_TO_KILL_S < 10
    monkeypatch.setattr(supervisor, "TERM_TO_KILL_S", 0.6)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    post, stuck = Post("alone"), []

    def begin(self: supervisor.RepeatableStopRequest) -> None:
        """In the supervisor, before it looks at its ranks for the first time: both are there."""
        for _ in range(2):
            report = post.next("ready")
            stuck.append(os.pidfd_open(report["child"]))
            if report["rank"] == 1:
                os.kill(report["pid"], signal.SIGUSR1)

    supervise = supervisor.supervise
    monkeypatch.setattr(
        "dpo_lab.distributed.launcher.supervise",
        lambda ranks, asked, grace: (begin(asked), supervise(ranks, asked, grace)),
    )
    command = [sys.executable, "-c", RANK, post.name, "is_stuck", "is_stopped"]
    ended = run_ranks(command, 2, folder=tmp_path, cwd=tmp_path)
    assert ended == ExitStatus(143, 1, "rank 1 was asked to stop by SIGTERM")
    assert post.next("asked")["rank"] == 0
    post.socket.close()
    for child in stuck:
        assert has_ended(child, 5)
        os.close(child)


def test_07_of_one_that_stops_alone_the_others_lost_connection_is_not_the_cause(tmp_path):
    """It takes long over it, and the other one fails and ends before."""
    with Group(tmp_path / "run", "takes_long_to_stop", "tells_and_ends") as group:
        os.kill(group.pids[0], signal.SIGTERM)
        group.post.next("stopping")
        group.go(1)
        code, output, _ = group.gone()
    assert code == 143
    assert json.loads(output) == {"code": 143, "failed_rank": 0, "error": "rank 0: stopped by SIGTERM"}


def test_07_what_fails_while_it_stops_is_shown(tmp_path):
    with Group(tmp_path / "run", "agrees", "fails_to_save") as group:
        group.supervisor.send_signal(signal.SIGTERM)
        code, _, errors = group.gone()
    assert code == 143
    assert "rank 1: OSError: no space left; its log: " in errors


def test_09_a_rank_that_raises_ends_a_stuck_one_and_its_traceback_is_shown(tmp_path):
    with Group(tmp_path / "run", "is_stuck", "raises") as group:
        group.go(1)
        code, output, errors = group.gone()
    assert code == 1
    assert json.loads(output) == {"code": 1, "failed_rank": 1, "error": "rank 1: ValueError: boom"}
    lines = errors.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "OSError: the cause" in lines
    assert lines[-2:] == ["second line", f"rank 1: ValueError: boom; its log: {group.folder}/rank-1.log"]


@pytest.mark.parametrize(("failed_rank", "other"), [(0, "is_stuck"), (1, "waits")])
def test_09_a_killed_rank_ends_the_other(failed_rank, other, tmp_path):
    with Group(tmp_path / "run", *(["waits", other] if failed_rank == 0 else [other, "waits"])) as group:
        os.kill(group.pids[failed_rank], signal.SIGKILL)
        code, output, _ = group.gone()
    assert code == 137
    assert json.loads(output)["error"] == f"rank {failed_rank} was killed by SIGKILL"


def test_09_a_rank_that_leaves_early_ends_the_others(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/rank-1.log").write_text(
        "Traceback (most recent call last):\n  ...\nValueError: of an earlier start\n"
    )
    with Group(tmp_path / "run", "waits", "leaves") as group:
        group.go(1)
        code, output, _ = group.gone()
    assert code == 3
    assert json.loads(output) == {"code": 3, "failed_rank": 1, "error": "rank 1 ended with exit code 3"}


def test_09_the_first_to_report_is_named_however_long_it_cleans_up(tmp_path):
    with Group(tmp_path / "run", "leaves", "tells") as group:
        group.go(1)
        group.post.next("told")
        group.go(0)
        code, output, _ = group.gone()
    assert code == 1
    assert json.loads(output) == {"code": 1, "failed_rank": 1, "error": "rank 1: ValueError: boom"}
    assert sorted(path.name for path in Path(group.folder).iterdir()) == ["rank-1.log"]


def test_09_a_killed_supervisor_leaves_no_rank(tmp_path):
    with Group(tmp_path / "run", "waits", "is_stuck") as group:
        group.supervisor.kill()
        for watched, pid in list(group.watched.items())[:2]:
            assert has_ended(watched, 10), f"rank {pid} is left"
