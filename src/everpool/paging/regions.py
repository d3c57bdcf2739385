"""Regions: the bytes of memory objects in shared memory, and which blocks of them are there.

A region is a memfd. It has no path, so that nobody but whom its agent hands it to can open it:

    size bytes, rounded up to whole blocks of 64 KiB    the object's bytes
    1 byte for each block                               1 when the block is there, 0 when not

A block that is there stays there; it changes as commits change it. What is in a block that is not
there means nothing. Its name, which the kernel shows in /proc, is `everpool-REPLICA-OBJECT`, so
that an agent that takes over from a dead one finds the regions its clients still have.
"""

import contextlib
import mmap
import os
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BLOCK_SHIFT = 16
BLOCK_BYTES = 1 << BLOCK_SHIFT
_LINK = re.compile(r"/memfd:everpool-([0-9a-f]+)-([0-9a-f]+) \(deleted\)")
_MOST_MAPPED = 1024


def blocks_of(offset: int, size: int) -> range:
    """Return the numbers of the blocks that a range of bytes touches."""
    return range(offset >> BLOCK_SHIFT, ((offset + size - 1) >> BLOCK_SHIFT) + 1 if size else 0)


def _block_count(size: int) -> int:
    return -(-size >> BLOCK_SHIFT)


class Region:
    """One object's region, as its agent uses it."""

    def __init__(self, size: int, descriptor: int) -> None:
        self.size = size
        self.descriptor = descriptor
        self.inode = os.fstat(descriptor).st_ino
        blocks = _block_count(size)
        start = blocks << BLOCK_SHIFT
        # Maps begin at whole pages, which the presence bytes do, too.
        self._map = mmap.mmap(descriptor, max(1, blocks), offset=start)
        self.present: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8, blocks)

    @classmethod
    def create(cls, replica: str, id: int, size: int) -> "Region":
        """Return a new region without any block."""
        descriptor = os.memfd_create(f"everpool-{replica}-{id:x}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, length_of(size))
            return cls(size, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store bytes, which must be within blocks that are there or are about to be."""
        view = memoryview(data)
        while view:
            done = os.pwrite(self.descriptor, view, offset)
            view = view[done:]
            offset += done

    def write_present(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store the bytes that fall into blocks that are there."""
        blocks = blocks_of(offset, len(data))
        present = self.present[blocks.start : blocks.stop]
        if present.all():
            self.write(offset, data)
            return
        view = memoryview(data)
        for block in (blocks.start + np.flatnonzero(present)).tolist():
            start = max(offset, block << BLOCK_SHIFT)
            end = min(offset + len(data), (block + 1) << BLOCK_SHIFT)
            self.write(start, view[start - offset : end - offset])

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of blocks that are there."""
        return os.pread(self.descriptor, size, offset)

    def absent(self, ranges: Iterable[tuple[int, int]]) -> list[int]:
        """Return which blocks are not there, of those that ranges of (offset, size) touch."""
        found: set[int] = set()
        for offset, size in ranges:
            blocks = blocks_of(offset, size)
            present = self.present[blocks.start : blocks.stop]
            found.update((blocks.start + np.flatnonzero(present == 0)).tolist())
        return sorted(found)

    def close(self) -> None:
        """Give the descriptor back; who has mapped the region keeps it."""
        self.present = np.zeros(0, np.uint8)
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self.descriptor)


def length_of(size: int) -> int:
    """Return the bytes of the region of an object of `size` bytes."""
    blocks = _block_count(size)
    return (blocks << BLOCK_SHIFT) + max(1, blocks)


def adopt(replica: str, pids: Iterable[int]) -> dict[int, int]:
    """Return descriptors of the regions of a replica that processes have, by object."""
    found: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for entry in list(Path(f"/proc/{pid}/fd").iterdir()):
                with contextlib.suppress(OSError):
                    link = _LINK.fullmatch(os.readlink(entry))
                    if link is not None and link[1] == replica and int(link[2], 16) not in found:
                        found[int(link[2], 16)] = os.open(entry, os.O_RDWR | os.O_CLOEXEC)
    return found


class SharedMemories:
    """The memory of a replica whose agent hands out regions, as its clients use it.

    `hand_out(id)` returns a descriptor of the region, or raises `FileNotFoundError`;
    `confirm(id, inode)` tells whether the region is the one that the agent keeps: the agent that
    handed it out may have died before its successor could find it here. `fetch(id, ranges)`
    returns when all blocks that the ranges touch are there.
    """

    def __init__(
        self,
        hand_out: Callable[[int], int],
        confirm: Callable[[int, int], bool],
        fetch: Callable[[int, list[tuple[int, int]]], None],
        extents: Callable[[int], list[tuple[int, int]]],
    ) -> None:
        self._hand_out = hand_out
        self._confirm = confirm
        self._fetch = fetch
        self._extents = extents
        self._mutex = threading.Lock()
        self._maps: dict[int, tuple[mmap.mmap, NDArray[np.uint8]]] = {}
        self._inodes: dict[int, int] = {}

    def regions(self) -> list[tuple[int, int]]:
        """Return the regions that are mapped, as (object, inode)."""
        with self._mutex:
            return list(self._inodes.items())

    def map(self, id: int, size: int) -> mmap.mmap:
        """Return a mapping that begins with the object's bytes, fetched or not."""
        return self._region(id, size)[0]

    def _region(self, id: int, size: int) -> tuple[mmap.mmap, NDArray[np.uint8]]:
        with self._mutex:
            known = self._maps.get(id)
        while known is None:
            mapped, inode = self._mapped(id, size)
            if self._confirm(id, inode):
                known = self._keep(id, inode, mapped, _block_count(size))
        return known

    def _mapped(self, id: int, size: int) -> tuple[mmap.mmap, int]:
        """Return a mapping of the region, which keeps its descriptor, and the region's inode."""
        descriptor = self._hand_out(id)
        try:
            status = os.fstat(descriptor)
            if status.st_size != length_of(size):
                raise FileNotFoundError(f"the region of object {id} has {status.st_size} bytes")
            return mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ), status.st_ino
        finally:
            os.close(descriptor)

    def _keep(
        self, id: int, inode: int, mapped: mmap.mmap, blocks: int
    ) -> tuple[mmap.mmap, NDArray[np.uint8]]:
        present = np.frombuffer(mapped, np.uint8, blocks, blocks << BLOCK_SHIFT)
        with self._mutex:
            if len(self._maps) >= _MOST_MAPPED:
                oldest = next(iter(self._maps))
                del self._maps[oldest], self._inodes[oldest]
            self._inodes.setdefault(id, inode)
            return self._maps.setdefault(id, (mapped, present))

    def ensure(self, id: int, offset: int, size: int) -> None:
        """Have the blocks fetched that are not there."""
        known = self._maps.get(id)
        blocks = blocks_of(offset, size)
        if known is None or not known[1][blocks.start : blocks.stop].all():
            self._fetch(id, [(offset, size)])

    def is_whole(self, id: int) -> bool:
        """Whether all blocks are there."""
        known = self._maps.get(id)
        return known is not None and bool(known[1].all())

    def extents(self, id: int, size: int) -> list[tuple[int, int]]:
        """Return the parts that were ever written to; all bytes outside are zero."""
        return self._extents(id)

    def close(self) -> None:
        """Let go of the mappings that nobody uses."""
        with self._mutex:
            self._maps.clear()
            self._inodes.clear()
