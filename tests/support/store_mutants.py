"""What keeps objects in a store, with one rule broken each, for the simulation to find."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import ClassVar
from unittest import mock

import msgspec

from everpool import verdict
from everpool.collection import Horizon, Unneeded, refusal, unneeded
from everpool.errors import (
    CommitUnknownError,
    ConflictError,
    EverpoolError,
    InvalidError,
    NotFoundError,
)
from everpool.log import Appended, End
from everpool.records import Checkpoint, Collect, Record, Restore, Retain
from everpool.segments.format import Past
from everpool.store import Listed
from everpool.store.memory import MemoryStore
from everpool.testing import memory_replica
from everpool.testing.memory_replica import Index, MemoryReplica
from everpool.testing.simulation.store import Parts
from everpool.testing.simulation.store.collector import Collector, Look
from everpool.testing.simulation.store.segments import Place
from everpool.testing.simulation.store.steward import Steward
from everpool.testing.simulation.store.world import (
    SteppedLog,
    Steps,
    World,
    patiently,
)
from everpool.verdict import Decision, Effect, Judge
from support.mutants import judged_by

# The rule by which records are judged


class _Patched(Judge):
    """Judges with something else in the place of a function of `everpool.verdict`."""

    patches: ClassVar[dict[str, Callable[..., object]]]

    def _effects(self, record: Record, effects: list[Effect]) -> int:
        with mock.patch.multiple(verdict, **self.patches):
            return super()._effects(record, effects)


class AnyCheckpointBefore(Judge):
    """Does not ask which checkpoint another one builds on."""

    def _effects(self, record: Record, effects: list[Effect]) -> int:
        operations = [
            msgspec.structs.replace(one, previous=-1) if isinstance(one, Checkpoint) else one
            for one in record.operations
        ]
        return super()._effects(msgspec.structs.replace(record, operations=operations), effects)


class LateUploadsAccepted(_Patched):
    patches: ClassVar = {"_check_upload": lambda began, horizon: None}


class RestoresMayNameAnything(Judge):
    """Takes what a restore has uploaded for what it brings back."""

    def _effects(self, record: Record, effects: list[Effect]) -> int:
        if not any(isinstance(one, Restore) for one in record.operations):
            return super()._effects(record, effects)
        with mock.patch.object(verdict, "_check_upload", lambda *_: None):
            return super()._effects(record, effects)


def _refusal_without(
    **changes: object,
) -> Callable[[Collect, int, Horizon, Iterable[int], int], str | None]:
    def changed(
        record: Collect, checkpoint: int, horizon: Horizon, pins: Iterable[int], now: int
    ) -> str | None:
        if "restored" in changes:
            horizon = msgspec.structs.replace(horizon, restored=0)
        if "dead" in changes:
            record = msgspec.structs.replace(record, dead=[])
        return refusal(record, checkpoint, horizon, () if "pins" in changes else pins, now)

    return changed


class RestoredNotChecked(_Patched):
    patches: ClassVar = {"refusal": _refusal_without(restored=True)}


class PinsNotChecked(_Patched):
    patches: ClassVar = {"refusal": _refusal_without(pins=True)}


class _NamedMayBeDead(_Patched):
    patches: ClassVar = {"refusal": _refusal_without(dead=True)}


class MoreToKeepNotChecked(Judge):
    """Lets a collection go on that was planned when less was to be kept."""

    def _effects(self, record: Record, effects: list[Effect]) -> int:
        if any(isinstance(one, Retain) for one in record.operations):
            before = self.horizon
            self.horizon = msgspec.structs.replace(before, age_ns=1 << 62, versions=1 << 62)
            try:
                return super()._effects(record, effects)
            finally:
                self.horizon = before
        return super()._effects(record, effects)


# What a replica remembers


class RevivedStaysDead(MemoryReplica):
    """Does not strike a value off the dead ones when it is named again."""

    def _index(
        self, draft: Index, decision: Decision, pending: dict[int, bytearray]
    ) -> tuple[bytes, ...]:
        with mock.patch.object(memory_replica, "_revive", lambda draft, payload: None):
            return super()._index(draft, decision, pending)


# Stewards


class PlacesOfSnapshotsDropped(Steward):
    def places(self, past: list[Past], pins: list[int], kept: int) -> list[Past]:
        return super().places(past, [], kept)


class CheckpointMixesVersions(Steward):
    """Gathers pages while others commit, and does not fold in what they change meanwhile."""

    def last(self, pages: dict[Place, tuple[int, bytes]]) -> list[Place]:
        return [place for place in self.left(pages) if place not in pages]


# Collectors


class DeadBeforeVoid(Collector):
    """Calls dead what a record may still name."""

    def voids(self, look: Look) -> bool:
        return False

    def sort_out(self, listed: Iterable[tuple[str, int]], look: Look) -> Unneeded:
        return unneeded(listed, look.live, look.dead_before, look.plan.start, look.plan)


class DeletesBeforeTheRecord(Collector):
    """Deletes what the record would let go of, and then commits it."""

    def decide(self, look: Look, dead: list[str]) -> Generator[int, None, list[str] | None]:
        gone = self.sort_out([], look).gone
        yield from self.delete(sorted(gone))
        return (yield from super().decide(look, dead))


class DeletesByClock(Collector):
    """Deletes what is not named and has been there for a while."""

    def collect(self) -> Steps:
        look = self.look()
        if look is None or look.plan.islands:
            return
        self.begin_at(look)
        old_ns = self.world.now_ns() - 1_500_000_000
        for folder in ("values", "pages"):
            found = yield from patiently(
                self.world, lambda folder=folder: list(self.store.list_stale(folder))
            )
            old = [one.key for one in found if one.modified_ns < old_ns]
            yield from self.delete([key for key in old if key not in look.live])


class DecidesByAnOldLook(Collector):
    """Says that it has looked at the newest state, when it has looked at an older one."""

    def decide(self, look: Look, dead: list[str]) -> Generator[int, None, list[str] | None]:
        index = self.host.replica.disk.index
        look = look._replace(version=index.version)
        return (yield from super().decide(look, dead))


class LogOfSnapshotsDropped(Collector):
    """Keeps only the log that the newest versions need."""

    def spans(self, look: Look) -> list[tuple[int, int]]:
        return super().spans(look._replace(plan=look.plan._replace(islands=[])))


class NeverTrims(Steward):
    """Dies, whenever it should trim the log: this must be harmless."""

    def trim(self, position: int, manifest: str) -> None:
        pass


class NewHostsBeginWithWhatGoes(Collector):
    """Does not trim the log up to the newest checkpoint, when stewards did not."""

    def begin_at(self, look: Look) -> None:
        pass


# Logs


class LostAnswerIsAFailure(SteppedLog):
    """Says that nothing was appended when an answer is lost."""

    def _swap(self, data: bytes, known: object) -> str:
        try:
            return super()._swap(data, known)  # type: ignore[arg-type]
        except CommitUnknownError as error:
            raise InvalidError(error.message) from error


class LostAnswerIsASuccess(SteppedLog):
    """Takes a swap for done when its answer is lost, and does not read back."""

    def _swap(self, data: bytes, known: object) -> str:
        try:
            return super()._swap(data, known)  # type: ignore[arg-type]
        except CommitUnknownError:
            return "perhaps"


class NumberedSlots:
    """A log of an object for each position, put where there is none: trimming frees slots.

    What is trimmed goes into an archive before.
    """

    def __init__(self, world: World, store: MemoryStore) -> None:
        self._world = world
        self._store = store

    def _slots(self) -> list[tuple[int, str]]:
        found = [listed.key for listed in self._store.list("log/slots")]
        return [(int(key.rpartition("/")[2]), key) for key in found]

    def _note(self) -> tuple[int, bytes, str | None]:
        try:
            found = self._store.get("log/note")
        except NotFoundError:
            return 0, b"", None
        position, _, note = found.data.partition(b" ")
        return int(position), note, found.e_tag

    def append(self, entry: bytes, expected: int | None = None) -> int:
        position = self.end().position + 1
        stamp = self._world.now_ns().to_bytes(8, "big")
        while True:
            try:
                self._store.swap(f"log/slots/{position:020d}", stamp + entry, None)
                return position
            except ConflictError:
                position += 1
            except CommitUnknownError:
                for _ in range(20):
                    try:
                        held = self._store.get(f"log/slots/{position:020d}").data
                    except EverpoolError:
                        continue
                    if held == stamp + entry:
                        return position
                    break
                raise

    def read(self, after: int, limit_bytes: int = 1 << 20) -> list[Appended]:
        trimmed = self._note()[0]
        if after < trimmed:
            raise NotFoundError(f"trimmed up to {trimmed}")
        return list(self.history(after))

    def history(self, after: int, last: int | None = None) -> Iterator[Appended]:
        old = [(int(one.key[-20:]), one.key) for one in self._store.list("log/archive")]
        for position, key in sorted({**dict(self._slots()), **dict(old)}.items()):
            if after < position and (last is None or position <= last):
                data = self._store.get(key).data
                yield Appended(position, int.from_bytes(data[:8], "big"), data[8:])

    def end(self) -> End:
        trimmed, note, _ = self._note()
        slots = self._slots()
        return End(max(trimmed, slots[-1][0] if slots else 0), trimmed, note)

    def trim(self, position: int, start: bytes) -> None:
        trimmed, _, e_tag = self._note()
        if position < trimmed:
            return
        old = [(at, key) for at, key in self._slots() if at <= position]
        for at, key in old:
            self._store.put(f"log/archive/{at:020d}", self._store.get(key).data)
        self._store.swap("log/note", b"%d " % position + start, e_tag)
        self._store.delete([key for _, key in old])

    def wait(self, after: int, timeout_s: float) -> bool:
        return self.end().position > after

    def garbage(self, kept: Sequence[tuple[int, int]]) -> Iterator[Listed]:
        for listed in self._store.list("log/archive"):
            position = int(listed.key[-20:])
            if not any(first < position <= last for first, last in kept):
                yield listed

    def close(self) -> None:
        pass


def parts_of(mutant: type) -> Parts:
    """Return what is simulated, with a mutant in its place."""
    if mutant is DeadBeforeVoid:
        return Parts(replica=judged_by(_NamedMayBeDead), collector=DeadBeforeVoid)
    if mutant is NewHostsBeginWithWhatGoes:
        return Parts(steward=NeverTrims, collector=mutant)
    if issubclass(mutant, Judge):
        return Parts(replica=judged_by(mutant))
    if issubclass(mutant, MemoryReplica):
        return Parts(replica=mutant)
    if issubclass(mutant, Steward):
        return Parts(steward=mutant)
    if issubclass(mutant, Collector):
        return Parts(collector=mutant)
    return Parts(log=mutant)
