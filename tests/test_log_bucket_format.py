"""The bytes of the bucket log: what is encoded is decoded, and nothing else is."""

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from everpool.errors import CorruptionError, InvalidError
from everpool.log.bucket.draft import Draft
from everpool.log.bucket.format import (
    Head,
    Reference,
    Stored,
    decode_chunk,
    decode_head,
    decode_table,
    encode_chunk,
    encode_head,
    encode_table,
    parse_entry,
    parse_span,
)

LOG_ID = bytes(range(16))
EMPTY = Head(LOG_ID, b"", 0, 0, 0, 0, b"", (), ())


def stored(rng: random.Random, large: bool = False) -> Stored:
    data = rng.randbytes(rng.randint(1, 60))
    one = Stored(rng.randbytes(16), rng.randbytes(8), rng.randrange(1 << 62), len(data), data)
    return one._replace(data=None, hash=xxh3_128_digest(data), put_at=7) if large else one


def make_head(seed: int) -> Head:
    """Return a head as some history of appends and trims leaves it."""
    rng = random.Random(seed)
    head = EMPTY
    for _ in range(rng.randint(1, 120)):
        draft = Draft(head, 300)
        assert draft.append(stored(rng, rng.random() < 0.2))
        if rng.random() < 0.02:
            draft.trim(rng.randint(0, draft.end), rng.randbytes(rng.randint(0, 30)))
        head = draft.write(LOG_ID, rng.randbytes(16)).head
    return head


def refused(decode: object, data: bytes, *args: object) -> None:
    with pytest.raises((CorruptionError, InvalidError)):
        decode(data, *args)  # type: ignore[operator]


def resealed(data: bytes) -> bytes:
    """Return the bytes with a checksum that is right, as a buggy writer would leave them."""
    return data[:16] + struct.pack("<Q", xxh3_64_intdigest(data[24:])) + data[24:]


@given(st.integers(0, 1 << 32))
def test_what_is_encoded_is_decoded(seed: int) -> None:
    head = make_head(seed)
    found = decode_head(encode_head(head))
    assert found == head._replace(references=list(head.references), entries=list(head.entries))
    if head.entries:
        reference, data = encode_chunk(LOG_ID, head.sealed + 1, head.entries)
        assert decode_chunk(data, reference, LOG_ID) == head.entries
        assert parse_span(reference.key) == (reference.first, reference.last)
        assert xxh3_128_digest(data).hex() in reference.key
    if head.references and head.references[0].level == head.references[-1].level:
        reference, data = encode_table(LOG_ID, head.references)
        assert decode_table(data, reference, LOG_ID) == head.references


@given(st.integers(0, 1 << 32), st.data())
def test_damaged_bytes_are_never_decoded(seed: int, data: st.DataObject) -> None:
    head = make_head(seed)
    whole = bytearray(encode_head(head))
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "shuffle"]))
    at = data.draw(st.integers(0, len(whole) - 1))
    if kind == "flip":
        whole[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del whole[at:]
    elif kind == "grow":
        whole += b"\0"
    else:
        whole[at:] = bytes(reversed(whole[at:])) + b"x"
    refused(decode_head, bytes(whole))
    chunk_reference, chunk = encode_chunk(LOG_ID, 1, [stored(random.Random(seed))])
    table_reference, table = encode_table(LOG_ID, [chunk_reference])
    for decode, good, reference in (
        (decode_chunk, chunk, chunk_reference),
        (decode_table, table, table_reference),
    ):
        bad = bytearray(good)
        bad[at % len(bad)] ^= 1 + at % 255
        refused(decode, bytes(bad), reference, LOG_ID)
        refused(decode, good[: at % len(good)], reference, LOG_ID)
        refused(decode, good, reference, bytes(16))
        wrong = reference._replace(first=reference.first + 1, last=reference.last + 1)
        refused(decode, good, wrong, LOG_ID)


@given(st.integers(0, 1 << 32), st.data())
def test_nonsense_with_a_right_checksum_raises_no_other_errors(
    seed: int, data: st.DataObject
) -> None:
    rng = random.Random(seed)
    sources = [encode_head(make_head(seed))]
    reference, chunk = encode_chunk(LOG_ID, 3, [stored(rng, one) for one in (True, False, True)])
    following, _ = encode_chunk(LOG_ID, 6, [stored(rng)])
    table_reference, table = encode_table(LOG_ID, [reference, following])
    sources += [chunk, table]
    for number, source in enumerate(sources):
        bad = bytearray(source)
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(24, len(bad) - 1))
            bad[at] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            del bad[data.draw(st.integers(24, len(bad))) :]
        whole = resealed(bytes(bad))
        hash = xxh3_128_digest(whole)
        try:
            if number == 0:
                decode_head(whole)
            elif number == 1:
                decode_chunk(whole, reference._replace(hash=hash), LOG_ID)
            else:
                decode_table(whole, table_reference._replace(hash=hash), LOG_ID)
        except (CorruptionError, InvalidError):
            continue


