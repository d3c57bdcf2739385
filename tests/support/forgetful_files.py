"""The living files of the forgetful disk: what processes see while the power is on.

Every change is appended to a log (see forgetful_model) before it is answered, so whatever
anybody was told is in the log. Holds no FUSE: methods take inode numbers and raise OSError.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from .forgetful_model import (
    PAGE_BYTES,
    ROOT,
    ZEROS,
    Make,
    Mark,
    Name,
    Operation,
    Resize,
    Sync,
    Write,
    Zero,
    patched,
    pieces,
    zeroed,
)

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10  # linux/falloc.h
NO_REPLACE, EXCHANGE = 0x01, 0x02  # linux/fs.h, of renameat2
UNLIMITED_PAGES = 1 << 40


def error(number: int) -> OSError:
    """The OSError of an errno."""
    return OSError(number, os.strerror(number))


class NoRoomError(OSError):
    """ENOSPC because there is no room, not because a fault was asked for."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclass
class Inode:
    """A file, folder or link that lives while it has a name or the kernel knows its number."""

    number: int
    mode: int
    owner: tuple[int, int]  # user, group
    size: int = 0
    pages: dict[int, bytes] = field(default_factory=dict[int, bytes])  # present = allocated
    # Name -> (inode, cookie); cookies grow, so that listings go on where they stopped.
    entries: dict[bytes, tuple[int, int]] = field(default_factory=dict[bytes, tuple[int, int]])
    target: bytes = b""
    names: int = 0
    known: int = 0  # the kernel's references
    last_name: tuple[int, bytes] = (ROOT, b"")
    times: list[int] = field(default_factory=lambda: [time.time_ns()] * 3)  # a, m, c

    def touch(self) -> None:
        self.times[1] = self.times[2] = time.time_ns()


@dataclass
class Fault:
    """`times` requests of a kind that fail, for paths that match `glob`; `after` more do not."""

    kind: str
    times: int
    glob: str
    error: int
    after: int


