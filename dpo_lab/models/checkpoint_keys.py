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

# Parts of a multimodal checkpoint that its language model does without, wherever they hang.
MODALITIES = ("vision", "visual", "image", "audio", "speech", "multi_modal", "multimodal", "mm_")


def check_keys(model: nn.Module, info: Mapping[str, Collection[Any]], key: str, prefix_key: str | None = None) -> None:
    """Raise PolicyError where weights were drawn at random, or weights of the model's own parts were left out.

    info: what from_pretrained gives with output_loading_info; key: what the user typed, as policy.path=FOLDER;
    prefix_key: the key that takes a prefix off the names. Whole parts that the model does not have (a reward head, a
    value head, a vision tower) are left out with a warning.
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
    whole_parts = {name for name in unexpected if _is_a_part_of_its_own(model, name)}
    if left_out := [name for name in unexpected if name not in whole_parts]:
        raise PolicyError(
            f"{key}: {_count(left_out)} in the files that a {type(model).__name__} of this config.json has no place for"
            f" ({some_of(left_out)}); put the config.json that the model was trained with beside them"
        )
    if whole_parts:
        log.warning(
            "policy: %d weights are left out, and not saved with the trained policy (%s): a %s has no such part",
            len(whole_parts),
            some_of(sorted(whole_parts)),
            type(model).__name__,
        )


def _prefix(missing: list[str], unexpected: list[str]) -> str | None:
    """What stands before the names of most of the missing weights in the files."""
    wanted = set(missing)
    found: Counter[str] = Counter()
    for name in unexpected:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in wanted:
                found[".".join(parts[:cut]) + "."] += 1
    (prefix, count), *_ = found.most_common(1) or [("", 0)]
    return prefix if 2 * count > len(missing) else None


def _is_a_part_of_its_own(model: nn.Module, name: str) -> bool:
    """Whether a weight belongs to a whole part that the model does not have, instead of to one that it has."""
    parts = name.split(".")
    base = getattr(model, "base_model_prefix", "")
    inside = len(parts) > 1 and parts[0] == base and hasattr(model, base)
    first, owner = (parts[1], getattr(model, base)) if inside else (parts[0], model)
    if any(first.startswith(word) for word in MODALITIES):
        return True
    return not inside and len(parts) > 1 and not hasattr(owner, first)


def _remedy(model: nn.Module, missing: Iterable[str]) -> str:
    head = getattr(model, "_tied_weights_keys", None) or {}
    if set(missing) and set(missing) <= set(head):
        return (
            "where the head is the embedding, set tie_word_embeddings to true in config.json; else save the whole"
            " model (a ...ForCausalLM) and type the path of that folder"
        )
    return "type the path of a folder with all the weights of the model that its config.json describes"


def _count(names: Collection[str]) -> str:
    return "1 weight is" if len(names) == 1 else f"{len(names)} weights are"


def some_of(names: Collection[str]) -> str:
    """The first three, and that there are more."""
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
