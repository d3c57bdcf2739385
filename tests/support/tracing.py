"""A process that stops at every step by which it changes what others can see.

A step is the end of a system call that changes files, and of a store into the page that processes
share. Killed there, or looked at while it stands there, a process shows every state that a death
or a pause at that place can leave, also those inside of LMDB.

    tracee = Tracee(function, *args)       # function(pause, link, *args) calls pause() twice:
    while step := tracee.next_step():      # the steps are those in between
        ...
    tracee.finish()

Needs Linux's ptrace; `why_not` says why it cannot be used here.
"""

import contextlib
import ctypes
import functools
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from everpool.replica import shared
from support.processes import PATIENCE_S, Child, Failure, ending

_TRACE_ME, _CONT, _SYSCALL, _SET_OPTIONS, _SYSCALL_INFO = 0, 7, 24, 0x4200, 0x420E
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_MARK_SYSCALL_STOPS, _KILL_WITH_TRACER = 1, 0x100000
_ENTRY, _EXIT = 1, 2
_WAIT_ANY = 0x40000000  # __WALL

_CALLS = {
    "x86_64": {
        "write": 1, "pwrite64": 18, "writev": 20, "msync": 26, "fcntl": 72, "flock": 73,
        "fsync": 74, "fdatasync": 75, "ftruncate": 77, "rename": 82, "mkdir": 83, "link": 86,
        "unlink": 87, "linkat": 265,
        "openat": 257, "mkdirat": 258, "unlinkat": 263, "renameat": 264, "fallocate": 285,
        "pwritev": 296, "renameat2": 316, "getppid": 110,
    },
    "aarch64": {
        "write": 64, "pwrite64": 68, "writev": 66, "msync": 227, "fcntl": 25, "flock": 32,
        "fsync": 82, "fdatasync": 83, "ftruncate": 46, "openat": 56, "mkdirat": 34,
        "unlinkat": 35, "linkat": 37, "renameat": 38, "fallocate": 47, "pwritev": 70,
        "renameat2": 276, "getppid": 173,
    },
}.get(platform.machine(), {})  # fmt: skip
_NAMES = {number: name for name, number in _CALLS.items()}
_OF_A_FILE = {"write", "pwrite64", "writev", "pwritev", "ftruncate", "fallocate"}
_OF_A_FILE |= {"fsync", "fdatasync", "fcntl", "flock"}
_LOCKING_COMMANDS = {6, 7}  # F_SETLK, F_SETLKW
# Stores into the shared page are no system calls: a harmless one is made before and after each.
_STORE = "getppid"
_STORING = {"started", "applied", "holder", "suspect", "reset", "wake"}

