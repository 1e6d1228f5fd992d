"""A digest of an array that does not depend on how it is split over devices, and that no flipped bit leaves unchanged.

Every element's bits are mixed with its position, and the results are added up modulo 2^32. So each device digests its
own part and only scalars travel. Mixing is a permutation of 32-bit numbers: another bit in one element always
changes the sum; other damage goes unnoticed once in 2^32 cases.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, Num, UInt32

_CHUNK = 2**16  # elements that stay in a core's cache while they are mixed
_ROUNDS = ((16, np.uint32(0x85EBCA6B)), (13, np.uint32(0xC2B2AE35)))  # MurmurHash3's finaliser (Appleby, 2011)
_LAST_SHIFT = 16


def digests(tree: Any) -> dict[str, str]:
    """Path of each array on the devices -> its digest, 8 hexadecimal digits. All processes must call it together."""
    return start_digests(tree)()


def start_digests(tree: Any) -> Callable[[], dict[str, str]]:
    """`digests`, which the devices compute while the host goes on; whoever calls what is returned waits for them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    values = _on_devices(flat)
    return lambda: {path: f"{int(value):08x}" for path, value in jax.device_get(values).items()}


def digest(array: Num[np.ndarray, "..."]) -> str:
    """The digest of one array on the host."""
    bits = np.ascontiguousarray(array).reshape(-1).view(_unsigned(array.dtype))
    total, scratch = 0, np.empty(_CHUNK, np.uint32)
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK]
        mixed = np.arange(start, start + len(chunk), dtype=np.uint32)  # arrays have less than 2^32 elements
        _mix_in_place(mixed, scratch[: len(chunk)])
        mixed ^= chunk
        _mix_in_place(mixed, scratch[: len(chunk)])
        total += int(mixed.sum(dtype=np.uint64))
    return f"{total % 2**32:08x}"


@jax.jit
def _on_devices(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    return {path: _digest_on_devices(array) for path, array in arrays.items()}


def _digest_on_devices(array: Num[Array, "..."]) -> UInt32[Array, ""]:
    if math.prod(array.shape[1:]) <= _CHUNK:
        return _mixed(array, jnp.uint32(0)).sum(dtype=jnp.uint32)

    # Layers that lie in one array are added up one by one: on a CPU, XLA keeps what it is about to add up in memory.
    def add(number: Integer[Array, ""], total: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
        return total + _mixed(jax.lax.dynamic_index_in_dim(array, number, keepdims=False), number)

    layers, *shape = array.shape
    return jax.lax.fori_loop(0, layers, add, jnp.zeros(shape, jnp.uint32)).sum(dtype=jnp.uint32)


def _mixed(array: Num[Array, "*shape"], number: Integer[Array, ""]) -> UInt32[Array, "*shape"]:
    """The bits of the elements, each mixed with its position, in the layer of that number."""
    position = jnp.full(array.shape, number.astype(jnp.uint32))
    for axis, size in enumerate(array.shape):
        position = position * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    bits = jax.lax.bitcast_convert_type(array, _unsigned(array.dtype)).astype(jnp.uint32)
    return _mix(bits ^ _mix(position))


def _mix(values: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    for shift, factor in _ROUNDS:
        values = (values ^ values >> shift) * factor
    return values ^ values >> _LAST_SHIFT


def _mix_in_place(values: UInt32[np.ndarray, " n"], scratch: UInt32[np.ndarray, " n"]) -> None:
    """`_mix`, without an allocation."""
    for shift, factor in _ROUNDS:
        values ^= np.right_shift(values, shift, out=scratch)
        values *= factor
    values ^= np.right_shift(values, _LAST_SHIFT, out=scratch)


def _unsigned(dtype: np.dtype) -> np.dtype:
    """The unsigned integers as wide as a type of at most 4 bytes."""
    if np.dtype(dtype).itemsize > 4:
        raise ValueError(f"expected elements of at most 4 bytes, got {dtype}")
    return np.dtype(f"u{np.dtype(dtype).itemsize}")
