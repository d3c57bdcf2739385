"""Playing the entries of a log elsewhere into the replica.

One process at a time does this, in one thread at a time. An entry goes these ways, and the process
may die after any line:

    judge the records; write the tail, the names and the state in one LMDB transaction
    started = version                        readers now look at the index after each copy
    commit the LMDB transaction              not flushed: a replica is of no use after a reboot
    copy stores into memory
    applied = version; wake those who wait

Whoever comes next plays the tail from `applied` on over memory; it holds the bytes that every
store and addition leaves, so playing twice does no harm.
"""

from collections import OrderedDict
from typing import NamedTuple

import lmdb

from everpool.errors import CorruptionError
from everpool.records import Entry, decode_entry
from everpool.replica.applier import Applier
from everpool.replica.batch import Batch, Result
from everpool.replica.index import ours, translate, translated
from everpool.replica.replica import Replica

_REMEMBERED_HASHES = 4096


class Played(NamedTuple):
    """What an entry came to."""

    entry: Entry
    results: list[Result]
    batch: Batch


class Player(Applier):
    """Plays one replica."""

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica)
        # The running hash by position, as far as it was played here.
        self._hashes: OrderedDict[int, bytes] = OrderedDict()
        # Version, and bytes of the tail.
        self.progress = (0, 0)
        # What is in the index and not wholly in memory, and its position.
        self._unfinished: tuple[int, Played] | None = None

    def recover(self) -> None:
        """Finish what a dead player left undone. Costs what was undone."""
        replica = self._replica
        shared = replica.shared
        with translated("finishing what a dead agent began"):
            replica.index.env.begin(write=True).abort()
            applied = shared.applied
            with replica.index.read() as txn:
                state = replica.index.state(txn)
                rows = list(replica.index.tail_after(txn, applied))
            for _, row in rows:
                self._redo(row, applied)
            shared.started = shared.applied = state.version
            shared.wake()
            self._hashes[state.position] = state.hash
            self.progress = (state.version, state.tail_bytes)

    def play(self, position: int, time_ns: int, data: bytes, flushed: int) -> Played:
        """Play the entry at `position`.

        Memory up to version `flushed` can be had without the tail. Raises `CorruptionError` when
        the entry is damaged or was written by a replica with another history, `InvalidError` when
        this version is too old for it, and `UnavailableError` when it should be tried again.
        Whatever it raises, an entry that is played again counts once.
        """
        entry = decode_entry(data)
        shared = self._replica.shared
        if shared.started != shared.applied:
            self.recover()
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None and unfinished[0] == position:
            return unfinished[1]
        try:
            txn = self._replica.index.env.begin(write=True, buffers=True)
        except lmdb.Error as error:
            raise translate(error, "playing the log") from error
        number = txn.id()
        known = self._known_before(number)
        try:
            batch = Batch(self._replica, txn, known)
            state = batch.state
            self._check(entry, position, state.position, state.hash)
            batch.trim_to(flushed)
            time_ns = max(state.time_ns, time_ns)
            row, results = self._decide(batch, entry, data, position, time_ns)
            batch.finish(row)
            shared.started = state.version
            txn.commit()
        except BaseException as error:
            self._judge = None
            txn.abort()
            shared.started = shared.applied
            if isinstance(error, (lmdb.Error, OSError)):
                raise ours(error, "playing the log") from error
            raise
        self._hashes[position] = state.hash
        if len(self._hashes) > _REMEMBERED_HASHES:
            self._hashes.popitem(last=False)
        played = Played(entry, results, batch)
        self._unfinished = position, played
        for effect, resolved in batch.applied:
            self._apply(effect, resolved)
        for file in batch.trimmed:
            self._replica.bulk.remove(file)
        self._unfinished = None
        shared.applied = state.version
        shared.wake()
        self._know(number, batch)
        self.progress = (state.version, state.tail_bytes)
        return played

    def knows(self, position: int, hash: bytes) -> bool:
        """Whether the log's running hash at `position` was that, as far as is remembered."""
        return self._hashes.get(position) == hash

    def _check(self, entry: Entry, position: int, last: int, running: bytes) -> None:
        """Raise `CorruptionError` when the entry's writer had played another log than this."""
        known = running if entry.base == last else self._hashes.get(entry.base)
        if entry.base >= position or (known is not None and known != entry.base_hash):
            raise CorruptionError(
                f"the entry at position {position} was written on another history: at position "
                f"{entry.base} its writer's log had the running hash {entry.base_hash.hex()}, "
                f"this one {known.hex() if known else 'none yet'}",
                position=position,
                base=entry.base,
            )