_libc = ctypes.CDLL(None, use_errno=True)
if sys.platform == "linux":
    _libc.ptrace.restype = ctypes.c_long
    _libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class _Info(ctypes.Structure):
    """`struct ptrace_syscall_info`."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction", ctypes.c_uint64),
        ("stack", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("args", ctypes.c_uint64 * 6),
    )


class Tracee(Child):
    """A child that is led from step to step. Use it in the thread that made it."""

    def __init__(self, function: Callable[..., Any], *args: Any, locks: bool = False) -> None:
        """`locks` makes taking and freeing a lock a step of its own."""
        self._locks = locks
        self._entered: tuple[str, str] | None = None
        super().__init__(_run, function, args)
        # A process that hangs ends the wait for its next step by dying.
        self._patience = threading.Timer(PATIENCE_S, os.kill, (self.pid, signal.SIGKILL))
        self._patience.daemon = True
        self._patience.start()
        self._wait_for_pause()
        options = _MARK_SYSCALL_STOPS | _KILL_WITH_TRACER
        _ptrace(_SET_OPTIONS, self.pid, options)
        _ptrace(_CONT, self.pid, 0)
        self._wait_for_pause()
        self._paused = False

    def next_step(self) -> str | None:
        """Let it go on until after its next step, and say what it was; None when it is through."""
        while not self._paused:
            _ptrace(_SYSCALL, self.pid, 0)
            stopped_by = self._wait()
            if stopped_by == signal.SIGSTOP:
                self._paused = True
            elif stopped_by == _SYSCALL_STOP:
                step = self._step()
                if step is not None:
                    return step
            else:
                raise AssertionError(f"the child got {signal.Signals(stopped_by).name}")
        return None

    def join(self, timeout_s: float = PATIENCE_S) -> int:
        """Return the exit code, or minus the signal."""
        self._patience.cancel()
        return super().join(timeout_s)

    def finish(self) -> None:
        """Let it run to its end."""
        while self.next_step():
            pass
        _ptrace(_CONT, self.pid, 0)
        assert self.join() == 0

    def _step(self) -> str | None:
        info = _Info()
        _ptrace(_SYSCALL_INFO, self.pid, ctypes.sizeof(info), ctypes.addressof(info))
        if info.op == _ENTRY:
            self._entered = self._describe(info)
            return None
        entered, self._entered = self._entered, None
        return None if entered is None else " ".join(entered).strip()

    def _describe(self, info: _Info) -> tuple[str, str] | None:
        name = _NAMES.get(info.number)
        if name is None:
            return None
        if name == "openat" and not info.args[2] & (os.O_CREAT | os.O_TRUNC):
            return None
        if name == "flock" or (name == "fcntl" and info.args[1] in _LOCKING_COMMANDS):
            if not self._locks:
                return None
        elif name == "fcntl":
            return None
        if name == _STORE:
            return "store", ""
        where = ""
        if name in _OF_A_FILE:
            with contextlib.suppress(OSError):
                where = _what(os.readlink(f"/proc/{self.pid}/fd/{info.args[0]}"))
        return name, where

    def _wait_for_pause(self) -> None:
        found = self._wait()
        assert found == signal.SIGSTOP, f"the child got {signal.Signals(found).name}"

    def _wait(self) -> int:
        """Return the signal that it stopped with; a child that ended fails the test."""
        _, status = os.waitpid(self.pid, _WAIT_ANY)
        if os.WIFSTOPPED(status):
            return os.WSTOPSIG(status)
        self.status = status
        self._patience.cancel()
        message = self.link.recv() if self.link.poll(0.1) else None
        text = message.text if isinstance(message, Failure) else f"it hung, or died: {status}"
        raise AssertionError("the traced child ended:\n" + text)


def _what(path: str) -> str:
    """Return a file's name, or its folder's where each file has a name of its own."""
    folder, name = os.path.split(path)
    kind = os.path.basename(folder)
    own = ("memory", "values", "staging", ".part")
    return kind if kind in own else name.partition(":")[0]


def _run(link: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if _libc.ptrace(_TRACE_ME, 0, None, None):
        raise OSError(ctypes.get_errno(), "ptrace")
    _pause()
    sys.settrace(_mark_stores)
    function(_pause, link, *args)


def _pause() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _mark_stores(frame: FrameType, event: str, arg: Any) -> Any:
    code = frame.f_code
    if code.co_name not in _STORING or code.co_filename != shared.__file__:
        return None
    if code.co_argcount < 2 and code.co_name not in ("reset", "wake"):
        return None  # a property that is read
    return _mark


def _mark(frame: FrameType, event: str, arg: Any) -> Any:
    os.getppid()
    return _mark


def _ptrace(request: int, pid: int, address: int, data: int | None = None) -> None:
    if request == _SET_OPTIONS:
        address, data = 0, address
    ctypes.set_errno(0)
    if _libc.ptrace(request, pid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")


def _nothing(pause: Callable[[], None], link: Connection) -> None:
    pause()
    os.getppid()
    pause()


@functools.cache
def why_not() -> str:
    """Return why processes cannot be traced here, or nothing."""
    if sys.platform != "linux" or not _CALLS:
        return "tracing system calls is known for Linux on x86-64 and ARM64 only"
    try:
        tracee = Tracee(_nothing)
        found = tracee.next_step()
        tracee.finish()
    except (OSError, AssertionError) as error:
        return f"ptrace is not allowed here: {error}"
    return "" if found == "store" else f"ptrace shows {found!r} in place of a known call"


def killed_somewhere_new(
    tried: set[tuple[str, int]], most: int, function: Any, *args: Any
) -> bool:
    """Kill one run after the first step that is not among those tried; False: there is none.

    Of steps of one kind only the first `most` count.
    """
    seen: dict[str, int] = {}
    tracee = Tracee(function, *args)
    with ending(tracee):
        while step := tracee.next_step():
            seen[step] = seen.get(step, 0) + 1
            if (step, seen[step]) not in tried and seen[step] <= most:
                tried.add((step, seen[step]))
                return True
        tracee.finish()
        return False
