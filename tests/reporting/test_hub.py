"""A run's model is pushed to a hub on this machine: what is asked of it, what it gets, and what it never gets."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dpo_lab import push
from dpo_lab.reporting import hub
from dpo_lab.runs.run_record import RunRefused
from tests.conftest import REPOSITORY

TOKEN = "hf_" + "t" * 30
SECRET = "a line of somebody's data"


class Hub(ThreadingHTTPServer):
    """What a push needs of the hub's HTTP interface. refuses: the status of every answer; private: of the repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.refuses: int | None = None
        self.private = True
        self.calls: list[tuple[str, str, str | None]] = []
        self.created: list[dict[str, Any]] = []
        self.received: dict[str, bytes] = {}
        self.committed: list[dict[str, Any]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, content: Any = None, status: int = 200) -> None:
        body = json.dumps({} if content is None else content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_call(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.server.calls.append((self.command, path, self.headers.get("Authorization")))
        if self.server.refuses is not None:
            return self.answer({"error": "no"}, self.server.refuses)
        if path.endswith("/repos/create"):
            self.server.created.append(json.loads(body))
            return self.answer({"url": f"{self.server.address}/me/mine", "name": "me/mine"})
        if path == "/api/validate-yaml":  # of the model card
            return self.answer({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            return self.answer({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.address}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if path.startswith("/lfs/"):
            self.server.received[path] = body
            return self.answer()
        if path.endswith("/commit/main"):
            self.server.committed += [json.loads(line) for line in body.splitlines()]
            return self.answer({"commitUrl": f"{self.server.address}/me/mine/commit/1", "commitOid": "1"})
        if path == "/api/models/me/mine":
            return self.answer({"id": "me/mine", "private": self.server.private, "siblings": [], "tags": []})
        return self.answer({"error": "not found"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = handle_call


@pytest.fixture
def local_hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a finished run, with what must not leave it."""
    folder = tmp_path / "seed=0"
    (folder / "policy").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "done", "samples": [SECRET], "config": {}}))
    (folder / "examples.jsonl").write_text(SECRET)
    for name in ("README.md", "config.json", "tokenizer.json", "model.safetensors", "adapter_config.json"):
        (folder / "policy" / name).write_text(f"{name} of the policy")
    for name in ("pairs.jsonl", "train.parquet", ".env", "optimizer.pt", "notes.txt"):
        (folder / "policy" / name).write_text(SECRET)
    return folder


def pushed(hub: Hub, run: Path, *options: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, since huggingface_hub reads its endpoint when it is imported."""
    environment = {"HF_ENDPOINT": hub.address, "PYTHONPATH": str(REPOSITORY), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HOME": str(run), "PATH": "", **({"HF_TOKEN": token} if token else {})}
    command = [sys.executable, "-m", "dpo_lab.push", str(run), "me/mine", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_model_is_pushed_and_nothing_of_the_data(local_hub, run):
    result = pushed(local_hub, run)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == f"Pushed: {local_hub.address}/me/mine"
    assert local_hub.created[0]["name"] == "mine"
    assert local_hub.created[0].get("private") is True or local_hub.created[0].get("visibility") == "private"
    files = {line["value"]["path"] for line in local_hub.committed if line["key"] in ("file", "lfsFile")}
    assert files == {"README.md", "config.json", "tokenizer.json", "model.safetensors", "adapter_config.json"}
    assert list(local_hub.received.values()) == [b"model.safetensors of the policy"]
    sent = [
        base64.b64decode(line["value"]["content"]).decode() for line in local_hub.committed if line["key"] == "file"
    ]
    assert "README.md of the policy" in sent
    assert SECRET not in sent
    asked = {path: token for _, path, token in local_hub.calls if path.startswith(("/api/repos", "/api/models"))}
    assert set(asked.values()) == {f"Bearer {TOKEN}"}  # what anybody may ask, as if a card is valid, needs none
    assert TOKEN not in result.stdout + result.stderr
    assert not [path for path in run.rglob("*") if path.is_file() and TOKEN in path.read_text(errors="replace")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "said"), [(401, "(401): the token is not valid"), (403, "(403): the token has no right to write there")]
)
def test_what_the_hub_refuses_is_one_line(status, said, local_hub, run):
    local_hub.refuses = status
    result = pushed(local_hub, run)
    assert result.returncode == 1
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert TOKEN not in result.stderr


@pytest.mark.slow
def test_a_public_repository_is_asked_for(local_hub, run):
    local_hub.private = False
    result = pushed(local_hub, run)
    assert (result.returncode, local_hub.committed) == (2, [])
    assert "me/mine: is public; type --public to push there" in result.stderr
    assert pushed(local_hub, run, "--public").returncode == 0
    assert local_hub.committed


@pytest.mark.slow
def test_without_a_network_it_is_one_line(local_hub, run):
    local_hub.shutdown()
    local_hub.server_close()
    result = pushed(local_hub, run)
    assert result.returncode == 1
    assert f"me/mine: {local_hub.address} can't be reached" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_dry_run_lists_the_files(run, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert push.main([str(run), "me/mine", "--dry-run"]) == 0
    listed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["README.md", "adapter_config.json", "config.json", "model.safetensors", "tokenizer.json"]
    assert push.main([str(run), "me/mine"]) == 2
    assert capsys.readouterr().err == (
        "error: HF_TOKEN is not set; make a token with the right to write and type export HF_TOKEN=...\n"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: (run / "run.json").unlink(), "holds no run.json"),
        (lambda run: (run / "run.json").write_text('{"status": "failed", "config": {}}'), "its status is failed"),
        (lambda run: (run / "policy" / "model.safetensors").unlink(), "holds no weights"),
    ],
)
def test_a_folder_without_a_finished_model_is_refused(change, said, run):
    change(run)
    with pytest.raises(RunRefused, match=said):
        hub.files_to_push(run)
