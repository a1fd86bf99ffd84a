"""Load a model from a folder, the hub, a GGUF file or a package, whole or with low-rank adapters."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dpo_lab.models.adapters import base_of, with_fresh_adapters, with_trained_adapters
from dpo_lab.models.checkpoint_keys import check_keys
from dpo_lab.models.decoding import sample_without_cache
from dpo_lab.models.folder_errors import unreadable
from dpo_lab.models.paths import causal_lm
from dpo_lab.models.policy import Dtype, Policy, PolicyError, Pretrained, is_adapter
from dpo_lab.models.probes import behaviour_of
from dpo_lab.models.quantized import keep_packing, quantization_of, requantized
from dpo_lab.runs.out_of_memory import OutOfMemory, explain_out_of_memory

log = logging.getLogger(__name__)


def read_tokenizer(settings: Pretrained) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with the end token as pad token if it has none, and with the chat template of the settings.

    Raises PolicyError if it can't be loaded or has no end token.
    """
    settings = _locate(settings)
    if settings.adapter is not None and (Path(settings.adapter) / "tokenizer_config.json").exists():
        # the tokenizer that the adapters were trained with
        settings = replace(settings, path=settings.adapter, revision=None, gguf_file=None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.path, **_source(settings))
    except Exception as error:  # many types, depending on hub, file and format
        raise unreadable(settings, error, "tokenizer") from error
    if tokenizer.eos_token_id is None:
        raise PolicyError(
            f"policy.path={settings.path}: its tokenizer has no end-of-sequence token; set eos_token in"
            " tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by position, never by token id
    if settings.chat_template is not None:
        try:
            tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyError(
                f"policy.chat_template={settings.chat_template}: {error}; type the path of a Jinja file"
            ) from None
    return tokenizer


def read_policy(settings: Pretrained, seed: int) -> Policy:
    """Load model and tokenizer, with adapters if the settings name them; raise PolicyError if they can't be loaded."""
    settings = _locate(settings)
    if settings.gguf_file is None:  # such a file is always a causal language model, and its header is read with it
        _read_config(settings)
    model, tokenizer = _read_model(settings), read_tokenizer(settings)
    if settings.adapter is not None:
        model = with_trained_adapters(model, settings)
    elif settings.lora.r is not None:
        model = with_fresh_adapters(model, settings, seed)
    _freeze_other_towers(model)
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index,union-attr]
    for name in ("eos", "pad"):
        token: int = getattr(tokenizer, f"{name}_token_id")
        if token < rows:
            continue
        if name == "eos":
            raise PolicyError(
                f"policy.path={settings.path}: the end token of its tokenizer is token {token}, its model's embedding has"
                f" {rows} rows: the tokenizer is not that of the model; type the path of a model with its own tokenizer"
            )
        log.info("policy: pad token %d exceeds the %d rows of the embedding; padding with the end token", token, rows)
        tokenizer.pad_token = tokenizer.eos_token
    return Policy(model.eval(), tokenizer)  # peft leaves adapters in train mode, with dropout


def untrained_model(settings: Pretrained) -> PreTrainedModel:
    """Return the model that the settings name, of random weights: only its config is read, and that of its adapters."""
    settings = _locate(settings)
    model = AutoModelForCausalLM.from_config(
        _read_config(settings), dtype=getattr(torch, settings.dtype.value), trust_remote_code=settings.trust_remote_code
    )
    model = model if settings.lora.r is None else with_fresh_adapters(model, settings, seed=0)
    _freeze_other_towers(model)
    return model


def _freeze_other_towers(model: PreTrainedModel) -> None:
    """Freeze what a model for text and images has beside its language model, adapters there too: no text runs through it,
    and DDP waits for the gradient of every trained weight.
    """
    bare = causal_lm(model)
    if bare.config.get_text_config() is bare.config:
        return
    parts = [bare.get_decoder(), bare.get_input_embeddings(), bare.get_output_embeddings()]
    of_text = {id(weight) for part in parts if part is not None for weight in part.parameters()}
    for weight in bare.parameters():
        if id(weight) not in of_text:
            weight.requires_grad_(False)


