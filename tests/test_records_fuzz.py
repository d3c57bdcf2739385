"""Whatever bytes `decode_entry` is given, only our errors come out, in little time and memory."""

import os
import random
import struct
import time
import tracemalloc

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from everpool.errors import CorruptionError, InvalidError
from everpool.records import (
    EMPTY_HASH,
    Allocate,
    Delete,
    Entry,
    Fence,
    FetchAdd,
    Floor,
    Operation,
    Put,
    Record,
    Reference,
    Write,
    decode_entry,
    encode_entry,
)

ROUNDS = 200_000 if os.environ.get("EVERPOOL_SOAK") == "1" else 6_000
HEADER_BYTES = 64
SESSION = bytes(range(16))

pack = msgspec.msgpack.encode

numbers = st.integers(-(1 << 63), (1 << 64) - 1)
payloads = st.binary(max_size=40) | st.builds(
    Reference, st.text(max_size=8), numbers, st.binary(max_size=16)
)
operations: st.SearchStrategy[Operation] = st.one_of(
    st.builds(Put, st.text(max_size=8), payloads),
    st.builds(Delete, st.text(max_size=8)),
    st.builds(Allocate, st.text(max_size=8), numbers, st.binary(max_size=8)),
    st.builds(Write, numbers, numbers, payloads),
    st.builds(FetchAdd, numbers, numbers, st.text(max_size=4), st.binary(max_size=8)),
    st.builds(Floor, numbers),
    st.builds(Fence, st.binary(max_size=20), numbers),
)
records = st.builds(
    Record,
    numbers,
    st.lists(st.text(max_size=8), max_size=3),
    st.lists(st.text(max_size=8), max_size=3),
    st.lists(st.tuples(numbers, numbers, numbers), max_size=3),
    st.lists(operations, max_size=5),
)
entries = st.builds(
    Entry,
    st.binary(min_size=16, max_size=16),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
    st.binary(min_size=16, max_size=16),
    st.lists(records, max_size=4),
)
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.integers(0, 9)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.datetimes(timezones=st.timezones())
    | st.builds(msgspec.msgpack.Ext, st.integers(-100, 127), st.binary(max_size=9)),
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=25,
)


def sound(body: bytes) -> bytes:
    """Return an entry with that body whose checksum is right."""
    before = struct.pack("<3sBI", b"EVE", 1, 0)
    behind = struct.pack("<16sQQ16s", SESSION, 1, 0, EMPTY_HASH) + body
    checksum = xxh3_64_intdigest(behind, int.from_bytes(before, "little"))
    return before + checksum.to_bytes(8, "little") + behind


def checked(data: bytes) -> Entry | None:
    """Decode within sensible limits; None for what is refused in a proper way."""
    tracemalloc.start()
    began = time.perf_counter()
    try:
        return decode_entry(data)
    except (CorruptionError, InvalidError) as error:
        assert len(str(error)) < 1000
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.perf_counter() - began < 5
        assert peak < 1 << 20 or peak < 200 * len(data)


@given(entries)
def test_every_entry_comes_back_equal(entry: Entry) -> None:
    assert decode_entry(encode_entry(entry)) == entry


@given(anything)
def test_sound_bytes_that_are_not_records_are_refused(body: object) -> None:
    found = checked(sound(pack(body)))
    assert found is None or decode_entry(encode_entry(found)) == found


