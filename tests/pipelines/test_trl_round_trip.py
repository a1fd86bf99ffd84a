"""The round trip with TRL (extra [bench]): its trainer on our exported pairs and initial policy, measured here beside ours."""

from __future__ import annotations

import pytest
import torch
from pyarrow import parquet

from dpo_lab import api
from dpo_lab.models.policy import weights_digest
from dpo_lab.studies.verdicts import by_prompt
from tests.support.warm import door

pytestmark = [pytest.mark.slow, pytest.mark.extended, pytest.mark.filterwarnings("ignore")]

STEPS, BATCH, RATE, WARMUP = 40, 16, 1e-3, 5
JOB = (
    "policy.hidden_size=64 policy.layers=2 policy.intermediate_size=128 sft.steps=192 sft.optim.lr=1e-2 data.pairs=640"
    f" data.validation_pairs=192 data.batch_size={BATCH} data.task.max_new_tokens=40 optim.lr={RATE}"
    f" optim.warmup_steps={WARMUP} trainer.max_steps={STEPS} trainer.val_check_interval={STEPS} evals.num_prompts=256"
    " evals.num_texts=32 noise=symmetric noise.rate=0.1 figures=false"
).split()


def test_the_same_pairs_and_initial_policy_give_the_same_policy_within_the_intervals(tmp_path, monkeypatch):
    """Steps are of other pairs, as each trainer shuffles them, so the policies are alike and not the same."""
    pytest.importorskip("trl", reason="needs pip install -c constraints.txt -e '.[bench]'")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    monkeypatch.chdir(tmp_path)
    ours = api.train([*JOB, "name=ours"])
    exported = door("dpo_lab.inspect", *JOB, "export=train.parquet", "export_tokens=true", "show=0", cwd=tmp_path)
    assert exported.returncode == 0, exported.stdout + exported.stderr
    rows = parquet.read_table("train.parquet").to_pylist()
    assert len(rows) == ours.record["data"]["train pairs"]
    assert sum(row["flipped"] for row in rows) == ours.record["data"]["flipped by label noise"] > 0
    initial = ours.initial_policy()
    assert weights_digest(initial.model) == ours.record["initial_policy"]
    settings = DPOConfig(
        output_dir="trl",
        beta=0.1,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        adam_beta2=0.95,
        warmup_steps=WARMUP,
        lr_scheduler_type="linear",
        seed=0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    given = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])
    trainer = DPOTrainer(initial.model, args=settings, train_dataset=given, processing_class=initial.tokenizer)
    for theirs, row in zip(trainer.train_dataset, rows, strict=True):
        assert all(theirs[name] == row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    trainer.train()
    trainer.save_model("trl-policy")
    torch.set_num_threads(1)
    found = api.evaluate([*JOB, "trained=trl-policy", "name=theirs"])
    assert found.record["identity"]["data"] == ours.record["identity"]["data"]
    assert found.record["initial_policy"] == ours.record["initial_policy"]
    assert found.record["trained_policy"] != ours.record["trained_policy"]
    for name in ("accuracy", "gold_gain", "kl"):
        (low, high), (left, right) = ours.metrics[name].interval, found.metrics[name].interval
        assert max(low, left) <= min(high, right), (name, ours.metrics[name], found.metrics[name])
    gold = by_prompt(ours._data, found._data)
    assert gold is not None
    assert gold.interval is not None
    assert gold.interval[0] <= 0 <= gold.interval[1]
    assert ours.metrics["kl"].interval[0] > 0  # both have moved
    assert found.metrics["kl"].interval[0] > 0
