"""What surrounds the hosts of a simulation: time, chance, a faulty network, and the log."""

import heapq
import random
from collections.abc import Callable
from typing import NamedTuple

from everpool.log.memory import MemoryLog
from everpool.records import RecordId
from everpool.testing.memory_replica import MemoryReplica
from everpool.testing.simulation.witness import Witness, demand


class Settings(NamedTuple):
    """How a simulation goes. Times are in ticks, chances from 0 to 1.

    An entry takes up to `delay` ticks to the log, a late one up to `late_delay`. A host plays the
    log every `poll` ticks; a session sends again after `patience`. Once faults have ceased, all
    is settled within `deadline` ticks, and with fewer than `entries` entries in all.
    """

    hosts: int = 3
    sessions: int = 2
    attempts: int = 110
    window: int = 4
    delay: int = 30
    late_delay: int = 900
    poll: int = 30
    patience: int = 120
    late: float = 0.08
    lost: float = 0.12
    doubled: float = 0.15
    slow_transaction: float = 0.12
    crash: float = 0.004
    asked: float = 0.12
    steward_every: int = 250
    floor_lag: int = 30
    deadline: int = 6_000
    entries: int = 2_000


class Clock:
    """Virtual time: calls what is due, in order."""

    def __init__(self) -> None:
        self.now = 0
        self._due: list[tuple[int, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, delay: int, call: Callable[[], None]) -> None:
        """Call `call` in `delay` ticks; of calls due at one tick, the first asked for is first."""
        self._count += 1
        heapq.heappush(self._due, (self.now + delay, self._count, call))

    def step(self) -> None:
        """Go on to the next call."""
        due, _, call = heapq.heappop(self._due)
        self.now = max(self.now, due)
        call()


class World:
    """All that hosts share. `replica_type` is the replica under test."""

    def __init__(self, seed: int, settings: Settings, replica_type: type[MemoryReplica]) -> None:
        self.rng = random.Random(seed)
        self.settings = settings
        self.replica_type = replica_type
        self.clock = Clock()
        self.log = MemoryLog(clock_ns=lambda: self.clock.now)
        self.witness = Witness()
        self.calm = False
        self.in_flight = 0
        self.begun = 0
        self.ids: list[RecordId] = []
        self.orphans: list[RecordId] = []

    def chance(self, probability: float) -> bool:
        """Whether a fault happens now; never once the simulation has calmed down."""
        return not self.calm and self.rng.random() < probability

    def happened(self, event: str) -> None:
        """Count an event, for the report."""
        self.witness.events[event] += 1

    def send(self, entry: bytes) -> None:
        """Send an entry to the log: it may come late, twice, or never. There is no answer."""
        copies = 1
        if self.chance(self.settings.lost):
            copies = 0
            self.happened("lost entry")
        if self.chance(self.settings.doubled):
            copies += 1
            self.happened("doubled entry")
        for _ in range(copies):
            late = self.chance(self.settings.late)
            limit = self.settings.late_delay if late else self.settings.delay
            self.in_flight += 1
            self.clock.after(self.rng.randint(1, limit), lambda: self._arrive(entry))

    def _arrive(self, entry: bytes) -> None:
        self.in_flight -= 1
        before = self.log.end().position
        position = self.log.append(entry)
        found = self.log.read(before)
        demand([item.position for item in found] == [position], "an append is one entry")
        self.witness.history += found

    def keep(self, replica: MemoryReplica) -> None:
        """Keep a checkpoint of the replica, and let the log forget what is in older ones."""
        kept = self.witness.checkpoints
        kept.append((replica.position, replica.checkpoint()))
        self.happened("checkpoint")
        if self.rng.random() < 0.5:
            self.log.trim(sorted(kept)[-2:][0][0], b"")

    def newest_checkpoint(self) -> bytes | None:
        """Return the checkpoint of the latest position."""
        kept = self.witness.checkpoints
        return max(kept)[1] if kept else None
