"""A reward model learned from the run's own pairs, or any that `dpo_lab.reward` trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_lab.errors import check_at_least, first_line
from dpo_lab.models.policy import PolicyConfig, TinyPolicy
from dpo_lab.rewards.base import Reward, RewardError, RewardInputs, ScoreTokens
from dpo_lab.runs.cache import CACHE

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FACTS = "reward.json"  # in the folder of a reward model: mean and sd of its scores, and what it was trained on


@dataclass
class Learned(Reward, name="learned", reads_labels=True):
    """The score of a reward model, in log-odds, less its mean on the initial policy's samples.

    path: the folder of one that `python -m dpo_lab.reward` trained; None: it is trained first, on the run's own pairs with
    their label noise, from its initial policy, once for all runs that share these. The other settings are those of that
    training: optimizer steps, pairs a step, learning rate (None: 1e-3 for the embedded policy, 2e-4 for adapters, 1e-5
    for all weights of a pretrained one), and the coefficient of the centring term, see core/bradley_terry.py.
    """

    path: str | None = None
    steps: int = 250
    batch_size: int = 16
    lr: float | None = None
    centring: float = 0.0

    def __post_init__(self) -> None:
        check_at_least("reward.steps", self.steps, 1, 250)
        check_at_least("reward.batch_size", self.batch_size, 1, 16)
        check_at_least("reward.centring", self.centring, 0, 0.01)
        if self.lr is not None:
            check_at_least("reward.lr", self.lr, 0, "1e-3")

    def learning_rate(self, policy: PolicyConfig) -> float:
        """Return the learning rate of the training from a policy."""
        if self.lr is not None:
            return self.lr
        if isinstance(policy, TinyPolicy):
            return 1e-3
        return 2e-4 if policy.has_adapters else 1e-5

    @property
    def is_given(self) -> bool:
        """Whether the reward model is one that the user names; one in the cache is the run's own."""
        return self.path is not None and not Path(self.path).is_relative_to(CACHE)

    def files(self) -> list[Path]:
        folder = Path(str(self.path))
        return sorted(file for file in folder.iterdir() if file.is_file()) if self.is_given and folder.is_dir() else []

    def measured(self) -> dict[str, Any]:
        return json.loads((Path(str(self.path)) / FACTS).read_text()).get("accuracy", {})

    def load(self, inputs: RewardInputs) -> ScoreTokens:
        from dpo_lab.evals.context import score_pairs
        from dpo_lab.models.reward_head import response_rewards

        facts = self._facts(inputs)
        model = load_reward_model(Path(str(self.path)), inputs.device, inputs.initial.model)

        def score(prompts, responses):
            scores, _ = score_pairs(model, prompts, responses, inputs.tokens, inputs.context, response_rewards)
            return scores.double().numpy() - facts["mean"]

        score.model = model  # type: ignore[attr-defined]  # see RewardFunction.model
        return score

    def moments(self, score, inputs) -> tuple[float, float]:
        if (sd := self._facts(inputs)["sd"]) is None:
            raise RewardError(
                f"reward.scale=unit: {self.path} was trained without held-out prompts, on which its standard deviation is"
                " measured; type reward.scale=preference"
            )
        return 0.0, float(sd)

    def _facts(self, inputs: RewardInputs) -> Mapping[str, Any]:
        """Return what the reward model's folder says of it. Raise RewardError if it is not one, or of another tokenizer."""
        assert self.path is not None, "a reward model without a path is trained before, see pipelines/reward_inputs.py"
        key, other = (
            f"reward.path={self.path}",
            "type reward=judge evals.judge.path=FOLDER for a classifier of another origin",
        )
        try:
            facts = json.loads((Path(self.path) / FACTS).read_text())
        except (OSError, ValueError) as error:
            raise RewardError(f"{key}: not made by python -m dpo_lab.reward ({first_line(error)}); {other}") from None
        if facts["tokenizer"] != inputs.encoder.fingerprint:
            raise RewardError(
                f"{key}: trained with another tokenizer, or another data.max_length or data.max_prompt_length; {other}"
            )
        return facts


def load_reward_model(folder: Path, device: torch.device, initial: PreTrainedModel | None = None) -> PreTrainedModel:
    """Load a reward model for response_rewards; it shares prompts if `initial`, a policy of the same class, does.

    Raises RewardError if it can't be loaded.
    """
    from transformers import AutoModelForSequenceClassification

    from dpo_lab.models.paths import apply_path, causal_lm, path_of

    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except Exception as error:  # many types, depending on file and format
        raise RewardError(f"reward.path={folder}: {first_line(error)}; type the folder of a reward model") from error
    if initial is not None and type(causal_lm(initial).base_model) is type(model.base_model):
        apply_path(model, path_of(initial))
    return model.eval().requires_grad_(False).to(device)
