"""Files of tensors without PyTorch: its zip archives (state dicts and TorchScript) and safetensors.

Reading gives views of the memory-mapped file. Every size is checked against the file before anything is allocated,
entries of zip archives are checked against their CRC-32, and no code in the file is ever executed.
"""

import json
import math
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from clip_jax.errors import UserError
from clip_jax.weights.unpickle import MAX_PICKLE_BYTES, Module, unpickle

MAX_HEADER_BYTES = 16 * 2**20  # of safetensors; CLIP's are a tenth of a megabyte
_MAX_MODULE_DEPTH = 32
_MAX_NAME = 1000  # characters; a long name of a module would be repeated in every tensor's
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")  # where training checkpoints keep the weights
_SAFETENSORS_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


@dataclass(frozen=True)
class TensorFile:
    """What a file of weights holds.

    Attributes:
      path: where it lies.
      tensors: name -> read-only view of the file, in the file's dtype.
      classes: of a TorchScript archive: module's name -> name of its class; else empty.
    """

    path: Path
    tensors: dict[str, np.ndarray]
    classes: dict[str, str] = field(default_factory=dict)


def read(path: str | Path) -> TensorFile:
    """Read a `.pt`, `.pth`, `.bin` or `.safetensors` file; the content decides, not the suffix.

    Raises:
      UserError: no such file, another kind of file, or one that is damaged or hostile.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file at {path}")
    if path.stat().st_size < 16:
        raise UserError(f"{path} is too short to hold weights ({path.stat().st_size} bytes)")
    data = np.memmap(path, np.uint8, mode="r")
    start = data[:16].tobytes()
    try:
        if start.startswith(b"PK"):
            return _read_zip(path, data)
        if start[8:9] == b"{":
            return TensorFile(path, _read_safetensors(data))
    except UserError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    hint = "; PyTorch before 1.6 wrote it: load it there and save it again" if start[:1] == b"\x80" else ""
    raise UserError(f"{path} is neither a PyTorch zip archive nor safetensors{hint}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: no such file, too large for a configuration, or not a JSON object.
    """
    if not path.is_file() or path.stat().st_size > MAX_HEADER_BYTES:
        raise UserError(f"expected a small JSON file at {path}")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


