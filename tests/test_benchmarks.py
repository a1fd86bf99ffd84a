"""The benchmarks' arithmetic and pages; what they measure is measured by hand."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig

from benchmarks import default_run, end_to_end, gpu, launches, ranks, results, saving, variants
from benchmarks.step import relative_error
from benchmarks.workload import LONGEST, MIXES, SHAPES, make_models, make_pairs, tokens_of, useful_flops
from dpo_lab.core.pairs import EncodedPair
from dpo_lab.data.sources import Data
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.models.policy import load_policy
from tests.conftest import SMALL as SMALL_RUN

pytestmark = pytest.mark.slow

SMALL = gpu.Shape("small", 256, 6, 128, 768, 8192, tied=True)


def test_the_gpu_page_is_what_the_program_writes():
    assert gpu.PAGE.read_text() == gpu.page()


def test_the_paper_estimate_counts_what_the_benchmark_counts():
    pair = gpu.Pair("chat", 200, 150)
    encoded = EncodedPair("key", range(200), range(150), range(150))
    assert gpu.OURS.flops(SMALL, pair) == pytest.approx(useful_flops([encoded], SHAPES["small"]))
    assert tokens_of([encoded]) == pair.work(shared_prompt=False).tokens == 700


def test_worked_flops():
    """A body of one layer, by hand: H = 4, keys 4, F = 8, V = 10; prompt 1, responses of 1 token."""
    shape, pair = gpu.Shape("hand", 4, 1, 4, 8, 10, tied=True), gpu.Pair("hand", 1, 1)
    assert shape.body == 2 * 16 + 2 * 16 + 3 * 32 == 160
    assert shape.parameters == 160 + 40
    assert pair.work(shared_prompt=True).attended == 1 + 2 * (1 + 1)
    assert pair.work(shared_prompt=False).attended == 2 + 2 * (1 + 1)
    assert gpu.OURS.flops(shape, pair) == 3 * (2 * 160 * 3 + 4 * 4 * 5) + 3 * 2 * 4 * 10 * 2
    assert gpu.TUNED.flops(shape, pair) == 3 * (2 * 160 * 4 + 4 * 4 * 6) + 4 * 2 * 4 * 10 * 2
    assert gpu.ORIGINAL.flops(shape, pair) == 1.3 * 4 * (2 * 160 * 4 + 2 * 4 * 10 * 4) + 4 * 4 * 4 * 6
    assert gpu.OURS.state_bytes(shape) == 18 * 200


def test_parameters_of_real_models():
    assert [round(shape.parameters / 1e9, 2) for shape in gpu.SHAPES] == [0.49, 8.03, 70.55]


@pytest.mark.parametrize("mix", MIXES)
def test_pairs_are_the_same_every_time_and_about_the_mix(mix):
    pairs = make_pairs(mix, 64, 1000)
    assert pairs == make_pairs(mix, 64, 1000)
    prompt, _, response, _ = MIXES[mix]
    lengths = sorted(len(p.prompt) for p in pairs), sorted(len(p.chosen) for p in pairs)
    assert [middle[32] for middle in lengths] == pytest.approx([prompt, response], rel=0.35)


def test_padding_of_the_paper_estimate_is_the_mixs():
    pairs = make_pairs("chat", 4, 1000)
    width = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)
    assert 2 * len(pairs) * width / tokens_of(pairs) == pytest.approx(gpu.TRL.padding, abs=0.15)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ours_is_measured_on_the_gradient_that_the_original_loop_has(checkpointing):
    policy, reference = make_models("small")
    pairs = make_pairs("short", 3, SHAPES["small"].vocab_size)
    gradients = []
    for variant in (
        variants.original(policy, reference, pairs),
        variants.ours(policy, reference, pairs, tokens=100, checkpointing=checkpointing),
    ):
        policy.zero_grad()
        variant.backward()
        gradients.append(variants.gradient(policy))
    assert 0 < relative_error(gradients[1], gradients[0]) < 5e-5


def test_a_sweep_is_measured_on_the_pairs_of_the_mix(tmp_path, monkeypatch):
    """What our command reads from the files are the very token ids, and it holds out the rows that TRL is told to."""
    monkeypatch.setattr(end_to_end, "FOLDER", tmp_path / "material")
    held_out = end_to_end.make_material("small", "short", 16)
    data = Data(path=str(tmp_path / "material" / "all.jsonl"), validation_fraction=end_to_end.VALIDATION)
    tokenizer = load_policy(tmp_path / "material" / "policy").tokenizer
    splits = data.choose(data.store(PairTokenizer(tokenizer, LONGEST, LONGEST - 256), tmp_path / "cache"))
    for name, pairs, count in (("train", splits.train, 16), ("held-out", splits.held_out, held_out)):
        rows = (tmp_path / "material" / f"{name}.jsonl").read_text().splitlines()
        prompts = [tokenizer(json.loads(row)["prompt"], add_special_tokens=False)["input_ids"] for row in rows]
        assert prompts == [pair.prompt.tolist() for pair in pairs]
        assert len(pairs) == count
    encoded = [*splits.train, *splits.held_out]
    wanted = make_pairs("short", 64, SHAPES["small"].vocab_size)
    end = tokenizer.eos_token_id
    drawn = {(tuple(p.prompt), (*p.chosen, end), (*p.rejected, end)) for p in wanted}
    assert {tuple(tuple(part.tolist()) for part in (p.prompt, p.chosen, p.rejected)) for p in encoded} <= drawn
    assert len(encoded) == 16 + held_out


def test_trls_tokenizer_reads_the_default_runs_tokens():
    """With the end token among them, and nothing added."""
    config = LlamaConfig(vocab_size=120, eos_token_id=1)
    tokenizer = default_run.tokenizer_of(config)
    prompt, response = [*range(120)], [12, 101, 1]
    text = default_run.words(prompt) + " " + default_run.words(response)
    assert tokenizer(text)["input_ids"] == prompt + response
    assert text.endswith(tokenizer.eos_token)  # else TRL would add one


def test_the_default_run_is_told_against_trl():
    turn = {"reference": 8.0, "training": 24.0, "stage": 32.0, "whole": 50.0}
    theirs = {"reference": 0.0, "training": 80.0, "stage": 80.0, "validation": 6.0, "whole": 90.0}
    rows = {"ours": [turn, turn | {"stage": 30.0}, turn | {"stage": 33.0}], "TRL, its defaults": [theirs]}
    page = "\n".join(results._default_run(results.context() | {"repeats": 3, "rows": rows}))
    assert "| ours | 32.0 | 30.0 .. 33.0 | 1.00 | 8.0 | 24.0 |  | 50.0 |" in page
    assert "| TRL, its defaults | 80.0 | 80.0 .. 80.0 | 2.50 | 0.0 | 80.0 | 6.0 | 90.0 |" in page
    assert "Ours, its reference included, against TRL, its defaults: 2.50 x." in page


def test_ranks_are_told_against_one_process():
    rows = [
        {"ranks": 1, "seconds": 4.0, "spread": [3.9, 4.2], "cpu": 4.0},
        {"ranks": 2, "seconds": 2.0, "spread": [1.9, 2.1], "cpu": 4.1},
    ]
    setting = {
        "shape": "small",
        "mix": "chat",
        "steps": 10,
        "repeats": 3,
        "imbalance": 1.025,
        "gradient_megabytes": 27.4,
    }
    page = "\n".join(results._ranks([results.context() | setting | {"rows": rows}]))
    assert (
        "| small, chat | 4.00 (3.90 .. 4.20) | 2.00 (1.90 .. 2.10) | 2.00 x | 4.00 and 4.10 | +2.5% | 27 MB |" in page
    )


@pytest.mark.parametrize("mix", MIXES)
def test_ranks_get_about_as_many_tokens(mix):
    assert 1 <= ranks.imbalance("small", mix, steps=4) < 1.1


def test_a_table_that_was_measured_takes_its_place_and_the_others_stay(tmp_path, monkeypatch, capsys):
    page = tmp_path / "RESULTS.md"
    stood = results.PAGE.read_text()
    page.write_text(stood)
    monkeypatch.setattr(results, "PAGE", page)
    monkeypatch.setattr(results, "MEASURED", tmp_path)
    results.write_results()
    assert page.read_text() == stood
    measured = {
        "what": "the embedded task",
        "steps": 160,
        "saves": 2,
        "repeats": 3,
        "cost": 0.0123,
        "spread": [0.01, 0.02],
    }
    results.save("saving-small", measured | {"seconds": {"fit": 20.0, "save": 0.3, "fsync": 0.2, "checksum": 0.04}})
    results.write_results()
    row = "| the embedded task | 160 | 2 | 0.30 | 0.20 | 0.04 | 1.23% (1.00% .. 2.00%) of 20.0 s |"
    assert row in page.read_text()
    assert row in capsys.readouterr().out
    sections = [text.split("\n## ")[1:] for text in (stood, page.read_text())]
    of_saving = lambda section: section.startswith("What it costs")  # noqa: E731
    assert [s.strip() for s in sections[0] if not of_saving(s)] == [s.strip() for s in sections[1] if not of_saving(s)]


@pytest.mark.extended
@pytest.mark.filterwarnings("ignore")
def test_what_durability_costs_is_counted_in_a_real_fit(tmp_path):
    """One save and the journal of a run of the real command, in a fresh process."""
    settings = [*SMALL_RUN, "trainer.max_steps=4", "callbacks.checkpoint.every_n_steps=2"]
    found = saving.of_runs(settings, repeats=1)
    assert found["steps"] == 4
    assert found["saves"] >= 2
    assert 0 < found["seconds"]["checksum"] < found["seconds"]["save"]
    assert 0 < found["seconds"]["fsync"] < found["seconds"]["fit"]
    assert found["cost"] > 0


def test_a_step_of_16_chat_pairs_launches_under_4000_operators():
    """Of 24 layers, of which one more adds as many as the one before: counted for one and two."""
    one, two = (launches.step(16, layers=layers) for layers in (1, 2))
    assert launches.total(one) + (launches.LAYERS - 1) * (launches.total(two) - launches.total(one)) <= 3181
    casts = two["forward"][launches.CAST] - one["forward"][launches.CAST]
    assert casts == 4  # the inputs of q, k and v, and of gate and up; rotated queries and keys, for the kernel
