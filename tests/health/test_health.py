"""Run health: real fits with one thing wrong each are found out, live and afterwards; what is unsure stays silent."""

from __future__ import annotations

import json
import logging
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from dpo_lab.config import schema as lab_config
from dpo_lab.health.diagnose import NOTHING, RULES, findings, lines, main, of_folder
from dpo_lab.health.evidence import Evidence, wilson_interval
from dpo_lab.health.finding import Finding, Severity
from dpo_lab.runs import metrics_log, run_record
from tests.conftest import REPOSITORY
from tests.support.unwell import FITS, health_of, train
from tests.support.warm import run_module
from tests.test_architecture import loaded_by

# What each fit is to be found out for: as it ends, and while it trains.
FOUND = {
    "nothing held out": {"nothing held out"},
    "uniform reference": {"step zero"},
    "no learning rate": {"not learning"},
    "far too high a rate": {"diverging", "likelihood displacement"},
    "told by a token": {"too easy", "likelihood displacement"},
    "by heart": {"over-fitting", "noise memorised"},
    "healthy": set(),
}
BY_DOOR = {"reward hacking of length", "language degenerated", "likelihood displacement"}

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:Found .* module.s. in eval mode", "ignore::FutureWarning:lightning",
    "ignore:Total length of `DataLoader` across ranks is zero",
)]  # fmt: skip


