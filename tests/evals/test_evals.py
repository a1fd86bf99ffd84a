"""Evaluators: against enumeration, hand-made texts and each other; samples are made once."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from dpo_lab.core.losses import DPO, LOSSES, SFTChosen
from dpo_lab.data.pair_sets import SetPair
from dpo_lab.data.splits import HELD_OUT
from dpo_lab.data.tasks.reviews import SyntheticReviews
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.evals.context import EvalContext
from dpo_lab.evals.evaluate import Evals, evaluate
from dpo_lab.evals.evaluators.above_best import AboveBest
from dpo_lab.evals.evaluators.base import EVALUATORS, Evaluator, in_order, labels_of
from dpo_lab.evals.evaluators.calibration import Calibration
from dpo_lab.evals.evaluators.displacement import Displacement
from dpo_lab.evals.evaluators.harness import Harness
from dpo_lab.evals.evaluators.kl import KL
from dpo_lab.evals.evaluators.language import Language, distinct, repeated
from dpo_lab.evals.evaluators.optimum import Optimum
from dpo_lab.evals.evaluators.pair_sets import PairSets
from dpo_lab.evals.evaluators.preference import Preference
from dpo_lab.evals.evaluators.reward import Reward
from dpo_lab.evals.evaluators.third import Third
from dpo_lab.evals.evaluators.win_rate import WinRate
from dpo_lab.evals.judges import Comparer, JudgeError, Scorer
from dpo_lab.evals.judges.classifier import Classifier
from dpo_lab.evals.third_policy import ThirdPolicy
from dpo_lab.models import sampling
from dpo_lab.models.policy import Policy
from dpo_lab.models.reference import Uniform
from dpo_lab.models.sampling import Sample
from dpo_lab.reporting.figures import draw_run
from dpo_lab.reporting.run_summary import metric_rows
from dpo_lab.runs.examples import EXAMPLES, numbered, read
from dpo_lab.stats.calibration import reliability
from dpo_lab.stats.estimates import Estimate
from tests.conftest import make_pairs
from tests.support.configs import recorded, settled


def set_of(pairs) -> list[SetPair]:
    """Pairs as those of a further file, of two subsets, whose texts are their token ids."""
    texts = [("", " ".join(map(str, pair.chosen)), " ".join(map(str, pair.rejected))) for pair in pairs]
    return [
        SetPair(pair, text, "odd" if i % 2 else "even") for i, (pair, text) in enumerate(zip(pairs, texts, strict=True))
    ]


def perturbed(policy: Policy, scale: float) -> Policy:
    model = copy.deepcopy(policy.model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return Policy(model, policy.tokenizer)


def subject_of(trained: Policy, initial: Policy, prompts: list[str], **changes) -> EvalContext:
    encoder = PairTokenizer(initial.tokenizer, 64, 32)
    begin = encoder.prompt("")
    settings = dict(
        trained=trained,
        initial=initial,
        encoder=encoder,
        pairs=make_pairs(9),
        prompts=prompts,
        prompt_ids=[encoder.prompt(prompt) for prompt in prompts],
        texts=[(begin, encoder.response(text, begin)) for text in SyntheticReviews().texts(HELD_OUT, 5, seed=0)],
        task=SyntheticReviews(),
        max_new_tokens=8,
        tokens=64,
        batch_size=4,
        seed=0,
    )
    return EvalContext(**(settings | changes))


@pytest.fixture
def subject(policy) -> EvalContext:
    return subject_of(perturbed(policy, 0.05), policy, SyntheticReviews().prompts(HELD_OUT, 6, seed=0))


def test_samples_are_made_once(subject, monkeypatch):
    calls = []
    real = sampling.generate_responses
    monkeypatch.setattr(sampling, "generate_responses", lambda *a, **k: calls.append(k["what"]) or real(*a, **k))
    generated = []
    for policy in (subject.trained, subject.initial):
        forward = policy.model.forward

        def counted(*args, forward=forward, **how):
            generated.extend([1] * (how.get("past_key_values") is not None))  # a token of each sample of a batch
            return forward(*args, **how)

        monkeypatch.setattr(policy.model, "forward", counted)
    subject.judge = Scorer(lambda texts: np.array([float(len(text)) for text in texts]))
    metrics = evaluate(subject)
    assert sorted(calls) == ["Samples (initial)", "Samples (trained)"]  # by all evaluators together
    assert 0 < len(generated) <= 2 * 2 * 8  # two policies, two batches, 8 tokens at most
    assert {
        "accuracy",
        "true_accuracy",
        "kl",
        "gold",
        "win_rate",
        "judge",
        "perplexity",
        "well_formed",
        "length",
    } <= set(metrics)


def test_the_initial_policy_against_itself(policy):
    metrics = evaluate(subject_of(policy, policy, SyntheticReviews().prompts(HELD_OUT, 6, seed=0)))
    assert metrics["kl"].value == 0
    assert metrics["accuracy"].value == 0.5
    assert metrics["true_accuracy"].value == 0.5
    assert metrics["margin"].value == 0
    assert metrics["chosen_fell"].value == 0
    assert metrics["perplexity"] == metrics["initial/perplexity"]


def test_kl_against_enumeration():
    """Vocabulary of 5 with an end token, responses of at most 3 tokens: the exact KL lies within 3 standard errors."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=2
    )
    initial, trained = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    with torch.no_grad():
        trained.lm_head.weight *= 30  # far enough apart to be worth measuring
        initial.lm_head.weight *= 30

    class Tokenizer:
        eos_token_id, pad_token_id, bos_token_id = 1, 2, None

        chat_template = None
        added_tokens_decoder, all_special_ids = {}, [1, 2, 3, 4]  # a response after them begins a text

        def __call__(self, texts, add_special_tokens=True):
            return {"input_ids": [[3, 4] for _ in texts] if isinstance(texts, list) else [3, 4]}

        def decode(self, ids, **settings):
            return "any"

    subject = subject_of(
        Policy(trained, Tokenizer()),
        Policy(initial, Tokenizer()),
        ["any"] * 4000,
        encoder=PairTokenizer(Tokenizer(), 16, 8),
        max_new_tokens=3,
        batch_size=500,
    )
    responses = [
        r for n in (1, 2, 3) for r in product(range(5), repeat=n) if 1 not in r[:-1] and (r[-1] == 1 or n == 3)
    ]
    of_trained, _ = subject.response_logps(trained, [[3, 4]] * len(responses), responses)
    of_initial, _ = subject.response_logps(initial, [[3, 4]] * len(responses), responses)
    assert of_trained.exp().sum().item() == pytest.approx(1, abs=1e-5)  # the enumeration is complete
    exact = (of_trained.exp() * (of_trained - of_initial)).sum().item()
    metrics = dict(KL().run(subject))
    assert metrics["kl"].se is not None
    assert abs(metrics["kl"].value - exact) < 3 * metrics["kl"].se
    assert exact > 10 * metrics["kl"].se


