"""NumPy arrays and scalars: their headers, their bytes in streams, and views of stored ones."""

import math
import struct
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

import numpy as np

from everpool.errors import CorruptionError, InvalidError
from everpool.values import _wire as wire
from everpool.values._dtypes import AnyDType, dtype_from_bytes, dtype_to_bytes
from everpool.values._wire import Buffer, Encoded

AnyArray: TypeAlias = np.ndarray[Any, Any]

BLOCK_BYTES: Final = 2 << 20
_MAX_DIMENSIONS: Final = 64
_FIXED: Final = struct.Struct("<IB3s")
_SHAPE_AT: Final = wire.HEADER_SIZE + _FIXED.size
_SHAPES: Final[tuple[struct.Struct, ...]] = tuple(
    struct.Struct(f"<{n}Q{n}s") for n in range(_MAX_DIMENSIONS + 1)
)
_IDENTITIES: Final = tuple(bytes(range(n)) for n in range(_MAX_DIMENSIONS + 1))
_ARRAY_HEADER: Final = wire.header(wire.ARRAY)
_SCALAR_HEADER: Final = wire.header(wire.SCALAR)
_U16: Final = struct.Struct("<H")
_STR_DTYPE: Final = b"U"
_BYTES_DTYPE: Final = b"S"

# Exact types: a subclass would come back as something else.
SCALAR_TYPES: Final[frozenset[type]] = frozenset(
    kind for kind in np.sctypeDict.values() if kind is not np.object_
)
ARRAY_TYPES: Final[frozenset[type]] = frozenset({np.ndarray, np.memmap})


def encode_array(array: AnyArray) -> Encoded:
    """Encode an ndarray; its memory is handed out as it is when it has no gaps in any axis order.

    The memory order of the axes is kept. Of other arrays (with steps, gaps, negative or zero
    strides) the items are gathered block by block into an array without gaps.
    """
    dtype = array.dtype
    dtype_bytes = dtype_to_bytes(dtype)
    order = _memory_order(array)
    ndim = array.ndim
    head = b"".join(
        (
            _ARRAY_HEADER,
            _FIXED.pack(len(dtype_bytes), ndim, b"\0\0\0"),
            _SHAPES[ndim].pack(*array.shape, order),
            dtype_bytes,
        )
    )
    head += wire.padding(len(head))
    stored = array if order == _IDENTITIES[ndim] else array.transpose(tuple(order))
    size = len(head) + array.nbytes
    if array.nbytes == 0:
        return Encoded(size, (head,))
    if stored.flags.c_contiguous:
        return Encoded(size, (head, _raw(stored)))
    return Encoded(size, (head, lambda: _blocks(stored)))


def _memory_order(array: AnyArray) -> bytes:
    """Return the axes of `array` from the one with the longest stride to the shortest."""
    identity = _IDENTITIES[array.ndim]
    if array.flags.c_contiguous:
        return identity
    if array.flags.f_contiguous:
        return identity[::-1]
    # A zero stride repeats items: no order of its axes is that of memory.
    if 0 in array.strides:
        return identity
    return bytes(sorted(identity, key=lambda axis: -abs(array.strides[axis])))


def _raw(contiguous: AnyArray) -> memoryview:
    # Through uint8, since most dtypes (datetime64, many structured ones) refuse the buffer
    # protocol; ndarray.view, so that numpy.memmap's own __array_finalize__ stays out of it.
    flat = contiguous.view(np.ndarray).reshape(-1).view(np.uint8)
    return flat.data.toreadonly()


def _blocks(array: AnyArray) -> Iterator[Buffer]:
    """Yield the items of `array` in C order, copying at most BLOCK_BYTES at a time."""
    if array.nbytes <= BLOCK_BYTES or array.flags.c_contiguous:
        yield _raw(np.ascontiguousarray(array))
        return
    row_bytes = array.nbytes // len(array)
    if row_bytes > BLOCK_BYTES:
        for i in range(len(array)):
            yield from _blocks(array[i, ...])
        return
    rows = BLOCK_BYTES // row_bytes
    for i in range(0, len(array), rows):
        yield _raw(np.ascontiguousarray(array[i : i + rows]))


