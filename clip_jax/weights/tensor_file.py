"""A file of tensors by name: safetensors through the library of that name, PyTorch's archives through archive.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from clip_jax.errors import UserError
from clip_jax.weights import archive
from clip_jax.weights.files import read_json
from clip_jax.weights.unpickle import not_plain

# What safetensors calls the types that NumPy and ml_dtypes hold; the quantised ones mean nothing without their scales.
_PLAIN_TYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}


@dataclass(frozen=True)
class TensorFile:
    """What a file of weights holds.

    Attributes:
      path: where it lies.
      tensors: name -> array in the file's dtype; read-only views of the file where it is a PyTorch archive.
      classes: of a TorchScript archive: module's name -> name of its class; else empty.
    """

    path: Path
    tensors: dict[str, np.ndarray]
    classes: dict[str, str] = field(default_factory=dict)


def read(path: str | Path) -> TensorFile:
    """Read a `.pt`, `.pth`, `.ckpt`, `.bin` or `.safetensors` file; the content decides, not the suffix.

    Raises:
      UserError: no such file, another kind of file, or one that is damaged or hostile.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file at {path}")
    with path.open("rb") as file:
        start = file.read(16)
    if len(start) < 16:
        raise UserError(f"{path} is too short to hold weights ({len(start)} bytes)")
    try:
        if start.startswith(b"PK"):
            return TensorFile(path, *archive.read(path))
        if start[8:9] == b"{":
            return TensorFile(path, _read_safetensors(path))
    except UserError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if start.startswith(b"\x80"):
        raise UserError(
            f"{path} is a bare pickle, as PyTorch before 1.6 wrote, and may run programs where it is loaded: if "
            "torch.load(FILE, weights_only=True) opens it, save the state dict again and read that"
        )
    raise UserError(f"{path} is neither a PyTorch zip archive nor safetensors")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            kinds = {file.get_slice(name).get_dtype() for name in names}
            if kinds <= _PLAIN_TYPES:
                return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, ValueError) as error:  # ValueError is NumPy's, of more than 64 axes
        raise UserError(f"its header does not describe its tensors ({str(error)[:300]})") from error
    raise not_plain(min(kinds - _PLAIN_TYPES))


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write arrays; the metadata says "pt", which transformers asks for."""
    save_file(
        {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, path, metadata={"format": "pt"}
    )


def shards(index: Path) -> list[str]:
    """The names of the files that a `....index.json` spreads its tensors over.

    Raises:
      UserError: it is no index, or names files outside its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} has no weight_map from tensors to files")
    names = sorted(set(map(str, weight_map.values())))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise UserError(f"{index} names files outside its folder: {outside[0]!r}")
    return names
