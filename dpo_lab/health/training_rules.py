"""Health rules on training metrics, which can report while a run trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpo_lab.health.evidence import Evidence, Row, at_no_margin, lowest, wilson_interval
from dpo_lab.health.finding import Finding, Rule, Severity, percent


@dataclass(frozen=True)
class StepZero(Rule):
    """The reference is not the policy that training starts from: off the loss at a margin of 0 by more than this share."""

    off: float = 0.1
    name = "step zero"

    def __call__(self, run: Evidence) -> Finding | None:
        first = run.record.get("first_batch")  # there where policy and reference need not agree
        expected = at_no_margin(run.config["loss"]) if run.loss else None
        if first is None or expected is None or not abs(first["loss"] - expected) > self.off * expected:
            return None
        says = (
            f"before the first step the loss of {first['pairs']} pairs is {first['loss']:.3f}, not the {expected:.3f} of a"
            f" policy that agrees with its reference, and {percent(first['accuracy'])} of them are ranked as labelled:"
            " rewards and margins hold what the policy knew before, and do not show what it learned"
        )
        return Finding(
            self.name, Severity.info, says, f"off by over {percent(self.off)}", "reference=cached to compare"
        )


@dataclass(frozen=True)
class NotLearning(Rule):
    """The loss stays where it started. moved: the least share of it; right: the accuracy under which nothing was learned;
    after: the share of the steps that a rate needs at least; pairs: that a mean needs at least.
    """

    still: float = 1e-5
    moved: float = 0.01
    right: float = 0.56
    after: float = 0.5
    pairs: int = 1000
    name = "not learning"

    def __call__(self, run: Evidence) -> Finding | None:
        return self._still(run) or self._aimless(run)

    def _still(self, run: Evidence) -> Finding | None:
        """Nothing at all changes, once the learning rate has risen."""
        warmup = run.config["optim"]["warmup_steps"]
        rows = [row for row in run.train if row.step > warmup][1:] if run.zero is not None else []
        what, start = "training loss", run.zero
        if len(rows) < 2:
            rows = [row for row in run.val if row.step > warmup]
            what, start = "held-out loss", rows[0]["loss"] if rows else None
        if len(rows) < 2 or start is None:
            return None
        if not all(abs(row["loss"] - start) <= self.still * abs(start) for row in rows):
            return None
        now = rows[-1]["loss"]
        says = f"the {what} was {start:.6f} at first and is {now:.6f} after {run.step} steps: the policy does not move"
        lr = run.config["optim"]["lr"]
        tries = f"optim.lr={10 * lr or 3e-4:g}"
        return Finding(self.name, Severity.warning, says, f"changed by under {self.still:g} of itself", tries)

    def _aimless(self, run: Evidence) -> Finding | None:
        """It changes, and nothing comes of it."""
        late = run.lately(self.pairs)
        if run.zero is None or late is None or "rewards/accuracies" not in late or run.step < self.after * run.steps:
            return None
        right = wilson_interval(late["rewards/accuracies"], late.pairs)
        if not late["loss"] > (1 - self.moved) * run.zero or not right.high < self.right:
            return None
        says = (
            f"after {run.step} of {run.steps} steps the training loss is {late['loss']:.4f}, and was {run.zero:.4f} at first;"
            f" {percent(right.value)} of the last {late.pairs:,} pairs are ranked as labelled"
        )
        tries = (
            "python -m dpo_lab.inspect with the same settings: do the labels say anything?"
            f" If they do, a higher optim.lr than {run.config['optim']['lr']:g}, or more trainer.max_steps"
        )
        threshold = f"fell by under {percent(self.moved)}, and under {percent(self.right)} right for certain"
        return Finding(self.name, Severity.warning, says, threshold, tries)


@dataclass(frozen=True)
class TooEasy(Rule):
    """Pairs that were never seen before are all ranked right, early: a surface cue tells the label.

    right: accuracy over `pairs` pairs; early: the share of the steps up to which this is too soon; at_least: accuracy that must
    be certain.
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
            seen = run.lately(self.pairs, until=row.step)
            if seen is None or "rewards/accuracies" not in seen:
                continue
            right = seen["rewards/accuracies"]
            if right >= self.right and wilson_interval(right, seen.pairs).low > self.at_least:
                return self._said(run, seen, right)
        return None

    def _said(self, run: Evidence, row: Row, right: float) -> Finding:
        says = (
            f"by step {row.step} of {run.steps} {percent(right)} of {row.pairs:,} pairs that were new to the policy are ranked"
            " as labelled: something on the surface tells the label, and there is little else to learn"
        )
        quality = run.record.get("data_quality") or {}
        longer = quality.get("train", {}).get("chosen_longer", {}).get("value", 0.5)
        if abs(longer - 0.5) > 0.15:
            says += f"; the chosen response is the longer one in {percent(longer)} of the pairs"
        tries = "python -m dpo_lab.inspect with the same settings, and harder pairs: both of one policy, of one length"
        return Finding(
            self.name, Severity.warning, says, f"{percent(self.right)} in the first {percent(self.early)}", tries
        )


