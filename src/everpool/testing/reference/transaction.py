"""A transaction: reads as of its snapshot, with its own operations played over them."""

import contextlib
import operator
from collections.abc import Iterator, MutableMapping
from concurrent.futures import Future
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from everpool.errors import (
    ClosedError,
    EverpoolError,
    ExistsError,
    InvalidError,
    NotFoundError,
)
from everpool.records import MAX_MEMORY_BYTES, RecordId, check_name
from everpool.testing.reference.handles import (
    ReferenceArray,
    ReferenceArrayValue,
    ReferenceMemory,
    array_handle,
    handle,
)
from everpool.testing.reference.log import (
    Bind,
    Log,
    Memory,
    Operation,
    ReadSet,
    Store,
    Unbind,
    Value,
)


class Client(Protocol):
    """The pool that a transaction belongs to."""

    @property
    def log(self) -> Log: ...

    def check_open(self) -> None: ...


class ReferenceTransaction(MutableMapping[str, object]):
    """Reads as of `snapshot`, with its own operations played over them."""

    live = False

    def __init__(self, pool: Client, id: RecordId, wait: bool) -> None:
        self.id = id
        self.version: int | None = None
        self.committed: Future[int] = Future()
        self.reads = ReadSet()
        self.operations: list[Operation] = []
        self.snapshot = pool.log.version
        self._pool = pool
        self._log = pool.log
        self._wait = wait
        self._open = True

    def __enter__(self) -> "ReferenceTransaction":
        self._check_open()
        self.snapshot = self._log.version
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._pool.check_open()
        if not self._open or kind is not None:
            self.abort()
            return
        self._open = False
        try:
            self.version = self._commit()
            self.committed.set_result(self.version)
        except EverpoolError as error:
            self.committed.set_exception(error)
            if self._wait:
                raise

    def _commit(self) -> int:
        with self._log.changed:
            if not self.operations:
                return self.snapshot
            return self._log.append(self.id, self.snapshot, self.reads, self.operations).version

    def abort(self) -> None:
        """Leave without commit."""
        self._open = False
        self.committed.cancel()

    def conflict(self) -> str | None:
        """Return what this transaction read that was changed since, or None."""
        with self._log.changed:
            return self._log.conflict(self.reads, self.snapshot)

    def _check_open(self) -> None:
        self._pool.check_open()
        if not self._open:
            raise ClosedError("this transaction is over: begin another")

    def look(self, name: str) -> Value | Memory | None:
        """Return what `name` is bound to, without counting that as read."""
        self._check_open()
        check_name(name)
        for operation in reversed(self.operations):
            if not isinstance(operation, Store) and operation.name == name:
                return operation.target if isinstance(operation, Bind) else None
        return self._log.binding(name, self.snapshot)

    def find(self, name: str) -> Value | Memory | None:
        """Return what `name` is bound to. That is a read, unless this transaction decided it."""
        target = self.look(name)
        if not any(not isinstance(own, Store) and own.name == name for own in self.operations):
            self.reads.names.add(name)
        return target

    def bound(self, name: str) -> Value | Memory:
        target = self.find(name)
        if target is None:
            raise NotFoundError(f"there is no {name!r} in this pool", name=name)
        return target

    def __getitem__(self, name: str) -> object:
        target = self.bound(name)
        return handle(self, target) if isinstance(target, Memory) else target.decoded()

    def __setitem__(self, name: str, value: object) -> None:
        """A blind write: whether the name is memory is found out when it is applied."""
        self._check_open()
        own = [op for op in self.operations if not isinstance(op, Store) and op.name == name]
        if own and isinstance(own[-1], Bind) and isinstance(own[-1].target, Memory):
            raise ExistsError(f"{name!r} is memory: delete it first", name=name)
        self.operations.append(Bind(check_name(name), Value(name, value)))

    def __delitem__(self, name: str) -> None:
        self.operations.append(Unbind(name, self.bound(name)))

    def __contains__(self, name: object) -> bool:
        return self.find(check_name(name)) is not None

    def __len__(self) -> int:
        return len(list(self.names()))

    def __iter__(self) -> Iterator[str]:
        return self.names()

    def names(self, prefix: str = "") -> Iterator[str]:
        self._check_open()
        self.reads.prefixes.add(prefix)
        candidates = set(self._log.names(self.snapshot))
        candidates |= {own.name for own in self.operations if isinstance(own, Bind)}
        found = [n for n in candidates if n.startswith(prefix) and self.look(n) is not None]
        return iter(sorted(found, key=str.encode))

    def allocate(self, name: str, size: int) -> ReferenceMemory:
        memory = self._allocate(name, size, None, np.dtype("u1"))
        return ReferenceMemory(self, memory)

    def allocate_array(self, name: str, shape: Any, dtype: Any = "float64") -> ReferenceArray:
        try:
            dtype = np.dtype(dtype)
            shape = tuple(operator.index(n) for n in (shape if np.iterable(shape) else (shape,)))
        except (TypeError, ValueError) as error:
            raise InvalidError(f"{name!r} cannot be an array: {error}") from error
        if dtype.hasobject or any(length < 0 for length in shape):
            raise InvalidError(f"{name!r} cannot be an array of {dtype} and shape {shape}")
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        return ReferenceArray(self, self._allocate(name, size, shape, dtype))

    def _allocate(
        self, name: str, size: int, shape: tuple[int, ...] | None, dtype: np.dtype[Any]
    ) -> Memory:
        if type(size) is not int or not 1 <= size <= MAX_MEMORY_BYTES:
            raise InvalidError(f"{name!r} cannot have {size!r} bytes: 1 to {MAX_MEMORY_BYTES}")
        if self.find(name) is not None:
            raise ExistsError(f"{name!r} is taken: delete it first", name=name)
        with self._log.changed:
            self._log.objects += 1
            memory = Memory(self._log.objects, name, size, shape, dtype)
        self.operations.append(Bind(name, memory))
        return memory

    def memory(self, name: str) -> ReferenceMemory:
        target = self.bound(name)
        if not isinstance(target, Memory):
            raise InvalidError(f"{name!r} is a value, not memory: read it as pool[{name!r}]")
        return ReferenceMemory(self, target)

    def array(self, name: str) -> ReferenceArray | ReferenceArrayValue:
        target = self.bound(name)
        if isinstance(target, Memory):
            return array_handle(self, target)
        value = target.decoded()
        if not isinstance(value, np.ndarray):
            raise InvalidError(f"{name!r} is a {type(value).__name__}, not an array")
        return ReferenceArrayValue(name, cast("NDArray[Any]", value))

    def require(self, memory: Memory) -> None:
        """Raise `NotFoundError` when the memory behind a handle was deleted."""
        if self.look(memory.name) is not memory:
            raise NotFoundError(f"the memory {memory.name!r} was deleted", name=memory.name)

    def read(self, memory: Memory, start: int, stop: int) -> bytes:
        """Return bytes as of the snapshot under this transaction's own writes."""
        self.require(memory)
        own = [(op.offset, op.data) for op in self._stores(memory)]
        for first, last in _outside(start, stop, own):
            self.reads.ranges.add((memory.id, first, last))
        return memory.content(start, stop, memory.writes_up_to(self.snapshot) + own)

    def write(self, memory: Memory, offset: int, data: bytes) -> None:
        self.require(memory)
        if data:
            self.operations.append(Store(memory, offset, data))

    def _stores(self, memory: Memory) -> list[Store]:
        return [op for op in self.operations if isinstance(op, Store) and op.target is memory]

    @contextlib.contextmanager
    def alone(self) -> Iterator["ReferenceTransaction"]:
        """What a handle uses in a transaction: the transaction itself."""
        yield self


def _outside(start: int, stop: int, writes: list[tuple[int, bytes]]) -> list[tuple[int, int]]:
    """Return the parts of a range that the writes do not cover."""
    parts = [(start, stop)] if start < stop else []
    for offset, data in writes:
        end = offset + len(data)
        left = [(first, min(last, offset)) for first, last in parts]
        right = [(max(first, end), last) for first, last in parts]
        parts = [(first, last) for first, last in left + right if first < last]
    return parts
