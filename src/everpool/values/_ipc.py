"""Arrow IPC streams, message by message: aligned when written, checked before they are read.

PyArrow aligns buffers to 8 bytes, so the offsets in its messages are rewritten here, in the
flatbuffers that the Arrow columnar format prescribes (format/Message.fbs of Apache Arrow). The
result is a stream that any Arrow implementation reads.
"""

import struct
from collections.abc import Generator, Iterator
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from everpool.errors import CorruptionError
from everpool.values import _wire as wire
from everpool.values._wire import Buffer

Spans: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

_CONTINUATION: Final = 0xFFFFFFFF
_PREFIX: Final = struct.Struct("<Ii")
_END_OF_STREAM: Final = _PREFIX.pack(_CONTINUATION, 0)

# MessageHeader, and the fields of Message, Schema, DictionaryBatch and RecordBatch, by number.
_SCHEMA: Final = 1
_DICTIONARY_BATCH: Final = 2
_RECORD_BATCH: Final = 3
_MESSAGE_HEADER_TYPE: Final = 1
_MESSAGE_HEADER: Final = 2
_MESSAGE_BODY_LENGTH: Final = 3
_SCHEMA_ENDIANNESS: Final = 0
_DICTIONARY_DATA: Final = 1
_DICTIONARY_IS_DELTA: Final = 2
_BATCH_BUFFERS: Final = 2
_BATCH_COMPRESSION: Final = 3

_U16: Final = struct.Struct("<H")
_I16: Final = struct.Struct("<h")
_I32: Final = struct.Struct("<i")
_U32: Final = struct.Struct("<I")
_I64: Final = struct.Struct("<q")


class _Rope:
    """Bytes in pieces, read from the front."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces = pieces
        self._front: memoryview = memoryview(b"")

    def pieces(self, size: int) -> Generator[memoryview, None, None]:
        while size:
            if not self._front:
                self._front = next(self._pieces)
            piece, self._front = self._front[:size], self._front[size:]
            size -= len(piece)
            yield piece

    def read(self, size: int) -> bytes:
        return b"".join(self.pieces(size))

    def at_end(self) -> bool:
        while not self._front:
            front = next(self._pieces, None)
            if front is None:
                return True
            self._front = front
        return False


def realigned(pieces: Iterator[memoryview]) -> Iterator[Buffer]:
    """Yield whole IPC messages with their bodies and the buffers in them aligned."""
    rope = _Rope(pieces)
    while not rope.at_end():
        _, metadata_size = _PREFIX.unpack(rope.read(_PREFIX.size))
        if metadata_size == 0:
            yield _END_OF_STREAM
            return
        metadata = bytearray(rope.read(metadata_size))
        message = _Message.of(metadata)
        spans = message.spans(metadata)
        starts = np.zeros_like(spans[:, 0])
        padded = (spans[:, 1] + wire.ALIGNMENT - 1) // wire.ALIGNMENT * wire.ALIGNMENT
        np.cumsum(padded[:-1], out=starts[1:])
        old_starts = spans[:, 0].tolist()
        spans[:, 0] = starts
        if message.body_size_at:
            _I64.pack_into(metadata, message.body_size_at, int(padded.sum()))
        aligned_metadata = bytes(metadata) + wire.padding(_PREFIX.size + len(metadata))
        yield _PREFIX.pack(_CONTINUATION, len(aligned_metadata)) + aligned_metadata
        at = 0
        for start, size in zip(old_starts, spans[:, 1].tolist(), strict=True):
            rope.read(start - at)
            yield from rope.pieces(size)
            yield wire.padding(size)
            at = start + size
        rope.read(message.body_size - at)


class _Message(NamedTuple):
    """Where the parts stand of an IPC message's metadata that matter here."""

    kind: int
    body_size: int
    body_size_at: int
    buffers_at: int
    buffer_count: int

    @classmethod
    def of(cls, metadata: Buffer | bytearray) -> "_Message":
        """Parse metadata; malformed metadata raises CorruptionError or struct.error."""
        message = int(_U32.unpack_from(metadata)[0])
        kind_at = _field(metadata, message, _MESSAGE_HEADER_TYPE)
        kind = metadata[kind_at] if kind_at else 0
        header = _pointed(metadata, _field(metadata, message, _MESSAGE_HEADER))
        body_size_at = _field(metadata, message, _MESSAGE_BODY_LENGTH)
        body_size = int(_I64.unpack_from(metadata, body_size_at)[0]) if body_size_at else 0
        if kind == _SCHEMA:
            endianness_at = _field(metadata, header, _SCHEMA_ENDIANNESS)
            if endianness_at and _I16.unpack_from(metadata, endianness_at)[0]:
                raise CorruptionError("an Arrow schema is big-endian")
            if body_size:
                raise CorruptionError("an Arrow schema has a body")
            return cls(kind, 0, 0, 0, 0)
        if kind == _DICTIONARY_BATCH:
            delta_at = _field(metadata, header, _DICTIONARY_IS_DELTA)
            if delta_at and metadata[delta_at]:
                raise CorruptionError("an Arrow stream adds to a dictionary piece by piece")
            header = _pointed(metadata, _field(metadata, header, _DICTIONARY_DATA))
        elif kind != _RECORD_BATCH:
            raise CorruptionError(f"an Arrow stream has a message of kind {kind}")
        if _field(metadata, header, _BATCH_COMPRESSION):
            raise CorruptionError("an Arrow stream is compressed")
        buffers_field = _field(metadata, header, _BATCH_BUFFERS)
        if not buffers_field:
            return cls(kind, body_size, body_size_at, 0, 0)
        buffers = _pointed(metadata, buffers_field)
        count = int(_U32.unpack_from(metadata, buffers)[0])
        return cls(kind, body_size, body_size_at, buffers + _U32.size, count)

    def spans(self, metadata: Buffer | bytearray) -> Spans:
        """Return the (offset, size) of each buffer in the body, over `metadata` itself."""
        if self.buffer_count == 0:
            return np.zeros((0, 2), "<i8")
        if self.buffers_at + 16 * self.buffer_count > len(metadata):
            raise CorruptionError("an Arrow message is shorter than its list of buffers")
        count = 2 * self.buffer_count
        return np.frombuffer(metadata, "<i8", count, self.buffers_at).reshape(-1, 2)


