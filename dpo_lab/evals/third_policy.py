"""A third policy that the trained one is compared with, with the prompts as tokens of its own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_lab.core.pairs import Tokens
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.models.policy import Policy


@dataclass(frozen=True)
class ThirdPolicy:
    """The policy. encoder: of its own tokenizer; prompt_ids: the prompts of the samples as its token ids; shares_tokens:
    whether these are the tokens of the other two policies, with the same meaning.
    """

    policy: Policy
    encoder: PairTokenizer
    prompt_ids: Sequence[Tokens]
    shares_tokens: bool
