"""A real browser and a real TensorBoard, for tests that look at what a reader of a run sees."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = (
    "no browser is installed; type apt-get install chromium"
    if CHROMIUM is None
    else "playwright is not installed; type pip install playwright"
    if find_spec("playwright") is None
    else None
)


@contextmanager
def tensorboard(logdir: Path, seconds: float = 60) -> Iterator[str]:
    """TensorBoard over `logdir`, for this machine alone; gives its address, and is gone in the end."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        yield _address(process, time.monotonic() + seconds)
    finally:
        process.terminate()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def _address(process: subprocess.Popen, deadline: float) -> str:
    assert process.stderr is not None
    said = ""
    while (left := deadline - time.monotonic()) > 0 and process.poll() is None:
        if select.select([process.stderr], [], [], left)[0]:
            said += os.read(process.stderr.fileno(), 4096).decode()
            if found := re.search(r"at (http://127\.0\.0\.1:\d+)/", said):
                return found[1]
    raise AssertionError(f"TensorBoard did not start: {said}")


def asked(address: str, body: Any = None) -> Any:
    """What TensorBoard's own page would be answered."""
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


_open: list[Any] = []


@contextmanager
def chromium() -> Iterator[None]:
    """A headless Chromium for the pages of a module's tests: to start one takes seconds."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        _open.append(browser)
        try:
            yield
        finally:
            _open.remove(browser)
            browser.close()


@contextmanager
def page(width: int = 1600, height: int = 1000, **context: Any) -> Iterator[Any]:
    """A page, with a profile of its own, of the Chromium that runs; context: what else Playwright's new_page takes."""
    shown = _open[-1].new_page(viewport={"width": width, "height": height}, **context)
    try:
        yield shown
    finally:
        shown.close()
