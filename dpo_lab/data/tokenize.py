"""Pairs of text or chat messages to pairs of token ids: joined at token level, truncated, every drop counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_lab.core.pairs import EncodedPair, Pair, Text, content_hash
from dpo_lab.data.chat import BadChat, Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]


@dataclass
class Encoder:
    """Token ids of prompts and responses.

    A prompt of plain text is what the tokenizer begins every text with (a begin token, or nothing) and the prompt's last
    tokens, at most max_prompt_length in all; a response is its first tokens and the end token, as many as fit into
    max_length with the prompt. Both responses of a pair keep the same prompt. A truncated response loses its end token: it
    does not end there. A chat is rendered by the tokenizer's template: its prompt ends where the assistant's answer
    begins, a response is the answer and the token that ends its turn; what a template writes after that is left out. Without
    `ends` no response of plain text has an end token: all were cut before they came here.

    Prompt and response are tokenised apart, so that none of their tokens lies across the border; where a tokenizer treats the
    first word of a text specially, a response is what follows the prompt's tokens in the whole.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_prompt_length: int
    ends: bool = True

    @cached_property
    def eos_id(self) -> int:
        return int(self.tokenizer.eos_token_id)  # type: ignore[arg-type]

    @cached_property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a response: the end token, and that which ends a turn under the chat template."""
        turn = self._ids(self._chat.turn_end)[-1:] if self._chat.has_template else []
        return tuple(dict.fromkeys([self.eos_id, *turn]))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokens that no plain text should become."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(self.tokenizer.all_special_ids) | {number for number, token in added if token.special}

    @cached_property
    def anchor(self) -> list[int]:
        """Plain tokens to decode another one after, since the first of a text may lose its space."""
        return self._ids("a")

    def cut(self, prompt: Any, response: Any, last: Any) -> np.ndarray:
        """Which responses were truncated, by the number of tokens of prompt and response and the response's last token."""
        return (
            np.isin(last, self.end_ids, invert=True) if self.ends else np.asarray(prompt + response >= self.max_length)
        )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides which ids a text becomes."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        special = sorted((name, str(token)) for name, token in self.tokenizer.special_tokens_map.items())
        kind = type(self.tokenizer).__name__
        template = self.tokenizer.chat_template  # type: ignore[attr-defined]
        return content_hash(
            [kind, words, special, template, self.max_length, self.max_prompt_length, self.ends, "format 1"]
        )

    def text(self, tokens: Sequence[int]) -> str:
        """A response's token ids as text, without its closing end token; any other special token in it is shown."""
        ended = len(tokens) > 0 and tokens[-1] in self.end_ids
        return str(self.tokenizer.decode(list(tokens[:-1] if ended else tokens), skip_special_tokens=False))

    def prompt_text(self, tokens: Sequence[int]) -> str:
        """A prompt's token ids as text, without what the tokenizer begins every text with."""
        begun = self._begin and list(tokens[: len(self._begin)]) == self._begin
        return str(self.tokenizer.decode(list(tokens[len(self._begin) if begun else 0 :]), skip_special_tokens=False))

    def prompt(self, text: str) -> Ids:
        """Token ids of a prompt of plain text."""
        return self._fit_prompt(self._begin, self._ids(text))

    def response(self, text: str, prompt: Sequence[int]) -> Ids:
        """Token ids of a response of plain text to an encoded prompt."""
        return self._ended(self._ids(text))[: self.max_length - len(prompt)]

    def pairs(self, pairs: Iterable[Pair], counts: Counter[str]) -> list[EncodedPair]:
        """Encode all pairs; counts gains how many were truncated or dropped, by reason.

        Raises BadChat where a chat can't be rendered, NoTemplate where no chat can.
        """
        encoded = (self.encode(pair, ids, counts) for pair, ids in self.tokenised(pairs, counts))
        return [pair for pair in encoded if pair is not None]

    def tokenised(self, pairs: Iterable[Pair], counts: Counter[str]) -> list[tuple[Pair, tuple[Ids, Ids, Ids]]]:
        """Each pair with the ids of its prompt, chosen and rejected, all of them before truncation, without begin and end."""
        pairs = list(pairs)
        texts = [self._texts(pair, counts) for pair in pairs]
        prompts = self._batch([prompt for prompt, *_ in texts])
        sides = self._batch([s if self._starts_plainly else p + s for p, *both in texts for s in both])
        if not self._starts_plainly:
            for i, (prompt, (_, *both)) in enumerate(zip(prompts, texts, strict=True)):
                for j, side in enumerate(both, start=2 * i):
                    is_prefix = sides[j][: len(prompt)] == prompt
                    sides[j] = sides[j][len(prompt) :] if is_prefix else self._ids(side)
        return list(zip(pairs, zip(prompts, sides[::2], sides[1::2], strict=True), strict=True))

    def encode(self, pair: Pair, ids: tuple[Ids, Ids, Ids], counts: Counter[str]) -> EncodedPair | None:
        """Begin, truncate and end a tokenised pair; None, and counted, where its sides are the same then."""
        begin = self._begin if not pair.is_chat else self._bos if ids[0][:1] == self._bos else []
        room = self.max_prompt_length - (0 if pair.is_chat else len(begin))
        prompt = self._fit_prompt(begin, ids[0][1:] if pair.is_chat and begin else ids[0])
        ended = [self._ended(side) for side in ids[1:]]
        chosen, rejected = (side[: self.max_length - len(prompt)] for side in ended)
        counts["prompts truncated"] += len(ids[0]) > room
        counts["responses truncated"] += (len(chosen) < len(ended[0])) + (len(rejected) < len(ended[1]))
        if chosen == rejected:
            counts["dropped: identical after truncation"] += 1
            return None
        return EncodedPair(pair.key, prompt, chosen, rejected, pair.gold_margin)

    def _texts(self, pair: Pair, counts: Counter[str]) -> tuple[str, str, str]:
        if not pair.is_chat:
            return pair.prompt, pair.chosen, pair.rejected  # type: ignore[return-value]
        prompt = self._chat.render(_messages(pair.prompt), pair.tools, answer_next=True)
        wholes = [
            self._chat.render(_messages(pair.prompt) + _messages(side), pair.tools)
            for side in (pair.chosen, pair.rejected)
        ]
        if not all(whole.startswith(prompt) for whole in wholes):
            prompt = self._without_opening(pair, prompt, wholes)
            counts["prompts without the opening of an answer that the chat template takes back"] += 1
        chosen, rejected = (self._chat.until_turn_end(whole[len(prompt) :]) for whole in wholes)
        return prompt, chosen, rejected

    def _without_opening(self, pair: Pair, prompt: str, wholes: list[str]) -> str:
        """The prompt up to where answers and the opening of an answer part: a '<think>' that no answer has, say."""
        closed = self._chat.render(_messages(pair.prompt), pair.tools)
        if not all(whole.startswith(closed) for whole in wholes):
            raise BadChat(
                "the chat template writes the prompt otherwise once it is answered; type another policy.chat_template="
            )
        return _common(prompt, *wholes)

    @cached_property
    def _chat(self) -> Chat:
        return Chat(self.tokenizer)

    @cached_property
    def _begin(self) -> Ids:
        """What the tokenizer itself puts before a text."""
        bare, whole = self._ids("a"), list(self.tokenizer("a")["input_ids"])
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return whole[:at]

    @cached_property
    def _bos(self) -> Ids:
        bos = self.tokenizer.bos_token_id
        return [] if bos is None else [int(bos)]  # type: ignore[arg-type]

    @cached_property
    def _starts_plainly(self) -> bool:
        """Whether a text's first word is tokenised as it is after a line break."""
        return all(self._ids("a\n" + text)[-len(self._ids(text)) :] == self._ids(text) for text in ("a", " a"))

    def _ids(self, text: str) -> Ids:
        return self._batch([text])[0]

    def _batch(self, texts: list[str]) -> list[Ids]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _fit_prompt(self, begin: Ids, ids: Ids) -> Ids:
        """The begin tokens and the last ids; without either, one special token: a response is predicted from something."""
        fitted = begin + ids[max(0, len(ids) - self.max_prompt_length + len(begin)) :]
        return fitted or self._bos or [self.eos_id]

    def _ended(self, ids: Ids) -> Ids:
        return ids if not self.ends or (ids and ids[-1] in self.end_ids) else [*ids, self.eos_id]


def _common(*texts: str) -> str:
    """What all texts begin with."""
    letters = enumerate(zip(*texts, strict=False))
    return texts[0][: next((i for i, column in letters if len(set(column)) > 1), min(map(len, texts)))]


def _messages(text: Text) -> list:
    assert not isinstance(text, str)
    return text
