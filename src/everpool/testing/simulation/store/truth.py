"""What is true in a simulation with a store, and whether the store holds to it.

The truth is the log, executed in order by a model that knows nothing of verdicts, checkpoints and
objects. Whatever the log says is kept must be readable, from the store alone, as the model had it.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from everpool.collection import KEPT_AGE_NS, KEPT_VERSIONS, place_of
from everpool.errors import EverpoolError
from everpool.log import Appended, ArchivedLog
from everpool.records import (
    Collect,
    Operation,
    Payload,
    Record,
    RecordId,
    Reference,
    Retain,
    decode_entry,
)
from everpool.replica.bulk import key_of_value
from everpool.segments.checkpoints import read_manifest
from everpool.store.memory import MemoryStore
from everpool.testing.memory_replica import Decided, MemoryReplica, Outcome
from everpool.testing.simulation.audit import Model, check_told, check_versions
from everpool.testing.simulation.store.host import Host
from everpool.testing.simulation.store.segments import (
    pages_in,
    places_of,
    read_page,
    read_rows,
    replica_of,
)
from everpool.testing.simulation.store.world import World
from everpool.testing.simulation.witness import Violation, Witness, committed, demand


class Picture(NamedTuple):
    """The pool as of one version."""

    names: dict[str, tuple[int, Payload | None]]
    memory: dict[int, bytes]
    # The keys of its large values.
    values: frozenset[str]


def _picture(model: Model) -> Picture:
    payloads = [payload for _, payload in model.names.values()]
    return Picture(
        dict(model.names),
        {id: bytes(data) for id, data in model.memory.items()},
        frozenset(key_of_value(one.file) for one in payloads if isinstance(one, Reference)),
    )


class _Stored(Mapping[str, bytes]):
    """The values that are in the store."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __getitem__(self, file: str) -> bytes:
        return self._world.shelf.objects[key_of_value(file)].data

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError


