"""QLoRA: a base of 4 bits under adapters, on the CPU build of bitsandbytes; and what is refused, with or without it."""

from __future__ import annotations

import copy
import importlib.util
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dpo_lab.config.schema import ConfigError, ConfigErrors, explain
from dpo_lab.core.losses import DPO
from dpo_lab.data.collate import collate
from dpo_lab.models import policy as policy_module
from dpo_lab.models.copies import trainable_copy
from dpo_lab.models.forward import disable_dropout, pair_logps
from dpo_lab.models.policy import Dtype, Lora, Policy, Pretrained, Quantization, weights_digest
from dpo_lab.models.reference import AdapterOff, Cached, Frozen
from dpo_lab.pipelines.trained_policy import load_trained
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.memory import bytes_of_weights
from dpo_lab.training.optim import Optim
from tests.conftest import make_pairs
from tests.support.configs import settled

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # peft asks by the old name
    pytest.mark.filterwarnings("ignore:.*matmul_4bit.*:DeprecationWarning"),
]
PAIRS = make_pairs(5)
TYPED = ("policy=pretrained", "policy.path=mine")


@pytest.fixture(scope="module")
def folder(policy, tmp_path_factory):
    policy.save(path := tmp_path_factory.mktemp("mine"))
    return path


@pytest.fixture
def settings(folder) -> Pretrained:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    return Pretrained(path=str(folder), lora=Lora(r=4), quantize=Quantization.nf4)


@pytest.fixture
def quantized(settings) -> Policy:
    return settings.load(seed=0)


def logps(model) -> torch.Tensor:
    disable_dropout(model)
    with torch.no_grad():
        found = pair_logps(model, collate(PAIRS))
    return torch.stack((found.chosen, found.rejected))


def step(model, reference) -> DPOModule:
    """One step of training."""
    module = DPOModule(
        model, DPO(0.1), reference, Optim(lr=1e-2), total_steps=3, batch_size=5, tokens_per_microbatch=99
    )
    disable_dropout(model)
    module.part_loss(collate(PAIRS)).backward()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.step()
    optimizer.zero_grad()
    return module


