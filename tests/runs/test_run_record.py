"""Run folders, caches and estimates: nothing is lost, nothing is overwritten, every interval is what it says."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from scipy import optimize, stats

from dpo_lab.distributed.signals import StopSignal
from dpo_lab.runs import atomic_write, fingerprint, redact, run_record
from dpo_lab.runs.cache import cached
from dpo_lab.stats.estimates import Estimate, exp_of_ratio, mean, rank_correlation, ratio, share, share_at_zero

CONFIG = {
    "beta": 0.1,
    "loss": {"kind": "dpo", "divergence": "reverse_kl", "divergence_alpha": 0.5, "ld_alpha": 1.0, "weighting": "none"},
    "data": {"num_workers": 0, "unpair": False},
    "trainer": {"max_steps": 160, "devices": 1},
    "if_exists": "error",
}


def hold(folder: Path, config: dict = CONFIG):
    return run_record.acquire_run(folder, config, ["beta=0.1"])


def finish(folder: Path, config: dict = CONFIG) -> None:
    with hold(folder, config) as run:
        assert run is not None
        run.update(metrics={"x": 1.0})


def record_in(folder: Path) -> dict:
    record = run_record.read_record(folder)
    assert record is not None
    return record


def checkpoint(folder: Path) -> None:
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "step=8.ckpt").write_bytes(b"x")


HOSTILE = ["../../etc/passwd", "a/b", "a\0b", "x" * 400, "a=[1,2]", 'a="b c"', "..", "a=${b}", "ü=é"]


@pytest.mark.parametrize("name", HOSTILE)
def test_slugs_are_one_folder_name(name, tmp_path):
    slug = run_record.slug(name)
    assert len(slug) <= 100
    assert (tmp_path / slug).resolve().parent == tmp_path
    (tmp_path / slug).mkdir()


def test_slugs_are_readable_and_do_not_collide():
    assert run_record.slug("+ablation=uniform_ref,beta=0.1") == "ablation=uniform_ref,beta=0.1"
    assert run_record.slug("") == "default"
    names = [*HOSTILE, "a_b", "a b", "x" * 401, "a=[1;2]", "beta=0.1", "beta=0.10"]
    assert len({run_record.slug(name) for name in names}) == len(names)


def test_a_run_is_running_until_it_is_done(tmp_path):
    with hold(tmp_path) as run:
        assert run is not None
        assert record_in(tmp_path)["status"] == "running"
        assert run_record.run_status(tmp_path, CONFIG) is run_record.RunStatus.new  # so far there is nothing to lose
    record = record_in(tmp_path)
    assert record["status"] == "done"
    assert record["overrides"] == ["beta=0.1"]
    assert run_record.run_status(tmp_path, CONFIG) is run_record.RunStatus.done


def test_a_finished_run_is_left_alone(tmp_path):
    finish(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    same = CONFIG | {
        "data": {"num_workers": 3, "unpair": False},
        "name": "volatile",
        "trainer": {"max_steps": 160, "devices": 2},
    }
    with hold(tmp_path, same | {"logger": {"csv": {}}, "callbacks": {"checkpoint": {"every_n_steps": 1}}}) as run:
        assert run is None
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("no luck\nat all"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (StopSignal(signal.SIGINT), "interrupted"),
        (StopSignal(signal.SIGTERM), "preempted"),
    ],
)
def test_an_unfinished_run_goes_on_from_what_it_left(error, status, tmp_path):
    with pytest.raises(type(error)), hold(tmp_path) as run:
        assert run is not None
        assert not run.resumes
        checkpoint(tmp_path)
        run.update(seconds={"prepare": 1.0}, step_zero_loss=0.69)
        raise error
    record = record_in(tmp_path)
    assert record["status"] == status
    assert record["error"] in ("ValueError: no luck", "KeyboardInterrupt:", "stopped by SIGINT", "stopped by SIGTERM")
    with hold(tmp_path) as run:
        assert run is not None
        assert run.resumes
        assert run.record["seconds"] == {"prepare": 1.0}
        assert run.record["attempts"][0]["status"] == status
    assert (tmp_path / "checkpoints" / "step=8.ckpt").exists()


def test_a_run_that_failed_before_its_first_checkpoint_starts_anew_whatever_its_config(tmp_path):
    with pytest.raises(ValueError, match="early"), hold(tmp_path):
        raise ValueError("early")
    with hold(tmp_path, CONFIG | {"beta": 0.5}) as run:
        assert run is not None
        assert not run.resumes
    record = record_in(tmp_path)
    assert record["config"]["beta"] == 0.5
    assert record["attempts"][0]["error"] == "ValueError: early"


@pytest.mark.parametrize("files", [{"run.json": "{"}, {"run.json": ""}])
def test_a_record_that_cannot_be_read_is_refused(files, tmp_path):
    (tmp_path / "run.json").write_text(files["run.json"])
    with pytest.raises(run_record.RunRefused, match=r"run.json: can't be read .* name=another"), hold(tmp_path):
        pytest.fail("entered")
    assert (tmp_path / "run.json").read_text() == files["run.json"]


def test_more_steps_are_more_of_the_same_run(tmp_path):
    finish(tmp_path)
    checkpoint(tmp_path)
    longer = CONFIG | {"trainer": {"max_steps": 320}}
    assert run_record.run_status(tmp_path, longer) is run_record.RunStatus.unfinished
    with hold(tmp_path, longer) as run:
        assert run is not None
        assert run.resumes
        assert "steps" not in run.record  # there is more to train
        run.update(steps=320, metrics={"x": 2.0})
    record = record_in(tmp_path)
    assert record["metrics"] == {"x": 2.0}
    assert record["attempts"][0]["max_steps"] == 160
    assert record["attempts"][0]["metrics"] == {"x": 1.0}  # what it had come to is kept
    with pytest.raises(run_record.RunRefused, match="trainer.max_steps: was 320, now 160"), hold(tmp_path):
        pytest.fail("entered")


def test_a_run_that_was_trained_to_its_end_is_not_trained_again(tmp_path):
    with pytest.raises(StopSignal), hold(tmp_path) as run:
        assert run is not None
        checkpoint(tmp_path)
        run.update(steps=120)  # it stopped early
        raise StopSignal(signal.SIGTERM)
    with hold(tmp_path) as run:
        assert run is not None
        assert run.record["steps"] == 120


def test_what_a_run_works_on_may_not_change(tmp_path):
    def start(config: dict, **identity: str) -> None:
        with hold(tmp_path, config) as run:
            assert run is not None
            run.check_inputs_unchanged(**identity)
            checkpoint(tmp_path)
            raise StopSignal(signal.SIGTERM)

    with pytest.raises(StopSignal):
        start(CONFIG, data="a", tokenizer="t")
    with pytest.raises(StopSignal):
        start(CONFIG, data="a", tokenizer="t")
    with pytest.raises(run_record.RunRefused, match=r"data was a, is b.*if_exists=restart"):
        start(CONFIG, data="b", tokenizer="t")
    assert record_in(tmp_path)["identity"] == {"data": "a", "tokenizer": "t"}
    with pytest.raises(StopSignal):
        start(CONFIG | {"if_exists": "restart"}, data="b", tokenizer="t")
    assert record_in(tmp_path)["identity"]["data"] == "b"
    assert record_in(tmp_path / "earlier-1")["identity"]["data"] == "a"
    assert (tmp_path / "earlier-1" / "checkpoints" / "step=8.ckpt").exists()


def test_a_restart_records_its_own_times_and_takes_a_new_number(tmp_path, monkeypatch):
    for hour, data in enumerate("abc"):
        monkeypatch.setattr(run_record, "now", lambda hour=hour: f"2026-01-01T0{hour}:00:00+00:00")
        with pytest.raises(StopSignal), hold(tmp_path, CONFIG | {"if_exists": "restart"}) as run:
            assert run is not None
            run.check_inputs_unchanged(data=data)
            assert not {"seconds", "steps"} & run.record.keys()
            run.update(seconds={"train": {"wall": 1.0, "cpu": 1.0}}, steps=160)
            checkpoint(tmp_path)
            raise StopSignal(signal.SIGTERM)
        assert record_in(tmp_path)["started"] == f"2026-01-01T0{hour}:00:00+00:00"
        (tmp_path / "earlier-7").mkdir(exist_ok=True)  # others were deleted
    assert record_in(tmp_path / "earlier-9")["identity"] == {"data": "b"}


def test_closing_names_the_true_error_and_never_undoes_a_finished_run(tmp_path):
    with pytest.raises(RuntimeError), hold(tmp_path):
        raise RuntimeError("Connection closed by peer")
    run_record.mark_ended(tmp_path, "failed", "rank 1: ValueError: boom")
    assert record_in(tmp_path)["error"] == "rank 1: ValueError: boom"
    finish(tmp_path)
    run_record.mark_ended(tmp_path, "failed", "late")
    assert record_in(tmp_path)["status"] == "done"


def test_a_folder_that_another_process_writes_is_refused(tmp_path):
    held = str(tmp_path / ".lock")
    code = (
        f"from filelock import FileLock; lock = FileLock({held!r}); lock.acquire(); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(run_record.RunRefused, match="another process"), hold(tmp_path):
            pytest.fail("entered")
        other.communicate("\n")
    finish(tmp_path)


def test_a_record_is_committed_whole(tmp_path):
    with pytest.raises(ValueError, match="JSON"), hold(tmp_path) as run:
        assert run is not None
        run.update(metrics={"x": math.nan})
    record = json.loads((tmp_path / "run.json").read_text())  # still whole
    assert record["status"] in ("running", "failed")


def test_what_a_killed_write_left_of_the_record_goes_and_nothing_else(tmp_path):
    kept = [".run.json.4711.bak", ".run.json.swp", "run.json.12", ".examples.jsonl.12"]
    for name in (*kept, ".run.json.4711"):
        (tmp_path / name).touch()
    with run_record.acquire_run(tmp_path, CONFIG, []):
        assert not (tmp_path / ".run.json.4711").exists()
    assert {*kept} < {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EACCES])
def test_a_file_that_the_disk_does_not_take_leaves_the_old_one_and_is_named(number, tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    atomic_write.write_atomic(path, "old")

    def fsync(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
        atomic_write.write_atomic(path, "new")
    said = atomic_write.explain_disk_error(caught.value)
    assert said is not None
    assert said.startswith(f"{path}: {os.strerror(number)}; ")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("run.json", "old")]


def test_the_trouble_of_a_disk_is_told_by_what_libraries_say_of_it_too():
    said = atomic_write.explain_disk_error(
        RuntimeError("Error while serializing: I/O error: No space left (os error 28)")
    )
    assert said == (
        "a file: No space left on device; what was written before is intact: make room, then type the same command again"
    )
    assert atomic_write.explain_disk_error(FileNotFoundError(errno.ENOENT, "No such file", "a")) is None
    assert atomic_write.explain_disk_error(PermissionError(errno.EACCES, "Permission denied")) is None  # of a port, say
    assert atomic_write.explain_disk_error(ValueError("28")) is None


def test_a_run_that_fails_where_no_record_can_be_written_says_what_it_failed_of(tmp_path, monkeypatch):
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(ValueError, match="the true error"), run_record.acquire_run(tmp_path, CONFIG, []):
        monkeypatch.setattr(run_record, "write_atomic", full)
        raise ValueError("the true error")
    assert run_record.read_record(tmp_path)["status"] == "running"


def test_secrets_in_overrides_are_redacted():
    overrides = ["beta=0.1", "+logger.wandb.api_key=abc=", "data.path=token", "--x"]
    assert [redact.redact_override(o) for o in overrides] == [
        "beta=0.1",
        "+logger.wandb.api_key=<redacted>",
        "data.path=token",
        "--x",
    ]


def test_secrets_are_redacted_at_any_depth():
    config = {
        "api_key": "s",
        "logger": {"wandb": {"WANDB_API_KEY": "s", "project": "p"}},
        "list": [{"password": "s"}],
        "token": None,
    }
    assert redact.redact(config) == {
        "api_key": "<redacted>",
        "logger": {"wandb": {"WANDB_API_KEY": "<redacted>", "project": "p"}},
        "list": [{"password": "<redacted>"}],
        "token": None,
    }


def test_difference_is_by_dotted_key():
    was, now = {"a": {"b": 1, "c": 2}, "name": "x"}, {"a": {"b": 1, "c": 3, "d": 4}, "name": "y"}
    assert fingerprint.difference(was, now) == {"a.c": (2, 3), "a.d": (None, 4)}


def test_once_makes_a_file_once_and_anew_when_it_is_not_what_was_put_there(tmp_path, caplog):
    made = []

    def make(path: Path) -> None:
        made.append(1)
        path.write_text(f"version {len(made)}")

    path = tmp_path / "deep" / "file"
    assert cached(path, make).read_text() == "version 1"
    assert cached(path, make).read_text() == "version 1"
    path.write_text("another")
    (path.parent / f".{path.name}.4711").mkdir()  # left by a process that was killed
    assert cached(path, make).read_text() == "version 2"
    assert "does not match its checksum: it is created again" in caplog.text
    (path.parent / f".{path.name}.seal").unlink()
    assert cached(path, make).read_text() == "version 3"
    assert sorted(p.name for p in path.parent.iterdir()) == [".file.seal", "file", "file.lock"]


def test_once_leaves_nothing_of_a_failure(tmp_path):
    def fail(path: Path) -> None:
        path.mkdir()
        (path / "half").write_text("x")
        raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        cached(tmp_path / "folder", fail)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


def test_once_waits_for_another_process(tmp_path):
    """The other process holds the lock and makes the file; this one must not make it again."""
    code = (
        "import sys; from pathlib import Path; from dpo_lab.runs.cache import cached\n"
        "def make(path): print('making', flush=True); input(); path.write_text('theirs')\n"
        "cached(Path(sys.argv[1]), make)"
    )
    path = tmp_path / "file"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "making\n"
        with pytest.raises(TimeoutError):
            FileLock(f"{path}.lock", timeout=0).acquire()
        other.stdin.write("\n")
        other.stdin.close()
        assert cached(path, lambda p: pytest.fail("made twice")).read_text() == "theirs"


def test_mean_against_scipy():
    values = [1.0, 2.0, 4.0, 4.5]
    estimate = mean(values)
    assert estimate.value == pytest.approx(2.875)
    assert estimate.se == pytest.approx(stats.sem(values))
    assert estimate.interval == pytest.approx(stats.t.interval(0.95, 3, 2.875, stats.sem(values)))
    assert Estimate.from_record(json.loads(json.dumps(estimate.as_record()))) == estimate


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0, 2.0]])
def test_no_spread_no_interval(values):
    assert mean(values).interval is None
    assert mean(values).se is None


@pytest.mark.parametrize(("yes", "n"), [(7, 10), (0, 10), (10, 10), (39, 100)])
def test_share_against_scipys_wilson(yes, n):
    expected = stats.binomtest(yes, n).proportion_ci(method="wilson")
    assert share([1] * yes + [0] * (n - yes)).interval == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_share_takes_ties_and_nothing_else():
    assert share([1, 0.5, 0, 0.5]).value == 0.5
    with pytest.raises(ValueError, match="not between"):
        share([3.0, 2.0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_metric_raises(value):
    with pytest.raises(ValueError, match="broken"):
        Estimate(value)
    with pytest.raises(ValueError, match="broken"):
        mean([1.0, value])


def test_exp_of_ratio_by_hand():
    """6 nats over 5 tokens; residuals .8 and -.8, so the ratio's error is sqrt(2 (.8^2 + .8^2)) / 5 = .32."""
    estimate = exp_of_ratio([2, 4], [1, 4])
    assert estimate.value == pytest.approx(math.exp(1.2))
    assert estimate.se == pytest.approx(0.32 * math.exp(1.2))
    assert exp_of_ratio([1, 2], [1, 2]) == Estimate(math.e, n=2)  # no spread, no error


