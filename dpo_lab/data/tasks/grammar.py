"""The grammar of the synthetic reviews: samples reviews, and parses any text back exactly.

    review   := sentence (" " sentence)*
    sentence := [opener ","] clause (connective clause)* "."          first letter in capitals
    clause   := aspect copula ["not"] [intensifier] adjective          the plot was not very good
              | "I" [adverb] opinion aspect                            I really enjoyed the plot
              | "there was" quantity quality "in" aspect               there was no charm in the plot
              | aspect "left me" [intensifier] effect                  the plot left me cold
    aspect   := ("the" | "its") noun

Membership is decidable: the words of each slot are disjoint from what may follow, connectives and full stops split a
review into clauses in one way only, and a clause matches at most one of four patterns. So `parse` finds in any text
which stretches are clauses, the valence of each, and whether the text is a review; the gold reward is computed from its
result (see reviews.py).
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from dpo_lab.data.tasks import lexicon as lex


@dataclass(frozen=True)
class Clause:
    """A stretch of text between connectives and full stops.

    valence: its valence (0 if it is not a clause of the grammar); weight: its weight by the contrasts in its sentence;
    well_formed: whether it is a clause of the grammar.
    """

    valence: float
    weight: float
    well_formed: bool


@dataclass(frozen=True)
class Review:
    """A parsed text: its clauses, its number of sentences, and whether it is in the grammar."""

    clauses: tuple[Clause, ...]
    sentences: int
    well_formed: bool


def sample_review(rng: random.Random, clauses: int) -> str:
    """Sample a review of exactly `clauses` clauses in one to `clauses` sentences."""
    return "".join(_sample_parts(rng, clauses))


def sample_prompt(rng: random.Random, clauses: int) -> str:
    """Sample a prompt: the start of a review up to its first word with a valence."""
    return _sample_parts(rng, clauses)[0]


def parse(text: str) -> Review:
    """Parse any text into sentences and clauses with valences; see `well_formed` for whether it is in the grammar."""
    sentences = re.findall(r"[^.]+\.?", text)
    clauses: list[Clause] = []
    well_formed = bool(sentences) and "".join(sentences) == text
    for number, raw in enumerate(sentences):
        sentence = raw.removeprefix(" ")
        well_formed &= raw.startswith(" ") == (number > 0) and sentence[:1].isupper() and sentence.endswith(".")
        sentence = sentence.removesuffix(".")
        body = _OPENER.sub("", sentence, count=1)
        if body == sentence and not body.startswith("I "):  # no opener: the clause itself is capitalised
            body = body[:1].lower() + body[1:]
        first, *rest = _CONNECTIVE.split(body)  # clause, connective, clause, ...
        stretches = [first, *(part.removeprefix(" ") for part in rest[1::2])]
        for stretch, weight in zip(stretches, _contrast_weights(rest[::2]), strict=True):
            valence = _clause_valence(stretch)
            clauses.append(Clause(valence or 0.0, weight, valence is not None))
    return Review(tuple(clauses), len(sentences), well_formed and all(c.well_formed for c in clauses))


def _sample_parts(rng: random.Random, clauses: int) -> tuple[str, str]:
    """Sample a review as (prompt, rest)."""
    cuts = {i for i in range(1, clauses) if rng.random() < 0.35}  # a new sentence starts at these clauses
    prompt, text = "", ""
    for i in range(clauses):
        starts = i == 0 or i in cuts
        lead = ""
        if starts:
            text += ". " if i else ""
            lead = rng.choice(lex.OPENERS) + ", " if rng.random() < 0.4 else ""
        else:
            text += rng.choice(_CONNECTIVE_WORDS) + " "
        head, tail = _sample_clause(rng)
        if starts:
            opening = lead + head
            lead, head = "", opening[0].upper() + opening[1:]
        text += lead + head
        prompt = prompt or text
        text += tail
    return prompt, text[len(prompt) :] + "."


def _sample_clause(rng: random.Random) -> tuple[str, str]:
    """Sample a clause as (head, tail); the head has no words with a valence."""
    aspect = f"{rng.choice(lex.DETERMINERS)} {rng.choice(lex.ASPECTS)}"
    kind = rng.choices(range(4), weights=(5, 2, 2, 2))[0]
    if kind == 0:
        copula = " " + rng.choice(lex.COPULAS)
        negated = " not" if rng.random() < 0.15 else ""
        tail = negated + _word(rng, _INTENSIFIERS) + _word(rng, _ADJECTIVES)
        return (aspect + copula, tail) if rng.random() < 0.5 else (aspect, copula + tail)
    if kind == 1:
        return "I", _word(rng, _ADVERBS) + _word(rng, _OPINIONS) + " " + aspect
    if kind == 2:
        return "there was", _word(rng, _QUANTITIES) + _word(rng, _QUALITIES) + " in " + aspect
    return aspect + " left me", _word(rng, _INTENSIFIERS) + _word(rng, _EFFECTS)


Slot = tuple[list[str], list[float]]  # words of a slot and their sampling weights


def _slot(table: dict[str, float]) -> Slot:
    """Return the words of a table with sampling weights: the empty word is common, words of large valence are rare."""
    return list(table), [6.0 / (2.0 + abs(value)) if word else 6.0 for word, value in table.items()]


def _word(rng: random.Random, slot: Slot) -> str:
    """Sample a word of the slot and prepend a space, except to the empty word."""
    word = rng.choices(slot[0], weights=slot[1])[0]
    return " " + word if word else ""


_INTENSIFIERS, _ADJECTIVES = _slot(lex.INTENSIFIERS), _slot(lex.ADJECTIVES)
_ADVERBS, _OPINIONS = _slot(lex.OPINION_ADVERBS), _slot(lex.OPINIONS)
_QUANTITIES, _QUALITIES = _slot(lex.QUANTITIES), _slot(lex.QUALITIES)
_EFFECTS = _slot(lex.EFFECTS)
_CONNECTIVE_WORDS = list(lex.CONNECTIVES)


def _any(words: dict[str, float] | tuple[str, ...]) -> str:
    return "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True) if w)


def _optional(words: dict[str, float]) -> str:
    return rf"(?:({_any(words)}) )?"


_ASPECT = rf"(?:{_any(lex.DETERMINERS)}) (?:{_any(lex.ASPECTS)})"
_OPENER = re.compile(rf"^(?:{_any(tuple(o[0].upper() + o[1:] for o in lex.OPENERS))}), ")
_CONNECTIVE = re.compile(rf"({_any(tuple(lex.CONNECTIVES))})(?= )")
_CLAUSES: tuple[tuple[re.Pattern[str], tuple[dict[str, float], ...]], ...] = (
    (
        re.compile(
            rf"{_ASPECT} (?:{_any(lex.COPULAS)}) (?:(not) )?{_optional(lex.INTENSIFIERS)}({_any(lex.ADJECTIVES)})"
        ),
        ({"not": lex.NEGATION}, lex.INTENSIFIERS, lex.ADJECTIVES),
    ),
    (
        re.compile(rf"I {_optional(lex.OPINION_ADVERBS)}({_any(lex.OPINIONS)}) {_ASPECT}"),
        (lex.OPINION_ADVERBS, lex.OPINIONS),
    ),
    (
        re.compile(rf"there was ({_any(lex.QUANTITIES)}) ({_any(lex.QUALITIES)}) in {_ASPECT}"),
        (lex.QUANTITIES, lex.QUALITIES),
    ),
    (
        re.compile(rf"{_ASPECT} left me {_optional(lex.INTENSIFIERS)}({_any(lex.EFFECTS)})"),
        (lex.INTENSIFIERS, lex.EFFECTS),
    ),
)


def _clause_valence(text: str) -> float | None:
    """Return the valence of a clause, the product of its words' factors; None if it is not a clause."""
    for pattern, tables in _CLAUSES:
        if match := pattern.fullmatch(text):
            value = 1.0
            for word, table in zip(match.groups(), tables, strict=True):
                value *= table[word] if word else 1.0
            return value
    return None


def _contrast_weights(connectives: list[str]) -> list[float]:
    """Return the weight of each clause of a sentence: a contrast scales all clauses before it and all after it."""
    weights = [1.0] * (len(connectives) + 1)
    for at, connective in enumerate(connectives, start=1):
        before, after = lex.CONNECTIVES[connective]
        weights = [w * (before if i < at else after) for i, w in enumerate(weights)]
    return weights
