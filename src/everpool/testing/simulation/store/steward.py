"""The steward of a simulated host: the steps of `everpool.agent.steward`, one at a time."""

from functools import partial

from everpool.collection import needed_places
from everpool.errors import EverpoolError
from everpool.records import Checkpoint, Floor, Record
from everpool.segments.checkpoints import key_of_pages, read_manifest
from everpool.segments.format import Manifest, Past, encode_manifest
from everpool.testing.simulation.store.host import Committer, Host
from everpool.testing.simulation.store.segments import (
    Place,
    changes,
    is_folded,
    page_key,
    put_page,
    put_run,
    read_rows,
    rows_of,
)
from everpool.testing.simulation.store.world import Steps, patiently

_ROUNDS = 3
_FEW = 2


class Steward:
    """Makes checkpoints of one host's pool, one step at a time. Two at once must be harmless."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.world = host.world
        self.store = host.world.store()
        self.committer = Committer(host)

    def serve(self) -> Steps:
        """Make a checkpoint now and then."""
        world = self.world
        while not world.calm:
            yield world.rng.randint(1, 2 * world.settings.steward_every)
            try:
                yield from self.checkpoint()
            except EverpoolError as error:
                world.happened(f"no checkpoint: {error.kind}")

    def checkpoint(self) -> Steps:
        """Make a checkpoint."""
        world, host = self.world, self.host
        yield from patiently(world, host.adopt)
        disk = host.disk
        before = host.replica.disk.index
        version, key = before.newest_checkpoint
        if disk is None or before.version == version:
            return
        previous = None
        if key:
            previous = yield from patiently(world, lambda: read_manifest(self.store, key))
        if previous is not None and previous.version != disk.flushed:
            return
        self.began = before.version
        pages: dict[Place, tuple[int, bytes]] = {}
        for _ in range(_ROUNDS):
            left = self.left(pages)
            if len(left) <= _FEW:
                break
            for place in left:
                yield world.rng.randint(0, 15)
                last = disk.dirty.get(place)
                if last is not None:
                    yield from self._put(place, last, host.block(place), pages)
        # From here to the next step nothing is played.
        replica = host.replica
        rest = [(place, disk.dirty[place], host.block(place)) for place in self.last(pages)]
        index = replica.disk.index
        state = (index.version, index.position, index.hash, index.time_ns)
        pins, kept = list(index.snapshots.values()), index.horizon.kept
        rows = rows_of(replica, disk.pages)
        memories = set(index.memory)
        lag = world.settings.floor_lag
        floor = max(index.floor, index.version - world.rng.randint(lag // 2, lag))
        for place, last, data in rest:
            yield from self._put(place, last, data, pages)
        for place, (_, row) in pages.items():
            if place[0] in memories:
                rows[page_key(place)] = row
        runs = [] if previous is None else list(previous.runs)
        if previous is None or is_folded(runs):
            runs, base, after = [], {}, 0
        else:
            base = yield from patiently(world, lambda: read_rows(self.store, previous))
            after = previous.version
        yield world.rng.randint(0, 15)
        delta = changes(base, rows)
        for part in (delta[: len(delta) // 2], delta[len(delta) // 2 :]):
            new = world.key("index", self.began)
            put = partial(put_run, self.store, new, part, after, state[0])
            runs.append((yield from patiently(world, put)))
            yield world.rng.randint(0, 15)
        past = [] if previous is None else [*previous.past, _past_of(previous, key)]
        manifest = Manifest(bytes(16), *state, runs, self.places(past, pins, kept))
        name = world.key("", self.began)[1:]
        new = f"checkpoints/{manifest.version:016x}-{name}"
        yield from patiently(world, lambda: self.store.put(new, encode_manifest(manifest)))
        yield world.rng.randint(0, 60)
        built_on = 0 if previous is None else previous.version
        checkpoint = Checkpoint(manifest.version, new, built_on, self.began)
        record = Record(host.replica.version, [], [], [], [Floor(floor), checkpoint])
        outcome = yield from self.committer.commit("checkpoint", record)
        if outcome is None or outcome.state != "committed":
            world.happened("somebody else made a checkpoint")
            return
        world.happened("checkpoint")
        yield world.rng.randint(0, world.rng.choice([60, 60, 3000]))
        self.trim(manifest.position, new)

    def _put(
        self, place: Place, last: int, data: bytes, pages: dict[Place, tuple[int, bytes]]
    ) -> Steps:
        key = self.world.key("pages", self.began)
        page = yield from patiently(self.world, lambda: put_page(self.store, key, data))
        assert key == key_of_pages(page.segment)
        pages[place] = (last, page.row())

    def left(self, pages: dict[Place, tuple[int, bytes]]) -> list[Place]:
        """Return what was written since it was uploaded, if ever."""
        disk = self.host.disk
        assert disk is not None
        return [at for at, last in sorted(disk.dirty.items()) if pages.get(at, (-1,))[0] != last]

    def last(self, pages: dict[Place, tuple[int, bytes]]) -> list[Place]:
        """Return what is gathered last, as of the checkpoint's version."""
        return self.left(pages)

    def trim(self, position: int, manifest: str) -> None:
        """Let the log begin with the new checkpoint; who dies before leaves it as it is."""
        self.committer.log.trim(position, manifest.encode())

    def places(self, past: list[Past], pins: list[int], kept: int) -> list[Past]:
        """Return which of the checkpoints before the new one keeps."""
        return needed_places(past, pins, kept)


def _past_of(manifest: Manifest, key: str) -> Past:
    return Past(manifest.version, manifest.time_ns, manifest.position, key)
