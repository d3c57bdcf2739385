"""The bytes of the bucket log: its head, its chunks and tables, and how they are named.

Under the log's prefix there are

    head                                    replaced by every swap
    chunks/FIRST-LAST-HASH                  sealed entries: positions FIRST to LAST, 20 digits each
    tables/FIRST-LAST-HASH                  sealed references to chunks, or to other tables
    entries/POSITION-ID                     an entry too large for the head, by its append's id;
                                            the log ended at POSITION (20 digits) when it was put

No head that is trimmed past its POSITION takes up a large entry: it is put again before. So what
no chunk names by then will never be named.

All but the head are immutable, and written before a head names them. HASH is the XXH3-128 of the
object's bytes in hexadecimal. A chunk is made of entries that stand in a head already, never of
one that is yet to be swapped in, so every chunk that exists is true, also one whose sealer lost
the swap: two sealers are harmless.

Integers are little-endian. All objects begin with

    offset size
         0    8  magic: b"EVLHEAD\0", b"EVLCHNK\0" or b"EVLTABL\0"
         8    2  format version, 1
        10    2  zero
        12    4  key id, 0: not encrypted
        16    8  XXH3-64 of everything behind this field
        24   16  id of the log, drawn when it was created

A head goes on with

        40   16  nonce, drawn by the swap that wrote it: no two heads are equal
        56    8  generation: how many swaps led to it, 1 or more
        64    8  position of the last sealed entry, 0: none
        72    8  trimmed: the entries up to this position may be gone
        80    8  time of the last entry, nanoseconds since 1970
        88    4  S, length of the note that came with the last trim
        92    4  R, how many references
        96    4  E, how many entries
       100    S  the note
         - 40 R  references to the sealed entries behind `trimmed`, in order and without a gap
         -    -  entries, from the position behind the last sealed one

a chunk with its entries, a table with its references:

        40    8  first position
        48    8  last position
        56    4  E entries, or R references
        60    -  the entries, or references

A reference is

         0    1  level: 0 refers to a chunk, n to a table of references of level n - 1
         1    3  zero
         4    4  length of the object
         8    8  first position
        16    8  last position
        24   16  XXH3-128 of the object

and an entry

         0   16  id of the append, random
        16    8  who appended it: random, drawn when a log was opened
        24    8  time, nanoseconds since 1970
        32    4  N, length of the entry
        36    1  0: the N bytes follow; 1: they are in an object of their own
        37    -  the N bytes, or their XXH3-128 (16 bytes) and POSITION (8)
"""

import itertools
import struct
from collections.abc import Sequence
from typing import NamedTuple

from xxhash import xxh3_64_intdigest, xxh3_128_digest

from everpool.errors import CorruptionError, InvalidError
from everpool.log import NOTE_BYTES

VERSION = 1
ENTRY_BYTES = (1 << 32) - 1
_HEAD, _CHUNK, _TABLE = b"EVLHEAD\0", b"EVLCHNK\0", b"EVLTABL\0"
_WORDS = {_HEAD: "head", _CHUNK: "chunk", _TABLE: "table"}
_START = struct.Struct("<8sHHIQ")
_ID_BYTES = 16
_STATE = struct.Struct("<16sQQQQIII")
_SPAN = struct.Struct("<QQI")
_REFERENCE = struct.Struct("<B3xIQQ16s")
_ENTRY = struct.Struct("<16s8sQIB")
_INLINE, _ELSEWHERE = 0, 1
_BODY = struct.Struct("<16sQ")
# A table of a table of a table: a log of more levels than this is damaged.
_LEVELS = 8

HEAD_KEY = "head"
CHUNKS, TABLES, ENTRIES = "chunks", "tables", "entries"


class Stored(NamedTuple):
    """An entry as it is stored.

    `data` is None when its bytes are in an object of its own, which was put at `put_at`.
    """

    id: bytes
    writer: bytes
    time_ns: int
    size: int
    data: bytes | None
    hash: bytes = b""
    put_at: int = 0

    @property
    def stored_bytes(self) -> int:
        """How much room it takes in a head or chunk."""
        return _ENTRY.size + (_BODY.size if self.data is None else self.size)

    @property
    def key(self) -> str:
        """Where its bytes are when they are in an object of their own, below the log's prefix."""
        return f"{ENTRIES}/{self.put_at:020d}-{self.id.hex()}"


