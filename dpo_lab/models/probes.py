"""Probe a loaded model on made-up tokens: whether it is causal, whether padding changes it, whether its cache is right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from dpo_lab.models.decoding import CachedRows
from dpo_lab.models.forward import causal_lm, pad_id_of
from dpo_lab.runs.cache import cached

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = (4, 1)  # lengths of the rows of made-up tokens
STEPS = 3  # tokens that each is continued by
FORMAT = "1"  # to be raised whenever the same model could be found to behave otherwise
# The largest difference, as a share of the logits' standard deviation, that rounding makes: by the weights' dtype.
# Seen of a cache in 65 architectures and SmolLM2: 1e-5 in float32, .033 in bfloat16 at most; of one that is wrong: .05 to 4.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
# The same where shapes are the same. Seen: 0; of attention to later tokens 4e-3 and more, at random weights.
LEAK_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3}


@dataclass(frozen=True)
class Behaviour:
    """refused: why nothing that a model says can be trusted; uncached: why its samples take no cache; None where they
    can.
    """

    refused: str | None = None
    uncached: str | None = None


def behaviour_of(model: PreTrainedModel, cache: Path | None = None) -> Behaviour:
    """What the forwards show; read from `cache` where the same model was looked at before."""
    if cache is None:
        return _probe(model)

    def make(path: Path) -> None:
        path.write_text(json.dumps(asdict(_probe(model))))

    return Behaviour(**json.loads(cached(cache / f"behaviour-{_fingerprint(model)}.json", make).read_text()))


def positions_of(model: PreTrainedModel) -> int | None:
    """The length of the longest row that the model was made for, None where its config names none."""
    declared = _declared_positions(model)
    for module in model.modules():  # positions that are counted from behind the pad token's, as in RoBERTa
        if declared is not None and hasattr(module, "create_position_ids_from_input_ids"):
            return declared - int(module.padding_idx) - 1  # type: ignore[arg-type]
    return declared


def _declared_positions(model: PreTrainedModel) -> int | None:
    config = causal_lm(model).config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


@torch.inference_mode()
def hard_positions(model: PreTrainedModel) -> bool:
    """Whether a row longer than positions_of(model) can't be computed, as with learned positions; one token shows it."""
    positions = _declared_positions(model)
    if positions is None or ropes_of(model):
        return False  # an angle can be computed for any position
    if causal_lm(model).config.model_type == "mpt":  # it takes no positions: its ALiBi is a table of so many
        return True
    one = torch.full((1, 1), 3, device=model.device)
    try:
        model(input_ids=one, position_ids=one.new_full((1, 1), positions), use_cache=False)
    except (IndexError, RuntimeError):
        return True
    except TypeError:  # it takes no positions
        return False
    return False


def ropes_of(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The settings of its rotary position embeddings: one, or one for each type of layer."""
    found = getattr(causal_lm(model).config.get_text_config(), "rope_parameters", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict) and "rope_type" in value]
    return nested or ([found] if found else [])


def _fingerprint(model: PreTrainedModel) -> str:
    """A hash of versions, class, config, and of each weight's name, shape, dtype and some of its values: read in no
    time.
    """
    versions = [FORMAT, transformers.__version__, torch.__version__]
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
    changed = torch.cat((rows[0][:half], rows[1]))
    with _evaluated(model):
        try:
            logits = _padded(model, [*rows, changed])
        except Exception as error:  # whatever a library raises
            return Behaviour(refused=f"its forward does not take plain rows of tokens ({_line(error)})")
        moved = _median(logits[-1][:half], logits[0][:half])
        if moved > LEAK_TOLERANCE.get(model.dtype, LEAK_TOLERANCE[torch.bfloat16]):
            return Behaviour(
                refused="its attention is bidirectional: later tokens change what it says of earlier ones"
                f" (by {moved:.1g} of the spread of its logits)"
            )
        uncached = _why_uncached(model, rows, logits, tolerance)
        if uncached is not None:  # else rows padded on the left agree with rows padded on the right
            alone = _padded(model, rows[-1:])[0]
            if (moved := _median(logits[len(rows) - 1], alone)) > tolerance:
                return Behaviour(
                    refused="padding after a row changes what it says of the row"
                    f" (by {moved:.1g} of the spread of its logits)"
                )
        return Behaviour(uncached=uncached)


def _why_uncached(model: PreTrainedModel, rows: list[Tensor], logits: list[Tensor], tolerance: float) -> str | None:
    """Why the cache is of no use: rows padded on the left, continued token by token, one of them leaving the batch."""
    try:
        cached = CachedRows(model, [row[:-STEPS].tolist() for row in rows], pad_id_of(model), STEPS)
        going = list(range(len(rows)))
        worst = 0.0
        for step in range(STEPS):
            for found, i in zip(cached.logits(), going, strict=True):
                worst = max(worst, _apart(found[None], logits[i][len(rows[i]) - STEPS + step - 1][None]))
            if step == 0:
                going = [1]
                cached.keep(torch.tensor(going, device=logits[0].device))
            cached.append(torch.stack([rows[i][len(rows[i]) - STEPS + step] for i in going]))
    except Exception as error:  # whatever a library raises
        return _line(error)
    if not worst <= tolerance:
        return f"it gives other logits than a full forward (by {worst:.2g} of their spread)"
    return None


def _made_up_rows(model: PreTrainedModel) -> list[Tensor]:
    """Tokens of any kind but pads, the same each time."""
    vocabulary: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index,union-attr]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(vocabulary, generator=generator)
    ids = ids[ids != pad_id_of(model)]
    rows, start = [], 0
    for length in PROMPTS:
        places = torch.arange(start, start + length + STEPS) % len(ids)
        rows.append(ids[places].to(model.device))
        start += length + STEPS
    return rows


def _padded(model: PreTrainedModel, rows: list[Tensor]) -> list[Tensor]:
    """Logits [T, V] of each row, by one forward as it scores responses: rows padded on the right, no mask."""
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id_of(model))
    logits = model(input_ids=input_ids, use_cache=False).logits
    return [found[: len(row)] for found, row in zip(logits, rows, strict=True)]


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """The difference of logits [T, V], root mean square, as a share of their standard deviation: the largest of T."""
    return float(_shares(ours, theirs).max())


def _median(ours: Tensor, theirs: Tensor) -> float:
    """The same, the median of T: a rounding that sends one token to another expert is no fault."""
    return float(_shares(ours, theirs).median())


def _shares(ours: Tensor, theirs: Tensor) -> Tensor:
    ours, theirs = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    shares = (ours - theirs).square().mean(-1).sqrt() / theirs.std(-1).clamp(min=1e-12)
    return shares.nan_to_num(nan=float("inf"))


@contextmanager
def _evaluated(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:200]
