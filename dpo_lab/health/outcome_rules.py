"""Health rules on the outcome: held-out pairs, samples and reference texts."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_lab.health.evidence import SUMMED, Evidence
from dpo_lab.health.finding import Finding, Rule, Severity, percent


@dataclass(frozen=True)
class NothingHeldOut(Rule):
    """Without held-out pairs nothing tells learning from memorising."""

    name = "nothing held out"

    def __call__(self, run: Evidence) -> Finding | None:
        if run.held_out_pairs != 0:
            return None
        says = f"all {run.train_pairs:,} pairs are trained on, none is held out: nothing tells learning from memorising"
        return Finding(self.name, Severity.warning, says, "0 held-out pairs", "data.validation_fraction=0.1")


@dataclass(frozen=True)
class Displacement(Rule):
    """Chosen responses become much less likely themselves: by `nats` and by `share` of what they had, in most pairs.

    A little of this comes with every DPO: what chosen and rejected have in common falls with the rejected ones.
    """

    share: float = 0.1
    nats: float = 2.0
    name = "likelihood displacement"

    def __call__(self, run: Evidence) -> Finding | None:
        if not run.val or "logps/chosen" not in run.val[-1]:
            return None
        last = run.val[-1]
        if run.zero is not None and run.loss in SUMMED:
            before, since = last["logps/chosen"] - last["logratio/chosen"], "before training"
            rejected = last["logratio/rejected"]
        else:  # the reference says nothing of how likely they were
            before, since = run.val[0]["logps/chosen"], f"at step {run.val[0].step}"
            rejected = last["logps/rejected"] - run.val[0]["logps/rejected"]
        fall = before - last["logps/chosen"]
        if not fall > max(self.nats, self.share * abs(before)):
            return None
        fell = run.metric("chosen_fell")
        if fell is not None and fell.low <= 0.5:
            return None
        says = (
            f"held-out chosen responses have lost {fall:.1f} nats of log-probability ({before:.1f} {since},"
            f" {last['logps/chosen']:.1f} now; rejected ones {'lost' if rejected < 0 else 'gained'} {abs(rejected):.1f})"
        )
        if fell is not None:
            says += f", and {percent(fell.value)} of them have become less likely"
        says += ": the policy moves to responses that are in no pair"
        threshold = f"over {percent(self.share)} and {self.nats:g} nats lost, in most pairs"
        tries = "a higher beta or a lower optim.lr, fewer trainer.max_steps, or loss=ipo, which stops at a margin"
        return Finding(self.name, Severity.warning, says, threshold, tries)


@dataclass(frozen=True)
class LengthHacking(Rule):
    """Samples became much longer, or shorter, than the initial policy's, while the reward rose: part of it is length.

    The reward is the gold one where it is known, else the implicit one: the margin on held-out pairs.
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
        if not (now.low / before.high > self.longer or now.high / before.low < self.shorter):
            return None
        says = (
            f"samples have {now.value:.1f} tokens, the initial policy's {before.value:.1f}"
            f" ({now.value / before.value:.2f} times), while"
            + (
                f" gold reward rose by {gold.value:.1f} sd"
                if gold
                else f" the held-out margin rose to {reward.value:.1f} nats"
            )
        )
        quality = run.record.get("data_quality") or {}
        if longer := quality.get("train", {}).get("chosen_longer"):
            says += f"; the chosen response is the longer one in {percent(longer['value'])} of the training pairs"
        says += ": compare rewards at equal length before you believe them"
        threshold = f"under {self.shorter:g} or over {self.longer:g} times, for certain"
        tries = (
            "a loss that weighs by length (loss=ipo_mean, or +ablation=simpo), a higher beta, or pairs of one length"
        )
        return Finding(self.name, Severity.warning, says, threshold, tries)


@dataclass(frozen=True)
class Degenerated(Rule):
    """The policy is a worse language model than it was: perplexity of real text so many times, shares fell by so much."""

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
            ("stopped", "samples that stop", self.stopped),
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
            f"perplexity {self.perplexity:g} times, well-formed {percent(self.well_formed)} or stopping"
            f" {percent(self.stopped)} fewer for certain, bigrams {self.distinct:g} times"
        )
        tries = "a higher beta, a lower optim.lr, or fewer trainer.max_steps"
        return Finding(self.name, Severity.warning, "; ".join(parts), threshold, tries)


@dataclass(frozen=True)
class RoundedAway(Rule):
    """Less than `moved` of the trained weights have changed, of a policy that keeps them in 16 bits.

    Updates add up in float32 master copies, but the policy that is measured and saved has them rounded.
    """

    moved: float = 0.5
    name = "weights rounded"

    def __call__(self, run: Evidence) -> Finding | None:
        counted = run.record.get("moved_weights")  # only there for weights in 16 bits
        if counted is None or not counted["share"] < self.moved:
            return None
        says = (
            f"{counted['moved']:,} of {counted['trained']:,} trained weights ({percent(counted['share'])}) differ from the"
            f" initial policy's: the other updates are below the spacing of {counted['dtype']}, and the policy that was"
            " measured and saved does not have them"
        )
        tries = (
            "policy.dtype=float32, with trainer.precision=bf16-mixed to compute in bf16; or a higher optim.lr, or more"
            " trainer.max_steps"
        )
        return Finding(self.name, Severity.warning, says, f"under {percent(self.moved)}", tries)
