"""Making checkpoints of a pool at a path.

A checkpoint is exactly of one version, and nobody waits for it longer than it takes to copy a few
blocks:

    copy the blocks that were written since the checkpoint before, and those again that were
    written meanwhile
    when few are left: with the writer's lock held, copy them, and begin to read the index: that
    is the checkpoint's version
    write them, the rows that changed since the checkpoint before, and a manifest
    archive the entries up to that version
    commit a record that names the manifest

Whoever dies in between leaves files that nothing names. All files are durable before the record
is. One process at a time does this, by the steward's lock; a second one would do no harm.
"""

import contextlib
import heapq
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, groupby, islice
from pathlib import Path
from typing import NamedTuple

import lmdb

from everpool.agent.collector import Progress as Collected
from everpool.collection import needed_places
from everpool.commit import Committer, Submission
from everpool.errors import (
    ClosedError,
    ConflictError,
    EverpoolError,
    ExistsError,
    NotFoundError,
    UnavailableError,
)
from everpool.interrupts import NOTICE_S, check, deferred
from everpool.past.collector import Finder, delete, unfinished
from everpool.past.entries import PathEntries
from everpool.past.folder import PastFolder
from everpool.records import Checkpoint, Operation, Pin, Record, Unpin, payload_size
from everpool.replica.dirty import BLOCK_SHIFT
from everpool.replica.effects import effects_of, entry_of
from everpool.replica.index import Index, State, is_page, translated
from everpool.replica.memories import MemoryFiles
from everpool.replica.replica import Replica
from everpool.segments.checkpoints import (
    is_due_whole,
    key_of_pages,
    read_run,
    write_manifest,
    write_pages,
    write_runs,
)
from everpool.segments.format import Manifest, Page, Row, Run
from everpool.store import Store
from everpool.verdict import Add, Bind, BindMemory, Unbind
from everpool.verdict import Store as Stored

_BLOCK_BYTES = 1 << BLOCK_SHIFT
# So many blocks go into one segment, and so many are copied while nobody commits.
_BLOCKS_AT_ONCE = 1024
_LAST_BLOCKS = 128
_ROUNDS = 8
_ROWS_AT_ONCE = 32
_LEAST_BYTES = 1 << 20
# So long after a collection, or after so many checkpoints, the next one is due.
COLLECT_S = float(os.environ.get("EVERPOOL_COLLECT_S", "3600"))
_COLLECT_CHECKPOINTS = 64
_COLLECT_TRIES = 5
_PAGES = b"1"  # what the keys of pages begin with
_NOTHING = bytes(_BLOCK_BYTES)

Place = tuple[int, int]
Progress = Callable[[int, int], None]
Tell = Callable[[Collected], None]


class Copied(NamedTuple):
    """A block that was copied when memory had everything up to a version, and perhaps more.

    No page: it is zeros, and was never anything else.
    """

    applied: int
    page: Page | None


