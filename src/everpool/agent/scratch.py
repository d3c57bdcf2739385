"""Folders that go with the process that made them, also when that is killed. Nobody else may look.

Whoever makes one removes those of the dead beside it. A folder's file `lock` is locked (flock)
while its process lives, and the kernel frees it: pids may be used again, and those of another
container mean nothing here. The file is locked before anything else is in the folder, and whoever
removes a folder locks it first. So a maker who finds its lock taken, or gone, takes another name.
"""

import contextlib
import fcntl
import os
import shutil
import uuid
from pathlib import Path

from everpool.errors import InvalidError
from everpool.replica.index import translated


class Scratch:
    """A new folder in `parent`, which is made where need be."""

    def __init__(self, parent: Path) -> None:
        with translated(f"making a folder in {parent}"):
            parent.mkdir(0o700, parents=True, exist_ok=True)
            if parent.stat().st_uid != os.getuid():
                raise InvalidError(
                    f"{parent} belongs to another user, who could read what is put there: remove "
                    "it, or set TMPDIR to a folder of your own"
                )
            _sweep(parent)
            while True:
                self.path = parent / f"{os.getpid()}-{uuid.uuid4().hex}"
                self.path.mkdir(0o700)
                lock = _lock(self.path)
                if lock is not None:
                    break
        self._lock = lock
        _open.add(self)

    def remove(self) -> None:
        """Remove the folder and what is in it; what is mapped lives on."""
        if self in _open:
            _open.discard(self)
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)

    def abandon(self) -> None:
        """In a forked child: let go of the lock, which stays the parent's."""
        os.close(self._lock)


_open: set[Scratch] = set()


def _sweep(parent: Path) -> None:
    """Remove the folders of the dead."""
    for path in list(parent.iterdir()):
        with contextlib.suppress(OSError):  # it may be another user's
            lock = _lock(path)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _lock(path: Path) -> int | None:
    """Return the folder's lock, or None when somebody has it or the folder is gone."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.stat(path / "lock").st_ino == os.fstat(lock).st_ino:
                    return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
    return None


def _forget_in_child() -> None:
    for scratch in _open:
        scratch.abandon()
    _open.clear()


os.register_at_fork(after_in_child=_forget_in_child)
