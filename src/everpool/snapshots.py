"""A pool's past: snapshots, looking back, and bringing back what was."""

import datetime
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from everpool.errors import InvalidError, NotFoundError
from everpool.memory import INLINE_STORE_BYTES
from everpool.records import (
    Allocate,
    Delete,
    Operation,
    Payload,
    Put,
    Record,
    Restore,
    Retain,
    Write,
)
from everpool.replica.bulk import Staged
from everpool.replica.index import BULK, INLINE, MEMORY, NameRow

if TYPE_CHECKING:
    from everpool.engine import Engine

_PIECE_BYTES = 1 << 20


class Snapshot(NamedTuple):
    """A version that has a name. `time` is when the name was given, by the log's clock (UTC).

    A locked one is kept until `locked_until`. `lock` says by what, as the store told it when the
    snapshot was made: `compliance`, the bucket lets nobody delete what it needs; `governance`,
    nobody who lacks a right of its own; `advisory: ...`, only Everpool refuses, and why.
    """

    name: str
    version: int
    time: datetime.datetime
    lock: str = ""
    locked_until: datetime.datetime | None = None


class Retention(NamedTuple):
    """How long versions are kept: while younger than `age`, or among the newest `versions`."""

    age: datetime.timedelta
    versions: int


class Collected(NamedTuple):
    """What a collection came to, in objects and their bytes.

    Versions from `kept` on can be looked at, and those of snapshots. `deleted` objects are gone, or
    would be; `dead` ones were found that nothing needs now, and go when what is kept no longer
    reaches back to them.
    """

    kept: int
    dead: int
    dead_bytes: int
    deleted: int
    deleted_bytes: int


def retention_of(engine: "Engine") -> Retention:
    """Return how long versions are kept."""
    horizon = engine.replica.state().horizon
    return Retention(datetime.timedelta(microseconds=horizon.age_ns // 1000), horizon.versions)


def retaining(now: Retention, age: datetime.timedelta | None, versions: int | None) -> Retain:
    """Return the operation that changes how long versions are kept; None changes nothing."""
    age = now.age if age is None else age
    versions = now.versions if versions is None else versions
    age_us = age // datetime.timedelta(microseconds=1)
    if age_us < 0 or type(versions) is not int or not 0 <= versions < 1 << 63:
        raise InvalidError(f"{age}, {versions} versions: neither can be less than nothing")
    return Retain(age_us * 1000, versions)


def snapshots_of(engine: "Engine") -> list[Snapshot]:
    """Return all snapshots, oldest version first."""
    with engine.replica.index.read() as txn:
        found = engine.replica.index.pins(txn)
    return [
        Snapshot(
            name,
            pin.version,
            _time_of(pin.time_ns),
            pin.lock,
            _time_of(pin.locked_until_ns) if pin.locked_until_ns else None,
        )
        for name, pin in found
    ]


def check_unlocked(snapshots: list[Snapshot], name: str) -> None:
    """Raise `InvalidError` while the snapshot of that name is locked."""
    for found in snapshots:
        until = found.locked_until
        if found.name == name and until is not None and until > datetime.datetime.now(datetime.UTC):
            raise InvalidError(
                f"the snapshot {name!r} is locked until {until.isoformat(' ', 'seconds')} "
                f"({found.lock}): forget it then",
                name=name,
            )


def version_of(engine: "Engine", when: object) -> int:
    """Return the version that a number, a snapshot's name or a time stands for."""
    if type(when) is int:
        return when
    if isinstance(when, str):
        for snapshot in snapshots_of(engine):
            if snapshot.name == when:
                return snapshot.version
        raise NotFoundError(f"there is no snapshot {when!r}: see `pool.snapshots()`", name=when)
    if isinstance(when, datetime.datetime):
        return engine.version_at(int(when.timestamp() * 1e9))
    raise InvalidError(f"{when!r} is no version, snapshot or datetime")


def _time_of(time_ns: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(time_ns / 1e9, datetime.UTC)


def restoring(now: "Engine", then: "Engine") -> tuple[Record, list[Staged]]:
    """Return the record that makes everything what it was, and what it stored for that.

    It conflicts with whatever is committed before it. Values are bound to the segments they had;
    of memory only the bytes that differ are written.
    """
    version, names = now.replica.names_at("")
    old = then.replica.names_at("")[1]
    operations: list[Operation] = []
    staged: list[Staged] = []
    created = inline = 0
    for name in sorted({*names, *old}):
        current, wanted = now.replica.find(name).row, then.replica.find(name).row
        if wanted is None:
            operations.append(Delete(name))
        elif wanted.kind == MEMORY:
            if current is None or current.id != wanted.id:
                if current is not None:
                    operations.append(Delete(name))
                operations.append(Allocate(name, wanted.size, bytes(wanted.body)))
                created += 1
                target, parts = -created, _written(then, wanted)
            else:
                target, parts = wanted.id, _different(now, then, wanted)
            for offset, data in parts:
                payload: Payload = data
                inline += len(data)
                if max(inline, 2 * len(data)) > INLINE_STORE_BYTES:
                    staged.append(now.stage_bytes(memoryview(data)))
                    payload = staged[-1].reference
                operations.append(Write(target, offset, payload))
        elif current is None or current.id != wanted.id:
            if current is not None and current.kind == MEMORY:
                operations.append(Delete(name))
            payload, stored = _payload(now, wanted)
            operations.append(Put(name, payload))
            staged += stored
    if operations:
        operations.insert(0, Restore(then.replica.version()))
    memory = [row for name in names if (row := now.replica.find(name).row) and row.kind == MEMORY]
    ranges = [(row.id, 0, row.size) for row in memory]
    return Record(version, list(names), [""], ranges, operations), staged


def _payload(now: "Engine", row: NameRow) -> tuple[Payload, list[Staged]]:
    assert row.kind in (INLINE, BULK)
    return (bytes(row.body), []) if row.kind == INLINE else now.again(row.reference())


def _written(engine: "Engine", row: NameRow) -> Iterator[tuple[int, bytes]]:
    """Yield the pieces of memory that were ever written to."""
    for start, size in engine.replica.memories.extents(row.id, row.size):
        for offset in range(start, start + size, _PIECE_BYTES):
            data = _read(engine, row, offset, min(_PIECE_BYTES, start + size - offset))
            if data.strip(b"\0"):
                yield offset, data


def _different(now: "Engine", then: "Engine", row: NameRow) -> Iterator[tuple[int, bytes]]:
    """Yield the pieces of memory that are not what they were, as they were; neighbours joined."""
    begin, joined = 0, b""
    extents = now.replica.memories.extents(row.id, row.size)
    for start, size in extents:  # whatever was written then has been written by now
        for offset in range(start, start + size, 1 << 16):
            length = min(1 << 16, start + size - offset)
            data = _read(then, row, offset, length)
            same = data == _read(now, row, offset, length)
            if joined and (same or begin + len(joined) != offset or len(joined) >= _PIECE_BYTES):
                yield begin, joined
                joined = b""
            if not same:
                begin, joined = (begin, joined + data) if joined else (offset, data)
    if joined:
        yield begin, joined


def _read(engine: "Engine", row: NameRow, offset: int, size: int) -> bytes:
    view = engine.replica.map_memory(row.id, row.size)
    return bytes(engine.replica.read_memory(row.id, "", view, offset, size)[0])
