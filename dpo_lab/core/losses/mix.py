"""A weighted sum of other losses."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from dpo_lab.core.losses.base import LOSSES, Loss, StepLevel
from dpo_lab.core.pairs import PairLogps

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

EXAMPLE = "type e.g. '+loss.terms={dpo: 1, sft: 0.1}'"


@dataclass
class Mix(
    StepLevel,
    Loss,
    name="mix",
    requires_reference=None,
    is_bradley_terry=False,
    is_per_token=False,
    is_margin_only=False,
):
    """The sum of `terms`, a weight for each loss by name. settings: those of a loss that differ from their defaults.

    All terms have the same beta and divergence. Losses that require reference=uniform take none here, too, beside ones with
    a reference. Wang et al. 2024 (arXiv:2411.10442) mix DPO, BCO and the likelihood (MPO). Rewards are beta times the
    log-ratios, whatever the terms.
    """

    terms: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError(f"loss.terms: names no loss; {EXAMPLE}")
        for key, names in (("loss.terms", self.terms), ("loss.settings", self.settings)):
            for name in names:
                if name not in LOSSES or name == "mix":
                    others = ", ".join(sorted(LOSSES.keys() - {"mix"}))
                    raise ValueError(f"{key}: '{name}' is none of the losses {others}; {EXAMPLE}")
        if unused := self.settings.keys() - self.terms.keys():
            raise ValueError(f"loss.settings: {', '.join(sorted(unused))} is not among loss.terms; {EXAMPLE}")
        self.losses = {name: self._term(name) for name in self.terms}
        required = {loss.requires_reference for loss in self.losses.values()}
        self.requires_reference = True if True in required else None if None in required else False  # type: ignore[misc]
        self.needs_scores = any(loss.needs_scores for loss in self.losses.values())  # type: ignore[misc]
        self.needs_unrelated = any(loss.needs_unrelated for loss in self.losses.values())  # type: ignore[misc]
        super().__post_init__()  # which asks for is_step_level
        if self.ld_alpha != 1 and (means := [name for name, loss in self.losses.items() if loss.is_per_token]):
            raise ValueError(
                f"loss.ld_alpha={self.ld_alpha}: {means[0]} takes the length out by a mean over tokens already; type"
                " loss.ld_alpha=1"
            )

    def _term(self, name: str) -> Loss:
        kind, settings = LOSSES[name], dict(self.settings.get(name) or {})
        if unknown := settings.keys() - {each.name for each in fields(kind)}:
            raise ValueError(f"loss.settings.{name}: has no setting {', '.join(sorted(unknown))}")
        if of_data := sorted(settings.keys() & {"ld_alpha", "weighting"}):
            raise ValueError(
                f"loss.settings.{name}: {of_data[0]} is of the data that all terms share; type loss.{of_data[0]}="
                f"{settings[of_data[0]]} for all of them"
            )
        shared: dict[str, Any] = {"beta": self.beta}
        if kind.requires_reference is not False:
            shared |= {"divergence": self.divergence, "divergence_alpha": self.divergence_alpha}
        return kind(**(shared | settings))

    @property
    def is_step_level(self) -> bool:
        return any(loss.is_step_level for loss in self.losses.values())

    def statistic(self, policy: PairLogps, reference: PairLogps) -> Float[Tensor, " terms"] | None:
        import torch

        found = [
            loss.statistic(policy, reference) if isinstance(loss, StepLevel) else None for loss in self.losses.values()
        ]
        if all(each is None for each in found):
            return None
        return torch.stack([policy.chosen.new_zeros(()) if each is None else each for each in found])

    def update(self, running: Float[Tensor, " terms"], statistic: Float[Tensor, " terms"]) -> Float[Tensor, " terms"]:
        momentum = [loss.momentum if isinstance(loss, StepLevel) else 0.0 for loss in self.losses.values()]
        weights = statistic.new_tensor(momentum)
        return weights * running + (1 - weights) * statistic

    def __call__(
        self, policy: PairLogps, reference: PairLogps, running: Float[Tensor, " terms"] | None = None
    ) -> Float[Tensor, " pairs"]:
        zeros = policy.chosen.new_zeros(len(policy.chosen))
        nothing = replace(reference, chosen=zeros, rejected=zeros)
        total = zeros
        for index, (name, loss) in enumerate(self.losses.items()):
            of_term = nothing if loss.requires_reference is False else reference
            mean = () if running is None or not isinstance(loss, StepLevel) else (running[index],)
            total = total + self.terms[name] * loss(policy, of_term, *mean)
        return total
