"""Low-rank adapters (peft): add new ones to a model, or load trained ones with the tokens added for them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpo_lab.errors import first_line
from dpo_lab.models.checkpoint_keys import some_of
from dpo_lab.models.policy import PolicyError, Pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")


def base_of(folder: Path) -> str:
    """Return the base model that a folder of adapters names in its config; raise PolicyError if it names none."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise PolicyError(
            f"{folder / 'adapter_config.json'}: can't be read ({error}); type policy.path=BASE policy.adapter={folder}"
        ) from None
    if not base:
        raise PolicyError(
            f"policy.path={folder}: its adapter_config.json names no base_model_name_or_path;"
            f" type policy.path=BASE policy.adapter={folder}"
        )
    return base


def with_fresh_adapters(model: PreTrainedModel, settings: Pretrained, seed: int) -> PreTrainedModel:
    """Add new low-rank adapters to a model, initialised from `seed`."""
    peft, lora = _peft(), settings.lora
    config = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.lora_alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, config)
        except ValueError as error:
            reason = first_line(error)
            raise PolicyError(
                f"policy.lora.target_modules={lora.target_modules}: {reason}; type policy.lora.target_modules=all-linear"
            ) from error


def with_trained_adapters(model: PreTrainedModel, settings: Pretrained) -> PreTrainedModel:
    """Load trained adapters: to train them further if `settings.lora.r` is set, else merged into the model."""
    peft = _peft()
    folder = str(settings.adapter)
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        weights = peft.utils.load_peft_weights(folder, device="cpu")
    except Exception as error:  # many types, depending on file and format
        raise _not_adapters_of(settings, error) from error
    if config.peft_type != peft.PeftType.LORA:
        raise PolicyError(
            f"policy.adapter={folder}: adapters of the kind {getattr(config.peft_type, 'value', config.peft_type)} can't"
            " be trained on or merged; type policy.adapter= of a folder of LoRA adapters"
        )
    if settings.lora.r not in (None, config.r):
        raise PolicyError(
            f"policy.lora.r={settings.lora.r}: the adapters have rank {config.r}; type policy.lora.r={config.r}"
        )
    _resize(model, weights, config, folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Found missing adapter keys"
            )  # _check_names raises an error for them
            adapted = peft.PeftModel.from_pretrained(model, folder, is_trainable=settings.lora.r is not None)
            loaded = adapted.load_adapter(folder, "default", is_trainable=settings.lora.r is not None)
    except Exception as error:  # many types, depending on file and format
        raise _not_adapters_of(settings, error) from error
    _check_names(loaded.missing_keys, loaded.unexpected_keys, settings)
    if settings.lora.r is not None:
        return adapted
    merged = adapted.merge_and_unload()
    merged.requires_grad_(True)  # peft has frozen it
    _untie(merged)
    return merged


def _resize(model: PreTrainedModel, weights: Mapping[str, Tensor], config: Any, folder: str) -> None:
    """Resize the embeddings to the number of tokens that the adapters were trained with; their file holds the new rows.

    Raises PolicyError if it does not hold them: when they were added they were initialised at random or averaged, which
    can't be repeated.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows: int = embedding.weight.shape[0]  # type: ignore[assignment,index]
    names = {id(module): name.split(".")[-1] for name, module in model.named_modules()}
    embedding_name = names[id(embedding)]
    trained = _trained_tokens(config, embedding_name)
    sizes = {name: weight.shape[0] for name, weight in weights.items() if _is_embedding(name)}
    new_rows = max(rows, *sizes.values(), *(token + 1 for tokens in trained.values() for token in tokens), 0)
    if new_rows == rows:
        return
    sources = {embedding_name: ([f".{embedding_name}."], trained.get(embedding_name, []))}
    if head is not None and head.weight is embedding.weight:
        # a tied head shares the rows of the embedding, but not those of a copy in modules_to_save
        copied = embedding_name in (config.modules_to_save or [])
        shared = f".{embedding_name}.original_module." if copied else f".{embedding_name}."
        sources[names[id(head)]] = ([shared, f".{names[id(head)]}."], trained.get(embedding_name, []))
    elif head is not None:
        sources[names[id(head)]] = ([f".{names[id(head)]}."], trained.get(names[id(head)], []))
    for module, (parts, tokens) in sources.items():
        is_stored = any(part in name for name, size in sizes.items() if size == new_rows for part in parts)
        if not is_stored and not set(range(rows, new_rows)) <= set(tokens):
            raise PolicyError(
                f"policy.adapter={folder}: it was trained with {new_rows - rows} tokens more than the {rows:,} of its base,"
                f" and holds no rows of {module} for them, so the model that it was trained on can't be restored; save it"
                " merged where it was trained, and type policy.path= of that folder"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the rows are replaced later, but until then they enter the hash of the weights
        model.resize_token_embeddings(new_rows, mean_resizing=False)


def _is_embedding(name: str) -> bool:
    """Return whether a weight in an adapter's file is a full embedding or LM head."""
    return name.endswith(".weight") and "lora_" not in name and any(f".{part}." in name for part in EMBEDDINGS)


def _trained_tokens(config: Any, embedding: str) -> dict[str, list[int]]:
    """Return the tokens whose embedding rows were trained, by name of the module; a plain list is for the embedding."""
    indices = getattr(config, "trainable_token_indices", None) or {}
    if not isinstance(indices, dict):
        return {embedding: list(indices)}
    return {name.split(".")[-1]: list(tokens) for name, tokens in indices.items()}


def _check_names(missing: Sequence[str], unexpected: Sequence[str], settings: Pretrained) -> None:
    """Raise PolicyError if the weights in the file are not those of the adapters that its config describes."""
    # peft also saves the embeddings of the base, and rows of a tied head twice
    unexpected = [name for name in unexpected if not _is_embedding(name) and ".token_adapter." not in name]
    for names, what in ((missing, "missing from its file"), (unexpected, "not of those that its config describes")):
        if names:
            raise PolicyError(
                f"policy.adapter={settings.adapter}: {len(names)} weights are {what} ({some_of(names)});"
                f" type the folder of adapters trained on policy.path={settings.path}"
            )


def _untie(model: PreTrainedModel) -> None:
    """Set tie_word_embeddings to False if the adapters untied the LM head, which would not be saved otherwise."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head is not None and head.weight is not embedding.weight:  # type: ignore[union-attr]
        model.config.tie_word_embeddings = False


def _not_adapters_of(settings: Pretrained, error: Exception) -> PolicyError:
    return PolicyError(
        f"policy.adapter={settings.adapter}: {first_line(error)};"
        f" type the folder of adapters trained on policy.path={settings.path}"
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise PolicyError("low-rank adapters need peft; type pip install 'dpo_lab[lora]'") from None
    return peft
