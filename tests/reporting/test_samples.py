"""Samples of the arms side by side: a third policy beside the initial one, each text once."""

from __future__ import annotations

import io
import json

from dpo_lab.reporting.run_summary import print_summary
from dpo_lab.reporting.samples import side_by_side
from dpo_lab.stats.estimates import mean
from dpo_lab.studies.run_data import RunData, RunSet
from dpo_lab.studies.spec import Arm
from dpo_lab.terminal.progress import plain_console


def test_a_summary_escapes_control_characters(tmp_path):
    out = io.StringIO()
    sample = dict.fromkeys(("prompt", "initial", "trained"), "\x1b[31mred")
    print_summary(
        plain_console(file=out, width=80), {"kl": mean([1.0])}, {"kl": "\x1b]0;label"}, [sample], tmp_path, []
    )
    assert "\x1b" not in out.getvalue()
    assert out.getvalue().count(r"\x1b[31mred") == 3
    assert r"\x1b]0;label" in out.getvalue()


def test_the_score_beside_a_sample_is_its_own_where_a_prompt_comes_twice(tmp_path):
    samples = [{"prompt": "p", "initial": "i", "trained": text} for text in ("first", "second")]
    own = {"kind": "prompt", "prompt": "p", "initial_response": "i"}
    rows = [own | {"key": sample["trained"], "response": sample["trained"]} for sample in samples]
    lines = [json.dumps(row | {"gold": gold}) for row, gold in zip(rows, (1.0, 2.0), strict=True)]
    (tmp_path / "examples.jsonl").write_text("\n".join(lines))
    run = RunData(tmp_path, "a", 0, "done", record={"samples": samples})
    found = side_by_side(RunSet("runs", tmp_path, [Arm("a", [])], [0], [run]), [])
    assert found is not None
    shown = found[1][0].responses[-1]
    assert (shown.text, float(shown.worth.removeprefix("gold "))) == ("first", 1.0)


def test_a_third_policy_stands_beside_the_others_once(tmp_path):
    runs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        sample = {"prompt": "p", "initial": "i", "trained": f"of {name}", "third": "t"}
        row = {"kind": "prompt", "key": "k", "prompt": "p", "response": f"of {name}", "initial_response": "i"}
        scores = {"gold": 1.0, "initial_gold": 0.5, "third/gold": 0.25, "third_response": "t"}
        (tmp_path / name / "examples.jsonl").write_text(json.dumps(row | scores))
        runs.append(RunData(tmp_path / name, name, 0, "done", record={"samples": [sample]}))
    found = side_by_side(RunSet("runs", tmp_path, [Arm("a", []), Arm("b", [])], [0], runs), [])
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
