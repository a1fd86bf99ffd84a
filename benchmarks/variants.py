"""Who is measured: the original repository's loop, TRL's DPOTrainer, and ours; each over the same pairs."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from benchmarks.workload import make_tokenizer
from dpo_lab.core.losses import DPO
from dpo_lab.core.pairs import EncodedPair, PairLogps
from dpo_lab.data.collate import collate
from dpo_lab.models.forward import disable_dropout, pair_logps, pair_loss, select_forward

BETA = 0.1


@dataclass
class Variant:
    """`backward` leaves the gradient of the mean loss of all pairs in the shared parameters."""

    name: str
    dtype: str
    checkpointing: bool
    backward: Callable[[], None]


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Modules of its own over the same parameters: what a trainer patches in it, the others don't see."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def computes_in(dtype: str, device: str = "cpu") -> AbstractContextManager:
    """Autocast for bf16, nothing for fp32."""
    return torch.autocast(device, torch.bfloat16) if dtype == "bf16" else nullcontext()


def padded(pairs: Sequence[EncodedPair]) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask, labels [2B, T], all chosen first."""
    rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    mask = torch.zeros_like(input_ids)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor([*prompt, *response])
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = input_ids[row, len(prompt) : end]
    return input_ids, mask, labels


def original_logps(model: PreTrainedModel, pairs: Sequence[EncodedPair]) -> Tensor:
    """[2B] as the DPO paper's own code computes it: padded rows, all logits in float32, log-softmax over every row."""
    input_ids, mask, labels = padded(pairs)
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits.float()[:, :-1]
    labels = labels[:, 1:]
    scored = labels != -100
    per_token = logits.log_softmax(-1).gather(2, labels.masked_fill(~scored, 0)[:, :, None])[:, :, 0]
    return (per_token * scored).sum(1)


def original(policy: PreTrainedModel, reference: PreTrainedModel, pairs: Sequence[EncodedPair]) -> Variant:
    """The original repository's loop, re-created from its mathematics: policy and reference forward in every step."""
    policy = twin(policy)

    def backward() -> None:
        chosen, rejected = original_logps(policy, pairs).chunk(2)
        with torch.no_grad():
            chosen_reference, rejected_reference = original_logps(reference, pairs).chunk(2)
        margin = (chosen - rejected) - (chosen_reference - rejected_reference)
        (-F.logsigmoid(BETA * margin)).mean().backward()

    return Variant("original repository's loop", "fp32", False, backward)


def ours(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    pairs: Sequence[EncodedPair],
    tokens: int,
    dtype: str = "fp32",
    checkpointing: bool = False,
) -> Variant:
    """DPOModule's step without Lightning: reference from the cache, micro-batches of `tokens`."""
    policy = twin(policy)
    select_forward(policy)
    if checkpointing:
        policy.activation_checkpointing_enable({"use_reentrant": False})
    disable_dropout(policy)
    parts = collate(sorted(pairs, key=lambda pair: -pair.size)).split(tokens)
    with torch.no_grad(), computes_in(dtype):
        cached: list[PairLogps] = [pair_logps(reference, part) for part in parts]
    loss = DPO(BETA)

    def backward() -> None:
        with computes_in(dtype):
            for part, of_reference in zip(parts, cached, strict=True):
                total, _ = pair_loss(policy, part, loss, of_reference)
                (total / len(pairs)).backward()

    name = "ours" + (", checkpointing" if checkpointing else "")
    return Variant(name, dtype, checkpointing, backward)


def trl_config(
    beta: float, dtype: str, checkpointing: bool = True, precomputed: bool = False, device: str = "cpu", **more
):
    """TRL's settings, its defaults but for what is named; quiet."""
    from trl.trainer.dpo_config import DPOConfig

    return DPOConfig(
        beta=beta,
        bf16=dtype == "bf16",
        gradient_checkpointing=checkpointing,
        precompute_ref_log_probs=precomputed,
        use_cpu=device == "cpu",
        report_to="none",
        disable_tqdm=True,
        **({"output_dir": tempfile.mkdtemp()} | more),
    )


class TRL:
    """TRL's own DPOTrainer: its collator, compute_loss and backward, set up as its train() would.

    At its defaults a reference model runs in every step and layers are checkpointed; tuned: precomputed reference
    log-probs and single pairs, which need no padding.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel | None,
        dtype: str,
        checkpointing: bool = True,
        tuned: bool = False,
    ) -> None:
        from datasets import Dataset
        from trl.trainer.dpo_trainer import DPOTrainer

        config = trl_config(BETA, dtype, checkpointing, precomputed=tuned, device=policy.device.type)
        rows = [{"prompt": "w3", "chosen": " w4", "rejected": " w5"}]  # the measured pairs are token ids already
        self.tuned = tuned
        self.trainer = DPOTrainer(
            policy,
            reference,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(policy.config.vocab_size),
        )
        self.model = self.trainer.accelerator.prepare_model(self.trainer.model)
        if checkpointing:
            self.trainer.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs=config.gradient_checkpointing_kwargs
            )
        self.model.train()

    def batches(self, pairs: Sequence[EncodedPair]) -> list[dict[str, Tensor]]:
        """The collated batches of a step, with reference log-probs if these are precomputed."""
        from accelerate.utils import send_to_device

        trainer, rows = self.trainer, []
        for p in pairs:
            rows.append({"prompt_ids": [*p.prompt], "chosen_ids": [*p.chosen], "rejected_ids": [*p.rejected]})
        groups = [[row] for row in rows] if self.tuned else [rows]
        found = [send_to_device(trainer.data_collator(group), trainer.accelerator.device) for group in groups]
        for batch in found if self.tuned else ():
            logps = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = logps
        return found

    def backward(self, batches: Sequence[dict[str, Tensor]]) -> None:
        """Forward and backward pass of the mean loss of all pairs."""
        for batch in batches:
            with self.trainer.compute_loss_context_manager():
                loss = self.trainer.compute_loss(self.model, batch)
            self.trainer.accelerator.backward(loss / len(batches))


def trl(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    pairs: Sequence[EncodedPair],
    name: str,
    dtype: str,
    checkpointing: bool = True,
    tuned: bool = False,
) -> Variant:
    """TRL on these pairs."""
    peer = TRL(twin(policy), twin(reference), dtype, checkpointing, tuned)
    batches = peer.batches(pairs)
    return Variant(name, dtype, checkpointing, lambda: peer.backward(batches))


def all_variants(
    policy: PreTrainedModel, reference: PreTrainedModel, pairs: Sequence[EncodedPair], tokens: int
) -> Iterator[Variant]:
    """Everybody, over the same parameters; the first is the padded twin that the others are compared with."""
    yield original(policy, reference, pairs)
    yield trl(policy, reference, pairs, "TRL, its defaults", "bf16")
    yield trl(policy, reference, pairs, "TRL, its defaults", "fp32")
    yield trl(policy, reference, pairs, "TRL, without checkpointing", "fp32", checkpointing=False)
    yield trl(policy, reference, pairs, "TRL tuned", "fp32", checkpointing=False, tuned=True)
    yield trl(policy, reference, pairs, "TRL tuned", "bf16", checkpointing=False, tuned=True)
    yield ours(policy, reference, pairs, tokens)
    yield ours(policy, reference, pairs, tokens, checkpointing=True)
    yield ours(policy, reference, pairs, tokens, dtype="bf16")


def gradient(model: nn.Module) -> list[Tensor]:
    """Copies of all gradients."""
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]