class Changes:
    """What the entries behind a version did, as far as was looked."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.names: set[str] = set()
        self.ids: set[int] = set()
        # By object and block: the version that wrote to it last.
        self.blocks: dict[int, dict[int, int]] = {}

    def look(self, index: Index, txn: lmdb.Transaction, most: int | None = None) -> bool:
        """Look at the entries that came since the last look; False when there are more."""
        rows = 0
        for last, row in islice(index.tail_after(txn, self.version), most):
            rows += 1
            for version, effect, resolved in effects_of(entry_of(row), row):
                if version <= self.version:
                    continue
                if isinstance(effect, (Bind, BindMemory, Unbind)):
                    self.names.add(effect.name)
                if isinstance(effect, (BindMemory, Unbind, Stored, Add)):
                    self.ids.add(resolved.id)
                if isinstance(effect, Stored):
                    self._wrote(version, effect.id, effect.offset, payload_size(effect.payload))
                elif isinstance(effect, Add):
                    self._wrote(version, effect.id, effect.offset, len(effect.delta))
                elif isinstance(effect, Unbind):
                    self.blocks.pop(effect.id, None)
            self.version = last
        return most is None or rows < most

    def _wrote(self, version: int, id: int, offset: int, size: int) -> None:
        if size:
            blocks = self.blocks.setdefault(id, {})
            for block in range(offset >> BLOCK_SHIFT, ((offset + size - 1) >> BLOCK_SHIFT) + 1):
                blocks[block] = version

    def left(self, copied: dict[Place, Copied]) -> list[Place]:
        """Return the blocks that were written and not copied since."""
        return [
            (id, block)
            for id, blocks in self.blocks.items()
            for block, version in blocks.items()
            if (id, block) not in copied or copied[id, block].applied < version
        ]


class Keeper:
    """Makes the checkpoints of one pool in this process."""

    def __init__(
        self, folder: Path, replica: Replica, committer: Committer, timeout_s: float
    ) -> None:
        assert isinstance(replica.memories, MemoryFiles) and replica.lock is not None
        self.past = PastFolder(folder, replica.bulk)
        self._replica = replica
        self._memories = replica.memories
        self._lock = replica.lock
        self._committer = committer
        self._timeout_s = timeout_s
        self._turn = threading.Lock()
        self._closed = False
        self._collecting: threading.Thread | None = None
        self._looked_s: float | None = None
        # The segments of pages that the checkpoint under way wrote.
        self._segments: set[str] = set()
        self._checkpoints = 0

    def close(self) -> None:
        """Stop what goes on in the background."""
        self._closed = True
        if self._collecting is not None:
            self._collecting.join()
        with self._turn:
            pass

    def begin(self) -> None:
        """Keep a past from now on."""

        def begin() -> None:
            state = self._replica.state()
            if not self._replica.bulk.keeps_past():
                self.past.begin(state.pool, state.version)

        if not self._replica.bulk.keeps_past():
            self._committer.settled(begin)

    def checkpoint(self, progress: Progress | None = None) -> int:
        """Make a checkpoint, and begin the past with it if there is none; returns its version.

        `progress` is called with the bytes of memory copied so far, and those to be copied.
        """
        self.begin()
        with self._steward(self._timeout_s):
            return self._checkpoint(progress)

    def checkpoint_quietly(self) -> None:
        """Make a checkpoint where there is a past, unless another process is about to."""
        if self._replica.bulk.keeps_past():
            with self._steward(0):
                self._checkpoint(None)

    def collect(self, dry_run: bool = False, tell: Tell | None = None) -> Collected:
        """Delete from the past what no version needs that is kept; returns what came of it.

        With `dry_run` nothing is changed, and what is returned is what would be.
        """
        if not self._replica.bulk.keeps_past():
            return Collected()
        with self._steward(self._timeout_s):
            return self._collect(dry_run, tell)

    def collect_soon(self) -> None:
        """Begin to collect in the background, when that is due."""
        if self._closed or not self._collection_is_due():
            return
        if self._collecting is not None:
            if self._collecting.is_alive():
                return
            self._collecting.join()
        self._looked_s, self._checkpoints = time.monotonic(), 0
        thread = threading.Thread(
            target=self._collect_quietly, name="everpool-collect", daemon=True
        )
        with contextlib.suppress(RuntimeError):  # too many threads: later
            thread.start()
            self._collecting = thread

    def _collection_is_due(self) -> bool:
        if self._checkpoints >= _COLLECT_CHECKPOINTS:
            return True
        if self._looked_s is None:
            state = self._replica.state()
            return state.time_ns - state.horizon.collected_ns >= COLLECT_S * 1e9
        return time.monotonic() - self._looked_s >= COLLECT_S

    def _collect_quietly(self) -> None:
        with contextlib.suppress(EverpoolError), self._steward(0):
            self._collect(False, None)

    def _collect(self, dry_run: bool, tell: Tell | None) -> Collected:
        progress = Collected()

        def deleted(objects: int, size: int) -> None:
            progress.deleted += objects
            progress.deleted_bytes += size
            if tell is not None:
                tell(progress)

        with contextlib.closing(self.past.open()) as store:
            for last in reversed(range(_COLLECT_TRIES)):
                self._pause()
                found = Finder(self.past, self._replica, store, self._pause).find()
                progress.kept = self._replica.state().horizon.kept
                if found is None:
                    return progress
                progress.kept = found.record.kept
                if dry_run:
                    progress.deleted, progress.deleted_bytes = found.total()
                    return progress
                if not found.changed and not found.total()[0]:
                    return progress
                try:
                    self._commit([found.record])
                except ConflictError as error:  # a snapshot was taken meanwhile
                    if not last:
                        raise UnavailableError(f"nothing was collected: {error.message}") from error
                    continue
                self.past.sweep()
                delete(store, found.steps, deleted, self._pause)
                break
        return progress

    def find(self, file: str) -> Path:
        """Return where a large value of the pool, or of its past, is."""
        return self._replica.bulk.find(file)

    def newest(self) -> tuple[Manifest | None, State]:
        """Return the newest checkpoint, None before the first, and what the pool's state is."""
        state = self._replica.state()
        with contextlib.closing(self.past.open()) as store:
            return self.past.manifest(store, state.manifest), state

    @contextlib.contextmanager
    def pinned(self, name: str, version: int) -> Iterator[None]:
        """Keep a version alive in the block, by a snapshot that is gone afterwards.

        It stays when the process dies in between, until the same is done again.
        """
        with self._replica.index.read() as txn:
            known = {pin[0] for pin in self._replica.index.pins(txn)}
        unpin: list[Operation] = [Unpin(name)] if name in known else []
        try:
            self._commit([*unpin, Pin(name, version)])
        except (ExistsError, NotFoundError) as error:
            raise UnavailableError(f"somebody else makes a {name}: try again") from error
        try:
            yield
        finally:
            with contextlib.suppress(NotFoundError):  # somebody forgot it meanwhile
                self._commit([Unpin(name)])

    @contextlib.contextmanager
    def _steward(self, timeout_s: float) -> Iterator[None]:
        deadline = time.monotonic() + timeout_s
        with deferred():
            while not self._turn.acquire(timeout=NOTICE_S):
                check()
                if time.monotonic() > deadline:
                    raise _busy("another thread", timeout_s)
            try:
                if not self._lock.acquire_steward(max(0.0, deadline - time.monotonic())):
                    raise _busy("another process", timeout_s)
                try:
                    yield
                finally:
                    self._lock.release_steward()
            finally:
                self._turn.release()

    def _pause(self) -> None:
        """Let go of it here when that is wanted: nothing is half done."""
        check()
        if self._closed:
            raise ClosedError("the pool is closed: open it again")

    def _checkpoint(self, progress: Progress | None) -> int:
        self._pause()
        replica = self._replica
        with contextlib.closing(self.past.open()) as store:
            state = replica.state()
            previous = self.past.manifest(store, state.manifest)
            if previous is None and not state.version:
                return 0  # the empty pool needs no checkpoint to begin with
            if previous is not None or not state.manifest:
                self._tidy(store, -1 if previous is None else previous.version)
            began = state.version
            changes = Changes(began if previous is None else previous.version)
            if previous is None:
                changes.blocks = self._all_blocks(began)
            self._segments = set()
            copied = self._copy_most(store, changes, progress, skip_zeros=previous is None)
            if previous is not None and self._is_same(changes):
                return previous.version
            txn, state, rest = self._committer.settled(lambda: self._copy_rest(changes, copied))
            with txn:
                self._write(store, rest, copied, state.version)
                written = {place: one.page for place, one in copied.items() if one.page}
                pages = _alive(replica.index, txn, written)
                runs = self._write_runs(store, txn, state, previous, changes, pages)
                pins = [pin.version for _, pin in replica.index.pins(txn)]
            marker = self.past.marker()
            places = []
            if previous is not None:
                places = [*previous.past, previous.place(replica.state().manifest)]
                places = needed_places(places, pins, max(state.horizon.kept, places[0].version))
            manifest = Manifest(
                state.pool,
                state.version,
                state.position,
                state.hash,
                state.time_ns,
                runs,
                places,
            )
            key = write_manifest(store, began, manifest)
            if previous is not None:
                after = previous.position
            else:
                after = 0 if marker is not None and not marker.began else state.position
            # What was copied, and written again or deleted meanwhile, is nobody's.
            self._segments -= {page.segment for page in pages.values()}
            store.delete([key_of_pages(segment) for segment in self._segments])
            self._archive(store, state, after)
            self._commit([Checkpoint(state.version, key, state.checkpoint, began)])
            self._checkpoints += 1
            return state.version

    def _tidy(self, store: Store, newest: int) -> None:
        """Delete what checkpoints left behind since the newest one, whose makers died."""
        if unfinished(store, newest, self._replica.state().version):
            # A dead one's last record may be on the disk and not in the index yet.
            state = self._committer.settled(self._replica.state)
            if state.checkpoint == max(newest, 0):
                store.delete(unfinished(store, newest, state.version))

    def _is_same(self, changes: Changes) -> bool:
        index = self._replica.index
        with index.read() as txn:
            changes.look(index, txn)
        return not (changes.names or changes.ids or changes.blocks)

    def _archive(self, store: Store, state: State, after: int) -> None:
        entries = PathEntries(self._replica, store, state.pool)
        try:
            entries.archive(self.past, after, state.version)
        finally:
            entries.close()

    def _commit(self, operations: list[Operation]) -> None:
        record = Record(self._replica.version(), [], [], [], operations)
        submission = Submission(record, [])
        self._committer.commit(submission)
        submission.version()

    # Pages

    def _all_blocks(self, version: int) -> dict[int, dict[int, int]]:
        """Return the blocks of all memory that may be other than zero."""
        index = self._replica.index
        with index.read() as txn:
            ids = list(index.memory_ids(txn))
        found: dict[int, dict[int, int]] = {}
        for id in ids:
            row = self._replica.memory_row(id)
            if row is None:
                continue
            with translated("copying memory"), contextlib.suppress(FileNotFoundError):
                for start, size in self._memories.extents(id, row.size):
                    blocks = range(start >> BLOCK_SHIFT, ((start + size - 1) >> BLOCK_SHIFT) + 1)
                    found.setdefault(id, {}).update(dict.fromkeys(blocks, version))
        return found

    def _copy_most(
        self, store: Store, changes: Changes, progress: Progress | None, *, skip_zeros: bool
    ) -> dict[Place, Copied]:
        """Copy blocks until few are left."""
        copied: dict[Place, Copied] = {}
        done = 0
        for _ in range(_ROUNDS):
            self._look(changes)
            left = changes.left(copied)
            if len(left) <= _LAST_BLOCKS:
                break
            total = done + len(left)
            for at in range(0, len(left), _BLOCKS_AT_ONCE):
                self._pause()
                applied = self._replica.shared.applied  # before the bytes: they may be newer
                part = self._read(left[at : at + _BLOCKS_AT_ONCE])
                if skip_zeros:
                    for place, data in list(part.items()):
                        if place not in copied and data == _NOTHING[: len(data)]:
                            copied[place] = Copied(applied, None)
                            del part[place]
                self._write(store, part, copied, applied)
                done += len(left[at : at + _BLOCKS_AT_ONCE])
                if progress is not None:
                    progress(done << BLOCK_SHIFT, total << BLOCK_SHIFT)
        return copied

    def _look(self, changes: Changes) -> None:
        index = self._replica.index
        while True:
            with index.read() as txn:
                if changes.look(index, txn, _ROWS_AT_ONCE):
                    return
            self._pause()
            time.sleep(0)  # commits go first

    def _copy_rest(
        self, changes: Changes, copied: dict[Place, Copied]
    ) -> tuple[lmdb.Transaction, State, dict[Place, bytes]]:
        """Copy what is left, and begin to read the index. Nobody commits meanwhile."""
        index = self._replica.index
        txn = index.read()
        try:
            changes.look(index, txn)
            return txn, index.state(txn), self._read(changes.left(copied))
        except BaseException:
            txn.abort()
            raise

    def _read(self, places: list[Place]) -> dict[Place, bytes]:
        """Return the bytes of blocks, without those of memory that is gone."""
        found: dict[Place, bytes] = {}
        with translated("copying memory"):
            for id, some in groupby(sorted(places), key=lambda place: place[0]):
                row = self._replica.memory_row(id)
                if row is None:
                    continue
                try:
                    descriptor = os.open(self._memories.path(id), os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue  # deleted since
                try:
                    for place in some:
                        start = place[1] << BLOCK_SHIFT
                        size = min(_BLOCK_BYTES, row.size - start)
                        found[place] = os.pread(descriptor, size, start)
                finally:
                    os.close(descriptor)
        return found

    def _write(
        self, store: Store, part: dict[Place, bytes], copied: dict[Place, Copied], applied: int
    ) -> None:
        pages = write_pages(store, applied, part.values())
        self._segments.update(page.segment for page in pages)
        for place, page in zip(part, pages, strict=True):
            copied[place] = Copied(applied, page)

    # Rows

    def _write_runs(
        self,
        store: Store,
        txn: lmdb.Transaction,
        state: State,
        previous: Manifest | None,
        changes: Changes,
        pages: dict[Place, Page],
    ) -> list[Run]:
        index = self._replica.index
        kept = [] if previous is None else previous.runs
        after = 0 if previous is None else previous.version
        is_whole = previous is None or is_due_whole(kept, _LEAST_BYTES)
        names, ids = (set[str](), set[int]()) if is_whole else (changes.names, changes.ids)
        new = {place: page.row() for place, page in pages.items()}
        rows = index.rows_of(txn, names, ids, new, set(), after)
        if not is_whole:
            return [*kept, *write_runs(store, state.version, list(rows), after, state.version)]
        newest = (row for row in rows if is_page(row[0]))
        stored = _pages_of(store, kept)
        known: dict[bytes, bool] = {}
        merged = (row for row in _merged([*stored, newest]) if _is_alive(index, txn, row[0], known))
        rest = (row for row in index.dump(txn) if not is_page(row[0]))
        return write_runs(store, state.version, chain(merged, rest), 0, state.version)


def _busy(who: str, timeout_s: float) -> UnavailableError:
    return UnavailableError(f"{who} has been making a checkpoint for {timeout_s:g} s: try again")


def _alive(
    index: Index, txn: lmdb.Transaction, pages: dict[Place, Page]
) -> dict[Place, Page]:
    known = {id: index.memory_row(txn, id) is not None for id in {id for id, _ in pages}}
    return {place: page for place, page in pages.items() if known[place[0]]}


def _pages_of(store: Store, runs: list[Run]) -> list[Iterator[Row]]:
    """Return the rows of pages of each checkpoint among runs, oldest first."""

    def pages(some: list[Run]) -> Iterator[Row]:
        for run in some:
            for row in read_run(store, run):
                if is_page(row[0]):
                    yield row
                elif row[0] > _PAGES:
                    return

    return [pages(list(some)) for _, some in groupby(runs, key=lambda run: run.version)]


def _merged(streams: list[Iterator[Row]]) -> Iterator[Row]:
    """Yield rows in the order of their keys; of several with one key, that of the last stream."""

    def numbered(at: int, rows: Iterable[Row]) -> Iterator[tuple[bytes, int, bytes | None]]:
        for key, row in rows:
            yield key, at, row

    found = heapq.merge(*(numbered(at, rows) for at, rows in enumerate(streams)), key=_place_of)
    for _, some in groupby(found, key=lambda one: one[0]):
        *_, (key, _, row) = some
        yield key, row


def _place_of(numbered: tuple[bytes, int, bytes | None]) -> tuple[bytes, int]:
    return numbered[:2]


def _is_alive(index: Index, txn: lmdb.Transaction, key: bytes, known: dict[bytes, bool]) -> bool:
    id = key[1:9]
    if id not in known:
        known[id] = index.memory_row(txn, int.from_bytes(id, "big")) is not None
    return known[id]
