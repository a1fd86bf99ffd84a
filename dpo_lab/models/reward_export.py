"""A reward model as a Hugging Face folder whose tokenizer turns texts into the tokens that the model was trained on."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dpo_lab.core.pairs import EncodedPair, Tokens
from dpo_lab.models.copies import merged_copy
from dpo_lab.models.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAD = "<|reward_pad|>"  # added where the tokenizer has no other token that ends no response


def exported(model: PreTrainedModel, tokenizer: Any, end: int | None) -> Policy:
    """Return a trained reward model, its adapters merged, and its tokenizer as they are to be saved.

    end: the token that ends responses, which the tokenizer appends to every text; None: none. Transformers takes the
    score at the last token that is not padding, so that the pad token has to be one that ends no text: another special
    token than `end`, or a new one. The weights of the argument `model` are not changed.
    """
    tokenizer = _with_end(tokenizer, end)
    ends = {end, tokenizer.eos_token_id}
    free = [token for token in (tokenizer.pad_token, tokenizer.unk_token, *tokenizer.all_special_tokens) if token]
    pad = next((token for token in free if tokenizer.convert_tokens_to_ids(token) not in ends), PAD)
    tokenizer.add_special_tokens({"pad_token": pad})
    pad_id, rows = int(tokenizer.pad_token_id), model.get_input_embeddings().weight.shape[0]  # type: ignore[index,union-attr]
    whole: Any = model
    if hasattr(model, "merge_and_unload"):
        whole = merged_copy(whole)
    if pad_id >= rows:
        whole = copy.deepcopy(whole)
        whole.resize_token_embeddings(pad_id + 1, mean_resizing=False)
    whole.config.id2label, whole.config.label2id = {0: "reward"}, {"reward": 0}
    for config in {id(each): each for each in (whole.config, whole.config.get_text_config())}.values():
        config.pad_token_id = pad_id
    return Policy(whole, tokenizer)


def _with_end(tokenizer: PreTrainedTokenizerBase, end: int | None) -> PreTrainedTokenizerBase:
    """Copy a tokenizer and let it append `end` to every text, and pad on the right.

    A tokenizer without a backend of the library `tokenizers` is copied as it is.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    copied = copy.deepcopy(tokenizer)
    copied.padding_side = copied.truncation_side = "right"
    backend: Any = getattr(copied, "backend_tokenizer", None)
    if end is None or backend is None:
        return copied
    without, whole = (copied("a", add_special_tokens=each)["input_ids"] for each in (False, True))
    start = next((i for i in range(len(whole)) if whole[i : i + len(without)] == without), 0)
    special = list(dict.fromkeys([*whole[:start], end]))
    names = {number: copied.convert_ids_to_tokens(number) for number in special}
    single = [*(names[number] for number in whole[:start]), "$A", names[end]]
    backend.post_processor = TemplateProcessing(
        single=" ".join(single), special_tokens=[(names[number], number) for number in special]
    )
    kept = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    # a plain class, since those of architectures set the tokens around a text themselves when they are loaded
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        truncation_side="right",
        **{name: token for name, token in kept.items() if token is not None},
    )


def end_of(responses: Iterable[Tokens], end_ids: Sequence[int]) -> int | None:
    """Return the end token that most of the responses end with; None if fewer than half have one."""
    last = [int(response[-1]) for response in responses if len(response)]
    found = Counter(token for token in last if token in end_ids).most_common(1)
    return found[0][0] if found and 2 * sum(token in end_ids for token in last) >= len(last) else None


def share_of_equal_tokens(
    tokenizer: PreTrainedTokenizerBase, pairs: Iterable[EncodedPair], texts: Iterable[str]
) -> float:
    """Return the share of chosen responses whose text, prompt included, has the tokens that the model was trained on."""
    equal = [
        tokenizer(text)["input_ids"] == [*map(int, pair.prompt), *map(int, pair.chosen)]
        for pair, text in zip(pairs, texts, strict=True)
    ]
    return sum(equal) / max(1, len(equal))
