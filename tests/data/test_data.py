"""Pairs of text to token ids: joined as tokens, truncated as stated, begun and ended once; collated without padding."""

from __future__ import annotations

from collections import Counter

import pytest

from dpo_lab.core.pairs import EncodedPair, Pair
from dpo_lab.data.collate import collate
from dpo_lab.data.splits import TRAIN
from dpo_lab.data.tasks.reviews import SyntheticReviews
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.models.tokenizer import train_tokenizer
from tests.support.templates import ids_of as ids_by_hand
from tests.support.templates import tokenizer_of, words_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SyntheticReviews().texts(TRAIN, 300, seed=0), vocab_size=500)


def encoded(
    tokenizer, *pairs: Pair, max_length: int = 64, max_prompt_length: int = 32
) -> tuple[list[EncodedPair], Counter]:
    counts: Counter[str] = Counter()
    return PairTokenizer(tokenizer, max_length, max_prompt_length).pairs(pairs, counts), counts


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_ids_are_begin_prompt_and_response_end(tokenizer):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ((pair,), counts) = encoded(tokenizer, Pair("The plot", " was good.", " felt dull."))
    assert pair.prompt == [bos, *ids_of(tokenizer, "The plot")]
    assert pair.chosen == [*ids_of(tokenizer, " was good."), eos]
    assert pair.rejected == [*ids_of(tokenizer, " felt dull."), eos]
    assert not any(counts.values())


def test_an_empty_response_of_a_pair_is_its_end_and_a_side_that_does_not_exist_is_nothing(tokenizer):
    """A policy may end at once: a sampled response of a task."""
    eos = tokenizer.eos_token_id
    ((both, single), _) = encoded(
        tokenizer, Pair("The plot", "", " felt dull."), Pair("The plot", "", " felt dull.", is_single=True)
    )
    assert both.chosen == [eos]
    assert single.chosen == []
    assert both.rejected == single.rejected == [*ids_of(tokenizer, " felt dull."), eos]


def test_prompt_and_response_are_joined_as_tokens(tokenizer):
    """A prompt that ends in a space tokenises differently once joined as text: the parts decide."""
    ((pair,), _) = encoded(tokenizer, Pair("The plot ", "was good.", "x"))
    parts = ids_of(tokenizer, "The plot ") + ids_of(tokenizer, "was good.")
    assert ids_of(tokenizer, "The plot was good.") != parts
    assert [*pair.prompt[1:], *pair.chosen[:-1]] == parts


def test_truncation_keeps_begin_the_prompts_end_and_the_responses_start(tokenizer):
    prompt, chosen = "The plot was good. " * 20, " and the cast was odd" * 20
    ((pair,), counts) = encoded(tokenizer, Pair(prompt, chosen, " x"), max_length=20, max_prompt_length=8)
    assert pair.prompt == [tokenizer.bos_token_id, *ids_of(tokenizer, prompt)[-7:]]
    assert pair.chosen == ids_of(tokenizer, chosen)[:12]  # no end token: it does not end there
    assert pair.rejected[-1] == tokenizer.eos_token_id
    assert counts == {"prompts truncated": 1, "responses truncated": 1}


def test_a_response_that_fits_without_its_end_token_is_truncated_too(tokenizer):
    response = " was good and the cast was odd"
    room = len(ids_of(tokenizer, response))
    ((pair,), counts) = encoded(tokenizer, Pair("I", response, " x"), max_length=2 + room, max_prompt_length=2)
    assert pair.chosen == ids_of(tokenizer, response)
    assert counts["responses truncated"] == 1


def test_sides_that_truncation_made_equal_are_dropped_and_counted(tokenizer):
    same = " was good and the cast was odd" * 4
    pairs, counts = encoded(tokenizer, Pair("I", same + " a", same + " b"), max_length=12, max_prompt_length=4)
    assert pairs == []
    assert counts["dropped: identical after truncation"] == 1


