"""The command `python -m dpo_lab.new NAME`: write a small project with a loss, a task, a study and a test of your own."""

from __future__ import annotations

import argparse
import keyword
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

TEMPLATES = Path(__file__).parent / "new_project"
SUFFIX = ".template"
PLACEHOLDER = "my_lab"  # the project's name in paths and text of the templates


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 written; 2 refused, see the message."""
    parser = argparse.ArgumentParser("python -m dpo_lab.new", description=__doc__)
    parser.add_argument("name", help="the name of the project, its folder and its Python package, e.g. my_lab")
    name = parser.parse_args(arguments).name
    if refusal := _refusal(name):
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    for path in write(name, Path()):
        print(path)
    print(f"Next: cd {name}")
    print("Next: python -m pytest")
    print(f"Next: python -m dpo_lab.train plugins={name} loss={name}_hinge")
    return 0


def write(name: str, parent: Path) -> list[Path]:
    """Write the files of a new project to parent/name and return their paths. Raise FileExistsError if it exists."""
    (parent / name).mkdir()
    written = []
    for template in sorted(TEMPLATES.rglob(f"*{SUFFIX}")):
        relative = template.relative_to(TEMPLATES).as_posix().removesuffix(SUFFIX)
        path = parent / name / relative.replace(PLACEHOLDER, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(template.read_text().replace(PLACEHOLDER, name))
        written.append(path)
    return written


def _refusal(name: str) -> str | None:
    """Return why a project can't have this name here; None if it can."""
    if not (name.isidentifier() and name.islower()) or keyword.iskeyword(name):
        return f"{name}: must be the name of a Python package, of small letters, digits and _; type e.g. my_lab"
    if Path(name).exists():
        return f"{name}: exists already and is not overwritten; type another name"
    if find_spec(name) is not None:
        return f"{name}: Python finds another module of this name; type another name"
    return None


if __name__ == "__main__":
    sys.exit(main())
