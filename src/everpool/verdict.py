"""The rule by which every replica gives every record the same verdict.

Pure functions of the log: names, object ids, byte ranges and prefixes; never of bytes, clocks or
what a replica happens to hold. `Judge` keeps what the rule remembers and asks a `Catalog` for what
a name is bound to.

1. *Identity.* Within a session, records are decided in sequence and once. A sequence that was
   decided before is a duplicate, one behind a gap waits for its predecessor to be sent again, one
   behind its fence is void. A session that is not known, and began below the floor, may have been
   forgotten: its records are void; so are those of a session that claims to begin in the future.
2. *Conflict.* A record aborts when its snapshot is below the floor, or when a committed record
   after its snapshot wrote a name it read, made or removed a name under a prefix it listed, or
   wrote a byte it read.
3. *Totality.* A missing object, a taken name or a range outside the object abort the record with
   a stated verdict. No record can stop a replica.

Every record counts one version, whatever its verdict.
"""

import enum
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import msgspec

from everpool.collection import Horizon, is_collected, refusal, upload_version
from everpool.records import (
    MAX_MEMORY_BYTES,
    NUMBER_BYTES,
    SESSION_BYTES,
    Allocate,
    Checkpoint,
    Collect,
    Delete,
    Entry,
    FetchAdd,
    Floor,
    Payload,
    Pin,
    Put,
    Record,
    Reference,
    Restore,
    Retain,
    Unpin,
    Write,
    can_be_stored,
    is_name,
    payload_size,
    session_start,
)

_BLOCK_SHIFT = 12
_WIDE_BLOCKS = 16
_MAX_KEY_CHARACTERS = 255
_MAX_LOCK_CHARACTERS = 255
_NO_HORIZON = Horizon()


class Verdict(enum.IntEnum):
    """What became of a record. Only `COMMITTED` has effects; the values are stored."""

    COMMITTED = 0
    CONFLICT = 1
    BELOW_FLOOR = 2
    NOT_FOUND = 3
    EXISTS = 4
    INVALID = 5
    DUPLICATE = 6
    GAP = 7
    FENCED = 8
    FORGOTTEN = 9


VOID = frozenset({Verdict.DUPLICATE, Verdict.GAP, Verdict.FENCED, Verdict.FORGOTTEN})


class Binding(NamedTuple):
    """What a name is bound to: `size` is the bytes of memory, or -1 for a value."""

    id: int
    size: int


class SessionState(msgspec.Struct, array_like=True):
    """What is remembered of a session: how far it was decided, when, and its open fences."""

    last_sequence: int
    last_version: int
    fences: list[int]


class Catalog(Protocol):
    """What the rule may ask a replica; the answers are functions of the log alone."""

    def binding(self, name: str) -> Binding | None:
        """Return what `name` is bound to."""
        ...

    def memory_size(self, id: int) -> int | None:
        """Return the size of the memory object `id` in bytes, or None when there is none."""
        ...

    def session(self, session: bytes) -> SessionState | None:
        """Return what is remembered of `session`."""
        ...

    def pins(self) -> Mapping[str, int]:
        """Return the versions of the snapshots, by name."""
        ...


class Bind(msgspec.Struct, gc=False):
    """Effect: `name` is now value `id`. `replaced` is the object that it was bound to, or 0."""

    name: str
    id: int
    payload: Payload
    replaced: int


class BindMemory(msgspec.Struct, gc=False):
    """Effect: `name` is now `size` zero bytes of memory with this id."""

    name: str
    id: int
    size: int
    header: bytes


class Unbind(msgspec.Struct, gc=False):
    """Effect: `name` and object `id` are gone; `size` as in `Binding`."""

    name: str
    id: int
    size: int


class Store(msgspec.Struct, gc=False):
    """Effect: the bytes of memory `id` from `offset` on are the payload."""

    id: int
    offset: int
    payload: Payload


class Add(msgspec.Struct, gc=False):
    """Effect: the number at `offset` of memory `id` grows by `delta`; the old one is a result."""

    id: int
    offset: int
    dtype: str
    delta: bytes


