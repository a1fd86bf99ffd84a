"""Check that a checkpoint holds all weights of its model, and that the model takes all weights of the checkpoint."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dpo_lab.models.policy import PolicyError

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

# Prefixes of the parts of a multimodal checkpoint that its language model does not use.
MODALITIES = ("vision", "visual", "image", "audio", "speech", "multi_modal", "multimodal", "mm_")


def check_keys(model: nn.Module, info: Mapping[str, Collection[Any]], key: str, prefix_key: str | None = None) -> None:
    """Raise PolicyError if weights were missing in the files, or if weights of the model's parts were not loaded.

    info: the loading info of from_pretrained(output_loading_info=True); key: the setting to name in errors, such as
    policy.path=FOLDER; prefix_key: the key that removes a prefix of names. Entire parts that the model does not have (a
    reward head, a value head, a vision tower) are left out with a warning.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    mismatched = [f"{name} {list(file)} instead of {list(own)}" for name, file, own in sorted(info["mismatched_keys"])]
    if prefix := _prefix(missing, unexpected):
        raise PolicyError(
            f"{key}: the names of {len(missing)} weights begin with '{prefix}' in the files ({some_of(unexpected)});"
            + (f" type {prefix_key}={prefix}" if prefix_key else " save it again without that prefix")
        )
    if any(part in name for name in unexpected for part in (".base_layer.", ".lora_A.", ".lora_B.")):
        raise PolicyError(
            f"{key}: the files hold adapters inside the model ({some_of(unexpected)}); save it with"
            " model.merge_and_unload().save_pretrained(FOLDER), and type policy.path=FOLDER"
        )
    if missing or mismatched:
        faults = [
            f"{_count(names)} {what} ({some_of(names)})"
            for names, what in (
                (missing, "missing from the files"),
                (mismatched, "of another shape"),
                (unexpected, "in the files that the model has no place for"),
            )
            if names
        ]
        raise PolicyError(f"{key}: {', '.join(faults)}; {_remedy(model, missing)}")
    separate = {name for name in unexpected if _is_in_separate_part(model, name)}
    if left_out := [name for name in unexpected if name not in separate]:
        raise PolicyError(
            f"{key}: {_count(left_out)} in the files that a {type(model).__name__} of this config.json has no place for"
            f" ({some_of(left_out)}); put the config.json that the model was trained with beside them"
        )
    if separate:
        log.warning(
            "policy: %d weights are left out, and not saved with the trained policy (%s): a %s has no such part",
            len(separate),
            some_of(sorted(separate)),
            type(model).__name__,
        )


def _prefix(missing: list[str], unexpected: list[str]) -> str | None:
    """Return the prefix that most of the missing weights have in the files, or None."""
    expected = set(missing)
    prefixes: Counter[str] = Counter()
    for name in unexpected:
        parts = name.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[i:]) in expected:
                prefixes[".".join(parts[:i]) + "."] += 1
    (prefix, count), *_ = prefixes.most_common(1) or [("", 0)]
    return prefix if 2 * count > len(missing) else None


def _is_in_separate_part(model: nn.Module, name: str) -> bool:
    """Return whether a weight belongs to a part that the model does not have at all, not to one of its parts."""
    parts = name.split(".")
    base = getattr(model, "base_model_prefix", "")
    inside = len(parts) > 1 and parts[0] == base and hasattr(model, base)
    first, owner = (parts[1], getattr(model, base)) if inside else (parts[0], model)
    if any(first.startswith(word) for word in MODALITIES):
        return True
    return not inside and len(parts) > 1 and not hasattr(owner, first)


def _remedy(model: nn.Module, missing: Iterable[str]) -> str:
    tied = getattr(model, "_tied_weights_keys", None) or {}
    if set(missing) and set(missing) <= set(tied):
        return (
            "if the head is tied to the embedding, set tie_word_embeddings to true in config.json; else save the full"
            " model (a ...ForCausalLM) and type the path of that folder"
        )
    return "type the path of a folder with all the weights of the model that its config.json describes"


def _count(names: Collection[str]) -> str:
    return "1 weight is" if len(names) == 1 else f"{len(names)} weights are"


def some_of(names: Collection[str]) -> str:
    """Return the first three names, with "..." if there are more."""
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
