"""One DPO step against the peers: tokens per CPU-second, memory, share of the GEMM limit, exactness.

    python -m benchmarks.step                          every shape and mix (about two hours of one core)
    python -m benchmarks.step --shape small --mix chat

Variants take turns in one process, on one thread, over the same pairs and parameters. A first round tells memory and
exactness, under the C library's own ways; for the timed rounds the process keeps freed memory, as our runs do, whoever's
turn it is. Times are medians. Writes outputs/benchmarks/ and benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import LlamaConfig
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from benchmarks.results import save, write_results
from benchmarks.variants import Variant, all_variants, gradient
from benchmarks.workload import MIXES, PAIRS, SHAPES, make_models, make_pairs, tokens_of, useful_flops
from dpo_lab.training.torch_setup import keep_memory

SQUARE = [(1536, 1536, 1536, 1)]


def measure(shape: str, mix: str, repeats: int, tokens: int) -> None:
    """One table: every variant on one shape and mix."""
    policy, reference = make_models(shape)
    pairs = make_pairs(mix, PAIRS[shape, mix], SHAPES[shape].vocab_size)
    optimizer = AdamW(policy.parameters(), lr=0.0, fused=True)  # all of its arithmetic, and weights that stay
    variants = list(all_variants(policy, reference, pairs, tokens))
    seconds: list[list[float]] = [[] for _ in variants]
    memory: list[float] = []
    errors: list[float | None] = []
    shapes = products(
        SHAPES[shape], tokens, tokens * sum(p.size - len(p.prompt) for p in pairs) // sum(p.size for p in pairs)
    )
    limit, square = [gemm_rate(shapes)], [gemm_rate(SQUARE)]
    twin: list[Tensor] = []
    for variant in variants:
        optimizer.zero_grad()
        memory.append(peak_memory(variant.backward))
        print(f"{shape} {mix} {variant.name} {variant.dtype}: {memory[-1]:.0f} MB", flush=True)
        twin = twin or gradient(policy)  # of the first one
        errors.append(None if variant is variants[0] else relative_error(gradient(policy), twin))
    keep_memory()
    for repeat in range(repeats):
        for variant, spent in zip(variants, seconds, strict=True):
            spent.append(step(variant, optimizer))
            print(f"{shape} {mix} {repeat + 1}/{repeats} {variant.name} {variant.dtype}: {spent[-1]:.2f} s", flush=True)
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
                "memory": memory[i],
                "limit_share": flops / spent / gemm,
                "gradient_error": errors[i],
            }
        )
    setup = {"pairs": len(pairs), "tokens": count, "tokens_per_microbatch": tokens, "repeats": repeats}
    save(
        f"step-{shape}-{mix}",
        {"shape": shape, "mix": mix, "gemm": gemm, "square_gemm": statistics.median(square), **setup, "rows": rows},
    )


def step(variant: Variant, optimizer: AdamW) -> float:
    """CPU seconds of forward, backward and optimizer; leaves the step's gradient in the parameters."""
    optimizer.zero_grad()
    start = time.process_time()
    variant.backward()
    optimizer.step()
    return time.process_time() - start


def peak_memory(work: Callable[[], object]) -> float:
    """MB that `work` needed at most beyond what was held before it."""
    before = reset_peak()
    work()
    return status("VmHWM") - before


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
    tables = [(shape, mix) for shape in chosen.shape or SHAPES for mix in chosen.mix or MIXES]
    if len(tables) == 1:
        measure(*tables[0], chosen.repeats, chosen.tokens)
        write_results()
    else:
        for shape, mix in tables:  # a process each: memory is told from a fresh one
            options = ("--repeats", str(chosen.repeats), "--tokens", str(chosen.tokens))
            subprocess.run(
                [sys.executable, "-m", "benchmarks.step", "--shape", shape, "--mix", mix, *options], check=True
            )


if __name__ == "__main__":
    main()