def test_ratio_is_what_exp_of_ratio_raises():
    plain, raised = ratio([2, 4], [1, 4]), exp_of_ratio([2, 4], [1, 4])
    assert plain.value == pytest.approx(6 / 5)
    assert plain.n == 2
    assert raised.interval == pytest.approx(tuple(map(math.exp, plain.interval)))


def test_exp_of_ratio_over_equal_counts_is_exp_of_the_mean():
    values = [1.5, 2.0, 3.25, 0.5]
    ratio, plain = exp_of_ratio([3 * v for v in values], [3] * 4), mean(values)
    assert math.log(ratio.value) == pytest.approx(plain.value)
    assert ratio.se == pytest.approx(plain.se * ratio.value)
    assert [math.log(end) for end in ratio.interval] == pytest.approx(plain.interval)


def test_an_empty_mean_is_refused():
    with pytest.raises(ValueError, match="no examples"):
        mean([])


def record(reference: str, beta: float, gain: float, status: str = "done", rate: float = 0.0) -> dict:
    metrics = {"gold_gain": gain, "kl": 2.0, "well_formed": 0.6, "initial/well_formed": 0.8, "perplexity": 6.0}
    metrics |= {"initial/perplexity": 5.0, "true_accuracy": 0.7}
    config = {"reference": {"kind": reference}, "beta": beta, "noise": {"rate": rate}}
    return {"status": status, "config": config, "metrics": {name: {"value": v} for name, v in metrics.items()}}


