"""Fault 46 of the matrix: memory does not suffice. What is raised is torch's own error, or that of a real allocation."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.evals import candidates
from dpo_lab.evals.judges.classifier import Classifier
from dpo_lab.models import reference_cache
from dpo_lab.models.policy import Dtype, Pretrained
from dpo_lab.pipelines.setup import memory_explained
from dpo_lab.runs.out_of_memory import OutOfMemory, explain_out_of_memory
from dpo_lab.training.dpo_module import DPOModule
from tests.pipelines.test_cuda_runs import QUIET, make_shop
from tests.support import warm
from tests.support.configs import settled


def on_a_gpu(*args, **kwargs):
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB of which 1 is free.\nMore"
    )


def in_the_host(*args, **kwargs):
    torch.empty(1 << 50)


def in_numpy(*args, **kwargs):
    np.zeros(1 << 55)


@pytest.mark.parametrize(
    ("fails", "size"),
    [
        (on_a_gpu, " (tried to allocate 20.00 MiB)"),
        (in_the_host, f" (tried to allocate {4 << 50} bytes)"),
        (in_numpy, ""),
    ],
)
def test_46_it_is_known_by_its_error(fails, size):
    with pytest.raises(OutOfMemory) as raised, explain_out_of_memory("training", "a=1", "b=2"):
        fails()
    assert str(raised.value) == f"out of memory in training{size}; type a=1, or b=2"


def test_46_other_errors_and_what_was_explained_before_are_left_alone():
    for error in (RuntimeError("shapes differ"), ValueError("out of memory")):
        with pytest.raises(type(error)) as raised, explain_out_of_memory("training", "a=1"):
            raise error
        assert raised.value is error
    with pytest.raises(OutOfMemory, match="^out of memory in sampling"), explain_out_of_memory("training", "a=1"):  # noqa: SIM117
        with explain_out_of_memory("sampling"):
            on_a_gpu()


OWN = ("policy=pretrained", "policy.path=mine", "data.tokens_per_microbatch=300")
LESS = "data.tokens_per_microbatch=150"


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (OWN, f"{LESS}, or policy.gradient_checkpointing=true, or policy.lora.r=16 optim=lora"),
        ((*OWN, "policy.gradient_checkpointing=true"), f"{LESS}, or policy.lora.r=16 optim=lora"),
        ((*OWN, "policy.lora.r=4"), f"{LESS}, or policy.gradient_checkpointing=true"),
        (["data.tokens_per_microbatch=1"], "policy.gradient_checkpointing=true"),
    ],
)
def test_46_it_names_what_the_config_has_not_done_yet(settings, advice):
    with pytest.raises(OutOfMemory) as raised, memory_explained(settled(*settings), "training", trains=True):
        on_a_gpu()
    assert str(raised.value).endswith(f"; type {advice}")
    for override in advice.replace(", or ", " ").split():
        settled(*OWN, override)  # each can be typed


def test_46_the_judge_names_its_own_setting():
    with pytest.raises(OutOfMemory, match="in the judge .*; type evals.judge.batch_size=4$"):
        Classifier(batch_size=8)._scores(None, on_a_gpu, 0, ["a text"])


def test_46_candidates_name_the_batches_that_they_are_sampled_in(policy):
    settings = dict(max_new_tokens=4, seed=0, context=nullcontext, folder=None)
    with patch("dpo_lab.models.sampling.generate_responses", on_a_gpu):  # noqa: SIM117
        with pytest.raises(OutOfMemory, match="in sampling .*; type evals.batch_size=6$"):
            candidates.candidates(
                policy, PairTokenizer(policy.tokenizer, 64, 32), [[5], [6]], 6, batch_size=99, **settings
            )


@pytest.mark.parametrize(
    ("dtype", "advice"), [("float32", "policy.dtype=bfloat16"), ("bfloat16", "policy.path= of a smaller model")]
)
def test_46_a_model_that_does_not_fit_is_not_called_unreadable(dtype, advice, policy, tmp_path):
    policy.save(tmp_path)
    with patch.object(AutoModelForCausalLM, "from_pretrained", on_a_gpu):  # noqa: SIM117
        with pytest.raises(OutOfMemory, match=f"in loading the policy .*; type {advice}$"):
            Pretrained(path=str(tmp_path), dtype=Dtype(dtype)).load()


PLACES = {
    "training": (DPOModule, "part_loss"),
    "validation": (DPOModule, "validate_part"),
    "sampling": ("dpo_lab.models.sampling", "generate_responses"),
    "reference": (reference_cache, "pair_logps"),
}
SIZE = "(tried to allocate 20.00 MiB)"
SAID = {
    "training": f"training {SIZE}; type {LESS}, or policy.gradient_checkpointing=true, or policy.lora.r=16 optim=lora",
    "sampling": f"sampling {SIZE}; type evals.batch_size=2",
    "reference": f"a pass before or after training {SIZE}; type {LESS}",
}


def failing(place: str, *command: str) -> None:
    """A command in this process, which has no memory left for one kind of work."""
    owner, name = PLACES[place]
    target = patch(f"{owner}.{name}", on_a_gpu) if isinstance(owner, str) else patch.object(owner, name, on_a_gpu)
    with target:
        warm.main(*command)


@pytest.fixture
def shop(policy, tmp_path) -> Path:
    return make_shop(tmp_path, policy)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["training", "validation", "sampling", "reference"])
def test_46_a_run_fails_in_one_line_and_its_log_has_the_traceback(place, shop):
    command = ["dpo_lab.train", f"name={place}", *QUIET]
    with warm.Warm(failing, place, *command, cwd=shop) as process:
        code, output, errors = process.wait(120)
    line = "out of memory in " + SAID["training" if place == "validation" else place]
    assert code == 1
    assert errors.splitlines()[-1] == f"error: {line}"
    assert "Traceback" not in output + errors
    (folder,) = (path.parent for path in (shop / "outputs" / place).glob("*/*/run.json"))
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["error"]) == ("failed", f"OutOfMemory: {line}")
    log = (folder / "run.log").read_text()
    assert f"the run failed: {line}" in log
    assert "OutOfMemoryError: CUDA out of memory" in log


@pytest.mark.slow
def test_46_a_run_that_failed_in_sampling_goes_on_with_the_setting_that_the_line_names(shop):
    """In its folder, from the end of its training: the size of a batch of samples names no other run."""
    command = ["dpo_lab.train", "name=again", *QUIET]
    with warm.Warm(failing, "sampling", *command, cwd=shop) as process:
        assert process.wait(120)[0] == 1
    again = warm.run_module(*command, "evals.batch_size=2", cwd=shop)
    assert again.returncode == 0, again.stderr
    (record,) = (json.loads(path.read_text()) for path in (shop / "outputs" / "again").glob("*/*/run.json"))
    assert record["status"] == "done"
    assert len(record["attempts"]) == 1  # the earlier one
    assert "resuming from" in again.stdout + again.stderr


@pytest.mark.slow
def test_46_so_does_a_later_evaluation_and_settings_that_the_line_names_let_it_go_on(shop):
    assert warm.run_module("dpo_lab.train", "name=done", *QUIET, cwd=shop).returncode == 0
    (folder,) = (path.parent.relative_to(shop) for path in (shop / "outputs" / "done").glob("*/*/run.json"))
    command = ["dpo_lab.evaluate", f"run={folder}"]
    with warm.Warm(failing, "sampling", *command, cwd=shop) as process:
        code, output, errors = process.wait(120)
    assert (code, errors.splitlines()[-1]) == (1, f"error: out of memory in {SAID['sampling']}")
    assert "Traceback" not in output + errors
    again = warm.run_module(*command, "evals.batch_size=2", LESS, cwd=shop)
    assert again.returncode == 0, again.stderr


def test_46_the_rank_that_ran_out_is_named(tmp_path, monkeypatch, capsys):
    """It reports its line to the supervisor, which names the rank that reported first."""
    from dpo_lab.cli import entry_point
    from dpo_lab.distributed import supervisor
    from tests.support.configs import composed

    monkeypatch.setenv(supervisor.ERROR_FILE, str(tmp_path / "error"))

    def body(settings) -> None:
        with memory_explained(settings, "training", trains=True):
            on_a_gpu()

    with pytest.raises(SystemExit) as ended:
        entry_point.validate_and_run(composed(), body)
    assert ended.value.code == 1
    reported = (tmp_path / "error").read_text().split(" ", 2)
    assert reported[1] == "1"
    assert reported[2].startswith("OutOfMemory: out of memory in training (tried to allocate 20.00 MiB); type ")
