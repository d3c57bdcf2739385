"""The shared page: what processes of one host tell each other without a system call.

The file `shared` is one page that every process maps. Integers are little-endian:

    offset size
         0    8  magic, b"EVSHARE1"
         8   16  boot id: the page means nothing after a reboot
        24    8  started: the newest version that a commit was begun for
        32    8  applied: the version that mapped memory is at
        40    8  pid of the process that holds, or last held, the writer's lock
        48    4  wake: counts publications; waiters sleep on it (futex)
        52    4  waiting: not 0 when somebody may sleep on `wake`
        56    4  suspect: not 0 when a flush of the index failed and was not made up for
        60    4  unflushed: not 0 when a flush of memory was begun and none has succeeded since
        64    4  queued: not 0 when somebody may wait for the writer's lock at its turnstile

Only the holder of the writer's lock changes anything but `waiting`, `unflushed`, which is for the
holder of the flusher's lock, and `queued`, which is for who is in the turnstile (see `lock`).
While `started` equals `applied`, the index is not ahead of memory and nobody is writing to it.
"""

import contextlib
import ctypes
import mmap
import os
import platform
import struct
import sys
import threading
import time
from pathlib import Path

PAGE_BYTES = 4096
_MAGIC = b"EVSHARE1"
_STARTED, _APPLIED, _PID = 3, 4, 5
_WAKE, _WAITING, _SUSPECT, _UNFLUSHED, _QUEUED = 12, 13, 14, 15, 16
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_FUTEX_CALL = {"x86_64": 202, "aarch64": 98, "riscv64": 98}.get(platform.machine())
_POLL_S = 0.001
# A wake-up that is missed by a hair costs at most this long.
_LONGEST_SLEEP_S = 0.05

_order_lock = threading.Lock()


def _renew_order_lock() -> None:
    """In a forked child: a thread that does not exist here may have held it."""
    global _order_lock
    _order_lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_order_lock)


def boot_id() -> bytes:
    """Return 16 bytes that are the same until this machine boots again."""
    override = os.environ.get("EVERPOOL_BOOT_ID")  # for tests of power loss
    if override:
        return bytes.fromhex(override.replace("-", ""))
    with contextlib.suppress(OSError):
        text = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return bytes.fromhex(text.replace("-", ""))
    if sys.platform == "darwin":
        size = ctypes.c_size_t(64)
        buffer = ctypes.create_string_buffer(64)
        libc = ctypes.CDLL(None)
        if libc.sysctlbyname(b"kern.bootsessionuuid", buffer, ctypes.byref(size), None, 0) == 0:
            return bytes.fromhex(buffer.value.decode().replace("-", ""))
    return bytes(16)  # unknown: never equal to a page's, so the tail is always played again


def order_loads() -> None:
    """Keep loads before this call before those after it, on processors that reorder them."""
    with _order_lock:
        pass


