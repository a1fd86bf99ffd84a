"""What memory a training takes: weights counted by the storages that hold them, and a peak that forgets what came before."""

from __future__ import annotations

import pytest
import torch

from dpo_lab.data.collate import collate
from dpo_lab.models.copies import trainable_copy
from dpo_lab.models.policy import Lora, Policy, Pretrained
from dpo_lab.models.reference import AdapterOff, Cached, Frozen, Reference, Uniform, reference_model
from dpo_lab.training import memory
from dpo_lab.training.memory import STATUS, MemoryTracker, bytes_of_weights, peak_memory, resident_peak, restart_peak
from tests.conftest import make_pairs

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name

CPU = torch.device("cpu")
MB = 1 << 20
on_linux = pytest.mark.skipif(not STATUS.exists(), reason="what is resident now is read from /proc")


@pytest.fixture(scope="module")
def adapted(policy, tmp_path_factory) -> Policy:
    pytest.importorskip("peft")
    policy.save(folder := tmp_path_factory.mktemp("mine"))
    return Pretrained(path=str(folder), lora=Lora(r=4)).load(seed=0)


def training_of(initial: Policy, kind: Reference, folder) -> MemoryTracker:
    """The memory of a training that has begun: its policy, its reference made ready and asked once."""
    pairs = make_pairs(5)
    training = MemoryTracker(CPU)
    model = trainable_copy(initial.model)
    reference = kind.prepare(model, pairs, folder)
    reference(collate(pairs))
    training.count_weights(model, reference_model(reference))
    return training


@pytest.mark.parametrize(("kind", "times"), [(Frozen(), 2), (Cached(), 1), (Uniform(), 1)])
def test_a_reference_takes_the_policys_weights_again_only_where_it_is_a_model_of_its_own(kind, times, policy, tmp_path):
    found = training_of(policy, kind, tmp_path).as_record()
    assert found["policy_bytes"] == 4 * policy.model.num_parameters()  # float32; the tied head counts once
    assert found["weights"] == times


def test_adapters_leave_the_base_in_memory_once(adapted, tmp_path):
    """Switched off they are no second model; a frozen copy of a policy with adapters is a copy of these alone."""
    assert training_of(adapted, AdapterOff(), tmp_path).as_record()["weights"] == 1
    own = [p for p in adapted.model.parameters() if p.requires_grad]
    expected = 1 + 4 * sum(p.numel() for p in own) / bytes_of_weights([adapted.model])
    assert 1 < expected < 1.5
    assert training_of(adapted, Frozen(), tmp_path).as_record()["weights"] == pytest.approx(expected, abs=1e-4)


def test_views_of_one_storage_count_once():
    rows = torch.zeros(10, 3)
    one, other = torch.nn.Linear(3, 5, bias=False), torch.nn.Linear(3, 5, bias=False)
    one.weight, other.weight = torch.nn.Parameter(rows[:5]), torch.nn.Parameter(rows[5:])
    assert bytes_of_weights([one, other]) == 4 * 30


@on_linux
def test_growth_is_that_of_the_training_and_not_of_what_came_before(policy):
    """A peak of 192 MB before it is forgotten, one of 64 MB in it is not; the run's own peak still knows of the first."""
    spent = bytearray(192 * MB)
    highest = resident_peak()
    del spent
    training = MemoryTracker(CPU)
    training.count_weights(policy.model, None)
    held = bytearray(64 * MB)
    del held  # the worst moment counts, not the last
    growth = training.as_record()["peak_growth"] * training.policy_bytes
    assert 60 * MB < growth < 100 * MB
    assert resident_peak() < highest - 64 * MB
    assert peak_memory(CPU) >= highest - MB  # the kernel counts pages by the batch


@on_linux
def test_what_was_freed_and_kept_is_not_taken_for_what_is_in_use():
    """Pieces below what the C library hands back by itself."""
    before = restart_peak(CPU)
    pieces = [bytearray(60_000) for _ in range(2000)]
    pinned = bytearray(60_000)  # above them in the heap
    del pieces
    after = restart_peak(CPU)
    assert len(pinned) == 60_000
    assert before is not None
    assert after is not None
    assert after - before < 40 * MB


def test_without_a_peak_that_counts_anew_no_growth_is_told(policy, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "nothing" / "clear_refs")
    training = MemoryTracker(CPU)
    training.count_weights(policy.model, None)
    assert training.as_record() == {
        "weights": 1,
        "peak_growth": None,
        "policy_bytes": 4 * policy.model.num_parameters(),
    }
