"""Load a model whose matrices are quantized to 4 bits by bitsandbytes (QLoRA); only adapters beside them are trained."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dpo_lab.models.policy import saved_by_this_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dpo_lab.models.policy import Pretrained


def quantization_of(settings: Pretrained) -> BitsAndBytesConfig:
    """Return transformers' config of 4-bit weights: all matrices but the embedding and the LM head.

    Blocks of 64 weights share a scale, whose own 8-bit quantization leaves 4.13 bits a weight (Dettmers et al. 2023,
    arXiv:2305.14314). Products are computed in the dtype of the weights that are not quantized.
    """
    assert settings.quantize is not None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.quantize.value,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype.value),
    )


def requantized(model: PreTrainedModel, settings: Pretrained, options: dict[str, Any]) -> PreTrainedModel:
    """Return a model that was read from a GGUF file, quantized; transformers reads either format, but not one into the
    other.
    """
    with TemporaryDirectory() as folder:
        with saved_by_this_rank(model):
            model.save_pretrained(folder)
        kept = {key: options[key] for key in ("dtype", "attn_implementation")}
        quantized = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization_of(settings), local_files_only=True, **kept
        )
    quantized.name_or_path = quantized.config.name_or_path = str(Path(settings.path))  # adapters name it as their base
    return quantized


def keep_packing(model: PreTrainedModel) -> None:
    """Keep quantized weights as they are: on CPUs with bf16 products, bitsandbytes would convert them for inference in
    place, which rounds their scales and leaves them unfit for training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
