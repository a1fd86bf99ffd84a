"""The life of a reward model's run: prepare the inputs, train on the pairs, measure, record."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from lightning.pytorch import seed_everything
from omegaconf import DictConfig
from transformers import AutoTokenizer, PreTrainedModel

from dpo_lab.cli.next_steps import after_reward
from dpo_lab.config.reward_model import reward_record
from dpo_lab.config.schema import ConfigError, RunConfig
from dpo_lab.core.bradley_terry import BRADLEY_TERRY
from dpo_lab.core.seeds import derive_seed
from dpo_lab.data.warnings import data_warnings
from dpo_lab.distributed.collectives import broadcast_object
from dpo_lab.evals.reward_model import LABELS, RewardContext, evaluate_reward_model
from dpo_lab.models.copies import trainable_copy
from dpo_lab.models.policy import Policy, PolicyError
from dpo_lab.models.probes import hard_positions
from dpo_lab.models.reward_export import end_of, exported, share_of_equal_tokens
from dpo_lab.models.reward_head import with_reward_head
from dpo_lab.models.sharded_weights import from_rank_zero, gather_model
from dpo_lab.models.sharding import Facts, on_device
from dpo_lab.pipelines.eval_inputs import build_eval_context
from dpo_lab.pipelines.inputs import Forward, TrainingInputs, prepare_pairs
from dpo_lab.pipelines.session import Session, open_session
from dpo_lab.rewards.base import texts_of
from dpo_lab.rewards.learned import FACTS, Learned
from dpo_lab.runs.atomic_write import write_atomic
from dpo_lab.runs.cache import CACHE
from dpo_lab.runs.examples import EXAMPLES
from dpo_lab.stats.text import percent
from dpo_lab.training.memory import MemoryTracker
from dpo_lab.training.reward_module import RewardModule

log = logging.getLogger("dpo_lab")

FOLDER = "reward_model"  # in a run folder
UNPAIRED = "a reward model compares two responses to a prompt, and {}; type data.path= of pairs"
TEXTS = 64  # held-out pairs whose texts are tokenized as the judge will


def train_reward(
    cfg: DictConfig,
    config: RunConfig,
    folder: Path,
    overrides: Sequence[str] | None = None,
    waits: bool = False,
) -> None:
    """Train and measure a reward model in `folder`, in one process or as one rank of several; a finished run is not
    started again.

    overrides, waits: see open_session. Raises ConfigError if the data are plain texts or the policy is quantized.
    """
    if config.sft.text_column is not None or config.data.has_texts:
        raise ConfigError("sft.text_column, data.format=text: plain texts hold no preference; type data.path= of pairs")
    if config.policy.is_quantized:
        raise ConfigError(
            "policy.quantize: a reward model is saved with its adapters merged, which weights of 4 bits would round; type"
            " policy.quantize=null"
        )
    with open_session(config, reward_record(cfg, config), folder, overrides, waits) as session:
        if session is not None:
            _run_stages(session)


def _run_stages(session: Session) -> None:
    """Prepare the inputs, train, save the reward model, measure it, and write the run's record."""
    config, run, trainer, forward = session.config, session.run, session.trainer, session.forward
    assert isinstance(config.reward, Learned)
    inputs = prepare_pairs(config, CACHE, forward, UNPAIRED)
    quality = inputs.quality()
    for line in data_warnings(quality):
        log.warning("data: %s", line)
    session.record_inputs(inputs)
    seconds = session.timer.stop("prepare")
    run.update(data_quality=quality.as_record(), loss_traits=BRADLEY_TERRY.traits(), seconds=seconds)
    seed_everything(config.seed, workers=True, verbose=False)
    memory = MemoryTracker(forward.device)
    model = _reward_model(inputs.initial.model, derive_seed(config.seed, "reward head"), forward)
    memory.count_weights(model, None)
    module = RewardModule(
        model,
        config.optim,
        config.reward.centring,
        total_steps=trainer.max_steps,
        batch_size=config.data.batch_size,
        tokens_per_microbatch=config.data.forward_tokens,
    )
    session.train(module, inputs, session.preference_data(inputs))
    session.record_training("reward", memory)
    responses = (side for pair in inputs.train for side in (pair.chosen, pair.rejected))
    end = end_of(islice(responses, 2 * TEXTS), inputs.encoder.end_ids)
    trained = session.save_trained(module, inputs, FOLDER, lambda policy: exported(policy.model, policy.tokenizer, end))
    _measure(session, inputs, trained)


def _reward_model(initial: PreTrainedModel, seed: int, forward: Forward) -> PreTrainedModel:
    """Return the reward model to train, on the forward's device; a collective where it is sharded."""
    try:
        if forward.sharding is None:
            return on_device(with_reward_head(trainable_copy(initial), seed), forward.device)
        whole, refusal = gather_model(initial), None
        try:
            whole = None if whole is None else with_reward_head(whole, seed)
        except PolicyError as error:
            refusal = error
        if (refusal := broadcast_object(refusal)) is not None:
            raise refusal
        facts = None if whole is None else Facts(None, hard_positions(whole))
        return from_rank_zero(forward.sharding, whole, facts)
    except PolicyError as error:
        raise ConfigError(str(error)) from None


def _measure(session: Session, inputs: TrainingInputs, trained: Policy) -> None:
    """Evaluate the trained reward model, and write what its folder says of it."""
    config, run = session.config, session.run
    context = RewardContext.of(build_eval_context(config, inputs, trained, session.forward, None), trained)
    metrics = evaluate_reward_model(context, getattr(config.evals, "calibration"))  # noqa: B009
    rewards = context.sample_rewards if len(context.prompts) else None
    if run.writes:
        context.examples.write(run.folder / EXAMPLES)
        facts = {
            "mean": 0.0 if rewards is None else float(rewards.mean()),
            "sd": None if rewards is None else float(rewards.std()),
            "samples": 0 if rewards is None else len(rewards),
            "tokenizer": inputs.encoder.fingerprint,
            "judged_alike": _judged_alike(session.saved, inputs),
            "accuracy": {
                name: each.as_record() for name, each in metrics.items() if name in ("accuracy", "true_accuracy")
            },
        }
        write_atomic(session.saved / FACTS, json.dumps(facts, indent=1))
    session.finish(metrics, LABELS, trained, after_reward)


def _judged_alike(folder: Path, inputs: TrainingInputs) -> float | None:
    """Return for which share of texts the judge that loads `folder` sees the tokens of training; warn if not of all."""
    encoder, pairs = inputs.encoder, list(islice(inputs.held_out, TEXTS))
    if not pairs:
        return None
    texts = texts_of(encoder, [pair.prompt for pair in pairs], [pair.chosen for pair in pairs])
    share = share_of_equal_tokens(AutoTokenizer.from_pretrained(folder, local_files_only=True), pairs, texts)
    if share < 1:
        log.warning(
            "as evals.judge.path= the reward model gets other tokens than in training for %s of %d held-out responses:"
            " their texts were truncated, or are tokenized otherwise behind their prompts",
            percent(1 - share),
            len(pairs),
        )
    return share