class SetFloor(msgspec.Struct, gc=False):
    """Effect: the floor is now `version`."""

    version: int


class SetCheckpoint(msgspec.Struct, gc=False):
    """Effect: the newest checkpoint is of `version`, and its manifest is `key`."""

    version: int
    key: str


class SetPin(msgspec.Struct, gc=False):
    """Effect: the snapshot `name` is of `version`, or is no more when that is -1."""

    name: str
    version: int
    locked_until_ns: int = 0
    lock: str = ""


class SetHorizon(msgspec.Struct, gc=False):
    """Effect: what is kept of the past is now `horizon`; None changes nothing.

    With a `record`, what it calls dead is so, and what nothing needs any more is forgotten.
    """

    horizon: Horizon | None
    record: Collect | None


class SetFence(msgspec.Struct, gc=False):
    """Effect: what is remembered of `session` is now `state`; None changes nothing."""

    session: bytes
    state: SessionState | None


Effect = (
    Bind
    | BindMemory
    | Unbind
    | Store
    | Add
    | SetFloor
    | SetFence
    | SetCheckpoint
    | SetPin
    | SetHorizon
)


class Decision(msgspec.Struct):
    """The verdict on one record: its version, what it was about, and what to apply."""

    verdict: Verdict
    version: int
    detail: str
    effects: list[Effect]
    next_id: int


class _RangeLog:
    """The writes to one memory object, newest last, also by block for quick answers."""

    __slots__ = ("all", "blocks", "wide")

    def __init__(self) -> None:
        self.all: list[tuple[int, int, int]] = []
        self.wide: list[tuple[int, int, int]] = []
        self.blocks: dict[int, list[tuple[int, int, int]]] = {}

    def add(self, version: int, start: int, end: int) -> None:
        write = (version, start, end)
        self.all.append(write)
        first, last = start >> _BLOCK_SHIFT, (end - 1) >> _BLOCK_SHIFT
        if last - first >= _WIDE_BLOCKS:
            self.wide.append(write)
            return
        blocks = self.blocks
        for block in range(first, last + 1):
            known = blocks.get(block)
            if known is None:
                blocks[block] = [write]
            else:
                known.append(write)

    def touched(self, start: int, end: int, after: int) -> bool:
        first, last = start >> _BLOCK_SHIFT, (end - 1) >> _BLOCK_SHIFT
        if last - first >= _WIDE_BLOCKS:
            return _overlaps(self.all, start, end, after)
        if self.wide and _overlaps(self.wide, start, end, after):
            return True
        for block in range(first, last + 1):
            known = self.blocks.get(block)
            if known is not None and _overlaps(known, start, end, after):
                return True
        return False


def _overlaps(writes: list[tuple[int, int, int]], start: int, end: int, after: int) -> bool:
    for version, write_start, write_end in reversed(writes):
        if version <= after:
            return False
        if write_start < end and start < write_end:
            return True
    return False


