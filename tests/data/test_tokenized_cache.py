"""The store: each pair once, in order; contradictions found; kept by content; mended when damaged; the same by many hands."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from dpo_lab.data import encoding
from dpo_lab.data import tokenized_cache as module
from dpo_lab.data.chat import NoTemplate
from dpo_lab.data.formats import Pick, Shape
from dpo_lab.data.row_faults import REPEATED
from dpo_lab.data.rows import BadData, open_rows
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.data.tokenized_cache import BadRows, TokenizedPairs, load_or_build
from tests.conftest import REPOSITORY
from tests.support.templates import ids_of, tokenizer_of
from tests.support.warm import Warm

STRICT, LENIENT = BadRows(skip=False, most=0.1), BadRows(skip=True, most=0.5)


def row(i: int, chosen: str = " good", rejected: str = " bad") -> dict:
    return {"prompt": f"p{i}", "chosen": chosen, "rejected": rejected}


def written(path: Path, *lines: dict | bytes) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def store_of(
    cache: Path, *paths: Path, bad: BadRows = STRICT, shape: Shape | None = None, **settings
) -> TokenizedPairs:
    encoder = PairTokenizer(tokenizer_of(settings.pop("family", "plain")), 64, 32)
    sources = [(open_rows(str(path), None, None, None), shape or Shape()) for path in paths]
    return load_or_build(sources, encoder, bad, settings.pop("workers", 1), cache)


def contents(store: TokenizedPairs) -> list[tuple]:
    return [
        (pair.key, *(list(map(int, part)) for part in (pair.prompt, pair.chosen, pair.rejected)), store.where(i))
        for i, pair in enumerate(store.table)
    ]


def test_pairs_lie_there_in_order_with_their_places(tmp_path):
    a = written(tmp_path / "a.jsonl", row(1), b"", row(2, " yes"))
    b = written(tmp_path / "b.jsonl", row(3))
    store = store_of(tmp_path / "cache", a, b)
    end = "<|end|>"
    expected = [("p1", " good", a, 1), ("p2", " yes", a, 3), ("p3", " good", b, 1)]
    assert [found[1:] for found in contents(store)] == [
        (*(ids_of("plain", text) for text in (prompt, chosen + end, " bad" + end)), f"{path}:{line}")
        for prompt, chosen, path, line in expected
    ]
    assert store.sources.tolist() == [0, 0, 1]
    assert store.counts["rows"] == 3


def test_repeated_pairs_stand_once_and_the_first_one_stays(tmp_path):
    path = written(tmp_path / "x", row(1), row(2), row(1), row(3), row(2))
    store = store_of(tmp_path, path)
    assert [store.where(i).rpartition(":")[2] for i in range(3)] == ["1", "2", "4"]
    assert (len(store.table), store.counts["dropped: duplicate"]) == (3, 2)
    assert [pair.prompt.tolist() for pair in store.table] == [ids_of("plain", f"p{i}") for i in (1, 2, 3)]


def test_pairs_that_say_the_contrary_know_each_other(tmp_path):
    turned = row(2, " bad", " good")
    store = store_of(tmp_path, written(tmp_path / "x", row(1), row(2), row(3), turned, row(4, " bad", " good")))
    assert store.opposite.tolist() == [-1, 3, -1, 1, -1]  # another prompt is another matter


def test_a_bad_row_stops_it_and_leaves_nothing_behind(tmp_path):
    path = written(tmp_path / "x.jsonl", row(1), {"prompt": "p", "rejected": "r"}, row(2))
    with pytest.raises(
        BadData, match=r"x.jsonl:2: field 'chosen' is missing .*; fix the row, or type data.on_bad_row=skip"
    ):
        store_of(tmp_path / "cache", path)
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []


def test_bad_rows_are_skipped_counted_shown_and_capped(tmp_path, caplog):
    bad = [b"{", b"[]", {"prompt": "p", "rejected": "r"}]
    path = written(tmp_path / "x.jsonl", *bad, *map(row, range(7)))
    store = store_of(tmp_path / "cache", path, bad=LENIENT)
    assert (len(store.table), store.counts["dropped: bad row"], store.counts["rows"]) == (7, 3, 10)
    shown = [record.message for record in caplog.records]
    assert [line.split("x.jsonl")[1][:3] for line in shown] == [":1:", ":2:", ":3:"]
    with pytest.raises(
        BadData, match=r"3 of 10 rows are bad, more than data.max_bad_share=0.2 \(the first: .*x.jsonl:1: not"
    ):
        store_of(tmp_path / "cache", path, bad=BadRows(skip=True, most=0.2))


def test_nothing_left_is_said(tmp_path):
    for lines in ([], [row(1, "same", "same")]):
        with pytest.raises(BadData, match="no pair is left of"):
            store_of(tmp_path / "cache", written(tmp_path / "x.jsonl", *lines))


def test_a_chat_that_the_template_refuses_is_a_bad_row_of_its_line(tmp_path):
    user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "b"}
    chats = [{"prompt": prompt, "chosen": "c", "rejected": "d"} for prompt in ([user], [system, user], [user, user])]
    path = written(tmp_path / "x.jsonl", *chats)
    with pytest.raises(BadData, match=r"x.jsonl:2: the chat template can't render it \(System role not supported\)"):
        store_of(tmp_path / "cache", path, family="gemma")
    store = store_of(tmp_path / "cache", path, family="gemma", bad=LENIENT)
    assert [store.where(i).rpartition(":")[2] for i in range(2)] == ["1", "3"]
    assert store.counts["dropped: bad row"] == 1
    long = {"prompt": [user], "chosen": "c" * 100, "rejected": "d" * 100}
    store = store_of(tmp_path / "cache", written(path, *chats, long), family="gemma", bad=LENIENT)
    assert store.counts["responses truncated"] == 2  # beside a row that is bad, too
    with pytest.raises(NoTemplate, match="no chat template"):
        store_of(tmp_path / "cache", path, bad=LENIENT)


QUESTIONS = [f"What is it, {i}?" for i in range(9)]
ASKED = [{"prompt": asked, "chosen": f"{asked} A cat.", "rejected": f" {asked} Who?"} for asked in QUESTIONS]


@pytest.mark.parametrize("as_chat", [False, True])
def test_sides_that_repeat_the_prompt_are_refused_unless_they_are_few(as_chat, tmp_path):
    others = [{"prompt": "Hello.", "chosen": f"Hello. {i}", "rejected": "Hello. Who?"} for i in range(12)]  # by chance
    path, settings = tmp_path / "x.jsonl", dict(shape=Shape(as_chat=as_chat), family="chatml")
    with pytest.raises(
        BadData, match=r"x.jsonl:3: both sides begin with the prompt, as in 9 of 11 pairs: .*; leave it out"
    ):
        store_of(tmp_path / "cache", written(path, *others[:2], *ASKED), **settings)
    store = store_of(tmp_path / "cache", written(path, *others, *ASKED), **settings)
    assert (len(store.table), store.counts[REPEATED]) == (21, 9)
    without = [{name: row[name].strip() for name in ("chosen", "rejected")} for row in ASKED]
    store = store_of(tmp_path / "cache", written(path, *without), **settings)
    assert store.counts[REPEATED] == 0


def test_a_chat_that_the_template_cuts_short_is_a_bad_row_of_its_line(tmp_path):
    """Its reasoning is not in the text, and it is not called identical after truncation."""
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    )
    path = written(
        tmp_path / "x.jsonl",
        {"prompt": [{"role": "user", "content": "a"}], "chosen": "yes", "rejected": "no"},
        {
            "prompt": [{"role": "user", "content": "b"}],
            "chosen": "<think>so</think>yes",
            "rejected": "<think>or</think>yes",
        },
    )
    source = (open_rows(str(path), None, None, None), Shape())
    with pytest.raises(BadData, match=r"x.jsonl:2: the chat template leaves out the reasoning of 'chosen' \('so'\)"):
        load_or_build([source], PairTokenizer(tokenizer, 64, 32), STRICT, 1, tmp_path / "cache")
    store = load_or_build([source], PairTokenizer(tokenizer, 64, 32), LENIENT, 1, tmp_path / "cache")
    assert store.counts == Counter({"rows": 2, "dropped: bad row": 1})


def test_it_is_made_once_for_one_content(tmp_path, monkeypatch):
    path, cache = written(tmp_path / "x", row(1), row(2)), tmp_path / "cache"
    first = store_of(cache, path)
    made = []
    monkeypatch.setattr("dpo_lab.data.tokenized_cache._build", lambda *a: made.append(1))
    again = store_of(cache, written(tmp_path / "same content", row(1), row(2)))
    assert contents(again)[0][:4] == contents(first)[0][:4]
    assert made == []
    monkeypatch.undo()
    others = [
        store_of(cache, written(tmp_path / "y", row(1), row(3))),
        store_of(cache, path, shape=Shape(pick=Pick.all)),
        store_of(cache, path, family="begins"),
        store_of(cache, path, bad=LENIENT),
    ]
    assert len(others) == 4
    assert len(list(cache.glob("pairs-*[!k]"))) == 5


@pytest.mark.parametrize("name", ["tokens.bin", "columns.safetensors", "store.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_store_is_seen_and_made_anew(name, damage, tmp_path, caplog):
    path, cache = written(tmp_path / "x", *map(row, range(20))), tmp_path / "cache"
    whole = contents(store_of(cache, path))
    (file,) = cache.glob(f"pairs-*/{name}")
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    assert contents(store_of(cache, path)) == whole
    assert "does not match its checksum: it is created again" in caplog.text


@pytest.mark.slow
def test_several_workers_make_the_same_table(tmp_path, monkeypatch):
    """Rows in many small chunks, by two processes and by none."""
    monkeypatch.setattr("dpo_lab.data.readers.CHUNK", 7)
    lines: list = [row(i % 90, rejected=f" bad{i % 3}") for i in range(200)]
    lines[150] = b"{"
    path = written(tmp_path / "x", *lines)
    alone = store_of(tmp_path / "a", path, bad=LENIENT, workers=1)
    together = store_of(tmp_path / "b", path, bad=LENIENT, workers=2)
    assert len(open_rows(str(path), None, None, None).chunks().__next__().rows) == 7
    assert contents(together) == contents(alone)
    assert together.counts == alone.counts
    assert together.counts["dropped: bad row"] == 1
    with pytest.raises(BadData, match="x:151: not JSON"):
        store_of(tmp_path / "c", path, workers=2)
    assert encoding.MIN_ROWS_FOR_WORKERS * 7 < 200


def make_aloud(cache: str, path: str) -> None:
    """One of two processes that want the same store."""
    make = module._build
    module._build = lambda *arguments: (print("made", flush=True), make(*arguments))[1]
    made = store_of(Path(cache), Path(path))
    print(len(made.table), sha256(made.table.tokens.tobytes()).hexdigest())


def test_two_processes_at_once_make_it_once(tmp_path):
    """One computes and the other waits; both see the same bytes."""
    path = written(tmp_path / "x", *map(row, range(3000)))
    with ExitStack() as stack:
        arguments = (make_aloud, str(tmp_path / "cache"), str(path))
        both = [stack.enter_context(Warm(*arguments, cwd=REPOSITORY)) for _ in range(2)]
        codes, outputs, errors = zip(*(process.wait(120) for process in both), strict=True)
    assert codes == (0, 0), errors
    printed = [output.splitlines() for output in outputs]
    assert sum("made" in lines for lines in printed) == 1
    assert printed[0][-1] == printed[1][-1]
    assert printed[0][-1].startswith("3000 ")


def test_ratings_come_with_their_margin(tmp_path):
    rated = {"prompt": "a", "responses": ["x", "y", "z"], "ratings": [1, 4, 2.5]}
    store = store_of(tmp_path, written(tmp_path / "x", rated), shape=Shape(pick=Pick.all))
    assert store.table.score_margin.tolist() == [3.0, 1.5, 1.5]
    assert np.isnan(store.table.gold_margin).all()
    assert Counter(store.sources.tolist()) == {0: 3}
