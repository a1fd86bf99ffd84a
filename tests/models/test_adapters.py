"""Folders of adapters, with tokens of their own or without: trained on, merged, or refused for the true reason."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_lab.core.losses import DPO
from dpo_lab.data.collate import collate
from dpo_lab.models.copies import trainable_copy
from dpo_lab.models.forward import pair_logps, pair_loss
from dpo_lab.models.policy import Lora, Policy, PolicyError, Pretrained, weights_digest
from tests.conftest import make_pairs
from tests.support.architectures import CACHED, made

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # of peft, about gradient checkpointing, tied weights and embeddings
V, NEW = 400, 3


def adapters(
    policy: Policy, where: Path, base: str = "Llama", kind: type = peft.LoraConfig, grown: int = 0, **settings
) -> tuple[Path, torch.nn.Module]:
    """A folder of adapters as a user's own script makes it, trained (at random), and the model that the script had."""
    architecture, of_base = CACHED[base]
    model = made(architecture, of_base | {"vocab_size": V})
    Policy(model, policy.tokenizer).save(where / "base")
    tokenizer = copy.deepcopy(policy.tokenizer)
    torch.manual_seed(1)
    if grown:
        tokenizer.add_tokens([f"<|new {i}|>" for i in range(grown)])
        model.resize_token_embeddings(V + grown)
    targets = {"target_modules": ["q_proj", "v_proj"]} if base == "Llama" else {"target_modules": ["c_attn"]}
    adapted = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **targets, **settings))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) / 8
    adapted.save_pretrained(where / "adapters")
    tokenizer.save_pretrained(where / "adapters")
    config = where / "adapters" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(where / "base")}))
    return where / "adapters", adapted.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(V - 5, V + NEW)[None] % model.get_input_embeddings().weight.shape[0]).logits


def trains(model) -> int:
    """How many weights one step on pairs moves."""
    copied, batch = trainable_copy(model), collate(make_pairs(4))
    optimizer = torch.optim.SGD([p for p in copied.parameters() if p.requires_grad], lr=0.1)
    pair_loss(copied, batch, DPO(), pair_logps(copied, batch).detach())[0].backward()
    optimizer.step()
    return sum(not torch.equal(a, b) for a, b in zip(copied.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("base", ["Llama", "GPT-2"])
def test_the_whole_model_is_trained_from_adapters(base, policy, tmp_path):
    folder, theirs = adapters(policy, tmp_path, base, r=4)
    merged = Pretrained(path=str(folder)).load().model
    assert all(p.requires_grad for p in merged.parameters())
    assert torch.allclose(logits(merged), logits(theirs), atol=1e-6)
    assert trains(merged) == len(list(merged.parameters()))


TOKENS = {
    "both embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both of a tied pair": {"modules_to_save": ["wte", "lm_head"]},
    "rows of both": {
        "trainable_token_indices": {"embed_tokens": [*range(V, V + NEW)], "lm_head": [*range(V, V + NEW)]}
    },
    "rows of a tied pair": {"trainable_token_indices": [*range(V, V + NEW)]},
}


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("name", TOKENS)
def test_adapters_with_new_tokens(name, rank, policy, tmp_path):
    base = "GPT-2" if "tied" in name else "Llama"
    folder, theirs = adapters(policy, tmp_path, base, r=4, lora_dropout=0.1, grown=NEW, **TOKENS[name])
    loaded = Pretrained(path=str(folder), lora=Lora(r=rank)).load()
    assert loaded.model.get_input_embeddings().weight.shape[0] == V + NEW == len(loaded.tokenizer)
    assert torch.allclose(logits(loaded.model), logits(theirs), atol=1e-6)
    assert weights_digest(loaded.model) == weights_digest(Pretrained(path=str(folder), lora=Lora(r=rank)).load().model)
    assert trains(loaded.model) > 0
    loaded.save(tmp_path / "saved")  # and what is kept of it is the same policy
    again = Pretrained(path=str(tmp_path / "saved"), lora=Lora(r=rank)).load().model
    assert torch.allclose(logits(again), logits(theirs), atol=1e-6)


@pytest.mark.parametrize(
    ("base", "trained"),
    [
        ("Llama", {"modules_to_save": ["embed_tokens"]}),
        ("Llama", {"trainable_token_indices": [*range(V, V + NEW)]}),  # of the embedding alone
        ("GPT-2", {"modules_to_save": ["wte"]}),  # a copy, to which the head is not tied
    ],
)
def test_new_tokens_without_their_rows_are_refused(base, trained, policy, tmp_path):
    folder, _ = adapters(policy, tmp_path, base, r=4, grown=NEW, **trained)
    path = folder / "adapter_model.safetensors"
    kept = {name: weight for name, weight in load_file(path).items() if not re.search("lm_head|original_module", name)}
    save_file(kept, path)
    with pytest.raises(
        PolicyError, match=r"trained with 3 tokens more than the 400 of its base, and holds no rows of lm_head"
    ):
        Pretrained(path=str(folder)).load()


def test_weights_that_are_missing_from_the_adapters_are_refused(policy, tmp_path):
    folder, _ = adapters(policy, tmp_path, r=4)
    path = folder / "adapter_model.safetensors"
    save_file({name: weight for name, weight in load_file(path).items() if "layers.1." not in name}, path)
    with pytest.raises(
        PolicyError, match=r"policy.adapter=.*4 weights are missing from its file \(.*layers.1.*\.\.\.\); type"
    ):
        Pretrained(path=str(folder), lora=Lora(r=4)).load()


@pytest.mark.parametrize(
    ("kind", "settings"), [(peft.IA3Config, {"feedforward_modules": []}), (peft.LoHaConfig, {"r": 4})]
)
def test_adapters_of_another_kind_are_refused(kind, settings, policy, tmp_path):
    folder, _ = adapters(policy, tmp_path, kind=kind, **settings)
    with pytest.raises(PolicyError, match="adapters of the kind (IA3|LOHA) can't be trained on or merged"):
        Pretrained(path=str(folder)).load()


@pytest.mark.parametrize("base", ["/nowhere/base", None, "../base/checkpoint-10"])
def test_a_base_that_is_not_there_is_refused(base, policy, tmp_path):
    folder, _ = adapters(policy, tmp_path, r=4)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    with pytest.raises(PolicyError, match=f"type policy.path=BASE policy.adapter={folder}$"):
        Pretrained(path=str(folder)).load()
    Pretrained(path=str(tmp_path / "base"), adapter=str(folder)).load()
