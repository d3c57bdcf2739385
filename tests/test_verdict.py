"""The rule of verdicts, case by case, and against the same rule written naively."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everpool.log import Appended
from everpool.records import (
    EMPTY_HASH,
    MAX_MEMORY_BYTES,
    Allocate,
    Checkpoint,
    Collect,
    Delete,
    Entry,
    Fence,
    FetchAdd,
    Floor,
    Operation,
    Put,
    Range,
    Record,
    RecordId,
    Reference,
    Restore,
    Retain,
    Write,
    encode_entry,
)
from everpool.testing.memory_replica import Index, MemoryReplica, Row
from everpool.verdict import (
    VOID,
    Add,
    Bind,
    BindMemory,
    Decision,
    Judge,
    SetFence,
    SetFloor,
    Store,
    Unbind,
    Verdict,
    Writes,
)
from support.naive_rule import NaiveRule

LOGS = 4000 if os.environ.get("EVERPOOL_SOAK") == "1" else 250
ONE = Put("one", b"")
ADD = FetchAdd(1, 0, "<i8", bytes(8))


def session(number: int, start: int = 0) -> bytes:
    return start.to_bytes(8, "big") + number.to_bytes(8, "big")


class Story:
    """A log judged record by record. Reads are of the version before, unless it is said."""

    def __init__(self, *setup: Operation) -> None:
        self.index = Index()
        self.judge = Judge(self.index, Writes(0), version=0, floor=0, next_id=1)
        self.sequences: dict[bytes, int] = {}
        if setup:
            self.does(*setup)

    @property
    def version(self) -> int:
        return self.judge.version

    def play(self, entry: Entry) -> list[Decision]:
        decisions: list[Decision] = []
        for decision, state in self.judge.entry(entry):
            for effect in decision.effects:
                self._apply(effect)
            if state is not None:
                self.index.sessions[entry.session] = state
            decisions.append(decision)
        return decisions

    def send(self, who: bytes, sequence: int, *records: Record) -> list[Verdict]:
        """Append an entry of these records as they come."""
        entry = Entry(who, sequence, 0, EMPTY_HASH, list(records))
        return [decision.verdict for decision in self.play(entry)]

    def decide(
        self,
        *operations: Operation,
        snapshot: int | None = None,
        names: Iterable[str] = (),
        prefixes: Iterable[str] = (),
        ranges: Iterable[Range] = (),
        who: bytes = session(1),
    ) -> Decision:
        """Append one record, the next of its session, and return what becomes of it."""
        record = Record(
            self.version if snapshot is None else snapshot,
            list(names),
            list(prefixes),
            list(ranges),
            list(operations),
        )
        self.sequences[who] = self.sequences.get(who, 0) + 1
        entry = Entry(who, self.sequences[who], 0, EMPTY_HASH, [record])
        return self.play(entry)[0]

    def does(self, *operations: Operation) -> Decision:
        """Commit these operations."""
        decision = self.decide(*operations)
        assert decision.verdict is Verdict.COMMITTED, decision
        return decision

    def _apply(self, effect: object) -> None:
        index = self.index
        match effect:
            case Bind(name=name, id=id, payload=payload):
                index.names[name] = Row(id, -1, payload)
            case BindMemory(name=name, id=id, size=size, header=header):
                index.names[name] = Row(id, size, header)
                index.memory[id] = size
            case Unbind(name=name, id=id):
                del index.names[name]
                index.memory.pop(id, None)
            case SetFence(session=who, state=state):
                if state is not None:
                    index.sessions[who] = state
            case _:
                pass


def blank(snapshot: int = 0, *operations: Operation) -> Record:
    return Record(snapshot, [], [], [], list(operations))


# What a record read.


@pytest.mark.parametrize(
    ("before", "meanwhile", "name", "conflicts"),
    [
        ([], [ONE], "one", True),
        ([ONE], [ONE], "one", True),
        ([ONE], [Delete("one")], "one", True),
        ([ONE], [Delete("one"), ONE], "one", True),
        ([], [ONE, Delete("one")], "one", True),
        ([], [Allocate("one", 8, b"")], "one", True),
        ([ONE], [Put("on", b""), Put("one/", b""), Put("One", b"")], "one", False),
        ([Allocate("one", 8, b"")], [Write(1, 0, b"x")], "one", False),
        ([Allocate("one", 8, b"")], [ADD], "one", False),
    ],
)
def test_a_name(
    before: list[Operation], meanwhile: list[Operation], name: str, conflicts: bool
) -> None:
    story = Story(*before)
    snapshot = story.version
    story.does(*meanwhile)
    decision = story.decide(ONE if not before else Put("x", b""), names=[name], snapshot=snapshot)
    assert (decision.verdict is Verdict.CONFLICT) is conflicts
    again = story.decide(Put("y", b""), names=[name])
    assert again.verdict is Verdict.COMMITTED


@pytest.mark.parametrize(
    ("before", "meanwhile", "prefix", "conflicts"),
    [
        ([], [Put("p/1", b"")], "p/", True),
        ([], [Put("p/1", b"")], "", True),
        ([], [Put("p/1", b"")], "p/1", True),
        ([], [Put("p/1", b"")], "p/1/", False),
        ([], [Put("q", b"")], "p", False),
        ([], [Allocate("p/1", 8, b"")], "p/", True),
        ([Put("p/1", b"")], [Put("p/1", b"new")], "p/", False),
        ([Put("p/1", b"")], [Delete("p/1")], "p/", True),
        ([Put("p/1", b"")], [Delete("p/1"), Put("p/1", b"")], "p/", False),
        ([Put("p/1", b"")], [Delete("p/1"), Allocate("p/1", 8, b"")], "p/", False),
        ([], [Put("p/1", b""), Delete("p/1")], "p/", False),
        ([], [Put("p/1", b""), Put("p/1", b"")], "p/", True),
        ([Put("p/1", b"")], [Delete("p/1"), Put("p/1", b""), Delete("p/1")], "p/", True),
        ([Put("ä/1", b"")], [Delete("ä/1")], "ä", True),
        ([Allocate("p/1", 8, b"")], [Write(1, 0, b"x")], "p/", False),
    ],
)
def test_a_listed_prefix(
    before: list[Operation], meanwhile: list[Operation], prefix: str, conflicts: bool
) -> None:
    story = Story(*before)
    snapshot = story.version
    story.does(*meanwhile)
    decision = story.decide(ONE, prefixes=[prefix], snapshot=snapshot)
    assert (decision.verdict is Verdict.CONFLICT) is conflicts
    assert story.decide(ONE, prefixes=[prefix]).verdict is Verdict.COMMITTED


BIG = 1 << 30
WIDE = 100 << 12


@pytest.mark.parametrize(
    ("write", "read", "conflicts"),
    [
        ((10, 20), (0, 10), False),
        ((10, 20), (0, 11), True),
        ((10, 20), (19, 30), True),
        ((10, 20), (20, 30), False),
        ((10, 20), (12, 13), True),
        ((12, 13), (10, 20), True),
        ((10, 20), (15, 15), False),
        ((15, 15), (10, 20), False),
        ((4095, 4096), (4096, 4097), False),
        ((4095, 4097), (4096, 4097), True),
        ((4096, 4097), (0, 4096), False),
        ((4096, 8192), (8191, 8192), True),
        ((0, WIDE), (WIDE - 1, WIDE), True),
        ((0, WIDE), (WIDE, WIDE + 1), False),
        ((5, WIDE), (0, 5), False),
        ((WIDE - 1, WIDE), (0, WIDE), True),
        ((WIDE, WIDE + 1), (0, WIDE), False),
        ((0, WIDE), (1, 2 * WIDE), True),
        ((0, WIDE), (WIDE, 3 * WIDE), False),
        ((0, BIG), (BIG - 1, BIG), True),
        ((BIG - 1, BIG), (0, BIG), True),
    ],
)
def test_a_byte_range_is_exact(
    write: tuple[int, int], read: tuple[int, int], conflicts: bool
) -> None:
    story = Story(Allocate("m", BIG, b""), Allocate("other", BIG, b""))
    snapshot = story.version
    story.does(Write(1, write[0], Reference("f", write[1] - write[0], bytes(16))))
    other = story.decide(ONE, ranges=[(2, *read)], snapshot=snapshot)
    assert other.verdict is Verdict.COMMITTED
    decision = story.decide(ONE, ranges=[(1, *read)], snapshot=snapshot)
    assert (decision.verdict is Verdict.CONFLICT) is conflicts
    assert story.decide(ONE, ranges=[(1, *read)]).verdict is Verdict.COMMITTED


def test_what_was_written_by_the_snapshot_is_no_conflict() -> None:
    story = Story(Allocate("m", BIG, b""))
    for size in (1, 8192, BIG):
        story.does(Write(1, 0, Reference("f", size, bytes(16))))
        decision = story.decide(ONE, ranges=[(1, 0, 1), (1, 0, BIG)])
        assert decision.verdict is Verdict.COMMITTED
    story.does(Put("p/new", b""))
    assert story.decide(ONE, prefixes=["p/"], names=["p/new"]).verdict is Verdict.COMMITTED


def test_an_addition_writes_the_bytes_of_its_number() -> None:
    story = Story(Allocate("m", 32, b""))
    snapshot = story.version
    story.does(FetchAdd(1, 8, "<i4", bytes(4)))
    for start, verdict in ((7, Verdict.COMMITTED), (8, Verdict.CONFLICT), (11, Verdict.CONFLICT)):
        decision = story.decide(ONE, ranges=[(1, start, start + 1)], snapshot=snapshot)
        assert decision.verdict is verdict
    assert story.decide(ONE, ranges=[(1, 12, 32)], snapshot=snapshot).effects


def test_deleting_memory_writes_all_its_bytes() -> None:
    story = Story(Allocate("m", 1 << 20, b""), Put("value", b""))
    snapshot = story.version
    story.does(Delete("m"), Allocate("m", 1 << 20, b""), Delete("value"))
    for start in (0, 5000, (1 << 20) - 1):
        decision = story.decide(ONE, ranges=[(1, start, start + 1)], snapshot=snapshot)
        assert decision.verdict is Verdict.CONFLICT
    assert story.decide(ONE, ranges=[(2, 0, 9)], snapshot=snapshot).effects


def test_an_object_is_its_id_and_not_its_name() -> None:
    story = Story(Allocate("m", 16, b""))
    story.does(Delete("m"), Allocate("m", 16, b""))
    assert story.decide(Write(1, 0, b"x")).verdict is Verdict.NOT_FOUND
    assert story.decide(FetchAdd(1, 0, "<i8", bytes(8))).verdict is Verdict.NOT_FOUND
    assert story.decide(Write(2, 0, b"x")).verdict is Verdict.COMMITTED


def test_blind_records_never_conflict() -> None:
    story = Story(Allocate("m", 16, b""), ONE)
    snapshot = story.version
    story.does(Write(1, 0, bytes(16)), ONE)
    for operation in (Write(1, 0, b"y"), ADD, ONE, Delete("one"), Put("new", b"")):
        assert story.decide(operation, snapshot=snapshot).verdict is Verdict.COMMITTED


def test_a_session_conflicts_with_itself_like_with_others() -> None:
    story = Story()
    assert story.decide(ONE, names=["one"], snapshot=0).verdict is Verdict.COMMITTED
    assert story.decide(ONE, names=["one"], snapshot=0).verdict is Verdict.CONFLICT


def test_an_aborted_record_writes_nothing() -> None:
    story = Story(Allocate("m", 16, b""), ONE)
    snapshot = story.version
    bad = story.decide(ONE, Put("new", b""), Write(1, 0, b"x"), Delete("m"), Delete("nothing"))
    assert (bad.verdict, bad.effects) == (Verdict.NOT_FOUND, [])
    reads = {"names": ["one", "new", "m"], "prefixes": [""], "ranges": [(1, 0, 16)]}
    assert story.decide(Put("x", b""), snapshot=snapshot, **reads).verdict is Verdict.COMMITTED


def test_a_snapshot_is_of_a_version_before() -> None:
    story = Story(ONE)
    assert story.decide(ONE, snapshot=story.version).verdict is Verdict.COMMITTED
    assert story.decide(ONE, snapshot=story.version + 1).verdict is Verdict.INVALID
    assert story.decide(ONE, snapshot=1 << 63).verdict is Verdict.INVALID
    assert story.decide(ONE, snapshot=-1).verdict is Verdict.BELOW_FLOOR


# What a record asks for.


@pytest.mark.parametrize(
    ("operations", "verdict"),
    [
        ([Delete("nothing")], Verdict.NOT_FOUND),
        ([Delete("value"), Delete("value")], Verdict.NOT_FOUND),
        ([Put("m", b"")], Verdict.EXISTS),
        ([Delete("m"), Put("m", b"")], Verdict.COMMITTED),
        ([Allocate("m", 8, b"")], Verdict.EXISTS),
        ([Allocate("value", 8, b"")], Verdict.EXISTS),
        ([Allocate("new", 8, b""), Allocate("new", 8, b"")], Verdict.EXISTS),
        ([Allocate("new", 8, b""), Put("new", b"")], Verdict.EXISTS),
        ([Put("new", b""), Put("new", b"")], Verdict.COMMITTED),
        ([Put("new", b""), Delete("new"), Allocate("new", 8, b"")], Verdict.COMMITTED),
        ([Allocate("new", 0, b"")], Verdict.INVALID),
        ([Allocate("new", -1, b"")], Verdict.INVALID),
        ([Allocate("new", MAX_MEMORY_BYTES, b"")], Verdict.COMMITTED),
        ([Allocate("new", MAX_MEMORY_BYTES + 1, b"")], Verdict.INVALID),
        ([Write(0, 0, b"")], Verdict.NOT_FOUND),
        ([Write(2, 0, b"")], Verdict.NOT_FOUND),
        ([Write(3, 0, b"")], Verdict.NOT_FOUND),
        ([Write(-1, 0, b"")], Verdict.NOT_FOUND),
        ([Allocate("new", 8, b""), Write(3, 0, b"")], Verdict.NOT_FOUND),
        ([Allocate("new", 8, b""), Write(-2, 0, b"")], Verdict.NOT_FOUND),
        ([Write(-1, 0, b""), Allocate("new", 8, b"")], Verdict.NOT_FOUND),
        ([Allocate("new", 8, b""), Write(-1, 0, bytes(8))], Verdict.COMMITTED),
        ([Allocate("new", 8, b""), Write(-1, 1, bytes(8))], Verdict.INVALID),
        ([Allocate("new", 8, b""), Delete("new"), Write(-1, 0, b"")], Verdict.NOT_FOUND),
        ([Delete("m"), Write(1, 0, b"")], Verdict.NOT_FOUND),
        ([Write(1, 0, b""), Delete("m")], Verdict.COMMITTED),
        ([Write(1, 0, bytes(16))], Verdict.COMMITTED),
        ([Write(1, 16, b"")], Verdict.COMMITTED),
        ([Write(1, 17, b"")], Verdict.INVALID),
        ([Write(1, 15, b"ab")], Verdict.INVALID),
        ([Write(1, -1, b"a")], Verdict.INVALID),
        ([Write(1, 1 << 63, b"a")], Verdict.INVALID),
        ([Write(1, 0, Reference("f", 17, bytes(16)))], Verdict.INVALID),
        ([FetchAdd(1, 8, "<i8", bytes(8))], Verdict.COMMITTED),
        ([FetchAdd(1, 9, "<i8", bytes(8))], Verdict.INVALID),
        ([FetchAdd(2, 0, "<i8", bytes(8))], Verdict.NOT_FOUND),
        ([FetchAdd(1, 0, "nonsense", bytes(8))], Verdict.INVALID),
        ([FetchAdd(1, 0, "O", bytes(8))], Verdict.INVALID),
        ([FetchAdd(1, 0, "<f16", bytes(16))], Verdict.INVALID),
        ([FetchAdd(1, 0, "<i8", bytes(7))], Verdict.INVALID),
        ([FetchAdd(1, 0, "<i4", bytes(8))], Verdict.INVALID),
        ([FetchAdd(1, 0, "<i8", b"")], Verdict.INVALID),
        ([FetchAdd(1, 0, "|u1", b"\1")], Verdict.COMMITTED),
        ([FetchAdd(1, 0, ">f2", bytes(2))], Verdict.COMMITTED),
        ([Put("", b"")], Verdict.INVALID),
        ([Put("a\0", b"")], Verdict.INVALID),
        ([Put("x" * 1025, b"")], Verdict.INVALID),
        ([Put("x" * 1024, b"")], Verdict.COMMITTED),
        ([Put("\u00e9" * 512, b"")], Verdict.COMMITTED),
        ([Put("\u00e9" * 513, b"")], Verdict.INVALID),
        ([Delete("")], Verdict.INVALID),
        ([Allocate("x" * 1025, 8, b"")], Verdict.INVALID),
        ([Put("new", Reference("f", -1, bytes(16)))], Verdict.INVALID),
        ([Put("new", Reference("f", 1, bytes(15)))], Verdict.INVALID),
        ([Put("new", Reference("", 1, bytes(16)))], Verdict.INVALID),
        ([Put("new", Reference("../f", 1, bytes(16)))], Verdict.INVALID),
        ([Put("new", Reference("/etc/passwd", 1, bytes(16)))], Verdict.INVALID),
        ([Put("new", Reference("a/.b", 1, bytes(16)))], Verdict.INVALID),
        ([Put("new", Reference("a\n", 1, bytes(16)))], Verdict.INVALID),
        ([Put("new", Reference("a/b-1.seg", 1, bytes(16)))], Verdict.COMMITTED),
        ([Write(1, 10, Reference("f", -5, bytes(16)))], Verdict.INVALID),
        ([Fence(b"", 1)], Verdict.INVALID),
        ([Fence(b"x" * 600, 1)], Verdict.INVALID),
        ([Fence(session(5), 0)], Verdict.INVALID),
        ([Fence(session(5, start=3), 1)], Verdict.INVALID),
        ([Fence(session(5, start=2), 1)], Verdict.COMMITTED),
        ([Floor(1 << 63)], Verdict.COMMITTED),
        ([Floor(-5)], Verdict.COMMITTED),
        ([], Verdict.COMMITTED),
    ],
)
def test_every_record_gets_a_verdict(operations: list[Operation], verdict: Verdict) -> None:
    story = Story(Allocate("m", 16, b""), Put("value", b""))
    decision = story.decide(*operations)
    assert decision.verdict is verdict
    assert decision.version == story.version == 2
    if verdict is Verdict.COMMITTED:
        assert len(decision.effects) == len(operations), "replaying needs one effect for each"
    else:
        assert decision.effects == [] and decision.detail
        assert story.does(Put("next", b"")).effects[0].id == 3, "an abort takes no ids"


def test_ids_are_given_in_order_and_effects_say_what_to_do() -> None:
    story = Story(Put("a", b"1"), Allocate("m", 8, b"h"))
    effects = story.does(
        Put("a", b"2"), Put("a", b"3"), Delete("m"), Allocate("m", 9, b""), Write(-1, 0, b"x"), ONE
    ).effects
    assert effects == [
        Bind("a", 3, b"2", 1),
        Bind("a", 4, b"3", 3),
        Unbind("m", 2, 8),
        BindMemory("m", 5, 9, b""),
        Store(5, 0, b"x"),
        Bind("one", 6, b"", 0),
    ]
    assert story.does(FetchAdd(5, 0, "<i8", b"\1" + bytes(7))).effects == [
        Add(5, 0, "<i8", b"\1" + bytes(7))
    ]


# Who sent a record.


def test_records_of_a_session_are_decided_once_and_in_order() -> None:
    story, one, other = Story(), session(1), session(2)
    assert story.send(one, 2, blank()) == [Verdict.GAP]
    assert story.send(one, 1, blank(), blank(0, Delete("nothing"))) == [
        Verdict.COMMITTED,
        Verdict.NOT_FOUND,
    ]
    assert story.send(one, 1, blank(), blank(), blank()) == [
        Verdict.DUPLICATE,
        Verdict.DUPLICATE,
        Verdict.COMMITTED,
    ]
    assert story.send(other, 1, blank()) == [Verdict.COMMITTED]
    assert story.send(one, 5, blank(), blank()) == [Verdict.GAP, Verdict.GAP]
    assert story.send(one, 4, blank(), blank()) == [Verdict.COMMITTED, Verdict.COMMITTED]
    assert story.send(one, 0, blank()) == [Verdict.DUPLICATE]
    assert story.send(session(3), 0, blank()) == [Verdict.GAP]
    assert story.version == 13, "every record counts one version"


def test_a_fence_voids_what_comes_behind_it() -> None:
    story, one = Story(), session(1)
    story.send(one, 1, blank())
    story.send(session(2), 1, blank(0, Fence(one, 2)))
    assert story.send(one, 2, blank(), blank()) == [Verdict.FENCED, Verdict.COMMITTED]
    assert story.send(one, 2, blank()) == [Verdict.DUPLICATE]


def test_a_fence_behind_the_record_changes_nothing() -> None:
    story, one = Story(), session(1)
    story.send(one, 1, blank())
    before = story.index.sessions[one]
    decision = story.decide(Fence(one, 1), who=session(2))
    assert decision.effects == [SetFence(one, None)]
    assert story.index.sessions[one] == before
    assert story.send(one, 2, blank()) == [Verdict.COMMITTED]


def test_a_fence_waits_for_the_records_before_the_fenced_one() -> None:
    story, one = Story(), session(1)
    story.send(session(2), 1, blank(0, Fence(one, 3)))
    assert story.send(one, 3, blank()) == [Verdict.GAP]
    assert story.send(one, 1, *[blank()] * 4) == [
        Verdict.COMMITTED,
        Verdict.COMMITTED,
        Verdict.FENCED,
        Verdict.COMMITTED,
    ]


def test_one_record_may_fence_several_of_a_session() -> None:
    story, one, other = Story(), session(1), session(2)
    story.send(one, 1, blank())
    fences = [Fence(one, 4), Fence(other, 1), Fence(one, 2), Fence(one, 1), Fence(one, 2)]
    story.send(session(3), 1, blank(0, *fences))
    assert story.send(one, 2, *[blank()] * 3) == [
        Verdict.FENCED,
        Verdict.COMMITTED,
        Verdict.FENCED,
    ]
    assert story.send(other, 1, blank()) == [Verdict.FENCED]


def test_fences_of_an_aborted_record_do_not_count() -> None:
    story, one = Story(), session(1)
    story.send(session(2), 1, blank(0, Fence(one, 1), Delete("nothing")))
    assert story.send(one, 1, blank()) == [Verdict.COMMITTED]


def test_a_session_may_fence_its_own_records_to_come() -> None:
    story, one = Story(), session(1)
    record = blank(0, Fence(one, 1), Fence(one, 3), Fence(one, 2), Fence(one, 5))
    assert story.send(one, 1, record, *[blank()] * 5) == [
        Verdict.COMMITTED,
        Verdict.FENCED,
        Verdict.FENCED,
        Verdict.COMMITTED,
        Verdict.FENCED,
        Verdict.COMMITTED,
    ]
    assert story.index.sessions[one].fences == []
    story.send(one, 7, blank(0, Fence(one, 7), Fence(one, 8)))
    assert story.index.sessions[one].fences == [8]


# The floor.


def test_snapshots_below_the_floor_abort_whatever_they_read() -> None:
    story = Story(ONE, Put("two", b""))
    story.does(Put("three", b""))
    story.does(Floor(2))
    assert story.judge.floor == 2
    assert story.decide(ONE, snapshot=1).verdict is Verdict.BELOW_FLOOR
    assert story.decide(ONE, snapshot=2).verdict is Verdict.COMMITTED
    assert story.decide(ONE, snapshot=2, names=["one"]).verdict is Verdict.CONFLICT
    assert story.decide(Floor(4), snapshot=1).verdict is Verdict.BELOW_FLOOR


def test_the_floor_only_rises_and_never_above_its_own_record() -> None:
    story = Story(ONE)
    story.does(Floor(1))
    assert story.does(Floor(0)).effects == [SetFloor(1)]
    assert story.does(Floor(1 << 62)).effects == [SetFloor(4)]
    assert story.judge.floor == 4
    assert story.decide(ONE, snapshot=4).verdict is Verdict.COMMITTED


def test_the_highest_floor_of_a_record_counts() -> None:
    story = Story(ONE, ONE)
    story.does(ONE)
    assert story.does(Floor(2), Floor(1)).effects == [SetFloor(2), SetFloor(2)]
    assert story.judge.floor == 2


def test_a_session_that_claims_to_begin_later_is_void() -> None:
    story, later = Story(), session(5, start=9)
    assert story.send(later, 1, blank()) == [Verdict.FORGOTTEN]
    assert later not in story.index.sessions
    assert story.send(session(5, start=1), 1, blank()) == [Verdict.COMMITTED]


def test_an_aborted_floor_does_not_count() -> None:
    story = Story(ONE)
    assert story.decide(Floor(1), Delete("nothing")).verdict is Verdict.NOT_FOUND
    assert story.judge.floor == 0


def test_sessions_older_than_the_floor_are_forgotten() -> None:
    story, old, idle, new = Story(), session(1), session(2), session(3, start=3)
    story.send(old, 1, blank())
    story.send(idle, 1, blank())
    story.send(session(9), 1, blank())
    story.send(session(9), 2, blank(3, Floor(3)))
    for sequence in (1, 2, 3):
        assert story.send(idle, sequence, blank(3)) == [Verdict.FORGOTTEN]
    assert story.send(session(4), 1, blank(3)) == [Verdict.FORGOTTEN]
    assert story.send(new, 1, blank(3)) == [Verdict.COMMITTED]
    assert story.send(session(9), 3, blank(3)) == [Verdict.COMMITTED]
    fence = blank(3, Fence(old, 2))
    assert story.send(new, 2, fence) == [Verdict.COMMITTED]
    assert story.send(old, 2, blank(3)) == [Verdict.FORGOTTEN]


def test_a_session_decided_at_the_floor_is_remembered() -> None:
    story, one = Story(), session(1)
    story.send(one, 1, blank())
    story.send(session(2), 1, blank(0, Floor(1)))
    assert story.send(one, 1, blank(2)) == [Verdict.DUPLICATE]
    assert story.send(one, 2, blank(2)) == [Verdict.COMMITTED]


def test_a_fence_keeps_its_session_in_memory() -> None:
    story, one = Story(), session(1)
    story.send(one, 1, blank())
    story.send(session(2), 1, blank(0, Fence(one, 3)))
    story.send(session(2), 2, blank(0, Floor(2)))
    assert story.send(one, 1, blank(2)) == [Verdict.DUPLICATE]
    assert story.send(one, 2, *[blank(2)] * 2) == [Verdict.COMMITTED, Verdict.FENCED]


def test_void_verdicts_are_those_about_ids() -> None:
    assert {Verdict.DUPLICATE, Verdict.GAP, Verdict.FENCED, Verdict.FORGOTTEN} == VOID
    stored = {verdict.name: int(verdict) for verdict in Verdict}
    assert stored == {
        "COMMITTED": 0,
        "CONFLICT": 1,
        "BELOW_FLOOR": 2,
        "NOT_FOUND": 3,
        "EXISTS": 4,
        "INVALID": 5,
        "DUPLICATE": 6,
        "GAP": 7,
        "FENCED": 8,
        "FORGOTTEN": 9,
    }


# Exactness, against naive lists.

edges = st.sampled_from([0, 1, 7, 8, 4095, 4096, 4097, 8192, 65536, 16 << 12, 17 << 12, 1 << 30])
points = st.builds(lambda edge, by: max(0, edge + by), edges, st.integers(-2, 2))
spans = st.builds(lambda a, b: (min(a, b), max(a, b)), points, points)
names = st.sampled_from(["a", "a/", "a/b", "ab", "ä", "b", "b/ä", "a/b/c"])
prefixes = st.sampled_from(["", "a", "a/", "a/b", "b/", "ä", "x"])
noted = st.lists(
    st.one_of(
        st.tuples(st.just("range"), st.integers(1, 3), spans),
        st.tuples(st.just("name"), names),
        st.tuples(st.just("listing"), names),
    ),
    max_size=30,
)


def overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return max(one[0], other[0]) < min(one[1], other[1])


@given(noted, st.integers(0, 31), st.integers(0, 31), spans, names, prefixes)
def test_writes_answer_like_a_list_of_all_writes(
    noted: list[tuple],
    floor: int,
    after: int,
    span: tuple[int, int],
    name: str,
    prefix: str,
) -> None:
    whole = Writes(0)
    for version, (kind, *facts) in enumerate(noted, 1):
        if kind == "range":
            whole.range(version, facts[0], *facts[1])
        else:
            getattr(whole, kind)(version, *facts)
    floor %= len(noted) + 1
    after = max(floor, after % (len(noted) + 1))
    late = noted[after:]
    touched_id = [
        any(item[:2] == ("range", id) and overlap(item[2], span) for item in late)
        for id in range(4)
    ]
    for writes in (whole, whole.since(floor), Writes.load(whole.dump(floor)), whole.since(after)):
        for id in range(4):
            assert writes.range_touched(id, *span, after) is touched_id[id]
        assert writes.name_touched(name, after) is (("name", name) in late)
        assert writes.prefix_touched(prefix, after) is any(
            kind == "listing" and facts[0].startswith(prefix) for kind, *facts in late
        )


@given(noted, st.integers(0, 31))
def test_a_dump_is_all_that_was_written_since(noted: list[tuple], floor: int) -> None:
    writes = Writes(0)
    for version, (kind, *facts) in enumerate(noted, 1):
        if kind == "range":
            writes.range(version, facts[0], *facts[1])
        else:
            getattr(writes, kind)(version, *facts)
    floor %= len(noted) + 1
    late = [(version, *item) for version, item in enumerate(noted, 1) if version > floor]
    last = {name: version for version, kind, name, *_ in late if kind == "name"}
    again = Writes.load(writes.dump(floor))
    for dump in (writes.dump(floor), again.dump(floor), again.dump(0)):
        assert dump.base == floor
        assert sorted(dump.names) == sorted((version, name) for name, version in last.items())
        assert sorted(dump.listings) == [
            (v, name) for v, kind, name, *_ in late if kind == "listing"
        ]
        assert sorted(dump.ranges) == [
            (version, facts[0], *facts[1])
            for version, kind, *facts in late
            if kind == "range" and facts[1][0] < facts[1][1]
        ]


# Whole logs, against the rule written naively.

SIZES = [1, 16, 4096, 5000, 70_000, 1 << 20]
NAMES = ["a", "a/1", "a/2", "b", "ä"]
STARTS = [0, 0, 1, 8, 4090, 4096, 60_000]


def random_operation(rng: random.Random, story: Story, sessions: list[bytes]) -> Operation:
    object = rng.choice([-2, -1, 99, *[*story.index.memory] * 9])
    offset = rng.choice(STARTS)
    size = rng.choice([0, 1, 8, 8, 100, 5000, 65_530, 900_000])
    draw = rng.random()
    if draw < 0.2:
        return Put(rng.choice(NAMES), b"")
    if draw < 0.28:
        return Delete(rng.choice(NAMES))
    if draw < 0.4:
        return Allocate(rng.choice(NAMES), rng.choice(SIZES), b"")
    if draw < 0.8:
        return Write(object, offset, Reference("f", size, bytes(16)))
    if draw < 0.92:
        return FetchAdd(object, offset, "<i8", bytes(8))
    if draw < 0.95:
        return Floor(story.version - rng.randint(-2, 12))
    return Fence(rng.choice(sessions), rng.randint(1, 9))


def random_record(rng: random.Random, story: Story, version: int, sessions: list[bytes]) -> Record:
    operations: list[Operation] = []
    for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 4])):
        operations.append(random_operation(rng, story, sessions))
    ranges: list[Range] = []
    for _ in range(rng.choice([0, 0, 1, 2])):
        start = rng.choice(STARTS)
        id = rng.choice([99, *[*story.index.memory] * 9])
        ranges.append((id, start, start + rng.choice([0, 1, 9, 200, 5000, 70_000])))
    return Record(
        version - rng.choice([0, 0, 0, 1, 2, 5, 9, -1]),
        rng.sample(NAMES, rng.choice([0, 0, 0, 1])),
        rng.sample(["", "a", "a/", "ä", "x"], rng.choice([0, 0, 0, 1])),
        ranges,
        operations,
    )


def random_entry(rng: random.Random, story: Story, sent: dict[bytes, int]) -> Entry:
    version = story.version
    if rng.random() < 0.08:
        sent[session(rng.randrange(1 << 30), max(0, version - rng.choice([0, 0, 3, 9])))] = 0
    sessions = list(sent)
    who = rng.choice(sessions[-5:])
    first = max(0, sent[who] + rng.choice([1, 1, 1, 1, 0, -1, 2, -3]))
    size = rng.choice([1, 1, 2, 4])
    sent[who] = max(sent[who], first + size - 1) if first <= sent[who] + 1 else sent[who]
    records = [random_record(rng, story, version + at, sessions) for at in range(size)]
    return Entry(who, first, 0, EMPTY_HASH, records)


@pytest.mark.parametrize("part", range(5))
def test_whole_logs_are_judged_like_by_the_naive_rule(part: int) -> None:
    seen: set[Verdict] = set()
    for seed in range(part * LOGS // 5, (part + 1) * LOGS // 5):
        rng = random.Random(seed)
        naive, story, sent = NaiveRule(), Story(), {session(at): 0 for at in range(3)}
        first = [Allocate(name, 1 << 20, b"") for name in rng.sample(NAMES, 2)]
        opening = Entry(session(0), 1, 0, EMPTY_HASH, [blank(0, *first)])
        assert naive.entry(opening) == [story.play(opening)[0].verdict]
        sent[session(0)] = 1
        for number in range(40):
            entry = random_entry(rng, story, sent)
            verdicts = [decision.verdict for decision in story.play(entry)]
            where = f"seed {seed}, entry {number}: {entry}"
            assert verdicts == naive.entry(entry), where
            state = (story.version, story.judge.floor, story.judge.next_id)
            assert state == (naive.version, naive.floor, naive.next_id), where
            bound = {name: (row.id, row.size) for name, row in story.index.names.items()}
            assert bound == naive.names, where
            seen.update(verdicts)
            if rng.random() < 0.1:  # forget what the floor allows
                story.judge.writes = story.judge.writes.since(story.judge.floor)
                story.index.sessions = {
                    who: known
                    for who, known in story.index.sessions.items()
                    if known.last_version >= story.judge.floor
                }
    assert seen == set(Verdict)


def test_ids_of_records_are_ordered_by_session_and_sequence() -> None:
    assert RecordId(session(1), 2) < RecordId(session(1), 10) < RecordId(session(2), 1)


# Whatever a record holds, replicas go on.

odd_names = st.text(max_size=3) | st.just("x" * 2000)
odd_numbers = st.integers(-3, 70) | st.sampled_from([-(1 << 63), 1 << 46, (1 << 64) - 1])
odd_files = st.builds(Reference, st.sampled_from(["f", "../f", ""]), odd_numbers, st.binary())
odd_operations = st.one_of(
    st.builds(Put, odd_names, st.binary(max_size=3)),
    st.builds(Delete, odd_names),
    st.builds(Allocate, odd_names, st.integers(-2, 64), st.binary(max_size=3)),
    st.builds(Write, odd_numbers, odd_numbers, st.binary(max_size=9) | odd_files),
    st.builds(
        FetchAdd,
        st.integers(-1, 4),
        st.integers(-1, 20),
        st.sampled_from(["<i8", "|i1", ">f4", "<f2", "<i1", "i8", "O", "V4", "", "nonsense"]),
        st.binary(max_size=9),
    ),
    st.builds(Floor, odd_numbers),
    st.builds(Fence, st.binary(max_size=20) | st.just(session(1)), odd_numbers),
)
odd_records = st.builds(
    Record,
    odd_numbers | st.just(0),
    st.lists(odd_names, max_size=1),
    st.lists(odd_names, max_size=1),
    st.lists(st.tuples(odd_numbers, odd_numbers, odd_numbers), max_size=1),
    st.lists(odd_operations, max_size=4),
)


@given(st.lists(st.lists(odd_records, max_size=3), max_size=5))
def test_no_record_stops_a_replica(entries: list[list[Record]]) -> None:
    replica, sequence = MemoryReplica(), 1
    for records in [[blank(0, Allocate("m", 32, b""))], *entries]:
        entry = Entry(session(1), sequence, replica.position, replica.hash, records)
        item = Appended(replica.position + 1, 0, encode_entry(entry))
        assert len(replica.apply(item)) == len(records)
        sequence += len(records)
    assert MemoryReplica.from_checkpoint(replica.checkpoint()).checkpoint() == replica.checkpoint()


# What is kept


def upload(began: int) -> Reference:
    return Reference(f"{began:016x}{9:016x}", 4, bytes(16))


def test_a_collection_that_was_planned_before_more_was_to_be_kept_is_refused() -> None:
    story = Story(Retain(0, 0))
    story.does(ONE)
    collect = Collect(story.version, 1, 0, [], [])
    story.does(Retain(0, 0))
    story.does(collect)
    story.does(Retain(0, 5))
    refused = story.decide(collect)
    assert refused.verdict is Verdict.CONFLICT and "more is needed" in refused.detail
    story.does(Collect(story.version, 1, 0, [], []))


def test_what_a_record_may_still_name_is_not_dead() -> None:
    story = Story(ONE, ONE)
    for _ in range(9):
        story.does(ONE)
    story.does(Checkpoint(8, "key", 0, 8))
    late = f"values/{upload(5).file}"
    refused = story.decide(Collect(story.version, 8, 8, [], [late]))
    assert refused.verdict is Verdict.CONFLICT and "named yet" in refused.detail
    story.does(Collect(story.version, 8, 8, [], []))
    assert story.decide(Put("late", upload(5))).verdict is Verdict.CONFLICT
    story.does(Collect(story.version, 8, 8, [], [late]))


def test_a_restore_names_old_values_again_and_nothing_else() -> None:
    story = Story()
    for _ in range(10):
        story.does(ONE)
    story.index.snapshots["early"] = 4
    story.does(Checkpoint(9, "key", 0, 9))
    story.does(Collect(story.version, 9, 9, [(0, 4)], []))
    memory = Allocate("memory", 9, b"")
    story.does(Restore(4), Put("old", upload(3)), memory, Write(-1, 0, upload(9)))
    refused = story.decide(Restore(4), Delete("memory"), memory, Write(-1, 0, upload(8)))
    assert refused.verdict is Verdict.CONFLICT and "void" in refused.detail
