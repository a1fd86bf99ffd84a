"""Check that token ids and lengths fit a model: rows of its embedding, positions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.core.pair_table import PairTable
from dpo_lab.core.pairs import Tokens
from dpo_lab.models.paths import causal_lm
from dpo_lab.models.policy import PolicyError
from dpo_lab.models.probes import hard_positions, positions_of, ropes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dpo_lab.models.policy import Policy

log = logging.getLogger(__name__)

# RoPE types whose angles depend on the longest row of a batch if it exceeds this config value.
DEPENDS_ON_THE_BATCH = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}


@dataclass(frozen=True)
class Limits:
    """The limits of a model. rows: number of rows of its embedding; positions: number of positions it was trained for,
    None without such a limit; why_hard: why more positions can't be computed, None if they can.
    """

    rows: int
    positions: int | None
    why_hard: str | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Limits:
        """Read the limits of a model from its modules and its config."""
        rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index,union-attr]
        config, positions = causal_lm(model).config.get_text_config(), positions_of(model)
        for rope in ropes_of(model):
            kind = rope.get("rope_type", "default")
            if name := DEPENDS_ON_THE_BATCH.get(kind):
                positions = rope.get(name) or getattr(config, name, None) or positions
                return cls(rows, positions, f"with its position embedding ({kind}) a longer row changes the others")
        return cls(rows, positions, "no more can be computed" if hard_positions(model) else None)

    def check_length(self, length: int, what: str, remedy: str) -> None:
        """Raise PolicyError if a row of this length can't be computed; warn if the model was not trained for it."""
        if self.positions is None or length <= self.positions:
            return
        fault = f"{what} is {length:,} tokens long, the model has {self.positions:,} positions"
        if self.why_hard is not None:
            raise PolicyError(f"{fault}, and {self.why_hard}; {remedy}")
        log.warning("policy: %s: it was not trained on more; %s, if this is not intended", fault, remedy)

    def check_rows(self, pairs: PairTable, max_length: int) -> None:
        """Call check_length for the longest pair: its prompt and the longer response."""
        lengths = pairs.lengths[:, 0] + pairs.lengths[:, 1:].max(1, initial=0)
        if len(pairs):
            longest = int(lengths.argmax())
            what = f"data.max_length={max_length}: pair {pairs.key(longest)}"
            self.check_length(int(lengths[longest]), what, f"type data.max_length={self.positions}")

    def check_samples(self, prompts: Sequence[Tokens], new_tokens: int, key: str) -> None:
        """Call check_length for the longest prompt and `new_tokens` sampled after it, and check the prompts' token ids.

        key: the config key of new_tokens.
        """
        longest = max(map(len, prompts), default=0)
        room = (self.positions or 0) - longest
        remedy = f"type {key}={room}" if room > 0 else f"type a data.max_prompt_length below {self.positions}"
        what = f"{key}={new_tokens}: with the longest prompt, of {longest:,} tokens, a sample"
        self.check_length(longest + new_tokens, what, remedy)
        if (token := max((max(prompt) for prompt in prompts if len(prompt)), default=0)) >= self.rows:
            raise PolicyError(
                f"a prompt has token {token}, the model's embedding {self.rows:,} rows: the tokenizer is not that of the"
                " model; type policy.path= of a model with its own tokenizer"
            )

    def check_ids(self, pairs: PairTable, policy: Policy) -> None:
        """Raise PolicyError if a token id of a pair exceeds the embedding."""
        if not len(pairs) or pairs.tokens.max() < self.rows:
            return
        for start, size, key in zip(pairs.starts, pairs.sizes, pairs.keys, strict=True):
            ids = pairs.tokens[start : start + size]
            if (beyond := ids >= self.rows).any():
                token = int(ids[beyond][0])
                word = policy.tokenizer.convert_ids_to_tokens(token)
                raise PolicyError(
                    f"pair {key.decode()}: token {token} ({word!r}) is beyond the {self.rows:,} rows of the model's"
                    f" embedding, and its tokenizer has {len(policy.tokenizer):,} tokens: the tokenizer is not that of the"
                    " model; type policy.path= of a model with its own tokenizer"
                )
