"""Transactions: what they read is of one version, what they write becomes visible at once."""

import contextlib
import operator
from collections.abc import Iterator, MutableMapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from everpool import values
from everpool.arrays import MOST_RUNS, Selection, header_of, layout_of, make_layout
from everpool.commit import Submission
from everpool.errors import ClosedError, ConflictError, ExistsError, InvalidError, NotFoundError
from everpool.memory import Array, Buffer, ByteSlices, ValueArray, as_bytes, encode_delta
from everpool.records import (
    MAX_MEMORY_BYTES,
    Allocate,
    Delete,
    Operation,
    Payload,
    Put,
    Record,
    RecordId,
    Reference,
    Write,
    check_name,
)
from everpool.replica.bulk import Staged
from everpool.replica.effects import overlay
from everpool.replica.index import INLINE, MEMORY, NameRow
from everpool.replica.replica import gone

if TYPE_CHECKING:
    from everpool.engine import Engine
    from everpool.pool import Pool


class _Own:
    """What this transaction bound a name to: a payload, or memory, or nothing."""

    __slots__ = ("memory", "payload")

    def __init__(self, payload: Payload | None, memory: "TransactionMemory | None") -> None:
        self.payload = payload
        self.memory = memory


class Transaction(MutableMapping[str, Any]):
    """A set of reads and writes that take effect together or not at all.

    Everything it reads is as of the version it began at, plus its own writes. Leaving the `with`
    block commits it; an exception, or `abort`, discards it. What it read and somebody else
    changed makes it a `ConflictError`, at the latest when it is left.
    """

    def __init__(self, pool: "Pool", *, wait: bool) -> None:
        self._pool = pool
        self._wait = wait
        self._engine: Engine = pool.engine()
        self._snapshot = self._engine.replica.version()
        self._open = True
        self._aborted = False
        self._names: set[str] = set()
        self._prefixes: set[str] = set()
        self._ranges: list[tuple[int, int, int]] = []
        self._operations: list[Operation] = []
        self._staged: list[Staged] = []
        self._own: dict[str, _Own] = {}
        self._put_at: dict[str, int] = {}
        self._memories: dict[int, TransactionMemory] = {}
        self._created = 0
        self._submission: Submission | None = None

    # Leaving

    def __enter__(self) -> "Transaction":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abort()
        elif not self._aborted:
            self._commit()

    def abort(self) -> None:
        """Discard the transaction: nothing of it will be committed."""
        if self._open:
            self._open = False
            self._aborted = True
            if self._engine.is_ours():  # a forked child must not delete its parent's files
                self._discard()

    def _commit(self) -> None:
        self._check_open()
        self._open = False
        if not self._operations:
            return
        record = Record(
            self._snapshot,
            list(self._names),
            list(self._prefixes),
            list(dict.fromkeys(self._ranges)),
            self._operations,
        )
        engine = self._engine
        if not self._wait:
            self._submission = engine.pipeline(record, self._staged)
            return
        self._submission = engine.write(record, self._staged)
        self._submission.version()

    def _discard_file(self, file: str) -> None:
        """Delete a stored value that this transaction put and replaced."""
        for staged in self._staged:
            if staged.reference.file == file:
                self._staged.remove(staged)
                self._engine.replica.bulk.discard(staged)
                return

    def _discard(self) -> None:
        for staged in self._staged:
            with contextlib.suppress(OSError):
                self._engine.replica.bulk.discard(staged)
        self._staged = []

    # Outcome

    @property
    def snapshot(self) -> int:
        """The version that its reads are of."""
        return self._snapshot

    @property
    def committed(self) -> "Future[int]":
        """A future of the version it commits as; its exception is what kept it from committing."""
        if self._submission is not None:
            return self._submission.future()
        future: Future[int] = Future()
        if self._aborted:
            future.set_exception(ClosedError("the transaction was aborted"))
        elif self._open:
            raise ClosedError("the transaction is still open: leave its block first")
        else:
            future.set_result(self._snapshot)
        return future

    @property
    def version(self) -> int:
        """The version it committed as, or read when it wrote nothing; waits when pipelined."""
        return self.committed.result()

    @property
    def id(self) -> RecordId | None:
        """The id of its record, for `pool.outcome`; None when it wrote nothing. Waits."""
        if self._submission is None:
            return None
        with contextlib.suppress(Exception):
            self._submission.future().result()
        result = self._submission.result
        if result is not None:
            return result.id
        return getattr(self._submission.error, "id", None)

    # The mapping

    def __getitem__(self, name: str) -> Any:
        found = self._lookup(check_name(name))
        if found is None:
            raise NotFoundError(f"there is no {name!r}", name=name)
        if isinstance(found, TransactionMemory):
            return found.handle()
        if isinstance(found, NameRow):
            return self._value(name, found)
        return self._decode(found)

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        self._check_writable()
        own = self._own.get(name)
        if own is not None and own.memory is not None:
            raise ExistsError(f"{name!r} is memory: delete it first", name=name)
        payload, staged = self._pool.encode_value(value)
        if staged is not None:
            self._staged.append(staged)
        self._own[name] = _Own(payload, None)
        at = self._put_at.get(name)
        if own is not None and isinstance(own.payload, Reference):
            self._discard_file(own.payload.file)
        if at is None:
            self._put_at[name] = len(self._operations)
            self._operations.append(Put(name, payload))
        else:
            self._operations[at] = Put(name, payload)

    def __delitem__(self, name: str) -> None:
        self._check_writable()
        found = self._lookup(check_name(name))
        if found is None:
            raise NotFoundError(f"there is no {name!r}", name=name)
        if isinstance(found, TransactionMemory):
            found.deleted = True
        self._own[name] = _Own(None, None)
        self._put_at.pop(name, None)
        self._operations.append(Delete(name))

    def __contains__(self, name: object) -> bool:
        return self._lookup(check_name(name)) is not None

    def __iter__(self) -> Iterator[str]:
        return self.names()

    def __len__(self) -> int:
        return sum(1 for _ in self.names())

    def names(self, prefix: str = "") -> Iterator[str]:
        """Return the names under `prefix`, in order."""
        self._check_open()
        _check_prefix(prefix)
        version, found = self._engine.replica.names_at(prefix)
        self._check(version, Record(self._snapshot, [], [prefix], [], []))
        self._prefixes.add(prefix)
        own = {name: it for name, it in self._own.items() if name.startswith(prefix)}
        if own:
            names = {name for name in found if name not in own}
            names |= {name for name, it in own.items() if it.payload is not None or it.memory}
            found = sorted(names, key=str.encode)
        return iter(found)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Bind several names."""
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    # Memory

    def memory(self, name: str) -> "TransactionMemory":
        """Return a handle on memory, as this transaction sees it."""
        found = self._lookup(check_name(name))
        if found is None:
            raise NotFoundError(f"there is no memory {name!r}", name=name)
        if not isinstance(found, TransactionMemory):
            raise InvalidError(f"{name!r} is a value, not memory: read tx[{name!r}]", name=name)
        return found

    def array(self, name: str) -> Array:
        """Return a typed handle on an array, as this transaction sees it."""
        found = self[name]
        if isinstance(found, Array):
            return found
        if isinstance(found, np.ndarray):
            return ValueArray(name, cast("NDArray[Any]", found), self._snapshot)
        raise InvalidError(f"{name!r} is no array but {type(found).__name__}", name=name)

    def allocate(self, name: str, size: int) -> "TransactionMemory":
        """Bind a free name to `size` zero bytes of memory."""
        return self._allocate(name, check_size(size), b"")

    def allocate_array(
        self, name: str, shape: int | tuple[int, ...], dtype: DTypeLike = "float64"
    ) -> Array:
        """Bind a free name to an array of zeros."""
        layout = make_layout(shape, dtype)
        memory = self._allocate(name, max(1, layout.nbytes), header_of(layout))
        return Array(memory, layout)

    def _allocate(self, name: str, size: int, header: bytes) -> "TransactionMemory":
        self._check_writable()
        if self._lookup(check_name(name)) is not None:
            raise ExistsError(f"{name!r} exists already: delete it first", name=name)
        self._created += 1
        memory = TransactionMemory(self, name, -self._created, size, header)
        self._own[name] = _Own(None, memory)
        self._put_at.pop(name, None)
        self._operations.append(Allocate(name, size, header))
        return memory

    # What handles of this transaction use

    def read_base(self, memory: "TransactionMemory", offset: int, size: int) -> bytearray:
        """Return bytes of an object as of the snapshot, and remember that they were read."""
        self._check_open()
        if memory.id < 0:
            return bytearray(size)
        replica = self._engine.replica
        view = memory.mapped(self._engine)
        try:
            data, version = replica.read_memory(memory.id, memory.name, view, offset, size)
        except NotFoundError:
            raise ConflictError(
                f"{memory.name!r} was deleted after version {self._snapshot}: run the "
                "transaction again"
            ) from None
        read = (memory.id, offset, offset + size)
        self._check(version, Record(self._snapshot, [], [], [read], []))
        self._ranges.append(read)
        return data if isinstance(data, bytearray) else bytearray(data)

    def store(self, memory: "TransactionMemory", parts: list[tuple[int, bytes]]) -> None:
        """Buffer stores."""
        self._check_writable()
        for offset, data in parts:
            self._operations.append(Write(memory.id, offset, data))

    def _lookup(self, name: str) -> "NameRow | TransactionMemory | bytes | Payload | None":
        self._check_open()
        own = self._own.get(name)
        if own is not None:
            return own.memory if own.memory is not None else own.payload
        version, row = self._engine.replica.find(name)
        if row is not None and row.version > self._snapshot:
            raise self._conflict(repr(name))
        if row is None:
            self._check(version, Record(self._snapshot, [name], [], [], []))
        self._names.add(name)
        if row is None or row.kind != MEMORY:
            return row
        memory = self._memories.get(row.id)
        if memory is None:
            memory = TransactionMemory(self, name, row.id, row.size, bytes(row.body))
            self._memories[row.id] = memory
        return memory

    def _value(self, name: str, row: NameRow) -> Any:
        if row.kind == INLINE:
            return values.decode(row.body, zero_copy=False)
        data = self._engine.replica.bulk_data(name, row)
        if data is None:
            raise self._conflict(repr(name))
        return values.decode(data, zero_copy=True)

    def _decode(self, payload: Any) -> Any:
        if isinstance(payload, bytes):
            return values.decode(payload, zero_copy=False)
        return values.decode(self._engine.replica.bulk.map(payload), zero_copy=True)

    def _check(self, version: int, read: Record) -> None:
        """Raise `ConflictError` when what was just read was written after the snapshot."""
        if version > self._snapshot:
            detail = self._engine.replica.recent.conflict(read, version)
            if detail is not None:
                raise self._conflict(detail)

    def _conflict(self, detail: str) -> ConflictError:
        return ConflictError(
            f"{detail} changed after version {self._snapshot}, which this transaction reads: run "
            "it again",
            snapshot=self._snapshot,
        )

    def _check_open(self) -> None:
        if not self._open:
            raise ClosedError("the transaction is over: begin a new one")
        if self._engine is not self._pool.engine():
            self._open = False
            if self._engine.generation == -1:
                raise ConflictError("the pool's replica was begun anew meanwhile: run it again")
            raise ClosedError("the transaction belongs to the parent process: begin a new one")

    def _check_writable(self) -> None:
        self._check_open()
        self._pool.check_writable()


class TransactionMemory(ByteSlices):
    """Memory as a transaction sees it: reads are copies, writes wait for the commit."""

    def __init__(self, tx: Transaction, name: str, id: int, size: int, header: bytes) -> None:
        self._tx = tx
        self.name = name
        self.id = id
        self.size = size
        self.header = header
        self.deleted = False
        self._stores: list[tuple[int, bytes]] = []
        self._view: memoryview | None = None

    @property
    def version(self) -> int:
        """The version that the transaction's reads are of."""
        return self._tx.snapshot

    def read(self, offset: int, size: int) -> bytes:
        """Return a copy of the bytes, this transaction's own writes included."""
        offset, size = self.check(offset, size)
        self._check_deleted()
        if not size:
            return b""
        copy = bytearray(size)
        for start, end in self._not_stored(offset, offset + size):
            copy[start - offset : end - offset] = self._tx.read_base(self, start, end - start)
        for start, data in self._stores:
            overlay(copy, offset, start, data)
        return bytes(copy)

    def _not_stored(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the parts of a range that this transaction did not write itself."""
        gaps = [(start, end)]
        for stored, data in self._stores:
            stop = stored + len(data)
            if stored < end and start < stop:
                gaps = [
                    part
                    for low, high in gaps
                    for part in ((low, min(high, stored)), (max(low, stop), high))
                    if part[0] < part[1]
                ]
        return gaps

    def read_runs(self, chosen: Selection, flat: NDArray[np.uint8]) -> None:
        """Read a selection, run by run, so that only what was asked for can conflict."""
        runs = list(chosen.runs()) if len(chosen.offsets) <= MOST_RUNS else None
        if runs is None:
            start, end = chosen.bounds()
            source = np.frombuffer(self.read(start, end - start), np.uint8)
            for at, offset in enumerate((chosen.offsets - start).tolist()):
                flat[at] = source[offset : offset + chosen.run_bytes]
            return
        target = flat.reshape(-1)
        for offset, at, length in runs:
            target[at : at + length] = np.frombuffer(self.read(offset, length), np.uint8)

    def store(self, parts: list[tuple[int, bytes]]) -> None:
        """Buffer several writes."""
        self._check_deleted()
        self._tx.store(self, parts)
        self._stores += parts

    def fetch_add(self, offset: int, delta: Any, dtype: DTypeLike = "<i8") -> Any:
        """Add to the number at `offset` and return what it was; here that is a read and a write."""
        kind, encoded = encode_delta(delta, dtype)
        old = self.read(offset, len(encoded))
        with np.errstate(all="ignore"):
            new = np.frombuffer(old, kind) + np.frombuffer(encoded, kind)
        self.write(offset, new.astype(kind).tobytes())
        return np.frombuffer(old, kind)[0].item()

    def compare_and_swap(self, offset: int, expected: Buffer, new: Buffer) -> bool:
        """Replace `expected` at `offset` by `new`; returns False when something else is there."""
        old, wanted = bytes(as_bytes(expected)), bytes(as_bytes(new))
        if len(old) != len(wanted) or not old:
            raise InvalidError("expected and new must be equally long, and not empty")
        if self.read(offset, len(old)) != old:
            return False
        self.write(offset, wanted)
        return True

    def view(self, offset: int = 0, size: int | None = None) -> memoryview:
        """Refuse: inside a transaction there are only copies."""
        raise InvalidError("a transaction hands out no live views: use read, or pool.memory")

    def handle(self) -> "TransactionMemory | Array":
        """Return what the mapping returns for this object."""
        return Array(self, layout_of(self.header)) if self.header else self

    def mapped(self, engine: "Engine") -> memoryview:
        """Return the object's mapping."""
        if self._view is None:
            try:
                self._view = engine.replica.map_memory(self.id, self.size)
            except FileNotFoundError:
                raise ConflictError(
                    f"{self.name!r} was deleted after version {self.version}: run the "
                    "transaction again"
                ) from None
        return self._view

    def _check_deleted(self) -> None:
        if self.deleted:
            raise gone(self.name)


def check_size(size: Any) -> int:
    """Return a size in bytes for new memory; raises `InvalidError`."""
    try:
        checked = operator.index(size)
    except TypeError:
        checked = 0
    if not 1 <= checked <= MAX_MEMORY_BYTES:
        raise InvalidError(f"memory has 1 to {MAX_MEMORY_BYTES} bytes, not {size!r}")
    return int(checked)


def _check_prefix(prefix: object) -> None:
    if type(prefix) is not str or "\0" in prefix:
        raise InvalidError(f"a prefix is a str without NUL, not {prefix!r}")
