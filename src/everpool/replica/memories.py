"""Memory files: the bytes of mutable memory, one sparse file an object, mapped by every process.

Stores go through `pwrite`, which the mappings of all processes see at once, and which reports a
full disk as an error where a store into a mapping would kill the process.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from everpool.errors import CorruptionError, InvalidError

_OPEN_FILES = 128
_PAGE_SHIFT = 12
_REMEMBERED_PAGES = 1 << 16
_COPY_BYTES = 8 << 20


class Memories(Protocol):
    """The bytes of mutable memory, as readers of a replica use them."""

    def ensure(self, id: int, offset: int, size: int) -> None:
        """Bring the bytes into mapped memory, where they are not there already."""
        ...

    def is_whole(self, id: int) -> bool:
        """Whether all of the object is in mapped memory for sure."""
        ...

    def map(self, id: int, size: int) -> mmap.mmap:
        """Return a read-only mapping that begins with the object's bytes.

        Raises `FileNotFoundError` when it is gone and `CorruptionError` when its length is wrong.
        """
        ...

    def extents(self, id: int, size: int) -> list[tuple[int, int]]:
        """Return (offset, size) of the parts that may be other than zero, in order."""
        ...

    def close(self) -> None:
        """Release what is held; mappings live as long as they are used."""
        ...


class MutableMemories(Memories, Protocol):
    """The same for the one who applies entries."""

    def create(self, id: int, size: int) -> None:
        """Make sure that object `id` exists. May be repeated."""
        ...

    def exists(self, id: int) -> bool:
        """Whether there are bytes of the object to change."""
        ...

    def reserve(self, id: int, offset: int, size: int, limit: int) -> list[tuple[int, int]]:
        """Make sure that there is room for these bytes; returns what `give_back` takes."""
        ...

    def give_back(self, id: int, holes: list[tuple[int, int]]) -> None:
        """Undo `reserve` for an entry that came to nothing."""
        ...

    def write(self, id: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store the bytes where every process sees them."""
        ...

    def read(self, id: int, offset: int, size: int) -> bytes:
        """Return the bytes as they are."""
        ...

    def remove(self, id: int) -> None:
        """Drop the object's bytes; mappings of it live on. May be repeated."""
        ...

    def sweep(self, is_garbage: Callable[[int], bool]) -> None:
        """Drop the objects that no record has made, or that one has deleted."""
        ...