class Files:
    """The tree of inodes, the log of its changes, and the faults in force."""

    def __init__(self, log_limit_bytes: int) -> None:
        self.inodes = {ROOT: Inode(ROOT, stat.S_IFDIR | 0o755, (os.getuid(), os.getgid()), names=1)}
        self.log: list[Operation] = []
        self.position = 0  # operations logged so far, those taken away included
        self.faults: list[Fault] = []
        self.full = False
        self.capacity_bytes: int | None = None
        self._pages_used = 0
        self._log_room_bytes = self._log_limit_bytes = log_limit_bytes
        self._last_cookie = 0
        self._last_inode = ROOT

    # -- the log ------------------------------------------------------------------------------

    def record(self, operation: Operation) -> None:
        """Appends to the log; once it is over its limit nothing is kept any more."""
        self.position += 1
        self._log_room_bytes -= 100 + (len(operation.data) if isinstance(operation, Write) else 0)
        if self._log_room_bytes >= 0:
            self.log.append(operation)

    def take_log(self) -> list[Operation]:
        """The operations since it was last taken. ValueError when there were too many to keep."""
        if self._log_room_bytes < 0:
            raise ValueError("the log passed its limit: cut or take the record more often")
        taken, self.log = self.log, []
        self._log_room_bytes = self._log_limit_bytes
        return taken

    # -- faults and room ----------------------------------------------------------------------

    def path(self, inode: Inode) -> str:
        """The path relative to the mount by the name last given, '' for the root."""
        parts: list[bytes] = []
        while inode.number != ROOT:
            folder, name = inode.last_name
            parts.append(name)
            inode = self.inodes.get(folder, self.inodes[ROOT])
        return os.fsdecode(b"/".join(reversed(parts)))

    def fails(self, kind: str, inode: Inode) -> int:
        """The errno with which this request is to fail, 0 for none."""
        for fault in self.faults:
            if fault.kind == kind and fnmatch.fnmatchcase(self.path(inode), fault.glob):
                if fault.after:
                    fault.after -= 1
                    continue
                fault.times -= 1
                if not fault.times:
                    self.faults.remove(fault)
                return fault.error
        return 0

    def check(self, kind: str, inode: Inode) -> None:
        """OSError when a fault is in force for it."""
        if number := self.fails(kind, inode):
            raise error(number)

    @property
    def total_pages(self) -> int:
        """The size of the disk in pages."""
        if self.capacity_bytes is None:
            return UNLIMITED_PAGES
        return self.capacity_bytes // PAGE_BYTES

    @property
    def free_pages(self) -> int:
        """Pages that may still be allocated."""
        return 0 if self.full else max(self.total_pages - self._pages_used, 0)

    def _put(self, inode: Inode, parts: Iterable[tuple[int, int, bytes]]) -> None:
        before = len(inode.pages)
        for page, start, chunk in parts:
            inode.pages[page] = patched(inode.pages.get(page, ZEROS), start, chunk)
        self._pages_used += len(inode.pages) - before

    def _drop(self, inode: Inode, pages: Iterable[int]) -> None:
        for page in list(pages):
            if inode.pages.pop(page, None) is not None:
                self._pages_used -= 1

    # -- names --------------------------------------------------------------------------------

    def entry(self, folder: int, name: bytes) -> Inode | None:
        """The inode that a name leads to."""
        found = self.inodes[folder].entries.get(name)
        return self.inodes[found[0]] if found else None

    def make(
        self, folder: int, name: bytes, mode: int, owner: tuple[int, int], target: bytes = b""
    ) -> Inode:
        """A new inode under a new name."""
        self.check("name", self.inodes[folder])
        self._last_inode += 1
        inode = Inode(self._last_inode, mode, owner, size=len(target), target=target)
        self.inodes[inode.number] = inode
        self.record(Make(inode.number, mode, target))
        self._rename((folder, name, inode))
        return inode

    def link(self, inode: Inode, folder: int, name: bytes) -> None:
        """One more name for a file."""
        self.check("name", self.inodes[folder])
        self._rename((folder, name, inode))

    def remove(self, folder: int, name: bytes) -> None:
        """Takes away the name of a file or of an empty folder."""
        self.check("name", self.inodes[folder])
        inode = self._existing(folder, name)
        if inode.entries:
            raise error(errno.ENOTEMPTY)
        self._rename((folder, name, None))

    def rename(self, old: tuple[int, bytes], new: tuple[int, bytes], flags: int) -> None:
        """As renameat2, RENAME_NOREPLACE and RENAME_EXCHANGE included."""
        self.check("name", self.inodes[new[0]])
        inode = self._existing(*old)
        there = self.entry(*new)
        if flags & EXCHANGE:
            self._rename((*old, self._existing(*new)), (*new, inode))
        elif flags & ~NO_REPLACE:
            raise error(errno.EINVAL)
        elif there and flags & NO_REPLACE:
            raise error(errno.EEXIST)
        elif there and there.entries:
            raise error(errno.ENOTEMPTY)
        else:
            self._rename((*old, None), (*new, inode))

    def _existing(self, folder: int, name: bytes) -> Inode:
        inode = self.entry(folder, name)
        if inode is None:
            raise error(errno.ENOENT)
        return inode

    def _rename(self, *changes: tuple[int, bytes, Inode | None]) -> None:
        """Makes the changes as one, logs them, and frees what lost its last name."""
        lost = [self.entry(folder, name) for folder, name, _ in changes]
        for folder, name, inode in changes:
            place = self.inodes[folder]
            place.entries.pop(name, None)
            place.touch()
            if inode:
                self._last_cookie += 1
                place.entries[name] = (inode.number, self._last_cookie)
                inode.names += 1
                inode.last_name = (folder, name)
        self.record(Name(tuple((at, name, i.number if i else 0) for at, name, i in changes)))
        for inode in lost:
            if inode:
                inode.names -= 1
                inode.times[2] = time.time_ns()
                self.forget(inode.number, 0)

    def forget(self, number: int, references: int) -> None:
        """The kernel gives back references; what has neither those nor a name is gone."""
        inode = self.inodes.get(number)
        if inode is None:
            return
        inode.known -= references
        if inode.known <= 0 and inode.names <= 0:
            self._drop(inode, inode.pages)
            del self.inodes[number]

    # -- contents -----------------------------------------------------------------------------

    def read(self, inode: Inode, offset: int, length: int) -> bytes:
        """Up to `length` bytes, fewer at the end of the file."""
        self.check("read", inode)
        end = min(offset + length, inode.size)
        if offset >= end:
            return b""
        first = offset // PAGE_BYTES
        pages = range(first, -(-end // PAGE_BYTES))
        content = b"".join(inode.pages.get(page, ZEROS) for page in pages)
        start = offset - first * PAGE_BYTES
        return content[start : start + end - offset]

    def write(self, inode: Inode, offset: int, data: bytes) -> int:
        """Writes what there is room for and returns how many bytes; ENOSPC for none."""
        self.check("write", inode)
        room = self.free_pages
        for page in range(offset // PAGE_BYTES, -(-(offset + len(data)) // PAGE_BYTES)):
            room -= page not in inode.pages
            if room < 0:
                data = data[: max(page * PAGE_BYTES - offset, 0)]
                break
        if not data:
            raise NoRoomError
        self._put(inode, pieces(offset, data))
        inode.size = max(inode.size, offset + len(data))
        inode.touch()
        self.record(Write(inode.number, offset, data))
        return len(data)

    def resize(self, inode: Inode, size: int) -> None:
        """As truncate: shrinks, or grows by a hole, which needs no room."""
        self.check("resize", inode)
        if size < inode.size:
            edge = [page for page in [size // PAGE_BYTES] if page in inode.pages]
            self._put(inode, zeroed(edge, size, float("inf")))
            first_gone = -(-size // PAGE_BYTES)
            self._drop(inode, [page for page in inode.pages if page >= first_gone])
        inode.size = size
        inode.touch()
        self.record(Resize(inode.number, size))

    def allocate(self, inode: Inode, offset: int, length: int, mode: int) -> None:
        """As fallocate: allocates, or punches a hole, or zeroes a range."""
        self.check("allocate", inode)
        end = offset + length
        if mode & ~(KEEP_SIZE | PUNCH_HOLE | ZERO_RANGE):
            raise error(errno.EOPNOTSUPP)
        if mode & (PUNCH_HOLE | ZERO_RANGE):
            first, last = offset // PAGE_BYTES, (end - 1) // PAGE_BYTES
            within = [page for page in inode.pages if first <= page <= last]
            self._put(inode, zeroed(within, offset, end))
            self.record(Zero(inode.number, offset, length))
            if mode & PUNCH_HOLE:
                self._drop(inode, [page for page in within if inode.pages[page] == ZEROS])
                return
        pages = range(offset // PAGE_BYTES, -(-end // PAGE_BYTES))
        absent = [page for page in pages if page not in inode.pages]
        if len(absent) > self.free_pages:
            raise NoRoomError
        self._put(inode, ((page, 0, ZEROS) for page in absent))
        if end > inode.size and not mode & KEEP_SIZE:
            inode.size = end
            self.record(Resize(inode.number, end))
        inode.touch()

    def seek(self, inode: Inode, offset: int, whence: int) -> int:
        """As lseek with SEEK_DATA or SEEK_HOLE."""
        if offset >= inode.size:
            raise error(errno.ENXIO)
        page = offset // PAGE_BYTES
        if whence == os.SEEK_HOLE:
            while page in inode.pages:
                page += 1
            return min(max(page * PAGE_BYTES, offset), inode.size)
        later = [at for at in inode.pages if at >= page and at * PAGE_BYTES < inode.size]
        if not later:
            raise error(errno.ENXIO)
        return max(min(later) * PAGE_BYTES, offset)

    def sync(self, number: int, before: int, failed: bool) -> None:
        """Notes that a sync of an inode ended, covering what was logged before `before`."""
        self.record(Sync(number, before, failed))

    def mark(self, text: str) -> None:
        """Notes what a process wants to have in the log."""
        self.record(Mark(text))
