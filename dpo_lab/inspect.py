"""The door of inspection: python -m dpo_lab.inspect [key=value ...] looks at the pairs before a run trains on them."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from dpo_lab import config, door

config.register()


@hydra.main(version_base="1.3", config_path=config.conf_dir(), config_name="inspect")
def inspect(cfg: DictConfig) -> None:
    door.settle(cfg, _inspect)


def _inspect(settings: config.RunConfig) -> None:
    assert isinstance(settings, config.InspectConfig)
    print("dpo_lab: pairs", flush=True)  # before the seconds that torch takes to load
    with door.loading():
        from dpo_lab.inspection import report, terminal
        from dpo_lab.inspection.look import look
        from dpo_lab.results.cache import CACHE
        from dpo_lab.results.progress import plain_console

    target = report.target(settings.page)
    found = look(settings, CACHE)
    terminal.show(plain_console(), found)
    if target:
        report.write(found, target)
        print(f"Written: {target}")


def main() -> int:
    return door.open_door(inspect)


if __name__ == "__main__":
    sys.exit(main())
