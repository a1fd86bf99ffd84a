"""Folders of a study that was never run: records, journals and examples as runs leave them, with numbers that are plausible
and samples that attack whoever shows them.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from dpo_lab.runs import metrics_log
from dpo_lab.stats.estimates import Estimate
from dpo_lab.studies.spec import Arm, Direction, Figure, Kind, Measure, Prediction, Study

HOSTILE = (
    '<script>document.title = "owned"</script><img src=x onerror="document.title=1"> &lt;b&gt;',
    "[link=https://evil.example]click[/link] javascript:alert(1) <a href='javascript:alert(1)'>x</a>",
    "</title></style></script><svg onload=alert(1)> |a|b| `c` \x1b[31mred \u202egnp {{ 7 * 7 }} {% raw %}",
    "https://evil.example/pixel.png <iframe src=//evil.example></iframe> a\nb",
)
BETAS = (0.1, 0.3, 1.0)


def study(seeds: int = 5) -> Study:
    """Two groups over beta, one arm with noise, one that fails."""
    arms = [
        Arm(f"{group}, beta {beta}", [f"beta={beta}"], group, {"beta": beta})
        for group in ("dpo", "uniform")
        for beta in BETAS
    ]
    for arm in arms[len(BETAS) :]:
        arm.overrides.append("+ablation=uniform_ref")
    arms.append(Arm("noisy labels", ["noise=symmetric", "noise.rate=0.2"], "", {"beta": 0.1}))
    arms.append(Arm("<b>crash</b>", ["optim.lr=1e30"]))
    predictions = [
        Prediction(
            "the uniform reference costs more KL",
            Measure.difference,
            "uniform, beta 0.1",
            Direction.more,
            "kl",
            "dpo, beta 0.1",
            min_effect=1.2,
        ),
        Prediction(
            "a larger beta keeps KL lower", Measure.slope, "dpo", Direction.less, "kl", axis="beta", min_effect=1.1
        ),
        Prediction(
            "label noise costs accuracy <i>of the truth</i>",
            Measure.difference,
            "noisy labels",
            Direction.less,
            "true_accuracy",
            "dpo, beta 0.1",
            min_effect=0.01,
            primary=False,
        ),
        Prediction(
            "the crashed arm gains as much",
            Measure.difference,
            "<b>crash</b>",
            Direction.same,
            "gold_gain",
            "dpo, beta 0.1",
            min_effect=0.1,
            primary=False,
        ),
    ]
    figures = [
        Figure(Kind.axis, ["kl", "gold_gain", "well_formed"], "beta"),
        Figure(Kind.arms, ["true_accuracy"]),
        Figure(Kind.curves, ["train/rewards/margins"], arms=["dpo"]),
    ]
    return Study(
        name="uniform_ref",
        title="What the reference is for <script>alert(1)</script>",
        question="Does DPO without a reference drift further at the same reward?",
        claim="A reference keeps the policy near where it started.",
        source="Rafailov et al. 2023, section 4",
        predictions=predictions,
        arms=arms,
        baseline="dpo, beta 0.1",
        seeds=list(range(seeds)),
        metrics=["true_accuracy", "gold_gain", "kl", "well_formed"],
        figures=figures,
        notes="The uniform arm lost its grammar first.\n\nLooked at <b>again</b>: it forgets to stop.",
    )  # fmt: skip


def write_study(outputs: Path, seeds: int = 5, steps: int = 60) -> Path:
    """The study's folder, as `outputs/studies/uniform_ref/full`; one job failed, one arm never ran at one seed."""
    of = study(seeds)
    folder = outputs / "studies" / of.name / "full"
    folder.mkdir(parents=True)
    jobs = []
    for arm in of.arms:
        for seed in of.seeds:
            runs = (
                outputs
                / "studies"
                / "runs"
                / "full"
                / "".join(c if c.isalnum() else "-" for c in arm.name)
                / f"seed={seed}"
            )
            status, error = "done", None
            if arm.name == "<b>crash</b>":
                status, error = "failed", "NotFinite: the loss is nan at step 3 <img src=x onerror=alert(1)>"
            if arm.name == "noisy labels" and seed == of.seeds[-1]:
                status, error = "not started", None
            else:
                write_run(runs, arm, seed, steps, status, error)
            jobs.append(
                {
                    "arm": arm.name,
                    "seed": seed,
                    "folder": f"../../runs/full/{runs.parent.name}/{runs.name}",
                    "overrides": [*arm.overrides, f"seed={seed}"],
                    "status": status,
                    "error": error,
                    "log": f"../../runs/full/{runs.parent.name}/{runs.name}/output.log" if status == "failed" else None,
                }
            )
    record = {
        "schema": 1,
        "study": of.as_record(),
        "file": "ablations/uniform_ref.yaml",
        "budget": "full",
        "overrides": [],
        "command": "python -m dpo_lab.study ablations/uniform_ref.yaml",
        "status": "failed",
        "registrations": [{"digest": of.digest(), "at": "2026-11-20T08:00:00+00:00"}],
        "jobs": jobs,
    }
    (folder / "study.json").write_text(json.dumps(record, indent=1))
    return folder


