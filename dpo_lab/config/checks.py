"""Checks of a run's config that concern several of its settings at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_lab.config.allowed_targets import is_sharded
from dpo_lab.config.precision import canonical, check_precision
from dpo_lab.core.losses import LOSSES
from dpo_lab.core.methods import PolicyGradient
from dpo_lab.data.sources import AUTO
from dpo_lab.models.policy import Dtype, Pretrained
from dpo_lab.models.reference import Moving, Uniform, UniformOver
from dpo_lab.rewards.learned import Learned

if TYPE_CHECKING:
    from dpo_lab.config.schema import RunConfig


def check_run(config: RunConfig) -> None:
    """Raise ValueError, with what to type, if settings of a run do not fit each other."""
    loss = f"loss={config.loss.name}"
    if (required := config.loss.requires_reference) not in (None, config.reference.starts_at_policy):
        why = "measures drift from the initial policy" if required else "has no reference"
        raise ValueError(f"{loss} {why}; type {loss} reference={'cached' if required else 'uniform'}")
    uses_length = isinstance(config.reference, Uniform) and config.reference.over is UniformOver.tokens
    if required is False and uses_length and not config.loss.is_per_token:
        raise ValueError(
            f"{loss} takes log-probabilities of the policy alone, to which reference=uniform_tokens would add a term of"
            f" length; type {loss} reference=uniform"
        )
    sharded = is_sharded(config.trainer)
    config.reference.check(config.policy, is_sharded=sharded)
    config.policy.check(is_sharded=sharded, on_cpu=config.trainer.get("accelerator") == "cpu")
    if sharded and config.data.tokens_per_microbatch == AUTO:
        raise ValueError(
            f"data.tokens_per_microbatch={AUTO}: its trials run before the model is sharded; type a number, e.g."
            " data.tokens_per_microbatch=4096"
        )
    is_short = isinstance(config.policy, Pretrained) and config.policy.dtype is not Dtype.float32
    trains_16_bits = is_short and not config.policy.has_adapters
    if trains_16_bits and isinstance(config.reference, Moving) and config.reference.mixup < 1:
        raise ValueError(
            f"reference.mixup={config.reference.mixup}: weights kept in 16 bits round its small changes to nothing; type"
            " reference.mixup=1, or policy.dtype=float32"
        )
    config.optim.check(
        trains_16_bits=trains_16_bits,
        is_sharded=sharded,
        scales_gradients=canonical(config.trainer.get("precision")) == "16-mixed",
    )
    check_precision(config.trainer)
    for key, seed in (("seed", config.seed), ("noise.seed", config.noise.seed)):
        if not 0 <= seed < 2**32:
            raise ValueError(f"{key}={seed}: must lie in 0 to {2**32 - 1}; type e.g. {key}=0")
    if config.threads is not None and config.threads < 1:
        raise ValueError(f"threads={config.threads}: must be 1 or more; type e.g. threads=1")
    if config.method.is_online:
        _check_online(config)


def _check_online(config: RunConfig) -> None:
    """Raise ValueError if a setting does not fit a method that samples."""
    method = config.method.name
    if not config.method.uses_loss and config.loss != LOSSES["dpo"](beta=config.loss.beta):
        raise ValueError(f"loss: method={method} trains without a loss of pairs; leave loss= out, or type method=dpo")
    if isinstance(config.method, PolicyGradient) and config.loss.beta != (beta := config.method.beta):
        raise ValueError(
            f"loss.beta={config.loss.beta}: method={method} trains with method.beta={beta}; leave both out and type"
            f" beta={beta}"
        )
    config.reward.check(has_gold=config.data.uses_task, judge=config.evals.judge)
    if config.noise.is_none:
        return
    what, instead = f"reward={config.reward.name}", "reward=learned"
    if isinstance(config.reward, Learned) and config.reward.is_given:
        what, instead = f"reward.path={config.reward.path}", "leave reward.path= out"
    elif config.reward.reads_labels:
        return
    raise ValueError(
        f"noise: {what} reads no label of the pairs, so that label noise would change nothing; type noise=none, or {instead}"
    )
