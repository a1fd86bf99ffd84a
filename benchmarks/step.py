"""One DPO step against the peers: tokens per CPU-second, memory, share of the GEMM limit, exactness.

    python -m benchmarks.step                          every shape and mix (about two hours of one core)
    python -m benchmarks.step --shape small --mix chat

Variants take turns in one process, on one thread, over the same pairs and parameters; figures are medians. Writes
outputs/benchmarks/ and benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import LlamaConfig
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from benchmarks.results import save, write_results
from benchmarks.variants import Variant, all_variants, gradient
from benchmarks.workload import MIXES, PAIRS, SHAPES, make_models, make_pairs, tokens_of, useful_flops

SQUARE = [(1536, 1536, 1536, 1)]


def measure(shape: str, mix: str, repeats: int, tokens: int) -> None:
    """One table: every variant on one shape and mix."""
    policy, reference = make_models(shape)
    pairs = make_pairs(mix, PAIRS[shape, mix], SHAPES[shape].vocab_size)
    optimizer = AdamW(policy.parameters(), lr=0.0, fused=True)  # all of its arithmetic, and weights that stay
    variants = list(all_variants(policy, reference, pairs, tokens))
    seconds: dict[int, list[float]] = {i: [] for i in range(len(variants))}
    memory: dict[int, list[float]] = {i: [] for i in range(len(variants))}
    errors: list[float | None] = []
    shapes = products(
        SHAPES[shape], tokens, tokens * sum(p.size - len(p.prompt) for p in pairs) // sum(p.size for p in pairs)
    )
    limit, square = [gemm_rate(shapes)], [gemm_rate(SQUARE)]
    twin: list[Tensor] = []
    for repeat in range(repeats + 1):  # the first one warms up, and tells how exact each is
        for i, variant in enumerate(variants):
            spent, peak = step(variant, optimizer)
            print(f"{shape} {mix} {repeat}/{repeats} {variant.name} {variant.dtype}: {spent:.2f} s, {peak:.0f} MB")
            if repeat:
                seconds[i].append(spent)
                memory[i].append(peak)
            elif i == 0:
                twin = gradient(policy)
                errors.append(None)
            else:
                errors.append(relative_error(gradient(policy), twin))
        limit.append(gemm_rate(shapes))
        square.append(gemm_rate(SQUARE))
    flops, count, gemm = useful_flops(pairs, SHAPES[shape]), tokens_of(pairs), statistics.median(limit)
    rows = []
    for i, variant in enumerate(variants):
        spent = statistics.median(seconds[i])
        rows.append(
            {
                "variant": variant.name,
                "dtype": variant.dtype,
                "checkpointing": variant.checkpointing,
                "seconds": spent,
                "spread": [min(seconds[i]), max(seconds[i])],
                "tokens_per_second": count / spent,
                "memory": statistics.median(memory[i]),
                "limit_share": flops / spent / gemm,
                "gradient_error": errors[i],
            }
        )
    setup = {"pairs": len(pairs), "tokens": count, "tokens_per_microbatch": tokens, "repeats": repeats}
    save(
        f"step-{shape}-{mix}",
        {"shape": shape, "mix": mix, "gemm": gemm, "square_gemm": statistics.median(square), **setup, "rows": rows},
    )


def step(variant: Variant, optimizer: AdamW) -> tuple[float, float]:
    """CPU seconds of forward, backward and optimizer, and MB that forward and backward needed at most, gradients included.

    Leaves the step's gradient in the parameters.
    """
    optimizer.zero_grad()
    before = reset_peak()
    start = time.process_time()
    variant.backward()
    seconds = time.process_time() - start
    peak = status("VmHWM") - before
    start = time.process_time()
    optimizer.step()
    return seconds + time.process_time() - start, peak


def relative_error(gradient: Sequence[Tensor], twin: Sequence[Tensor]) -> float:
    """Of the gradient as a whole."""
    pairs = list(zip(gradient, twin, strict=True))
    off = sum((g.double() - t.double()).square().sum().item() for g, t in pairs)
    return math.sqrt(off / sum(t.double().square().sum().item() for _, t in pairs))


def reset_peak() -> float:
    """Give freed memory back, start a new peak; MB now."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def gemm_rate(shapes: Sequence[tuple[int, int, int, int]], repeats: int = 5) -> float:
    """FLOP/s of fp32 matrix products [m, k] @ [k, n], each `times` times, in memory that is there already."""
    flops = seconds = 0.0
    for m, k, n, times in shapes:
        a, b, out = torch.randn(m, k), torch.randn(n, k), torch.empty(m, n)  # b as nn.Linear keeps it
        spent = []
        for _ in range(repeats):
            start = time.process_time()
            torch.mm(a, b.T, out=out)
            spent.append(time.process_time() - start)
        flops += times * 2 * m * k * n
        seconds += times * statistics.median(spent)
    return flops / seconds


def products(config: LlamaConfig, tokens: int, response_tokens: int) -> list[tuple[int, int, int, int]]:
    """The matrix products of a micro-batch's step: each layer's and the head's, forward and both backward."""
    hidden, inner = config.hidden_size, config.intermediate_size
    key_value = hidden // config.num_attention_heads * config.num_key_value_heads
    body = ((hidden, hidden, 2), (hidden, key_value, 2), (hidden, inner, 2), (inner, hidden, 1))
    of = [(tokens, i, o, config.num_hidden_layers * times) for i, o, times in body]
    of.append((response_tokens, hidden, config.vocab_size, 1))
    return [shape for m, i, o, times in of for shape in ((m, i, o, times), (m, o, i, times), (o, m, i, times))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--mix", choices=MIXES, action="append")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024, help="data.tokens_per_microbatch")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    set_verbosity_error()
    disable_progress_bar()
    for shape in chosen.shape or SHAPES:
        for mix in chosen.mix or MIXES:
            measure(shape, mix, chosen.repeats, chosen.tokens)
            write_results()


if __name__ == "__main__":
    main()