class SharedPage:
    """One process's mapping of the shared page."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        self._writable = writable
        mapped = _map_for_writing(path) if writable else _map_for_reading(path)
        self._map: mmap.mmap | bytearray = mapped
        view = memoryview(self._map)
        self._words = view.cast("Q")
        self._half_words = view.cast("I")
        self._address = 0
        self._anchor: ctypes.c_char | None = None
        if writable and _FUTEX_CALL is not None and sys.platform == "linux":
            self._anchor = ctypes.c_char.from_buffer(self._map)
            self._address = ctypes.addressof(self._anchor) + 4 * _WAKE

    def close(self) -> None:
        """Let go of the page, which else lives as long as a handle or transaction refers to it.

        Who still looks sees a commit that never ends, and so asks the index, which is closed.
        """
        blank = bytearray(PAGE_BYTES)
        self._address = 0
        self._anchor = None
        self._map = blank
        self._words, self._half_words = memoryview(blank).cast("Q"), memoryview(blank).cast("I")
        self._words[_STARTED] = 1

    def trusted(self) -> bool:
        """Whether the marks were written since this machine booted."""
        boot = boot_id()
        return self._map[:8] == _MAGIC and self._map[8:24] == boot and boot != bytes(16)

    def reset(self, version: int) -> None:
        """Make the page valid for this boot, with everything up to `version` applied."""
        self._words[_STARTED] = version
        self._words[_APPLIED] = version
        self.suspect = 0
        self.trust()

    def trust(self) -> None:
        """Make the page valid for this boot, with what it says of versions."""
        self.unflushed = 0
        self._map[8:24] = boot_id()
        self._map[:8] = _MAGIC

    @property
    def started(self) -> int:
        return self._words[_STARTED]

    @started.setter
    def started(self, version: int) -> None:
        self._words[_STARTED] = version

    @property
    def applied(self) -> int:
        return self._words[_APPLIED]

    @applied.setter
    def applied(self, version: int) -> None:
        self._words[_APPLIED] = version

    @property
    def holder(self) -> int:
        return self._words[_PID]

    @holder.setter
    def holder(self, pid: int) -> None:
        self._words[_PID] = pid

    @property
    def suspect(self) -> int:
        return self._half_words[_SUSPECT]

    @suspect.setter
    def suspect(self, value: int) -> None:
        self._half_words[_SUSPECT] = value

    @property
    def unflushed(self) -> int:
        return self._half_words[_UNFLUSHED]

    @unflushed.setter
    def unflushed(self, value: int) -> None:
        self._half_words[_UNFLUSHED] = value

    @property
    def queued(self) -> int:
        return self._half_words[_QUEUED]

    @queued.setter
    def queued(self, value: int) -> None:
        self._half_words[_QUEUED] = value

    def settled(self) -> int:
        """Return the version that memory and index are both at, or -1 during a commit."""
        words = self._words
        applied = words[_APPLIED]
        return applied if words[_STARTED] == applied else -1

    def wake(self) -> None:
        """Tell waiters that something was published. Call with the writer's lock held."""
        words = self._half_words
        words[_WAKE] = (words[_WAKE] + 1) & 0xFFFFFFFF
        if words[_WAITING]:
            words[_WAITING] = 0
            if self._address:
                _futex(self._address, _FUTEX_WAKE, 0x7FFFFFFF, None)

    def publications(self) -> int:
        """Return a number that changes with every publication."""
        return self._half_words[_WAKE]

    def wait(self, seen: int, timeout_s: float) -> None:
        """Sleep until `publications()` is no longer `seen`, or for `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self._half_words[_WAKE] == seen:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return
            if self._address:
                self._half_words[_WAITING] = 1
                _futex(self._address, _FUTEX_WAIT, seen, min(left_s, _LONGEST_SLEEP_S))
            else:
                time.sleep(min(left_s, _POLL_S))


def _map_for_writing(path: Path) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if os.fstat(descriptor).st_size < PAGE_BYTES:
            os.pwrite(descriptor, bytes(PAGE_BYTES), 0)
        if hasattr(os, "posix_fallocate"):
            # A store into a hole, which a power cut may leave, is a SIGBUS on a full disk.
            with contextlib.suppress(OSError):
                os.posix_fallocate(descriptor, 0, PAGE_BYTES)
        return mmap.mmap(descriptor, PAGE_BYTES, access=mmap.ACCESS_WRITE)
    finally:
        os.close(descriptor)


def _map_for_reading(path: Path) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_size < PAGE_BYTES:
            return mmap.mmap(-1, PAGE_BYTES)  # cut short by a power cut: no boot's marks
        return mmap.mmap(descriptor, PAGE_BYTES, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def _futex(address: int, operation: int, value: int, timeout_s: float | None) -> None:
    timeout = None
    if timeout_s is not None:
        timeout = ctypes.byref(_Timespec(int(timeout_s), int(timeout_s % 1 * 1e9)))
    _syscall(
        ctypes.c_long(_FUTEX_CALL or 0),
        ctypes.c_void_p(address),
        ctypes.c_int(operation),
        ctypes.c_uint32(value),
        timeout,
        None,
        ctypes.c_int(0),
    )


REORDERS_LOADS = platform.machine() not in ("x86_64", "AMD64", "i686")
assert struct.calcsize("Q") == 8 and sys.byteorder == "little"
