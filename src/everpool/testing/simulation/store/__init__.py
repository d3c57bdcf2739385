"""Hosts, stewards and collectors over one faulty store, simulated from a seed.

One seed is one history: the log is the real one in a bucket, and the rules of what is kept are the
real ones; the hosts' replicas are simple. Between any two requests to the store others take steps,
anybody is paused or killed, answers are lost, requests come late, and listings are stale. At any
moment, and at the end, what the log says is kept must be readable from the store alone:

    simulate_store(17)                         # raises `Violation`: "seed 17: ..."
    simulate_store(17, parts=Parts(collector=CollectorWithoutARule))
"""

from collections.abc import Callable
from typing import NamedTuple

from everpool.log import ArchivedLog
from everpool.records import Operation, Record, Retain, Unpin
from everpool.store.memory import MemoryStore
from everpool.testing.memory_replica import MemoryReplica
from everpool.testing.simulation.store.collector import Collector
from everpool.testing.simulation.store.host import Committer, Host
from everpool.testing.simulation.store.steward import Steward
from everpool.testing.simulation.store.truth import Truth
from everpool.testing.simulation.store.work import genesis, keep, look, write
from everpool.testing.simulation.store.world import Settings, SteppedLog, Steps, World
from everpool.testing.simulation.witness import Violation, demand

__all__ = ["Parts", "Report", "Settings", "simulate_store"]

_ROUNDS = 4
_FOLDERS = ("checkpoints", "index", "pages", "values")


class Parts(NamedTuple):
    """What is under test."""

    replica: type[MemoryReplica] = MemoryReplica
    steward: type[Steward] = Steward
    collector: type[Collector] = Collector
    log: Callable[[World, MemoryStore], ArchivedLog] = SteppedLog


class Report(NamedTuple):
    """What happened in a simulation in which all promises held."""

    seed: int
    versions: int
    hash: bytes
    events: dict[str, int]


def simulate_store(
    seed: int, settings: Settings | None = None, parts: Parts | None = None
) -> Report:
    """Run the history of `seed` to its end and check it; raises `Violation` with the seed."""
    try:
        return _simulate(seed, settings or Settings(), parts or Parts())
    except Violation as error:
        raise Violation(f"seed {seed}: {error}") from error
    except Exception as error:
        raise Violation(f"seed {seed}: {type(error).__name__}: {error}") from error


def _simulate(seed: int, settings: Settings, parts: Parts) -> Report:
    world = World(seed, settings, parts.log)
    truth = Truth(world, parts.replica)

    def processes(host: Host) -> None:
        host.spawn("follower", host.follow())
        if world.calm:
            return
        for _ in range(settings.writers):
            host.spawn("writer", write(host))
        for _ in range(settings.keepers):
            host.spawn("keeper", keep(host))
        host.serve("steward", lambda: parts.steward(host).serve())
        host.serve("collector", lambda: parts.collector(host).serve())

    hosts = [Host(world, truth, lambda host: None)]
    _run(world, lambda: hosts[0].up)
    _commit(world, hosts[0], *genesis(world))
    world.calm = False
    hosts = [Host(world, truth, processes) for _ in range(settings.hosts)]
    world.spawn("trouble", _trouble(world, hosts))
    world.spawn("lull", _lulls(world))
    world.spawn("reader", look(hosts[0]))
    _run(world, lambda: world.clock.now >= settings.ticks)
    world.calm = True
    world.shelf.deliver()
    _run(world, lambda: all(host.at_rest() for host in hosts))
    _catch_up(world, truth, hosts)
    truth.audit(hosts)
    _tidy(world, truth, hosts, parts)
    truth.audit(hosts)
    return Report(seed, truth.replica.version, truth.replica.hash, world.events)


def _run(world: World, until: Callable[[], bool]) -> None:
    deadline = world.clock.now + world.settings.deadline
    while not until():
        world.clock.step()
        demand(world.clock.now < deadline, "it never comes to rest")


def _catch_up(world: World, truth: Truth, hosts: list[Host]) -> None:
    end = truth.end()
    _run(world, lambda: all(host.up and host.replica.position >= end for host in hosts))


def _trouble(world: World, hosts: list[Host]) -> Steps:
    """Kill hosts now and then, and take the disks of some."""
    while not world.calm:
        yield world.rng.randint(1, 2 * world.settings.crash_every)
        host = world.rng.choice(hosts)
        if host.up and not world.calm:
            host.crash(disk_lost=world.rng.random() < world.settings.disk_lost)


def _lulls(world: World) -> Steps:
    """Let nobody write for a while, now and then."""
    while not world.calm:
        yield world.rng.randint(1, 2 * world.settings.lull_every)
        world.lull = world.clock.now + world.rng.randint(1, 2 * world.settings.lull_ticks)


def _do(world: World, steps: Steps) -> None:
    """Run steps to their end, while others go on."""
    process = world.spawn("tidier", steps)
    _run(world, lambda: not process.alive)


def _commit(world: World, host: Host, *operations: Operation) -> None:
    def steps() -> Steps:
        record = Record(host.replica.version, [], [], [], list(operations))
        outcome = yield from Committer(host).commit("own", record)
        demand(outcome is not None and outcome.state == "committed", f"{operations}: {outcome}")

    _do(world, steps())


def _tidy(world: World, truth: Truth, hosts: list[Host], parts: Parts) -> None:
    """Keep nothing of the past, collect, and see that all garbage is gone."""
    host = hosts[0]
    snapshots = sorted(host.replica.disk.index.snapshots)
    _commit(world, host, *(Unpin(name) for name in snapshots), Retain(0, 0))
    for _ in range(_ROUNDS):
        _commit(world, host, Retain(0, 0))
        _do(world, parts.steward(host).checkpoint())
        _do(world, parts.collector(host).collect())
    _catch_up(world, truth, hosts)
    objects = list(world.shelf.objects)
    found = {folder: {key for key in objects if key.startswith(folder)} for folder in _FOLDERS}
    extra = found["values"] - truth.pictures[-1].values
    demand(not extra, f"values that nothing needs are still there: {sorted(extra)[:3]}")
    for folder, most in (("checkpoints", 3), ("index", 20), ("pages", 30)):
        count = len(found[folder])
        demand(count <= most, f"{count} objects are left in {folder}")
    world.events["log objects left"] = sum(key.startswith("log/") for key in world.shelf.objects)
