"""What passes of a model cost, from shapes alone: bytes of weights, activations and KV cache, and FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_lab.core.fused_lm_head import GPU_ROWS
from dpo_lab.models.forward import disable_dropout
from dpo_lab.models.paths import causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ON_PAPER = "dpo_lab_on_paper"  # the name of causal attention without a mask, which transformers would build on paper
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight: 4 bits, a block's 8-bit scale, and the scale of 256 scales
PROBE = 16  # tokens of a pass that measures a KV cache


@dataclass(frozen=True)
class Work:
    """The work of a forward pass: tokens of the body, rows that the LM head scores, and pairs of tokens of which one
    attends to the other.
    """

    tokens: float
    rows: float
    attended: float

    @classmethod
    def of_pair(cls, prompt: float, response: float, responses: int = 2, shared_prompt: bool = True) -> Work:
        """Return the work of a prompt with responses of one length. shared_prompt: the prompt is computed once."""
        return cls.of_responses(prompt, [response] * responses, shared_prompt)

    @classmethod
    def of_responses(cls, prompt: float, lengths: Sequence[float], shared_prompt: bool = True) -> Work:
        """Return the work of a prompt with responses of these lengths. shared_prompt: the prompt is computed once."""
        prompts = 1 if shared_prompt else len(lengths)
        own = prompts * prompt * (prompt + 1) / 2
        return cls(
            tokens=prompts * prompt + sum(lengths),
            rows=sum(lengths),
            attended=own + sum(length * prompt + length * (length + 1) / 2 for length in lengths),
        )

    def times(self, count: float) -> Work:
        """Return the work of `count` such passes."""
        return Work(count * self.tokens, count * self.rows, count * self.attended)


@dataclass(frozen=True)
class Shape:
    """What FLOPs depend on. body: parameters of matrices that a token passes, without embedding and LM head; hidden:
    width of the hidden states; attention: width of all query heads of a layer.
    """

    body: int
    hidden: int
    attention: int
    layers: int
    vocabulary: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Shape:
        """Read the shape of a model; of its experts, the share that a token passes."""
        bare = causal_lm(model)
        config = bare.config.get_text_config()
        embeddings = {id(part.weight) for part in (bare.get_input_embeddings(), bare.get_output_embeddings()) if part}
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
        active = (getattr(config, "num_experts_per_tok", None) or experts) / experts
        matrices = [(name, p) for name, p in model.named_parameters() if p.ndim >= 2 and id(p) not in embeddings]
        heads = getattr(config, "num_attention_heads", 0)  # of a recurrent model there are none
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
        return cls(
            body=int(sum(p.numel() * (active if ".experts." in name else 1) for name, p in matrices)),
            hidden=config.hidden_size,
            attention=heads * head_dim,
            layers=config.num_hidden_layers,
            vocabulary=config.vocab_size,
        )

    @classmethod
    def llama(cls, hidden: int, layers: int, key_value: int, inner: int, vocabulary: int) -> Shape:
        """Return the shape of a Llama-like model. key_value: width of all keys of a layer; inner: width of its MLP."""
        layer = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * inner
        return cls(layers * layer, hidden, attention=hidden, layers=layers, vocabulary=vocabulary)

    def body_flops(self, work: Work) -> float:
        """Return the FLOPs of a forward pass of the body: 2 for a parameter and token, 4 a layer, channel and pair of
        tokens that attend.
        """
        return 2 * self.body * work.tokens + self._attention_flops(work)

    def head_flops(self, work: Work) -> float:
        """Return the FLOPs of a forward pass of the LM head."""
        return 2 * self.hidden * self.vocabulary * work.rows

    def step_flops(self, work: Work, recomputes: bool = False, reference: bool = False, frozen: bool = False) -> float:
        """Return the FLOPs of forward and backward pass.

        recomputes: the forward pass of the body is made again (gradient checkpointing); reference: one forward pass
        more; frozen: only adapters are trained, so that the backward pass needs no gradients of other weights.
        """
        passes = 2 if frozen else 3
        body = (passes + recomputes + reference) * self.body_flops(work) + frozen * self._attention_flops(work)
        return body + (passes + reference) * self.head_flops(work)

    def _attention_flops(self, work: Work) -> float:
        return 4 * self.attention * self.layers * work.attended


def _causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: object
) -> tuple[Tensor, None]:
    """Attend as a kernel for variable lengths does: it keeps queries, keys, values and result."""
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped).transpose(1, 2), None


AttentionInterface.register(ON_PAPER, _causal_attention)


@contextmanager
def on_paper(make: Callable[[], PreTrainedModel], autocast: torch.dtype | None = None) -> Iterator[PreTrainedModel]:
    """Yield the model that `make` returns; it and all tensors inside the context have shapes, but no memory.

    autocast: the dtype of products, None for that of the weights.
    """
    with torch.device("meta"):
        model = make()
    with suppress(ValueError):  # an architecture with an attention of its own
        causal_lm(model).set_attn_implementation(ON_PAPER)
    dtype = autocast or torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True):
        causal_lm(model.to_empty(device="cpu")).tie_weights()
        with torch.autocast("cpu", dtype, enabled=autocast is not None, cache_enabled=False):
            yield model


def weight_bytes(parameters: Iterable[nn.Parameter], quantized: bool = False) -> float:
    """Return the bytes of parameters. quantized: these are matrices kept in 4 bits."""
    return sum(p.numel() * (NF4_BYTES if quantized else p.element_size()) for p in parameters)


def quantized_matrices(model: nn.Module, head: nn.Module | None) -> list[nn.Parameter]:
    """Return the weights that bitsandbytes keeps in 4 bits: frozen ones of linear layers, but not those of the head."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return [layer.weight for layer in layers if not layer.weight.requires_grad]  # type: ignore[misc]


