"""A replica: the log played into local memory, as one process uses it.

Reading takes no lock. The index is read in one short LMDB transaction. Memory is copied from a
mapping, and then put right: `applied` is read before the copy, the index after it, and the tail
holds every store in between, so playing those over the copy gives the bytes as of the version
that the index had, however the copy was torn. While nothing is being committed (`started` equals
`applied` before and after the copy) there is nothing to play.
"""

import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import lmdb

from everpool.errors import CorruptionError, NotFoundError, UnavailableError
from everpool.records import Record
from everpool.replica.bulk import BulkFiles
from everpool.replica.effects import effects_of, entry_of, overlay
from everpool.replica.index import (
    Index,
    MemoryRow,
    NameRow,
    State,
    TailRow,
    translate_os,
    translated,
)
from everpool.replica.lock import WriterLock, lock_at
from everpool.replica.memories import Memories, MemoryFiles, MutableMemories, missing
from everpool.replica.shared import REORDERS_LOADS, SharedPage, order_loads
from everpool.verdict import Add, Effect, Store, Writes, find_conflict, note_effects

_READ_TRIES = 100
_STALE_FILE_TRIES = 20
# So many small values are kept until somebody commits.
MOST_KEPT = 1 << 12
# Unlike any version, and unlike the -1 of a commit in flight.
_NEVER = -2


class Found(NamedTuple):
    """What a name is bound to, with a copy of the row's body, and the version of the look."""

    version: int
    row: NameRow | None


class Kept(NamedTuple):
    """Small immutable values as of one version, and LMDB's number of what led to it."""

    version: int
    number: int
    values: dict[str, Any]


class Parts(NamedTuple):
    """Where a replica has its bytes, when not in files of its own."""

    memories: Memories
    bulk: BulkFiles


