"""The writer's lock: one writer at a time across the processes of a host.

Record locks of `fcntl`: the kernel frees them when their holder dies, and a forked child does not
inherit them. They belong to a process and vanish when it closes *any* descriptor of the file, so
nothing else may open the file in a process that has a `WriterLock` on it.

Byte 0 is the lock. Byte 1 is a turnstile that one waiter holds while it waits for byte 0: who
releases the lock and wants it again at once queues behind that waiter. While somebody may be at
the turnstile, the shared page's `queued` says so; else nobody needs to look. Byte 2 is for who
flushes memory: a second one would find clean pages where the first one's flush failed. Byte 3 is
for who makes a checkpoint: a second one would only do the same work again.
"""

import contextlib
import errno
import fcntl
import os
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

from everpool.interrupts import check

_LOCK, _TURNSTILE, _FLUSHER, _STEWARD = 0, 1, 2, 3
_POLL_S = 0.001
_PATIENCE_S = 0.05
# Linux's `struct flock` on 64-bit machines.
_FLOCK = struct.Struct("hh4xqqi4x")
_POLL_LONG_S = 0.01


def lock_at(path: Path) -> "WriterLock":
    """Return this process's end of the lock in the file `path`, of which there is one for each
    file: closing any descriptor of the file would free the lock for the whole process.

    Pair it with `close`.
    """
    with _mutex:
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(path)
            known = _locks.get((status.st_dev, status.st_ino))
            if known is not None:
                known.users += 1
                return known
        lock = WriterLock(path)
        status = os.fstat(lock.fileno())
        _locks[status.st_dev, status.st_ino] = lock
        return lock


_locks: dict[tuple[int, int], "WriterLock"] = {}
_mutex = threading.Lock()


def _forget_in_child() -> None:
    """A forked child holds none of its parent's locks."""
    global _mutex
    _mutex = threading.Lock()
    _locks.clear()


os.register_at_fork(after_in_child=_forget_in_child)


class Queue(Protocol):
    """Where processes see that one of them waits for the lock."""

    @property
    def queued(self) -> int: ...

    @queued.setter
    def queued(self, value: int) -> None: ...


class WriterLock:
    """One process's end of the lock. Its threads must not acquire it at the same time."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._mutex = threading.Lock()
        self._waiter: _Waiter | None = None
        self._held = False
        self.users = 1
        # The shared page, once there is one.
        self.page: Queue | None = None

    def close(self) -> None:
        """Give this end back; the last user closes the file."""
        with _mutex, self._mutex:
            self.users -= 1
            if self.users or self._waiter is not None:
                return  # a thread that waits in the kernel has the descriptor in use
            for key, known in list(_locks.items()):
                if known is self:
                    del _locks[key]
            os.close(self._descriptor)
            self._descriptor = -1

    def acquire(self, timeout_s: float) -> bool:
        """Take the lock; returns False when another process kept it for `timeout_s`."""
        if self._waiter is None and self._try_in_turn():
            self._held = True
            return True
        if timeout_s <= 0:
            return False
        waiter = self._wait_in_kernel()
        deadline = time.monotonic() + timeout_s
        patience_s = _PATIENCE_S
        while not waiter.acquired.wait(min(patience_s, max(0.0, deadline - time.monotonic()))):
            try:
                check()
            except BaseException:
                waiter.wanted = False
                raise
            # Who holds the turnstile may have been stopped there, with the lock itself free.
            with self._mutex:
                if self._try(_LOCK):
                    self._held, waiter.wanted = True, False
                    return True
            if time.monotonic() >= deadline:
                break
        with self._mutex:
            waiter.wanted = False
            if not waiter.acquired.is_set():
                return False
            self._waiter = None
            self._held = True
            return True

    def _try_in_turn(self) -> bool:
        """Take the lock if it is free and nobody else waits for it."""
        page = self.page
        if page is not None and not page.queued:
            return self._try(_LOCK)
        if not self._try(_TURNSTILE):
            return False
        if page is not None:
            page.queued = 0  # whoever waited here has died
        taken = self._try(_LOCK)
        self._free(_TURNSTILE)
        return taken

    def _wait_in_kernel(self) -> "_Waiter":
        """Let a thread queue for the lock in the kernel, unless one does already."""
        with self._mutex:
            waiter = self._waiter
            if waiter is None:
                waiter = self._waiter = _Waiter()
                try:
                    threading.Thread(
                        target=self._wait, args=(waiter,), name="everpool-lock", daemon=True
                    ).start()
                except RuntimeError:
                    self._waiter = None  # no more threads: `acquire` goes on trying by itself
            waiter.wanted = True
            return waiter

    def release(self) -> None:
        """Give the lock up."""
        with self._mutex:
            self._held = False
            self._free(_LOCK)

    def holder(self) -> int:
        """Return the pid of another process that holds the lock, or 0 when that is not told."""
        if sys.platform != "linux":
            return 0
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _LOCK, 1, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(self._descriptor, fcntl.F_GETLK, asked))
        return 0 if kind == fcntl.F_UNLCK else pid

    def fileno(self) -> int:
        return self._descriptor

    def acquire_flusher(self, timeout_s: float) -> bool:
        """Take the flusher's lock; returns False when another process kept it for `timeout_s`."""
        return self._poll(_FLUSHER, timeout_s)

    def acquire_steward(self, timeout_s: float) -> bool:
        """Take the steward's lock; returns False when another process kept it for `timeout_s`."""
        return self._poll(_STEWARD, timeout_s)

    def _poll(self, byte: int, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not self._try(byte):
            if time.monotonic() >= deadline:
                return False
            check()
            time.sleep(_POLL_LONG_S)
        return True

    def release_steward(self) -> None:
        """Give the steward's lock up."""
        self._free(_STEWARD)

    def release_flusher(self) -> None:
        """Give the flusher's lock up."""
        self._free(_FLUSHER)

    def _wait(self, waiter: "_Waiter") -> None:
        """Wait in the kernel, which queues waiters, for as long as it takes."""
        while True:
            try:
                self._block(_TURNSTILE)
                if self.page is not None:
                    self.page.queued = 1
                self._block(_LOCK)
                if self.page is not None:
                    self.page.queued = 0
                self._free(_TURNSTILE)
            except OSError:
                with self._mutex:
                    self._waiter = None
                return
            with self._mutex:
                if not waiter.wanted:
                    if not self._held:
                        self._free(_LOCK)
                    self._waiter = None
                    return
                # This process may have had the lock otherwise, and released it since.
                if self._try(_LOCK):
                    waiter.acquired.set()
                    return

    def _block(self, byte: int) -> None:
        while True:
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, byte)
                return
            except OSError as error:
                # The kernel suspects a deadlock between processes, not seeing that different
                # threads hold and wait.
                if error.errno != errno.EDEADLK:
                    raise
                time.sleep(_POLL_S)

    def _try(self, byte: int) -> bool:
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def _free(self, byte: int) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, byte)


class _Waiter:
    """A thread of this process that waits for the lock on behalf of whoever wants it."""

    def __init__(self) -> None:
        self.acquired = threading.Event()
        self.wanted = True
