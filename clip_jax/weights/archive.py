"""PyTorch's zip archives (state dicts, training checkpoints and TorchScript) without PyTorch, which no library reads.

Reading gives views of the memory-mapped file. Every size is checked against the file before anything is allocated,
the entries are checked against their CRC-32, and no code in the file is ever executed.
"""

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.errors import UserError
from clip_jax.weights.unpickle import MAX_PICKLE_BYTES, Module, unpickle

_MAX_MODULE_DEPTH = 32
_MAX_NAME = 1000  # characters; a long name of a module would be repeated in every tensor's
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")  # where training checkpoints keep the weights


class _ZipEntries:
    """The stored entries of a PyTorch archive, as views of the file.

    PyTorch never compresses tensors, so a compressed entry is refused, and with it every zip bomb.
    """

    def __init__(self, path: Path):
        self.data = np.memmap(path, np.uint8, mode="r")
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


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors, classes) of an archive, as `tensor_file.TensorFile` describes them.

    Raises:
      UserError: it is damaged, hostile, or holds no tensors by name.
    """
    entries = _ZipEntries(path)
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
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * entries.data.size:
        raise UserError("its tensors overlap: together they are larger than twice the file")
    return tensors, classes


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
