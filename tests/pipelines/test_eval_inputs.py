"""What an evaluation reads: prompts that a policy has no positions for, and third policies by their tokenizers."""

from __future__ import annotations

import copy
import json
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dpo_lab.config.schema import ConfigError
from dpo_lab.core.pair_table import PairTable
from dpo_lab.data.splits import HELD_OUT, TRAIN
from dpo_lab.data.tasks.reviews import SyntheticReviews
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.models.policy import Policy, TinyPolicy
from dpo_lab.pipelines.eval_inputs import read_eval_inputs
from dpo_lab.pipelines.inputs import Forward, TrainingInputs
from tests.conftest import train_tokenizer
from tests.support.configs import settled
from tests.support.templates import CHATML

FORWARD = Forward(torch.device("cpu"), nullcontext)
CHAT = [{"role": "user", "content": "Was it good?"}]


def inputs_of(policy: Policy) -> TrainingInputs:
    encoder = PairTokenizer(policy.tokenizer, 64, 32)
    return TrainingInputs(policy, encoder, PairTable.of([]), PairTable.of([]), Counter())


def with_template(policy: Policy, template: str | None) -> Policy:
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.chat_template = template
    return Policy(policy.model, tokenizer)


def test_a_prompt_that_the_policy_has_no_positions_for_is_one_line(policy, tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    (tmp_path / "p.txt").write_text("The plot was good.\n" + "The plot was good. " * 9)
    config = settled(f"evals.prompts={tmp_path / 'p.txt'}", "evals.max_new_tokens=8")
    with pytest.raises(
        ConfigError, match=r"p\.txt:2: the prompt, of \d+ tokens, .* the model has 32 positions.*"
    ) as error:
        read_eval_inputs(config, inputs_of(Policy(model, policy.tokenizer)), FORWARD)
    assert str(error.value).endswith("shorten the prompt or lower evals.max_new_tokens")


@pytest.mark.parametrize("chat", [False, True])
def test_a_third_policy_of_the_same_tokenizer_shares_tokens(policy, tmp_path, chat):
    """A base without a chat template shares those of the policy that was tuned on its chats."""
    with_template(policy, None).save(tmp_path / "third")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": CHAT if chat else "The plot was"}))
    config = settled(f"evals.prompts={tmp_path / 'p.jsonl'}", f"evals.third={tmp_path / 'third'}")
    inputs = inputs_of(with_template(policy, CHATML))
    read = read_eval_inputs(config, inputs, FORWARD)
    assert read.third is not None
    assert read.third.shares_tokens
    assert read.prompts is not None
    assert read.third.prompt_ids == read.prompts.encode(inputs.encoder)


def test_a_third_policy_of_another_tokenizer_has_prompts_of_its_own_tokens(policy, tmp_path, caplog):
    tokenizer = train_tokenizer(SyntheticReviews().texts(TRAIN, 40, seed=1), vocab_size=300)
    tiny = TinyPolicy(hidden_size=32, layers=2, heads=4, intermediate_size=64, context=256)
    Policy(tiny.build(tokenizer, seed=1), tokenizer).save(tmp_path / "third")
    config = settled(f"evals.third={tmp_path / 'third'}", "evals.num_prompts=4")
    inputs = inputs_of(policy)
    third = read_eval_inputs(config, inputs, FORWARD).third
    assert third is not None
    assert not third.shares_tokens
    assert "so its KL to that is not measured" in caplog.text
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in third.prompt_ids]
    assert texts == [text.strip() for text in config.data.task.prompts(HELD_OUT, 4, config.seed)]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": CHAT}))
    with pytest.raises(ConfigError, match=r"^evals\.third=.*p\.jsonl:1: .*no chat template"):
        read_eval_inputs(
            settled(f"evals.prompts={tmp_path / 'p.jsonl'}", f"evals.third={tmp_path / 'third'}"),
            inputs_of(with_template(policy, CHATML)),
            FORWARD,
        )


def test_chats_of_the_data_are_refused_for_another_tokenizer(policy, tmp_path, monkeypatch):
    tokenizer = train_tokenizer(SyntheticReviews().texts(TRAIN, 40, seed=1), vocab_size=300)
    tiny = TinyPolicy(hidden_size=32, layers=2, heads=4, intermediate_size=64, context=256)
    Policy(tiny.build(tokenizer, seed=1), tokenizer).save(tmp_path / "third")
    special = str(policy.tokenizer.eos_token)
    monkeypatch.setattr(SyntheticReviews, "prompts", lambda self, split, count, seed: [f"{special}user"] * count)
    with pytest.raises(
        ConfigError, match=r"^evals\.third=.*: its tokenizer is another one, .*; type evals\.prompts=FILE"
    ):
        read_eval_inputs(settled(f"evals.third={tmp_path / 'third'}"), inputs_of(policy), FORWARD)
