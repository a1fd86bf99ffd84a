"""The words of the synthetic reviews and the reward of each: aspects, valences, intensifiers, connectives."""

from __future__ import annotations

# The aspects that a review is about; they have no valence.
ASPECTS: tuple[str, ...] = (
    "plot", "acting", "script", "music", "ending", "cast", "story", "camera work", "dialogue", "pacing",
    "humour", "opening scene", "soundtrack", "editing", "villain", "hero", "romance", "photography", "finale",
    "lighting", "first half", "second half", "final act", "lead actor", "narration", "set design", "title song",
    "chase scene", "love story", "middle part",
)  # fmt: skip
DETERMINERS: tuple[str, ...] = ("the", "its")

OPENERS: tuple[str, ...] = (
    "honestly", "to me", "overall", "for once", "in the end", "this time", "frankly", "at first", "on reflection",
    "as a fan", "after an hour", "to be fair", "all in all", "at times", "for my taste", "on a second viewing",
)  # fmt: skip

# Clause "the plot was [not] [very] good": adjective valences, copulas, intensifiers.
ADJECTIVES: dict[str, float] = {
    "good": 1, "solid": 1, "charming": 2, "lovely": 2, "clever": 2, "brilliant": 3, "superb": 3,
    "weak": -1, "dull": -1, "clumsy": -2, "boring": -2, "tedious": -2, "awful": -3, "dreadful": -3,
    "long": 0, "slow": 0, "quiet": 0, "odd": 0, "dark": 0,
}  # fmt: skip
COPULAS: tuple[str, ...] = ("was", "felt", "seemed", "looked", "remained", "became")
INTENSIFIERS: dict[str, float] = {"": 1.0, "very": 1.5, "rather": 0.7, "quite": 0.8, "extremely": 2.0, "slightly": 0.5}
NEGATION = -0.5  # factor of a negation: "not superb" is mildly bad

# Clause "I [really] enjoyed the plot".
OPINIONS: dict[str, float] = {
    "loved": 3, "enjoyed": 2, "admired": 2, "liked": 1,
    "hated": -3, "resented": -2, "regretted": -2, "disliked": -1,
    "noticed": 0, "followed": 0,
}  # fmt: skip
OPINION_ADVERBS: dict[str, float] = {"": 1.0, "really": 1.5, "mostly": 0.8, "partly": 0.5, "never": NEGATION}

# Clause "there was [so much] charm in the plot".
QUALITIES: dict[str, float] = {
    "magic": 3, "charm": 2, "wit": 2, "tension": 1,
    "nonsense": -3, "padding": -2, "boredom": -2, "noise": -1,
    "detail": 0, "silence": 0,
}  # fmt: skip
QUANTITIES: dict[str, float] = {"some": 1.0, "a little": 0.5, "plenty of": 1.5, "so much": 2.0, "no": NEGATION}

# Clause "the plot left me [very] cold".
EFFECTS: dict[str, float] = {
    "thrilled": 3, "touched": 2, "impressed": 2, "amused": 1,
    "furious": -3, "bored": -2, "annoyed": -2, "cold": -1,
    "puzzled": 0, "calm": 0,
}  # fmt: skip

# Weights that a connective gives to the clauses (before it, after it) in its sentence.
CONNECTIVES: dict[str, tuple[float, float]] = {
    " and": (1.0, 1.0),
    " while": (1.0, 1.0),
    " because": (1.0, 1.0),
    ", but": (0.5, 1.5),
    ", although": (1.5, 0.5),
}
