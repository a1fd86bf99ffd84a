"""A run's row in TensorBoard's HPARAMS table: settings at the start, metrics and status at the end.

TensorBoard uses the first status that it finds in a folder. So the status at the end is written to a file of its own,
which the next start of the run removes. No list of columns is written: TensorBoard then collects them from all runs.
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
START, END = "settings", "end"  # suffixes of the two files


def columns(config: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Return the settings to compare runs by, by dotted key, without secrets and None values; lists become strings."""
    settings = {k: v for k, v in flatten(redact(config)).items() if v is not None and not _is_hidden(k)}
    return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}


def start(folder: Path, settings: Mapping[str, bool | float | str]) -> None:
    """Write the run's row, and remove the row and the end status of an earlier attempt in this folder."""
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    for kind in (START, END):
        for earlier in _files(folder, kind):
            earlier.unlink()
    info = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for name, value in settings.items():
        if isinstance(value, bool):  # before numbers: a bool is an int
            info.hparams[name].bool_value = value
        elif isinstance(value, int | float):
            info.hparams[name].number_value = value
        else:
            info.hparams[name].string_value = value
    _write(folder, START, metadata.SESSION_START_INFO_TAG, session_start_info=info)


def end(folder: Path, succeeded: bool) -> None:
    """Write the status at the end, if the run has a row. A run that is stopped to be resumed has not ended."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    if not _files(folder, START):
        return
    for earlier in _files(folder, END):
        earlier.unlink()
    status = api_pb2.Status.Value("STATUS_SUCCESS" if succeeded else "STATUS_FAILURE")
    info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    _write(folder, END, metadata.SESSION_END_INFO_TAG, session_end_info=info)


def _write(folder: Path, kind: str, tag: str, **content: Any) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    data = plugin_data_pb2.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content)
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString())
    value = Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))
    now = time.time()
    with (folder / f"events.out.tfevents.{int(now):010d}.{kind}").open("wb") as file:
        records = RecordWriter(file)
        for event in (Event(file_version="brain.Event:2"), Event(summary=Summary(value=[value]))):
            event.wall_time = now
            records.write(event.SerializeToString())


def _files(folder: Path, kind: str) -> list[Path]:
    return list(folder.glob(f"events.out.tfevents.*.{kind}"))


def _is_hidden(key: str) -> bool:
    return key.endswith("_target_") or any(key == name or key.startswith(f"{name}.") for name in HIDDEN)
