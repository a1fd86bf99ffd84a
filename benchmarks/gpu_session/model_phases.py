"""Phases on models of real shapes at random weights: exactness, rounding, step times, the LM head, sampling."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from benchmarks.gpu_session.scale import Scale
from benchmarks.step import relative_error
from benchmarks.variants import BETA, TRL, computes_in
from benchmarks.workload import make_pairs, tokens_of
from dpo_lab.core import fused_lm_head
from dpo_lab.core.lm_head import LMHead
from dpo_lab.core.losses import DPO
from dpo_lab.core.pairs import EncodedPair, PairLogps
from dpo_lab.data.collate import collate
from dpo_lab.models.autocast_linear import LinearCasts
from dpo_lab.models.forward import disable_dropout, pair_logps, pair_loss, response_logps
from dpo_lab.models.paths import ForwardPath, apply_path, causal_lm
from dpo_lab.models.sampling import sample

Row = dict[str, Any]
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def exactness(scale: Scale, device: torch.device) -> Iterator[Row]:
    """Log-probabilities and gradients of every path against padded rows in float32, for 1 to 3 responses a prompt."""
    model = make_model(scale.whole, device)
    for responses in (1, 2, 3):
        tokens, lengths = _items(scale, responses, device)
        exact = _logps_and_gradient(model, "padded", "fp32", tokens, lengths)
        for dtype in ("fp32", "bf16"):
            for path in paths(device, dtype):
                found = _logps_and_gradient(model, path, dtype, tokens, lengths)
                nats = (found[0] - exact[0]).abs().cpu() / torch.from_numpy(lengths[:, 1:])
                error = relative_error(found[1], exact[1])
                yield {
                    "responses": responses,
                    "path": path,
                    "dtype": dtype,
                    "nats per token": nats.max().item(),
                    "gradient error": error,
                }


def rounding(scale: Scale, device: torch.device) -> Iterator[Row]:
    """How far log-probabilities of the same pairs differ between batches, in nats over the root of the number of tokens.

    This is what the tolerance of the step-0 check is in, see dpo_lab/training/step_zero.py.
    """
    model = make_model(scale.whole, device)
    pairs = make_pairs(scale.mix, scale.pairs[0], scale.whole.vocab_size)
    for dtype in ("fp32", "bf16"):
        alone = _pair_logps(model, paths(device, dtype)[0], dtype, pairs, 0, device)
        for path in paths(device, dtype):
            for tokens in scale.tokens:
                found = _pair_logps(model, path, dtype, pairs, tokens, device)
                lengths = torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
                scaled = (found - alone).abs() / lengths.sqrt()
                yield {
                    "path": path,
                    "dtype": dtype,
                    "tokens": tokens,
                    "largest": scaled.max().item(),
                    "rms": scaled.square().mean().sqrt().item(),
                }


def steps(scale: Scale, device: torch.device) -> Iterator[Row]:
    """Times, launches and memory of optimizer steps, ours by each path and TRL's, with lengths that are new in each."""
    for name, adapted in (("whole", False), ("LoRA", True)):
        for pairs in scale.pairs:
            for variant, work in _variants(scale, adapted, device):
                row = {"model": name, "pairs": pairs, "variant": variant}
                try:
                    yield row | _timed(work, scale, pairs, device)
                except torch.OutOfMemoryError:
                    yield row | dict.fromkeys(("ms", "tokens/s", "launches", "peak GB"), "out of memory")


