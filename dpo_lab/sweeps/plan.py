"""Plan a sweep: compose and validate its jobs, give each a folder, and read how far each one is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from dpo_lab.config import schema
from dpo_lab.runs import run_record
from dpo_lab.runs.cache import CACHE
from dpo_lab.runs.redact import redact, redact_override
from dpo_lab.sweeps.job import raw_overrides
from dpo_lab.sweeps.plan_cache import PlanCache, digest_of_sources

AsRecord = Callable[[DictConfig, schema.RunConfig], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One run of a sweep. title: the overrides that tell it from the others; record: its config as it is recorded."""

    overrides: tuple[str, ...]
    title: str
    sweep: Path  # the folder of the whole
    folder: Path
    record: Mapping[str, Any]
    files: tuple[Path, ...]

    def standing(self) -> run_record.RunStatus:
        """How far the run is. Raises RunRefused where another one lies in its folder."""
        return run_record.run_status(self.folder, self.record, self.files)


def combinations(arguments: Sequence[str], loader: ConfigLoader) -> list[tuple[str, list[str]]]:
    """(title, overrides) of every combination of the swept values; the title is what tells it from the others."""
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(arguments))
    (every,) = BasicSweeper.split_arguments(parsed, None)
    return list(zip(_titles(every), map(list, every), strict=True))


def plan(
    wanted: Sequence[tuple[str, Sequence[str]]], master: DictConfig, loader: ConfigLoader, as_record: AsRecord
) -> list[Job]:
    """The cells of `wanted`, (title, overrides) each. Raises ConfigError, naming the cell, if any can't be run.

    master: the sweep's own config, whose `hydra` node holds for all cells; as_record(cfg, settings): what is recorded of one.
    """
    titles = [title for title, _ in wanted]
    every = _named_by_what_varies([list(overrides) for _, overrides in wanted], master)
    known = [as_record.__name__, str(master.hydra.job.config_name), *raw_overrides(master.hydra.overrides.hydra), "--"]
    memory = PlanCache(
        CACHE / "plans", digest_of_sources(master.hydra.runtime.config_sources, Path(schema.__file__).parent.parent)
    )
    cells = []
    for overrides, title in zip(every, titles, strict=True):
        found = memory.recall([*known, *overrides])
        if found is None:
            found = _compose(overrides, title, master, loader, as_record)
            if redact(found["record"]) == found["record"]:  # a secret is in no file of ours
                memory.remember([*known, *overrides], found, found["files"])
        sweep, folder, files = Path(found["sweep"]), Path(found["folder"]), tuple(map(Path, found["files"]))
        run_record.refuse_outside(folder)
        cells.append(Job(tuple(overrides), title, sweep, folder, found["record"], files))
    memory.save()
    _refuse_shared_folders(cells)
    return cells


def each(cells: Sequence[Job], ask: Callable[[Job], run_record.RunStatus]) -> list[run_record.RunStatus]:
    """ask(cell) of all cells; a refusal names the cell where there are several."""
    answers = []
    for cell in cells:
        try:
            answers.append(ask(cell))
        except run_record.RunRefused as error:
            raise run_record.RunRefused(f"cell {cell.title}: {error}" if len(cells) > 1 else str(error)) from None
    return answers


def _compose(
    overrides: Sequence[str], title: str, master: DictConfig, loader: ConfigLoader, as_record: AsRecord
) -> dict[str, Any]:
    holder = HydraConfig.instance()
    held = holder.cfg
    try:
        cfg = loader.load_sweep_config(master, list(overrides))
        holder.set_config(cfg)
        sweep = Path(cfg.hydra.sweep.dir)
        folder = sweep / cfg.hydra.sweep.subdir
        with read_write(cfg), open_dict(cfg):
            del cfg["hydra"]
        settings = schema.validate(cfg)
        record = as_record(cfg, settings)
        _check_job(record["trainer"], master)
    except schema.ConfigErrors as error:
        raise schema.ConfigError(f"cell {title}: {schema.explain(error)}") from None
    except schema.ConfigError as error:
        raise schema.ConfigError(f"cell {title}: {error}") from None
    finally:
        holder.cfg = held
    files = [str(file) for file in schema.input_files(settings)]
    return {"sweep": str(sweep), "folder": str(folder), "record": record, "files": files}


def _check_job(trainer: Mapping[str, Any], master: DictConfig) -> None:
    """A cell must fit what the launcher gives to each."""
    launcher = str(OmegaConf.select(master, "hydra.launcher._target_"))
    devices = trainer.get("devices")
    if "joblib" in launcher and trainer.get("accelerator") != "cpu" and not (isinstance(devices, int) and devices > 0):
        raise schema.ConfigError(
            f"trainer.devices={devices}: with launcher=joblib each cell takes GPUs of its own; type trainer.devices=1,"
            " or as many as a cell needs"
        )
    if "submitit" in launcher or "Ray" in launcher:
        for key in ("devices", "num_nodes", "accelerator"):
            if trainer.get(key) != master.trainer.get(key):
                raise schema.ConfigError(
                    f"trainer.{key}: the cells of one sweep are jobs of one size; run a sweep for each trainer.{key}"
                )


def _titles(every: Sequence[Sequence[str]]) -> list[str]:
    """Each cell's overrides that are not all cells'."""
    shared = set.intersection(*map(set, every)) if len(every) > 1 else set()
    own = [[o for o in overrides if o not in shared] or list(overrides) for overrides in every]
    return [" ".join(map(redact_override, overrides)) or "alone" for overrides in own]


def _named_by_what_varies(every: Sequence[Sequence[str]], master: DictConfig) -> list[list[str]]:
    """The cells, told to name their folders by every key that is swept: trainer.max_steps, say, which else names none."""
    left_out = list(master.hydra.job.config.override_dirname.exclude_keys)
    shared = set.intersection(*map(set, every))
    varying = {o.partition("=")[0] for overrides in every for o in overrides if o not in shared}
    naming = varying & set(left_out) - {"name", "seed"}
    if not naming:
        return [list(overrides) for overrides in every]
    kept = ",".join(key for key in left_out if key not in naming)
    return [[*overrides, f"hydra.job.config.override_dirname.exclude_keys=[{kept}]"] for overrides in every]


def _refuse_shared_folders(cells: Sequence[Job]) -> None:
    if len({cell.sweep for cell in cells}) > 1:
        raise schema.ConfigError("name: one sweep has one name; run a sweep for each name")
    first: dict[Path, Job] = {}
    for cell in cells:
        other = first.setdefault(cell.folder, cell)
        if other is not cell:
            raise schema.ConfigError(
                f"cell {cell.title}: it lies in {cell.folder}, as cell {other.title} does; leave one of them out"
            )
