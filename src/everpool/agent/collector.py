"""The collector: who deletes what nothing needs any more.

Every agent may be one, and any number at once are harmless: what is let go of, and when, is decided
by `Collect` records in the log (see `everpool.collection`).

    make a checkpoint, where somebody waits for the collection
    commit a record that says what is kept: uploads from before that are void
    list the store; what began before that and is named by nothing in the newest state is dead
    commit a record that says so; both tell what nothing needs any more
    delete that, and what of the log's archive only older versions need

What is dead is looked for only behind the first record: until then, an old upload may be named.

Whoever dies in between leaves objects that the next collection finds.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import lmdb

from everpool.agent.host import Host
from everpool.collection import (
    MOST_COLLECTED,
    Plan,
    needed_spans,
    plan,
    unneeded,
)
from everpool.errors import UnavailableError
from everpool.records import Collect, Record, Reference, Write
from everpool.replica.batch import Result, keys_in
from everpool.replica.bulk import key_of_value
from everpool.replica.effects import entry_of
from everpool.replica.index import State
from everpool.segments.checkpoints import key_of_pages, read_manifest
from everpool.segments.format import Manifest, Past, read_page_row
from everpool.verdict import Verdict

_FOLDERS = ("checkpoints", "index", "pages", "values")
_DELETED_AT_ONCE = 1000


class Progress:
    """How far a collection is. `dead` objects may be deleted once nothing old needs them."""

    def __init__(self) -> None:
        self.listed = 0
        self.dead = 0
        self.dead_bytes = 0
        self.deleted = 0
        self.deleted_bytes = 0
        self.kept = 0


class _Planned(NamedTuple):
    state: State
    manifest: Manifest
    places: list[Past]
    plan: Plan

    @property
    def changed(self) -> bool:
        """Whether less is to be kept than by now."""
        return self.plan[:2] != (self.state.horizon.kept, self.state.horizon.start)


class _Found(NamedTuple):
    planned: _Planned
    # Keys with their sizes: of dead objects, of those which were dead before and are needed no
    # more, and of those for which that was decided already.
    dead: dict[str, int]
    gone: dict[str, int]
    free: dict[str, int]


class Collector:
    """Collects for one host's pool. One thread at a time."""

    def __init__(self, host: Host, commit: Callable[[Record], Result]) -> None:
        """`commit` returns what became of a record."""
        self._host = host
        self._commit = commit
        self.progress = Progress()

    def collect(self, dry_run: bool = False) -> int:
        """Find what is dead, and delete what nothing needs; returns how many were newly dead.

        With `dry_run` nothing is changed, and `progress` tells what would be. Raises
        `UnavailableError` when the store or the log is away, or when somebody else was faster.
        """
        host = self._host
        host.adopt()
        free = [] if dry_run else self._void()
        found = self._look(free, dry_run)
        if found is None:
            return 0
        progress, planned = self.progress, found.planned
        progress.kept = planned.plan.kept
        progress.dead += len(found.dead)
        progress.dead_bytes += sum(found.dead.values())
        spans = needed_spans(planned.places, planned.plan)
        if dry_run:
            progress.deleted += len(found.gone)
            progress.deleted_bytes += sum(found.gone.values())
            for listed in host.log.garbage(spans):
                progress.deleted += 1
                progress.deleted_bytes += listed.size
            return len(found.dead)
        # New hosts must not begin with what is about to go.
        position, manifest = planned.places[-1].position, planned.state.manifest
        if position and host.log.end().start.decode() != manifest:
            host.log.trim(position, manifest.encode())
        self._delete(found.free.items())
        left, changed = list(found.dead), planned.changed
        while left or found.gone or changed:
            gone = self._decide(planned, left[:MOST_COLLECTED])
            self._delete((key, found.gone.pop(key, 0)) for key in gone)
            left, changed = left[MOST_COLLECTED:], False
            if not gone:
                found.gone.clear()  # it is needed again, or somebody else deletes it
        self._delete((listed.key, listed.size) for listed in host.log.garbage(spans))
        return len(found.dead)

    def _void(self) -> list[str]:
        """Have it decided what is kept, and older uploads void; returns what may be deleted."""
        with self._host.replica.index.env.begin(buffers=True) as txn:
            planned = self._plan(txn)
        if planned is None or not planned.changed:
            return []
        return self._decide(planned, [])

    def _plan(self, txn: lmdb.Transaction) -> _Planned | None:
        """Return what is to be kept; None without a checkpoint."""
        host = self._host
        index = host.replica.index
        state = index.state(txn)
        if not state.manifest:
            return None
        if state.checkpoint != state.flushed:
            raise UnavailableError("the newest checkpoint is not taken over yet: try again")
        pins = [pin.version for _, pin in index.pins(txn)]
        manifest = read_manifest(host.store, state.manifest)
        places = self._places(manifest, state.manifest)
        planned = plan(places, pins, state.horizon, state.version, state.time_ns)
        return _Planned(state, manifest, places, planned)

    def _look(self, free: list[str], dry_run: bool) -> _Found | None:
        """List the store, and compare it with the newest state; None without a checkpoint."""
        host = self._host
        index = host.replica.index
        with index.env.begin(buffers=True) as txn:
            planned = self._plan(txn)
            if planned is None:
                return None
            dead_before = {key: (began, dead) for key, began, dead in index.garbage(txn)}
            live = self._live(txn, planned.state)
        state, kept = planned.state, planned.plan
        live.update((state.manifest, *(run.key for run in planned.manifest.runs)))
        void = kept.start if dry_run else state.horizon.start
        let_go = dict.fromkeys(free, 0)
        found = unneeded(self._listed(let_go), live, dead_before, void, kept)
        return _Found(planned, *found, let_go)

    def _listed(self, let_go: dict[str, int]) -> Iterator[tuple[str, int]]:
        """Yield keys and sizes of what is in the store; `let_go` gets the sizes of its own."""
        for folder in _FOLDERS:
            for listed in self._host.store.list(folder):
                self.progress.listed += 1
                if listed.key in let_go:
                    let_go[listed.key] = listed.size
                else:
                    yield listed.key, listed.size

    def _live(self, txn: lmdb.Transaction, state: State) -> set[str]:
        """Return the keys of all pages and values that the newest state names."""
        index = self._host.replica.index
        live = {key_of_value(file) for file in index.bulk_files(txn)}
        live.update(key_of_pages(read_page_row(row).segment) for row in index.page_rows(txn))
        # What was stored in memory since the checkpoint.
        for _, row in index.tail_after(txn, state.flushed):
            for record in entry_of(row).records:
                for operation in record.operations:
                    if isinstance(operation, Write) and isinstance(operation.payload, Reference):
                        live.add(key_of_value(operation.payload.file))
        return live

    def _places(self, manifest: Manifest, key: str) -> list[Past]:
        places = [*manifest.past, manifest.place(key)]
        return places if self._host.is_branch else [Past(0, 0, 0, ""), *places]

    def _decide(self, planned: _Planned, dead: list[str]) -> list[str]:
        """Commit a `Collect`; returns the keys of what may be deleted."""
        state = planned.state
        operation = Collect(state.version, state.checkpoint, *planned.plan, dead)
        result = self._commit(Record(state.version, [], [], [], [operation]))
        if result.verdict is not Verdict.COMMITTED:
            raise UnavailableError(f"nothing more was collected: {result.detail}: try again")
        return [key for old in result.old for key in keys_in(old)]

    def _delete(self, objects: Iterable[tuple[str, int]]) -> None:
        following = iter(objects)
        while part := list(islice(following, _DELETED_AT_ONCE)):
            self._host.store.delete([key for key, _ in part])
            self.progress.deleted += len(part)
            self.progress.deleted_bytes += sum(size for _, size in part)
