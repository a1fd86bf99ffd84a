"""The classifier as judge: a local sequence-classification model that scores responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_lab.errors import check_at_least, first_line
from dpo_lab.evals.judges.base import Judge, JudgeError, Scorer
from dpo_lab.runs.out_of_memory import explain_out_of_memory, halved

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass
class Classifier(Judge, name="classifier", gives_scores=True):
    """A sequence-classification model, a reward model for one. path: its Hugging Face folder; None for no judge. label:
    the class whose log-odds are the score, by name or number, by default the last one; the score of a model with one
    output is that output. max_length: prompt and response are truncated on the right to so many tokens. batch_size:
    texts per forward pass.
    """

    path: str | None = None
    label: str | None = None
    max_length: int = 512
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("max_length", "batch_size"):
            check_at_least(f"evals.judge.{name}", getattr(self, name), 1, 32)

    @property
    def is_set(self) -> bool:
        return self.path is not None

    @property
    def local_model(self) -> str | None:
        return self.path

    def untrained(self) -> PreTrainedModel | None:
        if self.path is None:
            return None
        from dpo_lab.models.load import untrained_classifier

        try:
            return untrained_classifier(Path(self.path))
        except Exception as error:  # many types, depending on the file
            raise JudgeError(
                f"evals.judge.path={self.path}: {first_line(error)}; type the folder of a classifier"
            ) from error

    def load(self, device: torch.device | str = "cpu", cache: Path | None = None) -> Scorer | None:
        if self.path is None:
            return None
        if not Path(self.path).is_dir():
            raise JudgeError(f"evals.judge.path={self.path}: no such folder; type the folder of a classifier")
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from dpo_lab.models.checkpoint_keys import check_keys
        from dpo_lab.models.policy import PolicyError
        from dpo_lab.models.probes import hard_positions, positions_of

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.path,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            check_keys(model, info, f"evals.judge.path={self.path}")
        except PolicyError as error:
            raise JudgeError(str(error)) from error
        except Exception as error:  # many types, depending on file and format
            raise JudgeError(
                f"evals.judge.path={self.path}: {first_line(error)}; type the folder of a classifier with safetensors"
            ) from error
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
        label = self._label(model.config)
        positions = positions_of(model.eval())
        if positions is not None and self.max_length > positions and hard_positions(model):
            raise JudgeError(
                f"evals.judge.max_length={self.max_length}: the judge has {positions} positions;"
                f" type evals.judge.max_length={positions}"
            )
        model.to(device)
        return Scorer(lambda texts: self._scores(model, tokenizer, label, texts))

    def _label(self, config: Any) -> int:
        names = [str(config.id2label[i]) for i in range(config.num_labels)]
        if self.label is None:
            return config.num_labels - 1
        if self.label in names:
            return names.index(self.label)
        if self.label.isdecimal() and int(self.label) < len(names):
            return int(self.label)
        raise JudgeError(
            f"evals.judge.label={self.label}: no such class; type evals.judge.label= one of {', '.join(names)}"
        )

    def _scores(self, model: Any, tokenizer: Any, label: int, texts: Sequence[str]) -> np.ndarray:
        import torch

        from dpo_lab.distributed.collectives import map_across_ranks

        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

        @torch.inference_mode()
        def compute(part: list[int]) -> torch.Tensor:
            own = [texts[i] for i in part]
            batch = tokenizer(own, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
            logits = model(**batch.to(model.device)).logits.double().cpu()
            if logits.shape[1] == 1:
                return logits[:, 0]
            others = torch.cat((logits[:, :label], logits[:, label + 1 :]), 1)
            return logits[:, label] - others.logsumexp(1)

        scores = np.empty(len(texts))
        sizes = [sum(len(texts[i]) for i in part) for part in parts]
        with explain_out_of_memory("the judge", *halved("evals.judge.batch_size", self.batch_size)):
            computed = map_across_ranks(parts, sizes, compute)
        for part, of_part in zip(parts, computed, strict=True):
            scores[part] = of_part.numpy()
        return scores
