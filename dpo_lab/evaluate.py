"""The door of evaluation: python -m dpo_lab.evaluate run=DIR [evals.key=value ...] measures what is trained already."""

from __future__ import annotations

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
    from dpo_lab.evaluation_run import evaluate_again

    evaluate_again(chosen, trained, folder / "evaluations", settings.name, overrides, record)


def main() -> int:
    return door.open_door(evaluate)


if __name__ == "__main__":
    sys.exit(main())
