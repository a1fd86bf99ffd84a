"""Faults 37 and 38 of the matrix: reports over runs that say little, and beside event files that are damaged."""

from __future__ import annotations

import csv
import io
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpo_lab import report
from dpo_lab.pipelines.loggers import track_run_status
from dpo_lab.runs import run_record
from dpo_lab.stats.estimates import Estimate
from dpo_lab.studies.spec import Arm, Direction, Measure
from tests.studies.test_load import job, write_run, write_study
from tests.support import a_study, small_fit
from tests.support.small_fit import IGNORED
from tests.training.test_tensorboard import PLAIN

pytestmark = pytest.mark.slow

BASE = (1.0, 1.25, 1.5)  # gold_gain by seed
HALFWAY = 987.0  # what a run that did not end had measured by then
ARMS: dict[str, tuple[Any, ...]] = {  # by seed: what was measured, or how the run stands
    "base": BASE,
    "whole": (2.0, 2.75, 2.125),
    "unfinished": (9.0, "running", "preempted"),
    "single": (4.0, "failed", "failed"),
    "alike": (3.0, 3.0, 3.0),  # a level without spread; its difference to the baseline has one
    "shifted": (2.0, 2.25, 2.5),  # a difference without spread
    "never": ("not started", "not started", "not started"),
    "without a record": ("missing", "missing", "missing"),
}


@pytest.fixture(scope="module")
def thin(tmp_path_factory) -> Path:
    """Where the study lies whose arms say little, and its runs."""
    outputs = tmp_path_factory.mktemp("thin") / "outputs"
    predictions = [a_study.predicts(arm) for arm in ARMS if arm != "base"]
    counted: dict[str, Any] = {"metric": "memory/weights", "measure": Measure.level, "value": 1.0}
    predictions.append(a_study.predicts("whole", **counted, direction=Direction.same, min_effect=1.1))
    study = a_study.study([Arm(arm, [f"arm={arm}"]) for arm in ARMS], predictions, seeds=3)
    jobs = []
    for arm, values in ARMS.items():
        for seed, value in enumerate(values):
            folder = outputs / "runs" / arm / f"seed={seed}"
            if isinstance(value, float):
                write_run(
                    folder, [f"arm={arm}", f"seed={seed}"], {"gold_gain": value, "kl": 0.5}, memory={"weights": 1.0}
                )
            elif value in ("running", "preempted", "failed"):
                by_then = {"gold_gain": HALFWAY, "kl": HALFWAY}
                write_run(folder, [f"arm={arm}", f"seed={seed}"], by_then, status=value, error="it ended early")
            if value != "missing":
                status = "done" if isinstance(value, float) else value
                jobs.append(job(arm, seed, f"../runs/{arm}/seed={seed}", status))
    write_study(outputs / "study", study, jobs)
    return outputs


def told(capsys, tmp_path: Path, *arguments: object) -> dict[str, str]:
    """What a report says: on the page, in the terminal, in CSV and in Markdown."""
    page = tmp_path / "page.html"
    page.unlink(missing_ok=True)
    found = {}
    for kind, options in (("terminal", ["--page", page]), ("csv", ["--csv"]), ("markdown", ["--markdown"])):
        assert report.main([str(each) for each in (*arguments, *options)]) == 0
        found[kind] = capsys.readouterr().out
    return found | {"page": page.read_text()}


