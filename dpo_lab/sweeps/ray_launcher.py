"""A Hydra launcher for Ray: each job a Ray task with CPUs and GPUs of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from dpo_lab import plugins
from dpo_lab.config.schema import ConfigError


class RayLauncher(Launcher):
    """A launcher for Ray. init: arguments of ray.init; remote: the resources of each job (num_cpus, num_gpus)."""

    def __init__(self, init: DictConfig, remote: DictConfig) -> None:
        self._init, self._remote = (_to_dict(node) for node in (init, remote))

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        check()
        ray: Any = import_module("ray")
        with _signals_kept():
            ray.init(**(_environment() | self._init))
        try:
            shared = ray.put((self._context, self._config, self._task, Singleton.get_state()))
            start = ray.remote(**self._remote, max_retries=0)(_run).remote
            tasks = [start(shared, list(job), initial_job_idx + i) for i, job in enumerate(job_overrides)]
            return [_result(ray, task) for task in tasks]
        finally:
            ray.shutdown()


def check() -> None:
    """Raise ConfigError if Ray is not installed."""
    if find_spec("ray") is None:
        raise ConfigError("launcher=ray: its package is not installed; type pip install 'dpo_lab[ray]'")


def _environment() -> dict[str, Any]:
    """Return what workers need to import the plugins of this process, also on other machines of a cluster."""
    names = (plugins.INHERITED, "PYTHONPATH") if plugins.loaded() else ()
    variables = {name: os.environ[name] for name in names if name in os.environ}
    return {"runtime_env": {"env_vars": variables}} if variables else {}


def _run(shared: tuple[Any, ...], overrides: list[str], number: int) -> JobReturn:
    """Run one Hydra job in a worker process of Ray."""
    context, config, task, state = shared
    setup_globals()
    Singleton.set_state(state)
    cfg = context.config_loader.load_sweep_config(config, overrides)
    with open_dict(cfg):
        cfg.hydra.job.id = cfg.hydra.job.num = number
        cfg.hydra.runtime.cwd = config.hydra.runtime.cwd
    HydraConfig.instance().set_config(cfg)
    return run_job(
        hydra_context=context,
        task_function=task,
        config=cfg,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def _result(ray: Any, task: Any) -> JobReturn:
    """Return the result of a task; a crash becomes its failed result, and the other tasks continue."""
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        return JobReturn(status=JobStatus.FAILED, _return_value=error)


@contextmanager
def _signals_kept():
    """Restore this process's handler of SIGTERM, which ray.init replaces."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def _to_dict(node: DictConfig) -> dict[str, Any]:
    settings: dict[str, Any] = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
    return {key: value for key, value in settings.items() if value is not None}
