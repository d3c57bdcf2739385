"""Replicas that break one rule each, for the simulation to find."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from everpool.log import Appended
from everpool.records import Record
from everpool.testing.memory_replica import Decided, Index, MemoryReplica, Step, add_numbers
from everpool.verdict import (
    Add,
    BindMemory,
    Decision,
    Effect,
    Judge,
    SessionState,
    Store,
    Unbind,
    Verdict,
    WritesDump,
)


def judged_by(judge: type[Judge]) -> type[MemoryReplica]:
    """Return a replica that asks another judge."""
    return type(f"{judge.__name__}Replica", (MemoryReplica,), {"judge_type": judge})


class _Identity(Judge):
    """Overlooks one of the reasons for which a record is void."""

    overlooked: Verdict

    def _identity(
        self, session: bytes, state: SessionState | None, sequence: int
    ) -> Verdict | None:
        verdict = super()._identity(session, state, sequence)
        return None if verdict is self.overlooked else verdict


class NoDuplicateCheck(_Identity):
    overlooked = Verdict.DUPLICATE


class NoGapCheck(_Identity):
    overlooked = Verdict.GAP


class FencesIgnored(_Identity):
    overlooked = Verdict.FENCED


class ForgottenSessionsAccepted(_Identity):
    """Takes a session that was forgotten for one that begins."""

    def _identity(
        self, session: bytes, state: SessionState | None, sequence: int
    ) -> Verdict | None:
        self.overlooked = Verdict.FORGOTTEN if sequence == 1 else Verdict.COMMITTED
        return super()._identity(session, state, sequence)


class SessionsKeptByWhoHasThem(Judge):
    """Judges by sessions below the floor, which some replicas have dropped and others not."""

    def _session(self, session: bytes) -> SessionState | None:
        return self.catalog.session(session)


class OneFenceARecord(Judge):
    """Works out each fence from the catalog, not from the fences before it in its record."""

    def _fenced(
        self, session: bytes, sequence: int, state: SessionState | None
    ) -> SessionState | None:
        return super()._fenced(session, sequence, self._session(session))


class FloorIgnored(Judge):
    """Judges snapshots below the floor by the writes it still knows."""

    def _decide(self, record: Record) -> Decision:
        reads = (record.names, record.prefixes, record.ranges)
        return super()._decide(Record(max(record.snapshot, self.floor), *reads, record.operations))


class FloorFollowsTheLastSteward(Judge):
    """Lets a second steward lower the floor again."""

    def _effects(self, record: Record, effects: list[Effect]) -> int:
        floor, self.floor = self.floor, 0
        try:
            return super()._effects(record, effects)
        finally:
            self.floor = floor


class AbortsNotCounted(Judge):
    def _abort(self, verdict: Verdict, detail: str) -> Decision:
        self.version -= 1
        return super()._abort(verdict, detail)


class _Reads(Judge):
    """Overlooks some of what a record read."""

    def _kept(self, record: Record) -> Record:
        raise NotImplementedError

    def conflict(self, record: Record) -> str | None:
        return super().conflict(self._kept(record))


class RangesIgnored(_Reads):
    def _kept(self, record: Record) -> Record:
        return Record(record.snapshot, record.names, record.prefixes, [], [])


class PrefixesIgnored(_Reads):
    def _kept(self, record: Record) -> Record:
        return Record(record.snapshot, record.names, [], record.ranges, [])


class NamesIgnored(_Reads):
    def _kept(self, record: Record) -> Record:
        return Record(record.snapshot, [], record.prefixes, record.ranges, [])


class RangesMissTheirLastByte(_Reads):
    def _kept(self, record: Record) -> Record:
        ranges = [(id, start, end - 1) for id, start, end in record.ranges]
        return Record(record.snapshot, record.names, record.prefixes, ranges, [])


class OnlyTheLastVersionLooked(_Reads):
    """Overlooks writes that came before the newest version: an old snapshot passes for a new."""

    def _kept(self, record: Record) -> Record:
        snapshot = max(record.snapshot, self.version - 2)
        return Record(snapshot, record.names, record.prefixes, record.ranges, [])


class DeletesNotNotedForReaders(Judge):
    """Notes that a deleted name is free, but not that the object's bytes are gone."""

    def _effects(self, record: Record, effects: list[Effect]) -> int:
        next_id = super()._effects(record, effects)
        for effect in effects:
            if isinstance(effect, Unbind):
                effect.size = min(effect.size, 0)
        return next_id


