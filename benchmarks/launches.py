"""Count the operators that a step launches on a GPU, by kind, without one: on a pretended GPU, under bf16 autocast.

    python -m benchmarks.launches [PAIRS ...] [--tokens N] [--plain]        default: 4 16, micro-batches of 8192 tokens

A model of Qwen2.5-0.5B's 24 layers, narrower and with fewer words, as the number depends on neither; pieces of logits are
those of a GPU of 80 GB. Views and allocations are left out; the attention kernel counts as one. One operator may launch
several kernels, as a fused optimizer step does. --plain: with autocast's own casts in linear layers.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from dpo_lab.core import fused_lm_head
from dpo_lab.core.losses import DPO
from dpo_lab.core.pairs import EncodedPair
from dpo_lab.data.collate import collate
from dpo_lab.models.autocast_linear import LinearCasts
from dpo_lab.models.forward import disable_dropout, select_forward
from dpo_lab.models.reference import Uniform
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.optim import Optim
from tests.support.pretend_cuda import DEVICE, pretend_cuda

LAYERS = 24
SHAPE = dict(vocab_size=500, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1)
SIZES = (50, 37, 35)  # tokens: a quarter of a chat pair's, and pieces of logits have a quarter of the rows
CAST = "casts"


class Operators(TorchDispatchMode):
    """Counts the operators that a GPU computes, a cast to another dtype by the name CAST."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(
            returned.alias_info is not None and not returned.alias_info.is_write for returned in func._schema.returns
        ):
            name = func.name().removeprefix("aten::").split(".")[0]
            if not re.search("empty|pin|_unsafe_view|record_function", name):
                self.counts[CAST if name == "_to_copy" and (kwargs or {}).get("dtype") is not None else name] += 1
        return func(*args, **(kwargs or {}))


def pairs(count: int) -> list[EncodedPair]:
    return [EncodedPair(str(i), *([3 + i] * size for size in SIZES)) for i in range(count)]


@contextmanager
def counting(counts: dict[str, Counter[str]], phase: str) -> Iterator[None]:
    with Operators() as mode:
        yield
    counts.setdefault(phase, Counter()).update(mode.counts)


def step(count: int, tokens: int = 8192, layers: int = LAYERS, plain: bool = False) -> dict[str, Counter[str]]:
    """The operators of the second step of `count` chat pairs, by phase; metrics are counted on their own."""
    counts: dict[str, Counter[str]] = {}
    with pretend_cuda(), patch.object(fused_lm_head, "GPU_ROWS", fused_lm_head.GPU_ROWS // 4):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=layers, tie_word_embeddings=True, **SHAPE))
        select_forward(model)
        reference = Uniform().prepare(model, [], None)  # type: ignore[arg-type]
        optim = Optim()
        module = DPOModule(
            model, DPO(0.1), reference, optim, total_steps=9, batch_size=count, tokens_per_microbatch=tokens
        ).to(DEVICE)
        disable_dropout(model)
        optimizer, _ = optim.build(model.parameters(), 9)
        casts = LinearCasts([] if plain else module.models()).install()
        update, module.train_metrics.update = module.train_metrics.update, lambda *args: metrics.append(args)
        for _ in range(2):
            counts.clear()
            metrics: list[Any] = []
            with counting(counts, "copies of the batch"):
                batch = collate(pairs(count)).to(DEVICE)
            for part in batch.split(tokens // 4):
                with counting(counts, "forward"), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                    loss = module.part_loss(part)
                with counting(counts, "backward"):
                    (loss / count).backward()
            with counting(counts, "metrics"):
                for args in metrics:
                    update(*args)
            with counting(counts, "clip"):
                optim.clip(model.parameters())
            with counting(counts, "optimizer"):
                optimizer.step()
                casts.refresh()
                optimizer.zero_grad()
    return counts


def total(found: dict[str, Counter[str]]) -> int:
    return sum(counts.total() for counts in found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", type=int, default=[4, 16])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--kinds", type=int, default=12)
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    for count in options.pairs:
        found = step(count, options.tokens, plain=options.plain)
        print(f"{count} pairs: {total(found)} operators")
        for phase, counts in found.items():
            kinds = ", ".join(f"{name} {number}" for name, number in counts.most_common(options.kinds))
            print(f"  {phase:20} {counts.total():5}   {kinds}")


if __name__ == "__main__":
    main()
