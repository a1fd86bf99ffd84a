"""Which pairs train and which are held out: no prompt on both sides, subsets nested, mixtures by weight, all counted."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from dpo_lab.data.rows import BadData
from dpo_lab.data.sources import Contradictions, Data, OnBadRow, Source, Splits
from dpo_lab.data.tokenize import PairTokenizer
from tests.conftest import REPOSITORY
from tests.support.templates import tokenizer_of


def rows(count: int, prompts: int = 1000, name: str = "") -> list[dict]:
    return [{"prompt": f"{name}p{i % prompts}", "chosen": f"a{i}", "rejected": "b"} for i in range(count)]


def written(path: Path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def load(tmp_path: Path, **settings) -> Splits:
    data = Data(
        **({"validation_fraction": 0.3, "tokenize_workers": 1, "max_length": 64, "max_prompt_length": 32} | settings)
    )
    encoder = PairTokenizer(tokenizer_of("plain"), data.max_length, data.max_prompt_length)
    return data.choose(data.store(encoder, tmp_path / "cache"))


def keys(table) -> set[bytes]:
    return set(table.keys.tolist())


def prompts(table) -> set[bytes]:
    return {pair.prompt.tobytes() for pair in table}


def test_no_prompt_stands_on_both_sides(tmp_path):
    splits = load(tmp_path, path=written(tmp_path / "x", rows(400, prompts=80)))
    assert prompts(splits.train) & prompts(splits.held_out) == set()
    assert len(splits.train) + len(splits.held_out) == 400
    assert splits.counts["held-out pairs"] == len(splits.held_out)
    assert len(prompts(splits.held_out)) / 80 == pytest.approx(0.3, abs=0.15)


def test_held_out_pairs_are_capped_by_hash_and_counted(tmp_path):
    path = written(tmp_path / "x", rows(400))
    few, more, all_of_them = (load(tmp_path, path=path, validation_pairs=n) for n in (20, 60, 512))
    assert (len(few.held_out), len(more.held_out)) == (20, 60)
    assert keys(few.held_out) < keys(more.held_out) < keys(all_of_them.held_out)
    assert keys(few.train) == keys(all_of_them.train)  # they do not train instead
    left_out = few.counts["left out: more held-out pairs than data.validation_pairs"]
    assert left_out == len(all_of_them.held_out) - 20


def test_fractions_lie_inside_each_other_and_leave_the_held_out_pairs_alone(tmp_path):
    path = written(tmp_path / "x", rows(1000))
    parts = [load(tmp_path, path=path, fraction=f) for f in (0.1, 0.25, 0.5, 1.0)]
    for smaller, larger in pairwise(parts):
        assert keys(smaller.train) < keys(larger.train)
        assert keys(smaller.held_out) == keys(larger.held_out)
    for part, fraction in zip(parts, (0.1, 0.25, 0.5, 1.0), strict=True):
        assert len(part.train) / len(parts[-1].train) == pytest.approx(fraction, abs=0.06)
        assert len(part.train) + part.counts["left out: by data.fraction"] == len(parts[-1].train)


def test_a_subset_does_not_depend_on_what_else_is_there(tmp_path):
    small = load(tmp_path, path=written(tmp_path / "a", rows(300)), fraction=0.5)
    large = load(tmp_path, path=written(tmp_path / "b", rows(300)[::-1] + rows(200, name="z")), fraction=0.5)
    assert keys(small.train) < keys(large.train)
    assert keys(small.held_out) < keys(large.held_out)


def test_sources_are_mixed_by_weight(tmp_path):
    """As many pairs as the weights allow: of the source that is short for its weight all, of the others their share."""
    a, b = written(tmp_path / "a", rows(1000, name="a")), written(tmp_path / "b", rows(1000, name="b"))

    def shares(first: float, second: float) -> tuple[int, int, Splits]:
        sources = {"a": Source(path=a, weight=first), "b": Source(path=b, weight=second)}
        splits = load(tmp_path, sources=sources, validation_pairs=10_000)
        found = prompts(splits.train) | prompts(splits.held_out)
        of_a = sum(1 for prompt in found if prompt[:4] == _first_letter("a"))
        return of_a, len(found) - of_a, splits

    assert shares(1, 1)[:2] == (1000, 1000)
    more, less, splits = shares(3, 1)
    assert more == 1000
    assert less == pytest.approx(333, abs=50)
    assert splits.counts["left out: by the sources' weights"] == 1000 - less
    assert shares(1, 3)[1] == 1000
    assert keys(shares(4, 1)[2].train) < keys(splits.train)  # nested as the weight falls


def _first_letter(letter: str) -> bytes:
    return np.array(tokenizer_of("plain")(letter)["input_ids"], np.int32).tobytes()


def test_sources_of_other_shapes_are_one_set(tmp_path):
    rated = {"question": "q", "answers": ["x", "y"], "stars": [1, 2]}
    sources = {
        "mine": Source(path=written(tmp_path / "a", rows(60))),
        "theirs": Source(
            path=written(tmp_path / "b", [rated]),
            columns={"prompt": "question", "responses": "answers", "ratings": "stars"},
        ),
    }
    splits = load(tmp_path, sources=sources)
    assert splits.counts["rows"] == 61


def test_a_given_validation_set_is_the_held_out_one_and_its_prompts_do_not_train(tmp_path):
    held_out = rows(10, name="v")
    train = [*rows(50), {"prompt": "vp3", "chosen": "another", "rejected": "b"}, held_out[4]]
    settings = dict(path=written(tmp_path / "a", train), validation_path=written(tmp_path / "b", held_out))
    splits = load(tmp_path, **settings)
    assert (len(splits.train), len(splits.held_out)) == (50, 10)
    assert splits.counts["dropped: prompt is held out"] == 1
    assert splits.counts["dropped: duplicate"] == 1
    assert prompts(splits.train) & prompts(splits.held_out) == set()


def test_a_validation_split_of_the_same_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    folder = tmp_path / "mine"
    folder.mkdir()
    written(folder / "train.jsonl", rows(30))
    written(folder / "test.jsonl", rows(6, name="v"))
    splits = load(tmp_path, path=str(folder), split="train", validation_split="test")
    assert (len(splits.train), len(splits.held_out)) == (30, 6)


@pytest.mark.parametrize("asked", [{"validation_split": "test"}, {"split": "dev"}, {"revision": "v2"}, {"name": "one"}])
def test_a_file_has_no_split_configuration_or_revision(asked, tmp_path):
    path = written(tmp_path / "a.jsonl", rows(30))
    key, value = next(iter(asked.items()))
    said = f"a.jsonl: a file has no {key.removeprefix('validation_')}, which {key.removeprefix('validation_')}={value} asks for"
    with pytest.raises(BadData, match=said):
        load(tmp_path, path=path, **asked)
    assert len(load(tmp_path, path=path, split="train").train)
    with pytest.raises(ValueError, match="data.sources has no split"):
        Data(sources={"a": Source(path=path)}, validation_split="test")


AGAINST = [*rows(30), {"prompt": "p3", "chosen": "b", "rejected": "a3"}]


def test_contradictions_are_an_error_that_names_both_unless_allowed(tmp_path):
    path = written(tmp_path / "x.jsonl", AGAINST)
    with pytest.raises(BadData) as error:
        load(tmp_path, path=path)
    assert "x.jsonl:4 and " in str(error.value)
    assert "x.jsonl:31 contradict each other (1 such contradictions)" in str(error.value)
    assert "data.contradictions=drop" in str(error.value)
    kept = load(tmp_path, path=path, contradictions=Contradictions.keep)
    dropped = load(tmp_path, path=path, contradictions=Contradictions.drop)
    assert len(kept.train) + len(kept.held_out) == 31
    assert len(dropped.train) + len(dropped.held_out) == 29
    assert (kept.counts["contradictions"], dropped.counts["dropped: contradiction"]) == (1, 2)


def test_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(BadData, match="no pair is left of 0 rows"):
        load(tmp_path, path=written(tmp_path / "x", []))
    held_out = written(tmp_path / "v", rows(3))
    train = written(tmp_path / "y", [{**row, "chosen": "else"} for row in rows(3)])
    with pytest.raises(BadData, match="no train pair is left of rows 6, dropped: prompt is held out 3"):
        load(tmp_path, path=train, validation_path=held_out)


@pytest.mark.parametrize("prompt", ["first", "other"])  # the hash holds one of them out
def test_rows_too_few_to_hold_one_out_train_all_the_same(prompt, tmp_path, caplog):
    path = written(tmp_path / "x", [{"prompt": prompt, "chosen": "a", "rejected": "b"}])
    splits = load(tmp_path, path=path, validation_fraction=0.5)
    assert (len(splits.train), len(splits.held_out)) == (1, 0)
    assert "no pair is held out, so nothing can be measured" in caplog.text


REFUSED = [
    {"pairs": 0},
    {"batch_size": 0},
    {"num_workers": -1},
    {"tokenize_workers": 0},
    {"validation_fraction": 1.0},
    {"validation_pairs": 0},
    {"fraction": 0.0},
    {"fraction": 1.5},
    {"max_bad_share": -0.1},
    {"max_prompt_length": 600},
    {"tokens_per_microbatch": 0},
    {"path": ""},
    {"weight": 0.0},
    {"columns": {"promt": "x"}},
]


@pytest.mark.parametrize("settings", REFUSED)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"data.{next(iter(settings))}"):
        Data(**settings)


def test_a_mixture_needs_paths_and_no_path_beside_it():
    with pytest.raises(ValueError, match=r"data.sources.a.path is missing; type \+data.sources.a.path="):
        Data(sources={"a": Source()})
    with pytest.raises(ValueError, match="data.path and data.sources"):
        Data(path="x", sources={"a": Source(path="y")})


def test_a_mixture_is_a_config():
    node = OmegaConf.merge(OmegaConf.structured(Data), {"sources": {"a": {"path": ["x", "y"], "weight": 2}}})
    data = OmegaConf.to_object(node)
    assert isinstance(data, Data)
    assert data.sources["a"] == Source(path=["x", "y"], weight=2.0)


@pytest.mark.parametrize(("name", "count"), [("llmbar", 419), ("pandalm", None)])
def test_real_human_pairs_read(name, count, tmp_path):
    path = REPOSITORY.parent / "shared" / "data" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("the shared preference data is not beside this checkout")
    lenient = dict(contradictions=Contradictions.keep, on_bad_row=OnBadRow.skip)
    splits = load(tmp_path, path=str(path), max_length=4096, max_prompt_length=3000, **lenient)
    lines = path.read_text().splitlines()
    assert splits.counts["rows"] == len(lines)
    dropped = sum(n for what, n in splits.counts.items() if what.startswith("dropped"))
    left_out = sum(n for what, n in splits.counts.items() if what.startswith("left out"))
    assert len(splits.train) + len(splits.held_out) + dropped + left_out == len(lines)
    if count is not None:
        assert len(splits.train) + len(splits.held_out) == count
    assert Counter(splits.train.keys.tolist()).most_common(1)[0][1] == 1
