"""Prompt and response as token ids say what the two strings make together, on both sides alike, under any tokenizer."""

from __future__ import annotations

from collections import Counter

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dpo_lab.core.pairs import Pair
from dpo_lab.data.row_faults import BEGUN, SPECIAL, UNKNOWN
from dpo_lab.data.tokenize import PairTokenizer
from tests.support.templates import tokenizer_of

WORDS = "Q: the dog? A: yes no the quick brown fox brother \n again and again"
ROWS = [
    ("Q: the dog? A:", " yes", " no"),
    ("Q: the dog? A: ", "yes", "no"),
    ("Q: the dog?\n", "yes", "\nno"),
    ("Q: the fox? ", "\nyes", "no"),
    ("the quick bro", "wn fox", "ther"),
    ("the quick  ", " brown", "fox"),
    ("a\n\n", "\nb", "(b)"),
]


def trained(tokenizer: Tokenizer, trainer, post: bool = True) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator([WORDS] * 30, trainer)
    if post:
        begin = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def bpe(**settings) -> trainers.BpeTrainer:
    alphabet = [*"abcdefghijklmnopqrstuvwxyz()QA:?.|0\n▁"]
    return trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False, **settings
    )


def stripping() -> decoders.Decoder:
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


def old_llama() -> PreTrainedTokenizerFast:
    """A normalizer puts a mark before every text; no word borders, so that tokens may hold several words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = stripping()
    return trained(tokenizer, bpe())


def new_llama() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = stripping()
    return trained(tokenizer, bpe())


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = [*"abcdefghijklmnopqrstuvwxyz()QA:?.|0\n▁"]
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False, unk_token="a"
    )
    return trained(tokenizer, trainer)


def byte_level(add_prefix_space: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    return trained(tokenizer, trainer)


TOKENIZERS = {
    "old_llama": old_llama,
    "new_llama": new_llama,
    "unigram": unigram,
    "byte_level": byte_level,
    "byte_level_with_prefix": lambda: byte_level(add_prefix_space=True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_both_sides_say_what_the_strings_make_together(name):
    tokenizer = TOKENIZERS[name]()
    encoder = PairTokenizer(tokenizer, 64, 32)
    pairs = encoder.pairs([Pair(*row) for row in ROWS], Counter())
    assert len(pairs) == len(ROWS)
    for (prompt, *sides), pair in zip(ROWS, pairs, strict=True):
        assert pair.prompt == encoder.prompt(prompt)  # what sampling begins with
        for side, ids in zip(sides, (pair.chosen, pair.rejected), strict=True):
            assert ids[-1] == tokenizer.eos_token_id
            joined = tokenizer.decode([*pair.prompt[1:], *ids[:-1]], clean_up_tokenization_spaces=False)
            assert joined.removeprefix(" " if name.endswith("prefix") else "") == prompt + side
            assert encoder.text(ids) == side  # and a sample of the same tokens reads so
            assert encoder.response(side, pair.prompt) == ids


def test_ids_of_a_byte_level_tokenizer_are_those_of_the_parts():
    tokenizer = byte_level()
    pairs = PairTokenizer(tokenizer, 64, 32).pairs([Pair(*row) for row in ROWS], Counter())
    for (prompt, *sides), pair in zip(ROWS, pairs, strict=True):
        apart = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, *sides)]
        assert [pair.prompt[1:], pair.chosen[:-1], pair.rejected[:-1]] == apart


def test_a_tokenizer_of_whole_words_can_not_go_on_inside_one():
    words = {word: i for i, word in enumerate(["<unk>", "</s>", "the", "quick", "bro", "brown", "fox", "ther"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    encoder, counts = PairTokenizer(tokenizer, 64, 32), Counter()
    (pair,) = encoder.pairs([Pair("the quick", " brown fox", " fox")], counts)
    assert tokenizer.convert_ids_to_tokens(pair.chosen) == ["brown", "fox", "</s>"]
    assert counts[UNKNOWN] == 0
    encoder.pairs([Pair("the cat", " brown fox", " fox"), Pair("the", " brown cat", " fox")], counts)
    assert (counts[UNKNOWN], counts[SPECIAL]) == (2, 0)
    with pytest.raises(
        ValueError, match="no tokens for 'wn fox' right after its prompt; let the prompt end where a word"
    ):
        encoder.pairs([Pair("the quick bro", "wn fox", " fox")], counts)


def test_a_begin_token_in_the_text_is_not_put_there_twice():
    counts: Counter[str] = Counter()
    encoder = PairTokenizer(tokenizer_of("begins"), 64, 32)
    both = encoder.pairs([Pair("<s>who?", " I", " you"), Pair("who? ", " I", " you")], counts)
    assert both[0].prompt == encoder.prompt("who?") == encoder.prompt("<s>who?")
    assert both[0].prompt.count(encoder.tokenizer.bos_token_id) == 1
    assert counts[BEGUN] == 1
