"""Write an inspection to a file, a page or a figure, never over a file that is not an earlier report."""

from __future__ import annotations

import os
from pathlib import Path

from dpo_lab.config.schema import ConfigError
from dpo_lab.inspection.figure import MADE_BY, png
from dpo_lab.inspection.look import Inspection
from dpo_lab.inspection.page import page
from dpo_lab.reporting.html_page import may_be_written


def target(path: str | None) -> Path | None:
    """Return the path to write a report to, None for no report. Raises ConfigError if another file is there already."""
    if path is None:
        return None
    try:
        (file := Path(path)).parent.mkdir(parents=True, exist_ok=True)
        if may_be_written(file, MADE_BY):
            return file
    except (OSError, ValueError) as error:
        raise ConfigError(f"page={path}: {_reason(error)}; type another page=") from None
    raise ConfigError(f"page={path}: the file exists and is not a report of {MADE_BY}; type another page=")


def write(look: Inspection, file: Path) -> None:
    """Write a page or a figure, by the file's suffix; the same inspection gives the same bytes."""
    content = page(look).encode() if file.suffix == ".html" else png(look.quality, look.source)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        os.replace(beside, file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"page={file}: {_reason(error)}; type another page=") from None


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
