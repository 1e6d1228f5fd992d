"""A pickle machine that can only build tensors: the part of PyTorch's files that pickle describes.

Python's own unpickler runs whatever the file names, and allocates whatever the file asks for. This one decodes the
opcodes with `pickletools` and knows the twenty-odd that PyTorch writes, a few functions by name, and nothing else.
TorchScript's classes (`__torch__...`) become `Module`s, inert records of attributes; their code is never read. What
training scripts keep beside the weights (`argparse.Namespace` and its like) becomes `Ignored`, never made nor called.
"""

import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from clip_jax.errors import UserError

MAX_PICKLE_BYTES = 4 * 2**20  # RN50x64's is a quarter of a megabyte
_MAX_DIMENSIONS = 8

STORAGE_DTYPES = {
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
    "torch.storage.UntypedStorage": np.dtype("u1"),  # of the types that have no class above
}

# What checkpoints hold beside tensors, and no weights need: settings, paths, the best metric so far.
_IGNORED = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|pathlib\.(_local\.)?\w*Path|collections\.(defaultdict|Counter)"
    r"|(__builtin__|builtins)\.(int|long|float|bool|str|list|tuple|dict|set|frozenset|complex|bytearray)|_codecs\.encode"
    r"|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray)|torch\.(device|Size|\w*int\d+|b?float\d\w*|bool)"
    r"|(pytorch_lightning|lightning|lightning_fabric)\.[\w.]*\.AttributeDict"
)

# (key, dtype, number of elements) -> the storage as a one-dimensional array.
StorageReader = Callable[[str, np.dtype, int], np.ndarray]


@dataclass
class Module:
    """An object of a TorchScript archive: its class name, without PyTorch's mangling, and its attributes."""

    class_name: str
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ignored:
    """In place of an object that no weights need; whatever is put into it is dropped."""


@dataclass(frozen=True)
class _Global:
    name: str


def not_plain(kind: str) -> UserError:
    """The error for tensors of a type that is not a plain number, such as float8."""
    return UserError(
        f"it holds tensors of type {kind}; save the model in float32, float16 or bfloat16, quantised weights with "
        "their scales applied"
    )


