"""Making mapped memory durable, so that the tail can be trimmed.

The tail is trimmed only past versions whose memory files were fsynced. After a failed fsync the
kernel may have forgotten the pages, so everything since the last good one is written again from
the tail before the next try is believed, whichever process makes it. One that died while it
flushed may have been told of a failure, so that counts as one.
"""

import contextlib
import time
from collections.abc import Iterator
from itertools import islice

from xxhash import xxh3_64_intdigest

from everpool.errors import EverpoolError
from everpool.records import Floor, Record
from everpool.replica.bulk import sync_folder
from everpool.replica.dirty import BLOCK_SHIFT, Dirty, Flushed, Written
from everpool.replica.index import Index, State, TailRow, translated
from everpool.replica.memories import MemoryFiles
from everpool.replica.replica import Replica
from everpool.replica.writer import Writer

# A flush is due when this much was committed since the last one.
FLUSH_VERSIONS = 1 << 13
FLUSH_BYTES = 32 << 20
# Transactions, watchers and outcomes may look back this far.
KEPT_VERSIONS = 1 << 14
KEPT_BYTES = 64 << 20
_ENTRIES_AT_ONCE = 32


class Flusher:
    """Flushes one replica. Call `begin`, `sync` and `commit` with the flusher's lock held."""

    def __init__(self, replica: Replica, writer: Writer) -> None:
        assert isinstance(replica.memories, MemoryFiles)
        self._replica = replica
        self._memories = replica.memories
        self._writer = writer
        # The tail's bytes after a flush that could not trim it.
        self._held_bytes = 0

    def due(self, version: int, tail_bytes: int, flushed: int) -> bool:
        """Whether enough was committed since the last flush."""
        return version - flushed >= FLUSH_VERSIONS or (
            tail_bytes >= max(KEPT_BYTES, self._held_bytes) + FLUSH_BYTES and version > flushed
        )

    def begin(self) -> tuple[int, Written]:
        """Return what `sync` has to make durable. Call with the writer's lock held.

        After a failed sync, what may be lost is written again first.
        """
        if self._replica.shared.unflushed:
            with translated("writing memory again after a failed fsync"):
                self._writer.rewrite(self._replica.state().flushed)
        return self._writer.take_written()

    def sync(self, version: int, written: Written) -> Flushed:
        """Make memory durable as of that version; commits go on meanwhile.

        Raises `UnavailableError` when the disk fails.
        """
        replica = self._replica
        with translated("making memory durable"):
            dirty = written.between(replica.state().flushed, version, self._tail)
            replica.shared.unflushed = 1
            for id in dirty.blocks:
                self._memories.sync(id)
            for folder in (self._memories.folder, *replica.bulk.folders()):
                sync_folder(folder)
            replica.shared.unflushed = 0
            return Flushed(version, self._checksums(dirty))

    def _tail(self, after: int) -> Iterator[tuple[int, TailRow]]:
        """Yield the entries behind a version.

        A few at a time: what a reader pins makes each commit slower, and for long.
        """
        index = self._replica.index
        while True:
            with index.read() as txn:
                rows = list(islice(index.tail_after(txn, after), _ENTRIES_AT_ONCE))
            if not rows:
                return
            yield from rows
            after = rows[-1][0]
            time.sleep(0)  # commits go first

    def commit(self, flushed: Flushed) -> None:
        """Note what is durable and raise the floor. Call with the writer's lock held."""
        state = self._replica.state()
        floor = floor_of(self._replica.index, state, flushed.version)
        self._held_bytes = 0
        if floor > max(state.checkpoint, state.floor) and self._replica.bulk.keeps_past():
            # What no checkpoint has yet is nowhere but in the tail.
            floor = max(state.checkpoint, state.floor)
            self._held_bytes = state.tail_bytes
        record = Record(state.version, [], [], [], [Floor(floor)])
        self._writer.commit([record], flushed)
        with translated("tidying up"):
            self._replica.bulk.sweep()
            self._memories.drop_deleted()

    def _checksums(self, dirty: Dirty) -> dict[int, dict[int, int]]:
        found: dict[int, dict[int, int]] = {}
        for id, blocks in dirty.blocks.items():
            row = self._replica.memory_row(id)
            if row is None:
                continue
            with contextlib.suppress(FileNotFoundError, EverpoolError):
                view = memoryview(self._replica.memories.map(id, row.size))
                found[id] = {block: block_checksum(view, block) for block in blocks}
        return found


def floor_of(index: Index, state: State, flushed: int) -> int:
    """Return the floor that keeps enough, and not much more, of the tail.

    It is not above `flushed`, up to which memory can be had without the tail.
    """
    floor = min(flushed, state.version - KEPT_VERSIONS)
    if state.tail_bytes > KEPT_BYTES:
        kept = 0
        with index.read() as txn:
            for version, size in index.tail_sizes_backwards(txn):
                kept += size
                if kept > KEPT_BYTES:
                    floor = max(floor, min(flushed, version))
                    break
    return max(floor, state.floor)


def block_checksum(view: memoryview, block: int) -> int:
    """Return the checksum of one block of memory."""
    start = block << BLOCK_SHIFT
    return xxh3_64_intdigest(view[start : start + (1 << BLOCK_SHIFT)])
