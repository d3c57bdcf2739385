"""Hosts, a faulty network and one log, simulated from a seed.

One seed is one history: no threads, no clock, no chance but the seed's. `simulate` runs hosts
that pipeline transactions, crash between any two steps and start again, over a network that
delays, loses, doubles and reorders; at the end every promise is checked. A failure names the
seed:

    simulate(17)                                   # raises `Violation`: "seed 17: ..."
    simulate(17, replica_type=ReplicaWithoutARule)

What is kept in an object store, and deleted from it, has a simulation of its own: `store`.
"""

from collections import Counter
from typing import NamedTuple

from everpool.records import EMPTY_HASH, Entry, encode_entry
from everpool.testing.memory_replica import MemoryReplica
from everpool.testing.simulation.audit import audit
from everpool.testing.simulation.host import Host
from everpool.testing.simulation.witness import Violation, committed, demand
from everpool.testing.simulation.workload import genesis
from everpool.testing.simulation.world import Settings, World

__all__ = ["Report", "Settings", "Violation", "simulate"]


class Report(NamedTuple):
    """What happened in a simulation in which all promises held."""

    seed: int
    records: int
    hash: bytes
    verdicts: Counter[str]
    events: Counter[str]


def simulate(
    seed: int,
    settings: Settings | None = None,
    replica_type: type[MemoryReplica] = MemoryReplica,
) -> Report:
    """Run the history of `seed` to its end and check it; raises `Violation` with the seed."""
    try:
        return _simulate(seed, settings or Settings(), replica_type)
    except Violation as error:
        raise Violation(f"seed {seed}: {error}") from error
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        raise Violation(f"seed {seed}: a record stopped a replica: {words}") from error


def _simulate(seed: int, settings: Settings, replica_type: type[MemoryReplica]) -> Report:
    world = World(seed, settings, replica_type)
    first = Entry(bytes(8) + world.rng.randbytes(8), 1, 0, EMPTY_HASH, [genesis()])
    world.calm = True
    world.send(encode_entry(first))
    world.clock.step()
    world.calm = False
    hosts = [Host(world) for _ in range(settings.hosts)]
    _schedule_stewards(world, hosts)
    deadline = settings.deadline
    while not world.calm or world.in_flight or not all(host.settled() for host in hosts):
        world.clock.step()
        world.calm = world.calm or world.begun >= settings.attempts
        if not world.calm:
            deadline = world.clock.now + settings.deadline
        demand(world.clock.now < deadline, "a record is never settled")
        demand(len(world.witness.history) < settings.entries, "a record is sent again for ever")
    witness = world.witness
    fresh = replica_type(forgetful=False)
    audit(witness, [host.replica for host in hosts], fresh)
    decided = [one for _, said in witness.decided.values() for one in said]
    assert any(committed(one) for one in decided), "the first record always commits"
    verdicts = Counter(one.verdict.name.lower() for one in decided)
    return Report(seed, len(decided), fresh.hash, verdicts, witness.events)


def _schedule_stewards(world: World, hosts: list[Host]) -> None:
    """Let one host raise the floor now and then, often two of them at once."""

    def due() -> None:
        if not world.calm:
            for host in world.rng.sample(hosts, min(len(hosts), world.rng.randint(1, 2))):
                host.steward()
            again()

    def again() -> None:
        world.clock.after(world.rng.randint(1, 2 * world.settings.steward_every), due)

    again()
