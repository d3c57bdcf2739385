"""A replica in plain dicts and bytearrays: the log played in the simplest way that is right.

It keeps the order of steps that a real replica must keep, and stops between any two of them:

    decide the records of the entry, on a draft of the index
    replace the index by the draft               from here on the entry counts
    copy the after-images into memory, one by one, each in two halves
    note that the version is applied

`play` is a generator that yields between the steps. Who drops it half-way has crashed the
replica; a new one on the same `Disk` then does what the tail says (`recover`). The tail holds
*after-images*, the bytes that each operation leaves, so that doing it twice does no harm.
"""

import random
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec
import numpy as np

from everpool.collection import Horizon, is_needed, upload_version
from everpool.errors import CorruptionError, NotFoundError
from everpool.log import Appended
from everpool.records import (
    EMPTY_HASH,
    Collect,
    Payload,
    RecordId,
    Reference,
    decode_entry,
    next_hash,
    session_start,
)
from everpool.verdict import (
    VOID,
    Add,
    Bind,
    Binding,
    BindMemory,
    Decision,
    Effect,
    Judge,
    SessionState,
    SetCheckpoint,
    SetFence,
    SetFloor,
    SetHorizon,
    SetPin,
    Store,
    Unbind,
    Verdict,
    Writes,
    WritesDump,
    note_effects,
)

_POWER_CUT_GRAIN_BYTES = 8


class Row(NamedTuple):
    """What a name is bound to: a value's payload, or memory's size and header."""

    id: int
    size: int
    payload: Payload


class Outcome(NamedTuple):
    """What became of a record: "committed", "aborted", "expired" or, so far, "undecided".

    `version` is 0 unless a record decided it. `results` are the old numbers of its additions.
    """

    state: str
    version: int = 0
    verdict: int = 0
    results: tuple[bytes, ...] = ()


class Decided(NamedTuple):
    """What a replica found out about one record of the log."""

    id: RecordId
    verdict: Verdict
    version: int
    results: tuple[bytes, ...]


class Step(NamedTuple):
    """One thing to do to memory after version `version` counts; doing it again is harmless.

    `size` is -1 for bytes to store, 0 for memory to remove, otherwise that of memory to create.
    """

    version: int
    id: int
    size: int
    offset: int = 0
    image: bytes = b""


class Index:
    """All of a replica but its memory's bytes. Also the `Catalog` that the judge asks."""

    def __init__(self) -> None:
        self.names: dict[str, Row] = {}
        self.memory: dict[int, int] = {}
        self.sessions: dict[bytes, SessionState] = {}
        self.outcomes: dict[RecordId, Outcome] = {}
        self.old_writes = WritesDump(0, [], [], [])
        self.recent: list[tuple[int, list[Effect]]] = []
        self.tail: list[Step] = []
        self.version = 0
        self.floor = 0
        self.next_id = 1
        self.position = 0
        self.hash = EMPTY_HASH
        self.time_ns = 0
        self.newest_checkpoint: tuple[int, str] = (0, "")
        self.snapshots: dict[str, int] = {}
        self.horizon = Horizon()
        # Dead objects: when their uploads began, and since when nothing names them.
        self.garbage: dict[str, tuple[int, int]] = {}

    def copy(self) -> "Index":
        """Return a draft, which may be changed without changing this index."""
        draft = Index()
        vars(draft).update(vars(self))
        draft.names = self.names.copy()
        draft.memory = self.memory.copy()
        draft.sessions = self.sessions.copy()
        draft.outcomes = self.outcomes.copy()
        draft.recent = self.recent.copy()
        draft.snapshots = self.snapshots.copy()
        draft.garbage = self.garbage.copy()
        draft.tail = self.tail.copy()
        return draft

    def binding(self, name: str) -> Binding | None:
        row = self.names.get(name)
        return None if row is None else Binding(row.id, row.size)

    def memory_size(self, id: int) -> int | None:
        return self.memory.get(id)

    def session(self, session: bytes) -> SessionState | None:
        return self.sessions.get(session)

    def pins(self) -> dict[str, int]:
        return self.snapshots


class Disk:
    """What a crash leaves of a replica. After `cut_power`, of memory only what was flushed."""

    def __init__(self) -> None:
        self.index = Index()
        self.memory: dict[int, bytearray] = {}
        self.applied = 0
        self._flushed: dict[int, bytes] = {}

    def flush(self) -> None:
        """Make memory durable, as fsync does for mapped files."""
        self._flushed = {id: bytes(data) for id, data in self.memory.items()}

    def cut_power(self, rng: random.Random) -> None:
        """Lose any of the writes to memory since the last flush; the index is durable."""
        self.applied = 0
        for id in sorted({*self.memory, *self._flushed}):
            now, old = self.memory.get(id), self._flushed.get(id)
            if now is None or (old is None and rng.random() < 0.5):
                now = bytearray(old or b"")
            for at in range(0, len(now), _POWER_CUT_GRAIN_BYTES):
                if rng.random() < 0.5:
                    end = min(at + _POWER_CUT_GRAIN_BYTES, len(now))
                    now[at:end] = old[at:end] if old is not None else bytes(end - at)
            self.memory[id] = now
        self.flush()


