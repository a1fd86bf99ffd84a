"""Probe a loaded model on made-up tokens: whether it is causal, whether padding changes it, whether its cache is right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from dpo_lab.models.decoding import CachedRows
from dpo_lab.models.paths import causal_lm, pad_id_of
from dpo_lab.runs.cache import cached

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = (4, 1)  # lengths of the prompts of made-up tokens
STEPS = 3  # number of tokens that continue each prompt
FORMAT = "1"  # increase it when a change of the code changes the cached results
# The largest difference by rounding, relative to the standard deviation of the logits, by dtype of the weights.
# Measured with a KV cache in 65 architectures and SmolLM2: at most 1e-5 in float32 and .033 in bfloat16; with wrong
# caches .05 to 4.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
# The same between equal shapes. Measured: 0; with attention to later tokens 4e-3 and more, at random weights.
LEAK_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3}


@dataclass(frozen=True)
class Behaviour:
    """The result of probing a model. refused: why it can't be used, else None; uncached: why it is sampled without a KV
    cache, else None.
    """

    refused: str | None = None
    uncached: str | None = None


def behaviour_of(model: PreTrainedModel, cache: Path | None = None) -> Behaviour:
    """Probe a model, or return the result from `cache` if the same model was probed before."""
    if cache is None:
        return _probe(model)

    def make(path: Path) -> None:
        path.write_text(json.dumps(asdict(_probe(model))))

    return Behaviour(**json.loads(cached(cache / f"behaviour-{fingerprint(model, [FORMAT])}.json", make).read_text()))


def positions_of(model: PreTrainedModel) -> int | None:
    """Return the length of the longest row that the model was trained for, None if its config declares none."""
    declared = _declared_positions(model)
    for module in model.modules():  # position ids start after the pad token's id, as in RoBERTa
        if declared is not None and hasattr(module, "create_position_ids_from_input_ids"):
            return declared - int(module.padding_idx) - 1  # type: ignore[arg-type]
    return declared


def _declared_positions(model: PreTrainedModel) -> int | None:
    config = causal_lm(model).config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


@torch.inference_mode()
def hard_positions(model: PreTrainedModel) -> bool:
    """Return whether a row longer than positions_of(model) can't be computed, as with learned positions."""
    positions = _declared_positions(model)
    if positions is None or ropes_of(model):
        return False  # an angle can be computed for any position
    if causal_lm(model).config.model_type == "mpt":  # it takes no position ids, and its ALiBi table has a fixed size
        return True
    token = torch.full((1, 1), 3, device=model.device)
    try:
        model(input_ids=token, position_ids=token.new_full((1, 1), positions), use_cache=False)
    except (IndexError, RuntimeError):
        return True
    except TypeError:  # it takes no position ids
        return False
    return False


def ropes_of(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Return the settings of the rotary position embeddings: one for all layers, or one per type of layer."""
    parameters = getattr(causal_lm(model).config.get_text_config(), "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict) and "rope_type" in value]
    return nested or ([parameters] if parameters else [])


def fingerprint(model: PreTrainedModel, what: Sequence[str]) -> str:
    """Return a hash of `what`, versions, class, config, and each weight's name, shape, dtype and a sample of its values."""
    versions = [*what, transformers.__version__, torch.__version__]
    config = causal_lm(model).config.to_json_string()
    digest = hashlib.blake2b(json.dumps([*versions, str(type(causal_lm(model))), config]).encode(), digest_size=8)
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().reshape(-1)
        digest.update(flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def _probe(model: PreTrainedModel) -> Behaviour:
    rows = _made_up_rows(model)
    tolerance = TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])
    half = len(rows[0]) // 2
    changed = torch.cat((rows[0][:half], rows[1]))  # the first row with other tokens in its second half
    with evaluated(model):
        try:
            logits = _padded(model, [*rows, changed])
        except Exception as error:  # any type
            return Behaviour(refused=f"its forward does not take plain rows of tokens ({error_line(error)})")
        difference = _median(logits[-1][:half], logits[0][:half])
        if difference > LEAK_TOLERANCE.get(model.dtype, LEAK_TOLERANCE[torch.bfloat16]):
            return Behaviour(
                refused="its attention is bidirectional: later tokens change the logits of earlier ones"
                f" (by {difference:.1g} of their standard deviation)"
            )
        uncached = _why_uncached(model, rows, logits, tolerance)
        if uncached is not None:  # else rows padded on the left agree with rows padded on the right
            unpadded = _padded(model, rows[-1:])[0]
            if (difference := _median(logits[len(rows) - 1], unpadded)) > tolerance:
                return Behaviour(
                    refused="padding after a row changes the logits of the row"
                    f" (by {difference:.1g} of their standard deviation)"
                )
        return Behaviour(uncached=uncached)


def _why_uncached(model: PreTrainedModel, rows: list[Tensor], logits: list[Tensor], tolerance: float) -> str | None:
    """Return why the KV cache can't be used, or None: compare its logits with those of full forward passes.

    Rows are padded on the left and continued token by token; a row leaves the batch on the way.
    """
    try:
        cached = CachedRows(model, [row[:-STEPS].tolist() for row in rows], pad_id_of(model), STEPS)
        active = list(range(len(rows)))
        largest = 0.0
        for step in range(STEPS):
            for next_logits, i in zip(cached.logits(), active, strict=True):
                expected = logits[i][len(rows[i]) - STEPS + step - 1]
                largest = max(largest, _maximum(next_logits[None], expected[None]))
            if step == 0:
                active = [1]
                cached.keep(torch.tensor(active, device=logits[0].device))
            cached.append(torch.stack([rows[i][len(rows[i]) - STEPS + step] for i in active]))
    except Exception as error:  # any type
        return error_line(error)
    if not largest <= tolerance:
        return f"its logits differ from those of a full forward pass (by {largest:.2g} of their standard deviation)"
    return None


def _made_up_rows(model: PreTrainedModel) -> list[Tensor]:
    """Return rows of arbitrary tokens without padding, the same in each call."""
    lengths = [length + STEPS for length in PROMPTS]
    return list(made_up_tokens(model, sum(lengths)).split(lengths))


def made_up_tokens(model: PreTrainedModel, count: int) -> Tensor:
    """Return arbitrary tokens, none of them the pad token, the same in each call."""
    vocabulary: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index,union-attr]
    ids = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))
    ids = ids[ids != pad_id_of(model)]
    return ids[torch.arange(count) % len(ids)].to(model.device)


def _padded(model: PreTrainedModel, rows: list[Tensor]) -> list[Tensor]:
    """Return the logits [T, V] of each row by one forward pass, padded on the right without a mask, as for scoring."""
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id_of(model))
    logits = model(input_ids=input_ids, use_cache=False).logits
    return [of_row[: len(row)] for of_row, row in zip(logits, rows, strict=True)]


def _maximum(logits: Tensor, expected: Tensor) -> float:
    """Return the largest relative difference of T."""
    return float(relative_differences(logits, expected).max())


def _median(logits: Tensor, expected: Tensor) -> float:
    """Return the median relative difference of T, which ignores single tokens that are routed to another expert."""
    return float(relative_differences(logits, expected).median())


def relative_differences(logits: Tensor, expected: Tensor) -> Tensor:
    """Return the root mean square difference of logits [T, V] relative to their standard deviation, [T]."""
    logits, expected = logits.double().log_softmax(-1), expected.double().log_softmax(-1)
    differences = (logits - expected).square().mean(-1).sqrt() / expected.std(-1).clamp(min=1e-12)
    return differences.nan_to_num(nan=float("inf"))


@contextmanager
def evaluated(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def error_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:200]
