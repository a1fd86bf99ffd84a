"""The matrix is whole: every row of docs/faults.md has its tests, every test its row, every message is one of the code."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "tests" / "faults"
ROWS = 46


@cache
def matrix() -> dict[int, dict[str, str]]:
    """The table's rows by number."""
    found = {}
    for line in (REPOSITORY / "docs" / "faults.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[0].isdigit():
            assert int(cells[0]) not in found, f"row {cells[0]} stands twice"
            found[int(cells[0])] = dict(zip(("fault", "happens", "tests", "said"), cells[1:], strict=True))
    return found


def numbered(path: Path) -> set[int]:
    """The rows that a file's tests are of."""
    names = (node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
    return {int(name[5:7]) for name in names if re.match(r"test_\d\d_", name)}


@cache
def printed() -> list[str]:
    """Every text in the package's code, with `…` for what it is filled in with."""
    texts = []
    for path in (REPOSITORY / "dpo_lab").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                texts.append("".join(parts))
    return [text.replace("%s", "…") for text in texts]


def is_printed(message: str) -> bool:
    """Whether the code prints each part of it between two `…`, in order where one text has several."""
    parts = [part for part in re.split("…", message) if part.strip(" ;:,.()'")]
    return all(any(part in text for text in printed()) for part in parts)


def test_the_matrix_has_its_rows_and_each_says_what_happens():
    rows = matrix()
    assert sorted(rows) == list(range(1, ROWS + 1))
    assert all(row["fault"] and row["happens"] for row in rows.values())


def test_every_row_has_a_test_and_every_test_a_row():
    promised = {(name, number) for number, row in matrix().items() for name in row["tests"].split(", ")}
    written = {(path.name, number) for path in FOLDER.glob("test_*.py") for number in numbered(path)}
    assert sorted(promised - written) == [], "rows without a test"
    assert sorted(written - promised) == [], "tests without a row"
    assert {number for _, number in written} == set(range(1, ROWS + 1))


def test_every_message_is_one_of_the_code_s():
    messages = [(number, said) for number, row in matrix().items() for said in re.findall(r"`([^`]+)`", row["said"])]
    assert len(messages) > 30
    assert [(number, said) for number, said in messages if not is_printed(said)] == []
    assert not is_printed("…: this is a message that nobody prints")


def test_sixty_canaries_and_more_stand_ready():
    """Each in a test that fails once its mark is there."""
    from tests.faults import test_hostile

    counted = len(test_hostile.TARGETS) + len(test_hostile.INJECTED) + len(test_hostile.TAGS) + len(test_hostile.NAMES)
    assert counted >= 60


def test_the_floors_of_security_md_are_those_that_are_installed():
    floors = re.findall(r"^\| (\w[\w-]*) \| ([\d.]+) \|", (REPOSITORY / "SECURITY.md").read_text(), re.M)
    wanted = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    assert len(floors) >= 7
    assert [f"{package}>={floor}" for package, floor in floors if f"{package}>={floor}" not in wanted] == []