def saved_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Return the bytes that autograd keeps of what `run` computes, each storage once, without the model's own weights."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result is not None  # what it computed lives until all is counted
    return sum(storage.nbytes() for storage in kept.values())


def activation_bytes(model: PreTrainedModel, tokens: int, recomputes: bool = False) -> float:
    """Return the bytes that the body keeps of a forward pass over `tokens` tokens, for its backward pass; inside
    `on_paper`.

    It is a plain pass over one row. Autocast's copies of weights are counted, since autograd keeps them. recomputes:
    with gradient checkpointing, the inputs of all layers and what one layer keeps.
    """
    bare, ids = causal_lm(model), torch.zeros(1, tokens, dtype=torch.long)
    layers = sum(isinstance(m, GradientCheckpointingLayer) for m in bare.modules())

    def run() -> object:
        disable_dropout(model)
        return bare.base_model(input_ids=ids, position_ids=torch.arange(tokens)[None], use_cache=False)

    whole = saved_bytes(model, run)
    if not recomputes or not layers:
        return whole
    bare.activation_checkpointing_enable({"use_reentrant": False})
    inputs = saved_bytes(model, run)
    bare.activation_checkpointing_disable()  # else there is no KV cache
    return inputs + whole / layers


def head_bytes(shape: Shape, rows: float, weight: Tensor, trained: bool, product: torch.dtype) -> float:
    """Return the bytes of the LM head in training, for `rows` response rows: a chunk of logits in float32 and in the
    dtype of products, the largest on a GPU, the gradients of hidden states and, if it is trained, of its weight.
    """
    short = 0 if product == torch.float32 else product.itemsize
    logits = min(rows, GPU_ROWS) * shape.vocabulary * (4 + short)
    copies = weight.numel() * (0 if product == weight.dtype else product.itemsize)
    return logits + copies + rows * shape.hidden * (4 + product.itemsize) + (4 * weight.numel() if trained else 0)


def cache_bytes(model: PreTrainedModel, rows: int, length: int) -> float:
    """Return the bytes of the KV cache of `rows` rows of `length` tokens; inside `on_paper`.

    Layers with windows and states are counted as if they kept each token.
    """
    with torch.no_grad():
        output = causal_lm(model)(input_ids=torch.zeros(1, PROBE, dtype=torch.long), use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", [])  # a recurrent model has none
    kept = [t for layer in layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return rows * length * sum(t.nbytes for t in kept if t is not None) / PROBE
