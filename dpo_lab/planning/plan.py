"""Plan a run before it starts: the memory and the FLOPs that its config takes, from shapes alone, on several cards."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_lab.config.allowed_targets import is_sharded
from dpo_lab.config.precision import canonical
from dpo_lab.config.schema import RunConfig
from dpo_lab.errors import first_line
from dpo_lab.evals.evaluate import policy_folder
from dpo_lab.evals.judges import JudgeError
from dpo_lab.models.load import untrained_model
from dpo_lab.models.paths import causal_lm
from dpo_lab.models.policy import PolicyConfig, PolicyError, Pretrained, TinyPolicy
from dpo_lab.models.reference import AdapterOff, Frozen, Moving, Reference
from dpo_lab.models.weight_settings import Dtype, Lora, Quantization
from dpo_lab.pipelines.trained_policy import trained_settings
from dpo_lab.planning.online import Scorer, Sizes, critic_bytes, rollout_bytes, rollout_flops, sampling_bytes
from dpo_lab.planning.shapes import (
    Shape,
    Work,
    activation_bytes,
    head_bytes,
    on_paper,
    quantized_matrices,
    weight_bytes,
)

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Memory:
    """Bytes that a run holds on one card while it trains, and `sampling`, the bytes that an evaluation holds.

    critic, reward_model: their weights; rollouts: what sampling takes between optimizer steps, beside all models;
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
    critic: float = 0.0
    reward_model: float = 0.0
    rollouts: float = 0.0

    @property
    def models(self) -> float:
        """What is held at any time of training."""
        return self.weights + self.optimizer + self.reference + self.critic + self.reward_model

    @property
    def training(self) -> float:
        return self.models + self.gradients + self.activations + self.head

    @property
    def needed(self) -> float:
        """Return the peak of the run."""
        return max(self.training, self.models + self.rollouts, self.sampling)

    def sharded(self, ranks: int) -> Memory:
        """Return what each of several cards holds under FSDP; weights are whole where they are used.

        The reward model is whole on each.
        """
        names = ("weights", "gradients", "optimizer", "reference", "critic")
        shares = {name: getattr(self, name) / ranks for name in names}
        rollouts = self.rollouts and self.rollouts + self.gathered
        return replace(self, **shares, activations=self.activations + self.gathered, sampling=0.0, rollouts=rollouts)


@dataclass(frozen=True)
class Plan:
    """The plan of a run. parameters, trained: their numbers; tokens: of a micro-batch; sizes: of the longest prompts and
    responses; flops_of: the FLOPs of an optimizer step by phase, with its share of rollouts.
    """

    memory: Memory
    parameters: int
    trained: int
    tokens: int
    sizes: Sizes
    flops_of: dict[str, float]
    steps: int
    in_16_bits: bool

    @property
    def flops(self) -> float:
        """FLOPs of an optimizer step."""
        return sum(self.flops_of.values())


def plan_of(config: RunConfig, policy: PolicyConfig | None = None) -> Plan:
    """Return the plan of a config, or of the same with another policy. Raise PolicyError if its config can't be read.

    Pairs are taken to be as long as data.max_prompt_length and data.max_length allow, prompts that are sampled from too,
    and samples as long as they may be.
    """
    policy, sizes = policy or config.policy, Sizes.of(config)
    precision = AUTOCAST.get(canonical(config.trainer.get("precision")))
    tokens = sizes.tokens(config)
    with _explained(policy), on_paper(lambda: _model_of(policy), precision) as model:
        shape, scorer = Shape.of(model), Scorer.of(config, model) if config.method.is_online else None
        memory = _memory_of(model, config, policy, tokens, precision)
        rollouts = max(memory.rollouts, rollout_bytes(model, config, sizes))
        sampling = memory.sampling + _third_bytes(config) + _judge_bytes(config)
        memory = replace(memory, rollouts=rollouts, sampling=sampling, reward_model=scorer.size if scorer else 0.0)
        counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
        in_16_bits = precision is not None or model.dtype.itemsize == 2
    passes: dict[str, Any] = dict(recomputes=policy.gradient_checkpointing, frozen=policy.has_adapters)
    reference = _runs_reference(config)
    training = shape.step_flops(sizes.work, reference=reference and config.method.uses_loss, **passes)
    if config.method.has_critic:
        training += replace(shape, vocabulary=0).step_flops(sizes.work, **passes)
    return Plan(
        memory=memory,
        parameters=sum(size for size, _ in counts),
        trained=sum(size for size, is_trained in counts if is_trained),
        tokens=tokens,
        sizes=sizes,
        flops_of={
            "training": training,
            **rollout_flops(config, sizes, shape, scorer, reference, in_16_bits),
            **_trajectory_flops(config, shape),
        },
        steps=int(config.trainer["max_steps"]),
        in_16_bits=in_16_bits,
    )


@contextmanager
def _explained(policy: PolicyConfig) -> Iterator[None]:
    """Raise PolicyError for a model whose passes need more than shapes, or have no rule for them in torch."""
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it would log a traceback as well
    try:
        yield
    except (PolicyError, JudgeError):
        raise
    except Exception as error:  # many types, depending on the architecture
        raise PolicyError(
            f"policy.path={getattr(policy, 'path', '')}: its memory can't be told from shapes ({first_line(error)}); type"
            " policy.dtype=bfloat16 with --plan where products of experts fail, else leave --plan out"
        ) from error


