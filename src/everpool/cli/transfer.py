"""Objects carried from one pool to another, whatever kinds of pools these are.

A value is stored by one commit, many small ones together. Memory that differs in no more than
4 MiB is changed by one commit, too. Larger memory is filled in pieces, and meanwhile the
destination has a marker:

    commit 1       the marker `everpool/copying/HASH` and, unless it is there, the memory, all zero
    commits        pieces that differ, in any order; several are on their way at once
    last commit    the marker goes

So a reader who finds the marker knows that the object is half copied, and a second run goes on by
comparing: what is equal already is not written again.
"""

import bisect
import contextlib
import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import everpool
from everpool.cli import arrow_files
from everpool.cli.describe import (
    ARRAY,
    BATCH,
    BYTES,
    MEMORY,
    MEMORY_ARRAY,
    TABLE,
    TEXT,
    MemoryHandle,
    describe,
    kind_of,
)
from everpool.cli.files import BLOCK_BYTES, add_array, pieces
from everpool.cli.markers import COPYING, half_filled, is_marker, marker_of
from everpool.cli.tagged import to_json
from everpool.cli.terminal import Meter
from everpool.errors import ConflictError, CorruptionError, NotFoundError

BATCH_BYTES = 4 << 20
BATCH_OBJECTS = 256
ONE_COMMIT_BYTES = 4 << 20
_ATTEMPTS = 5
_WRITERS = 4
_ABSENT = object()

Extents = list[tuple[int, int]]


@dataclass
class Copied:
    """What a copy did; `bytes` are those that were written."""

    source: str
    target: str
    objects: int = 0
    bytes: int = 0
    unchanged: int = 0
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    verified: int | None = None
    differs: dict[str, str] = field(default_factory=dict[str, str])


class Shape(NamedTuple):
    """What memory in two pools must agree in: size, and for arrays type and lengths."""

    size: int
    array: tuple[Any, tuple[int, ...]] | None


def names_to_copy(source: everpool.Pool, prefix: str) -> Iterator[str]:
    """Yield the names under `prefix`, without the markers of what is half filled in the source."""
    return (name for name in source.names(prefix) if not is_marker(name))


