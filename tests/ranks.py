"""Real processes for distributed tests: run a function of a test module in N gloo ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def become_rank(number: int, world_size: int) -> None:
    """Let this process be one rank of several, as torchrun would have started it."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world_size)}
    os.environ |= {"GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(world_size), "TORCHELASTIC_RUN_ID": "test"}


def run_in_ranks(module: str, function: str, world_size: int, *arguments: str, timeout: float = 180) -> list[str]:
    """Call module.function(rank, world_size, *arguments) in that many processes; gives what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    loading = f"import sys\nfrom dpo_lab.door import loading\nwith loading():\n    import {module} as m\n"
    code = loading + f"m.{function}(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])"
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(world_size), *arguments],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        results = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()  # one that hangs, and its partner
            process.wait()
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in results]