def _field(metadata: Buffer | bytearray, table: int, number: int) -> int:
    """Return the offset of a field of a flatbuffer table, 0 when it is left out."""
    vtable = table - int(_I32.unpack_from(metadata, table)[0])
    if vtable < 0:
        raise CorruptionError("an Arrow message points before its start")
    slot = 4 + 2 * number
    if slot + 2 > _U16.unpack_from(metadata, vtable)[0]:
        return 0
    offset = int(_U16.unpack_from(metadata, vtable + slot)[0])
    return table + offset if offset else 0


def _pointed(metadata: Buffer | bytearray, at: int) -> int:
    if not at:
        raise CorruptionError("an Arrow message lacks a part")
    return at + int(_U32.unpack_from(metadata, at)[0])


class StreamCost(NamedTuple):
    """What reading a stream's dictionaries can cost: they are met again in every batch."""

    batches: int
    dictionary_bytes: int


def check_messages(memory: memoryview) -> StreamCost:
    """Refuse what costs Arrow more than its bytes: compression, conversion, shared buffers.

    Raises:
        CorruptionError: the stream is not one that `realigned` yields.
        struct.error: a message points outside of itself.
    """
    batches = dictionary_bytes = at = 0
    while True:
        if at + _PREFIX.size > len(memory):
            raise CorruptionError("an Arrow stream is cut short")
        continuation, metadata_size = _PREFIX.unpack_from(memory, at)
        at += _PREFIX.size
        if continuation != _CONTINUATION or not 0 <= metadata_size <= len(memory) - at:
            raise CorruptionError("an Arrow stream has a malformed message")
        if metadata_size == 0:
            break
        metadata = memory[at : at + metadata_size]
        at += metadata_size
        message = _Message.of(metadata)
        if not 0 <= message.body_size <= len(memory) - at:
            raise CorruptionError("an Arrow message does not fit its stream")
        if message.body_size and at % wire.ALIGNMENT:
            raise CorruptionError("the body of an Arrow message is not aligned")
        _check_spans(message.spans(metadata), message.body_size)
        batches += message.kind == _RECORD_BATCH
        dictionary_bytes += message.body_size * (message.kind == _DICTIONARY_BATCH)
        at += message.body_size
    if at != len(memory):
        raise CorruptionError("an Arrow stream goes on after its end")
    return StreamCost(batches, dictionary_bytes)


def _check_spans(spans: Spans, body_size: int) -> None:
    starts, sizes = spans[:, 0], spans[:, 1]
    if not len(spans):
        return
    if spans.min() < 0 or sizes.max() > body_size or starts.max() > body_size:
        raise CorruptionError("an Arrow buffer lies outside of its message")
    ends = starts + sizes
    if ends[-1] > body_size or (starts % wire.ALIGNMENT).any() or (starts[1:] < ends[:-1]).any():
        raise CorruptionError("the buffers of an Arrow message overlap or are not aligned")