class _ZipEntries:
    """The stored entries of a PyTorch archive, as views of the file.

    PyTorch never compresses tensors, so a compressed entry is refused, and with it every zip bomb.
    """

    def __init__(self, path: Path, data: np.ndarray):
        self.data = data
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except Exception as error:
            # zipfile raises half a dozen built-in types on malformed directories; it does nothing but parse here.
            raise UserError(f"its zip directory is damaged ({type(error).__name__}: {error})") from error
        names = [entry.filename for entry in entries]
        if len(set(names)) != len(names):
            raise UserError("two zip entries have the same name")
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError("it is a zip archive without PyTorch's data.pkl")
        self.root = pickles[0].removesuffix("data.pkl")
        for name in names:
            if not name.startswith(self.root) or ".." in name.split("/"):
                raise UserError(f"the zip entry {name[:200]!r} lies outside {self.root!r}")
        self.entries = {entry.filename.removeprefix(self.root): entry for entry in entries}

    def read(self, name: str) -> np.ndarray:
        entry = self.entries.get(name)
        if entry is None:
            raise UserError(f"it has no entry {name[:200]!r}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise UserError(f"the entry {name!r} is compressed or encrypted; PyTorch stores tensors as they are")
        header = self.data[entry.header_offset : entry.header_offset + 30].tobytes()
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise UserError(f"the entry {name!r} has no header at offset {entry.header_offset}")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if entry.file_size != entry.compress_size or start + entry.file_size > self.data.size:
            raise UserError(f"the entry {name!r} of {entry.file_size} bytes does not fit in the file")
        content = self.data[start : start + entry.file_size]
        if zlib.crc32(content) != entry.CRC:
            raise UserError(f"the entry {name!r} at offset {start} is corrupt: its CRC-32 does not match")
        return content


def _read_zip(path: Path, data: np.ndarray) -> TensorFile:
    entries = _ZipEntries(path, data)
    if "byteorder" in entries.entries and entries.read("byteorder").tobytes() != b"little":
        raise UserError("it was written on a big-endian machine")
    storages: dict[str, np.ndarray] = {}

    def read_storage(key: str, dtype: np.dtype, size: int) -> np.ndarray:
        if key not in storages:
            storages[key] = entries.read(f"data/{key}")
        content = storages[key]
        if size < 0 or size * dtype.itemsize != content.size:
            raise UserError(f"storage {key[:200]!r} claims {size} elements of {dtype}, but has {content.size} bytes")
        return content.view(dtype)

    pickled = entries.read("data.pkl")
    if pickled.size > MAX_PICKLE_BYTES:
        raise UserError(f"its data.pkl is larger than {MAX_PICKLE_BYTES} bytes")
    root = unpickle(pickled.tobytes(), read_storage)
    tensors, classes = _flatten(root)
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * data.size:
        raise UserError("its tensors overlap: together they are larger than twice the file")
    return TensorFile(path, tensors, classes)


def _flatten(root: Any) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors, classes) of a state dict, a training checkpoint around one, or a TorchScript module."""
    if isinstance(root, dict):
        inner = next((root[key] for key in _STATE_DICT_KEYS if isinstance(root.get(key), dict | Module)), root)
        if isinstance(inner, dict):
            return {str(k): v for k, v in inner.items() if isinstance(v, np.ndarray)}, {}
        root = inner
    if not isinstance(root, Module):
        raise UserError(f"it holds a {type(root).__name__}, not a state dict or a TorchScript module")
    tensors, classes, seen = {}, {}, set()
    pending = [((), root)]
    while pending:
        names, module = pending.pop()
        if id(module) in seen or len(names) > _MAX_MODULE_DEPTH:
            raise UserError(f"its modules form no tree, or one too deep, at {'.'.join(names)[:200]!r}")
        seen.add(id(module))
        classes[".".join(names)] = module.class_name
        for name, value in module.attributes.items():
            path = (*names, str(name))
            if sum(map(len, path)) > _MAX_NAME:
                raise UserError(f"a name in it is longer than {_MAX_NAME} characters: {str(name)[:100]!r}...")
            if isinstance(value, np.ndarray):
                tensors[".".join(path)] = value
            elif isinstance(value, Module):
                pending.append((path, value))
    return tensors, classes


def _read_safetensors(data: np.ndarray) -> dict[str, np.ndarray]:
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(MAX_HEADER_BYTES, data.size - 8):
        raise UserError(f"its header claims {length} bytes, in a file of {data.size} (at most {MAX_HEADER_BYTES})")
    try:
        header = json.loads(data[8 : 8 + length].tobytes(), object_pairs_hook=_unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"its header is not JSON ({error})") from error
    content = data[8 + length :]
    tensors, ranges = {}, []
    for name, entry in header.items() if isinstance(header, dict) else [("", None)]:
        if name != "__metadata__":
            dtype, shape, begin, end = _checked_entry(name, entry, content.size)
            tensors[name] = content[begin:end].view(dtype).reshape(shape)
            ranges.append((begin, end))
    position = 0
    for begin, end in sorted(ranges):
        if begin != position:
            raise UserError(f"its tensors overlap or leave a hole at offset {8 + length + min(begin, position)}")
        position = end
    if position != content.size:
        raise UserError(f"its tensors end at offset {8 + length + position} of {data.size}")
    return tensors


def _checked_entry(name: str, entry: Any, available: int) -> tuple[np.dtype, tuple[int, ...], int, int]:
    try:
        dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"its header describes {name[:200]!r} wrongly ({type(error).__name__}: {error})") from error
    numbers = (*shape, begin, end)
    whole = all(type(n) is int and 0 <= n < 2**63 for n in numbers) and len(shape) <= 8
    if not whole or not begin <= end <= available or end - begin != math.prod(shape) * dtype.itemsize:
        raise UserError(f"its header puts {name[:200]!r}, {str(shape)[:100]}, at impossible offsets {begin} to {end}")
    return dtype, shape, begin, end


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise UserError("a name appears twice in its header")
    return dict(pairs)
