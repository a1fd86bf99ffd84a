"""A later evaluation: load the trained policy, rebuild the inputs of its run, measure, record, summarise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dpo_lab.config.schema import ConfigError, RunConfig
from dpo_lab.evals.evaluate import evaluate
from dpo_lab.evals.evaluators.base import labels_of
from dpo_lab.models.policy import Lora, Policy, PolicyConfig, PolicyError, Pretrained, is_adapter, weights_digest
from dpo_lab.pipelines.eval_inputs import build_eval_context, load_judge, read_pair_sets
from dpo_lab.pipelines.inputs import prepare_pairs, select_on_device
from dpo_lab.pipelines.setup import forward_settings, logging_to, make_trainer, memory_explained, setup_process
from dpo_lab.pipelines.stage_timer import StageTimer
from dpo_lab.reporting.run_summary import print_summary
from dpo_lab.runs import evaluations, run_record
from dpo_lab.runs.cache import CACHE
from dpo_lab.runs.redact import redact_override
from dpo_lab.terminal.progress import plain_console


def evaluate_run(
    config: RunConfig,
    folder: Path,
    into: Path,
    name: str,
    overrides: Sequence[str],
    record: Mapping[str, Any] | None = None,
) -> None:
    """Evaluate the policy in `folder` against the initial policy of `config`, on its data, and write the result.

    record: the record of the run that trained the policy; raises RunRefused if data, tokenizer or a policy have changed
    since that run.
    """
    evaluations.check(into, name)
    setup_process(config)
    one_process = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    trainer = make_trainer(config, {"trainer": config.trainer | one_process, "callbacks": {}}, into)
    forward, timer = forward_settings(trainer), StageTimer()
    judge = load_judge(config, forward.device)
    trained = _load_trained(config.policy, folder)
    into.mkdir(parents=True, exist_ok=True)
    with logging_to(into), memory_explained(config, "the evaluation"):
        select_on_device(trained, CACHE, forward)
        inputs = prepare_pairs(config, CACHE, forward)
        identity = inputs.identity() | {"trained_policy": weights_digest(trained.model)}
        if record is not None:
            _check_identity(record, identity, config.policy)
        timer.stop("prepare")
        context = build_eval_context(config, inputs, trained, forward, judge, read_pair_sets(config, inputs.encoder))
        metrics = evaluate(context, config.evals.selected())
    result = {
        "run": str(into.parent) if record is not None else None,
        "trained": str(folder),
        "overrides": [redact_override(override) for override in overrides],
        "evals": asdict(config.evals),
        "identity": identity,
        "metrics": {name: estimate.as_record() for name, estimate in metrics.items()},
        **({"judge": costs} if judge is not None and (costs := judge.costs()) else {}),
        "samples": context.side_by_side[:16],
        "seconds": timer.stop("evaluate"),
        **run_record.provenance(),
    }
    path = evaluations.commit(into, name, result, context.examples)
    print_summary(plain_console(), metrics, labels_of(metrics), context.side_by_side, path, ())


def _load_trained(policy: PolicyConfig, folder: Path) -> Policy:
    """Load the policy in a folder with the settings of the initial policy; adapters are merged unless their base is
    quantized.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such folder; type trained=FOLDER of a policy, or run=FOLDER of a run that has one"
        )
    settings = policy if isinstance(policy, Pretrained) else Pretrained(path=str(folder))
    if not (settings.is_quantized and is_adapter(folder)):
        settings = replace(settings, lora=Lora(), quantize=None)
    settings = replace(settings, merge=False)
    if is_adapter(folder) and not is_adapter(Path(settings.path)):
        settings = replace(settings, adapter=str(folder))
    else:
        unset = {"adapter": None, "package": None, "gguf_file": None, "revision": None, "key_prefix": None}
        settings = replace(settings, path=str(folder), **unset)
    try:
        loaded = settings.load(cache=CACHE)
    except PolicyError as error:
        raise ConfigError(f"{folder}: {error}") from error
    loaded.model.eval()
    return loaded


def _check_identity(record: Mapping[str, Any], now: Mapping[str, str], policy: PolicyConfig) -> None:
    """Raise RunRefused if the hashes of the inputs differ from the recorded ones."""
    was = dict(record["identity"])
    if policy.is_quantized or not policy.has_adapters:  # else adapters are merged here, separate in the run
        was["trained_policy"] = record["trained_policy"]
    if changed := [f"{name} was {value}, is {now[name]}" for name, value in was.items() if now[name] != value]:
        raise run_record.RunRefused(
            f"the run had other inputs: {'; '.join(changed)}; restore them, or type trained= in place of run="
        )
