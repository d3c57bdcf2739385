"""Entries and records: what the log holds, and their bytes.

An *entry* is what one append adds to the log. It holds records of one session, in order, and
looks like this (integers are little-endian):

    offset size
         0    3  magic, b"EVE"
         3    1  format version, 1
         4    4  key id: 0 = not encrypted; otherwise the key that the body is encrypted with
         8    8  XXH3-64 of everything behind this field; its seed is the 8 bytes before it
        16   16  session
        32    8  sequence of the first record; record k has the first sequence + k
        40    8  base: the position up to which the writer had played the log
        48   16  running hash of the log at the base
        64    -  body: a MessagePack array of records

A *record* is the MessagePack array `[snapshot, names, prefixes, ranges, operations]`: the version
its reads are of, the names it read, the prefixes it listed, the byte ranges it read as
`[object, start, end]`, and what it does. An operation is an array that begins with its tag (see
the classes). A reader that meets a tag or a field it does not know stops with `InvalidError`:
skipping it would make replicas disagree.

A *session* is 16 bytes: the version its pool was at when it was opened (8 bytes, big-endian) and
8 random bytes. The version lets a replica that has forgotten old sessions tell a new session from
a forgotten one.

The *running hash* of a log is BLAKE2b with a digest of 16 bytes: `hash' = BLAKE2b(hash + entry)`,
over the entry's bytes, from 16 zero bytes for the empty log.
"""

import hashlib
import os
import re
import struct
from typing import NamedTuple

import msgspec
from xxhash import xxh3_64_intdigest

from everpool.errors import CorruptionError, InvalidError

FORMAT = 1
EMPTY_HASH = bytes(16)
SESSION_BYTES = 16
MAX_NAME_BYTES = 1024
MAX_MEMORY_BYTES = 1 << 46
CHECKSUM_BYTES = 16
# The types that `FetchAdd` knows, which are the same on every machine, and their sizes in bytes.
NUMBER_BYTES = {
    "|i1": 1,
    "|u1": 1,
    **{f"{order}{kind}{size}": size for order in "<>" for kind in "iuf" for size in (2, 4, 8)},
}

_MAGIC = b"EVE"
_HEADER = struct.Struct("<3sBIQ16sQQ16s")
_CHECKED_FROM = 16
_REST = struct.Struct("<16sQQ16s")
# What an entry that is not encrypted begins with.
_PLAIN_START = _MAGIC + bytes((FORMAT, 0, 0, 0, 0))
_PLAIN_SEED = int.from_bytes(_PLAIN_START, "little")
_FILE = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]*/)*[A-Za-z0-9_-][A-Za-z0-9._-]*")
_MAX_FILE_BYTES = 255


class RecordId(NamedTuple):
    """Which record this is: the session that wrote it, and its place in that session."""

    session: bytes
    sequence: int

    def __str__(self) -> str:
        return f"{self.session.hex()}-{self.sequence}"

    def checked(self) -> "RecordId":
        """Return the id; raises `ValueError` when no record can have it."""
        if type(self.session) is not bytes or len(self.session) != SESSION_BYTES:
            raise ValueError(f"a session has {SESSION_BYTES} bytes")
        if type(self.sequence) is not int or not 0 < self.sequence < 1 << 63:
            raise ValueError("a sequence is a number from 1 on")
        return self

    @classmethod
    def parse(cls, text: str) -> "RecordId":
        """Return the id that `str(id)` wrote; raises `InvalidError` when `text` is not one."""
        session, dash, sequence = text.partition("-")
        try:
            if not dash or len(session) != 2 * SESSION_BYTES:
                raise ValueError
            found = cls(bytes.fromhex(session), int(sequence)).checked()
            if str(found) != text:
                raise ValueError
            return found
        except ValueError:
            raise InvalidError(
                f"{text!r} is not a record id: expected 32 hexadecimal digits, a dash and a number"
            ) from None


