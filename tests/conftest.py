"""Shared fixtures: a small embedded policy and its pairs, and the settings of a run that takes seconds."""

# ruff: noqa: E402

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.summary.writer import event_file_writer

from tests.support.shapes import check_shapes

check_shapes()  # before anything else of the package is imported

from dpo_lab.core.pairs import EncodedPair
from dpo_lab.distributed.fork_server import fast_imports
from dpo_lab.distributed.signals import STOP_SIGNALS
from dpo_lab.models.policy import Policy, TinyPolicy
from dpo_lab.models.tokenizer import train_tokenizer
from tests.support import processes

OFFLINE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
REPOSITORY = Path(__file__).resolve().parent.parent

# A run of a few seconds: a policy just large enough to learn when to stop.
SMALL = (
    "policy.hidden_size=64 policy.layers=2 policy.intermediate_size=128 sft.steps=96 sft.optim.lr=1e-2"
    " data.pairs=96 data.validation_pairs=24 data.batch_size=8 data.task.max_new_tokens=40 optim.warmup_steps=2"
    " trainer.max_steps=6 trainer.val_check_interval=3 trainer.log_every_n_steps=2 evals.num_prompts=16 evals.num_texts=8"
    " figures=false"
).split()
OWN_MODEL = [s for s in SMALL if not s.startswith(("policy.", "sft."))]  # what of it goes with policy=pretrained
LONGEST = {"test_cli", "test_contributing", "test_readme"}  # files of more than a minute


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Every module of tests is imported here."""
    with fast_imports():
        return (yield)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Files are what xdist hands out: the longest first, those without slow tests last, which even the workers out."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.stem not in LONGEST, item.path not in slow))


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left():
    """Of all that tests of this process start, whatever helper they use."""
    os.environ[processes.MARK] = processes.session_mark()
    yield
    processes.kill_all(processes.session_mark())


@pytest.fixture(autouse=True)
def signal_handlers_are_restored():
    """A run that is stopped in this process ignores SIGTERM from then on, which the processes of later tests would inherit."""
    before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def event_files_in_order():
    """TensorBoard sorts files by name: time in seconds, process, number. Of starts in one process the numbers count.

    They must be of as many digits.
    """
    event_file_writer._global_uid = event_file_writer.AtomicCounter(10_000)


@pytest.fixture(scope="session")
def policy() -> Policy:
    """Random weights, a vocabulary of the task's words."""
    from dpo_lab.data.splits import TRAIN
    from dpo_lab.data.tasks.reviews import SyntheticReviews

    tokenizer = train_tokenizer(SyntheticReviews().texts(TRAIN, 300, seed=0), vocab_size=400)
    tiny = TinyPolicy(hidden_size=32, layers=2, heads=4, intermediate_size=64, context=256)
    return Policy(tiny.build(tokenizer, seed=0).eval(), tokenizer)


def make_pairs(count: int, seed: int = 0, vocabulary: int = 300) -> list[EncodedPair]:
    """Pairs of random tokens and uneven lengths, prompts of 1 token among them; true preferences known for most."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    def gold(i: int) -> float:
        return float("nan") if i % 5 == 0 else float(torch.randn((), generator=generator))

    return [
        EncodedPair(f"pair-{i}", tokens(1, 1 if i % 4 == 0 else 9), tokens(1, 12), tokens(1, 12), gold(i))
        for i in range(count)
    ]


@pytest.fixture
def pairs() -> list[EncodedPair]:
    return make_pairs(12)


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """The folder of a small fit that nothing interrupted."""
    from tests.support.small_fit import run

    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Path:
    """A folder that CLI runs of all xdist workers share, so that the initial policy and the pairs are made once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "workshop"
    folder.mkdir(exist_ok=True)
    return folder


def python_m(
    module: str, *arguments: str, cwd: Path, timeout: float = 240, **variables: str
) -> subprocess.CompletedProcess:
    """`python -m module ...` as a user types it, offline, with one thread."""
    environment = os.environ | OFFLINE | variables
    command = [sys.executable, "-m", module, *arguments]
    return processes.run(command, cwd=cwd, env=environment, timeout=timeout)
