"""The writer's lock: one writer at a time across the processes of a host.

Record locks of `fcntl`: the kernel frees them when their holder dies, and a forked child does not
inherit them. They belong to a process and vanish when it closes *any* descriptor of the file, so
nothing else may open the file in a process that has a `WriterLock` on it.

Byte 0 is the lock. Byte 1 is a turnstile that one waiter holds while it waits for byte 0: who
releases the lock and wants it again at once queues behind that waiter. Byte 2 is for who flushes
memory: a second one would find clean pages where the first one's flush failed.
"""

import errno
import fcntl
import os
import threading
import time
from pathlib import Path

_LOCK, _TURNSTILE, _FLUSHER = 0, 1, 2
_POLL_S = 0.001
_FLUSHER_POLL_S = 0.01


class WriterLock:
    """One process's end of the lock. Its threads must not acquire it at the same time."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._mutex = threading.Lock()
        self._waiter: _Waiter | None = None

    def acquire(self, timeout_s: float) -> bool:
        """Take the lock; returns False when another process kept it for `timeout_s`."""
        if self._waiter is None and self._try(_TURNSTILE):
            if self._try(_LOCK):
                self._free(_TURNSTILE)
                return True
            self._free(_TURNSTILE)
        if timeout_s <= 0:
            return False
        with self._mutex:
            waiter = self._waiter
            if waiter is None:
                waiter = self._waiter = _Waiter()
                threading.Thread(
                    target=self._wait, args=(waiter,), name="everpool-lock", daemon=True
                ).start()
            waiter.wanted = True
        waiter.acquired.wait(timeout_s)
        with self._mutex:
            waiter.wanted = False
            if not waiter.acquired.is_set():
                return False
            self._waiter = None
            return True

    def release(self) -> None:
        """Give the lock up."""
        self._free(_LOCK)

    def acquire_flusher(self, timeout_s: float) -> bool:
        """Take the flusher's lock; returns False when another process kept it for `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not self._try(_FLUSHER):
            if time.monotonic() >= deadline:
                return False
            time.sleep(_FLUSHER_POLL_S)
        return True

    def release_flusher(self) -> None:
        """Give the flusher's lock up."""
        self._free(_FLUSHER)

    def close(self) -> None:
        """Give up the lock and the descriptor."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _wait(self, waiter: "_Waiter") -> None:
        """Wait in the kernel, which queues waiters, for as long as it takes."""
        try:
            self._block(_TURNSTILE)
            self._block(_LOCK)
            self._free(_TURNSTILE)
        except OSError:
            with self._mutex:
                self._waiter = None
            return
        with self._mutex:
            if waiter.wanted:
                waiter.acquired.set()
            else:
                self._free(_LOCK)
                self._waiter = None

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