def test_response_logps_do_not_depend_on_batches(subject):
    prompts, responses = subject.prompt_ids, [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [5], [6, 6]]
    sums, lengths = subject.response_logps(subject.initial.model, prompts, responses)
    for i in range(len(prompts)):
        alone, _ = subject.response_logps(subject.initial.model, [prompts[i]], [responses[i]])
        assert sums[i].item() == pytest.approx(alone.item(), rel=1e-5)
    assert lengths.tolist() == [3, 1, 2, 4, 1, 2]


def test_language_of_uniform_logits_is_the_vocabulary(subject):
    uniform = copy.deepcopy(subject.initial)
    with torch.no_grad():
        uniform.model.lm_head.weight.zero_()
    vocabulary = uniform.model.config.vocab_size
    metrics = dict(Language().run(subject_of(uniform, subject.initial, subject.prompts)))
    assert metrics["perplexity"].value == pytest.approx(vocabulary, rel=1e-4)
    assert metrics["entropy"].value == pytest.approx(math.log(vocabulary), rel=1e-5)
    assert metrics["initial/entropy"].value < metrics["entropy"].value


def with_samples(subject: EvalContext, trained: list[str], initial: list[str]) -> EvalContext:
    """The subject with these texts as its samples, behind empty prompts."""
    subject.prompts, subject.prompt_ids = [""] * len(trained), [subject.encoder.prompt("")] * len(trained)
    eos = subject.encoder.tokenizer.eos_token_id

    def as_samples(texts):
        return [
            Sample((*subject.encoder.tokenizer(t, add_special_tokens=False)["input_ids"], eos), True) for t in texts
        ]

    subject.__dict__["samples"], subject.__dict__["initial_samples"] = as_samples(trained), as_samples(initial)
    return subject


