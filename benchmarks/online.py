"""RLOO and GRPO against TRL's: gold reward and KL divergence after the same steps on the same task, gold reward at an equal
KL divergence, and CPU seconds a step.

    python -m benchmarks.online                     (about half an hour of one core; TRL is found by PYTHONPATH)
    python -m benchmarks.online --method rloo --seeds 0 --steps 20

Both train the default run's initial policy, in float32 on one thread, on the gold reward over the annotator's temperature: 16
prompts with 4 responses a step, the same learning rate and schedule. Both policies are measured by the same function: 512
held-out prompts, one response each. A step's seconds are those of the whole training, sampling included, over its steps.
For the gold reward at TRL's KL divergence ours is trained with further betas, and interpolated between their final policies.
Writes outputs/benchmarks/online.json and benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.end_to_end import cpu_seconds
from benchmarks.results import MEASURED, save, write_results
from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.collate import collate_responses
from dpo_lab.data.splits import HELD_OUT
from dpo_lab.data.tasks.reviews import SyntheticReviews
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.models.forward import response_logps
from dpo_lab.models.policy import load_policy
from dpo_lab.models.sampling import sample
from dpo_lab.stats.paired_tests import paired

FOLDER = MEASURED.resolve() / "online"
BETA, PROMPTS, RESPONSES = 0.1, 16, 4
FURTHER = (0.05, 0.2)  # betas of ours, for the gold reward at the KL divergence of TRL's policy
# GRPO as TRL's defaults have it: normalised by tokens, k3 times the ratio in the loss, rewards over the group's spread
OURS = {"rloo": [], "grpo": ["method.normalise=token", "method.kl=k3_weighted"]}


def settings(method: str, seed: int, steps: int, beta: float) -> list[str]:
    """The command of ours, as a user types it."""
    rhythm = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}", f"seed={seed}"]
    own = [f"method={method}", "reward=gold", f"beta={beta}", *OURS[method], *rhythm]
    few = ["figures=false", "evals.evaluators=[]", "data.validation_pairs=8"]  # TRL's run validates nothing either
    return [*own, *few, f"name={method}-{seed}-{beta}"]


def measure(folder: Path, initial_folder: Path, seed: int) -> dict[str, float]:
    """Gold reward and KL divergence to the initial policy of one response to each of 512 held-out prompts."""
    task, initial = SyntheticReviews(), load_policy(initial_folder)
    trained = load_policy(folder)
    encoder = PairTokenizer(initial.tokenizer, 256, 128, True)
    texts = task.prompts(HELD_OUT, 512, seed)
    prompts = [encoder.prompt(text) for text in texts]
    sampling: dict[str, Any] = dict(max_new_tokens=task.max_new_tokens, end_ids=encoder.end_ids, pad_id=encoder.pad_id)
    found = sample(trained.model, prompts, seed=derive_seed(seed, "benchmark"), **sampling)
    responses = [each.tokens for each in found]
    tokens, lengths = collate_responses(prompts, responses)
    with torch.no_grad():
        ratios = response_logps(trained.model, tokens, lengths) - response_logps(initial.model, tokens, lengths)
    gold = np.array([task.gold(text + encoder.text(each)) for text, each in zip(texts, responses, strict=True)])
    return {"gold": float(gold.mean()), "gold_error": float(gold.std() / len(gold) ** 0.5), "kl": ratios.mean().item()}


def run_ours(method: str, seed: int, steps: int, beta: float = BETA) -> dict[str, Any]:
    shutil.rmtree(FOLDER / f"outputs/{method}-{seed}-{beta}", ignore_errors=True)
    cpu_seconds([sys.executable, "-m", "dpo_lab.train", *settings(method, seed, steps, beta)], FOLDER)
    (record,) = FOLDER.glob(f"outputs/{method}-{seed}-{beta}/*/*/run.json")
    return {"seconds": json.loads(record.read_text())["seconds"]["dpo"]["cpu"] / steps} | measure(
        record.parent / "policy", initial_of(seed), seed
    )


def gold_at(policies: Sequence[dict[str, Any]], kl: float) -> float | None:
    """The gold reward where policies of several betas have a KL divergence, linear between neighbours; None outside of them."""
    path = sorted((policy["kl"], policy["gold"]) for policy in policies)
    kls, golds = zip(*path, strict=True)
    return float(np.interp(kl, kls, golds)) if kls[0] <= kl <= kls[-1] else None


def initial_of(seed: int) -> Path:
    """The folder of the initial policy of a seed, which a run of ours has made."""
    records = (json.loads(path.read_text()) for path in FOLDER.glob(f"outputs/*-{seed}-*/*/*/run.json"))
    digest = next(iter(records))["initial_policy"]
    (folder,) = (path for path in FOLDER.glob("outputs/cache/policy-*") if path.is_dir() and _digest(path) == digest)
    return folder


def _digest(folder: Path) -> str:
    from dpo_lab.models.policy import weights_digest

    return weights_digest(load_policy(folder).model)


def run_trl(method: str, seed: int, steps: int) -> dict[str, Any]:
    shutil.rmtree(FOLDER / "trl", ignore_errors=True)
    options = ["--method", method, "--seed", str(seed), "--steps", str(steps), "--policy", str(initial_of(seed))]
    cpu_seconds([sys.executable, "-m", "benchmarks.trl_online", *options], FOLDER)
    seconds = json.loads((FOLDER / "trl/times.json").read_text())["training"] / steps
    for path in initial_of(seed).glob("*token*"):
        shutil.copy(path, FOLDER / "trl/policy")
    return {"seconds": seconds} | measure(FOLDER / "trl/policy", initial_of(seed), seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=[*OURS], action="append")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = []
    for method in chosen.method or [*OURS]:
        for seed in chosen.seeds:
            ours, theirs = (run(method, seed, chosen.steps) for run in (run_ours, run_trl))
            policies = [ours, *(run_ours(method, seed, chosen.steps, beta) for beta in FURTHER)]
            theirs |= {"ours_at_its_kl": gold_at(policies, theirs["kl"])}
            for who, of in (("ours", ours), ("TRL", theirs)):
                rows.append({"method": method, "seed": seed, "who": who, **of})
                print({key: round(x, 3) if isinstance(x, float) else x for key, x in rows[-1].items()}, flush=True)
    save("online", {"steps": chosen.steps, "rows": rows})
    write_results()


def table(measured: dict[str, Any]) -> list[str]:
    """The section of RESULTS.md."""
    lines = [
        "## Online methods against TRL",
        "",
        "| method | | gold reward | KL, nats | CPU s a step |",
        "|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(row["method"] for row in measured["rows"]):
        for who in ("ours", "TRL"):
            rows = [row for row in measured["rows"] if (row["method"], row["who"]) == (method, who)]
            means = {name: float(np.mean([row[name] for row in rows])) for name in ("gold", "kl", "seconds")}
            spread = {name: float(np.std([row[name] for row in rows], ddof=1)) if rows[1:] else 0.0 for name in means}
            cells = " | ".join(f"{means[name]:.2f} (sd {spread[name]:.2f})" for name in means)
            lines.append(f"| {method} | {who} | {cells} |")
    lines += [""]
    for method in dict.fromkeys(row["method"] for row in measured["rows"]):
        of = [row for row in measured["rows"] if row["method"] == method and row.get("ours_at_its_kl") is not None]
        found = paired([row["ours_at_its_kl"] - row["gold"] for row in of]) if of else None
        if found is not None and found.interval is not None:
            low, high = found.interval
            lines.append(
                f"- {method}: gold reward at the KL divergence of TRL's policy, ours - TRL's, paired by seed:"
                f" {found.value:+.2f} (95 % interval {low:+.2f} .. {high:+.2f}, {len(of)} seeds)."
            )
    versions = ", ".join(f"{package} {version}" for package, version in measured["versions"].items())
    seeds = len({row["seed"] for row in measured["rows"]})
    lines += [
        "",
        f"{measured['date']}, `python -m benchmarks.online`: {seeds} seeds, {measured['steps']} steps of {PROMPTS} prompts with"
        f" {RESPONSES} responses, beta {BETA}. {measured['machine']}; {versions}.",
        "",
    ]
    return lines


if __name__ == "__main__":
    main()