class Checkpoint(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A replica as of one version, as plain data; equal for all replicas of that version."""

    position: int
    hash: bytes
    time_ns: int
    version: int
    floor: int
    next_id: int
    names: list[tuple[str, int, int, Payload]]
    memory: list[tuple[int, bytes]]
    sessions: list[tuple[bytes, SessionState]]
    outcomes: list[tuple[bytes, int, Outcome]]
    writes: WritesDump
    checkpoint: tuple[int, str]
    snapshots: list[tuple[str, int]]
    horizon: Horizon
    garbage: list[tuple[str, tuple[int, int]]]


class MemoryReplica:
    """A replica. With `forgetful=False` it keeps what the floor allows it to forget.

    One that was left in the middle of `play` is of no use any more: make a new one of its `disk`.
    `files` holds what references in the log refer to.
    """

    judge_type: type[Judge] = Judge

    def __init__(
        self,
        disk: Disk | None = None,
        *,
        forgetful: bool = True,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.disk = Disk() if disk is None else disk
        self.forgetful = forgetful
        self._files: Mapping[str, bytes] = {} if files is None else files
        index = self.disk.index
        writes = Writes.load(index.old_writes)
        for version, effects in index.recent:
            note_effects(writes, version, effects)
        self._judge = self.judge_type(
            index,
            writes,
            version=index.version,
            floor=index.floor,
            next_id=index.next_id,
            checkpoint=index.newest_checkpoint[0],
            horizon=index.horizon,
        )
        self._hashes = {index.position: index.hash}

    # What a reader may ask.

    @property
    def version(self) -> int:
        """The number of records played."""
        return self.disk.index.version

    @property
    def position(self) -> int:
        """The position of the last entry played."""
        return self.disk.index.position

    @property
    def floor(self) -> int:
        """The oldest snapshot that a new record may have."""
        return self.disk.index.floor

    @property
    def hash(self) -> bytes:
        """The running hash of the log up to `position`."""
        return self.disk.index.hash

    def row(self, name: str) -> Row | None:
        """Return what `name` is bound to."""
        return self.disk.index.names.get(name)

    def names(self, prefix: str = "") -> list[str]:
        """Return the names under `prefix`, in the order of their UTF-8 bytes."""
        return sorted(
            (name for name in self.disk.index.names if name.startswith(prefix)), key=str.encode
        )

    def read(self, id: int, start: int, end: int) -> bytes:
        """Return bytes of memory `id`; raises `NotFoundError` when there is no such memory."""
        if id not in self.disk.index.memory:
            raise NotFoundError(f"memory {id} does not exist", id=id)
        return bytes(self.disk.memory[id][start:end])

    def outcome(self, id: RecordId) -> Outcome:
        """Return what became of that record; "undecided" only until it is decided or fenced."""
        index = self.disk.index
        known = index.outcomes.get(id)
        if known is not None and known.version >= index.floor:
            return known
        state = index.session(id.session)
        if state is None or state.last_version < index.floor:
            forgotten = session_start(id.session) < index.floor
            return Outcome("expired" if forgotten else "undecided")
        if id.sequence in state.fences:
            return Outcome("aborted", 0, Verdict.FENCED)
        return Outcome("expired" if id.sequence <= state.last_sequence else "undecided")

    # Playing.

    def recover(self) -> Iterator[str]:
        """Finish what a crash left undone, yielding between any two steps.

        Must be run to its end before anything else is asked of a replica on a used disk.
        """
        for step in self.disk.index.tail:
            if step.version > self.disk.applied:
                yield from self._do(step)
                yield "done again"
        self.disk.applied = self.version

    def apply(self, item: Appended) -> list[Decided]:
        """Play one entry to its end."""
        decided: list[Decided] = []
        for _ in self.play(item, decided):
            pass
        return decided

    def play(self, item: Appended, decided: list[Decided]) -> Iterator[str]:
        """Play one entry, yielding between any two steps; fills `decided` once it counts.

        Raises `CorruptionError` when the entry's writer had another log before its base.
        """
        draft = self.disk.index.copy()
        entry = decode_entry(item.entry)
        self._check_history(draft, item, entry.base, entry.base_hash)
        found: list[Decided] = []
        known_steps = len(draft.tail)
        judge = self._judge
        judge.catalog = self._catalog(draft)
        pending: dict[int, bytearray] = {}
        for at, (decision, state) in enumerate(judge.entry(entry)):
            id = RecordId(entry.session, entry.first_sequence + at)
            results = self._index(draft, decision, pending)
            if state is not None:
                draft.sessions[entry.session] = state
            if decision.verdict not in VOID or decision.verdict is Verdict.FENCED:
                ended = "committed" if decision.verdict is Verdict.COMMITTED else "aborted"
                draft.outcomes[id] = Outcome(ended, decision.version, decision.verdict, results)
            found.append(Decided(id, decision.verdict, decision.version, results))
        draft.version, draft.floor, draft.next_id = judge.version, judge.floor, judge.next_id
        draft.position = item.position
        draft.hash = self._hashes[item.position] = next_hash(draft.hash, item.entry)
        draft.time_ns = max(draft.time_ns, item.time_ns)
        if self.forgetful:
            self._forget(draft)
        yield "decided"
        self.disk.index = draft
        decided += found
        yield "counts"
        for step in draft.tail[known_steps:]:
            yield from self._do(step)
            yield "done"
        self.disk.applied = draft.version

    def flush(self) -> None:
        """Make memory durable, then shorten the tail."""
        self.disk.flush()
        self.disk.index.tail = []

    def _check_history(self, draft: Index, item: Appended, base: int, base_hash: bytes) -> None:
        if item.position <= draft.position:
            raise CorruptionError(
                f"entry {item.position} comes after {draft.position}: the log lost its tail",
                position=item.position,
            )
        if base > draft.position or self._hashes.get(base, base_hash) != base_hash:
            raise CorruptionError(
                f"the writer of entry {item.position} had another log up to {base}",
                position=item.position,
                base=base,
            )

    def _catalog(self, draft: Index) -> Index:
        return draft

    def _index(
        self, draft: Index, decision: Decision, pending: dict[int, bytearray]
    ) -> tuple[bytes, ...]:
        """Put a decision's effects into the draft; returns the old numbers of its additions.

        `pending` is memory as the entry's records so far will leave it.
        """
        version, results = decision.version, list[bytes]()
        for effect in decision.effects:
            match effect:
                case Bind(name, id, payload):
                    draft.names[name] = Row(id, -1, payload)
                    _revive(draft, payload)
                case BindMemory(name, id, size, header):
                    draft.names[name] = Row(id, size, header)
                    draft.memory[id] = size
                    pending[id] = bytearray(size)
                    draft.tail.append(Step(version, id, size))
                case Unbind(name, id, size):
                    del draft.names[name]
                    if draft.memory.pop(id, None) is not None:
                        draft.tail.append(Step(version, id, 0))
                case Store(id, offset, payload):
                    _revive(draft, payload)
                    self._store(draft, pending, version, id, offset, self._bytes(payload))
                case Add(id, offset, dtype, delta):
                    memory = self._pending(pending, id)
                    old = bytes(memory[offset : offset + len(delta)])
                    results.append(old)
                    image = add_numbers(old, delta, dtype)
                    self._store(draft, pending, version, id, offset, image)
                case SetFence(session, state):
                    if state is not None:
                        draft.sessions[session] = state
                case SetFloor(floor):
                    draft.floor = floor
                case SetCheckpoint(checkpoint, key):
                    draft.newest_checkpoint = (checkpoint, key)
                case SetPin(name, pinned):
                    if pinned < 0:
                        del draft.snapshots[name]
                    else:
                        draft.snapshots[name] = pinned
                case SetHorizon(horizon, record):
                    assert horizon is not None
                    draft.horizon = horizon
                    if record is not None:
                        results.append(_collect(draft, version, record))
        if decision.effects:
            draft.recent.append((version, decision.effects))
        return tuple(results)

    def _store(
        self,
        draft: Index,
        pending: dict[int, bytearray],
        version: int,
        id: int,
        offset: int,
        image: bytes,
    ) -> None:
        self._pending(pending, id)[offset : offset + len(image)] = image
        draft.tail.append(Step(version, id, -1, offset, image))

    def _pending(self, pending: dict[int, bytearray], id: int) -> bytearray:
        if id not in pending:
            pending[id] = bytearray(self.disk.memory[id])
        return pending[id]

    def _bytes(self, payload: Payload) -> bytes:
        if not isinstance(payload, Reference):
            return payload
        data = self._files.get(payload.file)
        if data is None or len(data) != payload.size:
            raise CorruptionError(f"file {payload.file!r} is missing or cut short")
        return data

    def _do(self, step: Step) -> Iterator[str]:
        """Do one step of the tail; it may have been done before, in part or whole."""
        memory = self.disk.memory
        if step.size > 0:
            memory[step.id] = bytearray(step.size)
        elif step.size == 0:
            memory.pop(step.id, None)
        elif step.id in memory:  # else a later step, done before the crash, removed it
            middle = len(step.image) // 2
            memory[step.id][step.offset : step.offset + middle] = step.image[:middle]
            yield "torn"
            end = step.offset + len(step.image)
            memory[step.id][step.offset + middle : end] = step.image[middle:]

    def _forget(self, draft: Index) -> None:
        """Drop what the floor allows: old outcomes, old sessions, what old snapshots need."""
        floor = draft.floor
        if floor == self.disk.index.floor:
            return
        for id in [id for id, outcome in draft.outcomes.items() if outcome.version < floor]:
            del draft.outcomes[id]
        for session in [s for s, known in draft.sessions.items() if known.last_version < floor]:
            del draft.sessions[session]
        self._judge.writes = self._judge.writes.since(floor)
        draft.old_writes = self._judge.writes.dump(floor)
        draft.recent = []

    # Checkpoints.

    def checkpoint(self) -> bytes:
        """Return the replica as bytes, which are a function of the log up to `position` alone."""
        index, floor = self.disk.index, self.disk.index.floor
        return msgspec.msgpack.encode(
            Checkpoint(
                index.position,
                index.hash,
                index.time_ns,
                index.version,
                floor,
                index.next_id,
                [
                    (name, row.id, row.size, row.payload)
                    for name, row in sorted(index.names.items())
                ],
                [(id, bytes(self.disk.memory[id])) for id in sorted(index.memory)],
                [
                    (session, state)
                    for session, state in sorted(index.sessions.items(), key=_first)
                    if state.last_version >= floor
                ],
                [
                    (id.session, id.sequence, outcome)
                    for id, outcome in sorted(index.outcomes.items())
                    if outcome.version >= floor
                ],
                self._dump_writes(floor),
                index.newest_checkpoint,
                sorted(index.snapshots.items()),
                index.horizon,
                sorted(index.garbage.items()),
            )
        )

    def _dump_writes(self, floor: int) -> WritesDump:
        dump = self._judge.writes.dump(floor)
        return WritesDump(dump.base, sorted(dump.names), sorted(dump.listings), sorted(dump.ranges))

    @classmethod
    def from_checkpoint(
        cls,
        data: bytes,
        *,
        forgetful: bool = True,
        files: Mapping[str, bytes] | None = None,
    ) -> "MemoryReplica":
        """Return a replica that starts with a checkpoint; raises `CorruptionError` on others."""
        try:
            found = msgspec.msgpack.decode(data, type=Checkpoint)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise CorruptionError(f"not a checkpoint: {error}") from error
        disk = Disk()
        index = disk.index
        index.names = {name: Row(id, size, payload) for name, id, size, payload in found.names}
        index.memory = {id: len(content) for id, content in found.memory}
        index.sessions = dict(found.sessions)
        index.outcomes = {
            RecordId(session, sequence): outcome for session, sequence, outcome in found.outcomes
        }
        index.old_writes = found.writes
        index.newest_checkpoint = found.checkpoint
        index.snapshots, index.horizon = dict(found.snapshots), found.horizon
        index.garbage = dict(found.garbage)
        index.version, index.floor, index.next_id = found.version, found.floor, found.next_id
        index.position, index.hash, index.time_ns = found.position, found.hash, found.time_ns
        disk.memory = {id: bytearray(content) for id, content in found.memory}
        disk.applied = index.version
        disk.flush()
        return cls(disk, forgetful=forgetful, files=files)


def _collect(draft: Index, version: int, record: Collect) -> bytes:
    """Note what is dead, and forget what nothing needs; returns the keys of that."""
    gone = [
        key
        for key, (began, dead) in sorted(draft.garbage.items())
        if not is_needed(began, dead, record.start, record.islands)
    ]
    for key in gone:
        del draft.garbage[key]
    for key in record.dead:
        draft.garbage[key] = (upload_version(key), version)
    return "\n".join(gone).encode()


def _revive(draft: Index, payload: Payload) -> None:
    if isinstance(payload, Reference):
        draft.garbage.pop(f"values/{payload.file}", None)


def add_numbers(old: bytes, delta: bytes, dtype: str) -> bytes:
    """Return `old + delta` as numbers of type `dtype`; integers wrap around."""
    with np.errstate(all="ignore"):
        total = np.frombuffer(old, dtype) + np.frombuffer(delta, dtype)
    return total.astype(dtype).tobytes()  # the sum has the byte order of the machine


def _first(item: tuple[bytes, SessionState]) -> bytes:
    return item[0]