def test_a_text_begins_as_its_tokenizer_begins_it():
    """A begin token that the tokenizer knows of and does not put there is not put there."""
    plain, begins, chatml = (PairTokenizer(tokenizer_of(name), 64, 32) for name in ("plain", "begins", "chatml"))
    assert plain.prompt("the") == ids_by_hand("plain", "the")
    assert begins.prompt("the") == ids_by_hand("begins", "<s>the")
    chatml.tokenizer.bos_token = "<|im_start|>"
    assert chatml.prompt("the") == ids_by_hand("chatml", "the")
    assert chatml.prompt("") == ids_by_hand("chatml", "<|im_start|>")  # a response is predicted from something
    assert plain.prompt("") == ids_by_hand("plain", "<|end|>")


def test_an_end_token_in_the_text_is_not_doubled():
    encoder = PairTokenizer(tokenizer_of("plain"), 64, 32)
    assert encoder.response("yes<|end|>", [1]) == encoder.response("yes", [1]) == ids_by_hand("plain", "yes<|end|>")


def test_without_ends_no_response_has_one():
    cut = PairTokenizer(tokenizer_of("plain"), 64, 32, append_eos=False)
    counts: Counter[str] = Counter()
    (pair,) = cut.pairs([Pair("a", " b", " c")], counts)
    assert (pair.chosen, pair.rejected) == (ids_by_hand("plain", " b"), ids_by_hand("plain", " c"))
    assert counts["responses truncated"] == 0


def test_where_a_text_starts_otherwise_a_response_is_what_follows_the_prompt():
    """SentencePiece marks a text's first word: alone, ' b' would begin with a mark too many."""
    tokenizer = words_tokenizer(["a", "b", "c"])
    counts: Counter[str] = Counter()
    (pair,) = PairTokenizer(tokenizer, 64, 32).pairs([Pair("a b", " c", " a c")], counts)
    assert tokenizer.convert_ids_to_tokens(pair.prompt) == ["▁a", "▁b"]
    assert tokenizer.convert_ids_to_tokens(pair.chosen) == ["▁c", "</s>"]
    assert tokenizer.convert_ids_to_tokens(pair.rejected) == ["▁a", "▁c", "</s>"]
    assert tokenizer.tokenize(" c") == ["▁", "▁c"]


def test_the_fingerprint_tells_what_changes_ids():
    def fingerprint(change=lambda tokenizer: None, **lengths) -> str:
        tokenizer = tokenizer_of("chatml")
        change(tokenizer)
        return PairTokenizer(tokenizer, **({"max_length": 64, "max_prompt_length": 32} | lengths)).fingerprint

    def template(tokenizer):
        tokenizer.chat_template += " "

    def end(tokenizer):
        tokenizer.eos_token = "<|im_start|>"

    def word(tokenizer):
        tokenizer.add_tokens(["new"])

    changed = [fingerprint(template), fingerprint(end), fingerprint(word), fingerprint(max_length=65)]
    changed += [fingerprint(max_prompt_length=33), fingerprint(append_eos=False)]
    assert fingerprint() == fingerprint()
    assert len({fingerprint(), *changed}) == 7


def test_any_text_survives(tokenizer):
    text = "naïve – 漢字 🎬\n\ttabs <|end|"
    assert PairTokenizer(tokenizer, 64, 32).text(ids_of(tokenizer, text)) == text


def test_a_special_token_inside_a_response_is_seen(tokenizer):
    """A policy that writes one in the middle of a sentence does not get away with it; the closing one is no text."""
    encoder = PairTokenizer(tokenizer, 64, 32)
    ids = ids_of(tokenizer, "the plot was good")
    assert encoder.text([*ids, tokenizer.eos_token_id]) == encoder.text(ids) == "the plot was good"
    broken = [*ids[:2], tokenizer.bos_token_id, *ids[2:], tokenizer.eos_token_id]
    assert tokenizer.bos_token in encoder.text(broken)
    assert ids_of(tokenizer, encoder.text(broken)) == broken[:-1]
    assert encoder.text([]) == ""


def test_collate_as_documented():
    batch = collate([EncodedPair("k", prompt=[1, 2], chosen=[7], rejected=[8, 9])])
    assert batch.keys == ["k"]
    assert batch.tokens.tolist() == [1, 2, 7, 8, 9]
    assert batch.lengths.tolist() == [[2, 1, 2]]
    assert batch.flipped.tolist() == [False]
    assert batch.gold_margin.isnan().all()
