"""Playing new entries into the replica: the embedded commit.

With the writer's lock held, an entry goes these ways, and a process may die after any line:

    judge the records; write the tail, the names and the state in one LMDB transaction
    started = version                        readers now look at the index after each copy
    create files and reserve disk for what will be written to mapped memory
    write the entry to the ring
    commit the LMDB transaction, durably     from here on the entry counts
    copy stores into memory, move and remove files
    applied = version; wake those who wait

What a dead writer left between the last two is played again from the tail, which holds the bytes
that every store and addition leaves, so playing twice does no harm.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import lmdb

from everpool.errors import CommitUnknownError, EverpoolError
from everpool.records import (
    Entry,
    Payload,
    Record,
    RecordId,
    Reference,
    encode_entry,
    new_session,
    next_hash,
    payload_size,
)
from everpool.replica.effects import (
    PendingStores,
    add_numbers,
    effects_of,
    entry_of,
    overlay,
)
from everpool.replica.index import (
    BULK,
    INLINE,
    MEMORY,
    Index,
    MemoryRow,
    NameRow,
    RecordOutcome,
    Resolved,
    State,
    TailRow,
    encode,
    ours,
    translate,
    translated,
)
from everpool.replica.replica import Replica, load_writes
from everpool.verdict import (
    Add,
    Bind,
    Binding,
    BindMemory,
    Effect,
    Judge,
    SessionState,
    SetFence,
    SetFloor,
    Store,
    Unbind,
    Verdict,
    Writes,
)

# Each entry removes up to this many older ones, so that trimming never comes in bursts.
_TRIMMED_PER_ENTRY = 3
_UNTRIMMED_VERSIONS = 1 << 15
_KNOWN_ROWS = 1 << 12
# Blocks of memory that have a checksum of their own.
BLOCK_SHIFT = 16


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
        if self._pending is not None:
            self._pending.store(id, effect.offset, self._data(payload))
        return Resolved(id, 0, self._touch(id, version))

    def _bind_value(self, version: int, effect: Bind) -> Resolved:
        name = effect.name
        old = self._row(name)
        if old is None:
            self.state.names += 1
        self._bind(name, _value_row(effect.id, version, effect.payload))
        return Resolved(effect.id, effect.replaced, _file_of(old))

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
                file = _file_of(self._row(name))
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
            case SetFence(session, state):
                if state is not None:
                    self.sessions[session] = state
                return Resolved()
            case _:
                raise AssertionError(f"no such effect: {effect}")

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

    def reserve(self) -> None:
        """Create files and reserve the disk that the effects will need."""
        memories = self._replica.memories
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
            holes = self._replica.memories.reserve(id, offset, size, row.size)
            if holes:
                self._reserved.append((id, holes))

    def give_back(self) -> None:
        """Undo `reserve`: the entry came to nothing."""
        for id, holes in self._reserved:
            self._replica.memories.give_back(id, holes)

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
        return bytes(size) if id in self._created else self._replica.memories.read(id, offset, size)

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


class Writer:
    """The one who changes a replica. Call its methods with the writer's lock held."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._judge: Judge | None = None
        self._session = b""
        self._known: Known | None = None
        self._written = Written(0)
        # Version, bytes of the tail and flushed version after the last commit.
        self.progress = (0, 0, 0)

    def recover(self) -> None:
        """Finish what a dead writer, or the last boot, left undone. Costs what was undone."""
        replica = self._replica
        shared = replica.shared
        with translated("finishing an interrupted commit"):
            # A writer that died inside LMDB's own commit may have left a commit that counts but
            # that readers are not shown; beginning a write transaction makes LMDB look.
            replica.index.env.begin(write=True).abort()
            replica.trusted = shared.trusted()
            if not replica.trusted or shared.suspect or shared.started != shared.applied:
                # A flush may have failed, and its process may have died before it could mend.
                # What the last boot left in the ring counts, though; see `_replay`.
                self._mend(forget=replica.trusted)
            with replica.index.read() as txn:
                state = replica.index.state(txn)
                applied = shared.applied if replica.trusted else state.flushed
                rows = list(replica.index.tail_after(txn, applied))
            for _, row in rows:
                self._redo(row, applied)
            shared.applied = state.version
            shared.started = state.version
            if not replica.trusted:
                self._replay()
                # What was swept in the last boot may be back.
                replica.memories.sweep(lambda id: replica.memory_row(id) is None)
                # Not before: under a page that is trusted nobody looks into the ring any more.
                shared.trust()
                replica.trusted = True
            shared.wake()
            next_id = replica.state().next_id
            replica.memories.sweep(lambda id: id >= next_id)
            replica.bulk.sweep()

    def _replay(self) -> None:
        """Commit the entries of the ring that the index lacks: they may be acknowledged."""
        while row := self._replica.index.unplayed():
            self._append(entry_of(row).records, None, row)

    def take_written(self) -> "tuple[int, Written]":
        """Return the version, with all of it applied, and what is known to be written up to it."""
        shared = self._replica.shared
        if shared.suspect or shared.started != shared.applied:
            self.recover()
        version = shared.applied
        taken, self._written = self._written, Written(version)
        return version, taken

    def rewrite(self, after: int) -> None:
        """Write everything after that version to memory again, as after a failed fsync.

        Block by block, with its final bytes: readers, who take no lock, see no old ones.
        """
        replica = self._replica
        with replica.index.read() as txn:
            rows = list(replica.index.tail_after(txn, after))
        stores: dict[int, list[tuple[int, bytes | memoryview]]] = {}
        dirty = Dirty()
        for _, row in rows:
            for version, effect, resolved in effects_of(entry_of(row), row):
                if version > after and isinstance(effect, (Store, Add)):
                    data = resolved.new if isinstance(effect, Add) else self._data(effect.payload)
                    stores.setdefault(effect.id, []).append((effect.offset, data))
                    dirty.add(effect)
        for id, blocks in dirty.blocks.items():
            known = replica.memory_row(id)
            if known is None:
                continue
            by_block: dict[int, list[tuple[int, bytes | memoryview]]] = {}
            for offset, data in stores[id]:
                last = (offset + len(data) - 1) >> BLOCK_SHIFT
                for block in range(offset >> BLOCK_SHIFT, last + 1):
                    by_block.setdefault(block, []).append((offset, data))
            for block in blocks:
                start = block << BLOCK_SHIFT
                size = min(1 << BLOCK_SHIFT, known.size - start)
                final = bytearray(replica.memories.read(id, start, size))
                for offset, data in by_block[block]:
                    overlay(final, start, offset, data)
                replica.memories.write(id, start, final)

    def _data(self, payload: Payload) -> bytes | memoryview:
        return payload if isinstance(payload, bytes) else self._replica.bulk.map(payload)

    def _redo(self, row: TailRow, applied: int) -> None:
        for version, effect, resolved in effects_of(entry_of(row), row):
            if version <= applied:
                continue
            memories = self._replica.memories
            if isinstance(effect, BindMemory):
                memories.create(resolved.id, effect.size)
            # Memory that a later record deleted, and that was deleted already, needs no stores.
            if not isinstance(effect, (Store, Add)) or memories.path(resolved.id).exists():
                self._apply(effect, resolved)
        for file in row.removed:
            self._replica.bulk.remove(file)

    def commit(self, records: list[Record], flushed: "Flushed | None" = None) -> list[Result]:
        """Append the records as one entry, durably; returns what became of each, in order.

        `flushed` says what of mapped memory was made durable. Raises
        `UnavailableError` or `InvalidError` when nothing was committed, and `CommitUnknownError`
        when that cannot be told.
        """
        shared = self._replica.shared
        if shared.suspect or shared.started != shared.applied:
            self.recover()
        return self._append(records, flushed, None)

    def _mend(self, *, forget: bool) -> None:
        """Make up for a flush of the index that failed; raises `UnavailableError`.

        With `forget`, the entry whose flush it was will never count.
        """
        with translated("writing the index again after a failed flush"):
            self._replica.index.ring.mend(self._replica.state().position if forget else None)
        self._replica.shared.suspect = 0

    def _append(
        self,
        records: list[Record],
        flushed: "Flushed | None",
        replayed: TailRow | None,
    ) -> list[Result]:
        shared = self._replica.shared
        try:
            txn = self._replica.index.env.begin(write=True, buffers=True)
        except lmdb.Error as error:
            raise translate(error, "committing") from error
        number = txn.id()
        known, self._known = self._known, None
        if known is None or known.number != number - 1:
            known = None  # another process committed since
        batch: Batch | None = None
        try:
            batch, results = self._index(txn, records, flushed, replayed, known)
            state = batch.state
            # Who dies or fails from here on leaves files, which `recover` removes.
            shared.started = state.version
            batch.reserve()
            if replayed is None:  # else the ring has it, and must not lose it meanwhile
                self._replica.index.ring.put(state.position - 1, batch.row)
        except BaseException as error:
            self._judge = None
            txn.abort()
            if batch is not None:
                batch.give_back()
            if isinstance(error, (lmdb.Error, OSError)):
                raise ours(error, "committing") from error
            raise
        self._commit(txn, batch, results)
        self._written.add(state.version - len(results), state.version, batch.applied)
        self._finish(batch)
        if len(batch.rows) > _KNOWN_ROWS or len(batch.memory) > _KNOWN_ROWS:
            batch.rows, batch.memory = {}, {}
        self._known = Known(number, state, batch.sessions, batch.rows, batch.memory)
        self.progress = (state.version, state.tail_bytes, state.flushed)
        return results

    def _commit(self, txn: lmdb.Transaction, batch: Batch, results: list[Result]) -> None:
        index, shared = self._replica.index, self._replica.shared
        done = False
        try:
            txn.commit()
            done = True
        except lmdb.Error as error:
            # The entry may lie in the ring, to be played after a power cut: it must not, if the
            # caller is told that nothing was committed; and it must, if it was played from there.
            shared.suspect = 1
            # The ids of this entry may not be taken again: who asks for them must not be told of
            # another record. `started` stays, so that `recover` removes what `reserve` made.
            self._session = b""
            try:
                with index.read() as reader:
                    unknown = index.state(reader).version >= batch.state.version
                if not unknown:
                    self._mend(forget=not batch.replayed)
            except EverpoolError:
                unknown = True
            if unknown and not batch.replayed:
                ids = ", ".join(str(result.id) for result in results[:3])
                raise CommitUnknownError(
                    f"the disk failed during the commit of {ids} ({error}): open the pool again "
                    "and ask `outcome(id)`",
                    id=results[0].id,
                ) from error
            if not batch.replayed:
                batch.give_back()
            raise translate(error, "committing") from error
        finally:
            if not done:
                self._judge = None

    def _finish(self, batch: Batch) -> None:
        """Copy a durable entry into memory. What fails here is done again by the next commit."""
        shared = self._replica.shared
        try:
            for effect, resolved in batch.applied:
                self._apply(effect, resolved)
            for file in batch.trimmed:
                self._replica.bulk.remove(file)
        except (OSError, EverpoolError):
            return  # readers play the tail over what they read until it succeeds
        shared.applied = batch.state.version
        shared.wake()

    def _apply(self, effect: Effect, resolved: Resolved) -> None:
        replica = self._replica
        if isinstance(effect, Store):
            payload = effect.payload
            if isinstance(payload, bytes):
                replica.memories.write(effect.id, effect.offset, payload)
            else:
                replica.memories.write(effect.id, effect.offset, replica.bulk.map(payload))
                replica.bulk.publish(payload)
        elif isinstance(effect, Add):
            replica.memories.write(effect.id, effect.offset, resolved.new)
        elif isinstance(effect, Bind):
            if isinstance(effect.payload, Reference):
                replica.bulk.publish(effect.payload)
            if resolved.name:
                replica.bulk.remove(resolved.name)
        elif isinstance(effect, Unbind):
            if effect.size >= 0:
                replica.memories.remove(effect.id)
            elif resolved.name:
                replica.bulk.remove(resolved.name)

    def _index(
        self,
        txn: lmdb.Transaction,
        records: list[Record],
        flushed: "Flushed | None",
        replayed: TailRow | None,
        known: "Known | None",
    ) -> tuple[Batch, list[Result]]:
        batch = Batch(self._replica, txn, known)
        state = batch.state
        first_version = state.version + 1
        judge = self._judge_for(batch, records)
        if replayed is not None:
            entry, now_ns = entry_of(replayed), replayed.time_ns
            batch.replayed = True
            for outcome in replayed.outcomes:
                batch.recorded.extend(known.old for known in outcome.resolved if known.old)
        else:
            for record in records:
                if not (record.ranges or record.names or record.prefixes):
                    record.snapshot = state.version  # it saw nothing that could be too old
            first = self._next_sequence(batch)
            entry = Entry(self._session, first, state.position, state.hash, records)
            now_ns = max(state.time_ns + 1, time.time_ns())
        data = encode_entry(entry)
        outcomes: list[RecordOutcome] = []
        results: list[Result] = []
        for at, (decision, session) in enumerate(judge.entry(entry)):
            resolved = [batch.apply(decision.version, effect) for effect in decision.effects]
            if session is not None:
                batch.sessions[entry.session] = session
            outcomes.append(RecordOutcome(int(decision.verdict), decision.detail, resolved))
            old = [item.old for item in resolved if item.old]
            id = RecordId(entry.session, entry.first_sequence + at)
            results.append(Result(id, decision.verdict, decision.version, decision.detail, old))
        state.version = judge.version
        state.next_id = judge.next_id
        state.position += 1
        state.hash = next_hash(state.hash, data)
        state.time_ns = now_ns
        if flushed is not None:
            self._note_flushed(batch, flushed, first_version)
        batch.finish(TailRow(first_version, state.time_ns, outcomes, data, batch.garbage))
        return batch, results

    def _note_flushed(self, batch: Batch, flushed: "Flushed", first_version: int) -> None:
        """Keep the checksums of the blocks that nobody wrote to since they were read."""
        index, txn = self._replica.index, batch.txn
        later = self._written.between(
            flushed.version, first_version - 1, lambda after: index.tail_after(txn, after)
        )
        for effect, _ in batch.applied:
            later.add(effect)
        for id, checksums in flushed.blocks.items():
            if index.memory_row(txn, id) is not None:
                touched = later.blocks.get(id, set())
                for block, checksum in checksums.items():
                    if block not in touched:
                        index.put_block(txn, id, block, checksum)
        batch.state.flushed = max(batch.state.flushed, flushed.version)

    def _judge_for(self, batch: Batch, records: list[Record]) -> Judge:
        """Return a judge that knows all writes since the oldest snapshot it must judge."""
        state, judge = batch.state, self._judge
        self._judge = None  # until this entry is decided
        oldest = state.version
        for record in records:
            if record.snapshot < oldest and (record.ranges or record.names or record.prefixes):
                oldest = max(record.snapshot, state.floor)
        if judge is None or judge.writes.base > oldest:
            judge = Judge(batch, Writes(oldest), version=oldest, floor=0, next_id=0)
        elif state.version - judge.writes.base > 2 * _UNTRIMMED_VERSIONS:
            judge.writes = judge.writes.since(min(oldest, state.version - _UNTRIMMED_VERSIONS))
        if judge.version < state.version:
            load_writes(self._replica.index, batch.txn, judge.writes, judge.version)
        judge.catalog = batch
        judge.version, judge.floor, judge.next_id = state.version, state.floor, state.next_id
        self._judge = judge
        return judge

    def _next_sequence(self, batch: Batch) -> int:
        """Return the sequence for the next record.

        In a new session when the old one is forgotten, or has a fence, which would void a record
        in the middle of a pipeline.
        """
        if self._session:
            known = batch.session(self._session)
            remembered = known is not None and known.last_version >= batch.state.floor
            if known is not None and remembered and not known.fences:
                return known.last_sequence + 1
        self._session = new_session(batch.state.version)
        return 1


