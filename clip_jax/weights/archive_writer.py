"""Writing what archive.py reads, again without PyTorch: state dicts for `torch.load`, and safetensors."""

import json
import os
import shutil
import struct
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.errors import UserError

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}
_SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "int64": "I64"}


@contextmanager
def appears_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` for a file or a folder, which takes the final name only when complete.

    Raises:
      UserError: `path` exists already, or cannot be written.
    """
    if path.exists():
        raise UserError(f"{path} exists already; remove it or choose another name")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.rename(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        elif temporary.exists():
            temporary.unlink()


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(values, indent=2) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write float32, float16 and int64 arrays; the metadata says "pt", which transformers asks for."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    # The widest types first keep every tensor aligned, as the safetensors library does.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    for name, tensor in ordered:
        offsets = [position, position + tensor.nbytes]
        kind = _SAFETENSORS_NAMES[tensor.dtype.name]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            file.write(_little_endian_bytes(tensor))


def write_state_dict(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write what `torch.load(path, weights_only=True)` reads as a dict of contiguous tensors."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickled(tensors))
        archive.writestr("archive/byteorder", "little")
        for index, tensor in enumerate(tensors.values()):
            with archive.open(f"archive/data/{index}", "w", force_zip64=True) as entry:
                entry.write(_little_endian_bytes(tensor))
        archive.writestr("archive/version", "3\n")


def _little_endian_bytes(tensor: np.ndarray) -> memoryview:
    contiguous = np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<"))
    return memoryview(contiguous.reshape(-1).view(np.uint8))


def _pickled(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The protocol 2 pickle of {name: torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, {})}."""
    items = [
        _text(name)
        + b"ctorch._utils\n_rebuild_tensor_v2\n("  # GLOBAL, MARK
        + b"("
        + _text("storage")
        + f"ctorch\n{_STORAGES[tensor.dtype.name]}\n".encode()
        + _text(str(index))
        + _text("cpu")
        + _integer(tensor.size)
        + b"tQ"  # TUPLE, BINPERSID: the storage
        + _integer(0)
        + _integers(tensor.shape)
        + _integers(tuple(int(np.prod(tensor.shape[axis + 1 :])) for axis in range(tensor.ndim)))
        + b"\x89ccollections\nOrderedDict\n)RtR"  # NEWFALSE, no hooks, TUPLE, REDUCE
        for index, (name, tensor) in enumerate(tensors.items())
    ]
    return b"\x80\x02}(" + b"".join(items) + b"u."  # PROTO 2, EMPTY_DICT, MARK, ..., SETITEMS, STOP


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded  # BINUNICODE


def _integer(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)  # LONG1 of 8 bytes


def _integers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