def test_gold_reward_by_hand(subject):
    good, bad, fair = "The plot was superb.", "The plot was awful.", "The plot was odd."  # 3, -3, 0
    subject = with_samples(subject, [good, good, fair], [bad, good, fair])
    metrics = dict(Reward().run(subject)) | dict(WinRate().run(subject))
    assert metrics["gold"].value == pytest.approx(2)
    assert metrics["initial/gold"].value == pytest.approx(0)
    assert metrics["win_rate"].value == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert metrics["gold_gain"].value == pytest.approx(2 / math.sqrt(6))


def test_without_a_task_there_is_no_gold_reward(subject):
    subject.task = None
    assert list(Reward().run(subject)) == []
    assert list(WinRate().run(subject)) == []


def test_preference_by_hand(subject):
    trained, initial = subject.pair_logps
    margins = ((trained.chosen - initial.chosen) - (trained.rejected - initial.rejected)).tolist()
    truth = [p.gold_margin for p in subject.pairs]
    metrics = dict(Preference().run(subject))
    assert metrics["accuracy"].value == pytest.approx(sum(m > 0 for m in margins) / 9)
    known = [(m, t) for m, t in zip(margins, truth, strict=True) if not math.isnan(t)]
    assert metrics["true_accuracy"].n == len(known) == 7
    assert metrics["true_accuracy"].value == pytest.approx(sum(m * t > 0 for m, t in known) / len(known))


def test_train_pairs_clean_and_flipped_apart(subject):
    """One pair as annotated and one flipped: what is fitted of the flipped one is the wrong side."""
    pairs = [p for p in subject.pairs if not math.isnan(p.gold_margin)]
    subject.train_pairs = [pairs[0], *(p.flip() for p in pairs[1:3])]
    held_out = dict(zip((p.key for p in subject.pairs), subject.held_out.margins.tolist(), strict=True))
    signs = [held_out[p.key] * (-1 if p.flipped else 1) for p in subject.train_pairs]
    metrics = dict(Preference().run(subject))
    assert metrics["train/clean/accuracy"].value == (signs[0] > 0)
    assert metrics["train/flipped/accuracy"].value == sum(m > 0 for m in signs[1:]) / 2
    assert metrics["train/flipped/margin"].value == pytest.approx(sum(signs[1:]) / 2, rel=1e-5)
    right = [m * p.gold_margin > 0 for m, p in zip(signs, subject.train_pairs, strict=True)]
    assert metrics["train/true_accuracy"].value == pytest.approx(sum(right) / 3)
    rows = {row["key"]: row for row in subject.examples.rows() if row["kind"] == "train"}
    assert [rows[p.key]["flipped"] for p in subject.train_pairs] == [False, True, True]


@pytest.mark.parametrize("evaluator", [Preference(), Displacement(), PairSets()])
def test_copies_of_a_pair_narrow_no_interval(policy, evaluator):
    """Of 40 prompts with four equal pairs each the intervals are about those of one pair of each prompt."""
    alone = make_pairs(40)
    alone = [replace(pair, prompt=[3, *divmod(i, 9), *pair.prompt]) for i, pair in enumerate(alone)]
    copies = [replace(pair, key=f"{pair.key}-{i}") for i in range(4) for pair in alone]
    widths: list[dict[str, float]] = []
    for pairs in (alone, copies):
        subject = subject_of(
            perturbed(policy, 0.05), policy, ["p"], pairs=pairs, train_pairs=pairs, pair_sets={"own": set_of(pairs)}
        )
        found = {name: each.interval for name, each in evaluate(subject, [evaluator]).items() if each.interval}
        widths.append({name: high - low for name, (low, high) in found.items() if name != "gold_correlation"})
    assert widths[0].keys() == widths[1].keys()
    for name, width in widths[0].items():
        assert widths[1][name] == pytest.approx(width, rel=0.05), name


def test_displacement_by_hand(subject):
    trained, initial = subject.pair_logps
    metrics = dict(Displacement().run(subject))
    fell = (trained.chosen < initial.chosen).sum().item()
    assert metrics["chosen_fell"].value == pytest.approx(fell / 9)
    assert metrics["chosen_change"].value == pytest.approx((trained.chosen - initial.chosen).mean().item(), rel=1e-5)
    assert metrics["rejected_change"].value == pytest.approx(
        (trained.rejected - initial.rejected).mean().item(), rel=1e-5
    )


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error_is_that_of_its_curve(subject, bins):
    subject.loss = DPO(beta=2.0)
    metrics = dict(Calibration(bins).run(subject))
    curve = [row for row in subject.examples.rows() if row["kind"] == "bin"]
    assert sum(row["share"] for row in curve) == pytest.approx(1)
    error = sum(row["share"] * abs(row["probability"] - row["frequency"]) for row in curve)
    assert metrics["calibration_error"].value == pytest.approx(error, abs=1e-6)
    assert (metrics["calibration_error"].value > 0.05) == (bins > 1)  # in one bin both sides are one half


