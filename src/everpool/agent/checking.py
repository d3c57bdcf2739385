"""Comparing a pool in a bucket with its checksums: every value, and every page, in the store."""

import time
from collections.abc import Callable, Iterable

from everpool import values
from everpool.agent.values import CachedValues
from everpool.errors import EverpoolError
from everpool.paging.regions import blocks_of
from everpool.records import Reference
from everpool.replica.effects import effects_of, entry_of
from everpool.replica.index import BULK, INLINE, MEMORY
from everpool.replica.replica import Replica
from everpool.replica.verify import Damage, Report
from everpool.segments.checkpoints import read_pages
from everpool.store import Store
from everpool.verdict import Store as Stored

_REPORT_EVERY_S = 0.1
_PIECE_BYTES = 16 << 20


class Check:
    """One check of everything. `progress` gets the bytes read so far, and those in all so far."""

    def __init__(
        self,
        replica: Replica,
        bulk: CachedValues,
        store: Store,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._store = store
        self._replica = replica
        self._bulk = bulk
        self._progress = progress
        self._reported = 0.0
        self._damage: list[Damage] = []
        self._read = self._total = self._names = 0

    def run(self) -> Report:
        """Read everything, and return what is wrong."""
        for name in self._replica.names(""):
            try:
                for detail in self._check(name):
                    self._damage.append(Damage(name, detail))
            except EverpoolError as error:
                if error.kind == "unavailable":
                    raise
                self._damage.append(Damage(name, str(error)))
        for name, reference in self._in_the_tail():
            for detail in self._bulk.stored_damage(reference):
                self._damage.append(Damage(name, detail))
        return Report(self._damage, self._read, self._names)

    def _check(self, name: str) -> list[str]:
        row = self._replica.find(name).row
        if row is None:
            return []  # deleted meanwhile
        self._names += 1
        if row.kind == INLINE:
            values.decode(row.body, zero_copy=False)
            self._count(len(row.body))
        elif row.kind == BULK:
            self._total += row.size
            found = self._bulk.stored_damage(row.reference())
            now = self._replica.find(name).row
            if found and now is not None and now.id == row.id:
                return found
            self._count(row.size)
        elif row.kind == MEMORY:
            memories = self._replica.memories
            for start, size in memories.extents(row.id, row.size):
                self._total += size
                for offset in range(start, start + size, _PIECE_BYTES):
                    piece = min(_PIECE_BYTES, start + size - offset)
                    self._check_pages(row.id, offset, piece)
                    self._count(piece)
        return []

    def _check_pages(self, id: int, offset: int, size: int) -> None:
        # From the store, also what the host has in its memory already.
        blocks = blocks_of(offset, size)
        index = self._replica.index
        with index.read() as txn:
            rows = [row for _, row in index.pages(txn, id, blocks.start, blocks.stop - 1)]
        read_pages(self._store, rows)

    def _in_the_tail(self) -> Iterable[tuple[str, Reference]]:
        """Return what was stored in memory since the checkpoint and is a segment of its own."""
        index = self._replica.index
        found: dict[str, tuple[str, Reference]] = {}
        with index.read() as txn:
            for _, row in index.tail_after(txn, index.state(txn).flushed):
                for _, effect, resolved in effects_of(entry_of(row), row):
                    if isinstance(effect, Stored) and isinstance(effect.payload, Reference):
                        memory = index.memory_row(txn, resolved.id)
                        if memory is not None:
                            found[effect.payload.file] = memory.name, effect.payload
        return found.values()

    def _count(self, size: int) -> None:
        self._read += size
        now = time.monotonic()
        if self._progress is not None and now - self._reported > _REPORT_EVERY_S:
            self._reported = now
            self._progress(self._read, max(self._total, self._read))
