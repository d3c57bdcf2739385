"""What the processes of hosts do in a simulation with a store: write, keep, and bring back."""

from collections.abc import Generator

from everpool.errors import CorruptionError, EverpoolError
from everpool.records import (
    Allocate,
    Delete,
    FetchAdd,
    Operation,
    Payload,
    Pin,
    Put,
    Range,
    Record,
    Reference,
    Restore,
    Retain,
    Unpin,
    Write,
)
from everpool.testing.memory_replica import MemoryReplica
from everpool.testing.simulation.store.host import Committer, Host
from everpool.testing.simulation.store.segments import BLOCK
from everpool.testing.simulation.store.world import TICK_NS, Steps, World, patiently
from everpool.testing.simulation.witness import SawBytes, SawName, SawNames, Sight

MEMORY = 6 * BLOCK
_COUNTER = MEMORY - 8
_NAMES = [f"n/{number}" for number in range(5)]
_MEMORIES = ["m/0", "m/1"]
_ONE = (1).to_bytes(8, "little")


class Work:
    """A transaction in the making: what it has read, and what it will do."""

    def __init__(self, replica: MemoryReplica) -> None:
        self.replica = replica
        self.snapshot = replica.version
        self.names: list[str] = []
        self.prefixes: list[str] = []
        self.ranges: list[Range] = []
        self.sights: list[Sight] = []
        self.operations: list[Operation] = []

    def bound(self, name: str) -> tuple[int, Payload | None] | None:
        """Read a name: id and payload; None for the payload of memory."""
        row = self.replica.row(name)
        found = None if row is None else (row.id, None if row.size >= 0 else row.payload)
        self.names.append(name)
        self.sights.append(SawName(name, found))
        return found

    def read(self, id: int, start: int, end: int) -> bytes:
        """Read bytes of memory that exists."""
        data = self.replica.read(id, start, end)
        self.ranges.append((id, start, end))
        self.sights.append(SawBytes(id, start, end, data))
        return data

    def listed(self) -> list[str]:
        """Read which names there are."""
        found = self.replica.names()
        self.prefixes.append("")
        self.sights.append(SawNames("", found))
        return found

    def record(self) -> Record:
        """Return what is committed."""
        return Record(self.snapshot, self.names, self.prefixes, self.ranges, self.operations)


def genesis(world: World) -> list[Operation]:
    """Return the first commit of a simulation: little is kept, and there is memory."""
    return [_retention(world), *(Allocate(name, MEMORY, b"") for name in _MEMORIES)]


def _retention(world: World) -> Retain:
    """Return how much is to be kept from now on."""
    rng = world.rng
    if rng.random() >= world.settings.retention:
        return Retain(0, 0)
    return Retain(rng.choice([0, 500, 3000]) * TICK_NS, rng.choice([0, 5, 30]))


def upload(host: Host, data: bytes) -> Generator[int, None, Reference]:
    """Store a large value, for a record to name."""
    world = host.world
    key = world.key("values", host.replica.version)
    file = key.partition("/")[2]
    host.truth.contents[file] = data
    yield world.rng.randint(0, 40)
    store = world.store()
    yield from patiently(world, lambda: store.put(key, data))
    slow = world.chance(world.settings.slow)
    yield world.rng.randint(0, world.settings.slow_ticks if slow else 40)
    return Reference(file, len(data), bytes(16))


def write(host: Host) -> Steps:
    """Commit transactions for as long as the simulation is not over."""
    world = host.world
    committer = Committer(host)
    while not world.calm:
        yield world.rng.randint(1, 2 * world.settings.rest)
        if world.clock.now < world.lull:
            continue
        try:
            work = yield from _work(host)
            if work.operations:
                yield from committer.commit("write", work.record(), work.sights)
        except CorruptionError:
            raise
        except EverpoolError:
            world.happened("gave up writing")


