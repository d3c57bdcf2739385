"""Small disks, full disks, disks that refuse: each in a process with mounts of its own.

    on_own_disk(function, point, *args, size_bytes=...)     calls function(disk, *args) over there

Nothing is left mounted, whatever happens: the mounts end with the process. The file system is an
ext4 in a file. It is not a tmpfs, which takes memory for holes that are merely read, so that
reading a mapping when it is full is a SIGBUS, whoever wrote the program.
"""

import ctypes
import errno
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.processes import PATIENCE_S, call

PAGE_BYTES = 4096
_NEW_MOUNTS, _NEW_USER = 0x20000, 0x10000000
_PRIVATE, _RECURSIVE, _REMOUNT, _READ_ONLY, _BIND = 1 << 18, 1 << 14, 1 << 5, 1, 1 << 12
_libc = ctypes.CDLL(None, use_errno=True)


def on_own_disk(
    function: Callable[..., Any],
    point: Path,
    *args: Any,
    size_bytes: int,
    timeout_s: float = 2 * PATIENCE_S,
) -> Any:
    """Return `function(disk, *args)`, worked out in a process that has a disk at `point`."""
    return call(_mounted, function, point, args, size_bytes, timeout_s=timeout_s)


def _mounted(function: Callable[..., Any], point: Path, args: tuple[Any, ...], size: int) -> Any:
    _own_mounts()
    point.mkdir(exist_ok=True)
    image = point.with_suffix(".img")
    with open(image, "wb") as file:
        file.truncate(size)
    path = os.environ["PATH"] + ":/sbin:/usr/sbin"
    make = ["mkfs.ext4", "-q", "-m0", f"-b{PAGE_BYTES}", image]
    for command in (make, ["mount", "-o", "loop", image, point]):
        done = subprocess.run(
            command, env=dict(os.environ, PATH=path), capture_output=True, text=True
        )
        if done.returncode:
            raise OSError(f"{command[0]}: {done.stderr.strip()}")
    shutil.rmtree(point / "lost+found")
    return function(Disk(point), *args)


class Disk:
    """A small file system, as the process that mounted it uses it."""

    def __init__(self, point: Path) -> None:
        self.path = point
        self._ballast = point / "ballast"

    def fill(self, spare_pages: int) -> None:
        """Take all room but for so many pages."""
        with open(self._ballast, "ab", buffering=0) as ballast:
            size, step = ballast.tell(), 1 << 24
            while step >= PAGE_BYTES:
                try:
                    os.posix_fallocate(ballast.fileno(), size, step)
                    size += step
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    step >>= 1
            ballast.truncate(max(0, size - spare_pages * PAGE_BYTES))

    def free_pages(self) -> int:
        return os.statvfs(self.path).f_bavail

    def clear(self) -> None:
        """Give the room back."""
        self._ballast.unlink(missing_ok=True)

    def refuse_writes(self) -> None:
        """Make the file system read-only."""
        _mount(None, self.path, None, _REMOUNT | _READ_ONLY, None)

    def allow_writes(self) -> None:
        _mount(None, self.path, None, _REMOUNT, None)

    def read_only_view(self, folder: Path, view: Path) -> None:
        """Show a folder at another place, read-only."""
        view.mkdir()
        _mount(os.fspath(folder), view, None, _BIND, None)
        _mount(None, view, None, _BIND | _REMOUNT | _READ_ONLY, None)


@functools.cache
def why_not() -> str:
    """Return why there can be no disks of one's own here, or nothing."""
    if sys.platform != "linux":
        return "needs Linux's mount namespaces"
    with tempfile.TemporaryDirectory() as folder:
        try:
            on_own_disk(lambda disk: None, Path(folder) / "disk", size_bytes=8 << 20)
        except AssertionError as error:
            return f"cannot mount a file system here: {str(error).strip().splitlines()[-1]}"
    return ""


def _own_mounts() -> None:
    user, group = os.geteuid(), os.getegid()
    flags = _NEW_MOUNTS | (_NEW_USER if user else 0)
    _check(_libc.unshare(flags), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount(None, Path("/"), None, _PRIVATE | _RECURSIVE, None)


def _mount(
    source: str | None, point: Path, kind: str | None, flags: int, options: str | None
) -> None:
    def text(value: str | None) -> bytes | None:
        return None if value is None else value.encode()

    result = _libc.mount(
        text(source), os.fsencode(point), text(kind), ctypes.c_ulong(flags), text(options)
    )
    _check(result, f"mounting at {point}")


def _check(result: int, doing: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{doing}: {os.strerror(number)}")
