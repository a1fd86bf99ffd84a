"""A report in a real browser, at a desk and on a phone: it sorts, filters, loads nothing, runs nothing of others, fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_lab.reporting.comparison_page import page as drawn
from dpo_lab.studies.load import gather
from tests.conftest import REPOSITORY
from tests.support.browser import MISSING, page
from tests.support.study_runs import write_study

pytestmark = [pytest.mark.browser, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

SCREENSHOTS = REPOSITORY / "outputs" / "screenshots"  # to be looked at; none of it is committed


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    folder = write_study(tmp_path_factory.mktemp("page") / "outputs")
    (folder / "report.html").write_text(drawn(gather([folder]), folder))
    return (folder / "report.html").as_uri()


def listened(shown, address: str) -> list[str]:
    """Open the page; gives what went wrong, now and later: messages, errors, dialogs and requests but the page's own."""
    heard: list[str] = []
    shown.on("console", lambda message: heard.append(message.text))
    shown.on("pageerror", lambda error: heard.append(str(error)))
    shown.on("dialog", lambda dialog: (heard.append(dialog.message), dialog.dismiss()))
    shown.on("request", lambda request: heard.append(request.url) if request.url != address else None)
    shown.goto(address)
    return heard


def arms(shown) -> list[str]:
    rows = shown.locator("table.filtered tbody tr:visible")
    return [row.locator("th bdi").first.inner_text() for row in rows.all()]


def test_at_a_desk_it_sorts_filters_and_nothing_of_others_runs(address):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with page(1280, 900, color_scheme="light") as shown:
        heard = listened(shown, address)
        given = arms(shown)
        assert given[0] == "dpo, beta 0.1"
        head = shown.locator("table.filtered thead th").filter(has_text="kl").first
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == "ascending"
        assert arms(shown)[0] == "dpo, beta 1.0"
        assert arms(shown)[-1] == "<b>crash</b>"  # nothing measured: last
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == "descending"
        assert arms(shown)[0] == "uniform, beta 0.1"
        shown.locator("input.filter").fill("uniform 0.3")
        assert arms(shown) == ["uniform, beta 0.3"]
        shown.locator("input.filter").fill("")
        assert len(arms(shown)) == 8
        for chart in shown.locator("svg.chart").all():
            box = chart.bounding_box()
            assert box["width"] > 300
            assert box["height"] > 150
        for sample in shown.locator("details.sample").all():
            if sample.get_attribute("open") is None:
                sample.locator("summary").click()
        assert shown.locator("img, iframe, .said script, .said svg, .said a").count() == 0
        assert shown.title().startswith("What the reference is for")
        shown.screenshot(path=SCREENSHOTS / "report-light.png", full_page=True)
        assert heard == []


def test_text_of_a_figure_is_neither_cut_nor_written_over(address):
    """Every text of a chart lies inside it, and no two touch."""
    inside = """charts => charts.flatMap(chart => {
        const outer = chart.getBoundingClientRect(), texts = [...chart.querySelectorAll("text")];
        const boxes = texts.map(text => [text.textContent, text.getBoundingClientRect()]);
        const cut = boxes.filter(([, b]) =>
            b.left < outer.left - 1 || b.right > outer.right + 1 || b.bottom > outer.bottom + 1);
        const over = boxes.flatMap(([s, a], i) => boxes.slice(0, i).filter(([, b]) =>
            a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2).map(([t]) => [s, t]));
        return [...cut.map(([text]) => text), ...over];
    })"""
    with page(1280, 900) as shown:
        listened(shown, address)
        assert shown.locator("svg.chart").count() > 5
        assert shown.locator("svg.chart").evaluate_all(inside) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_sticks_out(address, scheme):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with page(390, 844, color_scheme=scheme) as shown:
        heard = listened(shown, address)
        assert shown.evaluate("document.documentElement.scrollWidth") <= 390
        shown.screenshot(path=SCREENSHOTS / f"report-phone-{scheme}.png", full_page=True)
        assert heard == []


def test_in_the_dark_all_of_a_figure_can_be_read(address):
    """Ink and lines stand out from the page: WCAG's contrast of 4.5 for text, 3 for what is drawn."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    contrast = """([selector, property]) => [...document.querySelectorAll(selector)].map(found => {
        const light = rgb => rgb.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
        const [a, b] = [getComputedStyle(found)[property], getComputedStyle(document.body).backgroundColor].map(light);
        return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    })"""
    for scheme in ("dark", "light"):
        with page(1280, 900, color_scheme=scheme) as shown:
            listened(shown, address)
            for selector, property_, least in (
                (".chart text", "fill", 3.0),
                (".chart .line", "stroke", 3.0),
                (".chart .mark", "fill", 3.0),
                ("td, th, p, dd, dt, .legend bdi, small", "color", 4.5),
            ):
                ratios = shown.evaluate(contrast, [selector, property_])
                assert ratios, selector
                assert min(ratios) >= least, (scheme, selector, min(ratios))
            if scheme == "dark":
                shown.screenshot(path=SCREENSHOTS / "report-dark.png", full_page=True)


def test_printed_it_fits_a_sheet(address, tmp_path):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with page(720, 1000) as shown:  # A4 less its margins
        listened(shown, address)
        shown.emulate_media(media="print")
        assert shown.evaluate("document.documentElement.scrollWidth") <= 720
        assert not shown.locator("input.filter").is_visible()
        shown.pdf(path=SCREENSHOTS / "report.pdf", format="A4")
        assert shown.locator("details.sample:not([open])").count() == 0
    assert Path(SCREENSHOTS / "report.pdf").stat().st_size > 10_000
