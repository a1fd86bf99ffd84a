"""Progress: a bar that fits its terminal, one plain line elsewhere, tokens a second and memory that are what they say."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch

from dpo_lab.evals.evaluators.base import EVALUATORS
from dpo_lab.evals.held_out import LABELS
from dpo_lab.reporting.run_summary import cost_rows, print_summary
from dpo_lab.stats.estimates import Estimate
from dpo_lab.terminal import progress
from dpo_lab.training.callbacks.progress_bar import ProgressBar
from dpo_lab.training.callbacks.throughput import Throughput, throughput
from dpo_lab.training.memory import STATUS, peak_memory, resident_peak
from tests.conftest import SMALL
from tests.support.fits import BATCH, initial_policy, make_data, make_module, make_trainer
from tests.support.terminal import COLOUR, in_pipe, on_terminal
from tests.support.warm import Warm

pytestmark = pytest.mark.slow

QUIET = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore::FutureWarning:lightning")

STAGE = """
import sys
from dpo_lab.terminal.progress import track
figures = ["loss 0.693", "acc 0.500", "14,600 tok/s", "margin -0.012"]
with track(sys.argv[1], 10000, done=1000) as advance:
    for _ in range(9):
        advance(1000, figures)
        if len(sys.argv) > 2:
            raise SystemExit(3)
