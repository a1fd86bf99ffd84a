"""How a process computes: what it frees is kept for the next step, on the CPU alone."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FAULTS = """
import resource, sys, torch
from dpo_lab.training.torch_setup import setup_torch
setup_torch(threads=1, on_cpu=sys.argv[1] == "cpu")
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    before = faults()
    held = [torch.empty(2**24).fill_(1.0) for _ in range(2)]  # 64 MB each
    return faults() - before
settled = [work() for _ in range(15)][-5:]  # at first the heap grows
print(max(settled), torch.get_num_threads(), torch.tensor(1e-40).mul(1.0).item())
"""


def measure(device: str) -> tuple[int, int, float]:
    """(page faults of 128 MB of tensors made again, threads, what becomes of a denormal), in a process of its own."""
    result = subprocess.run([sys.executable, "-c", FAULTS, device], capture_output=True, text=True, check=True)
    faults, threads, denormal = result.stdout.split()
    return int(faults), int(threads), float(denormal)


@pytest.mark.extended
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keeping memory is a setting of glibc's malloc")
def test_a_cpu_run_keeps_its_memory_and_others_give_it_back():
    kept, given_back = measure("cpu"), measure("gpu")
    assert kept[0] < 100 < given_back[0]
    assert kept[1:] == given_back[1:] == (1, 0.0)


@pytest.mark.extended
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the kernel has no huge pages")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is glibc's")
def test_the_heap_of_a_cpu_run_is_in_huge_pages():
    script = (
        "from dpo_lab.training.torch_setup import keep_memory; keep_memory(); print(open('/proc/self/smaps').read())"
    )
    maps = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    heaps = re.findall(r"\[heap\]\nSize: +(\d+) kB.*?VmFlags: ([a-z0-9 ]+)", maps, re.DOTALL)
    assert any(int(kilobytes) > 10**6 and "hg" in flags.split() for kilobytes, flags in heaps)