def arms(text: str, metric: str = "gold_gain") -> dict[str, dict[str, str]]:
    return {row["arm"]: row for row in csv.DictReader(io.StringIO(text)) if row["metric"] == metric}


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize("which", ["study", "runs"])
def test_37_only_what_was_run_to_its_end_is_averaged_and_how_much_that_is_stands_beside_it(
    which, thin, capsys, tmp_path
):
    found = told(capsys, tmp_path, thin / which)
    rows = arms(found["csv"])
    name = "{}" if which == "study" else "arm={}"
    expected = {"base": "3", "whole": "3", "unfinished": "1", "single": "1", "alike": "3", "shifted": "3"}
    if which == "study":
        expected |= {"never": "0", "without a record": "0"}
    assert {arm: rows[name.format(arm)]["n"] for arm in expected} == expected
    assert len(rows) == len(expected)
    assert {row["runs"] for row in rows.values()} == {"3"}
    assert (rows[name.format("unfinished")]["value"], rows[name.format("single")]["value"]) == ("9.0", "4.0")
    for kind, text in found.items():
        assert f"{HALFWAY:.0f}" not in text, kind
        assert "nan" not in text.lower().split(), kind
    for kind in ("terminal", "markdown"):
        of = {arm: re.search(rf"{arm}\s[| ]*([\d/]+)\s", found[kind]) for arm in ("unfinished", "single")}
        assert {arm: match and match[1] for arm, match in of.items()} == {"unfinished": "1/3", "single": "1/3"}, kind
    assert found["page"].count("1 of 3") == 2


def test_37_every_run_that_did_not_end_is_named_with_how_it_stands(thin, capsys, tmp_path):
    found = told(capsys, tmp_path, thin / "study")
    for arm, values in ARMS.items():
        for seed, value in enumerate(values):
            line, row = f"{arm}, seed {seed}: ", f"| {arm} | {seed} | "
            if isinstance(value, float):
                assert line not in found["terminal"]
                assert row not in found["markdown"]
            else:
                assert f"{line}{value}" in found["terminal"]
                assert f"{row}{value} |" in found["markdown"]
    done = sum(isinstance(value, float) for values in ARMS.values() for value in values)
    assert f"{done} of {3 * len(ARMS)} runs done" in found["page"]
    absent = found["page"].partition("Runs without a result")[2].partition("</table>")[0]
    assert absent.count("<tr") == 1 + 3 * len(ARMS) - done


def test_37_no_interval_has_a_width_of_0_and_one_seed_or_no_spread_has_none(thin, capsys, tmp_path):
    found = told(capsys, tmp_path, thin / "study", "--metrics", "gold_gain,kl,memory/weights")
    levels = [row for metric in ("gold_gain", "kl", "memory/weights") for row in arms(found["csv"], metric).values()]
    for row in levels:
        for before in ("", "difference_"):
            low, high = row[f"{before}low"], row[f"{before}high"]
            assert (low, high) == ("", "") or float(low) < float(high), row
    rows = arms(found["csv"])
    has = {arm: (row["low"] != "", row["difference_low"] != "", row["p_holm"] != "") for arm, row in rows.items()}
    assert has == {
        "base": (True, False, False),
        "whole": (True, True, True),
        "unfinished": (False, False, False),
        "single": (False, False, False),
        "alike": (False, True, True),
        "shifted": (True, False, False),
        "never": (False, False, False),
        "without a record": (False, False, False),
    }
    assert (rows["shifted"]["difference_value"], rows["never"]["value"]) == ("1.0", "")
    for kind, text in found.items():
        assert re.search(r"±0(\.0+)?(?![.\d])", text) is None, kind
        intervals = re.findall(r"([+-]?[\d.]+) \.\. ([+-]?[\d.]+)", text)
        assert [ends for ends in intervals if ends[0] == ends[1]] == [], kind
    assert len(re.findall(r"\d \.\. [+-]?\d", found["page"])) >= 6  # those that have one show it


def test_37_what_limits_a_verdict_is_told_and_none_rests_on_it(thin, capsys, tmp_path):
    found = told(capsys, tmp_path, thin / "study")
    assert "inconclusive" in found["terminal"].splitlines()[1]
    notes = {
        "unfinished": "one seed; 2 of 3 seeds not finished",
        "single": "one seed; 2 of 3 seeds missing (bounds): inconclusive however they count",
        "shifted": "zero variance between seeds, so no interval",
        "never": "not measured; 3 of 3 seeds not finished",
        "without a record": "not measured; 3 of 3 seeds not finished",
    }
    for arm, note in notes.items():
        assert f"of {arm}: {note}\n" in found["terminal"]
        assert note in found["page"]
        (row,) = [line for line in found["markdown"].splitlines() if line.startswith(f"| of {arm} |")]
        assert row.split(" | ")[1] == "inconclusive", row


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run's, with its record, its journal and what TensorBoard was told of it."""
    folder = tmp_path_factory.mktemp("real") / "outputs" / "sweep" / "beta=0.1" / "seed=3"
    trainer: Any = SimpleNamespace(loggers=[])
    with run_record.acquire_run(folder, PLAIN, ["beta=0.1"]) as run, track_run_status(trainer, PLAIN, folder):
        assert run is not None
        small_fit.run(folder, loggers=lambda step: [tensorboard(folder, step)])
        run.update(metrics={"kl": Estimate(0.5, 0.1, 9).as_record()}, steps=small_fit.STEPS)
    shutil.rmtree(folder / run_record.CHECKPOINTS)
    return folder


