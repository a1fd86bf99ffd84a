"""The choices of config groups as text for --help: losses by the reference that they require, each in one line."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

from dpo_lab.core.losses import LOSSES, Loss
from dpo_lab.core.losses.base import StepLevel

DESCRIBED = ("method", "loss", "reference", "noise", "reward", "evals/judge")  # groups whose choices get a line each
HEADINGS = {None: "any reference", True: "reference=cached, frozen, moving or adapter_off", False: "reference=uniform"}
TOGETHER = "all pairs of a step together"


def describe_choices(folder: Path) -> str:
    """Return the choices of every group of a config folder; a line of a YAML file's first comment describes it."""
    lines = []
    groups = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_dir()}
    for name_of_group, group in sorted(groups.items()):
        names = sorted(path.stem for path in group.glob("*.yaml"))
        if name_of_group.startswith("hydra"):
            continue
        if name_of_group not in DESCRIBED:
            indent = "  "
            lines += textwrap.wrap(f"{name_of_group}: {', '.join(names)}", 110, subsequent_indent=indent)
        elif name_of_group == "loss":
            for heading in (*HEADINGS.values(), TOGETHER):
                lines.append(f"loss, {heading}:")
                lines += _described(group, [name for name in names if _heading(LOSSES.get(name)) == heading])
        else:
            lines += [f"{name_of_group}:", *_described(group, names)]
    return "\n".join(lines).replace("$", "$$")  # Hydra substitutes names after a dollar sign


def _described(group: Path, names: Iterable[str]) -> list[str]:
    """Return a line for each choice, with the first comment of its file."""
    comments = {name: (group / f"{name}.yaml").read_text().splitlines()[0] for name in names}
    return [f"  {name:<14} {comment.lstrip('# ')}" for name, comment in comments.items()]


def _heading(loss: type[Loss] | None) -> str:
    if loss is None:
        return HEADINGS[None]
    return TOGETHER if issubclass(loss, StepLevel) else HEADINGS[loss.requires_reference]