class Truth:
    """Follows the log, entry by entry, as the first host that plays each."""

    def __init__(self, world: World, kind: type[MemoryReplica]) -> None:
        self.world = world
        self.kind = kind
        self.witness = Witness()
        # Everything that was ever uploaded as a value.
        self.contents: dict[str, bytes] = {}
        self.replica = kind(forgetful=False, files=self.contents)
        self.model = Model(self.contents)
        self.pictures = [_picture(self.model)]
        self.over = False
        self._records: list[Record] = []
        self._times = [0]
        self._kept, self._retained = 0, Retain(KEPT_AGE_NS, KEPT_VERSIONS)
        self._entries: dict[int, bytes] = {}
        self._acknowledged: list[tuple[int, bytes]] = []
        self._quiet = MemoryStore(world.shelf)
        self._files = _Stored(world)
        world.before_delete = self.before_delete

    # What the hosts do

    def played(self, item: Appended, replica: MemoryReplica, decided: list[Decided]) -> None:
        """A host has played an entry."""
        first = self._entries.setdefault(item.position, item.entry)
        demand(first == item.entry, f"the log has two entries at position {item.position}")
        if item.position > self.replica.position:
            self._execute(item)
        self.witness.played(replica, decided)

    def _execute(self, item: Appended) -> None:
        demand(item.position == self.replica.position + 1, f"no entry before {item.position}")
        self.witness.history.append(item)
        decided = self.replica.apply(item)
        self.witness.played(self.replica, decided)
        for one, record in zip(decided, decode_entry(item.entry).records, strict=True):
            if committed(one):
                self._check_sights(one, record)
            self.pictures.append(_picture(self.model))
            self._records.append(record)
            self._times.append(max(item.time_ns, self._times[-1]))
            if committed(one):
                for operation in record.operations:
                    self._follow(one.version, operation)
            demand(one.version == len(self.pictures) - 1, f"{one.id} has version {one.version}")

    def _follow(self, version: int, operation: Operation) -> None:
        """See that nothing is let go of that is to be kept by then."""
        if isinstance(operation, Retain):
            self._retained = operation
        elif isinstance(operation, Collect) and operation.kept > self._kept:
            self._kept, retained = operation.kept, self._retained
            age_ns = self._times[version] - self._times[self._kept]
            enough = self._kept + retained.versions <= version and age_ns >= retained.age_ns
            demand(enough, f"only {self._kept} is kept at {version}, of {retained}")

    def _check_sights(self, one: Decided, record: Record) -> None:
        attempt = self.witness.attempts.get(one.id)
        for sight in attempt.sights if attempt else ():
            if not sight.holds(self.model):
                raise Violation(f"not serializable: {attempt} at {one.version} saw {sight}")
        try:
            results = self.model.execute(record.operations)
        except Violation as error:
            raise Violation(f"committed at {one.version} though {error}") from error
        wanted = tuple(results)
        demand(one.results[: len(wanted)] == wanted, f"the results at {one.version} are wrong")

    def acknowledged(self, position: int, entry: bytes) -> None:
        """The log said that an entry stands at a position."""
        self._acknowledged.append((position, entry))

    def lost(self, position: int) -> None:
        """The log ends before what it has acknowledged."""
        raise Violation(f"position {position} was acknowledged, and is not in the log")

    def told(self, id: RecordId, replica: MemoryReplica, outcome: Outcome) -> None:
        """Somebody was told what became of a record."""
        self.witness.answered(id, replica.version, outcome)

    def records(self, after: int, to: int) -> list[Record]:
        """Return the records of the versions after one, up to another."""
        return self._records[after:to]

    # What must hold at any moment

    def kept(self) -> list[int]:
        """Return the versions that can be looked at, as far as anybody has played the log."""
        index = self.replica.disk.index
        pins = index.snapshots.values()
        return sorted({*range(index.horizon.kept, index.version + 1), *pins})

    def before_delete(self, key: str) -> None:
        """Raise `Violation` when an object is deleted that something kept names."""
        if key.startswith("values/"):
            for version in self.kept():
                if key in self.pictures[version].values:
                    raise Violation(f"{key} is deleted, but version {version} is kept")

    def look(self) -> None:
        """Look at some of what is kept, and see whether a new host can begin."""
        kept = self.kept()
        pins = self.replica.disk.index.snapshots.values()
        self.check_past(sorted({self.world.rng.choice(kept), kept[0], *pins}))
        self.check_beginning()
        self.world.happened("looked")

    def check_past(self, versions: Iterable[int]) -> None:
        """Raise `Violation` unless versions that are kept can be had from the store."""
        log = self._open_log()
        places = places_of(self._quiet, self._newest())
        by_place: dict[int, list[int]] = {}
        for version in versions:
            by_place.setdefault(place_of(places, version).version, []).append(version)
        version = 0
        try:
            for place in places:
                replica = self._begin(place.key) if place.version in by_place else self.replica
                for version in sorted(by_place.get(place.version, ())):
                    self._go_on(log, replica, version)
        except (EverpoolError, KeyError) as error:
            raise Violation(f"version {version} is kept, but {error}") from error
        finally:
            log.close()

    def _go_on(self, log: ArchivedLog, replica: MemoryReplica, version: int) -> None:
        """Play up to a version and compare; every entry of a simulation has one record."""
        if replica.version < version:
            for item in log.history(replica.position):
                replica.apply(item)
                if replica.version >= version:
                    break
        demand(replica.version == version, f"{version} is kept, {replica.version} is there")
        self.compare(replica, self.pictures[version])

    def check_beginning(self) -> None:
        """Raise `Violation` unless a new host can begin now."""
        log = self._open_log()
        try:
            end = log.end()
            replica = self._begin(end.start.decode())
            while items := log.read(replica.position):
                for item in items:
                    decided = replica.apply(item)
                    if item.position <= self.replica.position:
                        self.witness.played(replica, decided)
            if replica.version < len(self.pictures):
                self.compare(replica, self.pictures[replica.version])
        except EverpoolError as error:
            raise Violation(f"a new host cannot begin: {error.message}") from error
        finally:
            log.close()

    def _newest(self) -> str:
        return self.replica.disk.index.newest_checkpoint[1]

    def _open_log(self) -> ArchivedLog:
        return self.world.log(self._quiet)

    def _begin(self, key: str) -> MemoryReplica:
        store = self._quiet
        rows = read_rows(store, read_manifest(store, key)) if key else {}
        contents = {place: read_page(store, row) for place, row in pages_in(rows).items()}
        return replica_of(self.kind, rows, contents, self._files)

    def compare(self, replica: MemoryReplica, picture: Picture) -> None:
        """Raise `Violation` unless a replica is what the model was, values included."""
        index, version = replica.disk.index, replica.version
        held = {
            name: (row.id, None if row.size >= 0 else row.payload)
            for name, row in index.names.items()
        }
        demand(held == picture.names, f"the names are not those of version {version}")
        memory = {id: bytes(data) for id, data in replica.disk.memory.items()}
        demand(memory == picture.memory, f"the bytes are not those of version {version}")
        for key in sorted(picture.values):
            kept = self.world.shelf.objects.get(key)
            demand(kept is not None, f"{key} is gone, a value of version {version}")
            assert kept is not None
            demand(kept.data == self.contents[key.partition("/")[2]], f"{key} is another one")

    # The end

    def end(self) -> int:
        """Return where the log ends."""
        log = self._open_log()
        try:
            return log.end().position
        finally:
            log.close()

    def audit(self, hosts: list[Host]) -> None:
        """Check everything, after all have come to rest."""
        for position, entry in self._acknowledged:
            same = self._entries.get(position) == entry
            demand(same, f"position {position} was acknowledged, and is another entry")
        decided = [one for _, (_, said) in sorted(self.witness.decided.items()) for one in said]
        check_versions(self.witness.history, decided)
        check_told(self.witness, decided)
        for host in hosts:
            demand(host.replica.position == self.replica.position, "a host has not caught up")
            demand(
                host.replica.checkpoint() == hosts[0].replica.checkpoint(),
                "two replicas of the whole log are not equal",
            )
            self.compare(host.replica, self.pictures[-1])
        self.check_beginning()
        self.check_past(self.kept())
