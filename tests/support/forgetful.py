"""A disk that forgets what was not synced, to put a whole pool on and cut its power.

    with ForgetfulDisk(folder) as disk:
        (disk.path / "a").write_bytes(b"never synced")     # by any process
        disk.cut(seed=1, target=elsewhere)                 # what a disk may hold, in plain files

It is a FUSE file system served by a process of its own. Everything asked of it goes into a log;
a cut is a pure function of the log up to some operation, and a seed: see forgetful_model for
what a disk may do. So one run gives any number of cuts, at any of its operations:

    mark(disk.path, "transfer 7 acknowledged")             # by any process, in order with the rest
    log = disk.record()
    for position in sync_positions(log):                   # just before each sync ends
        disk.cut_at(position, seed, target)
        promised = marks(log[:position])

`NotAvailableError` says that this machine has no FUSE: a test may then be skipped.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import msgspec

from .forgetful_fuse import MARK_ATTRIBUTE, Answer, receive, send, serve, unmount
from .forgetful_model import DiskModel, Mark, Operation, Sync, Tree

START_S = 30
STOP_S = 10

T = TypeVar("T")
Kind = Literal["sync", "write", "read", "resize", "allocate", "name"]


class NotAvailableError(RuntimeError):
    """FUSE is not to be had on this machine, or not by this user."""


class ForgetfulDisk:
    """A disk mounted on `folder`, which is made if it does not exist, and then removed at the end.

    A context manager. Several threads may use it, but not a forked child (which may use the
    files). However its owner ends, the disk is unmounted and its process ends.
    `log_limit_bytes` bounds what is kept in memory between two looks at the record.
    """

    def __init__(self, folder: str | Path, *, log_limit_bytes: int = 1 << 30) -> None:
        self.path = Path(folder).resolve()
        self._log_limit_bytes = log_limit_bytes
        self._settings: dict[str, Any] = {"full": False, "capacity_bytes": None, "sync_delay_s": 0}
        self._lock = threading.RLock()
        self._owner = os.getpid()
        self._made_folder = False
        self._process: subprocess.Popen[bytes] | None = None
        self._base = DiskModel()  # where the log begins
        self._log: list[Operation] = []
        self._model = DiskModel()  # somewhere along the log: cuts further on play on from there

    def __enter__(self) -> ForgetfulDisk:
        self._made_folder = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- cuts ---------------------------------------------------------------------------------

    def cut(self, seed: int, target: str | Path, *, torn_sectors: bool = False) -> Tree:
        """Cuts the power now: makes in `target` a state that the disk may be in, and returns it.

        Everything answered before the call counts as asked. The living files go on unharmed.
        """
        return self.cut_at(self.position(), seed, target, torn_sectors=torn_sectors)

    def cut_at(
        self, position: int, seed: int, target: str | Path, *, torn_sectors: bool = False
    ) -> Tree:
        """As `cut`, as if the power had gone after the first `position` operations.

        Cheapest with positions that never go down. ValueError for one not in the record.
        """
        tree = self.state_at(position, seed, torn_sectors=torn_sectors)
        tree.write_to(target)
        return tree

    def state_at(self, position: int, seed: int, *, torn_sectors: bool = False) -> Tree:
        """As `cut_at`, in memory only."""
        with self._lock:
            self._fetch()
            begin = self._base.position
            if not begin <= position <= begin + len(self._log):
                raise ValueError(
                    f"operation {position} is not in the record, which goes from {begin} "
                    f"to {begin + len(self._log)}"
                )
            if position < self._model.position:
                self._model = copy.deepcopy(self._base)
            for operation in self._log[self._model.position - begin : position - begin]:
                self._model.apply(operation)
            return self._model.survivors(seed, torn_sectors=torn_sectors)

    def position(self) -> int:
        """How many operations were asked of the disk so far."""
        return self._ask("position")

    def record(self) -> list[Operation]:
        """The log so far, from the mount or the last `forget_record`."""
        with self._lock:
            self._fetch()
            return list(self._log)

    def forget_record(self) -> None:
        """Frees the memory of the log so far: cuts can be taken from here on only."""
        with self._lock:
            self._fetch()
            self.state_at(self._base.position + len(self._log), seed=0)
            self._base = copy.deepcopy(self._model)
            self._log.clear()

    def _fetch(self) -> None:
        self._log += self._ask("log", into=list[Operation])

    # -- faults -------------------------------------------------------------------------------

    def fail(
        self,
        kind: Kind,
        times: int = 1,
        *,
        glob: str = "*",
        error: int = errno.EIO,
        after: int = 0,
    ) -> None:
        """Makes the next `times` requests of a kind fail, for paths (below the mount) like `glob`.

        The first `after` of them go well.

        A sync that fails makes nothing durable, and its file's pages count as clean from then
        on, as on Linux: trying again succeeds without writing them. "sync" includes those of
        directories (the root's path is ""), and those of writes through O_DSYNC; "name" goes by
        the path of the directory that is changed.
        """
        self._ask("fail", kind=kind, times=times, glob=glob, error=error, after=after)

    def heal(self) -> None:
        """Takes back all failures that have not happened yet."""
        self._ask("heal")

    @property
    def full(self) -> bool:
        """Whether nothing more can be allocated: ENOSPC. Holes and names need no room."""
        return self._settings["full"]

    @full.setter
    def full(self, full: bool) -> None:
        self._set(full=full)

    @property
    def capacity_bytes(self) -> int | None:
        """The size of the disk, for file data only; None for no limit."""
        return self._settings["capacity_bytes"]

    @capacity_bytes.setter
    def capacity_bytes(self, capacity_bytes: int | None) -> None:
        self._set(capacity_bytes=capacity_bytes)

    @property
    def sync_delay_s(self) -> float:
        """How much longer each sync takes; it covers what was written before it began."""
        return self._settings["sync_delay_s"]

    @sync_delay_s.setter
    def sync_delay_s(self, sync_delay_s: float) -> None:
        self._set(sync_delay_s=sync_delay_s)

    def _set(self, **changed: Any) -> None:
        self._settings.update(changed)
        self._ask("settings", **self._settings)

    # -- the process --------------------------------------------------------------------------

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", f"{Path(__file__).parent.name}.{Path(__file__).stem}"),
                    *(str(self.path), str(number), str(os.getpid())),
                    str(self._log_limit_bytes),
                ],
                cwd=Path(__file__).parents[1],
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the owner, who then unmounts
            )
        self._control.settimeout(START_S)
        try:
            self._answer(Any)
        except ValueError as problem:
            raise NotAvailableError(f"no FUSE here: {problem}") from None
        self._control.settimeout(None)

    def _ask(self, order: str, *, into: type[T] | Any = Any, **facts: Any) -> Any:
        if os.getpid() != self._owner:
            raise RuntimeError("the disk takes orders from the process that mounted it only")
        if self._process is None:
            raise RuntimeError("the disk is not mounted")
        with self._lock:
            return self._answer(into, {"order": order, **facts})

    def _answer(self, into: Any, order: dict[str, Any] | None = None) -> Any:
        try:
            if order is not None:
                send(self._control, order)
            data = receive(self._control)
        except (EOFError, ConnectionError) as problem:
            raise RuntimeError("the disk's process died: its traceback is on stderr") from problem
        answer = msgspec.msgpack.decode(data, type=Answer)
        if answer.problem:
            raise ValueError(answer.problem)
        return msgspec.msgpack.decode(answer.value, type=into)

    def close(self) -> None:
        """Unmounts, though files may still be open, and ends the process. Again: does nothing."""
        process, self._process = self._process, None
        if process is None or os.getpid() != self._owner:
            return
        with self._control, contextlib.suppress(OSError):
            send(self._control, {"order": "stop"})  # closing is not enough where a fork has it too
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            if is_mounted(self.path):
                unmount(str(self.path))
            if self._made_folder:
                self.path.rmdir()


def is_mounted(folder: str | Path) -> bool:
    """Whether something is mounted exactly there."""
    wanted = str(folder).replace(" ", "\\040")
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        return any(line.split()[1] == wanted for line in mounts)


def mark(folder: str | Path, text: str) -> None:
    """Leaves a note in the log of the disk that `folder` is on; any process may, at any time."""
    os.setxattr(folder, MARK_ATTRIBUTE.decode(), text.encode())


def marks(log: Iterable[Operation]) -> list[str]:
    """The notes in (a part of) a log."""
    return [operation.text for operation in log if isinstance(operation, Mark)]


def sync_positions(log: Iterable[Operation]) -> list[int]:
    """The positions just before each sync in a log: the last moments when it was not yet done."""
    return [at for at, operation in enumerate(log) if isinstance(operation, Sync)]


def main() -> None:
    """The disk's process; its owner passes the folder, a channel, its pid and the log's limit."""
    folder, number, owner_pid, log_limit_bytes = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    serve(folder, socket.socket(fileno=int(number)), int(owner_pid), int(log_limit_bytes))


if __name__ == "__main__":
    main()
