"""Pairs of text to pairs of token ids: joined at token level, truncated, every drop counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_lab.core.pairs import EncodedPair, Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Encoder:
    """Token ids of prompts and responses.

    A prompt is the begin token (where the tokenizer has one) and its last tokens, at most max_prompt_length in all; a
    response is its first tokens and the end token, as many as fit into max_length with the prompt. Both responses of a
    pair keep the same prompt. A truncated response loses its end token: it does not end there. Without `ends` no response
    has one: all were cut before they came here.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_prompt_length: int
    ends: bool = True

    @property
    def eos_id(self) -> int:
        return int(self.tokenizer.eos_token_id)  # type: ignore[arg-type]

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]

    def text(self, tokens: Sequence[int]) -> str:
        """A response's token ids as text, without its closing end token; any other special token in it is shown."""
        ended = len(tokens) > 0 and tokens[-1] == self.eos_id
        return str(self.tokenizer.decode(list(tokens[:-1] if ended else tokens), skip_special_tokens=False))

    def prompt(self, text: str) -> list[int]:
        return self._fit_prompt(self._ids(text))

    def response(self, text: str, prompt: Sequence[int]) -> list[int]:
        """Token ids of a response to an encoded prompt."""
        return self._fit_response(self._ids(text), prompt)

    def pairs(self, pairs: Iterable[Pair], counts: Counter[str]) -> list[EncodedPair]:
        """Encode all pairs; counts gains how many were truncated or dropped, by reason."""
        pairs = list(pairs)
        texts = [text for p in pairs for text in (p.prompt, p.chosen, p.rejected)]
        ids = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else iter(())
        encoded: list[EncodedPair] = []
        for pair, prompt, chosen, rejected in zip(pairs, ids, ids, ids, strict=True):
            fitted = self._fit_prompt(prompt)
            sides = (self._fit_response(chosen, fitted), self._fit_response(rejected, fitted))
            counts["prompts truncated"] += len(prompt) > self._prompt_room
            counts["responses truncated"] += sum(
                len(side) < len(ids) + self.ends for side, ids in zip(sides, (chosen, rejected), strict=True)
            )
            if sides[0] == sides[1]:
                counts["dropped: identical after truncation"] += 1
                continue
            encoded.append(EncodedPair(pair.key, fitted, sides[0], sides[1], pair.gold_margin))
        return encoded

    @property
    def _prompt_room(self) -> int:
        return self.max_prompt_length - (self.tokenizer.bos_token_id is not None)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _fit_prompt(self, ids: list[int]) -> list[int]:
        """The begin token and the last tokens. Without either, the end token: a response is predicted from something."""
        begin: list[int] = [] if self.tokenizer.bos_token_id is None else [int(self.tokenizer.bos_token_id)]  # type: ignore
        return begin + ids[max(0, len(ids) - self._prompt_room) :] or [self.eos_id]

    def _fit_response(self, ids: list[int], prompt: Sequence[int]) -> list[int]:
        return [*ids, *[self.eos_id] * self.ends][: self.max_length - len(prompt)]