class Replica:
    """A replica of a pool, in one process. Threads share it."""

    def __init__(self, folder: Path, *, read_only: bool, parts: "Parts | None" = None) -> None:
        """`parts` are those of a replica of a log elsewhere, which only its agent changes."""
        self.folder = folder
        self.read_only = read_only
        self.lock: WriterLock | None = None
        with translated(f"opening {folder}"):
            # Who waits for changes leaves a mark in the page, also when somebody else makes them.
            writable = not read_only or parts is not None
            self.shared = SharedPage(folder / "shared", writable=writable)
            self.index = Index(
                folder / "index", read_only=read_only, create=False, durable=parts is None
            )
            if parts is None and not read_only:
                self.lock = lock_at(folder / "lock")
                self.lock.page = self.shared
        self.bulk = BulkFiles(folder) if parts is None else parts.bulk
        self.memories: Memories = MemoryFiles(folder) if parts is None else parts.memories
        self.recent = Recent(self)
        self.trusted = self.shared.trusted()
        self._seen = (-1, 0)
        self.kept = Kept(_NEVER, _NEVER, {})

    def close(self) -> None:
        """Close what can be closed; mappings that are in use live on."""
        self.memories.close()
        self.shared.close()
        self.index.close()
        if self.lock is not None:
            self.lock.close()

    @property
    def stores(self) -> MutableMemories:
        """The memory, for the one who changes it."""
        return cast("MutableMemories", self.memories)

    # Versions

    def version(self) -> int:
        """Return the newest version that a reader sees."""
        settled = self.shared.settled() if self.trusted else -1
        if settled >= 0:
            return settled
        with self.index.read() as txn:
            return self.version_of(txn)

    def version_of(self, txn: lmdb.Transaction) -> int:
        """Return the version that an index transaction sees."""
        number = txn.id()
        seen, version = self._seen
        if seen != number:
            version = self.index.state(txn).version
            self._seen = (number, version)
        return version

    def state(self) -> State:
        with self.index.read() as txn:
            return self.index.state(txn)

    def quiet(self) -> int:
        """Return the version that mapped memory is exactly of, or -1 when it may be changing."""
        return self.shared.settled() if self.trusted else -1

    # Names

    def find(self, name: str) -> Found:
        """Return what `name` is bound to now."""
        with self.index.read() as txn:
            row = self.index.name(txn, name)
            if row is not None:
                row = row._replace(body=bytes(row.body))
            return Found(self.version_of(txn), row)

    def keep(self, number: int) -> "Kept":
        """Return where to keep immutable values that LMDB's transaction `number` has read."""
        kept = self.kept
        if kept.number != number:
            with self.index.read() as txn:
                version = self.version_of(txn)
                # Of no version, when something was committed since: nobody will look into it.
                kept = Kept(version, number, {}) if txn.id() == number else Kept(_NEVER, number, {})
            self.kept = kept
        return kept

    def names(self, prefix: str) -> Iterator[str]:
        """Yield the names under `prefix` in order. Each 8,192 names are of one version."""
        encoded = prefix.encode()
        after: bytes | None = b""
        while after is not None:
            with self.index.read() as txn:
                found, after = self.index.list_names(txn, encoded, after)
            for name in found:
                yield name.decode()

    def names_at(self, prefix: str) -> tuple[int, list[str]]:
        """Return the names under `prefix`, in order, and the version they are of."""
        encoded = prefix.encode()
        names: list[bytes] = []
        after: bytes | None = b""
        with self.index.read() as txn:
            while after is not None:
                found, after = self.index.list_names(txn, encoded, after)
                names += found
            return self.version_of(txn), [name.decode() for name in names]

    def bulk_data(self, name: str, row: NameRow) -> memoryview | None:
        """Return the mapped data of a value in a bulk file; None when it was replaced meanwhile."""
        with translated(f"reading {name!r}"):
            for _ in range(_STALE_FILE_TRIES):
                try:
                    return self.bulk.map(row.reference())
                except FileNotFoundError:
                    now = self.find(name).row
                    if now is None or now.id != row.id:
                        return None
                    time.sleep(0.001)
            raise CorruptionError(
                f"the file of {name!r} ({row.reference().file}) is missing: restore it from a copy",
                name=name,
            )

    # Memory

    def memory_row(self, id: int) -> MemoryRow | None:
        with self.index.read() as txn:
            return self.index.memory_row(txn, id)

    def memory_at(self, id: int) -> tuple[int, MemoryRow | None]:
        """Return an object's row and the version it is of."""
        with self.index.read() as txn:
            return self.version_of(txn), self.index.memory_row(txn, id)

    def read_memory(
        self, id: int, name: str, mapped: memoryview, offset: int, size: int
    ) -> tuple[bytes | bytearray, int]:
        """Return a copy of bytes of memory and the version that it is exactly of.

        Raises `NotFoundError` when the object is gone.
        """
        for _ in range(_READ_TRIES):
            self.memories.ensure(id, offset, size)
            # Before the copy, in either case: what comes later is played over it.
            applied = self.shared.applied if self.trusted else self.state().flushed
            if REORDERS_LOADS:
                order_loads()
            copy = bytearray(mapped[offset : offset + size])
            if REORDERS_LOADS:
                order_loads()
            with self.index.read() as txn:
                state = self.index.state(txn)
                if self.index.memory_row(txn, id) is None:
                    raise gone(name)
                if state.version <= applied:
                    return copy, state.version
                if self._play(txn, applied, id, offset, copy):
                    return copy, state.version
        raise UnavailableError(
            f"reading {size} bytes of {name!r} took longer than the pool keeps changes: "
            "read less at once"
        )

    def _play(
        self, txn: lmdb.Transaction, applied: int, id: int, start: int, copy: bytearray
    ) -> bool:
        """Play the tail after `applied` over a copy; False when the tail was trimmed past it."""
        expected = applied + 1
        for last, row in self.index.tail_after(txn, applied):
            if row.first_version > expected:
                return False
            expected = last + 1
            for version, effect, resolved in effects_of(entry_of(row), row):
                if version <= applied or resolved.id != id:
                    continue
                if type(effect) is Store:
                    payload = effect.payload
                    try:
                        data = payload if isinstance(payload, bytes) else self.bulk.map(payload)
                    except FileNotFoundError:
                        return False  # trimmed meanwhile
                    overlay(copy, start, effect.offset, data)
                elif type(effect) is Add:
                    overlay(copy, start, effect.offset, resolved.new)
        return True

    def map_memory(self, id: int, size: int) -> memoryview:
        """Return the mapping of an object; raises `FileNotFoundError` when it is gone."""
        with self.index.read() as txn:
            if self.index.memory_row(txn, id) is None:
                raise FileNotFoundError
        try:
            return memoryview(self.memories.map(id, size))[:size]
        except (OSError, CorruptionError) as error:
            lost = isinstance(error, (FileNotFoundError, CorruptionError))
            if lost and self.read_only and not self.trusted:
                raise unfinished(self.folder) from error
            if isinstance(error, CorruptionError):
                raise
            if lost and self.memory_row(id) is None:
                raise  # deleted between the two looks
            if lost:
                raise missing(id) from error
            raise translate_os(error, f"mapping object {id}") from error

    def settle(self, timeout_s: float) -> None:
        """Wait until mapped memory has all that the index has.

        Raises `UnavailableError` when a writer that was stopped in between does not go on.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            applied = self.shared.applied if self.trusted else -1
            with self.index.read() as txn:
                version = self.version_of(txn)
            if version <= applied:
                return
            if time.monotonic() >= deadline:
                raise UnavailableError(
                    f"memory is at version {applied}, the index at {version}: the writer "
                    f"(process {self.shared.holder}) is stopped; continue or end it"
                )
            time.sleep(0.0005)

    # The tail

    def changes(self, after: int, limit: int) -> tuple[int, list[tuple[int, TailRow]]]:
        """Return up to `limit` entries with versions after `after`, and the floor."""
        with self.index.read() as txn:
            floor = self.index.state(txn).floor
            rows: list[tuple[int, TailRow]] = []
            for item in self.index.tail_after(txn, after):
                rows.append(item)
                if len(rows) >= limit:
                    break
            return floor, rows


def unfinished(folder: Path) -> UnavailableError:
    """Return the error for a read-only pool that needs a writer's hand first."""
    return UnavailableError(
        f"the machine went down while {folder} was in use: open it for writing once, which "
        "finishes what was committed"
    )


