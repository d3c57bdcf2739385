"""The rule of verdicts once more, written to be read and not to be fast.

It forgets nothing, keeps every committed record with all that it wrote, and looks at all of them
for each new one. What `Judge` says must be what this says.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from everpool.records import (
    Allocate,
    Delete,
    Entry,
    Fence,
    FetchAdd,
    Floor,
    Put,
    Record,
    Write,
    payload_size,
    session_start,
)
from everpool.verdict import Verdict

Object = tuple[int, int]  # id, and bytes of memory or -1


@dataclass
class Written:
    """What one committed record wrote: names, names that came or went, and ranges."""

    version: int
    names: set[str] = field(default_factory=set)
    came_or_went: set[str] = field(default_factory=set)
    ranges: list[tuple[int, int, int]] = field(default_factory=list)


class Refused(Exception):
    """The record aborts with this verdict."""


class NaiveRule:
    """Decides entry after entry."""

    def __init__(self) -> None:
        self.version = 0
        self.floor = 0
        self.next_id = 1
        self.names: dict[str, Object] = {}
        self.written: list[Written] = []
        # Of each session: versions at which something of it was decided or fenced, and what.
        self.touched: dict[bytes, int] = {}
        self.decided: dict[bytes, int] = {}
        self.fences: set[tuple[bytes, int]] = set()

    def entry(self, entry: Entry) -> list[Verdict]:
        return [
            self.record(entry.session, entry.first_sequence + at, record)
            for at, record in enumerate(entry.records)
        ]

    def record(self, session: bytes, sequence: int, record: Record) -> Verdict:
        self.version += 1
        verdict = self.void(session, sequence)
        if verdict is None or verdict is Verdict.FENCED:
            self.decided[session] = sequence
            self.touched[session] = self.version
        return self.judged(record) if verdict is None else verdict

    def remembered(self, session: bytes) -> bool:
        """Whether anything is known of the session; what the floor has passed is forgotten."""
        if self.touched.get(session, -1) < self.floor:
            self.decided.pop(session, None)
            self.touched.pop(session, None)
            self.fences = {fence for fence in self.fences if fence[0] != session}
            return False
        return True

    def void(self, session: bytes, sequence: int) -> Verdict | None:
        if not self.remembered(session) and session_start(session) < self.floor:
            return Verdict.FORGOTTEN
        last = self.decided.get(session, 0)
        if self.remembered(session) and sequence <= last:
            return Verdict.DUPLICATE
        if sequence != last + 1:
            return Verdict.GAP
        return Verdict.FENCED if (session, sequence) in self.fences else None

    def judged(self, record: Record) -> Verdict:
        if record.snapshot < self.floor:
            return Verdict.BELOW_FLOOR
        if record.snapshot >= self.version:
            return Verdict.INVALID
        if any(self.touches(w, record) for w in self.written if w.version > record.snapshot):
            return Verdict.CONFLICT
        before = dict(self.names), self.next_id, self.floor, set(self.fences), dict(self.touched)
        names_before = set(self.names)
        written = Written(self.version)
        try:
            self.execute(record, written)
        except Refused as refused:
            self.names, self.next_id, self.floor, self.fences, self.touched = before
            return refused.args[0]
        written.came_or_went = names_before ^ set(self.names)
        self.written.append(written)
        return Verdict.COMMITTED

    def touches(self, written: Written, record: Record) -> bool:
        return (
            any(name in written.names for name in record.names)
            or any(n.startswith(p) for p in record.prefixes for n in written.came_or_went)
            or any(
                read[0] == wrote[0] and max(read[1], wrote[1]) < min(read[2], wrote[2])
                for read in record.ranges
                for wrote in written.ranges
            )
        )

    def execute(self, record: Record, written: Written) -> None:
        created: list[int] = []
        known = set(range(self.next_id))
        floor = self.floor
        for operation in record.operations:
            match operation:
                case Put(name):
                    if self.names.get(name, (0, -1))[1] >= 0:
                        raise Refused(Verdict.EXISTS)
                    self.bind(name, -1, written)
                case Delete(name):
                    if name not in self.names:
                        raise Refused(Verdict.NOT_FOUND)
                    id, size = self.names.pop(name)
                    written.names.add(name)
                    written.ranges.append((id, 0, size))
                case Allocate(name, size):
                    if name in self.names:
                        raise Refused(Verdict.EXISTS)
                    if not 1 <= size <= 1 << 46:
                        raise Refused(Verdict.INVALID)
                    created.append(self.bind(name, size, written))
                case Write(object, offset, payload):
                    self.store(object, offset, payload_size(payload), created, known, written)
                case FetchAdd(object, offset, _, delta):
                    self.store(object, offset, len(delta), created, known, written)
                case Floor(version):
                    floor = max(floor, min(version, self.version))
                case Fence(other, sequence):
                    self.fence(other, sequence)
        self.floor = floor

    def bind(self, name: str, size: int, written: Written) -> int:
        self.names[name] = (self.next_id, size)
        written.names.add(name)
        self.next_id += 1
        return self.next_id - 1

    def store(
        self,
        object: int,
        offset: int,
        size: int,
        created: list[int],
        known: set[int],
        written: Written,
    ) -> None:
        if object < 0 and -object <= len(created):
            object = created[-object - 1]
        elif object not in known:
            raise Refused(Verdict.NOT_FOUND)
        limits = [limit for id, limit in self.names.values() if id == object and limit >= 0]
        if not limits:
            raise Refused(Verdict.NOT_FOUND)
        if offset < 0 or offset + size > limits[0]:
            raise Refused(Verdict.INVALID)
        written.ranges.append((object, offset, offset + size))

    def fence(self, session: bytes, sequence: int) -> None:
        if not self.remembered(session) and session_start(session) < self.floor:
            return
        if sequence > self.decided.get(session, 0):
            self.fences.add((session, sequence))
            self.touched[session] = self.version