def unpickle(data: bytes, read_storage: StorageReader) -> Any:
    """The object that `data` describes: dicts, lists, tuples, numbers, strings, arrays and Modules.

    Raises:
      UserError: the pickle is damaged, or asks for anything else.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise UserError(f"its pickle of {len(data)} bytes is larger than the {MAX_PICKLE_BYTES} that CLIP can need")
    machine = _Machine(read_storage)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
        return machine.pop()
    except UserError:
        raise
    except Exception as error:
        # Nothing but this machine and pickletools' decoder runs above, so any exception means a malformed pickle.
        raise UserError(f"its pickle is damaged ({type(error).__name__}: {error})") from error


class _Machine:
    """The stack, the memo, and one step of the pickle language."""

    def __init__(self, read_storage: StorageReader):
        self.read_storage = read_storage
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise UserError("its pickle is damaged (it takes more than it put)")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def step(self, opcode: str, argument: Any) -> None:
        push = self.stack.append
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                push(argument)
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(opcode == "NEWTRUE")
            case "EMPTY_DICT":
                push({})
            case "EMPTY_LIST":
                push([])
            case "EMPTY_TUPLE":
                push(())
            case "MARK":
                self.marks.append(len(self.stack))
            case "TUPLE":
                push(tuple(self.pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(reversed([self.pop() for _ in range(int(opcode[-1]))])))
            case "APPEND":
                self.extend([self.pop()])
            case "APPENDS":
                self.extend(self.pop_to_mark())
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.pop_to_mark())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "GLOBAL":
                push(_checked_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                if not isinstance(name, str) or not isinstance(module, str):
                    raise UserError("its pickle asks for a name that is not a string")
                push(_checked_global(module, name))
            case "BINPERSID":
                push(self.storage(self.pop()))
            case "REDUCE":
                arguments, function = self.pop(), self.pop()
                push(_call(function, arguments))
            case "NEWOBJ":
                arguments, cls = self.pop(), self.pop()
                push(_new_object(cls, arguments))
            case "BUILD":
                state = self.pop()
                _set_state(self.stack[-1], state)
            case _:
                raise UserError(f"its pickle uses the opcode {opcode}, which no file of weights needs")

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Ignored):
            return
        if not isinstance(target, list):
            raise UserError("its pickle appends to something that is not a list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Ignored):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise UserError("its pickle sets items of something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise UserError(f"its pickle has a dict key of type {type(key).__name__}")
            target[key] = value

    def storage(self, identity: Any) -> np.ndarray:
        kind, storage_class, key, _location, size = identity
        dtype = STORAGE_DTYPES.get(storage_class.name) if isinstance(storage_class, _Global) else None
        if kind != "storage" or dtype is None or not isinstance(key, str) or type(size) is not int:
            raise UserError(f"its pickle names a storage that is not one: {_shown(storage_class)}")
        return self.read_storage(key, dtype, size)


def _checked_global(module: str, name: str) -> _Global:
    full = f"{module}.{name}"
    if full in _FUNCTIONS or full in STORAGE_DTYPES or module.startswith("__torch__.") or _IGNORED.fullmatch(full):
        return _Global(full)
    raise UserError(
        f"its pickle asks for {full[:200]!r}, which no weights need; nothing was executed. If "
        "torch.load(FILE, weights_only=True) accepts it, save the state dict alone and read that"
    )


def _call(function: Any, arguments: Any) -> Any:
    if _is_ignored(function):
        return Ignored()
    if not isinstance(function, _Global) or function.name not in _FUNCTIONS:
        raise UserError(f"its pickle calls something that is not a function: {_shown(function)}")
    return _FUNCTIONS[function.name](*arguments)


def _is_ignored(value: Any) -> bool:
    return isinstance(value, _Global) and _IGNORED.fullmatch(value.name) is not None


def _shown(value: Any) -> str:
    # Never the value itself: a few memoised tuples of each other are longer than any memory when printed.
    return value.name[:200] if isinstance(value, _Global) else f"a {type(value).__name__}"


def _new_object(cls: Any, arguments: Any) -> Module | Ignored:
    if _is_ignored(cls):
        return Ignored()
    if not isinstance(cls, _Global) or not cls.name.startswith("__torch__.") or arguments != ():
        raise UserError(f"its pickle builds an object of {_shown(cls)}")
    return Module(cls.name.rpartition(".")[2])


def _set_state(target: Any, state: Any) -> None:
    if isinstance(target, Module) and isinstance(state, dict):
        target.attributes = state
    elif not isinstance(
        target, dict | Ignored
    ):  # on an OrderedDict it is the `_metadata` of state_dict(), of no use here
        raise UserError(f"its pickle sets the state of a {type(target).__name__}")


def _rebuild_tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_unused: Any) -> np.ndarray:
    """torch._utils._rebuild_tensor_v2: a strided view of a storage."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, np.ndarray) or storage.ndim != 1:
        raise UserError("its pickle makes a tensor of something that is not a storage")
    if any(type(n) is not int for n in numbers):
        raise UserError("a tensor has an offset, size or stride that is not a whole number")
    if not len(size) == len(stride) <= _MAX_DIMENSIONS or any(not 0 <= n < 2**48 for n in numbers):
        raise UserError(f"a tensor has impossible offset, size and stride: {offset}, {size}, {stride}"[:300])
    elements = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if elements and (last >= storage.size or elements > storage.size):
        raise UserError(
            f"a tensor of size {size}, stride {stride} and offset {offset} does not fit in its storage of "
            f"{storage.size} elements"
        )
    if not elements:
        return np.empty(size, storage.dtype)
    strides = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _rebuild_tensor_of_type(*arguments: Any) -> np.ndarray:
    """torch._utils._rebuild_tensor_v3, for the types that have no storage class: (storage, ..., dtype, metadata)."""
    raise not_plain(_shown(arguments[6]))


def _rebuild_parameter(tensor: np.ndarray, *_unused: Any) -> np.ndarray:
    return tensor


def _ordered_dict(*arguments: Any) -> dict:
    if arguments:
        raise UserError("its pickle makes an OrderedDict with arguments")
    return {}


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_of_type,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "collections.OrderedDict": _ordered_dict,
}
