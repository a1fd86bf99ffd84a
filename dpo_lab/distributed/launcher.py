"""Start the ranks of a run on this machine: what makes a process a rank, how many there are, and how they end together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_lab.distributed.resource_locks import visible_gpus
from dpo_lab.distributed.signals import StopSignal
from dpo_lab.distributed.supervisor import (
    ERROR_FILE,
    EXIT_CODES,
    STORE,
    ExitStatus,
    Rank,
    RepeatableStopRequest,
    root_cause,
    start_rank,
    supervise,
)
from dpo_lab.errors import check_at_least

if TYPE_CHECKING:
    from dpo_lab.distributed.fork_server import Fork

PARENT = "DPO_LAB_PARENT"  # the parent's process id: the child ends when that process does
OPENED = "TORCHELASTIC_USE_AGENT_STORE"  # torch's variable: the store exists already, so no rank opens one

# The variables of a rank; they must not be inherited by the processes of another run.
DDP_VARIABLES = frozenset(
    "MASTER_ADDR MASTER_PORT NODE_RANK LOCAL_RANK RANK WORLD_SIZE GROUP_RANK LOCAL_WORLD_SIZE PL_GLOBAL_SEED"
    " TORCHELASTIC_RUN_ID".split()
) | {PARENT, ERROR_FILE, STORE, OPENED}

RENDEZVOUS = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")  # by which ranks on several machines find each other


def is_rank() -> bool:
    """Return whether this process is a rank: of this launcher, of torchrun, or one of several SLURM tasks."""
    return "RANK" in os.environ or "LOCAL_RANK" in os.environ or _slurm_tasks() > 1


def rank() -> int:
    """Return this process's rank among all ranks of its run; 0 if it is not a rank."""
    env = os.environ
    if "RANK" in env:
        return int(env["RANK"])
    if "LOCAL_RANK" in env:  # ranks started by Lightning have only this one, which is unique on one machine
        node = int(env.get("NODE_RANK", env.get("GROUP_RANK", "0")))
        return node * int(env.get("LOCAL_WORLD_SIZE", "1")) + int(env["LOCAL_RANK"])
    return int(env["SLURM_PROCID"]) if _slurm_tasks() > 1 else 0


def _slurm_tasks() -> int:
    """Return the tasks of this process's SLURM step; 0 in an interactive job, by the names that Lightning uses."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return 0 if interactive or "SLURM_PROCID" not in os.environ else int(os.environ.get("SLURM_NTASKS", "1"))


def num_local_ranks(accelerator: str, devices: int | str | Sequence[int], num_nodes: int = 1) -> int:
    """Return the number of ranks on this machine for `trainer.accelerator`, `.devices` and `.num_nodes`, without torch.

    Raises ValueError if a setting is invalid, or if the GPUs that it asks for can't be counted.
    """
    check_at_least("trainer.num_nodes", num_nodes, 1, 1)
    if isinstance(devices, str) and devices != "auto":
        try:
            devices = [int(x) for x in devices.split(",") if x.strip()] if "," in devices else int(devices)
        except ValueError:
            raise ValueError(
                f"trainer.devices={devices}: not a number of devices; type e.g. trainer.devices=2"
            ) from None
    if isinstance(devices, int) and devices != -1:
        if devices < 1:
            raise ValueError(
                f"trainer.devices={devices}: must be 1 or more, or -1 for all; type e.g. trainer.devices=1"
            )
        return devices
    if not isinstance(devices, (int, str)):
        if not devices or len(set(devices)) < len(devices):
            raise ValueError(
                f"trainer.devices={list(devices)}: must name devices, each once; type e.g. trainer.devices=[0]"
            )
        return len(devices)
    if accelerator not in ("gpu", "cuda", "auto"):
        return 1
    gpus = visible_gpus()
    if not gpus and accelerator != "auto":
        why = (
            "no GPU is visible"
            if gpus == []
            else "neither CUDA_VISIBLE_DEVICES nor nvidia-smi says how many GPUs there are"
        )
        raise ValueError(f"trainer.devices={devices}: {why}; type their number, e.g. trainer.devices=2, or trainer=cpu")
    return len(gpus or [""])


def set_parent_death_signal(signum: int, parent: int | None = None) -> None:
    """Have the kernel (Linux) send this process `signum` when its parent dies; send it now if `parent` is dead.

    Call it in a thread that lives as long as the process, the main thread.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, int(signum))  # PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signum)


