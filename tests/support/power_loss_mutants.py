"""Pools with something missing, which a test of power loss must find out.

A mutant is made in the process that it is to work in, before any pool is opened there.
"""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable
from typing import Any

import lmdb

from everpool.commit import Committer
from everpool.embedded import Engine
from everpool.past import folder
from everpool.replica import bulk, dirty, flush, index, layout, ring, shared
from everpool.replica.batch import Batch
from everpool.replica.bulk import BulkFiles
from everpool.replica.dirty import Flushed
from everpool.replica.memories import MemoryFiles
from everpool.replica.ring import Ring
from everpool.replica.shared import SharedPage
from everpool.replica.writer import Writer
from everpool.verdict import Add, BindMemory, Store

Mutate = Callable[[], None]
MUTANTS: dict[str, Mutate] = {}
# Nothing is missing in these; the process dies in the middle of something.
ACCIDENTS: dict[str, Mutate] = {}


def mutant(mutate: Mutate) -> Mutate:
    MUTANTS[mutate.__name__] = mutate
    return mutate


def accident(mutate: Mutate) -> Mutate:
    ACCIDENTS[mutate.__name__] = mutate
    return mutate


def apply_mutant(name: str) -> None:
    """Make this process's everpool the mutant of that name; "" leaves it as it is."""
    if name:
        (MUTANTS | ACCIDENTS)[name]()


class _Os:
    """The module os for one module, with some functions replaced."""

    def __init__(self, **replaced: Any) -> None:
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def _nothing(*_: object) -> None:
    pass


# -- the workload's process -----------------------------------------------------------------------


@mutant
def no_fsync() -> None:
    """Nothing but the index is flushed."""
    os.fsync = _nothing


@mutant
def bulk_files_not_flushed() -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            os.fsync(descriptor)

    bulk.os = _Os(fsync=fsync)  # type: ignore[assignment]


@mutant
def folders_not_flushed() -> None:
    for module in (bulk, flush, layout):
        module.sync_folder = _nothing


@mutant
def staging_not_flushed() -> None:
    bulk.sync_folder = _nothing


@mutant
def past_values_not_flushed() -> None:
    folder.sync_folder = _nothing


@mutant
def replaced_values_removed_at_once() -> None:
    def removed(_: Any, row: Any) -> str:
        return row.reference().file if row is not None and row.kind == index.BULK else ""

    Batch._removed = removed  # type: ignore[method-assign]


@mutant
def folders_not_flushed_with_memory() -> None:
    flush.sync_folder = _nothing


@mutant
def memory_files_not_flushed() -> None:
    MemoryFiles.sync = _nothing  # type: ignore[method-assign]


@mutant
def sizes_of_unwritten_memory_not_flushed() -> None:
    """Only files that were written to are flushed, not those that were just made."""
    add = dirty.Dirty.add

    def add_written(self: dirty.Dirty, effect: Any) -> None:
        if not isinstance(effect, BindMemory):
            add(self, effect)

    dirty.Dirty.add = add_written  # type: ignore[method-assign]


@mutant
def ring_not_written() -> None:
    Ring.put = _nothing  # type: ignore[method-assign]


@mutant
def ring_of_one_slot() -> None:
    """The newest entry is written over the one before, of which the index may not know yet."""
    slots = Ring._slots
    Ring._slots = lambda self, position: slots(self, 0)  # type: ignore[method-assign]


@mutant
def index_not_flushed() -> None:
    really = lmdb.open

    def unsynced(*args: Any, **options: Any) -> lmdb.Environment:
        return really(*args, **{**options, "sync": False})

    index.lmdb.open = unsynced  # type: ignore[assignment]


@mutant
def large_entries_not_flushed() -> None:
    """The file of an entry that does not fit in the ring may be lost, or empty."""
    ring.os = _Os(fsync=_nothing)  # type: ignore[assignment]


