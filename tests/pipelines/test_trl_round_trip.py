"""The round trip with TRL (extra [bench]): its trainer on our exported pairs and initial policy, measured here beside ours."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from pyarrow import parquet
from torch.optim.lr_scheduler import LambdaLR

from dpo_lab import api
from dpo_lab.data.datamodule import StepSampler
from dpo_lab.models.policy import weights_digest
from dpo_lab.studies.verdicts import by_prompt
from dpo_lab.training.optim import Optim
from tests.support.warm import run_module

pytestmark = [pytest.mark.slow, pytest.mark.extended, pytest.mark.filterwarnings("ignore")]

STEPS, BATCH = 40, 16
OPTIM = Optim(lr=1e-3, beta2=0.95, warmup_steps=5)
JOB = (
    "policy.hidden_size=64 policy.layers=2 policy.intermediate_size=128 sft.steps=192 sft.optim.lr=1e-2 data.pairs=640"
    f" data.validation_pairs=192 data.batch_size={BATCH} data.task.max_new_tokens=40 optim.lr={OPTIM.lr}"
    f" optim.warmup_steps={OPTIM.warmup_steps} trainer.max_steps={STEPS} trainer.val_check_interval={STEPS}"
    " evals.num_prompts=256 evals.num_texts=32 noise=symmetric noise.rate=0.1 figures=false"
).split()


def trained_by_trl(initial, rows: list[dict]) -> torch.nn.Module:
    """TRL's DPO on the rows, in our steps' order and under our schedule, whose warm-up begins a step's share higher."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Scheduled(DPOTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = LambdaLR(self.optimizer, lambda step: OPTIM.factor(step, num_training_steps))
            return self.lr_scheduler

    settings = DPOConfig(
        output_dir="trl",
        beta=0.1,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        learning_rate=OPTIM.lr,
        adam_beta2=OPTIM.beta2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    sizes = [sum(len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")) for row in rows]
    order = [pair for step in islice(StepSampler(sizes, BATCH, seed=0), STEPS) for pair in step]
    ordered = [rows[at] for at in order]
    given = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in ordered])
    trainer = Scheduled(initial.model, args=settings, train_dataset=given, processing_class=initial.tokenizer)
    for theirs, row in zip(trainer.train_dataset, ordered, strict=True):
        assert all(theirs[name] == row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    trainer.train()
    trainer.save_model("trl-policy")
    torch.set_num_threads(1)
    return trainer.model


def test_the_same_pairs_and_initial_policy_give_the_same_policy(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="needs pip install -c constraints.txt -e '.[bench]'")
    monkeypatch.chdir(tmp_path)
    ours = api.train([*JOB, "name=ours"])
    exported = run_module("dpo_lab.inspect", *JOB, "export=train.parquet", "export_tokens=true", "show=0", cwd=tmp_path)
    assert exported.returncode == 0, exported.stdout + exported.stderr
    rows = parquet.read_table("train.parquet").to_pylist()
    assert len(rows) == ours.record["data"]["train pairs"]
    assert sum(row["flipped"] for row in rows) == ours.record["data"]["flipped by label noise"] > 0
    initial = ours.initial_policy()
    assert weights_digest(initial.model) == ours.record["initial_policy"]
    start = {name: weight.clone() for name, weight in initial.model.state_dict().items()}
    theirs, mine = trained_by_trl(initial, rows).state_dict(), ours.policy().model.state_dict()
    apart, moved = (sum(float((mine[name] - other[name]).square().sum()) for name in mine) for other in (theirs, start))
    assert apart < 1e-6 * moved  # the squares; they were 2e-11
    found = api.evaluate([*JOB, "trained=trl-policy", "name=theirs"])
    assert found.record["identity"]["data"] == ours.record["identity"]["data"]
    assert found.record["initial_policy"] == ours.record["initial_policy"]
    for name in ("accuracy", "gold_gain", "kl"):
        low, high = ours.metrics[name].interval or (0.0, 0.0)
        assert low <= found.metrics[name].value <= high, name
    assert (ours.metrics["kl"].interval or (0.0,))[0] > 0  # it has moved
    gold = by_prompt(ours._data, found._data)
    assert gold is not None
    assert gold.interval is None or gold.interval[0] <= 0 <= gold.interval[1]
