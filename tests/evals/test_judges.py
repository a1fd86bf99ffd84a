"""Judges that compare two responses: verdicts by hand, a local model against its own logits, a real HTTP server."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from dpo_lab.data.formats import Shape
from dpo_lab.data.pair_sets import read_pair_set
from dpo_lab.data.rows import BadData
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.evals.evaluate import Evals
from dpo_lab.evals.evaluators.base import labels_of
from dpo_lab.evals.evaluators.win_rate import WinRate
from dpo_lab.evals.judges import Comparer, JudgeError
from dpo_lab.evals.judges.answers import AnswerStore
from dpo_lab.evals.judges.base import ComparingJudge
from dpo_lab.evals.judges.endpoint import STORE, Endpoint
from dpo_lab.evals.judges.generative import Generative
from dpo_lab.health.diagnose import findings
from dpo_lab.models.forward import pair_logps
from tests.evals.test_evals import evaluate, perturbed, subject_of, with_samples
from tests.health.test_rollout_rules import RECORD

PROMPTS, ONE, OTHER = ["p1", "p2", "p3"], ["short", "a longer answer", "same"], ["a longer answer", "short", "same"]


def comparer(prefers) -> Comparer:
    """A judge whose probability of the first label is prefers(prompt, first, second)."""
    return Comparer(lambda questions: [prefers(*q.split("|")) for q in questions], lambda *texts: "|".join(texts))


@pytest.mark.parametrize(
    ("prefers", "wins", "chose_first"),
    [
        (lambda _, a, b: 0.9 if len(a) > len(b) else 0.2, [0, 1, 0.5], [[0.2, 0.9], [0.9, 0.2], [None, None]]),
        (lambda *_: 0.9, [0.5, 0.5, 0.5], [[0.9, 0.9], [0.9, 0.9], [None, None]]),  # always the first
        (lambda *_: 0.5, [0.5, 0.5, 0.5], [[0.5, 0.5], [0.5, 0.5], [None, None]]),
        (lambda *_: math.nan, [0.5, 0.5, 0.5], [[None, None]] * 3),
        (lambda prompt, *_: 0.9 if prompt == "p1" else math.nan, [0.5] * 3, [[0.9, 0.9], [None, None], [None, None]]),
    ],
)
def test_verdicts_by_hand(prefers, wins, chose_first):
    verdicts = comparer(prefers).compare(PROMPTS, ONE, OTHER)
    assert verdicts.wins.tolist() == wins
    assert [[None if math.isnan(p) else p for p in row] for row in verdicts.chose_first.tolist()] == chose_first


def test_verdicts_do_not_depend_on_which_policy_comes_first():
    rng = np.random.default_rng(0)
    memory: dict[str, float] = {}
    judge = comparer(lambda *texts: memory.setdefault("|".join(texts), float(rng.uniform())))
    prompts = [f"p{i}" for i in range(50)]
    a, b = ([f"{side}{i}" for i in range(50)] for side in "ab")
    there, back = judge.compare(prompts, a, b), judge.compare(prompts, b, a)
    assert (there.wins == 1 - back.wins).all()
    assert {0.0, 0.5, 1.0} == set(there.wins.tolist())


@pytest.fixture
def subject(policy):
    words = "the plot was superb and the music too".split()
    texts = [[" ".join(words[: 1 + i % n]) for i in range(60)] for n in (7, 5)]
    return with_samples(subject_of(perturbed(policy, 0.05), policy, ["p"], task=None), *texts)


def health(metrics) -> dict[str, str]:
    record = RECORD | {"metrics": {name: estimate.as_record() for name, estimate in metrics.items()}}
    return {finding.name: str(finding) for finding in findings(record, [])}


def test_a_judge_that_always_says_first_is_reported(subject):
    subject.judge = comparer(lambda *_: 0.99)
    metrics = evaluate(subject, [WinRate()])
    assert metrics["judge_win_rate"].value == 0.5
    assert metrics["judge_first"].value == 1
    assert metrics["judge_undecided"].value == 1
    assert "prefers the response shown first in 100 % of its answers" in health(metrics)["judge prefers a position"]


def test_a_judge_that_prefers_length_is_told_apart_at_equal_length(subject):
    rng = np.random.default_rng(1)
    noise: dict[frozenset, float] = {}  # the same for both orders of a pair

    def longer(prompt, a, b):
        drawn = noise.setdefault(frozenset((a, b)), rng.normal())
        return 0.9 if len(a) - len(b) + (drawn if a < b else -drawn) * 8 > 0 else 0.1

    subject.judge = comparer(longer)
    metrics = evaluate(subject, [WinRate()])
    assert metrics["judge_win_rate"].interval[0] > 0.5
    low, high = metrics["judge_win_rate_equal_length"].interval
    assert low < 0.5 < high
    assert "at equal length" in health(metrics)["judge prefers length"]
    assert "judge prefers a position" not in health(metrics)


def test_a_sound_judge_has_no_findings(subject):
    subject.judge = comparer(lambda _, a, b: 0.9 if a < b else 0.1)
    metrics = evaluate(subject, [WinRate()])
    assert metrics["judge_first"].value == 0.5
    assert metrics["judge_unanswered"].value == 0
    assert not {name for name in health(metrics) if name.startswith("judge")}


def test_questions_without_an_answer_are_counted(subject):
    subject.judge = comparer(lambda _, a, b: math.nan if "superb" in a else 0.9 if a < b else 0.1)
    metrics = evaluate(subject, [WinRate()])
    assert 0 < metrics["judge_unanswered"].value < 1
    assert "judge without answers" in health(metrics)


def test_a_question_shows_texts_as_they_are():
    judge = ComparingJudge(question="{prompt} / {first_label} {first} / {second_label} {second}")
    assert judge.write(" q {first} ", "{second}", "\\1 {x}") == "q {first} / A {second} / B \\1 {x}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"labels": ["A", "A"]},
            r"\['A', 'A'\]: must be two different labels; type evals\.judge\.labels=\[A,B\]",
        ),
        ({"labels": ["A"]}, "must be two different labels"),
        ({"question": "{prompt} {first}"}, r"has no place for \{second\}"),
        ({"url": "http://127.0.0.1:1"}, r"type evals\.judge\.model=NAME"),
        ({"model": "m"}, r"type evals\.judge\.url=http"),
        ({"url": "127.0.0.1:8000", "model": "m"}, "must begin with http:// or https://"),
        ({"workers": 0}, r"evals\.judge\.workers=0: must be 1 or more"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        Endpoint(**settings)


def test_the_generative_judge_against_its_own_logits(policy, tmp_path):
    """Each answer: the softmax over the two labels' logits, after the question alone, read row by row."""
    policy.save(tmp_path)
    settings = Generative(path=str(tmp_path), question="{prompt} {first} {second}", tokens=64, max_length=40)
    judge = settings.load()
    assert judge is not None
    questions = ["The plot was superb.", "The plot was awful and the music was odd", "Fair.", "so " * 60]
    found = judge.ask(questions)
    assert math.isnan(found[3])  # longer than max_length
    first, second = (policy.tokenizer(label, add_special_tokens=False)["input_ids"][0] for label in "AB")
    for question, answer in zip(questions[:3], found, strict=False):
        ids = policy.tokenizer(f"{question}\n", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = policy.model(ids).logits[0, -1].double()
        expected = (logits[first] - logits[second]).sigmoid().item()
        assert answer == pytest.approx(expected, abs=1e-5)


def test_the_generative_judge_without_a_question_it_can_answer(policy, tmp_path):
    policy.save(tmp_path)
    judge = Generative(path=str(tmp_path), question="{prompt} {first} {second}", max_length=16).load()
    assert judge is not None
    assert np.isnan(judge.compare(["p"], ["same"], ["same"]).chose_first).all()  # equal responses are not asked about
    with pytest.raises(JudgeError, match=r"all 2 questions have more tokens, \d+ or more; type a longer evals\.judge"):
        judge.ask(["so " * 60, "so " * 70])


def test_labels_that_a_tokenizer_does_not_tell_apart_are_refused(policy, tmp_path):
    policy.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(JudgeError, match=r"evals\.judge\.labels=.*does not tell them apart"):
        Generative(path=str(tmp_path), labels=["Yes", "yes"]).load()


class Server:
    """An OpenAI-compatible server whose replies are `answer(body)`: the JSON of a reply, or an HTTP status and headers."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.keys: set[str | None] = set()
        self.answer = lambda body: reply("A")
        self.dead_after: int | None = None
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.send(200, {"data": []})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.keys.add(self.headers["Authorization"])
                if owner.dead_after is not None and sum(owner.asked.values()) >= owner.dead_after:
                    self.close_connection = True
                    self.connection.close()
                    return
                owner.asked[body["messages"][0]["content"]] += 1
                found = owner.answer(body)
                self.send(*(found if isinstance(found, tuple) else (200, found)))

            def send(self, status, value, **headers):
                content = value.encode() if isinstance(value, str) else json.dumps(value).encode()
                self.send_response(status)
                for name, text in {"Content-Length": str(len(content)), "Content-Type": "application/json"}.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def judge(self, cache=None, **settings) -> Comparer:
        settings = {"url": self.url, "model": "m", "attempts": 1, "workers": 4} | settings
        judge = Endpoint(**settings).load(cache=cache)
        assert judge is not None
        return judge


def reply(text: str, **logprobs: float) -> dict:
    """A chat completion; logprobs: of tokens in the place of the first one."""
    top = [{"token": token.replace("_", " "), "logprob": value} for token, value in logprobs.items()]
    choice: dict = {"message": {"content": text}}
    if top:
        choice["logprobs"] = {"content": [{"top_logprobs": top}]}
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}


@contextmanager
def serving():
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (reply("B", A=math.log(0.3), B=math.log(0.6), _A=math.log(0.1)), 0.4),  # " A" counts as A
        (reply("A."), 1.0),
        (reply(" **B** is better"), 0.0),
        (reply("Answer"), None),
        (reply(""), None),
    ],
)
def test_answers_of_an_endpoint(server, answer, expected):
    server.answer = lambda body: answer if "?" in body["messages"][0]["content"] else reply("A")
    found = server.judge().ask(["which?", "other"])
    assert (None if math.isnan(found[0]) else pytest.approx(found[0])) == expected
    assert found[1] == 1


def test_nothing_is_asked_twice(server, tmp_path):
    questions = [f"q{i}" for i in range(10)]
    judge = server.judge(cache=tmp_path)
    judge.ask([*questions, *questions])
    assert dict(judge.costs()) == pytest.approx(
        {"asked": 10, "questions": 20, "prompt_tokens": 70, "completion_tokens": 10, "seconds": 0}, abs=60
    )
    assert server.judge(cache=tmp_path).ask([*questions, "new"]).tolist() == [1.0] * 11
    assert server.asked == Counter([*questions, "new"])
    server.judge(cache=tmp_path, model="another").ask(questions)  # another model: other answers
    assert server.asked == Counter(dict.fromkeys(questions, 2) | {"new": 1})


def test_a_server_that_dies_half_way_is_gone_on_with(server, tmp_path):
    questions, server.dead_after = [f"q{i}" for i in range(32)], 11
    with pytest.raises(JudgeError, match=r"no server answers .*; 11 of 32 answers are kept") as error:
        server.judge(cache=tmp_path).ask(questions)
    assert "\n" not in str(error.value)
    server.dead_after = None
    assert server.judge(cache=tmp_path).ask(questions).tolist() == [1.0] * 32
    assert server.asked == Counter(questions)  # each once


def test_what_is_in_flight_when_the_command_is_stopped_is_kept_and_nothing_more_is_asked(server, tmp_path, monkeypatch):
    questions = [f"q{i}" for i in range(16)]

    def stopped(futures):
        yield next(iter(futures))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dpo_lab.evals.judges.endpoint.as_completed", stopped)
        server.answer = lambda body: time.sleep(0.05) or reply("A")  # type: ignore[func-returns-value]
        server.judge(cache=tmp_path, workers=2).ask(questions)
    assert 0 < sum(server.asked.values()) < 16
    server.judge(cache=tmp_path).ask(questions)
    assert server.asked == Counter(questions)  # each once


def test_a_busy_server_is_asked_again(server):
    server.answer = lambda body: (429, "slow down") if server.asked["q"] < 3 else reply("B")
    assert server.judge(attempts=3).ask(["q"]).tolist() == [0.0]
    assert server.asked["q"] == 3


def test_a_slow_server_is_given_up_in_one_line(server):
    server.answer = lambda body: time.sleep(1.5) or reply("A")  # type: ignore[func-returns-value]
    with pytest.raises(JudgeError, match=r"no answer within .*timeout"):
        server.judge(timeout=1).ask(["q"])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, "no"), r"refuses the key \(HTTP 401\); export DPO_LAB_JUDGE_KEY="),
        (
            (404, "no model m"),
            r"HTTP 404 for evals\.judge\.model=m: 'no model m'; type the name of a model that it serves",
        ),
        ((503, "loading"), r"HTTP 503 after 1 attempts; type fewer evals\.judge\.workers"),
        ((200, "<html>"), r"replies no JSON but '<html>'"),
        ({"error": "x"}, "replies otherwise than an OpenAI-compatible server"),
        (
            reply("I can't say"),
            r"no answer begins with A nor B, but e\.g\. with .I can't say.; type another evals\.judge\.model",
        ),
    ],
)
def test_what_a_server_does_wrong_is_told_in_one_line(server, answer, message):
    server.answer = lambda body: answer
    with pytest.raises(JudgeError, match=message) as error:
        server.judge().ask(["q1", "q2"])
    assert "\n" not in str(error.value)


def test_a_server_that_is_down_is_an_error_before_training():
    with serving() as server:
        url = server.url
    with pytest.raises(JudgeError, match=r"no server answers \(connection refused\) in 1 attempts; start it"):
        Endpoint(url=url, model="m", attempts=1).load()


def test_the_key_comes_from_the_environment_and_is_stored_nowhere(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    monkeypatch.setenv("DPO_LAB_JUDGE_KEY", "sk-secret")
    server.judge(cache=tmp_path).ask(["q"])
    assert server.keys == {"Bearer sk-secret"}
    assert not any(b"sk-" in path.read_bytes() for path in tmp_path.iterdir())


def test_answers_are_on_disk_when_stored(tmp_path):
    store, other = AnswerStore(tmp_path / STORE), AnswerStore(tmp_path / STORE)
    store.add("k", {"first": None})
    assert other.find(["k", "none"]) == {"k": {"first": None}}
    assert len(other.find(f"k{i}" for i in range(1200))) == 0


def test_pairs_of_further_files_by_subset(policy, tmp_path, caplog):
    """Accuracy by hand on rows of two subsets; a judge that always says "first" is undecided on all it answers."""
    rows = [
        {
            "prompt": f"question {i}",
            "chosen": "good " * (1 + i % 3),
            "rejected": "bad",
            "subset": "even" if i % 2 == 0 else "odd",
        }
        for i in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "rejected": ""}, rows[1]])
    )
    subject = subject_of(perturbed(policy, 0.2), policy, ["p"])
    pairs = read_pair_set("own", str(tmp_path / "rows.jsonl"), Shape(), subject.encoder)
    assert [pair.subset for pair in pairs] == ["even", "odd"] * 3
    assert "rows.jsonl: dropped: empty response 1, dropped: duplicate 1" in caplog.text
    assert pairs[1].texts == ("question 1", "good good ", "bad")
    subject.pair_sets = {"own": pairs}
    subject.judge = comparer(lambda prompt, a, b: math.nan if prompt == "question 0" else 0.9)
    (evaluator,) = Evals(evaluators=[], pairs={"own": "rows.jsonl"}).selected()
    metrics = evaluate(subject, [evaluator])
    trained, initial = (
        subject.logps_of(p.model, partial(pair_logps, p.model), [pair.encoded for pair in pairs])
        for p in (subject.trained, subject.initial)
    )
    preferred = ((trained.margin - initial.margin) > 0).tolist()
    assert metrics["pairs/own/accuracy"].value == pytest.approx(np.mean(preferred))
    assert metrics["pairs/own/even/accuracy"].value == pytest.approx(np.mean(preferred[::2]))
    assert metrics["pairs/own/odd/accuracy"].value == pytest.approx(np.mean(preferred[1::2]))
    per_token = (trained.chosen / trained.chosen_length - trained.rejected / trained.rejected_length) > 0
    assert metrics["pairs/own/policy_accuracy"].value == pytest.approx(per_token.double().mean().item())
    longer = [len(p.encoded.chosen) > len(p.encoded.rejected) for p in pairs]
    same = [len(p.encoded.chosen) == len(p.encoded.rejected) for p in pairs]
    assert metrics["pairs/own/longer"].value == pytest.approx((sum(longer) + sum(same) / 2) / 6)
    assert metrics["pairs/own/judge_accuracy"].value == 0.5
    assert (metrics["pairs/own/judge_first"].value, metrics["pairs/own/judge_first"].n) == (1, 5)
    assert (metrics["pairs/own/judge_undecided"].value, metrics["pairs/own/judge_undecided"].n) == (1, 5)
    assert metrics["pairs/own/judge_unanswered"].value == pytest.approx(1 / 6)
    assert labels_of(metrics)["pairs/own/even/accuracy"] == "own/even: accuracy"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, r"rows\.jsonl:1: .*rejected.*; fix the row, which evals\.pairs reads"),
        ({"prompt": "p", "completion": "a", "label": True}, r"rows\.jsonl:1: is one response with a label"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, r"evals\.pairs\.own=.*: holds no pair"),
    ],
)
def test_files_of_another_shape_are_refused_in_one_line(policy, tmp_path, row, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    encoder = PairTokenizer(policy.tokenizer, 64, 32)
    with pytest.raises(BadData, match=message) as error:
        read_pair_set("own", str(tmp_path / "rows.jsonl"), Shape(), encoder)
    assert "\n" not in str(error.value)
    with pytest.raises(BadData, match=r"evals\.pairs\.own=.*no such file"):
        read_pair_set("own", str(tmp_path / "none.jsonl"), Shape(), encoder)
