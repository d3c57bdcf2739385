"""The collector of a simulated host: the steps of `everpool.agent.collector`, one at a time."""

from collections.abc import Generator, Iterable
from typing import NamedTuple

from everpool.collection import (
    MOST_COLLECTED,
    Horizon,
    Plan,
    Unneeded,
    needed_spans,
    plan,
    unneeded,
)
from everpool.errors import EverpoolError
from everpool.log import ArchivedLog
from everpool.records import Collect, Record, Reference, Write
from everpool.replica.bulk import key_of_value
from everpool.segments.checkpoints import key_of_pages, read_manifest
from everpool.segments.format import Past, read_page_row
from everpool.testing.simulation.store.host import Committer, Host
from everpool.testing.simulation.store.segments import places_of
from everpool.testing.simulation.store.world import Steps, patiently

_FOLDERS = ("checkpoints", "index", "pages", "values")


class Look(NamedTuple):
    """The newest state, and what is to be kept from there on."""

    version: int
    manifest: str
    horizon: Horizon
    places: list[Past]
    plan: Plan
    live: set[str]
    dead_before: dict[str, tuple[int, int]]


class Collector:
    """Collects for one host's pool, one step at a time. Any number at once must be harmless."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.world = host.world
        self.store = host.world.store()
        self.committer = Committer(host)
        self.log: ArchivedLog = self.committer.log

    def serve(self) -> Steps:
        """Collect now and then."""
        world = self.world
        while not world.calm:
            yield world.rng.randint(1, 2 * world.settings.collect_every)
            try:
                yield from self.collect()
                self.host.truth.look()
            except EverpoolError as error:
                world.happened(f"no collection: {error.kind}")

    def collect(self) -> Steps:
        """Find what is dead, and delete what nothing needs."""
        look = self.look()
        if look is None:
            return
        self.begin_at(look)
        first: list[str] = []
        yield self.world.rng.randint(0, self.world.rng.choice([5, 300, 900]))
        if self.voids(look):
            decided = yield from self.decide(look, [])
            if decided is None:
                return
            first = decided
            look = yield from patiently(self.world, self.look)
            if look is None:
                return
            yield from patiently(self.world, lambda: self.begin_at(look))
        yield self.world.rng.randint(0, 200)
        found = yield from self.compare(look, first)
        yield from self.delete(first)
        left = list(found.dead)
        changed = look.plan[:2] != (look.horizon.kept, look.horizon.start)
        while left or found.gone or changed:
            yield self.world.rng.randint(0, 200)
            gone = yield from self.decide(look, left[:MOST_COLLECTED])
            if gone is None:
                return
            yield from self.delete(gone)
            left, changed = left[MOST_COLLECTED:], False
            found.gone.clear()
        for listed in self.log.garbage(self.spans(look)):
            yield self.world.rng.randint(0, 3)
            yield from patiently(self.world, lambda key=listed.key: self.store.delete([key]))
            self.world.happened("deleted of the log")

    def look(self) -> Look | None:
        """Read the newest state; None while it cannot be told."""
        host = self.host
        host.adopt()
        index, disk = host.replica.disk.index, host.disk
        version, key = index.newest_checkpoint
        if disk is None or not key or version != disk.flushed:
            return None
        state, horizon = index.version, index.horizon
        pins = list(index.snapshots.values())
        dead_before = dict(index.garbage)
        live = self.live()
        time_ns = index.time_ns
        manifest = read_manifest(self.store, key)
        live.update((key, *(run.key for run in manifest.runs)))
        places = places_of(self.store, key)
        planned = plan(places, pins, horizon, state, time_ns)
        return Look(state, key, horizon, places, planned, live, dead_before)

    def voids(self, look: Look) -> bool:
        """Whether a record has to make uploads void before any is found dead."""
        return look.plan.start > look.horizon.start

    def live(self) -> set[str]:
        """Return the keys of all pages and values that the newest state names."""
        host = self.host
        assert host.disk is not None
        rows = host.replica.disk.index.names.values()
        payloads = [row.payload for row in rows if isinstance(row.payload, Reference)]
        live = {key_of_value(payload.file) for payload in payloads}
        live.update(key_of_pages(read_page_row(row).segment) for row in host.disk.pages.values())
        # What was stored in memory since the checkpoint.
        for record in host.truth.records(host.disk.flushed, host.replica.version):
            for operation in record.operations:
                if isinstance(operation, Write) and isinstance(operation.payload, Reference):
                    live.add(key_of_value(operation.payload.file))
        return live

    def begin_at(self, look: Look) -> None:
        """Let new hosts not begin with what is about to go."""
        if self.log.end().start.decode() != look.manifest:
            self.log.trim(look.places[-1].position, look.manifest.encode())

    def compare(self, look: Look, let_go: list[str]) -> Generator[int, None, Unneeded]:
        """List the store, folder by folder, and compare it with the state."""
        listed: list[tuple[str, int]] = []
        for folder in _FOLDERS:
            found = yield from patiently(
                self.world, lambda folder=folder: list(self.store.list_stale(folder))
            )
            listed += [(one.key, one.size) for one in found if one.key not in let_go]
            yield self.world.rng.randint(0, 60)
        return self.sort_out(listed, look)

    def sort_out(self, listed: Iterable[tuple[str, int]], look: Look) -> Unneeded:
        """Tell what is dead, and what is gone."""
        return unneeded(listed, look.live, look.dead_before, look.horizon.start, look.plan)

    def decide(self, look: Look, dead: list[str]) -> Generator[int, None, list[str] | None]:
        """Commit a `Collect`; returns the keys of what may be deleted, or None."""
        kept, start, islands = look.plan
        operation = Collect(look.version, kept, start, islands, dead)
        record = Record(look.version, [], [], [], [operation])
        outcome = yield from self.committer.commit("collect", record)
        if outcome is None or outcome.state != "committed":
            self.world.happened("collection refused")
            return None
        self.world.happened("Collect")
        return outcome.results[0].decode().splitlines()

    def spans(self, look: Look) -> list[tuple[int, int]]:
        """Return which positions of the log are needed."""
        return needed_spans(look.places, look.plan)

    def delete(self, keys: list[str]) -> Steps:
        """Delete objects, one after the other."""
        for key in keys:
            yield self.world.rng.randint(0, 10)
            yield from patiently(self.world, lambda key=key: self.store.delete([key]))
            self.world.happened(f"deleted of {key.partition('/')[0]}")