def alternatives(config: RunConfig) -> Iterator[tuple[str, Plan]]:
    """Yield what to type for less memory, each with its plan, the mildest change first; each adds to the ones before."""
    policy, typed = copy.copy(config.policy), []
    changes: list[tuple[str, dict[str, Any]]] = []
    if not policy.gradient_checkpointing:
        changes.append(("policy.gradient_checkpointing=true", {"gradient_checkpointing": True}))
    if isinstance(policy, Pretrained) and not policy.has_adapters:
        changes.append(("policy.lora.r=16 optim=lora", {"lora": Lora(r=16)}))
    sharded = is_sharded(config.trainer)  # for which weights of 4 bits are refused
    if isinstance(policy, Pretrained) and not sharded and not policy.is_quantized:
        smaller = {"quantize": Quantization.nf4, "dtype": Dtype.bfloat16}
        changes.append(("policy.quantize=nf4 policy.dtype=bfloat16", smaller))
    if isinstance(policy, Pretrained) and sharded and policy.dtype is Dtype.float32:
        changes.append(("policy.dtype=bfloat16", {"dtype": Dtype.bfloat16}))
    for words, settings in changes:
        policy = copy.copy(policy)
        vars(policy).update(settings)  # not by replace, which asks for bitsandbytes
        typed.append(words)
        yield " ".join(typed), plan_of(config, policy)


def _model_of(policy: PolicyConfig) -> PreTrainedModel:
    if isinstance(policy, TinyPolicy):
        return policy.untrained(policy.vocab_size)
    assert isinstance(policy, Pretrained)
    return untrained_model(policy)


def _runs_reference(config: RunConfig) -> bool:
    """Return whether each step has a forward pass of the reference."""
    return isinstance(_reference(config), (Frozen, AdapterOff, Moving))


def _reference(config: RunConfig) -> Reference:
    """Return the reference of the run."""
    return config.reference.of_fresh_responses() if config.method.is_online else config.reference


def _memory_of(
    model: PreTrainedModel, config: RunConfig, policy: PolicyConfig, tokens: int, precision: torch.dtype | None
) -> Memory:
    head: nn.Module = causal_lm(model).get_output_embeddings()  # type: ignore[assignment]
    packed = quantized_matrices(model, head) if policy.is_quantized else []
    weights = _bytes_of(list(model.parameters()), packed)
    trained = [p for p in model.parameters() if p.requires_grad]
    critic, of_critic = critic_bytes(model) if config.method.has_critic else (0.0, [])
    of_head: nn.Parameter = head.weight  # type: ignore[assignment]
    shape, evals = Shape.of(model), config.evals
    rows = min(evals.batch_size, evals.num_prompts)
    sampled = sampling_bytes(model, rows, config.data.max_prompt_length, evals.max_new_tokens)
    sampled += weight_bytes(trained)  # of the initial policy
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    kept = activation_bytes(model, tokens, policy.gradient_checkpointing)
    if policy.activation_offload and layers:
        kept /= len(layers)  # about one layer's
    largest = max((_bytes_of(list(layer.parameters()), packed) for layer in layers), default=0.0)
    gathered = largest + _bytes_of([p for p in model.parameters() if id(p) not in inside], packed)
    return Memory(
        weights=weights,
        gradients=weight_bytes(trained + of_critic),
        optimizer=float(config.optim.state_bytes(trained + of_critic)),
        reference=weight_bytes(trained) if isinstance(_reference(config), (Frozen, Moving)) else 0.0,
        critic=critic,
        activations=(2 if critic else 1) * kept,  # one backward pass is of policy and critic
        head=head_bytes(shape, tokens, of_head, of_head.requires_grad, precision or model.dtype),
        sampling=weights + sampled,
        rollouts=sampled if evals.every else 0.0,
        gathered=gathered * (1 if policy.has_adapters else 2),
    )


def _third_bytes(config: RunConfig) -> float:
    """Return the bytes of the third policy's weights, which an evaluation holds beside the others; 0 without one."""
    if config.evals.third is None:
        return 0.0
    return weight_bytes(
        untrained_model(trained_settings(config.policy, policy_folder(config.evals.third))).parameters()
    )


def _judge_bytes(config: RunConfig) -> float:
    """Return the bytes of the weights of the judge that an evaluation holds beside the policies; 0 without one here."""
    judge = config.evals.judge.untrained()
    return 0.0 if judge is None else weight_bytes(judge.parameters())


def _trajectory_flops(config: RunConfig, shape: Shape) -> dict[str, float]:
    """Return the share of an optimizer step in the FLOPs of the trajectory: its samples are drawn, and scored twice."""
    evals = config.evals
    if not evals.every:
        return {}
    prompts = min(evals.num_trajectory_prompts, evals.num_prompts) / evals.every
    work = Work.of_pair(config.data.max_prompt_length, evals.max_new_tokens, 1).times(prompts)
    return {"trajectory": 3 * (shape.body_flops(work) + shape.head_flops(work))}


def _bytes_of(parameters: list[nn.Parameter], packed: list[nn.Parameter]) -> float:
    quantized = {id(p) for p in packed}
    few = [p for p in parameters if id(p) in quantized]
    return weight_bytes([p for p in parameters if id(p) not in quantized]) + weight_bytes(few, quantized=True)
