"""The HTML page of an inspection: one offline file; all text in it is escaped."""

from __future__ import annotations

from markupsafe import Markup

from dpo_lab.inspection.figure import MADE_BY, svg
from dpo_lab.inspection.look import Inspection
from dpo_lab.inspection.tables import tables
from dpo_lab.inspection.terminal import MARKS, NO_WARNINGS
from dpo_lab.inspection.token_view import CUT, LEGEND
from dpo_lab.reporting.html_page import render


def page(look: Inspection) -> str:
    """Return the page of an inspection."""
    return render(
        "inspection.html",
        MADE_BY,
        ["templates/inspection.css"],
        title=f"Pairs from {look.source}",
        heading=f"Preference pairs from {look.source}",
        look=look,
        tables=tables(look),
        figure=Markup(svg(look.quality)),
        marks=MARKS,
        no_warnings=NO_WARNINGS,
        legend=LEGEND,
        cut=CUT,
    )
