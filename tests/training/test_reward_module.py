"""The reward model: its loss by numbers, its gradient and its folder against transformers, ranks and micro-batches."""

from __future__ import annotations

import copy
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)

from dpo_lab.core.bradley_terry import RewardMetrics, reward_losses
from dpo_lab.core.pairs import EncodedPair
from dpo_lab.data.collate import collate, collate_responses
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.evals.context import score_pairs
from dpo_lab.evals.judges.classifier import Classifier
from dpo_lab.models.copies import trainable_copy
from dpo_lab.models.forward import select_forward
from dpo_lab.models.paths import ForwardPath, apply_path
from dpo_lab.models.policy import PolicyError
from dpo_lab.models.reward_export import PAD, end_of, exported, share_of_equal_tokens
from dpo_lab.models.reward_head import response_rewards, with_reward_head
from dpo_lab.training.optim import Optim
from dpo_lab.training.reward_module import RewardModule
from tests.conftest import make_pairs
from tests.support import small_fit
from tests.support.fits import BATCH, Seen, flat, initial_policy, make_data, make_trainer
from tests.support.kill_points import fork, told
from tests.support.ranks import become_rank, run_in_ranks

# of Lightning and of peft
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", *small_fit.IGNORED)

MODULE = "tests.training.test_reward_module"


def test_the_loss_by_numbers():
    rewards = torch.tensor([[1.0, -1.0], [0.5, 2.0], [3.0, 3.0]], dtype=torch.float64)
    by_hand = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1.5)), math.log(2)]
    assert reward_losses(rewards).tolist() == pytest.approx(by_hand, abs=1e-12)
    centred = [by_hand[0], by_hand[1] + 0.01 * 2.5**2, by_hand[2] + 0.01 * 36]
    assert reward_losses(rewards, 0.01).tolist() == pytest.approx(centred, abs=1e-12)


def test_the_metrics_are_of_rewards():
    pairs = [EncodedPair("a", [1], [2], [3], 1.0), EncodedPair("b", [1], [2], [3], 1.0, flipped=True)]
    metrics = RewardMetrics()
    rewards = torch.tensor([[1.0, -1.0], [0.5, 2.0]])
    metrics.update(reward_losses(rewards), rewards, collate(pairs))
    found = metrics.compute()
    assert found["rewards/chosen"] == pytest.approx(0.75)
    assert found["rewards/margins"] == pytest.approx(0.25)
    assert (found["clean/rewards/accuracies"], found["flipped/rewards/accuracies"]) == (1, 0)
    assert found["true/rewards/accuracies"] == pytest.approx(0.5)
    assert not any("log" in name for name in found)


def brute_force(rewarder, pairs, pad: int):
    """Rewards [B, 2] by transformers' own forward pass, on padded rows."""
    rows = [[*pair.prompt, *side] for pair in pairs for side in (pair.chosen, pair.rejected)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    model = copy.deepcopy(rewarder)
    model.set_attn_implementation("eager")
    model.config.pad_token_id = pad
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert logits.shape == (len(rows), 1)
    return model, logits.view(len(pairs), 2)


@pytest.mark.parametrize("kind", ["shared", "padded", "alone", "gpt2"])
def test_rewards_and_gradient_are_those_of_transformers_class(kind):
    if kind == "gpt2":
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300, n_positions=64)).eval()
        select_forward(model)
    else:
        model = initial_policy(layers=2).model
        if kind != "shared":
            apply_path(model, ForwardPath(vocabulary=300, longest=1 if kind == "alone" else None))
            model.set_attn_implementation("eager")
    rewarder = with_reward_head(model).double()
    pairs = list(make_pairs(9, vocabulary=250))
    batch = collate(pairs)
    ours = response_rewards(rewarder, batch.tokens, batch.lengths)
    assert ours.dtype == torch.float64
    theirs_model, theirs = brute_force(rewarder, pairs, rewarder.config.vocab_size - 1)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    reward_losses(ours, 0.1).sum().backward()
    reward_losses(theirs, 0.1).sum().backward()
    gradients = dict(theirs_model.named_parameters())
    assert any("score" in name for name in gradients)
    for name, parameter in rewarder.named_parameters():
        assert parameter.grad is not None, name
        assert torch.allclose(parameter.grad, gradients[name].grad, atol=1e-6), name


