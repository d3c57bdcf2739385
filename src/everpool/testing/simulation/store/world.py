"""What surrounds the hosts of a simulation with a store: time, chance, a faulty bucket, its log.

There are no threads: a process is a generator, and all that happens at once is that between any
two requests to the store others take steps. So every history is one of single requests in some
order, as on a real bucket, and a seed is one history.
"""

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple, TypeVar

from everpool.errors import CorruptionError, EverpoolError
from everpool.log import ArchivedLog
from everpool.log.bucket import BucketLog
from everpool.log.bucket.archive import Archive
from everpool.log.bucket.heads import Known
from everpool.store import Listed
from everpool.store.memory import Fault, MemoryStore, Shelf
from everpool.testing.simulation.witness import Violation
from everpool.testing.simulation.world import Clock

TICK_NS = 1_000_000
_TICKS_A_SECOND = 1000
_BEGINNING_NS = 1_000_000_000 * TICK_NS
_DEEPEST = 3
A = TypeVar("A")
B = TypeVar("B")

Steps = Generator[int, None, None]
"""What a process does: it yields how many ticks it rests."""


class Settings(NamedTuple):
    """How a simulation goes. Times are in ticks, chances from 0 to 1 and for each request or step.

    At each request to the store up to `others` steps of other processes may come before it, and
    those of up to `sleep_ticks`. Between an upload and its record `slow_ticks` may go by.
    """

    hosts: int = 3
    writers: int = 2
    ticks: int = 6_000
    head_bytes: int = 900
    rest: int = 120
    lull_every: int = 1500
    lull_ticks: int = 1500
    slow: float = 0.25
    slow_ticks: int = 2500
    keepers: int = 1
    keep_every: int = 360
    restores: float = 0.3
    retention: float = 0.7
    steward_every: int = 400
    collect_every: int = 400
    look_every: int = 800
    floor_lag: int = 150
    interleaved: float = 0.10
    others: int = 5
    refused: float = 0.01
    never: float = 0.01
    lost: float = 0.03
    late: float = 0.02
    late_ticks: int = 2500
    sleeps: float = 0.004
    sleep_ticks: int = 1500
    stale_list: float = 0.4
    stale_ticks: int = 1500
    pause: float = 0.015
    pause_ticks: int = 5000
    killed: float = 0.006
    crash_every: int = 2500
    disk_lost: float = 0.4
    deadline: int = 80_000


class Killed(BaseException):
    """The process was killed while it waited for the store."""


class Process:
    """Something that goes on step by step, on a host or by itself."""

    def __init__(self, world: "World", name: str, steps: Steps, fragile: bool) -> None:
        self.world = world
        self.name = name
        self.alive = True
        # Called when it alone is killed, not with its host.
        self.killed: Callable[[], object] = lambda: None
        self._steps = steps
        self._fragile = fragile
        self._resume(world.rng.randint(0, 20))

    def _resume(self, ticks: int) -> None:
        self.world.clock.after(ticks, self._step)

    def _step(self) -> None:
        world = self.world
        if not self.alive:
            return
        if self._fragile and world.chance(world.settings.killed):
            world.happened(f"{self.name} killed")
            self.end()
            self.killed()
            return
        world.running.append(self)
        try:
            rest = next(self._steps)
        except StopIteration:
            self.end()
            return
        except Killed:
            return
        except EverpoolError as error:
            # Not an error of whoever's request this step has crossed with.
            raise Violation(f"{self.name}: {error}") from error
        finally:
            world.running.pop()
        if self.alive:
            if world.chance(world.settings.pause):
                world.happened(f"{self.name} paused")
                rest += world.rng.randint(0, world.settings.pause_ticks)
            self._resume(rest)

    def end(self) -> None:
        """Stop it, wherever it is."""
        self.alive = False
        self.world.processes.discard(self)


