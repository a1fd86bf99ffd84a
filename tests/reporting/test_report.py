"""The report over runs, sweeps and studies: what it says is what the runs measured, and nothing in them acts."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dpo_lab import report
from dpo_lab.reporting.comparison_page import page
from dpo_lab.reporting.figures import comparison_figures
from dpo_lab.reporting.figures.charts import Panel, Point, Series, chart
from dpo_lab.reporting.formatting import format_short, format_value, signed, strip_control
from dpo_lab.runs import metrics_log
from dpo_lab.stats.estimates import mean
from dpo_lab.studies import archive, verdicts
from dpo_lab.studies.load import gather
from dpo_lab.studies.scales import mean_over_seeds
from dpo_lab.studies.spec import Arm
from tests.conftest import REPOSITORY
from tests.support.study_runs import HOSTILE, study, write_run, write_study

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "outputs"
    write_study(folder)
    return folder


@pytest.fixture(scope="module")
def folder(outputs) -> Path:
    """The study's."""
    return outputs / "studies" / "uniform_ref" / "full"


@pytest.fixture
def again(outputs, tmp_path) -> Path:
    """A study folder of one's own."""
    shutil.copytree(outputs, tmp_path / "outputs")
    return tmp_path / "outputs" / "studies" / "uniform_ref" / "full"