def write_run(
    folder: Path, arm: Arm, seed: int, steps: int = 60, status: str = "done", error: str | None = None
) -> None:
    """One run's folder."""
    folder.mkdir(parents=True)
    beta = arm.axes.get("beta", 0.1)
    is_uniform, is_noisy = arm.group == "uniform", arm.name == "noisy labels"
    shared, own = random.Random(seed), random.Random(f"{arm.name} {seed}")
    start = shared.gauss(0, 0.05)

    def near(value: float, spread: float) -> float:
        return value + spread * (start + own.gauss(0, 0.03))

    kl = near((1.6 if is_uniform else 0.9) / (1 + beta), 1.5)
    values = {
        "true_accuracy": near(0.72 - 0.05 * is_noisy - 0.02 * is_uniform, 0.2),
        "accuracy": near(0.70 - 0.05 * is_noisy, 0.2),
        "gold_gain": near(1.0 - 0.35 * math.log10(10 * beta) - 0.2 * is_noisy, 1.0),
        "kl": max(kl, 0.02),
        "well_formed": min(1.0, near(0.97 - 0.2 * is_uniform, 0.2)),
        "train/clean/accuracy": near(0.85, 0.2),
        "train/flipped/accuracy": near(0.6, 0.2),
    }
    metrics = {name: Estimate(v, 0.02, 512, (v - 0.04, v + 0.04)).as_record() for name, v in values.items()}
    flipped = 380 + own.randrange(40) if is_noisy else 0
    finding = {
        "name": "language lost",
        "severity": "warning",
        "message": "well-formed samples fell from 97 % to 77 % <script>alert(1)</script>",
        "threshold": "more than 10 points",
        "suggestion": "a larger beta",
    }
    texts = [f"It was {word}." for word in ("fine", "dull", "superb")] + list(HOSTILE)
    record: dict[str, Any] = {
        "status": status,
        "started": "2026-11-20T09:00:00+00:00",
        "config": {"name": "dpo", "beta": beta, "seed": seed, "loss": {"kind": "dpo", "beta": beta}, "if_exists": "error",
                   "noise": {"kind": "symmetric", "rate": 0.2 if is_noisy else 0.0, "seed": seed},
                   "reference": {"kind": "uniform" if is_uniform else "cached"}, "trainer": {"max_steps": steps},
                   "optim": {"lr": 1e30 if arm.name == "<b>crash</b>" else 1e-4}},
        "overrides": [*arm.overrides, f"seed={seed}", "name='a b'"],
        "versions": {"python": "3.11.7", "dpo_lab": "0.1.0", "torch": "2.13.0+cpu" if seed else "2.12.0+cpu"},
        "git": {"commit": "295d1d8d8cc35a924e6ec8e94cb854ef52d5bf13", "dirty": seed == 0},
        "data": {"rows": 2400, "dropped: unfinished response": 30 + seed, "train pairs": 2000, "held-out pairs": 370,
                 "flipped by label noise": flipped},
        "data_quality": {"noise": {"flipped": {"chosen longer": [1000, flipped], "same length": [1000, 0]}}},
        "seconds": {"prepare": {"wall": 3.0, "cpu": 2.5}, "dpo": {"wall": 30.0, "cpu": 29.0 + seed}},
        "steps": steps,
        "peak_memory_bytes": 528_703_488,
        "health": [finding] if is_uniform and seed < 3 else [],
    }  # fmt: skip
    if error:
        record["error"] = error
    if status == "done":
        record["metrics"] = metrics
        record["samples"] = [
            {"prompt": text, "initial": f"initially {text}", "trained": f"{arm.name} says {text}"} for text in texts
        ]
        record["finished"] = "2026-11-20T09:10:00+00:00"
        (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _examples(record, shared)))
    (folder / "run.json").write_text(json.dumps(record, indent=1))
    for step in range(2, steps + 1 if status == "done" else 6, 2):
        way = 1 - math.exp(-step / (steps / 3))
        figures = {
            "train/loss": 0.69 - 0.3 * way + own.gauss(0, 0.02),
            "train/rewards/margins": way + own.gauss(0, 0.05),
        }
        if step % 10 == 0:
            figures |= {
                "val/loss": 0.69 - 0.25 * way + own.gauss(0, 0.01),
                "val/rewards/margins": (0.8 + own.gauss(0, 0.03)) * way,
            }
            figures |= {"val/true/rewards/accuracies": 0.5 + (values["true_accuracy"] - 0.5) * way}
        if status == "failed":
            figures["train/loss"] = math.nan
        metrics_log.append(folder / metrics_log.METRICS_LOG, step, figures)


def _examples(record: dict[str, Any], shared: random.Random) -> list[dict[str, Any]]:
    """Of prompts, and of the initial policy's candidates, which are the same for every run of a seed."""
    rows = [
        {
            "kind": "prompt",
            "key": f"{i:032x}",
            "prompt": s["prompt"],
            "response": s["trained"],
            "gold": 0.5,
            "initial_gold": 0.1 * i,
        }
        | {"initial_response": s["initial"]}
        for i, s in enumerate(record["samples"])
    ]
    candidates = [
        {"kind": "candidates", "key": f"{i:032x}", "gold": [round(shared.gauss(0.1 * i, 1), 4) for _ in range(64)]}
        for i in range(12)
    ]
    return rows + candidates
