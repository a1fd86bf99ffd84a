"""Find how many tokens of a micro-batch fit in the memory of a GPU, by trials before training."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from dpo_lab.data.datamodule import PreferenceDataModule
from dpo_lab.data.sources import FORWARD_TOKENS
from dpo_lab.distributed.collectives import all_reduce_max
from dpo_lab.models.forward import disable_dropout
from dpo_lab.runs.out_of_memory import OutOfMemory, explain_out_of_memory
from dpo_lab.training.memory import current_peak, restart_peak
from dpo_lab.training.rng_state import metric_state, set_metric_state

if TYPE_CHECKING:
    from dpo_lab.training.base_module import BaseModule

log = logging.getLogger("dpo_lab")

STEP = 256  # the fewest tokens of a trial; the first is of FORWARD_TOKENS
HEADROOM = 0.1  # share of the memory that stays free, for pairs that pad or fragment more than those of the trials

Probe = Callable[[int], int]  # tokens -> peak of the bytes in use; raises OutOfMemory


def find_tokens(
    module: BaseModule,
    data: PreferenceDataModule,
    world_size: int,
    device: torch.device,
    context: Callable[[], AbstractContextManager],
) -> int:
    """Return the tokens of a micro-batch that fit on every rank's GPU while it trains; the default on a CPU.

    data: makes the batches of trials; world_size: the ranks that share a step, beyond which no micro-batch grows.
    """
    if device.type != "cuda":
        log.info("data.tokens_per_microbatch=auto: %d, the default; only a GPU's memory is tried out", FORWARD_TOKENS)
        return FORWARD_TOKENS
    module.to(device)  # its metrics, too, as Lightning will
    free, _ = torch.cuda.mem_get_info(device)
    usable = (1 - HEADROOM) * (free + torch.cuda.memory_reserved(device))
    state = module.optim.state_bytes(module.parameters())  # made by the first step, after the trials
    probe = probe_of(module, data.trial_batch, device, context)
    tokens = tokens_that_fit(probe, int(usable) - state, data.most_tokens(world_size))
    log.info("data.tokens_per_microbatch=auto: %d tokens fit", tokens)
    return tokens


def tokens_that_fit(probe: Probe, budget: int, most: int) -> int:
    """Return the number of tokens, at most `most`, whose passes peak below `budget` bytes on every rank; a collective.

    Two trials give the bytes a token, a third is of the number that follows from them; a trial that fails is followed
    by one of half the tokens. Raises OutOfMemory if STEP tokens don't fit on a rank.
    """
    found = _search(probe, budget, most)
    if (fewest := -all_reduce_max(-found)) == 0:
        raise OutOfMemory(
            f"out of memory in a trial of {min(STEP, most)} tokens; type policy.gradient_checkpointing=true, or"
            " policy.lora.r=16 optim=lora"
        )
    return fewest


def _search(probe: Probe, budget: int, most: int) -> int:
    """Return the number of tokens that fit on this rank; 0 if STEP don't."""

    def peak(tokens: int) -> int | None:
        try:
            used = probe(tokens)
        except OutOfMemory:
            return None
        return used if used <= budget else None

    tokens = min(FORWARD_TOKENS, most)
    while (first := peak(tokens)) is None:
        if tokens <= STEP:
            return 0
        tokens //= 2
    larger = min(2 * tokens, most)
    if larger == tokens or (second := peak(larger)) is None:
        return tokens
    per_token = max((second - first) / (larger - tokens), 1.0)
    fitting = min(most, larger + int((budget - second) / per_token) // STEP * STEP)
    while fitting > larger and peak(fitting) is None:
        fitting = max(larger, fitting * 3 // 4 // STEP * STEP)
    return fitting


def probe_of(
    module: BaseModule,
    trial_batch: Callable[[int], Any],
    device: torch.device,
    context: Callable[[], AbstractContextManager],
) -> Probe:
    """Return the probe that runs forward and backward pass of a micro-batch, and measures their peak.

    trial_batch: returns a micro-batch of a number of tokens. A trial leaves no trace: random generators, gradients, metrics
    and training mode are as before.
    """

    def probe(tokens: int) -> int:
        batch = trial_batch(tokens).to(device)
        metrics, modes = metric_state(module.train_metrics), {m: m.training for m in module.modules()}
        restart_peak(device)
        try:
            with (
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                explain_out_of_memory("a trial"),
                context(),
            ):
                disable_dropout(module.model)
                module.part_loss(batch).backward()
                return current_peak(device)
        finally:
            for parameter in module.parameters():
                parameter.grad = None
            for each, mode in modes.items():
                each.training = mode
            set_metric_state(module.train_metrics, metrics)
            gc.collect()

    return probe