class Writes:
    """What committed records wrote after version `base`, for judging snapshots from `base` on."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.names: dict[str, int] = {}
        self.listings: list[tuple[int, str]] = []
        self.ranges: dict[int, _RangeLog] = {}

    def name(self, version: int, name: str) -> None:
        """Note that `name` was bound or removed."""
        self.names[name] = version

    def listing(self, version: int, name: str) -> None:
        """Note that `name` appeared or disappeared."""
        self.listings.append((version, name))

    def range(self, version: int, id: int, start: int, end: int) -> None:
        """Note that bytes `start` up to `end` of memory `id` were written."""
        if start < end:
            log = self.ranges.get(id)
            if log is None:
                log = self.ranges[id] = _RangeLog()
            log.add(version, start, end)

    def name_touched(self, name: str, after: int) -> bool:
        """Whether `name` was bound or removed after that version."""
        return self.names.get(name, 0) > after

    def prefix_touched(self, prefix: str, after: int) -> bool:
        """Whether a name under `prefix` appeared or disappeared after that version."""
        first = bisect_right(self.listings, after, key=_version)
        return any(
            self.listings[at][1].startswith(prefix) for at in range(first, len(self.listings))
        )

    def range_touched(self, id: int, start: int, end: int, after: int) -> bool:
        """Whether a byte of the range was written after that version."""
        log = self.ranges.get(id)
        return log is not None and start < end and log.touched(start, end, after)

    def since(self, floor: int) -> "Writes":
        """Return a copy without the writes up to `floor`."""
        return Writes.load(self.dump(floor))

    def dump(self, after: int) -> "WritesDump":
        """Return what was written after that version, as plain data; equal for all replicas."""
        return WritesDump(
            max(after, self.base),
            sorted((version, name) for name, version in self.names.items() if version > after),
            sorted(item for item in self.listings if item[0] > after),
            sorted(
                (version, id, start, end)
                for id, log in self.ranges.items()
                for version, start, end in log.all
                if version > after
            ),
        )

    @classmethod
    def load(cls, dump: "WritesDump") -> "Writes":
        """Return the writes that `dump` holds."""
        writes = cls(dump.base)
        for version, name in dump.names:
            writes.name(version, name)
        writes.listings = sorted(dump.listings)
        for version, id, start, end in sorted(dump.ranges):
            writes.range(version, id, start, end)
        return writes


class WritesDump(msgspec.Struct, array_like=True):
    """The write sets since a floor, as a checkpoint carries them."""

    base: int
    names: list[tuple[int, str]]
    listings: list[tuple[int, str]]
    ranges: list[tuple[int, int, int, int]]


def _version(item: tuple[int, str]) -> int:
    return item[0]


def note_effects(writes: Writes, version: int, effects: Iterable[Effect]) -> None:
    """Add what a committed record wrote to `writes`."""
    present: dict[str, tuple[bool, bool]] = {}
    for effect in effects:
        if isinstance(effect, Store):
            end = effect.offset + payload_size(effect.payload)
            writes.range(version, effect.id, effect.offset, end)
        elif isinstance(effect, Bind):
            _note_name(writes, version, present, effect.name, bool(effect.replaced), True)
        elif isinstance(effect, Add):
            writes.range(version, effect.id, effect.offset, effect.offset + len(effect.delta))
        elif isinstance(effect, BindMemory):
            _note_name(writes, version, present, effect.name, False, True)
        elif isinstance(effect, Unbind):
            writes.range(version, effect.id, 0, effect.size)
            _note_name(writes, version, present, effect.name, True, False)
    for name, (was, remains) in present.items():
        if was != remains:
            writes.listing(version, name)


def _note_name(
    writes: Writes,
    version: int,
    present: dict[str, tuple[bool, bool]],
    name: str,
    was: bool,
    remains: bool,
) -> None:
    writes.names[name] = version
    before = present.get(name)
    present[name] = (was if before is None else before[0], remains)


def find_conflict(writes: Writes, record: Record) -> str | None:
    """Return what `record` read that was written after its snapshot, in words, or None."""
    snapshot = record.snapshot
    for name in record.names:
        if writes.name_touched(name, snapshot):
            return f"{name!r}"
    for prefix in record.prefixes:
        if writes.prefix_touched(prefix, snapshot):
            return f"the names under {prefix!r}"
    for id, start, end in record.ranges:
        if writes.range_touched(id, start, end, snapshot):
            return f"bytes {start} to {end} of object {id}"
    return None


class Judge:
    """Gives verdicts in log order.

    `version`, `floor`, `next_id`, `checkpoint` (the version of the newest one) and `horizon` are as
    of the last verdict.
    """

    def __init__(
        self,
        catalog: Catalog,
        writes: Writes,
        *,
        version: int,
        floor: int,
        next_id: int,
        checkpoint: int = 0,
        horizon: Horizon = _NO_HORIZON,
    ) -> None:
        self.catalog = catalog
        self.writes = writes
        self.version = version
        self.floor = floor
        self.next_id = next_id
        self.checkpoint = checkpoint
        self.horizon = horizon

    def entry(self, entry: Entry) -> Iterator[tuple[Decision, SessionState | None]]:
        """Decide the records of `entry`, one at a time.

        The caller applies each decision's effects to the catalog, and remembers the session's
        state that comes with it, before it asks for the next.
        """
        session = entry.session
        state = self._session(session)
        for sequence, record in enumerate(entry.records, entry.first_sequence):
            verdict = self._identity(session, state, sequence)
            if verdict is None:
                decision = self._decide(record)
                state = SessionState(sequence, decision.version, _later(state, sequence))
                for effect in decision.effects:
                    if isinstance(effect, SetFence) and effect.session == session and effect.state:
                        state.fences = [f for f in effect.state.fences if f > sequence]
                yield decision, state
            else:
                self.version += 1
                detail = f"record {sequence} of its session"
                decision = Decision(verdict, self.version, detail, [], self.next_id)
                if verdict is Verdict.FENCED:
                    state = SessionState(sequence, self.version, _later(state, sequence))
                    yield decision, state
                else:
                    yield decision, None

    def _session(self, session: bytes) -> SessionState | None:
        state = self.catalog.session(session)
        return None if state is None or state.last_version < self.floor else state

    def _identity(
        self, session: bytes, state: SessionState | None, sequence: int
    ) -> Verdict | None:
        if state is None:
            if not self.floor <= session_start(session) <= self.version:
                return Verdict.FORGOTTEN
            return None if sequence == 1 else Verdict.GAP
        if sequence <= state.last_sequence:
            return Verdict.DUPLICATE
        if sequence > state.last_sequence + 1:
            return Verdict.GAP
        return Verdict.FENCED if sequence in state.fences else None

    def _fenced(
        self, session: bytes, sequence: int, state: SessionState | None
    ) -> SessionState | None:
        """Return the session's state with a fence for `sequence`, or None where none is needed."""
        if state is None:
            if session_start(session) < self.floor:
                return None  # forgotten: its records are void already
            return SessionState(0, self.version, [sequence])
        if sequence <= state.last_sequence:
            return None
        return SessionState(state.last_sequence, self.version, sorted({*state.fences, sequence}))

    def _decide(self, record: Record) -> Decision:
        snapshot = record.snapshot
        self.version += 1
        if snapshot < self.floor:
            return self._abort(Verdict.BELOW_FLOOR, f"version {snapshot}")
        if snapshot >= self.version:
            return self._abort(Verdict.INVALID, f"snapshot {snapshot} is of the future")
        if record.names or record.prefixes or record.ranges:
            detail = self.conflict(record)
            if detail is not None:
                return self._abort(Verdict.CONFLICT, detail)
        effects: list[Effect] = []
        try:
            next_id = self._effects(record, effects)
        except _Refused as refused:
            return self._abort(refused.verdict, refused.detail)
        self.next_id = next_id
        note_effects(self.writes, self.version, effects)
        for effect in effects:
            if isinstance(effect, SetFloor):
                self.floor = effect.version
            elif isinstance(effect, SetCheckpoint):
                self.checkpoint = effect.version
            elif isinstance(effect, SetHorizon) and effect.horizon is not None:
                self.horizon = effect.horizon
        return Decision(Verdict.COMMITTED, self.version, "", effects, next_id)

    def _abort(self, verdict: Verdict, detail: str) -> Decision:
        return Decision(verdict, self.version, detail, [], self.next_id)

    def conflict(self, record: Record) -> str | None:
        """Return what the record read that was written after its snapshot, in words, or None."""
        return find_conflict(self.writes, record)

    def _effects(self, record: Record, effects: list[Effect]) -> int:
        """Append the record's effects; returns the next free object id; raises `_Refused`."""
        catalog = self.catalog
        next_id = self.next_id
        overlay: dict[str, Binding | None] = {}
        created: list[tuple[int, int]] = []
        gone: set[int] = set()
        floor, checkpoint, horizon = self.floor, self.checkpoint, self.horizon
        pins: dict[str, int] | None = None
        fenced: dict[bytes, SessionState] = {}
        restored = 0  # what is older than that is named again

        def binding(name: str) -> Binding | None:
            if not is_name(name):
                raise _Refused(Verdict.INVALID, "a name that cannot be one")
            return overlay[name] if name in overlay else catalog.binding(name)

        def target(object: int, offset: int, size: int) -> int:
            if object < 0:
                if -object > len(created):
                    raise _Refused(Verdict.NOT_FOUND, f"object {object}")
                id, limit = created[-object - 1]
            else:
                id, limit = object, catalog.memory_size(object)
            if limit is None or id in gone:
                raise _Refused(Verdict.NOT_FOUND, f"object {object}")
            if offset < 0 or offset + size > limit:
                raise _Refused(
                    Verdict.INVALID, f"bytes {offset} to {offset + size} of {limit} in object {id}"
                )
            return id

        def stored(payload: Payload, bound: bool = False) -> Payload:
            if not can_be_stored(payload):
                raise _Refused(Verdict.INVALID, "a reference that cannot be one")
            if isinstance(payload, Reference) and horizon.start:
                began = upload_version(payload.file)
                if not bound or began >= restored:
                    _check_upload(began, horizon)
            return payload

        for operation in record.operations:
            if isinstance(operation, Write):
                payload = stored(operation.payload)
                id = target(operation.object, operation.offset, payload_size(payload))
                effects.append(Store(id, operation.offset, payload))
            elif isinstance(operation, Put):
                name = operation.name
                old = binding(name)
                if old is not None and old.size >= 0:
                    raise _Refused(Verdict.EXISTS, f"memory {name!r}")
                # Of what is restored, values are known; memory was uploaded for this.
                payload = stored(operation.payload, bound=True)
                effects.append(Bind(name, next_id, payload, old.id if old else 0))
                overlay[name] = Binding(next_id, -1)
                next_id += 1
            elif isinstance(operation, FetchAdd):
                if NUMBER_BYTES.get(operation.dtype) != len(operation.delta):
                    detail = f"{len(operation.delta)} bytes for a number of type"
                    raise _Refused(Verdict.INVALID, f"{detail} {operation.dtype[:9]!r}")
                id = target(operation.object, operation.offset, len(operation.delta))
                effects.append(Add(id, operation.offset, operation.dtype, operation.delta))
            elif isinstance(operation, Delete):
                old = binding(operation.name)
                if old is None:
                    raise _Refused(Verdict.NOT_FOUND, f"{operation.name!r}")
                effects.append(Unbind(operation.name, old.id, old.size))
                overlay[operation.name] = None
                gone.add(old.id)
            elif isinstance(operation, Allocate):
                if binding(operation.name) is not None:
                    raise _Refused(Verdict.EXISTS, f"{operation.name!r}")
                if not 0 < operation.size <= MAX_MEMORY_BYTES:
                    raise _Refused(
                        Verdict.INVALID, f"{operation.size} bytes for {operation.name!r}"
                    )
                effects.append(
                    BindMemory(operation.name, next_id, operation.size, operation.header)
                )
                overlay[operation.name] = Binding(next_id, operation.size)
                created.append((next_id, operation.size))
                next_id += 1
            elif isinstance(operation, Floor):
                floor = max(floor, min(operation.version, self.version))
                effects.append(SetFloor(floor))
            elif isinstance(operation, Checkpoint):
                if not checkpoint < operation.version < self.version or not _is_key(operation.key):
                    raise _Refused(Verdict.INVALID, f"a checkpoint of version {operation.version}")
                if operation.previous not in (checkpoint, -1):
                    raise _Refused(
                        Verdict.CONFLICT, f"there is a checkpoint of version {checkpoint} by now"
                    )
                _check_upload(operation.began, horizon)
                checkpoint = operation.version
                effects.append(SetCheckpoint(operation.version, operation.key))
            elif isinstance(operation, (Pin, Unpin, Collect, Restore)):
                if pins is None:
                    pins = dict(catalog.pins())
                if isinstance(operation, Collect):
                    if not all(is_collected(key) for key in operation.dead):
                        raise _Refused(Verdict.INVALID, "an object that is not to be collected")
                    why = refusal(operation, checkpoint, horizon, pins.values(), self.version)
                    if why is not None:
                        raise _Refused(Verdict.CONFLICT, why)
                    voided = horizon.voided
                    if operation.start > horizon.start:
                        voided = self.version
                    horizon = msgspec.structs.replace(
                        horizon, kept=operation.kept, start=operation.start, voided=voided
                    )
                    effects.append(SetHorizon(horizon, operation))
                elif isinstance(operation, Restore):
                    horizon = self._restored(operation, horizon, pins)
                    restored = operation.version
                    effects.append(SetHorizon(horizon, None))
                else:
                    effects.append(self._pin(operation, pins, horizon))
            elif isinstance(operation, Retain):
                if operation.age_ns < 0 or operation.versions < 0:
                    raise _Refused(Verdict.INVALID, "less than nothing to keep")
                if operation.age_ns > horizon.age_ns or operation.versions > horizon.versions:
                    horizon = msgspec.structs.replace(horizon, restored=self.version)
                horizon = msgspec.structs.replace(
                    horizon, age_ns=operation.age_ns, versions=operation.versions
                )
                effects.append(SetHorizon(horizon, None))
            else:
                whole = len(operation.session) == SESSION_BYTES and 0 < operation.sequence < 1 << 63
                if not whole or session_start(operation.session) > self.version:
                    raise _Refused(Verdict.INVALID, "a fence for what cannot be a record")
                known = fenced.get(operation.session) or self._session(operation.session)
                state = self._fenced(operation.session, operation.sequence, known)
                effects.append(SetFence(operation.session, state))
                if state is not None:
                    fenced[operation.session] = state
        return next_id

    def _pin(self, operation: Pin | Unpin, pins: dict[str, int], horizon: Horizon) -> SetPin:
        """Return the effect; `pins` are the snapshots so far, and are changed."""
        name = operation.name
        if not is_name(name):
            raise _Refused(Verdict.INVALID, "a name that cannot be one")
        if isinstance(operation, Unpin):
            if pins.pop(name, None) is None:
                raise _Refused(Verdict.NOT_FOUND, f"snapshot {name!r}")
            return SetPin(name, -1)
        version = operation.version or self.version
        if name in pins and not (operation.lock and pins[name] == version):
            raise _Refused(Verdict.EXISTS, f"snapshot {name!r}")
        if not 0 < version <= self.version:
            raise _Refused(Verdict.INVALID, f"snapshot {name!r} of version {version}")
        _check_kept(version, horizon, pins)
        until_ns, lock = operation.locked_until_ns, operation.lock
        if not 0 <= until_ns < 1 << 63 or len(lock) > _MAX_LOCK_CHARACTERS:
            raise _Refused(Verdict.INVALID, f"the lock of snapshot {name!r}")
        pins[name] = version
        return SetPin(name, version, until_ns, lock)

    def _restored(self, operation: Restore, horizon: Horizon, pins: Mapping[str, int]) -> Horizon:
        if not 0 <= operation.version < self.version:
            raise _Refused(Verdict.INVALID, f"version {operation.version}")
        _check_kept(operation.version, horizon, pins)
        return msgspec.structs.replace(horizon, restored=self.version)


def _check_upload(began: int, horizon: Horizon) -> None:
    if began < horizon.start:
        detail = f"an upload that began at version {began}, before {horizon.start}: it is void"
        raise _Refused(Verdict.CONFLICT, detail)


def _check_kept(version: int, horizon: Horizon, pins: Mapping[str, int]) -> None:
    if not horizon.keeps(version, pins.values()):
        raise _Refused(
            Verdict.INVALID, f"version {version}, of those from {horizon.kept} on that are kept"
        )


def _is_key(key: str) -> bool:
    return 0 < len(key) <= _MAX_KEY_CHARACTERS


def _later(state: SessionState | None, sequence: int) -> list[int]:
    return [fence for fence in state.fences if fence > sequence] if state else []


class _Refused(Exception):
    """One operation cannot be applied, so the record aborts."""

    def __init__(self, verdict: Verdict, detail: str) -> None:
        self.verdict = verdict
        self.detail = detail