@mutant
def memory_before_index() -> None:
    """Stores are copied into memory before their commit is durable."""
    commit_entry = Writer._commit

    def too_early(self: Writer, txn: lmdb.Transaction, batch: Batch, results: Any) -> None:
        for effect, resolved in batch.applied:
            if isinstance(effect, (Store, Add)):
                self._apply(effect, resolved)
        commit_entry(self, txn, batch, results)

    Writer._commit = too_early  # type: ignore[method-assign]


@mutant
def trimmed_before_flush() -> None:
    def reversed_flush(self: Committer) -> None:
        version, written = self.holding_lock(self._flusher.begin)
        self.holding_lock(lambda: self._flusher.commit(Flushed(version, {})))
        self._flusher.sync(version, written)

    Committer.flush = reversed_flush  # type: ignore[method-assign]


@mutant
def trimmed_by_unflushed_mark() -> None:
    """The commit that notes a flush also trims by it, though the note may be lost."""
    finish = Batch.finish

    def eager(self: Batch, row: Any) -> None:
        self._flushed = self.state.flushed
        finish(self, row)

    Batch.finish = eager  # type: ignore[method-assign]


@mutant
def marker_before_folders() -> None:
    """The marker of a new pool may survive without what it stands for."""
    sync_folder = layout.sync_folder

    def only_afterwards(folder: Any) -> None:
        if layout.is_pool(folder) or not (folder / "index").exists():
            sync_folder(folder)

    layout.sync_folder = only_afterwards


# -- faults are needed to tell these from the real one --------------------------------------------


@mutant
def failed_entry_stays_in_ring() -> None:
    """After a failed flush only the meta pages are written again."""

    mend = Ring.mend
    Ring.mend = lambda self, forget: mend(self, None)  # type: ignore[method-assign]


@mutant
def meta_pages_not_written_again() -> None:
    """After a failed flush only the entry is taken out of the ring."""

    def mend(self: Ring, forget: int | None) -> None:
        if forget is not None:
            os.pwrite(self._descriptor, bytes(32), self._offset(forget))
        ring.flush_data(self._descriptor)

    Ring.mend = mend  # type: ignore[method-assign]


@mutant
def nothing_mended() -> None:
    Ring.mend = _nothing  # type: ignore[method-assign]


@mutant
def memory_not_written_again() -> None:
    """After a failed flush of memory the next one is believed."""
    Writer.rewrite = _nothing  # type: ignore[method-assign]


@mutant
def dead_writers_index_not_mended() -> None:
    """A process that died when its flush had failed counts as one that died before it."""
    recover = Writer.recover
    mend = Ring.mend

    def recover_without(self: Writer) -> None:
        page = self._replica.shared
        if page.trusted() and not page.suspect:
            Ring.mend = _nothing  # type: ignore[method-assign]
        try:
            recover(self)
        finally:
            Ring.mend = mend  # type: ignore[method-assign]

    Writer.recover = recover_without  # type: ignore[method-assign]


@mutant
def ids_used_again() -> None:
    """The next record gets the id of one whose outcome is unknown."""
    commit_entry = Writer._commit

    def keeping(self: Writer, *args: Any) -> None:
        session = self._session
        try:
            commit_entry(self, *args)
        except BaseException:
            self._session = session
            raise

    Writer._commit = keeping  # type: ignore[method-assign]


@mutant
def failed_flush_kept_secret() -> None:
    """Other processes do not hear that a flush of memory failed."""
    secret: dict[int, bool] = {}

    def get(self: SharedPage) -> int:
        return int(secret.get(id(self), False))

    def put(self: SharedPage, value: int) -> None:
        secret[id(self)] = bool(value)

    SharedPage.unflushed = property(get, put)  # type: ignore[assignment, attr-defined]


# -- the process that opens the pool after the cut ------------------------------------------------


@mutant
def boot_ignored() -> None:
    """The shared page is believed though the machine has booted since."""
    SharedPage.trusted = lambda self: self._map[:8] == shared._MAGIC  # type: ignore[method-assign]


@mutant
def ring_not_played() -> None:
    Writer._replay = _nothing  # type: ignore[method-assign]


