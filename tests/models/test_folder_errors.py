"""What can't be read is looked at, and the one line names the key that helps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors

from dpo_lab.models.folder_errors import unreadable
from dpo_lab.models.policy import PolicyError, Pretrained

pytestmark = pytest.mark.filterwarnings("ignore")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    without_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


def a_shard_missing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00003.safetensors")
    names = {f"w{i}": f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def config_with(**settings):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


def several_ggufs(folder: Path) -> None:
    without_config(folder)
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"GGUF")


OWN_CODE = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
FAULTS = {
    "pickled weights": (pickled, "its weights are pickled.*type policy.allow_pickle=true if you trust"),
    "no weights": (without_weights, "the folder holds no weights; type the path of"),
    "a shard missing": (a_shard_missing, "2 of the 3 files of its weights are missing .model-00002.*copy or download"),
    "a Git LFS pointer": (lfs_pointer, "model.safetensors is a Git LFS pointer.*type git lfs pull"),
    "a file cut short": (cut_short, "model.safetensors is damaged or truncated .*copy or download it again"),
    "code of its own": (
        config_with(model_type="mine", auto_map=OWN_CODE),
        "its config.json needs custom code .mine.Model.; type policy.trust_remote_code=true if you trust",
    ),
    "an unknown kind": (config_with(model_type="mine"), "has no model_type mine; type pip install -U transformers"),
    "no config": (without_config, "the folder has no config.json"),
    "no tokenizer": (without_tokenizer, "holds no tokenizer; put tokenizer.json and tokenizer_config.json"),
    "several GGUF files": (several_ggufs, "2 GGUF files; type policy.gguf_file= one of a.gguf, b.gguf"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_folder(name, policy, tmp_path):
    spoil, said = FAULTS[name]
    policy.save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(PolicyError, match=f"^policy.path={tmp_path}: .*{said}") as refused:
        Pretrained(path=str(tmp_path)).load()
    assert "\n" not in str(refused.value)


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(PolicyError, match=f"type policy.path={tmp_path} policy.gguf_file=x.gguf$"):
        Pretrained(path=str(tmp_path / "x.gguf")).load()
    with pytest.raises(PolicyError, match="no such GGUF file; type policy.gguf_file= one of x.gguf$"):
        Pretrained(path=str(tmp_path), gguf_file="y.gguf").load()


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "a/b/c"])
def test_a_folder_that_is_not_there(path):
    with pytest.raises(
        PolicyError, match=f"policy.path={path}: no such folder; type the path of a Hugging Face folder"
    ):
        Pretrained(path=path).load()


def test_a_name_on_the_hub_while_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = str(unreadable(Pretrained(path="someone/model"), OSError("We couldn't connect")))
    assert "HF_HUB_OFFLINE is set; type the path of a Hugging Face folder, or unset HF_HUB_OFFLINE" in line
    assert "hf download someone/model" in line


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.GatedRepoError, "request access at https://huggingface.co/someone/model, then type hf auth login"),
        (errors.RepositoryNotFoundError, "no such model on the hub"),
        (errors.RevisionNotFoundError, "it has no revision v9; type policy.revision="),
    ],
)
def test_what_the_hub_answers(kind, said, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    error = OSError("you are trying to access something")
    error.__cause__ = kind.__new__(kind)
    assert said in str(unreadable(Pretrained(path="someone/model", revision="v9"), error))
