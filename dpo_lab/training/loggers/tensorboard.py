"""What TensorBoard shows of a run besides scalars: charts of several curves, margin histograms, samples, figures."""

# pyright: reportAttributeAccessIssue=false
# (protobuf creates its classes at import)

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from dpo_lab.reporting.model_card import markdown_table
from dpo_lab.reporting.run_summary import sample_table

# The group of metrics that are measured once, after training. TensorBoard's cards sort `/` before `-`, so that the curves of
# train/ come before it; its HPARAMS table sorts `-` before `/`, so that these are the first metrics there.
FINAL_METRICS = "train-end"
BINS: Any = 30  # of a histogram: as many as TensorBoard draws


def writers(loggers: Iterable[Logger]) -> Iterator[SummaryWriter]:
    """Yield the writers of the TensorBoard loggers; to be called on rank 0."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            yield logger.experiment


def show_charts(trainer: Trainer, charts: Mapping[str, Sequence[str]]) -> None:
    """Show several scalars on one chart under CUSTOM SCALARS. charts: {`group/title`: names of scalars}."""
    layout: dict[str, dict[str, list]] = {}
    for key, names in charts.items():
        group, title = key.split("/", 1)
        layout.setdefault(group, {})[title] = ["Multiline", [f"{name}$" for name in names]]  # regular expressions
    for writer in writers(trainer.loggers) if trainer.is_global_zero else ():
        writer.add_custom_scalars(layout)


def show_histogram(trainer: Trainer, name: str, values: Tensor, step: int) -> None:
    """Add a histogram of values, of any shape, unless there are none."""
    if trainer.is_global_zero and values.numel():
        for writer in writers(trainer.loggers):
            writer.add_histogram(name, values, step, bins=BINS)


def show_samples(loggers: Iterable[Logger], samples: Sequence[Mapping[str, str]], step: int, most: int = 16) -> None:
    """Add a text table of the first `most` samples: responses of the policies to the same prompts."""
    if not samples:
        return
    lines = markdown_table(*sample_table(samples[:most]))
    for writer in writers(loggers):
        writer.add_text("samples", "\n".join(lines), step)


def show_figures(loggers: Iterable[Logger], figures: Iterable[Path], step: int) -> None:
    """Add PNG files unchanged, as `figures/` and the name of the file."""
    for path in figures:
        png = path.read_bytes()
        width, height = struct.unpack(">II", png[16:24])
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        value = Summary.Value(tag=f"figures/{path.stem}", image=image)
        for writer in writers(loggers):
            writer._get_file_writer().add_summary(Summary(value=[value]), step)