@mutant
def ring_adds_twice() -> None:
    """What the ring's entry added to is read from memory, which may have it already."""
    add = Batch._add

    def add_to_memory(self: Batch, version: int, effect: Any) -> Any:
        replayed, self.replayed = self.replayed, False
        try:
            return add(self, version, effect)
        finally:
            self.replayed = replayed

    Batch._add = add_to_memory  # type: ignore[method-assign]


@mutant
def tail_not_played() -> None:
    Writer._redo = _nothing  # type: ignore[method-assign]


@mutant
def swept_too_early() -> None:
    """Staged files are swept before the entries that name them are played."""
    recover = Writer.recover

    def too_early(self: Writer) -> None:
        self._replica.bulk.sweep()
        recover(self)

    Writer.recover = too_early  # type: ignore[method-assign]


@mutant
def swept_files_come_back() -> None:
    """Files that a failed commit made, and that were swept, are not swept again after a cut."""
    recover, sweep = Writer.recover, MemoryFiles.sweep

    def recover_without(self: Writer) -> None:
        skipped = [not self._replica.shared.trusted()]

        def sweep_later(files: MemoryFiles, is_garbage: Any) -> None:
            if not skipped.pop():
                sweep(files, is_garbage)
            skipped.append(False)

        MemoryFiles.sweep = sweep_later  # type: ignore[method-assign]
        recover(self)

    Writer.recover = recover_without  # type: ignore[method-assign]


@mutant
def nothing_swept() -> None:
    BulkFiles.sweep = _nothing  # type: ignore[method-assign]


@mutant
def trimmed_files_come_back() -> None:
    """Files that went with the tail's end are not removed again."""
    redo = Writer._redo

    def redo_effects(self: Writer, row: Any, applied: int) -> None:
        row.removed.clear()
        redo(self, row, applied)

    Writer._redo = redo_effects  # type: ignore[method-assign]


@mutant
def read_only_without_ring() -> None:
    """A read-only pool shows what the index has, without what only the ring has."""
    Engine._check_finished = _nothing  # type: ignore[method-assign]


@mutant
def trusted_before_replay() -> None:
    """The shared page counts before the ring was played, which may fail."""
    replay = Writer._replay

    def too_late(self: Writer) -> None:
        self._replica.shared.trust()
        replay(self)

    Writer._replay = too_late  # type: ignore[method-assign]


@mutant
def ring_written_while_played() -> None:
    """An entry that is played from the ring is written to it again, over its only copy."""
    commit_entry = Writer._commit

    def write_again(self: Writer, txn: lmdb.Transaction, batch: Batch, results: Any) -> None:
        if batch.replayed:
            self._replica.index.ring.put(batch.state.position - 1, batch.row)
        commit_entry(self, txn, batch, results)

    Writer._commit = write_again  # type: ignore[method-assign]


@mutant
def failed_replay_forgotten() -> None:
    """An entry of the ring is taken out of it when the flush of its replay fails."""
    commit_entry = Writer._commit

    def forgetting(self: Writer, txn: lmdb.Transaction, batch: Batch, results: Any) -> None:
        batch.replayed = False
        commit_entry(self, txn, batch, results)

    Writer._commit = forgetting  # type: ignore[method-assign]


# -- processes that die ---------------------------------------------------------------------------


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@accident
def dies_when_the_index_is_not_flushed() -> None:
    """It dies before it can tell anybody that the flush has failed."""

    def put(self: SharedPage, value: int) -> None:
        if value:
            _die()
        self._half_words[14] = value

    SharedPage.suspect = property(SharedPage.suspect.fget, put)  # type: ignore[assignment]


@accident
def dies_when_memory_is_not_flushed() -> None:
    sync = MemoryFiles.sync

    def fatal(self: MemoryFiles, id: int) -> None:
        try:
            sync(self, id)
        except OSError:
            _die()

    MemoryFiles.sync = fatal  # type: ignore[method-assign]
