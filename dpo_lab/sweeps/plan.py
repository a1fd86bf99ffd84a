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

from dpo_lab import plugins
from dpo_lab.config import schema
from dpo_lab.config.allowed_targets import check_hydra
from dpo_lab.runs import run_record
from dpo_lab.runs.cache import CACHE
from dpo_lab.runs.redact import redact, redact_override
from dpo_lab.sweeps.plan_cache import PlanCache, digest_of_sources

AsRecord = Callable[[DictConfig, schema.RunConfig], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    title: the overrides in which it differs from other jobs; sweep: the folder of the sweep; folder: of this run;
    record: its config as the run records it; files: the input files that it reads.
    """

    overrides: tuple[str, ...]
    title: str
    sweep: Path
    folder: Path
    record: Mapping[str, Any]
    files: tuple[Path, ...]

    def run_status(self) -> run_record.RunStatus:
        """Return how far the run is. Raise RunRefused if its folder holds another run."""
        return run_record.run_status(self.folder, self.record, self.files)


def combinations(arguments: Sequence[str], loader: ConfigLoader) -> list[tuple[str, list[str]]]:
    """Return (title, overrides) of every combination of the swept values; the title is what differs between them."""
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(arguments))
    (every,) = BasicSweeper.split_arguments(parsed, None)
    return list(zip(_titles(every), map(list, every), strict=True))


def plan(
    wanted: Sequence[tuple[str, Sequence[str]]], master: DictConfig, loader: ConfigLoader, as_record: AsRecord
) -> list[Job]:
    """Compose and validate the jobs `wanted`, (title, overrides) each. Raise ConfigError if one is invalid.

    master: the sweep's config, whose `hydra` node applies to all jobs; as_record(cfg, settings): a job's config as
    recorded.
    """
    titles = [title for title, _ in wanted]
    every = _named_by_what_varies([list(overrides) for _, overrides in wanted], master)
    known = [as_record.__name__, str(master.hydra.job.config_name), *raw_overrides(master.hydra.overrides.hydra), "--"]
    known += [plugin.sha256 for plugin in plugins.loaded()]
    cache = PlanCache(
        CACHE / "plans", digest_of_sources(master.hydra.runtime.config_sources, Path(schema.__file__).parent.parent)
    )
    jobs = []
    for overrides, title in zip(every, titles, strict=True):
        found = cache.get([*known, *overrides])
        if found is None:
            found = _compose(overrides, title, master, loader, as_record)
            if redact(found["record"]) == found["record"]:  # the cache holds no secrets
                cache.put([*known, *overrides], found, found["files"])
        sweep, folder, files = Path(found["sweep"]), Path(found["folder"]), tuple(map(Path, found["files"]))
        run_record.refuse_outside(folder)
        jobs.append(Job(tuple(overrides), title, sweep, folder, found["record"], files))
    cache.save()
    _check_folders(jobs)
    return jobs


def each(jobs: Sequence[Job], ask: Callable[[Job], run_record.RunStatus]) -> list[run_record.RunStatus]:
    """Return ask(job) of all jobs; if there are several, a RunRefused names the job."""
    statuses = []
    for job in jobs:
        try:
            statuses.append(ask(job))
        except run_record.RunRefused as error:
            raise run_record.RunRefused(f"job {job.title}: {error}" if len(jobs) > 1 else str(error)) from None
    return statuses


def _compose(
    overrides: Sequence[str], title: str, master: DictConfig, loader: ConfigLoader, as_record: AsRecord
) -> dict[str, Any]:
    """Compose and validate the config of one job, under its own `hydra` node."""
    singleton = HydraConfig.instance()
    sweep_cfg = singleton.cfg
    try:
        cfg = loader.load_sweep_config(master, list(overrides))
        singleton.set_config(cfg)
        check_hydra(cfg.hydra)
        sweep = Path(cfg.hydra.sweep.dir)
        folder = sweep / cfg.hydra.sweep.subdir
        with read_write(cfg), open_dict(cfg):
            del cfg["hydra"]
        settings = schema.validate(cfg)
        record = as_record(cfg, settings)
        _check_job(record["trainer"], master)
    except schema.ConfigErrors as error:
        raise schema.ConfigError(f"job {title}: {schema.explain(error)}") from None
    except schema.ConfigError as error:
        raise schema.ConfigError(f"job {title}: {error}") from None
    finally:
        singleton.cfg = sweep_cfg
    files = [str(file) for file in schema.input_files(settings)]
    return {"sweep": str(sweep), "folder": str(folder), "record": record, "files": files}


def raw_overrides(overrides: Any) -> list[str]:
    """Return overrides as they were typed, with interpolations unresolved."""
    return OmegaConf.to_container(overrides, resolve=False)  # type: ignore[return-value]


def _check_job(trainer: Mapping[str, Any], master: DictConfig) -> None:
    """Raise ConfigError if a job does not fit the resources that the launcher gives to each job."""
    launcher = str(OmegaConf.select(master, "hydra.launcher._target_"))
    devices = trainer.get("devices")
    if "joblib" in launcher and trainer.get("accelerator") != "cpu" and not (isinstance(devices, int) and devices > 0):
        raise schema.ConfigError(
            f"trainer.devices={devices}: with launcher=joblib each job uses GPUs of its own; type trainer.devices=1,"
            " or as many as a job needs"
        )
    if "submitit" in launcher or "Ray" in launcher:
        for key in ("devices", "num_nodes", "accelerator"):
            if trainer.get(key) != master.trainer.get(key):
                raise schema.ConfigError(
                    f"trainer.{key}: all jobs of a sweep request the same resources; run one sweep for each value"
                )


def _titles(every: Sequence[Sequence[str]]) -> list[str]:
    """Return each job's overrides that not all jobs share, as a title."""
    shared = set.intersection(*map(set, every)) if len(every) > 1 else set()
    own = [[o for o in overrides if o not in shared] or list(overrides) for overrides in every]
    return [" ".join(map(redact_override, overrides)) or "no overrides" for overrides in own]


def _named_by_what_varies(every: Sequence[Sequence[str]], master: DictConfig) -> list[list[str]]:
    """Return the jobs' overrides, extended so that every swept key, also trainer.max_steps, is in the folder name."""
    left_out = list(master.hydra.job.config.override_dirname.exclude_keys)
    shared = set.intersection(*map(set, every))
    varying = {o.partition("=")[0] for overrides in every for o in overrides if o not in shared}
    naming = varying & set(left_out) - {"name", "seed"}
    if not naming:
        return [list(overrides) for overrides in every]
    kept = ",".join(key for key in left_out if key not in naming)
    return [[*overrides, f"hydra.job.config.override_dirname.exclude_keys=[{kept}]"] for overrides in every]


def _check_folders(jobs: Sequence[Job]) -> None:
    """Raise ConfigError if two jobs share a folder, or if not all are in the same sweep folder."""
    if len({job.sweep for job in jobs}) > 1:
        raise schema.ConfigError("name: a sweep has one name; run one sweep for each name")
    first: dict[Path, Job] = {}
    for job in jobs:
        other = first.setdefault(job.folder, job)
        if other is not job:
            raise schema.ConfigError(
                f"job {job.title}: its folder {job.folder} is also that of job {other.title}; leave one of them out"
            )