def stop(process: subprocess.Popen | Fork, signum: int, grace: float) -> None:
    """Send `signum` to the leader of a session, wait `grace` seconds, then kill the processes left in the session."""
    if process.poll() is None:
        process.send_signal(signum)  # only the leader: it stops its ranks itself
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_ranks(
    command: Sequence[str],
    count: int,
    *,
    folder: Path,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    nodes: int = 1,
    grace: float = 120.0,
) -> ExitStatus:
    """Run `command` as `count` ranks on this machine, one of `nodes` machines, and wait until all of them have ended.

    Rank 0 inherits this process's output; rank N writes to `folder`/rank-N.log. environment: the variables of the ranks
    besides those of their rank (default: os.environ). If a rank fails, the others are stopped, and the first to fail is
    reported. If this process is asked to stop, it forwards the signal once; the ranks have `grace` seconds to save, or
    until a second signal; then StopSignal is raised. No process is left in either case. Raises ValueError if the
    variables by which several nodes find each other are not set.
    """
    base = dict(os.environ if environment is None else environment)
    if "SLURM_NTASKS" in base:
        base["SLURM_JOB_NAME"] = "interactive"  # or Lightning would take the SLURM task for the only rank
    folder.mkdir(parents=True, exist_ok=True)
    with RepeatableStopRequest() as request, ExitStack() as stack:
        node, address = _rendezvous(base, nodes, stack)
        shared = {k: v for k, v in base.items() if k not in DDP_VARIABLES} | address
        ranks: list[Rank] = []
        for local in range(count):
            number = node * count + local
            places = {"NODE_RANK": node, "GROUP_RANK": node, "LOCAL_RANK": local, "RANK": number}
            sizes = {"LOCAL_WORLD_SIZE": count, "WORLD_SIZE": count * nodes, PARENT: os.getpid()}
            variables = shared | {name: str(value) for name, value in (places | sizes).items()}
            ranks.append(stack.enter_context(start_rank(number, command, folder, cwd, variables)))
            shared.pop(STORE, None)
        supervise(ranks, request, grace)
        if request.signum is None:
            return root_cause(ranks)
        root_cause([rank for rank in ranks if rank.code not in EXIT_CODES and not rank.stopped])  # prints its log
        request.raise_or_requeue(request.signum)
        raise StopSignal(request.signum)


def _rendezvous(base: Mapping[str, str], nodes: int, stack: ExitStack) -> tuple[int, dict[str, str]]:
    """Return this node's rank and the variables by which ranks find each other.

    On a single node that is a socket which listens on a free port until `stack` closes; else it is the user's choice.
    """
    if nodes == 1:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
        return 0, address | {STORE: str(listener.fileno()), OPENED: "True"}
    missing = [name for name in RENDEZVOUS if not base.get(name)]
    node = base.get("NODE_RANK", "")
    if missing or not node.isdigit() or int(node) >= nodes:
        what = f"{', '.join(missing)} not set" if missing else f"NODE_RANK={node} is not one of 0 to {nodes - 1}"
        raise ValueError(
            f"trainer.num_nodes={nodes}: {what}; on each node type e.g. NODE_RANK=0 MASTER_ADDR=node0 MASTER_PORT=29500"
            " before the command, or start it by torchrun or srun"
        )
    return int(node), {name: base[name] for name in RENDEZVOUS[1:]}
