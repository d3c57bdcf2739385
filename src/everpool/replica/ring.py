"""The ring: a copy of the newest entries inside LMDB's own file, so that a commit is one flush.

LMDB makes a commit durable in two flushes: one for the pages, one for the meta page that makes
them count. Without the second (`metasync=False`) the file is always sound after a power cut, but
may be one commit behind. The ring holds what that commit was: each entry is written to one of two
slots, inside `data.mdb`, before LMDB flushes that file. So one flush makes durable the entry, the
pages, and the meta page of the commit before. After a power cut the entry behind the index, if
there is one, is played again. It is kept as its row of the tail, with what its additions found:
memory may have them already.

There are two slots of two kinds, since each block that a flush has to write costs time:

* Small rows lie in LMDB's two meta pages, which use up a fraction of their first 512 bytes: from
  byte 512 of the page on. That of the commit before has to be written anyway.
* Larger ones lie in a value that LMDB stores once, in pages of its own, and never moves. It begins
  with a mark by which it is found in the file; from the next multiple of 4,096 bytes on there are
  two slots of 256 KiB.

The entry that has an even number of others before it is in the first slot of its kind, else in the
second (integers are little-endian):

    offset size
         0    8  magic, b"EVSLOT1\0"
         8    8  XXH3-64 of everything behind this field
        16    8  position: how many entries were before it
        24    8  length of the row
        32    -  the entry's row of the tail (see `index`)

The row of an entry that fits in neither lies in a file of its own, `large-0` or `large-1`, made
durable first; a slot holds the XXH3-64 of that file, and its length has the highest bit set.
"""

import contextlib
import errno
import os
import struct
import sys
from pathlib import Path

import lmdb
from xxhash import xxh3_64_intdigest

KEY = b"/"
_SLOT_BYTES = 256 << 10
_PAGE_BYTES = 4096
_META_BYTES = 512
VALUE_BYTES = 2 * _SLOT_BYTES + 2 * _PAGE_BYTES
_MARK = b"everpool ring of entries, format 1"
_MARK_BYTES = len(_MARK) + 16
# Where a value that has pages of its own begins in the first of them.
_VALUE_OFFSET = 16
_ELSEWHERE = 1 << 63
_MAGIC = b"EVSLOT1\0"
_HEADER = struct.Struct("<8sQQQ")
_REST = struct.Struct("<QQ")
_CHECKED_FROM = 16
_SEARCHED_BYTES = 4 << 20


def create(txn: lmdb.Transaction) -> None:
    """Store the ring's value in a new index."""
    mark = _MARK + os.urandom(16)
    txn.put(KEY, mark + bytes(VALUE_BYTES - len(mark)))


class Ring:
    """The ring of one index, as one process uses it."""

    def __init__(self, path: Path, env: lmdb.Environment, *, writable: bool) -> None:
        flags = os.O_RDWR if writable else os.O_RDONLY
        # LMDB keeps its locks on another file, so closing this descriptor drops none of them.
        self._descriptor = os.open(path, flags | os.O_CLOEXEC)
        self._path = path
        self._page_bytes = env.stat()["psize"]
        with env.begin(buffers=True) as txn:
            value = txn.get(KEY)
            mark = b"" if value is None else bytes(value[:_MARK_BYTES])
        self._start = self._find(mark) if mark else -1
        self._most_small = self._page_bytes - _META_BYTES - _HEADER.size

    def _find(self, mark: bytes) -> int:
        """Return where the slots begin in the file, or -1."""
        head = os.pread(self._descriptor, _SEARCHED_BYTES, 0)
        found = head.find(mark)
        while found >= 0 and found % _PAGE_BYTES != _VALUE_OFFSET:
            found = head.find(mark, found + 1)
        return -1 if found < 0 else -(-found // _PAGE_BYTES) * _PAGE_BYTES

    def close(self) -> None:
        os.close(self._descriptor)

    def put(self, position: int, row: bytes) -> None:
        """Write an entry to its slot; the next flush makes it durable. Raises `OSError`.

        `position` is the number of entries before it. What does not fit in a slot is made durable
        in a file of its own, and the slot tells its checksum.
        """
        if self._start < 0:
            raise OSError(errno.EUCLEAN, "the index has no ring")
        length, kept = len(row), row
        if _HEADER.size + length > _SLOT_BYTES:
            self._write_elsewhere(position, row)
            length, kept = length | _ELSEWHERE, xxh3_64_intdigest(row).to_bytes(8, "little")
        checked = _REST.pack(position, length) + kept
        checksum = xxh3_64_intdigest(checked).to_bytes(8, "little")
        slot = self._slots(position)[len(kept) > self._most_small]
        os.pwrite(self._descriptor, _MAGIC + checksum + checked, slot)

    def _elsewhere(self, position: int) -> Path:
        return self._path.with_name(f"large-{position & 1}")

    def _write_elsewhere(self, position: int, row: bytes) -> None:
        path = self._elsewhere(position)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            view = memoryview(row)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, 0)  # what came to nothing must not eat up the last room
            raise
        finally:
            os.close(descriptor)
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def mend(self, forget: int | None) -> None:
        """Make up for a failed flush, durably; raises `OSError`.

        The kernel may have dropped the meta page of the commit before, which the failed flush was
        to make durable, so the meta pages are written again. The entry at position `forget`, which
        the flush may have made durable, is taken out.
        """
        if self._start >= 0 and forget is not None:
            for slot in self._slots(forget):
                os.pwrite(self._descriptor, bytes(_HEADER.size), slot)
            with contextlib.suppress(FileNotFoundError):
                os.truncate(self._elsewhere(forget), 0)
        pages = os.pread(self._descriptor, 2 * self._page_bytes, 0)
        os.pwrite(self._descriptor, pages, 0)
        flush_data(self._descriptor)

    def find(self, position: int) -> bytes | None:
        """Return the row of the entry that has `position` others before it."""
        if self._start < 0:
            return None
        for slot in self._slots(position):
            row = self._read(slot, position)
            if row is not None:
                return row
        return None

    def _read(self, slot: int, position: int) -> bytes | None:
        data = os.pread(self._descriptor, _SLOT_BYTES, slot)
        if len(data) < _HEADER.size:
            return None
        magic, checksum, stored, length = _HEADER.unpack_from(data)
        large = bool(length & _ELSEWHERE)
        end = _HEADER.size + (8 if large else length)
        if magic != _MAGIC or stored != position or end > _SLOT_BYTES:
            return None
        if xxh3_64_intdigest(memoryview(data)[_CHECKED_FROM:end]) != checksum:
            return None
        kept = data[_HEADER.size : end]
        return self._read_elsewhere(position, kept) if large else kept

    def _read_elsewhere(self, position: int, checksum: bytes) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            row = self._elsewhere(position).read_bytes()
            if xxh3_64_intdigest(row).to_bytes(8, "little") == checksum:
                return row
        return None

    def _slots(self, position: int) -> tuple[int, int]:
        """Return where the entry's small slot and its large one are in the file."""
        second = position & 1
        return second * self._page_bytes + _META_BYTES, self._start + second * _SLOT_BYTES


def flush_data(descriptor: int) -> None:
    """Make a file's bytes durable."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(descriptor)
