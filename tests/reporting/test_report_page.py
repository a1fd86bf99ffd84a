"""A report in a real browser, at a desk and on a phone: it sorts, filters, loads nothing, runs nothing of others, fits."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from dpo_lab.reporting.comparison_page import page as drawn
from dpo_lab.reporting.figures.charts import Panel, Point, Series, plain
from dpo_lab.reporting.front_page import front_page
from dpo_lab.studies.load import gather
from tests.conftest import REPOSITORY
from tests.support.browser import MISSING, chromium, page
from tests.support.study_runs import write_study

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.usefixtures("browser"),
]

CHARTS = "figure:not(.effect) svg.chart"  # those with titles
SCREENSHOTS = REPOSITORY / "outputs" / "screenshots"  # to be looked at; none of it is committed


@pytest.fixture(scope="module")
def browser():
    with chromium():
        yield


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
        for chart in shown.locator(CHARTS).all():
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
        assert shown.locator(CHARTS).count() > 5
        assert shown.locator(CHARTS).evaluate_all(inside) == []


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
                (".chart .line path", "stroke", 3.0),
                (".chart .bar line", "stroke", 3.0),
                (".chart .mark > *", "fill", 3.0),
                ("td, th, p, dd, dt, li, .legend bdi, small, select", "color", 4.5),
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


def test_a_pointer_reads_values_and_hostile_text_stays_text(address):
    with page(1280, 900) as shown:
        heard = listened(shown, address)
        chart = shown.locator("svg.chart[aria-label=kl]")
        chart.scroll_into_view_if_needed()
        chart.locator(".mark > *").first.hover()
        tip = chart.locator("g[aria-label=tip]")
        assert "dpo, beta 0.1: kl" in tip.text_content()
        assert ", n = 5" in tip.text_content()
        by_arm = shown.locator("svg.chart[aria-label=true_accuracy]")
        assert "<b>crash</b>" in by_arm.text_content()
        assert by_arm.get_by_text("not measured").count() == 1
        curves = shown.locator("svg.chart[aria-label='val/loss']")
        curves.scroll_into_view_if_needed()
        curves.hover()
        assert re.search(r"optimizer steps \d+: 0\.\d", curves.locator("g[aria-label=tip]").text_content())
        assert shown.locator("svg b, svg script, svg a, svg image, svg foreignObject").count() == 0
        assert heard == []


@pytest.mark.parametrize("by", ["pointer", "keyboard"])
def test_a_legend_entry_hides_its_arms_and_the_others_keep_their_colours(address, by):
    def press(button):
        button.click() if by == "pointer" else button.press("Enter")

    styles = "marks => marks.map(mark => mark.parentElement.getAttribute('fill') + getComputedStyle(mark).fill)"
    with page(1280, 900) as shown:
        figure = shown.locator("figure", has=shown.locator("svg[aria-label=kl]")).first
        listened(shown, address)
        marks = figure.locator("svg[aria-label=kl] .mark")
        before = marks.evaluate_all(styles)
        button = figure.get_by_role("button", name="dpo", exact=True)
        press(button)
        assert button.get_attribute("aria-pressed") == "false"
        assert marks.evaluate_all(styles) == before[1:]
        press(button)
        assert button.get_attribute("aria-pressed") == "true"
        assert marks.evaluate_all(styles) == before


def test_an_axis_can_be_made_log_and_linear_again(address):
    with page(1280, 900) as shown:
        heard = listened(shown, address)
        figure = shown.locator("figure", has=shown.locator("svg[aria-label=kl]")).first
        ticks = figure.locator("svg[aria-label=kl] [aria-label='y-axis tick label'] text")
        assert "kl, log scale" in figure.locator("svg[aria-label=kl]").text_content()  # as it is a ratio quantity
        figure.get_by_label("y axis").select_option("linear")
        assert "log scale" not in figure.locator("svg[aria-label=kl]").text_content().partition("kl")[2]
        linear = ticks.all_text_contents()
        figure.get_by_label("y axis").select_option("log")
        logged = [float(text) for text in ticks.all_text_contents()]
        assert len(logged) >= 2
        assert min(logged) > 0
        assert {round(value / 10 ** math.floor(math.log10(value))) for value in logged} <= {1, 2, 5}
        figure.get_by_label("x axis").select_option("linear")
        assert "beta, log scale" not in figure.text_content()
        figure.get_by_label("y axis").select_option("linear")
        assert ticks.all_text_contents() == linear
        assert heard == []


def test_without_javascript_every_number_is_there(address):
    with page(1280, 900, java_script_enabled=False) as shown:
        shown.goto(address)
        figure = shown.locator("figure[aria-label^='kl, gold_gain']")
        assert figure.get_by_text("uniform, beta 0.3: kl ").is_visible()
        assert shown.locator("figure .legend").first.is_visible()
        assert shown.locator("table.filtered tbody tr").count() == 8


def draw(shown, panel: Panel, **types: str):
    """Draw one panel in place of the page's first figure, 440 px wide; gives the chart. types: chosen scales of axes."""
    code = """([panel, types]) => {
        const chart = draw(panel, new Set(), types, 440);
        document.querySelector(".panels").replaceChildren(chart);
        if (chart) separate(chart);
    }"""
    shown.evaluate(code, [plain(panel), types])
    return shown.locator(".panels").first.locator("svg")


