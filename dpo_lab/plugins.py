"""Plugins: packages and files of the user's with losses, tasks and other parts of their own; found, imported and hashed
here.

A plugin is typed as `plugins=[my_lab,./my_losses.py]`, never named in a config, and imported once. Its classes enter the
same tables as this package's, where they are defined. The processes that a command starts inherit its plugins by the
environment and import them with this package.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpo_lab.errors import LabError, first_line

ENTRY_POINTS = "dpo_lab.plugins"  # the group of entry points of installed packages
INHERITED = "DPO_LAB_PLUGINS"  # a variable of the environment, set for child processes: the plugins and their hashes
WORD = re.compile(r"\+{0,2}plugins=(.*)", re.S)
HASHED = (".py", ".yaml", ".yml")


class PluginError(LabError):
    """A plugin can't be used; the message is one line that names it and says why, and what to type."""


@dataclass(frozen=True)
class Plugin:
    """A plugin that was imported. name: of its top-level module; typed: how the command names it; source: the same with
    an absolute path; root: its file, or its package's folder; sha256: of its content, see `content_hash`.
    """

    name: str
    typed: str
    source: str
    root: Path
    sha256: str

    @property
    def digest(self) -> str:
        """The start of its hash, which a run's config holds."""
        return self.sha256[:16]

    @property
    def conf(self) -> Path | None:
        """The folder of its YAML files, `conf` in its package; None if it has none."""
        folder = self.root / "conf"
        return folder if folder.is_dir() else None


# What the plugins of this process registered, and the error of inherited ones, which is raised where they are used.
_loaded: dict[str, Plugin] = {}
_callbacks: dict[str, dict[str, Any]] = {}
_refusal: list[PluginError] = []


def register_callback(name: str, target: type | str, **settings: Any) -> None:
    """Add the choice `callbacks=NAME`: the default callbacks and one of the class `target`, with these settings.

    target: a class of Lightning's kind Callback at the top level of its module, or its full name as text, which is
    imported when a run trains and so keeps --help fast. settings: its arguments, plain values. Raises ValueError if the
    name is taken.
    """
    path = target if isinstance(target, str) else f"{target.__module__}.{target.__qualname__}"
    node = {"_target_": path, **settings}
    if _callbacks.get(name, node)["_target_"] != path:
        raise ValueError(f"callbacks={name}: taken by {_callbacks[name]['_target_']}; choose another name")
    _callbacks[name] = node


def callbacks() -> dict[str, dict[str, Any]]:
    """Return the config nodes of registered callbacks by name."""
    return dict(_callbacks)


def loaded() -> list[Plugin]:
    """Return the plugins of this process."""
    return list(_loaded.values())


def check() -> None:
    """Raise PluginError if the plugins that this process inherited can't be used."""
    for refusal in _refusal:
        raise refusal


def plugin_of(cls: type) -> Plugin | None:
    """Return the plugin that defines a class; None for a class of this package or of no plugin."""
    return _loaded.get(cls.__module__.partition(".")[0])


def words() -> list[str]:
    """Return the word of the command line that names the plugins of this process; none if it has none."""
    return [f"plugins=[{','.join(plugin.typed for plugin in loaded())}]"] if _loaded else []


def installed() -> dict[str, str]:
    """Return the installed plugins, which are not imported before they are typed: the module of each by its name."""
    from importlib.metadata import entry_points

    return {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}


