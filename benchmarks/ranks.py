"""Ranks against one process: optimizer steps a second of the very `trainer.fit` that a run makes, by DDP over gloo.

    python -m benchmarks.ranks                          2 ranks x 1 thread against 1 x 1: small, chat (some minutes)
    python -m benchmarks.ranks --shape 135M --mix short

Both make the same steps of the same pairs, under the presets trainer=cpu and trainer=ddp_cpu; they take turns, each time
in fresh processes. A rate is of the steps after the first two, by the wall. Writes outputs/benchmarks/ and
benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.results import save, write_results
from benchmarks.workload import MIXES, PAIRS, SHAPES, make_models, make_pairs, tokens_of
from dpo_lab.config.schema import conf_dir, register
from dpo_lab.core.losses import DPO
from dpo_lab.data.datamodule import PreferenceDataModule, StepSampler
from dpo_lab.models.forward import select_forward
from dpo_lab.models.reference import Uniform
from dpo_lab.training.dpo_module import DPOModule
from dpo_lab.training.optim import Optim
from dpo_lab.training.torch_setup import setup_torch

WARM_UP = 2  # steps: DDP lays its buckets out in the first one
PRESETS = {1: "cpu", 2: "ddp_cpu"}


class Rate(Callback):
    """Wall and CPU seconds of the steps after the warm-up."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        now = (time.perf_counter(), time.process_time())
        if trainer.global_step == WARM_UP:
            self.start = now
        self.wall, self.cpu = (n - s for n, s in zip(now, getattr(self, "start", now), strict=True))


def fit(shape: str, mix: str, world_size: int, steps: int, tokens: int) -> dict[str, float]:
    """One rank's seconds a step; pairs differ from step to step."""
    setup_torch(threads=1, on_cpu=True)
    model, _ = make_models(shape)
    select_forward(model)
    count, batch = WARM_UP + steps, PAIRS[shape, mix]
    pairs = make_pairs(mix, count * batch, SHAPES[shape].vocab_size)
    reference = Uniform().prepare(model, pairs, None)  # as cheap in a step as one that is looked up
    sizes = dict(total_steps=count, batch_size=batch, tokens_per_microbatch=tokens)
    module = DPOModule(model, DPO(), reference, Optim(lr=1e-5), **sizes)
    rate = Rate()
    quiet = dict(logger=False, enable_checkpointing=False, limit_val_batches=0, use_distributed_sampler=False)
    register()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        node = compose("train", [f"trainer={PRESETS[world_size]}", f"trainer.max_steps={count}"]).trainer
    trainer: Trainer = instantiate(node, callbacks=[rate], **quiet)
    trainer.fit(module, datamodule=PreferenceDataModule(pairs, [], batch_size=batch, num_workers=0, seed=0))
    assert trainer.global_step == count
    return {"wall": rate.wall / steps, "cpu": rate.cpu / steps}


def by_ranks(world_size: int, arguments: Sequence[str]) -> list[dict[str, float]]:
    """What each rank measured, in fresh processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "benchmarks.ranks", "--as-rank-of", str(world_size), *arguments]
    ranks = []
    for rank in range(world_size):
        of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "OMP_NUM_THREADS": "1"}
        environment = os.environ | ((shared | of_rank) if world_size > 1 else {"OMP_NUM_THREADS": "1"})
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit("a rank failed; its error stands above")
    return [json.loads(output.strip().splitlines()[-1]) for output in outputs]


def imbalance(shape: str, mix: str, steps: int) -> float:
    """Tokens of the rank that has more of a step, over half of the step's: the mean over steps."""
    batch = PAIRS[shape, mix]
    sizes = [pair.size for pair in make_pairs(mix, (WARM_UP + steps) * batch, SHAPES[shape].vocab_size)]
    ratios = []
    for start in range(0, len(sizes), batch):
        of_step = sizes[start : start + batch]
        loads = [sum(of_step[pair] for pair in StepSampler(of_step, batch, 0, rank, 2).step(0)) for rank in (0, 1)]
        ratios.append(2 * max(loads) / sum(loads))
    return statistics.mean(ratios)


def measure(shape: str, mix: str, steps: int, repeats: int, tokens: int) -> None:
    """One row: both take turns `repeats` times."""
    arguments = ["--shape", shape, "--mix", mix, "--steps", str(steps), "--tokens", str(tokens)]
    seconds: dict[int, list[float]] = {1: [], 2: []}
    cpu: dict[int, list[float]] = {1: [], 2: []}
    for repeat in range(repeats):
        for world_size in (1, 2):
            found = by_ranks(world_size, arguments)
            seconds[world_size].append(max(rank["wall"] for rank in found))
            cpu[world_size].append(sum(rank["cpu"] for rank in found))
            print(f"{shape} {mix} {repeat + 1}/{repeats} {world_size} x 1: {seconds[world_size][-1]:.3f} s", flush=True)
    pairs = make_pairs(mix, (WARM_UP + steps) * PAIRS[shape, mix], SHAPES[shape].vocab_size)
    gradients = sum(p.numel() for p in LlamaForCausalLM(SHAPES[shape]).parameters())
    save(
        f"ranks-{shape}-{mix}",
        {
            "shape": shape,
            "mix": mix,
            "pairs": PAIRS[shape, mix],
            "tokens": tokens_of(pairs) / (WARM_UP + steps),
            "tokens_per_microbatch": tokens,
            "steps": steps,
            "repeats": repeats,
            "gradient_megabytes": 4 * gradients / 1e6,
            "imbalance": imbalance(shape, mix, steps),
            "rows": [
                {
                    "ranks": ranks,
                    "seconds": statistics.median(seconds[ranks]),
                    "spread": [min(seconds[ranks]), max(seconds[ranks])],
                    "cpu": statistics.median(cpu[ranks]),
                }
                for ranks in (1, 2)
            ],
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--mix", choices=MIXES, default="chat")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024, help="data.tokens_per_microbatch")
    parser.add_argument("--as-rank-of", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    disable_progress_bar()
    if chosen.as_rank_of:
        print(json.dumps(fit(chosen.shape, chosen.mix, chosen.as_rank_of, chosen.steps, chosen.tokens)))
    else:
        torch.set_num_threads(1)
        measure(chosen.shape, chosen.mix, chosen.steps, chosen.repeats, chosen.tokens)
        write_results()


if __name__ == "__main__":
    main()
