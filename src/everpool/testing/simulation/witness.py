"""What everybody in a simulation saw and was told, to be judged at its end."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from everpool.errors import CorruptionError
from everpool.log import Appended
from everpool.records import Payload, Record, RecordId
from everpool.testing.memory_replica import Decided, MemoryReplica, Outcome
from everpool.verdict import Verdict


class Violation(AssertionError):
    """A promise was broken. The message begins with the seed that shows it."""


def demand(holds: bool, broken: str) -> None:
    """Raise `Violation` unless `holds`; unlike `assert`, also under `python -O`."""
    if not holds:
        raise Violation(broken)


class Readable(Protocol):
    """What a sight can be compared with: the model of the pool."""

    def bound(self, name: str) -> tuple[int, Payload | None] | None: ...
    def listed(self, prefix: str) -> list[str]: ...
    def bytes_of(self, id: int, start: int, end: int) -> bytes | None: ...


class SawName(NamedTuple):
    """A transaction saw what `name` was bound to: an id and, for a value, its payload."""

    name: str
    bound: tuple[int, Payload | None] | None

    def holds(self, pool: Readable) -> bool:
        return pool.bound(self.name) == self.bound


class SawNames(NamedTuple):
    """A transaction saw the names under `prefix`."""

    prefix: str
    names: list[str]

    def holds(self, pool: Readable) -> bool:
        return pool.listed(self.prefix) == self.names


class SawBytes(NamedTuple):
    """A transaction saw these bytes of memory `id`; None: it saw that there is no such memory."""

    id: int
    start: int
    end: int
    data: bytes | None

    def holds(self, pool: Readable) -> bool:
        return pool.bytes_of(self.id, self.start, self.end) == self.data


Sight = SawName | SawNames | SawBytes


class Attempt(NamedTuple):
    """A transaction: what it saw at its snapshot, and the record it made of that."""

    kind: str
    record: Record
    sights: Sequence[Sight]


class Told(NamedTuple):
    """What a session learned of its own record, or somebody who asked for the outcome.

    `at` is the version of the replica that answered.
    """

    at: int
    outcome: Outcome


class Witness:
    """Collects; refuses at once what can be refused at once."""

    def __init__(self) -> None:
        self.history: list[Appended] = []
        self.decided: dict[int, tuple[bytes, list[Decided]]] = {}
        self.attempts: dict[RecordId, Attempt] = {}
        self.views: list[tuple[int, Sequence[Sight]]] = []
        self.told: dict[RecordId, list[Told]] = {}
        self.checkpoints: list[tuple[int, bytes]] = []
        self.events: Counter[str] = Counter()

    def played(self, replica: MemoryReplica, decided: list[Decided]) -> None:
        """A replica has played one more entry."""
        said = (replica.hash, decided)
        first = self.decided.setdefault(replica.position, said)
        if first != said:
            words = f"{_words(first)} and {_words(said)}"
            raise Violation(f"replicas disagree on entry {replica.position}: {words}")

    def viewed(self, snapshot: int, sights: Sequence[Sight]) -> None:
        """Somebody read; whatever comes of it, it must be what the pool held at `snapshot`."""
        self.views.append((snapshot, sights))

    def submitted(self, id: RecordId, attempt: Attempt) -> None:
        """A session made a record of an attempt."""
        demand(id not in self.attempts, f"{id} was given twice")
        self.attempts[id] = attempt

    def answered(self, id: RecordId, at: int, outcome: Outcome) -> None:
        """Somebody was told what became of a record."""
        demand(outcome.state != "undecided", f"a fence at version {at} left {id} undecided")
        self.told.setdefault(id, []).append(Told(at, outcome))
        self.events[f"told {outcome.state}"] += 1


def committed(decided: Decided) -> bool:
    """Whether the record took effect."""
    return decided.verdict is Verdict.COMMITTED


def replay(replica: MemoryReplica, history: list[Appended], witness: Witness) -> None:
    """Play the rest of the history, and compare what the replica says with the others."""
    for item in history[replica.position :]:
        try:
            witness.played(replica, replica.apply(item))
        except CorruptionError as error:
            raise Violation(f"a replica refused the log: {error}") from error


def _words(said: tuple[bytes, list[Decided]]) -> str:
    return ", ".join(f"{one.verdict.name.lower()} at {one.version} for {one.id}" for one in said[1])
