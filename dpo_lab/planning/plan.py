"""Plan a run before it starts: the memory and the FLOPs that its config takes, from shapes alone, on several cards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_lab.config.precision import canonical
from dpo_lab.config.schema import RunConfig
from dpo_lab.models.load import untrained_model
from dpo_lab.models.paths import causal_lm
from dpo_lab.models.policy import Lora, PolicyConfig, Pretrained, Quantization, TinyPolicy
from dpo_lab.models.reference import Frozen
from dpo_lab.planning.shapes import (
    Shape,
    Work,
    activation_bytes,
    cache_bytes,
    head_bytes,
    on_paper,
    quantized_matrices,
    weight_bytes,
)

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Memory:
    """Bytes that a run holds on one card while it trains, and `sampling`, the bytes that an evaluation holds.

    gathered: weights, and gradients of trained ones, that FSDP has whole at one time, at most.
    """

    weights: float
    gradients: float
    optimizer: float
    reference: float
    activations: float
    head: float
    sampling: float
    gathered: float

    @property
    def training(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.reference + self.activations + self.head

    @property
    def needed(self) -> float:
        """Return the peak of the run."""
        return max(self.training, self.sampling)

    def sharded(self, ranks: int) -> Memory:
        """Return what each of several cards holds under FSDP; weights are whole where they are used."""
        shares = {name: getattr(self, name) / ranks for name in ("weights", "gradients", "optimizer", "reference")}
        return replace(self, **shares, activations=self.activations + self.gathered, sampling=0.0)


@dataclass(frozen=True)
class Plan:
    """The plan of a run. parameters, trained: their numbers; tokens: of a micro-batch; prompt, response: tokens of the
    longest pairs; flops: of a step.
    """

    memory: Memory
    parameters: int
    trained: int
    tokens: int
    prompt: int
    response: int
    flops: float
    steps: int
    in_16_bits: bool


def plan_of(config: RunConfig, policy: PolicyConfig | None = None) -> Plan:
    """Return the plan of a config, or of the same with another policy. Raise PolicyError if its config can't be read.

    Pairs are taken to be as long as data.max_prompt_length and data.max_length allow.
    """
    data, policy = config.data, policy or config.policy
    precision = AUTOCAST.get(canonical(config.trainer.get("precision")))
    prompt = min(data.max_prompt_length, data.max_length - 1)
    pair = Work.of_pair(prompt, data.max_length - prompt)
    longest = 2 * data.max_length - 1  # an empty prompt with two responses
    tokens = min(max(data.forward_tokens, longest), data.batch_size * longest)
    with on_paper(lambda: _model_of(policy), precision) as model:
        shape, memory = Shape.of(model), _memory_of(model, config, policy, tokens, precision)
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        in_16_bits = precision is not None or model.dtype.itemsize == 2
    flops = shape.step_flops(
        pair,
        recomputes=policy.gradient_checkpointing,
        reference=_runs_reference(config),
        frozen=policy.has_adapters,
    )
    return Plan(
        memory=memory,
        parameters=sum(size for size, _ in sizes),
        trained=sum(size for size, is_trained in sizes if is_trained),
        tokens=tokens,
        prompt=prompt,
        response=data.max_length - prompt,
        flops=flops * data.batch_size,
        steps=int(config.trainer["max_steps"]),
        in_16_bits=in_16_bits,
    )


def alternatives(config: RunConfig) -> Iterator[tuple[str, Plan]]:
    """Yield what to type for less memory, each with its plan, the mildest change first."""
    policy, typed = copy.copy(config.policy), []
    if not policy.gradient_checkpointing:
        policy.gradient_checkpointing = True
        typed.append("policy.gradient_checkpointing=true")
        yield " ".join(typed), plan_of(config, policy)
    if isinstance(policy, Pretrained) and not policy.has_adapters:
        policy = copy.copy(policy)
        policy.lora = Lora(r=16)
        typed.append("policy.lora.r=16 optim=lora")
        yield " ".join(typed), plan_of(config, policy)
    if isinstance(policy, Pretrained) and not policy.is_quantized:
        policy = copy.copy(policy)
        policy.quantize = Quantization.nf4  # not by replace, which asks for the package
        policy.dtype = type(policy.dtype).bfloat16
        typed.append("policy.quantize=nf4 policy.dtype=bfloat16")
        yield " ".join(typed), plan_of(config, policy)


def _model_of(policy: PolicyConfig) -> PreTrainedModel:
    if isinstance(policy, TinyPolicy):
        return policy.untrained(policy.vocab_size)
    assert isinstance(policy, Pretrained)
    return untrained_model(policy)


def _runs_reference(config: RunConfig) -> bool:
    """Return whether each step has a forward pass of the reference."""
    return config.reference.starts_at_policy and type(config.reference).__name__ != "Cached"


def _memory_of(
    model: PreTrainedModel, config: RunConfig, policy: PolicyConfig, tokens: int, precision: torch.dtype | None
) -> Memory:
    head: nn.Module = causal_lm(model).get_output_embeddings()  # type: ignore[assignment]
    packed = quantized_matrices(model, head) if policy.is_quantized else []
    weights = _bytes_of(list(model.parameters()), packed)
    trained = [p for p in model.parameters() if p.requires_grad]
    of_head: nn.Parameter = head.weight  # type: ignore[assignment]
    shape, evals = Shape.of(model), config.evals
    rows, length = min(evals.batch_size, evals.num_prompts), config.data.max_prompt_length + evals.max_new_tokens
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    largest = max((_bytes_of(list(layer.parameters()), packed) for layer in layers), default=0.0)
    gathered = largest + _bytes_of([p for p in model.parameters() if id(p) not in inside], packed)
    return Memory(
        weights=weights,
        gradients=weight_bytes(trained),
        optimizer=float(config.optim.state_bytes(trained)),
        reference=weight_bytes(trained) if isinstance(config.reference, Frozen) else 0.0,
        activations=activation_bytes(model, tokens, policy.gradient_checkpointing),
        head=head_bytes(shape, tokens, of_head, of_head.requires_grad, precision or model.dtype),
        sampling=weights
        + weight_bytes(trained)  # of the initial policy
        + cache_bytes(model, rows, length)
        + rows * shape.vocabulary * (4 + 3 * 8),  # logits, and probabilities in float64 that are drawn from
        gathered=gathered * (1 if policy.has_adapters else 2),
    )


def _bytes_of(parameters: list[nn.Parameter], packed: list[nn.Parameter]) -> float:
    quantized = {id(p) for p in packed}
    few = [p for p in parameters if id(p) in quantized]
    return weight_bytes([p for p in parameters if id(p) not in quantized]) + weight_bytes(few, quantized=True)
