"""The evaluation harness over local items: its own figures, paired intervals, tasks that do not exist."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from dpo_lab.evals.evaluate import Evals, evaluate
from dpo_lab.evals.evaluators.base import labels_of
from dpo_lab.evals.evaluators.harness import Harness, HarnessError
from dpo_lab.stats.estimates import mean
from tests.evals.test_evals import perturbed, subject_of

TASK = """
task: local_items
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
"""
needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval, the extra [harness]")


@pytest.fixture
def tasks(tmp_path):
    """A folder with a task of 50 items of two choices."""
    words = ["superb", "awful", "odd", "dull", "fine"]
    rows = [
        {"question": f"{i} The plot was", "choices": [words[i % 5], words[(i + 1 + i // 5 % 4) % 5]], "answer": i % 2}
        for i in range(50)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local_items.yaml").write_text(TASK.format(items=tmp_path / "items.jsonl"))
    return tmp_path


@pytest.mark.slow
@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_figures_are_the_harness_own_and_changes_are_paired(policy, tasks, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    subject = subject_of(perturbed(policy, 0.2), policy, ["p"])
    settings = Evals(evaluators=[], harness=Harness(tasks=["local_items"], include_path=str(tasks)))
    (harness,) = settings.selected()
    assert isinstance(harness, Harness)
    harness.check()
    metrics = evaluate(subject, [harness])
    for policy_of, name in ((subject.trained, "harness/"), (subject.initial, "initial/harness/")):
        _, figures = harness._results(policy_of, harness._manager())
        for metric in ("acc", "acc_norm"):
            assert metrics[f"{name}local_items/{metric}"].value == pytest.approx(figures["local_items", metric])
            assert metrics[f"{name}local_items/{metric}"].n == 50
    rows = [row for row in subject.examples.rows() if row["kind"] == "harness"]
    assert len(rows) == 50
    change = metrics["harness/local_items/acc_change"]
    assert change == mean(row["acc"] - row["initial_acc"] for row in rows)
    assert change.interval is not None  # the two policies differ on some items
    assert labels_of(metrics) == {
        "harness/local_items/acc": "local_items: acc",
        "harness/local_items/acc_change": "  change",
        "harness/local_items/acc_norm": "local_items: acc_norm",
        "harness/local_items/acc_norm_change": "  change",
    }


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_a_task_that_does_not_exist_is_refused_in_one_line(tasks):
    with pytest.raises(
        HarnessError, match=r"no task is called 'local_item'; type evals\.harness\.tasks=\[local_items\]"
    ):
        Harness(tasks=["local_item"], include_path=str(tasks)).check()


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_data_that_cannot_be_read_are_an_error_in_one_line(policy, tasks):
    (tasks / "items.jsonl").unlink()
    harness = Harness(tasks=["local_items"], include_path=str(tasks))
    with pytest.raises(HarnessError, match=r"evals\.harness\.tasks=\['local_items'\]: .*leave the task out") as error:
        evaluate(subject_of(policy, policy, ["p"]), [harness])
    assert "\n" not in str(error.value)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("dpo_lab.evals.evaluators.harness.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"evals\.harness\.tasks: needs lm-eval; type pip install 'dpo_lab\[harness\]'"
    ):
        Harness(tasks=["arc_easy"])
    assert Harness().tasks == []


def test_items_with_a_value_of_one_policy_are_left_out_of_the_pairs_and_counted(policy, monkeypatch):
    values = {"trained": {"a": 1.0, "b": 0.0, "c": 1.0}, "initial": {"a": 0.0, "b": 0.0, "d": 1.0}}
    found = iter([({("t", "m"): values["trained"]}, {}), ({("t", "m"): values["initial"], ("t", "n"): {"a": 2.0}}, {})])
    monkeypatch.setattr(Harness, "_manager", lambda self: None)
    monkeypatch.setattr(Harness, "_results", lambda self, policy, manager: next(found))
    harness, subject = Harness(), subject_of(policy, policy, ["p"])
    harness.tasks = ["t"]
    metrics = evaluate(subject, [harness])
    assert metrics["harness/t/m_change"] == mean([1.0, 0.0])
    assert (metrics["harness/t/m"].n, metrics["initial/harness/t/m"].n) == (3, 3)
    assert metrics["harness/t/m_left_out"].value == 2
    assert (metrics["initial/harness/t/n"].value, metrics["harness/t/n_left_out"].value) == (2, 1)
    assert "harness/t/n_change" not in metrics
    rows = {row["key"]: row for row in subject.examples.rows() if row["kind"] == "harness"}
    assert (rows["t/c"]["m"], rows["t/c"]["initial_m"], rows["t/d"]["m"]) == (1.0, None, None)
    assert labels_of(metrics)["harness/t/m_left_out"] == "  items left out"
