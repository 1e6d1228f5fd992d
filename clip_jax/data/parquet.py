"""Rows of Parquet files by number: a row group is decoded when one of its rows is read, and kept for its neighbours."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_jax.data import files
from clip_jax.data.bucket import Stream
from clip_jax.data.damage import Damaged, naming
from clip_jax.data.files import File
from clip_jax.data.kept import Kept

MAX_GROUP = 2**31  # bytes of a row group's wanted columns, decoded
CACHED = 2**30  # bytes of decoded row groups that are kept, the one in use apart

Row = dict[str, pa.Scalar]  # the cells of the wanted columns

_MAGIC = b"PAR1"
_BATCH = 1024  # rows that are decoded in one go
_FOOTERS_AT_ONCE = 16
_REFUSALS = (pa.ArrowException, OSError, LookupError, UnicodeDecodeError)  # what damaged files make pyarrow raise


@dataclass(frozen=True)
class Footer:
    """What a Parquet file says of itself.

    Attributes:
      path: of the file.
      schema: its columns.
      groups: the number of rows of each row group.
    """

    path: str
    schema: pa.Schema
    groups: tuple[int, ...]


def read_footers(found: Sequence[File]) -> tuple[list[Footer], tuple[Damaged, ...]]:
    """The footers of Parquet files, read in parallel, and what is wrong with those files that have none."""
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        results = list(pool.map(_read_footer, found))
    good = [result for result in results if isinstance(result, Footer)]
    return good, tuple(result for result in results if isinstance(result, Damaged))


class ParquetRows:
    """The rows of Parquet files, numbered from 0 in the order of the files.

    Safe in threads, of which one decodes a row group while others wait for it; in another process it starts with no
    row group decoded.

    Args:
      footers: of the files.
      columns: those that are wanted; no others are read.

    Attributes:
      file_starts: the number of the first row of each file; last, that of all rows.
      group_size: rows of the largest row group.
    """

    def __init__(self, footers: Sequence[Footer], columns: Sequence[str]):
        self._paths = [footer.path for footer in footers]
        self._columns = list(columns)
        sizes = np.array([rows for footer in footers for rows in footer.groups], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._files = np.repeat(np.arange(len(footers)), [len(footer.groups) for footer in footers])
        self._first_group = np.searchsorted(self._files, np.arange(len(footers) + 1))
        self.file_starts = self._starts[self._first_group]
        self._decoded = Kept(self._decode, CACHED, _size)
        self.group_size = int(sizes.max(initial=0))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Row:
        group = self._group_of(index)
        table, inside = self._decoded[group], index - int(self._starts[group])
        return {name: table.column(name)[inside] for name in self._columns}

    def where(self, index: int) -> tuple[str, int]:
        """The file of a row, and its number there, from 0."""
        file = self._files[self._group_of(index)]
        return self._paths[file], index - int(self.file_starts[file])

    def distinct(self, column: str) -> list[Any]:
        """The values of a column, which is read whole."""
        values = set()
        for path in self._paths:
            with naming(path), _opened(path) as source:
                values.update(pq.read_table(source, columns=[column]).column(0).unique().to_pylist())
        return list(values)

    def group_bytes(self, index: int) -> int:
        """The memory that the row group of a row takes."""
        return self._decoded[self._group_of(index)].nbytes

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, "right")) - 1

    def _decode(self, group: int) -> pa.Table:
        """The wanted columns of a row group."""
        file = self._files[group]
        path, number = self._paths[file], int(group - self._first_group[file])
        expected = int(self._starts[group + 1] - self._starts[group])
        with naming(f"{path}, row group {number}"), _opened(path) as source:
            try:
                batches = list(_batches(source, number, self._columns))
            except _REFUSALS as error:
                raise Damaged("unreadable", f"{type(error).__name__}: {error}") from error
            rows = sum(batch.num_rows for batch in batches)
            if rows != expected or not {*self._columns} <= {*batches[0].schema.names}:
                raise Damaged("cut", f"expected {expected} rows of {', '.join(self._columns)}, got {rows}")
            return pa.Table.from_batches(batches)


def _size(table: pa.Table) -> int:
    return table.nbytes


def _read_footer(file: File) -> Footer | Damaged:
    try:
        with naming(file.path):
            return Footer(file.path, *_contents(file))
    except Damaged as error:
        return error


def _contents(file: File) -> tuple[pa.Schema, tuple[int, ...]]:
    if files.read(file.path, 0, len(_MAGIC)) != _MAGIC:
        raise Damaged("header" if file.size else "cut", "it is not a Parquet file" if file.size else "it is empty")
    if file.size < 12 or files.read(file.path, file.size - len(_MAGIC), len(_MAGIC)) != _MAGIC:
        raise Damaged("cut", f"it ends after {file.size} bytes without a footer")
    try:
        with _opened(file.path) as source:
            meta = pq.read_metadata(source)
            groups = tuple(meta.row_group(number).num_rows for number in range(meta.num_row_groups))
            schema = meta.schema.to_arrow_schema()
            schema.names  # noqa: B018  (decodes them)
    except _REFUSALS as error:
        raise Damaged("header", f"its footer is damaged: {error}") from error
    if any(rows < 0 for rows in groups) or sum(groups) != meta.num_rows or meta.num_rows >= 2**48:
        raise Damaged("header", "its footer is damaged: the numbers of rows do not add up")
    return schema, groups


def _opened(path: str) -> pa.NativeFile:
    return pa.PythonFile(Stream(path), "r") if files.is_remote(path) else pa.OSFile(path)


def _batches(source: pa.NativeFile, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The wanted columns of a row group, piece by piece, so that it is noticed early when they grow beyond bounds."""
    meta = pq.read_metadata(source)
    # Texts and bytes that refer to a dictionary are kept so in memory, where copies of one value could fill it.
    leaves = [meta.schema.column(number) for number in range(meta.num_columns)]
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    reader = pq.ParquetFile(source, metadata=meta, read_dictionary=texts, page_checksum_verification=True)
    room = MAX_GROUP
    for batch in reader.iter_batches(_BATCH, row_groups=[group], columns=columns, use_threads=False):
        room -= batch.nbytes
        if room < 0:
            raise Damaged(
                "too_large",
                f"it holds over {MAX_GROUP / 2**30:.0f} GiB in {', '.join(columns)}: write the file with fewer rows in "
                "a row group",
            )
        yield batch
