"""Refuse rows that a training can't use: single responses, prompts alone, pairs without scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpo_lab.config.schema import ConfigError, RunConfig
from dpo_lab.data.row_faults import OnBadRow
from dpo_lab.data.sources import Splits

INSTEAD = "type data.path= of rows with chosen and rejected"


def check_pairs(config: RunConfig, splits: Splits, refusal: str | None = None) -> Splits:
    """Return the splits that the run uses. Raise ConfigError, with the location of a row, if it can't use one.

    Prompts alone are for methods that sample; others leave them out if bad rows are skipped. refusal: see prepare_pairs.
    """
    loss = config.loss
    if splits.prompt_alone and not config.method.is_online:
        train, held_out = splits.train.with_responses(), splits.held_out.with_responses()
        if config.data.on_bad_row is not OnBadRow.skip or not len(train):
            what = f"method={config.method.name} trains on" if refusal is None else "a reward model is trained on"
            raise ConfigError(
                f"{splits.prompt_alone}, and {what} pairs of responses; {INSTEAD}, or for training on samples method=rloo"
                " with reward=judge evals.judge.path=FOLDER, or reward=learned reward.path=FOLDER"
            )
        splits.counts["dropped: prompt alone"] = len(splits.train) - len(train) + len(splits.held_out) - len(held_out)
        splits = replace(splits, train=train, held_out=held_out)
    if refusal is None and not config.method.uses_loss:
        refusal = (
            f"method={config.method.name}: it takes prompts, alone or with two responses, and {{}}; {INSTEAD}, or with a"
            " prompt alone"
        )
    if splits.unpaired and (refusal := refusal or loss.refusal):
        raise ConfigError(refusal.format(splits.unpaired))
    gaps = np.concatenate([splits.train.score_gap, splits.held_out.score_gap])
    if loss.needs_scores and (missing := int(np.isnan(gaps).sum())):
        raise ConfigError(
            f"loss={loss.name}: {missing:,} of {len(gaps):,} pairs came without the scores that it takes; type loss=dpo, or"
            " name their columns, e.g. '+data.columns={score_chosen: a, score_rejected: b}'"
        )
    return splits


def check_responses(splits: Splits) -> None:
    """Raise ConfigError, with the location of the row, if it has no response for supervised fine-tuning."""
    if splits.prompt_alone:
        raise ConfigError(
            f"{splits.prompt_alone}, and supervised fine-tuning trains on responses; {INSTEAD}, or with"
            " prompt, completion and label"
        )
