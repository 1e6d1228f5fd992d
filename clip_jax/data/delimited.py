"""Rows of CSV and TSV files by number, held in memory."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.csv

from clip_jax.data import files
from clip_jax.data.damage import Damaged, naming
from clip_jax.data.files import File
from clip_jax.data.parquet import Row

_LONGEST_ROW = 2**24  # bytes
_LONGEST_HEADER = 2**16


@dataclass(frozen=True)
class _Part:
    """The rows of one file; `numbers` are their places in it, the header's being 1."""

    path: str
    table: pa.Table
    numbers: Sequence[int]


class CsvRows:
    """The rows of CSV files, numbered from 0 in the order of the files.

    A file is read whole when it is opened; only the wanted columns stay in memory: a million rows with paths of 40
    bytes and captions of 60 take 107 MB (and a second to read).

    Args:
      found: the files. Cells are divided by commas, in files named .tsv or with a header of tabs and no comma by tabs;
        cells in quotes may hold both, quotes (doubled) and line breaks.
      columns: those that are wanted.

    Attributes:
      damage: rows of another number of cells, which are left out, and files that cannot be read.
    """

    def __init__(self, found: Sequence[File], columns: Sequence[str]):
        self._columns = list(columns)
        self._parts: list[_Part] = []
        damage: list[Damaged] = []
        for file in found:
            try:
                with naming(file.path):
                    self._parts.append(_read(file, self._columns, damage))
            except Damaged as error:
                damage.append(error)
        self.damage = tuple(damage)
        self._starts = [0]
        for part in self._parts:
            self._starts.append(self._starts[-1] + part.table.num_rows)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Row:
        part, inside = self._located(index)
        return {name: part.table.column(name)[inside] for name in self._columns}

    def where(self, index: int) -> tuple[str, int]:
        """The file of a row, and its number there, the header's being 1."""
        part, inside = self._located(index)
        return part.path, part.numbers[inside]

    def distinct(self, column: str) -> list[Any]:
        """The values of a column."""
        return list({value for part in self._parts for value in part.table.column(column).unique().to_pylist()})

    def _located(self, index: int) -> tuple[_Part, int]:
        number = bisect_right(self._starts, index) - 1
        return self._parts[number], index - self._starts[number]


def read_header(path: str) -> list[str]:
    """The names of a file's columns.

    Raises:
      Damaged: it has none.
    """
    try:
        with pa.csv.open_csv(_opened(path), **_options(path, [])) as reader:
            return reader.schema.names
    except pa.ArrowException as error:
        raise Damaged("header", f"it has no header with the names of columns: {error}") from error


def _read(file: File, columns: list[str], damage: list[Damaged]) -> _Part:
    """The wanted columns of a file; adds to `damage` what rows are left out."""
    path = file.path
    names = read_header(path)
    if missing := [name for name in columns if name not in names]:
        raise Damaged("unreadable", f"it has no column {missing[0]!r}, which the first file has")
    left_out: list[int] = []

    def leave_out(row: pa.csv.InvalidRow) -> str:
        what = f"expected {row.expected_columns} cells, got {row.actual_columns}"
        damage.append(Damaged("unreadable", f"{path}, row {row.number}: {what}"))
        left_out.append(row.number)
        return "skip"

    try:
        table = pa.csv.read_csv(_opened(path), **_options(path, [*columns, names[-1]], leave_out))
    except pa.ArrowException as error:
        raise Damaged("unreadable", str(error)) from error
    numbers = range(2, table.num_rows + 2)
    if left_out:
        missing = set(left_out)
        numbers = [number for number in range(2, table.num_rows + len(missing) + 2) if number not in missing]
    if _ends_in_quotes(file, table.column(names[-1])):
        raise Damaged("cut", f"row {numbers[-1]}: a quote opens and is never closed")
    return _Part(path, table.select(columns), numbers)


def _options(path: str, columns: list[str], leave_out: Any = lambda row: "skip") -> dict[str, Any]:
    text = {name: pa.string() for name in columns}
    return {
        # With threads, rows that are left out would have no numbers.
        "read_options": pa.csv.ReadOptions(use_threads=False, block_size=_LONGEST_ROW),
        "parse_options": pa.csv.ParseOptions(
            delimiter=_separator(path), newlines_in_values=True, invalid_row_handler=leave_out
        ),
        # What is not UTF-8 is damage of its row, found when that is read.
        "convert_options": pa.csv.ConvertOptions(
            check_utf8=False, include_columns=list(dict.fromkeys(columns)), column_types=text, strings_can_be_null=False
        ),
    }


def _separator(path: str) -> str:
    header = files.read(path, 0, _LONGEST_HEADER).partition(b"\n")[0]
    is_tabs = path.lower().endswith(".tsv") or (b"\t" in header and b"," not in header)
    return "\t" if is_tabs else ","


def _ends_in_quotes(file: File, last_column: pa.ChunkedArray) -> bool:
    """Whether a quote is open where the file ends, so that the last cell has swallowed what should be rows."""
    if not len(last_column) or b"\n" not in last_column[-1].as_buffer().to_pybytes():
        return False
    return not files.read(file.path, max(0, file.size - 4), 4).rstrip(b"\r\n").endswith(b'"')


def _opened(path: str) -> pa.NativeFile:
    if not files.is_remote(path):
        return pa.OSFile(path)
    return pa.BufferReader(files.read(path))
