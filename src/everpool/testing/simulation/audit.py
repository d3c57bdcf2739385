"""The judgement at the end of a simulation, by a model that knows nothing of verdicts.

The model executes what committed, one record after the other in version order. If every
transaction sees there what it saw when it ran, the history was serializable in that order.
"""

import math
import struct
from collections.abc import Mapping

from everpool.log import Appended
from everpool.records import (
    Allocate,
    Delete,
    FetchAdd,
    Operation,
    Payload,
    Put,
    RecordId,
    Write,
    decode_entry,
)
from everpool.testing.memory_replica import Decided, MemoryReplica
from everpool.testing.simulation.witness import Told, Violation, Witness, committed, demand, replay
from everpool.testing.simulation.workload import ACCOUNTS, CELL, OPENING_BALANCE


class Model:
    """The pool as one would write it without thinking of failures."""

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self.names: dict[str, tuple[int, Payload | None]] = {}
        self.memory: dict[int, bytearray] = {}
        self._files: Mapping[str, bytes] = {} if files is None else files
        self._next_id = 1

    def bound(self, name: str) -> tuple[int, Payload | None] | None:
        return self.names.get(name)

    def listed(self, prefix: str) -> list[str]:
        return sorted((n for n in self.names if n.startswith(prefix)), key=str.encode)

    def bytes_of(self, id: int, start: int, end: int) -> bytes | None:
        memory = self.memory.get(id)
        return None if memory is None else bytes(memory[start:end])

    def execute(self, operations: list[Operation]) -> list[bytes]:
        """Do what a committed record says; returns the old numbers of its additions."""
        created: list[int] = []
        results: list[bytes] = []
        for operation in operations:
            match operation:
                case Put(name, payload):
                    bound = self.names.get(name)
                    demand(bound is None or bound[1] is not None, f"{name} was memory")
                    self.names[name] = (self._new_id(), payload)
                case Delete(name):
                    demand(name in self.names, f"{name} was deleted but did not exist")
                    self.memory.pop(self.names.pop(name)[0], None)
                case Allocate(name, size):
                    demand(name not in self.names, f"{name} was allocated but existed")
                    created.append(self._new_id())
                    self.names[name] = (created[-1], None)
                    self.memory[created[-1]] = bytearray(size)
                case Write(object, offset, payload):
                    data = payload if isinstance(payload, bytes) else self._files[payload.file]
                    self._store(created, object, offset, data)
                case FetchAdd(object, offset, dtype, delta):
                    id = created[-object - 1] if object < 0 else object
                    old = self.bytes_of(id, offset, offset + len(delta)) or b""
                    self._store(created, object, offset, _sum(old, delta, dtype))
                    results.append(old)
                case _:  # it changes no names and no bytes
                    pass
        return results

    def _store(self, created: list[int], object: int, offset: int, data: bytes) -> None:
        demand(object >= -len(created), f"memory {object} was written but never allocated")
        id = created[-object - 1] if object < 0 else object
        demand(id in self.memory, f"memory {id} was written after it was deleted")
        inside = offset >= 0 and offset + len(data) <= len(self.memory[id])
        demand(inside, f"memory {id} was written beyond its end")
        self.memory[id][offset : offset + len(data)] = data

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1


def audit(witness: Witness, replicas: list[MemoryReplica], fresh: MemoryReplica) -> None:
    """Raise `Violation` unless all that was promised holds.

    `replicas` are those that lived through the simulation, `fresh` an empty one.
    """
    _compare_replicas(witness, replicas, fresh)
    decided = [one for position in sorted(witness.decided) for one in witness.decided[position][1]]
    check_versions(witness.history, decided)
    check_told(witness, decided)
    model = _execute(witness, decided)
    _compare_bytes(model, fresh)


def _compare_replicas(
    witness: Witness, replicas: list[MemoryReplica], fresh: MemoryReplica
) -> None:
    """All replicas play to the end, also from each checkpoint, and are equal in every byte."""
    history = witness.history
    checkpoints = sorted(witness.checkpoints)
    for position, checkpoint in checkpoints:
        replay(fresh, history[:position], witness)
        demand(fresh.checkpoint() == checkpoint, f"the checkpoint at {position} is another")
    replay(fresh, history, witness)
    final = fresh.checkpoint()
    for replica in replicas:
        replay(replica, history, witness)
        demand(replica.checkpoint() == final, "two replicas of the whole log are not equal")
    for position, checkpoint in checkpoints:
        replica = type(fresh).from_checkpoint(checkpoint)
        replay(replica, history, witness)
        demand(replica.checkpoint() == final, f"the replica that began at {position} is another")


