"""The collector of the past of a pool at a path: what no kept version needs is deleted.

What is kept is told by the log, as for a pool in a bucket (see `everpool.collection`): versions
from `kept` on, and those of snapshots. A version that is not kept never will be again.

    with the steward's lock held, so that nobody stores anything here meanwhile
    look for what can go
    commit a `Collect`, which says so, unless a snapshot was taken since
    delete large values and pages, then log chunks, then runs, and at last the manifests

Manifests are what a collection begins with, so what a death leaves half deleted is found by the
next one. The record's `start` is 0: nothing that was stored elsewhere, for a value to be, is void.

Whatever a past consists of is needed by the versions of one stretch, from its making to its being
replaced. So what a manifest or a chunk that goes has told of is in use still only if the nearest
place that stays, on either side, says so. Those and no others are read: what a collection costs
goes by what can be deleted, and by the index, not by all that is kept.
"""

import contextlib
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice
from typing import NamedTuple

import msgspec

from everpool.collection import Plan, needed_places, needed_spans, plan
from everpool.errors import CorruptionError, NotFoundError
from everpool.past.entries import PathEntries
from everpool.past.folder import PastFolder
from everpool.records import Collect
from everpool.replica.bulk import key_of_value
from everpool.replica.index import State, files_in, is_page, page_in, translated
from everpool.replica.replica import Replica
from everpool.segments.checkpoints import key_of_pages, read_manifest, read_run
from everpool.segments.format import Manifest, Past, Run, read_page_row
from everpool.store import Store

_AT_ONCE = 1000
_ROWS_AT_ONCE = 256
_END = 1 << 62

Span = tuple[int, int]
Sizes = dict[str, int]


class Found(NamedTuple):
    """What a collection may let go of: see `Collect`, and keys with their bytes, step by step."""

    record: Collect
    changed: bool
    steps: list[Sizes]

    def total(self) -> tuple[int, int]:
        """Return how many objects can go, and their bytes."""
        sizes = [size for step in self.steps for size in step.values()]
        return len(sizes), sum(sizes)


class Finder:
    """Looks for what can go, with the steward's lock held. `pause` may raise."""

    def __init__(
        self, past: PastFolder, replica: Replica, store: Store, pause: Callable[[], None]
    ) -> None:
        self._past = past
        self._replica = replica
        self._store = store
        self._pause = pause

    def find(self) -> Found | None:
        """Return what can go by now; None when there is no past to collect."""
        index = self._replica.index
        with index.read() as txn:
            state = index.state(txn)
            pins = [pin.version for _, pin in index.pins(txn)]
        marker, manifest = self._past.marker(), self._past.manifest(self._store, state.manifest)
        if marker is None or manifest is None or marker.pool() != state.pool:
            return None
        places = [*manifest.past, manifest.place(state.manifest)]
        places[:0] = earlier_places(self._store, places[0].version)
        if not marker.began:
            places.insert(0, Past(0, 0, 0, ""))  # the empty pool
        first = places[0].version
        horizon = msgspec.structs.replace(state.horizon, kept=max(state.horizon.kept, first))
        planned = plan(places, pins, horizon, state.version, state.time_ns)
        # Where the past begins is no matter of the log.
        kept = planned.kept if planned.kept > first else state.horizon.kept
        record = Collect(state.version, kept, 0, planned.islands, [])
        needed = needed_places(places, pins, planned.kept)
        steps = self._steps(state, needed, planned, manifest.runs)
        return Found(record, kept != state.horizon.kept, steps)

    def _steps(
        self, state: State, needed: list[Past], planned: Plan, newest: list[Run]
    ) -> list[Sizes]:
        stay = {place.key for place in needed}
        manifests = {
            listed.key: listed.size
            for listed in self._store.list("checkpoints")
            if listed.key not in stay and _version_in(listed.key) <= state.version
        }
        gone = {key: found for key in manifests if (found := self._readable(key)) is not None}
        known = sorted([*needed, *(one.place(key) for key, one in gone.items())], key=_order)
        spans = needed_spans(known, planned)
        entries = PathEntries(self._replica, self._store, state.pool)
        try:
            chunks = {
                listed.key: (listed, span)
                for listed, span in entries.chunks()
                if not _meets(span, spans)
            }
            if not manifests and not chunks:
                return []
            beside = _beside(needed, gone, (span for _, span in chunks.values()))
            found = set[str]()
            runs = {run.key: run for one in gone.values() for run in one.runs}
            done = set[str]()
            for manifest in sorted(gone.values(), key=lambda one: one.version):
                for key, row in self._rows(manifest.runs, done, careful=False):
                    found.update(_keys_in(key, row))
                done.update(run.key for run in manifest.runs)
            for listed, _ in chunks.values():
                self._pause()
                found.update(map(key_of_value, entries.files_in(listed)))
            for run in newest:
                runs.pop(run.key, None)
            for place in beside:
                for run in self._spare(place, found):
                    runs.pop(run.key, None)
            self._spare_behind(entries, beside, spans, found)
        finally:
            entries.close()
        return [
            self._there(sorted(found)),
            {key: listed.size for key, (listed, _) in chunks.items()},
            self._there(runs),
            manifests,
        ]

    def _readable(self, key: str) -> Manifest | None:
        """Return a manifest that is to go; None when it tells of nothing any more."""
        with contextlib.suppress(NotFoundError, CorruptionError):
            return read_manifest(self._store, key)
        return None

    def _rows(
        self, runs: list[Run], done: set[str], *, careful: bool
    ) -> Iterator[tuple[bytes, bytes]]:
        """Yield the rows of a checkpoint, without those of runs that are done.

        The newest row of a key counts, so the newest runs are read first. Unless `careful`, what
        is not there, or cannot be read, is passed over.
        """
        parts = [list(part) for _, part in groupby(runs, key=lambda run: run.version)]
        seen = set[bytes]()
        while parts:
            part = parts.pop()
            if part[0].key in done:
                return  # and all that is older
            for run in part:
                self._pause()
                try:
                    rows = read_run(self._store, run)
                except (NotFoundError, CorruptionError):
                    if careful:
                        raise
                    continue
                for at, (key, row) in enumerate(rows):
                    if not at % _ROWS_AT_ONCE:
                        time.sleep(0)  # commits go first
                    if key not in seen:
                        if row is not None:
                            yield key, row
                        if parts:  # nothing is older than the first
                            seen.add(key)

    def _spare(self, place: Past, found: set[str]) -> list[Run]:
        """Take out of `found` what the pool needed at a place; returns the runs of that place."""
        if not place.key:
            return []
        try:
            runs = read_manifest(self._store, place.key).runs
            for key, row in self._rows(runs, set(), careful=True):
                found.difference_update(_keys_in(key, row))
        except NotFoundError as error:
            raise CorruptionError(
                f"the past in {self._past.path} is not whole ({error.message}): nothing was "
                "collected; restore it from a copy, or delete that folder, which ends the past"
            ) from error
        return runs

    def _spare_behind(
        self, entries: PathEntries, beside: list[Past], spans: list[Span], found: set[str]
    ) -> None:
        """Take out of `found` what the entries between a place and its snapshot tell of."""
        starts = {place.position for place in beside}
        some = [span for span in spans if span[0] in starts and span[1] < _END]
        for listed, span in entries.chunks() if some else ():
            if _meets(span, some):
                self._pause()
                found.difference_update(map(key_of_value, entries.files_in(listed)))

    def _there(self, keys: Iterable[str]) -> Sizes:
        """Return those of the keys under which there is something, with their bytes."""
        sizes: Sizes = {}
        with translated("looking at what can be deleted"):
            for key in keys:
                with contextlib.suppress(FileNotFoundError):
                    sizes[key] = os.stat(self._past.path / key).st_size
        return sizes


