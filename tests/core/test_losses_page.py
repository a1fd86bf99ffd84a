"""docs/losses.md names losses once, with the reference that they take and among those of their kind."""

from __future__ import annotations

import re

from dpo_lab.core.losses import LOSSES
from tests.conftest import REPOSITORY
from tests.support.losses import STEP_LEVEL

REFERENCE = {None: "any", True: "policy", False: "none"}


def test_every_loss_has_its_row():
    sections = (REPOSITORY / "docs" / "losses.md").read_text().split("\n## ")
    rows = {}
    for section in sections:
        heading = section.splitlines()[0]
        for name, rest in re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.M):
            assert name not in rows
            rows[name] = (heading, rest.split(" | ")[1])
    assert len(rows) >= 28  # a loss of somebody's own needs none
    assert {name: reference for name, (_, reference) in rows.items()} == {
        name: REFERENCE[LOSSES[name].requires_reference] for name in rows
    }
    together = {name for name, (heading, _) in rows.items() if heading == "All pairs of a step together"}
    assert together == set(STEP_LEVEL) - {"mix"}
    assert "`loss=mix " in sections[-2]