class World:
    """All that hosts share."""

    def __init__(
        self, seed: int, settings: Settings, log: "Callable[[World, MemoryStore], ArchivedLog]"
    ) -> None:
        self.rng = random.Random(seed)
        self.settings = settings
        self.clock = Clock()
        self.shelf = Shelf(self.now_ns)
        self.calm = True
        # Until then nobody writes; what keeps the store in order goes on.
        self.lull = 0
        self.processes: set[Process] = set()
        self.running: list[Process] = []
        self.events: dict[str, int] = {}
        self.deleted: list[tuple[int, Listed]] = []
        # Asked before an object is deleted.
        self.before_delete: Callable[[str], None] = lambda key: None
        self._log = log

    def now_ns(self) -> int:
        """Return the time, which is the same everywhere."""
        return _BEGINNING_NS + self.clock.now * TICK_NS

    def spawn(self, name: str, steps: Steps, *, fragile: bool = False) -> Process:
        """Begin a process; a `fragile` one is killed at any step."""
        process = Process(self, name, steps, fragile)
        self.processes.add(process)
        return process

    def chance(self, probability: float) -> bool:
        """Whether a fault happens now; never once the simulation has calmed down."""
        return not self.calm and self.rng.random() < probability

    def happened(self, event: str) -> None:
        """Count an event, for the report."""
        self.events[event] = self.events.get(event, 0) + 1

    def store(self) -> "BucketStore":
        """Return a client of the store, for one process."""
        return BucketStore(self)

    def log(self, store: MemoryStore) -> ArchivedLog:
        """Return a client of the log, for one process."""
        return self._log(self, store)

    def key(self, folder: str, began: int) -> str:
        """Return a new key for an object whose upload begins at that version."""
        return f"{folder}/{began:016x}{self.rng.randbytes(8).hex()}"

    def others(self) -> None:
        """Let others take a few steps before a request of whoever is running."""
        deep = len(self.running)
        if 0 < deep <= _DEEPEST and self.chance(self.settings.interleaved):
            for _ in range(self.rng.randint(1, self.settings.others)):
                self.clock.step()
        if self.running and self.chance(self.settings.sleeps):
            self.happened("request slept")
            self.rest(self.rng.randint(1, self.settings.sleep_ticks))
        self.check()

    def rest(self, ticks: int) -> None:
        """Let time go by for whoever is running."""
        until = self.clock.now + ticks
        if len(self.running) <= _DEEPEST:
            self.clock.after(ticks, lambda: None)
            while self.clock.now < until:
                self.clock.step()
        else:
            self.clock.now = until
        self.check()

    def check(self) -> None:
        """End whoever is running, if it was killed meanwhile."""
        if self.running and not self.running[-1].alive:
            raise Killed


class BucketStore(MemoryStore):
    """A client of the store: requests fail, are late, or cross with those of others."""

    def __init__(self, world: World) -> None:
        super().__init__(world.shelf, self._happens)
        self._world = world

    def _happens(self, call: str, key: str) -> Fault | None:
        world, settings = self._world, self._world.settings
        world.others()
        dice = 1.0 if world.calm else world.rng.random()
        for chance, fault in (
            (settings.refused, Fault.REFUSED),
            (settings.never, Fault.NEVER),
            (settings.lost, Fault.LOST),
            (settings.late, Fault.LATE),
        ):
            if dice < chance:
                world.happened(f"{fault.name.lower()} {call}")
                if fault is Fault.LATE and not call.startswith(("get", "list")):
                    ticks = world.rng.randint(1, settings.late_ticks)
                    world.clock.after(ticks, world.shelf.deliver)
                return fault
            dice -= chance
        return None

    def delete(self, keys: Sequence[str]) -> None:
        """Forget the objects; the world is asked before."""
        for key in keys:
            kept = self.shelf.objects.get(key)
            self._world.before_delete(key)
            if kept is not None:
                listed = Listed(key, len(kept.data), kept.modified_ns)
                self._world.deleted.append((self._world.clock.now, listed))
            super().delete([key])

    def list_stale(self, folder: str) -> Iterator[Listed]:
        """Yield a listing as eventual consistency gives it: some of what happened lately lacks."""
        world = self._world
        found = list(self.list(folder))
        if not world.chance(world.settings.stale_list):
            yield from found
            return
        world.happened("stale list")
        since = world.clock.now - world.settings.stale_ticks
        since_ns = world.now_ns() - world.settings.stale_ticks * TICK_NS
        found = [one for one in found if one.modified_ns < since_ns or world.rng.random() < 0.5]
        found += [
            one
            for at, one in world.deleted
            if at >= since and one.key.startswith(f"{folder}/") and world.rng.random() < 0.5
        ]
        yield from sorted(set(found))


class _SingleThread(Archive):
    """Fetches one thing after the other."""

    def _map(self, function: Callable[[A], B], items: Sequence[A]) -> list[B]:
        return [function(item) for item in items]


class SteppedLog(BucketLog):
    """The log in a bucket, by one thread: others go on at its requests, and while it sleeps."""

    def __init__(self, world: World, store: MemoryStore) -> None:
        super().__init__(
            store,
            timeout_s=4.0,
            head_bytes=world.settings.head_bytes,
            clock_ns=world.now_ns,
            monotonic=lambda: world.clock.now / _TICKS_A_SECOND,
            chance=random.Random(world.rng.getrandbits(64)),
        )
        self._world = world
        self._archive = _SingleThread(store, "log", 1 << 20)

    def _swap(self, data: bytes, known: Known) -> str:
        return self._store.swap(self._head_key, data, known.e_tag)

    def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            self._world.rest(1 + int(seconds * _TICKS_A_SECOND))


def patiently(world: World, call: Callable[[], A], tries: int = 4) -> Generator[int, None, A]:
    """Call until the store answers, a few times; what fails for good is raised."""
    while True:
        try:
            return call()
        except CorruptionError:
            raise
        except EverpoolError:
            tries -= 1
            if not tries:
                raise
        yield world.rng.randint(1, 60)
