"""The verdict on locked snapshots: a lock is told, not judged, and stops no replica."""

import msgspec
import pytest

from everpool.records import EMPTY_HASH, Entry, Pin, Record, Unpin
from everpool.replica.index import PinRow
from everpool.testing.memory_replica import Index
from everpool.verdict import Decision, Judge, SetPin, Verdict, Writes

_SESSION = bytes(16)


def decide(*operations: Pin | Unpin) -> Decision:
    judge = Judge(Index(), Writes(0), version=0, floor=0, next_id=1)
    record = Record(0, [], [], [], list(operations))
    ((decision, _),) = judge.entry(Entry(_SESSION, 1, 0, EMPTY_HASH, [record]))
    return decision


def test_a_lock_comes_to_a_snapshot_of_the_same_version() -> None:
    decision = decide(Pin("a", 1), Pin("a", 1, 5, "compliance"))
    assert decision.verdict is Verdict.COMMITTED
    assert decision.effects[-1] == SetPin("a", 1, 5, "compliance")
    assert decide(Pin("a", 1), Pin("a", 1)).verdict is Verdict.EXISTS
    assert decide(Pin("a", 1), Pin("a", 2, 5, "governance")).verdict is Verdict.EXISTS
    assert decide(Pin("a", 1, 5, "governance"), Unpin("a")).verdict is Verdict.COMMITTED


@pytest.mark.parametrize("until_ns, lock", [(-1, ""), (1 << 63, ""), (0, "x" * 256)])
def test_a_lock_that_cannot_be_one_aborts(until_ns: int, lock: str) -> None:
    assert decide(Pin("a", 0, until_ns, lock)).verdict is Verdict.INVALID


def test_snapshots_without_a_lock_read_as_before() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode([9, "a", 7]), type=Pin) == Pin("a", 7)
    row = msgspec.msgpack.encode((7, 123))
    assert msgspec.msgpack.decode(row, type=PinRow) == PinRow(7, 123, 0, "")
