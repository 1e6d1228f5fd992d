"""State dicts for `torch.load`, written without PyTorch."""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}


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
