"""The command `python -m dpo_lab.sft [key=value ...]`: supervised fine-tuning, which makes a policy that DPO starts
from.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from dpo_lab.cli import entry_point
from dpo_lab.cli.next_steps import after_sft, print_finished_run
from dpo_lab.config import schema

schema.register()


@hydra.main(version_base="1.3", config_path=schema.conf_dir(), config_name="sft")
def sft(cfg: DictConfig) -> float | None:
    return entry_point.validate_and_run(cfg, lambda settings: _sft(cfg, settings))


def _sft(cfg: DictConfig, settings: schema.RunConfig) -> None:
    def run(folder: Path) -> None:
        with entry_point.fast_imports():
            from dpo_lab.pipelines.train_sft import train_sft

        train_sft(cfg, settings, folder)

    def if_done(record: Mapping[str, Any], folder: Path) -> None:
        print_finished_run(record, folder, after_sft(settings, record["overrides"], folder))

    record = schema.sft_record(cfg, settings)
    entry_point.run_or_spawn_ranks(
        "dpo_lab.sft", settings, record, run=run, if_done=if_done, single_process=settings.is_embedded
    )


def main() -> int:
    return entry_point.run_command(sft, schema.sft_record)


if __name__ == "__main__":
    sys.exit(main())
