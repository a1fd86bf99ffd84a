"""The generative judge: a local causal language model that is asked which of two responses is better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_lab.core.pairs import EncodedPair, Pair
from dpo_lab.errors import check_at_least
from dpo_lab.evals.judges.base import Comparer, ComparingJudge, JudgeError
from dpo_lab.models.weight_settings import Dtype
from dpo_lab.runs.out_of_memory import explain_out_of_memory, halved

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from dpo_lab.data.tokenize import PairTokenizer
    from dpo_lab.models.policy import Policy, Pretrained

UNLIMITED = 1 << 30  # tokens; too long questions are found afterwards


@dataclass
class Generative(ComparingJudge, name="generative"):
    """A causal language model whose verdict are the log-probabilities of the two labels as its answer.

    path: its Hugging Face folder, a folder with one GGUF file, or a name on the hub; None for no judge. revision: of it on
    the hub; package: see Pretrained; dtype: of its weights. max_length: a question of more tokens is not asked. tokens: the
    most tokens of a forward pass. The question is a message of the user, if the tokenizer has a chat template.
    """

    takes_hub_names = True

    path: str | None = None
    revision: str | None = None
    package: str | None = None
    dtype: Dtype = Dtype.float32
    max_length: int = 4096
    tokens: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_length", "tokens"):
            check_at_least(f"evals.judge.{name}", getattr(self, name), 16, 4096)

    @property
    def is_set(self) -> bool:
        return self.path is not None

    @property
    def local_model(self) -> str | None:
        return self.path if self.package is None else None

    @property
    def _settings(self) -> Pretrained:
        from dpo_lab.models.policy import Pretrained

        assert self.path is not None
        return Pretrained(path=self.path, revision=self.revision, package=self.package, dtype=self.dtype)

    def untrained(self) -> PreTrainedModel | None:
        if self.path is None:
            return None
        from dpo_lab.models.load import untrained_model

        with _judge_errors():
            return untrained_model(self._settings)

    def load(self, device: torch.device | str = "cpu", cache: Path | None = None) -> Comparer | None:
        if self.path is None:
            return None
        import torch

        from dpo_lab.data.tokenize import PairTokenizer
        from dpo_lab.models.forward import select_forward

        with _judge_errors():
            judge = self._settings.load(cache=cache)
        judge.model.to(device)  # type: ignore[arg-type]
        if (torch.device(device).type, self.dtype) != ("cpu", Dtype.float32):
            select_forward(judge.model, cache, torch.device(device))
        encoder = PairTokenizer(judge.tokenizer, UNLIMITED, UNLIMITED - 1)
        self.encoded(encoder, [""])  # labels that the tokenizer can't tell apart are an error now
        return Comparer(partial(self._answers, judge, encoder), self.write)

    def encoded(self, encoder: PairTokenizer, questions: Sequence[str]) -> list[EncodedPair]:
        """Return each question with its two answers, as token ids: the labels, up to the first token that differs."""
        has_template = bool(encoder.tokenizer.chat_template)  # type: ignore[attr-defined]
        first, second = self.labels

        def pair(question: str) -> Pair:
            if not has_template:
                return Pair(f"{question}\n", first, second)
            answers: Any = ([{"role": "assistant", "content": label}] for label in self.labels)
            return Pair([{"role": "user", "content": question}], *answers)

        encoded = []
        for each in encoder.pairs(map(pair, questions), Counter()):  # without those whose answers are the same tokens
            differs = [x != y for x, y in zip(each.chosen, each.rejected, strict=False)]
            if any(differs):
                end = differs.index(True) + 1
                encoded.append(EncodedPair(each.key, each.prompt, each.chosen[:end], each.rejected[:end]))
        if len(encoded) < len(questions):
            raise JudgeError(
                f"evals.judge.labels={self.labels}: the judge's tokenizer does not tell them apart; type"
                " evals.judge.labels=[A,B]"
            )
        return encoded

    def _answers(self, judge: Policy, encoder: PairTokenizer, questions: Sequence[str]) -> np.ndarray:
        from dpo_lab.evals.scored_pairs import logps_of_pairs
        from dpo_lab.models.forward import pair_logps

        encoded = self.encoded(encoder, questions)
        answers = np.full(len(questions), np.nan)
        fits = [i for i, pair in enumerate(encoded) if pair.size <= self.max_length]
        if not fits and encoded:
            raise JudgeError(
                f"evals.judge.max_length={self.max_length}: all {len(encoded):,} questions have more tokens,"
                f" {min(pair.size for pair in encoded):,} or more; type a longer evals.judge.max_length"
            )
        if not fits:
            return answers
        order = sorted(fits, key=lambda i: encoded[i].size)
        with explain_out_of_memory("the judge", *halved("evals.judge.tokens", self.tokens)):
            logps = logps_of_pairs(
                judge.model,
                partial(pair_logps, judge.model),
                [encoded[i] for i in order],
                self.tokens,
                nullcontext,
                judge.model.device,  # type: ignore[arg-type]
                title="Judge",
            )
        answers[order] = logps.margin.double().sigmoid().numpy()
        return answers


@contextmanager
def _judge_errors() -> Iterator[None]:
    """Turn errors of loading a policy into those of a judge, which name its settings."""
    from dpo_lab.models.policy import PolicyError

    try:
        yield
    except PolicyError as error:
        raise JudgeError(str(error).replace("policy.", "evals.judge.")) from error