def test_the_head_depends_on_the_seed_alone():
    heads = [with_reward_head(initial_policy().model, seed).score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx(1 / math.sqrt(33), rel=0.4)


def test_an_architecture_without_such_a_class_is_refused():
    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50))
    with pytest.raises(PolicyError, match="no model for sequence classification beside MambaForCausalLM"):
        with_reward_head(model)


def texts_and_pairs(encoder: PairTokenizer):
    prompts = ["the plot was", "the music"]
    responses = [" good and its plot was too good", " was"]
    pairs = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = encoder.prompt(prompt)
        pairs.append(EncodedPair(prompt, ids, encoder.response(response, ids), encoder.response(" too", ids)))
    return [p + r for p, r in zip(prompts, responses, strict=True)], pairs


@pytest.mark.parametrize("pad", ["own", "is the end token", "is the end token and no other is free"])
def test_the_folder_is_what_transformers_and_the_judge_load(tmp_path, pad):
    policy = initial_policy()
    tokenizer = policy.tokenizer
    if pad != "own":
        tokenizer.pad_token = tokenizer.eos_token
    if pad.endswith("free"):  # as GPT-2's: one token for begin, end and padding
        tokenizer.bos_token = tokenizer.eos_token
        bare = tokenizer.backend_tokenizer
        from tokenizers.processors import TemplateProcessing

        bare.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    encoder = PairTokenizer(tokenizer, 64, 32)
    texts, pairs = texts_and_pairs(encoder)
    rewarder = with_reward_head(policy.model)
    with torch.no_grad():
        ours = response_rewards(rewarder, *collate_responses([p.prompt for p in pairs], [p.chosen for p in pairs]))[
            :, 0
        ]
    end = end_of([p.chosen for p in pairs], encoder.end_ids)
    assert end == encoder.eos_id
    exported(rewarder, tokenizer, end).save(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.num_labels == 1
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.pad_token_id != saved.eos_token_id
    assert (saved.pad_token == PAD) == pad.endswith("free")
    assert share_of_equal_tokens(saved, pairs, texts) == 1
    with torch.no_grad():
        for text, reward in zip(texts, ours.tolist(), strict=True):
            assert loaded(**saved(text, return_tensors="pt")).logits.item() == pytest.approx(reward, abs=1e-5)
    judged = Classifier(str(tmp_path)).load().score(texts)  # in one padded batch
    assert judged == pytest.approx(ours.tolist(), abs=1e-5)


def test_without_end_tokens_none_is_appended(tmp_path):
    policy = initial_policy()
    encoder = PairTokenizer(policy.tokenizer, 64, 32, append_eos=False)
    texts, pairs = texts_and_pairs(encoder)
    assert end_of([p.chosen for p in pairs], encoder.end_ids) is None
    rewarder = with_reward_head(policy.model)
    exported(rewarder, policy.tokenizer, None).save(tmp_path)
    ours, _ = score_pairs(
        rewarder, [p.prompt for p in pairs], [p.chosen for p in pairs], 2048, torch.no_grad, response_rewards
    )
    assert Classifier(str(tmp_path)).load().score(texts) == pytest.approx(ours.tolist(), abs=1e-5)


def test_adapters_and_head_are_trained_and_saved_merged(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    policy = initial_policy()
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(policy.model, lora)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    rewarder = with_reward_head(trainable_copy(adapted))
    trained = {name for name, weight in rewarder.named_parameters() if weight.requires_grad}
    assert {name.split(".")[-3] for name in trained if "lora" in name} == {"lora_A", "lora_B"}
    assert [name for name in trained if "lora" not in name] == ["base_model.model.score.weight"]
    texts, pairs = texts_and_pairs(PairTokenizer(policy.tokenizer, 64, 32))
    with torch.no_grad():
        ours = response_rewards(rewarder, *collate_responses([p.prompt for p in pairs], [p.chosen for p in pairs]))[
            :, 0
        ]
    went: list[str] = []
    move = type(rewarder).to
    monkeypatch.setattr(type(rewarder), "to", lambda self, device: went.append(str(device)) or move(self, device))
    exported(rewarder, policy.tokenizer, policy.tokenizer.eos_token_id).save(tmp_path)
    assert went == ["cpu", str(rewarder.device)]  # a GPU need not hold the merged copy too
    assert not (tmp_path / "adapter_config.json").exists()
    assert Classifier(str(tmp_path)).load().score(texts) == pytest.approx(ours.tolist(), abs=1e-5)
    still = [name for name, weight in rewarder.named_parameters() if "lora" in name]
    assert still  # the export has merged a copy


def module_of(steps: int, tokens: int) -> RewardModule:
    model = with_reward_head(trainable_copy(initial_policy().model))
    sizes = dict(total_steps=steps, batch_size=BATCH, tokens_per_microbatch=tokens)
    return RewardModule(model, Optim(lr=1e-3, warmup_steps=0), 0.01, **sizes)


def fit_and_save(rank: int, world_size: int, folder: str, tokens: str, steps: str) -> None:
    if world_size > 1:
        become_rank(rank, world_size)
    seed_everything(0, verbose=False)
    seen, module = Seen(), module_of(int(steps), int(tokens))
    settings = dict(strategy="ddp") if world_size > 1 else {}
    trainer = make_trainer(int(steps), world_size, callbacks=[seen], **settings)
    trainer.fit(module, datamodule=make_data())
    if rank == 0:
        found = {"weights": flat(module.parameters()), "gradient": seen.gradient, "figures": seen.figures}
        torch.save(found | {"val": trainer.callback_metrics}, Path(folder) / f"{world_size}-{tokens}.pt")


def test_micro_batches_and_ranks_do_not_change_a_step(tmp_path):
    fit_and_save(0, 1, str(tmp_path), "2048", "4")
    fit_and_save(0, 1, str(tmp_path), "1", "4")
    run_in_ranks(MODULE, "fit_and_save", 2, str(tmp_path), "60", "4")
    whole, single, ranks = (torch.load(tmp_path / f"{name}.pt") for name in ("1-2048", "1-1", "2-60"))
    start = flat(module_of(4, 2048).parameters())
    assert (whole["weights"] - start).abs().max() > 1e-3
    for other in (single, ranks):
        assert torch.allclose(other["gradient"], whole["gradient"], atol=1e-6)
        assert torch.allclose(other["weights"], whole["weights"], atol=1e-5)
        for mine, theirs in zip(other["figures"], whole["figures"], strict=True):
            assert mine.keys() == theirs.keys()
            assert list(mine.values()) == pytest.approx(list(theirs.values()), abs=1e-5)
    assert whole["val"]["val/loss"].item() == pytest.approx(ranks["val"]["val/loss"].item(), abs=1e-5)
    assert np.isfinite(whole["weights"].numpy()).all()


@pytest.mark.parametrize("kind", ["write", "replace step=4.ckpt", "step", "append"])
def test_killed_it_goes_on_bit_identically(tmp_path, kind):
    """At the third write, replacement, optimizer step or row of the journal of its kind."""
    small_fit.run(tmp_path / "whole", kind=RewardModule)
    passed = []

    def tick(what: str) -> None:
        passed.append(what)
        if what == kind and passed.count(kind) == (1 if kind.startswith("replace") else 3):
            os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        with told(tick):
            small_fit.run(tmp_path / "cut", kind=RewardModule)

    (tmp_path / "cut").mkdir()
    assert fork(killed) == -signal.SIGKILL
    small_fit.run(tmp_path / "cut", kind=RewardModule)
    assert small_fit.difference(small_fit.left(tmp_path / "cut"), small_fit.left(tmp_path / "whole")) is None
