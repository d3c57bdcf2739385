"""Frames: what an agent and its clients say to each other over a Unix socket.

A frame is its length (4 bytes, little-endian) and that many bytes of MessagePack: an array.

    client: [number, verb, argument, ...]      a request; numbers above 0 are the client's to choose
    agent:  [number, "ok", result]             the answer
    agent:  [number, "region"]                 the answer with a descriptor, which comes with it
    agent:  [number, "error", name, message, facts]
    agent:  [0, "ids", session, [[number, sequence], ...]]
                                               commits got their ids: they may be in the log soon
    agent:  [0, "done", session, [[number, sequence, verdict, version, detail, old], ...]]
                                               what became of commits
    agent:  [0, "trouble", text]               why the log cannot be reached; empty when it can

A commit's ids are in the client's socket before the commit is appended. So who has read everything
that there was when the commit's time was over knows whether anything may come of it.
"""

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from everpool.errors import InvalidError

MAX_FRAME_BYTES = 1 << 30
_LENGTH = struct.Struct("<I")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


class Nonsense(Exception):
    """The other end speaks another language."""


def pack(*frame: Any) -> bytes:
    """Return the bytes of a frame."""
    body = _encode(frame)
    if len(body) > MAX_FRAME_BYTES:
        raise InvalidError(f"{len(body)} bytes are too many for one transaction: split it")
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Takes bytes as they come, and yields whole frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[list[Any]]:
        """Yield the frames that are whole with `data`; raises `Nonsense`."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(buffer, start)
                if length > MAX_FRAME_BYTES:
                    raise Nonsense
                end = start + _LENGTH.size + length
                if end > len(buffer):
                    break
                with memoryview(buffer)[start + _LENGTH.size : end] as body:
                    frame = _decode(body)
                start = end
                yield frame
        except msgspec.DecodeError as error:
            raise Nonsense from error
        finally:
            del buffer[:start]
