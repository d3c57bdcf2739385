"""Whatever bytes `decode` is given, only our errors come out, in little time and memory."""

import contextlib
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everpool.errors import CorruptionError, InvalidError
from everpool.values import (
    _ipc,
    _tables,
    decode,
    describe,
    dtype_from_bytes,
    dtype_to_bytes,
    encode,
    view_array,
)

pack = msgspec.msgpack.encode
Ext = msgspec.msgpack.Ext

VALUES: list[Any] = [
    None,
    True,
    -(2**90),
    1.5,
    1j,
    "héllo wörld",
    b"\x00\xff" * 9,
    datetime(2024, 2, 29, 1, 2, 3, 4, fold=1),
    datetime(2024, 2, 29, tzinfo=UTC),
    datetime(2024, 2, 29, tzinfo=timezone(timedelta(hours=2), "EET")),
    datetime(2024, 2, 29, tzinfo=ZoneInfo("Europe/Paris")),
    date(2024, 2, 29),
    [1, [2.5, None, "x"], {"a": b"y"}, True],
    (1, (2, (3,)), 2**70),
    {"from": 1, "to": 2, "note": {"deep": [1] * 20}},
    {"t": (1, 2), "a": np.arange(5), "z": [np.zeros((2, 2), order="F"), np.float32(1)]},
    [datetime(2024, 2, 29, tzinfo=ZoneInfo("UTC")), date(2024, 2, 29), 1j, -(2**80)],
    np.float64(2.5),
    np.str_("scalar"),
    np.datetime64("2024-02-29", "ns"),
    np.ones(1, [("a", "i4"), ("b", ">f8", (2,))])[0],
    np.arange(24, dtype="i2").reshape(2, 3, 4),
    np.arange(24.0).reshape(2, 3, 4).transpose(1, 2, 0),
    np.zeros((0, 3)),
    np.array(7),
    np.zeros(2, np.longdouble),
    np.array(["2024-02-29"], "M8[us]"),
    np.zeros(2, np.dtype([("a", "i1"), ("b", [("c", "f4", (2,)), ("d", "U3")])], align=True)),
]

ENCODED = [encode(value).tobytes() for value in VALUES]
MARKS = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\0\0\0", b"\xdd", b"\xc9")


