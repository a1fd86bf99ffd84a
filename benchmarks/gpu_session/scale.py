"""Sizes of a GPU session: real ones, and tiny ones for a rehearsal on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from benchmarks.workload import SHAPES, llama

TINY = llama(32, 2, heads=4, key_value_heads=2, inner=64, vocabulary=256)
COMMON = dict(max_position_embeddings=32768, pad_token_id=0, bos_token_id=1, eos_token_id=2)


@dataclass(frozen=True)
class Scale:
    """whole: the model that is trained whole; adapted: the one under LoRA; pairs, tokens: pairs a step and tokens a
    micro-batch, which are combined; steps: timed steps, each of fresh lengths; pieces: rows of a chunk of the head; sampled:
    prompts and new tokens; small, max_steps: the model and the steps of whole runs.
    """

    whole: PreTrainedConfig
    adapted: PreTrainedConfig
    mix: str
    pairs: tuple[int, ...]
    tokens: tuple[int, ...]
    steps: int
    rows: int
    pieces: tuple[int, ...]
    sampled: tuple[int, int]
    small: LlamaConfig
    max_steps: int


SCALES = {
    "full": Scale(
        whole=Qwen2Config(  # Qwen2.5-0.5B's
            hidden_size=896,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            intermediate_size=4864,
            vocab_size=151936,
            tie_word_embeddings=True,
            **COMMON,
        ),
        adapted=LlamaConfig(  # Llama 3.1 8B's
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=14336,
            vocab_size=128256,
            **COMMON,
        ),
        mix="chat",
        pairs=(16, 64),
        tokens=(2048, 16384),
        steps=5,
        rows=8192,
        pieces=(256, 512, 1024, 2048, 4096),
        sampled=(128, 128),
        small=SHAPES["small"],
        max_steps=40,
    ),
    "tiny": Scale(
        whole=TINY,
        adapted=TINY,
        mix="short",
        pairs=(4,),
        tokens=(512,),
        steps=1,
        rows=64,
        pieces=(16, 64),
        sampled=(4, 4),
        small=TINY,
        max_steps=6,
    ),
}
