"""Phases that run commands as a user types them: versions, tests, whole runs and their resume, out of memory."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from benchmarks.gpu_session.scale import Scale
from benchmarks.workload import make_pairs, make_tokenizer

Row = dict[str, Any]
REPOSITORY = Path(__file__).parents[2]
SHORT = (
    "policy=pretrained policy.path=policy data=jsonl data.path=pairs.jsonl data.batch_size=8 optim=default figures=false"
    " logger=csv evals.num_prompts=4 evals.num_texts=4 evals.num_train_pairs=8 evals.max_new_tokens=8"
).split()


def versions(scale: Scale, device: torch.device) -> Iterator[Row]:
    """The GPU, its driver's CUDA, and the order in which SDPA tries its kernels."""
    yield {"what": "cpu threads", "value": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        yield {"what": "gpu", "value": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"}
        yield {"what": "capability", "value": str(torch.cuda.get_device_capability(device))}
        yield {"what": "cuda, cudnn", "value": f"{torch.version.cuda}, {torch.backends.cudnn.version()}"}
        order = torch._C._get_sdp_priority_order()
        yield {"what": "order of SDPA's kernels", "value": str(order)}


def tests(scale: Scale, device: torch.device) -> Iterator[Row]:
    """`make test-gpu`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", f"--junitxml={report}"]
        subprocess.run(command, cwd=REPOSITORY, capture_output=True)
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    yield counts
    for case in suite.iter("testcase"):
        for failure in (*case.iter("failure"), *case.iter("error")):
            yield {"failed": case.get("name"), "message": str(failure.get("message")).splitlines()[0][:300]}


def runs(scale: Scale, device: torch.device) -> Iterator[Row]:
    """A run twice, one that SIGTERM stops and that is resumed, and the reference caches of a CPU run and a GPU run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_material(scale, folder)
        trainer = f"trainer={'gpu' if device.type == 'cuda' else 'cpu'}"
        command = ["-m", "dpo_lab.train", trainer, f"trainer.max_steps={scale.max_steps}", *SHORT]
        for name in ("first", "second"):
            start = time.monotonic()
            _run([*command, f"name={name}"], folder)
            yield {"run": name, "seconds": round(time.monotonic() - start, 2), "weights": _weights(folder, name)}
        stopped = _stop_after_a_step([*command, "name=resumed", "trainer.log_every_n_steps=1"], folder)
        _run([*command, "name=resumed", "trainer.log_every_n_steps=1"], folder)
        yield {"run": f"resumed after exit code {stopped}", "seconds": None, "weights": _weights(folder, "resumed")}
        caches = set(folder.glob("outputs/cache/reference-*.safetensors"))
        for precision in ("32-true", "bf16-mixed"):
            for kind in ("cpu", trainer.removeprefix("trainer=")):
                settings = [f"trainer={kind}", f"trainer.precision={precision}", "trainer.max_steps=1", *SHORT]
                _run(["-m", "dpo_lab.train", *settings, f"name={kind}-{precision}", "if_exists=restart"], folder)
                found = set(folder.glob("outputs/cache/reference-*.safetensors"))
                yield {"reference of": f"{kind}, {precision}", "new caches": len(found - caches)}
                caches = found


def out_of_memory(scale: Scale, device: torch.device) -> Iterator[Row]:
    """The line that a run ends with whose memory does not suffice."""
    if device.type != "cuda":
        yield {"skipped": "needs a GPU"}
        return
    limit = "import torch, runpy, sys; torch.cuda.set_per_process_memory_fraction(5e-4); sys.argv = sys.argv[1:]"
    code = f"{limit}; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    with tempfile.TemporaryDirectory() as name:
        _make_material(scale, folder := Path(name))
        done = _start(["-c", code, "dpo_lab.train", "trainer=gpu", *SHORT], folder)
        _, errors = done.communicate()
    yield {"exit code": done.returncode, "lines": len(errors.strip().splitlines()), "last": errors.strip()[-400:]}


def _make_material(scale: Scale, folder: Path) -> None:
    """Put a model of random weights into policy/ and pairs into pairs.jsonl."""
    torch.manual_seed(0)
    LlamaForCausalLM(scale.small).save_pretrained(folder / "policy")
    make_tokenizer(scale.small.vocab_size).save_pretrained(folder / "policy")
    with (folder / "pairs.jsonl").open("w") as file:
        for pair in make_pairs("short", 64, scale.small.vocab_size):
            parts = zip(("prompt", "chosen", "rejected"), (pair.prompt, pair.chosen, pair.rejected), strict=True)
            file.write(json.dumps({name: " ".join(f"w{token}" for token in part) for name, part in parts}) + "\n")


def _start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=pipe, text=True
    )


def _run(arguments: list[str], folder: Path) -> None:
    """Run to the end; raise RuntimeError with the last line of its errors."""
    process = _start(arguments, folder)
    _, errors = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}: {errors.strip()[-300:]}")


def _stop_after_a_step(arguments: list[str], folder: Path) -> int:
    """Start a run, send SIGTERM when its first step is logged, and return its exit code."""
    with _start(arguments, folder) as process:
        while process.poll() is None:
            if any(path.stat().st_size for path in folder.glob("outputs/resumed/*/*/metrics.jsonl")):
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.02)
        process.communicate()
    return process.returncode


def _weights(folder: Path, name: str) -> str:
    """A digest of the trained policy of a finished run."""
    record = next(folder.glob(f"outputs/{name}/*/*/run.json"))
    if json.loads(record.read_text())["status"] != "done":
        raise RuntimeError(f"{name}: not finished")
    digest = hashlib.sha256()
    for path in sorted(record.parent.glob("policy/*.safetensors")):
        for key, tensor in sorted(load_file(path).items()):
            digest.update(key.encode() + tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
