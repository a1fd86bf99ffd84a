"""A policy: a causal language model with its tokenizer; its config classes, and how it is saved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_lab.models.weight_settings import Dtype, Lora, Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Init(str, Enum):
    """How the embedded policy is initialised."""

    sft = "sft"  # supervised fine-tuning on the reviews of the task
    random = "random"  # random weights


class PolicyError(ValueError):
    """Raised where a policy can't be loaded or trained; the message is one line that says what to type."""


@dataclass
class PolicyConfig:
    """The base class of policy configs. gradient_checkpointing: less memory in training for one more forward pass;
    activation_offload: less memory of a GPU for the host's, and the time of two copies.
    """

    gradient_checkpointing: bool = False
    activation_offload: bool = False

    @property
    def has_adapters(self) -> bool:
        """Whether only low-rank adapters are trained."""
        return False

    @property
    def is_quantized(self) -> bool:
        """Whether the base of the adapters is quantized, so that they are not merged into it."""
        return False

    def check(self, is_sharded: bool, on_cpu: bool) -> None:
        """Raise ValueError if the policy can't be trained as the trainer is to: sharded over ranks, or on the CPU."""
        if self.activation_offload and on_cpu:
            raise ValueError(
                "policy.activation_offload=true: on the CPU activations are in the host's memory already; type"
                " policy.activation_offload=false, or trainer=gpu"
            )
        if self.activation_offload and is_sharded:
            raise ValueError(
                "policy.activation_offload=true: FSDP's sharded weights can't be told from activations; type"
                " policy.activation_offload=false policy.gradient_checkpointing=true, or trainer=ddp"
            )

    def files(self) -> list[Path]:
        """Return the local files that the policy is loaded from."""
        return []

    def export(self, trained: Policy) -> Policy:
        """Return the policy to save after training."""
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
    init: Init = Init.sft

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(
                f"policy.hidden_size={self.hidden_size}: must be an even multiple of policy.heads={self.heads};"
                " type e.g. policy.hidden_size=128 policy.heads=4"
            )
        if self.vocab_size < 259:
            raise ValueError(
                f"policy.vocab_size={self.vocab_size}: must be 259 or more, for 256 bytes and 3 special tokens;"
                " type e.g. policy.vocab_size=1024"
            )

    def build(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
        """Return the model with random weights."""
        import torch

        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.untrained(len(tokenizer), **ids)

    def untrained(self, vocabulary: int, **ids: int) -> PreTrainedModel:
        """Return the model with weights from torch's generator. ids: of its special tokens, as LlamaConfig names them."""
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=self.hidden_size,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                intermediate_size=self.intermediate_size,
                vocab_size=vocabulary,
                max_position_embeddings=self.context,
                tie_word_embeddings=True,
                **ids,  # type: ignore[arg-type]
            )
        )


@dataclass
class Policy:
    """A model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder with safetensors and tokenizer; any rank may call it."""
        with saved_by_this_rank(self.model):
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def merged(self) -> Policy:
        """Return it with its adapters merged into a copy of their base, on the CPU."""
        from dpo_lab.models.copies import merged_copy

        return Policy(merged_copy(self.model), self.tokenizer)


@contextmanager
def saved_by_this_rank(model: PreTrainedModel) -> Iterator[None]:
    """Let transformers write weights on any rank: once a process group exists, it silently saves on rank 0 only, but a
    cache is written by the rank that takes its lock first.
    """
    vars(model)["should_save_on_this_rank"] = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del vars(model)["should_save_on_this_rank"]


