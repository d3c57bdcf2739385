"""What every kind of replica does with an entry: judge it, and copy what it did into memory."""


from everpool.records import Entry, Payload, Record, RecordId, Reference, next_hash
from everpool.replica.batch import Batch, Known, Result
from everpool.replica.effects import effects_of, entry_of
from everpool.replica.index import RecordOutcome, Resolved, TailRow
from everpool.replica.replica import Replica, load_writes
from everpool.verdict import Add, Bind, BindMemory, Effect, Judge, Store, Unbind, Writes

_UNTRIMMED_VERSIONS = 1 << 15


class Applier:
    """Judges entries in the order of the log, and applies what they did."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._judge: Judge | None = None
        self._known: Known | None = None

    def _decide(
        self, batch: Batch, entry: Entry, data: bytes, position: int, time_ns: int
    ) -> tuple[TailRow, list[Result]]:
        """Judge the entry's records and change the batch's rows; returns the row for the tail."""
        state = batch.state
        first_version = state.version + 1
        batch.time_ns = time_ns
        judge = self._judge_for(batch, entry.records)
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
        state.position = position
        state.hash = next_hash(state.hash, data)
        state.time_ns = time_ns
        return TailRow(first_version, time_ns, outcomes, data, batch.garbage), results

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
        judge.checkpoint, judge.horizon = state.checkpoint, state.horizon
        self._judge = judge
        return judge

    def _know(self, number: int, batch: Batch) -> None:
        """Remember what the commit with LMDB's number `number` left."""
        self._known = batch.known(number)

    def _known_before(self, number: int) -> Known | None:
        """Return what the last commit left, if no other process committed before `number`."""
        known, self._known = self._known, None
        return known if known is not None and known.number == number - 1 else None

    def _data(self, payload: Payload) -> bytes | memoryview:
        return payload if isinstance(payload, bytes) else self._replica.bulk.map(payload)

    def _redo(self, row: TailRow, applied: int) -> None:
        for version, effect, resolved in effects_of(entry_of(row), row):
            if version <= applied:
                continue
            memories = self._replica.stores
            if isinstance(effect, BindMemory):
                memories.create(resolved.id, effect.size)
            # Memory that a later record deleted, and that was deleted already, needs no stores.
            if not isinstance(effect, (Store, Add)) or memories.exists(resolved.id):
                self._apply(effect, resolved)
        for file in row.removed:
            self._replica.bulk.remove(file)

    def _apply(self, effect: Effect, resolved: Resolved) -> None:
        replica = self._replica
        if isinstance(effect, Store):
            payload = effect.payload
            if isinstance(payload, bytes):
                replica.stores.write(effect.id, effect.offset, payload)
            else:
                if replica.stores.exists(effect.id):
                    replica.stores.write(effect.id, effect.offset, replica.bulk.map(payload))
                replica.bulk.publish(payload)
        elif isinstance(effect, Add):
            replica.stores.write(effect.id, effect.offset, resolved.new)
        elif isinstance(effect, Bind):
            if isinstance(effect.payload, Reference):
                replica.bulk.publish(effect.payload)
            if resolved.name:
                replica.bulk.remove(resolved.name)
        elif isinstance(effect, Unbind):
            if effect.size >= 0:
                replica.stores.remove(effect.id)
            elif resolved.name:
                replica.bulk.remove(resolved.name)
