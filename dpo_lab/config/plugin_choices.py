"""The choices that plugins add to config groups: classes of theirs, callbacks, and the YAML files of their conf folders."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from dpo_lab import plugins
from dpo_lab.evals.evaluators.base import EVALUATORS
from dpo_lab.plugins import Plugin, PluginError
from dpo_lab.runs.run_record import OUTPUTS, RECORD

FROM_ROOT = ("beta", "seed")  # settings at the root of the config, from which a field of the same name takes its value


@dataclasses.dataclass(frozen=True)
class Choice:
    """A choice GROUP=NAME of a plugin. node: its config, None if a YAML file holds it; about: a line that describes it."""

    group: str
    name: str
    plugin: Plugin | None
    about: str
    node: Mapping[str, Any] | None = None

    @property
    def source(self) -> str:
        """Where it is from, for --help: the plugin as it was typed."""
        return self.plugin.typed if self.plugin else "not a plugin"


class ConfFolders(SearchPathPlugin):
    """Adds the `conf` folders of plugins to those in which Hydra looks for choices."""

    def manipulate_search_path(self, search_path: Any) -> None:
        for plugin in plugins.loaded():
            if plugin.conf is not None:
                search_path.append(plugin.name, f"file://{plugin.conf}")


def register(kinds: Mapping[str, Mapping[str, type]], ours: Path) -> None:
    """Add the choices of the loaded plugins to Hydra's.

    kinds: the tables of classes by group; ours: this package's folder of YAML files. Raises PluginError if a choice has
    the name of another one.
    """
    loaded = plugins.loaded()
    if any(plugin.conf for plugin in loaded):
        Plugins.instance().register(ConfFolders)
    for choice in _files():
        plugin, path = choice.plugin, Path(choice.group, f"{choice.name}.yaml")
        assert plugin is not None
        others = [other.conf for other in loaded if other != plugin and other.conf and (other.conf / path).exists()]
        if (ours / path).exists() or others or choice.group.partition("/")[0] == "schema":
            raise PluginError(
                f"{plugin.conf / path}: {choice.group}={choice.name} is a choice of"  # type: ignore[operator]
                f" {others[0] if others else 'dpo_lab'} already; rename the file"
            )
    for choice in _classes(kinds):
        if (ours / choice.group / f"{choice.name}.yaml").exists():
            raise PluginError(
                f"{choice.plugin.name if choice.plugin else 'plugins'}: {choice.group}={choice.name} is a choice of dpo_lab"
                " already; choose another name"
            )
        provider = choice.plugin.name if choice.plugin else None
        ConfigStore.instance().store(choice.name, dict(choice.node or {}), choice.group, provider=provider)


def choices(kinds: Mapping[str, Mapping[str, type]]) -> list[Choice]:
    """Return all choices of the loaded plugins; of one that has both a class and a YAML file, the file's."""
    files = list(_files())
    known = {(choice.group, choice.name) for choice in files}
    return files + [choice for choice in _classes(kinds) if (choice.group, choice.name) not in known]


def hint(group: str, name: str) -> str:
    """Return the end of the message about a choice that is not found: plugins that may have it.

    They are that of an earlier run with this choice, or those that are installed and not loaded.
    """
    typed = re.compile(rf'"\+*{re.escape(group)}=[^"]*\b{re.escape(name)}\b')
    for path in OUTPUTS.rglob(RECORD):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged record says nothing
            text = path.read_text()
            if typed.search(text) and (record := json.loads(text)).get("plugins"):
                return f"; {path.parent} was made with {plugins.word_of(record)}: type it too"
    names = plugins.installed().keys() - {plugin.typed for plugin in plugins.loaded()}
    return f"; or with a plugin that has it, of those installed: plugins=[{','.join(sorted(names))}]" if names else ""


def _files() -> Iterator[Choice]:
    for plugin in plugins.loaded():
        for path in sorted(plugin.conf.rglob("*.yaml")) if plugin.conf else ():
            relative = path.relative_to(plugin.conf)  # type: ignore[arg-type]
            comments = [
                line for line in path.read_text().splitlines() if line.startswith("# ") and "@package" not in line
            ]
            about = comments[0].lstrip("# ") if comments else ""
            yield Choice(relative.parent.as_posix(), relative.stem, plugin, about)


def _classes(kinds: Mapping[str, Mapping[str, type]]) -> Iterator[Choice]:
    """Yield the choices that follow from the classes and callbacks of plugins, without a file."""
    for group, table in kinds.items():
        for name, cls in table.items():
            if _is_ours(cls):
                continue
            if group == "data.task":  # a part of the data, not a group that is typed
                node = {"defaults": [{f"override /schema/data/task@_global_.{group}": name}], "path": None}
                yield Choice("data", name, plugins.plugin_of(cls), _about(cls), node)
            else:
                path = group.replace(".", "/")
                fields = {field.name for field in dataclasses.fields(cls)}
                roots = {key: f"${{{key}}}" for key in FROM_ROOT if key in fields}
                node = {"defaults": [f"/schema/{path}/{name}@_here_"], **roots}
                yield Choice(path, name, plugins.plugin_of(cls), _about(cls), node)
    for name, cls in EVALUATORS.items():
        if not _is_ours(cls) and not cls.is_default:
            node = {"evaluators": f"${{default_evaluators:{name}}}"}
            yield Choice("evals", name, plugins.plugin_of(cls), _about(cls), node)
    for name, node in plugins.callbacks().items():
        plugin = next((each for each in plugins.loaded() if each.name == node["_target_"].partition(".")[0]), None)
        with_it = {"defaults": ["default"], name: node}
        yield Choice("callbacks", name, plugin, f"the default ones and {node['_target_']}", with_it)


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "dpo_lab"


def _about(cls: type) -> str:
    """Return the first sentence of a class's docstring."""
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ").partition(". ")[0].rstrip(".")
