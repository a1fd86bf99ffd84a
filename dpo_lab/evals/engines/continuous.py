"""The engine of continuous batching: transformers' own, where a finished response at once makes room for the next one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpo_lab.errors import check_at_least, first_line
from dpo_lab.evals.engines.base import Engine, EngineError, Request, sampled_on_rank_zero

if TYPE_CHECKING:
    from dpo_lab.models.sampling import Sample


@dataclass
class Continuous(Engine, name="continuous"):
    """transformers' continuous batching (`generate_batch`), for long responses of uneven length. Runs on GPUs and on the
    CPU, in the precision of the weights, without autocast. evals.batch_size is the most responses at a time.

    page_size: tokens of a page of the KV cache; memory: the share of the GPU's free memory for the KV cache, None for
    transformers' default; on the CPU the cache has the pages that evals.batch_size responses need.
    """

    page_size: int = 256
    memory: float | None = None

    def __post_init__(self) -> None:
        check_at_least("evals.engine.page_size", self.page_size, 4, 256)
        if self.memory is not None and not 0 < self.memory < 1:
            raise ValueError(
                f"evals.engine.memory={self.memory}: must be between 0 and 1; type evals.engine.memory=0.5"
            )

    def generate(self, request: Request) -> list[Sample]:
        from dpo_lab.models.paths import causal_lm

        encoder, prompts = request.encoder, request.prompts

        def rows() -> list[list[int]]:
            from transformers import ContinuousBatchingConfig, GenerationConfig

            model: Any = causal_lm(request.policy.model)
            rows_at_once = min(request.batch_size, len(prompts))
            longest = max(map(len, prompts)) + request.max_new_tokens
            on_cpu = model.device.type == "cpu"  # whose memory is not this process's alone
            batching = ContinuousBatchingConfig(
                page_size=self.page_size,
                max_memory_percent=self.memory,
                max_requests_per_batch=rows_at_once,
                num_blocks=rows_at_once * -(-longest // self.page_size) if on_cpu else None,
                max_batch_tokens=max(rows_at_once, longest) if on_cpu else None,
                seed=request.seed % 2**32,
            )
            drawn = GenerationConfig(
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                max_new_tokens=request.max_new_tokens,
                eos_token_id=list(encoder.end_ids),
                pad_token_id=encoder.pad_id,
            )
            try:
                with _plain_attention(model):
                    found = model.generate_batch(
                        [[int(token) for token in prompt] for prompt in prompts], drawn, batching, warmup=False
                    )
            except Exception as error:  # many types, depending on the model's attention
                raise EngineError(
                    f"evals/engine=continuous: {type(error).__name__}: {first_line(error)}; type evals/engine=exact"
                ) from error
            return [list(each.generated_tokens) if each.error is None else [] for each in found.values()]

        return sampled_on_rank_zero(request, self.name, rows)


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """Let the model, inside the context, have an attention that takes pages, and be in evaluation mode."""
    from dpo_lab.models.sampling import evaluating

    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        with evaluating(model):
            yield
    finally:
        model.set_attn_implementation(attention)
