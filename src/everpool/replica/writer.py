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

import lmdb

from everpool.errors import CommitUnknownError, EverpoolError
from everpool.records import Entry, Record, encode_entry, new_session
from everpool.replica.applier import Applier
from everpool.replica.batch import Batch, Known, Result
from everpool.replica.dirty import BLOCK_SHIFT, Dirty, Flushed, Written
from everpool.replica.effects import effects_of, entry_of, overlay
from everpool.replica.index import TailRow, ours, translate, translated
from everpool.replica.replica import Replica
from everpool.verdict import Add, Store


class Writer(Applier):
    """The one who changes a replica. Call its methods with the writer's lock held."""

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica)
        self._session = b""
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
                replica.stores.sweep(lambda id: replica.memory_row(id) is None)
                # Not before: under a page that is trusted nobody looks into the ring any more.
                shared.trust()
                replica.trusted = True
            shared.wake()
            next_id = replica.state().next_id
            replica.stores.sweep(lambda id: id >= next_id)
            replica.bulk.sweep()

    def _replay(self) -> None:
        """Commit the entries of the ring that the index lacks: they may be acknowledged."""
        while row := self._replica.index.unplayed():
            self._append(entry_of(row).records, None, row)

    def settle(self) -> None:
        """See to it that memory has all that the index has, and that all of it is durable."""
        shared = self._replica.shared
        if shared.suspect or shared.started != shared.applied:
            self.recover()

    def take_written(self) -> "tuple[int, Written]":
        """Return the version, with all of it applied, and what is known to be written up to it."""
        self.settle()
        version = self._replica.shared.applied
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
                final = bytearray(replica.stores.read(id, start, size))
                for offset, data in by_block[block]:
                    overlay(final, start, offset, data)
                replica.stores.write(id, start, final)

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
        known = self._known_before(number)
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
        self._know(number, batch)
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
        row, results = self._decide(batch, entry, data, state.position + 1, now_ns)
        if flushed is not None:
            self._note_flushed(batch, flushed, first_version)
        batch.finish(row)
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
