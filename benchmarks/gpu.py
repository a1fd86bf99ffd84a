"""A paper estimate for GPUs, on which nothing here was measured: FLOPs, memory and traffic of a DPO step, ours and the peers'.

    python -m benchmarks.gpu        writes benchmarks/GPU.md

Every figure is computed from a model's shape, a pair's lengths and the assumptions below.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dpo_lab.core.fused_lm_head import GPU_ROWS, GPU_SHARE
from dpo_lab.planning import shapes
from dpo_lab.planning.shapes import Work

PAGE = Path(__file__).with_name("GPU.md")


@dataclass(frozen=True)
class Shape:
    """A Llama-like model: H hidden, L layers, K width of keys, F inner, V vocabulary."""

    name: str
    hidden: int
    layers: int
    key_value: int
    inner: int
    vocabulary: int
    tied: bool

    @property
    def costs(self) -> shapes.Shape:
        return shapes.Shape.llama(self.hidden, self.layers, self.key_value, self.inner, self.vocabulary)

    @property
    def body(self) -> int:
        """Parameters of all layers' matrices, embeddings left out."""
        return self.costs.body

    @property
    def parameters(self) -> int:
        return self.body + (1 if self.tied else 2) * self.hidden * self.vocabulary

    def activations(self, tokens: float) -> float:
        """Bytes that autograd keeps for `tokens` tokens of the body in bf16 autocast, the residual stream in fp32.

        A layer keeps: two norms' inputs and normalised outputs (fp32), their bf16 copies for the products, q, k and v
        and their rotated twins, the attention's output, gate, up, the gated product and the activation (bf16).
        """
        hidden, key_value, inner = self.hidden, self.key_value, self.inner
        return (
            tokens * self.layers * (4 * 4 * hidden + 2 * (2 * hidden + 2 * hidden + 3 * key_value + hidden + 4 * inner))
        )

    def checkpoints(self, tokens: float) -> float:
        """Bytes kept under gradient checkpointing: a layer's input each, and one layer whole."""
        return tokens * self.layers * 4 * self.hidden + self.activations(tokens) / self.layers


@dataclass(frozen=True)
class Pair:
    """Median tokens of a mix."""

    name: str
    prompt: int
    response: int

    def work(self, shared_prompt: bool) -> Work:
        return Work.of_pair(self.prompt, self.response, shared_prompt=shared_prompt)


@dataclass(frozen=True)
class Trainer:
    """Which work a trainer does. head_products: products of response rows with the head's weight in a step, 3 if logits
    are computed once; None: all rows are scored at once, and their logits held. padding: padded tokens over real ones.
    pairs: in a micro-batch.
    """

    name: str
    shared_prompt: bool
    head_products: int | None
    reference_each_step: bool
    checkpointing: bool
    padding: float
    pairs: int = 4

    def flops(self, shape: Shape, pair: Pair) -> float:
        """Of one pair in one step: forward, backward (twice a forward), and the forwards that are made again."""
        work = pair.work(self.shared_prompt)
        tokens = self.padding * work.tokens
        work = replace(work, tokens=tokens, rows=tokens if self.head_products is None else work.rows)
        forward, head = shape.costs.body_flops(work), shape.costs.head_flops(work)
        products = self.head_products or 3
        return (3 + self.checkpointing) * forward + products * head + self.reference_each_step * (forward + head)

    def activation_bytes(self, shape: Shape, pair: Pair) -> float:
        """What grows with the tokens of a micro-batch, and the logits."""
        work = pair.work(self.shared_prompt)
        tokens = self.pairs * self.padding * work.tokens
        body = shape.checkpoints(tokens) if self.checkpointing else shape.activations(tokens)
        if self.head_products is None:  # bf16 logits, their fp32 copy and its gradient
            return body + tokens * shape.vocabulary * (2 + 4 + 4)
        rows = self.pairs * work.rows
        ours, trl = (min(most, rows) * columns for most, columns in ((GPU_ROWS, shape.vocabulary), TRL_TILE))
        return body + (ours * (4 + 2) if self.head_products == 3 else trl * 2)

    def state_bytes(self, shape: Shape) -> float:
        """Weights, gradients and Adam's two moments in fp32, a bf16 copy under autocast, the reference in bf16."""
        return shape.parameters * (16 + 2 + 2 * self.reference_each_step)


SHAPES = (
    Shape("0.5B (Qwen2.5)", 896, 24, 128, 4864, 151936, tied=True),
    Shape("8B (Llama 3.1)", 4096, 32, 1024, 14336, 128256, tied=False),
    Shape("70B (Llama 3.1)", 8192, 80, 1024, 28672, 128256, tied=False),
)
PAIRS = (Pair("chat", 200, 150), Pair("long", 600, 100), Pair("short", 16, 32))
OURS = Trainer("ours", True, 3, False, False, 1.0)
OURS_CHECKPOINTED = Trainer("ours, checkpointing", True, 3, False, True, 1.0)
ORIGINAL = Trainer("original loop", False, None, True, False, 1.3)
TRL = Trainer("TRL, its defaults", False, 4, True, True, 1.3)  # 1.16 on a GPU
TUNED = Trainer("TRL tuned", False, 4, False, False, 1.0, pairs=1)
TRAINERS = (OURS, OURS_CHECKPOINTED, ORIGINAL, TRL, TUNED)

