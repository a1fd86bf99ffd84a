"""One run of TRL's RLOO or GRPO as its user scripts it, on the embedded task's gold reward; a trained policy out."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from benchmarks.default_run import tokenizer_of, words
from dpo_lab.data.splits import TRAIN
from dpo_lab.data.tasks.reviews import SyntheticReviews
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.models.policy import load_policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=["rloo", "grpo"], required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--policy", type=Path, required=True)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    task, initial = SyntheticReviews(), load_policy(chosen.policy)
    encoder = PairTokenizer(initial.tokenizer, 256, 128, True)
    model = AutoModelForCausalLM.from_pretrained(chosen.policy)
    texts = task.prompts(TRAIN, 4000, chosen.seed)
    rows = Dataset.from_list([{"prompt": words(encoder.prompt(text)), "text": text} for text in texts])

    def gold(completions: list[str], text: list[str], **_: object) -> list[float]:
        tokens = [[int(word[1:-1]) for word in completion.split()] for completion in completions]
        return [
            task.gold(prompt + encoder.text(response)) / task.temperature
            for prompt, response in zip(text, tokens, strict=True)
        ]

    kinds = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}
    config_class, trainer_class = kinds[chosen.method]
    config = config_class(
        output_dir="trl/run",
        seed=chosen.seed,
        max_steps=chosen.steps,
        per_device_train_batch_size=64,
        num_generations=4,
        max_completion_length=task.max_new_tokens,
        beta=0.1,
        learning_rate=3e-4,
        adam_beta2=0.95,
        warmup_steps=20,
        lr_scheduler_type="linear",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
    )
    trainer = trainer_class(
        model=model,
        reward_funcs=gold,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer_of(model.config),
    )
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    trainer.model.save_pretrained("trl/policy")
    Path("trl/times.json").write_text(json.dumps({"training": seconds}))


if __name__ == "__main__":
    main()
