"""Real processes for distributed tests: run a function of a test module in N gloo ranks."""

from __future__ import annotations

import importlib
import os
import socket
from contextlib import ExitStack
from pathlib import Path

from tests.support.warm import Warm

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def become_rank(number: int, world_size: int) -> None:
    """Let this process be one rank of several, as torchrun would have started it."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world_size)}
    os.environ |= {"GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(world_size), "TORCHELASTIC_RUN_ID": "test"}


def run_in_ranks(module: str, function: str, world_size: int, *arguments: str, timeout: float = 180) -> list[str]:
    """Call module.function(rank, world_size, *arguments) in that many processes; gives what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ExitStack() as stack:  # in the end none is left: neither one that hangs nor its partner
        ranks = [
            stack.enter_context(Warm(_call, module, function, rank, world_size, *arguments, cwd=REPOSITORY, **address))
            for rank in range(world_size)
        ]
        results = [rank.wait(timeout) for rank in ranks]
    for code, _, errors in results:
        assert code == 0, errors
    return [output for _, output, _ in results]


def _call(module: str, function: str, *arguments: str | int) -> None:
    getattr(importlib.import_module(module), function)(*arguments)
