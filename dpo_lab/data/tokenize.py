"""Tokenize pairs of text or chat messages: join prompt and response as token ids, truncate, and count every dropped
pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_lab.core.pairs import EncodedPair, Pair, Text, content_hash
from dpo_lab.data.assistant_text import common_prefix, split_response
from dpo_lab.data.chat import BadChat, Chat
from dpo_lab.data.content_checks import check_content, check_marks
from dpo_lab.data.row_faults import BEGUN, DATE, DATED, SEVERAL, SPECIAL, UNKNOWN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]
Pieces = list[Ids]  # of a response: what is scored and what is not, in turn; the first is scored and may be empty
BEFORE = ("\n", "a", "0", ".", "|")  # prefixes to tokenize a text behind, as inside a longer text
SHOWN = 20  # characters of a text to show in an error


@dataclass
class PairTokenizer:
    """Encodes prompts and responses to token ids.

    A prompt of plain text has the tokens that the tokenizer prepends to every text (a begin token, or none) and the
    last tokens of the prompt, max_prompt_length in all at most. A response has its first tokens and the end token, as
    many as fit into max_length after the prompt; a truncated response has no end token. Both responses of a pair have
    the same prompt. A chat is rendered by the tokenizer's template: the prompt ends where the assistant's answer
    begins, a response is the answer up to the token that ends its turn; text of the template after that is left out.
    In a response of several messages what the assistant wrote is scored, see assistant_text.py, and tokenized on its own.
    Without `append_eos` responses of plain text have no end token: all of them were truncated before.

    No token spans prompt and response, and their tokens together decode to the concatenated text. So both responses of
    a pair follow the same prompt tokens, which are those of sampling. A response is tokenized as inside a text, not as
    a text of its own, to which SentencePiece would prepend a space.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_prompt_length: int
    append_eos: bool = True

    @cached_property
    def eos_id(self) -> int:
        return int(self.tokenizer.eos_token_id)  # type: ignore[arg-type]

    @cached_property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a response: the end token, and the token that ends a turn of the chat template."""
        turn = self._ids(self._chat.turn_end)[-1:] if self._chat.has_template else []
        return tuple(dict.fromkeys([self.eos_id, *turn]))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Token ids that should not occur in plain text."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(self.tokenizer.all_special_ids) | {number for number, token in added if token.special}

    @cached_property
    def anchor(self) -> list[int]:
        """Plain tokens to put before others for decoding, since the first token of a text may lose its space."""
        return self._ids("a")

    def is_truncated(self, prompt: Any, response: Any, last: Any) -> np.ndarray:
        """Return which responses were truncated, from the lengths of prompt and response and the last token."""
        return (
            np.isin(last, self.end_ids, invert=True)
            if self.append_eos
            else np.asarray(prompt + response >= self.max_length)
        )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that determines the token ids of a text."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        special = sorted((name, str(token)) for name, token in self.tokenizer.special_tokens_map.items())
        kind = type(self.tokenizer).__name__
        template = self.tokenizer.chat_template  # type: ignore[attr-defined]
        if template and self._chat.writes_date:
            template = [template, DATE.isoformat()]
        return content_hash(
            [kind, words, special, template, self.max_length, self.max_prompt_length, self.append_eos, "format 1"]
        )

    def text(self, tokens: Sequence[int]) -> str:
        """Decode a response, without its end token but with all other special tokens."""
        has_end = len(tokens) > 0 and tokens[-1] in self.end_ids
        ids = list(tokens[:-1] if has_end else tokens)
        if self._adds_no_space:
            return str(self.tokenizer.decode(ids, skip_special_tokens=False))
        before, both = self._decoded(self.anchor), self._decoded([*self.anchor, *ids])
        return both.removeprefix(before) if both.startswith(before) else self._decoded(ids)

    def prompt_text(self, tokens: Sequence[int]) -> str:
        """Decode a prompt, without the tokens that the tokenizer prepends to every text."""
        start = len(self._begin) if self._is_begun(list(tokens[: len(self._begin)])) else 0
        return str(self.tokenizer.decode(list(tokens[start:]), skip_special_tokens=False))

    def prompt(self, text: str) -> Ids:
        """Encode a prompt of plain text."""
        ids = self._ids(text)
        return self._fit_prompt(self._begin, ids[len(self._begin) :] if self._is_begun(ids) else ids)

    def response(self, text: str, prompt: Sequence[int]) -> Ids:
        """Encode a response of plain text to an encoded prompt."""
        starts_text = self._adds_no_space or self.special_ids.issuperset(prompt)
        return self._with_end(self._ids(text) if starts_text else self._inside(text))[: self.max_length - len(prompt)]

    def pairs(self, pairs: Iterable[Pair], counts: Counter[str]) -> list[EncodedPair]:
        """Encode all pairs and add to `counts` how many were truncated or dropped, by reason.

        Raises BadChat if a chat can't be rendered, NoTemplate if no chat can.
        """
        encoded = (self.encode(pair, ids, counts) for pair, ids in self.tokenize(pairs, counts))
        return [pair for pair in encoded if pair is not None]

    def tokenize(self, pairs: Iterable[Pair], counts: Counter[str]) -> list[tuple[Pair, tuple[Ids, Pieces, Pieces]]]:
        """Return each pair with the ids of prompt, chosen and rejected, before truncation, begin and end tokens."""
        pairs = list(pairs)
        texts = [self._texts(pair, counts) for pair in pairs]
        prompts = self._batch([prompt for prompt, *_ in texts])
        sides = self._batch([s[0] if self._adds_no_space else p + s[0] for p, *both in texts for s in both])
        if not self._adds_no_space:
            for i, (prompt, (_, *both)) in enumerate(zip(prompts, texts, strict=True)):
                for j, side in enumerate(both, start=2 * i):
                    is_prefix = sides[j][: len(prompt)] == prompt
                    sides[j] = sides[j][len(prompt) :] if is_prefix else self._inside(side[0])
        later = self._ids if self._adds_no_space else self._inside
        rest = ([later(text) for text in side[1:]] for _, *both in texts for side in both)
        pieces = [[first, *others] for first, others in zip(sides, rest, strict=True)]
        return list(zip(pairs, zip(prompts, pieces[::2], pieces[1::2], strict=True), strict=True))

    def encode(self, pair: Pair, ids: tuple[Ids, Pieces, Pieces], counts: Counter[str]) -> EncodedPair | None:
        """Add begin and end tokens and truncate; return None, and count it, if both responses are the same then."""
        text, *pieces = ids
        joined = [[number for piece in side for number in piece] for side in pieces]
        if pair.is_chat:
            begin, text = (self._bos, text[1:]) if self._bos and text[:1] == self._bos else ([], text)
            room = self.max_prompt_length - len(begin)
        else:
            begin, room = self._begin, self.max_prompt_length - len(self._begin)
            if self._is_begun(text):
                text = text[len(begin) :]
                counts[BEGUN] += 1
            if not self._special_but_unknown.isdisjoint(text):
                counts[SPECIAL] += 1
        if self.unknown_ids and not all(map(self.unknown_ids.isdisjoint, (ids[0], *joined))):
            counts[UNKNOWN] += 1
        prompt = self._fit_prompt(begin, text)
        sides = [
            self._with_end(side) if name in pair.responses else []
            for name, side in zip(("chosen", "rejected"), joined, strict=True)
        ]
        if pair.responses and sides[0] == sides[1]:
            counts["dropped: identical as tokens"] += 1
            return None
        chosen, rejected = (side[: self.max_length - len(prompt)] for side in sides)
        counts["prompts truncated"] += len(text) > room
        counts["responses truncated"] += (len(chosen) < len(sides[0])) + (len(rejected) < len(sides[1]))
        if pair.responses and chosen == rejected:
            counts["dropped: identical after truncation"] += 1
            return None
        scored = None
        if any(len(side) > 1 for side in pieces):
            counts[SEVERAL] += 1
            scored = _is_scored(pieces[0], len(chosen)), _is_scored(pieces[1], len(rejected))
        return EncodedPair(pair.key, prompt, chosen, rejected, pair.gold_margin, scored=scored)

    def _texts(self, pair: Pair, counts: Counter[str]) -> tuple[str, list[str], list[str]]:
        """Return the prompt, and of each response what is scored and what is not, in turn."""
        if not pair.is_chat:
            return pair.prompt, [pair.chosen], [pair.rejected]  # type: ignore[return-value,list-item]
        prompt = self._chat.render(_messages(pair.prompt), pair.tools, answer_next=True)
        wholes = [
            self._chat.render(_messages(pair.prompt) + _messages(side), pair.tools) for side in pair.responses.values()
        ]
        start = len(prompt)  # offset of the answers
        if not all(whole.startswith(prompt) for whole in wholes):
            prompt, start = self._without_opening(pair, prompt, wholes)
            counts["prompts without the opening of an answer that the chat template takes back"] += 1
        check_content(pair, prompt, wholes, start, counts)
        check_marks(pair, *self._chat.marks, counts)
        if self._chat.writes_date:
            counts[DATED] += 1
        by_side = {
            name: [self._chat.until_turn_end(whole[len(prompt) :])]
            if len(side) == 1
            else split_response(self._chat, _messages(pair.prompt), _messages(side), pair.tools, whole, len(prompt))
            for (name, side), whole in zip(pair.responses.items(), wholes, strict=True)
        }
        return prompt, by_side.get("chosen", [""]), by_side.get("rejected", [""])

    def _without_opening(self, pair: Pair, prompt: str, wholes: list[str]) -> tuple[str, int]:
        """Shorten the prompt to what both rendered answers begin with, for templates that open an answer with text that
        given answers do not have ('<think>'); return it and the offset where the question ends.
        """
        closed = self._chat.render(_messages(pair.prompt), pair.tools)
        if not all(whole.startswith(closed) for whole in wholes):
            raise BadChat(
                "the chat template writes the prompt otherwise once it is answered; type another"
                " policy.chat_template=FILE.jinja"
            )
        return common_prefix(prompt, *wholes), len(closed)

    @cached_property
    def _chat(self) -> Chat:
        return Chat(self.tokenizer)

    @cached_property
    def _begin(self) -> Ids:
        """The tokens that the tokenizer prepends to every text."""
        without, ids = self._ids("a"), list(self.tokenizer("a")["input_ids"])
        start = next((i for i in range(len(ids)) if ids[i : i + len(without)] == without), 0)
        return ids[:start]

    @cached_property
    def _bos(self) -> Ids:
        return [] if (bos := self.tokenizer.bos_token_id) is None else [int(bos)]  # type: ignore[arg-type]

    @cached_property
    def unknown_ids(self) -> frozenset[int]:
        """The unknown token, unless it is another special token as well."""
        tokenizer = self.tokenizer
        others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, None)
        return frozenset() if tokenizer.unk_token_id in others else frozenset([int(tokenizer.unk_token_id)])  # type: ignore[arg-type]

    @cached_property
    def _special_but_unknown(self) -> frozenset[int]:
        """Special tokens other than the unknown token, which occur only if a text spells them."""
        return self.special_ids - self.unknown_ids

    @cached_property
    def _adds_no_space(self) -> bool:
        """Whether the first word of a text is tokenized as after a line break, and decodes without a space."""
        ids_of = {text: self._ids(text) for text in ("a", " a")}
        return all(
            self._ids("a\n" + text)[-len(ids) :] == ids and self._decoded(ids_of["a"] + ids).endswith("a" + text)
            for text, ids in ids_of.items()
        )

    def _inside(self, text: str) -> Ids:
        """Encode a text as inside a longer text, for tokenizers that treat the start of a text differently.

        Raises ValueError if that is not possible: a tokenizer of whole words, and a text that begins inside a word.
        """
        for before in BEFORE:
            first, both = self._batch([before, before + text])
            joined = self._decoded(first) + text[:1]  # only the first character: a tokenizer may normalise later ones
            if both[: len(first)] == first and self._decoded(both).casefold().startswith(joined.casefold()):
                return both[len(first) :]
        raise ValueError(
            f"the tokenizer has no tokens for {text[:SHOWN]!r} right after its prompt; let the prompt end where a word"
            " ends"
        )

    def _decoded(self, ids: Ids) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _is_begun(self, ids: Ids) -> bool:
        """Return whether ids start with the tokens that the tokenizer prepends to every text."""
        return bool(self._begin) and ids[: len(self._begin)] == self._begin

    def _ids(self, text: str) -> Ids:
        return self._batch([text])[0]

    def _batch(self, texts: list[str]) -> list[Ids]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _fit_prompt(self, begin: Ids, ids: Ids) -> Ids:
        """Return begin tokens and the last ids; if both are empty one special token, as the prompt."""
        fitted = begin + ids[max(0, len(ids) - self.max_prompt_length + len(begin)) :]
        return fitted or self._bos or [self.eos_id]

    def _with_end(self, ids: Ids) -> Ids:
        return ids if not self.append_eos or (ids and ids[-1] in self.end_ids) else [*ids, self.eos_id]


def _is_scored(pieces: Pieces, length: int) -> np.ndarray:
    """Return which of a response's first `length` tokens are scored: every other piece, and the end token."""
    scored = [at % 2 == 0 for at, piece in enumerate(pieces) for _ in piece]
    return np.array([*scored, True][:length])


def _messages(text: Text) -> list:
    assert not isinstance(text, str)
    return text
