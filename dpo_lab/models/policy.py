"""A policy: a causal language model with its tokenizer, made, saved and loaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Start(str, Enum):
    """Where a policy starts from."""

    sft = "sft"  # supervised fine-tuning on the world's reviews
    random = "random"  # random weights


@dataclass
class TinyPolicy:
    """The embedded policy: a Llama of about 1M parameters and a byte-level BPE vocabulary of at most `vocab_size`."""

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 384
    vocab_size: int = 1024
    context: int = 1024
    start: Start = Start.sft
    gradient_checkpointing: bool = False  # less memory in training for one more forward

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(
                f"policy.hidden_size={self.hidden_size}: must be an even multiple of policy.heads={self.heads};"
                " type e.g. policy.hidden_size=128 policy.heads=4"
            )
        if self.vocab_size < 259:
            raise ValueError(
                f"policy.vocab_size={self.vocab_size}: 256 bytes and 3 special tokens need 259 at least;"
                " type e.g. policy.vocab_size=1024"
            )

    def build(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
        """The model with random weights."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            intermediate_size=self.intermediate_size,
            vocab_size=len(tokenizer),
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,  # type: ignore[arg-type]
            eos_token_id=tokenizer.eos_token_id,  # type: ignore[arg-type]
            pad_token_id=tokenizer.pad_token_id,  # type: ignore[arg-type]
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(config)


@dataclass
class Policy:
    """A model and the tokenizer that goes with it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder, safetensors and tokenizer."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_policy(folder: Path) -> Policy:
    """Read a Hugging Face folder, safetensors only; the model takes the fastest forward path that is proven for it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dpo_lab.models.forward import choose_path

    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    choose_path(model)
    return Policy(model, AutoTokenizer.from_pretrained(folder, local_files_only=True))


def weights_digest(model: PreTrainedModel) -> str:
    """A hash of all weights: names, shapes, dtypes and values."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