@dataclass(frozen=True)
class Diverging(Rule):
    """The training loss stands above its start by more than `rise` of it, over two rows together; or is no number."""

    rise: float = 0.5
    name = "diverging"

    def __call__(self, run: Evidence) -> Finding | None:
        lr, start = run.config["optim"]["lr"], run.start
        tries = f"optim.lr={lr / 10:g}"
        for row in [*run.train, *run.val]:
            if broken := [name for name, value in sorted(row.figures.items()) if not math.isfinite(value)]:
                says = f"{broken[0]} is {row[broken[0]]} at step {row.step}"
                return Finding(self.name, Severity.warning, says, "must be a number", tries)
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
        says = (
            f"the training loss was {start:.3f} at first, {highest['loss']:.3f} around step {highest.step}, and is {now:.3f} at"
            f" step {run.train[-1].step}"
        )
        severity = Severity.warning if now > start else Severity.info
        return Finding(self.name, severity, says, f"a rise of over {percent(self.rise)}, twice in a row", tries)


@dataclass(frozen=True)
class OverFitting(Rule):
    """Training pairs are fitted, held-out ones are not. rise: of the held-out loss over its lowest, with twice as much between
    it and that of training; gap: in accuracy, of which `at_least` must be certain; held_out: pairs, at least.
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
        parted = [said for said in (self._risen(run), self._apart(run)) if said]
        if not parted:
            return None
        tries = "fewer trainer.max_steps, callbacks=early_stopping, a lower optim.lr, or more pairs"
        threshold = f"held-out loss {percent(self.rise)} over its lowest, or {percent(self.gap)} between the accuracies"
        return Finding(self.name, Severity.warning, "; ".join(parted), threshold, tries)

    def _risen(self, run: Evidence) -> str | None:
        low, last = lowest(run.val, "loss"), run.val[-1]
        then, now = run.lately(self.pairs, until=low.step), run.lately(self.pairs)
        rise = self.rise * abs(low["loss"])
        if then is None or now is None or run.epochs <= 1 or not last["loss"] > low["loss"] + rise:
            return None  # before a pair comes again, training pairs are held out themselves
        if not now["loss"] < then["loss"] or not last["loss"] - now["loss"] > 2 * rise:
            return None
        return (
            f"the held-out loss was {low['loss']:.3f} at step {low.step} and is {last['loss']:.3f} at step {last.step}, while"
            f" that of training fell from {then['loss']:.3f} to {now['loss']:.3f}"
        )

    def _apart(self, run: Evidence) -> str | None:
        name = "clean/rewards/accuracies"
        train = run.lately(self.pairs)
        if train is None or run.epochs <= 1 or name not in train or name not in run.val[-1]:
            return None
        held_out = wilson_interval(run.val[-1][name], run.val[-1].pairs)
        clean = train.pairs * (1 - run.flips / run.train_pairs)
        seen, apart = wilson_interval(train[name], clean), train[name] - held_out.value
        if not apart > self.gap or not seen.low - held_out.high > self.at_least:
            return None
        flips = " clean" if run.flips else ""
        return (
            f"{percent(seen.value)} of the{flips} training pairs are ranked as labelled and {percent(held_out.value)} of the"
            f" {run.val[-1].pairs:,} held-out ones, after {run.epochs:.1f} epochs"
        )


@dataclass(frozen=True)
class Memorised(Rule):
    """Pairs with a flipped label are ranked as the wrong label says. right: the share, of which `at_least` is certain."""

    right: float = 0.6
    at_least: float = 0.5
    pairs: int = 640
    name = "noise memorised"

    def __call__(self, run: Evidence) -> Finding | None:
        name = "flipped/rewards/accuracies"
        late = run.lately(min(self.pairs, run.train_pairs)) if run.flips else None
        if late is None or name not in late or run.epochs <= 1:
            return None
        fitted = wilson_interval(late[name], late.pairs * run.flips / run.train_pairs)
        if not fitted.value > self.right or not fitted.low > self.at_least:
            return None
        says = (
            f"{percent(fitted.value)} of the {run.flips:,} training pairs with a flipped label are ranked as that wrong label"
            f" says, after {run.epochs:.1f} epochs: the policy learns single pairs by heart"
        )
        rate = run.flips / run.train_pairs
        tries = (
            "fewer trainer.max_steps, callbacks=early_stopping, or a loss that expects flips:"
            f" loss=rdpo loss.flip_rate={rate:.2g}"
        )
        return Finding(self.name, Severity.warning, says, f"over {percent(self.right)}", tries)