@pytest.mark.parametrize("name", ["dpo", "simpo", "ipo_mean"])
def test_record_table_and_figure_of_a_run_say_one_calibration_error(name, subject, tmp_path):
    subject.loss = LOSSES[name](beta=2.0)
    subject.reference = Uniform().prepare(subject.initial.model, (), tmp_path) if name == "simpo" else None
    metrics = evaluate(subject, [Calibration(), Preference()])
    subject.examples.write(tmp_path / EXAMPLES)
    record = {
        "config": {"beta": 2.0, "loss": {"kind": name}},
        "metrics": {k: m.as_record() for k, m in metrics.items()},
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    draw_run(tmp_path)
    drawn = (tmp_path / "figures" / "calibration.svg").read_text()
    (row,) = (row for row in metric_rows(metrics, labels_of(metrics)) if row[0] == "calibration error")
    # by hand: the probability that each loss gives the label of a pair, and the error over it
    trained, reference = subject.pair_logps
    if name == "simpo":
        reference = reference - reference
    ratios = (trained - reference) if name == "dpo" else (trained - reference).per_token()
    expected = reliability((2.0 * ratios.margin.double()).sigmoid().numpy(), 15).error
    recorded = record["metrics"]["calibration_error"]["value"]
    assert recorded == pytest.approx(expected, abs=1e-9)
    assert row[2] == f"{recorded:.3f}"
    assert f"by labels: calibration error {recorded:.3f}, n = 9" in drawn


def test_a_loss_without_beta_gives_no_probability_to_calibrate(subject):
    subject.loss = SFTChosen()
    assert list(Calibration().run(subject)) == []
    assert subject.examples.rows() == []


def test_calibration_by_hand():
    """Four pairs said at 0.7, of which three came true, and two ties: off by 0.05 in the outer bins, right in the middle."""
    p = np.array([0.7, 0.7, 0.7, 0.3, 0.5, 0.5])
    curve = reliability(p, 5)
    assert curve.probability.tolist() == pytest.approx([0.3, 0.5, 0.7])
    assert curve.frequency.tolist() == pytest.approx([0.25, 0.5, 0.75])
    assert curve.share.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3])


def test_forward_kl_of_texts_is_the_rise_of_their_log_perplexity(subject):
    metrics = evaluate(subject, [KL(), Language()])
    tokens = sum(len(response) for _, response in subject.texts)
    rise = math.log(metrics["perplexity"].value) - math.log(metrics["initial/perplexity"].value)
    assert metrics["kl_forward_text"].value * len(subject.texts) / tokens == pytest.approx(rise)


def test_examples_hold_what_the_figures_are_made_of(subject, tmp_path):
    subject.train_pairs = subject.pairs[:3]
    metrics = evaluate(subject)
    subject.examples.write(tmp_path / EXAMPLES)
    found = read(tmp_path / EXAMPLES)
    assert {kind: len(rows) for kind, rows in found.items() if kind != "bin"} == {
        "held_out": 9,
        "train": 3,
        "prompt": 6,
        "text": 5,
    }

    def average(kind, column):
        return sum(row[column] for row in found[kind].values()) / len(found[kind])

    for kind, column, name in (
        ("prompt", "kl", "kl"),
        ("prompt", "gold", "gold"),
        ("prompt", "initial_gold", "initial/gold"),
        ("prompt", "win", "win_rate"),
        ("prompt", "tokens", "length"),
        ("held_out", "margin", "margin"),
    ):
        assert average(kind, column) == pytest.approx(metrics[name].value), column
    assert [row["response"] for row in found["prompt"].values()] == subject.responses(subject.samples)
    assert list(found["held_out"]) == [p.key for p in subject.pairs]
    assert found["held_out"]["pair-0"]["gold_margin"] is None


def test_a_damaged_line_of_examples_is_named(tmp_path):
    (tmp_path / EXAMPLES).write_text('{"kind": "text", "key": "a", "tokens": 3}\n{"kind": "te')
    with pytest.raises(ValueError, match=r"examples.jsonl:2: not an example"):
        read(tmp_path / EXAMPLES)


