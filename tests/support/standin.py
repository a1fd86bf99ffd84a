"""A command like the others whose runs take no time and need no torch: what they do stands in a file beside them.

`behaviour.json` maps parts of a run folder's path to one of `fails`, `killed`, `leaves` (exit 0, early) and `waits` (until
it is asked to stop, or `go` is there). Each start adds a line to `starts.log`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig

from dpo_lab.cli import entry_point
from dpo_lab.config import schema
from dpo_lab.distributed.signals import StopRequest
from dpo_lab.runs import run_record

schema.register()


@hydra.main(version_base="1.3", config_path=schema.conf_dir(), config_name="train")
def main(cfg: DictConfig) -> float | None:
    return entry_point.validate_and_run(cfg, lambda settings: live(cfg, settings))


def live(cfg: DictConfig, settings: schema.RunConfig) -> None:
    record = schema.as_record(cfg, settings)

    def run(folder: Path) -> None:
        assert "torch" not in sys.modules
        said = {
            "pid": os.getpid(),
            "argv": sys.argv[1:],
            "rank": os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")),
        }
        said |= {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "threads": os.environ.get("OMP_NUM_THREADS")}
        with Path("starts.log").open("a") as log:
            log.write(json.dumps(said) + "\n")
        if said["rank"] != "0":
            return
        with run_record.acquire_run(folder, record, sys.argv[1:]) as held:
            if held is not None:
                behave(folder)
                held.update(metrics={"accuracy": {"value": settings.beta, "se": None, "n": 1, "interval": None}})

    entry_point.run_or_spawn_ranks(
        "tests.support.standin",
        settings,
        record,
        run=run,
        if_done=lambda record, folder: None,
        imported="dpo_lab.cli.entry_point",
    )


def behave(folder: Path) -> None:
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "step-1.ckpt").touch()  # so much is done
    table = json.loads(Path("behaviour.json").read_text()) if Path("behaviour.json").exists() else {}
    for what in (what for part, what in table.items() if part in str(folder)):
        if what == "fails":
            raise ValueError("the loss is not finite\nand more")
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "leaves":
            os._exit(0)
        assert what == "waits"
        print("waiting", flush=True)
        with StopRequest() as request:
            while not Path("go").exists():
                if request.signum is not None:
                    request.raise_or_requeue(request.signum)
                time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(entry_point.run_command(main))