@dataclass
class Pretrained(PolicyConfig):
    """A pretrained causal language model: a Hugging Face folder, or a name on the hub.

    revision: branch, tag or commit on the hub; gguf_file: a GGUF file in the folder or repository, whose weights are
    dequantised; package: a Python package that contains the model as a GGUF file, used instead of `path` if it is
    installed; dtype: dtype of the weights; attention: transformers' name of an attention implementation (None: its
    default), for models that take padded rows; chat_template: a Jinja file that replaces the tokenizer's template;
    key_prefix: a prefix to remove from the names of weights, as torch.compile and wrappers add it ('_orig_mod.');
    quantize: the 4-bit type of the base's matrices, beside adapters in float32 (QLoRA).

    lora: low-rank adapters to train instead of all weights. adapter: a folder of trained adapters (`path` may be one
    too); they are trained further if lora.r is set, else merged into their base. merge: save the trained policy merged
    instead of as adapters.

    Only safetensors and GGUF files are read, unless allow_pickle; no custom code is run, unless trust_remote_code.
    """

    path: str = ""
    revision: str | None = None
    gguf_file: str | None = None
    package: str | None = None
    dtype: Dtype = Dtype.float32
    attention: str | None = None
    chat_template: str | None = None
    key_prefix: str | None = None
    quantize: Quantization | None = None
    lora: Lora = field(default_factory=Lora)
    adapter: str | None = None
    merge: bool = False
    allow_pickle: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("policy.path is empty; type policy.path=FOLDER, or a model's name on the Hugging Face hub")
        if self.merge and self.lora.r is None:
            raise ValueError("policy.merge=true: the policy has no adapters to merge; type policy.lora.r=16 with it")
        if self.quantize is not None:
            self._check_quantize(f"policy.quantize={self.quantize.value}")

    def _check_quantize(self, key: str) -> None:
        """Raise ValueError if the quantized policy can't be trained or its package is missing. key: as typed."""
        if self.lora.r is None:
            raise ValueError(
                f"{key}: weights of 4 bits can't be trained, only adapters beside them; type policy.lora.r=16 optim=lora"
            )
        if self.merge:
            raise ValueError(
                "policy.merge=true: adapters merged into weights of 4 bits lose precision; type policy.merge=false, and"
                " merge them into the unquantized base later"
            )
        if find_spec("bitsandbytes") is None:
            raise ValueError(f"{key}: needs bitsandbytes; type pip install 'dpo_lab[quantized]'")

    def check(self, is_sharded: bool, on_cpu: bool) -> None:
        super().check(is_sharded, on_cpu)
        if is_sharded and self.quantize is not None:
            raise ValueError(
                f"policy.quantize={self.quantize.value}: FSDP can't shard weights of 4 bits here; type trainer=ddp, or"
                " policy.quantize=null"
            )

    @property
    def has_adapters(self) -> bool:
        return self.lora.r is not None

    @property
    def is_quantized(self) -> bool:
        return self.quantize is not None

    @property
    def starts_from_adapter(self) -> bool:
        """Whether training starts from trained adapters."""
        return self.adapter is not None or is_adapter(Path(self.path))

    def files(self) -> list[Path]:
        folders = [Path(folder) for folder in (self.path, self.adapter) if folder and self.package is None]
        files = [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())]
        files += [Path(self.chat_template)] if self.chat_template else []
        return [file for file in files if file.is_file()]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load only the tokenizer, with the chat template of the config; raise PolicyError if it can't be loaded."""
        from dpo_lab.models.load import read_tokenizer

        return read_tokenizer(self)

    def load(self, seed: int = 0, cache: Path | None = None, known: bool = False) -> Policy:
        """Load the model, with the shared-prompt forward path if it supports that, and its tokenizer.

        seed: for weights that are initialised at random; cache: folder of the results of probing the model, see
        probes.py; known: skip the probes. Raises PolicyError if model or tokenizer can't be loaded or the model can't
        be trained.
        """
        from dpo_lab.models.forward import select_forward
        from dpo_lab.models.load import check_behaviour, read_policy

        policy = read_policy(self, seed)
        select_forward(policy.model, cache)
        if not known:
            check_behaviour(policy, self, cache)
        return policy

    def export(self, trained: Policy) -> Policy:
        if not self.merge:
            return trained
        return trained.merged()


POLICIES: dict[str, type[PolicyConfig]] = {"tiny": TinyPolicy, "pretrained": Pretrained}


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds adapters instead of a full model."""
    return (folder / "adapter_config.json").is_file()


def load_policy(folder: Path) -> Policy:
    """Load a policy from a folder that Policy.save wrote, without probing it."""
    return Pretrained(path=str(folder)).load(known=True)


def weights_digest(model: PreTrainedModel) -> str:
    """Return a hash of all weights: names, shapes, dtypes and values; new adapters (B = 0) count as none.

    That of a sharded model was computed where it was whole.
    """
    import torch

    from dpo_lab.models.sharding import sharded_of

    if (sharded := sharded_of(model)) is not None:
        assert sharded.facts.digest is not None, "the weights have changed since they were whole"
        return sharded.facts.digest
    weights = model.state_dict()
    new = {name for name, tensor in weights.items() if ".lora_B." in name and not tensor.any()}
    new |= {name.replace(".lora_B.", ".lora_A.") for name in new}
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(weights.items()):
        if name not in new:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