class Copier:
    """One copy from `source` to `target`."""

    def __init__(
        self, source: everpool.Pool, target: everpool.Pool, result: Copied, meter: Meter
    ) -> None:
        self._source = source
        self._target = target
        self._result = result
        self._meter = meter
        self._batch: dict[str, Any] = {}
        self._batch_bytes = 0

    def run(self, prefix: str) -> None:
        """Copy what is missing or differs. Names that only the destination has stay.

        Raises `ConflictError`, in the end, when others changed memory as often as it was read.
        """
        conflict: ConflictError | None = None
        for name in names_to_copy(self._source, prefix):
            half = half_filled(self._source, name)
            if half is not None:
                self._result.left_out[name] = f"it is half {half} itself: finish that, or remove it"
                continue
            try:
                self._copy(name)
            except CorruptionError as error:
                self._result.left_out[name] = str(error)
            except ConflictError as error:
                conflict = error
            except NotFoundError:
                if name in self._source:
                    raise  # it is the destination where something was deleted
        self._store_batch()
        if conflict is not None:
            raise conflict

    def _copy(self, name: str) -> None:
        # The destination's first and only its digest kept, so that no two large values are held.
        there = None
        with contextlib.suppress(CorruptionError):  # damaged there: written again
            there = digest_of(self._target, name)
        value: Any = self._source[name]
        kind = kind_of(value)
        if kind in (MEMORY, MEMORY_ARRAY):
            self._copy_memory(name)
            return
        marked = marker_of(COPYING, name) in self._target
        if there is not None and not marked and there == digest_value(kind, value):
            self._result.unchanged += 1
            return
        size: int = describe(name, value)["size"]
        self._meter.begin(name, size)
        self._batch[name] = value
        self._batch_bytes += size
        self._count(size)
        if self._batch_bytes >= BATCH_BYTES or len(self._batch) >= BATCH_OBJECTS:
            self._store_batch()

    def _store_batch(self) -> None:
        def store(tx: everpool.Transaction) -> None:
            for name, value in self._batch.items():
                _remove_memory(tx, name)
                tx[name] = value

        if self._batch:
            self._target.run(store)
        self._result.objects += len(self._batch)
        self._batch, self._batch_bytes = {}, 0

    def _count(self, size_bytes: int) -> None:
        self._result.bytes += size_bytes
        self._meter.advance(size_bytes)

    # Memory

    def _copy_memory(self, name: str) -> None:
        conflict: ConflictError | None = None
        for _ in range(_ATTEMPTS):
            try:
                with self._source.transaction() as tx:
                    self._copy_version(tx, name)
                return
            except ConflictError as error:
                conflict = error
        raise ConflictError(
            f"{name!r} was changed as often as it was read ({conflict}): pause its writers and run "
            "the copy again, which goes on where this one stopped"
        )

    def _copy_version(self, tx: everpool.Transaction, name: str) -> None:
        """Copy memory as it is in the transaction's version."""
        shape = shape_of(tx[name])
        memory = tx.memory(name)
        there = self._same_shape(name, shape)
        differing = differences(memory, self._source.memory(name).extents(), there)
        first: list[tuple[int, bytes]] = []
        size = 0
        self._meter.begin(name, sum(size for _, size in self._source.memory(name).extents()))
        for offset, data in differing:
            first.append((offset, data))
            size += len(data)
            if size > ONE_COMMIT_BYTES:
                break
        marker = marker_of(COPYING, name)
        if there is not None and not first and marker not in self._target:
            memory.read(0, 1)  # raises when the name stands for another object now
            self._result.unchanged += 1
            return
        small = size <= ONE_COMMIT_BYTES
        if small:
            memory.read(0, 1)

        def begin(into: everpool.Transaction) -> None:
            if there is None:
                if name in into:
                    del into[name]
                _allocate(into, name, shape)
            if small:
                for offset, data in first:
                    into.memory(name).write(offset, data)
                if marker in into:
                    del into[marker]
            elif marker not in into:
                into[marker] = {"name": name}

        def end(into: everpool.Transaction) -> None:
            if marker in into:
                del into[marker]

        self._target.run(begin)
        if small:
            self._count(size)
        else:
            self._fill(name, first, differing)
            memory.read(0, 1)
            self._target.run(end)
        self._result.objects += 1

    def _same_shape(self, name: str, shape: Shape) -> everpool.Memory | None:
        value: Any = self._target.get(name) if name in self._target else None
        if kind_of(value) not in (MEMORY, MEMORY_ARRAY) or shape_of(value) != shape:
            return None
        return self._target.memory(name)

    def _fill(
        self, name: str, first: list[tuple[int, bytes]], rest: Iterator[tuple[int, bytes]]
    ) -> None:
        into = self._target.memory(name)
        going: list[Future[None]] = []
        with ThreadPoolExecutor(_WRITERS, "everpool-copy") as writers:
            for part in (first, rest):
                for offset, data in part:
                    if len(going) >= 2 * _WRITERS:
                        going.pop(0).result()
                    going.append(writers.submit(into.write, offset, data))
                    self._count(len(data))
                first = []
            for write in going:
                write.result()


def _remove_memory(tx: everpool.Transaction, name: str) -> None:
    """Make room for a value: memory of that name, and the marker of its copy, go."""
    marker = marker_of(COPYING, name)
    if marker in tx:
        del tx[marker]
    with contextlib.suppress(CorruptionError):  # a damaged value is replaced like any other
        if name in tx and kind_of(tx[name]) in (MEMORY, MEMORY_ARRAY):
            del tx[name]


def _allocate(tx: everpool.Transaction, name: str, shape: Shape) -> None:
    if shape.array is None:
        tx.allocate(name, shape.size)
    else:
        dtype, lengths = shape.array
        tx.allocate_array(name, lengths, dtype)


