"""The command of inspection: real processes on honest and hostile rows; what it says is what a run records."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from dpo_lab.config.inspection import InspectConfig
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.inspection import report, terminal
from dpo_lab.inspection.look import Inspection, inspect_pairs
from dpo_lab.inspection.token_view import visible
from tests.conftest import OWN_MODEL, python_m
from tests.data.test_quality import PLANTED, planted
from tests.support.configs import composed
from tests.support.warm import run_module

pytestmark = pytest.mark.slow

HOSTILE = [
    {
        "prompt": f"<script>alert({i})</script> [bold red]hi[/] [link=https://evil.example]x[/link] \x1b[31mred\x1b[0m",
        "chosen": f'javascript:alert({i}) "><img src=//evil.example/x onerror=alert(1)> <|end|> &amp; $x$',
        "rejected": f"[red]no[/red]\r\n\tmore \x07\x9b31m \u202egnp\u200b {i}",
    }
    for i in range(40)
]
ACTS = re.compile("[\0-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e]")  # what must not reach a terminal; line breaks may


@pytest.fixture(scope="module")
def folder(policy, tmp_path_factory) -> Path:
    """Where a user stands, with a model of their own, hostile rows, and files with planted faults."""
    folder = tmp_path_factory.mktemp("inspect")
    policy.save(folder / "my-model")
    (folder / "hostile.jsonl").write_text("\n".join(map(json.dumps, HOSTILE)))
    planted(folder)
    return folder


OWN = ["policy=pretrained", "policy.path=my-model"]
PLANTED_DATA = ["data.path=train.jsonl", "data.validation_path=held.jsonl"]


def looked(*overrides: str) -> Inspection:
    from dpo_lab.config import schema

    settings = schema.validate(composed(*OWN, *overrides, name="inspect"))
    assert isinstance(settings, InspectConfig)
    return inspect_pairs(settings, Path("outputs/cache"))


def printed(found: Inspection, **settings) -> str:
    console = Console(width=120, file=io.StringIO(), **settings)
    terminal.show(console, found)
    return console.file.getvalue()  # type: ignore[attr-defined]


def inspect(folder: Path, *overrides: str, code: int = 0, **variables: str) -> str:
    result = run_module("dpo_lab.inspect", *OWN, *overrides, cwd=folder, **variables)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout if code == 0 else result.stderr.splitlines()[-1]


def part_lines(output: str, mark: str) -> list[str]:
    return [line[4:] for line in output.splitlines() if line.startswith(f"  {mark} ")]


def test_every_token_is_shown_and_which_is_scored(folder, policy):
    output = inspect(folder, "data.path=hostile.jsonl", "show=1", "noise=none", NO_COLOR="1", FORCE_COLOR="")
    assert ACTS.search(output) is None
    assert "hostile.jsonl:" in output
    row = HOSTILE[int(re.findall(r"hostile\.jsonl:(\d+) ", output)[0]) - 1]
    encoder = PairTokenizer(policy.tokenizer, 512, 256)
    prompt = encoder.prompt(row["prompt"])
    expected = {
        ".": prompt,
        "+": encoder.response(row["chosen"], prompt),
        "-": encoder.response(row["rejected"], prompt),
    }
    for mark, ids in expected.items():
        words = " ".join(part_lines(output, mark)).split(" ")
        assert len(words) == len(ids)
        plain = "".join(words).replace("⟦<|begin|>⟧", "").replace("⟦<|end|>⟧", "")
        assert "‹" in plain or mark != "-"  # the pieces of the change of direction
        for visible_text in re.findall(r"[\w:]{4,}", row[{".": "prompt", "+": "chosen", "-": "rejected"}[mark]]):
            assert visible_text in plain
    assert part_lines(output, "+")[-1].endswith("⟦<|end|>⟧")
    assert "".join(part_lines(output, ".")).count("␣") == HOSTILE[0]["prompt"].count(" ")
    assert "\\x0d ⏎ ⇥" in " ".join(part_lines(output, "-"))


def test_rows_style_nothing_on_a_terminal_and_what_is_scored_is_coloured(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("NO_COLOR", raising=False)
    styled = printed(looked("data.path=hostile.jsonl", "show=1"), force_terminal=True, color_system="truecolor")
    codes = set(re.findall(r"\x1b\[([\d;]*)m", styled))
    green, orange = "38;2;0;158;115", "38;2;213;94;0"
    assert {green, orange, "2"} <= codes
    assert {code for code in codes if code.endswith(("31", "1;31"))} == set()  # neither [red] nor the row's own escape
    assert ACTS.sub("", re.sub(r"\x1b\[[\d;]*m", "", styled)) == re.sub(r"\x1b\[[\d;]*m", "", styled)
    for mark, colour in (("+", green), ("-", orange)):
        lines = [line for line in styled.splitlines() if f"m  {mark} " in line]
        assert lines
        assert all(line.startswith(f"\x1b[{colour}m") for line in lines)


def test_control_characters_are_made_visible():
    assert visible("a b\n\t\x1b[0m\u202e\0 é🙂") == "a␣b⏎⇥\\x1b[0m\\u202e\\x00␣é🙂"
    assert visible("␣⟦‹✂") == "\\u2423\\u27e6\\u2039\\u2702"  # no text passes for a mark of ours
    assert visible("my file:3\x07", blanks=False) == "my file:3\\x07"


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_runs_nothing_loads_nothing_and_shows_all(folder):
    out = inspect(folder, "data.path=hostile.jsonl", "show=3", "page=reports/page.html")
    assert "Written: reports/page.html" in out
    first = (folder / "reports" / "page.html").read_bytes()
    inspect(folder, "data.path=hostile.jsonl", "show=3", "page=reports/page.html")
    assert (folder / "reports" / "page.html").read_bytes() == first
    page = Page(first.decode())
    names = {tag for tag, _ in page.tags}
    assert names & {"script", "img", "link", "iframe", "object", "embed", "a", "form", "base", "b"} == set()
    for _, attributes in page.tags:
        assert {name for name in attributes if name.startswith("on") or name in ("src", "action", "srcset")} == set()
        assert all(str(attributes[name]).startswith("#") for name in ("href", "xlink:href") if name in attributes)
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none'")
    assert "url(http" not in first.decode()
    text = "".join(page.words)
    for needle in ("Pairs, token by token", "held-out rejected", "hostile.jsonl:", "⟦<|end|>⟧"):
        assert needle in text
    assert "evil" not in "".join(str(a) for _, a in page.tags)
    assert ACTS.search(text.replace("\t", "")) is None
    assert sum(attributes.get("class") == "tokens chosen" for _, attributes in page.tags) == 3


def test_the_figure_is_the_same_bytes_and_nothing_of_others_is_overwritten(folder):
    contents = []
    for _ in range(2):
        inspect(folder, *PLANTED_DATA, "show=0", "page=figure.png")
        contents.append((folder / "figure.png").read_bytes())
    content, again = contents
    assert content == again
    assert content.startswith(b"\x89PNG")
    assert len(content) > 20_000
    (folder / "mine.html").write_text("<p>mine: python -m dpo_lab.inspect</p>")
    error = inspect(folder, *PLANTED_DATA, "page=mine.html", code=2)
    assert error.startswith("error: page=mine.html")
    assert "type another page=" in error
    assert (folder / "mine.html").read_text() == "<p>mine: python -m dpo_lab.inspect</p>"
    assert not list(folder.glob(".*.png.*"))


@pytest.mark.parametrize(
    ("overrides", "says", "types"),
    [
        (["page=report.pdf"], "page=report.pdf", "page=report.html"),
        (["show=-1"], "show=-1", "show=3"),
        (["shw=1"], "'shw'", "--help"),
        (["data.path=nowhere.jsonl"], "nowhere.jsonl", "type the path"),
        (["data.path=bad.jsonl"], "bad.jsonl:2", "data.on_bad_row=skip"),
        (["policy.path=nowhere", *PLANTED_DATA], "policy.path=nowhere", "type"),
        (["page=bad.jsonl/x.html", *PLANTED_DATA], "page=bad.jsonl/x.html", "type another page="),
    ],
)
def test_refused_in_one_line(overrides, says, types, folder):
    (folder / "bad.jsonl").write_text(json.dumps(HOSTILE[0]) + "\n{oh")
    error = inspect(folder, *overrides, code=2)
    assert error.startswith("error: ")
    assert says in error
    assert types in error


def test_contradictions_are_told_with_their_places_and_stop_nothing(folder):
    output = inspect(folder, *PLANTED_DATA, "show=0")
    assert len(re.findall(r"Contradiction: train\.jsonl:\d+ and train\.jsonl:\d+", output)) == PLANTED["contradictions"]
    assert "Contradiction: train.jsonl:84 and train.jsonl:85" in output
    assert f"Warning: {PLANTED['contradictions']} contradictions" in output
    for what in ("dropped: duplicate", "dropped: identical sides", "dropped: prompt is held out"):
        assert what in output
    assert not list((folder / "outputs").glob("dpo*"))  # it writes nothing but the cache


def test_what_a_run_cannot_do_with_three_pairs_is_told(folder, monkeypatch):
    monkeypatch.chdir(folder)
    rows = [row | {"prompt": "the same, so that none can be held out"} for row in HOSTILE[:3]]
    Path("three.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = looked("data.path=three.jsonl", "show=0")
    assert {"only 3 training pairs (under 30)", "data.batch_size=32", "no pair is held out of 3"} <= {
        line.partition(":")[0] for line in found.advice
    }
    assert "type data.batch_size=3" in printed(found)


def test_a_file_of_prompts_alone_has_no_responses_to_tell_of(folder, monkeypatch):
    rows = [{"prompt": f"Topic: the movie {i}.\nReview:"} for i in range(40)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(folder)
    shown = printed(looked("data.path=prompts.jsonl"))
    assert ", a prompt alone" in shown
    assert "desirable" not in shown
    assert "train prompt" in shown
    assert "train chosen" not in shown


def test_cuts_and_flips_are_shown(folder, monkeypatch):
    monkeypatch.chdir(folder)
    small = ["data.max_length=24", "data.max_prompt_length=12", "noise.rate=1"]
    found = looked("data.path=hostile.jsonl", "show=1", *small)
    (pair,) = found.pairs
    assert pair.flipped
    assert [(part.cut, part.scored) for part in pair.parts] == [(True, False), (True, True), (True, True)]
    assert [len(part.tokens) for part in pair.parts] == [12, 12, 12]
    output = printed(found)
    assert "chosen and rejected swapped by label noise" in output
    assert output.count("✂") == 1 + 3  # the legend, and each part
    assert part_lines(output, ".")[0].startswith("✂ ⟦<|begin|>⟧")
    assert part_lines(output, "+")[-1].endswith(" ✂")
    assert "Label noise" in output


def test_no_weights_are_loaded_for_pairs_of_ones_own(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("dpo_lab.pipelines.inputs.Pretrained.load", lambda *_: pytest.fail("loads weights"))
    assert looked(*PLANTED_DATA).quality.train.pairs == 84
    with pytest.raises(pytest.fail.Exception, match="loads weights"):
        looked(*PLANTED_DATA, "noise=uncertainty", "noise.gap=reference")


def test_a_run_records_what_inspection_says(folder, monkeypatch):
    monkeypatch.chdir(folder)
    settings = [*PLANTED_DATA, "data.contradictions=drop", "noise.rate=0.2"]
    small = [s for s in OWN_MODEL if not s.startswith(("data.pairs", "data.validation_pairs", "data.task"))]
    result = run_module("dpo_lab.train", *OWN, *settings, *small, "trainer.max_steps=1", "name=same", cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (folder / "outputs" / "same").rglob("run.json")
    record = json.loads(path.read_text())
    found = looked(*settings)
    assert record["data_quality"] == json.loads(json.dumps(found.quality.as_record()))
    assert record["data"] == record["data_quality"]["counts"]
    assert 0 < sum(flipped for _, flipped in record["data_quality"]["noise"]["flipped"].values()) < 80
    for line in found.advice:
        assert line in (path.parent / "run.log").read_text()


def test_the_embedded_task_can_be_inspected(tmp_path):
    small = (
        "policy.hidden_size=64 policy.layers=2 policy.intermediate_size=128 sft.steps=96 sft.optim.lr=1e-2 data.pairs=96"
        " data.validation_pairs=24 data.task.max_new_tokens=40"
    ).split()
    result = run_module("dpo_lab.inspect", *small, "show=1", "page=task.png", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "truth: contradicts the label" in result.stdout
    assert "training pair 1 " in result.stdout
    assert {p.name for p in (tmp_path / "outputs").iterdir()} == {"cache"}


def test_help_says_what_to_type(tmp_path):
    shown = python_m("dpo_lab.inspect", "--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert "page=report.html" in shown.stdout
    assert "show: 3" in shown.stdout


def test_a_report_is_written_whole_or_not_at_all(folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = looked(*PLANTED_DATA, "show=0")
    report.write(found, Path("whole.html"))
    before = Path("whole.html").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(Exception, match="page=whole.html: No space left on device"):
        report.write(found, Path("whole.html"))
    assert Path("whole.html").read_bytes() == before
    assert not list(folder.glob(".whole.html*"))
