"""Health rules on the judge: whether its verdicts say more than the order and the length of what it was shown."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_lab.health.evidence import Evidence
from dpo_lab.health.finding import Finding, Rule, Severity
from dpo_lab.stats.text import percent


@dataclass(frozen=True)
class PositionBias(Rule):
    """Report that the judge certainly prefers the response shown first, or the one shown second, by more than `most`.

    Both orders are asked about and contradictions are ties, so the win rate is not biased, but drawn to one half.
    """

    most: float = 0.15
    name = "judge prefers a position"

    def __call__(self, run: Evidence) -> Finding | None:
        first = run.metric("judge_first")
        if first is None or not (first.low > 0.5 + self.most or first.high < 0.5 - self.most):
            return None
        message = f"the judge prefers the response shown first in {percent(first.value)} of its answers"
        if undecided := run.metric("judge_undecided"):
            message += f" and is undecided between the orders on {percent(undecided.value)} of the pairs"
        message += ": its win rate is drawn to 50 %"
        threshold = f"certainly over {percent(0.5 + self.most)} or under {percent(0.5 - self.most)}"
        return Finding(
            self.name, Severity.warning, message, threshold, "a larger judge, or another evals.judge.question"
        )


@dataclass(frozen=True)
class LengthBias(Rule):
    """Report that the judge prefers one policy, but at equal length certainly neither so much, or even the other.

    apart: by how much the win rates have to differ at least.
    """

    apart: float = 0.05
    name = "judge prefers length"

    def __call__(self, run: Evidence) -> Finding | None:
        plain, equal = run.metric("judge_win_rate"), run.metric("judge_win_rate_equal_length")
        if plain is None or equal is None or not (plain.low > 0.5 or plain.high < 0.5):
            return None
        is_high = plain.value > 0.5
        gone = equal.low <= 0.5 if is_high else equal.high >= 0.5
        if not gone or abs(plain.value - equal.value) < self.apart:
            return None
        message = (
            f"the judge prefers the trained policy in {percent(plain.value)} of the prompts, at equal length in"
            f" {percent(equal.value)}: it may prefer no more than the length"
        )
        threshold = f"a win rate certainly not 50 %, over {percent(self.apart)} from that at equal length, which may be"
        return Finding(self.name, Severity.warning, message, threshold, "the win rate at equal length")


@dataclass(frozen=True)
class Unanswered(Rule):
    """Report that the judge gave no answer to more than the share `most` of its questions."""

    most: float = 0.05
    name = "judge without answers"

    def __call__(self, run: Evidence) -> Finding | None:
        share = run.metric("judge_unanswered")
        if share is None or share.value <= self.most:
            return None
        message = f"the judge did not answer {percent(share.value)} of its questions, which count as ties"
        kind = run.config.get("evals", {}).get("judge", {}).get("kind")
        key = "max_tokens" if kind == "endpoint" else "max_length"
        suggestion = f"a larger evals.judge.{key}, a larger judge, or another evals.judge.question"
        return Finding(self.name, Severity.warning, message, f"over {percent(self.most)}", suggestion)
