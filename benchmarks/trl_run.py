"""One TRL run as its user scripts it: policy/, train.jsonl and held-out.jsonl of this folder in, a trained policy out."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.variants import trl_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beta", type=float, required=True)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], required=True)
    parser.add_argument("--settings", type=json.loads, required=True, help="of trl_config, as JSON")
    parser.add_argument("--times", type=Path, help="a file for the CPU seconds of its parts")
    parser.add_argument("--sorted", action="store_true", help="sort rows by their column length")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    from trl.trainer.dpo_trainer import DPOTrainer

    given: dict[str, Any] = {"checkpointing": True, "precomputed": False, "output_dir": "trl/run", **chosen.settings}
    config = trl_config(chosen.beta, chosen.dtype, **given)
    rows = load_dataset("json", data_files={"train": "train.jsonl", "held_out": "held-out.jsonl"}, cache_dir="trl/data")
    rows = rows.sort("length") if chosen.sorted else rows
    seconds = {"reference": 0.0, "training": 0.0, "validation": 0.0}

    def timed(part, function):
        def call(*args, **kwargs):
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[part] += time.process_time() - start

        return call

    DPOTrainer._precompute_ref_logps = timed("reference", DPOTrainer._precompute_ref_logps)
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained("policy"),
        args=config,
        train_dataset=rows["train"],
        eval_dataset=rows["held_out"],
        processing_class=AutoTokenizer.from_pretrained("policy"),
    )
    trainer.evaluate = timed("validation", trainer.evaluate)
    timed("training", trainer.train)()
    trainer.save_model()
    if chosen.times:
        chosen.times.write_text(json.dumps(seconds))
    print(trainer.state.global_step, "steps")


if __name__ == "__main__":
    main()
