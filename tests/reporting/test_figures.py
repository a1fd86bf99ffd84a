"""Figures of a run: drawn from its folder alone, the same bytes every time, honest or absent where data are odd or absent."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from dpo_lab.reporting.figures import NAMES, draw_run
from dpo_lab.reporting.figures.learning_curves import PANELS, POINTS, thinned
from dpo_lab.reporting.figures.pair_plots import BINS, edges_of
from dpo_lab.runs import metrics_log
from dpo_lab.runs.examples import EXAMPLES, Examples, PairExample
from dpo_lab.stats.calibration import reliability
from tests.conftest import REPOSITORY
from tests.support.terminal import environment

pytestmark = pytest.mark.slow

ALL = set(NAMES)


def example(i: int, split: str = "held-out", **changes) -> PairExample:
    rng = random.Random(i)
    gold, margin, flipped = rng.gauss(1, 1), rng.gauss(2, 5), split == "train" and i % 3 == 0
    values = dict(key=f"{i:032x}", split=split, flipped=flipped, gold_margin=gold, margin=margin)
    values |= dict(logratio_chosen=margin - 3.0, logratio_rejected=-3.0, logp_chosen=-40.0, logp_rejected=-41.0)
    values |= dict(length_chosen=rng.randint(5, 40), length_rejected=rng.randint(5, 40))
    values |= changes
    probability = torch.tensor(0.1 * values["margin"]).sigmoid().item()  # as DPO gives it at beta 0.1
    return PairExample(**({"probability": probability} | values))


def write_pairs(path: Path, pairs: Sequence[PairExample]) -> None:
    """As a run leaves them."""
    examples = Examples()
    for pair in pairs:
        columns = dict(margin=pair.margin, gold_margin=pair.gold_margin, flipped=pair.flipped)
        columns |= dict(trained_chosen=pair.logp_chosen, trained_rejected=pair.logp_rejected)
        columns |= dict(initial_chosen=pair.logp_chosen - pair.logratio_chosen)
        columns |= dict(initial_rejected=pair.logp_rejected - pair.logratio_rejected)
        columns |= dict(chosen_length=pair.length_chosen, rejected_length=pair.length_rejected)
        kind = "train" if pair.split == "train" else "held_out"
        if kind == "held_out" and pair.probability is not None:
            columns["probability"] = pair.probability
        examples.add(kind, [pair.key], **{name: [value] for name, value in columns.items()})
    examples.write(path)


def pairs_of(**changes) -> list[PairExample]:
    return [example(i, split, **changes) for split in ("train", "held-out") for i in range(30)]


def step(at: int, **changes: float) -> tuple[int, dict[str, float]]:
    figures = {name: 0.5 + at / 100 for _, _, curves in PANELS.values() for curve in curves for name in [curve.name]}
    return at, figures | {"trajectory/kl": at / 2, "trajectory/gold_gain": at / 10} | changes


def run_folder(
    folder: Path,
    pairs: Sequence[PairExample] | None = None,
    rows: Sequence[tuple[int, dict[str, float]]] = (step(2), step(4), step(6)),
    config: dict | None = None,
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"config": {"beta": 0.1} if config is None else config}))
    for at, figures in rows:
        metrics_log.append(folder / metrics_log.METRICS_LOG, at, figures)
    if pairs is not None:
        write_pairs(folder / EXAMPLES, pairs)
    return folder


def drawn(folder: Path) -> set[str]:
    """Names of what was drawn, each in both kinds and whole."""
    files = draw_run(folder)
    assert {path.name for path in files} == {path.name for path in (folder / "figures").iterdir()}
    for path in files:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") if path.suffix == ".png" else content.rstrip().endswith(b"</svg>")
    names = {path.stem for path in files}
    assert len(files) == 2 * len(names)
    return names


def text_of(folder: Path, name: str) -> list[str]:
    """What is written on a figure: an SVG notes every text beside its outlines."""
    return re.findall(r"<!-- (.*?) -->", (folder / "figures" / f"{name}.svg").read_text())


def test_the_same_folder_gives_the_same_bytes_whatever_the_users_settings(tmp_path):
    """In this process and in another one."""
    folder = run_folder(tmp_path / "run", pairs_of())
    assert drawn(folder) == ALL
    before = {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}
    with mpl.rc_context({"font.size": 20, "savefig.dpi": 30, "axes.grid": False, "svg.hashsalt": "x"}):
        draw_run(folder)
    assert {path.name: path.read_bytes() for path in (folder / "figures").iterdir()} == before
    command = [sys.executable, "-m", "dpo_lab.reporting.figures", str(folder)]
    told = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert len(told.stdout.split()) == 2 * len(ALL)
    assert {path.name: path.read_bytes() for path in (folder / "figures").iterdir()} == before


def test_the_command_says_what_to_type_where_there_is_no_run(tmp_path):
    command = [sys.executable, "-m", "dpo_lab.reporting.figures", str(tmp_path)]
    told = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert told.returncode == 1
    assert told.stderr == f"{tmp_path}: holds no run.json; type the folder of a run, e.g. outputs/dpo/default/seed=0\n"


@pytest.mark.parametrize("damaged", ["run.json", metrics_log.METRICS_LOG, EXAMPLES])
def test_the_command_tells_of_a_damaged_file_in_one_line(damaged, tmp_path):
    folder = run_folder(tmp_path / "run", pairs_of())
    (folder / damaged).write_text("{\n" * 2)
    command = [sys.executable, "-m", "dpo_lab.reporting.figures", str(folder)]
    told = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert told.returncode == 1
    assert told.stderr.startswith(f"{folder / damaged}")
    assert told.stderr.count("\n") == 1


NO_CURVES = {"rows": []}
OF_PAIRS = ALL - {"curves", "trajectory"}
ODD = {
    "no pairs were kept": (None, {}, {"curves", "trajectory"}),
    "none held out": ([example(i, "train") for i in range(9)], NO_CURVES, {"margins"}),
    "no pair at all": ([], NO_CURVES, set()),
    "one pair": ([example(1)], NO_CURVES, OF_PAIRS),
    "two pairs": ([example(1), example(2)], NO_CURVES, OF_PAIRS),
    "all margins 0, as of an untrained policy": (pairs_of(margin=0.0), NO_CURVES, OF_PAIRS),
    "one margin far off": ([*pairs_of(), example(99, margin=1e12)], NO_CURVES, OF_PAIRS),
    "huge margins, all equal": (pairs_of(margin=-1e30), NO_CURVES, OF_PAIRS),
    "no truth, equal lengths": (
        pairs_of(gold_margin=None, length_chosen=7, length_rejected=7),
        NO_CURVES,
        OF_PAIRS - {"gold"},
    ),
    "gold ties alone": (pairs_of(gold_margin=0.0), NO_CURVES, OF_PAIRS),
    "a loss without beta": (
        pairs_of(probability=None),
        NO_CURVES,
        OF_PAIRS - {"calibration"},
    ),
    "one logged step": (None, {"rows": [step(2)]}, {"curves"}),
    "loss alone, of supervised fine-tuning": (None, {"rows": [(2, {"train/loss": 1.0})], "config": {}}, {"curves"}),
    "infinite figures alone": (None, {"rows": [(2, {"train/loss": math.inf})]}, set()),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_data_give_an_honest_figure_or_none(case, tmp_path):
    pairs, changes, expected = ODD[case]
    assert drawn(run_folder(tmp_path / "run", pairs, **changes)) == expected


def test_what_there_is_no_data_for_any_more_is_not_left(tmp_path):
    folder = run_folder(tmp_path / "run", [example(i, "train") for i in range(9)], [])
    assert drawn(folder) == {"margins"}
    (folder / EXAMPLES).unlink()
    assert drawn(folder) == set()


def test_figures_say_their_numbers(tmp_path):
    ordered = [
        example(i, gold_margin=float(i + 1), margin=float(i**2 - 9), length_rejected=i, length_chosen=0)
        for i in range(10)
    ]
    pairs = [*ordered, *(example(i, "train", margin=-2.0, flipped=i < 4) for i in range(10))]
    rows = [step(2, **{"train/loss": math.nan}), step(4), step(6)]
    folder = run_folder(tmp_path / "run", pairs, rows)
    draw_run(folder)
    assert "rank correlation 1.00, n = 10" in text_of(folder, "gold")
    assert "rank correlation -1.00, n = 10" in text_of(folder, "length")
    assert {"train, flipped: mean -2.00, n = 4", "train, clean: mean -2.00, n = 6"} <= set(text_of(folder, "margins"))
    assert "held-out: mean 19.50, n = 10" in text_of(folder, "margins")
    assert "loss: 1 not finite" in text_of(folder, "curves")
    assert {"train, flipped pairs", "validation, by gold", "chosen, train"} <= set(text_of(folder, "curves"))
    assert {"2", "4", "6", "KL to the initial policy, nats"} <= set(text_of(folder, "trajectory"))
    # at beta 0.1 the rewards are (i^2 - 9) / 10: 3 wrong (-.9, -.8, -.5), one tie, 6 right; both sides, in 15 bins
    said = [1 / (1 + math.exp(-side * (i**2 - 9) / 10)) for side in (1, -1) for i in range(10)]
    came_true = [1] * 10 + [0] * 10
    bins: dict[int, list[int]] = {}
    for i, p in enumerate(said):
        bins.setdefault(int(15 * p), []).append(i)
    error = sum(abs(sum(came_true[i] - said[i] for i in held)) for held in bins.values()) / 20
    assert f"by labels: calibration error {error:.3f}, n = 10" in text_of(folder, "calibration")
    assert f"by gold: calibration error {error:.3f}, n = 10" in text_of(
        folder, "calibration"
    )  # gold agrees with all labels


def test_rewards_of_a_reward_model_are_not_called_implicit(tmp_path):
    draw_run(run_folder(tmp_path / "run", pairs_of(), config={"reward_model": {}}))
    said = " ".join(text for name in ALL for text in text_of(tmp_path / "run", name))
    assert "Reward against gold reward" in said
    assert "mplicit" not in said
    assert "log-ratio" not in said


def test_a_run_without_flips_shows_none(tmp_path):
    folder = run_folder(tmp_path / "run", [example(i, "train", flipped=False) for i in range(9)], [])
    draw_run(folder)
    assert [text for text in text_of(folder, "margins") if "flipped" in text] == []


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_is_torchmetrics_over_both_orders(bins):
    """Of a pair (p, right) both orders are there: (p, 1) and (1 - p, 0)."""
    label = torch.tensor(np.random.default_rng(0).normal(1, 2, 500)).sigmoid()
    both, target = torch.cat((label, 1 - label)), torch.repeat_interleave(torch.tensor([1, 0]), 500)
    expected = binary_calibration_error(both, target, bins).item()
    assert reliability(label.numpy(), bins).error == pytest.approx(expected, abs=1e-12)


def test_edges_hold_all_but_what_lies_far_off():
    edges, is_cut = edges_of([float(i) for i in range(101)])
    assert len(edges) == BINS + 1
    assert edges[0] < 0
    assert edges[-1] > 100
    assert not is_cut
    edges, is_cut = edges_of([*(float(i) for i in range(1001)), 1e9])
    assert edges[-1] < 2000
    assert is_cut


def test_long_curves_are_means_of_neighbours():
    values = [float(i % 2) for i in range(4 * POINTS)]
    x, y, of_each = thinned(range(4 * POINTS), values)
    assert of_each == 4
    assert len(x) == POINTS
    assert x[:2] == [1.5, 5.5]
    assert set(y) == {0.5}
    assert thinned([2, 4], [1.0, math.nan])[0] == [2, 4]
    _, y, _ = thinned(range(2 * POINTS), [math.nan, 3.0] * (POINTS - 1) + [math.nan] * 2)
    assert y[0] == 3.0
    assert math.isnan(y[-1])


def test_lines_of_one_panel_are_told_apart_without_colours():
    for _, _, curves in PANELS.values():
        for one, other in combinations(curves, 2):
            assert one.look != other.look
