"""Low-rank adapters (peft): add new ones to a model, or load trained ones with the tokens added for them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpo_lab.models.checkpoint_keys import some_of
from dpo_lab.models.policy import PolicyError, Pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")


def base_of(folder: Path) -> str:
    """The model that the adapters in a folder were trained on, as their config names it."""
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


def with_trained_adapters(model: PreTrainedModel, settings: Pretrained) -> PreTrainedModel:
    """Merged into the model where it is trained whole; else trained further, as they are."""
    peft = _peft()
    folder = str(settings.adapter)
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        weights = peft.utils.load_peft_weights(folder, device="cpu")
    except Exception as error:  # of a dozen kinds, from files and formats
        raise _not_adapters_of(settings, error) from error
    if config.peft_type != peft.PeftType.LORA:
        raise PolicyError(
            f"policy.adapter={folder}: adapters of the kind {getattr(config.peft_type, 'value', config.peft_type)} can't"
            " be trained on or merged; type policy.adapter= of a folder of LoRA adapters"
        )
    if settings.rank not in (None, config.r):
        raise PolicyError(
            f"policy.rank={settings.rank}: the adapters have rank {config.r}; type policy.rank={config.r}"
        )
    _resize(model, weights, config, folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below, by name
            adapted = peft.PeftModel.from_pretrained(model, folder, is_trainable=settings.rank is not None)
            loaded = adapted.load_adapter(folder, "default", is_trainable=settings.rank is not None)
    except Exception as error:  # of a dozen kinds, from files and formats
        raise _not_adapters_of(settings, error) from error
    _check_names(loaded.missing_keys, loaded.unexpected_keys, settings)
    if settings.rank is not None:
        return adapted
    merged = adapted.merge_and_unload()
    merged.requires_grad_(True)  # peft froze it
    _untie(merged)
    return merged


def _resize(model: PreTrainedModel, weights: Mapping[str, Tensor], config: Any, folder: str) -> None:
    """Give the embeddings the rows that the adapters were trained with; they come from their file.

    Raises PolicyError where it does not hold them: at training they were drawn at random, or averaged.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows: int = embedding.weight.shape[0]  # type: ignore[assignment,index]
    names = {id(module): name.split(".")[-1] for name, module in model.named_modules()}
    of_embedding = names[id(embedding)]
    trained = _trained_tokens(config, of_embedding)
    whole = {name: weight.shape[0] for name, weight in weights.items() if _is_embedding(name)}
    wanted = max(rows, *whole.values(), *(token + 1 for tokens in trained.values() for token in tokens), 0)
    if wanted == rows:
        return
    sources = {of_embedding: ([f".{of_embedding}."], trained.get(of_embedding, []))}
    if head is not None and head.weight is embedding.weight:
        # a tied head has the embedding's rows, but not those of a copy of it
        copied = of_embedding in (config.modules_to_save or [])
        of_it = f".{of_embedding}.original_module." if copied else f".{of_embedding}."
        sources[names[id(head)]] = ([of_it, f".{names[id(head)]}."], trained.get(of_embedding, []))
    elif head is not None:
        sources[names[id(head)]] = ([f".{names[id(head)]}."], trained.get(names[id(head)], []))
    for module, (parts, tokens) in sources.items():
        held = any(part in name for name, size in whole.items() if size == wanted for part in parts)
        if not held and not set(range(rows, wanted)) <= set(tokens):
            raise PolicyError(
                f"policy.adapter={folder}: it was trained with {wanted - rows} tokens more than the {rows:,} of its base,"
                f" and holds no rows of {module} for them: the model that it was trained on can't be made again; save it"
                " merged where it was trained, and type policy.path= of that folder"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the rows are replaced, and are a part of the weights' hash before
        model.resize_token_embeddings(wanted, mean_resizing=False)


def _is_embedding(name: str) -> bool:
    """Whether a weight of an adapter's file is a whole embedding or head, a row for each token."""
    return name.endswith(".weight") and "lora_" not in name and any(f".{part}." in name for part in EMBEDDINGS)


def _trained_tokens(config: Any, embedding: str) -> dict[str, list[int]]:
    """The tokens whose rows alone were trained, by the name of the module; of a bare list: the embedding's."""
    found = getattr(config, "trainable_token_indices", None) or {}
    if not isinstance(found, dict):
        return {embedding: list(found)}
    return {name.split(".")[-1]: list(tokens) for name, tokens in found.items()}


def _check_names(missing: Sequence[str], unexpected: Sequence[str], settings: Pretrained) -> None:
    """Raise PolicyError where the file and the adapters that its config describes are not of the same weights."""
    # peft also saves the base's own embeddings, and rows of a tied head twice
    unexpected = [name for name in unexpected if not _is_embedding(name) and ".token_adapter." not in name]
    for names, what in ((missing, "missing from its file"), (unexpected, "not of those that its config describes")):
        if names:
            raise PolicyError(
                f"policy.adapter={settings.adapter}: {len(names)} weights are {what} ({some_of(names)});"
                f" type the folder of adapters trained on policy.path={settings.path}"
            )


def _untie(model: PreTrainedModel) -> None:
    """Let the config say so where the adapters gave a tied head weights of its own, else they would not be saved."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head is not None and head.weight is not embedding.weight:  # type: ignore[union-attr]
        model.config.tie_word_embeddings = False


def _not_adapters_of(settings: Pretrained, error: Exception) -> PolicyError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return PolicyError(
        f"policy.adapter={settings.adapter}: {reason}; type the folder of adapters trained on policy.path={settings.path}"
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise PolicyError("low-rank adapters need peft; type pip install 'dpo_lab[lora]'") from None
    return peft
