"""The shapes that core and models state are checked in tests: a wrong one is an error where it enters."""

from __future__ import annotations

import ast

import jaxtyping
import numpy as np
import pytest
import torch

from dpo_lab.core.logps import sequence_logps, sum_responses
from dpo_lab.core.losses import DPO
from dpo_lab.core.pairs import PairLogps
from tests.conftest import REPOSITORY
from tests.support.shapes import MODULES, SHAPE

ONES, TWO = torch.ones(3), torch.ones(2)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: sequence_logps(torch.zeros(2, 4, 9), torch.zeros(2, 3, dtype=torch.long)),
        lambda: sequence_logps(torch.zeros(2, 4, 9), torch.zeros(2, 4)),
        lambda: sum_responses(torch.zeros(3, 1), np.ones((1, 3), int)),
        lambda: PairLogps(ONES, TWO, ONES, ONES),
        lambda: PairLogps.of(torch.zeros(4, 2), torch.ones(4, 3, dtype=torch.long)),
    ],
)
def test_a_wrong_shape_is_an_error(wrong):
    with pytest.raises(jaxtyping.TypeCheckError):
        wrong()


def test_right_shapes_pass():
    logps = PairLogps(ONES, ONES, ONES, ONES)
    assert DPO()(logps, logps).shape == (3,)


def test_every_module_that_states_shapes_is_checked():
    """By its text: a module whose functions state shapes stands in MODULES."""
    stating = set()
    for folder in ("core", "models"):
        for path in (REPOSITORY / "dpo_lab" / folder).rglob("*.py"):
            hints = [
                ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Subscript)
            ]
            if any(SHAPE.search(hint) for hint in hints):
                stating.add(".".join(path.relative_to(REPOSITORY / "dpo_lab").with_suffix("").parts))
    assert stating == set(MODULES)