def tensorboard(folder: Path, step: int) -> TensorBoardLogger:
    return TensorBoardLogger(folder, name="", version="", default_hp_metric=False, purge_step=step)


def event_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("events.out.tfevents.*"))


def damaged(path: Path) -> Iterator[str]:
    """The file cut at every 50th byte, with bytes flipped, empty, with something after it; then whole again."""
    whole, drawn = path.read_bytes(), random.Random(path.suffix)
    for at in range(0, len(whole), 50):
        path.write_bytes(whole[:at])
        yield f"cut at {at}"
    for _ in range(40):
        changed = bytearray(whole)
        for at in drawn.sample(range(len(whole)), 3):
            changed[at] ^= drawn.randrange(1, 256)
        path.write_bytes(changed)
        yield "flipped"
    path.write_bytes(whole + whole[: len(whole) // 2])
    yield "something after it"
    path.write_bytes(whole)


@pytest.mark.filterwarnings(*IGNORED)
def test_38_a_report_is_the_same_whatever_became_of_event_files(run_folder, capsys, tmp_path):
    outputs = run_folder.parents[1]
    before = told(capsys, tmp_path, outputs)
    assert '"xlabel":"optimizer steps"' in before["page"]  # learning curves, from the journal
    assert arms(before["csv"], "kl")["beta=0.1"]["value"] == "0.5"
    files = event_files(run_folder)
    assert {".end", ".settings"} < {path.suffix for path in files}
    count = 0
    for path in files:
        for how in damaged(path):
            count += 1
            if count % 12 == 0:
                assert told(capsys, tmp_path, outputs) == before, f"{path.name}, {how}"
            else:
                assert report.main([str(outputs), "--csv"]) == 0
                assert capsys.readouterr().out == before["csv"], f"{path.name}, {how}"
    assert count > 200
    for path in files:  # opening any of them now fails
        path.unlink()
        path.mkdir()
    assert told(capsys, tmp_path, outputs) == before
    for path in files:
        path.rmdir()
    assert told(capsys, tmp_path, outputs) == before


@pytest.mark.filterwarnings(*IGNORED)
@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "gone"])
def test_38_a_run_whose_event_files_are_damaged_goes_on_and_ends_as_if_they_were_not(how, whole, tmp_path):
    trainer: Any = SimpleNamespace(loggers=[])
    with pytest.raises(small_fit.Leave), track_run_status(trainer, PLAIN, tmp_path):
        small_fit.run(tmp_path, loggers=lambda step: [tensorboard(tmp_path, step)], callbacks=[small_fit.LeaveAt(5)])
    for path in event_files(tmp_path):
        content = path.read_bytes()
        damage = {"cut": content[: len(content) // 2 + 3], "empty": b"", "gone": None}
        flipped = bytes(byte ^ (0xFF if i % 50 == 7 else 0) for i, byte in enumerate(content))
        new = damage.get(how, flipped)
        path.unlink() if new is None else path.write_bytes(new)
    earlier = event_files(tmp_path)
    with track_run_status(trainer, PLAIN, tmp_path):
        small_fit.run(tmp_path, loggers=lambda step: [tensorboard(tmp_path, step)])
    assert small_fit.difference(small_fit.left(tmp_path), small_fit.left(whole)) is None
    (added,) = [
        path for path in event_files(tmp_path) if path not in earlier and path.suffix not in (".settings", ".end")
    ]
    events = EventAccumulator(str(added))
    events.Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [6]
