"""The engine of a pool at a path: one replica and one committer for each process.

A process that opens a pool twice shares them: LMDB and record locks allow one of each a process.
After a fork the child makes its own; the parent's are left alone there, neither used nor closed.
"""

import atexit
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from everpool.commit import Committer, Submission, reset_after_fork
from everpool.errors import CorruptionError, InvalidError, UnavailableError
from everpool.interrupts import deferred
from everpool.records import Fence, Record, RecordId, session_start
from everpool.replica import layout
from everpool.replica.bulk import Staged
from everpool.replica.effects import entry_of
from everpool.replica.index import translated
from everpool.replica.replica import Replica, unfinished
from everpool.replica.verify import walk_index
from everpool.values import Encoded
from everpool.verdict import Verdict

# Larger values go to files of their own.
INLINE_BYTES = 64 << 10
DEFAULT_TIMEOUT_S = 30.0
_SETTLE_S = 0.05


class Engine:
    """What all pools that one process has open at one path share."""

    def __init__(self, folder: Path, id: bytes, *, read_only: bool, timeout_s: float) -> None:
        self.folder = folder
        self.read_only = read_only
        self.timeout_s = timeout_s
        self.users = 0
        self.generation: int = generation
        self.replica = Replica(folder, read_only=read_only)
        self.committer = None if read_only else Committer(self.replica, timeout_s)
        try:
            self._check_complete()
            if self.replica.state().pool != id:
                raise CorruptionError(
                    f"the index of {folder} is not of the pool that {layout.MARKER} names: "
                    "restore both from one copy"
                )
            self._recover()
        except BaseException:
            self.replica.close()
            raise

    def _check_complete(self) -> None:
        index = self.replica.index
        if index.missing_bytes:
            # Pages at the end may never have been written; only a walk can tell.
            damage = walk_index(self.folder)
            if damage:
                raise CorruptionError(
                    f"the index of {self.folder} is {index.missing_bytes} bytes short: "
                    f"{damage[0]}: restore the pool from a copy"
                )

    def _recover(self) -> None:
        if self.committer is None:
            self._check_finished()
            return
        shared = self.replica.shared
        if not self.replica.trusted:
            self.committer.recover(wait=True)
        elif shared.settled() != self.replica.state().version or self.replica.bulk.staged():
            self.committer.recover(wait=False)

    def _check_finished(self) -> None:
        """Refuse to read what lacks its newest commit; only a writer can add that."""
        if not self.replica.trusted and self.replica.index.unplayed() is not None:
            raise unfinished(self.folder)

    def is_ours(self) -> bool:
        """Whether this process opened the engine, and did not inherit it by a fork."""
        return self.generation == generation

    def write(self, record: Record, staged: list[Staged]) -> Submission:
        """Commit a record and wait for its outcome."""
        submission = Submission(record, staged)
        self._committer().commit(submission)
        return submission

    def pipeline(self, record: Record, staged: list[Staged]) -> Submission:
        """Queue a record and return at once."""
        submission = Submission(record, staged)
        self._committer().enqueue(submission)
        return submission

    def stage(self, encoded: Encoded) -> Staged:
        """Store a large value durably, for a record to name."""
        with translated("storing a large value"):
            return self.replica.bulk.stage(encoded.buffers(), encoded.size)

    def stage_bytes(self, data: memoryview) -> Staged:
        """Store a large piece of memory durably, for a record to name."""
        with translated("storing a large write"):
            return self.replica.bulk.stage([data], len(data))

    def settle(self) -> None:
        """Bring mapped memory up to the index, finishing for a dead writer if need be."""
        replica = self.replica
        if replica.shared.settled() >= 0 and replica.trusted:
            return
        deadline = time.monotonic() + self.timeout_s
        while True:
            if self.committer is not None:
                self.committer.recover(wait=False)  # its writer may be dead
            try:
                replica.settle(_SETTLE_S)
                return
            except UnavailableError:
                if time.monotonic() >= deadline:
                    raise

    def flush(self) -> None:
        """Make memory durable in its own files and trim the tail."""
        self._committer().flush()

    def outcome(self, id: RecordId) -> "tuple[str, int | None, list[bytes]]":
        """Settle what became of a record: its state, version and results."""
        if self.committer is not None and self.replica.shared.suspect:
            self.committer.recover(wait=True)  # else a power cut might take back what is told
        found = self._decided(id)
        if found is None and self.read_only:
            raise InvalidError(
                f"{id} is not decided yet, and a pool that is open read-only cannot settle it: "
                "open it for writing"
            )
        if found is None:
            state = self.replica.state()
            fence = Record(state.version, [], [], [], [Fence(id.session, id.sequence)])
            self.write(fence, []).version()
            found = self._decided(id)
        if found is not None:
            return found
        with self.replica.index.read() as txn:
            known = self.replica.index.session(txn, id.session)
            floor = self.replica.index.state(txn).floor
        if known is None or known.last_version < floor:
            return ("expired" if session_start(id.session) < floor else "aborted"), None, []
        return ("expired" if id.sequence <= known.last_sequence else "aborted"), None, []

    def _decided(self, id: RecordId) -> "tuple[str, int | None, list[bytes]] | None":
        index = self.replica.index
        with index.read() as txn:
            for _, row in index.tail_backwards(txn):
                entry = entry_of(row)
                at = id.sequence - entry.first_sequence
                if entry.session != id.session or not 0 <= at < len(entry.records):
                    continue
                outcome = row.outcomes[at]
                if outcome.verdict == Verdict.COMMITTED:
                    old = [resolved.old for resolved in outcome.resolved if resolved.old]
                    return "committed", row.first_version + at, old
                return "aborted", None, []
        return None

    def stats(self) -> dict[str, Any]:
        """Return facts about the pool and this process's replica of it."""
        replica = self.replica
        state = replica.state()
        environment = replica.index.env
        applied = replica.shared.applied if replica.trusted else state.flushed
        return {
            "kind": "embedded",
            "path": str(self.folder),
            "id": str(uuid.UUID(bytes=state.pool)),
            "format": state.format,
            "version": state.version,
            "names": state.names,
            "versions_behind": 0,
            "seconds_behind": 0.0,
            "memory_behind_index": max(0, state.version - applied),
            "floor": state.floor,
            "flushed": state.flushed,
            "tail_bytes": state.tail_bytes,
            "index_bytes": replica.index.path.stat().st_size,
            "readers": environment.info()["num_readers"],
            "read_only": self.read_only,
        }

    def close(self) -> None:
        """Commit what is queued and close everything that can be closed."""
        if self.committer is not None:
            self.committer.close()
        self.replica.close()

    def _committer(self) -> Committer:
        if self.committer is None:
            raise InvalidError(f"the pool {self.folder} is open read-only: open it for writing")
        return self.committer


