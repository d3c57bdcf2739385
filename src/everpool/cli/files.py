"""Files as export writes them and import reads them: whole or not there, holes kept, hashed.

Memory can be far larger than what was ever written to it, and hashing zeros takes as long as
hashing anything else. Files of memory beyond 1 GiB therefore have a *data hash*: the SHA-256 over
each block that is not all zeros, its offset in the file (8 bytes, little-endian) before it. The
first block is what stands before the memory's bytes (an .npy file's header, or nothing); then
every 64 KiB are one.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import numpy as np

from everpool.cli.layout import PART_SUFFIX
from everpool.cli.terminal import Meter

CHUNK_BYTES = 4 << 20
BLOCK_BYTES = 64 << 10
DATA_HASH_FROM_BYTES = 1 << 30
_ZEROS = bytes(CHUNK_BYTES)


def add_array(digest: Any, array: "np.ndarray[Any, Any]", order: Literal["C", "F"]) -> None:
    """Hash an array's bytes in that order, without a copy of all of it.

    Bytes, not numbers: a NaN is the same as itself, and -0.0 is not 0.0.
    """
    flags: Any = ["external_loop", "buffered", "zerosize_ok"]
    elements = max(1, CHUNK_BYTES // max(1, array.itemsize))
    chunks: Any = np.nditer(array, flags=flags, buffersize=elements, order=order)
    for chunk in chunks:
        digest.update(chunk.tobytes())


class FileWriter:
    """A file that appears under its name only when it is complete.

    It is written as `NAME.part` beside its place and renamed at the end of the `with` block; an
    exception leaves nothing. Runs of zeros become holes. `size` and `hash` describe what a reader
    will see; the hash is a data hash with `data_hash`, and else the SHA-256 of all bytes.
    """

    def __init__(self, path: Path, meter: Meter, *, data_hash: bool = False) -> None:
        self.path = path
        self.size = 0
        self._data_hash = data_hash
        self._meter = meter
        self._part = path.with_name(path.name + PART_SUFFIX)
        self._hash = hashlib.sha256()

    def __enter__(self) -> Self:
        self._part.unlink(missing_ok=True)
        # Exclusive and without following: nobody's link leads the bytes elsewhere.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(self._part, flags, 0o666)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                os.ftruncate(self._file, self.size)
        finally:
            os.close(self._file)
        if kind is None:
            os.replace(self._part, self.path)
        else:
            self._part.unlink(missing_ok=True)

    @property
    def hash(self) -> dict[str, str]:
        """The hash under the name that the manifest has for its kind."""
        return {"data_sha256" if self._data_hash else "sha256": self._hash.hexdigest()}

    def write(self, data: Any) -> int:
        """Append `data`, anything that has bytes; returns how many."""
        view = memoryview(data).cast("B")
        if not self._data_hash:
            self._hash.update(view)
        for offset, block in _blocks(view, self.size):
            _write_at(self._file, block, offset)
            if self._data_hash:
                _add_block(self._hash, offset, block)
        self.size += len(view)
        self._meter.advance(len(view))
        return len(view)

    def skip(self, size_bytes: int) -> None:
        """Append zeros: a hole."""
        for start in range(0, 0 if self._data_hash else size_bytes, len(_ZEROS)):
            self._hash.update(memoryview(_ZEROS)[: size_bytes - start])
        self.size += size_bytes
        self._meter.advance(size_bytes)

    # The rest is what Arrow asks of a file.

    @property
    def closed(self) -> bool:
        return False

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Do nothing: the bytes are with the system already."""

    def close(self) -> None:
        """Do nothing: the end of the `with` block closes."""


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _blocks(data: memoryview, offset: int) -> Iterator[tuple[int, memoryview]]:
    """Yield (offset, bytes) of the blocks of `data` that are not all zeros."""
    for start in range(0, len(data), BLOCK_BYTES):
        block = data[start : start + BLOCK_BYTES]
        if np.frombuffer(block, np.uint8).any():
            yield offset + start, block


def _add_block(digest: Any, offset: int, block: memoryview) -> None:
    digest.update(offset.to_bytes(8, "little"))
    digest.update(block)


def pieces(extents: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, size) of at most 4 MiB that cover `extents`, in order and in whole blocks.

    `size` is where the last block ends.
    """
    done = 0
    for offset, length in extents:
        start = max(done, offset - offset % BLOCK_BYTES)
        end = min(size, offset + length + -(offset + length) % BLOCK_BYTES)
        for at in range(start, end, CHUNK_BYTES):
            yield at, min(CHUNK_BYTES, end - at)
        done = max(done, end)


def file_extents(file: BinaryIO, begin: int) -> list[tuple[int, int]]:
    """Return (offset from `begin` on, size) of all of an open file that is not a hole."""
    number = file.fileno()
    end = os.fstat(number).st_size
    found: list[tuple[int, int]] = []
    position = begin
    while position < end:
        try:
            start = os.lseek(number, position, os.SEEK_DATA)
        except OSError:
            break  # nothing but a hole is left
        position = os.lseek(number, start, os.SEEK_HOLE)
        found.append((start - begin, position - start))
    return found


def data_chunks(file: BinaryIO, begin: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield (offset from `begin` on, bytes) for all of an open file that is not a hole."""
    size = os.fstat(file.fileno()).st_size - begin
    for offset, length in pieces(file_extents(file, begin), size):
        yield offset, os.pread(file.fileno(), length, begin + offset)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_hash_file(path: Path, begin: int) -> str:
    """Return a file's data hash as hexadecimal digits; memory's bytes start at `begin`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for offset, block in _blocks(memoryview(os.pread(file.fileno(), begin, 0)), 0):
            _add_block(digest, offset, block)
        for start, data in data_chunks(file, begin):
            for offset, block in _blocks(memoryview(data), begin + start):
                _add_block(digest, offset, block)
    return digest.hexdigest()
