"""The figure of an inspection: lengths of chosen and rejected responses, prompts, and what became of the rows."""

from __future__ import annotations

import io
import re
from typing import Any

from dpo_lab.data.quality import Quality
from dpo_lab.inspection.tables import interval

MADE_BY = "dpo_lab.inspect"
INK = "#808081"  # text and axes of the SVG, replaced by currentColor
COLOURS = {"prompt": "#0072B2", "chosen": "#009E73", "rejected": "#D55E00"}  # Okabe and Ito's
LINES = {"chosen": "-", "rejected": "--"}


def png(quality: Quality, title: str) -> bytes:
    """Return the figure as a PNG file; the same numbers give the same bytes."""
    return _draw(quality, title, "black", format="png", dpi=130, metadata={"Software": MADE_BY})


def svg(quality: Quality) -> str:
    """Return the figure as an SVG element without background, in the colour of the surrounding text."""
    no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    text = _draw(quality, "", INK, format="svg", transparent=True, metadata=no_metadata).decode()
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(r' style="([^"]*)"', _as_attributes, text).replace(INK, "currentColor")


def _as_attributes(style: re.Match[str]) -> str:
    """Return a style as attributes, which a content security policy allows."""
    settings = [setting.split(":", 1) for setting in style[1].split(";") if setting.strip()]
    return "".join(f' {name.strip()}="{value.strip()}"' for name, value in settings)


def _draw(quality: Quality, title: str, ink: str, **how: Any) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor")
    settings: Any = {"svg.hashsalt": MADE_BY, "svg.fonttype": "path", "font.size": 9, **dict.fromkeys(inked, ink)}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore the user's matplotlibrc
        matplotlib.rcParams.update(settings)
        figure = Figure(figsize=(11, 7), layout="constrained")
        (responses, difference), (prompts, counts) = figure.subplots(2, 2)
        if title:
            figure.suptitle(title.replace("$", r"\$"), fontsize=10)
        _responses(responses, quality)
        _difference(difference, quality)
        _prompts(prompts, quality)
        _counts(counts, quality)
        for axis in (responses, difference, prompts, counts):
            axis.spines[["top", "right"]].set_visible(False)
        out = io.BytesIO()
        figure.savefig(out, **how)
    return out.getvalue()


def _responses(axis: Any, quality: Quality) -> None:
    edges = quality.bins["response"]
    for part, line in LINES.items():
        lengths = quality.train.lengths[part]
        label = f"{part}, mean {lengths.mean:.1f}"
        axis.stairs(lengths.histogram, edges, color=COLOURS[part], ls=line, lw=1.8, label=label)
    axis.set(title="Responses (train)", xlabel="tokens", ylabel="pairs", xlim=(edges[0], edges[-1]))
    axis.legend(frameon=False)


def _difference(axis: Any, quality: Quality) -> None:
    edges, counts = quality.bins["difference"], quality.train.differences
    middle = len(counts) // 2  # the bin around 0
    for label, colour, hatch, bins in (
        ("chosen is longer", COLOURS["chosen"], "", range(middle + 1, len(counts))),
        ("rejected is longer", COLOURS["rejected"], "///", range(middle)),
        ("about equal", "#999999", "", [middle]),
    ):
        shown = [count if i in bins else 0 for i, count in enumerate(counts)]
        axis.stairs(shown, edges, fill=not hatch, hatch=hatch, color=colour, label=label)
    longer = interval(quality.train.chosen_longer)
    axis.set(
        title=f"Chosen is longer in {longer}, ties count half (train)"
        if longer
        else "No pair has two responses (train)",
        xlabel="difference in tokens, chosen minus rejected",
        ylabel="pairs",
    )
    axis.legend(frameon=False)


def _prompts(axis: Any, quality: Quality) -> None:
    lengths, edges = quality.train.lengths["prompt"], quality.bins["prompt"]
    axis.stairs(lengths.histogram, edges, fill=True, color=COLOURS["prompt"], alpha=0.8)
    title = f"Prompts (train): {quality.train.prompts:,} distinct, mean {lengths.mean:.1f}"
    axis.set(title=title, xlabel="tokens", ylabel="pairs", xlim=(edges[0], edges[-1]))


def _counts(axis: Any, quality: Quality) -> None:
    counts = [(what, count) for what, count in quality.counts.items() if count]
    axis.barh([what for what, _ in counts], [count for _, count in counts], color="#999999")
    axis.bar_label(axis.containers[0], labels=[f" {count:,}" for _, count in counts])
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_title("Rows: used and dropped")
