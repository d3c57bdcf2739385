"""The header that every encoding starts with, and the pieces an encoding is made of."""

import io
import struct
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

import msgspec

from everpool.errors import CorruptionError, EverpoolError, InvalidError

Buffer: TypeAlias = bytes | memoryview
Stream: TypeAlias = Callable[[], Iterator[Buffer]]

MAGIC: Final = 0xE5
FORMAT_VERSION: Final = 1
ALIGNMENT: Final = 64
HEADER_SIZE: Final = 8

NONE: Final = 1
BOOL: Final = 2
INT: Final = 3
FLOAT: Final = 4
COMPLEX: Final = 5
STR: Final = 6
BYTES: Final = 7
DATETIME: Final = 8
DATE: Final = 9
LIST: Final = 10
TUPLE: Final = 11
DICT: Final = 12
SCALAR: Final = 13
ARRAY: Final = 14
TABLE: Final = 15
BATCH: Final = 16

KIND_NAMES: Final = {
    NONE: "none",
    BOOL: "bool",
    INT: "int",
    FLOAT: "float",
    COMPLEX: "complex",
    STR: "str",
    BYTES: "bytes",
    DATETIME: "datetime",
    DATE: "date",
    LIST: "list",
    TUPLE: "tuple",
    DICT: "dict",
    SCALAR: "scalar",
    ARRAY: "array",
    TABLE: "table",
    BATCH: "batch",
}

EXTENDED: Final = 1

_HEADER: Final = struct.Struct("<BBBBI")
_WORD: Final = struct.Struct("<Q")
read_word: Final = _WORD.unpack_from


def header(kind: int, flags: int = 0) -> bytes:
    """Return the 8 header bytes of an unencrypted encoding."""
    return _HEADER.pack(MAGIC, FORMAT_VERSION, kind, flags, 0)


def header_word(kind: int, flags: int = 0) -> int:
    """Return the header as one integer: comparing it checks all of its fields at once."""
    return int.from_bytes(header(kind, flags), "little")


def header_error(data: Buffer) -> EverpoolError:
    """Return the error that says what is wrong with a header no decoder is known for."""
    if len(data) < HEADER_SIZE:
        return CorruptionError(
            f"the encoded value has {len(data)} bytes, fewer than its header", size=len(data)
        )
    magic, version, kind, flags, key_id = _HEADER.unpack_from(data)
    if magic != MAGIC:
        return CorruptionError(f"the encoded value starts with {magic:#04x}, not {MAGIC:#04x}")
    if version != FORMAT_VERSION:
        return InvalidError(
            f"the value has format version {version}, this release reads version "
            f"{FORMAT_VERSION}: upgrade everpool",
            format_version=version,
        )
    if key_id:
        return InvalidError(
            f"the value is encrypted with key {key_id}, which this release cannot use: "
            "upgrade everpool",
            key_id=key_id,
        )
    return CorruptionError(f"the encoded value has the unknown kind {kind} with flags {flags}")


def aligned(offset: int) -> int:
    """Return the first multiple of 64 that is not below `offset`."""
    return (offset + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def padding(offset: int) -> bytes:
    """Return the zeros that lead from `offset` to the next multiple of 64."""
    return bytes(-offset % ALIGNMENT)


def expect_zeros(gap: Buffer) -> None:
    """Raise CorruptionError unless `gap` is all zeros."""
    if any(gap):
        raise CorruptionError("the gap before aligned data is not zero")


class Encoded(msgspec.Struct, frozen=True, gc=False):
    """A value ready to be written: `size` bytes, handed out piece by piece.

    It refers to the value's own memory rather than to a copy. Whoever changes an array
    between `encode` and the last use of the result stores a mix of old and new items.
    """

    size: int
    pieces: tuple[Buffer | Stream, ...]

    def buffers(self) -> Iterator[Buffer]:
        """Yield the bytes in order, as often as it is called.

        Contiguous memory comes as a zero-copy, read-only memoryview of any length; what must be
        copied comes in fresh pieces of at most 2 MiB, made one at a time.
        """
        left = self.size
        for piece in self.pieces:
            for buffer in (piece,) if isinstance(piece, (bytes, memoryview)) else piece():
                left -= len(buffer)
                yield buffer
        if left:
            raise InvalidError("the value changed its size while it was being stored")

    def tobytes(self) -> bytes:
        """Return all bytes as one object, without a second copy on the way."""
        try:
            # Fails at the first stream: those must not be kept in memory all at once.
            return b"".join(self.pieces)  # pyright: ignore[reportArgumentType, reportCallIssue]
        except TypeError:
            whole = io.BytesIO()
            for buffer in self.buffers():
                whole.write(buffer)
            return whole.getvalue()
