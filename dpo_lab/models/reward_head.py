"""Reward models: the body of a causal language model with a scalar head, and the scores of responses."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from dpo_lab.models.paths import apply_path, causal_lm, last_rows, path_of
from dpo_lab.models.policy import PolicyError
from dpo_lab.models.sharding import device_of, one_pass

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from transformers import PreTrainedModel


def with_reward_head(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Return a reward model of one label, of transformers' class for sequence classification: the causal language
    model's body, which is not copied, and a head from `seed`, normal with standard deviation 1 / sqrt(width + 1).

    That is the head of Stiennon et al. 2020, as Huang et al. 2024 (arXiv:2403.17031) report. From one of zeros the body of
    the embedded policy gets too little gradient at first, and may learn nothing in a hundred steps.

    Adapters stay around the body; their model is changed in place. The reward model takes the forward path of the causal
    model. Raises PolicyError if transformers has no such class for the architecture.
    """
    bare: Any = causal_lm(model)
    path, config = path_of(model), copy.deepcopy(bare.config)
    config.num_labels = 1
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    name = type(bare).__name__
    if kind is None:
        raise PolicyError(
            f"policy: transformers has no model for sequence classification beside {name}, so it can't be a reward model;"
            " type policy.path= of another architecture"
        )
    with torch.device("meta"):
        rewarder = kind(config)
    body, head = getattr(rewarder, kind.base_model_prefix, None), getattr(rewarder, "score", None)
    if type(body) is not type(bare.base_model) or type(head) is not nn.Linear:
        raise PolicyError(
            f"policy: transformers' {kind.__name__} does not have the body of {name} and a linear head `score`, so it"
            " can't be a reward model; type policy.path= of another architecture"
        )
    setattr(rewarder, kind.base_model_prefix, bare.base_model)
    like = bare.get_input_embeddings().weight
    dtype = like.dtype if like.is_floating_point() else torch.float32
    rewarder.score = nn.Linear(head.in_features, 1, bias=False, device="meta")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = torch.randn(1, head.in_features) / math.sqrt(head.in_features + 1)
    rewarder.score.weight = nn.Parameter(start.to(like.device, dtype))
    apply_path(rewarder, path)
    if bare is model:
        return rewarder
    model.base_model.model = rewarder  # type: ignore[union-attr]  # where peft keeps the model with adapters
    return model


@one_pass
def response_rewards(
    model: PreTrainedModel, tokens: Int[Tensor, " tokens"], lengths: Int[np.ndarray, "items parts"]
) -> Float[Tensor, "items parts-1"]:
    """Return the reward of each item's responses given its prompt, from the hidden state of the response's last token.

    Differentiable, in float32 or higher. tokens: a packed stream of prompts and responses; lengths: of each part, see
    core/logps.py.
    """
    rows, weight = last_rows(model, tokens, lengths), causal_lm(model).score.weight[0]  # type: ignore[union-attr,index]
    dtype = torch.promote_types(torch.promote_types(rows.dtype, weight.dtype), torch.float32)
    return (rows.to(dtype) * weight.to(dtype)).sum(-1)


def dummy_reward(model: PreTrainedModel) -> Float[Tensor, "1 1"]:
    """Return the reward of a response of one token, for a pass that other ranks need."""
    tokens = torch.zeros(2, dtype=torch.long, device=device_of(model))
    return response_rewards(model, tokens, np.ones((1, 2), int))
