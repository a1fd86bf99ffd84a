"""Plan a sweep: compose and validate its jobs, give each a folder, and read how far each one is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from dpo_lab.runs.fingerprint import config_digest, override_key
from dpo_lab.runs.redact import redact, redact_override
from dpo_lab.sweeps.job_folders import STEPS, SUBDIR, JobFolders, as_override, named
from dpo_lab.sweeps.plan_cache import PlanCache, digest_of_sources

AsRecord = Callable[[DictConfig, schema.RunConfig], dict[str, Any]]


@dataclass(frozen=True)
class Wanted:
    """A run that a sweep should have. swept: those of its overrides that not all runs of the sweep share."""

    title: str
    overrides: Sequence[str]
    swept: Sequence[str]


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


def combinations(arguments: Sequence[str], loader: ConfigLoader) -> list[Wanted]:
    """Return every combination of the swept values; the title is what differs between them."""
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(arguments))
    (every,) = BasicSweeper.split_arguments(parsed, None)
    return [
        Wanted(" ".join(map(redact_override, swept or overrides)) or "no overrides", overrides, swept)
        for overrides, swept in zip(every, not_shared(every), strict=True)
    ]


def not_shared(every: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return each job's overrides that not all jobs have; all of them where there is one job."""
    shared = set.intersection(*map(set, every)) if len(every) > 1 else set()
    return [[override for override in overrides if override not in shared] for overrides in every]


def plan(
    wanted: Sequence[Wanted],
    master: DictConfig,
    loader: ConfigLoader,
    as_record: AsRecord,
    sweeps_beside: Callable[[Path], Sequence[Path]] | None = None,
) -> list[Job]:
    """Compose and validate the jobs `wanted`. Raise ConfigError if one is invalid.

    master: the sweep's config, whose `hydra` node applies to all jobs; as_record(cfg, settings): a job's config as
    recorded; sweeps_beside(folder of the sweep): folders of other sweeps whose runs count as this one's. If it is
    given, jobs with equal settings share a folder; without it, two jobs of one folder are an error.
    """
    known = [as_record.__name__, str(master.hydra.job.config_name), *raw_overrides(master.hydra.overrides.hydra), "--"]
    known += [plugin.sha256 for plugin in plugins.loaded()]
    cache = PlanCache(
        CACHE / "plans", digest_of_sources(master.hydra.runtime.config_sources, Path(schema.__file__).parent.parent)
    )
    jobs = []
    for want in wanted:
        found = cache.get([*known, *want.overrides])
        if found is None:
            found = _compose(want.overrides, want.title, master, loader, as_record)
            if redact(found["record"]) == found["record"]:  # the cache holds no secrets
                cache.put([*known, *want.overrides], found, found["files"])
        folder, files = Path(found["folder"]), tuple(map(Path, found["files"]))
        jobs.append(Job(tuple(want.overrides), want.title, Path(found["sweep"]), folder, found["record"], files))
    cache.save()
    _check_sweep(jobs)
    if OmegaConf.to_container(master.hydra.sweep, resolve=False)["subdir"] == SUBDIR:  # type: ignore[index]
        jobs = _in_folders(wanted, jobs, list(master.hydra.job.config.override_dirname.exclude_keys), sweeps_beside)
    for job in jobs:
        run_record.refuse_outside(job.folder)
    _check_folders(jobs, shares=sweeps_beside is not None)
    return jobs


def _in_folders(
    wanted: Sequence[Wanted],
    jobs: Sequence[Job],
    left_out: Sequence[str],
    sweeps_beside: Callable[[Path], Sequence[Path]] | None,
) -> list[Job]:
    """Return the jobs in the folders that JobFolders chooses. left_out: keys that don't name a folder by themselves."""
    sweep = jobs[0].sweep
    extends = STEPS in left_out and not any(override_key(o) == STEPS for want in wanted for o in want.swept)
    others = sweeps_beside(sweep) if sweeps_beside else ()
    records, found = [job.record for job in jobs], []
    folders = JobFolders(sweep, records, others, extends=extends, shares=sweeps_beside is not None)
    for want, job in zip(wanted, jobs, strict=True):
        name = named(want.swept, [o for o in want.overrides if o not in want.swept], left_out)
        folder = folders.choose(name or job.folder.parent.name, job.record, job.files)
        if folder != job.folder:
            job = replace(job, folder=folder, overrides=(*job.overrides, as_override(folder, sweep)))
        found.append(job)
    return found


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
        schema.check_files(settings)
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


def _check_sweep(jobs: Sequence[Job]) -> None:
    """Raise ConfigError if not all jobs are in the same sweep folder."""
    if len({job.sweep for job in jobs}) > 1:
        raise schema.ConfigError("name: a sweep has one name; run one sweep for each name")


def _check_folders(jobs: Sequence[Job], shares: bool) -> None:
    """Raise ConfigError if two jobs share a folder, unless `shares` and their settings are equal."""
    first: dict[Path, Job] = {}
    for job in jobs:
        other = first.setdefault(job.folder, job)
        if other is not job and not (shares and config_digest(other.record) == config_digest(job.record)):
            raise schema.ConfigError(
                f"job {job.title}: its folder {job.folder} is also that of job {other.title}; leave one of them out"
            )