def mutated(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Return `data` after one to four changes of the kinds that files suffer."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at:] = b""
        elif kind == 2:
            changed[at : at + rng.randint(1, 9)] = bytes(rng.randint(0, 9))
        elif kind == 3:
            changed[at : at + 5] = rng.choice([b"\xdd", b"\xdf", b"\xc6"]) + b"\xff" * 4
        elif kind == 4:
            start = rng.randrange(len(other))
            changed[at : at + 4] = other[start : start + rng.randint(1, 12)]
        else:
            changed[at:at] = rng.randbytes(rng.randint(1, 9))
    return bytes(changed)


def seeds() -> list[bytes]:
    every = [
        Put("name", b"value"),
        Put("näme", Reference("file", 9, bytes(16))),
        Delete("gone"),
        Allocate("memory", 99, b"head"),
        Write(-1, 3, b"abc"),
        FetchAdd(5, 8, "<i8", bytes(8)),
        Floor(3),
        Fence(SESSION, 4),
    ]
    whole = Record(9, ["a", "b"], ["p/"], [(5, 0, 1 << 40)], every)
    return [
        encode_entry(Entry(SESSION, 1, 2, EMPTY_HASH, records))
        for records in ([], [whole], [whole, Record(0, [], [], [], [])], [whole] * 3)
    ]


def test_mutated_entries_are_refused() -> None:
    rng = random.Random(1)
    good = seeds()
    for _ in range(ROUNDS):
        data = mutated(rng, rng.choice(good), rng.choice(good))
        found = checked(data)
        assert found is None or data in good


def test_mutated_bodies_with_a_right_checksum_are_refused_or_are_records() -> None:
    rng = random.Random(2)
    good = [data[HEADER_BYTES:] for data in seeds()]
    decoded = 0
    for _ in range(ROUNDS):
        found = checked(sound(mutated(rng, rng.choice(good), rng.choice(good))))
        if found is not None:
            decoded += 1
            assert decode_entry(encode_entry(found)) == found
    assert decoded, "no mutation was harmless: nothing was tested behind the first error"


def record_with(operation: bytes) -> bytes:
    """Return a body of one record with this operation."""
    return b"\x91\x95\x00\x90\x90\x90\x91" + operation


BOMBS = {
    "deep arrays": b"\x91" * 3_000_000,
    "deep maps": b"\x81\x01" * 1_000_000,
    "deep arrays in an unknown operation": record_with(b"\x92\x63" + b"\x91" * 1_000_000),
    "deep arrays behind a record": b"\x91\x96\x00\x90\x90\x90\x90" + b"\x91" * 1_000_000,
    "4 G records": b"\xdd\xff\xff\xff\xff",
    "256 M records": b"\xdd\x10\x00\x00\x00",
    "4 G names": b"\x91\x95\x00\xdd\xff\xff\xff\xff",
    "4 G operations": b"\x91\x95\x00\x90\x90\x90\xdd\xff\xff\xff\xff",
    "4 G pairs": b"\x91\xdf\xff\xff\xff\xff",
    "4 GiB of bytes": record_with(b"\x93\x01\xa1a\xc6\xff\xff\xff\xff"),
    "4 GiB of text": record_with(b"\x92\x02\xdb\xff\xff\xff\xff"),
    "4 GiB of an unknown type": record_with(b"\xc9\xff\xff\xff\xff\x01"),
    "many declared sizes": b"\xdd\x00\xff\xff\xff" * 100_000,
    "a hundred thousand empty arrays": b"\xdd\x00\x01\x86\xa0" + b"\x90" * 100_000,
    "names that are not UTF-8": b"\x91\x95\x00\x91\xa2\xff\xfe\x90\x90\x90",
    "a value's name that is not UTF-8": record_with(b"\x93\x01\xa2\xc3\x28\xc4\x00"),
    "a surrogate in a name": record_with(b"\x92\x02\xa3\xed\xa0\x80"),
    "tags that cannot be hashed": record_with(b"\x92\x90\x90"),
    "a map for an operation": record_with(b"\x81\x90\x90"),
    "nothing": b"",
    "trailing bytes": b"\x90\x90",
    "no records": b"\xc0",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_in_little_time_and_memory(bomb: str) -> None:
    assert checked(sound(BOMBS[bomb])) is None


@pytest.mark.parametrize("tag", [0, 14, 99, -1, 1 << 40])
def test_an_unknown_operation_asks_for_an_upgrade(tag: int) -> None:
    body = pack([[0, [], [], [], [Put("a", b""), [tag, "x", {"later": 1}]]]])
    with pytest.raises(InvalidError, match=f"operations \\[{tag}\\] or fields.*upgrade"):
        decode_entry(sound(body))


@pytest.mark.parametrize(
    "records",
    [
        [[0, [], [], [], [], "later"]],
        [[0, [], [], [], [[4, 1, 2, b"x", "later"]]]],
        [[0, [], [], [], [[6, 1, None]]]],
    ],
)
def test_an_unknown_field_asks_for_an_upgrade(records: object) -> None:
    with pytest.raises(InvalidError, match="upgrade"):
        decode_entry(sound(pack(records)))


def test_records_with_too_few_fields_are_refused() -> None:
    with pytest.raises(CorruptionError):
        decode_entry(sound(pack([[0, [], [], []]])))
    with pytest.raises(CorruptionError):
        decode_entry(sound(pack([[0, [], [], [], [[4, 1, 2]]]])))


@pytest.mark.parametrize("wrong", ["1", 1.0, None, True, [1]])
def test_numbers_are_numbers(wrong: object) -> None:
    with pytest.raises(CorruptionError):
        decode_entry(sound(pack([[wrong, [], [], [], []]])))
