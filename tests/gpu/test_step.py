"""On a real GPU: what a step waits for, products whose sums stay in float32, and linear layers with fewer casts."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback

from dpo_lab.core.products import add_product, product
from dpo_lab.models.autocast_linear import LinearCasts
from dpo_lab.models.reference import Cached
from dpo_lab.training.dpo_module import DPOModule
from tests.models.test_autocast_linear import TOKENS, make_model
from tests.support import small_fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="no GPU since Ampere is visible to torch",
    ),
    *(pytest.mark.filterwarnings(rule) for rule in small_fit.IGNORED),
]


class WarnsOfWaits(Callback):
    """Lets torch warn of each wait, from the end of the first step."""

    def on_train_batch_end(self, *_) -> None:
        torch.cuda.set_sync_debug_mode("warn")


def test_a_step_waits_once(tmp_path):
    """torch's own count: of an item, of a copy to the host, of an index by a mask, of a copy from pageable memory."""
    quiet = dict(accelerator="gpu", log_every_n_steps=100, val_check_interval=100, every_n_steps=0, logger=[])
    try:
        with pytest.warns(UserWarning, match="synchronizing CUDA operation") as found:
            small_fit.run(
                tmp_path,
                kind=DPOModule,
                reference=Cached(),
                precision="bf16-mixed",
                callbacks=[WarnsOfWaits()],
                steps=6,
                **quiet,
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(each.message) for each in found) <= 5 + 3  # and at the end of the fit


def test_products_leave_their_sums_in_float32():
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=draw).bfloat16().cuda() for shape in ((512, 2048), (2048, 256)))
    exact = (left.double() @ right.double()).float()
    found = product(left, right, torch.float32)
    total = torch.full_like(found, torch.nan)
    add_product(total, left, right, beta=0)
    add_product(total, left, right)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(total, 2 * exact, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("kind", ["llama", "qwen", "lora", "checkpointed"])
def test_linear_layers_give_autocasts_outputs_and_gradients(kind):
    plain = make_model(kind).cuda()
    ours = copy.deepcopy(plain)
    LinearCasts([ours], keeps_copies=kind != "checkpointed").install()
    found = []
    for model in (plain, ours):
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=TOKENS.cuda(), use_cache=False).logits
        logits.float().log_softmax(-1)[..., 7].sum().backward()
        found.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert torch.equal(found[0][0], found[1][0])
    for one, two in zip(*found, strict=True):
        assert ((one - two).norm() / one.norm()).item() < 0.02