class Reference(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Bytes that were stored before the record: `size` bytes in the file or segment `file`.

    `checksum` is what the file's own table of block checksums must hash to (XXH3-128).
    """

    file: str
    size: int
    checksum: bytes


Payload = bytes | Reference


class Put(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=1):
    """Bind `name` to a new value, replacing the value it is bound to. Memory is not replaced."""

    name: str
    payload: Payload


class Delete(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=2):
    """Remove `name` and its object."""

    name: str


class Allocate(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=3):
    """Bind the free `name` to `size` zero bytes of memory; `header` describes an array, or b""."""

    name: str
    size: int
    header: bytes


class Write(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=4):
    """Replace the bytes of `object` from `offset` on.

    An `object` below zero names one that this record creates: -1 its first `Allocate`, and so on.
    """

    object: int
    offset: int
    payload: Payload


class FetchAdd(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=5):
    """Add `delta` to the number of type `dtype` at `offset`; its result is the old number."""

    object: int
    offset: int
    dtype: str
    delta: bytes


class Floor(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=6):
    """Raise the floor to `version`: older snapshots abort, older outcomes are forgotten."""

    version: int


class Fence(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=7):
    """Void the record with this id if it has not been decided yet."""

    session: bytes
    sequence: int


class Checkpoint(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=8):
    """Say that the replica as of `version` can be had from the manifest `key` in the store.

    It builds on the checkpoint of version `previous` (0: on none; -1: not said), and its uploads
    began at version `began`.
    """

    version: int
    key: str
    previous: int = -1
    began: int = 0


class Pin(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=9):
    """Give the free snapshot name `name` to `version`; 0 is that of this record.

    With a `lock`, which says what keeps it, the snapshot is not to be forgotten before a time
    (nanoseconds since 1970), and may be there already, of that version. Both are told, not judged:
    see `everpool.snapshots`.
    """

    name: str
    version: int
    locked_until_ns: int = 0
    lock: str = ""


class Unpin(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=10):
    """Take the snapshot name `name` away."""

    name: str


class Collect(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=11):
    """Let go of versions before `kept`, but those of snapshots (see `everpool.collection`).

    Replicas begin at `start`, or, for a snapshot, at the first version of an island, which ends
    with the snapshot's. `dead` are the keys of objects that nothing names any more. All this was
    worked out at version `version`.
    """

    version: int
    kept: int
    start: int
    islands: list[tuple[int, int]]
    dead: list[str]


class Retain(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=12):
    """Keep versions while they are younger than `age_ns`, or among the newest `versions`."""

    age_ns: int
    versions: int


class Restore(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=13):
    """Say that this record puts values again which were in use at `version`."""

    version: int


Operation = (
    Put
    | Delete
    | Allocate
    | Write
    | FetchAdd
    | Floor
    | Fence
    | Checkpoint
    | Pin
    | Unpin
    | Collect
    | Retain
    | Restore
)

Range = tuple[int, int, int]


class Record(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """One submitted transaction. It commits or aborts as a whole."""

    snapshot: int
    names: list[str]
    prefixes: list[str]
    ranges: list[Range]
    operations: list[Operation]


class Entry(NamedTuple):
    """What one append adds to the log."""

    session: bytes
    first_sequence: int
    base: int
    base_hash: bytes
    records: list[Record]


_encode_records = msgspec.msgpack.Encoder().encode
_decode_records = msgspec.msgpack.Decoder(list[Record]).decode
_decode_record = msgspec.msgpack.Decoder(Record).decode
_decode_anything = msgspec.msgpack.Decoder().decode


def new_session(version: int) -> bytes:
    """Return a session id for a pool that is opened at `version`."""
    return version.to_bytes(8, "big") + os.urandom(8)


def session_start(session: bytes) -> int:
    """Return the version at which the session's pool was opened."""
    return int.from_bytes(session[:8], "big")


def payload_size(payload: Payload) -> int:
    """Return how many bytes the payload stands for."""
    return len(payload) if isinstance(payload, bytes) else payload.size


def can_be_stored(payload: Payload) -> bool:
    """Whether the payload is bytes, or may be a file: a size, a checksum and a harmless name."""
    return isinstance(payload, bytes) or (
        payload.size >= 0
        and len(payload.checksum) == CHECKSUM_BYTES
        and len(payload.file) <= _MAX_FILE_BYTES
        and _FILE.fullmatch(payload.file) is not None
    )


def next_hash(previous: bytes, entry: bytes) -> bytes:
    """Return the running hash of a log after `entry` was appended to it."""
    return hashlib.blake2b(previous + entry, digest_size=16).digest()


def encode_record(record: Record) -> bytes:
    """Return a record's bytes, for another process of the same version."""
    return _encode_records(record)


def decode_record(data: bytes) -> Record:
    """Return the record that `encode_record` wrote down. Raises `InvalidError`."""
    try:
        return _decode_record(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidError(f"a record from another version ({error}): use the same one") from error


def encode_entry(entry: Entry) -> bytes:
    """Return the entry's bytes."""
    body = _REST.pack(*entry[:4]) + _encode_records(entry.records)
    return _PLAIN_START + xxh3_64_intdigest(body, _PLAIN_SEED).to_bytes(8, "little") + body


def decode_entry(data: bytes | memoryview) -> Entry:
    """Return the entry that `data` holds.

    Raises `CorruptionError` when the bytes are damaged, and `InvalidError` when they are sound
    but of a newer format, encrypted, or with an operation that this version does not know.
    """
    if len(data) < _HEADER.size:
        raise CorruptionError(f"a log entry is cut short: {len(data)} bytes")
    magic, version, key, checksum, session, first, base, base_hash = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise CorruptionError(f"a log entry does not begin with {_MAGIC!r} but with {magic!r}")
    if version != FORMAT:
        raise InvalidError(
            f"a log entry has format {version}, this version reads {FORMAT}: upgrade"
        )
    if _checksum(data) != checksum:
        raise CorruptionError("a log entry's bytes do not match their checksum")
    if key:
        raise InvalidError(f"a log entry is encrypted with key {key}: upgrade, or give the key")
    body = data[_HEADER.size :]
    try:
        return Entry(session, first, base, base_hash, _decode_records(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _undecodable(body, error) from error


def _checksum(data: bytes | memoryview) -> int:
    return xxh3_64_intdigest(data[_CHECKED_FROM:], int.from_bytes(data[:8], "little"))


def _undecodable(body: bytes | memoryview, error: Exception) -> InvalidError | CorruptionError:
    """Return the error for a sound body that does not fit: of a later version, or not records."""
    fields = {
        kind.__struct_config__.tag: len(kind.__struct_fields__) for kind in Operation.__args__
    }
    try:
        records = _decode_anything(body)
        longer = any(len(record) > len(Record.__struct_fields__) for record in records)
        unknown = sorted(
            {
                operation[0]
                for record in records
                for operation in record[4]
                if isinstance(operation[0], int)
                and len(operation) - 1 > fields.get(operation[0], -1)
            }
        )
    except (ValueError, RecursionError, TypeError, LookupError):
        return CorruptionError(f"a log entry's records cannot be decoded: {error}")
    if unknown or longer:
        return InvalidError(
            f"a log entry has operations {unknown} or fields that this version lacks: upgrade"
        )
    return CorruptionError(f"a log entry's records cannot be decoded: {error}")


def is_name(name: str) -> bool:
    """Whether `name` may name an object, in any process and on any replica."""
    if not name or "\0" in name:
        return False
    if len(name) <= MAX_NAME_BYTES // 4 or name.isascii():
        return len(name) <= MAX_NAME_BYTES
    return len(name) <= MAX_NAME_BYTES and len(name.encode()) <= MAX_NAME_BYTES


def check_name(name: object) -> str:
    """Return `name` when it may name an object; raises `InvalidError` with the rule otherwise."""
    if type(name) is not str:
        raise InvalidError(f"a name must be a str, not {type(name).__name__}")
    if not name or "\0" in name:
        raise InvalidError(f"{name!r} cannot be a name: names are not empty and hold no NUL")
    try:
        size = len(name) if name.isascii() else len(name.encode())
    except UnicodeEncodeError:
        raise InvalidError(f"{name!r} cannot be a name: it is not valid Unicode") from None
    if size > MAX_NAME_BYTES:
        raise InvalidError(
            f"the name {name[:40]!r}… has {size} bytes in UTF-8: {MAX_NAME_BYTES} are allowed"
        )
    return name