def shape_of(handle: Any) -> Shape:
    """Return what sets memory apart, besides its bytes."""
    if kind_of(handle) == MEMORY_ARRAY:
        return Shape(max(1, handle.nbytes), (handle.dtype, tuple(handle.shape)))
    return Shape(handle.size, None)


def differences(
    memory: MemoryHandle, extents: Extents, there: everpool.Memory | None
) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of what must be written to make `there` equal to `memory`.

    Outside of `extents` the memory is zero; None stands for new memory, which is all zero.
    """
    others = there.extents() if there is not None else []
    for offset, size in pieces(sorted([*extents, *others]), memory.size):
        data = memory.read(offset, size) if _touches(extents, offset, size) else bytes(size)
        old = bytes(size)
        if there is not None and _touches(others, offset, size):
            old = there.read(offset, size)
        if data != old:
            yield from _runs(offset, data, old)


def _touches(extents: Extents, offset: int, size: int) -> bool:
    last = bisect.bisect_left(extents, (offset + size,)) - 1
    return last >= 0 and sum(extents[last]) > offset


def _runs(offset: int, data: bytes, old: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the runs of blocks in which `data` differs from `old`."""
    begin: int | None = None
    for at in range(0, len(data), BLOCK_BYTES):
        same = data[at : at + BLOCK_BYTES] == old[at : at + BLOCK_BYTES]
        if same and begin is not None:
            yield offset + begin, data[begin:at]
            begin = None
        elif not same and begin is None:
            begin = at
    if begin is not None:
        yield offset + begin, data[begin:]


# Comparing


def difference(source: everpool.Pool, target: everpool.Pool, name: str) -> str | None:
    """Return in words how an object differs between two pools, or None."""
    if name not in target:
        return "it is missing"
    half = half_filled(target, name)
    if half is not None:
        return f"it is half {half}: run that again"
    kinds = kind_of(source[name]), kind_of(target[name])
    if kinds[0] != kinds[1]:
        return f"it is of kind {kinds[1]}, not {kinds[0]}"
    if kinds[0] not in (MEMORY, MEMORY_ARRAY):
        same = digest_of(target, name) == digest_of(source, name)
        return None if same else "its value is another one"
    if shape_of(source[name]) != shape_of(target[name]):
        return "its size, type or shape is another one"
    memory = source.memory(name)
    for offset, data in differences(memory, memory.extents(), target.memory(name)):
        return f"its bytes differ from {offset} to {offset + len(data)}, or in a part of these"
    return None


def digest_of(pool: everpool.Pool, name: str) -> Any:
    """Return what is equal for equal values of one type only; None for memory."""
    value: Any = pool.get(name, _ABSENT)
    if value is _ABSENT:
        return None
    kind = kind_of(value)
    return None if kind in (MEMORY, MEMORY_ARRAY) else digest_value(kind, value)


def digest_value(kind: str, value: Any) -> Any:
    """Return the digest of a value, with all that sets its type apart."""
    digest = hashlib.blake2b()
    if kind == BYTES:
        digest.update(value)
    elif kind == TEXT:
        digest.update(value.encode("utf-8", "surrogatepass"))
    elif kind == ARRAY:
        order = "F" if value.flags.fnc else "C"
        add_array(digest, value, order)
        return kind, value.dtype, value.shape, order, digest.digest()
    elif kind in (TABLE, BATCH):
        _add_table(digest, value)
    else:
        digest.update(to_json(value).encode())
    return kind, digest.digest()


class _Hashing:
    """A file that only hashes what is written to it."""

    closed = False

    def __init__(self, digest: Any) -> None:
        self._digest = digest
        self._size = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._digest.update(view)
        self._size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _add_table(digest: Any, table: Any) -> None:
    pa = arrow_files.arrow()
    with pa.ipc.new_stream(pa.PythonFile(_Hashing(digest), mode="w"), table.schema) as writer:
        writer.write(table)