def take(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the plugins that it names and its other words."""
    names, others = [], []
    for word in arguments:
        if found := WORD.fullmatch(word):
            names += [name.strip(" '\"") for name in found[1].strip("[]").split(",") if name.strip()]
        else:
            others.append(word)
    return names, others


def load(names: Iterable[str]) -> bool:
    """Import the plugins of these names and paths, and return whether one is new. Raise PluginError if one can't be used.

    A name is that of an entry point of an installed package, or of a module that Python can import from here; a path is
    that of a .py file or of a package's folder.
    """
    check()
    before = len(_loaded)
    for typed in names:
        _load(typed, typed)
    if len(_loaded) > before:
        os.environ[INHERITED] = json.dumps({p.typed: [p.source, p.sha256] for p in _loaded.values()})
    return len(_loaded) > before


def load_inherited() -> None:
    """Import the plugins of the process that started this one; called when this package is imported."""
    try:
        inherited = json.loads(os.environ.get(INHERITED) or "{}")
        for typed, (source, sha256) in inherited.items():
            plugin = _load(typed, source)
            if plugin.sha256 != sha256:
                raise PluginError(
                    f"plugins=[{typed}]: {plugin.root} has changed since the command was typed; type it again"
                )
    except PluginError as error:
        _refusal.append(error)


def _load(typed: str, source: str) -> Plugin:
    """Import a plugin, unless it is loaded already, and return it."""
    name, module, root = _find(source)
    plugin = Plugin(name, typed, str(root) if _is_path(source) else source, root, content_hash(root))
    known = _loaded.get(name)
    if known is not None and known.root != root:
        raise PluginError(f"plugins=[{typed}]: {known.root} has the same name; rename one of them")
    if known is not None and known.sha256 != plugin.sha256:
        raise PluginError(f"plugins=[{typed}]: {root} has changed since it was imported; start Python again")
    if known is None:
        if not {"site-packages", "dist-packages"} & {*root.parts}:
            _make_importable(root.parent)
        _import(typed, module, root)
        _loaded[name] = plugin
    return _loaded[name]


def load_typed(arguments: Sequence[str], may_import: bool = True) -> tuple[bool, list[str]]:
    """Load the plugins that a command line names; return whether one is new, and the other words.

    may_import: False in a process that a run or a sweep started, whose command line holds what configs say: there a
    plugin must be among those that it inherited. Raises PluginError.
    """
    check()
    names, others = take(arguments)
    known = {plugin.typed for plugin in loaded()}
    if not may_import and (unknown := [name for name in names if name not in known]):
        raise PluginError(
            f"plugins=[{unknown[0]}]: not a plugin of the command that started this process; type it there"
        )
    return load(name for name in names if name not in known), others


def content_hash(root: Path) -> str:
    """Return the SHA-256 of a file, or of the .py and .yaml files of a package's folder with their names."""
    inside = (
        [root] if root.is_file() else [path for path in root.rglob("*") if path.suffix in HASHED and path.is_file()]
    )
    digest = hashlib.sha256()
    for path in sorted(inside):
        name = path.relative_to(root.parent).as_posix()
        if not any(part.startswith(".") for part in Path(name).parts):
            content = path.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def as_record() -> dict[str, Any]:
    """Return the entry `plugins` of a record: how each was typed, where it lies, and its hash. {} without plugins."""
    found = {p.name: {"typed": p.typed, "path": str(p.root), "sha256": p.sha256} for p in loaded()}
    return {"plugins": found} if found else {}


def word_of(record: Mapping[str, Any]) -> str:
    """Return the word `plugins=[...]` of the command that made a record."""
    return f"plugins=[{','.join(each['typed'] for each in record.get('plugins', {}).values())}]"


def change(key: str, was: Any, now: Any, record: Mapping[str, Any]) -> str:
    """Return as text that the config's `key` is not as it was when a record was made; of a plugin without its hash."""
    group, _, name = key.partition(".")
    if group != "plugins":
        return f"{key}: was {was!r}, now {now!r}"
    if now is None:
        return f"it was started with {word_of(record)}, which is not typed now"
    return f"plugin {name} {'was not typed then' if was is None else 'has changed since'}"


def _is_path(typed: str) -> bool:
    return "/" in typed or os.sep in typed or typed.endswith(".py")


def _find(typed: str) -> tuple[str, str, Path]:
    """Return the top-level name, the module to import, and the file or folder of a plugin; import nothing of it."""
    if _is_path(typed):
        root = Path(os.path.abspath(Path(typed).expanduser()))
        is_package = (root / "__init__.py").is_file()
        if not is_package and not (root.is_file() and root.suffix == ".py"):
            raise PluginError(f"plugins=[{typed}]: no .py file and no folder with an __init__.py; type the path of one")
        name = root.name if is_package else root.stem
        if not name.isidentifier():
            raise PluginError(f"plugins=[{typed}]: {name} is no name of a Python module; rename it, with letters and _")
        return name, name, root
    module = (installed().get(typed) or typed).partition(":")[0]
    name = module.partition(".")[0]
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        names = ", ".join(sorted(installed())) or "none"
        raise PluginError(
            f"plugins=[{typed}]: Python finds no such module from here; type the path of one, such as ./{typed}.py, or an"
            f" installed plugin ({names})"
        )
    origin = Path(spec.origin)
    return name, module, origin.parent if origin.name == "__init__.py" else origin


def _make_importable(folder: Path) -> None:
    """Let this process and those that it starts import from a folder, after all other places."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    searched = os.environ.get("PYTHONPATH", "")
    if str(folder) not in searched.split(os.pathsep):
        os.environ["PYTHONPATH"] = f"{searched}{os.pathsep}{folder}" if searched else str(folder)


def _import(typed: str, module: str, root: Path) -> None:
    """Import a plugin's module. Raise PluginError, with file and line, if that fails or gives another file's module."""
    try:
        found = sys.modules.get(module) or import_module(module)
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"plugins=[{typed}]: {_place(error, root)}{type(error).__name__}: {first_line(error)}"
        ) from None
    top = sys.modules[module.partition(".")[0]]
    file = Path(os.path.abspath(str(getattr(top, "__file__", None) or found)))
    if file not in (root, root / "__init__.py"):
        raise PluginError(f"plugins=[{typed}]: Python imports {file} by this name; rename {root.name}")


def _place(error: BaseException, root: Path) -> str:
    """Return where a plugin's import failed, `file:line: `: the last line of its own that ran."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{os.path.relpath(error.filename)}:{error.lineno}: "
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(root)]
    return f"{os.path.relpath(own[-1].filename)}:{own[-1].lineno}: " if own else ""
