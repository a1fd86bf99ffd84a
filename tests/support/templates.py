"""Tokenizers and chat templates of the common families, small and without a hub: every byte of text is a token of its own."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# Each template writes its family's documented format, in our own words.
CHATML = """\
{%- if tools %}<|im_start|>system
Tools: {{ tools | tojson }}<|im_end|>
{% endif %}
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content or (m.tool_calls | tojson) }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
MISTRAL = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content + '\\n\\n' %}{% set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and assistant must take turns') }}{% endif %}
{%- if m.role == 'user' %}{{ '[INST] ' + (system if loop.first and system else '') + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""
GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""


@dataclass(frozen=True)
class Family:
    """A family's template and special tokens. begins: whether its tokenizer puts `bos` before every text."""

    template: str | None
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    begins: bool = False


FAMILIES = {
    "plain": Family(None, ("<|end|>",), "<|end|>"),
    "begins": Family(None, ("<s>", "</s>"), "</s>", "<s>", begins=True),
    "chatml": Family(CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama3": Family(
        LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        "<|end_of_text|>",
        "<|begin_of_text|>",
        begins=True,
    ),
    "mistral": Family(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "<s>", begins=True),
    "gemma": Family(GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>", begins=True),
}


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The family's tokenizer: its special tokens have the first ids, then every byte its own."""
    family = FAMILIES[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*family.special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(family.special))
    if family.begins:
        begin = (family.bos, vocabulary[str(family.bos)])
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.eos,
        additional_special_tokens=[t for t in family.special if t not in (family.bos, family.eos)],
        chat_template=family.template,
        clean_up_tokenization_spaces=False,
    )


def ids_of(name: str, text: str) -> list[int]:
    """Ids of a text by hand: its special tokens, and a token for every byte of what stands between them."""
    special = FAMILIES[name].special
    place = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    visible = _byte_letters()
    ids: list[int] = []
    while text:
        token = next((token for token in special if text.startswith(token)), None)
        if token is not None:
            ids.append(special.index(token))
            text = text[len(token) :]
        else:
            ids += [len(special) + place[visible[byte]] for byte in text[0].encode()]
            text = text[1:]
    return ids


def _byte_letters() -> dict[int, str]:
    """The letter that byte-level tokenizers write each byte with (GPT-2's table)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def words_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer in SentencePiece's manner: a space becomes a mark before the word, and a text's first word gets one too."""
    pieces = ["<s>", "</s>", "▁", *(f"▁{word}" for word in words), *words, "\n"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, unk_token="▁"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