def head(scale: Scale, device: torch.device) -> Iterator[Row]:
    """Times of the fused LM head, forward and backward, by the number of rows of a chunk."""
    width, vocabulary = scale.whole.hidden_size, scale.whole.vocab_size
    hidden = torch.randn(scale.rows, width, device=device).requires_grad_()
    targets = torch.randint(vocabulary, (scale.rows,), device=device)
    lengths = np.array([[8, scale.rows // 8 - 4, 4]] * 8)
    of_logits = LMHead(nn.Linear(width, vocabulary, bias=False, device=device), vocabulary)

    def work() -> None:
        with computes_in("bf16", device.type):
            loss, _ = fused_lm_head.fused_loss(hidden, of_logits, targets, lengths, lambda logps, _: -logps.sum(1))
        loss.backward()

    for rows in scale.pieces:
        with patch.object(fused_lm_head, "rows_per_chunk", lambda *_, rows=rows: rows):
            work()
            peak = _restart_peak(device)
            yield {"rows a chunk": rows, "ms": 1e3 * _seconds(work, device), "peak GB": peak()}


def sampler(scale: Scale, device: torch.device) -> Iterator[Row]:
    """Sampled tokens a second."""
    model = make_model(scale.whole, device)
    count, new = scale.sampled
    prompts = [pair.prompt for pair in make_pairs(scale.mix, count, scale.whole.vocab_size)]

    def work() -> None:
        with computes_in("bf16", device.type):
            sample(model, prompts, max_new_tokens=new, end_ids=[], pad_id=0, seed=0, batch_size=count)

    work()
    yield {"prompts": count, "new tokens": new, "tokens/s": count * new / _seconds(work, device)}


def make_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of this shape at random weights."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    disable_dropout(model)
    return model


def paths(device: torch.device, dtype: str) -> list[str]:
    """The ways to compute: one kernel a layer, a loop over responses, padded rows."""
    kernel = device.type == "cuda" and dtype == "bf16" and torch.cuda.get_device_capability(device) >= (8, 0)
    return ["kernel", "loop", "padded"] if kernel else ["loop", "padded"]


@contextmanager
def taking(model: PreTrainedModel, path: str) -> Iterator[None]:
    """The model on this path, with the LM head on response tokens alone."""
    causal_lm(model).set_attn_implementation("sdpa")
    apply_path(model, ForwardPath(shares_prompts=path != "padded", vocabulary=model.config.vocab_size))
    if path == "loop":
        with patch("dpo_lab.models.attention.supports", lambda *_: False):
            yield
    else:
        yield


def _items(scale: Scale, responses: int, device: torch.device) -> tuple[Tensor, np.ndarray]:
    """A packed stream of four prompts with this number of responses each, and its lengths."""
    pairs = make_pairs(scale.mix, 8, scale.whole.vocab_size, seed=responses)
    items = [
        [*(p.prompt for p in pairs[i : i + 1]), pairs[i].chosen, pairs[i].rejected, pairs[i + 4].chosen]
        for i in range(4)
    ]
    parts = [part for item in items for part in item[: 1 + responses]]
    lengths = np.array([[len(part) for part in item[: 1 + responses]] for item in items])
    return torch.tensor(np.concatenate(parts)).to(device), lengths


def _logps_and_gradient(
    model: PreTrainedModel, path: str, dtype: str, tokens: Tensor, lengths: np.ndarray
) -> tuple[Tensor, list[Tensor]]:
    """The log-probabilities, and the gradient of a weighted sum of them."""
    parameters = list(model.parameters())
    with taking(model, path), computes_in(dtype, tokens.device.type):
        logps = response_logps(model, tokens, lengths)
    weights = torch.linspace(-1, 1, logps.numel(), device=logps.device).view_as(logps)
    gradient = torch.autograd.grad((logps.float() * weights).sum(), parameters)
    return logps.detach().float(), [each.detach() for each in gradient]


@torch.no_grad()
def _pair_logps(
    model: PreTrainedModel, path: str, dtype: str, pairs: Sequence[EncodedPair], tokens: int, device: torch.device
) -> Tensor:
    """Log-probabilities [pairs, 2] computed in micro-batches of this number of tokens; 0: each pair alone."""
    with taking(model, path), computes_in(dtype, device.type):
        found = [pair_logps(model, part.to(device)) for part in collate(pairs).split(tokens)]
    return torch.cat([torch.stack((each.chosen, each.rejected), 1) for each in found]).float().cpu()


Work = Callable[[Sequence[EncodedPair]], Callable[[], None]]  # from the pairs of a step to its forward and backward


def _variants(scale: Scale, adapted: bool, device: torch.device) -> Iterator[tuple[str, tuple[PreTrainedModel, Work]]]:
    """Who is measured: its name, its model, and its work. A model is freed before the next is made."""
    for path in paths(device, "bf16"):
        for tokens in scale.tokens:
            model = _to_train(scale, adapted, device)
            yield f"ours, {path}, {tokens} tokens", (model, _ours(model, path, tokens, device))
            del model
            _restart_peak(device)
    if find_spec("trl") is None:
        return
    for tuned in (False, True):
        model = _to_train(scale, adapted, device)
        reference = None if adapted or tuned else make_model(scale.whole, device, torch.bfloat16)
        peer = TRL(model, reference, "bf16", checkpointing=not tuned, tuned=tuned)

        def work(pairs: Sequence[EncodedPair], peer: TRL = peer) -> Callable[[], None]:
            batches = peer.batches(pairs)
            return lambda: peer.backward(batches)

        yield f"TRL {'tuned' if tuned else 'at its defaults'}", (model, work)
        del model, reference, peer, work
        _restart_peak(device)


def _to_train(scale: Scale, adapted: bool, device: torch.device) -> PreTrainedModel:
    if not adapted:
        return make_model(scale.whole, device)
    from peft import LoraConfig, get_peft_model

    base = make_model(scale.adapted, device, torch.bfloat16)
    return get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))  # type: ignore[return-value]


def _ours(model: PreTrainedModel, path: str, tokens: int, device: torch.device) -> Work:
    """DPOModule's step without Lightning; its reference's log-probs are made up, as if from the cache."""
    loss, casts = DPO(BETA), LinearCasts([model]).install()

    def prepare(pairs: Sequence[EncodedPair]) -> Callable[[], None]:
        batch = collate(sorted(pairs, key=lambda pair: -pair.size))

        def backward() -> None:
            casts.refresh()
            for part in batch.split(tokens):
                part = part.to(device)
                cached = PairLogps.of(-part.response_lengths.float(), part.response_lengths)
                with taking(model, path), computes_in("bf16", device.type):
                    total, _ = pair_loss(model, part, loss, cached)
                (total / len(pairs)).backward()

        return backward

    return prepare


def _timed(variant: tuple[PreTrainedModel, Work], scale: Scale, count: int, device: torch.device) -> Row:
    """Median milliseconds of steps on fresh pairs, after two to warm up; launches and peak memory of one."""
    model, work = variant
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    vocabulary = model.config.vocab_size
    spent, tokens = [], []
    for seed in range(2 + scale.steps):
        pairs = make_pairs(scale.mix, count, vocabulary, seed)
        backward = work(pairs)

        def step(backward: Callable[[], None] = backward) -> None:
            backward()
            optimizer.step()
            optimizer.zero_grad()

        if seed == 1:
            peak = _restart_peak(device)
            launches = _launches(step, device)
            gigabytes = peak()
            continue
        spent.append(_seconds(step, device))
        tokens.append(tokens_of(pairs))
    rates = [number / seconds for number, seconds in zip(tokens[1:], spent[1:], strict=True)]
    return {
        "ms": 1e3 * statistics.median(spent[1:]),
        "tokens/s": statistics.median(rates),
        "launches": launches,
        "peak GB": gigabytes,
    }


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _launches(work: Callable[[], None], device: torch.device) -> int:
    """Kernels that the work launches on a GPU; on a CPU the operators that it calls, those within operators included."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        work()
    names = [event.name for event in found.events() or ()]
    return sum(name in LAUNCHES if on_gpu else name.startswith("aten::") for name in names)


def _restart_peak(device: torch.device) -> Callable[[], float]:
    """Free what is free; return a function that tells the peak since then in GB, not a number without a GPU."""
    gc.collect()
    if device.type != "cuda":
        return lambda: float("nan")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return lambda: torch.cuda.max_memory_allocated(device) / 1e9
