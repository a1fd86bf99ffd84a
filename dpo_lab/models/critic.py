"""The critic of PPO: the value of the state before each response token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpo_lab.models.copies import trainable_copy
from dpo_lab.models.paths import causal_lm, path_of, response_rows
from dpo_lab.models.policy import PolicyError
from dpo_lab.models.sharded_weights import sharded_copy
from dpo_lab.models.sharding import is_sharded, one_pass

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from transformers import PreTrainedModel


class Critic(nn.Module):
    """A copy of the initial policy, of which only the body is used, with a linear head of its hidden states, `value_head`.

    Of a policy with adapters only the adapters are copied; the base model is shared. The head starts at 0. It is part of the
    model, so that it is sharded with it.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        if path_of(policy).vocabulary is None:
            raise PolicyError(
                "method=ppo: this policy returns no hidden states of single tokens, from which a critic is trained; type"
                " method=rloo"
            )
        whole: Any = policy
        dtype = next(weight.dtype for weight in policy.parameters() if weight.requires_grad)  # FSDP requires one
        head = nn.Linear(whole.get_output_embeddings().weight.shape[1], 1, dtype=dtype)
        if is_sharded(policy):
            self.model = sharded_copy(policy, {"value_head": head})
        else:
            self.model = trainable_copy(policy)
            self.model.value_head = head.to(next(policy.parameters()).device)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        bare: Any = causal_lm(self.model)
        unused, body = bare.get_output_embeddings(), bare.get_input_embeddings()
        if unused.weight is not body.weight:
            unused.requires_grad_(False)  # a tied one is the embedding

    def forward(
        self, tokens: Int[Tensor, " tokens"], lengths: Int[np.ndarray, "items parts"]
    ) -> Float[Tensor, " response_tokens"]:
        """Return the value of the state before each response token of a packed stream, in units of the reward."""
        return _values(self.model, tokens, lengths)


@one_pass
def _values(model: PreTrainedModel, tokens: Tensor, lengths: np.ndarray) -> Tensor:
    head: Any = model.value_head
    hidden, _, _ = response_rows(model, tokens, lengths)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), head.weight.float(), head.bias.float())[:, 0]
