"""The base classes of judges, and what a loaded judge does: score texts, or say which of two responses is better."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from dpo_lab.core.registry import add_to_table
from dpo_lab.errors import LabError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

JUDGES: dict[str, type[Judge]] = {}  # by name in configs
Score = Callable[[Sequence[str]], np.ndarray]  # texts of prompt and response -> their scores [N]
Ask = Callable[[Sequence[str]], np.ndarray]  # questions -> probabilities of the first label [N], NaN without an answer
QUESTION = """Two responses to the same request are shown below. Decide which of them is better: which does what the \
request asks for, correctly, and without needless text. Neither their order nor their length matters.

Request:
{prompt}

Response {first_label}:
{first}

Response {second_label}:
{second}

Which response is better? Answer with {first_label} or {second_label} alone."""
PLACEHOLDERS = ("prompt", "first", "second", "first_label", "second_label")


class JudgeError(LabError, ValueError):
    """Raised where a judge can't be loaded or does not answer; the message is one line that says what to type."""


@dataclass(frozen=True)
class Verdicts:
    """Verdicts on N pairs of responses a and b to one prompt each.

    wins [N]: 1 where a is better, 0 where b is, 1/2 for a tie: equal responses, or a judge who prefers the one shown
    first, or the one shown second, in both orders. chose_first [N, 2]: the probability with which the response shown
    first was preferred, where that was a and where it was b; NaN where the judge gave no answer or was not asked, since
    the responses are equal. None if the judge scores each response on its own. asked [N]: which pairs it was asked about.
    """

    wins: np.ndarray
    chose_first: np.ndarray | None = None
    asked: np.ndarray | None = None

    def by_order(self) -> dict[str, np.ndarray]:
        """Return what the orders say of the judge, [N] each, NaN where it is unknown; {} without orders.

        judge_first: the share of answers that prefer the response shown first; judge_undecided: 1 where the answers in
        the two orders contradict each other; judge_unanswered: the share of questions without an answer.
        """
        if self.chose_first is None or self.asked is None:
            return {}
        answers = np.heaviside(self.chose_first - 0.5, 0.5)  # NaN stays
        counts = (~np.isnan(answers)).sum(1)
        with np.errstate(invalid="ignore"):
            first = np.nansum(answers, 1) / np.where(counts, counts, np.nan)
            undecided = np.where(counts == 2, answers[:, 0] == answers[:, 1], np.nan)
        unanswered = np.where(self.asked, 1 - counts / 2, np.nan)
        return {"judge_first": first, "judge_undecided": undecided, "judge_unanswered": unanswered}


@dataclass
class Scorer:
    """A loaded judge that scores texts of prompt and response. All ranks have to call it, and get all scores."""

    score: Score

    def compare(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Verdicts:
        """Return the verdicts on pairs of responses by the difference of their scores; equal scores are a tie."""
        texts = [p + r for side in (a, b) for p, r in zip(prompts, side, strict=True)]
        scores = np.asarray(self.score(texts), np.float64).reshape(2, len(prompts))
        return Verdicts(np.heaviside(scores[0] - scores[1], 0.5))

    def costs(self) -> dict[str, float]:
        """Return what is recorded of its costs: nothing, the time counts as that of the evaluation."""
        return {}


@dataclass
class Comparer:
    """A loaded judge that says which of two responses is better. All ranks have to call it, and get all verdicts.

    ask: answers questions; write: the question about a prompt and two responses, in the order in which they are shown;
    costs: returns what its answers have cost.
    """

    ask: Ask
    write: Callable[[str, str, str], str]
    costs: Callable[[], Mapping[str, float]] = dict

    def compare(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Verdicts:
        """Return the verdicts on pairs of responses, each asked about in both orders unless they are equal."""
        different = [i for i in range(len(prompts)) if a[i] != b[i]]
        orders = ((a, b), (b, a))
        questions = [self.write(prompts[i], first[i], second[i]) for first, second in orders for i in different]
        chose_first = np.full((len(prompts), 2), np.nan)
        chose_first[different] = np.asarray(self.ask(questions), np.float64).reshape(2, len(different)).T
        prefers_a = np.stack((chose_first[:, 0] - 0.5, 0.5 - chose_first[:, 1]))
        signs = np.sign(np.nan_to_num(prefers_a))
        asked = np.isin(np.arange(len(prompts)), different)
        return Verdicts(np.where(signs[0] == signs[1], (1 + signs[0]) / 2, 0.5), chose_first, asked)


LoadedJudge = Scorer | Comparer


@dataclass
class Judge:
    """The base class of judges. A subclass states its name in configs and whether it gives_scores, of each response on its
    own, which a reward needs, and defines is_set and `load`. takes_hub_names: whether its model may be a name on the hub.
    """

    name: ClassVar[str]
    gives_scores: ClassVar[bool]
    takes_hub_names: ClassVar[bool] = False

    def __init_subclass__(cls, *, name: str = "", gives_scores: bool = False) -> None:
        cls.gives_scores = gives_scores
        if name:
            cls.name = name
            add_to_table(JUDGES, name, cls)

    @property
    def is_set(self) -> bool:
        """Whether there is a judge at all."""
        raise NotImplementedError

    @property
    def local_model(self) -> str | None:
        """The path, or name on the hub, of the model that it loads on this machine; None if it loads none."""
        return None

    def untrained(self) -> PreTrainedModel | None:
        """Return the model that it loads on this machine with random weights, of which only the config is read; None if it
        loads none. Raise JudgeError if that fails.
        """
        return None

    def load(self, device: torch.device | str = "cpu", cache: Path | None = None) -> LoadedJudge | None:
        """Load the judge; return None if none is set. cache: folder of its answers. Raise JudgeError if that fails."""
        raise NotImplementedError


@dataclass
class ComparingJudge(Judge):
    """The base class of judges that are asked which of two responses is better.

    question: the text of a question, with the places {prompt}, {first} and {second}, and {first_label} and
    {second_label} of the two labels, by which the judge answers.
    """

    question: str = QUESTION
    labels: list[str] = field(default_factory=lambda: ["A", "B"])

    def __post_init__(self) -> None:
        if len(self.labels) != 2 or self.labels[0] == self.labels[1] or not all(map(str.strip, self.labels)):
            raise ValueError(
                f"evals.judge.labels={self.labels}: must be two different labels; type evals.judge.labels=[A,B]"
            )
        for place in PLACEHOLDERS[:3]:
            if f"{{{place}}}" not in self.question:
                raise ValueError(
                    f"evals.judge.question: has no place for {{{place}}}; write a question with {{prompt}}, {{first}} and"
                    " {second}, or leave evals.judge.question out"
                )

    def write(self, prompt: str, first: str, second: str) -> str:
        """Return the question about two responses to a prompt, in the order in which they are shown."""
        values: dict[str, str] = dict(
            zip(PLACEHOLDERS, (prompt.strip(), first.strip(), second.strip(), *self.labels), strict=True)
        )
        return re.sub(rf"{{({'|'.join(PLACEHOLDERS)})}}", lambda place: values[place[1]], self.question)