# Counts forks: an engine of an older generation belongs to the parent process.
generation: int = 0
_engines: dict[tuple[int, int, bool], Engine] = {}
_mutex = threading.Lock()
# Held while a pool that was inherited opens itself again.
switching = threading.Lock()
# A forked child keeps its parent's engines here: freeing them would close the parent's files.
_inherited: list[Engine] = []


def acquire(folder: Path, *, create: bool, read_only: bool, timeout_s: float) -> Engine:
    """Return this process's engine for the pool in `folder`; pair it with `release`."""
    with deferred(), _mutex:
        if create and not read_only and not layout.is_pool(folder):
            layout.create_pool(folder, timeout_s)
        marker = layout.read_marker(folder)
        layout.check_place(folder)
        with translated(f"opening {folder}"):
            status = os.stat(folder)
        for mode in (read_only, False):
            engine = _engines.get((status.st_dev, status.st_ino, mode))
            if engine is not None:
                engine.users += 1
                return engine
        if (status.st_dev, status.st_ino, True) in _engines:
            raise InvalidError(
                f"this process has {folder} open read-only: close that first, or open it for "
                "writing from the start"
            )
        if not read_only:
            layout.check_folders(folder)
        engine = Engine(folder, marker.id(), read_only=read_only, timeout_s=timeout_s)
        engine.users = 1
        _engines[status.st_dev, status.st_ino, read_only] = engine
        return engine


def release(engine: Engine) -> None:
    """Give the engine back; the last user closes it."""
    with deferred(), _mutex:
        if engine.generation != generation:
            return
        engine.users -= 1
        if engine.users:
            return
        for key, known in list(_engines.items()):
            if known is engine:
                del _engines[key]
        engine.close()


def _after_fork_in_child() -> None:
    global _mutex, switching, generation
    _mutex = threading.Lock()
    switching = threading.Lock()
    generation += 1
    reset_after_fork()
    for engine in _engines.values():
        _inherited.append(engine)
        if engine.committer is not None:
            for submission in engine.committer.pending():
                submission.abandon()
    _engines.clear()


def _drain_at_exit() -> None:
    """Wait for what was pipelined: its thread would end with the interpreter."""
    for engine in list(_engines.values()):
        if engine.committer is not None:
            engine.committer.drain()


atexit.register(_drain_at_exit)
os.register_at_fork(after_in_child=_after_fork_in_child)
