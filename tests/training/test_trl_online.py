"""Beside TRL (extra [bench]): on the very rollouts of its RLOO and GRPO trainers, our loss has their loss and gradient."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.default_run import tokenizer_of, words
from dpo_lab.core.methods.grpo import GRPO, KLPrice, Normalise, Scale
from dpo_lab.core.methods.rloo import RLOO
from dpo_lab.core.rollouts import Rollouts, spread
from dpo_lab.data.collate import collate_responses
from dpo_lab.models.forward import rollout_loss, token_logps_of

pytestmark = pytest.mark.filterwarnings("ignore")
BETA, PROMPTS, SAMPLES, LONGEST = 0.3, 3, 4, 12
CASES = {
    "rloo": (RLOO(beta=BETA), {}),
    "grpo, its defaults": (GRPO(beta=BETA, normalise=Normalise.token, kl=KLPrice.k3_weighted), {}),
    "grpo": (GRPO(beta=BETA), {"loss_type": "grpo", "use_bias_correction_kl": False}),
    "dr_grpo": (
        GRPO(beta=BETA, scale=Scale.none, normalise=Normalise.constant),
        {"loss_type": "dr_grpo", "scale_rewards": "none", "use_bias_correction_kl": False},
    ),
}


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=2, eos_token_id=1, pad_token_id=0))


def their_step(name: str, settings: dict, folder) -> tuple[torch.nn.Module, dict, list[float], torch.Tensor]:
    """The policy, moved away from the reference, rollouts of TRL's trainer, their rewards, and the loss that it makes."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    config_class, trainer_class = (RLOOConfig, RLOOTrainer) if name == "rloo" else (GRPOConfig, GRPOTrainer)
    given: list[float] = []

    def reward(completions: list[str], **_: object) -> list[float]:
        given[:] = [float(np.sin(len(text)) + len(text.split())) for text in completions]
        return list(given)

    small_llama().save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    quiet = dict(report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, output_dir=str(folder / "run"))
    sizes = dict(num_generations=SAMPLES, per_device_train_batch_size=PROMPTS * SAMPLES, max_completion_length=LONGEST)
    prompts = [words([2, 10 + i, *range(11, 11 + i)]) for i in range(PROMPTS)]
    trainer = trainer_class(
        model=model,
        reward_funcs=reward,
        args=config_class(beta=BETA, **sizes, **quiet, **settings),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer_of(model.config),
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape)
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": p} for p in prompts for _ in range(SAMPLES)])
    loss = trainer.compute_loss(model, inputs)
    torch.set_num_threads(1)
    return model, inputs, given, loss


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_trl(name, tmp_path):
    pytest.importorskip("trl", reason="needs pip install -c constraints.txt -e '.[bench]'")
    method, settings = CASES[name]
    model, inputs, rewards, loss = their_step(name, settings, tmp_path)
    loss.backward()
    theirs = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    prompts, responses = (
        [row[mask.bool()].tolist() for row, mask in zip(inputs[f"{part}_ids"], inputs[f"{part}_mask"], strict=True)]
        for part in ("prompt", "completion")
    )
    tokens, lengths = collate_responses(prompts[::SAMPLES], responses)
    assert len(set(lengths[:, 1:].ravel().tolist())) > 1
    given = torch.tensor(rewards).view(PROMPTS, SAMPLES)
    stopped = torch.ones(PROMPTS, SAMPLES, dtype=torch.bool)
    rollouts = Rollouts(list("abc"), tokens, lengths, given, given, stopped, beta=BETA)
    with torch.no_grad():
        behaviour, reference = (token_logps_of(each, tokens, lengths) for each in (model, small_llama()))
    rollouts = replace(rollouts, behaviour=behaviour, reference=reference)
    weights = torch.from_numpy(method.token_weights(rollouts.response_lengths, LONGEST)).float()
    advantages, _ = method.advantages(rollouts)
    rollouts = replace(rollouts, advantages=advantages, weights=spread(weights, rollouts.response_lengths))
    model.zero_grad()
    ours = rollout_loss(model, rollouts, method.loss)[0] / (PROMPTS * SAMPLES)
    ours.backward()
    torch.testing.assert_close(ours, loss, rtol=1e-4, atol=1e-6)
    for weight, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[weight], rtol=1e-4, atol=1e-5)