def test_ties_narrow_a_share_as_much_as_they_narrow_its_error():
    """300 wins, 100 losses and 400 ties: the normal interval, which holds for so many."""
    estimate = share([1] * 300 + [0] * 100 + [0.5] * 400)
    assert estimate.se is not None
    assert estimate.interval == pytest.approx(
        (estimate.value - 1.96 * estimate.se, estimate.value + 1.96 * estimate.se), abs=0.002
    )
    assert share([0.5] * 40).interval == share([1] * 20 + [0] * 20).interval  # no spread says how much


def wins(count: int, at_zero: float, slope: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Wins whose log-odds are a line in `at`."""
    rng = np.random.default_rng(seed)
    at = rng.normal(2.0, 3.0, count)
    p = 1 / (1 + np.exp(-(np.log(at_zero / (1 - at_zero)) + slope * at)))
    return (rng.random(count) < p).astype(float), at


def test_the_share_at_zero_is_that_of_the_likeliest_logistic_curve():
    values, at = wins(400, 0.4, 0.3, seed=1)

    def unlikelihood(weights):
        logits = weights[0] + weights[1] * at
        return np.sum(np.logaddexp(0, logits) - values * logits)

    best = optimize.minimize(unlikelihood, [0.0, 0.0], tol=1e-10).x
    found = share_at_zero(values, at)
    assert found is not None
    assert found.value == pytest.approx(1 / (1 + np.exp(-best[0])), abs=1e-5)
    assert abs(found.value - values.mean()) > 0.08  # length had its share in the wins


def test_the_share_at_zero_covers_what_it_says():
    found = [share_at_zero(*wins(300, 0.4, 0.3, seed)) for seed in range(300)]
    covered = np.mean([each is not None and each.interval[0] <= 0.4 <= each.interval[1] for each in found])
    assert 0.92 <= covered <= 0.98


@pytest.mark.parametrize(
    ("values", "at"),
    [
        ([1, 0] * 10, [3] * 20),  # all of one length
        ([1] * 20, range(20)),  # always won
        ([0] * 10 + [1] * 10, range(20)),  # the longer always wins
        ([1, 0, 1], [1, 2, 3]),
    ],
)
def test_a_share_at_zero_that_is_not_determined_is_left_out(values, at):
    assert share_at_zero(np.array(values, float), np.array(at, float)) is None


def test_rank_correlation_by_hand():
    found = rank_correlation(np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 4, 3, 9]))
    assert found is not None
    assert found.value == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert rank_correlation(np.ones(9), np.arange(9.0)) is None
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        one = rng.normal(size=100)
        found = rank_correlation(one, one + rng.normal(size=100))
        assert found is not None
        assert found.interval is not None
        covered += found.interval[0] <= 6 / np.pi * np.arcsin(0.5**0.5 / 2) <= found.interval[1]  # of a normal pair
    assert 0.92 <= covered / 300 <= 0.98
