"""A policy: a causal language model with its tokenizer; its config classes, and how it is saved."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Init(str, Enum):
    """Where a policy starts from."""

    sft = "sft"  # supervised fine-tuning on the world's reviews
    random = "random"  # random weights


class PolicyError(ValueError):
    """A policy that can't be loaded or can't be trained; the message is one line that says what to type."""


@dataclass
class PolicyConfig:
    """What all kinds share. gradient_checkpointing: less memory in training for one more forward."""

    gradient_checkpointing: bool = False

    @property
    def has_adapters(self) -> bool:
        """Whether low-rank adapters alone are trained."""
        return False

    def files(self) -> list[Path]:
        """The files that it is read from, as far as they lie on this machine."""
        return []

    def to_save(self, trained: Policy) -> Policy:
        """What a run keeps of the trained policy."""
        return trained


@dataclass
class TinyPolicy(PolicyConfig):
    """The embedded policy: a Llama of about 1M parameters and a byte-level BPE vocabulary of at most `vocab_size`."""

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 384
    vocab_size: int = 1024
    context: int = 1024
    start: Init = Init.sft

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
        """Write a Hugging Face folder, safetensors and tokenizer, whichever rank this is."""
        with _saved_by_this_rank(self.model):
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


@contextmanager
def _saved_by_this_rank(model: PreTrainedModel) -> Iterator[None]:
    """Once ranks have joined transformers lets rank 0 alone write weights, and says nothing; what is made once, for the
    cache, is made by the rank that came first.
    """
    vars(model)["should_save_on_this_rank"] = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del vars(model)["should_save_on_this_rank"]


class Dtype(str, Enum):
    """What weights are kept in. trainer.precision says what is computed in.

    bfloat16 takes 2 bytes a frozen weight. A trained one takes 16 either way: 2 for itself, 2 for its gradient, and 12
    for the float32 master copy and moments that AdamW keeps of it, see training/master_weights.py.
    """

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass
class Pretrained(PolicyConfig):
    """A causal language model of your own: a Hugging Face folder, or a name on the hub.

    revision: a branch, tag or commit on the hub; gguf_file: a GGUF file in it, whose weights are dequantised; package:
    a Python package that carries the model as a GGUF file, taken instead of `path` where it is installed; dtype: what
    weights are kept and trained in; attention: transformers' name of one (none: its own choice), for models that take
    padded rows; chat_template: a Jinja file in place of the tokenizer's own template; key_prefix: what is taken off the
    front of the weights' names, as torch.compile and wrappers put it there ('_orig_mod.').

    rank: none trains the whole model; a number trains low-rank adapters alone, W + alpha / rank B A with B = 0 at the
    start (Hu et al. 2021, arXiv:2106.09685, equation 3). targets: names of the matrices that get one, or all-linear:
    all but the LM head. adapter: a folder of trained adapters, which `path` may be too: merged into their base where
    the whole model is trained, gone on with where rank is set. merge: the trained policy is saved whole instead of as
    adapters.

    Only safetensors and GGUF are read, unless pickled_weights; no code of the model's own is run, unless
    trust_remote_code.
    """

    path: str = ""
    revision: str | None = None
    gguf_file: str | None = None
    package: str | None = None
    dtype: Dtype = Dtype.float32
    attention: str | None = None
    chat_template: str | None = None
    key_prefix: str | None = None
    rank: int | None = None
    alpha: int = 32
    targets: Any = "all-linear"  # a name or a list of names
    adapter: str | None = None
    merge: bool = False
    pickled_weights: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("policy.path is empty; type policy.path=FOLDER, or a model's name on the Hugging Face hub")
        for name in ("rank", "alpha"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"policy.{name}={value}: must be 1 or more; type e.g. policy.{name}=16")
        if self.merge and self.rank is None:
            raise ValueError("policy.merge=true: the policy has no adapters to merge; type policy.rank=16 with it")

    @property
    def has_adapters(self) -> bool:
        return self.rank is not None

    @property
    def goes_on(self) -> bool:
        """Whether it starts from adapters that were trained before."""
        return self.adapter is not None or is_adapter(Path(self.path))

    def files(self) -> list[Path]:
        folders = [Path(folder) for folder in (self.path, self.adapter) if folder and self.package is None]
        files = [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())]
        files += [Path(self.chat_template)] if self.chat_template else []
        return [file for file in files if file.is_file()]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer alone, with the chat template asked for. Raises PolicyError where it can't be had."""
        from dpo_lab.models.load import read_tokenizer

        return read_tokenizer(self)

    def load(self, seed: int = 0, cache: Path | None = None, known: bool = False) -> Policy:
        """The model, on the fastest forward path that is proven for it, and its tokenizer.

        seed: of what is drawn anew; cache: a folder to keep in how the model behaves, which is looked at once, unless
        it is known to be as it should. Raises PolicyError where they can't be had or can't be trained.
        """
        from dpo_lab.models.forward import select_forward
        from dpo_lab.models.load import check_behaviour, read_policy

        policy = read_policy(self, seed)
        select_forward(policy.model)
        if not known:
            check_behaviour(policy, self, cache)
        return policy

    def to_save(self, trained: Policy) -> Policy:
        if not self.merge:
            return trained
        return Policy(copy.deepcopy(trained.model).merge_and_unload(), trained.tokenizer)  # type: ignore[operator]


POLICIES: dict[str, type[PolicyConfig]] = {"tiny": TinyPolicy, "pretrained": Pretrained}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters instead of a whole model."""
    return (folder / "adapter_config.json").is_file()


def trainable_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose training leaves `model` as it is. What is frozen is shared: under LoRA the base stands in memory
    once.
    """
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def load_policy(folder: Path) -> Policy:
    """Read a folder that was written here, see Pretrained; how its model behaves is known."""
    return Pretrained(path=str(folder)).load(known=True)


def weights_digest(model: PreTrainedModel) -> str:
    """A hash of all weights: names, shapes, dtypes and values. Adapters that are still zero count as none, however
    drawn.
    """
    import torch

    weights = model.state_dict()
    idle = {name for name, tensor in weights.items() if ".lora_B." in name and not tensor.any()}
    idle |= {name.replace(".lora_B.", ".lora_A.") for name in idle}
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(weights.items()):
        if name not in idle:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