def test_matrices_take_4_bits_and_the_rest_stays(settings, quantized):
    whole = replace(settings, quantize=None).load(seed=0)
    by_name = dict(quantized.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        found = by_name[name]
        if "base_layer" in name:  # all matrices but the embedding, which is the LM head too
            assert found.dtype == torch.uint8
            assert found.numel() == parameter.numel() / 2
        else:
            assert torch.equal(found, parameter)
    assert bytes_of_weights([quantized.model]) < 0.8 * bytes_of_weights([whole.model])
    short = replace(settings, dtype=Dtype.bfloat16).load(seed=0, known=True).model
    assert {p.dtype for name, p in short.named_parameters() if "lora_" in name} == {torch.float32}
    error = (logps(quantized.model) - logps(whole.model)).abs().max()
    assert 0 < error < 0.1 * logps(whole.model).abs().mean()


def test_using_a_model_changes_no_weight(quantized):
    """bitsandbytes packs weights anew for inference on some CPUs, with rounded scales."""
    before = weights_digest(quantized.model)
    first = logps(quantized.model)
    assert weights_digest(quantized.model) == before
    assert torch.equal(logps(quantized.model), first)


def test_copies_share_the_base_and_a_digest_knows_it(settings, quantized, folder, tmp_path):
    copied = trainable_copy(quantized.model)
    assert weights_digest(copied) == weights_digest(quantized.model)
    trained = sum(p.nbytes for p in copied.parameters() if p.requires_grad)
    assert bytes_of_weights([copied, quantized.model]) == bytes_of_weights([quantized.model]) + trained
    assert torch.equal(logps(copy.deepcopy(quantized.model)), logps(quantized.model))
    assert weights_digest(settings.load(seed=0).model) == weights_digest(quantized.model)
    weights = next(p for name, p in copied.named_parameters() if "base_layer" in name)
    weights.data[0] ^= 1  # one bit of the base, which is shared
    assert weights_digest(settings.load(seed=0).model) != weights_digest(quantized.model)
    weights.data[0] ^= 1
    state = weights.quant_state  # type: ignore[attr-defined]
    state.absmax[0] ^= 1  # its scales count too
    assert weights_digest(settings.load(seed=0).model) != weights_digest(quantized.model)


@pytest.mark.parametrize("kind", [Cached(), Frozen(), AdapterOff()])
def test_references_agree_before_the_first_step_and_stay(kind, quantized, tmp_path):
    model = trainable_copy(quantized.model)
    reference = kind.prepare(model, PAIRS, tmp_path)
    before = logps(model)
    assert torch.allclose(reference(collate(PAIRS)).chosen, before[0], atol=1e-4)
    base = [p.clone() for name, p in model.named_parameters() if "base_layer" in name]
    step(model, reference)
    assert not torch.allclose(logps(model)[0], before[0], atol=1e-3)
    assert torch.allclose(reference(collate(PAIRS)).chosen, before[0], atol=1e-4)
    after = [p for name, p in model.named_parameters() if "base_layer" in name]
    assert all(torch.equal(a, b) for a, b in zip(after, base, strict=True))


def test_a_checkpoint_holds_adapters_alone_and_restores_them(quantized, tmp_path):
    model = trainable_copy(quantized.model)
    module = step(model, Cached().prepare(model, PAIRS, tmp_path))
    state = module.state_dict()
    assert state
    assert all("lora_" in name for name in state)
    again = trainable_copy(quantized.model)
    other = DPOModule(
        again, module.loss, module.reference, Optim(), total_steps=3, batch_size=5, tokens_per_microbatch=9
    )
    other.load_state_dict(state)
    assert torch.equal(logps(again), logps(model))
    name = next(iter(state))
    with pytest.raises(RuntimeError, match="Missing key.*lora_"):
        other.load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(RuntimeError, match="unknown"):
        other.load_state_dict(state | {"unknown": state[name]})


def test_adapters_are_saved_alone_and_evaluated_on_the_quantized_base(settings, quantized, tmp_path):
    model = trainable_copy(quantized.model)
    step(model, Cached().prepare(model, PAIRS, tmp_path / "cache"))
    settings.export(Policy(model.eval(), quantized.tokenizer)).save(tmp_path / "policy")
    names = {path.name for path in (tmp_path / "policy").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    trained = load_trained(settings, tmp_path / "policy")
    assert weights_digest(trained.model) == weights_digest(model)
    assert torch.equal(logps(trained.model), logps(model))
    merged = Pretrained(path=str(tmp_path / "policy")).load(known=True)  # into the base that is not quantized
    assert not hasattr(merged.model, "peft_config")
    assert all(p.dtype == torch.float32 for p in merged.model.parameters())


def test_a_gguf_file_is_quantized_too(settings, quantized, monkeypatch, tmp_path):
    """Read and written by transformers; only the way there differs."""
    from dpo_lab.models.quantized import requantized

    whole = replace(settings, quantize=None, lora=Lora()).load(seed=0, known=True).model
    whole.set_attn_implementation("sdpa")
    model = requantized(whole, settings, {"dtype": torch.float32, "attn_implementation": None})
    assert model.name_or_path == settings.path
    expected = {name for name, p in quantized.model.named_parameters() if p.dtype == torch.uint8}
    assert sum(p.dtype == torch.uint8 for p in model.parameters()) == len(expected) > 0


REFUSED = {
    "policy.quantize=nf4": r"^policy.quantize=nf4: weights of 4 bits can't be trained, .* type policy.lora.r=16 optim=lora$",
    "policy.quantize=nf4 policy.lora.r=4 policy.merge=true": r"^policy.merge=true: .*type policy.merge=false, and",
    "policy.quantize=nf4 policy.lora.r=4 trainer=fsdp_cpu": r"^policy.quantize=nf4: FSDP .*; type trainer=ddp, or",
    "policy.quantize=nf5 policy.lora.r=4": r"policy.quantize=nf5: must be one of nf4",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(typed, monkeypatch):
    monkeypatch.setattr(policy_module, "find_spec", lambda name: SimpleNamespace())
    with pytest.raises((ConfigError, *ConfigErrors)) as refused:
        settled(*TYPED, *typed.split())
    error = refused.value
    assert re.search(REFUSED[typed], str(error) if isinstance(error, ConfigError) else explain(error))


def test_without_the_package_it_says_what_to_type(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(policy_module, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ConfigError, match=r"needs bitsandbytes; type pip install 'dpo_lab\[quantized\]'$"):
        settled(*TYPED, "policy.quantize=nf4", "policy.lora.r=4")


def test_the_embedded_policy_has_no_such_setting():
    with pytest.raises(ConfigErrors) as refused:
        settled("policy.quantize=nf4")
    assert explain(refused.value) == ("unknown key 'policy.quantize' under this policy; type policy=pretrained with it")


def test_the_preset_is_quantized_with_adapters(monkeypatch):
    monkeypatch.setattr(policy_module, "find_spec", lambda name: SimpleNamespace())
    policy = settled("policy=qlora", "policy.path=mine").policy
    assert isinstance(policy, Pretrained)
    assert (policy.quantize, policy.lora.r, policy.dtype) == (Quantization.nf4, 16, Dtype.bfloat16)
