"""What TensorBoard shows of a run besides scalars: charts of several curves, margin histograms, samples, figures."""

# pyright: reportAttributeAccessIssue=false
# (protobuf makes its classes at import)

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.writer import SummaryWriter

from dpo_lab.core.histogram import EDGES, HistogramCounts
from dpo_lab.reporting.model_card import markdown_table


def writers(loggers: Iterable[Logger]) -> Iterator[SummaryWriter]:
    """Those of the loggers that are TensorBoard's; to be called by rank 0."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            yield logger.experiment


def show_charts(trainer: Trainer, charts: Mapping[str, Sequence[str]]) -> None:
    """Put scalars together on charts, {`group/title`: names of scalars}, under CUSTOM SCALARS."""
    layout: dict[str, dict[str, list]] = {}
    for place, names in charts.items():
        group, title = place.split("/", 1)
        layout.setdefault(group, {})[title] = ["Multiline", [f"{name}$" for name in names]]  # a regular expression each
    for writer in writers(trainer.loggers) if trainer.is_global_zero else ():
        writer.add_custom_scalars(layout)


def show_histogram(trainer: Trainer, name: str, counted: HistogramCounts, step: int) -> None:
    """How values are spread that were counted by core/histogram.py; nothing where none was."""
    if not trainer.is_global_zero or not counted.number:
        return
    full = [i for i, count in enumerate(counted.counts) if count]
    held = slice(full[0], full[-1] + 1)  # the others are empty
    for writer in writers(trainer.loggers):
        writer.add_histogram_raw(
            name,
            min=counted.least,
            max=counted.greatest,
            num=counted.number,
            sum=counted.total,
            sum_squares=counted.squares,
            bucket_limits=EDGES[held],
            bucket_counts=counted.counts[held],
            global_step=step,
        )


def show_samples(loggers: Iterable[Logger], samples: Sequence[Mapping[str, str]], step: int, most: int = 16) -> None:
    """The first samples, as many as `most`, side by side: what the initial and the trained policy say to the same
    prompts.
    """
    if not samples:
        return
    rows = [[sample[key] for key in ("prompt", "initial", "trained")] for sample in samples[:most]]
    lines = markdown_table(("prompt", "initial policy", "trained policy"), rows)
    for writer in writers(loggers):
        writer.add_text("samples", "\n".join(lines), step)


def show_figures(loggers: Iterable[Logger], figures: Iterable[Path], step: int) -> None:
    """PNG files as they are, each under `figures/` and its file's name."""
    for path in figures:
        png = path.read_bytes()
        width, height = struct.unpack(">II", png[16:24])
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        value = Summary.Value(tag=f"figures/{path.stem}", image=image)
        for writer in writers(loggers):
            writer._get_file_writer().add_summary(Summary(value=[value]), step)
