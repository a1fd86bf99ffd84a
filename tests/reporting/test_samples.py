"""Samples of the arms side by side: a third policy beside the initial one, each text once."""

from __future__ import annotations

import json

from dpo_lab.reporting.samples import side_by_side
from dpo_lab.studies.run_data import RunData, RunSet
from dpo_lab.studies.spec import Arm


def test_a_third_policy_stands_beside_the_others_once(tmp_path):
    runs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        sample = {"prompt": "p", "initial": "i", "trained": f"of {name}", "third": "t"}
        row = {"kind": "prompt", "key": "k", "prompt": "p", "response": f"of {name}", "initial_response": "i"}
        scores = {"gold": 1.0, "initial_gold": 0.5, "third/gold": 0.25, "third_response": "t"}
        (tmp_path / name / "examples.jsonl").write_text(json.dumps(row | scores))
        runs.append(RunData(tmp_path / name, name, 0, "done", record={"samples": [sample]}))
    found = side_by_side(RunSet("runs", tmp_path, [Arm("a", []), Arm("b", [])], [0], runs))
    assert found is not None
    (prompt,) = found[1]
    shown = [(response.by, response.text, response.worth) for response in prompt.responses]
    assert [(by, text) for by, text, _ in shown] == [
        ("initial policy", "i"),
        ("third policy", "t"),
        ("a", "of a"),
        ("b", "of b"),
    ]
    assert [float(worth.removeprefix("gold ")) for *_, worth in shown] == [0.5, 0.25, 1.0, 1.0]