def test_a_prompt_that_comes_again_keeps_a_key_of_its_own():
    assert numbered(["a", "b", "a", "a"]) == ["a", "b", "a#2", "a#3"]


def save_classifier(policy: Policy, folder, labels: int) -> BertForSequenceClassification:
    settings = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    vocabulary = len(policy.tokenizer)
    torch.manual_seed(labels)
    model = BertForSequenceClassification(BertConfig(vocab_size=vocabulary, num_labels=labels, **settings)).eval()
    model.config.id2label = dict(enumerate(["BAD", "FAIR", "GOOD"][:labels]))
    model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return model


TEXTS = ["The plot was superb.", "The plot was awful and the music too.", "Fair."]


@pytest.mark.parametrize(("labels", "label", "column"), [(1, None, 0), (3, None, 2), (3, "BAD", 0), (3, "1", 1)])
def test_a_classifier_as_judge(policy, tmp_path, labels, label, column):
    model = save_classifier(policy, tmp_path, labels)
    judge = Classifier(path=str(tmp_path), label=label, batch_size=2).load()
    assert judge is not None
    for text, found in zip(TEXTS, judge.score(TEXTS), strict=True):
        with torch.no_grad():
            logits = model(**policy.tokenizer(text, return_tensors="pt")).logits[0].double()
        expected = logits[0] if labels == 1 else logits.softmax(0)[column].logit()
        assert found == pytest.approx(expected.item(), abs=1e-4)


def test_a_judge_that_cannot_be_had_is_refused_in_one_line(policy, tmp_path):
    with pytest.raises(JudgeError, match="no such folder"):
        Classifier(path=str(tmp_path / "none")).load()
    with pytest.raises(JudgeError, match=r"evals\.judge\.path=.*type the folder of a classifier"):
        Classifier(path=str(tmp_path)).load()
    save_classifier(policy, tmp_path, 3)
    with pytest.raises(JudgeError, match="no such class; type evals.judge.label= one of BAD, FAIR, GOOD"):
        Classifier(path=str(tmp_path), label="BEST").load()


def test_judges_scores_have_names_of_their_own(subject):
    subject.judge = Scorer(lambda texts: np.array([-float(len(text)) for text in texts]))
    subject = with_samples(subject, ["The plot was superb.", "a"], ["The plot was awful, awful.", "bb"])
    metrics = evaluate(subject, [Reward(), WinRate()])
    assert metrics["judge"].value == -10.5
    assert metrics["judge_win_rate"].value == 1
    assert metrics["win_rate"].value == 0.75  # a tie, of two texts that are no clause


def test_settings_choose_evaluators():
    evals = Evals(evaluators=["calibration", "kl"], calibration=Calibration(bins=3))
    assert evals.selected() == [Calibration(bins=3), KL()]
    with pytest.raises(ValueError, match=r"no evaluator is called 'winrate'; type evals.evaluators=\[win_rate\]"):
        Evals(evaluators=["winrate"])


ALL = ["preference", "calibration", "displacement", "kl", "reward", "win_rate", "language", "optimum"]


@pytest.mark.parametrize(("choice", "expected"), [("default", ALL[:-1]), ("imdb", ALL[:-1]), ("study", ALL)])
def test_every_choice_runs_the_default_evaluators_in_their_order(choice, expected):
    names = recorded(f"evals={choice}")["evals"]["evaluators"]
    assert names == settled(f"evals={choice}").evals.evaluators
    assert [name for name in names if name in ALL] == expected
    assert [name for name in in_order() if name in ALL] == ALL


@pytest.mark.parametrize("name", EVALUATORS)
def test_settings_of_an_evaluator_are_settings_of_a_run(name):
    own = dataclasses.asdict(EVALUATORS[name]())
    assert recorded()["evals"].get(name, {}) == own


def test_an_evaluator_that_does_not_state_its_traits_is_refused_where_it_is_defined():
    traits = dict(name="silent", order=90, is_default=True, needs_samples=False)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'needs_reward'"):

        class Silent(Evaluator, **traits):
            labels = {}

    with pytest.raises(TypeError, match="Mute: states no labels; give it labels = {metric: label}"):

        class Mute(Evaluator, **traits, needs_reward=False):
            """Does not say what is shown of it."""

    assert "silent" not in EVALUATORS


