"""What a loss asks for beside two log-probabilities reaches it in training: scores of pairs, and responses of other pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dpo_lab.core.losses import KTO, ODPO, Loss, Mix
from tests.support.fits import BATCH, Seen, initial_policy, make_data, make_module, make_trainer, tables

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore::FutureWarning:lightning")


def train(folder: Path, loss: Loss, tokens: int, steps: int) -> Seen:
    seen = Seen()
    module = make_module(initial_policy().model, folder, steps, tokens, loss)
    make_trainer(steps, callbacks=[seen]).fit(module, datamodule=make_data(loss=loss))
    return seen


@pytest.mark.parametrize("tokens", [60, 100_000])
def test_the_first_step_of_odpo_costs_what_the_scores_say(tokens, tmp_path):
    """At the start the margin is 0, so the loss of a pair is log(1 + exp(alpha gap)), by its label after noise."""
    loss = ODPO(0.5, alpha=2)
    batch = next(iter(make_data(loss=loss).train_dataloader()))
    scores = dict(zip(tables(loss)[0].keys.tolist(), tables(loss)[0].score_gap.tolist(), strict=True))
    gaps = torch.tensor([scores[key.encode()] for key in batch.keys])
    assert batch.score_gap is not None
    assert batch.score_gap.tolist() == pytest.approx(gaps.tolist())
    assert (len(set(gaps.tolist())), len(gaps)) == (BATCH, BATCH)
    seen = train(tmp_path, loss, tokens, 1)
    expected = torch.nn.functional.softplus(2 * gaps).mean().item()
    assert seen.figures[0]["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_a_mixture_passes_scores_and_unrelated_responses_on(tmp_path):
    """At the start KTO costs 1 a pair."""
    alone = train(tmp_path, ODPO(0.5), 60, 1).figures[0]["train/loss"]
    mixed = train(tmp_path, Mix(0.5, terms={"odpo": 0.5, "kto": 2}), 60, 1).figures[0]["train/loss"]
    assert mixed == pytest.approx(0.5 * alone + 2, rel=1e-5)


def test_the_baseline_of_kto_moves_in_training(tmp_path, monkeypatch):
    baselines, baseline = [], KTO.baseline
    monkeypatch.setattr(KTO, "baseline", lambda *args: baselines.append(baseline(*args).item()) or baseline(*args))
    train(tmp_path, KTO(0.5), 60, 5)
    assert max(baselines) > 0
