"""Points to be killed at, counted and not timed, and trials that are forks of a process which has loaded torch already."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

from dpo_lab.runs import metrics_log
from dpo_lab.training import checkpoint_io
from dpo_lab.training.checkpoint_io import VerifiedCheckpointIO


def fork(action: Callable[[], object]) -> int:
    """Do it in a fork of this process; its exit code, that of an exception is 1, less a signal's number."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def told(tick: Callable[[str], None]) -> Iterator[None]:
    """Call tick(what) before every write, fsync, replace and removal of a checkpoint, optimizer step and row of the journal."""

    def before(owner: object, name: str, what: Callable[..., str]):
        real = getattr(owner, name)

        def instead(*args, **kwargs):
            tick(what(*args))
            return real(*args, **kwargs)

        return patch.object(owner, name, instead)

    with ExitStack() as stack:
        for patched in (
            before(checkpoint_io._HashingWriter, "write", lambda *_: "write"),
            before(os, "fsync", lambda handle: f"fsync {os.path.basename(os.readlink(f'/proc/self/fd/{handle}'))}"),
            before(os, "replace", lambda source, target: f"replace {target.name}"),
            before(VerifiedCheckpointIO, "remove_checkpoint", lambda io, path: f"remove {path.name}"),
            before(torch.optim.AdamW, "step", lambda *_: "step"),
            before(metrics_log, "append", lambda *_: "append"),
        ):
            stack.enter_context(patched)
        yield