# An H100 SXM, from its data sheet but for the share of the peak that a training step reaches.
PEAK, REACHED = 989e12, 0.45  # bf16 FLOP/s without sparsity
MEMORY = 80e9
NVLINK, NETWORK = 450e9, 50e9  # bytes/s of one GPU, one way; network: 400 Gbit/s a GPU
GPUS = 8
TRL_TILE = (4096, 32768)  # rows and columns of TRL's tiles of logits, in bf16
LAUNCH = 5e-6  # seconds a kernel launch
# Launches of attention under autocast, both ways, counted in tests/models/test_varlen.py: a layer by the variable-length
# kernel, of which each pass counts as one, and a layer and pair by a loop.
KERNELS, LOOPED = 12, 19


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def flops_table() -> list[str]:
    rows = [
        [shape.name, pair.name, f"{OURS.flops(shape, pair) / 1e12:.2f}"]
        + [f"{t.flops(shape, pair) / OURS.flops(shape, pair):.2f}" for t in TRAINERS[1:]]
        for shape in SHAPES
        for pair in PAIRS
    ]
    return table(["model", "pairs", "ours, TFLOP a pair", *(f"{t.name}, times ours" for t in TRAINERS[1:])], rows)


def speed_table() -> list[str]:
    """Pairs a second of one GPU if products are all that counts."""
    rows = [[t.name] + [f"{PEAK * REACHED / t.flops(shape, PAIRS[0]):.3g}" for shape in SHAPES] for t in TRAINERS]
    return table(["chat", *(s.name for s in SHAPES)], rows)


def memory_table() -> list[str]:
    rows = []
    for shape in SHAPES:
        for t in TRAINERS:
            state, moving = t.state_bytes(shape) / 1e9, t.activation_bytes(shape, PAIRS[0]) / 1e9
            sharded = [state / n + moving for n in (1, GPUS, 8 * GPUS)]
            fits = ["yes" if total < MEMORY / 1e9 else "no" for total in sharded]
            cells = [f"{total:.0f} ({fit})" for total, fit in zip(sharded, fits, strict=True)]
            rows.append([shape.name, t.name, f"{state:.0f}", f"{moving:.1f}", *cells])
    head = ["model", "trainer", "states, GB", "a micro-batch, GB", "one GPU or DDP", "FSDP over 8", "FSDP over 64"]
    return table(head, rows)


def traffic_table() -> list[str]:
    """What a step sends, and how much work hides it."""
    rows = []
    for shape in SHAPES:
        gradient = 4 * shape.parameters * 2 * (GPUS - 1) / GPUS  # ring all-reduce, fp32
        pairs = gradient / NVLINK * PEAK * REACHED / OURS.flops(shape, PAIRS[0])
        rows.append([shape.name, f"{gradient / 1e9:.1f}", f"{1e3 * gradient / NVLINK:.0f}", f"{pairs:.1f}"])
    return table(["model", "DDP, GB a step", "ms over NVLink", "chat pairs a GPU that take as long"], rows)


def hidden_tokens(bandwidth: float) -> float:
    """Tokens of a micro-batch on one GPU whose products take as long as FSDP's traffic of one micro-batch.

    FSDP gathers bf16 weights twice and scatters fp32 gradients once: 8 bytes a parameter, 6 FLOPs a parameter and token.
    """
    return 8 / bandwidth * PEAK * REACHED / 6


def launch_table() -> list[str]:
    rows = []
    for shape in SHAPES:
        products = OURS.flops(shape, PAIRS[0]) / (PEAK * REACHED)
        launches = [count * shape.layers * LAUNCH for count in (LOOPED, KERNELS / 4)]
        cells = [f"{1e3 * each:.2f} ({each / products:.0%})" for each in launches]
        rows.append([shape.name, f"{1e3 * products:.2f}", *cells])
    return table(
        ["model", "products of a chat pair, ms", "launches of a loop, ms", "one call a layer, 4 pairs, ms"], rows
    )


def prose(*sentences: str) -> list[str]:
    return [*textwrap.wrap(" ".join(sentences), 120), ""]


