"""The command `python -m dpo_lab.inspect [key=value ...]`: show the preference pairs that a run would train on, and
export them.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from dpo_lab.cli import entry_point
from dpo_lab.config import inspection as config
from dpo_lab.config import schema
from dpo_lab.distributed.fork_server import fast_imports

schema.register()
config.register()


@hydra.main(version_base="1.3", config_path=schema.conf_dir(), config_name="inspect")
def inspect(cfg: DictConfig) -> None:
    entry_point.validate_and_run(cfg, _inspect)


def _inspect(settings: schema.RunConfig) -> None:
    assert isinstance(settings, config.InspectConfig)
    print("dpo_lab: pairs", flush=True)  # before torch is imported, which takes seconds
    with fast_imports():
        from dpo_lab.inspection import export, report, terminal
        from dpo_lab.inspection.look import inspect_pairs
        from dpo_lab.runs.cache import CACHE
        from dpo_lab.terminal.progress import plain_console

    target, exported = report.target(settings.page), export.check_target(settings.export)
    found = inspect_pairs(settings, CACHE)
    terminal.show(plain_console(), found)
    if target:
        report.write(found, target)
        print(f"Written: {target}")
    if exported:
        print(f"Written: {export.export_pairs(settings, CACHE, exported)}")


def main() -> int:
    return entry_point.run_command(inspect)


if __name__ == "__main__":
    sys.exit(main())
