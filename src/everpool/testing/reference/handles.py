"""Handles on memory and arrays, the same for a pool and for a transaction."""

from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from everpool.errors import InvalidError
from everpool.testing.reference.log import Memory


class Reader(Protocol):
    """The transaction that a call on a handle runs in."""

    @property
    def snapshot(self) -> int: ...

    def require(self, memory: Memory) -> None: ...

    def read(self, memory: Memory, start: int, stop: int) -> bytes: ...

    def write(self, memory: Memory, offset: int, data: bytes) -> None: ...


class Owner(Protocol):
    """A pool, where each call on a handle commits by itself, or a transaction."""

    live: bool

    def alone(self) -> AbstractContextManager[Reader]: ...


class ReferenceMemory:
    """A handle on memory, of a pool (each call commits) or of a transaction."""

    def __init__(self, owner: Owner, memory: Memory) -> None:
        self.owner = owner
        self.memory = memory
        self.name = memory.name
        self.size = memory.size

    def __len__(self) -> int:
        return self.size

    @property
    def version(self) -> int:
        with self.owner.alone() as tx:
            tx.read(self.memory, 0, self.size)
            return max(at for at, _, _ in self.memory.history if at <= tx.snapshot)

    def read(self, offset: int, size: int) -> bytes:
        with self.owner.alone() as tx:
            return tx.read(self.memory, *self._bounds(offset, size))

    def write(self, offset: int, data: Any) -> None:
        data = _as_bytes(data)
        with self.owner.alone() as tx:
            tx.write(self.memory, self._bounds(offset, len(data))[0], data)

    def view(self, offset: int = 0, size: int | None = None) -> memoryview:
        if not self.owner.live:
            raise InvalidError("a transaction hands out copies: use read()")
        start, stop = self._bounds(offset, self.size - offset if size is None else size)
        with self.owner.alone() as tx:
            tx.require(self.memory)
            return memoryview(self.memory.live_buffer())[start:stop].toreadonly()

    def __getitem__(self, key: int | slice) -> int | bytes:
        if isinstance(key, slice):
            start, stop = self._slice(key)
            return self.read(start, stop - start)
        return self.read(self._index(key), 1)[0]

    def __setitem__(self, key: int | slice, data: Any) -> None:
        if not isinstance(key, slice):
            self.write(self._index(key), data.to_bytes(1, "little"))
            return
        start, stop = self._slice(key)
        data = _as_bytes(data)
        if len(data) != stop - start:
            raise InvalidError(f"{len(data)} bytes for {stop - start} of {self.name!r}")
        self.write(start, data)

    def fetch_add(self, offset: int, delta: int | float, dtype: Any = "<i8") -> int | float:
        dtype = _number_type(dtype)
        start, stop = self._bounds(offset, dtype.itemsize)
        with self.owner.alone() as tx:
            old = np.frombuffer(tx.read(self.memory, start, stop), dtype)[0]
            tx.write(self.memory, start, _add(old, delta, dtype))
            return old.item()

    def compare_and_swap(self, offset: int, expected: Any, new: Any) -> bool:
        expected, new = _as_bytes(expected), _as_bytes(new)
        if len(expected) != len(new):
            raise InvalidError(f"expected has {len(expected)} bytes and new {len(new)}")
        start, stop = self._bounds(offset, len(new))
        with self.owner.alone() as tx:
            same = tx.read(self.memory, start, stop) == expected
            if same:
                tx.write(self.memory, start, new)
            return same

    def _bounds(self, offset: int, size: int) -> tuple[int, int]:
        if not 0 <= offset <= offset + size <= self.size:
            raise InvalidError(
                f"bytes {offset} to {offset + size} are outside {self.name!r}, "
                f"which has {self.size}"
            )
        return offset, offset + size

    def _index(self, key: int) -> int:
        if not -self.size <= key < self.size:
            raise InvalidError(f"byte {key} is outside {self.name!r}, which has {self.size}")
        return key % self.size

    def _slice(self, key: slice) -> tuple[int, int]:
        start, stop, step = key.indices(self.size)
        if step != 1:
            raise InvalidError(f"a slice of {self.name!r} cannot have a step of {step}")
        return start, max(start, stop)


