"""Whole parts of a run on fake cuda tensors: no operator gets tensors of two devices, no product is computed on the CPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.extended]
TORCH = Path(torch.__file__).parent
SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[tuple[str, str], dict]:
    """What tests/support/fake_cuda.py prints: a step, a validation, samples and an evaluation of each model."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or torch.backends.cuda.is_built():
        pytest.skip("needs a C++ compiler, and torch built without CUDA")
    library = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so"
    where = [f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
    source = [str(SUPPORT / "fake_cuda.cpp"), "-o", str(library)]
    subprocess.run([compiler, "-shared", "-fPIC", "-std=c++20", *source, *where], check=True)
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.fake_cuda", str(library)]
    done = subprocess.run(command, cwd=SUPPORT.parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(row["model"], row["precision"]): row for row in rows}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("model", ["Llama", "window", "soft-cap and window", "experts"])
def test_every_part_stays_on_the_gpu(model, precision, found):
    row = found[model, precision]
    assert row["shares prompts"] is (model != "soft-cap and window")
    for part in ("train", "validate", "draw", "evaluate"):
        assert row[part]["operators"] > 100
        assert row[part]["products on the CPU"] == 0
        if part != "draw":  # which asks whether rows are finished
            assert row[part]["questions"] == 0
    takes_kernel = row["shares prompts"] and precision == "bf16"
    layers, passes = 2, {"train": 3, "validate": 2, "evaluate": 1}  # the policy's, the reference's, the backward pass
    for part, count in passes.items():
        assert row[part]["kernels"] == takes_kernel * layers * count
