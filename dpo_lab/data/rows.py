"""Read rows from files or from a Hugging Face data set, in chunks, each row with its location."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dpo_lab.data.readers import CHUNK, READERS, read, rows_of, suffix
from dpo_lab.data.text import COMPRESSED, TooLarge, from_json
from dpo_lab.errors import LabError, first_line

SAVED = ("dataset_dict.json", "state.json", "dataset_info.json")  # files that save_to_disk writes besides the rows
SHOWN = 300  # characters of a library's error to show


class BadData(LabError, ValueError):
    """Raised for data that can't be read or are not pairs; the message is one line with location and what to type."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of `place`, numbered from 1 (by lines in a text file, else by rows). A row is an object, or a
    line of JSON that is not parsed yet. amount: the part of Rows.total that was read.
    """

    place: str
    numbers: Sequence[int]
    rows: Sequence[Any]
    amount: int


class Rows(Protocol):
    """A source of rows. total: its size in the unit of Chunk.amount."""

    total: int

    def chunks(self) -> Iterator[Chunk]:
        """Yield all rows in chunks."""
        ...

    def digest(self) -> str:
        """Return a hash of the content, which does not depend on paths or names."""
        ...


def open_rows(path: str | Sequence[str], name: str | None, split: str | None, revision: str | None) -> Rows:
    """Open files (a path, a pattern, or several) or a data set (a folder, or a name on the hub).

    Raises BadData if there is none, or if a file is asked for what only data sets have; "train" is the split of any file.
    """
    files = check_exists(path)
    if files is None:
        return _data_set(path if isinstance(path, str) else path[0], name, split, revision)
    of_sets = {"split": None if split == "train" else split, "name": name, "revision": revision}
    for key, value in of_sets.items():
        if value is not None:
            raise BadData(
                f"{files[0]}: a file has no {key}, which {key}={value} asks for; type data.{key}=null, and for held-out"
                " pairs data.validation_split=null or data.validation_path=FILE"
            )
    return FileRows(files)


def check_exists(path: str | Sequence[str], key: str = "data.path") -> list[Path] | None:
    """Return the files of a path, a pattern, or several; None for a data set, a folder or a name that the hub may have.

    Raises BadData, which names `key`, if there is none.
    """
    paths = [path] if isinstance(path, str) else list(path)
    files: list[Path] = []
    for each in paths:
        found = _matching(each)
        if any(p.is_dir() for p in found) or (not found[0].exists() if found else False):
            if len(paths) == 1 and len(found) == 1 and (found[0].is_dir() or _may_be_on_the_hub(each)):
                return None
            raise BadData(f"{key}={each}: no such file; type the path of a file, or a data set's name on the hub")
        if not found:
            raise BadData(f"{key}={each}: no file matches; type a path or a pattern that does")
        files += found
    return files


def local_files(path: str | Sequence[str]) -> list[Path]:
    """Return the local files of a path, a pattern, a folder or several of these; none for a name on the hub."""
    paths = [path] if isinstance(path, str) else list(path)
    found = [file for each in paths for file in _matching(each)]
    return [file for each in found for file in (sorted(each.rglob("*")) if each.is_dir() else [each]) if file.is_file()]


def _matching(path: str) -> list[Path]:
    """Return the file or folder of this name; if it does not exist and is a pattern, the matching ones."""
    if glob.has_magic(path) and not os.path.exists(path):
        return [Path(match) for match in sorted(glob.glob(path, recursive=True))]
    return [Path(path)]


def parse(row: Any) -> Mapping[str, Any]:
    """Return a row as an object; raise ValueError if it is not one."""
    if isinstance(row, bytes):
        row = from_json(row)
    if not isinstance(row, Mapping):
        raise ValueError(f"not an object but {type(row).__name__}")
    if None in row:
        raise ValueError(f"{len(row[None])} cells more than the first row has names")
    return row


class FileRows:
    """The rows of JSON lines, JSON, Parquet, CSV and Arrow files, plain or compressed with gzip, zstd, bzip2 or xz."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.total = sum(file.stat().st_size for file in files)

    def chunks(self) -> Iterator[Chunk]:
        for file in self.files:
            size, number, done = file.stat().st_size, 0, 0
            try:
                for numbers, chunk, position in read(file):
                    number = numbers[-1]
                    yield Chunk(str(file), numbers, chunk, position - done)
                    done = position
            except TooLarge as error:
                raise BadData(f"{file}: {error}") from None
            except Exception as error:  # many types, from system, codecs and pyarrow
                raise _unreadable(file, f" after {number}", error) from error
            yield Chunk(str(file), [], [], size - done)

    def digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files:
            digest.update(suffix(file).encode())
            try:
                add_file(digest, file)
            except OSError as error:
                raise _unreadable(file, "", error) from error
        return digest.hexdigest()


