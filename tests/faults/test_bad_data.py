"""Faults 18 to 32 of the matrix: bad data. Each test bears its row's number."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from dpo_lab.core.losses import DPO, LOSSES
from dpo_lab.core.noise import OneSided, Symmetric
from dpo_lab.core.pairs import Pair, PairLogps
from dpo_lab.data.chat import BadChat
from dpo_lab.data.collate import collate
from dpo_lab.data.rows import BadData
from dpo_lab.data.sources import Contradictions, Data, OnBadRow, Splits
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.models.policy import Policy, PolicyError, load_policy
from dpo_lab.models.reference import Cached
from tests.conftest import OWN_MODEL, make_pairs
from tests.support.losses import make_loss
from tests.support.ranks import become_rank, run_in_ranks
from tests.support.templates import ids_of, tokenizer_of
from tests.support.warm import run_module

pytestmark = pytest.mark.slow

ROWS = [{"prompt": f"p{i}", "chosen": f" good {i}", "rejected": " bad"} for i in range(60)]


def written(path: Path, *lines: dict | bytes) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def load(path: Path, **settings) -> Splits:
    data = Data(**({"path": str(path), "tokenize_workers": 1, "max_length": 64, "max_prompt_length": 32} | settings))
    encoder = PairTokenizer(tokenizer_of("plain"), data.max_length, data.max_prompt_length)
    return data.choose(data.store(encoder, path.parent / "cache"))


def refusal(path: Path, **settings) -> str:
    with pytest.raises(BadData) as error:
        load(path, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def model(policy, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "mine"
    policy.save(folder)
    return folder


def train(folder: Path, model: Path, *overrides: str):
    lengths = ["data.max_length=64", "data.max_prompt_length=32", "evals.max_new_tokens=8"]
    return run_module(
        "dpo_lab.train", *OWN_MODEL, "policy=pretrained", f"policy.path={model}", *lengths, *overrides, cwd=folder
    )


def test_18_malformed_jsonl_ends_at_its_line_and_skipping_is_counted_shown_and_capped(model, tmp_path, caplog):
    path = written(tmp_path / "pairs.jsonl", *ROWS[:40], b'{"prompt": "cut"', *ROWS[40:])
    result = train(tmp_path, model, "data.path=pairs.jsonl")
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert errors == [
        "error: pairs.jsonl:41: not JSON (Expecting ',' delimiter at column 17); fix the row, or type"
        " data.on_bad_row=skip to leave such rows out"
    ]
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("outputs/cache/pairs-*/"))
    splits = load(path, on_bad_row=OnBadRow.skip)
    assert splits.counts["dropped: bad row"] == 1
    assert "pairs.jsonl:41: not JSON" in caplog.text
    assert "1 of 61 rows are bad" in refusal(path, on_bad_row=OnBadRow.skip, max_bad_share=0.01)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("chosen", None, "is NoneType"),
        ("rejected", 3, "is int"),
        ("prompt", 1.5, "is float"),
        ("chosen", "  ", "is empty"),
        ("rejected", [], "is empty"),
        ("chosen", [{"role": "assistant"}], "content is NoneType"),
        ("rejected", ..., "is missing"),
    ],
)
def test_19_a_wrong_field_is_named(field, value, what, tmp_path):
    row = {k: v for k, v in (ROWS[0] | {field: value}).items() if v is not ...}
    message = refusal(written(tmp_path / "x.jsonl", *ROWS[1:], row))
    assert f"x.jsonl:60: field '{field}'" in message
    assert what in message
    assert "type data.on_bad_row=skip" in message


def test_20_duplicates_contradictions_and_leaks_are_counted(tmp_path):
    against = {"prompt": "p3", "chosen": " bad", "rejected": " good 3"}
    path = written(tmp_path / "x.jsonl", *ROWS, ROWS[7], ROWS[7], against)
    message = refusal(path)
    assert "x.jsonl:4 and " in message
    assert "x.jsonl:63 contradict each other" in message
    assert "type data.contradictions=drop" in message
    held_out = written(tmp_path / "v.jsonl", *({**row, "chosen": " other"} for row in ROWS[:5]), ROWS[9])
    kept = load(path, contradictions=Contradictions.keep, validation_path=str(held_out))
    assert kept.counts["contradictions"] == 1
    assert kept.counts["dropped: duplicate"] == 3  # two in the file, one that is held out itself
    assert kept.counts["dropped: prompt is held out"] == 6  # the five, and p3 the other way round
    assert len(kept.train) == 60 + 3 - 3 - 6


def test_21_identical_sides_are_dropped_and_counted(tmp_path):
    splits = load(written(tmp_path / "x", *ROWS, {"prompt": "q", "chosen": "same", "rejected": "same"}))
    assert splits.counts["dropped: identical sides"] == 1
    assert len(splits.train) + len(splits.held_out) == 60


def test_22_long_prompts_and_responses_are_cut_and_counted_and_nothing_left_is_an_error(tmp_path):
    long = {"prompt": "p" * 100, "chosen": "c" * 100, "rejected": "r" * 100}
    same = {"prompt": "p" * 99, "chosen": "c" * 100 + "1", "rejected": "c" * 100 + "2"}
    splits = load(written(tmp_path / "x", *ROWS, long, same))
    assert splits.counts["prompts truncated"] == 2
    assert splits.counts["responses truncated"] == 4
    assert splits.counts["dropped: identical after truncation"] == 1
    pairs = [*splits.train, *splits.held_out]
    assert all(len(pair.chosen) >= 1 <= len(pair.rejected) for pair in pairs)
    assert max(pair.size for pair in pairs) <= 32 + 2 * 32
    message = refusal(written(tmp_path / "y", same))
    assert "no pair is left of rows 1" in message
    assert "dropped: identical after truncation 1" in message


def test_23_no_end_token_is_refused_and_no_pad_token_is_set_with_the_end_still_learned(policy, tmp_path):
    tokenizer = tokenizer_of("plain")
    model = policy.model
    tokenizer.eos_token = None
    Policy(model, tokenizer).save(tmp_path / "endless")
    with pytest.raises(PolicyError, match="no end-of-sequence token; set eos_token"):
        load_policy(tmp_path / "endless")
    tokenizer = tokenizer_of("plain")
    tokenizer.pad_token = None
    Policy(model, tokenizer).save(tmp_path / "padless")
    loaded = load_policy(tmp_path / "padless").tokenizer
    assert loaded.pad_token_id == loaded.eos_token_id
    (pair,) = PairTokenizer(loaded, 64, 32).pairs([Pair("a", "b", "c")], Counter())
    assert list(pair.chosen) == ids_of("plain", "b<|end|>")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}', "not UTF-8 at byte 12 of the line"),
        (
            b'{"prompt": "ab\\u0000", "chosen": "a", "rejected": "b"}',
            "field 'prompt' has a NUL character at position 2",
        ),
        (b'{"prompt": "p", "chosen": "\\ud800", "rejected": "b"}', "field 'chosen' has a lone surrogate at position 0"),
    ],
)
def test_24_bytes_that_are_no_text_are_placed_and_a_byte_order_mark_is_accepted(line, what, tmp_path):
    assert f"x.jsonl:2: {what}" in refusal(written(tmp_path / "x.jsonl", ROWS[0], line))
    splits = load(written(tmp_path / "y.jsonl", b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode(), *ROWS[1:]))
    assert splits.counts["rows"] == 60


def test_25_no_row_refuses(tmp_path):
    assert "no pair is left of 0 rows" in refusal(written(tmp_path / "x"))
    assert "no pair is left of 0 rows" in refusal(written(tmp_path / "y", b"", b"  "))


@pytest.mark.parametrize("name", ["first", "other"])  # prompts that the hash puts on different sides
def test_25_one_row_trains(name, model, tmp_path):
    written(tmp_path / "one.jsonl", {"prompt": name, "chosen": " good", "rejected": " bad"})
    result = train(tmp_path, model, "data.path=one.jsonl", "data.validation_fraction=0.5", "data.batch_size=1")
    assert result.returncode == 0, result.stderr
    assert "no pair is held out" in result.stdout
    (record,) = tmp_path.glob("outputs/dpo/*/seed=0/run.json")
    assert json.loads(record.read_text())["status"] == "done"


@pytest.mark.parametrize("noise", [Symmetric, OneSided])
@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_26_a_noise_rate_that_is_none_is_refused_and_0_and_1_are_exact(noise, rate, tmp_path):
    with pytest.raises(ValueError, match=r"noise.rate=.*: must lie in \[0, 1\]; type e.g. noise.rate=0.2"):
        noise(rate=rate)
    pairs = load(written(tmp_path / "x", *ROWS)).train
    assert not Symmetric(rate=0.0).flips(pairs).any()
    assert Symmetric(rate=1.0).flips(pairs).all()


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_27_a_beta_that_is_none_is_refused(beta):
    with pytest.raises(ValueError, match="beta="):
        DPO(beta)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_27_loss_and_gradient_stay_finite_at_great_margins(name, margin):
    chosen = torch.tensor([margin], requires_grad=True)
    zero, length = torch.zeros(1), torch.ones(1)
    reference = PairLogps(zero, zero, length, length, score_gap=zero)
    loss = make_loss(name, beta=1.0)(PairLogps(chosen, zero, length, length), reference)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert chosen.grad.isfinite().all()


def test_28_a_tokenizer_of_another_model_is_refused_before_step_0(policy, tmp_path):
    torch.manual_seed(0)
    smaller = type(policy.model)(policy.model.config.__class__(**(policy.model.config.to_dict() | {"vocab_size": 300})))
    Policy(smaller, policy.tokenizer).save(tmp_path / "mixed")
    beyond = policy.tokenizer.decode([len(policy.tokenizer) - 1])
    written(tmp_path / "pairs.jsonl", *({**row, "prompt": f"{i}{beyond}"} for i, row in enumerate(ROWS)))
    result = train(tmp_path, tmp_path / "mixed", "data.path=pairs.jsonl")
    assert result.returncode == 2
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert (
        f"is beyond the 300 rows of the model's embedding, and its tokenizer has {len(policy.tokenizer)} tokens"
        in error
    )
    assert "the tokenizer is not that of the model" in error
    assert not list(tmp_path.glob("outputs/cache/reference-*"))


def test_29_prompt_and_response_are_joined_as_tokens(policy):
    tokenizer = policy.tokenizer
    (pair,) = PairTokenizer(tokenizer, 64, 32).pairs([Pair("The plot ", "was good.", "x")], Counter())
    apart = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("The plot ", "was good.")]
    assert [*pair.prompt[1:], *pair.chosen[:-1]] == [token for part in apart for token in part]
    assert tokenizer("The plot was good.", add_special_tokens=False)["input_ids"] != [t for part in apart for t in part]


@pytest.mark.parametrize("fault", ["cut", "flipped bit", "of another model"])
def test_30_a_reference_cache_that_is_not_what_it_should_be_is_computed_again(fault, policy, tmp_path, caplog):
    pairs = make_pairs(12)
    cached = Cached().prepare(policy.model, pairs, tmp_path)
    right = cached(collate(pairs)).chosen.tolist()
    data = bytearray(cached.path.read_bytes())
    if fault == "cut":
        cached.path.write_bytes(data[:-20])
    elif fault == "flipped bit":
        data[-3] ^= 1
        cached.path.write_bytes(data)
    else:
        others = Cached().prepare(policy.model, make_pairs(12, seed=3), tmp_path)
        cached.path.write_bytes(others.path.read_bytes())
    assert Cached().prepare(policy.model, pairs, tmp_path)(collate(pairs)).chosen.tolist() == right
    assert "does not match its checksum: it is created again" in caplog.text


def build_cache(rank: int, world_size: int, folder: str) -> None:
    """One of two processes that want the same reference cache."""
    from dpo_lab.models import reference_cache

    compute = reference_cache._compute
    reference_cache._compute = lambda *a: (print("computed", flush=True), compute(*a))[1]
    cached = Cached().prepare(load_policy(Path(folder) / "mine").model, make_pairs(40), Path(folder) / "cache")
    print("ROWS", cached.rows.numpy().tobytes().hex())
    sys.stdout.flush()


def test_31_two_processes_that_build_one_cache_compute_it_once(policy, tmp_path):
    policy.save(tmp_path / "mine")
    outputs = run_in_ranks("tests.faults.test_bad_data", "build_cache", 2, str(tmp_path))
    assert sum(output.count("computed") for output in outputs) == 1
    assert outputs[0].split("ROWS")[1] == outputs[1].split("ROWS")[1]


def validate(rank: int, world_size: int, held_out: str) -> None:
    """One rank of a validation over so many held-out pairs."""
    become_rank(rank, world_size)
    print("RESULT", json.dumps(figures(make_pairs(int(held_out), vocabulary=250), devices=world_size)))
    sys.stdout.flush()


def figures(held_out, devices: int) -> dict[str, float]:
    """What validation says of these pairs."""
    from lightning.pytorch import Trainer

    from dpo_lab.data.datamodule import PreferenceDataModule
    from dpo_lab.models.forward import select_forward
    from dpo_lab.models.policy import TinyPolicy
    from dpo_lab.models.reference import Uniform
    from dpo_lab.models.tokenizer import train_tokenizer
    from dpo_lab.training.dpo_module import DPOModule
    from dpo_lab.training.optim import Optim

    model = TinyPolicy(hidden_size=32, layers=1, heads=4, intermediate_size=32).build(
        train_tokenizer(["the plot was good and its music too"], 300), seed=0
    )
    select_forward(model)
    reference = Uniform().prepare(model, held_out, Path("unused"))
    module = DPOModule(model, DPO(0.5), reference, Optim(), total_steps=1, batch_size=8, tokens_per_microbatch=64)
    data = PreferenceDataModule(held_out, held_out, batch_size=8, num_workers=0, seed=0)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(module, datamodule=data, verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore::FutureWarning:lightning")
@pytest.mark.parametrize("held_out", [1, 5])
def test_32_held_out_pairs_that_do_not_divide_by_the_ranks_count_once(held_out):
    """One pair for two ranks, and five: nothing hangs, and the figures are those of one process."""
    outputs = run_in_ranks("tests.faults.test_bad_data", "validate", 2, str(held_out))
    alone = figures(make_pairs(held_out, vocabulary=250), devices=1)
    assert "val/loss" in alone
    for output in outputs:
        assert json.loads(output.split("RESULT", 1)[1]) == pytest.approx(alone, abs=1e-5)


def test_a_chat_under_a_tokenizer_that_can_not_take_it_is_a_bad_row_too():
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    answer = [{"role": "assistant", "content": "a"}]
    with pytest.raises(BadChat):
        PairTokenizer(tokenizer_of("gemma"), 64, 32).pairs(
            [Pair(turns, answer, [{**answer[0], "content": "b"}])], Counter()
        )
