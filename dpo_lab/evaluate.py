"""The door of evaluation: python -m dpo_lab.evaluate run=DIR [evals.key=value ...] measures what is trained already."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dpo_lab import config, door, recorded

config.register()
recorded.register()


@hydra.main(version_base="1.3", config_path=config.conf_dir(), config_name="evaluate")
def evaluate(cfg: DictConfig) -> None:
    door.settle(cfg, lambda settings: _evaluate(cfg, settings))


def _evaluate(cfg: DictConfig, settings: config.RunConfig) -> None:
    assert isinstance(settings, recorded.EvaluateConfig)
    overrides = list(HydraConfig.get().overrides.task)
    record = None
    if settings.run is not None:
        folder = Path(settings.run)
        record = recorded.finished(folder)
        chosen, trained = recorded.settings_of(record, cfg, overrides), folder / "policy"
    else:
        folder, chosen, trained = Path("outputs"), settings, Path(str(settings.trained))
    print(f"dpo_lab: {trained}", flush=True)  # before the seconds that torch takes to load
    with door.loading():
        from dpo_lab.evaluation_run import evaluate_again

    evaluate_again(chosen, trained, folder / "evaluations", settings.name, overrides, record)


def as_path(argument: str) -> str:
    """run= and trained= as Hydra reads them whole: folders of runs hold commas and equals signs."""
    key, _, value = argument.partition("=")
    is_bare = key in ("run", "trained") and value and value[0] not in "\"'" and value != "null"
    return f"{key}={json.dumps(value, ensure_ascii=False)}" if is_bare else argument


def main() -> int:
    sys.argv[1:] = map(as_path, sys.argv[1:])
    return door.open_door(evaluate)


if __name__ == "__main__":
    sys.exit(main())