@given(st.binary(max_size=300))
def test_any_bytes_raise_our_errors_only(data: bytes) -> None:
    reference = Reference(0, len(data), 1, 1, xxh3_128_digest(data))
    for magic in (b"", b"EVLHEAD\0", b"EVLCHNK\0", b"EVLTABL\0"):
        refused(decode_head, magic + data)
        refused(decode_chunk, magic + data, reference, LOG_ID)
        refused(decode_table, magic + data, reference, LOG_ID)


def test_a_newer_format_asks_for_an_upgrade() -> None:
    data = encode_head(make_head(1))
    newer = data[:8] + struct.pack("<H", 2) + data[10:]
    with pytest.raises(InvalidError, match=r"format 2.*upgrade everpool"):
        decode_head(newer)
    encrypted = data[:12] + struct.pack("<I", 7) + data[16:]
    with pytest.raises(InvalidError, match=r"key 7.*upgrade everpool"):
        decode_head(encrypted)


def test_the_bytes_are_those_that_are_documented() -> None:
    one = Stored(b"i" * 16, b"w" * 8, 5, 3, b"abc")
    away = Stored(b"j" * 16, b"w" * 8, 6, 9, None, b"h" * 16, 3)
    old = Reference(1, 77, 1, 4, b"H" * 16)
    head = Head(b"L" * 16, b"N" * 16, 8, 4, 2, 6, b"note", [old], [one, away])
    rest = (
        b"L" * 16
        + b"N" * 16
        + struct.pack("<QQQQIII", 8, 4, 2, 6, 4, 1, 2)
        + b"note"
        + struct.pack("<B3xIQQ", 1, 77, 1, 4)
        + b"H" * 16
        + (b"i" * 16 + b"w" * 8 + struct.pack("<QIB", 5, 3, 0) + b"abc")
        + (b"j" * 16 + b"w" * 8 + struct.pack("<QIB", 6, 9, 1) + b"h" * 16 + struct.pack("<Q", 3))
    )
    start = b"EVLHEAD\0" + struct.pack("<HHIQ", 1, 0, 0, xxh3_64_intdigest(rest))
    assert encode_head(head) == start + rest
    chunk = b"L" * 16 + struct.pack("<QQI", 5, 5, 1)
    chunk += b"i" * 16 + b"w" * 8 + struct.pack("<QIB", 5, 3, 0) + b"abc"
    start = b"EVLCHNK\0" + struct.pack("<HHIQ", 1, 0, 0, xxh3_64_intdigest(chunk))
    reference, data = encode_chunk(b"L" * 16, 5, [one])
    assert data == start + chunk
    name = xxh3_128_digest(data).hex()
    assert reference.key == f"chunks/{5:020d}-{5:020d}-{name}"
    table = b"L" * 16 + struct.pack("<QQI", 1, 4, 1) + struct.pack("<B3xIQQ", 1, 77, 1, 4)
    start = b"EVLTABL\0" + struct.pack("<HHIQ", 1, 0, 0, xxh3_64_intdigest(table + b"H" * 16))
    reference, data = encode_table(b"L" * 16, [old])
    assert data == start + table + b"H" * 16
    assert reference.level == 2 and reference.key.startswith(f"tables/{1:020d}-{4:020d}-")
    assert away.key == f"entries/{3:020d}-" + "6a" * 16
    assert parse_entry(away.key) == (3, b"j" * 16) and parse_entry("entries/x") is None


def test_a_head_stays_short_however_long_the_log_is() -> None:
    rng = random.Random(3)
    head, objects = EMPTY, dict[str, bytes]()
    for _ in range(9_000):
        draft = Draft(head, 120)
        draft.append(Stored(rng.randbytes(16), b"w" * 8, 1, 60, bytes(60)))
        written = draft.write(LOG_ID, rng.randbytes(16))
        head = written.head
        objects |= written.objects
    assert len(written.data) < 6_000
    assert {one.level for one in head.references} == {0, 1, 2}
    assert len(objects) == len(set(objects))
    draft = Draft(head, 120)
    draft.trim(head.end - 1, b"")
    assert not draft.write(LOG_ID, bytes(16)).head.references


def test_no_chunk_holds_what_is_yet_to_be_swapped_in() -> None:
    """Else a chunk whose sealer lost the swap would tell of entries that never came to be."""
    rng = random.Random(5)
    head = EMPTY
    truth: dict[int, bytes] = {}
    for _ in range(300):
        attempts = []
        for _ in range(3):
            draft = Draft(head, 400)
            batch = [stored(rng) for _ in range(rng.randint(1, 4))]
            ids = [one.id for one in batch if draft.append(one)]
            attempts.append((draft.write(LOG_ID, rng.randbytes(16)), ids))
        for written, _ in attempts:
            for key, data in written.objects:
                span = parse_span(key)
                if key.startswith("chunks/"):
                    assert span is not None
                    reference = Reference(0, len(data), *span, xxh3_128_digest(data))
                    for position, one in enumerate(decode_chunk(data, reference, LOG_ID), span[0]):
                        assert truth[position] == one.id
        winner, ids = rng.choice(attempts)
        for position, id in enumerate(ids, head.end + 1):
            truth[position] = id
        head = winner.head
