"""`parquet` and `csv`: tables whose rows hold a caption, and an image or the path of one."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from clip_jax.data import files
from clip_jax.data.checked import MAX_BYTES, decoded_captions, read_file
from clip_jax.data.damage import Damaged, naming
from clip_jax.data.delimited import CsvRows, read_header
from clip_jax.data.example import Example
from clip_jax.data.files import File
from clip_jax.data.order import Windows
from clip_jax.data.parquet import CACHED, ParquetRows, Row, read_footers
from clip_jax.errors import UserError

logger = logging.getLogger(__name__)

# What is taken where a configuration names no column, in capitals or not.
_IMAGES = ("image", "jpg", "png", "path", "filepath", "image_path", "file_name")
_CAPTIONS = ("caption", "captions", "text", "title")
_BUCKETS = ("gs", "s3")


@dataclass(frozen=True)
class Columns:
    """Which columns hold images, captions and labels; "" is for the usual name, or none."""

    image: str = ""
    caption: str = ""
    label: str = ""

    def found_in(self, names: Sequence[str], where: str) -> "Columns":
        """The same, with the usual names where there are such columns.

        Raises:
          UserError: a column is missing; the message lists those there are.
        """
        for wanted in filter(None, (self.image, self.caption, self.label)):
            if wanted not in names:
                raise UserError(f"{where} has no column {wanted!r}; it has {_shown(names)}")
        image, caption = self.image or _usual(names, _IMAGES), self.caption or _usual(names, _CAPTIONS)
        if not image and _usual(names, ("url",)):
            raise UserError(
                f"{where} has addresses of images in its column {_usual(names, ('url',))}, not images: fetch them "
                "first, for example with img2dataset, and read the shards that it writes"
            )
        if not image:
            raise UserError(
                f"{where} has no column with images that is called {' or '.join(_IMAGES)}: name it in "
                f"image_column; it has {_shown(names)}"
            )
        if not caption and not self.label:
            raise UserError(
                f"{where} has no column with captions that is called {' or '.join(_CAPTIONS)}: name it in "
                f"caption_column; it has {_shown(names)}"
            )
        chosen = Columns(image, caption, self.label)
        if twice := [name for name in chosen.used() if list(names).count(name) > 1]:
            raise UserError(f"{where} has several columns {twice[0]!r}")
        return chosen

    def used(self) -> list[str]:
        """The columns that are read."""
        return list(dict.fromkeys(filter(None, (self.image, self.caption, self.label))))


@runtime_checkable
class Rows(Protocol):
    """The rows of one or several files."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def where(self, index: int) -> tuple[str, int]: ...

    def distinct(self, column: str) -> list[Any]: ...


class Table:
    """The rows of tables as examples.

    An image is a cell's bytes, or the file that its text names: relative to the table's folder, absolute, or in a
    bucket. Hugging Face's cells `{bytes, path}` are both. A cell with a list of texts holds several captions.

    Args:
      name: what messages call it.
      rows: of all files.
      columns: what is what.
      damage: what was found when the files were opened.
      windows: how its examples are shuffled; None mixes all of them.

    Attributes:
      class_names: the texts of the label column in alphabetical order; empty where labels are whole numbers.
    """

    def __init__(
        self, name: str, rows: Rows, columns: Columns, damage: tuple[Damaged, ...], windows: Windows | None = None
    ):
        if not len(rows):
            raise UserError(f"{name} has no row" + (f"; {damage[0]}" if damage else ""))
        self.name, self.damage, self.windows = name, damage, windows
        self._rows, self._columns = rows, columns
        self.class_names = _class_names(rows, columns.label) if columns.label else ()
        self._labels = {name: number for number, name in enumerate(self.class_names)}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[index]
        image = self._image(row, self._rows.where(index)[0])
        return Example(image, self._captions(row), self._label(row), key=self.where(index))

    def where(self, index: int) -> str:
        """The file that an example is in, and its row there."""
        path, number = self._rows.where(index)
        return f"{path}, row {number}"

    def _image(self, row: Row, table: str) -> bytes:
        cell = _value(row, self._columns.image, "image")
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        if not cell or not isinstance(cell, bytes | str):
            raise Damaged("image", f"expected bytes or a path in {self._columns.image}, got {cell!r:.40}")
        if isinstance(cell, str):
            return read_file(_located(cell, table), "image")
        if len(cell) > MAX_BYTES:
            raise Damaged("too_large", f"the image has over {MAX_BYTES} bytes")
        return cell

    def _captions(self, row: Row) -> tuple[str, ...]:
        if not self._columns.caption:
            return ()
        cell = _value(row, self._columns.caption, "caption")
        values = cell if isinstance(cell, list) else [cell]
        if not all(isinstance(value, str | bytes | None) for value in values):
            raise Damaged("caption", f"expected text in {self._columns.caption}, got {cell!r:.40}")
        captions = decoded_captions(values)
        if not captions:
            raise Damaged("caption", f"the caption, {self._columns.caption}, is empty")
        return captions

    def _label(self, row: Row) -> int | None:
        if not self._columns.label:
            return None
        cell = _value(row, self._columns.label, "unreadable")
        if cell in (None, ""):
            return None
        try:
            return self._labels[cell] if self._labels else int(cell)
        except (KeyError, ValueError, TypeError) as error:
            raise Damaged("unreadable", f"{self._columns.label}: {cell!r:.40} is no label") from error


