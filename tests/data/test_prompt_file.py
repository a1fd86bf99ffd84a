"""Prompts of the user's own: which files are read, to which tokens, and the one line for those that can't be."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
from collections import Counter

import pandas as pd
import pytest

from dpo_lab.core.pairs import Pair
from dpo_lab.data.prompt_file import read_prompts
from dpo_lab.data.rows import BadData
from dpo_lab.data.tokenize import PairTokenizer
from tests.support.templates import CHATML

TEXTS = ["The plot was superb.", " The cast, too: ", "Was it good?"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Was it good?"}]


def written(folder, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """The same prompts in every format, one of them twice."""
    rows = [{"prompt": text, "chosen": "left", "rejected": "unread"} for text in [*TEXTS, TEXTS[0]]]
    lines = "\r\n".join([TEXTS[0], "", *TEXTS[1:], TEXTS[0]])
    pd.DataFrame(rows).to_parquet(tmp_path / "p.parquet")
    return {
        "txt": written(tmp_path, "p.txt", "\ufeff" + lines),
        "txt.gz": written(tmp_path, "p.txt.gz", gzip.compress(lines.encode())),
        "jsonl": written(tmp_path, "p.jsonl", "\n".join(json.dumps({"prompt": text}) for text in [*TEXTS, TEXTS[0]])),
        "json": written(tmp_path, "p.json", json.dumps(rows)),
        "csv": written(tmp_path, "p.csv", pd.DataFrame(rows).to_csv(index=False)),
        "parquet": str(tmp_path / "p.parquet"),
    }


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_prompts(files, policy, kind):
    prompts = read_prompts(files[kind], as_chat=False, most=10)
    encoder = PairTokenizer(policy.tokenizer, 64, 32)
    assert [pair.prompt for pair in prompts.pairs] == TEXTS
    assert prompts.encode(encoder) == [encoder.prompt(text) for text in TEXTS]
    with open(files[kind], "rb") as content:
        assert prompts.sha256 == hashlib.sha256(content.read()).hexdigest()


def test_no_prompt_is_truncated(tmp_path, policy):
    long = " ".join(["good"] * 50)
    (ids,) = read_prompts(written(tmp_path, "p.txt", long), as_chat=False, most=9).encode(
        PairTokenizer(policy.tokenizer, 16, 8)
    )
    assert len(ids) > 16
    assert policy.tokenizer.decode(ids, skip_special_tokens=True).strip() == long


def test_only_the_first_are_used(files, caplog):
    prompts = read_prompts(files["txt"], as_chat=False, most=2)
    assert [pair.prompt for pair in prompts.pairs] == TEXTS[:2]
    assert "the first 2 of 3 prompts are used; for more type evals.num_prompts" in caplog.text


def test_a_chat_has_the_tokens_that_it_has_in_a_pair(tmp_path, policy):
    encoder = PairTokenizer(copy.deepcopy(policy.tokenizer), 400, 300)
    encoder.tokenizer.chat_template = CHATML
    text = "\n".join(json.dumps({"prompt": prompt}) for prompt in (CHAT, TEXTS[0]))
    prompts = read_prompts(written(tmp_path, "p.jsonl", text), as_chat=True, most=9)
    users = [CHAT, [{"role": "user", "content": TEXTS[0]}]]
    answers = [[{"role": "assistant", "content": answer}] for answer in ("yes", "no")]
    pairs = [Pair(prompt, *answers) for prompt in users]
    assert prompts.encode(encoder) == [pair.prompt for pair in encoder.pairs(pairs, Counter())]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"question": "b"}', r"p\.jsonl:2: field 'prompt' is missing .*question"),
        ("p.jsonl", '{"prompt": ""}', r"p\.jsonl:1: field 'prompt' is empty"),
        ("p.jsonl", '{"prompt": 3}', r"p\.jsonl:1: field 'prompt' is int, not a string or a list of messages"),
        ("p.jsonl", '{"prompt": [{"role": "user"}]}', r"p\.jsonl:1: field 'prompt'"),
        ("p.jsonl", "not json", r"p\.jsonl:1: not JSON"),
        ("p.csv", "question\nwhy\n", r"p\.csv:2: field 'prompt' is missing"),
        ("p.txt", b"good\n\xff\xfe\n", r"p\.txt:2: field 'prompt' .*"),
        ("p.txt", "\n \n", r"evals\.prompts=.*p\.txt: holds no prompt; type the path of a file with one prompt a line"),
        ("p.jsonl", "", r"evals\.prompts=.*p\.jsonl: holds no prompt"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, name, text, message):
    with pytest.raises(BadData, match=message) as error:
        read_prompts(written(tmp_path, name, text), as_chat=False, most=9)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(BadData, match=r"evals\.prompts=.*: no such file"):
        read_prompts(str(tmp_path / "none.txt"), as_chat=False, most=9)
    with pytest.raises(BadData, match=r"evals\.prompts=owner/name: no such file"):
        read_prompts("owner/name", as_chat=False, most=9)


def test_a_chat_without_a_template_is_refused_with_its_place(tmp_path, policy):
    prompts = read_prompts(written(tmp_path, "p.jsonl", json.dumps({"prompt": CHAT})), as_chat=False, most=9)
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(BadData, match=r"p\.jsonl:1: .*has no chat template; type policy\.chat_template"):
        prompts.encode(PairTokenizer(tokenizer, 64, 32))
