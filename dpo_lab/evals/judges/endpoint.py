"""The endpoint judge: a model behind an OpenAI-compatible server, asked which of two responses is better."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_lab.core.pairs import content_hash
from dpo_lab.errors import check_at_least, first_line
from dpo_lab.evals.judges.answers import AnswerStore
from dpo_lab.evals.judges.base import Comparer, ComparingJudge, JudgeError

if TYPE_CHECKING:
    import torch

KEYS = ("DPO_LAB_JUDGE_KEY", "OPENAI_API_KEY")  # environment variables of the server's key; the first that is set
BUSY = (408, 425, 429, 500, 502, 503, 504)  # HTTP codes after which a request is repeated
STORE = "judge-answers.sqlite"
SHOWN = 60  # characters of a reply to show in an error


@dataclass
class Endpoint(ComparingJudge, name="endpoint"):
    """A model behind an OpenAI-compatible server, asked by chat completions.

    url: of the server, up to and with /v1; None for no judge. model: its name there. The key is read from the environment
    (DPO_LAB_JUDGE_KEY, else OPENAI_API_KEY) and written nowhere. The verdict are the probabilities of the labels as first
    token, where the server tells log-probabilities, else the label that its answer begins with. Answers are stored in the
    cache by content: the same question is never asked twice.

    workers: requests at a time; timeout: seconds for one answer; attempts: of a request before the evaluation ends with
    an error, with growing pauses between them, or those that the server asks for. body: further fields of a request, such
    as {reasoning_effort: low}.
    """

    url: str | None = None
    model: str | None = None
    max_tokens: int = 8
    workers: int = 8
    timeout: float = 60.0
    attempts: int = 6
    body: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_tokens", "workers", "timeout", "attempts"):
            check_at_least(f"evals.judge.{name}", getattr(self, name), 1, 8)
        if (self.url is None) != (self.model is None):
            missing = "url=http://127.0.0.1:8000/v1" if self.url is None else "model=NAME"
            raise ValueError(
                f"evals/judge=endpoint: needs evals.judge.url and evals.judge.model; type evals.judge.{missing}"
            )
        if self.url is not None and not re.match(r"https?://[^/]", self.url):
            raise ValueError(
                f"evals.judge.url={self.url}: must begin with http:// or https://; type http://127.0.0.1:8000/v1"
            )

    @property
    def is_set(self) -> bool:
        return self.url is not None

    def load(self, device: torch.device | str = "cpu", cache: Path | None = None) -> Comparer | None:
        from dpo_lab.distributed.collectives import rank_and_world_size

        if self.url is None:
            return None
        is_asking = rank_and_world_size()[0] == 0
        client = _Client(self, AnswerStore(cache / STORE if cache is not None and is_asking else None))
        if is_asking:
            client.check()
        return Comparer(client.ask, self.write, client.costs)


class _Client:
    """Asks the server of an Endpoint, on rank 0 for all ranks, and counts what that takes."""

    def __init__(self, settings: Endpoint, store: AnswerStore) -> None:
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        self.settings, self.store = settings, store
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0
        self.base = str(settings.url).rstrip("/")
        self.session = requests.Session()
        self.session.trust_env = False  # no key of ~/.netrc is sent to a server
        if key := next((key for name in KEYS if (key := os.environ.get(name))), None):
            self.session.headers["Authorization"] = f"Bearer {key}"
        retry = Retry(
            total=settings.attempts - 1,
            backoff_factor=0.5,
            backoff_max=30,
            status_forcelist=BUSY,
            allowed_methods={"POST"},  # a GET only asks whether a server answers, whatever it says
            raise_on_status=False,
        )
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=settings.workers))

    def check(self) -> None:
        """Raise JudgeError if no server answers, before anything costly is done."""
        self._send("GET", "models", None)

    def costs(self) -> dict[str, float]:
        """Return what is recorded: questions, how many were asked now, their tokens, and seconds of waiting."""
        return {**self.counts, "seconds": self.seconds}

    def ask(self, questions: Sequence[str]) -> np.ndarray:
        """Return the probability of the first label for each question, [N], NaN without an answer."""
        from dpo_lab.distributed.collectives import broadcast_object, rank_and_world_size

        return broadcast_object(self._ask(questions) if rank_and_world_size()[0] == 0 else None)  # type: ignore[return-value]

    def _ask(self, questions: Sequence[str]) -> np.ndarray:
        from dpo_lab.terminal.progress import track

        start = time.perf_counter()
        asked = [self._request(question) for question in questions]
        keys = [self._key(request) for request in asked]
        requests = dict(zip(keys, asked, strict=True))
        found = self.store.find(requests)
        missing = {key: request for key, request in requests.items() if key not in found}
        error: JudgeError | None = None
        pool = ThreadPoolExecutor(self.settings.workers)
        try:
            with track("Judge", len(missing)) as advance:
                futures = {pool.submit(self._answer_and_store, key, request): key for key, request in missing.items()}
                for future in as_completed(futures):
                    if future.cancelled():
                        continue
                    try:
                        found[futures[future]] = answer = future.result()
                    except JudgeError as raised:  # what the other requests in flight bring is kept
                        error = error or raised
                        for each in futures:
                            each.cancel()
                    else:
                        self.counts.update(asked=1, **answer["usage"])
                        advance(1)
        finally:  # whatever ends it: what is in flight is waited for and stored, nothing more is asked
            pool.shutdown(cancel_futures=True)
        self.counts["questions"] += len(questions)
        self.seconds += time.perf_counter() - start
        if error is not None:
            raise JudgeError(
                f"{error}; {len(found):,} of {len(requests):,} answers are kept: the same command goes on with the others"
            )
        answers = [found[key] for key in keys]
        if answers and all(answer["first"] is None for answer in answers):
            labels, reply = " nor ".join(self.settings.labels), answers[0]["text"][:SHOWN]
            raise JudgeError(
                f"evals.judge.model={self.settings.model}: no answer begins with {labels}, but e.g. with {reply!r}; type"
                " another evals.judge.model, or evals.judge.question"
            )
        return np.array([math.nan if answer["first"] is None else answer["first"] for answer in answers])

    def _answer_and_store(self, key: str, request: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._answer(request)
        self.store.add(key, answer)
        return answer

    def _request(self, question: str) -> dict[str, Any]:
        settings = self.settings
        return {
            "model": settings.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": settings.max_tokens,
            "temperature": 0.0,
            "logprobs": True,
            "top_logprobs": 20,
            **settings.body,
        }

    def _key(self, request: Mapping[str, Any]) -> str:
        return content_hash([self.base, self.settings.labels, request])

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the probability of the first label ("first", None without an answer), the answer's text, its tokens."""
        reply = self._send("POST", "chat/completions", request)
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"] or ""
            usage = {
                name: int((reply.get("usage") or {}).get(name) or 0) for name in ("prompt_tokens", "completion_tokens")
            }
            tokens = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
            weights = [
                sum(math.exp(each["logprob"]) for each in tokens if each["token"].strip() == label)
                for label in self.settings.labels
            ]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise JudgeError(
                f"evals.judge.url={self.base}: replies otherwise than an OpenAI-compatible server:"
                f" {json.dumps(reply)[:SHOWN]!r} ({first_line(error)}); type the url of one, with /v1"
            ) from error
        first = weights[0] / total if (total := sum(weights)) else self._first_word(text)
        return {"first": first, "text": text, "usage": usage}

    def _first_word(self, text: str) -> float | None:
        """Return 1 if the text begins with the first label, 0 if with the second, None if with neither."""
        for label, value in zip(self.settings.labels, (1.0, 0.0), strict=True):
            if re.match(rf"\W*{re.escape(label)}(?!\w)", text):
                return value
        return None

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        """Return the JSON that the server replies; of a GET it does not matter what it replies."""
        from requests.exceptions import RequestException, Timeout

        url, key, attempts = f"{self.base}/{path}", f"evals.judge.url={self.base}", self.settings.attempts
        try:
            reply = self.session.request(method, url, json=body, timeout=self.settings.timeout)
        except Timeout:
            raise JudgeError(
                f"{key}: no answer within evals.judge.timeout={self.settings.timeout:g} seconds in {attempts} attempts; type"
                " a longer one, or fewer evals.judge.workers"
            ) from None
        except RequestException as error:
            what = (
                "no answer within the timeout" if "timed out" in str(error) else f"no server answers ({_reason(error)})"
            )
            raise JudgeError(f"{key}: {what} in {attempts} attempts; start it, or type the url of another") from None
        if reply.status_code in (401, 403):
            raise JudgeError(f"{key}: the server refuses the key (HTTP {reply.status_code}); export {KEYS[0]}=...")
        if method == "GET":
            return None
        if reply.status_code in BUSY:
            raise JudgeError(
                f"{key}: HTTP {reply.status_code} after {attempts} attempts; type fewer evals.judge.workers, or more"
                " evals.judge.attempts"
            )
        if reply.status_code != 200:
            raise JudgeError(
                f"{key}: HTTP {reply.status_code} for evals.judge.model={self.settings.model}: {reply.text[:200].strip()!r};"
                " type the name of a model that it serves"
            )
        try:
            return reply.json()
        except ValueError:
            raise JudgeError(
                f"{key}: replies no JSON but {reply.text[:SHOWN]!r}; type the url of an API, with /v1"
            ) from None


def _reason(error: BaseException) -> str:
    """Return the system's words for a failed connection, without those of the libraries around them."""
    found = re.search(r"\[Errno -?\d+\] ([^')\"]+)", str(error))
    return found[1].lower() if found else type(error).__name__
