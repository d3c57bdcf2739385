"""The ring: a copy of the newest entries inside LMDB's own file, so that a commit is one flush.

LMDB makes a commit durable in two flushes: one for the pages, one for the meta page that makes
them count. Without the second (`metasync=False`) the file is always sound after a power cut, but
may be one commit behind. The ring holds what that commit was: each entry is written to one of two
slots, inside `data.mdb`, before LMDB flushes that file. So one flush makes durable the entry, the
pages, and the meta page of the commit before. After a power cut the entry behind the index, if
there is one, is played again. It is kept as its row of the tail, with what its additions found:
memory may have them already.

The slots lie in a value that LMDB stores once, in pages of its own, and never moves. The value
begins with a mark by which it is found in the file; from the next multiple of 4,096 bytes on there
are two slots of 256 KiB (integers are little-endian):

    offset size
         0    8  magic, b"EVSLOT1\\0"
         8    8  XXH3-64 of everything behind this field
        16    8  position: how many entries were before it
        24    8  length of the row
        32    -  the entry's row of the tail (see `index`)

An entry that does not fit in a slot is made durable with the second flush.
"""

import os
import struct
import sys
from pathlib import Path

import lmdb
from xxhash import xxh3_64_intdigest

KEY = b"/"
_SLOT_BYTES = 256 << 10
_PAGE_BYTES = 4096
VALUE_BYTES = 2 * _SLOT_BYTES + 2 * _PAGE_BYTES
_MARK = b"everpool ring of entries, format 1"
_MAGIC = b"EVSLOT1\0"
_HEADER = struct.Struct("<8sQQQ")
_CHECKED_FROM = 16
_SEARCHED_BYTES = 4 << 20


def create(txn: lmdb.Transaction) -> None:
    """Store the ring's value in a new index."""
    txn.put(KEY, _MARK + bytes(VALUE_BYTES - len(_MARK)))


class Ring:
    """The ring of one index, as one process uses it."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        flags = os.O_RDWR if writable else os.O_RDONLY
        # LMDB keeps its locks on another file, so closing this descriptor drops none of them.
        self._descriptor = os.open(path, flags | os.O_CLOEXEC)
        found = os.pread(self._descriptor, _SEARCHED_BYTES, 0).find(_MARK)
        self._start = -1 if found < 0 else -(-found // _PAGE_BYTES) * _PAGE_BYTES

    def close(self) -> None:
        os.close(self._descriptor)

    def put(self, position: int, row: bytes) -> bool:
        """Write an entry to its slot; False when it does not fit. The next flush makes it durable.

        `position` is the number of entries before it.
        """
        if self._start < 0 or _HEADER.size + len(row) > _SLOT_BYTES:
            return False
        data = bytearray(_HEADER.pack(_MAGIC, 0, position, len(row)) + row)
        data[8:16] = xxh3_64_intdigest(memoryview(data)[_CHECKED_FROM:]).to_bytes(8, "little")
        os.pwrite(self._descriptor, data, self._offset(position))
        return True

    def mend(self, forget: int | None) -> None:
        """Make up for a failed flush, durably; raises `OSError`.

        The kernel may have dropped the meta page of the commit before, which the failed flush was
        to make durable, so the meta pages are written again. The entry at position `forget`, which
        the flush may have made durable, is taken out.
        """
        if self._start >= 0 and forget is not None:
            os.pwrite(self._descriptor, bytes(_HEADER.size), self._offset(forget))
        os.pwrite(self._descriptor, os.pread(self._descriptor, 2 * _PAGE_BYTES, 0), 0)
        flush_data(self._descriptor)

    def find(self, position: int) -> bytes | None:
        """Return the row of the entry that has `position` others before it."""
        if self._start < 0:
            return None
        data = os.pread(self._descriptor, _SLOT_BYTES, self._offset(position))
        if len(data) < _HEADER.size:
            return None
        magic, checksum, stored, length = _HEADER.unpack_from(data)
        if magic != _MAGIC or stored != position or length > _SLOT_BYTES - _HEADER.size:
            return None
        end = _HEADER.size + length
        if xxh3_64_intdigest(memoryview(data)[_CHECKED_FROM:end]) != checksum:
            return None
        return data[_HEADER.size : end]

    def _offset(self, position: int) -> int:
        return self._start + (position & 1) * _SLOT_BYTES


def flush_data(descriptor: int) -> None:
    """Make a file's bytes durable."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(descriptor)
