"""A fork server: a process that imports what jobs need, once, and forks itself for each of them.

multiprocessing's own server lives as long as a process that it started, so a job would survive the one that waits for it;
this one is killed with its parent, and its processes know it by launcher.PARENT.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from io import RawIOBase
from typing import IO

from dpo_lab.distributed.launcher import PARENT, set_parent_death_signal


@contextmanager
def fast_imports() -> Iterator[None]:
    """Pause the garbage collector while a run's modules are imported; this takes a third off the time of the imports.

    Imports create a million objects that live as long as the process. The garbage collector would traverse them
    repeatedly during the imports and in every full collection later; here it is off, and afterwards ignores them
    (`gc.freeze`).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class ForkServer:
    """A process that has imported a module, which runs one command at a time and ends with the process that started it.

    Linux only. environment, cwd: of its processes. Only for what uses no GPU: CUDA does not work in a fork of a process that
    has looked for one.
    """

    def __init__(self, imported: str, environment: Mapping[str, str], cwd: str) -> None:
        self._of = imported, dict(environment), cwd
        self._socket, its_socket = socket.socketpair()
        with its_socket:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, imported],
                env={**environment, PARENT: str(os.getpid())},
                cwd=cwd,
                start_new_session=True,
                stdin=its_socket.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def serves(self, imported: str, environment: Mapping[str, str], cwd: str) -> bool:
        """Return whether it runs, and has this module imported, this environment and this folder."""
        return self.process.poll() is None and self._of == (imported, environment, cwd)

    def start(self, command: Sequence[str], output: IO[bytes]) -> Fork:
        """Start `python -m *command` as a session of its own, whose output is appended to an open file.

        Waits for the imports. Raises ConnectionError if the server has ended, say by an import that failed.
        """
        socket.send_fds(self._socket, [b"\n"], [output.fileno()])
        self._socket.sendall(json.dumps([*command]).encode() + b"\n")
        replies = self._socket.makefile("rb", buffering=0)  # so that nothing that was received is hidden from select
        if not (pid := replies.readline()):
            raise ConnectionResetError("the fork server has ended")
        # nothing to read: the server was killed, and the kernel has asked its process to stop
        return Fork(int(pid), replies, lambda: int(replies.readline() or -signal.SIGTERM))

    def close(self) -> None:
        """End the server. The kernel asks a process that it has started to stop, as if its parent had died."""
        self._socket.close()
        self.process.kill()
        self.process.wait()


class Fork:
    """A forked process, with methods of subprocess.Popen.

    ended: what select finds readable once it has ended; exit_code: called once then, returns its exit code.
    """

    returncode: int | None = None

    def __init__(self, pid: int, ended: RawIOBase | int, exit_code: Callable[[], int]) -> None:
        self.pid, self._ended, self._exit_code = pid, ended, exit_code

    def poll(self) -> int | None:
        """Return the exit code, as subprocess has it; None while the process runs."""
        return self._read(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the process and return its exit code. Raise TimeoutExpired after `timeout` seconds."""
        if (code := self._read(timeout)) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return code

    def send_signal(self, signum: int) -> None:
        """Send a signal to the process, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """Kill the process, if it runs."""
        self.send_signal(signal.SIGKILL)

    def _read(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], timeout)[0]:
            self.returncode = self._exit_code()
        return self.returncode


def serve(imported: str) -> None:
    """Import a module, then fork for each request of the socket on stdin until it is closed.

    Returns in a forked process, too, when that has run its module. A request is a file, then a line of JSON; the replies to
    it are the process id and, in the end, the exit code, a line each. The kernel kills this process with its parent.
    """
    set_parent_death_signal(signal.SIGKILL, int(os.environ[PARENT]))
    os.environ[PARENT] = str(os.getpid())
    with socket.socket(fileno=os.dup(0)) as connection:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        with fast_imports():
            import_module(imported)
        requests = connection.makefile("rb", buffering=0)
        while output := socket.recv_fds(connection, 1, 1)[1]:
            command = json.loads(requests.readline())
            if (pid := os.fork()) == 0:
                break
            os.close(*output)
            connection.sendall(f"{pid}\n".encode())
            connection.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
        else:
            return
        requests.close()
    _become(command, output[0])


def _become(command: Sequence[str], output: int) -> None:
    """Run a module in this process as `python -m` does, as a session of its own that writes to `output`.

    SIGTERM ends it, also if the process that started the server ignores it.
    """
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    sys.argv = [*command]
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve(sys.argv[1])