def mutated(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """One to four random changes of the kinds that files suffer, and attackers try."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out)) if out else 0
        how = rng.randrange(8)
        if how <= 1 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif how == 2 and out:
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xC1, 0xFF, rng.randrange(256)))
        elif how == 3:
            out[at : at + 4] = rng.choice(MARKS)
        elif how == 4:
            del out[at:]
        elif how == 5:
            del out[at : at + rng.randrange(1, 16)]
        elif how == 6:
            out[at:at] = rng.randbytes(rng.randrange(1, 70))
        else:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            out[at : at + 16] = other[start : start + rng.randrange(1, 32)]
    return bytes(out)


def inside(array: Any, data: bytes) -> bool:
    """Whether all of an array's memory lies within `data`."""
    if array.nbytes == 0:
        return True
    low, high = np.lib.array_utils.byte_bounds(array)
    start = np.frombuffer(data, np.uint8).ctypes.data
    return start <= low <= high <= start + len(data)


def check_value(value: Any, data: bytes, zero_copy: bool) -> None:
    if type(value) is np.ndarray:
        assert not value.flags.writeable and not value.dtype.hasobject
        assert inside(value, data) == (zero_copy or value.nbytes == 0)
    elif type(value) in (list, tuple):
        for item in value:
            check_value(item, data, zero_copy)
    elif type(value) is dict:
        assert all(type(key) is str for key in value)
        for item in value.values():
            check_value(item, data, zero_copy)


def survives(data: bytes, original: bytes = b"", *, zero_copy: bool = True) -> bool:
    """Decode hostile bytes; True when they made a value, which then must be a legal one."""
    for read in (describe, view_array):
        with contextlib.suppress(CorruptionError, InvalidError):
            read(data)
    try:
        value = decode(data, zero_copy=zero_copy)
    except CorruptionError as error:
        assert str(error)
        return False
    except InvalidError as error:
        # Sound bytes that cannot be read here: never the answer to mere damage.
        message = str(error)
        assert data[:8] != original[:8] or "time zone" in message or "long double" in message
        return False
    check_value(value, data, zero_copy)
    encode(value)
    return True


@pytest.mark.parametrize("seed", range(8))
def test_mutations(seed: int) -> None:
    rng = random.Random(seed)
    accepted = 0
    for _ in range(5000):
        original = rng.choice(ENCODED)
        data = mutated(rng, original, ENCODED)
        accepted += survives(data, original, zero_copy=rng.random() < 0.5)
    # Else the mutations were too wild to reach the inner checks.
    assert 250 < accepted < 4000


@pytest.mark.parametrize("index", range(len(VALUES)), ids=lambda i: type(VALUES[i]).__name__)
def test_every_single_byte_and_every_length(index: int) -> None:
    original = ENCODED[index]
    for at in range(len(original)):
        for change in (0x01, 0x80, 0xFF):
            data = bytearray(original)
            data[at] ^= change
            survives(bytes(data), original)
        survives(original[:at], original)
        survives(original[at:], original)
    for extra in (b"\0", b"\xc0", b"\0" * 64):
        survives(original + extra, original)


STATED_LENGTH = [i for i, v in enumerate(VALUES) if type(v) not in (int, str, bytes, np.str_)]


@pytest.mark.parametrize("index", STATED_LENGTH, ids=lambda i: type(VALUES[i]).__name__)
def test_a_wrong_length_is_found_where_the_kind_states_it(index: int) -> None:
    original = ENCODED[index]
    named_zone = isinstance(VALUES[index], datetime) and VALUES[index].tzinfo not in (None, UTC)
    for data in (original[:-1], original + b"\0", original[: len(original) // 2]):
        if named_zone:
            survives(data, original)
        else:
            with pytest.raises(CorruptionError):
                decode(data, zero_copy=True)


@given(st.binary(max_size=200), st.sampled_from(ENCODED))
def test_random_bodies(body: bytes, original: bytes) -> None:
    survives(original[:8] + body, original)
    survives(body)


def peak_bytes(data: bytes) -> int:
    tracemalloc.start()
    try:
        survives(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_in_proportion_to_the_input() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        data = mutated(rng, rng.choice(ENCODED), ENCODED)
        assert peak_bytes(data) < 300 * len(data) + 300_000


# ---------------------------------------------------------------- made to hurt


def header(name: str, flags: int = 0) -> bytes:
    kinds = "none bool int float complex str bytes datetime date list tuple dict scalar array"
    return bytes((0xE5, 1, (kinds + " table batch").split().index(name) + 1, flags, 0, 0, 0, 0))


def array_bytes(
    shape: tuple[int, ...],
    dtype: bytes = b"\xa3<f8",
    items: bytes = b"",
    order: bytes | None = None,
) -> bytes:
    n = len(shape)
    order = bytes(range(n)) if order is None else order
    head = header("array") + struct.pack(f"<IB3x{n}Q", len(dtype), n, *shape) + order + dtype
    return head + bytes(-len(head) % 64) + items


def extended(packed: bytes, *attachments: bytes, kind: str = "list") -> bytes:
    out = header(kind, 1) + struct.pack("<Q", len(packed)) + packed
    for attachment in attachments:
        out += bytes(-len(out) % 64) + attachment
    return out


def attachment(size: int) -> Any:
    return Ext(64, struct.pack("<Q", size))


def nested_tuples(levels: int) -> bytes:
    packed = b"\x90"
    for _ in range(levels):
        size = len(packed)
        packed = b"\x91\xc9" + struct.pack(">I", size) + b"\x0b" + packed
    return packed


ITEM = array_bytes((1,), items=bytes(8))

HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "half a header": b"\xe5\x01\x03\x00",
    "unknown kind": b"\xe5\x01\x63\x00\x00\x00\x00\x00",
    "unknown flags": header("int", 2) + b"\1",
    "flags where none belong": header("int", 1) + b"\1",
    "wrong magic": b"\x80" + header("int")[1:] + b"\1",
    "wrong magic and version": b"\x80\x09" + header("int")[2:] + b"\1",
    "wrong magic and key": b"\x80" + header("int")[1:4] + b"\1\0\0\0\1",
    "none with a body": header("none") + b"\0",
    "bool 2": header("bool") + b"\2",
    "empty bool": header("bool"),
    "empty int": header("int"),
    "short float": header("float") + bytes(7),
    "long complex": header("complex") + bytes(17),
    "bad UTF-8": header("str") + b"\xff",
    "surrogate in UTF-8": header("str") + b"\xed\xa0\x80",
    "30 February": header("date") + struct.pack("<HBB", 2024, 2, 30),
    "year 0": header("date") + struct.pack("<HBB", 0, 1, 1),
    "fold 2": header("datetime") + struct.pack("<H5BIBB", 2024, 1, 1, 0, 0, 0, 0, 2, 0),
    "naive with a zone": header("datetime")
    + struct.pack("<H5BIBB", 2024, 1, 1, 0, 0, 0, 0, 0, 0)
    + b"UTC",
    "zone kind 9": header("datetime") + struct.pack("<H5BIBB", 2024, 1, 1, 0, 0, 0, 0, 0, 9),
    "offset of days": header("datetime")
    + struct.pack("<H5BIBBq", 2024, 1, 1, 0, 0, 0, 0, 0, 1, 2**62),
    "offset cut short": header("datetime")
    + struct.pack("<H5BIBBi", 2024, 1, 1, 0, 0, 0, 0, 0, 1, 0),
    **{
        f"zone {key!r}": header("datetime")
        + struct.pack("<H5BIBB", 2024, 1, 1, 0, 0, 0, 0, 0, 3)
        + key
        for key in (
            b"",
            b"../../etc/passwd",
            b"/etc/passwd",
            b"a/../UTC",
            b"A\0B",
            b"\xff",
            b"x" * 999,
        )
    },
    "list of 4 billion": header("list") + b"\xdd\xff\xff\xff\xff",
    "lists of 4 billion": header("list") + b"\xdd\xff\xff\xff\xff" * 5000,
    "dict of 4 billion": header("dict") + b"\xdf\xff\xff\xff\xff",
    "bytes of 4 GiB": header("list") + b"\x91\xc6\xff\xff\xff\xff",
    "str of 4 GiB": header("list") + b"\x91\xdb\xff\xff\xff\xff",
    "extension of 4 GiB": header("list", 1)
    + struct.pack("<Q", 7)
    + b"\x91\xc9\xff\xff\xff\xff\x0b",
    "list 300 deep": header("list") + b"\x91" * 300 + b"\xc0",
    "list 10 million deep": header("list") + b"\x91" * 10_000_000,
    "dict 5 million deep": header("dict") + b"\x81\xa0" * 5_000_000,
    "tuples 300 deep": extended(nested_tuples(300)),
    "tuples 30,000 deep": extended(nested_tuples(30_000)),
    "a dict for a list": header("list") + pack({}),
    "a list for a dict": header("dict") + pack([]),
    "a number for a tuple": header("tuple") + pack(1),
    "two lists": header("list") + pack([]) + pack([]),
    "int keys": header("dict") + pack({1: 2}),
    "bytes keys": header("dict") + pack({b"1": 2}),
    "inner int keys": header("list") + pack([{"a": [{1: 2}]}]),
    "list keys": header("dict") + b"\x81\x91\x01\x01",
    "dict keys": header("dict") + b"\x81\x80\x01",
    "timestamp": header("list") + pack([datetime(2024, 1, 1, tzinfo=UTC)]),
    "extension in a plain list": header("list") + pack([Ext(11, b"\x90")]),
    "unknown extension": extended(pack([Ext(99, b"")])),
    "extension as a key": extended(
        b"\x81\xc7\x04\x09" + struct.pack("<HBB", 2024, 1, 1), kind="dict"
    ),
    "array as a key": extended(b"\x81" + pack(attachment(len(ITEM))) + b"\x01", ITEM, kind="dict"),
    "tuple of a number": extended(pack([Ext(11, b"\x01")])),
    "tuple with a tail": extended(pack([Ext(11, b"\x90\x90")])),
    "members longer than all": header("list", 1) + struct.pack("<Q", 2**63) + b"\x90",
    "no members": header("list", 1) + b"\0\0\0",
    "attachment missing": extended(pack([attachment(72)])),
    "attachment too long": extended(pack([attachment(len(ITEM) + 1)]), ITEM),
    "attachment of 2**64 bytes": extended(pack([attachment(2**64 - 1)]), ITEM),
    "attachment twice": extended(pack([attachment(len(ITEM))] * 2), ITEM),
    "attachment never named": extended(pack([1]), ITEM),
    "attachment of 0 bytes": extended(pack([attachment(0)]), ITEM),
    "attached list": extended(pack([attachment(9)]), header("list") + b"\x90"),
    "attachment misnamed": extended(pack([Ext(64, b"\1")]), ITEM),
    "gap not zero": extended(pack([attachment(len(ITEM))]), ITEM)[:63] + b"\1" + ITEM,
    "array of nothing": array_bytes((2**40,)),
    "array too short": array_bytes((4,), items=bytes(31)),
    "array too long": array_bytes((4,), items=bytes(33)),
    "product of 2**64": array_bytes((2**32, 2**32)),
    "product of 2**67": array_bytes((2**32, 2**32), b"\xa3<f8"),
    "empty but huge": array_bytes((0, 2**62, 2**62)),
    "empty beyond 64 bits": array_bytes((0, 2**64 - 1)),
    "2**64 - 1 nothings": array_bytes((2**64 - 1,), b"\xa3|V0"),
    "65 dimensions": array_bytes((1,) * 65, items=bytes(8)),
    "255 dimensions": array_bytes((1,) * 255, items=bytes(8)),
    "axis twice": array_bytes((1, 1), items=bytes(8), order=b"\0\0"),
    "axis 7": array_bytes((1, 1), items=bytes(8), order=b"\0\7"),
    "dtype longer than all": header("array") + struct.pack("<IB3x", 2**32 - 1, 0) + bytes(60),
    "array header cut": header("array") + b"\0\0\0",
    "array padding": array_bytes((1,), items=bytes(8)).replace(b"f8\0", b"f8\1"),
    "reserved bytes": array_bytes((1,), items=bytes(8))[:13] + b"\1" + ITEM[14:],
    "subarray dtype": array_bytes((1,), dtype_to_bytes(np.dtype(("f8", (2,)))), bytes(16)),
    "scalar cut": header("scalar") + b"\0",
    "scalar dtype cut": header("scalar") + b"\xff\xff<f8",
    "scalar item cut": header("scalar") + b"\4\0\xa3<f8" + bytes(7),
    "scalar str": header("scalar") + b"\1\0U\xff",
    "scalar of a subarray": header("scalar")
    + struct.pack("<H", len(dtype_to_bytes(np.dtype(("i1", (2,))))))
    + dtype_to_bytes(np.dtype(("i1", (2,))))
    + bytes(2),
    "table cut": header("table") + bytes(8),
    "table of nothing": header("table") + bytes(56),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=list(HOSTILE))
@pytest.mark.parametrize("zero_copy", [True, False])
def test_hostile_bytes_are_corruption(data: bytes, zero_copy: bool) -> None:
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(CorruptionError):
            decode(data, zero_copy=zero_copy)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 2
    assert peak < 3 * len(data) + 3_000_000
    survives(data)


MISFITS = [name for name in HOSTILE if name.startswith(("array too", "array of", "product"))]


@pytest.mark.parametrize("name", MISFITS)
def test_describe_finds_what_does_not_fit(name: str) -> None:
    for read in (describe, view_array):
        with pytest.raises(CorruptionError):
            read(HOSTILE[name])


def test_the_hostile_kit_makes_sound_bytes_when_asked() -> None:
    """Else the cases above would be refused for a slip in the kit."""
    assert decode(ITEM, zero_copy=True).tolist() == [0.0]
    sound = extended(pack([attachment(len(ITEM))] * 2), ITEM, ITEM)
    assert [a.tolist() for a in decode(sound, zero_copy=True)] == [[0.0], [0.0]]
    deep = decode(extended(nested_tuples(150)), zero_copy=True)
    assert type(deep) is list and type(deep[0]) is tuple
    assert decode(header("dict") + pack({"a": 1}), zero_copy=True) == {"a": 1}
    assert decode(header("list") + b"\x91" * 199 + b"\x90", zero_copy=True)


def dtype_record(*fields: Any, itemsize: int = 8, aligned: bool = False) -> bytes:
    return pack(["rec", list(fields), itemsize, aligned])


HOSTILE_DTYPES: dict[str, bytes] = {
    "nothing": b"",
    "not MessagePack": b"\xc1",
    "a number": pack(8),
    "a tail": pack("<f8") + b"\0",
    **{
        f"name {name}": pack(name)
        for name in (
            "O",
            "|O",
            "|O8",
            "object",
            "f8",
            "=f8",
            "<f8 ",
            "<f8\n",
            "float64",
            "f8,f8",
            "(2,)f8",
            "<f3",
            "<i16",
            "|i4",
            "T",
            "|S",
            "|S-1",
            "|S99999999999",
            "|S2147483648",
            "<U536870912",
            "|V4294967296",
            "<M8[]",
            "<M8[xs]",
            "<M8[0s]",
            "<M8[s/2]",
            "<M8[99999999999s]",
            "<M8[generic]",
            "<f16",
            "<f16:",
            "__import__('os')",
            "\ud7ff",
            "|S1\0",
            "|S01",
            "<M8[1s]",
            "<U1073741825",
        )
    },
    "two times": pack(["sub", "<f8"]),
    "negative side": pack(["sub", "<f8", [-1]]),
    "huge side": pack(["sub", "<f8", [2**62]]),
    "huge sides": pack(["sub", "<f8", [2**16, 2**16]]),
    "wrapping sides": pack(["sub", "<f8", [2**31, 2**31, 4]]),
    "many sides": pack(["sub", "<f8", [1] * 1000]),
    "sides of text": pack(["sub", "<f8", ["2"]]),
    "unknown tag": pack(["obj", "<f8", [2]]),
    "object field": dtype_record(["a", "|O", 0, None]),
    "field outside": dtype_record(["a", "<f8", 4, None]),
    "field before": dtype_record(["a", "<f8", -8, None]),
    "field far away": dtype_record(["a", "<f8", 2**62, None]),
    "one name twice": dtype_record(["a", "<i4", 0, None], ["a", "<i4", 4, None]),
    "name as title": dtype_record(["a", "<i4", 0, "b"], ["b", "<i4", 4, None]),
    "title of bytes": dtype_record(["a", "<f8", 0, b"t"]),
    "itemsize negative": dtype_record(itemsize=-1),
    "itemsize huge": dtype_record(itemsize=2**40),
    "itemsize of 2**31": dtype_record(itemsize=2**31),
    "not aligned": dtype_record(["a", "|i1", 0, None], ["b", "<i4", 1, None], aligned=True),
    "a field short": pack(["rec", [["a", "<f8", 0]], 8, False]),
    "a field long": pack(["rec", [["a", "<f8", 0, None, 1]], 8, False]),
    "too long": pack(["rec", [], 8, False, 1]),
    "40 deep": b"\x93\xa3sub" * 40 + pack("<f8") + b"\x91\x01" * 40,
    "million deep": b"\x93\xa3sub" * 1_000_000,
}


@pytest.mark.parametrize("encoded", HOSTILE_DTYPES.values(), ids=list(HOSTILE_DTYPES))
def test_hostile_dtypes_are_corruption(encoded: bytes) -> None:
    with pytest.raises(CorruptionError):
        dtype_from_bytes(encoded)
    with pytest.raises(CorruptionError):
        decode(array_bytes((0,), encoded), zero_copy=True)


def test_long_doubles_of_another_processor_are_refused() -> None:
    sound = dtype_to_bytes(np.dtype(np.longdouble))
    bits = sound.partition(b":")[2]
    with pytest.raises(InvalidError, match="long double"):
        dtype_from_bytes(sound.replace(bits, b"1" * len(bits)))


DTYPES = [
    dtype_to_bytes(np.dtype(dtype))
    for dtype in (
        "<f8",
        ">M8[25us]",
        [("a", "i4"), ("b", [("c", "U3", (2, 2)), ("d", "?")])],
        ("f4", (2, 3)),
        {"names": ["a", "b"], "formats": ["i4", "i2"], "offsets": [9, 1], "titles": ["A", "B"]},
    )
]


def test_dtype_mutations() -> None:
    rng = random.Random(3)
    accepted = 0
    for _ in range(15_000):
        data = mutated(rng, rng.choice(DTYPES), DTYPES)
        try:
            dtype = dtype_from_bytes(data)
        except (CorruptionError, InvalidError):
            continue
        accepted += 1
        assert not dtype.hasobject
        assert dtype_from_bytes(dtype_to_bytes(dtype)) == dtype
    assert accepted > 100


# ---------------------------------------------------------------- Arrow


def arrow_values(pa: Any) -> list[Any]:
    n = 9
    columns = [
        pa.array([1, None, 3] * 3),
        pa.array(["x" * i for i in range(n)]),
        pa.array(["é" * 5 * i for i in range(n)], pa.string_view()),
        pa.array([[str(i)] * (i % 4) for i in range(n)]),
        pa.array([[i] * (i % 4) for i in range(n)], pa.list_view(pa.int16())),
        pa.array([{"a": i, "b": "q" * i} for i in range(n)]),
        pa.array(["a", "b", None] * 3).dictionary_encode(),
        pa.array([["a", "b"]] * n).cast(pa.list_(pa.dictionary(pa.int8(), pa.string()))),
        pa.RunEndEncodedArray.from_arrays([5, n], ["a", "b"]),
        pa.UnionArray.from_sparse(
            pa.array([0, 1, 0] * 3, pa.int8()), [pa.array(range(n)), pa.array(["a"] * n)]
        ),
        pa.array([datetime(2020, 1, 1)] * n, pa.timestamp("us", "UTC")),
    ]
    tables = [pa.table({"c": pa.chunked_array([column, column])}) for column in columns]
    return [pa.table({str(i): c for i, c in enumerate(columns)}), *tables] + [
        table.to_batches()[0] for table in tables
    ]


def use(pa: Any, value: Any) -> None:
    """Touch everything: what was let through must not crash, whatever it says."""
    if value.num_rows < 1000:
        try:
            value.to_pylist()
            value.equals(value)
        except (ValueError, TypeError, ArithmeticError, LookupError, NotImplementedError):
            pass  # text that is not UTF-8, dates out of range


@pytest.mark.parametrize("seed", range(4))
def test_arrow_mutations(seed: int) -> None:
    pa = pytest.importorskip("pyarrow")
    rng = random.Random(seed)
    corpus = [encode(value).tobytes() for value in arrow_values(pa)]
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    previous = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    accepted = 0
    try:
        for _ in range(3000):
            original = rng.choice(corpus)
            data = bytearray(original)
            for _ in range(rng.choice((1, 1, 2, 3))):
                at = rng.randrange(64, len(data))
                if rng.random() < 0.5:
                    data[at] ^= 1 << rng.randrange(8)
                else:
                    data[at : at + 4] = rng.choice((*MARKS[:4], data[at + 8 : at + 12]))
            if rng.random() < 0.1:
                data = bytearray(mutated(rng, bytes(data), corpus))
            try:
                value = decode(bytes(data), zero_copy=rng.random() < 0.7)
            except (CorruptionError, InvalidError):
                continue
            if type(value) in (pa.Table, pa.RecordBatch):
                accepted += 1
                use(pa, value)
    finally:
        pa.set_memory_pool(previous)
    assert 100 < accepted < 2000
    assert pool.max_memory() < 10_000_000


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1 and len(old) == len(new)
    return data.replace(old, new)


@pytest.mark.parametrize("zero_copy", [True, False])
def test_offsets_and_indices_that_lead_outside_are_found(zero_copy: bool) -> None:
    pa = pytest.importorskip("pyarrow")
    text = pa.array(["abc", "defg", "hi"])
    nested = pa.array([["abc"], ["defg"], ["hi"]])
    categories = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int32()), text)
    nested_categories = pa.ListArray.from_arrays([0, 3], categories)
    offsets = struct.pack("<4i", 0, 3, 7, 9)
    bad_offsets = struct.pack("<4i", 0, 3, 1 << 30, 9)
    indices, bad_indices = struct.pack("<3i", 0, 1, 2), struct.pack("<3i", 0, 900_000, 2)
    for column, old, new in (
        (text, offsets, bad_offsets),
        (
            text.cast(pa.large_string()),
            struct.pack("<4q", 0, 3, 7, 9),
            struct.pack("<4q", 0, 3, -7, 9),
        ),
        (text.cast(pa.binary()), offsets, struct.pack("<4i", 0, 3, 7, 900)),
        (nested, offsets, bad_offsets),
        (categories, offsets, bad_offsets),
        (categories, indices, bad_indices),
        (nested_categories, indices, bad_indices),
        (pa.StructArray.from_arrays([text], ["s"]), offsets, bad_offsets),
    ):
        for value in (pa.table({"c": column}), pa.record_batch({"c": column})):
            data = encode(value).tobytes()
            assert decode(data, zero_copy=zero_copy).equals(value)
            with pytest.raises(CorruptionError):
                decode(replaced(data, old, new), zero_copy=zero_copy)


def test_bad_text_is_found_by_a_copying_read() -> None:
    pa = pytest.importorskip("pyarrow")
    data = encode(pa.table({"c": ["hello"]})).tobytes()
    broken = replaced(data, b"hello", b"he\xff\xfeo")
    with pytest.raises(CorruptionError):
        decode(broken, zero_copy=False)
    use(pa, decode(broken, zero_copy=True))


def stream_of(pa: Any, value: Any, rows: int, columns: int, kind: str, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, value.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write(value)
    head = header(kind) + struct.pack("<QI", rows, columns)
    return head + bytes(64 - len(head)) + sink.getvalue().to_pybytes()


def refused(data: bytes, reason: str) -> None:
    for zero_copy in (True, False):
        with pytest.raises(CorruptionError, match=reason):
            decode(data, zero_copy=zero_copy)


def aligned(data: bytes) -> bytes:
    """The same encoding with its buffers aligned, whatever else is wrong with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ipc, "_BATCH_COMPRESSION", 99)
        patch.setattr(_ipc, "_DICTIONARY_IS_DELTA", 99)
        return data[:64] + b"".join(_ipc.realigned(iter([memoryview(data)[64:]])))


def test_arrow_streams_that_cost_more_than_their_bytes_are_refused() -> None:
    pa = pytest.importorskip("pyarrow")
    plain = stream_of(pa, pa.table({"c": [1], "d": ["x"]}), 1, 2, "table")
    refused(plain, "aligned")
    assert decode(aligned(plain), zero_copy=True).to_pylist() == [{"c": 1, "d": "x"}]

    zeros = pa.table({"c": np.zeros(1 << 16)})
    bomb = stream_of(pa, zeros, 1 << 16, 1, "table", compression="zstd")
    assert len(bomb) < 4096
    refused(aligned(bomb), "compressed")

    growing = pa.chunked_array(
        [pa.array(["x", "y"]).dictionary_encode(), pa.array(["x", "y", "z"]).dictionary_encode()]
    )
    delta = stream_of(pa, pa.table({"c": growing}), 5, 1, "table", emit_dictionary_deltas=True)
    refused(aligned(delta), "piece by piece")


def test_a_header_that_contradicts_the_stream_is_found() -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"c": pa.chunked_array([[1], [2]])})
    data = encode(table).tobytes()
    refused(data[:8] + struct.pack("<Q", 3) + data[16:], "rows")
    refused(data[:16] + struct.pack("<I", 2) + data[20:], "columns")
    refused(data[:20] + b"\1" + data[21:], "gap")
    refused(data + bytes(8), "after its end")
    refused(data[:-8], "cut short")
    refused(header("batch") + data[8:], "one batch")


def test_shared_and_overlapping_buffers_are_refused() -> None:
    pa = pytest.importorskip("pyarrow")
    data = encode(pa.table({"a": np.arange(8), "b": np.arange(8)})).tobytes()
    # The second column's buffer, made to lie over the first's: without a check of this kind
    # a small stream could have every one of many columns read all of it.
    spans = struct.pack("<4q", 0, 64, 64, 0) + struct.pack("<2q", 64, 64)
    refused(replaced(data, spans, spans[:32] + struct.pack("<2q", 0, 64)), "overlap")
    refused(replaced(data, spans, spans[:32] + struct.pack("<2q", 72, 56)), "aligned")
    refused(replaced(data, spans, spans[:32] + struct.pack("<2q", 64, 65)), "outside|overlap")
    refused(replaced(data, spans, spans[:32] + struct.pack("<2q", -64, 64)), "outside")
    refused(replaced(data, spans, spans[:32] + struct.pack("<2q", 64, 2**62)), "outside")


def test_nested_dictionaries_are_not_repeated_batch_by_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pa = pytest.importorskip("pyarrow")
    big = pa.array([f"{i:06}" for i in range(50_000)])
    column = pa.ListArray.from_arrays(
        [0, 1], pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), big)
    )
    table = pa.table({"c": pa.chunked_array([column] * 2000)})
    back = decode(encode(table).tobytes(), zero_copy=True)
    assert back.equals(table) and back["c"].num_chunks == 1

    with monkeypatch.context() as patch:
        patch.setattr(_tables, "_nests_dictionary", lambda _: False)
        data = encode(table).tobytes()
    refused(data, "too often")


def test_a_dictionary_of_many_batches_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    words = pa.array([f"{i:06}" for i in range(1000)])
    column = pa.DictionaryArray.from_arrays(pa.array([0, None, 999], pa.int32()), words)
    table = pa.table({"c": pa.chunked_array([column] * 50)})
    checked: list[int] = []
    check = _tables._check_array
    monkeypatch.setattr(
        _tables,
        "_check_array",
        lambda arrow, array, **kw: (checked.append(len(array)), check(arrow, array, **kw)),
    )
    back = decode(encode(table).tobytes(), zero_copy=True)
    assert back.equals(table) and back["c"].num_chunks == 50
    assert checked == [1000]


def test_a_body_off_its_alignment_is_refused() -> None:
    pa = pytest.importorskip("pyarrow")
    data = encode(pa.table({"c": [1, 2]})).tobytes()
    batch = 64 + 8 + struct.unpack_from("<i", data, 64 + 4)[0]
    size = struct.unpack_from("<i", data, batch + 4)[0]
    body = batch + 8 + size
    assert data[body - 8 : body] == bytes(8)
    shifted = data[: batch + 4] + struct.pack("<i", size - 8) + data[batch + 8 : body - 8]
    refused(shifted + data[body:], "body of an Arrow message is not aligned")


def test_big_endian_streams_are_refused() -> None:
    pa = pytest.importorskip("pyarrow")
    data = bytearray(encode(pa.table({"c": [1, 2]})).tobytes())
    metadata = memoryview(data)[64 + 8 :]
    message = struct.unpack_from("<I", metadata)[0]
    schema = _ipc._pointed(metadata, _ipc._field(metadata, message, 2))
    vtable = schema - struct.unpack_from("<i", metadata, schema)[0]
    # The field is left out, being 0: let it point to a 1.
    one = bytes(metadata).index(b"\1\0", schema)
    struct.pack_into("<H", metadata, vtable + 4, one - schema)
    refused(bytes(data), "big-endian")


TIMED: dict[str, Callable[[], Any]] = {
    "100,000 tuples": lambda: encode([(i,) for i in range(100_000)]).tobytes(),
    "100,000 dicts": lambda: encode([{"k": i} for i in range(100_000)]).tobytes(),
    "10,000 arrays": lambda: encode([np.zeros(1)] * 10_000).tobytes(),
}


@pytest.mark.parametrize("make", TIMED.values(), ids=list(TIMED))
def test_time_grows_in_proportion(make: Callable[[], Any]) -> None:
    started = time.process_time()
    decode(make(), zero_copy=True)
    assert time.process_time() - started < 10