"""


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (200, "loss 0.693  acc 0.500  14,600 tok/s  margin -0.012"),
        (80, "loss 0.693  acc 0.500  14,600 tok/s"),
        (60, "loss 0.693  acc 0.500"),
        (40, ""),
    ],
)
def test_a_bar_fits_the_terminal_with_its_count_and_time_whole(columns, shown, tmp_path):
    said = on_terminal("-c", STAGE, "DPO", columns=columns, cwd=tmp_path)
    assert said.code == 0
    assert said.raw.count("\x1b[") > 3  # it is redrawn
    assert max(len(line) for line in said.lines) <= columns
    assert re.fullmatch(rf"DPO +━+ 10000/10000 \d:\d\d:\d\d *{re.escape(shown)}", said.lines[-1])


def test_a_bar_without_colours_where_they_are_not_wanted(tmp_path):
    plain, coloured = (
        on_terminal("-c", STAGE, "DPO", columns=80, cwd=tmp_path, **no) for no in ({"NO_COLOR": "1"}, {})
    )
    assert COLOUR.search(coloured.raw)
    assert not COLOUR.search(plain.raw)
    assert plain.lines[-1].startswith("DPO")


LINE = r"DPO: 10000 of 10000 in 0:00:0\d; loss 0\.693, acc 0\.500, 14,600 tok/s, margin -0\.012\n"


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}, {"COLUMNS": "20"}])
def test_a_stage_in_a_pipe_is_one_line_when_it_is_over(variables, tmp_path):
    assert re.fullmatch(LINE, in_pipe("-c", STAGE, "DPO", cwd=tmp_path, **variables).raw)


def test_a_terminal_that_can_redraw_nothing_is_written_to_like_a_pipe(tmp_path):
    said = on_terminal("-c", STAGE, "DPO", columns=80, cwd=tmp_path, TERM="dumb")
    assert re.fullmatch(LINE, said.raw.replace("\r\n", "\n"))


def test_a_stage_that_is_stopped_says_where(tmp_path):
    said = in_pipe("-c", STAGE, "DPO", "stop", cwd=tmp_path)
    assert said.code == 3
    assert re.fullmatch(r"DPO: stopped at 2000 of 10000 after 0:00:0\d; loss .*\n", said.raw)


def test_a_short_stage_can_leave_nothing_behind(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for seconds in (0.9, 1.1):
        with progress.track(f"{seconds} seconds", 2, least=1.0) as advance:
            advance(2)
            now[0] += seconds
    assert capsys.readouterr().out == "1.1 seconds: 2 of 2 in 0:00:01\n"


def test_a_rank_that_shows_nothing_says_nothing(capsys):
    with progress.track("Stage", 2, shown=False) as advance:
        advance(2, ["loss 1"])
    assert capsys.readouterr().out == ""


def test_log_lines_stay_whole_in_a_pipe(tmp_path):
    long = " ".join(f"word-{i}" for i in range(60))
    code = "import logging; from dpo_lab.terminal.progress import log_handler as h\nlog = logging.getLogger('x')\n"
    code += f"log.addHandler(h()); log.warning({long!r})"
    said = in_pipe("-c", code, cwd=tmp_path, FORCE_COLOR="1")
    assert re.fullmatch(rf"\[\d\d:\d\d:\d\d\] WARNING  {long}\n", said.raw)
    wrapped = on_terminal("-c", code, columns=80, cwd=tmp_path)
    assert "word-59" in wrapped.lines[-1]
    assert max(map(len, wrapped.lines)) <= 80


def test_cost_counts_training_and_leaves_validation_out(monkeypatch, pairs):
    from dpo_lab.data.collate import collate
    from dpo_lab.training.callbacks import throughput as module

    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    cost, batch = Throughput(), collate(pairs)
    nothing: tuple = (None, None)

    def wait(seconds: float) -> None:
        now[0] += seconds

    cost.on_validation_start(*nothing)  # Lightning's sanity check
    wait(50)
    cost.on_validation_end(*nothing)
    assert cost.throughput() == {}
    cost.on_train_start(*nothing)
    wait(4)
    cost.on_train_batch_end(*nothing, None, batch, 0)
    tokens = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
    assert cost.tokens_per_second == tokens / 4
    cost.on_validation_start(*nothing)
    wait(100)
    cost.on_validation_end(*nothing)
    wait(2)
    cost.on_train_batch_end(*nothing, None, batch, 1)
    wait(2)
    cost.on_train_end(*nothing)
    wait(100)
    cost.on_validation_start(*nothing)  # of its own, after the fit
    cost.on_validation_end(*nothing)
    wait(100)
    assert cost.throughput() == {
        "tokens_per_second": round(2 * tokens / 8, 1),
        "pairs_per_second": round(2 * len(pairs) / 8, 2),
    }


@QUIET
def test_a_fit_says_its_last_figures_and_speed(tmp_path, capsys):
    cost = Throughput()
    trainer = make_trainer(4, callbacks=[ProgressBar(), cost])
    trainer.fit(make_module(initial_policy().model, tmp_path, 4), make_data())
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("DPO"))
    assert re.fullmatch(
        r"DPO: 4 of 4 in 0:\d\d:\d\d; loss 0\.\d{3}, acc [01]\.\d{3}, [\d,]+ tok/s, margin -?\d+\.\d{3}", line
    )
    assert cost.pairs == 4 * BATCH
    measured = throughput(trainer)["throughput"]
    assert measured["pairs_per_second"] == pytest.approx(cost.pairs / cost.seconds, rel=1e-2)
    assert measured["tokens_per_second"] == pytest.approx(cost.tokens / cost.seconds, rel=1e-2)


@QUIET
def test_a_fit_that_fails_closes_its_stage(tmp_path, capsys):
    class Fails(ProgressBar):
        def on_train_batch_start(self, trainer, *args) -> None:
            if trainer.global_step == 2:
                raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        make_trainer(4, callbacks=[Fails()]).fit(make_module(initial_policy().model, tmp_path, 4), make_data())
    assert "DPO: stopped at 2 of 4 after 0:00:0" in capsys.readouterr().out


def grow() -> None:
    """64 MB beyond the most that this process ever had: what is measured before and after."""
    resident = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS:"))
    before = resident_peak()
    held = b"x" * (before - 1024 * int(resident.split()[1]) + (64 << 20))
    print(before, peak_memory(torch.device("cpu")), len(held))


@pytest.mark.skipif(not STATUS.exists(), reason="what is resident now is read from /proc")
def test_peak_memory_is_this_processs_own_and_grows_with_it(tmp_path):
    """In a process of its own: one that ran a fit before keeps what it frees, and fills that first."""
    with Warm(grow, cwd=tmp_path) as process:
        code, output, errors = process.wait(60)
    assert code == 0, errors
    before, after, _ = map(int, output.split())
    assert before + (48 << 20) < after < before + (256 << 20)


def test_the_closing_table_fits_80_columns(tmp_path):
    wide = Estimate(-1234.567, 1.0, 100_000, (-1240.123, -1229.987))
    labels = LABELS | {metric: label for kind in EVALUATORS.values() for metric, label in kind.labels.items()}
    metrics = dict.fromkeys(labels, wide) | {f"initial/{name}": wide for name in labels}
    record = {
        "throughput": {"tokens_per_second": 1234567.8, "pairs_per_second": 12345.67},
        "peak_memory_bytes": 80 * 2**30,
    }
    samples = [{"prompt": "a " * 90, "initial": "b" * 200, "trained": "[red]c[/red]"}]
    out = io.StringIO()
    print_summary(progress.plain_console(file=out, width=80), metrics, labels, samples, tmp_path, [], cost_rows(record))
    table, rest = out.getvalue().split("Samples of both policies")
    assert max(map(len, table.splitlines())) <= 80
    rows = [line for line in table.splitlines() if line.strip()]
    assert len(rows) == 1 + 2 + len(labels) + 3  # title, head, and none is folded into two
    assert "[red]c[/red]" in rest
    assert re.search(r"training tokens per second +1,234,568", table)
    assert re.search(r"peak memory \(GiB\) +80\.00", table)


def test_nothing_measured_no_table(tmp_path):
    assert cost_rows({}) == []
    out = io.StringIO()
    print_summary(progress.plain_console(file=out, width=80), {}, {}, [], tmp_path, [], [])
    assert out.getvalue() == f"Run folder: {tmp_path}\n"


def test_a_run_on_a_terminal_of_80_columns(workshop):
    said = on_terminal("-m", "dpo_lab.train", *SMALL, "figures=true", "name=terminal", columns=80, cwd=workshop)
    assert said.code == 0, said.raw
    loose = ("dpo_lab: ", "Run folder: ", "Next: ")  # paths and commands, to be copied
    assert [line for line in said.lines if len(line) > 80 and not line.startswith(loose)] == []
    bar = next(line for line in reversed(said.lines) if line.startswith("DPO"))
    assert re.fullmatch(r"DPO ━+ 6/6 0:00:\d\d loss 0\.\d{3}  acc [01]\.\d{3}  [\d,]+ tok/s  margin -?\d\.\d{3}", bar)
    assert any(line.lstrip().startswith("peak memory (GiB)") for line in said.lines)
    folder = next(workshop.glob("outputs/terminal/*/seed=0"))
    assert "\x1b" not in (folder / "run.log").read_text()
    record = json.loads((folder / "run.json").read_text())
    assert record["throughput"]["tokens_per_second"] > record["throughput"]["pairs_per_second"] > 0
    assert record["peak_memory_bytes"] > 100 << 20
    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"{name}.{kind}" for name in ("curves", "margins", "gold", "calibration", "length") for kind in ("png", "svg")
    }
