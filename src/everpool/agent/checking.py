"""Comparing a pool in a bucket with its checksums: every value, and every page, in the store."""

import time
from collections.abc import Callable

from everpool import values
from everpool.agent.values import CachedValues
from everpool.errors import EverpoolError
from everpool.replica.index import BULK, INLINE, MEMORY
from everpool.replica.replica import Replica
from everpool.replica.verify import Damage, Report

_REPORT_EVERY_S = 0.1
_PIECE_BYTES = 16 << 20


class Check:
    """One check of everything. `progress` gets the bytes read so far, and those in all so far."""

    def __init__(
        self, replica: Replica, bulk: CachedValues, progress: Callable[[int, int], None] | None
    ) -> None:
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
                    memories.ensure(row.id, offset, piece)
                    self._count(piece)
        return []

    def _count(self, size: int) -> None:
        self._read += size
        now = time.monotonic()
        if self._progress is not None and now - self._reported > _REPORT_EVERY_S:
            self._reported = now
            self._progress(self._read, max(self._total, self._read))
