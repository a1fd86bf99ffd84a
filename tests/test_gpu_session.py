"""The GPU session without a GPU: its phases on tiny models on the CPU, and what its driver does about failures."""

from __future__ import annotations

import json
import math
from unittest.mock import patch

import pytest
import torch

from benchmarks.gpu_session import __main__ as session
from benchmarks.gpu_session import model_phases, run_phases
from benchmarks.gpu_session.scale import SCALES
from tests.support import varlen, warm

pytestmark = pytest.mark.slow

CPU, TINY = torch.device("cpu"), SCALES["tiny"]


def test_every_path_is_as_exact_as_padded_rows():
    kernel = patch.object(model_phases, "paths", lambda device, dtype: ["kernel", "loop", "padded"])
    calls = varlen.CALLS["forward"]
    with kernel, patch("dpo_lab.models.attention.supports", lambda *_: True):
        rows = list(model_phases.exactness(TINY, CPU))
    assert varlen.CALLS["forward"] == calls + 3 * 2 * TINY.whole.num_hidden_layers  # responses, dtypes; not by the loop
    assert len(rows) == 3 * 2 * 3
    for row in rows:
        assert row["nats per token"] < (1e-5 if row["dtype"] == "fp32" else 0.01)
        assert row["gradient error"] < (1e-5 if row["dtype"] == "fp32" else 0.05)


def test_rounding_is_measured_against_pairs_alone():
    rows = list(model_phases.rounding(TINY, CPU))
    assert [row["path"] for row in rows] == ["loop", "padded"] * 2
    assert all(row["rms"] <= row["largest"] < 0.01 for row in rows)


@pytest.mark.filterwarnings("ignore")
def test_steps_head_and_sampler_are_timed():
    rows = list(model_phases.steps(TINY, CPU))
    assert {row["model"] for row in rows} == {"whole", "LoRA"}
    assert all(row["ms"] > 0 and row["launches"] > 500 and math.isnan(row["peak GB"]) for row in rows)
    assert [row["rows a chunk"] for row in model_phases.head(TINY, CPU)] == [16, 64]
    (sampled,) = model_phases.sampler(TINY, CPU)
    assert sampled["tokens/s"] > 0


@pytest.mark.filterwarnings("ignore")
def test_out_of_memory_in_a_variant_is_a_row(monkeypatch):
    monkeypatch.setattr(model_phases, "_timed", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    rows = list(model_phases.steps(TINY, CPU))
    assert {row["ms"] for row in rows} == {"out of memory"}


@pytest.mark.extended
def test_runs_repeat_and_resume(monkeypatch):
    """As on a GPU, with commands in warm processes; the one that SIGTERM stops is a fresh one."""

    def run(arguments, folder):
        done = warm.run_module(arguments[1], *arguments[2:], cwd=folder)
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(run_phases, "_run", run)
    rows = list(run_phases.runs(TINY, CPU))
    assert len({row["weights"] for row in rows if "weights" in row}) == 1
    assert [row["run"] for row in rows[:3]] == ["first", "second", "resumed after exit code 143"]
    assert [row["new caches"] for row in rows[3:]] == [0, 0, 1, 0]


@pytest.mark.extended
def test_a_failed_phase_stops_no_other_and_each_is_a_row(tmp_path):
    output = tmp_path / "found.jsonl"
    output.write_text("")
    first = session.run_session("cpu", "tiny", output, ["versions"], 100)
    assert {"phase": "versions", "what": "cpu threads", "value": torch.get_num_threads()}.keys() <= first[0].keys()
    rows = session.run_session("cuda", "tiny", output, ["head"], 100)  # no GPU is visible to it
    assert first[-1]["status"] == "done"
    assert rows[-1]["status"].startswith("failed: ")
    rows = session.run_session("cpu", "tiny", output, ["sampler"], 5)
    assert "not run" in rows[-1]["status"]
    assert rows == [json.loads(line) for line in output.read_text().splitlines()]
    assert "| sampler | not run" in session.tables(rows)
