"""The choices of config groups as text for --help: losses by the reference that they require, each in one line."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from dpo_lab import plugins
from dpo_lab.config.plugin_choices import Choice
from dpo_lab.core.losses import LOSSES, Loss
from dpo_lab.core.losses.base import StepLevel

# Groups whose choices get a line each.
DESCRIBED = ("method", "loss", "reference", "noise", "reward", "evals/engine", "evals/judge")
HEADINGS = {None: "any reference", True: "reference=cached, frozen, moving or adapter_off", False: "reference=uniform"}
TOGETHER = "all pairs of a step together"


def describe_choices(folder: Path, added: Sequence[Choice] = ()) -> str:
    """Return the choices of every group of a config folder; a line of a YAML file's first comment describes it.

    added: those of plugins, each of which says where it is from.
    """
    about = {
        name: {path.stem: _comment(path) for path in sorted(group.glob("*.yaml"))}
        for group in folder.rglob("*")
        if group.is_dir() and not (name := group.relative_to(folder).as_posix()).startswith("hydra")
    }
    for choice in added:
        about.setdefault(choice.group, {})[choice.name] = f"{choice.about} [{choice.source}]"
    lines = []
    for group, texts in sorted(about.items()):
        own = {choice.name for choice in added if choice.group == group}
        if group == "loss":
            for heading in (*HEADINGS.values(), TOGETHER):
                lines.append(f"loss, {heading}:")
                lines += [_line(name, text) for name, text in texts.items() if _heading(LOSSES.get(name)) == heading]
        elif group in DESCRIBED:
            lines += [f"{group}:", *(_line(name, text) for name, text in texts.items())]
        else:
            names = ", ".join(sorted(texts.keys() - own))
            lines += textwrap.wrap(f"{group}: {names}", 110, subsequent_indent="  ")
            lines += [_line(name, texts[name]) for name in sorted(own)]
    lines += _not_loaded()
    return "\n".join(lines).replace("$", "$$")  # Hydra substitutes names after a dollar sign


def _not_loaded() -> list[str]:
    """Return a line that names the installed plugins which are not loaded, if there are some."""
    loaded = {plugin.typed for plugin in plugins.loaded()}
    names = sorted(plugins.installed().keys() - loaded)
    return (
        [f"plugins that are installed: {', '.join(names)}; type plugins=[{names[0]}] for its choices"] if names else []
    )


def _comment(path: Path) -> str:
    return path.read_text().splitlines()[0].lstrip("# ")


def _line(name: str, text: str) -> str:
    return f"  {name:<14} {text}"


def _heading(loss: type[Loss] | None) -> str:
    if loss is None:
        return HEADINGS[None]
    return TOGETHER if issubclass(loss, StepLevel) else HEADINGS[loss.requires_reference]