class DatasetRows:
    """The rows of a data set of the `datasets` library."""

    def __init__(self, path: str, place: str, data: Any) -> None:
        self.path, self.place, self.data = path, place, data
        self.total = len(data)

    def chunks(self) -> Iterator[Chunk]:
        """Yield all rows in chunks, read from Arrow: the library's decoding would open every image and sound."""
        stored, done = self.data.with_format("arrow"), 0
        json_columns = {name: feature for name, feature in self.data.features.items() if _holds_json(feature)}
        try:
            for first in range(0, len(self.data), CHUNK):
                for rows in rows_of(stored[first : first + CHUNK]):
                    for name, feature in json_columns.items():
                        for row in rows:
                            row[name] = _from_json(feature, row[name])
                    yield Chunk(self.place, range(done + 1, done + 1 + len(rows)), rows, len(rows))
                    done += len(rows)
        except Exception as error:
            raise _fault(self.path, f" after {done}", error) from error

    def digest(self) -> str:
        digest = hashlib.blake2b(f"{self.data.features} {len(self.data)}".encode(), digest_size=16)
        files = [Path(file["filename"]) for file in self.data.cache_files]
        for file in files:
            add_file(digest, file)
        if not files:  # a data set in memory
            digest.update(self.data._fingerprint.encode())
        return digest.hexdigest()


def _holds_json(feature: Any) -> bool:
    """Return whether a feature of `datasets` stores JSON text, for values that Arrow has no type for."""
    inside = feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    return type(feature).__name__ == "Json" or any(each is not None and _holds_json(each) for each in inside)


def _from_json(feature: Any, value: Any) -> Any:
    """Return a value from Arrow with its JSON text parsed."""
    if type(feature).__name__ == "Json":
        return json.loads(value) if isinstance(value, str) else value
    if isinstance(feature, dict) and isinstance(value, dict):
        return {name: _from_json(feature[name], item) for name, item in value.items()}
    inside = getattr(feature, "feature", None)
    return [_from_json(inside, item) for item in value] if inside is not None and isinstance(value, list) else value


def _data_set(path: str, name: str | None, split: str | None, revision: str | None) -> Rows:
    """Open a data set on the hub, a folder that is structured like one, or a folder of save_to_disk.

    The library finds which files of a folder belong to a split. They are read by FileRows if it can read all of them,
    with the location of each row; the library would copy them, and some damaged files make it end the process.
    """
    import datasets

    folder = Path(path)
    is_folder = folder.is_dir()
    is_saved = any((folder / name).exists() for name in SAVED[:2])
    if is_folder and not is_saved and glob.has_magic(str(folder.resolve())):
        raise BadData(
            f"data.path={path}: the datasets library takes the brackets or stars in a folder's path for a pattern; rename"
            " the folder, or type the paths of its files (data.path=[FILE, ...])"
        )
    try:
        if is_saved:
            found = datasets.load_from_disk(path)
        elif is_folder and (files := _files_of_splits(folder, name)):
            found = files
        else:
            found = datasets.load_dataset(str(folder.resolve()) if is_folder else path, name, revision=revision)
    except Exception as error:  # many types, from hub, network, cache and files
        if is_folder:
            raise _fault(path, "", error) from error
        raise BadData(
            f"data.path={path}: {_reason(error)}; type the path of a file, or a data set's name on the hub (and data.name="
            " its configuration)"
        ) from error
    if isinstance(found, dict):
        chosen_split = split or ("train" if "train" in found else "")
        if chosen_split not in found:
            raise BadData(
                f"data.split={split}: {path} has no such split; type data.split= one of {', '.join(map(str, found))}"
            )
        found = found[chosen_split]
    if isinstance(found, list):
        return FileRows(found)
    return DatasetRows(path, f"{path}[{split}]" if split else path, found)


def _files_of_splits(folder: Path, name: str | None) -> dict[str, list[Path]]:
    """Return the files of a folder by split; {} if one of them has a format that FileRows does not read."""
    import datasets

    absolute = folder.resolve()  # the library can't derive a name from "."
    found = datasets.load_dataset_builder(str(absolute), name).config.data_files or {}
    files = {str(split): [folder / Path(file).relative_to(absolute) for file in each] for split, each in found.items()}
    return files if all(suffix(file) in READERS for each in files.values() for file in each) else {}


def _may_be_on_the_hub(path: str) -> bool:
    """Return whether a path may be a name on the hub: name or owner/name, without the suffix of a data file."""
    parts = path.split("/")
    is_file = suffix(Path(path)) in READERS or Path(path).suffix.lower() in COMPRESSED
    return len(parts) <= 2 and all(parts) and not is_file and not path.startswith((".", "~"))


def _fault(path: str, after: str, error: BaseException) -> BadData:
    """Return the error of a data set: of the first damaged file that save_to_disk wrote, else the library's."""
    for file in local_files(path):
        try:
            if file.name in SAVED:
                json.loads(file.read_bytes())
            elif file.suffix == ".arrow":
                for _ in FileRows([file]).chunks():
                    pass
        except BadData as own:
            return own
        except (OSError, ValueError, RecursionError) as cause:
            return _unreadable(file, "", cause)
    while error.__cause__:
        error = error.__cause__
    return _unreadable(path, after, error)


def _unreadable(place: Path | str, after: str, error: BaseException) -> BadData:
    return BadData(f"{place}: can't be read{after} ({_reason(error)}); fix the file or download it again")


def _reason(error: BaseException) -> str:
    """Return the first line of a library's error, printable and truncated."""
    return "".join(letter if letter.isprintable() else "?" for letter in first_line(error))[:SHOWN]


def add_file(digest: Any, file: Path) -> None:
    """Update a hash with the bytes of a file."""
    with file.open("rb") as opened:
        hashlib.file_digest(opened, lambda: digest)
