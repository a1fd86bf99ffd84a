"""A policy: a causal language model with its tokenizer, made, saved and loaded."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Start(str, Enum):
    """Where a policy starts from."""

    sft = "sft"  # supervised fine-tuning on the world's reviews
    random = "random"  # random weights


class PolicyError(ValueError):
    """A policy that can't be loaded or can't be trained; the message is one line that says what to type."""


@dataclass
class PolicyConfig:
    """What all kinds share. gradient_checkpointing: less memory in training for one more forward."""

    gradient_checkpointing: bool = False

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
    start: Start = Start.sft

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


class Dtype(str, Enum):
    """What weights are kept in. trainer.precision says what is computed in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass
class Pretrained(PolicyConfig):
    """A causal language model of your own: a Hugging Face folder, or a name on the hub.

    revision: a branch, tag or commit on the hub; gguf_file: a GGUF file in it, whose weights are dequantised; dtype: what
    weights are kept and trained in; attention: transformers' name of one (none: its own choice), for models that take
    padded rows. Only safetensors and GGUF are read, and no code of the model's own is run.
    """

    path: str = ""
    revision: str | None = None
    gguf_file: str | None = None
    dtype: Dtype = Dtype.float32
    attention: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("policy.path is empty; type policy.path=FOLDER, or a model's name on the Hugging Face hub")

    def load(self, seed: int = 0) -> Policy:
        """The model, on the fastest forward path that is proven for it, and its tokenizer; seed: of what is drawn anew.

        Raises PolicyError where they can't be had or can't be trained.
        """
        from dpo_lab.models.forward import choose_path

        policy = self._read(seed)
        choose_path(policy.model)
        return policy

    def _read(self, seed: int) -> Policy:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        source = {"revision": self.revision, "gguf_file": self.gguf_file, "trust_remote_code": False}
        source["local_files_only"] = Path(self.path).is_dir()  # a folder is read without asking the hub about it
        settings = {"dtype": getattr(torch, self.dtype.value), "attn_implementation": self.attention}
        if self.gguf_file is None:
            settings["use_safetensors"] = True
        else:
            settings["quantization_config"] = GgufConfig(dequantize=True)
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, **source)
            model = AutoModelForCausalLM.from_pretrained(self.path, **source, **settings)
        except (OSError, ValueError, ImportError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise PolicyError(
                f"policy.path={self.path}: {reason.strip()}; type the path of a Hugging Face folder with safetensors,"
                " or a model's name on the hub"
            ) from error
        _check_tokenizer(model, tokenizer, f"policy.path={self.path}")
        return Policy(model, tokenizer)


@dataclass
class Lora(Pretrained):
    """The same behind fresh low-rank adapters, which alone are trained: W + alpha / rank B A, B = 0 at the start.

    Hu et al. 2021 (arXiv:2106.09685), equation 3. targets: names of the matrices that get one, or all-linear: all but the
    LM head. merge: the trained policy is saved whole, as an ordinary model, instead of as adapters beside their base.
    """

    rank: int = 16
    alpha: int = 32
    targets: Any = "all-linear"  # a name or a list of names
    merge: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"policy.rank={self.rank}: must be 1 or more; type e.g. policy.rank=16")
        if self.alpha < 1:
            raise ValueError(f"policy.alpha={self.alpha}: must be 1 or more; type e.g. policy.alpha=32")

    def _read(self, seed: int) -> Policy:
        import torch

        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise PolicyError("policy=lora needs peft; type pip install 'dpo_lab[lora]'") from None
        policy = super()._read(seed)
        settings = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=self.targets, task_type="CAUSAL_LM")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                model = get_peft_model(policy.model, settings)
            except ValueError as error:
                reason = str(error).splitlines()[0]
                raise PolicyError(f"policy.targets={self.targets}: {reason}; type policy.targets=all-linear") from error
        return Policy(model, policy.tokenizer)  # type: ignore[arg-type]

    def to_save(self, trained: Policy) -> Policy:
        if not self.merge:
            return trained
        return Policy(copy.deepcopy(trained.model).merge_and_unload(), trained.tokenizer)  # type: ignore[operator]


POLICIES: dict[str, type[PolicyConfig]] = {"tiny": TinyPolicy, "pretrained": Pretrained, "lora": Lora}


def to_train(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose training leaves `model` as it is. What is frozen is shared: under LoRA the base stands in memory once."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def _check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """An end token, one vocabulary, and a pad token: the end token where there is none."""
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index,union-attr]
    if tokenizer.eos_token_id is None:
        raise PolicyError(f"{what}: its tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    if len(tokenizer) > rows:
        raise PolicyError(
            f"{what}: its tokenizer has {len(tokenizer)} tokens, its model {rows}: they do not belong together;"
            " type the path of a model with its own tokenizer"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # pads are masked by place, never by value


def load_policy(folder: Path) -> Policy:
    """Read a Hugging Face folder, see Pretrained."""
    return Pretrained(path=str(folder)).load()


def weights_digest(model: PreTrainedModel) -> str:
    """A hash of all weights: names, shapes, dtypes and values."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
