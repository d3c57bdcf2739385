"""Group commit: the commits of a process's threads share one flush.

An idle committer lets the calling thread commit by itself, which costs no hand-over. Whoever
finds it busy queues up, and a thread of the committer's own commits what has gathered, one entry
after another, until the queue has been empty for a moment.
"""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import TypeVar, cast

from everpool.errors import (
    ClosedError,
    CommitUnknownError,
    ConflictError,
    EverpoolError,
    ExistsError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from everpool.interrupts import NOTICE_S, check, deferred
from everpool.processes import is_stopped
from everpool.records import Put, Record, RecordId, Write
from everpool.replica.batch import Result
from everpool.replica.bulk import BulkFiles, Staged
from everpool.replica.flush import Flusher
from everpool.replica.index import translate_os
from everpool.replica.lock import WriterLock
from everpool.replica.replica import Replica
from everpool.replica.writer import Writer
from everpool.verdict import Verdict

_BATCH_RECORDS = 512
_BATCH_BYTES = 4 << 20
_QUEUE_RECORDS = 4096
_QUEUE_BYTES = 64 << 20
_LINGER_S = 0.001
_GATHER_S = 0.001
_HURRIED_BATCHES = 32
_RECORD_BYTES = 200


T = TypeVar("T")


class Submission:
    """A record on its way. `result` or `error` is set before whoever waits is woken."""

    __slots__ = ("_future", "_woken", "error", "record", "result", "staged")

    def __init__(self, record: Record, staged: list[Staged]) -> None:
        self.record = record
        self.staged = staged
        self.result: Result | None = None
        self.error: BaseException | None = None
        self._woken: threading.Lock | None = None
        self._future: Future[int] | None = None

    def size(self) -> int:
        """Return about how many bytes the record has."""
        found = _RECORD_BYTES
        for operation in self.record.operations:
            if type(operation) is Put or type(operation) is Write:
                payload = operation.payload
                found += len(payload) if isinstance(payload, bytes) else 0
        return found

    @property
    def waited(self) -> bool:
        """Whether a thread waits for it."""
        return self._woken is not None

    def done(self) -> bool:
        return self.result is not None or self.error is not None

    def prepare_wait(self) -> None:
        """Arrange for `wait`; call it before the submission is queued."""
        self._woken = threading.Lock()
        self._woken.acquire()

    def wait(self) -> None:
        """Sleep until the outcome is known."""
        if self._woken is not None and not self.done():
            self._woken.acquire()

    def future(self) -> Future[int]:
        """Return a future of the version that the record commits as."""
        with _futures:
            if self._future is None:
                future: Future[int] = Future()
                # It cannot be cancelled: the record is on its way. Not seen by others before: the
                # outcome may come at any moment.
                future.set_running_or_notify_cancel()
                self._future = future
            future = self._future
        if self.done():
            self._resolve(future)
        return future

    def version(self) -> int:
        """Return the version the record committed as; raises what kept it from committing."""
        if self.error is not None:
            raise self.error
        assert self.result is not None, "the outcome is not known yet"
        error = error_of(self.result, self.record.snapshot)
        if error is not None:
            raise error
        return self.result.version

    def settle(self, result: Result | None, error: BaseException | None, bulk: BulkFiles) -> None:
        """Set the outcome and wake whoever waits for it."""
        if self.staged:
            refused = result is not None and result.verdict is not Verdict.COMMITTED
            failed = isinstance(error, EverpoolError) and not isinstance(error, CommitUnknownError)
            for staged in self.staged:
                with contextlib.suppress(OSError):
                    if refused or failed:
                        bulk.discard(staged)
                    else:
                        staged.release()
        self.result, self.error = result, error
        if self._woken is not None:
            self._woken.release()
        if self._future is not None:
            self._resolve(self._future)

    def abandon(self) -> None:
        """In a forked child: nobody here will ever learn the outcome."""
        self.error = ClosedError("this commit belongs to the parent process: ask there")
        if self._future is not None:
            self._future._condition = threading.Condition()  # pyright: ignore[reportPrivateUsage]
            self._resolve(self._future)

    def _resolve(self, future: Future[int]) -> None:
        with contextlib.suppress(InvalidStateError):
            error = version = None
            try:
                version = self.version()
            except BaseException as raised:
                error = raised
            try:
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(cast("int", version))
            except SystemExit:
                pass  # of somebody's callback: it must not end the thread that commits for all


_futures = threading.Lock()


def reset_after_fork() -> None:
    """In a forked child: nobody holds the lock that somebody may have held in the parent."""
    global _futures
    _futures = threading.Lock()


def error_of(result: Result, snapshot: int) -> EverpoolError | None:
    """Return the error that a verdict means to the caller, or None when it committed."""
    detail = result.detail
    match result.verdict:
        case Verdict.COMMITTED:
            return None
        case Verdict.CONFLICT:
            return ConflictError(
                f"{detail} changed after version {snapshot}, which this transaction read: run it "
                "again",
                snapshot=snapshot,
                version=result.version,
            )
        case Verdict.BELOW_FLOOR:
            return ConflictError(
                f"the transaction began at version {snapshot}, too long ago to be judged: run it "
                "again, and keep it shorter",
                snapshot=snapshot,
            )
        case Verdict.NOT_FOUND:
            return NotFoundError(f"{detail} does not exist, or was deleted: look the name up again")
        case Verdict.EXISTS:
            return ExistsError(
                f"{detail} exists already: delete or forget it first, or choose another name"
            )
        case Verdict.INVALID:
            return InvalidError(f"{detail}: outside of what exists")
        case _:
            return ConflictError(f"{detail} was void: run the transaction again")


class Turn:
    """A lock that is given to whoever waits for it before its last holder can have it again."""

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Take the lock if that needs no waiting; pair it with `release`."""
        return not self._gate.locked() and self._lock.acquire(blocking=False)

    def release(self) -> None:
        self._lock.release()

    def wanted(self) -> bool:
        """Whether somebody waits."""
        return self._gate.locked()

    def __enter__(self) -> None:
        with self._gate:
            while not self._lock.acquire(timeout=NOTICE_S):
                check()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Committer:
    """Commits what a process's threads submit, in the order of submission."""

    def __init__(self, replica: Replica, timeout_s: float) -> None:
        assert replica.lock is not None
        self._replica = replica
        self._lock: WriterLock = replica.lock
        self._timeout_s = timeout_s
        self._pid = os.getpid()  # a forked child makes a committer of its own
        self._writer = Writer(replica)
        self._flusher = Flusher(replica, self._writer)
        self._flushing = threading.Lock()
        self._flush_begun = False
        self._queue: deque[Submission] = deque()
        self._queue_bytes = 0
        self._running: list[Submission] = []
        self._leader = Turn()
        self._mutex = threading.Lock()
        self._room = threading.Condition(self._mutex)
        self._work = threading.Event()
        self._thread: threading.Thread | None = None
        self._server = 0
        # The queue's length at which its thread is woken, and how many batches it will not gather.
        self._enough = 1
        self._hurry = 0
        self._closed = False
        # Called in the background before a flush that is due.
        self.before_flush: Callable[[], None] = lambda: None

    def commit(self, submission: Submission) -> None:
        """Commit and return when the outcome is known."""
        self._refuse_in_callback()
        with deferred():
            if not self._queue and self._leader.take():
                try:
                    if not self._queue:
                        if self._closed:
                            raise ClosedError("the pool is closed: open it again")
                        self._run([submission])
                        return
                finally:
                    self._leader.release()
                    if self._queue:
                        self._work.set()
            submission.prepare_wait()
            self.enqueue(submission)
        submission.wait()

    def enqueue(self, submission: Submission) -> None:
        """Queue the submission; waits while too much is queued."""
        with deferred(), self._mutex:
            while len(self._queue) >= _QUEUE_RECORDS or self._queue_bytes >= _QUEUE_BYTES:
                if self._is_serving():
                    break  # a callback, in the one thread that makes room
                if not self._room.wait(NOTICE_S):
                    check()
            if self._closed:
                raise ClosedError("the pool is closed: open it again")
            if self._thread is None:
                thread = threading.Thread(target=self._serve, name="everpool-commit", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    raise UnavailableError(f"committing: {error}: end some threads") from error
                self._thread = thread
            self._queue.append(submission)
            self._queue_bytes += submission.size()
            if len(self._queue) >= self._enough and not self._work.is_set():
                self._work.set()

    def drain(self) -> None:
        """Return when everything submitted before has an outcome."""
        self._refuse_in_callback()
        with self._mutex:
            last = self._queue[-1] if self._queue else None
        if last is not None:
            with contextlib.suppress(Exception):
                last.future().exception()
        with deferred(), self._leader:
            pass

    def recover(self, *, wait: bool) -> None:
        """Finish what a dead process left undone.

        With `wait`, waits for the writer's lock; else leaves it to a live writer.
        """
        if self._is_serving() and not wait:
            return  # a callback: this thread goes on as soon as that is done
        self._refuse_in_callback()
        with deferred(), self._leader:
            if wait:
                self._acquire_in_time()
            elif not self._acquire(0):
                return
            try:
                self._writer.recover()
            finally:
                self._lock.release()

    def flush(self) -> None:
        """Make mapped memory durable and trim the tail."""
        self._refuse_in_callback()
        self._flush(self._timeout_s)

    def _flush(self, timeout_s: float) -> None:
        with deferred(), self._flushing:
            if self._closed:
                raise ClosedError("the pool is closed: open it again")
            if not self._lock.acquire_flusher(timeout_s):
                raise UnavailableError(
                    f"another process has been flushing memory for {timeout_s:g} s: try again"
                )
            try:
                flushed = self._flusher.sync(*self.holding_lock(self._flusher.begin))
                self.holding_lock(lambda: self._flusher.commit(flushed))
            finally:
                self._lock.release_flusher()

    def close(self) -> None:
        """Commit what is queued, and stop."""
        self.drain()
        with deferred():
            with self._leader, self._mutex:
                self._closed = True
            self._work.set()
        if self._thread is not None:
            self._thread.join()
        with self._flushing:
            pass

    def pending(self) -> list[Submission]:
        """Return what has no outcome yet."""
        return [*self._running, *self._queue]

    def _serve(self) -> None:
        self._server = threading.get_ident()
        while True:
            self._work.wait()
            with self._leader:
                crowd = True
                while not self._leader.wanted():
                    self._work.clear()
                    batch = self._take()
                    if batch:
                        crowd = len(batch) > 1
                        self._run(batch)
                        self._running = []
                        if crowd:
                            self._gather(sum(submission.waited for submission in batch))
                    # One thread alone commits by itself, faster, when it finds nobody here.
                    elif self._closed or not crowd or not self._work.wait(_LINGER_S):
                        break
                if self._queue:
                    self._work.set()
            if self._closed and not self._queue:
                return

    def _gather(self, threads: int) -> None:
        """Let the threads that were just answered come back, so that one flush does for all.

        While they do, this thread keeps out of their way, which saves more than the flush. When
        most of them had other things to do, it does not wait again for a while.
        """
        if self._hurry:
            self._hurry -= 1
            return
        self._enough = threads
        self._work.clear()
        if len(self._queue) < threads:
            self._work.wait(_GATHER_S)
        self._enough = 1
        if 2 * len(self._queue) < threads:
            self._hurry = _HURRIED_BATCHES

    def _take(self) -> list[Submission]:
        with self._mutex:
            batch: list[Submission] = []
            size = 0
            queue = self._queue
            self._running = batch  # before anything is taken: a fork must find it in either place
            while queue and len(batch) < _BATCH_RECORDS and size < _BATCH_BYTES:
                submission = queue.popleft()
                size += submission.size()
                batch.append(submission)
            self._queue_bytes -= size
            if batch:
                self._room.notify_all()
            return batch

    def _run(self, batch: list[Submission]) -> None:
        """Commit a batch as one entry and settle its submissions."""
        locked = False
        try:
            self._acquire_in_time()
            locked = True
            results = self._append([submission.record for submission in batch], batch)
        except BaseException as error:
            final = not locked or isinstance(error, CommitUnknownError)
            if final or len(batch) == 1 or not isinstance(error, Exception):
                for at, submission in enumerate(batch):
                    submission.settle(None, _error_of_record(error, at), self._replica.bulk)
                if not isinstance(error, Exception):
                    raise
                return
            # One record that there is no room for, or that is odd, must not fail the others.
            for submission in batch:
                self._run([submission])
            return
        for submission, result in zip(batch, results, strict=True):
            if result.verdict is Verdict.FENCED:
                self._run([submission])
            else:
                submission.settle(result, None, self._replica.bulk)

    def _append(self, records: list[Record], batch: list[Submission]) -> list[Result]:
        try:
            for submission in batch:
                for staged in submission.staged:
                    if not staged.exists():
                        raise UnavailableError(
                            f"the staged file {staged.reference.file} is gone: try again"
                        )
            results = self._writer.commit(records)
        finally:
            self._lock.release()
        if not self._flush_begun and self._flusher.due(*self._writer.progress):
            self._flush_begun = True
            try:
                threading.Thread(
                    target=self._flush_quietly, name="everpool-flush", daemon=True
                ).start()
            except RuntimeError:  # no more threads: a later commit tries again
                self._flush_begun = False
        return results

    def _flush_quietly(self) -> None:
        """Flush in the background; what fails is tried again when the next flush is due."""
        try:
            with contextlib.suppress(EverpoolError):
                self.before_flush()
            with contextlib.suppress(EverpoolError):
                self._flush(0)  # another process that flushes does it for this one, too
        finally:
            self._flush_begun = False

    def _is_serving(self) -> bool:
        """Whether this is the thread that commits, in a callback of a future."""
        return threading.get_ident() == self._server

    def _refuse_in_callback(self) -> None:
        """Raise `InvalidError` in the thread that commits: it would wait for itself."""
        if self._is_serving():
            raise InvalidError(
                "a callback of a transaction's future cannot commit, sync or close: hand it to "
                "another thread"
            )

    def settled(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, called while nobody commits and memory has all there is."""

        def settle_first() -> T:
            self._writer.settle()
            return work()

        self._refuse_in_callback()
        return self.holding_lock(settle_first)

    def holding_lock(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, called with the writer's lock held."""
        with deferred(), self._leader:
            self._acquire_in_time()
            try:
                return work()
            finally:
                self._lock.release()

    def _acquire_in_time(self) -> None:
        if not self._acquire(self._timeout_s):
            raise self._busy()

    def _acquire(self, timeout_s: float) -> bool:
        try:
            if not self._lock.acquire(timeout_s):
                return False
        except OSError as error:
            raise translate_os(error, "taking the writer's lock") from error
        self._replica.shared.holder = self._pid
        return True

    def _busy(self) -> UnavailableError:
        pid = self._lock.holder() or self._replica.shared.holder
        state = " and is stopped: continue it, or end it" if is_stopped(pid) else ""
        return UnavailableError(
            f"process {pid} has kept the pool's writer lock for {self._timeout_s:g} s{state}; "
            "nothing was committed",
            pid=pid,
        )


def _error_of_record(error: BaseException, at: int) -> BaseException:
    """Return the error for the record at that place of a batch: each has an id of its own."""
    if not isinstance(error, CommitUnknownError) or not isinstance(error.id, RecordId):
        return error
    id = RecordId(error.id.session, error.id.sequence + at)
    return CommitUnknownError(error.message, id=id)
