"""Faults 18, 19 and 24 of the matrix, by the thousand: of whatever file pairs are made, or one of our errors says why not."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_lab.data.chat import NoTemplate
from dpo_lab.data.formats import Format, Label, Pick
from dpo_lab.data.rows import BadData
from dpo_lab.data.sources import Contradictions, Data, OnBadRow
from dpo_lab.data.text import LARGEST_ARRAY
from dpo_lab.data.tokenize import PairTokenizer
from dpo_lab.data.tokenized_cache import TokenizedPairs
from tests.support.mutations import COMPRESS, Damaged, damaged_bytes, damaged_folders, damaged_rows, damaged_text
from tests.support.templates import FAMILIES, tokenizer_of
from tests.support.warm import CONTEXT, start_fork

pytestmark = pytest.mark.slow

FILES = int(os.environ.get("FUZZ", 300))  # type FUZZ=10000 before the command
SECONDS = 10.0  # of CPU for a file
MEMORY = 128 << 20  # bytes that reading any of these files may add
ENUMS: dict[str, Any] = {"format": Format, "pick": Pick, "label_is": Label}


def test_18_of_damaged_bytes_pairs_are_made_or_an_error_of_ours_says_why_not(reader, capsys):
    _fuzz("bytes", damaged_bytes(), FILES - 2 * (FILES // 3), reader, capsys)


def test_19_of_damaged_rows_pairs_are_made_or_an_error_of_ours_says_why_not(reader, capsys):
    _fuzz("rows", damaged_rows(), FILES // 3, reader, capsys)


def test_24_of_damaged_text_pairs_are_made_or_an_error_of_ours_says_why_not(reader, capsys):
    _fuzz("text", damaged_text(), FILES // 3, reader, capsys)


def test_18_of_damaged_data_sets_pairs_are_made_or_an_error_of_ours_says_why_not(reader, capsys):
    _fuzz("data sets", damaged_folders(), FILES // 6, reader, capsys)


BOMB = 1 << 27  # bytes, or nearly so, that a file of some kilobytes becomes


@pytest.mark.parametrize(
    ("name", "pack", "content"),
    [
        ("x.jsonl.gz", ".gz", lambda: bytes(BOMB)),
        ("x.jsonl.bz2", ".bz2", lambda: b"\n" * (BOMB // 128)),
        ("x.json.zst", ".zst", lambda: b'[{"prompt": "' + b"p" * LARGEST_ARRAY),
        ("x.json.gz", ".gz", lambda: b"[" * (LARGEST_ARRAY + 1)),
        ("x.json.zst", ".zst", lambda: b"[" + b" " * LARGEST_ARRAY),
        ("x.json.zst", ".zst", lambda: b"[" + b"1," * (BOMB // 1024)),
        ("x.csv.zst", ".zst", lambda: b"p" * BOMB),
        ("x.csv.zst", ".zst", lambda: b'prompt,chosen,rejected\n"' + b"p\n" * (BOMB // 8)),
    ],
)
def test_18_a_file_that_unpacks_without_end_is_refused_in_little_memory(name, pack, content, reader):
    became, told = reader.read(Damaged(name, COMPRESS[pack](content()), {}, "plain", skips=True))
    assert became == "BadData", told
    assert reader.grown < MEMORY


def _fuzz(kind: str, files: st.SearchStrategy[Damaged], count: int, reader: Reader, capsys) -> None:
    found: Counter[str] = Counter()

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(files)
    def holds(file: Damaged) -> None:
        became, told = reader.read(file)
        found[became] += 1
        assert became in ("read", "BadData", "NoTemplate"), told

    holds()
    assert found.total() >= count
    assert min(found["read"], found["BadData"]) > count // 20
    assert reader.grown < MEMORY
    if "FUZZ" in os.environ:
        with capsys.disabled():
            figures = ", ".join(f"{what} {number:,}" for what, number in found.most_common())
            print(
                f"\ndamaged {kind}: {found.total():,} files: {figures}; {reader.grown / 2**20:.0f} MiB more at the most"
            )


class Reader:
    """A process that reads files, one after another. grown: bytes that its memory was larger at its peak than at its start.

    What kills it, and what takes longer than so many seconds of CPU, is told as an outcome, and another one takes its place.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.grown = folder, 0
        self._start()

    def read(self, file: Damaged) -> tuple[str, str]:
        """(read, the error's name, or what went wrong; what can be said of it)."""
        self.connection.send(file)
        try:
            if not self.connection.poll(120):
                self.close()
                self._start()
                return "hangs", f"{file}: nothing came of it in two minutes"
            became, told, self.grown = self.connection.recv()
            return became, told
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            self._start()
            return "dies", f"{file}: {'too much CPU' if code == -signal.SIGVTALRM else f'exit code {code}'}"

    def close(self) -> None:
        self.process.kill()
        self.process.join()

    def _start(self) -> None:
        self.connection, theirs = CONTEXT.Pipe()
        self.process = start_fork(_serve, theirs, self.folder, daemon=True)
        theirs.close()


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Iterator[Reader]:
    reader = Reader(tmp_path_factory.mktemp("fuzz"))
    yield reader
    reader.close()