def page() -> str:
    eight, chat = SHAPES[1], PAIRS[0]
    gain = {t.name: t.flops(eight, chat) / OURS.flops(eight, chat) for t in TRAINERS}
    lines = [
        "# An estimate for GPUs, not a measurement",
        "",
        *prose(
            "Written by `python -m benchmarks.gpu`. **Nothing here was measured**: no GPU was available. The",
            "numbers are computed",
            "from model shapes, lengths and a data sheet (H100 SXM).",
        ),
        *prose(
            f"Summary: for 8B on chat pairs a DPO Lab step needs 1/{gain[TRL.name]:.1f} of the FLOPs of TRL's defaults and",
            f"1/{gain[TUNED.name]:.1f} of TRL tuned. Attention is one variable-length kernel a layer: for a 0.5B",
            "model a loop over pairs would cancel the gain. Optimizer states, not activations, decide what fits.",
        ),
        "## FLOPs",
        "",
        *prose(
            "FLOPs per pair: `2 Nb` per token and forward pass of the body, `2 H V` per scored row, `4 H L` per",
            "pair of tokens",
            "that attend; a backward pass counts as two forward passes. Ours: the prompt once, only response rows scored,",
            "the reference from the cache. TRL 1.16, read from its source: the prompt twice; on a GPU only response rows are",
            "scored, in tiles that are computed again in the backward pass (4 products where ours takes 3). At its defaults a",
            "reference forward pass and one more for checkpointing; with padding, a batch of several pairs has",
            f"{TRL.padding:.1f} tokens per real token, as the chat mix of workload.py at 4 pairs. TRL tuned: single pairs, no",
            "reference forward pass, no checkpointing.",
        ),
        *flops_table(),
        f"Pairs per second on one GPU, counting matrix products only, at {REACHED:.0%} of {PEAK / 1e12:.0f} TFLOP/s:",
        "",
        *speed_table(),
        *prose(
            "With the cache, a step costs 1 / (epochs x runs) of a reference forward pass: in a sweep of 5 betas",
            "and 2 epochs a",
            "tenth of the cost of running it in every step.",
        ),
        "## Memory",
        "",
        *prose(
            "States: fp32 weights, gradients and Adam's moments, 16 bytes per parameter, 2 more for autocast's",
            "copies, 2",
            "more for a bf16 reference if there is one. A micro-batch: activations and logits of 4 chat pairs, of one pair",
            "for TRL tuned.",
        ),
        *memory_table(),
        *prose(
            "Ours grows with `data.tokens_per_microbatch`, not with the batch size. The head holds the logits of at most",
            f"{GPU_ROWS:,} rows, and no more than {GPU_SHARE:.1%} of the GPU's memory.",
        ),
        "## Traffic",
        "",
        *prose(
            "DDP sums fp32 gradients once per step for any number of micro-batches (only the last backward pass syncs):"
        ),
        *traffic_table(),
        *prose(
            "FSDP transfers the weights in every micro-batch, so a micro-batch must be large enough to hide",
            "that, for any model",
            f"size: {hidden_tokens(NVLINK):,.0f} tokens per GPU over NVLink, {hidden_tokens(NETWORK):,.0f} over",
            "the network",
            "(sharding only within a node avoids that). On GPUs, set `data.tokens_per_microbatch` as large as",
            "memory allows,",
            "instead of a laptop's 2,048.",
        ),
        "## What limits it",
        "",
        *prose(
            "In bf16 and fp16, on NVIDIA GPUs since Ampere, attention over shared prompts is one call of",
            "`torch.nn.attention.varlen` a layer, for any number of pairs and responses: keys and values are the stream",
            "with each prompt repeated before its second and later responses. In float32, and on older GPUs, it is a loop",
            f"over responses. Both passes of a layer are {KERNELS} launches by the kernel, {LOOPED} a pair by the loop,",
            f"{1e6 * LAUNCH:.0f} us each:",
        ),
        *launch_table(),
        *prose(
            "**The kernel has never run here.** Its layout, its gradients and whole runs that use it were tested on a CPU,",
            "with the kernel emulated by its documented contract. `make test-gpu` compares it with the emulation and the",
            "loop. A step of 16 chat pairs in one micro-batch, with Qwen2.5-0.5B's 24 layers and heads, narrower, under",
            "autocast, is 3,181 operators, of which 299 are casts; 3,851 with autocast's own casts. Counted by",
            "`python -m benchmarks.launches` on a CPU; some operators launch several kernels.",
        ),
        "## On a real GPU",
        "",
        *prose(
            "`python -m benchmarks.gpu_session` checks and measures in one script of at most 15 minutes, and prints tables:",
            "`make test-gpu`; runs that repeat, resume and share no reference cache with the CPU; exactness and rounding of",
            "every path; step times, launches and memory against TRL, whole and with LoRA; chunks of the head; sampling; the",
            "line of a run out of memory. **It has never run on a GPU**; with `--device cpu --scale tiny` it rehearses on a",
            "CPU, which its tests do.",
        ),
        "What its figures will tell of this page:",
        "",
        *CHECKS,
        "",
    ]
    return "\n".join(lines)


CHECKS = (
    "- `exactness`, `tests`: the kernel's causal alignment and backward pass, against padded rows in float32.",
    "- `rounding`: whether the step-0 check's tolerance for bf16 (dpo_lab/training/step_zero.py) holds there.",
    f"- `steps`: the {REACHED:.0%} above; launches against the {LAUNCH * 1e6:.0f} us each; peak memory against the table.",
    "- `head`: its softmax is memory-bound, 12 bytes per logit; how many rows a chunk should have.",
    "- Not in it: several GPUs. DDP over NCCL has one sync per step; FSDP2 shards the head's weight as well.",
)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(page())