def test_what_an_evaluator_does_not_need_is_not_made(subject, monkeypatch):
    """Evaluators that state that they need no samples, or no reward, run where none can be had."""
    monkeypatch.setattr(sampling, "generate_responses", lambda *a, **k: pytest.fail("samples"))
    subject.train_pairs, subject.pair_sets = subject.pairs[:3], {"own": set_of(subject.pairs)}
    for kind in EVALUATORS.values():
        if not kind.needs_samples and kind is not Harness:  # which measures what it is told
            assert dict(kind().run(subject))
    monkeypatch.undo()
    subject.task = None
    assert {name for name, kind in EVALUATORS.items() if not dict(kind().run(subject))} == {
        name for name, kind in EVALUATORS.items() if kind.needs_reward or kind in (Harness, Third)
    }


@pytest.mark.parametrize("prompts", [["The plot"], []])
def test_without_held_out_pairs_what_needs_none_still_runs(policy, prompts):
    further = {"own": set_of(make_pairs(4))}
    subject = subject_of(perturbed(policy, 0.05), policy, prompts, pairs=[], pair_sets=further)
    found = evaluate(subject, [Preference(), Displacement(), KL(), PairSets()])
    of_samples = {"kl", "kl_per_token", "kl_forward_text"} if prompts else set()
    assert {name for name in found if "pairs/" not in name} == of_samples
    assert "pairs/own/accuracy" in found


def test_labels_are_of_metrics_that_are_measured(subject, monkeypatch):
    monkeypatch.setattr(SyntheticReviews, "gold", lambda self, text: sum(map(ord, text)) % 7)
    subject.judge = Scorer(lambda texts: np.array([sum(map(ord, text)) % 11 for text in texts], float))
    subject.train_pairs = [*subject.pairs[:3], *(pair.flip() for pair in subject.pairs[3:])]
    first, second = subject.pairs[:2]
    subject.pairs = [*subject.pairs, replace(first, rejected=[]), replace(second, chosen=[])]  # labelled on their own
    words = SyntheticReviews().texts(HELD_OUT, 1, seed=0)[0].split() * 2
    with_samples(subject, *([" ".join(words[: i % n + 1]) for i in range(40)] for n in (7, 5)))
    subject.third = ThirdPolicy(subject.initial, subject.encoder, subject.prompt_ids, shares_tokens=True)
    subject.third_samples = subject.initial_samples
    optimum = Optimum(num_candidates=16, num_prompts=2)
    settings = Evals(evaluators=in_order(), optimum=optimum)
    metrics = evaluate(subject, settings.selected())
    del subject.verdicts
    subject.judge = Comparer(lambda questions: np.linspace(0, 1, len(questions)), lambda *texts: " ".join(texts))
    metrics |= evaluate(subject, settings.selected())
    labels = [label for kind in EVALUATORS.values() for label in kind.labels]
    assert sorted(labels_of(metrics)) == sorted(labels)
    assert [row[0] for row in metric_rows(metrics, labels_of(metrics))] == list(labels_of(metrics).values())


def test_metrics_of_a_record_without_labels_are_shown_by_name():
    metrics = {name: Estimate(1.5) for name in ("accuracy", "initial/length", "length")}
    assert [row[0] for row in metric_rows(metrics, {})] == ["accuracy", "length"]


def test_nan_raises(subject):
    subject.judge = Scorer(lambda texts: np.full(len(texts), math.nan))
    with pytest.raises(ValueError, match="is nan, not a finite number"):
        evaluate(subject, [Reward()])


def test_repeated_by_hand():
    # trigrams: (a b a) (b a b) (a b a) | none | (x y z): 4, of which 1 stood there before
    assert repeated(["a b a b a", "a b", "x y z"], 3).value == pytest.approx(1 / 4)
    assert repeated(["a b"], 3) is None


def test_distinct_by_hand():
    # bigrams: (a b) (b a) (a b) | (a b): 4, of which 2 differ
    assert distinct(["a b a b", "a b"], 2).value == pytest.approx(2 / 4)


def test_above_best_counts_samples_above_the_initial_policys_best_hundredth():
    initial = np.arange(200.0)  # whose 99th percentile lies between 197 and 198
    trained = np.concatenate([np.full(50, 198.0), np.full(150, 197.0)])
    context: Any = SimpleNamespace(rewards={"gold": (trained, initial), "judge": (trained, initial)})
    found = dict(AboveBest().run(context))
    assert {name: each.value for name, each in found.items()} == {"above_best": 0.25, "initial/above_best": 0.01}
    context.rewards = {"judge": (trained, initial)}
    assert not dict(AboveBest().run(context))
