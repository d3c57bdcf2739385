"""The steward: who makes checkpoints, so that the log stays short.

Every agent is one, and two at once are harmless: of two checkpoints of one log the later one
counts, and the other's objects are garbage. A checkpoint's version is the one that was applied
when its last page was gathered:

    upload dirty blocks, some at a time, and those again that were written meanwhile
    when few are left: stop playing, copy them, begin to read the index; go on playing
    upload them, the rows that changed since the checkpoint before, and last the manifest
    commit a record that names the manifest and raises the floor
    trim the log up to the checkpoint

A process that dies in between leaves garbage. Every replica that plays the record then takes over
where pages are (`Host.adopt`), and needs the tail only behind the checkpoint.
"""

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import lmdb

from everpool.agent.host import Host
from everpool.collection import needed_places
from everpool.errors import UnavailableError
from everpool.paging.regions import BLOCK_BYTES, BLOCK_SHIFT
from everpool.records import Checkpoint, Floor, Record, Reference
from everpool.replica.batch import Result, keys_in
from everpool.replica.bulk import key_of_value
from everpool.replica.effects import effects_of, entry_of
from everpool.replica.flush import floor_of
from everpool.replica.index import State
from everpool.segments.checkpoints import (
    is_due_whole,
    read_manifest,
    write_manifest,
    write_pages,
    write_runs,
)
from everpool.segments.format import Manifest, Page, Row, Run
from everpool.verdict import Add, Bind, BindMemory, SetHorizon, Store, Unbind, Verdict

# A checkpoint is due when this much was committed since the last one.
DUE_VERSIONS = int(os.environ.get("EVERPOOL_CHECKPOINT_VERSIONS", "8192"))
DUE_BYTES = 16 << 20
_LAST_BLOCKS = 1024
_ROUNDS = 8
# A new host asks for each run: so few bytes are not worth a request.
_LEAST_BYTES = 1024

Place = tuple[int, int]


class _Changed(NamedTuple):
    names: set[str]
    ids: set[int]
    garbage: set[str]


