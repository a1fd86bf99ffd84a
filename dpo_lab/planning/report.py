"""Print the plan of a run: its memory by what holds it, and whether it fits each card, with seconds of a step."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from dpo_lab.config.allowed_targets import is_sharded
from dpo_lab.config.schema import RunConfig
from dpo_lab.planning.cards import CARDS, REACHED, RESERVED, Card
from dpo_lab.planning.plan import Plan, alternatives, plan_of

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "reference": "copy of the reference",
    "critic": "critic",
    "reward_model": "reward model",
    "activations": "activations of a micro-batch",
    "head": "LM head",
    "training": "training",
    "rollouts": "samples between steps, beside the models",
    "sampling": "sampling, after training",
}
ONLINE = ("critic", "reward_model", "rollouts")  # parts that methods that sample have
SHARDS = 8  # cards of the column for FSDP, where trainer.devices does not say how many


def print_plan(config: RunConfig, console: Console) -> None:
    """Print the plan of a config. Raise PolicyError if the policy's config can't be read."""
    plan, shards = plan_of(config), _shards(config)
    sizes, is_online = plan.sizes, config.method.is_online
    limits = "the method's length limit" if is_online else "data.max_length"
    console.print(
        f"{plan.parameters:,} parameters, {plan.trained:,} trained; micro-batches of {plan.tokens:,} tokens;"
        f" {'prompts with samples' if is_online else 'pairs'} of {sizes.prompt} + {sizes.responses} x {sizes.response}"
        f" tokens, the longest that data.max_prompt_length and {limits} allow"
    )
    console.print(_memory_table(plan, None if config.policy.is_quantized else shards))
    console.print(_card_table(config, plan, *((shards, _ranks(config)) if is_sharded(config.trainer) else (1, 1))))
    console.print(
        f"An estimate, nothing was run: memory from shapes, {RESERVED / 1e9:.0f} GB of a card kept free; a step is"
        f" {_flops_text(plan)}, the run's {plan.steps:,} steps {plan.steps * plan.flops:.3g}; seconds at"
        f" {REACHED:.0%} of the peak of the data sheet, an assumption"
    )


def _flops_text(plan: Plan) -> str:
    """Return the FLOPs of a step, with those of its phases if there are several."""
    phases = [f"{name} {flops:.3g}" for name, flops in plan.flops_of.items()]
    return f"{plan.flops:.3g} FLOPs" + (f" ({', '.join(phases)})" if phases[1:] else "")


def _ranks(config: RunConfig) -> int:
    """Return how many cards a run has, or would have under FSDP."""
    devices, nodes = config.trainer.get("devices"), config.trainer.get("num_nodes") or 1
    return (devices if isinstance(devices, int) and devices > 1 else SHARDS) * nodes


def _shards(config: RunConfig) -> int:
    """Return over how many cards FSDP cuts the weights, or would: all, or those of one copy of a mesh."""
    strategy = config.trainer.get("strategy")
    mesh = strategy.get("mesh") if isinstance(strategy, Mapping) else None
    return mesh[1] if mesh else _ranks(config)


def _memory_table(plan: Plan, shards: int | None) -> Table:
    """Return the table of memory. shards: of the column for FSDP, None for no such column."""
    columns = {"one card": plan.memory}
    if shards is not None:
        columns[f"FSDP over {shards}, each"] = plan.memory.sharded(shards)
    table = Table("GB", *columns, title="Memory", title_justify="left")
    for name, label in PARTS.items():
        if name in ONLINE and not getattr(plan.memory, name):
            continue
        values = [getattr(memory, name) / 1e9 for memory in columns.values()]
        shown = values[:1] if name == "sampling" else values
        table.add_row(label, *(f"{value:.2f}" for value in shown), end_section=name == "head")
    return table


def _card_table(config: RunConfig, plan: Plan, shards: int, ranks: int) -> Table:
    """Return the table of cards: whether each holds the plan, or what to type so that it does. shards: cards that share the
    weights; ranks: that share a step.
    """
    others, planned = alternatives(config), list[tuple[str, Plan]]()

    def fits(card: Card, plan: Plan) -> bool:
        return card.fits((plan.memory if shards == 1 else plan.memory.sharded(shards)).needed)

    def first_that_fits(card: Card) -> tuple[str, Plan] | None:
        """Return what to type, and its plan; further alternatives are only planned where they are needed."""
        for typed, other in planned:
            if fits(card, other):
                return typed, other
        for typed, other in others:
            planned.append((typed, other))
            if fits(card, other):
                return typed, other
        return None

    table = Table("card", "fits", "s a step", title="Cards", title_justify="left")
    for card in CARDS:
        verdict, chosen = "yes", plan
        if not fits(card, plan):
            found = first_that_fits(card)
            verdict, chosen = (f"no: type {found[0]}", found[1]) if found else ("no", plan)
        table.add_row(card.name, verdict, f"{card.seconds(chosen.flops / ranks, chosen.in_16_bits):.3g}")
    return table