def _work(host: Host) -> Generator[int, None, Work]:
    rng, replica = host.world.rng, host.replica
    work = Work(replica)
    name, memory = rng.choice(_NAMES), rng.choice(_MEMORIES)
    dice = rng.random()
    if dice < 0.35:
        old = work.bound(name) if rng.random() < 0.5 else None
        held = old[1] if old else None
        seen = len(held) if isinstance(held, bytes) else 0
        reference = yield from upload(host, rng.randbytes(20) + bytes([seen]))
        work.operations.append(Put(name, reference))
    elif dice < 0.45:
        old = work.bound(name)
        before = old[1] if old and isinstance(old[1], bytes) else b""
        work.operations.append(Put(name, before[-6:] + rng.randbytes(2)))
    elif dice < 0.52:
        if work.bound(name) is not None:
            work.operations.append(Delete(name))
    elif dice < 0.57:
        if work.bound(memory) is not None:
            work.operations.append(Delete(memory))
        work.operations.append(Allocate(memory, MEMORY, b""))
        work.operations.append(Write(-1, rng.randrange(MEMORY - 9), rng.randbytes(9)))
    else:
        bound = work.bound(memory)
        if bound is None:
            return work
        id = bound[0]
        if dice < 0.7:
            work.operations.append(FetchAdd(id, _COUNTER, "<i8", _ONE))
        elif dice < 0.85:  # the same in two blocks: a mixed picture shows
            stamp = rng.randbytes(4)
            for block in rng.sample(range(5), 2):
                work.operations.append(Write(id, block * BLOCK, stamp))
        elif dice < 0.93:
            at = rng.randrange(5) * BLOCK
            data = work.read(id, at, at + 4)
            work.operations.append(Write(id, at, bytes(x ^ 0x55 for x in data[::-1])))
        else:
            reference = yield from upload(host, rng.randbytes(2 * BLOCK))
            work.operations.append(Write(id, rng.randrange(3) * BLOCK, reference))
    return work


def keep(host: Host) -> Steps:
    """Take and forget snapshots, bring versions back, and change how much is kept."""
    world = host.world
    rng = world.rng
    committer = Committer(host)
    while not world.calm:
        yield rng.randint(1, 2 * world.settings.keep_every)
        index = host.replica.disk.index
        dice = rng.random()
        try:
            if rng.random() < world.settings.restores:
                yield from _restore(committer)
            elif dice < 0.5:
                kept, newest = index.horizon.kept, index.newest_checkpoint[0]
                among = [0, kept, rng.randint(kept, index.version), *index.snapshots.values()]
                old = rng.randint(kept, max(kept, newest))
                version = old if rng.random() < 0.7 else rng.choice(among)
                yield rng.choice([0, 0, rng.randint(1, 2000)])
                word = rng.choice(["snapshot", "branch at"])
                yield from _alone(committer, Pin(f"{word} {rng.randrange(6)}", version))
            elif dice < 0.85 and index.snapshots:
                yield from _alone(committer, Unpin(rng.choice(sorted(index.snapshots))))
            else:
                yield from _alone(committer, _retention(world))
        except CorruptionError:
            raise
        except EverpoolError:
            world.happened("gave up keeping")


def _alone(committer: Committer, operation: Operation) -> Steps:
    record = Record(committer.host.replica.version, [], [], [], [operation])
    outcome = yield from committer.commit("keep", record)
    if outcome is not None and outcome.state == "committed":
        committer.host.world.happened(type(operation).__name__)


def _restore(committer: Committer) -> Steps:
    """Make the pool what it was at a version, as `Pool.restore` does."""
    host = committer.host
    world, rng = host.world, host.world.rng
    index = host.replica.disk.index
    kept = [index.horizon.kept, index.version, rng.randint(index.horizon.kept, index.version)]
    pins = list(index.snapshots.values())
    version = rng.choice(pins if pins and rng.random() < 0.7 else kept)
    if not version:
        return
    # What it was is read from the store; that this is true is checked elsewhere.
    then = host.truth.pictures[version]
    yield rng.randint(0, 200)
    yield from patiently(world, host.play)
    work = Work(host.replica)
    work.operations.append(Restore(version))
    created = 0
    for name in sorted({*work.listed(), *then.names}):
        current, wanted = work.bound(name), then.names.get(name)
        if wanted is None:
            work.operations.append(Delete(name))
            continue
        id, payload = wanted
        if payload is not None:
            if current is not None and current[0] == id:
                continue
            if current is not None and current[1] is None:
                work.operations.append(Delete(name))
            work.operations.append(Put(name, payload))
            continue
        target = id
        if current is None or current[0] != id:
            if current is not None:
                work.operations.append(Delete(name))
            work.operations.append(Allocate(name, MEMORY, b""))
            created += 1
            target = -created
        data = then.memory[id]
        if target < 0 or work.read(id, 0, MEMORY) != data:
            reference = yield from upload(host, data)
            work.operations.append(Write(target, 0, reference))
    if len(work.operations) > 1:
        outcome = yield from committer.commit("restore", work.record(), work.sights)
        if outcome is not None and outcome.state == "committed":
            world.happened("Restore")
        elif outcome is not None and outcome.verdict:
            world.happened("restore refused")


def look(host: Host) -> Steps:
    """Look at what is kept, and begin a host, at any moment."""
    world, truth = host.world, host.truth
    while not world.calm:
        yield world.rng.randint(1, 2 * world.settings.look_every)
        truth.look()