class Said(logging.Handler):
    """What was logged while a file was read; bad rows that were skipped are told as those are that stop a run."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def check(self, file: Damaged) -> None:
        for line in self.lines:
            assert line.isprintable(), repr(line)
            assert len(line) < 1000, line
            if line.startswith("bad row: "):
                assert file.row(line), line


def _serve(connection: Connection, folder: Path) -> None:
    import datasets
    import pyarrow as pa

    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    datasets.config.HF_DATASETS_CACHE = folder / "one" / "datasets"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pa.set_cpu_count(1)
    warnings.simplefilter("error")
    log, said = logging.getLogger("dpo_lab"), Said()
    log.addHandler(said)
    log.propagate = False
    encoders = {name: PairTokenizer(tokenizer_of(name), 64, 32) for name in FAMILIES}
    first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while True:
        file = connection.recv()
        said.lines.clear()
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)  # ends this process, whatever it is in
        try:
            became, told = _outcome(file, encoders[file.family], folder / "one")
            said.check(file)
        except Exception:
            became, told = "goes wrong", f"{file}\n{traceback.format_exc()}"
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        connection.send((became, told, 1024 * (peak - first)))


def _outcome(file: Damaged, encoder: PairTokenizer, folder: Path) -> tuple[str, str]:
    shutil.rmtree(folder, ignore_errors=True)
    rows = folder / "rows"
    for name, content in {**file.beside, file.name: file.content}.items():
        (rows / name).parent.mkdir(parents=True, exist_ok=True)
        (rows / name).write_bytes(content)
    shape = {name: ENUMS[name][value] if name in ENUMS else value for name, value in file.shape.items()}
    on_bad_row = OnBadRow.skip if file.skips else OnBadRow.error
    data = Data(
        path=str(rows if file.beside else rows / file.name),
        tokenize_workers=1,
        on_bad_row=on_bad_row,
        max_bad_share=1.0,
        contradictions=Contradictions.keep,
        max_length=64,
        max_prompt_length=32,
        **shape,
    )
    try:
        store = data.store(encoder, folder / "cache")
        _is_sound(store, data, encoder, file)
        data.choose(store)
    except (BadData, NoTemplate) as error:
        _tells(str(error), file, is_of_a_file=isinstance(error, BadData))
        return type(error).__name__, str(error)
    return "read", ""


def _is_sound(store: TokenizedPairs, data: Data, encoder: PairTokenizer, file: Damaged) -> None:
    """Counts add up, and each pair is one that a model can be trained on."""
    table, counts = store.table, store.counts
    dropped = sum(count for what, count in counts.items() if what.startswith("dropped: "))
    if data.pick is Pick.best_worst:
        assert counts["rows"] == len(table) + dropped, counts
    else:
        assert counts["rows"] <= len(table) + dropped, counts
    assert counts["dropped: bad row"] <= counts["rows"]
    assert counts["dropped: bad row"] == 0 or file.skips
    if file.name in ("x", "x.jsonl", "x.ndjson"):
        lines = file.content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        assert counts["rows"] == sum(1 for line in lines if line.strip())
        assert all(lines[number - 1].strip() for number in store.numbers)
    assert len(set(table.keys.tolist())) == len(table) > 0
    for i, pair in enumerate(table):
        prompt, chosen, rejected = (list(map(int, part)) for part in (pair.prompt, pair.chosen, pair.rejected))
        assert prompt, pair
        assert chosen, pair
        assert rejected or data.format is Format.text, pair
        assert chosen != rejected
        assert len(prompt) <= 32
        assert max(len(chosen), len(rejected)) + len(prompt) <= 64
        assert set(prompt + chosen + rejected) <= set(range(len(encoder.tokenizer)))
        assert file.place in store.where(i)
    assert (np.isnan(table.score_margin) | (np.abs(table.score_margin) < 1e38)).all()


def _tells(error: str, file: Damaged, is_of_a_file: bool) -> None:
    """One line, of a readable length, that names the file, the row where there is one, and what to do."""
    assert error.isprintable(), repr(error)
    assert len(error) < 1000, error
    assert "fix " in error or "type " in error, error
    if is_of_a_file:
        assert file.place in error, error
        if "data.on_bad_row=skip" in error:
            assert not file.skips
            row = file.row(error)
            assert row, error
            if file.name in ("x", "x.jsonl", "x.ndjson"):
                assert file.content.split(b"\n")[row - 1].strip(), error
