"""The collector: who deletes what nothing needs any more.

Every agent may be one, and any number at once are harmless: what is let go of, and when, is decided
by `Collect` records in the log (see `everpool.collection`).

    make a checkpoint, where somebody waits for the collection
    commit a record that says what is kept, upon which uploads from before are void
    list the store; what is that old and is named by nothing in the newest state is dead
    commit a record that says so; it tells what nothing needs any more
    delete that, and what of the log's archive only older versions need

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
    Unneeded,
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


class _Look(NamedTuple):
    """The newest state, and what is to be kept from there on."""

    state: State
    places: list[Past]
    plan: Plan
    live: set[str]
    # Dead objects, with the versions between which they lived.
    dead_before: dict[str, tuple[int, int]]


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
        look = self._look()
        if look is None:
            return 0
        if dry_run:
            return self._tell(look)
        progress = self.progress
        first: dict[str, int] = {}
        self._begin_at(look)
        if look.plan.start > look.state.horizon.start:
            # What this makes void is found dead in a state from behind it.
            first.update(dict.fromkeys(self._decide(look, []), 0))
            look = self._look()
            assert look is not None, "there was a checkpoint"
            self._begin_at(look)
        found = self._compare(look, look.state.horizon.start, first)
        self._delete(first.items())
        progress.kept = look.plan.kept
        progress.dead += len(found.dead)
        progress.dead_bytes += sum(found.dead.values())
        left = list(found.dead)
        changed = look.plan[:2] != (look.state.horizon.kept, look.state.horizon.start)
        while left or found.gone or changed:
            gone = self._decide(look, left[:MOST_COLLECTED])
            self._delete((key, found.gone.pop(key, 0)) for key in gone)
            left, changed = left[MOST_COLLECTED:], False
            if not gone:
                found.gone.clear()  # it is needed again, or somebody else deletes it
        spans = needed_spans(look.places, look.plan)
        self._delete((listed.key, listed.size) for listed in self._host.log.garbage(spans))
        return len(found.dead)

    def _begin_at(self, look: _Look) -> None:
        """Let new hosts not begin with what is about to go."""
        log, newest = self._host.log, look.places[-1].position
        if log.end().start.decode() != look.state.manifest and newest:
            log.trim(newest, look.state.manifest.encode())

    def _tell(self, look: _Look) -> int:
        """Note what a collection would come to; returns how many objects would be dead."""
        progress, found = self.progress, self._compare(look, look.plan.start, {})
        progress.kept = look.plan.kept
        progress.dead += len(found.dead)
        progress.dead_bytes += sum(found.dead.values())
        progress.deleted += len(found.gone)
        progress.deleted_bytes += sum(found.gone.values())
        for listed in self._host.log.garbage(needed_spans(look.places, look.plan)):
            progress.deleted += 1
            progress.deleted_bytes += listed.size
        return len(found.dead)

    def _look(self) -> _Look | None:
        """Read the newest state; None without a checkpoint."""
        host = self._host
        host.adopt()
        index = host.replica.index
        with index.env.begin(buffers=True) as txn:
            state = index.state(txn)
            if not state.manifest:
                return None
            if state.checkpoint != state.flushed:
                raise UnavailableError("the newest checkpoint is not taken over yet: try again")
            pins = [pin.version for _, pin in index.pins(txn)]
            dead_before = {key: (began, dead) for key, began, dead in index.garbage(txn)}
            live = self._live(txn, state.flushed)
        manifest = read_manifest(host.store, state.manifest)
        places = self._places(manifest, state.manifest)
        live.update((state.manifest, *(run.key for run in manifest.runs)))
        planned = plan(places, pins, state.horizon, state.version, state.time_ns)
        return _Look(state, places, planned, live, dead_before)

    def _compare(self, look: _Look, start: int, let_go: dict[str, int]) -> Unneeded:
        """List the store, and compare it with the newest state; `let_go` gets its sizes."""
        return unneeded(self._listed(let_go), look.live, look.dead_before, start, look.plan)

    def _listed(self, let_go: dict[str, int]) -> Iterator[tuple[str, int]]:
        for folder in _FOLDERS:
            for listed in self._host.store.list(folder):
                self.progress.listed += 1
                if listed.key in let_go:
                    let_go[listed.key] = listed.size
                else:
                    yield listed.key, listed.size

    def _live(self, txn: lmdb.Transaction, flushed: int) -> set[str]:
        """Return the keys of all pages and values that the newest state names."""
        index = self._host.replica.index
        live = {key_of_value(file) for file in index.bulk_files(txn)}
        live.update(key_of_pages(read_page_row(row).segment) for row in index.page_rows(txn))
        # What was stored in memory since the checkpoint.
        for _, row in index.tail_after(txn, flushed):
            for record in entry_of(row).records:
                for operation in record.operations:
                    if isinstance(operation, Write) and isinstance(operation.payload, Reference):
                        live.add(key_of_value(operation.payload.file))
        return live

    def _places(self, manifest: Manifest, key: str) -> list[Past]:
        places = [*manifest.past, manifest.place(key)]
        return places if self._host.is_branch else [Past(0, 0, 0, ""), *places]

    def _decide(self, look: _Look, dead: list[str]) -> list[str]:
        """Commit a `Collect`; returns the keys of what may be deleted."""
        state, planned = look.state, look.plan
        operation = Collect(state.version, *planned, dead)
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