def check_versions(history: list[Appended], decided: list[Decided]) -> None:
    """Every record counts one version; every id takes effect once, in the session's order."""
    ids = [
        RecordId(entry.session, entry.first_sequence + at)
        for entry in (decode_entry(item.entry) for item in history)
        for at in range(len(entry.records))
    ]
    demand(ids == [one.id for one in decided], "the verdicts are not about the log's records")
    last: dict[bytes, int] = {}
    for number, one in enumerate(decided, 1):
        demand(one.version == number, f"record {number} of the log has version {one.version}")
        if committed(one):
            session, sequence = one.id
            earlier = last.get(session, 0)
            demand(sequence != earlier, f"{one.id} was committed twice")
            demand(sequence > earlier, f"{one.id} was committed after {earlier} of its session")
            last[session] = sequence


def check_told(witness: Witness, decided: list[Decided]) -> None:
    """Whatever anybody was told about a record is what the log says, and stays so."""
    truth = {one.id: one for one in decided if committed(one)}
    for id, answers in witness.told.items():
        fact = truth.get(id)
        expired = False
        for at, outcome in sorted(answers, key=_at):
            if outcome.state == "committed":
                demand(fact is not None, f"{id} was acknowledged and is not in the log")
                assert fact is not None
                same = (outcome.version, outcome.results) == (fact.version, fact.results)
                demand(same, f"{id} was acknowledged as {outcome}, but is {fact}")
            elif outcome.state == "aborted":
                demand(fact is None, f"{id} was said to be aborted, but is {fact}")
            else:
                late = fact is not None and fact.version > at
                demand(not late, f"{id} had expired at {at}, and was committed later")
            back = expired and outcome.state == "committed"
            demand(not back, f"{id} came back after it had expired")
            expired = expired or outcome.state == "expired"


def _at(told: Told) -> int:
    return told.at


def _execute(witness: Witness, decided: list[Decided]) -> Model:
    """Execute what committed on the model, and ask it whether all sights were true."""
    views: dict[int, list[int]] = {}
    for at, (snapshot, _) in enumerate(witness.views):
        views.setdefault(snapshot, []).append(at)
    records = [record for item in witness.history for record in decode_entry(item.entry).records]
    model = Model()
    for one, record in zip(decided, records, strict=True):
        if committed(one):
            attempt = witness.attempts.get(one.id)
            for sight in attempt.sights if attempt else ():
                if not sight.holds(model):
                    kind = attempt.kind if attempt else ""
                    raise Violation(f"not serializable: {kind} at {one.version} saw {sight}")
            try:
                results = model.execute(record.operations)
            except Violation as error:
                raise Violation(f"committed at {one.version} though {error}") from error
            demand(tuple(results) == one.results, f"the results at {one.version} are wrong")
        for at in views.get(one.version, ()):
            for sight in witness.views[at][1]:
                demand(sight.holds(model), f"a reader saw at {one.version} what was not: {sight}")
    return model


def _compare_bytes(model: Model, replica: MemoryReplica) -> None:
    """The replica holds what the model holds, and money was neither made nor lost."""
    index = replica.disk.index
    held = {
        name: (row.id, None if row.size >= 0 else row.payload) for name, row in index.names.items()
    }
    demand(held == model.names, "the replicas' names are not those of the model")
    demand(replica.disk.memory == model.memory, "the replicas' bytes are not those of the model")
    accounts = bytes(model.memory[model.names["accounts"][0]])
    cells = [accounts[at : at + CELL] for at in range(0, len(accounts), CELL)]
    total = sum(int.from_bytes(cell, "little", signed=True) for cell in cells)
    demand(total == ACCOUNTS * OPENING_BALANCE, f"the accounts hold {total}")


def _sum(old: bytes, delta: bytes, dtype: str) -> bytes:
    """Return `old + delta`, worked out without NumPy."""
    if dtype == "<f8":
        return struct.pack("<d", math.fsum(struct.unpack("<dd", old + delta)))
    order = "big" if dtype[0] == ">" else "little"
    total = int.from_bytes(old, order) + int.from_bytes(delta, order)
    return (total % (1 << 8 * len(delta))).to_bytes(len(delta), order)