class Reference(NamedTuple):
    """Where a run of sealed entries is."""

    level: int
    size: int
    first: int
    last: int
    hash: bytes

    @property
    def key(self) -> str:
        """The object's key below the log's prefix."""
        folder = TABLES if self.level else CHUNKS
        return f"{folder}/{self.first:020d}-{self.last:020d}-{self.hash.hex()}"


class Head(NamedTuple):
    """What the head says. The entries stand at `sealed + 1` and behind."""

    log_id: bytes
    nonce: bytes
    generation: int
    sealed: int
    trimmed: int
    time_ns: int
    note: bytes
    references: Sequence[Reference]
    entries: Sequence[Stored]

    @property
    def end(self) -> int:
        """The position of the last entry."""
        return self.sealed + len(self.entries)


def parse_span(key: str) -> tuple[int, int] | None:
    """Return the first and last position that a chunk's or table's key names."""
    parts = key.rpartition("/")[2].split("-")
    if len(parts) == 3 and parts[0].isdecimal() and parts[1].isdecimal():
        return int(parts[0]), int(parts[1])
    return None


def parse_entry(key: str) -> tuple[int, bytes] | None:
    """Return where the log ended when a large entry was put, and its append's id, by its key."""
    position, dash, id = key.rpartition("/")[2].partition("-")
    try:
        return (int(position), bytes.fromhex(id)) if dash else None
    except ValueError:
        return None


def encode_head(head: Head) -> bytes:
    """Return the head's bytes."""
    state = _STATE.pack(
        head.nonce,
        head.generation,
        head.sealed,
        head.trimmed,
        head.time_ns,
        len(head.note),
        len(head.references),
        len(head.entries),
    )
    parts = [state, head.note, *map(_encode_reference, head.references)]
    return _seal(_HEAD, head.log_id, parts + _encode_entries(head.entries))


def decode_head(data: bytes) -> Head:
    """Return what `encode_head` got; raises as all decoders here do.

    `CorruptionError` for bytes that no encoder wrote, `InvalidError` for those of a newer format.
    """
    log_id, at = _open(_HEAD, data, _STATE)
    nonce, generation, sealed, trimmed, time_ns, noted, referred, entered = _STATE.unpack_from(
        data, at
    )
    at += _STATE.size
    note = _slice(data, at, noted)
    references, at = _decode_references(data, at + noted, referred)
    entries, at = _decode_entries(data, at, entered)
    head = Head(log_id, nonce, generation, sealed, trimmed, time_ns, note, references, entries)
    _demand(at == len(data) and generation > 0, "its parts do not add up")
    _demand(trimmed <= head.end and noted <= NOTE_BYTES, "its parts do not add up")
    _demand_run(references, trimmed, sealed)
    return head


def encode_chunk(log_id: bytes, first: int, entries: Sequence[Stored]) -> tuple[Reference, bytes]:
    """Return the chunk of the entries from position `first`, and a reference to it."""
    last = first + len(entries) - 1
    parts = [_SPAN.pack(first, last, len(entries)), *_encode_entries(entries)]
    data = _seal(_CHUNK, log_id, parts)
    return Reference(0, len(data), first, last, xxh3_128_digest(data)), data


def decode_chunk(data: bytes, reference: Reference, log_id: bytes) -> list[Stored]:
    """Return the entries of the chunk that `reference` names; see `decode_head`."""
    at, count = _open_span(_CHUNK, data, reference, log_id)
    _demand(count == reference.last - reference.first + 1, "it has another number of entries")
    entries, at = _decode_entries(data, at, count)
    _demand(at == len(data), "its parts do not add up")
    return entries


def encode_table(log_id: bytes, references: Sequence[Reference]) -> tuple[Reference, bytes]:
    """Return a table of references of one level that follow each other, and a reference to it."""
    first, last = references[0].first, references[-1].last
    parts = [_SPAN.pack(first, last, len(references)), *map(_encode_reference, references)]
    data = _seal(_TABLE, log_id, parts)
    level = references[0].level + 1
    return Reference(level, len(data), first, last, xxh3_128_digest(data)), data


def decode_table(data: bytes, reference: Reference, log_id: bytes) -> list[Reference]:
    """Return the references of the table that `reference` names; see `decode_head`."""
    at, count = _open_span(_TABLE, data, reference, log_id)
    references, at = _decode_references(data, at, count)
    _demand(at == len(data) and count > 0, "its parts do not add up")
    _demand(references[0].first == reference.first, "it begins elsewhere")
    _demand_run(references, reference.first - 1, reference.last)
    _demand(all(one.level == reference.level - 1 for one in references), "its levels are wrong")
    return references


