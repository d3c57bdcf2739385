"""The log, the rule that decides its records, and what they leave of names and bytes."""

import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from everpool import values
from everpool.errors import ConflictError, ExistsError
from everpool.records import RecordId

ByteRange = tuple[int, int, int]
"""An object's id, and the first byte and the one behind the last."""


@dataclass(frozen=True)
class ReadSet:
    """What a transaction learned: bindings of names, listings, bytes of memory."""

    names: set[str] = field(default_factory=set[str])
    prefixes: set[str] = field(default_factory=set[str])
    ranges: set[ByteRange] = field(default_factory=set[ByteRange])


@dataclass(frozen=True)
class WriteSet:
    """What a record changed: names bound or removed, those that came or went, and bytes."""

    names: set[str] = field(default_factory=set[str])
    came_or_went: set[str] = field(default_factory=set[str])
    ranges: set[ByteRange] = field(default_factory=set[ByteRange])


def conflict(reads: ReadSet, later: list[WriteSet]) -> str | None:
    """Return what was read and written `later`, in words, or None: the rule of the pool.

    `later` are the write sets of the records committed after the reader's snapshot.
    """
    for writes in later:
        for name in reads.names & writes.names:
            return repr(name)
        for prefix in reads.prefixes:
            for name in writes.came_or_went:
                if name.startswith(prefix):
                    return f"the names under {prefix!r}"
        for object_id, start, stop in reads.ranges:
            for written_id, written_start, written_stop in writes.ranges:
                if object_id == written_id and start < written_stop and written_start < stop:
                    return f"bytes {start} to {stop} of object {object_id}"
    return None


class Value:
    """A value as bytes: immutable, and replaced whole."""

    def __init__(self, name: str, value: object) -> None:
        self.name = name
        self.encoded = values.encode(value).tobytes()

    def decoded(self) -> Any:
        return values.decode(self.encoded, zero_copy=True)


class Memory:
    """Memory as the history of its writes over zeros, and a buffer for live views."""

    def __init__(
        self, id: int, name: str, size: int, shape: tuple[int, ...] | None, dtype: np.dtype[Any]
    ) -> None:
        self.id = id
        self.name = name
        self.size = size
        self.shape = shape
        self.dtype = dtype
        self.history: list[tuple[int, int, bytes]] = []  # version, offset, data
        self.live: mmap.mmap | None = None

    def content(self, start: int, stop: int, writes: list[tuple[int, bytes]]) -> bytes:
        """Return the bytes that the writes, in order, leave between `start` and `stop`."""
        result = bytearray(stop - start)
        for offset, data in writes:
            first, last = max(start, offset), min(stop, offset + len(data))
            if first < last:
                result[first - start : last - start] = data[first - offset : last - offset]
        return bytes(result)

    def writes_up_to(self, version: int) -> list[tuple[int, bytes]]:
        return [(offset, data) for at, offset, data in self.history if at <= version]

    def live_buffer(self) -> mmap.mmap:
        if self.live is None:
            no_reserve = 0x4000  # sparse: pages exist once they are written (Linux)
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
            self.live = mmap.mmap(-1, self.size, flags=flags)
            for _, offset, data in self.history:
                self.live[offset : offset + len(data)] = data
        return self.live


class Bind(NamedTuple):
    """Operation: `name` is now this object."""

    name: str
    target: Value | Memory


class Unbind(NamedTuple):
    """Operation: `name` and its object are gone."""

    name: str
    target: Value | Memory


class Store(NamedTuple):
    """Operation: the bytes of `target` from `offset` on are `data`."""

    target: Memory
    offset: int
    data: bytes


Operation = Bind | Unbind | Store


class Change(NamedTuple):
    """One thing that a commit changed. `offset` and `size` say which bytes of memory."""

    name: str
    kind: str
    version: int
    offset: int
    size: int


class Outcome(NamedTuple):
    """What became of a record: "committed" with its version, or "aborted"."""

    state: str
    version: int | None
    results: list[object]


class Report(NamedTuple):
    """What `verify` found."""

    ok: bool
    damage: list[str]


@dataclass
class Record:
    """A decided transaction: `version` is its place in the log."""

    id: RecordId
    version: int
    committed: bool
    operations: list[Operation]
    writes: WriteSet


class Log:
    """What all clients of one pool share."""

    def __init__(self, rule: Callable[[ReadSet, list[WriteSet]], str | None]) -> None:
        self.rule = rule
        self.changed = threading.Condition(threading.RLock())
        self.records: list[Record] = []
        self.bindings: dict[str, list[tuple[int, Value | Memory | None]]] = {}
        self.objects = 0

    @property
    def version(self) -> int:
        return len(self.records)

    def binding(self, name: str, version: int) -> Value | Memory | None:
        """Return what `name` was bound to at `version`."""
        for at, target in reversed(self.bindings.get(name, [])):
            if at <= version:
                return target
        return None

    def names(self, version: int) -> list[str]:
        return [name for name in self.bindings if self.binding(name, version) is not None]

    def conflict(self, reads: ReadSet, snapshot: int) -> str | None:
        """Return what the rule finds between the snapshot and now."""
        later = [record.writes for record in self.records[snapshot:] if record.committed]
        return self.rule(reads, later)

    def append(
        self, id: RecordId, snapshot: int, reads: ReadSet, operations: list[Operation]
    ) -> Record:
        """Decide a record and, when it commits, apply it. Either way it counts a version."""
        touched = self.conflict(reads, snapshot)
        over_memory = None if touched else self._put_over_memory(operations)
        record = Record(id, self.version + 1, not touched and not over_memory, [], WriteSet())
        if record.committed:
            record.operations = operations
            self._note_writes(record)
            for operation in operations:
                self._apply(operation, record.version)
        self.records.append(record)
        self.changed.notify_all()
        if touched:
            raise ConflictError(
                f"{touched} changed after version {snapshot}, which this transaction read: "
                "run it again",
                snapshot=snapshot,
                version=record.version,
            )
        if over_memory:
            raise ExistsError(f"{over_memory!r} is memory: delete it first", name=over_memory)
        return record

    def _put_over_memory(self, operations: list[Operation]) -> str | None:
        """Return the name that became memory since a blind put of a value looked, if any."""
        removed: set[str] = set()
        for operation in operations:
            if isinstance(operation, Unbind):
                removed.add(operation.name)
            elif isinstance(operation, Bind) and operation.name not in removed:
                bound = self.binding(operation.name, self.version)
                if isinstance(bound, Memory):
                    return operation.name
        return None

    def _note_writes(self, record: Record) -> None:
        after: dict[str, object] = {}
        for operation in record.operations:
            match operation:
                case Bind(name, target):
                    after[name] = target
                case Unbind(name):
                    after[name] = None
                case Store(target, offset, data):
                    record.writes.ranges.add((target.id, offset, offset + len(data)))
        for name, target in after.items():
            record.writes.names.add(name)
            if (target is None) != (self.binding(name, self.version) is None):
                record.writes.came_or_went.add(name)

    def _apply(self, operation: Operation, version: int) -> None:
        match operation:
            case Bind(name, target):
                if isinstance(target, Memory):
                    target.history.append((version, 0, b""))
                self.bindings.setdefault(name, []).append((version, target))
            case Unbind(name):
                self.bindings[name].append((version, None))
            case Store(target, offset, data):
                target.history.append((version, offset, data))
                if target.live is not None:
                    target.live[offset : offset + len(data)] = data
