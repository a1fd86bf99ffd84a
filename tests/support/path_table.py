"""The table of docs/architectures.md: the path of each architecture, measured; run as a module to write it."""

from __future__ import annotations

import copy
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_lab.core import fused_lm_head
from dpo_lab.data.collate import collate_responses
from dpo_lab.models.forward import response_logps, response_nll, select_forward
from dpo_lab.models.paths import path_of
from tests.support.architectures import CACHED, UNCACHED, VOCABULARY, made

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
LENGTHS = [(9, 5), (3, 8), (1, 4), (6, 1)]  # tokens of prompt and response
CHUNK = 4  # rows of logits that a chunk may have
PADDED = len(LENGTHS) * max(map(sum, LENGTHS))  # rows of logits of the whole batch


def rows() -> list[tuple[list[int], list[int]]]:
    draws = random.Random(0)
    return [tuple([draws.randrange(3, VOCABULARY) for _ in range(n)] for n in lengths) for lengths in LENGTHS]  # type: ignore[misc]


def batch() -> Any:
    """The rows as a packed stream, and its lengths."""
    prompts, responses = zip(*rows(), strict=True)
    return collate_responses(prompts, responses)


def alone(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of one row, without padding and without a cache."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@torch.no_grad()
def log_probability(model: Any, prompt: list[int], response: list[int]) -> float:
    logits = alone(model, prompt + response).double().log_softmax(-1)[len(prompt) - 1 : -1]
    return float(logits.gather(1, torch.tensor(response)[:, None]).sum())


class LogitRows(TorchDispatchMode):
    """Notes the most rows of logits that any operator returns; views of the head's weight are not logits."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_view = any(returned.alias_info is not None for returned in func._schema.returns)
        if isinstance(result, torch.Tensor) and not is_view and result.shape[-1:] == (VOCABULARY,):
            self.most = max(self.most, result.numel() // VOCABULARY)
        return result


@dataclass(frozen=True)
class Row:
    """What an architecture does. held: the most rows of logits at once, in a forward and a backward pass."""

    name: str
    shares_prompts: bool
    why: str
    difference: float
    held: int

    @property
    def line(self) -> str:
        """The row of the table; the difference is rounded up to a power of ten."""
        path = "shared prompts" if self.shares_prompts else "padded rows"
        bound = f"1e{math.ceil(math.log10(max(self.difference, 1e-6)))}"
        logits = "a chunk" if self.held <= CHUNK else "all rows"
        reasons = [] if self.shares_prompts else re.findall(r"because (.*?)(?=;|$)", self.why)
        return f"| {self.name} | {path} | {logits} | {bound} | {'; '.join(reasons)} |"


def measure(name: str) -> Row:
    original = made(*(CACHED | UNCACHED)[name], scale=3.0)
    model = copy.deepcopy(original)
    select_forward(model)
    with torch.no_grad():
        found = response_logps(model, *batch())[:, 0].tolist()
    exact = [log_probability(original, prompt, response) for prompt, response in rows()]
    difference = max(abs(one - two) for one, two in zip(found, exact, strict=True))
    with patch.object(fused_lm_head, "ROWS", CHUNK), LogitRows() as seen:
        response_nll(model, *batch()).backward()
    path = path_of(model)
    return Row(name, path.shares_prompts, path.why, difference, seen.most)


def main() -> None:
    head, _ = PAGE.read_text().split("|---|---|---|---|---|\n")
    table = "\n".join(measure(name).line for name in CACHED | UNCACHED)
    PAGE.write_text(f"{head}|---|---|---|---|---|\n{table}\n")


if __name__ == "__main__":
    main()
