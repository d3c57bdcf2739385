"""The entries of a pool at a path: the archive that its past has, and the tail behind it.

An archived chunk is one of `log.bucket.format`. Its entries have the positions that they have in
the pool's own log, so any two chunks that overlap say the same: archiving twice does no harm.
"""

from collections.abc import Iterator
from itertools import islice

import lmdb

from everpool.errors import CorruptionError, NotFoundError
from everpool.log import Appended
from everpool.log.bucket.archive import Archive
from everpool.log.bucket.draft import MOST_ENTRIES
from everpool.log.bucket.format import CHUNKS, Head, Stored, encode_chunk, parse_span
from everpool.past.folder import PastFolder
from everpool.records import decode_entry
from everpool.replica.index import TailRow
from everpool.replica.replica import Replica
from everpool.store import Store

_PREFIX = "log"
_CHUNK_BYTES = 4 << 20
_CACHE_BYTES = 32 << 20
# Few, for what a reader pins makes commits slower.
_ROWS_AT_ONCE = 64


class PathEntries:
    """The entries behind the first checkpoint of a past. See `agent.past.Entries`."""

    def __init__(self, replica: Replica, store: Store, pool: bytes) -> None:
        self._replica = replica
        self._store = store
        self._pool = pool
        self._archive = Archive(store, _PREFIX, _CACHE_BYTES)

    def close(self) -> None:
        """Close the archive."""
        self._archive.close()

    def history(self, after: int, last: int | None = None) -> Iterator[Appended]:
        """Yield the entries behind position `after`, up to `last`, or to the end.

        Raises `NotFoundError` for entries that are not there any more.
        """
        while last is None or after < last:
            rows = self._in_the_tail(after)
            if rows is None:
                rows = self._archived(after)
            before = after
            for item in rows:
                if last is not None and item.position > last:
                    return
                yield item
                after = item.position
            if after == before:
                return

    def _archived(self, after: int) -> Iterator[Appended]:
        end = self.end(after)
        if end <= after:
            raise NotFoundError(f"the entries behind position {after} are not there any more")
        head = Head(self._pool, b"", 1, end, end, 0, b"", (), ())
        return self._archive.history(head, after, end)

    def _in_the_tail(self, after: int) -> list[Appended] | None:
        """Return what follows a position, as far as is fetched at once; None when the tail begins
        behind it.
        """
        index = self._replica.index
        with index.read() as txn:
            if index.state(txn).position <= after:
                return []
            version = self._version_of(txn, after)
            rows = [row for _, row in islice(index.tail_after(txn, version), _ROWS_AT_ONCE)]
        if not rows or _base_of(rows[0]) != after:
            return None
        return [Appended(after + at, row.time_ns, row.entry) for at, row in enumerate(rows, 1)]

    def _version_of(self, txn: lmdb.Transaction, position: int) -> int:
        """Return the version that the first entry behind a position follows, of those in the tail:
        by bisection, for the tail is in the order of versions.
        """
        index = self._replica.index
        low, high = 0, index.state(txn).version
        while low < high:
            middle = (low + high) // 2
            last, row = next(index.tail_after(txn, middle))
            if _base_of(row) >= position:
                high = middle
            else:
                low = last
        return low

    # Archiving

    def end(self, after: int) -> int:
        """Return the last position that is archived, or `after` when that is later."""
        folder = f"{_PREFIX}/{CHUNKS}"
        end = after
        for listed in self._store.list(folder, f"{folder}/{max(0, after - MOST_ENTRIES):020d}"):
            span = parse_span(listed.key)
            end = end if span is None else max(end, span[1])
        return end

    def archive(self, folder: PastFolder, after: int, version: int) -> None:
        """Archive, durably, the entries behind a position up to a version, and the large values
        that only they need.

        What was archived is passed over. The tail must reach back to `after`.
        """
        after = self.end(after)
        index = self._replica.index
        with index.read() as txn:
            if after > index.state(txn).position:
                raise CorruptionError(
                    f"{folder.path} is the past of another pool, or of a later one: move it away"
                )
            at = self._version_of(txn, after)
        part: list[Stored] = []
        files: list[str] = []
        size = 0
        while at < version:
            with index.read() as txn:
                rows = list(islice(index.tail_after(txn, at), _ROWS_AT_ONCE))
            for at, row in rows:
                if at > version:
                    break
                if not part and _base_of(row) != after:
                    raise CorruptionError(
                        f"the entry behind position {after} is neither archived nor in the tail: "
                        f"move {folder.path} away, which ends the past, and make a checkpoint"
                    )
                part.append(Stored(bytes(16), bytes(8), row.time_ns, len(row.entry), row.entry))
                files += row.garbage
                size += len(row.entry)
                if len(part) >= MOST_ENTRIES or size >= _CHUNK_BYTES:
                    after = self._write(folder, after, part, files)
                    part, files, size = [], [], 0
        if part:
            self._write(folder, after, part, files)

    def _write(
        self, folder: PastFolder, after: int, part: list[Stored], files: list[str]
    ) -> int:
        folder.keep(files)
        reference, data = encode_chunk(self._pool, after + 1, part)
        self._store.put(f"{_PREFIX}/{reference.key}", data)
        return reference.last


def _base_of(row: TailRow) -> int:
    return decode_entry(row.entry).base