class Parsed(HTMLParser):
    """A page's tags with their attributes, its text apart from script and style, and the data of its charts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.charts: list[dict] = []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = "data" if tag == "script" and ("type", "application/json") in attrs else tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "data":
            self.charts.append(json.loads(data))
        elif self._inside not in ("script", "style"):
            self.text += data


def said(capsys, *arguments: object, code: int = 0) -> str:
    assert report.main([str(each) for each in arguments]) == code
    out, err = capsys.readouterr()
    return out if code == 0 else err


def test_the_page_answers_first_and_has_everything(folder):
    parsed = Parsed(page(gather([folder]), folder))
    headings = [
        "supported", "Verdict", "the uniform reference costs more KL", "Reward against KL", "Notes after the runs",
        "Figures of the study", "Arms", "Learning curves", "Samples", "Data", "Label noise", "Health", "Runs without a result",
        "Command and provenance",
    ]  # fmt: skip
    places = [parsed.text.index(heading) for heading in headings]
    assert places == sorted(places)
    for needle in (
        "34 of 40 runs done",
        "registered",
        "2026-11-20T08:00:00+00:00",
        "1 of 5 seeds not finished",
        "optimum: tilted samples of the initial policy",
        "best of 4",
        "NotFinite: the loss is nan at step 3",
        "symmetric, rate 0.2",
        "1,612 of 8,000",
        "20.1 %",
        "3 of 5",
        "python -m dpo_lab.study ablations/uniform_ref.yaml",
        "python -m dpo_lab.train beta=0.1 +ablation=uniform_ref seed=3 'name='\"'\"'a b'\"'\"''",
        "2.13.0+cpu (31 runs); 2.12.0+cpu (8 runs)",
        "with uncommitted changes",
        "not started",
    ):
        assert needle in parsed.text, needle
    panels = [len(each["panels"]) for each in parsed.charts if each["panels"][0].get("title")]
    assert panels == [1, 3, 1, 1, 3]  # the frontier; along beta, by arm, margins; learning curves


def test_figures_of_the_page_are_those_of_the_runs(folder):
    (collection,) = gather([folder])
    text = Parsed(page([collection], folder)).text
    values = list(collection.values("uniform, beta 0.1", "kl").values())
    assert format_value(mean_over_seeds("kl", values).value) in text
    (first, *_) = verdicts.decide(collection)
    effect = first[1].effect
    assert effect is not None
    factors = [format_value(math.exp(log)) for log in (effect.value, *effect.interval)]
    assert "effectx {} ({} .. {})".format(*factors) in text
    assert first[1].detectable is not None
    assert f"detectablex {format_value(math.exp(first[1].detectable))}" in text


def test_nothing_in_a_page_can_act(folder):
    whole = page(gather([folder]), folder)
    parsed = Parsed(whole)
    scripts = [attributes for tag, attributes in parsed.tags if tag == "script"]
    assert [each for each in scripts if each != {"type": "application/json"}] == [
        {}
    ] * 4  # d3, Plot, charts.js, tables.js
    assert {tag for tag, _ in parsed.tags} & {"img", "link", "iframe", "object", "embed", "form", "base", "i"} == set()
    for _, attributes in parsed.tags:
        assert {n for n in attributes if n.startswith("on") or n in ("src", "action", "srcset", "style")} == set()
        assert all(str(attributes[n]).startswith("#") for n in ("href", "xlink:href") if n in attributes)
    (policy,) = [a["content"] for _, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert re.fullmatch(
        r"default-src 'none'; img-src data:; style-src( 'sha256-[\w+/=]+'){2}; script-src( 'sha256-[\w+/=]+'){4};"
        r" base-uri 'none'; form-action 'none'",
        str(policy),
    )
    for text in HOSTILE:
        assert strip_control(text) in parsed.text
    assert re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", whole) is None


def test_a_hostile_name_in_the_data_of_a_chart_ends_no_script(again):
    record = again / "study.json"
    record.write_text(record.read_text().replace("<b>crash</b>", json.dumps(HOSTILE[2])[1:-1]))
    parsed = Parsed(page(gather([again]), again))
    (by_arm,) = [panel for each in parsed.charts for panel in each["panels"] if panel.get("title") == "true_accuracy"]
    assert by_arm["rows"][-1] == strip_control(HOSTILE[2])
    assert not any("onload" in attributes for _, attributes in parsed.tags)


def test_the_same_runs_give_the_same_bytes_wherever_one_stands(folder, monkeypatch, tmp_path):
    first = page(gather([folder]), folder)
    monkeypatch.chdir(folder)
    assert page(gather([Path(".")]), Path(".")) == first
    monkeypatch.chdir(tmp_path)
    code = f"import sys; from dpo_lab.report import main; sys.exit(main([{str(folder)!r}, '--page', 'twice.html']))"
    variables = {"PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "PATH": "/usr/bin"}
    made = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (collection,) = gather([folder])
    assert (tmp_path / "twice.html").read_text() == page([collection], tmp_path)


def test_a_report_needs_neither_torch_nor_hydra(folder, tmp_path):
    code = (
        "import sys; from dpo_lab.report import main;"
        f" main([{str(folder)!r}, '--page', {str(tmp_path / 'page.html')!r}]); print(*sys.modules, file=sys.stderr)"
    )
    made = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert (
        set(made.stderr.split()) & {"torch", "lightning", "transformers", "hydra", "omegaconf", "matplotlib"} == set()
    )
    assert "page.html" in made.stdout


def test_two_hundred_runs_take_seconds(tmp_path):
    for number in range(40):
        beta = round(0.01 * 1.2**number, 5)
        for seed in range(5):
            write_run(
                tmp_path / f"beta={beta}" / f"seed={seed}", Arm("", [f"beta={beta}"], "", {"beta": beta}), seed, 40
            )
    started = time.process_time()
    whole = page(gather([tmp_path]), tmp_path)
    assert time.process_time() - started < 10
    assert "200 of 200 runs done" in whole
    assert all(
        "ticks" not in panel for each in Parsed(whole).charts for panel in each["panels"]
    )  # 40 betas: no 40 ticks
    assert len(whole.encode()) < 3e6


def test_the_terminal_says_verdicts_arms_and_what_is_missing(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = said(capsys, folder, "--page", folder / "page.html")
    assert text.splitlines()[1] == "supported"
    (collection,) = gather([folder])
    drift = mean_over_seeds("kl", list(collection.values("uniform, beta 0.1", "kl").values()))
    assert drift.interval is not None
    low, high = map(format_value, drift.interval)
    assert f"{format_value(drift.value)} ({low} .. {high})" in text
    estimate = mean(collection.values("uniform, beta 0.1", "gold_gain").values())
    assert estimate.interval is not None
    assert f"{format_value(estimate.value)} ±{format_value((estimate.interval[1] - estimate.interval[0]) / 2)}" in text
    assert "baseline: dpo, beta 0.1" in text
    assert "noisy labels, seed 4: not started" in text
    assert "<b>crash</b>, seed 0: failed, NotFinite" in text
    assert "\x1b" not in text
    assert f"Page: {folder / 'page.html'}" in text


def test_csv_has_every_digit(folder, capsys):
    text = said(capsys, folder, "--csv", "--metrics", "kl, gold_gain, gold_gain / kl")
    rows = {(row["arm"], row["metric"]): row for row in csv.DictReader(io.StringIO(text))}
    (collection,) = gather([folder])
    base = collection.values("dpo, beta 0.1", "gold_gain")
    noisy = collection.values("noisy labels", "gold_gain")
    row = rows["noisy labels", "gold_gain"]
    assert float(row["value"]) == mean(noisy.values()).value
    assert (row["n"], row["runs"], row["scale"]) == ("4", "5", "plain")
    apart = mean(noisy[seed] - base[seed] for seed in noisy)
    assert apart.interval is not None
    assert float(row["difference_value"]) == pytest.approx(apart.value, rel=1e-12)
    assert [float(row[f"difference_{end}"]) for end in ("low", "high")] == pytest.approx(apart.interval, rel=1e-12)
    base, noisy = (collection.values(arm, "kl") for arm in ("dpo, beta 0.1", "noisy labels"))
    row = rows["noisy labels", "kl"]
    factor = math.exp(mean(math.log(noisy[seed] / base[seed]) for seed in noisy).value)
    assert float(row["difference_value"]) == pytest.approx(factor, rel=1e-12)
    assert row["scale"] == "log"
    assert rows["<b>crash</b>", "kl"]["value"] == ""
    ratio = rows["dpo, beta 1.0", "gold_gain / kl"]
    gains = collection.values("dpo, beta 1.0", "gold_gain")
    kls = collection.values("dpo, beta 1.0", "kl")
    assert float(ratio["value"]) == pytest.approx(mean(gains[s] / kls[s] for s in gains).value)


def test_markdown_obeys_no_text(folder, capsys):
    text = said(capsys, folder, "--markdown")
    assert "**supported**" in text
    assert "<script>" not in text
    assert "&lt;b&gt;crash&lt;/b&gt;" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns == {6, 8, 5}  # arms, verdicts, cells: nothing in a cell parts it


def test_another_baseline_and_runs_of_no_study(outputs, capsys):
    runs = outputs / "studies" / "runs" / "full"
    text = said(capsys, runs, "--csv", "--baseline", "beta=1.0", "--metrics", "kl")
    rows = {row["arm"]: row for row in csv.DictReader(io.StringIO(text))}
    assert rows["beta=1.0"]["difference_value"] == ""
    assert float(rows["beta=0.1"]["difference_value"]) > 0
    assert "verdict" not in said(capsys, runs, "--page", runs / "report.html").lower()
    whole = (runs / "report.html").read_text()
    assert 'class="answers"' not in whole
    assert Parsed(whole).text.count("gold_gain") >= 2  # along beta, and in the arms' table


def test_runs_older_than_the_prediction_are_exploratory(again, capsys):
    record = json.loads((again / "study.json").read_text())
    record["registrations"] = [
        {"digest": "an earlier one", "at": "2026-11-20T08:00:00+00:00"},
        {"digest": study().digest(), "at": "2026-11-21T08:00:00+00:00"},
    ]
    (again / "study.json").write_text(json.dumps(record))
    assert "supported, exploratory" in said(capsys, again)
    text = Parsed((again / "report.html").read_text()).text
    assert text.index("exploratory") < text.index("Verdict")
    assert "1 other version registered before" in text
    assert "*exploratory*" in said(capsys, again, "--markdown")


def test_arms_that_were_not_measured_alike_are_named_first(again, capsys):
    for length, run in zip((48, 7), [run for run in gather([again])[0].runs if run.is_done][::20], strict=False):
        record = {**run.record, "config": {**run.record["config"], "evals": {"max_new_tokens": length}}}
        (run.folder / "run.json").write_text(json.dumps(record))
    assert "measured with different settings, not comparable: evals.max_new_tokens is" in said(capsys, again)
    text = Parsed((again / "report.html").read_text()).text
    assert text.index("measured with different settings") < text.index("Verdict")
    assert "**Measured with different settings:**" in said(capsys, again, "--markdown")


def test_a_kept_record_is_reported_on_as_well(folder, tmp_path, capsys):
    said(capsys, folder, "--archive", tmp_path / "records")
    (record,) = (tmp_path / "records").iterdir()
    text = said(capsys, record, "--page", tmp_path / "kept.html")
    assert text.splitlines()[1] == "supported"
    parsed = Parsed((tmp_path / "kept.html").read_text())
    assert "These runs have no samples." in parsed.text
    assert "optimum: tilted samples of the initial policy" in parsed.text
    whole, slim = gather([folder])[0], archive.read(record)
    assert slim.values("noisy labels", "kl") == pytest.approx(whole.values("noisy labels", "kl"), rel=1e-5)


def test_results_are_written_and_checked(folder, tmp_path, capsys):
    said(capsys, folder, "--archive", tmp_path / "records")
    results = tmp_path / "RESULTS.md"
    said(capsys, "--results", results)
    front = Parsed((tmp_path / "pages/index.html").read_text())
    (link,) = [of["href"] for tag, of in front.tags if tag == "a"]
    assert (tmp_path / "pages" / str(link)).is_file()
    assert "agrees with the records" in said(capsys, "--results", results, "--check")
    text = results.read_text()
    figure = re.search(r"\d\.\d\d", text)
    assert figure is not None
    results.write_text(text.replace(figure[0], "9.99", 1))
    assert "9.99" in said(capsys, "--results", results, "--check", code=1)


def test_the_front_page_has_a_line_for_every_claim_and_links_each_study(folder, tmp_path, capsys):
    said(capsys, folder)
    front = tmp_path / "front" / "index.html"
    assert f"Front page: {front}" in said(capsys, folder, folder.parent.parent, "--front", front)
    parsed = Parsed(front.read_text())
    assert "Results of 1 study" in parsed.text
    assert "2 claims: 2 supported." in parsed.text
    assert parsed.text.index("the uniform reference costs more KL") < parsed.text.index("a larger beta keeps KL lower")
    assert "2 secondary predictions on its page" in parsed.text
    assert "label noise costs accuracy" not in parsed.text
    (link,) = [of["href"] for tag, of in parsed.tags if tag == "a"]
    assert (front.parent / str(link)).resolve() == (folder / "report.html").resolve()
    lines = [of for tag, of in parsed.tags if tag == "line" and of["class"] == "span"]
    assert len(lines) == 2
    assert all(160 < float(str(of["x1"])) < float(str(of["x2"])) < 310 for of in lines)  # as predicted, on the right
    assert not any(tag == "script" for tag, _ in parsed.tags)
    assert "no study in" in said(capsys, folder.parent.parent.parent / "studies/runs", "--front", code=2)
    front.write_text("<p>mine</p>")
    assert "type another" in said(capsys, folder, "--front", front, code=2)
    assert front.read_text() == "<p>mine</p>"


def test_a_file_of_others_is_never_overwritten(again, capsys):
    mine = again / "report.html"
    mine.write_text("<p>mine, of python -m dpo_lab.report</p>")
    assert "type another --page FILE" in said(capsys, again, code=2)
    assert mine.read_text() == "<p>mine, of python -m dpo_lab.report</p>"
    mine.unlink()
    said(capsys, again)
    first = mine.read_bytes()
    said(capsys, again)  # over its own
    assert mine.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere"),
        ([], "type the folder of a run"),
        (["--check"], "--results"),
        (["{folder}", "--baseline", "dpo"], "type one of: dpo, beta 0.1"),
        (["{folder}", "--metrics", "kl,klo"], "--metrics klo: no run has it; type some of: accuracy"),
        (["{folder}", "--page", "{folder}/study.json/x.html"], "type another --page FILE"),
    ],
)
def test_what_can_be_mended_is_one_line(folder, capsys, arguments, words):
    error = said(capsys, *(each.format(folder=folder) for each in arguments), code=2)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


def test_a_damaged_journal_and_an_unreadable_record_do_not_stop_a_report(again):
    runs = again.parents[1] / "runs" / "full"
    (runs / "dpo--beta-0-1" / "seed=0" / metrics_log.METRICS_LOG).write_text("{\n")
    (runs / "dpo--beta-0-1" / "seed=1" / "run.json").write_text("{")
    for examples in runs.glob("*/seed=0/examples.jsonl"):
        examples.write_text('{"kind": "prompt", ')
    text = Parsed(page(gather([again]), again)).text
    assert "A metrics log can't be read" in text
    assert "unreadable" in text
    assert "examples.jsonl:1: not an example" in text


def test_one_seed_and_nothing_measured_are_told_as_such(tmp_path):
    write_study(tmp_path, seeds=1)
    (collection,) = gather([tmp_path])
    text = Parsed(page([collection], tmp_path)).text
    assert "one seed" in text
    shutil.rmtree(tmp_path / "studies" / "runs")
    text = Parsed(page(gather([tmp_path]), tmp_path)).text
    assert "not measured" in text
    assert "These runs have no metrics log." in text
    assert "0 of 8 runs done" in text


def test_several_studies_are_one_page_with_a_list(folder):
    text = page(gather([folder]) * 2, folder)
    parsed = Parsed(text)
    links = [attributes["href"] for tag, attributes in parsed.tags if tag == "a"]
    assert links == ["#report-1", "#report-2"]
    assert {attributes.get("id") for tag, attributes in parsed.tags if tag == "article"} == {"report-1", "report-2"}


def test_what_was_logged_once_is_a_point_in_the_learning_curves(folder):
    (collection,) = gather([folder])
    column = "val/rewards/accuracies"
    logged = lambda arm: [(seed, [{"step": 80, column: 0.5 + 0.1 * seed}]) for seed in (0, 1)]  # noqa: E731
    found = comparison_figures.learning(collection, logged)
    assert found is not None
    (panel,) = found.panels
    assert [(s.is_line, s.has_markers, len(s.points)) for s in panel.series] == [(False, True, 1)] * len(
        collection.arms
    )


def test_what_is_not_finite_is_a_gap_in_the_data_of_a_chart():
    points = [Point(i, math.nan if i == 5 else 0.1 * i) for i in range(9)]
    found = chart("loss", [Panel("loss", "steps", [Series("one", points)])])
    assert found is not None
    (panel,) = found.data["panels"]
    assert [point["y"] for point in panel["series"][0]["points"]] == [0, 0.1, 0.2, 0.3, 0.4, None, 0.6, 0.7, 0.8]
    assert chart("none", [Panel("none", "x", [Series("one", [Point(0, math.nan)])])]) is None


def test_figures_are_spelled_for_people():
    told = [format_value(v) for v in (0.12345, -0.0001, 0.0, -0.0, 12.345, 1234.5, 528_703_488, 3e-7, 1e30)]
    assert told == ["0.123", "-1.0e-04", "0.000", "0.000", "12.35", "1,234.5", "529M", "3.0e-07", "1e+30"]
    assert [signed(v) for v in (0.5, -0.5, 0.0)] == ["+0.500", "-0.500", "+0.000"]
    assert [format_short(v) for v in (0.1, 1.0, 2500.0, 25000.0)] == ["0.1", "1", "2500", "25k"]


def test_a_figure_may_have_a_metric_across(again):
    record = json.loads((again / "study.json").read_text())
    record["study"]["figures"] = [{"kind": "axis", "x": "gold_gain", "y": ["kl"], "arms": ["dpo", "uniform"]}]
    (again / "study.json").write_text(json.dumps(record))
    parsed = Parsed(page(gather([again]), again))
    assert "small points: single seeds. Labels: beta." in parsed.text
    (collection,) = gather([again])
    gain, kl = (
        mean_over_seeds(metric, list(collection.values("uniform, beta 0.3", metric).values()))
        for metric in ("gold_gain", "kl")
    )
    assert gain.interval is not None
    assert f"uniform, beta 0.3: kl {format_value(kl.value)}" in parsed.text
    assert f"gold_gain {format_value(gain.value)} ({format_value(gain.interval[0])}" in parsed.text