def test_names_beside_points_touch_neither_each_other_nor_what_is_drawn(address):
    points = [
        Point(i / 10, math.sin(i), name=f"name {i}", y_interval=(math.sin(i) - 0.2, math.sin(i) + 0.2))
        for i in range(12)
    ]
    boxes = "found => found.map(e => e.getBoundingClientRect()).map(b => [b.left, b.top, b.right, b.bottom])"
    with page(1280, 900) as shown:
        listened(shown, address)
        chart = draw(shown, Panel("title", "x", [Series("one", points)]))
        names = chart.locator(".names text").evaluate_all(boxes)
        marks = chart.locator(".mark > *, .bar > *").evaluate_all(boxes)
    assert len(names) >= 6
    assert len(marks) == 24
    for i, a in enumerate(names):
        for b in [*names[:i], *marks]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_what_is_not_finite_is_a_gap_and_far_off_values_do_not_flatten_the_rest(address):
    points = [Point(i, math.nan if i == 5 else 1e9 if i == 8 else 0.1 * i) for i in range(40)]
    with page(1280, 900) as shown:
        listened(shown, address)
        chart = draw(shown, Panel("loss", "steps", [Series("one", points, has_markers=False)]))
        path = chart.locator(".line path").get_attribute("d")
        assert path.count("M") == 2
        assert "NaN" not in path
        assert "loss (1 outliers not shown)" in chart.text_content()
        assert draw(shown, Panel("none", "x", [Series("one", [Point(0, math.nan)])])).count() == 0


def test_what_a_log_axis_cannot_show_is_said(address):
    panel = Panel("margin", "x", [Series("one", [Point(i, y) for i, y in enumerate((-2.0, 0.0, 1.0, 10.0))])])
    below = Panel("logps", "x", [Series("one", [Point(1.0, -40.0), Point(2.0, -30.0)])])
    with page(1280, 900) as shown:
        listened(shown, address)
        chart = draw(shown, panel, y="log")
        assert "margin, log scale (2 at or below 0 not shown)" in chart.text_content()
        assert chart.locator(".mark > *").count() == 2
        assert draw(shown, panel, y="root").locator(".mark > *").count() == 4
        chart = draw(shown, below, y="log")  # linear, rather than nothing
        assert chart.locator(".mark > *").count() == 2
        assert "log scale" not in chart.text_content()


def test_a_large_kl_leaves_small_ones_distinguishable(address):
    """On a root scale, what reaches below 0, as an interval may, stands on the floor."""
    points = [Point(i, kl, y_interval=(kl - 30, kl + 1)) for i, kl in enumerate((0.5, 15.0, 60.0))]
    with page(1280, 900) as shown:
        listened(shown, address)
        chart = draw(shown, Panel("kl", "x", [Series("one", points)], y="root"))
        assert "kl, root scale" in chart.text_content()
        read = "(found, name) => found.map(e => Number(e.getAttribute(name)))"
        y = chart.locator(".mark > *").evaluate_all(read, "cy")
        ends = chart.locator(".bar line").evaluate_all(read, "y1")
        floor = max(ends)
        assert ends.count(floor) == 2
        assert (floor - y[1]) / (floor - y[2]) == pytest.approx(0.5, abs=0.01)
        assert floor - y[0] > 10


def test_ticks_are_round_few_and_apart(address):
    limits = ((0, 1), (-0.37, 0.11), (3e-5, 9e-5), (0, 1e7), (99.9, 100.1))
    with page(1280, 900) as shown:
        listened(shown, address)
        for low, high in limits:
            chart = draw(shown, Panel("loss", "steps", [Series("one", [Point(low, low), Point(high, high)])]))
            for axis in "xy":
                labels = chart.locator(f"[aria-label='{axis}-axis tick label'] text").all_text_contents()
                assert 2 <= len(labels) <= 9
                assert len(set(labels)) == len(labels)
        points = [Point(x, 1.0) for x in (0.01, 10.0)]
        chart = draw(shown, Panel("loss", "beta", [Series("one", points)], x="log"))
        found = chart.locator("[aria-label='x-axis tick label'] text").all_text_contents()
        assert {"0.01", "0.1", "1", "10"} <= set(found)
        points = [Point(x, 1.0) for x in (0.01, 100.0)]
        chart = draw(shown, Panel("loss", "beta", [Series("one", points)], x="log"))
        assert "" not in chart.locator("[aria-label='x-axis tick label'] text").all_text_contents()


def test_an_effect_shows_zero_and_what_would_matter(address):
    with page(1280, 900) as shown:
        listened(shown, address)
        chart = shown.locator("figure.effect svg").first  # uniform costs more KL: at least a factor of 1.2
        assert chart.get_attribute("aria-label").startswith("effect x 1.")
        solid, dashed = chart.locator(".level line").evaluate_all(
            "lines => lines.map(l => [Number(l.getAttribute('x1')), getComputedStyle(l).strokeDasharray])"
        )
        assert (solid[1], dashed[1]) == ("none", "4px, 3px")
        assert solid[0] < dashed[0]
        assert chart.locator(".bar line").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 900, 400])
def test_the_forest_plot_fits_and_tells_verdicts_by_word_and_shape(address, width, scheme, tmp_path):
    front = tmp_path / "index.html"
    (study,) = gather([Path(address.removeprefix("file://")).parent])
    front.write_text(front_page([(study, "report.html")] * 3))
    with page(width, 900, color_scheme=scheme) as shown:
        heard = listened(shown, front.as_uri())
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        shown.screenshot(path=SCREENSHOTS / f"front-{scheme}-{width}.png", full_page=True)
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        assert shown.locator("tr.claim").count() == 6
        assert shown.locator("tr.claim .verdict", has_text="● supported").count() == 6
        assert shown.locator("tr.claim svg circle.solid").count() == 6
        overlaps = """texts => texts.map(t => t.getBoundingClientRect()).some((a, i, all) => all.slice(i + 1).some(
            b => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom))"""
        assert not shown.locator("thead svg text:visible").evaluate_all(overlaps)
        assert not shown.locator("tr.claim th, tr.claim td").evaluate_all(overlaps)
        assert heard == []
