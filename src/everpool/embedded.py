"""The engine of a pool at a path: one replica and one committer for each process.

A process that opens a pool twice shares them: LMDB and record locks allow one of each a process.
After a fork the child makes its own; the parent's are left alone there, neither used nor closed.
"""

import atexit
import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everpool import forks
from everpool.commit import Committer, Submission, reset_after_fork
from everpool.errors import CorruptionError, InvalidError, UnavailableError
from everpool.interrupts import deferred
from everpool.records import Fence, Record, RecordId, Reference
from everpool.replica import layout
from everpool.replica.bulk import Staged
from everpool.replica.index import translated
from everpool.replica.outcomes import decided, forgotten
from everpool.replica.replica import Replica, unfinished
from everpool.replica.verify import Report, verify_folder, walk_index
from everpool.values import Encoded

if TYPE_CHECKING:
    from everpool.agent.past import PastEngine
    from everpool.past.folder import PastFolder
    from everpool.past.keeper import Keeper

_SETTLE_S = 0.05


class Engine:
    """What all pools that one process has open at one path share."""

    def __init__(self, folder: Path, id: bytes, *, read_only: bool, timeout_s: float) -> None:
        self.folder = folder
        self.read_only = read_only
        self.timeout_s = timeout_s
        self.users = 0
        self.lineage = b""
        self.generation = forks.generation
        self.replica = Replica(folder, read_only=read_only)
        self.committer = None if read_only else Committer(self.replica, timeout_s)
        self._mutex = threading.Lock()
        self._kept_by: Keeper | None = None
        if self.committer is not None:
            self.committer.before_flush = self._checkpoint_quietly
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
        return self.generation == forks.generation

    def release(self) -> None:
        """Give the engine back; its last user closes it."""
        release(self)

    def reopener(self, read_only: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return what opens the pool in another process, for pickling."""
        from everpool.opening import reopen

        return reopen, (os.fspath(self.folder), read_only, self.timeout_s, None)

    def drain(self) -> None:
        """Return when everything that was submitted before has an outcome."""
        if self.committer is not None:
            self.committer.drain()

    def sync(self) -> int:
        """Wait for what was submitted; returns the version, of everything committed before."""
        self.drain()
        self.settle()
        return self.replica.version()

    def verify(self, progress: Callable[[int, int], None] | None) -> Report:
        """Compare everything with its checksums, in a process of its own."""
        if not self.read_only:
            self.flush()
        return verify_folder(self.folder, progress)

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
        index = self.replica.index
        found = decided(index, [id]).get(id)
        if found is None and self.read_only:
            raise InvalidError(
                f"{id} is not decided yet, and a pool that is open read-only cannot settle it: "
                "open it for writing"
            )
        if found is None:
            fence = Record(self.replica.state().version, [], [], [], [Fence(*id)])
            self.write(fence, []).version()
            found = decided(index, [id]).get(id)
        return forgotten(index, id) if found is None else found

    # The past. Its modules are loaded when they are first wanted.

    def begin_past(self, version: int | None = None) -> None:
        """Keep a past from now on, which begins with a checkpoint of all there is.

        Raises `InvalidError` when `version` is of before the past began.
        """
        from everpool.past.looking import PathHistory

        folder = self._past()
        with contextlib.closing(folder.open()) as store:
            if not folder.is_of_use(store, self.replica.state().manifest):
                self.checkpoint()
            if version is not None:
                history = PathHistory(folder, self.replica, store)
                try:
                    history.before(version)
                finally:
                    history.close()

    def again(self, reference: Reference) -> tuple[Reference, list[Staged]]:
        """Return what a record names to bind a large value of the past, and what was stored."""
        with translated("storing a value again"):
            staged = self.replica.bulk.stage_again(reference)
        return staged.reference, [staged]

    def past(self, version: int) -> "Callable[[bool], PastEngine]":
        """Return what opens the pool as it was at a version."""
        from everpool.opening import reopen_past
        from everpool.past.looking import open_at

        def open_past(create: bool) -> "PastEngine":
            if self.is_ours():
                return open_at(self._past(), self.replica, version, self.timeout_s, reopen_past)
            # In a forked child, which must not use what its parent has open.
            engine = acquire(
                self.folder, create=False, read_only=self.read_only, timeout_s=self.timeout_s
            )
            try:
                return engine.past(version)(create)
            finally:
                engine.release()

        self.sync()
        return open_past

    def version_at(self, time_ns: int) -> int:
        """Return the newest version that is not younger than a time."""
        from everpool.past.looking import PathHistory

        self.sync()
        with contextlib.closing(self._past().open()) as store:
            history = PathHistory(self._past(), self.replica, store)
            try:
                return history.version_at(time_ns)
            finally:
                history.close()

    def branch(self, url: str, version: int) -> None:
        """Make a pool at a URL that begins as this was at a version. It shares nothing with it."""
        from everpool.past.sending import branch

        branch(self._keeper(), self.past(version)(False), url)

    def backup(self, url: str, progress: Callable[[int, int], None] | None) -> int:
        """Make a checkpoint, and have a pool at the URL begin with it; returns its version."""
        from everpool.past.sending import back_up

        return back_up(self._keeper(), lambda version: self.past(version)(False), url, progress)

    def lock(self, name: str, period_s: float | None) -> None:
        """Refuse: only a bucket can lock."""
        raise InvalidError(
            "a pool at a path cannot be locked, for its owner can always delete it: copy it to a "
            "bucket with object lock (`everpool copy POOL s3://...`), and lock it there"
        )

    def checkpoint(self) -> int:
        """Make a checkpoint now, which begins the past when there is none; returns its version."""
        version = self._keeper().checkpoint()
        if version:  # else there is nothing yet
            self.flush()
        return version

    def _past(self) -> "PastFolder":
        from everpool.past.folder import PastFolder

        return PastFolder(self.folder, self.replica.bulk)

    def _keeper(self) -> "Keeper":
        from everpool.past.keeper import Keeper

        committer = self._committer()
        with self._mutex:
            if self._kept_by is None:
                self._kept_by = Keeper(self.folder, self.replica, committer, self.timeout_s)
            return self._kept_by

    def _checkpoint_quietly(self) -> None:
        if self.replica.bulk.keeps_past():
            self._keeper().checkpoint_quietly()

    def collect(
        self, dry_run: bool, progress: Callable[[dict[str, Any]], None] | None
    ) -> dict[str, Any]:
        """Refuse: nothing of the past of a pool at a path is collected."""
        raise InvalidError(
            "nothing is collected at a path, where all of the past is kept: to end it, delete the "
            "folder `past`; to start afresh, `everpool copy` the pool"
        )

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
            "checkpoint": state.checkpoint,
            "tail_bytes": state.tail_bytes,
            "index_bytes": replica.index.path.stat().st_size,
            "readers": environment.info()["num_readers"],
            "read_only": self.read_only,
        }

    def close(self) -> None:
        """Commit what is queued and close everything that can be closed."""
        if self._kept_by is not None:
            self._kept_by.close()
        if self.committer is not None:
            self.committer.close()
        self.replica.close()

    def _committer(self) -> Committer:
        if self.committer is None:
            raise InvalidError(f"the pool {self.folder} is open read-only: open it for writing")
        return self.committer


_engines: dict[tuple[int, int, bool], Engine] = {}
_mutex = threading.Lock()
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
        if not engine.is_ours():
            return
        engine.users -= 1
        if engine.users:
            return
        for key, known in list(_engines.items()):
            if known is engine:
                del _engines[key]
        engine.close()


def _after_fork_in_child() -> None:
    global _mutex
    _mutex = threading.Lock()
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