def earlier_places(store: Store, version: int) -> list[Past]:
    """Return the places before a version, by the manifests that are there.

    The newest manifest may not tell of all of them, nor is all of what it tells of still there.
    """
    keys = [one.key for one in store.list("checkpoints") if _version_in(one.key) < version]
    places: list[Past] = []
    for key in keys:
        with contextlib.suppress(NotFoundError, CorruptionError):
            places.append(read_manifest(store, key).place(key))
    return places


def delete(
    store: Store, steps: list[Sizes], done: Callable[[int, int], None], pause: Callable[[], None]
) -> None:
    """Delete objects, each step durably before the next; `done` is told how many, and bytes."""
    for step in steps:
        following: Iterator[tuple[str, int]] = iter(step.items())
        while part := list(islice(following, _AT_ONCE)):
            pause()
            store.delete([key for key, _ in part])
            done(len(part), sum(size for _, size in part))


def unfinished(store: Store, newest: int, version: int) -> list[str]:
    """Return the keys of what checkpoints left behind that came to nothing.

    `newest` is the version of the newest checkpoint, -1 before the first; nothing of that has a
    later one in its name. What is younger than the pool itself, at `version`, is not ours.
    """
    return [
        listed.key
        for folder in ("checkpoints", "index", "pages")
        for listed in store.list(folder, f"{folder}/{newest + 1:016x}")
        if _version_in(listed.key) <= version
    ]


def _keys_in(key: bytes, row: bytes) -> list[str]:
    if is_page(key):
        return [key_of_pages(read_page_row(page_in(key, row)).segment)]
    return [key_of_value(file) for file in files_in(key, row)]


def _version_in(key: str) -> int:
    """Return the version that a key begins with; of what is not ours, one that never is."""
    try:
        return int(key.rpartition("/")[2][:16], 16)
    except ValueError:
        return _END


def _order(place: Past) -> tuple[int, str]:
    return place.version, place.key


def _meets(span: Span, spans: list[Span]) -> bool:
    return any(span[0] <= last and span[1] > after for after, last in spans)


def _beside(
    needed: list[Past], gone: dict[str, Manifest], chunks: Iterable[Span]
) -> list[Past]:
    """Return the places that stay, next to what goes."""
    orders = [_order(place) for place in needed]
    positions = [place.position for place in needed]
    right = {bisect_left(orders, _order(one.place(key))) for key, one in gone.items()}
    right |= {bisect_left(positions, last) for _, last in chunks}
    some = {at for one in right for at in (one - 1, one) if 0 <= at < len(needed)}
    return [needed[at] for at in sorted(some)]
