"""Preparation of many pairs of the user's: time and peak memory of the first start and of the second.

    python -m benchmarks.pairs --pairs 1000000

Writes a JSONL file of synthetic chats or plain pairs, then starts a process that prepares it as `dpo_lab.train` does (rows to
pairs to token ids, kept), a second that finds it kept, and one epoch's worth of batches. Memory is the largest resident set of
the process, its workers apart.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from dpo_lab.data.splits import TRAIN
from dpo_lab.data.tasks.reviews import SyntheticReviews


def write_pairs(path: Path, count: int, chat: bool) -> None:
    """Pairs of about 60 tokens a prompt and 90 a response, no two alike."""
    rng = random.Random(0)
    reviews = SyntheticReviews().texts(TRAIN, 2000, seed=0)

    def text(sentences: int) -> str:
        return " ".join(rng.choice(reviews) for _ in range(sentences))

    with path.open("w") as file:
        for i in range(count):
            row: dict = {"prompt": f"{i}: {text(2)}", "chosen": " " + text(3), "rejected": " " + text(3)}
            if chat:
                row["prompt"] = [{"role": "user", "content": row["prompt"]}]
                for side in ("chosen", "rejected"):
                    row[side] = [{"role": "assistant", "content": row[side]}]
            file.write(json.dumps(row) + "\n")


def prepare(path: Path, cache: Path, batches: int) -> dict[str, float]:
    """Seconds and memory of what a run does with its pairs before it trains."""
    from dpo_lab.data.collate import collate
    from dpo_lab.data.datamodule import StepSampler
    from dpo_lab.data.sources import Data
    from dpo_lab.data.tokenize import PairTokenizer
    from dpo_lab.models.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(SyntheticReviews().texts(TRAIN, 2000, seed=0), 1024)
    tokenizer.chat_template = (
        "{% for m in messages %}<|begin|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
    )
    data = Data(path=str(path))
    start, cpu = time.perf_counter(), time.process_time()
    splits = data.choose(data.store(PairTokenizer(tokenizer, data.max_length, data.max_prompt_length), cache))
    ready = time.perf_counter()
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for step in islice(StepSampler(splits.train.sizes.tolist(), 32, seed=0), batches):
        collate([splits.train[pair] for pair in step])
    return {
        "pairs": len(splits.train) + len(splits.held_out),
        "tokens": len(splits.train.tokens),
        "seconds": ready - start,
        "cpu_seconds": time.process_time() - cpu + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime,
        "peak_mb": own / 1024,
        "workers_peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        "ms_a_batch": 1000 * (time.perf_counter() - ready) / batches,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--chat", action="store_true", help="conversational rows, through a chat template")
    parser.add_argument("--folder", type=Path, help="where the file and the store lie (default: a temporary folder)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(prepare(arguments.measure, arguments.measure.parent / "cache", batches=200)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "pairs.jsonl"
        write_pairs(path, arguments.pairs, arguments.chat)
        print(
            f"{arguments.pairs:,} {'chats' if arguments.chat else 'plain pairs'}, {path.stat().st_size / 1e6:,.0f} MB of JSONL"
        )
        for start in ("first", "second"):
            begun = time.perf_counter()
            command = [sys.executable, "-m", "benchmarks.pairs", "--measure", str(path)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            figures = json.loads(output.strip().splitlines()[-1])
            whole = time.perf_counter() - begun
            print(
                f"{start} start: " + ", ".join(f"{k} {v:,.1f}" for k, v in figures.items()) + f", process {whole:.1f} s"
            )


if __name__ == "__main__":
    main()