class ReferenceArray:
    """A handle on memory that holds an array, of a pool or of a transaction."""

    def __init__(self, owner: Owner, memory: Memory) -> None:
        assert memory.shape is not None
        self.memory = memory
        self.name = memory.name
        self.shape = memory.shape
        self.dtype = memory.dtype
        self.ndim = len(self.shape)
        self.nbytes = memory.size
        self.size = memory.size // memory.dtype.itemsize
        self._bytes = ReferenceMemory(owner, memory)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def version(self) -> int:
        return self._bytes.version

    def view(self) -> NDArray[Any]:
        return np.frombuffer(self._bytes.view(), self.dtype).reshape(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if not self._bytes.owner.live:
            return np.asarray(self[...], dtype)
        return np.array(self.view(), dtype, copy=copy)

    def __getitem__(self, key: Any) -> Any:
        content = np.zeros(self.shape, self.dtype)
        with self._bytes.owner.alone() as tx:
            tx.require(self.memory)
            self._fill(tx, content, self._runs(key))
        return _copied(content[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        runs = self._runs(key)
        content = np.zeros(self.shape, self.dtype)
        flat = content.reshape(-1)
        with self._bytes.owner.alone() as tx:
            tx.require(self.memory)
            if _is_field(key):  # the other fields of the elements stay as they are
                self._fill(tx, content, runs)
            try:
                content[key] = value
            except (TypeError, ValueError) as error:
                raise InvalidError(f"{self.name!r} cannot take this: {error}") from error
            for first, last in runs:
                tx.write(self.memory, first * self.dtype.itemsize, flat[first:last].tobytes())

    def fetch_add(self, index: Any, delta: int | float) -> int | float:
        runs = self._runs(index)
        if len(runs) != 1 or runs[0][1] - runs[0][0] != 1:
            raise InvalidError(f"{index!r} is not one element of {self.name!r}")
        return self._bytes.fetch_add(runs[0][0] * self.dtype.itemsize, delta, self.dtype)

    def _fill(self, tx: Reader, content: NDArray[Any], runs: list[tuple[int, int]]) -> None:
        flat = content.reshape(-1)
        for first, last in runs:
            data = tx.read(self.memory, first * self.dtype.itemsize, last * self.dtype.itemsize)
            flat[first:last] = np.frombuffer(data, self.dtype)

    def _runs(self, key: Any) -> list[tuple[int, int]]:
        """Return the runs of elements, in memory order, that NumPy's indexing with `key` takes."""
        numbers = np.arange(self.size).reshape(self.shape)
        try:
            if _is_field(key):
                np.empty(0, self.dtype)[key]
            chosen = np.unique(numbers[... if _is_field(key) else key])
        except (IndexError, TypeError, ValueError) as error:
            raise InvalidError(f"{key!r} does not index {self.name!r}: {error}") from error
        breaks = np.flatnonzero(np.diff(chosen) != 1) + 1
        return [(int(run[0]), int(run[-1]) + 1) for run in np.split(chosen, breaks) if run.size]


class ReferenceArrayValue:
    """A read-only handle on a value that is an array."""

    def __init__(self, name: str, value: NDArray[Any]) -> None:
        self.name = name
        self.shape = value.shape
        self.dtype = value.dtype
        self.ndim = value.ndim
        self.size = value.size
        self.nbytes = value.nbytes
        self._value = value

    def __len__(self) -> int:
        return len(self._value)

    def __getitem__(self, key: Any) -> Any:
        try:
            return _copied(self._value[key])
        except (IndexError, TypeError, ValueError) as error:
            raise InvalidError(f"{key!r} does not index {self.name!r}: {error}") from error

    def __setitem__(self, key: Any, value: Any) -> None:
        raise InvalidError(f"{self.name!r} is a value, which is immutable: replace it whole")

    def fetch_add(self, index: Any, delta: int | float) -> None:
        self[index] = delta

    def view(self) -> NDArray[Any]:
        return self._value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self._value, dtype, copy=copy)


def handle(owner: Owner, memory: Memory) -> "ReferenceMemory | ReferenceArray":
    return ReferenceMemory(owner, memory) if memory.shape is None else ReferenceArray(owner, memory)


def array_handle(owner: Owner, memory: Memory) -> ReferenceArray:
    if memory.shape is None:
        raise InvalidError(f"{memory.name!r} was not allocated as an array: use memory()")
    return ReferenceArray(owner, memory)


def _copied(chosen: Any) -> Any:
    return cast("NDArray[Any]", chosen).copy() if isinstance(chosen, np.ndarray) else chosen


def _is_field(key: Any) -> bool:
    """Whether NumPy takes the key for the name of a field, or for a list of such names."""
    first = cast("list[Any]", key)[:1] if isinstance(key, list) else [key]
    return bool(first) and isinstance(first[0], str)


def _as_bytes(data: Any) -> bytes:
    try:
        return memoryview(data).tobytes()
    except (TypeError, ValueError) as error:
        raise InvalidError(f"not bytes: {error}") from error


def _number_type(dtype: Any) -> np.dtype[Any]:
    try:
        dtype = np.dtype(dtype)
    except TypeError as error:
        raise InvalidError(f"{dtype!r} is not a type of number") from error
    if dtype.kind not in "iuf":
        raise InvalidError(f"{dtype} is not an integer or floating-point type")
    return dtype


def _add(old: Any, delta: int | float, dtype: np.dtype[Any]) -> bytes:
    """Return the bytes of the sum; integers wrap around."""
    if dtype.kind == "f":
        return np.array(old + dtype.type(delta), dtype).tobytes()
    if not isinstance(delta, int | np.integer):
        raise InvalidError(f"{delta!r} cannot be added to {dtype}: it is not an integer")
    order = "big" if dtype.str[0] == ">" else "little"
    return ((int(old) + int(delta)) % (1 << 8 * dtype.itemsize)).to_bytes(dtype.itemsize, order)
