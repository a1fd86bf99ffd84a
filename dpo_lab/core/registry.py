"""Tables of classes by their names in configs, filled where a class is defined, so that no list needs an entry."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TypeVar

T = TypeVar("T")


def add_to_table(table: dict[str, type[T]], name: str, cls: type[T]) -> None:
    """Add a class under its name; raise TypeError if another class has that name.

    A class that is defined again, as where a notebook's cell runs twice, replaces the one before.
    """
    path = (cls.__module__, cls.__qualname__)
    if name in table and path != (table[name].__module__, table[name].__qualname__):
        raise TypeError(f"{cls.__qualname__}: the name '{name}' is taken by {table[name].__qualname__}; choose another")
    table[name] = cls


def import_modules(package: str) -> None:
    """Import all modules of a package, so that the classes that they define are in their tables."""
    for module in iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")
