"""Pairs from a file to token ids: bad rows named by line, drops counted, ids and truncation as stated."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from dpo_lab.data.jsonl import BadRow, OnBadRow, read_pairs

from dpo_lab.core.pairs import EncodedPair, Pair
from dpo_lab.data.collate import collate
from dpo_lab.data.sources import Data
from dpo_lab.data.splits import TRAIN
from dpo_lab.data.tokenize import Encoder
from dpo_lab.data.world.embedded import Embedded
from dpo_lab.models.tokenizer import train_tokenizer
from tests.conftest import REPOSITORY

GOOD = {"prompt": "p", "chosen": "good", "rejected": "bad"}


def written(path: Path, *lines: bytes | dict) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def read(path: Path, on_bad_row: OnBadRow = OnBadRow.error) -> tuple[list[Pair], Counter]:
    counts: Counter[str] = Counter()
    return read_pairs(path, on_bad_row, counts), counts


BAD = [
    (b'{"prompt": "x", "chosen": ', "not JSON"),
    (b"[1, 2]", "not an object"),
    ({"prompt": "x", "chosen": "y"}, "field 'rejected' is missing"),
    (GOOD | {"chosen": None}, "field 'chosen' is NoneType"),
    (GOOD | {"rejected": 3}, "field 'rejected' is int"),
    (GOOD | {"prompt": ["x"]}, "field 'prompt' is list"),
    (GOOD | {"chosen": "  "}, "field 'chosen' is empty"),
    (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
]


@pytest.mark.parametrize(("row", "what"), BAD)
def test_bad_rows_are_named_by_line_and_field(row, what, tmp_path):
    path = written(tmp_path / "pairs.jsonl", GOOD, b"", row, GOOD)
    with pytest.raises(BadRow) as error:
        read(path)
    assert f"{path}:3: {what}" in str(error.value)
    assert "data.on_bad_row=skip" in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path):
    other = GOOD | {"prompt": "q"}
    pairs, counts = read(written(tmp_path / "x", GOOD, *(row for row, _ in BAD), other), OnBadRow.skip)
    assert pairs == [Pair("p", "good", "bad"), Pair("q", "good", "bad")]
    assert counts["dropped: bad row"] == len(BAD)
    assert counts["rows"] == len(BAD) + 2


def test_a_byte_order_mark_is_accepted(tmp_path):
    assert len(read(written(tmp_path / "x", b"\xef\xbb\xbf" + json.dumps(GOOD).encode()))[0]) == 1


def test_identical_sides_and_duplicates_are_dropped_and_counted(tmp_path):
    pairs, counts = read(written(tmp_path / "x", GOOD, GOOD | {"rejected": "good"}, GOOD))
    assert len(pairs) == 1
    assert counts == {"rows": 3, "dropped: identical sides": 1, "dropped: duplicate": 1}


def test_a_missing_file_names_the_key(tmp_path):
    with pytest.raises(BadRow, match="data.path="):
        read(tmp_path / "nowhere.jsonl")


def no_world(prompts, stream):
    raise AssertionError("a file needs no samples")


def test_no_prompt_stands_on_both_sides(tmp_path):
    rows = [{"prompt": f"p{i % 40}", "chosen": f"a{i}", "rejected": "b"} for i in range(200)]
    path = written(tmp_path / "x", *rows)
    splits = Data(path=str(path), validation_fraction=0.3).load(0, no_world)
    train, held_out = ({p.prompt for p in pairs} for pairs in (splits.train, splits.held_out))
    assert train & held_out == set()
    assert len(splits.train) + len(splits.held_out) == 200
    assert splits.counts["held-out pairs"] == len(splits.held_out) > 0


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no (train|held-out) pair is left"):
        Data(path=str(written(tmp_path / "x", GOOD))).load(0, no_world)


@pytest.mark.parametrize(
    "settings",
    [
        {"pairs": 0},
        {"batch_size": 0},
        {"num_workers": -1},
        {"validation_fraction": 1.0},
        {"max_prompt_length": 600},
        {"tokens_per_microbatch": 0},
        {"path": ""},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"data.{next(iter(settings))}"):
        Data(**settings)


def test_real_human_pairs_read():
    path = REPOSITORY.parent / "shared" / "data" / "llmbar.jsonl"
    if not path.exists():
        pytest.skip("the shared preference data is not beside this checkout")
    pairs, counts = read(path)
    assert counts["rows"] == len(pairs) == 419


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Embedded().reviews(TRAIN, 300, seed=0), vocab_size=500)


def encoded(
    tokenizer, *pairs: Pair, max_length: int = 64, max_prompt_length: int = 32
) -> tuple[list[EncodedPair], Counter]:
    counts: Counter[str] = Counter()
    return Encoder(tokenizer, max_length, max_prompt_length).pairs(pairs, counts), counts


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_ids_are_begin_prompt_and_response_end(tokenizer):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ((pair,), counts) = encoded(tokenizer, Pair("The plot", " was good.", " felt dull."))
    assert pair.prompt == [bos, *ids_of(tokenizer, "The plot")]
    assert pair.chosen == [*ids_of(tokenizer, " was good."), eos]
    assert pair.rejected == [*ids_of(tokenizer, " felt dull."), eos]
    assert not any(counts.values())


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


def test_without_a_begin_token_an_empty_prompt_gets_the_end_token():
    plain = train_tokenizer(["the plot was good"], 300)
    plain.bos_token = None
    ((first, second), _) = encoded(plain, Pair("", "a", "b"), Pair("the", "a", "b"))
    assert first.prompt == [plain.eos_token_id]
    assert second.prompt == ids_of(plain, "the")


def test_any_text_survives(tokenizer):
    text = "naïve – 漢字 🎬\n\ttabs <|end|"
    assert Encoder(tokenizer, 64, 32).text(ids_of(tokenizer, text)) == text


def test_a_special_token_inside_a_response_is_seen(tokenizer):
    """A policy that writes one in the middle of a sentence does not get away with it; the closing one is no text."""
    encoder = Encoder(tokenizer, 64, 32)
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