@dataclass
class Fit:
    folder: Path
    trainer: Trainer
    warned: list[str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(metrics_log.rows(self.folder / metrics_log.METRICS_LOG))

    @property
    def record(self) -> dict[str, Any]:
        record = run_record.read_record(self.folder)
        assert record is not None
        return record


@contextmanager
def heard() -> Iterator[list[str]]:
    """What is logged meanwhile of health."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    handler.addFilter(lambda record: record.getMessage().startswith("health: "))
    log = logging.getLogger("dpo_lab")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield said
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@pytest.fixture(scope="module")
def fits(tmp_path_factory) -> dict[str, Fit]:
    made = {}
    for name, settings in FITS.items():
        folder = tmp_path_factory.mktemp("fit")
        with heard() as warned:
            made[name] = Fit(folder, train(folder, **settings), warned)
    return made


@pytest.fixture(scope="module")
def long_winded(tmp_path_factory) -> tuple[Path, str]:
    """A run by its command in a task where every clause is paid for, at a rate and a beta that break its language, too."""
    folder = tmp_path_factory.mktemp("command")
    settings = (
        "name=long policy.hidden_size=64 policy.layers=2 policy.intermediate_size=128 sft.steps=96 sft.optim.lr=1e-2"
        " data.pairs=192 data.validation_pairs=64 data.batch_size=16 data.task.min_clauses=1 data.task.max_clauses=6"
        " data.task.reward=sum data.task.max_new_tokens=64 beta=0.02 optim.lr=3e-3 optim.warmup_steps=2"
        " trainer.max_steps=24 trainer.val_check_interval=12 trainer.log_every_n_steps=4"
        " evals.num_prompts=128 evals.num_texts=64 evals.max_new_tokens=64"
    ).split()
    done = run_module("dpo_lab.train", *settings, cwd=folder)
    assert done.returncode == 0, done.stderr
    (record,) = folder.glob("outputs/long/*/*/run.json")
    return record.parent, done.stdout


def texts_of(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """What TensorBoard shows as text: {tag: [(step, text)]}."""
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    return {
        tag.removesuffix("/text_summary"): [
            (event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
        if tag.endswith("/text_summary")
    }


@pytest.mark.parametrize("name", FITS)
def test_a_faulty_fit_has_the_finding_of_its_fault_and_no_other(name, fits):
    found = of_folder(fits[name].folder, fits[name].record)
    assert {finding.name for finding in found} == FOUND[name]
    for finding in found:
        assert re.search(r"\d", finding.message)
        assert re.search(r"\d|must", finding.threshold)
        assert finding.is_warning == (finding.name != "step zero")


@pytest.mark.parametrize("name", FITS)
def test_it_is_said_once_while_the_fit_goes_on(name, fits):
    fit = fits[name]
    said = health_of(fit.trainer).reported
    assert said.keys() == FOUND[name]
    assert [line.split(": ")[1] for line in fit.warned] == list(said)  # in the order in which they became certain
    for step, finding in said.values():
        before = [row for row in fit.rows if row["step"] <= step]
        assert finding in [f.as_record() for f in findings(fit.record, before)]
    if said:
        assert min(step for step, _ in said.values()) <= fit.record["config"]["trainer"]["max_steps"] / 2


@pytest.mark.parametrize("name", ["no learning rate", "far too high a rate", "told by a token", "by heart"])
def test_a_row_or_two_are_too_few_to_say_anything(name, fits):
    rows = [row for row in fits[name].rows if "train/loss" in row]
    assert findings(fits[name].record, rows[:2]) == findings(fits[name].record, []) == []


def test_the_default_run_as_it_was_recorded_stands_out_in_nothing():
    record, *rows = map(json.loads, (Path(__file__).parent.parent / "default_run.jsonl").read_text().splitlines())
    assert rows[-1]["step"] == record["config"]["trainer"]["max_steps"]
    assert len(Evidence(record, rows).train) == 16
    for until in range(len(rows) + 1):
        assert findings(record, rows[:until]) == []


def said_at_the_end(output: str) -> list[str]:
    """What stands above the closing table."""
    return [line for line in output.splitlines() if line.startswith("health")]


def test_a_run_by_its_command_says_it_everywhere(long_winded):
    folder, output = long_winded
    record = json.loads((folder / "run.json").read_text())
    found = [Finding.from_record(finding) for finding in record["health"]]
    assert {finding.name for finding in found} == BY_DOOR
    assert said_at_the_end(output) == list(lines(found))
    texts = texts_of(folder)
    ((step, text),) = texts["health"]
    assert step == record["steps"] == 24
    for finding in found:
        assert finding.name in text
        assert finding.suggestion.split(",")[0].split("_")[0] in text
    assert texts["health/live"]
    assert all(0 < step <= 24 for step, _ in texts["health/live"])
    assert "health: likelihood displacement" in (folder / "run.log").read_text()


def test_the_folder_alone_says_the_same_afterwards_without_torch(long_winded, capsys):
    folder, output = long_winded
    assert main([str(folder)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == str(folder)
    assert [line.strip() for line in said[1:]] == said_at_the_end(output)
    assert loaded_by("import dpo_lab.health.diagnose") & {"torch", "lightning", "transformers"} == set()
    command = [sys.executable, "-m", "dpo_lab.health.diagnose", str(folder.parent)]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert refused.returncode == 2
    assert "holds no run" in refused.stderr
    assert refused.stderr.count("\n") == 1


class Leave(Exception):
    """A crash."""


class LeaveAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            raise Leave


@pytest.mark.parametrize(("step", "kept"), [(13, 1), (23, 1), (29, 2)])
def test_a_run_that_goes_on_says_nothing_twice_and_comes_to_the_same(step, kept, fits, tmp_path):
    """Found at steps 12 and 20, which are saved: 12 with what was found, 20 before its validation, which is done again.

    kept: how many findings the checkpoint has.
    """
    settings = FITS["by heart"] | {"every": 4}
    whole = fits["by heart"]

    def board(at: int) -> list:
        return [TensorBoardLogger(tmp_path, name="", version="", purge_step=at)]

    with heard() as first, pytest.raises(Leave):
        train(tmp_path, **settings, callbacks=[LeaveAt(step)], loggers=board)
    with heard() as second:
        trainer = train(tmp_path, **settings, loggers=board)
    assert first[:kept] == whole.warned[:kept]
    assert second == whole.warned[kept:]
    assert health_of(trainer).reported == health_of(whole.trainer).reported
    assert (tmp_path / metrics_log.METRICS_LOG).read_bytes() == (whole.folder / metrics_log.METRICS_LOG).read_bytes()
    shown = texts_of(tmp_path)["health/live"]
    assert [at for at, _ in shown] == [at for at, _ in health_of(whole.trainer).reported.values()]


def test_what_there_is_to_try_can_be_typed(fits, long_winded):
    """Every key=value that a finding names composes, and every bare key is there."""
    lab_config.register()
    found = [f for fit in fits.values() for f in of_folder(fit.folder, fit.record)]
    found += [Finding.from_record(f) for f in json.loads((long_winded[0] / "run.json").read_text())["health"]]
    assert {finding.name for finding in found} == set().union(*FOUND.values()) | BY_DOOR
    said = " ".join(finding.suggestion for finding in found)
    typed = set(re.findall(r"\+?[a-z_.]+=[\w.\-]+(?<![.,])", said))
    assert {"callbacks=early_stopping", "loss=ipo_mean", "+ablation=simpo", "data.validation_path=FILE.jsonl"} <= typed
    with initialize_config_dir(lab_config.conf_dir(), version_base="1.3"):
        for setting in typed - {"loss.flip_rate=0.31"}:
            compose("train", [setting])
        cfg = compose("train", ["loss=rdpo", "loss.flip_rate=0.31"])
    for key in ("beta", "optim.lr", "trainer.max_steps"):
        assert key in said
        node: Any = cfg
        for part in key.split("."):
            node = node[part]


def test_findings_go_into_a_record_and_back():
    finding = Finding("name", Severity.info, "it is 1", "over 0", "a=1")
    assert Finding.from_record(json.loads(json.dumps(finding.as_record()))) == finding
    assert list(lines([finding])) == ["health, info: name: it is 1 (threshold: over 0). Try a=1"]
    assert list(lines([])) == [NOTHING]


def test_every_rule_has_its_own_name():
    assert len({rule.name for rule in RULES}) == len(RULES) == 20


# What is unsure stays silent: made-up figures at the edge of every rule.

LN2 = math.log(2)


def a_record(**entries: Any) -> dict[str, Any]:
    config = {"loss": {"kind": "dpo", "beta": 0.1}, "optim": {"lr": 1e-3, "warmup_steps": 0}}
    config |= {"data": {"batch_size": 32}, "trainer": {"max_steps": 100}}
    data = {"train pairs": 1600, "held-out pairs": 200, "flipped by label noise": 0}
    return {"config": config, "data": data, "step_zero_loss": LN2} | entries


def rows_of(split: str, every: int = 10, **figures: Any) -> list[dict[str, float]]:
    """A row every so many steps; a figure is a list of its values. `__` stands for `/`."""
    columns = {f"{split}/{name.replace('__', '/')}": values for name, values in figures.items()}
    count = len(next(iter(columns.values())))
    return [{"step": every * (i + 1)} | {name: float(v[i]) for name, v in columns.items()} for i in range(count)]


def how_often(name: str, make) -> float:
    """The share of 300 draws of (record, rows) in which a rule speaks."""
    draws = (make(np.random.default_rng(seed)) for seed in range(300))
    return float(np.mean([name in {f.name for f in findings(record, rows)} for record, rows in draws]))


def drawn(random, p: float, n: int, count: int = 10) -> np.ndarray:
    return random.binomial(n, p, count) / n


@pytest.mark.parametrize(("p", "low", "high"), [(0.58, 0, 0.01), (0.5, 0.5, 1)])
def test_not_learning_needs_labels_that_are_missed_for_certain(p, low, high):
    def make(random):
        accuracies = drawn(random, p, 320)
        return a_record(), rows_of("train", loss=np.full(10, 0.997 * LN2), rewards__accuracies=accuracies)

    assert low <= how_often("not learning", make) <= high


@pytest.mark.parametrize(("p", "low", "high"), [(0.9, 0, 0.01), (0.999, 0.9, 1)])
def test_too_easy_needs_nearly_all_right_on_many_pairs(p, low, high):
    def make(random):
        return a_record(), rows_of("train", loss=np.full(10, 0.3), rewards__accuracies=drawn(random, p, 320))

    assert low <= how_often("too easy", make) <= high


@pytest.mark.parametrize(("p", "flips", "low", "high"), [(0.5, 320, 0, 0.01), (0.6, 40, 0, 0.01), (0.95, 320, 0.9, 1)])
def test_noise_is_memorised_only_where_more_than_half_of_it_is_for_certain(p, flips, low, high):
    data = {"train pairs": 1600, "held-out pairs": 200, "flipped by label noise": flips}

    def make(random):
        fitted = drawn(random, p, 320 * flips // 1600)
        return a_record(data=data), rows_of("train", loss=np.full(10, 0.5), flipped__rewards__accuracies=fitted)

    assert low <= how_often("noise memorised", make) <= high


@pytest.mark.parametrize(("train", "held_out", "low", "high"), [(0.75, 0.63, 0, 0.01), (0.95, 0.6, 0.9, 1)])
def test_over_fitting_needs_a_gap_that_no_chance_explains(train, held_out, low, high):
    def make(random):
        rows = rows_of("train", loss=np.full(10, 0.5), clean__rewards__accuracies=drawn(random, train, 320))
        val = drawn(random, held_out, 200, 2)
        return a_record(), rows + rows_of("val", 50, loss=[0.6, 0.6], clean__rewards__accuracies=val)

    assert low <= how_often("over-fitting", make) <= high


@pytest.mark.parametrize(("val", "pairs", "speaks"), [(1.04, 1600, False), (1.2, 1600, True), (1.2, 3200, False)])
def test_over_fitting_needs_a_held_out_loss_that_rises_after_an_epoch(val, pairs, speaks):
    data = {"train pairs": pairs, "held-out pairs": 200, "flipped by label noise": 0}
    rows = rows_of("train", loss=np.linspace(0.6, 0.4, 10)) + rows_of("val", 50, loss=[0.6, 0.6 * val])
    assert ("over-fitting" in {f.name for f in findings(a_record(data=data), rows)}) is speaks


@pytest.mark.parametrize(("noise", "low", "high"), [(0.1, 0, 0), (0.2, 0, 0.01)])
def test_a_noisy_loss_does_not_diverge(noise, low, high):
    def make(random):
        return a_record(), rows_of("train", loss=LN2 * (1 + noise * random.standard_normal(10)))

    assert low <= how_often("diverging", make) <= high


def test_one_high_row_is_no_divergence_and_one_that_passed_is_no_warning():
    one, two = [0.69, 3.0, 0.6, 0.5], [0.69, 3.0, 3.0, 0.5]
    assert findings(a_record(), rows_of("train", loss=one)) == []
    (passed,) = findings(a_record(), rows_of("train", loss=two))
    assert (passed.name, passed.severity) == ("diverging", Severity.info)
    (broken,) = findings(a_record(), rows_of("train", loss=[0.69, math.nan]))
    assert broken.message == "loss is nan at step 20"
    assert broken.is_warning


@pytest.mark.parametrize(
    ("fall", "fell", "speaks"), [(1.9, 0.9, False), (3.5, 0.9, False), (5, 0.9, True), (5, 0.5, False)]
)
def test_displacement_is_a_large_fall_of_most_pairs(fall, fell, speaks):
    figures = dict(logps__chosen=[-40 - fall], logratio__chosen=[-fall], logratio__rejected=[-2 * fall])
    metrics = {"chosen_fell": {"value": fell, "interval": [fell - 0.05, fell + 0.05]}}
    rows = rows_of("val", 50, loss=[0.5], **figures)
    assert ("likelihood displacement" in {f.name for f in findings(a_record(metrics=metrics), rows)}) is speaks


@pytest.mark.parametrize("damaged", ["run.json", metrics_log.METRICS_LOG])
def test_a_damaged_file_is_told_in_one_line(damaged, tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps(a_record()))
    (tmp_path / damaged).write_text("{\n")
    assert main([str(tmp_path)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith(f"{tmp_path / damaged}")
    assert error.count("\n") == 1


def test_displacement_without_held_out_rejected_responses_says_nothing_of_them():
    rows = rows_of("val", 50, loss=[0.5], logps__chosen=[-48], logratio__chosen=[-8])
    (found,) = [f for f in findings(a_record(), rows) if f.name == "likelihood displacement"]
    assert "(-40.0 before training, -48.0 now):" in found.message
    rows = rows_of("val", 50, loss=[0.5, 0.5], logps__chosen=[-40, -48])
    (found,) = [f for f in findings(a_record(step_zero_loss=None), rows) if f.name == "likelihood displacement"]
    assert "(-40.0 at step 50, -48.0 now):" in found.message


def measured(**figures: tuple[float, float]) -> dict[str, Any]:
    """Metrics by value and half width; `__` stands for `/`."""
    return {
        name.replace("__", "/"): {"value": value, "interval": [value - half, value + half]}
        for name, (value, half) in figures.items()
    }


@pytest.mark.parametrize(
    ("figures", "name"),
    [
        (dict(length=(30, 1), initial__length=(20, 1), margin=(2, 1)), "reward hacking of length"),
        (dict(length=(14, 1), initial__length=(20, 1), margin=(2, 1)), "reward hacking of length"),
        (dict(length=(30, 6), initial__length=(20, 6), margin=(2, 1)), None),  # it may be chance
        (dict(length=(20, 1), initial__length=(20, 25), margin=(2, 1)), None),  # an interval that reaches below 0
        (dict(length=(23, 0.1), initial__length=(20, 0.1), margin=(2, 1)), None),  # it is little
        (dict(length=(30, 1), initial__length=(20, 1), margin=(2, 3)), None),  # no reward rose
        (dict(length=(30, 1), initial__length=(20, 1), margin=(2, 1), gold_gain=(-1, 0.5)), None),  # the true one fell
        (dict(perplexity=(8, 0.1), initial__perplexity=(5, 0.1)), "language degenerated"),
        (dict(perplexity=(8, 2), initial__perplexity=(5, 0.1)), None),
        (dict(perplexity=(7, 0.1), initial__perplexity=(5, 0.1)), None),
        (dict(stopped=(0.7, 0.05), initial__stopped=(0.95, 0.03)), "language degenerated"),
        (dict(stopped=(0.8, 0.05), initial__stopped=(0.95, 0.05)), None),
        (dict(well_formed=(0.5, 0.05), initial__well_formed=(0.9, 0.05)), "language degenerated"),
        (dict(well_formed=(0.65, 0.05), initial__well_formed=(0.9, 0.05)), None),
        (dict(distinct_2=(0.1, 0), initial__distinct_2=(0.3, 0)), "language degenerated"),
        (dict(distinct_2=(0.2, 0), initial__distinct_2=(0.3, 0)), None),
    ],
)
def test_a_policy_is_compared_with_its_initial_one(figures, name):
    found = findings(a_record(metrics=measured(**figures)), [])
    assert [f.name for f in found] == ([name] if name else [])


@pytest.mark.parametrize(
    ("kind", "loss", "says"),
    [("dpo", 0.69, 0), ("dpo", 0.9, 1), ("ipo", 25.0, 0), ("ipo", 0.69, 1), ("hinge", 1.05, 0), ("simpo", 9.0, 0)],
)  # fmt: skip
def test_step_zero_is_held_against_what_the_loss_is_at_no_margin(kind, loss, says):
    record = a_record(step_zero_loss=None, first_batch={"loss": loss, "accuracy": 0.5, "pairs": 32})
    record["config"]["loss"]["kind"] = kind
    assert [f.name for f in findings(record, [])] == says * ["step zero"]


@pytest.mark.parametrize(("moved", "warns"), [(0, True), (2530, True), (15_119, True), (25_400, False), (None, False)])
def test_16_bit_weights_that_hardly_moved_are_warned_of(moved, warns):
    counted = {"moved": moved, "trained": 44_192, "share": (moved or 0) / 44_192, "dtype": "bfloat16"}
    found = findings(a_record() if moved is None else a_record(moved_weights=counted), [])
    assert [f.name for f in found] == warns * ["weights rounded"]
    assert all(f.is_warning and f"{moved:,} of 44,192 trained weights" in f.message for f in found)


@pytest.mark.parametrize(("kind", "key"), [("endpoint", "max_tokens"), ("generative", "max_length")])
def test_a_judge_without_answers_gets_a_suggestion_that_its_kind_has(kind, key):
    record = a_record(metrics=measured(judge_unanswered=(0.5, 0.1)))
    record["config"]["evals"] = {"judge": {"kind": kind}}
    (found,) = findings(record, [])
    assert f"evals.judge.{key}," in found.suggestion


def test_supervised_fine_tuning_is_looked_at_by_its_losses():
    record = a_record(step_zero_loss=None)
    del record["config"]["loss"]
    rows = rows_of("train", loss=[3.0, 2.0, 1.5, 1.0, 0.8, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert findings(record, rows + rows_of("val", 50, loss=[2.0, 1.9])) == []
    (found,) = findings(record, rows + rows_of("val", 50, loss=[2.0, 2.6]))
    assert found.name == "over-fitting"


def test_a_share_is_known_to_wilsons_interval_at_three_standard_errors():
    """By hand: 81 of 81 leaves 81 / (81 + 9); one half of 100 leaves 1/2 -+ 3 sqrt(.25/100 + 9/40000) / 1.09."""
    assert wilson_interval(1.0, 81).low == pytest.approx(0.9)
    assert wilson_interval(1.0, 81).high == 1.0
    half = 3 * math.sqrt(0.0025 + 9 / 40000) / 1.09
    assert wilson_interval(0.5, 100).high == pytest.approx(0.5 + half)
    assert wilson_interval(0.5, 100).low == pytest.approx(0.5 - half)
