"""The hosts of a simulation with a store: each plays the log, and its processes commit."""

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING

from everpool.errors import (
    CommitUnknownError,
    CorruptionError,
    EverpoolError,
    NotFoundError,
    UnavailableError,
)
from everpool.log import Appended
from everpool.records import (
    Entry,
    Fence,
    Record,
    RecordId,
    Reference,
    Write,
    decode_entry,
    encode_entry,
)
from everpool.replica.bulk import key_of_value
from everpool.segments.checkpoints import read_manifest
from everpool.testing.memory_replica import Disk, Outcome
from everpool.testing.simulation.store.segments import (
    BLOCK,
    Place,
    pages_in,
    read_page,
    read_rows,
    replica_of,
)
from everpool.testing.simulation.store.world import Killed, Process, Steps, World, patiently
from everpool.testing.simulation.witness import Attempt, Sight

if TYPE_CHECKING:
    from everpool.testing.simulation.store.truth import Truth

_HISTORY_AT_ONCE = 8


class Files(Mapping[str, bytes]):
    """What a host has fetched of values, for the records that write them into memory."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def __getitem__(self, file: str) -> bytes:
        return self.held[file]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


class HostDisk:
    """What a host keeps when it is killed: its replica, and where memory has pages."""

    def __init__(self, disk: Disk, pages: dict[Place, bytes], flushed: int) -> None:
        self.replica = disk
        self.pages = pages
        self.flushed = flushed
        # Blocks that were written since the checkpoint `flushed`: the position that did it last.
        self.dirty: dict[Place, int] = {}


class Host:
    """A machine with a replica, while it runs."""

    def __init__(self, world: World, truth: "Truth", processes: Callable[["Host"], None]) -> None:
        """`processes` begins what runs on a host."""
        self.world = world
        self.truth = truth
        self.store = world.store()
        self.log = world.log(self.store)
        self.files = Files()
        self.disk: HostDisk | None = None
        self.life: set[Process] = set()
        self._processes = processes
        self._watch(world.spawn("host", self._begin()))

    # Living

    @property
    def up(self) -> bool:
        """Whether it plays the log."""
        return self.disk is not None and hasattr(self, "replica")

    def at_rest(self) -> bool:
        """Whether nothing goes on but that the log is played."""
        return self.up and not any(one.alive and one.name != "follower" for one in self.life)

    def spawn(self, name: str, steps: Steps) -> None:
        """Begin a process that ends with this host."""
        self._watch(self.world.spawn(name, self._guarded(steps)))

    def serve(self, name: str, begin: Callable[[], Steps]) -> None:
        """Begin a process that is killed at any step, and then begun again."""
        process = self.world.spawn(name, self._guarded(begin()), fragile=True)
        process.killed = lambda: self.serve(name, begin) if process in self.life else None
        self._watch(process)

    def _watch(self, process: Process) -> None:
        self.life.add(process)

    def _guarded(self, steps: Steps) -> Steps:
        """Run a process; who finds that the replica is of no use ends the host."""
        try:
            yield from steps
        except LeftBehind:
            self.crash(disk_lost=True)

    def crash(self, *, disk_lost: bool) -> None:
        """End everything on this host, and begin again a while later."""
        self.world.happened("disk lost" if disk_lost else "host killed")
        for process in self.life:
            process.end()
        self.life = set()
        if disk_lost:
            self.disk = None
        self.log = self.world.log(self.store)
        self.__dict__.pop("replica", None)
        self._watch(self.world.spawn("host", self._begin()))

    def _begin(self) -> Steps:
        """Take the replica up again, or begin one where the log begins."""
        yield self.world.rng.randint(1, 400)
        while self.disk is None:
            try:
                yield from self._begin_anew()
            except EverpoolError:  # what it began with may have been collected meanwhile
                self.world.happened("began in vain")
                yield self.world.rng.randint(1, 100)
        disk = self.disk
        replica = self.truth.kind(disk.replica, files=self.files)
        for _ in replica.recover():
            pass
        self.replica = replica
        self._processes(self)

    def _begin_anew(self) -> Steps:
        start = (yield from patiently(self.world, self.log.end)).start.decode()
        if not start:
            self.disk = HostDisk(Disk(), {}, 0)
            return
        manifest = read_manifest(self.store, start)
        rows = read_rows(self.store, manifest)
        pages = pages_in(rows)
        contents: dict[Place, bytes] = {}
        for place, row in pages.items():
            contents[place] = read_page(self.store, row)
            if self.world.rng.random() < 0.2:
                yield self.world.rng.randint(0, 20)
        found = replica_of(self.truth.kind, rows, contents, self.files)
        self.world.happened("began from a checkpoint")
        self.disk = HostDisk(found.disk, pages, manifest.version)

    # Playing

    def play(self) -> None:
        """Play everything that was appended before the call."""
        end = self.log.end().position
        while self.replica.position < end:
            items = self._read()
            for item in items:
                self._play(item)

    def _read(self) -> list[Appended]:
        limit = self.world.rng.choice([1, 400, 3000])
        try:
            return self.log.read(self.replica.position, limit)
        except NotFoundError:
            pass
        found: list[Appended] = []
        try:
            for item in self.log.history(self.replica.position):
                found.append(item)
                if len(found) >= _HISTORY_AT_ONCE:
                    break
        except NotFoundError:
            raise LeftBehind from None
        self.world.happened("read what was trimmed")
        return found

    def _play(self, item: Appended) -> None:
        """Play an entry; what it needs of the store is fetched before, for others go on then."""
        if item.position <= self.replica.position:
            return
        for record in decode_entry(item.entry).records:
            for operation in record.operations:
                if isinstance(operation, Write) and isinstance(operation.payload, Reference):
                    self._fetch(operation.payload)
        replica, disk = self.replica, self.disk
        if item.position <= replica.position or disk is None:
            return  # another process of this host was faster
        known = len(replica.disk.index.tail)
        try:
            decided = replica.apply(item)
        except CorruptionError:
            if item.position <= self.log.end().trimmed:
                raise LeftBehind from None  # what it needs may have been collected
            raise
        self.truth.played(item, replica, decided)
        for step in replica.disk.index.tail[known:]:
            if step.size == 0:
                for places in (disk.dirty, disk.pages):
                    for place in [place for place in places if place[0] == step.id]:
                        del places[place]
            elif step.size < 0:
                first, last = step.offset // BLOCK, (step.offset + len(step.image) - 1) // BLOCK
                for block in range(first, last + 1):
                    disk.dirty[step.id, block] = item.position
        if self.world.rng.random() < 0.2:
            replica.flush()

    def _fetch(self, reference: Reference) -> None:
        for _ in range(20):
            if reference.file in self.files.held:
                return
            try:
                data = self.store.get(key_of_value(reference.file)).data
                self.files.held[reference.file] = data
            except NotFoundError:
                return  # the record that names it does not commit, or this host is far behind
            except UnavailableError:
                pass
        raise UnavailableError("the store does not answer")

    def block(self, place: Place) -> bytes:
        """Return what is in a block of memory now; b"" when it is gone."""
        id, block = place
        if id not in self.replica.disk.index.memory:
            return b""
        return self.replica.read(id, block * BLOCK, (block + 1) * BLOCK)

    # Checkpoints

    def adopt(self) -> None:
        """Take over where the newest checkpoint has pages."""
        disk = self._there()
        version, key = self.replica.disk.index.newest_checkpoint
        if version <= disk.flushed:
            return
        manifest = read_manifest(self.store, key)
        rows = read_rows(self.store, manifest, disk.flushed)
        if manifest.version <= disk.flushed:
            return
        for place, row in _page_rows(rows):
            if place[0] in self.replica.disk.index.memory:
                disk.pages[place] = row
        disk.flushed = manifest.version
        for place in [p for p, at in disk.dirty.items() if at <= manifest.position]:
            del disk.dirty[place]

    def _there(self) -> HostDisk:
        if self.disk is None:
            raise Killed
        return self.disk

    # What runs on every host

    def follow(self) -> Steps:
        """Play what others append, and take over their checkpoints."""
        while True:
            yield self.world.rng.randint(1, 120)
            try:
                self.play()
                if self.world.rng.random() < 0.5:
                    self.adopt()
            except CorruptionError:
                raise
            except EverpoolError:
                self.world.happened("out of reach")
            if self.world.calm and self.truth.over:
                return


def _page_rows(rows: Mapping[bytes, bytes]) -> list[tuple[Place, bytes]]:
    return [
        ((int.from_bytes(key[1:9], "big"), int.from_bytes(key[9:], "big")), row)
        for key, row in rows.items()
        if key[:1] == b"1"
    ]


class LeftBehind(Exception):
    """The replica cannot be played any further: another one must be begun."""


class Committer:
    """Commits for one process of a host, one record at a time, in a session of its own."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.log = host.world.log(host.world.store())
        self._session = b""
        self._sequence = 0

    def commit(
        self, kind: str, record: Record, sights: "list[Sight] | None" = None
    ) -> Generator[int, None, Outcome | None]:
        """Commit a record; returns what became of it, or None when it never came into the log."""
        host = self.host
        world, witness = host.world, host.truth.witness
        yield from patiently(world, host.play)
        replica = host.replica
        if not self._session:
            self._session = replica.version.to_bytes(8, "big") + world.rng.randbytes(8)
            self._sequence = 0
        if not (record.names or record.prefixes or record.ranges):
            record.snapshot = replica.version
        self._sequence += 1
        id = RecordId(self._session, self._sequence)
        witness.submitted(id, Attempt(kind, record, sights or []))
        entry = encode_entry(Entry(*id, replica.position, replica.hash, [record]))
        try:
            position = self.log.append(entry)
        except CommitUnknownError:
            world.happened("commit unknown")
            return (yield from self._settle(id))
        except EverpoolError:
            self._session = b""
            host.truth.told(id, host.replica, Outcome("aborted"))
            return None
        host.truth.acknowledged(position, entry)
        while True:
            yield from patiently(world, host.play, 1000)
            if host.replica.position >= position:
                return self._told(id)
            host.truth.lost(position)

    def _told(self, id: RecordId) -> Outcome:
        outcome = self.host.replica.outcome(id)
        if outcome.state != "committed":
            self._session = b""  # forgotten, perhaps
        if outcome.state == "undecided":
            outcome = Outcome("aborted")  # void, and nobody will send it again
        self.host.truth.told(id, self.host.replica, outcome)
        return outcome

    def _settle(self, id: RecordId) -> Generator[int, None, Outcome | None]:
        """Learn what became of a record whose answer was lost: void it, unless it was decided."""
        world, host = self.host.world, self.host
        while True:
            self._session = b""
            yield world.rng.randint(1, 300)
            outcome = host.replica.outcome(id)
            if outcome.state != "undecided":
                return self._told(id)
            fence = Record(host.replica.version, [], [], [], [Fence(*id)])
            found = yield from self.commit("fence", fence)
            if found is not None and found.state == "committed":
                self._session = b""
                return self._told(id)
