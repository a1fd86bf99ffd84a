"""A later evaluation: load the trained policy, rebuild the inputs of its run, measure, record, summarise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dpo_lab.config.schema import ConfigError, RunConfig
from dpo_lab.evals.evaluate import evaluate
from dpo_lab.models.policy import Policy, PolicyConfig, PolicyError, Pretrained, is_adapter, weights_digest
from dpo_lab.pipelines.eval_inputs import build_eval_context, load_judge
from dpo_lab.pipelines.inputs import prepare_pairs
from dpo_lab.pipelines.session import forward_settings, logging_to, make_trainer, setup_process
from dpo_lab.reporting.run_summary import print_summary
from dpo_lab.runs import evaluations, run_record
from dpo_lab.runs.cache import CACHE
from dpo_lab.runs.redact import redact_override
from dpo_lab.terminal.progress import plain_console
from dpo_lab.training.callbacks.throughput import StageTimer


def evaluate_run(
    config: RunConfig,
    folder: Path,
    into: Path,
    name: str,
    overrides: Sequence[str],
    record: Mapping[str, Any] | None = None,
) -> None:
    """Measure the policy in `folder` against the initial one of `config`, on its data; the result goes to `into`.

    record: of the run that trained it. Raises RunRefused where the data, the tokenizer or a policy are not what that run's
    were.
    """
    evaluations.check(into, name)
    setup_process(config)
    alone = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    trainer = make_trainer(config, {"trainer": config.trainer | alone, "callbacks": {}}, into)
    forward, clock = forward_settings(trainer), StageTimer()
    judge = load_judge(config, forward.device)
    trained = _trained(config.policy, folder)
    into.mkdir(parents=True, exist_ok=True)
    with logging_to(into):
        material = prepare_pairs(config, CACHE, forward)
        identity = material.identity() | {"trained_policy": weights_digest(trained.model)}
        if record is not None:
            _check_identity(record, identity, config.policy)
        clock.lap("prepare")
        subject = build_eval_context(config, material, trained, forward, judge)
        metrics = evaluate(subject, config.evals.evaluators())
    result = {
        "run": str(into.parent) if record is not None else None,
        "trained": str(folder),
        "overrides": [redact_override(override) for override in overrides],
        "evals": asdict(config.evals),
        "identity": identity,
        "metrics": {name: estimate.as_record() for name, estimate in metrics.items()},
        "samples": subject.side_by_side[:16],
        "seconds": clock.lap("evaluate"),
        **run_record.provenance(),
    }
    path = evaluations.commit(into, name, result, subject.examples)
    print_summary(plain_console(), metrics, subject.side_by_side, path, ())


def _trained(policy: PolicyConfig, folder: Path) -> Policy:
    """The policy in a folder, read with the settings that the initial one was read with; adapters are merged."""
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such folder; type trained=FOLDER of a policy, or run=FOLDER of a run that has one"
        )
    settings = policy if isinstance(policy, Pretrained) else Pretrained(path=str(folder))
    settings = replace(settings, rank=None, merge=False)
    if is_adapter(folder) and not is_adapter(Path(settings.path)):
        settings = replace(settings, adapter=str(folder))
    else:
        elsewhere = {"adapter": None, "package": None, "gguf_file": None, "revision": None, "key_prefix": None}
        settings = replace(settings, path=str(folder), **elsewhere)
    try:
        loaded = settings.load(cache=CACHE)
    except PolicyError as error:
        raise ConfigError(f"{folder}: {error}") from error
    loaded.model.eval()
    return loaded


def _check_identity(record: Mapping[str, Any], now: Mapping[str, str], policy: PolicyConfig) -> None:
    was = dict(record["identity"])
    if not policy.has_adapters:  # else merged here, and apart there
        was["trained_policy"] = record["trained_policy"]
    if changed := [f"{name} was {value}, is {now[name]}" for name, value in was.items() if now[name] != value]:
        raise run_record.RunRefused(
            f"this is not what the run worked on: {'; '.join(changed)}; put it back, or type trained= in place of run="
        )