def _seal(magic: bytes, log_id: bytes, parts: Sequence[bytes]) -> bytes:
    checked = b"".join((log_id, *parts))
    return _START.pack(magic, VERSION, 0, 0, xxh3_64_intdigest(checked)) + checked


def _open(magic: bytes, data: bytes, rest: struct.Struct) -> tuple[bytes, int]:
    """Check what all objects begin with; returns the log's id, and where `rest` begins."""
    word = _WORDS[magic]
    if len(data) < _START.size or data[:8] != magic:
        raise CorruptionError(f"this is no {word} of a log: restore it from a copy")
    _, version, zero, key_id, checksum = _START.unpack_from(data)
    if version > VERSION:
        raise InvalidError(
            f"a log's {word} has format {version}, this release reads up to {VERSION}:"
            " upgrade everpool",
            version=version,
        )
    if key_id:
        raise InvalidError(
            f"a log's {word} is encrypted with key {key_id}, which this release cannot read:"
            " upgrade everpool",
            key_id=key_id,
        )
    _demand(version == VERSION and not zero, f"a {word} begins wrongly")
    checked = xxh3_64_intdigest(memoryview(data)[_START.size :]) == checksum
    _demand(checked, f"a {word}'s checksum is wrong")
    at = _START.size + _ID_BYTES
    _demand(len(data) >= at + rest.size, f"a {word} is too short")
    return data[_START.size : at], at


def _open_span(magic: bytes, data: bytes, reference: Reference, log_id: bytes) -> tuple[int, int]:
    """Check a chunk or table against what refers to it; returns where its rest is, and a count."""
    _demand(xxh3_128_digest(data) == reference.hash, f"{reference.key} has another hash")
    found, at = _open(magic, data, _SPAN)
    first, last, count = _SPAN.unpack_from(data, at)
    same = (found, first, last) == (log_id, reference.first, reference.last)
    _demand(same, f"{reference.key} is not what its name says")
    return at + _SPAN.size, count


def _encode_reference(one: Reference) -> bytes:
    return _REFERENCE.pack(one.level, one.size, one.first, one.last, one.hash)


def _decode_references(data: bytes, at: int, count: int) -> tuple[list[Reference], int]:
    end = at + count * _REFERENCE.size
    _demand(end <= len(data), "a reference is cut off")
    found = [Reference(*parts) for parts in _REFERENCE.iter_unpack(data[at:end])]
    return found, end


def _encode_entries(entries: Sequence[Stored]) -> list[bytes]:
    parts: list[bytes] = []
    for one in entries:
        kind = _ELSEWHERE if one.data is None else _INLINE
        parts.append(_ENTRY.pack(one.id, one.writer, one.time_ns, one.size, kind))
        parts.append(_BODY.pack(one.hash, one.put_at) if one.data is None else one.data)
    return parts


def _decode_entries(data: bytes, at: int, count: int) -> tuple[list[Stored], int]:
    found: list[Stored] = []
    for _ in range(count):
        _demand(at + _ENTRY.size <= len(data), "an entry is cut off")
        id, writer, time_ns, size, kind = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size
        _demand(kind in (_INLINE, _ELSEWHERE) and size > 0, "an entry is of no known kind")
        length = size if kind == _INLINE else _BODY.size
        kept = _slice(data, at, length)
        at += length
        if kind == _INLINE:
            found.append(Stored(id, writer, time_ns, size, kept))
        else:
            found.append(Stored(id, writer, time_ns, size, None, *_BODY.unpack(kept)))
    return found, at


def _demand_run(references: Sequence[Reference], after: int, last: int) -> None:
    """The references must follow each other, reach `last`, and leave nothing behind `after` out."""
    if not references:
        _demand(last <= after, "references are missing")
        return
    _demand(references[0].first <= after + 1 and references[-1].last == last, "a run has a gap")
    for one, following in itertools.pairwise(references):
        _demand(following.first == one.last + 1, "a run has a gap")
    for one in references:
        _demand(0 < one.first <= one.last and one.level <= _LEVELS, "a reference is wrong")


def _slice(data: bytes, at: int, length: int) -> bytes:
    _demand(at + length <= len(data), "it is cut off")
    return data[at : at + length]


def _demand(holds: bool, wrong: str) -> None:
    if not holds:
        raise CorruptionError(f"the log is damaged ({wrong}): restore it from a copy")