class Steward:
    """Makes checkpoints of one host's pool. One thread at a time."""

    def __init__(self, host: Host, commit: Callable[[Record], Result]) -> None:
        """`commit` returns what became of a record."""
        self._host = host
        self._commit = commit
        self._began = 0

    def due(self) -> bool:
        """Whether enough was committed since the last checkpoint."""
        state = self._host.replica.state()
        return (
            state.version - state.checkpoint >= DUE_VERSIONS
            or self._host.bytes_since_checkpoint >= DUE_BYTES
        )

    def checkpoint(self) -> int:
        """Make a checkpoint now; returns its version.

        Raises `UnavailableError` when the store or the log is away, or somebody else made one.
        """
        host = self._host
        host.adopt()
        before = host.replica.state()
        previous = read_manifest(host.store, before.manifest) if before.manifest else None
        if previous is not None and previous.version != host.flushed:
            raise UnavailableError("the checkpoint before is not taken over yet: try again")
        if before.version == before.checkpoint:
            return before.version
        self._began = before.version
        pages = self._upload_most()
        with host.playing:
            txn = host.replica.index.env.begin(buffers=True)
            state = host.replica.index.state(txn)
            rest = self._take(self._left(pages))
        with txn:
            places = write_pages(host.store, self._began, (data for _, _, data in rest))
            for (place, last, _), page in zip(rest, places, strict=True):
                pages[place] = (last, page)
            runs = self._write_runs(txn, state, previous, pages)
            pins = [pin.version for _, pin in host.replica.index.pins(txn)]
        past = [] if previous is None else [*previous.past, previous.place(before.manifest)]
        manifest = Manifest(
            state.pool,
            state.version,
            state.position,
            state.hash,
            state.time_ns,
            runs,
            needed_places(past, pins, state.horizon.kept),
        )
        key = write_manifest(host.store, self._began, manifest)
        now = host.replica.state()
        floor = floor_of(host.replica.index, now, state.version)
        built_on = 0 if previous is None else previous.version
        operations = [Floor(floor), Checkpoint(state.version, key, built_on, self._began)]
        result = self._commit(Record(now.version, [], [], [], list(operations)))
        if result.verdict is not Verdict.COMMITTED:
            raise UnavailableError(f"{result.detail}: somebody else was faster: try again")
        host.adopt()
        host.log.trim(manifest.position, key.encode())
        return state.version

    # Pages

    def _upload_most(self) -> dict[Place, tuple[int, Page]]:
        """Upload dirty blocks until few are left; returns them by place, with the last entry that
        each one has.
        """
        pages: dict[Place, tuple[int, Page]] = {}
        for _ in range(_ROUNDS):
            with self._host.playing:
                left = self._left(pages)
            if len(left) <= _LAST_BLOCKS:
                self._fetch(left)
                break
            for at in range(0, len(left), _LAST_BLOCKS):
                part = left[at : at + _LAST_BLOCKS]
                self._fetch(part)
                with self._host.playing:
                    taken = self._take(part)
                written = (data for _, _, data in taken)
                places = write_pages(self._host.store, self._began, written)
                for (place, last, _), page in zip(taken, places, strict=True):
                    pages[place] = (last, page)
        return pages

    def _left(self, pages: dict[Place, tuple[int, Page]]) -> list[Place]:
        """Return what was written since it was uploaded, if ever. Call while nothing is played."""
        return [
            (id, block)
            for id, blocks in self._host.blocks.dirty().items()
            for block, last in blocks.items()
            if (id, block) not in pages or pages[id, block][0] != last
        ]

    def _fetch(self, places: list[Place]) -> None:
        """Have blocks in memory, before anybody has to wait for them."""
        by_object: dict[int, list[tuple[int, int]]] = {}
        for id, block in places:
            by_object.setdefault(id, []).append((block << BLOCK_SHIFT, BLOCK_BYTES))
        for id, ranges in by_object.items():
            self._host.blocks.fill_if_there(id, ranges)

    def _take(self, places: list[Place]) -> list[tuple[Place, int, bytes]]:
        """Return copies of blocks, with the last entry each one has. Nothing may be played."""
        blocks = self._host.blocks
        self._fetch(places)
        dirty = blocks.dirty()
        return [
            ((id, block), dirty[id][block], blocks.copy(id, block))
            for id, block in places
            if id in dirty and block in dirty[id]
        ]

    # Rows

    def _write_runs(
        self,
        txn: lmdb.Transaction,
        state: State,
        previous: Manifest | None,
        pages: dict[Place, tuple[int, Page]],
    ) -> list[Run]:
        index, store = self._host.replica.index, self._host.store
        rows = {place: page.row() for place, (_, page) in pages.items()}
        kept = [] if previous is None else previous.runs
        if previous is None or is_due_whole(kept, _LEAST_BYTES):
            dumped: Iterator[Row] = iter(index.dump(txn))
            runs = write_runs(store, self._began, dumped, 0, state.version)
            places = index.rows_of(txn, set(), set(), rows, set(), state.version)
            return [*runs, *write_runs(store, self._began, places, 1, state.version)]
        names, ids, garbage = self._changed(txn, previous.version)
        delta = index.rows_of(txn, names, ids, rows, garbage, previous.version)
        return [*kept, *write_runs(store, self._began, delta, previous.version, state.version)]

    def _changed(self, txn: lmdb.Transaction, after: int) -> _Changed:
        """Return which names, memory and dead objects the entries after a version changed."""
        changed = _Changed(set(), set(), set())
        for _, row in self._host.replica.index.tail_after(txn, after):
            for _, effect, resolved in effects_of(entry_of(row), row):
                if isinstance(effect, (Bind, BindMemory, Unbind)):
                    changed.names.add(effect.name)
                if isinstance(effect, (BindMemory, Unbind, Store, Add)):
                    changed.ids.add(resolved.id)
                if isinstance(effect, SetHorizon) and effect.record is not None:
                    changed.garbage.update(effect.record.dead)
                    changed.garbage.update(keys_in(resolved.old))
                if isinstance(effect, (Bind, Store)) and isinstance(effect.payload, Reference):
                    changed.garbage.add(key_of_value(effect.payload.file))
        return changed
