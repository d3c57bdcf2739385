"""Entries and records: their bytes are frozen, their names and ids are checked."""

import pytest
from xxhash import xxh3_64_intdigest

from everpool.errors import CorruptionError, InvalidError
from everpool.records import (
    EMPTY_HASH,
    MAX_NAME_BYTES,
    Allocate,
    Delete,
    Entry,
    Fence,
    FetchAdd,
    Floor,
    Put,
    Record,
    RecordId,
    Reference,
    Write,
    check_name,
    decode_entry,
    encode_entry,
    new_session,
    next_hash,
    payload_size,
    session_start,
)

SESSION = bytes(range(16))
ENTRY = Entry(
    SESSION,
    7,
    41,
    bytes(range(16, 32)),
    [
        Record(
            300,
            ["a", "ä/β"],
            ["", "p/"],
            [(5, 0, 8), (5, 1 << 40, (1 << 40) + 1)],
            [
                Put("a", b"\x00value"),
                Put("big", Reference("f-1", 70_000, bytes(16))),
                Delete("gone"),
                Allocate("m", 1 << 46, b"\x93"),
                Write(-1, 0, b"xyz"),
                Write(5, 4096, Reference("f-2", 1 << 33, b"\xff" * 16)),
                FetchAdd(5, 16, "<i8", (-1).to_bytes(8, "little", signed=True)),
                Floor(12),
                Fence(SESSION, 6),
            ],
        ),
        Record(0, [], [], [], []),
    ],
)
# What version 1 of the format looks like on disk and on the wire. It may be read for ever.
GOLDEN = bytes.fromhex(
    "45564501000000003af8d780f1fe7c35000102030405060708090a0b0c0d0e0f070000000000000029000000"
    "00000000101112131415161718191a1b1c1d1e1f9295cd012c92a161a5c3a42fceb292a0a2702f9293050008"
    "9305cf0000010000000000cf0000010000000001999301a161c4060076616c75659301a362696793a3662d31"
    "ce00011170c410000000000000000000000000000000009202a4676f6e659403a16dcf0000400000000000c4"
    "01939404ff00c40378797a940405cd100093a3662d32cf0000000200000000c410ffffffffffffffffffffff"
    "ffffffffff95050510a33c6938c408ffffffffffffffff92060c9307c410000102030405060708090a0b0c0d"
    "0e0f06950090909090"
)


def test_an_entry_comes_back_equal() -> None:
    assert decode_entry(encode_entry(ENTRY)) == ENTRY


def test_an_entry_without_records_comes_back_equal() -> None:
    empty = Entry(SESSION, 1, 0, EMPTY_HASH, [])
    assert decode_entry(encode_entry(empty)) == empty


def test_a_memoryview_is_decoded_like_bytes() -> None:
    assert decode_entry(memoryview(encode_entry(ENTRY))) == ENTRY


def test_the_format_is_frozen() -> None:
    assert encode_entry(ENTRY).hex() == GOLDEN.hex()
    assert decode_entry(GOLDEN) == ENTRY


@pytest.mark.parametrize("number", [0, 1, (1 << 64) - 1])
def test_header_numbers_use_all_their_bits(number: int) -> None:
    entry = Entry(SESSION, number, number, EMPTY_HASH, [Record(number, [], [], [], [])])
    assert decode_entry(encode_entry(entry)) == entry


def test_any_flipped_bit_is_noticed() -> None:
    data = encode_entry(ENTRY)
    for at in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises((CorruptionError, InvalidError)):
            decode_entry(bytes(damaged))


def test_only_the_format_version_is_not_under_the_checksum() -> None:
    data = encode_entry(ENTRY)
    for at in set(range(64)) - {3}:
        damaged = bytearray(data)
        damaged[at] ^= 1
        with pytest.raises(CorruptionError):
            decode_entry(bytes(damaged))


def test_an_encrypted_entry_asks_for_the_key() -> None:
    data = bytearray(encode_entry(ENTRY))
    data[4] = 1
    seed = int.from_bytes(data[:8], "little")
    data[8:16] = xxh3_64_intdigest(bytes(data[16:]), seed).to_bytes(8, "little")
    with pytest.raises(InvalidError, match="key 1"):
        decode_entry(bytes(data))


def test_any_truncation_is_noticed() -> None:
    data = encode_entry(ENTRY)
    for size in range(len(data)):
        with pytest.raises(CorruptionError):
            decode_entry(data[:size])
    with pytest.raises(CorruptionError):
        decode_entry(data + b"\0")


def test_a_newer_format_asks_for_an_upgrade() -> None:
    data = bytearray(encode_entry(ENTRY))
    data[3] = 2
    with pytest.raises(InvalidError, match=r"format 2.*upgrade"):
        decode_entry(bytes(data))


def test_sessions_tell_when_they_began_and_differ() -> None:
    one, other = new_session(1 << 40), new_session(1 << 40)
    assert len(one) == 16 and one != other
    assert session_start(one) == session_start(other) == 1 << 40
    assert sorted([new_session(300), new_session(2)], key=bytes)[0][7] == 2


def test_ids_are_written_and_read() -> None:
    id = RecordId(SESSION, 12345)
    assert str(id) == "000102030405060708090a0b0c0d0e0f-12345"
    assert RecordId.parse(str(id)) == id


@pytest.mark.parametrize(
    "text",
    ["", "-", "12", "00-1", f"{SESSION.hex()}", f"{SESSION.hex()}-", f"{SESSION.hex()}-x"]
    + [f"{SESSION.hex()}-{tail}" for tail in ("1_0", " 5", "+5", "-5", "05", "5 ", "\u0663")]
    + ["00 " * 10 + "00-1", f"{SESSION.hex().upper()}-1"],
)
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidError, match="not a record id"):
        RecordId.parse(text)


def test_the_running_hash_depends_on_every_entry_and_their_order() -> None:
    one, two = next_hash(EMPTY_HASH, b"one"), next_hash(EMPTY_HASH, b"two")
    assert one != two and len(one) == 16
    assert next_hash(one, b"two") != next_hash(two, b"one")
    assert next_hash(EMPTY_HASH, b"entry").hex() == "535e96e727b7c7bfef99ff30ad393e76"


def test_a_payload_knows_its_size() -> None:
    assert payload_size(b"12345") == 5
    assert payload_size(Reference("f", 1 << 50, b"")) == 1 << 50


@pytest.mark.parametrize(
    "name", ["a", "ä", "a/b c\n", "\U0001f600", "x" * MAX_NAME_BYTES, "é" * 512, " ", "-"]
)
def test_good_names_are_returned_as_they_are(name: str) -> None:
    assert check_name(name) is name


@pytest.mark.parametrize(
    "name",
    ["", "\0", "a\0b", "\ud800", "a\udfff", "x" * 1025, "é" * 513, b"bytes", 1, None, ("a",)],
)
def test_bad_names_are_refused(name: object) -> None:
    with pytest.raises(InvalidError):
        check_name(name)


def test_a_very_long_name_does_not_fill_the_message() -> None:
    with pytest.raises(InvalidError) as caught:
        check_name("x" * 10_000_000)
    assert len(str(caught.value)) < 300
