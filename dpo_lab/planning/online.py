"""What a method that samples adds to the plan of a run: the models that it holds, its rollouts, and their FLOPs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dpo_lab.config.schema import RunConfig
from dpo_lab.core.methods import Online, PolicyGradient
from dpo_lab.errors import first_line
from dpo_lab.models.load import untrained_classifier
from dpo_lab.models.paths import causal_lm
from dpo_lab.models.policy import PolicyError
from dpo_lab.models.trial import compute_dtype
from dpo_lab.pipelines.online import longest_response
from dpo_lab.planning.shapes import Shape, Work, cache_bytes, weight_bytes
from dpo_lab.rewards.judge import OfJudge
from dpo_lab.rewards.learned import Learned


@dataclass(frozen=True)
class Sizes:
    """The sizes of what an optimizer step trains on: `items` prompts with responses, and tokens of the longest ones."""

    prompt: int
    response: int
    responses: int
    items: int

    @classmethod
    def of(cls, config: RunConfig) -> Sizes:
        """Return the sizes of a config, whose longest prompts and responses are taken to be those that it allows."""
        data, method = config.data, config.method
        if not isinstance(method, Online):
            return cls(data.max_prompt_length, data.max_length - data.max_prompt_length, 2, data.batch_size)
        responses = method.samples if isinstance(method, PolicyGradient) else 2
        return cls(data.max_prompt_length, longest_response(config), responses, method.prompts_per_step)

    @property
    def work(self) -> Work:
        """The work of a forward pass over an optimizer step."""
        return Work.of_pair(self.prompt, self.response, self.responses).times(self.items)

    def tokens(self, config: RunConfig) -> int:
        """Return the tokens of a micro-batch, in which each prompt has all its responses."""
        longest = self.prompt + self.responses * self.response
        if not config.method.is_online:
            longest = 2 * config.data.max_length - 1  # an empty prompt with two responses
        return min(max(config.data.forward_tokens, longest), self.items * longest)


@dataclass(frozen=True)
class Scorer:
    """The model that gives rewards. size: bytes of its weights; shape: what its FLOPs depend on."""

    size: float
    shape: Shape

    @classmethod
    def of(cls, config: RunConfig, policy: PreTrainedModel) -> Scorer | None:
        """Return the reward model of a config, which is of the policy's size if it is trained first; None without one.

        Inside `on_paper`. Raises PolicyError, or JudgeError of a judge, if the config of its folder can't be read.
        """
        reward = config.reward
        if isinstance(reward, Learned) and reward.path is None:
            body = causal_lm(policy).base_model
            return cls(weight_bytes(p for n, p in body.named_parameters() if ".lora_" not in n), Shape.of(policy))
        path, model = getattr(reward, "path", None), None
        if isinstance(reward, OfJudge):
            model = config.evals.judge.untrained()
        elif path is not None:
            try:
                model = untrained_classifier(Path(path))
            except Exception as error:  # many types, depending on the file
                raise PolicyError(
                    f"reward.path={path}: {first_line(error)}; type the folder of a reward model"
                ) from None
        return None if model is None else cls(weight_bytes(model.parameters()), replace(Shape.of(model), vocabulary=0))


def critic_bytes(model: PreTrainedModel) -> tuple[float, list[torch.nn.Parameter]]:
    """Return the bytes of a critic's weights that are not the policy's, and those of them that are trained.

    Its body and its value head are trained; an LM head that is not the embedding is copied, and not used.
    """
    bare = causal_lm(model)
    head, body = bare.get_output_embeddings().weight, bare.get_input_embeddings().weight  # type: ignore[union-attr]
    copied = [p for p in model.parameters() if p.requires_grad]
    trained = [p for p in copied if p is not head or head is body]
    return weight_bytes(copied), trained


def rollout_bytes(model: PreTrainedModel, config: RunConfig, sizes: Sizes) -> float:
    """Return the bytes that sampling takes beside the models: of a batch of `evals.batch_size` responses."""
    method = config.method
    if not isinstance(method, Online):
        return 0.0
    rows = min(config.evals.batch_size, method.prompts * method.samples)
    return sampling_bytes(model, rows, sizes.prompt, sizes.response, copies=method.samples)


def sampling_bytes(model: PreTrainedModel, rows: int, prompt: int, new: int, copies: int = 1) -> float:
    """Return the bytes of the KV cache of `rows` rows, and of the larger of two: logits with the probabilities that are drawn
    from, or a layer's activations in the pass of all prompts; inside `on_paper`.

    prompt, new: tokens of a row; copies: rows that share a prompt, which runs through the model once.
    """
    config = causal_lm(model).config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    size = min(model.dtype.itemsize, compute_dtype(torch.device("cpu")).itemsize)
    of_prompts = rows / copies * prompt * (3 * inner + 4 * config.hidden_size) * size
    drawn = rows * Shape.of(model).vocabulary * (4 + 3 * 8)
    return cache_bytes(model, rows, prompt + new) + max(drawn, of_prompts)


def rollout_flops(
    config: RunConfig, sizes: Sizes, shape: Shape, scorer: Scorer | None, reference: bool, in_16_bits: bool
) -> dict[str, float]:
    """Return the FLOPs of rollouts, for each optimizer step that follows them: of sampling, and of scoring samples.

    Each response is sampled with a prompt of its own, and scored so by the reward model. Policy gradients need the log-
    probabilities of the reference too, values of the critic, and in 16 bits those of the policy.
    """
    method = config.method
    if not isinstance(method, Online):
        return {}
    prompts = method.prompts / method.updates
    alone = Work.of_pair(sizes.prompt, sizes.response, method.samples, shared_prompt=False).times(prompts)
    packed = Work.of_pair(sizes.prompt, sizes.response, method.samples).times(prompts)
    scoring = 0.0 if scorer is None else scorer.shape.body_flops(alone)
    if isinstance(method, PolicyGradient):
        passes = reference + in_16_bits
        scoring += passes * (shape.body_flops(packed) + shape.head_flops(packed))
        scoring += method.has_critic * shape.body_flops(packed)
    return {"sampling": shape.body_flops(alone) + shape.head_flops(alone), "scoring": scoring}
