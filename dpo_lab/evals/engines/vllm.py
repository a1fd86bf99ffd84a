"""The engine vLLM, which takes the policy as a saved folder. Nobody has run it in this project: it needs a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dpo_lab.errors import first_line
from dpo_lab.evals.engines.base import Engine, EngineError, Request, sampled_on_rank_zero

if TYPE_CHECKING:
    from dpo_lab.models.sampling import Sample


@dataclass
class VLLM(Engine, name="vllm"):
    """vLLM (extra [vllm], GPUs only). The policy is saved to a temporary folder, with adapters merged, which vLLM loads
    beside the models of this process. Each prompt has a seed of its own.

    memory: the share of the GPU's memory for vLLM, weights and KV cache; gpus: over how many GPUs it divides the policy.
    """

    memory: float = 0.4
    gpus: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.memory < 1:
            raise ValueError(
                f"evals.engine.memory={self.memory}: must be between 0 and 1; type evals.engine.memory=0.4"
            )

    def check(self) -> None:
        import torch

        if find_spec("vllm") is None:
            raise EngineError(
                "evals/engine=vllm: needs vLLM; type pip install 'dpo_lab[vllm]', or evals/engine=continuous"
            )
        if not torch.cuda.is_available():
            raise EngineError("evals/engine=vllm: needs a GPU; type evals/engine=continuous")

    def generate(self, request: Request) -> list[Sample]:
        from dpo_lab.core.seeds import derive_seed

        policy, prompts = request.policy, request.prompts

        def rows() -> list[list[int]]:
            self.check()
            from vllm import LLM, SamplingParams  # type: ignore

            drawn = [
                SamplingParams(
                    temperature=1.0,
                    top_p=1.0,
                    top_k=0,
                    max_tokens=request.max_new_tokens,
                    stop_token_ids=list(request.encoder.end_ids),
                    ignore_eos=True,  # the end tokens are those of the encoder alone
                    detokenize=False,
                    seed=derive_seed(request.seed, str(i)) % 2**31,
                )
                for i in range(len(prompts))
            ]
            try:
                with TemporaryDirectory() as folder:
                    has_adapters = hasattr(policy.model, "merge_and_unload")
                    (policy.merged() if has_adapters else policy).save(Path(folder))
                    llm = LLM(
                        model=folder,
                        generation_config="vllm",  # not the folder's, which may set a temperature
                        gpu_memory_utilization=self.memory,
                        tensor_parallel_size=self.gpus,
                        max_model_len=max(map(len, prompts)) + request.max_new_tokens,
                        max_num_seqs=request.batch_size,
                    )
                    given = [{"prompt_token_ids": [int(token) for token in prompt]} for prompt in prompts]
                    found = llm.generate(given, drawn, use_tqdm=False)
            except Exception as error:  # many types, from vLLM and CUDA
                raise EngineError(
                    f"evals/engine=vllm: {type(error).__name__}: {first_line(error)}; type evals/engine=continuous"
                ) from error
            return [list(each.outputs[0].token_ids) for each in found]

        return sampled_on_rank_zero(request, self.name, rows)
