"""The bytes of a checkpoint's objects. None of them ever changes.

A *name* is 32 hexadecimal digits: the version at which the upload began, and 8 random bytes. A
*manifest* (`checkpoints/VERSION-NAME`) and a *run* (`index/NAME`) look alike (integers are
little-endian):

    offset size
         0    6  magic, b"EVMANI" or b"EVIRUN"
         6    1  format version, 1
         7    1  reserved, 0
         8    4  key id: 0 = not encrypted
        12    8  XXH3-64 of the body; its seed is the 8 bytes before it
        20    -  body: MessagePack, a `Manifest`, or for a run an array of `[key, row]`

A run holds rows of the replica's index in the order of their keys; a row of nil says that there is
none. Later runs of a manifest count over earlier ones.

A *page segment* (`pages/NAME`) is nothing but pages: blocks of memory, one behind the other. An
index row says where a page is (36 bytes):

    0   16  the segment: its name is `pages/` and these bytes in hexadecimal digits
    16   8  offset of the page in it
    24   4  length of the page
    28   8  XXH3-64 of the page
"""

import os
import struct
from collections.abc import Iterable
from typing import NamedTuple

import msgspec
from xxhash import xxh3_64_intdigest

from everpool.errors import CorruptionError, InvalidError

FORMAT = 1
_MANIFEST, _RUN = b"EVMANI", b"EVIRUN"
_HEADER = struct.Struct("<6sBBIQ")
_CHECKED_FROM = 12
_PAGE = struct.Struct("<16sQIQ")

Row = tuple[bytes, bytes | None]


class Run(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """One run of a manifest: its key, its bytes, and the versions it covers, after `after`."""

    key: str
    size: int
    after: int
    version: int


class Past(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """An earlier checkpoint, of which this one keeps the place."""

    version: int
    time_ns: int
    position: int
    key: str


class Manifest(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A checkpoint: a replica as of `version`, at `position` of the log with the hash `hash`.

    `runs` are read in order, `past` are the checkpoints before, oldest first.
    """

    pool: bytes
    version: int
    position: int
    hash: bytes
    time_ns: int
    runs: list[Run]
    past: list[Past]

    def place(self, key: str) -> Past:
        """Return what later manifests keep of this one, which is under `key`."""
        return Past(self.version, self.time_ns, self.position, key)


class Page(NamedTuple):
    """Where a page is."""

    segment: str
    offset: int
    length: int
    checksum: int

    def row(self) -> bytes:
        """Return the page's index row."""
        return _PAGE.pack(bytes.fromhex(self.segment), *self[1:])


def read_page_row(row: bytes) -> Page:
    """Return the page that an index row tells of."""
    segment, offset, length, checksum = _PAGE.unpack(row)
    return Page(segment.hex(), offset, length, checksum)


def new_name(began: int) -> str:
    """Return a name for a new object, whose upload begins at version `began`."""
    return f"{began:016x}{os.urandom(8).hex()}"


_encode = msgspec.msgpack.Encoder().encode
_decode_manifest = msgspec.msgpack.Decoder(Manifest).decode
_decode_rows = msgspec.msgpack.Decoder(list[Row]).decode


def encode_manifest(manifest: Manifest) -> bytes:
    """Return a manifest's bytes."""
    return _seal(_MANIFEST, _encode(manifest))


def decode_manifest(key: str, data: bytes | memoryview) -> Manifest:
    """Return the manifest; raises `CorruptionError`, or `InvalidError` for a newer format."""
    body = _unseal(_MANIFEST, key, data)
    try:
        return _decode_manifest(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _undecodable(key, error) from error


def encode_run(rows: Iterable[Row]) -> bytes:
    """Return a run's bytes."""
    return _seal(_RUN, _encode(list(rows)))


def decode_run(key: str, data: bytes | memoryview) -> list[Row]:
    """Return a run's rows; raises `CorruptionError`, or `InvalidError` for a newer format."""
    body = _unseal(_RUN, key, data)
    try:
        return _decode_rows(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _undecodable(key, error) from error


def _seal(magic: bytes, body: bytes) -> bytes:
    start = _HEADER.pack(magic, FORMAT, 0, 0, 0)[:_CHECKED_FROM]
    return start + _checksum(start, body).to_bytes(8, "little") + body


def _checksum(start: bytes | memoryview, body: bytes | memoryview) -> int:
    return xxh3_64_intdigest(body, int.from_bytes(start[4:_CHECKED_FROM], "little"))


def _unseal(magic: bytes, key: str, data: bytes | memoryview) -> bytes | memoryview:
    if len(data) < _HEADER.size:
        raise CorruptionError(f"{key} is cut short: {len(data)} bytes: restore it from a copy")
    found, version, _, key_id, checksum = _HEADER.unpack_from(data)
    if found != magic:
        raise CorruptionError(
            f"{key} begins with {found!r} instead of {magic!r}: restore it from a copy"
        )
    if version != FORMAT:
        raise InvalidError(f"{key} has format {version}, this version reads {FORMAT}: upgrade")
    body = data[_HEADER.size :]
    if _checksum(bytes(data[:_CHECKED_FROM]), body) != checksum:
        raise CorruptionError(f"{key} does not match its checksum: restore it from a copy")
    if key_id:
        raise InvalidError(f"{key} is encrypted with key {key_id}: upgrade, or give the key")
    return body


def _undecodable(key: str, error: Exception) -> CorruptionError:
    return CorruptionError(f"{key} cannot be decoded ({error}): restore it from a copy")