def _value_row(id: int, version: int, payload: Payload) -> NameRow:
    if isinstance(payload, bytes):
        return NameRow(INLINE, id, version, len(payload), payload)
    return NameRow(BULK, id, version, payload.size, encode(payload))


def _without_value(row: NameRow) -> NameRow:
    """Return the row to keep: no inline value, no bytes that lie in a page which may move."""
    kind, id, version, size, body = row
    return NameRow(kind, id, version, size, b"" if kind == INLINE else bytes(body))


def _file_of(row: NameRow | None) -> str:
    return row.reference().file if row is not None and row.kind == BULK else ""


class Flushed(NamedTuple):
    """What was made durable: memory up to `version`, and the checksums of changed blocks."""

    version: int
    blocks: dict[int, dict[int, int]]


class Dirty:
    """Which blocks of which memory were written."""

    def __init__(self) -> None:
        self.blocks: dict[int, set[int]] = {}

    def add(self, effect: Effect) -> None:
        """Note what the effect writes."""
        if isinstance(effect, Store):
            size = payload_size(effect.payload)
        elif isinstance(effect, Add):
            size = len(effect.delta)
        elif isinstance(effect, BindMemory):
            self.blocks.setdefault(effect.id, set())  # its length
            return
        else:
            return
        if size:
            first, last = effect.offset >> BLOCK_SHIFT, (effect.offset + size - 1) >> BLOCK_SHIFT
            self.blocks.setdefault(effect.id, set()).update(range(first, last + 1))

    def add_all(self, effects: Iterator[tuple[int, Effect, Resolved]], after: int) -> None:
        """Note what the effects of versions after `after` write."""
        for version, effect, _ in effects:
            if version > after:
                self.add(effect)


class Written:
    """What a process's own commits of versions after `base`, up to `top`, wrote to memory.

    It spares reading the tail, as long as no other process commits in between.
    """

    def __init__(self, base: int) -> None:
        self.base = self.top = base
        self._dirty = Dirty()

    def add(self, before: int, version: int, applied: list[tuple[Effect, Resolved]]) -> None:
        """Note what the entry wrote that led from version `before` to `version`."""
        if before != self.top:
            self.base, self._dirty = before, Dirty()
        for effect, _ in applied:
            if not isinstance(effect, Bind):
                self._dirty.add(effect)
        self.top = version

    def between(
        self, after: int, up_to: int, tail: Callable[[int], Iterator[tuple[int, TailRow]]]
    ) -> Dirty:
        """Return what the versions after `after`, up to `up_to`, wrote, and what is known of
        earlier ones. `tail` yields the entries behind a version, for what is not known.
        """
        dirty = self._dirty
        for low, high in ((after, min(self.base, up_to)), (max(after, self.top), up_to)):
            if low < high:
                for last, row in tail(low):
                    dirty.add_all(effects_of(entry_of(row), row), low)
                    if last >= high:
                        break
        return dirty
