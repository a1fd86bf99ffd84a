"""Start the ranks of a run on this machine: what makes a process a rank, how many there are, and how they end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from dpo_lab.distributed.resource_locks import acquire_port, visible_gpus
from dpo_lab.distributed.signals import StopSignal
from dpo_lab.distributed.supervisor import (
    ERROR_FILE,
    EXIT_CODES,
    ExitStatus,
    Rank,
    RepeatableStopRequest,
    root_cause,
    supervise,
)

PARENT = "DPO_LAB_PARENT"  # the process that a child of ours must not outlive
STORE = "DPO_LAB_STORE"  # all ranks are of this machine: rank 0 opens what they meet at, to this machine alone
OPENED = "TORCHELASTIC_USE_AGENT_STORE"  # torch's word for it: no rank opens the store, it is there

# What tells a process that it is a rank; none of it may leak from one run into another's processes.
DDP_VARIABLES = frozenset(
    "MASTER_ADDR MASTER_PORT NODE_RANK LOCAL_RANK RANK WORLD_SIZE GROUP_RANK LOCAL_WORLD_SIZE PL_GLOBAL_SEED"
    " TORCHELASTIC_RUN_ID".split()
) | {PARENT, ERROR_FILE, STORE, OPENED}

MEETING = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")  # what ranks on several machines find each other by


def is_rank() -> bool:
    """Whether this process is one rank of a run already: started by us, by torchrun, or as one of several SLURM tasks."""
    return "RANK" in os.environ or "LOCAL_RANK" in os.environ or _slurm_tasks() > 1


def rank() -> int:
    """This process's rank among all of its run's, 0 where it is no rank."""
    known = os.environ
    if "RANK" in known:
        return int(known["RANK"])
    if (
        "LOCAL_RANK" in known
    ):  # Lightning's own ranks have no more than that; one machine is all they can be told apart on
        node = int(known.get("NODE_RANK", known.get("GROUP_RANK", "0")))
        return node * int(known.get("LOCAL_WORLD_SIZE", "1")) + int(known["LOCAL_RANK"])
    return int(known["SLURM_PROCID"]) if _slurm_tasks() > 1 else 0


def _slurm_tasks() -> int:
    """Tasks of the SLURM step that this process is one of; 0 in an interactive job, by the names that Lightning goes by."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return 0 if interactive or "SLURM_PROCID" not in os.environ else int(os.environ.get("SLURM_NTASKS", "1"))


def num_local_ranks(accelerator: str, devices: int | str | Sequence[int], num_nodes: int = 1) -> int:
    """How many ranks this machine runs under the settings `trainer.accelerator`, `.devices` and `.num_nodes`, without torch.

    Raises ValueError where a setting can't be, or where the GPUs that it asks for can't be counted.
    """
    if num_nodes < 1:
        raise ValueError(f"trainer.num_nodes={num_nodes}: must be 1 or more; type e.g. trainer.num_nodes=1")
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
    """Let the kernel send this process `signum` when the one that started it dies (Linux); now, if that was `parent`, who is
    dead already and has been replaced by another process.

    To be called in the thread that lives as long as the process.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, int(signum))  # PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signum)


def stop(process: subprocess.Popen, signum: int, grace: float) -> None:
    """Send `signum` to a process that leads a session of its own, wait `grace` seconds, then kill all that is left of it."""
    if process.poll() is None:
        process.send_signal(signum)  # the leader alone: it stops its ranks itself
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
    """Run `command` as `count` ranks of this machine, out of `nodes` alike, and wait until all of them are gone.

    Rank 0 writes where this process writes, each other rank N to `folder`/rank-N.log. `environment` is all that they see
    beside the variables of their rank (default: os.environ). When a rank fails, the others are stopped: the first to fail
    is the culprit. When this process is asked to stop, the ranks are asked, once; they have `grace` seconds to put their
    work in safety, or until a second signal; then StopSignal is raised. No process is left in either case. Raises ValueError
    where several nodes have not been told how to meet.
    """
    base = dict(os.environ if environment is None else environment)
    if "SLURM_NTASKS" in base:
        base["SLURM_JOB_NAME"] = "interactive"  # else Lightning takes the job's one task for the only rank
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        node, meeting = _rendezvous(base, nodes, held)
        shared = {k: v for k, v in base.items() if k not in DDP_VARIABLES} | meeting
        asked = RepeatableStopRequest()
        held.enter_context(asked)
        ranks: list[Rank] = []
        for local in range(count):
            number = node * count + local
            places = {"NODE_RANK": node, "GROUP_RANK": node, "LOCAL_RANK": local, "RANK": number}
            sizes = {"LOCAL_WORLD_SIZE": count, "WORLD_SIZE": count * nodes, PARENT: os.getpid()}
            variables = shared | {name: str(value) for name, value in (places | sizes).items()}
            ranks.append(Rank.start(number, command, folder, cwd, variables))
            held.callback(ranks[-1].close)
        supervise(ranks, asked, grace)
        if asked.signum is None:
            return root_cause(ranks)
        root_cause(
            [each for each in ranks if each.code not in EXIT_CODES and not each.stopped]
        )  # to show what failed on the way out
        asked.obey(asked.signum)
        raise StopSignal(asked.signum)


def _rendezvous(base: Mapping[str, str], nodes: int, held: ExitStack) -> tuple[int, dict[str, str]]:
    """This machine's number, and where the ranks meet: a port leased until `held` closes, or what the user set."""
    if nodes == 1:
        here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.enter_context(acquire_port()))}
        return 0, here | {STORE: "1", OPENED: "True"}
    missing = [name for name in MEETING if not base.get(name)]
    node = base.get("NODE_RANK", "")
    if missing or not node.isdigit() or int(node) >= nodes:
        what = f"{', '.join(missing)} not set" if missing else f"NODE_RANK={node} is not one of 0 to {nodes - 1}"
        raise ValueError(
            f"trainer.num_nodes={nodes}: {what}; on each node type e.g. NODE_RANK=0 MASTER_ADDR=node0 MASTER_PORT=29500"
            " before the command, or start it by torchrun or srun"
        )
    return int(node), {name: base[name] for name in MEETING[1:]}
