"""On a real GPU: the plan against measured peaks, trials of micro-batches, offloaded activations, a base of 4 bits."""

from __future__ import annotations

import pytest
import torch

from dpo_lab.core.losses import DPO
from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.pairs import EncodedPair
from dpo_lab.data.collate import collate
from dpo_lab.data.datamodule import PreferenceDataModule
from dpo_lab.models.forward import disable_dropout, pair_loss, select_forward
from dpo_lab.models.load import untrained_model
from dpo_lab.models.paths import causal_lm
from dpo_lab.models.policy import Lora, Pretrained, Quantization, TinyPolicy
from dpo_lab.models.reference import Uniform
from dpo_lab.planning.shapes import activation_bytes, on_paper
from dpo_lab.training.activation_offload import offload_activations
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.microbatch import HEADROOM, find_tokens
from dpo_lab.training.optim import Optim

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # peft asks by the old name
]
GPU = torch.device("cuda")
SIZES = TinyPolicy(hidden_size=512, layers=12, heads=8, intermediate_size=1536)
VOCABULARY = 8000
PAIRS = [EncodedPair(f"{i:032}", list(range(9, 209)), list(range(9, 159)), list(range(20, 170))) for i in range(64)]


def autocast():
    return torch.autocast("cuda", torch.bfloat16)


def step(model, pairs, offloads: bool = False) -> tuple[int, list[torch.Tensor]]:
    """The growth of memory by a forward pass, what autograd keeps and the peak of it, and the gradients."""
    select_forward(model)
    disable_dropout(model)
    if offloads:
        offload_activations(causal_lm(model).base_model)
    batch = collate(pairs).to(GPU)
    reference = Uniform().prepare(model, [], None)(batch)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with autocast():
        loss, _ = pair_loss(model, batch, DPO(0.1), reference)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    return kept, [p.grad.cpu() for p in model.parameters() if p.grad is not None]


def test_activations_are_those_of_the_plan():
    kept, _ = step(SIZES.untrained(VOCABULARY).to(GPU), PAIRS[:16])
    with on_paper(lambda: SIZES.untrained(VOCABULARY), torch.bfloat16) as model:
        planned = activation_bytes(model, 16 * PAIRS[0].size)
    assert kept == pytest.approx(planned, rel=0.25)


def test_offloaded_activations_leave_the_gpu_and_gradients_are_the_same():
    torch.manual_seed(0)
    model = SIZES.untrained(VOCABULARY).to(GPU)
    kept, expected = step(model, PAIRS[:16])
    model.zero_grad()
    less, found = step(model, PAIRS[:16], offloads=True)
    assert less < 0.5 * kept
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_a_trial_finds_fits_and_leaves_no_trace():
    model = SIZES.untrained(VOCABULARY).to(GPU)
    select_forward(model)
    module = DPOModule(
        model,
        DPO(0.1),
        Uniform().prepare(model, [], None),  # type: ignore[arg-type]
        Optim(),
        total_steps=3,
        batch_size=2048,
        tokens_per_microbatch=2048,
    )
    torch.cuda.set_per_process_memory_fraction(8e9 / torch.cuda.get_device_properties(GPU).total_memory)
    state = torch.cuda.get_rng_state()
    try:
        data = PreferenceDataModule(PairTable.of(PAIRS), [], batch_size=2048, num_workers=0, seed=0)
        tokens = find_tokens(module, data, 1, GPU, autocast)
        assert 2048 < tokens <= 2048 * PAIRS[0].size
        assert torch.equal(torch.cuda.get_rng_state(), state)
        assert all(p.grad is None for p in model.parameters())
        step(model, [PAIRS[i % 64] for i in range(int((1 - HEADROOM) * tokens / PAIRS[0].size))])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_base_of_4_bits_trains_on_the_gpu(tmp_path, policy):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    policy.save(tmp_path)
    settings = Pretrained(path=str(tmp_path), lora=Lora(r=4), quantize=Quantization.nf4)
    model = settings.load(seed=0).model
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert any(p.dtype == torch.uint8 for p in model.parameters())
    pairs = [EncodedPair("k", [5, 6, 7], [8, 9], [9, 8])]
    _, gradients = step(model, pairs)
    assert all(torch.isfinite(each).all() for each in gradients)
    assert untrained_model(settings).num_parameters() > 0
