"""Health rules of methods that sample: on rewards, KL divergence and entropy of rollouts, ratios, and the critic."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from dpo_lab.health.evidence import Evidence, Row
from dpo_lab.health.finding import Finding, Rule, Severity
from dpo_lab.stats.text import percent


def rollout_rows(run: Evidence, *names: str) -> list[Row]:
    """Return the training rows that have all of these metrics."""
    return [row for row in run.train if all(name in row for name in names)]


@dataclass(frozen=True)
class OverOptimised(Rule):
    """Report that the gold reward fell from its highest by the share `fall` of what it had gained, while the reward that is
    trained on rose further. Gao et al. 2022 (arXiv:2210.10760). rows: fewest rows.
    """

    fall: float = 0.2
    rows: int = 4
    name = "reward over-optimised"

    def __call__(self, run: Evidence) -> Finding | None:
        rows = rollout_rows(run, "rollout/reward", "rollout/gold")
        if len(rows) < self.rows:
            return None
        # the mean of two successive rows, so that one lucky row is no maximum
        pairs = [
            {name: (a[name] + b[name]) / 2 for name in ("rollout/reward", "rollout/gold")} | {"step": b.step}
            for a, b in itertools.pairwise(rows)
        ]
        best, last = max(pairs, key=lambda pair: pair["rollout/gold"]), pairs[-1]
        gained = best["rollout/gold"] - rows[0]["rollout/gold"]
        lost = best["rollout/gold"] - last["rollout/gold"]
        if not (lost > self.fall * gained > 0 and last["rollout/reward"] > best["rollout/reward"]):
            return None
        message = (
            f"the gold reward of samples was {best['rollout/gold']:.2f} around step {best['step']} and is"
            f" {last['rollout/gold']:.2f} now, while the reward that is trained on rose from"
            f" {best['rollout/reward']:.2f} to {last['rollout/reward']:.2f}"
        )
        suggestion = f"a higher beta, trainer.max_steps={int(best['step'])}, or a reward model of more pairs"
        threshold = f"a fall of over {percent(self.fall)} of the gain"
        return Finding(self.name, Severity.warning, message, threshold, suggestion)


@dataclass(frozen=True)
class RunawayKL(Rule):
    """Report that samples are further than `nats` from the reference, and further than in the row before."""

    nats: float = 30.0
    name = "KL running away"

    def __call__(self, run: Evidence) -> Finding | None:
        rows = rollout_rows(run, "rollout/kl")
        if len(rows) < 2 or not rows[-1]["rollout/kl"] > max(self.nats, rows[-2]["rollout/kl"]):
            return None
        message = (
            f"a response is {rows[-1]['rollout/kl']:.1f} nats from the reference at step {rows[-1].step},"
            f" {rows[0]['rollout/kl']:.1f} at step {rows[0].step}: rewards and judges say little about such text"
        )
        return Finding(
            self.name,
            Severity.warning,
            message,
            f"over {self.nats:g} nats and rising",
            "a higher beta, or a lower optim.lr",
        )


@dataclass(frozen=True)
class EntropyCollapse(Rule):
    """Report that the entropy of samples fell below the share `left` of that of the first row."""

    left: float = 0.2
    name = "entropy collapsed"

    def __call__(self, run: Evidence) -> Finding | None:
        rows = rollout_rows(run, "rollout/entropy")
        if len(rows) < 2 or not rows[-1]["rollout/entropy"] < self.left * rows[0]["rollout/entropy"]:
            return None
        message = (
            f"a token of a sample has {rows[-1]['rollout/entropy']:.2f} nats at step {rows[-1].step}, and had"
            f" {rows[0]['rollout/entropy']:.2f} at step {rows[0].step}: samples hardly differ, so rewards teach nothing more"
        )
        return Finding(
            self.name,
            Severity.warning,
            message,
            f"under {percent(self.left)} of the first",
            "a higher beta, or a lower optim.lr",
        )


@dataclass(frozen=True)
class ClippedRatios(Rule):
    """Report that over the share `most` of ratios was clipped in two successive rows."""

    most: float = 0.3
    name = "ratios clipped"

    def __call__(self, run: Evidence) -> Finding | None:
        rows = rollout_rows(run, "ratio/clipped")
        shares = [min(a["ratio/clipped"], b["ratio/clipped"]) for a, b in itertools.pairwise(rows)]
        if not shares or not max(shares) > self.most:
            return None
        message = f"up to {percent(max(shares))} of the token ratios were clipped, so that much of each rollout taught nothing"
        suggestion = "fewer method.epochs, or a lower optim.lr"
        return Finding(self.name, Severity.warning, message, f"over {percent(self.most)} in two rows", suggestion)


@dataclass(frozen=True)
class IdleCritic(Rule):
    """Report that the critic explains less than the share `least` of the variance of returns after the share `after` of the
    steps.
    """

    least: float = 0.05
    after: float = 0.5
    name = "critic explains nothing"

    def __call__(self, run: Evidence) -> Finding | None:
        rows = rollout_rows(run, "critic/explained")
        late = [row["critic/explained"] for row in rows if row.step > self.after * run.steps]
        if len(late) < 2 or not max(late) < self.least:
            return None
        message = (
            f"after {run.step} of {run.steps} steps the critic explains {percent(max(0.0, late[-1]))} of the variance of"
            " returns: advantages are those of REINFORCE without a baseline"
        )
        suggestion = "a higher method.critic_lr_factor, more method.epochs, or method=rloo, which needs no critic"
        return Finding(self.name, Severity.warning, message, f"under {percent(self.least)}", suggestion)