def gone(name: str) -> NotFoundError:
    """Return the error for a handle whose object was deleted."""
    return NotFoundError(f"{name!r} was deleted or replaced: look it up again", name=name)


class Recent:
    """What was written lately, for transactions that check what they have read."""

    def __init__(self, replica: Replica) -> None:
        # Not a reference: a closed replica must go at once, with its descriptors.
        self._replica = weakref.ref(replica)
        self._mutex = threading.Lock()
        self._writes = Writes(0)
        self._top = 0

    def conflict(self, record: Record, version: int) -> str | None:
        """Return what `record` read that was written after its snapshot, up to `version`."""
        with self._mutex:
            if not self._cover(record.snapshot, version):
                return f"version {record.snapshot}, which is too old to be judged"
            return find_conflict(self._writes, record)

    def _cover(self, snapshot: int, version: int) -> bool:
        if snapshot < self._writes.base or self._top < snapshot:
            self._writes, self._top = Writes(snapshot), snapshot
        if self._top >= version:
            return True
        replica = self._replica()
        assert replica is not None
        with replica.index.read() as txn:
            if snapshot < replica.index.state(txn).floor:
                return False
            self._top = load_writes(replica.index, txn, self._writes, self._top)
        return True


def load_writes(index: Index, txn: lmdb.Transaction, writes: Writes, after: int) -> int:
    """Add to `writes` what the tail says was written after that version; returns the newest."""
    for last, row in index.tail_after(txn, after):
        by_version: dict[int, list[Effect]] = {}
        for version, effect, _ in effects_of(entry_of(row), row):
            if version > after:
                by_version.setdefault(version, []).append(effect)
        for version, effects in by_version.items():
            note_effects(writes, version, effects)
        after = last
    return after
