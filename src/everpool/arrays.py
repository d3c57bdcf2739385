"""Which bytes an index of an array means.

A `Layout` answers for an array of given dtype and shape without looking at its bytes.
"""

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from everpool.errors import InvalidError
from everpool.records import MAX_MEMORY_BYTES
from everpool.values import dtype_from_bytes, dtype_to_bytes

# A selection of more runs than this is read as one stretch.
MOST_RUNS = 4096


class Selection(NamedTuple):
    """The bytes that an index selects: runs of equal length, in the order of the result."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offsets: NDArray[np.int64]
    run_bytes: int
    scalar: bool

    @property
    def size(self) -> int:
        """How many bytes are selected."""
        return len(self.offsets) * self.run_bytes

    def bounds(self) -> tuple[int, int]:
        """Return where the first selected byte is, and where the last one ends."""
        if not self.size:
            return 0, 0
        return int(self.offsets.min()), int(self.offsets.max()) + self.run_bytes

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Yield offset in the array, offset in the result and length, neighbours joined."""
        if not self.size:
            return
        step = self.run_bytes
        start, at, length = int(self.offsets[0]), 0, step
        for number, offset in enumerate(self.offsets[1:].tolist(), 1):
            if offset == start + length:
                length += step
            else:
                yield start, at, length
                start, at, length = offset, number * step, step
        yield start, at, length


class Layout:
    """An array in C order: dtype and shape, no bytes."""

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.shape = shape
        self.items = 1
        for length in shape:
            self.items *= length
        self.nbytes = self.items * dtype.itemsize
        self._plain = len(shape) == 1 and dtype.subdtype is None
        strides: list[int] = []
        step = dtype.itemsize
        for length in reversed(shape):
            strides.append(step)
            step *= max(length, 1)
        self.strides = tuple(reversed(strides))
        # Never looked into: basic indexing of it only does sums on addresses.
        self._phantom: NDArray[Any] = np.lib.stride_tricks.as_strided(
            np.zeros(1, dtype), shape, self.strides
        )
        self._address = self._phantom.__array_interface__["data"][0]

    def select(self, key: Any) -> Selection:
        """Return what `key` selects; raises what NumPy raises for a wrong index."""
        if type(key) is int and self._plain and -self.items <= key < self.items:
            step = self.dtype.itemsize
            offsets = np.array((key % self.items * step,), np.int64)
            return Selection((), self.dtype, offsets, step, True)
        return self._basic(key) if is_basic(key) else self._advanced(key)

    def _basic(self, key: Any) -> Selection:
        if isinstance(key, str):
            view = self._phantom[key]
            scalar = False
        else:
            parts = cast("tuple[Any, ...]", key) if isinstance(key, tuple) else (key,)
            scalar = all(isinstance(part, (int, np.integer)) for part in parts)
            scalar = scalar and len(parts) == len(self.shape)
            if not any(part is Ellipsis for part in parts):
                parts = (*parts, Ellipsis)
            view = self._phantom[parts]
        start = view.__array_interface__["data"][0] - self._address if view.size else 0
        run, outer = view.dtype.itemsize, view.ndim
        while outer and (view.strides[outer - 1] == run or view.shape[outer - 1] == 1):
            outer -= 1
            run *= view.shape[outer]
        offsets = np.full((1,) * outer, start, np.int64)
        for axis in range(outer):
            steps = np.arange(view.shape[axis], dtype=np.int64) * view.strides[axis]
            offsets = offsets + steps.reshape((-1,) + (1,) * (outer - axis - 1))
        if not view.size:
            offsets = offsets[:0] if outer else np.zeros(0, np.int64)
        return Selection(view.shape, view.dtype, offsets.reshape(-1), run, scalar)

    def _advanced(self, key: Any) -> Selection:
        if not self.shape:
            raise InvalidError("an array without dimensions has only the indices () and ...")
        positions: Any = 0
        for axis, length in enumerate(self.shape):
            steps = np.arange(length, dtype=np.int64) * self.strides[axis]
            steps = steps.reshape((-1,) + (1,) * (len(self.shape) - axis - 1))
            positions = positions + np.broadcast_to(steps, self.shape)[key]
        found = np.asarray(positions, np.int64)
        return Selection(
            found.shape, self.dtype, np.ravel(found), self.dtype.itemsize, not found.ndim
        )


def is_basic(key: Any) -> bool:
    """Whether NumPy calls this index basic: numbers, slices, a field, and nothing to gather."""
    if isinstance(key, str):
        return True
    parts = cast("tuple[Any, ...]", key) if isinstance(key, tuple) else (key,)
    return all(
        part is None
        or part is Ellipsis
        or isinstance(part, slice)
        or (isinstance(part, (int, np.integer)) and not isinstance(part, (bool, np.bool_)))
        for part in parts
    )


def header_of(layout: Layout) -> bytes:
    """Return the bytes that describe an allocated array."""
    return msgspec.msgpack.encode((dtype_to_bytes(layout.dtype), layout.shape))


def layout_of(header: bytes) -> Layout:
    """Return the layout that `header_of` wrote down."""
    dtype, shape = msgspec.msgpack.decode(header, type=tuple[bytes, tuple[int, ...]])
    return Layout(dtype_from_bytes(dtype), shape)


def make_layout(shape: Any, dtype: Any) -> Layout:
    """Return the layout of a new array; raises `InvalidError` for what cannot be one."""
    try:
        given = cast("tuple[Any, ...]", (shape,) if hasattr(shape, "__index__") else tuple(shape))
        lengths = tuple(operator.index(length) for length in given)
        kind = np.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise InvalidError(f"shape {shape!r} and dtype {dtype!r} make no array: {error}") from error
    if any(length < 0 for length in lengths):
        raise InvalidError(f"shape {shape!r} has a negative length")
    if kind.hasobject or not kind.itemsize:
        raise InvalidError(
            f"dtype {kind} cannot lie in memory: use numbers, fixed-size strings or structures"
        )
    dtype_to_bytes(kind)
    items = 1
    for length in lengths:
        items *= length
    if items * kind.itemsize > MAX_MEMORY_BYTES:
        raise InvalidError(
            f"{items * kind.itemsize} bytes are more than memory can have ({MAX_MEMORY_BYTES})"
        )
    return Layout(kind, lengths)