def array_layout(data: Buffer) -> tuple[tuple[int, ...], AnyDType, bytes, int]:
    """Return (shape, dtype, axis order, data offset) of an encoded array, checked.

    What it returns describes exactly the bytes that `data` has.

    Raises:
        CorruptionError: the header is malformed or does not fit the length of `data`.
    """
    if len(data) < _SHAPE_AT:
        raise CorruptionError("the encoded array is shorter than its header")
    fixed: tuple[int, int, bytes] = _FIXED.unpack_from(data, wire.HEADER_SIZE)
    dtype_size, ndim, zeros = fixed
    if ndim > _MAX_DIMENSIONS or zeros != b"\0\0\0":
        raise CorruptionError(f"the encoded array has {ndim} dimensions or a malformed header")
    dtype_at = _SHAPE_AT + 9 * ndim
    dtype_end = dtype_at + dtype_size
    data_at = wire.aligned(dtype_end)
    if data_at > len(data):
        raise CorruptionError("the encoded array is shorter than its header")
    *dimensions, order = _SHAPES[ndim].unpack_from(data, _SHAPE_AT)
    shape: tuple[int, ...] = tuple(dimensions)
    if order != _IDENTITIES[ndim] and bytes(sorted(order)) != _IDENTITIES[ndim]:
        raise CorruptionError("the encoded array has a malformed axis order")
    dtype = dtype_from_bytes(bytes(data[dtype_at:dtype_end]))
    if dtype.subdtype is not None:
        raise CorruptionError("the encoded array has a subarray for its dtype")
    wire.expect_zeros(data[dtype_end:data_at])
    if math.prod(shape) * dtype.itemsize != len(data) - data_at:
        raise CorruptionError(
            f"an array of shape {shape} and dtype {dtype} does not have the "
            f"{len(data) - data_at} bytes that are stored",
        )
    return shape, dtype, order, data_at


def decode_array(data: Buffer, zero_copy: bool) -> AnyArray:
    """Return the encoded array, read-only: over `data`, or over a private copy."""
    shape, dtype, order, data_at = array_layout(data)
    memory = memoryview(data).toreadonly()
    if not zero_copy:
        memory = memoryview(bytes(memory[data_at:]))
        data_at = 0
    # numpy.ndarray takes a memoryview's owner for its base, numpy.frombuffer the memoryview: only
    # the latter keeps a writable owner's arrays from being switched back to writeable.
    raw = np.frombuffer(memory, np.uint8)
    identity = _IDENTITIES[len(shape)]
    try:
        if order == identity:
            return np.ndarray(shape, dtype, raw, data_at)
        stored_shape = [shape[axis] for axis in order]
        inverse = sorted(identity, key=order.__getitem__)
        return np.ndarray(stored_shape, dtype, raw, data_at).transpose(inverse)
    except (ValueError, TypeError, OverflowError) as error:
        raise CorruptionError(f"the encoded array has an impossible shape: {error}") from error


def scalar_body(value: "np.generic[Any]") -> bytes:
    """Return what follows the header of an encoded NumPy scalar."""
    # A str_ or bytes_ can end in NULs, which an item of an array cannot.
    if type(value) is np.str_:
        return _U16.pack(1) + _STR_DTYPE + value.encode()
    if type(value) is np.bytes_:
        return _U16.pack(1) + _BYTES_DTYPE + bytes(value)
    dtype_bytes = dtype_to_bytes(value.dtype)
    if len(dtype_bytes) > 0xFFFF:
        raise InvalidError(f"the scalar's dtype has {len(dtype_bytes)} bytes: store an array")
    return _U16.pack(len(dtype_bytes)) + dtype_bytes + value.tobytes()


def encode_scalar(value: "np.generic[Any]") -> Encoded:
    """Encode a NumPy scalar."""
    body = scalar_body(value)
    return Encoded(wire.HEADER_SIZE + len(body), (_SCALAR_HEADER, body))


def scalar_layout(body: Buffer) -> tuple[AnyDType, int]:
    """Return the dtype and the offset of the item in a scalar's body, checked."""
    if len(body) < _U16.size:
        raise CorruptionError("the encoded scalar is shorter than its header")
    item_at = _U16.size + int(_U16.unpack_from(body)[0])
    item_size = len(body) - item_at
    if item_size < 0:
        raise CorruptionError("the encoded scalar is shorter than its dtype")
    dtype_bytes = bytes(body[_U16.size : item_at])
    if dtype_bytes == _STR_DTYPE:
        return np.dtype(np.str_), item_at
    if dtype_bytes == _BYTES_DTYPE:
        return np.dtype(np.bytes_), item_at
    dtype = dtype_from_bytes(dtype_bytes)
    if dtype.type not in SCALAR_TYPES or dtype.subdtype is not None or dtype.itemsize != item_size:
        raise CorruptionError(f"a scalar of dtype {dtype} has {item_size} bytes")
    return dtype, item_at


def scalar_from(body: Buffer) -> "np.generic[Any]":
    """Return the NumPy scalar that `scalar_body` wrote."""
    dtype, item_at = scalar_layout(body)
    item = bytes(body[item_at:])
    if dtype.type is np.str_:
        return np.str_(item.decode())
    if dtype.type is np.bytes_:
        return np.bytes_(item)
    scalar: Any = np.ndarray((), dtype, memoryview(item))[()]
    return scalar
