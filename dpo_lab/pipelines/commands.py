"""The commands that train a model, for the command line and for dpo_lab.api: what each of them runs, records and suggests
next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dpo_lab.cli import entry_point, next_steps
from dpo_lab.config import reward_model, schema
from dpo_lab.distributed.fork_server import fast_imports
from dpo_lab.runs import run_record
from dpo_lab.sweeps.plan import AsRecord

schema.register()
reward_model.register()

Pipeline = Callable[[DictConfig, schema.RunConfig, Path], None]
NextSteps = Callable[[schema.RunConfig, Sequence[str], Path], list[str]]


@dataclass(frozen=True)
class Command:
    """A command that trains a model.

    module: that `python -m` runs; config_name: of its file in conf/; as_record: returns the config as a run records it;
    next_steps: returns the commands to suggest after a run; pipeline: the name of the function that runs it and of its
    module in dpo_lab.pipelines, which is imported when it is needed, since it loads torch.
    """

    module: str
    config_name: str
    as_record: AsRecord
    next_steps: NextSteps
    pipeline: str

    def main(self, hydra_main: Callable[[], None]) -> int:
        """Run the command line and return the exit code. hydra_main: the decorated function that calls `start`."""
        return entry_point.run_command(hydra_main, self.as_record)

    def start(self, cfg: DictConfig) -> float | None:
        """Validate the config that Hydra composed, and train here or on as many ranks as the trainer has devices.

        The process ends with one line and exit code 2 on errors that the user can fix.
        """
        return entry_point.validate_and_run(cfg, lambda settings: self._start(cfg, settings))

    def _start(self, cfg: DictConfig, settings: schema.RunConfig) -> None:
        def run(folder: Path) -> None:
            with fast_imports():
                pipeline = self.load()
            pipeline(cfg, settings, folder)

        def if_done(record: Mapping[str, Any], folder: Path) -> None:
            next_steps.print_finished_run(record, folder, self.next_steps(settings, record["overrides"], folder))

        entry_point.run_or_spawn_ranks(
            self.module,
            settings,
            self.as_record(cfg, settings),
            run=run,
            if_done=if_done,
            single_process=self.makes_no_record(settings),
            imported=self._module_of_pipeline,
        )

    def load(self) -> Pipeline:
        """Import and return the function that runs the command."""
        return getattr(import_module(self._module_of_pipeline), self.pipeline)

    @property
    def _module_of_pipeline(self) -> str:
        return f"dpo_lab.pipelines.{self.pipeline}"

    def makes_no_record(self, settings: schema.RunConfig) -> bool:
        """Return whether the command only fills the cache, in one process: supervised fine-tuning of the embedded policy."""
        return self is SFT and settings.is_embedded

    def is_done(self, cfg: DictConfig, settings: schema.RunConfig, folder: Path) -> bool:
        """Return whether the folder holds the finished run of a config. Raise RunRefused if it holds another run."""
        status = run_record.run_status(folder, self.as_record(cfg, settings), schema.input_files(settings))
        return status is run_record.RunStatus.done


TRAIN = Command("dpo_lab.train", "train", schema.as_record, next_steps.after_training, "train_dpo")
SFT = Command("dpo_lab.sft", "sft", schema.sft_record, next_steps.after_sft, "train_sft")
REWARD = Command("dpo_lab.reward", "reward_model", reward_model.reward_record, next_steps.after_reward, "train_reward")
