"""Make the initial policy of the synthetic task by supervised fine-tuning, once, cached by content."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.splits import TRAIN
from dpo_lab.data.tasks.base import Task
from dpo_lab.errors import check_at_least
from dpo_lab.models.policy import Init, Policy, TinyPolicy, load_policy
from dpo_lab.runs.cache import cached
from dpo_lab.training.optim import Optim, OptimKind


@dataclass
class SFT:
    """Settings of supervised fine-tuning on the task's reviews: `steps` steps of `batch_size` reviews, each used once.

    For supervised fine-tuning on the user's rows trainer.max_steps and optim apply instead, and only text_column is
    used: the column of texts without a prompt (None: rows are pairs, and the chosen responses are learned).
    """

    steps: int = 256
    batch_size: int = 32
    optim: Optim = field(default_factory=lambda: Optim(lr=4e-3, beta2=0.95, weight_decay=0.01))
    text_column: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            check_at_least(f"sft.{name}", getattr(self, name), 1, 256)


def initial_policy(tiny: TinyPolicy, sft: SFT, task: Task, seed: int, cache: Path) -> tuple[Policy, Path]:
    """Return the initial policy of the synthetic task and its folder, from the cache or trained and stored there.

    The folder's name is a hash of everything that determines the policy: training texts, settings, seed.
    """
    from dpo_lab.models.tokenizer import train_tokenizer

    texts = task.texts(TRAIN, sft.steps * sft.batch_size, derive_seed(seed, "sft/reviews"))
    # `kind` is left out at its default: it is newer than policies in caches
    optim = {name: value for name, value in asdict(sft.optim).items() if (name, value) != ("kind", OptimKind.adamw)}
    inputs = {
        "tiny": asdict(replace(tiny, gradient_checkpointing=False)),  # which does not change the policy
        "sft": {"steps": sft.steps, "batch_size": sft.batch_size, "optim": optim},
        "seed": seed,
        "format": 4,
    }
    digest = hashlib.blake2b(json.dumps([inputs, texts]).encode(), digest_size=8).hexdigest()
    folder = cache / f"policy-{digest}"

    def make(folder: Path) -> None:
        tokenizer = train_tokenizer(texts, tiny.vocab_size)
        policy = Policy(tiny.build(tokenizer, derive_seed(seed, "init")), tokenizer)
        if tiny.init is Init.sft:
            train_on_texts(policy, texts, sft, seed, append_eos=task.complete_texts)
        policy.save(folder)

    cached(folder, make)
    return load_policy(folder), folder


def train_on_texts(policy: Policy, texts: Sequence[str], sft: SFT, seed: int, append_eos: bool = True) -> None:
    """Train policy.model in place on texts after a begin token, with an end token appended if `append_eos`."""
    from dpo_lab.core.logps import pad_rows, sequence_logps
    from dpo_lab.data.collate import collate_responses
    from dpo_lab.terminal.progress import track

    tokenizer = policy.tokenizer
    begin, pad_id = [int(tokenizer.bos_token_id)], int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    end = [tokenizer.eos_token_id] if append_eos else []
    rows = [[*ids, *end] for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    # not fused, which rounds differently: policies in caches were trained so
    optimizer, schedule = sft.optim.build(policy.model.parameters(), sft.steps, fused=False)
    policy.model.train()
    with track("Initial policy (SFT)", sft.steps) as advance:
        for batch in _batches(rows, sft, seed):
            input_ids, labels = pad_rows(*collate_responses([begin] * len(batch), batch), pad_id)
            sums, counts = sequence_logps(policy.model(input_ids=input_ids, use_cache=False).logits, labels)
            loss = -sums.sum() / counts.sum()
            optimizer.zero_grad()
            loss.backward()
            sft.optim.clip(policy.model.parameters())
            optimizer.step()
            schedule.step()
            advance(1, [f"loss {loss.item():.3f}"])
    policy.model.eval()


def _batches(rows: list[list[int]], sft: SFT, seed: int, window: int = 16) -> list[list[list[int]]]:
    """Return batches of rows of similar length: rows are sorted within each window of batches, whose batches are
    shuffled.
    """
    rng = random.Random(derive_seed(seed, "sft/order"))
    batches = []
    for start in range(0, len(rows), window * sft.batch_size):
        pool = sorted(rows[start : start + window * sft.batch_size], key=len)
        of_window = [pool[i : i + sft.batch_size] for i in range(0, len(pool), sft.batch_size)]
        rng.shuffle(of_window)
        batches += of_window
    return batches