def open_parquet(path: str, columns: Columns, window: int, lanes: int) -> Table:
    """The rows of Parquet files, shuffled in blocks of the size of a row group.

    Args:
      path: a pattern, see `files.find`.
      columns: what is what.
      window: blocks whose rows are mixed.
      lanes: parts of a batch that read blocks of their own.

    Raises:
      UserError: no file is found or none can be read, or a column is missing.
    """
    footers, damage = read_footers(files.find(path))
    if not footers:
        raise damage[0]
    columns = columns.found_in(footers[0].schema.names, footers[0].path)
    whole = [footer for footer in footers if {*columns.used()} <= {*footer.schema.names}]
    lacking = [
        Damaged("unreadable", f"{footer.path} has not the columns of {footers[0].path}: {_shown(columns.used())}")
        for footer in footers
        if footer not in whole
    ]
    rows = ParquetRows(whole, columns.used())
    windows = Windows(max(1, rows.group_size), window, lanes)
    _warn_of_large_groups(path, rows, window * lanes)
    return Table(path, rows, columns, (*damage, *lacking), windows)


def open_csv(path: str, columns: Columns) -> Table:
    """The rows of CSV or TSV files, read into memory.

    Args:
      path: a pattern, see `files.find`.
      columns: what is what.

    Raises:
      UserError: no file is found or none can be read, or a column is missing.
    """
    found = files.find(path)
    columns = columns.found_in(*_first_header(found))
    rows = CsvRows(found, columns.used())
    return Table(path, rows, columns, rows.damage)


def _warn_of_large_groups(path: str, rows: ParquetRows, count: int) -> None:
    """Say when the row groups that are in use at a time are more than are kept."""
    with suppress(Damaged):
        size = rows.group_bytes(0) if len(rows) > count * rows.group_size else 0
        if size * count > CACHED:
            logger.warning(
                "%s: a row group takes %.0f MiB, window * lanes = %d of them are in use at a time, and %.0f MiB are "
                "kept, so that they are decoded again and again: write the files with fewer rows in a row group, or "
                "lower window or lanes",
                path,
                size / 2**20,
                count,
                CACHED / 2**20,
            )


def _first_header(found: Sequence[File]) -> tuple[list[str], str]:
    """The columns of the first file that has any, and its path."""
    for file in found:
        try:
            with naming(file.path):
                return read_header(file.path), file.path
        except Damaged as error:
            damage = error
    raise damage


def _class_names(rows: Rows, column: str) -> tuple[str, ...]:
    values = [value for value in rows.distinct(column) if value not in (None, "")]
    are_numbers = all(isinstance(value, int) or (isinstance(value, str) and value.isdecimal()) for value in values)
    return () if are_numbers else tuple(sorted(map(str, values)))


def _value(row: Row, column: str, reason: str) -> Any:
    """A cell as Python's value."""
    try:
        return row[column].as_py()
    except UnicodeDecodeError as error:
        raise Damaged(reason, f"{column} is not UTF-8 text (byte {error.start})") from error
    except pa.ArrowException as error:  # it refers to what the file does not hold
        raise Damaged(reason, f"{column} is damaged: {error}") from error


def _located(path: str, table: str) -> str:
    """Where the image lies that a cell names. A cell may not send the reader to any address it likes."""
    scheme, is_url, _ = path.partition("://")
    if is_url and scheme not in (*_BUCKETS, table.partition("://")[0]):
        raise Damaged(
            "image",
            f"{path:.200} is not in a bucket ({', '.join(_BUCKETS)}): fetch images from the web first, for example "
            "with img2dataset",
        )
    return files.join(files.parent(table), path)


def _usual(names: Sequence[str], usual: Sequence[str]) -> str:
    """The first of the usual names that a column has, as the column spells it; "" without one."""
    spelled = {name.lower(): name for name in reversed(names)}
    return next((spelled[name] for name in usual if name in spelled), "")


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names)[:400]