def untrained_classifier(folder: Path) -> PreTrainedModel:
    """Return the sequence classifier of a folder with random weights: only its config is read."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return AutoModelForSequenceClassification.from_config(config)


def check_behaviour(policy: Policy, settings: Pretrained, cache: Path | None) -> None:
    """Probe the model on made-up tokens: raise PolicyError if it is not causal, and disable the KV cache if it is
    wrong.

    cache: folder of cached results.
    """
    behaviour = behaviour_of(policy.model, cache)
    if behaviour.refused is not None:
        raise PolicyError(
            f"policy.path={settings.path}: {behaviour.refused}; type the path of a causal language model (a decoder)"
        )
    if behaviour.uncached is not None:
        log.info("sampling: a full forward pass per token, without a KV cache: %s", behaviour.uncached)
        sample_without_cache(policy.model)


def _locate(settings: Pretrained) -> Pretrained:
    """Return the settings with `path`, `gguf_file` and `adapter` resolved for a package or a folder of adapters."""
    package = find_spec(settings.package) if settings.package else None  # not imported: its dependencies may be missing
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
        base = base_of(folder)
        if not Path(base).is_dir() and not _may_be_on_the_hub(base):
            raise PolicyError(
                f"policy.path={folder}: the base model of these adapters, {base}, does not exist;"
                f" type policy.path=BASE policy.adapter={folder}"
            )
        return _locate(replace(settings, path=base, adapter=str(folder)))
    files = sorted(folder.glob("*.gguf"))
    if settings.gguf_file is None and len(files) == 1 and not (folder / "config.json").exists():
        return replace(settings, gguf_file=files[0].name)
    return settings


def _source(settings: Pretrained) -> dict[str, Any]:
    return {
        "revision": settings.revision,
        "gguf_file": settings.gguf_file,
        "trust_remote_code": settings.trust_remote_code,
        "local_files_only": Path(settings.path).is_dir(),  # no request to the hub for a folder
    }


def _no_report(record: logging.LogRecord) -> bool:
    """Filter out transformers' table of missing and unexpected keys, which check_keys reports in one line."""
    message = record.getMessage()
    return "LOAD REPORT" not in message or "CONVERSION" in message


def _may_be_on_the_hub(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None


def _read_config(settings: Pretrained) -> PreTrainedConfig:
    """Read config.json, or the header of a GGUF file. Raise PolicyError if it is not that of a causal language model."""
    try:
        config = AutoConfig.from_pretrained(settings.path, **_source(settings))
    except Exception as error:  # many types, depending on hub, file and format
        raise unreadable(settings, error) from error
    key = f"policy.path={settings.path}"
    if getattr(config, "is_encoder_decoder", False):
        raise PolicyError(
            f"{key}: a {config.model_type} has an encoder and a decoder; type the path of a causal language model"
            " (a decoder)"
        )
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        raise PolicyError(
            f"{key}: a {config.model_type} is not a causal language model; type the path of one (a ...ForCausalLM)"
        )
    text = config.get_text_config()
    if getattr(text, "output_router_logits", False) and getattr(text, "router_aux_loss_coef", 0):
        log.warning(
            "policy: its config.json asks for a mixture-of-experts auxiliary loss (output_router_logits,"
            " router_aux_loss_coef=%s), which no loss here includes, so its experts may become unbalanced",
            text.router_aux_loss_coef,
        )
    return config


def _read_model(settings: Pretrained) -> PreTrainedModel:
    options: dict[str, Any] = {
        "dtype": getattr(torch, settings.dtype.value),
        "attn_implementation": settings.attention,
        "output_loading_info": True,  # check_keys reports missing, unexpected and mismatched weights
        "ignore_mismatched_sizes": True,
        **_source(settings),
    }
    if settings.gguf_file is not None:
        folder = Path(settings.path)
        is_missing = folder.is_dir() and not (folder / settings.gguf_file).is_file()  # `unreadable` says so
        for package in () if is_missing else ("gguf", "accelerate"):
            if find_spec(package) is None:
                raise PolicyError(
                    f"policy.gguf_file={settings.gguf_file}: needs {package}; type pip install gguf accelerate"
                )
        options["quantization_config"] = GgufConfig(dequantize=True)
    elif not settings.allow_pickle:
        options["use_safetensors"] = True
    if settings.quantize is not None and settings.gguf_file is None:
        options["quantization_config"] = quantization_of(settings)
    if settings.key_prefix:
        options["key_mapping"] = {f"^{re.escape(settings.key_prefix)}": ""}
    logging.getLogger("transformers.modeling_utils").addFilter(_no_report)
    is_float32 = settings.dtype is Dtype.float32
    smaller = ["policy.dtype=bfloat16" if is_float32 else "policy.path= of a smaller model"]
    try:
        with explain_out_of_memory("loading the policy", *smaller):
            model, info = AutoModelForCausalLM.from_pretrained(settings.path, **options)  # type: ignore[misc]
    except OutOfMemory:
        raise
    except Exception as error:  # many types, depending on hub, file and format
        raise unreadable(settings, error) from error
    finally:
        logging.getLogger("transformers.modeling_utils").removeFilter(_no_report)
    check_keys(model, info, f"policy.path={settings.path}", "policy.key_prefix")
    if settings.quantize is not None and settings.gguf_file is not None:
        model = requantized(model, settings, options)
    keep_packing(model)
    return model
