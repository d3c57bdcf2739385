"""Bulk files: large values, written once and never changed.

A bulk file holds (integers are little-endian; n is the number of blocks):

    size bytes    the data
    8 n bytes     XXH3-64 of each block of 1 MiB of the data, the last one shorter
    40 bytes      magic b"EVBULK\\0", format version 1 (1 byte), key id (4 bytes, 0 = not
                  encrypted), block size (4 bytes), size (8 bytes), XXH3-128 of the table of
                  checksums (16 bytes)

A file is written to `staging/`, made durable there, and moved to `values/` once a record that
names it is durable. What lies in `staging/` without a record is garbage: its writer holds a lock
(flock) on it, so who finds one without that lock may delete it, under the writer's lock.

A pool that keeps a past (see `everpool.past`) has the files that only its past needs in
`past/values/`. A file is linked there before it is removed here.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
import uuid
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

from xxhash import xxh3_64_intdigest, xxh3_128_digest

from everpool.errors import CorruptionError, InvalidError
from everpool.records import Reference

BLOCK_BYTES = 1 << 20
# What says that a pool keeps a past, and where its values are, below the pool's folder.
PAST_MARKER = Path("past", "everpool.json")
PAST_VALUES = Path("past", "values")
# Where a hard link cannot be had: another disk, no such thing there, or too many already.
UNLINKABLE = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS})
_MAGIC = b"EVBULK\0"
_FORMAT = 1
_FOOTER = struct.Struct("<7sBIIQ16s")
_WRITEBACK_BLOCKS = 16
_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)


class Staged:
    """A durable bulk file that no record names yet."""

    def __init__(self, reference: Reference, descriptor: int) -> None:
        self.reference = reference
        self._descriptor = descriptor

    def release(self) -> None:
        """Let go of the file; without a record it is now garbage."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def exists(self) -> bool:
        """Whether the file is still there for a record to name."""
        return self._descriptor >= 0 and os.fstat(self._descriptor).st_nlink > 0


