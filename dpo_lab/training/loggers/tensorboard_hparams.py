"""A run's row in TensorBoard's HPARAMS table: settings at the start, metrics and status at the end.

TensorBoard uses the first status that it finds in a folder. So the status at the end is written to a file of its own,
which the next start of the run removes. No list of columns is written: TensorBoard then collects them from all runs.
SummaryWriter.add_hparams would write a success at once, a folder of its own, and yes/no settings as numbers.
"""

# pyright: reportAttributeAccessIssue=false
# (protobuf creates its classes at import)

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_lab.runs.fingerprint import flatten
from dpo_lab.runs.redact import redact

# Keys, including all keys below them, that runs are not compared by; names of classes are hidden too.
HIDDEN = (
    "name",
    "if_exists",
    "optimized_metric",
    "figures",
    "logger",
    "callbacks.checkpoint",
    "callbacks.progress",
    "data.num_workers",
    "data.tokenize_workers",
)
REPEATED = ("beta", "seed")  # at the root, and again in groups that take them over, as loss.beta
START, END = "settings", "end"  # suffixes of the two files


def columns(config: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Return the settings to compare runs by, by dotted key, without secrets, None values and those that only repeat
    REPEATED; lists become strings.
    """
    settings = {k: v for k, v in flatten(redact(config)).items() if v is not None and not _is_hidden(k)}
    own = {key: config[key] for key in REPEATED if key in config}
    settings = {k: v for k, v in settings.items() if k in own or own.get(k.rpartition(".")[2]) != v}
    return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}


def start(folder: Path, settings: Mapping[str, bool | float | str]) -> None:
    """Write the run's row, and remove the row and the end status of an earlier attempt in this folder."""
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb

    for kind in (START, END):
        for earlier in _files(folder, kind):
            earlier.unlink()
    _write(
        folder, START, hparams_pb(dict(settings), trial_id="")
    )  # without an id TensorBoard names a row by its folder


def end(folder: Path, succeeded: bool) -> None:
    """Write the status at the end, if the run has a row. A run that is stopped to be resumed has not ended."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    if not _files(folder, START):
        return
    for earlier in _files(folder, END):
        earlier.unlink()
    status = api_pb2.Status.Value("STATUS_SUCCESS" if succeeded else "STATUS_FAILURE")
    info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=info))
    _write(folder, END, Summary(value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about)]))


def _write(folder: Path, kind: str, summary: Any) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder), filename_suffix=f".{kind}")
    writer.add_event(Event(wall_time=time.time(), summary=summary))
    writer.close()


def _files(folder: Path, kind: str) -> list[Path]:
    return list(folder.glob(f"events.out.tfevents.*.{kind}"))


def _is_hidden(key: str) -> bool:
    return key.endswith("_target_") or any(key == name or key.startswith(f"{name}.") for name in HIDDEN)