class VerdictByWhatIsLoaded(MemoryReplica):
    """Finds only objects that were allocated while this process ran."""

    class _Loaded(Index):
        def __init__(self, draft: Index, loaded: set[int]) -> None:
            vars(self).update(vars(draft))
            self._loaded = loaded

        def memory_size(self, id: int) -> int | None:
            return super().memory_size(id) if id in self._loaded else None

    def _catalog(self, draft: Index) -> Index:
        vars(self).setdefault("loaded", set())
        return self._Loaded(draft, self.loaded)

    def _index(
        self, draft: Index, decision: Decision, pending: dict[int, bytearray]
    ) -> tuple[bytes, ...]:
        self.loaded.update(e.id for e in decision.effects if isinstance(e, BindMemory))
        return super()._index(draft, decision, pending)


class ObjectsComparedByName(MemoryReplica):
    """Takes an id for whatever the name of that object is bound to now."""

    judge_type = DeletesNotNotedForReaders
    # Every simulation gives out the same ids, and writes a name here before it looks it up.
    names_had: ClassVar[dict[int, str]] = {}

    class _ByName(Index):
        def __init__(self, draft: Index) -> None:
            vars(self).update(vars(draft))

        def memory_size(self, id: int) -> int | None:
            return self.memory.get(_same_name(self, id))

    def _catalog(self, draft: Index) -> Index:
        return self._ByName(draft)

    def _index(
        self, draft: Index, decision: Decision, pending: dict[int, bytearray]
    ) -> tuple[bytes, ...]:
        for effect in decision.effects:
            if isinstance(effect, BindMemory):
                self.names_had[effect.id] = effect.name
            elif isinstance(effect, Store | Add) and effect.id not in pending:
                effect.id = _same_name(draft, effect.id)
        return super()._index(draft, decision, pending)


def _same_name(index: Index, id: int) -> int:
    row = index.names.get(ObjectsComparedByName.names_had.get(id, ""))
    return id if row is None or row.size < 0 else row.id


class WritesNotInTheCheckpoint(MemoryReplica):
    def _dump_writes(self, floor: int) -> WritesDump:
        return WritesDump(floor, [], [], [])


class SessionsNotInTheCheckpoint(MemoryReplica):
    @classmethod
    def from_checkpoint(cls, data: bytes, **options: object) -> MemoryReplica:
        replica = super().from_checkpoint(data, **options)  # type: ignore[arg-type]
        replica.disk.index.sessions.clear()
        return replica


class FencesNotInTheCheckpoint(MemoryReplica):
    @classmethod
    def from_checkpoint(cls, data: bytes, **options: object) -> MemoryReplica:
        replica = super().from_checkpoint(data, **options)  # type: ignore[arg-type]
        for state in replica.disk.index.sessions.values():
            state.fences.clear()
        return replica


class _Addition(Step):
    """A step of a tail that holds what to add, not what it leaves."""

    dtype: str


class RedoAddsAgain(MemoryReplica):
    def _index(
        self, draft: Index, decision: Decision, pending: dict[int, bytearray]
    ) -> tuple[bytes, ...]:
        known = len(draft.tail)
        results = super()._index(draft, decision, pending)
        made = [e for e in decision.effects if isinstance(e, Store | Add | BindMemory)]
        made += [e for e in decision.effects if isinstance(e, Unbind) and e.size >= 0]
        if len(made) == 1 and isinstance(made[0], Add):
            step = draft.tail[known]
            draft.tail[known] = _Addition(*step[:-1], made[0].delta)
            draft.tail[known].dtype = made[0].dtype
        return results

    def _do(self, step: Step) -> Iterator[str]:
        if isinstance(step, _Addition) and step.id in self.disk.memory:
            memory, end = self.disk.memory[step.id], step.offset + len(step.image)
            memory[step.offset : end] = add_numbers(
                bytes(memory[step.offset : end]), step.image, step.dtype
            )
        else:
            yield from super()._do(step)


class MemoryBeforeTheTail(MemoryReplica):
    """Touches memory before the after-images are stored."""

    def _store(
        self,
        draft: Index,
        pending: dict[int, bytearray],
        version: int,
        id: int,
        offset: int,
        image: bytes,
    ) -> None:
        super()._store(draft, pending, version, id, offset, image)
        if id in self.disk.memory:
            self.disk.memory[id][offset : offset + len(image)] = image


class NoRedo(MemoryReplica):
    """Believes that what counts has also been copied into memory."""

    def recover(self) -> Iterator[str]:
        self.disk.applied = self.version
        yield from ()


class TailCutBeforeTheFlush(MemoryReplica):
    """Drops after-images of memory that was never made durable."""

    def flush(self) -> None:
        self.disk.index.tail = []


class MarkTrustedAfterReboot(MemoryReplica):
    """Believes a mark of what was applied although the power was cut since."""

    def play(self, item: Appended, decided: list[Decided]) -> Iterator[str]:
        yield from super().play(item, decided)
        vars(self.disk)["mark"] = self.disk.applied

    def recover(self) -> Iterator[str]:
        self.disk.applied = max(self.disk.applied, vars(self.disk).get("mark", 0))
        yield from super().recover()
