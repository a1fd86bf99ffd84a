"""A whole sweep against a loop over TRL runs: five betas, two epochs each, from the command line to the saved policies.

    python -m benchmarks.end_to_end                 (about an hour of one core)
    python -m benchmarks.end_to_end --pairs 16 --part ours --part defaults

All start from the same policy folder and JSONL rows, compute in the same dtype, take the same steps and validate after
each epoch. CPU seconds are those of all processes: start-up, data and reference included; ours evaluates by sampling on
top of it. Writes outputs/benchmarks/ and benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import MEASURED, context, save, write_results
from benchmarks.workload import LONGEST, MIXES, SHAPES, make_models, make_pairs, make_tokenizer
from dpo_lab.data.splits import TRAIN, split_of

BETAS = ("0.05", "0.1", "0.3", "1", "5")
EPOCHS, BATCH, VALIDATION = 2, 8, 0.1
PARTS = {"ours": "ours, `--multirun`", "defaults": "TRL, its defaults, in a loop", "tuned": "TRL tuned, in a loop"}
FOLDER = MEASURED.resolve() / "end-to-end"


def make_material(shape: str, mix: str, pairs: int) -> int:
    """policy/ and rows in a new FOLDER, as many training pairs as asked for; gives the number of held-out ones."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    _, reference = make_models(shape)
    reference.save_pretrained(FOLDER / "policy")
    make_tokenizer(SHAPES[shape].vocab_size).save_pretrained(FOLDER / "policy")
    train, held_out = [], []
    for pair in make_pairs(mix, 4 * pairs, SHAPES[shape].vocab_size):
        prompt, chosen, rejected = (
            " ".join(f"w{t}" for t in side) for side in (pair.prompt, pair.chosen, pair.rejected)
        )
        row = {"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected}
        if split_of(prompt, VALIDATION) != TRAIN:
            held_out.append(row)
        elif len(train) < pairs:
            train.append(row)
        if len(train) == pairs and held_out:
            break
    assert held_out, "no pair fell among the held-out ones; type more --pairs"
    for name, rows in (("train", train), ("held-out", held_out), ("all", train + held_out)):
        (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(held_out)


def cpu_seconds(command: Sequence[str], folder: Path) -> float:
    """CPU seconds of a command with all that it starts, in a folder, one thread a process. Raises where it fails."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))  # of peers that lie elsewhere
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (folder / "log.txt").open("a") as log:
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(pairs: int, dtype: str) -> list[str]:
    """The sweep as a user types it."""
    steps = pairs // BATCH
    return [
        *(sys.executable, "-m", "dpo_lab.train", "--multirun", f"beta={','.join(BETAS)}"),
        *("policy=pretrained", f"policy.path={FOLDER / 'policy'}", f"data.path={FOLDER / 'all.jsonl'}"),
        *(f"data.batch_size={BATCH}", f"data.validation_fraction={VALIDATION}", f"data.max_length={LONGEST}"),
        *(f"data.max_prompt_length={LONGEST - 256}", "optim.lr=1e-6", "optim.warmup_steps=0"),
        *(f"trainer.max_steps={EPOCHS * steps}", f"trainer.val_check_interval={steps}"),
        f"trainer.precision={'bf16-mixed' if dtype == 'bf16' else '32-true'}",
    ]


def theirs(beta: str, dtype: str, tuned: bool) -> list[str]:
    """One TRL run."""
    settings = {
        "num_train_epochs": EPOCHS,
        "eval_strategy": "epoch",
        "per_device_train_batch_size": 1 if tuned else BATCH,
        "gradient_accumulation_steps": BATCH if tuned else 1,
        "checkpointing": not tuned,
        "precomputed": tuned,
    }
    options = ["--beta", beta, "--dtype", dtype, "--settings", json.dumps(settings)]
    return [sys.executable, "-m", "benchmarks.trl_run", *options]


def measure(part: str, pairs: int, dtype: str) -> dict[str, Any]:
    """One row of the table; ours comes with its CPU seconds by stage, over all jobs."""
    if part == "ours":
        seconds = cpu_seconds(ours(pairs, dtype), FOLDER)
        done = [json.loads(path.read_text()) for path in FOLDER.glob("outputs/**/run.json")]
        assert [r["status"] for r in done] == ["done"] * len(BETAS), "ours did not finish; see log.txt"
        assert {r["steps"] for r in done} == {EPOCHS * pairs // BATCH}
        stages = {stage: sum(r["seconds"][stage]["cpu"] for r in done) for stage in done[0]["seconds"]}
        return {"what": PARTS[part], "seconds": seconds, "stages": stages}
    seconds = 0.0
    for beta in BETAS:
        seconds += cpu_seconds(theirs(beta, dtype, tuned=part == "tuned"), FOLDER)
        print(f"{part}, beta {beta}: {seconds:.0f} s so far", flush=True)
    return {"what": PARTS[part], "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--mix", choices=MIXES, default="chat")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="TRL's default is bf16")
    parser.add_argument("--part", choices=PARTS, action="append", help="the others keep what was measured here today")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.pairs % BATCH:
        parser.error(f"--pairs: a multiple of {BATCH}, so that every epoch is whole steps for both")
    setup = {"shape": chosen.shape, "mix": chosen.mix, "pairs": chosen.pairs, "dtype": chosen.dtype}
    held_out = make_material(chosen.shape, chosen.mix, chosen.pairs)
    setup |= {"betas": list(BETAS), "epochs": EPOCHS, "batch": BATCH, "held_out": held_out}
    kept = MEASURED / "end-to-end.json"
    before = json.loads(kept.read_text()) if kept.exists() else {}
    same = all(before.get(key) == value for key, value in (context() | setup).items())
    rows = before["rows"] if same else {}
    for part in chosen.part or PARTS:
        print(f"{part} ...", flush=True)
        rows[part] = measure(part, chosen.pairs, chosen.dtype)
        save("end-to-end", setup | {"rows": rows})
    write_results()


if __name__ == "__main__":
    main()
