"""One TRL run as its user scripts it: policy/, train.jsonl and held-out.jsonl of this folder in, a trained policy out."""

from __future__ import annotations

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.variants import trl_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beta", type=float, required=True)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--tuned", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    from trl.trainer.dpo_trainer import DPOTrainer

    single = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": chosen.batch}
    together = {"per_device_train_batch_size": chosen.batch}
    config = trl_config(
        chosen.beta,
        chosen.dtype,
        checkpointing=not chosen.tuned,
        precomputed=chosen.tuned,
        output_dir=f"trl/{chosen.tuned}-{chosen.beta}",
        num_train_epochs=chosen.epochs,
        eval_strategy="epoch",
        **(single if chosen.tuned else together),
    )
    rows = load_dataset("json", data_files={"train": "train.jsonl", "held_out": "held-out.jsonl"}, cache_dir="trl/data")
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained("policy"),
        args=config,
        train_dataset=rows["train"],
        eval_dataset=rows["held_out"],
        processing_class=AutoTokenizer.from_pretrained("policy"),
    )
    trainer.train()
    trainer.save_model()
    print(trainer.state.global_step, "steps")


if __name__ == "__main__":
    main()
