"""Files as export writes them and import reads them: whole or not there, holes kept, hashed."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from everpool.cli.layout import PART_SUFFIX
from everpool.cli.terminal import Meter

CHUNK_BYTES = 4 << 20
_BLOCK_BYTES = 64 << 10


class FileWriter:
    """A file that appears under its name only when it is complete.

    It is written as `NAME.part` beside its place and renamed at the end of the `with` block; an
    exception leaves nothing. Runs of zeros become holes. `sha256` and `size` describe what a
    reader will see.
    """

    def __init__(self, path: Path, meter: Meter) -> None:
        self.path = path
        self.size = 0
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
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: Any) -> int:
        """Append `data`, anything that has bytes; returns how many."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        for start in range(0, len(view), _BLOCK_BYTES):
            block = view[start : start + _BLOCK_BYTES]
            if np.frombuffer(block, np.uint8).any():
                _write_at(self._file, block, self.size + start)
        self.size += len(view)
        self._meter.advance(len(view))
        return len(view)

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


def data_chunks(file: BinaryIO, begin: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) for all of an open file from `begin` on that is not a hole."""
    number = file.fileno()
    end = os.fstat(number).st_size
    position = begin
    while position < end:
        try:
            start = os.lseek(number, position, os.SEEK_DATA)
        except OSError:
            return  # nothing but a hole is left
        stop = os.lseek(number, start, os.SEEK_HOLE)
        for offset in range(start, stop, CHUNK_BYTES):
            yield offset, os.pread(number, min(CHUNK_BYTES, stop - offset), offset)
        position = stop


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
