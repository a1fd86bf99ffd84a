"""The style of matplotlib figures: colours, fonts, and equal bytes for equal numbers."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MADE_BY = "dpo_lab.reporting.figures"
# Okabe and Ito's colour-blind safe colours; dashes, markers and hatches distinguish lines without colour.
BLUE, VERMILLION, GREEN, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#777777"
METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": MADE_BY},
    "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
}


@dataclass(frozen=True)
class FigureSpec:
    """A figure to draw. draw: puts everything on a matplotlib figure; size: inches."""

    draw: Callable[[Any], None]
    size: tuple[float, float] = (6.0, 4.2)


def draw(spec: FigureSpec) -> dict[str, bytes]:
    """Return the figure as files, `png` and `svg`; the user's matplotlib settings are ignored."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": MADE_BY,
                "svg.fonttype": "path",
                "font.size": 9,
                "axes.titlesize": 10,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "grid.alpha": 0.3,
                "legend.frameon": False,
                "legend.fontsize": 8,
            }
        )
        figure = Figure(figsize=spec.size, dpi=150)
        spec.draw(figure)
        ConstrainedLayoutEngine().execute(figure)  # once for both files; a figure with an engine would draw twice
        files = {kind: io.BytesIO() for kind in METADATA}
        for kind, file in files.items():
            figure.savefig(file, format=kind, dpi=figure.dpi, metadata=METADATA[kind])
    return {kind: file.getvalue() for kind, file in files.items()}