class BulkFiles:
    """The bulk files of one pool."""

    def __init__(self, folder: Path) -> None:
        self._staging = folder / "staging"
        self._values = folder / "values"
        self._past_marker = folder / PAST_MARKER
        self._past_values = folder / PAST_VALUES
        self._maps: weakref.WeakValueDictionary[str, mmap.mmap] = weakref.WeakValueDictionary()

    def folders(self) -> tuple[Path, Path]:
        """Return the folders to make durable before the tail is trimmed, in this order.

        A file that moves from one to the other must never be in neither.
        """
        return self._values, self._staging

    def stage(self, pieces: Iterable[bytes | memoryview], size: int) -> Staged:
        """Write `size` bytes to a new file and make it durable; memory needed: one piece."""
        name, descriptor = self._create()
        path = self._staging / name
        try:
            sealed = Sealed(pieces, size)
            for number, block in enumerate(sealed, 1):
                _write(descriptor, block)
                if number % _WRITEBACK_BLOCKS == 0:
                    _start_writeback(descriptor, (number - _WRITEBACK_BLOCKS) * BLOCK_BYTES)
            os.fsync(descriptor)
            sync_folder(self._staging)
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        return Staged(Reference(name, size, sealed.checksum), descriptor)

    def _create(self) -> tuple[str, int]:
        """Return the name of a new staged file and a descriptor that holds its lock."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        while True:
            name = _new_name()
            descriptor = os.open(self._staging / name, flags, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return name, descriptor
            os.close(descriptor)  # swept before it was locked

    def discard(self, staged: Staged) -> None:
        """Delete a staged file that no record will name."""
        (self._staging / staged.reference.file).unlink(missing_ok=True)
        staged.release()

    def keeps_past(self) -> bool:
        """Whether what is replaced has to stay until its record is archived."""
        return self._past_marker.exists()

    def stage_again(self, reference: Reference) -> Staged:
        """Store a value of the pool, or of its past, once more, for another record to name.

        A name is bound by one record and removed by another, so each has a file of its own. Where
        the disk has hard links, no bytes are copied. Raises `FileNotFoundError`.
        """
        while True:
            name = _new_name()
            path = self._staging / name
            try:
                os.link(self.find(reference.file), path)
            except OSError as error:
                if error.errno not in UNLINKABLE:
                    raise
                mapped = map_at(self.find(reference.file), reference)
                return self.stage([memoryview(mapped)[: reference.size]], reference.size)
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            # The lock is on the file, whatever its name: others may have staged it again, too.
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if path.exists():
                sync_folder(self._staging)
                return Staged(Reference(name, reference.size, reference.checksum), descriptor)
            os.close(descriptor)  # swept before it was locked

    def find(self, file: str) -> Path:
        """Return where a file of the pool, or of its past, is; raises `FileNotFoundError`."""
        for _ in range(2):  # it may be on its way from one to the next
            for folder in (self._values, self._staging, self._past_values):
                if (folder / file).exists():
                    return folder / file
        raise FileNotFoundError(errno.ENOENT, "this value is missing", file)

    def publish(self, reference: Reference) -> None:
        """Move the file of a durable record to its place. May be repeated."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._staging / reference.file, self._values / reference.file)

    def remove(self, file: str) -> None:
        """Delete a file that nothing refers to any more. May be repeated; mappings live on."""
        (self._values / file).unlink(missing_ok=True)
        (self._staging / file).unlink(missing_ok=True)

    def staged(self) -> bool:
        """Whether there is anything in `staging/`."""
        with os.scandir(self._staging) as entries:
            return next(entries, None) is not None

    def sweep(self) -> None:
        """Delete staged files whose writers are gone. Call with the writer's lock held."""
        for path in list(self._staging.iterdir()):
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                finally:
                    os.close(descriptor)

    def stored(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yield the name and status of every published file."""
        with os.scandir(self._values) as entries:
            for entry in entries:
                yield entry.name, entry.stat()

    def map(self, reference: Reference) -> memoryview:
        """Return the file's data, mapped read-only; it lives as long as anything uses it.

        Raises `FileNotFoundError` when the file is gone and `CorruptionError` when its length or
        its footer is wrong. The data are not read.
        """
        mapped = self._maps.get(reference.file)
        if mapped is None:
            mapped = self._maps[reference.file] = self._open(reference)
        return memoryview(mapped)[: reference.size]

    def damage(self, reference: Reference) -> list[str]:
        """Read the whole file; returns what is wrong with it, in words."""
        try:
            data = self.map(reference)
        except FileNotFoundError:
            return [f"its file {reference.file} is missing"]
        except CorruptionError as error:
            return [str(error)]
        return damage_of(data, self._maps[reference.file], reference)

    def _open(self, reference: Reference) -> mmap.mmap:
        try:
            descriptor = os.open(self._values / reference.file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            # Its record is durable, but the file was not moved yet.
            descriptor = os.open(self._staging / reference.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return map_file(descriptor, reference)
        finally:
            os.close(descriptor)


def _new_name() -> str:
    """Return a name that, where there is a backup of the pool, stands for one of old: names of
    objects in a bucket begin with the version at which their upload began.
    """
    return f"0-{uuid.uuid4().hex}"


def map_at(path: Path, reference: Reference) -> mmap.mmap:
    """Map the bulk file at a path; raises as `map_file` does, and `FileNotFoundError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return map_file(descriptor, reference)
    finally:
        os.close(descriptor)


def key_of_value(file: str) -> str:
    """Return the key of the segment that holds a value, in a store."""
    return f"values/{file}"


def map_file(descriptor: int, reference: Reference) -> mmap.mmap:
    """Map a bulk file; raises `CorruptionError` when its length or its footer is wrong."""
    length = os.fstat(descriptor).st_size
    expected = stored_bytes(reference.size)
    if length != expected:
        raise CorruptionError(
            f"the file {reference.file} has {length} bytes instead of {expected}: "
            "restore it from a copy"
        )
    mapped = mmap.mmap(descriptor, length, access=mmap.ACCESS_READ)
    _check_footer(mapped, reference)
    return mapped


def damage_of(data: memoryview, mapped: mmap.mmap, reference: Reference) -> list[str]:
    """Read the whole of a mapped file, which begins with `data`; returns what is wrong with it."""
    table = memoryview(mapped)[reference.size : -_FOOTER.size]
    found: list[str] = []
    if xxh3_128_digest(table) != reference.checksum:
        found.append("its table of checksums does not match its record")
    for at, (expected,) in enumerate(struct.iter_unpack("<Q", table)):
        start = at * BLOCK_BYTES
        if xxh3_64_intdigest(data[start : start + BLOCK_BYTES]) != expected:
            end = min(start + BLOCK_BYTES, reference.size)
            found.append(f"bytes {start} to {end} do not match their checksum")
    return found


def stored_bytes(size: int) -> int:
    """Return the length of a bulk file that holds `size` bytes of data."""
    return size + 8 * -(-size // BLOCK_BYTES) + _FOOTER.size


def sync_folder(folder: Path) -> None:
    """Make the entries of `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_footer(mapped: mmap.mmap, reference: Reference) -> None:
    footer = _FOOTER.unpack_from(mapped, len(mapped) - _FOOTER.size)
    magic, version, key, block, size, checksum = footer
    if magic == _MAGIC and version != _FORMAT:
        raise InvalidError(f"the file {reference.file} has format {version}: upgrade")
    expected = (_MAGIC, _FORMAT, BLOCK_BYTES, reference.size, reference.checksum)
    if (magic, version, block, size, checksum) != expected:
        raise CorruptionError(
            f"the footer of the file {reference.file} does not match its record: "
            "restore it from a copy"
        )
    if key:
        raise InvalidError(f"the file {reference.file} is encrypted with key {key}: give the key")


class Sealed:
    """The bytes of a bulk file that holds the given pieces, block by block; iterate once.

    Memory needed: one block. `checksum` is known when it is through.
    """

    def __init__(self, pieces: Iterable[bytes | memoryview], size: int) -> None:
        self._pieces = pieces
        self._size = size
        self.checksum = b""

    def __iter__(self) -> Iterator[bytes | bytearray | memoryview]:
        table = bytearray()
        for block in _blocks(self._pieces, self._size):
            table += xxh3_64_intdigest(block).to_bytes(8, "little")
            yield block
        self.checksum = xxh3_128_digest(table)
        yield bytes(table) + _FOOTER.pack(
            _MAGIC, _FORMAT, 0, BLOCK_BYTES, self._size, self.checksum
        )


def _blocks(
    pieces: Iterable[bytes | memoryview], size: int
) -> Iterator[bytes | bytearray | memoryview]:
    """Yield the pieces' bytes in blocks, of which only the last may be shorter."""
    rest = bytearray()
    written = 0
    for piece in pieces:
        view = memoryview(piece).cast("B")
        written += len(view)
        if rest:
            taken = BLOCK_BYTES - len(rest)
            rest += view[:taken]
            view = view[taken:]
            if len(rest) == BLOCK_BYTES:
                yield rest
                rest = bytearray()
        whole = len(view) - len(view) % BLOCK_BYTES
        for start in range(0, whole, BLOCK_BYTES):
            yield view[start : start + BLOCK_BYTES]
        rest += view[whole:]
    if rest:
        yield rest
    assert written == size, f"{written} bytes were given instead of {size}"


def _write(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _start_writeback(descriptor: int, start: int) -> None:
    """Let the disk begin with what was written, while the rest is being written."""
    if _sync_file_range is not None:
        _sync_file_range(
            ctypes.c_int(descriptor),
            ctypes.c_int64(start),
            ctypes.c_int64(_WRITEBACK_BLOCKS * BLOCK_BYTES),
            ctypes.c_uint(_SYNC_FILE_RANGE_WRITE),
        )
