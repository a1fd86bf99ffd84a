"""The default run against TRL: CPU seconds of its DPO stage and of the whole command, over the very same pairs and policy.

    python -m benchmarks.default_run               (about half an hour of one core)
    python -m benchmarks.default_run --repeats 1 --variant ours --variant "TRL, its defaults"

Every run is a fresh process of one thread: the same 160 steps of 32 pairs, the same 512 held-out pairs validated and the
weights saved at steps 80 and 160, in float32. Variants take turns; times are medians of the CPU seconds of all
processes. The DPO stage is the reference, the steps, validation and saving: ours by the stages of run.json, TRL's from
its constructor's precomputation and `train`. Ours evaluates by sampling on top of it in the whole command, and has its
initial policy in the cache. Writes outputs/benchmarks/ and benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from benchmarks.end_to_end import cpu_seconds
from benchmarks.results import MEASURED, save, write_results
from dpo_lab import train
from dpo_lab.data.datamodule import PreferenceDataModule

FOLDER = MEASURED.resolve() / "default-run"
JOB = "figures=false"  # the settings of dpo_lab.train
SETTINGS = {  # TRL's settings for the same job
    "max_steps": 160,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 3e-4,
    "adam_beta2": 0.95,
    "warmup_steps": 20,
    "lr_scheduler_type": "linear",
    "eval_strategy": "steps",
    "eval_steps": 80,
    "save_steps": 80,
    "checkpointing": False,
}
PRECOMPUTED = {"precomputed": True, "precompute_ref_batch_size": 64}
GROUPED = {  # its steps are of pairs of alike length, which are not the same pairs as without
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "length",
    "remove_unused_columns": False,
    "logging_steps": 160,
}
TUNED = "TRL tuned: precomputed, sorted by length, quiet"
THEIRS: dict[str, Mapping[str, Any]] = {
    "TRL, its defaults": {},
    "TRL, its reference precomputed": PRECOMPUTED,
    TUNED: PRECOMPUTED | GROUPED,
}
OURS = ("ours", "ours, its reference in the cache")


def export(folder: Path) -> None:
    """Prepare the default run up to its first step and write what TRL needs: policy/, train.jsonl, held-out.jsonl.

    A token i is written as the word <i>, so that TRL's tokenizer gives the very same tokens.
    """

    def fit(trainer: Trainer, module: LightningModule, datamodule: PreferenceDataModule, **_: Any) -> None:
        module.model.save_pretrained(folder / "policy")
        tokenizer_of(module.model.config).save_pretrained(folder / "policy")
        for name, pairs in (("train", datamodule.train), ("held-out", datamodule.held_out)):
            rows = [
                {
                    "prompt": words(pair.prompt),
                    "chosen": f" {words(pair.chosen)}",
                    "rejected": f" {words(pair.rejected)}",
                    "length": pair.size,
                }
                for pair in pairs
            ]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        os._exit(0)

    Trainer.fit = fit  # type: ignore[method-assign, assignment]
    sys.argv = ["dpo_lab.train", JOB, "name=export"]
    train.main()


def words(tokens: Sequence[int]) -> str:
    """Return a word for each token; none is a part of another, since special tokens are found within words too."""
    return " ".join(f"<{int(token)}>" for token in tokens)


def tokenizer_of(config: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words of all tokens, whose end token is the model's."""
    vocabulary = {words([i]): i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=words([0])))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"eos_token": words([config.eos_token_id]), "pad_token": words([0]), "unk_token": words([0])}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def measure(variant: str, turn: int) -> dict[str, float]:
    """Run a variant once; return the CPU seconds of its parts, of its DPO stage and of the whole command."""
    if variant in OURS:
        if variant == "ours":
            for path in FOLDER.glob("outputs/cache/reference-*"):
                path.unlink()
        name = f"ours{OURS.index(variant)}-{turn}"
        whole = cpu_seconds([sys.executable, "-m", "dpo_lab.train", JOB, f"name={name}"], FOLDER)
        (record,) = FOLDER.glob(f"outputs/{name}/**/run.json")
        parts = {stage: spent["cpu"] for stage, spent in json.loads(record.read_text())["seconds"].items()}
        reference, training = parts["reference"], parts["dpo"]
        return {"stage": reference + training, "reference": reference, "training": training, "whole": whole}
    shutil.rmtree(FOLDER / "trl", ignore_errors=True)  # with its cache of the reference
    found = FOLDER / "found.json"
    settings = json.dumps({**SETTINGS, **THEIRS[variant]})
    options = ["--beta", "0.1", "--dtype", "fp32", "--settings", settings, "--times", str(found)]
    options += ["--sorted"] if variant == TUNED else []
    whole = cpu_seconds([sys.executable, "-m", "benchmarks.trl_run", *options], FOLDER)
    parts = json.loads(found.read_text())
    return {"stage": parts["reference"] + parts["training"], **parts, "whole": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=[*OURS, *THEIRS], action="append")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--export", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.export:
        export(chosen.export)
        return
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in FOLDER.glob("outputs/ours*"):
        shutil.rmtree(path)
    if not (FOLDER / "held-out.jsonl").exists():
        cpu_seconds([sys.executable, "-m", "benchmarks.default_run", "--export", str(FOLDER)], FOLDER)
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in chosen.variant or [*OURS, *THEIRS]}
    for turn in range(chosen.repeats):
        for variant, times in found.items():
            times.append(measure(variant, turn))
            print(variant, {part: round(seconds, 1) for part, seconds in times[-1].items()}, flush=True)
    save("default-run", {"repeats": chosen.repeats, "rows": found})
    write_results()


if __name__ == "__main__":
    main()
