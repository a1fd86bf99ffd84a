"""Health rules on the outcome: held-out pairs, samples and reference texts."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_lab.health.evidence import Evidence
from dpo_lab.health.finding import Finding, Rule, Severity
from dpo_lab.stats.text import percent


@dataclass(frozen=True)
class NothingHeldOut(Rule):
    """Report that no pairs are held out, so that learning cannot be distinguished from memorising."""

    name = "nothing held out"

    def __call__(self, run: Evidence) -> Finding | None:
        if run.held_out_pairs != 0:
            return None
        message = (
            f"all {run.train_pairs:,} pairs are training pairs, none is held out: learning and memorising look the same"
        )
        return Finding(self.name, Severity.warning, message, "0 held-out pairs", "data.validation_path=FILE.jsonl")


@dataclass(frozen=True)
class Displacement(Rule):
    """Report that chosen responses became much less likely: by more than `nats` and by more than `share` of their
    initial log-probability, in most pairs.

    DPO always does a little of this: what chosen and rejected responses have in common becomes less likely with the
    rejected.
    """

    share: float = 0.1
    nats: float = 2.0
    name = "likelihood displacement"

    def __call__(self, run: Evidence) -> Finding | None:
        if not run.val or "logps/chosen" not in run.val[-1]:
            return None
        last = run.val[-1]
        if run.step_zero_loss is not None and run.loss_traits and not run.loss_traits["is_per_token"]:
            before, since = last["logps/chosen"] - last["logratio/chosen"], "before training"
            rejected = last.figures.get("logratio/rejected")  # None without undesirable responses
        else:  # the reference does not tell how likely they were initially
            before, since = run.val[0]["logps/chosen"], f"at step {run.val[0].step}"
            now, then = (row.figures.get("logps/rejected") for row in (last, run.val[0]))
            rejected = None if now is None or then is None else now - then
        fall = before - last["logps/chosen"]
        if not fall > max(self.nats, self.share * abs(before)):
            return None
        fell = run.metric("chosen_fell")
        if fell is not None and fell.low <= 0.5:
            return None
        message = (
            f"the mean log-probability of held-out chosen responses fell by {fall:.1f} nats ({before:.1f} {since},"
            f" {last['logps/chosen']:.1f} now"
        )
        if rejected is not None:
            message += f"; that of rejected responses {'fell' if rejected < 0 else 'rose'} by {abs(rejected):.1f}"
        message += ")"
        if fell is not None:
            message += f", and {percent(fell.value)} of them became less likely"
        message += ": probability moves to responses that occur in no pair"
        threshold = f"a fall of over {percent(self.share)} and {self.nats:g} nats, in most pairs"
        suggestion = (
            "a higher beta or a lower optim.lr, fewer trainer.max_steps, or loss=ipo, which aims at a finite margin"
        )
        return Finding(self.name, Severity.warning, message, threshold, suggestion)


@dataclass(frozen=True)
class LengthHacking(Rule):
    """Report that samples became much longer, or shorter, than the initial policy's while the reward rose.

    The reward is the gold reward where it is known, otherwise the implicit reward: the margin on held-out pairs.
    """

    longer: float = 1.2
    shorter: float = 0.8
    name = "reward hacking of length"

    def __call__(self, run: Evidence) -> Finding | None:
        now, before = run.metric("length"), run.metric("initial/length")
        gold, margin = run.metric("gold_gain"), run.metric("margin")
        reward = gold or margin
        if now is None or before is None or reward is None or not reward.low > 0:
            return None
        if not (now.low > self.longer * before.high or now.high < self.shorter * before.low):
            return None
        message = (
            f"samples have {now.value:.1f} tokens on average, the initial policy's {before.value:.1f}"
            f" (ratio {now.value / before.value:.2f}), while"
            + (
                f" the gold reward rose by {gold.value:.1f} sd"
                if gold
                else f" the held-out margin rose to {reward.value:.1f} nats"
            )
        )
        quality = run.record.get("data_quality") or {}
        if longer := quality.get("train", {}).get("chosen_longer"):
            message += f"; the chosen response is longer in {percent(longer['value'])} of the training pairs"
        message += ": part of the gain may be length; compare rewards at equal length"
        threshold = f"length ratio certainly under {self.shorter:g} or over {self.longer:g}"
        suggestion = (
            "a length-normalised loss (loss=ipo_mean, or +ablation=simpo), a higher beta, or pairs of equal length"
        )
        return Finding(self.name, Severity.warning, message, threshold, suggestion)


@dataclass(frozen=True)
class Degenerated(Rule):
    """Report that the policy became a worse language model. perplexity, distinct: ratios to the initial policy's value;
    well_formed, stopped: how far these shares may fall.
    """

    perplexity: float = 1.5
    well_formed: float = 0.2
    stopped: float = 0.1
    distinct: float = 0.5
    name = "language degenerated"

    def __call__(self, run: Evidence) -> Finding | None:
        parts: list[str] = []
        now, before = run.metric("perplexity"), run.metric("initial/perplexity")
        if now and before and now.low > self.perplexity * before.high:
            parts.append(f"the perplexity of real text rose from {before.value:.1f} to {now.value:.1f}")
        for name, what, most in (
            ("well_formed", "well-formed samples", self.well_formed),
            ("stopped", "samples that end with the end token", self.stopped),
        ):
            now, before = run.metric(name), run.metric(f"initial/{name}")
            if now and before and before.low - now.high > most:
                parts.append(f"{what} fell from {percent(before.value)} to {percent(now.value)}")
        metrics = run.record.get("metrics", {})
        now, before = (metrics.get(name, {}).get("value") for name in ("distinct_2", "initial/distinct_2"))
        if now is not None and before and now < self.distinct * before:
            parts.append(f"distinct bigrams fell from {before:.3f} to {now:.3f}")
        if not parts:
            return None
        threshold = (
            f"perplexity over {self.perplexity:g} times the initial one, well-formed share {percent(self.well_formed)} lower,"
            f" ending share {percent(self.stopped)} lower, or distinct bigrams under {self.distinct:g} times"
        )
        suggestion = "a higher beta, a lower optim.lr, or fewer trainer.max_steps"
        return Finding(self.name, Severity.warning, "; ".join(parts), threshold, suggestion)


@dataclass(frozen=True)
class RoundedAway(Rule):
    """Report that less than the share `moved` of the trained weights changed, for a policy stored in 16 bits.

    Updates accumulate in float32 master copies, but the policy that is evaluated and saved holds the rounded weights.
    """

    moved: float = 0.5
    name = "weights rounded"

    def __call__(self, run: Evidence) -> Finding | None:
        counted = run.record.get("moved_weights")  # present for 16-bit weights only
        if counted is None or not counted["share"] < self.moved:
            return None
        message = (
            f"{counted['moved']:,} of {counted['trained']:,} trained weights ({percent(counted['share'])}) differ from the"
            f" initial policy's: the other updates are smaller than the spacing of {counted['dtype']} numbers, so the policy"
            " that was evaluated and saved lacks them"
        )
        suggestion = (
            "policy.dtype=float32, with trainer.precision=bf16-mixed to compute in bf16; or a higher optim.lr, or more"
            " trainer.max_steps"
        )
        return Finding(
            self.name, Severity.warning, message, f"under {percent(self.moved)} of weights changed", suggestion
        )


@dataclass(frozen=True)
class RewardAtChance(Rule):
    """Report that a reward model, trained by this run or followed by it, may rank held-out pairs no better than chance: its
    interval of accuracy, against the truth where it is known, else against the labels, is not above `chance`.
    """

    chance: float = 0.5
    name = "reward model at chance"

    def __call__(self, run: Evidence) -> Finding | None:
        of = "" if "reward_model" in run.config else "reward_model"
        if of and of not in run.record:
            return None
        right = run.metric("true_accuracy", of) or run.metric("accuracy", of)
        if right is None or right.low > self.chance:
            return None
        message = (
            f"the reward model ranks {percent(right.value)} of the held-out pairs right ({percent(right.low)} to"
            f" {percent(right.high)}): training on its rewards would follow noise"
        )
        suggestion = (
            "more steps of its training, another rate, or more pairs; python -m dpo_lab.inspect looks at the pairs"
        )
        return Finding(
            self.name, Severity.warning, message, f"an interval not above {percent(self.chance)}", suggestion
        )