class MemoryFiles:
    """The memory files of one pool, as one process uses them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "memory"
        self._mutex = threading.Lock()
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._maps: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
        self._allocated: set[tuple[int, int]] = set()

    def path(self, id: int) -> Path:
        """Return where the bytes of object `id` are."""
        return self.folder / f"{id:x}"

    def exists(self, id: int) -> bool:
        """Whether the object has a file."""
        return self.path(id).exists()

    def ensure(self, id: int, offset: int, size: int) -> None:
        """Do nothing: the mapping of a file is all there."""

    def is_whole(self, id: int) -> bool:
        """Whether all of the object is mapped: it is."""
        return True

    def create(self, id: int, size: int) -> None:
        """Make sure that the file exists and is `size` bytes long. May be repeated."""
        descriptor = os.open(self.path(id), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if os.fstat(descriptor).st_size != size:
                os.ftruncate(descriptor, size)
        except OSError as error:
            if error.errno not in (errno.EFBIG, errno.EINVAL):
                raise
            raise InvalidError(
                f"this file system has no files of {size} bytes: allocate less"
            ) from error
        finally:
            os.close(descriptor)

    def reserve(self, id: int, offset: int, size: int, limit: int) -> list[tuple[int, int]]:
        """Make sure that there is room on the disk for these bytes, whatever they are now.

        Returns the holes that were filled for it, for `give_back`. Raises `CorruptionError` when
        the file is missing or does not have `limit` bytes.
        """
        first, last = offset >> _PAGE_SHIFT, (offset + size - 1) >> _PAGE_SHIFT
        known = self._allocated
        small = last - first < 4
        if small and all((id, page) in known for page in range(first, last + 1)):
            return []
        start = first << _PAGE_SHIFT
        try:
            descriptor = self._descriptor(id)
        except FileNotFoundError as error:
            raise missing(id) from error
        _check_length(id, os.fstat(descriptor).st_size, limit)
        end = min((last + 1) << _PAGE_SHIFT, limit)
        holes = _holes(descriptor, start, end)
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(descriptor, start, end - start)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    self.give_back(id, holes)
                    raise
        if small:
            if len(known) >= _REMEMBERED_PAGES:
                known.clear()
            known.update((id, page) for page in range(first, last + 1))
        return holes

    def give_back(self, id: int, holes: list[tuple[int, int]]) -> None:
        """Undo `reserve` for an entry that came to nothing: it must not eat up the last room."""
        self._allocated.clear()  # the id may come to stand for another object
        for start, end in holes:
            _punch(self._descriptor(id), start, end - start)

    def write(self, id: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store the bytes where every process sees them."""
        descriptor = self._descriptor(id)
        written = os.pwrite(descriptor, data, offset)
        if written < len(data):
            view = memoryview(data)
            while written < len(view):
                written += os.pwrite(
                    descriptor, view[written : written + _COPY_BYTES], offset + written
                )

    def read(self, id: int, offset: int, size: int) -> bytes:
        """Return the bytes as they are in the file."""
        data = os.pread(self._descriptor(id), size, offset)
        if len(data) != size:
            raise CorruptionError(
                f"the file of memory object {id} ends before byte {offset + size}: "
                "restore the pool from a copy"
            )
        return data

    def extents(self, id: int, size: int) -> list[tuple[int, int]]:
        """Return (offset, size) of the parts of the file that are not holes, in order."""
        found: list[tuple[int, int]] = []
        descriptor = os.open(self.path(id), os.O_RDONLY | os.O_CLOEXEC)
        try:
            end = 0
            while end < size:
                start = os.lseek(descriptor, end, os.SEEK_DATA)
                end = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
                found.append((start, end - start))
        except OSError as error:
            if error.errno == errno.EINVAL:  # a file system that does not tell
                return [(0, size)]
            if error.errno != errno.ENXIO:  # nothing but a hole is left
                raise
        finally:
            os.close(descriptor)
        return found

    def map(self, id: int, size: int) -> mmap.mmap:
        """Return a read-only mapping of the object.

        Raises `FileNotFoundError` when it is gone and `CorruptionError` when its length is wrong.
        """
        mapped = self._maps.get(id)
        if mapped is not None:
            return mapped
        descriptor = os.open(self.path(id), os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check_length(id, os.fstat(descriptor).st_size, size)
            mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        self._maps[id] = mapped
        return mapped

    def remove(self, id: int) -> None:
        """Delete the file; mappings of it live on. May be repeated."""
        with self._mutex:
            descriptor = self._descriptors.pop(id, None)
        if descriptor is not None:
            os.close(descriptor)
        self.path(id).unlink(missing_ok=True)

    def sweep(self, is_garbage: Callable[[int], bool]) -> None:
        """Delete the files of the objects that no record has made, or that one has deleted."""
        for name in os.listdir(self.folder):
            with contextlib.suppress(ValueError):
                if is_garbage(int(name, 16)):
                    self.remove(int(name, 16))

    def drop_deleted(self) -> None:
        """Let go of files that another process deleted. Call with the writer's lock held."""
        with self._mutex:
            for id, descriptor in list(self._descriptors.items()):
                if not os.fstat(descriptor).st_nlink:
                    os.close(self._descriptors.pop(id))

    def sync(self, id: int) -> None:
        """Make the object's bytes durable. An object that is gone needs nothing."""
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(self.path(id), os.O_RDWR | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def close(self) -> None:
        """Close the descriptors; mappings live as long as they are used."""
        with self._mutex:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def _descriptor(self, id: int) -> int:
        """Return a descriptor for stores. Call with the writer's lock held."""
        descriptors = self._descriptors
        descriptor = descriptors.get(id)
        if descriptor is None:
            descriptor = os.open(self.path(id), os.O_RDWR | os.O_CLOEXEC)
            with self._mutex:
                descriptors[id] = descriptor
                if len(descriptors) > _OPEN_FILES:
                    os.close(descriptors.popitem(last=False)[1])
        return descriptor


def missing(id: int) -> CorruptionError:
    """Return the error for an object whose file is lost."""
    return CorruptionError(
        f"the file of memory object {id} is missing: restore the pool from a copy"
    )


def _check_length(id: int, length: int, expected: int) -> None:
    if length != expected:
        raise CorruptionError(
            f"the file of memory object {id} has {length} bytes instead of {expected}: "
            "restore the pool from a copy"
        )


_KEEP_SIZE_AND_PUNCH_HOLE = 3
_fallocate = getattr(ctypes.CDLL(None), "fallocate", None)
if _fallocate is not None:
    _fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def _holes(descriptor: int, start: int, end: int) -> list[tuple[int, int]]:
    """Return the parts of a range that take no room on the disk, as far as the system tells."""
    holes: list[tuple[int, int]] = []
    with contextlib.suppress(OSError, AttributeError):
        while start < end:
            hole = os.lseek(descriptor, start, os.SEEK_HOLE)
            if hole >= end:
                break
            try:
                start = min(end, os.lseek(descriptor, hole, os.SEEK_DATA))
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                start = end  # no more data in the file
            holes.append((hole, start))
    return holes


def _punch(descriptor: int, start: int, size: int) -> None:
    """Make a hole, where the system has such a thing."""
    if _fallocate is not None:
        _fallocate(descriptor, _KEEP_SIZE_AND_PUNCH_HOLE, start, size)
