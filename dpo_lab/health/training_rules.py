"""Health rules on training metrics, which can report while a run trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpo_lab.health.evidence import Evidence, Row, lowest, wilson_interval
from dpo_lab.health.finding import Finding, Rule, Severity
from dpo_lab.stats.text import percent


@dataclass(frozen=True)
class StepZero(Rule):
    """Report that the initial loss differs from the loss at margin 0 by more than the share `off`: the reference is not
    the policy that training starts from.
    """

    off: float = 0.1
    name = "step zero"

    def __call__(self, run: Evidence) -> Finding | None:
        first = run.record.get("first_batch")  # recorded if policy and reference need not agree
        expected = run.loss_traits["loss_at_zero_margin"] if run.loss_traits else None
        if first is None or expected is None or not abs(first["loss"] - expected) > self.off * expected:
            return None
        message = (
            f"before the first step the loss of {first['pairs']} pairs is {first['loss']:.3f}, while a policy equal to its"
            f" reference has {expected:.3f}, and {percent(first['accuracy'])} of the pairs are already ranked as labelled:"
            " rewards and margins include what the policy knew before training"
        )
        return Finding(
            self.name,
            Severity.info,
            message,
            f"a difference of over {percent(self.off)}",
            "reference=cached to compare",
        )


@dataclass(frozen=True)
class NotLearning(Rule):
    """Report that the loss stays at its initial value. still: relative change that counts as none; moved: smallest
    relative fall that counts as learning; right: accuracy under which nothing was learned; after: share of the steps
    after which to judge; pairs: fewest pairs for a mean.
    """

    still: float = 1e-5
    moved: float = 0.01
    right: float = 0.56
    after: float = 0.5
    pairs: int = 1000
    name = "not learning"

    def __call__(self, run: Evidence) -> Finding | None:
        return self._unchanged(run) or self._no_progress(run)

    def _unchanged(self, run: Evidence) -> Finding | None:
        """Return a finding if the loss does not change at all after warm-up."""
        warmup = run.config["optim"]["warmup_steps"]
        rows = [row for row in run.train if row.step > warmup][1:] if run.step_zero_loss is not None else []
        what, start = "training loss", run.step_zero_loss
        if len(rows) < 2:
            rows = [row for row in run.val if row.step > warmup]
            what, start = "held-out loss", rows[0]["loss"] if rows else None
        if len(rows) < 2 or start is None:
            return None
        if not all(abs(row["loss"] - start) <= self.still * abs(start) for row in rows):
            return None
        now = rows[-1]["loss"]
        message = (
            f"the {what} was {start:.6f} initially and is {now:.6f} after {run.step} steps: the policy does not change"
        )
        lr = run.config["optim"]["lr"]
        suggestion = f"optim.lr={10 * lr or 3e-4:g}"
        return Finding(self.name, Severity.warning, message, f"a relative change of under {self.still:g}", suggestion)

    def _no_progress(self, run: Evidence) -> Finding | None:
        """Return a finding if the loss changes but neither loss nor accuracy improves."""
        late = run.recent_mean(self.pairs)
        if (
            run.step_zero_loss is None
            or late is None
            or "rewards/accuracies" not in late
            or run.step < self.after * run.steps
        ):
            return None
        right = wilson_interval(late["rewards/accuracies"], late.pairs)
        if not late["loss"] > (1 - self.moved) * run.step_zero_loss or not right.high < self.right:
            return None
        message = (
            f"after {run.step} of {run.steps} steps the training loss is {late['loss']:.4f}, initially"
            f" {run.step_zero_loss:.4f}; {percent(right.value)} of the last {late.pairs:,} pairs are ranked as labelled"
        )
        suggestion = (
            "python -m dpo_lab.inspect with the same settings, to see whether the labels can be learned;"
            f" if they can, an optim.lr above {run.config['optim']['lr']:g}, or more trainer.max_steps"
        )
        threshold = f"loss fell by under {percent(self.moved)}, and accuracy certainly under {percent(self.right)}"
        return Finding(self.name, Severity.warning, message, threshold, suggestion)


@dataclass(frozen=True)
class TooEasy(Rule):
    """Report that unseen pairs are almost all ranked correctly early in training: a surface cue gives the label away.

    right: accuracy over `pairs` pairs; early: share of the steps up to which that is too early; at_least: lower bound
    that the accuracy's interval must exceed.
    """

    right: float = 0.99
    early: float = 0.25
    at_least: float = 0.9
    pairs: int = 100
    name = "too easy"

    def __call__(self, run: Evidence) -> Finding | None:
        for row in run.train:
            if row.step > self.early * run.steps or row.step * run.batch > run.train_pairs:
                return None
            seen = run.recent_mean(self.pairs, until=row.step)
            if seen is None or "rewards/accuracies" not in seen:
                continue
            right = seen["rewards/accuracies"]
            if right >= self.right and wilson_interval(right, seen.pairs).low > self.at_least:
                return self._finding(run, seen, right)
        return None

    def _finding(self, run: Evidence, row: Row, right: float) -> Finding:
        message = (
            f"by step {row.step} of {run.steps}, {percent(right)} of {row.pairs:,} pairs not seen before are ranked as"
            " labelled: a surface feature seems to give the label away, and there is little else to learn"
        )
        quality = run.record.get("data_quality") or {}
        longer = quality.get("train", {}).get("chosen_longer", {}).get("value", 0.5)
        if abs(longer - 0.5) > 0.15:
            message += f"; the chosen response is longer in {percent(longer)} of the pairs"
        suggestion = (
            "python -m dpo_lab.inspect with the same settings, and harder pairs: both responses from one policy and of"
            " similar length"
        )
        return Finding(
            self.name,
            Severity.warning,
            message,
            f"accuracy {percent(self.right)} in the first {percent(self.early)} of the steps",
            suggestion,
        )


@dataclass(frozen=True)
class Diverging(Rule):
    """Report that the training loss exceeds its initial value by the share `rise` in two successive rows, or is not
    finite.
    """

    rise: float = 0.5
    name = "diverging"

    def __call__(self, run: Evidence) -> Finding | None:
        lr, start = run.config["optim"]["lr"], run.initial_loss
        suggestion = f"optim.lr={lr / 10:g}"
        for row in [*run.train, *run.val]:
            if broken := [name for name, value in sorted(row.figures.items()) if not math.isfinite(value)]:
                message = f"{broken[0]} is {row[broken[0]]} at step {row.step}"
                return Finding(self.name, Severity.warning, message, "must be finite", suggestion)
        if start is None or len(run.train) < 3:
            return None
        highest = max(
            (
                Row(b.step, 0, {"loss": min(a["loss"], b["loss"])})
                for a, b in zip(run.train, run.train[1:], strict=False)
            ),
            key=lambda row: row["loss"],
        )
        if not highest["loss"] > start + self.rise * abs(start):
            return None
        now = run.train[-1]["loss"]
        message = (
            f"the training loss was {start:.3f} initially, {highest['loss']:.3f} around step {highest.step}, and is"
            f" {now:.3f} at step {run.train[-1].step}"
        )
        severity = Severity.warning if now > start else Severity.info
        return Finding(
            self.name, severity, message, f"a rise of over {percent(self.rise)} in two successive rows", suggestion
        )


@dataclass(frozen=True)
class OverFitting(Rule):
    """Report that training pairs are fitted and held-out pairs are not. rise: relative rise of the held-out loss over
    its minimum, with twice as much between held-out and training loss; gap: between the accuracies, with a lower bound
    over `at_least`; pairs: fewest training pairs for a mean; held_out: fewest held-out pairs.
    """

    rise: float = 0.05
    gap: float = 0.15
    at_least: float = 0.05
    pairs: int = 256
    held_out: int = 50
    name = "over-fitting"

    def __call__(self, run: Evidence) -> Finding | None:
        if not run.val or (run.held_out_pairs or 0) < self.held_out:
            return None
        parts = [text for text in (self._loss_rises(run), self._accuracy_gap(run)) if text]
        if not parts:
            return None
        suggestion = "fewer trainer.max_steps, callbacks=early_stopping, a lower optim.lr, or more pairs"
        threshold = (
            f"held-out loss {percent(self.rise)} over its minimum, or {percent(self.gap)} between the accuracies"
        )
        return Finding(self.name, Severity.warning, "; ".join(parts), threshold, suggestion)

    def _loss_rises(self, run: Evidence) -> str | None:
        low, last = lowest(run.val, "loss"), run.val[-1]
        then, now = run.recent_mean(self.pairs, until=low.step), run.recent_mean(self.pairs)
        rise = self.rise * abs(low["loss"])
        if then is None or now is None or run.epochs <= 1 or not last["loss"] > low["loss"] + rise:
            return None  # in the first epoch training pairs are unseen as well
        if not now["loss"] < then["loss"] or not last["loss"] - now["loss"] > 2 * rise:
            return None
        return (
            f"the held-out loss was {low['loss']:.3f} at step {low.step} and is {last['loss']:.3f} at step {last.step}, while"
            f" the training loss fell from {then['loss']:.3f} to {now['loss']:.3f}"
        )

    def _accuracy_gap(self, run: Evidence) -> str | None:
        name = "clean/rewards/accuracies"
        train = run.recent_mean(self.pairs)
        if train is None or run.epochs <= 1 or name not in train or name not in run.val[-1]:
            return None
        held_out = wilson_interval(run.val[-1][name], run.val[-1].pairs)
        clean = train.pairs * (1 - run.flips / run.train_pairs)
        seen, apart = wilson_interval(train[name], clean), train[name] - held_out.value
        if not apart > self.gap or not seen.low - held_out.high > self.at_least:
            return None
        flips = " clean" if run.flips else ""
        return (
            f"after {run.epochs:.1f} epochs {percent(seen.value)} of the{flips} training pairs are ranked as labelled, but"
            f" {percent(held_out.value)} of the {run.val[-1].pairs:,} held-out pairs"
        )


@dataclass(frozen=True)
class Memorised(Rule):
    """Report that pairs with a flipped label are ranked as that wrong label says. right: share of them, with a lower
    bound over `at_least`; pairs: fewest training pairs for a mean.
    """

    right: float = 0.6
    at_least: float = 0.5
    pairs: int = 640
    name = "noise memorised"

    def __call__(self, run: Evidence) -> Finding | None:
        name = "flipped/rewards/accuracies"
        late = run.recent_mean(min(self.pairs, run.train_pairs)) if run.flips else None
        if late is None or name not in late or run.epochs <= 1:
            return None
        fitted = wilson_interval(late[name], late.pairs * run.flips / run.train_pairs)
        if not fitted.value > self.right or not fitted.low > self.at_least:
            return None
        message = (
            f"{percent(fitted.value)} of the {run.flips:,} training pairs with a flipped label are ranked as that wrong label"
            f" says, after {run.epochs:.1f} epochs: the policy memorises single pairs"
        )
        rate = run.flips / run.train_pairs
        suggestion = (
            "fewer trainer.max_steps, callbacks=early_stopping, or a loss that accounts for flipped labels:"
            f" loss=rdpo loss.flip_rate={rate:.2g}"
        )
        return Finding(self.name, Severity.warning, message, f"over {percent(self.right)}", suggestion)
