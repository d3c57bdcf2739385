"""Memory as its agent has it: regions whose blocks are fetched when somebody wants them.

A block's bytes are those of its page in the newest checkpoint that this replica knows, or zeros,
and what the tail has stored since. A commit changes only blocks that are there; for the others
its bytes wait in the tail. A fill plays the tail over the page just before the block counts as
there, under the lock under which entries are played, so that no store falls in between.
"""

import contextlib
import mmap
import threading
from collections.abc import Callable, Iterable, Sequence

from everpool.errors import CorruptionError, NotFoundError
from everpool.paging.regions import (
    BLOCK_BYTES,
    BLOCK_SHIFT,
    Region,
    adopt,
    blocks_of,
    length_of,
)
from everpool.records import Payload
from everpool.replica.effects import effects_of, entry_of, overlay
from everpool.replica.index import Resolved
from everpool.replica.replica import Replica
from everpool.verdict import Add, Effect, Store, Unbind

Fetch = Callable[[Sequence[bytes]], list[bytes]]
_TRIES = 100
# A fill holds the pages of one part in its heap, and then the lock for as long as they are copied.
_FILLED_BYTES = 64 << 20


class BlockMemories:
    """The memory of one replica. `fetch` returns stored pages by their rows.

    `playing` is held by whoever plays entries. `attach` comes before everything else.
    """

    replica: Replica

    def __init__(self, name: str, fetch: Fetch, playing: threading.RLock) -> None:
        self._name = name
        self._fetch = fetch
        self._playing = playing
        self._regions: dict[int, Region] = {}
        # By object and block: the entries of the tail that wrote to it, by their last version.
        self._written: dict[int, dict[int, list[int]]] = {}

    def attach(self, replica: Replica, pids: Iterable[int]) -> None:
        """Begin with a replica, and with the regions that clients of a dead agent still have."""
        self.replica = replica
        for id, descriptor in adopt(self._name, pids).items():
            with replica.index.read() as txn:
                row = replica.index.memory_row(txn, id)
            if row is not None:
                self._regions[id] = Region(row.size, descriptor)
        with replica.index.read() as txn:
            flushed = replica.index.state(txn).flushed
            for last, row in replica.index.tail_after(txn, flushed):
                effects = [(e, r) for _, e, r in effects_of(entry_of(row), row)]
                self.note(last, effects)

    def note(self, last: int, applied: Iterable[tuple[Effect, Resolved]]) -> None:
        """Remember which blocks the entry that ends at version `last` wrote to."""
        for effect, _ in applied:
            if isinstance(effect, Store):
                payload = effect.payload
                size = len(payload) if isinstance(payload, bytes) else payload.size
            elif isinstance(effect, Add):
                size = len(effect.delta)
            else:
                if isinstance(effect, Unbind) and effect.size >= 0:
                    # Also what the same entry wrote to it before.
                    self._written.pop(effect.id, None)
                continue
            blocks = self._written.setdefault(effect.id, {})
            for block in blocks_of(effect.offset, size):
                known = blocks.setdefault(block, [])
                if not known or known[-1] != last:
                    known.append(last)

    def forget(self, flushed: int) -> None:
        """Pages have everything up to that version: forget the entries up to it."""
        for id, blocks in list(self._written.items()):
            for block, known in list(blocks.items()):
                kept = [last for last in known if last > flushed]
                if kept:
                    blocks[block] = kept
                else:
                    del blocks[block]
            if not blocks:
                del self._written[id]

    def dirty(self) -> dict[int, dict[int, int]]:
        """Return the blocks that were written since the newest checkpoint, by object, and the last
        version of the entry that wrote to each last. Call while nothing is played.
        """
        return {
            id: {block: known[-1] for block, known in blocks.items()}
            for id, blocks in self._written.items()
        }

    def fill_if_there(self, id: int, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch blocks of an object, unless it was deleted."""
        with contextlib.suppress(NotFoundError):
            region = self.region(id)
            self.fill(id, [(start, min(n, region.size - start)) for start, n in ranges])

    def copy(self, id: int, block: int) -> bytes:
        """Return the bytes of a block that is there. Call while nothing is played."""
        region, start = self.region(id), block << BLOCK_SHIFT
        return region.read(start, min(BLOCK_BYTES, region.size - start))

    def region(self, id: int) -> Region:
        """Return the object's region; raises `NotFoundError` when the object is gone."""
        with self._playing:
            known = self._regions.get(id)
            if known is None:
                row = self.replica.memory_row(id)
                if row is None:
                    raise NotFoundError(f"object {id} was deleted: look its name up again")
                known = self._regions[id] = Region.create(self._name, id, row.size)
            return known

    def strangers(self, regions: Iterable[tuple[int, int]]) -> list[int]:
        """Return which of a client's regions, as (object, inode), are not the ones that are kept.

        Whoever has mapped such a one will not see any change.
        """
        with self._playing:
            known = {id: region.inode for id, region in self._regions.items()}
        return [
            id
            for id, inode in regions
            if known.get(id) != inode and self.replica.memory_row(id) is not None
        ]

    def fill(self, id: int, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch the blocks that the ranges touch and that are not there, part by part."""
        region = self.region(id)
        if sum(size for _, size in ranges) <= _FILLED_BYTES:
            self._fill(region, id, ranges)
            return
        for start, size in ranges:
            for offset in range(start, start + size, _FILLED_BYTES):
                self._fill(region, id, [(offset, min(_FILLED_BYTES, start + size - offset))])

    def _fill(self, region: Region, id: int, ranges: Sequence[tuple[int, int]]) -> None:
        for _ in range(_TRIES):
            absent = region.absent(ranges)
            if not absent:
                return
            rows = self._rows(id, absent)
            pages = dict(zip(rows, self._fetch(list(rows.values())), strict=True))
            with self._playing:
                if self._rows(id, absent) != rows:
                    continue  # a checkpoint came in between, and the tail may have been trimmed
                self._publish(region, id, absent, pages)
        raise CorruptionError(f"blocks of object {id} change faster than they can be fetched")

    def _rows(self, id: int, blocks: list[int]) -> dict[int, bytes]:
        wanted = set(blocks)
        with self.replica.index.read() as txn:
            found = self.replica.index.pages(txn, id, blocks[0], blocks[-1])
            return {block: row for block, row in found if block in wanted}

    def _publish(self, region: Region, id: int, blocks: list[int], pages: dict[int, bytes]) -> None:
        written = self._written.get(id, {})
        changed = sorted({*pages, *(written.keys() & set(blocks))})
        stores = self._stores(id, {last for block in changed for last in written.get(block, ())})
        for block in changed:
            if region.present[block]:
                continue
            start = block << BLOCK_SHIFT
            content = bytearray(min(BLOCK_BYTES, region.size - start))
            page = pages.get(block)
            if page is not None:
                content[: len(page)] = page
            for offset, data in stores:
                overlay(content, start, offset, data)
            region.write(start, content)
        region.present[blocks] = 1

    def _stores(self, id: int, entries: set[int]) -> list[tuple[int, bytes | memoryview]]:
        """Return what entries of the tail stored in an object, in order."""
        found: list[tuple[int, bytes | memoryview]] = []
        index = self.replica.index
        for last in sorted(entries):
            with index.read() as txn:
                _, row = next(index.tail_after(txn, last - 1))
            for _, effect, resolved in effects_of(entry_of(row), row):
                if resolved.id == id and isinstance(effect, Store):
                    found.append((effect.offset, self._data(effect.payload)))
                elif resolved.id == id and isinstance(effect, Add):
                    found.append((effect.offset, resolved.new))
        return found

    def _data(self, payload: Payload) -> bytes | memoryview:
        if isinstance(payload, bytes):
            return payload
        try:
            return self.replica.bulk.map(payload)
        except NotFoundError as error:  # which would say that the object is gone
            raise CorruptionError(f"{error.message}: restore it from a copy") from error

    def written_extents(self, id: int) -> list[tuple[int, int]]:
        """Return the parts of an object that were ever written to, in whole blocks."""
        with self._playing, self.replica.index.read() as txn:
            row = self.replica.index.memory_row(txn, id)
            if row is None:
                raise NotFoundError(f"object {id} was deleted: look its name up again")
            pages = self.replica.index.pages(txn, id, 0, (row.size - 1) >> BLOCK_SHIFT)
            blocks = sorted({*(block for block, _ in pages), *self._written.get(id, {})})
        found: list[tuple[int, int]] = []
        for block in blocks:
            start = block << BLOCK_SHIFT
            size = min(BLOCK_BYTES, row.size - start)
            if found and sum(found[-1]) == start:
                found[-1] = (found[-1][0], found[-1][1] + size)
            else:
                found.append((start, size))
        return found

    # What the player does

    def create(self, id: int, size: int) -> None:
        """Do nothing: a region is made when somebody wants it."""

    def exists(self, id: int) -> bool:
        """Whether there is a region to change."""
        return id in self._regions

    def reserve(self, id: int, offset: int, size: int, limit: int) -> list[tuple[int, int]]:
        """Do nothing: shared memory is not reserved."""
        return []

    def give_back(self, id: int, holes: list[tuple[int, int]]) -> None:
        """Do nothing."""

    def write(self, id: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store the bytes in the blocks that are there."""
        region = self._regions.get(id)
        if region is not None:
            region.write_present(offset, data)

    def read(self, id: int, offset: int, size: int) -> bytes:
        """Return the bytes, which are fetched first if need be."""
        self.fill(id, [(offset, size)])
        return self.region(id).read(offset, size)

    def remove(self, id: int) -> None:
        """Let go of the region."""
        self._written.pop(id, None)
        region = self._regions.pop(id, None)
        if region is not None:
            region.close()

    def sweep(self, is_garbage: Callable[[int], bool]) -> None:
        """Let go of regions of objects that are no more."""
        for id in list(self._regions):
            if is_garbage(id):
                self.remove(id)

    # What a reader does; an agent reads through clients' eyes only in tests

    def ensure(self, id: int, offset: int, size: int) -> None:
        """Fetch the blocks that are not there."""
        self.fill(id, [(offset, size)])

    def is_whole(self, id: int) -> bool:
        """Whether all blocks are there."""
        return id in self._regions and bool(self._regions[id].present.all())

    def map(self, id: int, size: int) -> mmap.mmap:
        """Return a read-only mapping that begins with the object's bytes, fetched or not."""
        try:
            region = self.region(id)
        except NotFoundError as error:
            raise FileNotFoundError(str(error)) from error
        return mmap.mmap(region.descriptor, length_of(region.size), access=mmap.ACCESS_READ)

    def extents(self, id: int, size: int) -> list[tuple[int, int]]:
        """Return the parts that were ever written to."""
        return self.written_extents(id)

    def close(self) -> None:
        """Give all descriptors back."""
        for id in list(self._regions):
            self._regions.pop(id).close()
