"""The index as one entry changes it."""

from collections import deque
from typing import NamedTuple

import lmdb
import msgspec

from everpool.collection import MOST_COLLECTED, Horizon, is_needed, upload_version
from everpool.records import Collect, Payload, RecordId, Reference, payload_size
from everpool.replica.bulk import key_of_value
from everpool.replica.effects import PendingStores, add_numbers
from everpool.replica.index import (
    BULK,
    INLINE,
    MEMORY,
    Index,
    MemoryRow,
    NameRow,
    PinRow,
    Resolved,
    State,
    TailRow,
    encode,
)
from everpool.replica.replica import Replica
from everpool.verdict import (
    Add,
    Bind,
    Binding,
    BindMemory,
    Effect,
    SessionState,
    SetCheckpoint,
    SetFence,
    SetFloor,
    SetHorizon,
    SetPin,
    Store,
    Unbind,
    Verdict,
)

# Each entry removes up to this many older ones, so that trimming never comes in bursts.
_TRIMMED_PER_ENTRY = 3
_KNOWN_ROWS = 1 << 12


class Result(NamedTuple):
    """What became of a record: its id, verdict, version, and the old values of its additions."""

    id: RecordId
    verdict: Verdict
    version: int
    detail: str
    old: list[bytes]


class Batch:
    """The index as one entry changes it. The `Catalog` that the judge asks."""

    def __init__(self, replica: Replica, txn: lmdb.Transaction, known: "Known | None") -> None:
        state = replica.index.state(txn) if known is None else known.state
        self._index: Index = replica.index
        self._replica = replica
        self.txn = txn
        self.state = state
        # Rows as the entry leaves them, and those of them that it changes.
        self.rows: dict[str, NameRow | None] = {} if known is None else known.rows
        self.bound: dict[str, NameRow | None] = {}
        self.memory: dict[int, MemoryRow | None] = {} if known is None else known.memory
        self.changed: set[int] = set()
        self.sessions: dict[bytes, SessionState] = {}
        self.known_sessions: dict[bytes, SessionState | None] = {}
        if known is not None:
            self.known_sessions.update(known.sessions)
        self.garbage: list[str] = []
        self.applied: list[tuple[Effect, Resolved]] = []
        self.trimmed: list[str] = []
        self.row = b""
        self.time_ns = 0
        # Replayed from the ring: what its additions found before they changed it.
        self.replayed = False
        self.recorded: deque[bytes] = deque()
        # What this very entry says of a flush is not durable before the next one is.
        self._flushed = state.flushed
        self._created: set[int] = set()
        self._reserved: list[tuple[int, list[tuple[int, int]]]] = []
        self._pending: PendingStores | None = None

    def binding(self, name: str) -> Binding | None:
        row = self._row(name)
        if row is None:
            return None
        return Binding(row.id, row.size if row.kind == MEMORY else -1)

    def memory_size(self, id: int) -> int | None:
        row = self._memory_row(id)
        return None if row is None else row.size

    def session(self, session: bytes) -> SessionState | None:
        changed = self.sessions.get(session)
        if changed is not None:
            return changed
        known = self.known_sessions
        if session not in known:
            known[session] = self._index.session(self.txn, session)
        return known[session]

    def pins(self) -> dict[str, int]:
        return {name: pin.version for name, pin in self._index.pins(self.txn)}

    def apply(self, version: int, effect: Effect) -> Resolved:
        """Put one effect into the index; returns what it came to."""
        if isinstance(effect, Store):
            resolved = self._store(version, effect)
        elif isinstance(effect, Bind):
            resolved = self._bind_value(version, effect)
        elif isinstance(effect, Add):
            resolved = self._add(version, effect)
        else:
            resolved = self._apply_rare(version, effect)
        self.applied.append((effect, resolved))
        return resolved

    def _store(self, version: int, effect: Store) -> Resolved:
        id, payload = effect.id, effect.payload
        if isinstance(payload, Reference):
            self.garbage.append(payload.file)
            self._revive(payload)
        if self._pending is not None:
            self._pending.store(id, effect.offset, self._data(payload))
        return Resolved(id, 0, self._touch(id, version))

    def _bind_value(self, version: int, effect: Bind) -> Resolved:
        name = effect.name
        old = self._row(name)
        if old is None:
            self.state.names += 1
        self._bind(name, _value_row(effect.id, version, effect.payload))
        if isinstance(effect.payload, Reference):
            self._revive(effect.payload)
        return Resolved(effect.id, effect.replaced, self._removed(old))

    def _add(self, version: int, effect: Add) -> Resolved:
        id, offset, delta = effect.id, effect.offset, effect.delta
        row = self._memory_row(id)
        assert row is not None, "the judge checked that the object exists"
        if self.replayed:
            old = self.recorded.popleft()
            new = add_numbers(old, delta, effect.dtype)
        else:
            pending = self._pending_stores()
            old = pending.read(id, offset, len(delta), row.size)
            new = add_numbers(old, delta, effect.dtype)
            pending.store(id, offset, new)
        return Resolved(id, 0, self._touch(id, version), old, new)

    def _apply_rare(self, version: int, effect: Effect) -> Resolved:
        match effect:
            case BindMemory(name, id, size, header):
                self.state.names += 1
                self._created.add(id)
                self.memory[id] = MemoryRow(version, size, name)
                self.changed.add(id)
                self._bind(name, NameRow(MEMORY, id, version, size, header))
                return Resolved(id)
            case Unbind(name, id, size):
                file = self._removed(self._row(name))
                self.state.names -= 1
                self._bind(name, None)
                if size >= 0:
                    self.memory[id] = None
                    self.changed.discard(id)
                    self._index.delete_memory(self.txn, id)
                return Resolved(id, size, file)
            case SetFloor(floor):
                self.state.floor = floor
                self._index.forget_sessions(self.txn, floor)
                return Resolved(0, floor)
            case SetCheckpoint(checkpoint, key):
                self.state.checkpoint, self.state.manifest = checkpoint, key
                return Resolved()
            case SetPin(name, pinned, until_ns, lock):
                pin = PinRow(pinned, self.time_ns, until_ns, lock)
                self._index.put_pin(self.txn, name, pin if pinned >= 0 else None)
                return Resolved(0, max(pinned, 0))
            case SetFence(session, state):
                if state is not None:
                    self.sessions[session] = state
                return Resolved()
            case SetHorizon(horizon, record):
                assert horizon is not None, "a new effect says what is kept"
                self.state.horizon = horizon
                return Resolved() if record is None else self._collect(version, horizon, record)
            case _:
                raise AssertionError(f"no such effect: {effect}")

    def _removed(self, row: NameRow | None) -> str:
        """Return the file to remove when a row goes; "" for none, or none before the tail's row."""
        if row is None or row.kind != BULK:
            return ""
        file = row.reference().file
        if self._replica.bulk.keeps_past():
            self.garbage.append(file)
            return ""
        return file

    def _collect(self, version: int, horizon: Horizon, record: Collect) -> Resolved:
        """Note what is dead, and forget what nothing needs; the result has the latter's keys."""
        index, txn = self._index, self.txn
        self.state.horizon = msgspec.structs.replace(horizon, collected_ns=self.time_ns)
        gone = [
            key
            for key, began, dead in index.garbage(txn)
            if not is_needed(began, dead, record.start, record.islands)
        ][:MOST_COLLECTED]
        for key in gone:
            index.drop_garbage(txn, key)
        for key in record.dead:
            index.put_garbage(txn, key, upload_version(key), version)
        return Resolved(old="\n".join(gone).encode())  # see `keys_in`

    def _revive(self, payload: Reference) -> None:
        if self.state.horizon.start:
            self._index.drop_garbage(self.txn, key_of_value(payload.file))

    def finish(self, row: TailRow) -> None:
        """Write the rows that the entry's records share, and trim the tail a little."""
        index, txn, state = self._index, self.txn, self.state
        for name, bound in sorted(self.bound.items()):  # in the order of the index
            if bound is None:
                index.delete_name(txn, name)
            else:
                index.put_name(txn, name, bound)
        for session, known in self.sessions.items():
            index.put_session(txn, session, known)
        for id in self.changed:
            memory = self.memory[id]
            assert memory is not None
            index.put_memory(txn, id, memory)
        limit = min(state.floor, self._flushed)
        if limit:
            trimmed, row.removed = index.trim_tail(txn, limit, _TRIMMED_PER_ENTRY)
            state.tail_bytes -= trimmed
            self.trimmed = row.removed
        self.row = encode(row)
        state.tail_bytes += index.put_tail(txn, state.version, self.row)
        index.put_state(txn, state)
        self._pending = None

    def trim_to(self, flushed: int) -> None:
        """Allow the tail to be trimmed up to that version, if the floor does, too."""
        self.state.flushed = self._flushed = flushed

    def known(self, number: int) -> "Known":
        """Return what a commit of this leaves, for whoever commits next."""
        if len(self.rows) > _KNOWN_ROWS or len(self.memory) > _KNOWN_ROWS:
            return Known(number, self.state, self.sessions, {}, {})
        return Known(number, self.state, self.sessions, self.rows, self.memory)

    def reserve(self) -> None:
        """Create files and reserve the disk that the effects will need."""
        memories = self._replica.stores
        for effect, resolved in self.applied:
            if isinstance(effect, Store):
                self._reserve(effect.id, effect.offset, payload_size(effect.payload))
            elif isinstance(effect, Add):
                self._reserve(effect.id, effect.offset, len(effect.delta))
            elif isinstance(effect, BindMemory):
                memories.create(resolved.id, effect.size)

    def _reserve(self, id: int, offset: int, size: int) -> None:
        row = self.memory[id]
        if size and row is not None:
            holes = self._replica.stores.reserve(id, offset, size, row.size)
            if holes:
                self._reserved.append((id, holes))

    def give_back(self) -> None:
        """Undo `reserve`: the entry came to nothing."""
        for id, holes in self._reserved:
            self._replica.stores.give_back(id, holes)

    def _row(self, name: str) -> NameRow | None:
        if name in self.rows:
            return self.rows[name]
        found = self._index.name(self.txn, name)
        row = self.rows[name] = None if found is None else _without_value(found)
        return row

    def _memory_row(self, id: int) -> MemoryRow | None:
        if id not in self.memory:
            self.memory[id] = self._index.memory_row(self.txn, id)
        return self.memory[id]

    def _touch(self, id: int, version: int) -> str:
        row = self._memory_row(id)
        assert row is not None, "the judge checked that the object exists"
        self.memory[id] = MemoryRow(version, row.size, row.name)
        self.changed.add(id)
        return row.name

    def _bind(self, name: str, row: NameRow | None) -> None:
        self.rows[name] = None if row is None else _without_value(row)
        self.bound[name] = row

    def _pending_stores(self) -> PendingStores:
        if self._pending is None:
            self._pending = PendingStores(self._read_memory)
            for effect, _ in self.applied:
                if isinstance(effect, Store):
                    self._pending.store(effect.id, effect.offset, self._data(effect.payload))
        return self._pending

    def _read_memory(self, id: int, offset: int, size: int) -> bytes:
        return bytes(size) if id in self._created else self._replica.stores.read(id, offset, size)

    def _data(self, payload: Payload) -> bytes | memoryview:
        return payload if isinstance(payload, bytes) else self._replica.bulk.map(payload)


class Known(NamedTuple):
    """What this process's own last commit left: LMDB's number of it, and rows as of then.

    While that is the last transaction of all, they need not be read.
    """

    number: int
    state: State
    sessions: dict[bytes, SessionState]
    rows: dict[str, NameRow | None]
    memory: dict[int, MemoryRow | None]


def keys_in(result: bytes) -> list[str]:
    """Return the keys of what a `Collect` let go of, by the result that it came to."""
    return result.decode().splitlines()


def _value_row(id: int, version: int, payload: Payload) -> NameRow:
    if isinstance(payload, bytes):
        return NameRow(INLINE, id, version, len(payload), payload)
    return NameRow(BULK, id, version, payload.size, encode(payload))


def _without_value(row: NameRow) -> NameRow:
    """Return the row to keep: no inline value, no bytes that lie in a page which may move."""
    kind, id, version, size, body = row
    return NameRow(kind, id, version, size, b"" if kind == INLINE else bytes(body))
