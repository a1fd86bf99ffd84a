"""The kinds of optimizers: AdamW as ever, and those whose state has 8 bits, where bitsandbytes is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dpo_lab.config.schema import ConfigError
from dpo_lab.runs.fingerprint import flatten
from dpo_lab.training import optim
from dpo_lab.training.checkpoint_io import VerifiedCheckpointIO
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.master_weights import MasterAdamW
from dpo_lab.training.optim import Optim, OptimKind
from tests.support.configs import recorded, settled
from tests.support.fits import flat, initial_policy, make_data, make_module, make_trainer

OWN = ("policy=pretrained", "policy.path=folder")
SMALLER = [OptimKind.adamw_8bit, OptimKind.paged_adamw_8bit]
STEPS, STOP = 5, 3


def test_adamw_is_what_it_was():
    weights = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3))]
    assert type(Optim().build(weights, 1)[0]) is torch.optim.AdamW
    weights.append(torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16)))
    assert type(Optim().build(weights, 1)[0]) is MasterAdamW
    assert flatten(recorded())["optim.kind"] == "adamw"


@pytest.mark.parametrize("kind", SMALLER)
def test_without_the_package_it_is_refused(kind, monkeypatch):
    monkeypatch.setattr(optim, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"optim.kind={kind.value} .*type pip install 'dpo_lab\[quantized\]'"):
        settled(f"optim.kind={kind.value}")
    settled("optim.kind=adamw")


@pytest.mark.parametrize("kind", SMALLER)
def test_what_it_can_t_train_is_refused(kind, monkeypatch):
    monkeypatch.setattr(optim, "find_spec", lambda name: name)
    chosen = f"optim.kind={kind.value}"
    with pytest.raises(
        ConfigError, match=r"master copies of optim.kind=adamw.*type policy.dtype=float32, or policy.lora"
    ):
        settled(*OWN, chosen, "policy.dtype=bfloat16")
    with pytest.raises(ConfigError, match=r"sharded over ranks; type optim.kind=adamw, .*or trainer=ddp"):
        settled(*OWN, chosen, "trainer=fsdp_cpu")
    with pytest.raises(ConfigError, match=r"no scaled gradients; type trainer.precision=bf16-mixed"):
        settled(*OWN, chosen, "trainer=gpu", "trainer.precision=16-mixed")
    settled(*OWN, chosen, "policy.dtype=bfloat16", "policy.lora.r=4")
    settled(*OWN, chosen, "trainer=ddp_cpu")
    with pytest.raises(ValueError, match="16 bits"):  # also where the config could not tell
        Optim(kind).build([torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))], 1)


def train(folder: Path, kind: OptimKind, steps: int = STEPS, resume: Path | None = None) -> DPOModule:
    module = make_module(initial_policy().model, folder, STEPS)
    module.optim = Optim(kind, lr=1e-3, warmup_steps=0)
    trainer = make_trainer(steps, plugins=[VerifiedCheckpointIO()])
    trainer.fit(module, datamodule=make_data(), ckpt_path=resume)
    trainer.save_checkpoint(folder / f"step={steps}.ckpt")
    return module


def state_bytes(checkpoint: Path) -> int:
    def count(value) -> int:
        return sum(map(count, value.values())) if isinstance(value, dict) else getattr(value, "nbytes", 0)

    return count(torch.load(checkpoint, weights_only=True)["optimizer_states"][0]["state"])


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore::FutureWarning:lightning")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("kind", SMALLER)
def test_a_state_of_8_bits_trains_nearly_alike_and_goes_on_bit_identically(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    start = flat(initial_policy().model.parameters())
    expected = flat(train(tmp_path, OptimKind.adamw).model.parameters())
    whole = state_bytes(tmp_path / f"step={STEPS}.ckpt")
    found = flat(train(tmp_path, kind).model.parameters())
    moved = (expected - start).norm()
    assert 0 < (found - expected).norm() < 0.2 * moved
    assert state_bytes(tmp_path / f"step={STEPS}.ckpt") < 0.75 * whole  # most of its tensors are too small for 8 bits
    train(tmp_path, kind, STOP)
    again = train(tmp_path, kind, resume=tmp_path / f"step={STOP}.ckpt")
    assert torch.equal(flat(again.model.parameters()), found)
