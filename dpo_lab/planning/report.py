"""Print the plan of a run: its memory by what holds it, and whether it fits each card, with seconds of a step."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dpo_lab.config.allowed_targets import FSDP2, target_of
from dpo_lab.config.schema import RunConfig
from dpo_lab.planning.cards import CARDS, REACHED, RESERVED
from dpo_lab.planning.plan import Plan, alternatives, plan_of

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "reference": "copy of the reference",
    "activations": "activations of a micro-batch",
    "head": "LM head",
    "training": "training",
    "sampling": "sampling, after training",
}
SHARDS = 8  # cards of the column for FSDP, where trainer.devices does not say how many


def print_plan(config: RunConfig, console: Console) -> None:
    """Print the plan of a config. Raise PolicyError if the policy's config can't be read."""
    plan, ranks = plan_of(config), _ranks(config)
    is_sharded = target_of(config.trainer.get("strategy")) == FSDP2
    console.print(
        f"{plan.parameters:,} parameters, {plan.trained:,} trained; micro-batches of {plan.tokens:,} tokens; pairs of"
        f" {plan.prompt} + 2 x {plan.response} tokens, the longest that data.max_prompt_length and data.max_length allow"
    )
    console.print(_memory_table(plan, ranks))
    console.print(_card_table(config, plan, ranks if is_sharded else 1))
    console.print(
        f"An estimate, nothing was run: memory from shapes, {RESERVED / 1e9:.0f} GB of a card kept free; a step is"
        f" {plan.flops:.3g} FLOPs, the run's {plan.steps:,} steps {plan.steps * plan.flops:.3g}; seconds at"
        f" {REACHED:.0%} of the peak of the data sheet, an assumption"
    )


def _ranks(config: RunConfig) -> int:
    devices = config.trainer.get("devices")
    return devices if isinstance(devices, int) and devices > 1 else SHARDS


def _memory_table(plan: Plan, ranks: int) -> Table:
    table = Table("GB", "one card", f"FSDP over {ranks}, each", title="Memory", title_justify="left")
    sharded = plan.memory.sharded(ranks)
    for name, label in PARTS.items():
        cells = [f"{getattr(memory, name) / 1e9:.2f}" for memory in (plan.memory, sharded)]
        table.add_row(label, *(cells if name != "sampling" else (cells[0], "")), end_section=name == "head")
    return table


def _card_table(config: RunConfig, plan: Plan, ranks: int) -> Table:
    def needed(planned: Plan) -> float:
        return (planned.memory if ranks == 1 else planned.memory.sharded(ranks)).needed

    others = alternatives(config)
    known: list[tuple[str, Plan]] = []  # an alternative is only planned where a card needs it
    table = Table("card", "fits", "s a step", title="Cards", title_justify="left")
    for card in reversed(CARDS):
        chosen, verdict = plan, "yes"
        if not card.fits(needed(plan)):
            known += [] if any(card.fits(needed(other)) for _, other in known) else list(_until(others, card, needed))
            found = next(((typed, other) for typed, other in known if card.fits(needed(other))), None)
            chosen = found[1] if found else plan
            verdict = f"no: type {found[0]}" if found else "no"
        table.add_row(card.name, verdict, f"{card.seconds(chosen.flops / ranks, chosen.in_16_bits):.3g}")
    return table


def _until(others, card, needed):
    """Yield alternatives up to the first that fits a card."""
    for typed, other in others:
        yield typed, other
        if card.fits(needed(other)):
            return
