"""Values come back equal and of the same type, or are refused with a remedy."""

import collections
import dataclasses
import decimal
import enum
import math
import mmap
import pathlib
import subprocess
import sys
import tempfile
import tracemalloc
import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from everpool.errors import CorruptionError, InvalidError
from everpool.values import (
    Encoded,
    decode,
    describe,
    dtype_from_bytes,
    dtype_to_bytes,
    encode,
    view_array,
)


def leaves(array: Any) -> Iterator[bytes]:
    """The bytes of every field at any depth: padding does not count."""
    if array.dtype.char in "gG":
        # Part of a long double's memory is padding.
        yield repr([repr(item) for item in array.ravel()]).encode()
    elif array.dtype.names is None:
        yield array.tobytes()
    else:
        for name in array.dtype.names:
            yield from leaves(array[name])


def same_dtype(a: Any, b: Any) -> bool:
    """Equal, and alike in what NumPy's == overlooks."""
    if a != b or a.type is not b.type or a.isalignedstruct != b.isalignedstruct:
        return False
    if a.subdtype:
        return a.subdtype[1] == b.subdtype[1] and same_dtype(a.base, b.base)
    if a.names is None:
        return a.char == b.char and a.str == b.str
    return all(same_dtype(a.fields[n][0], b.fields[n][0]) for n in a.names)


def same(a: Any, b: Any) -> bool:
    """Equal and of exactly the same types at every level, telling -0.0 from 0.0."""
    if type(b) is np.ndarray and type(a) in (np.ndarray, np.memmap):
        return (
            same_dtype(a.dtype, b.dtype)
            and a.shape == b.shape
            and list(leaves(a)) == list(leaves(b))
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, np.generic):
        if isinstance(a, np.str_ | np.bytes_):
            return a == b
        return same_dtype(a.dtype, b.dtype) and list(leaves(np.array(a))) == list(
            leaves(np.array(b))
        )
    if isinstance(a, float):
        return math.isnan(b) if math.isnan(a) else a == b and str(a) == str(b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, datetime):
        wall = (a.replace(tzinfo=None), a.fold) == (b.replace(tzinfo=None), b.fold)
        return wall and repr(a.tzinfo) == repr(b.tzinfo) and type(a.tzinfo) is type(b.tzinfo)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if type(a).__module__ == "pyarrow.lib":
        return a.schema.equals(b.schema, check_metadata=True) and a.equals(b)
    return a == b


def round_trip(value: Any) -> Any:
    encoded = encode(value)
    data = encoded.tobytes()
    assert type(data) is bytes
    assert encoded.size == len(data)
    assert b"".join(encoded.buffers()) == data
    assert b"".join(encoded.buffers()) == data, "buffers() cannot be repeated"
    for zero_copy in (True, False):
        for source in (data, memoryview(data), memoryview(bytearray(data))):
            back = decode(source, zero_copy=zero_copy)
            assert same(value, back), (value, back)
    described = describe(data)
    assert described.data_offset + described.nbytes == len(data)
    return decode(data, zero_copy=True)


# ---------------------------------------------------------------- plain values

ZONES = ["UTC", "Europe/Paris", "America/Argentina/Buenos_Aires", "Etc/GMT+5", "Asia/Kolkata"]
fixed_zones = st.builds(
    timezone,
    st.timedeltas(min_value=timedelta(hours=-23, minutes=-59), max_value=timedelta(hours=23)),
) | st.builds(
    timezone,
    st.timedeltas(min_value=timedelta(hours=-23), max_value=timedelta(hours=23)),
    st.text(max_size=5),
)
zones = st.none() | st.just(UTC) | fixed_zones | st.sampled_from(ZONES).map(ZoneInfo)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ints = st.integers() | st.integers(-(2**70), 2**70) | st.integers(-(2**2000), 2**2000)
datetimes = st.builds(
    lambda value, fold: value.replace(fold=fold), st.datetimes(timezones=zones), st.booleans()
)
plain = (
    st.none()
    | st.booleans()
    | ints
    | st.floats()
    | st.complex_numbers()
    | texts
    | st.binary(max_size=60)
    | datetimes
    | st.dates()
)
numpy_dtypes = npst.array_dtypes() | npst.scalar_dtypes() | npst.nested_dtypes()
arrays = npst.arrays(numpy_dtypes, npst.array_shapes(min_dims=0, min_side=0, max_side=4))
scalars = npst.arrays(numpy_dtypes.filter(lambda d: d.subdtype is None), ()).map(lambda a: a[()])


def containers(members: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return (
        st.lists(members, max_size=5)
        | st.lists(members, max_size=5).map(tuple)
        | st.dictionaries(texts, members, max_size=5)
    )


nested = st.recursive(plain | arrays | scalars, containers, max_leaves=12)


@given(plain)
def test_plain_values_round_trip(value: object) -> None:
    round_trip(value)


@given(nested)
def test_nested_values_round_trip(value: object) -> None:
    round_trip(value)


@given(st.recursive(plain, containers, max_leaves=40))
def test_nested_plain_values_round_trip(value: object) -> None:
    round_trip(value)


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        127,
        128,
        -128,
        -129,
        255,
        256,
        2**63 - 1,
        2**63,
        -(2**63),
        -(2**63) - 1,
        2**64 - 1,
        2**64,
        2**20_000,
        -(2**20_000),
        -0.0,
        math.inf,
        -math.inf,
        5e-324,
        complex(-0.0, math.inf),
        "",
        "\0",
        "\U0001f40d",
        b"",
        b"\0" * 1000,
        [],
        (),
        {},
        {"": {}},
        [[], (), {}],
        ((), ((),)),
        (1,),
        [True, 1, 1.0],
        {"b": 1, "a": 2},
        "é" * 70_000,
        b"x" * 70_000,
        date.min,
        date.max,
        datetime.min,
        datetime.max,
        datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Paris")),
        datetime(2024, 3, 31, 2, 30, tzinfo=ZoneInfo("Europe/Paris")),
        datetime(2024, 1, 1, tzinfo=UTC),
        datetime(2024, 1, 1, tzinfo=timezone(timedelta(0), "UTC")),
        datetime(2024, 1, 1, tzinfo=timezone(timedelta(seconds=-1, microseconds=1))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_edges_round_trip(value: object) -> None:
    round_trip(value)
    round_trip([value])
    round_trip((value, {"k": value}))


def test_containers_of_many_members_round_trip() -> None:
    for value in (list(range(70_000)), {str(i): i for i in range(70_000)}, (None,) * 70_000):
        data = encode(value).tobytes()
        assert same(value, decode(data, zero_copy=True))
        assert same([value], decode(encode([value]).tobytes(), zero_copy=True))


def test_every_zone_of_the_database_round_trips() -> None:
    import zoneinfo

    for key in sorted(zoneinfo.available_timezones()):
        value = datetime(2024, 6, 1, 12, tzinfo=ZoneInfo(key))
        assert decode(encode(value).tobytes(), zero_copy=True).tzinfo is value.tzinfo


def test_shared_members_are_not_cyclic() -> None:
    shared: list[Any] = [1, (2,)]
    for _ in range(10):
        shared = [shared, shared]
    round_trip(shared)


def test_the_types_of_dict_keys_and_their_order_are_kept() -> None:
    value = {"z": 1, "a": {"y": 2, "b": 3}, "m": 4}
    back = round_trip(value)
    assert list(back) == ["z", "a", "m"] and list(back["a"]) == ["y", "b"]


def nest(levels: int, wrap: Any) -> Any:
    value: Any = wrap(1)
    for _ in range(levels - 1):
        value = wrap(value)
    return value


WRAPS = {
    "list": lambda v: [v],
    "tuple": lambda v: (v,),
    "dict": lambda v: {"k": v},
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=list(WRAPS))
def test_nesting_to_200_levels_and_no_further(wrap: Any) -> None:
    round_trip(nest(200, wrap))
    with pytest.raises(InvalidError, match="200 levels"):
        encode(nest(201, wrap))


def test_cycles_are_refused() -> None:
    cycle: list[Any] = []
    cycle += [cycle, cycle]
    ring: dict[str, Any] = {}
    ring["x"] = [(ring,)]
    for value in (cycle, ring):
        with pytest.raises(InvalidError, match="contains itself"):
            encode(value)


# ---------------------------------------------------------------- refusals


class Number(enum.IntEnum):
    ONE = 1


class Text(str):
    __slots__ = ()


class Count(int):
    pass


class Zone(tzinfo):
    def utcoffset(self, dt: datetime | None) -> timedelta:
        return timedelta(0)

    def tzname(self, dt: datetime | None) -> str:
        return "Z"

    def dst(self, dt: datetime | None) -> None:
        return None


class Double(np.float64):
    pass


class Grid(np.ndarray):
    pass


@dataclasses.dataclass
class Point:
    x: int


RECORDS = np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])
Pair = collections.namedtuple("Pair", "a b")

REFUSED: list[tuple[Any, str]] = [
    (Number.ONE, "value.value"),
    (Text("a"), "str"),
    (Count(1), "int"),
    (type("F", (float,), {})(1.0), "float"),
    (type("B", (bytes,), {})(b"x"), "bytes"),
    (type("L", (list,), {})(), "list"),
    (collections.OrderedDict(a=1), "dict"),
    (collections.defaultdict(int), "dict"),
    (Pair(1, 2), "tuple"),
    (set(), "list"),
    (frozenset(), "list"),
    (bytearray(b"x"), "bytes"),
    (memoryview(b"x"), "bytes"),
    (decimal.Decimal("1.5"), "str"),
    (uuid.UUID(int=1), "str"),
    (pathlib.PurePosixPath("a"), "str"),
    (timedelta(1), "total_seconds"),
    (time(1), "isoformat"),
    (type("D", (date,), {})(2020, 1, 1), "date"),
    (datetime(2020, 1, 1, tzinfo=Zone()), "ZoneInfo"),
    (Point(1), "convert"),
    (object(), "convert"),
    (int, "convert"),
    (len, "convert"),
    (range(3), "convert"),
    ({1: 2}, "keys must be"),
    ({b"a": 2}, "keys must be"),
    ({Text("a"): 2}, "keys must be"),
    ({None: 2}, "keys must be"),
    ({np.str_("a"): 2}, "keys must be"),
    ("\ud800", "encode it to bytes"),
    ({"\ud800": 1}, "encode it to bytes"),
    (np.str_("\udfff"), "encode it to bytes"),
    (np.array([None]), "object"),
    (np.zeros(2, [("a", "i4"), ("o", "O")]), "objects"),
    (np.array(["a"], np.dtypes.StringDType()), "'U'"),
    (np.ma.MaskedArray([1], [True]), "filled"),
    (np.zeros((1, 1)).view(np.matrix), "asarray"),
    (RECORDS, "view"),
    (RECORDS.view(np.ndarray), "view"),
    (RECORDS[0], "plain"),
    (np.zeros(2).view(Grid), "asarray"),
    (Double(1.0), "plain"),
    (np.zeros(1, {"names": ["a"], "formats": ["i4"], "titles": [("no", "str")]}), "title"),
]


@pytest.mark.parametrize(("value", "remedy"), REFUSED, ids=lambda value: type(value).__name__)
def test_other_types_are_refused_with_a_remedy(value: Any, remedy: str) -> None:
    for wrapped in (value, [value], (1, value), {"k": {"l": [value]}}, [1, np.zeros(1), value]):
        with pytest.raises(InvalidError) as caught:
            encode(wrapped)
        assert remedy in str(caught.value)


def test_the_remedy_for_records_works() -> None:
    back = round_trip(RECORDS.view(np.dtype((np.void, RECORDS.dtype)), np.ndarray))
    again = back.view(np.recarray)
    assert again.a == [1] and again.b == [2.0]


def test_a_zone_without_a_findable_key_is_refused() -> None:
    import importlib.resources

    with importlib.resources.files("tzdata.zoneinfo").joinpath("UTC").open("rb") as file:
        anonymous = ZoneInfo.from_file(file)
        file.seek(0)
        stranger = ZoneInfo.from_file(file, key="No/Where")
    for zone in (anonymous, stranger):
        with pytest.raises(InvalidError, match=r"ZoneInfo|time zone"):
            encode(datetime(2020, 1, 1, tzinfo=zone))


# ---------------------------------------------------------------- arrays


@given(arrays)
def test_arrays_round_trip(array: Any) -> None:
    back = round_trip(array)
    assert not back.flags.writeable


@given(arrays, st.data())
def test_layouts_survive(array: Any, data: st.DataObject) -> None:
    axes = data.draw(st.permutations(range(array.ndim)))
    permuted = array.transpose(axes)
    back = round_trip(permuted)
    if permuted.size:
        real = [axis for axis in range(permuted.ndim) if permuted.shape[axis] > 1]
        assert [back.strides[i] for i in real] == [permuted.strides[i] for i in real]


@given(arrays, st.data())
def test_strided_views_become_arrays_without_gaps(array: Any, data: st.DataObject) -> None:
    index = data.draw(npst.basic_indices(array.shape, allow_ellipsis=True))
    view = np.asarray(array[index])
    back = round_trip(view)
    if view.size:
        strides = sorted(
            (stride, side)
            for stride, side in zip(back.strides, back.shape, strict=True)
            if side > 1
        )
        expected = back.itemsize
        for stride, side in strides:
            assert stride == expected or back.itemsize == 0
            expected *= side


@pytest.mark.parametrize(
    "array",
    [
        np.array(1.5),
        np.array("abc"),
        np.zeros((0,)),
        np.zeros((3, 0, 2), order="F"),
        np.zeros((0, 10**9), "i1"),
        np.zeros((1,) * 32),
        np.arange(24).reshape(2, 3, 4)[::-1, ::2, ::-1],
        np.broadcast_to(np.arange(3), (4, 3)),
        np.broadcast_to(np.array(7), (2, 2)),
        np.arange(10, dtype=">u2"),
        np.array(["2020-01-01", "NaT"], "M8[ns]"),
        np.array([1, 2], "m8[25us]"),
        np.zeros(3, "V0"),
        np.ndarray((3,), "S0", b""),
        np.ndarray((2, 2), "U0", b""),
        np.zeros(3, []),
        np.zeros(2, "V7"),
        np.zeros(5, np.longdouble),
        np.zeros(5, np.clongdouble),
        np.zeros(3, np.longlong),
        np.array([b"a\0b", b""]),
        np.ones((2, 2), "?"),
        np.ones(3, [("a", "i1"), ("b", [("c", ">f4", (2, 2)), ("d", "U3")])]),
        np.lib.stride_tricks.as_strided(np.arange(10), (4, 4), (8, 8)),
    ],
    ids=lambda a: f"{a.dtype.str}{a.shape}",
)
def test_special_arrays_round_trip(array: Any) -> None:
    back = round_trip(array)
    assert not back.flags.writeable
    round_trip({"k": (array, [array])})


@pytest.mark.parametrize(
    "view",
    [
        np.broadcast_to(np.arange(3), (4, 3)),
        np.broadcast_to(np.arange(4)[:, None], (4, 3)),
        np.broadcast_to(np.arange(3)[:, None, None], (3, 4, 2)).transpose(1, 0, 2),
        np.arange(24).reshape(2, 3, 4)[::-1, ::-1, ::-1],
        np.arange(24).reshape(2, 3, 4)[:, ::-1, ::2],
        np.arange(9)[::-3],
    ],
)
def test_repeated_and_reversed_items_are_stored_in_the_order_of_the_axes(view: Any) -> None:
    assert round_trip(view).flags.c_contiguous
    if 0 not in view.strides:
        assert round_trip(view.T).flags.f_contiguous


def test_an_array_that_changed_its_size_meanwhile_is_noticed() -> None:
    with pytest.raises(InvalidError, match="changed its size"):
        list(Encoded(10, (b"123456789",)).buffers())


def test_64_dimensions() -> None:
    array = np.arange(6).reshape((1,) * 62 + (2, 3))
    back = decode(encode(array.transpose(range(63, -1, -1))).tobytes(), zero_copy=True)
    assert back.shape == (3, 2) + (1,) * 62
    assert back.squeeze().tolist() == [[0, 3], [1, 4], [2, 5]]


def test_data_starts_at_a_multiple_of_64() -> None:
    for ndim in range(20):
        data = encode(np.ones((1,) * ndim, "i1")).tobytes()
        offset = describe(data).data_offset
        assert offset % 64 == 0 and data[offset] == 1


def test_arrays_in_containers_are_aligned() -> None:
    page = mmap.mmap(-1, 1 << 16)
    value = {"pad": "x" * 13, "a": [np.arange(3.0), (np.arange(5, dtype="i1"), 2**80)]}
    data = encode(value).tobytes()
    page[: len(data)] = data
    back = decode(memoryview(page)[: len(data)], zero_copy=True)
    assert same(value, back)
    start = np.frombuffer(page, np.uint8).ctypes.data
    for array in (back["a"][0], back["a"][1][0]):
        assert (array.ctypes.data - start) % 64 == 0


@pytest.mark.parametrize("order", ["C", "F"])
def test_zero_copy_aliases_and_a_copy_does_not(order: Any) -> None:
    array = np.arange(60.0).reshape(3, 4, 5).copy(order)
    for value, pick in ((array, lambda v: v), ({"k": (array,)}, lambda v: v["k"][0])):
        data = bytearray(encode(value).tobytes())
        raw = np.frombuffer(data, np.uint8)
        aliasing = pick(decode(memoryview(data), zero_copy=True))
        owning = pick(decode(memoryview(data), zero_copy=False))
        assert np.shares_memory(aliasing, raw)
        assert not np.shares_memory(owning, raw)
        raw[-8:] = 0xFF
        assert np.isnan(aliasing[-1, -1, -1]) and owning[-1, -1, -1] == 59.0


@pytest.mark.parametrize("zero_copy", [True, False])
@pytest.mark.parametrize("source", [bytes, bytearray, lambda data: mmap_of(data)])
def test_arrays_cannot_be_made_writeable(zero_copy: bool, source: Any) -> None:
    data = memoryview(source(encode(np.arange(6).reshape(2, 3).T).tobytes()))
    views = [decode(data, zero_copy=zero_copy), view_array(data)]
    views += [views[0].T, views[0][1:], views[0].T.view("u1")]
    for view in views:
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.setflags(write=True)
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.flags.writeable = True


def mmap_of(data: bytes) -> mmap.mmap:
    page = mmap.mmap(-1, len(data))
    page[:] = data
    return page


def test_contiguous_arrays_are_handed_out_without_a_copy() -> None:
    for array in (
        np.arange(100.0),
        np.ones((3, 4, 5), order="F"),
        np.ones((3, 4, 5)).swapaxes(0, 1),
    ):
        pieces = list(encode(array).buffers())
        assert len(pieces) == 2 and isinstance(pieces[1], memoryview) and pieces[1].readonly
        assert np.shares_memory(np.frombuffer(pieces[1], np.uint8), array)
    value = {"a": np.arange(100.0), "b": b"x"}
    assert any(
        np.shares_memory(np.frombuffer(piece, np.uint8), value["a"])
        for piece in encode(value).buffers()
    )
    blob = b"x" * 100_000
    assert any(piece is blob for piece in encode(blob).buffers())


def strided_arrays() -> Iterator[Any]:
    base = np.arange(1 << 25, dtype="u4")  # 128 MiB
    yield base[1::2]
    yield base.reshape(2, -1)[:, ::2]
    yield base.reshape(-1, 2)[:, :1]
    yield base.reshape(256, 512, 256)[::2, 1:, ::2].transpose(2, 0, 1)
    yield base[::-2]
    yield np.broadcast_to(np.arange(4096, dtype="f8"), (4096, 4096))


def test_strided_arrays_stream_in_little_memory() -> None:
    for array in strided_arrays():
        tracemalloc.start()
        try:
            encoded = encode(array)
            buffers = iter(encoded.buffers())
            size = len(next(buffers))
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            for buffer in buffers:
                size += len(buffer)
            peak = tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()
        assert size == encoded.size > 30 << 20
        assert peak <= 8 << 20, (array.strides, peak)
        back = decode(encoded.tobytes(), zero_copy=True)
        assert np.array_equal(back, array)


def test_memmaps_come_back_as_arrays() -> None:
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, "i4", "w+", shape=(4, 5), order="F")
        mapped[:] = np.arange(20).reshape(4, 5)
        for view in (mapped, mapped[::2], mapped[0]):
            back = round_trip(view)
            assert type(back) is np.ndarray and np.array_equal(back, view)


def test_view_array() -> None:
    array = np.arange(12).reshape(3, 4).T
    data = encode(array).tobytes()
    view = view_array(data)
    assert same(array, view)
    assert np.shares_memory(view, np.frombuffer(data, np.uint8))
    with pytest.raises(InvalidError, match="kind bytes"):
        view_array(encode(b"x").tobytes())
    with pytest.raises(CorruptionError):
        view_array(data[:-1])


# ---------------------------------------------------------------- NumPy scalars and dtypes


@given(scalars)
def test_numpy_scalars_round_trip(value: Any) -> None:
    round_trip(value)


@pytest.mark.parametrize(
    "value",
    [
        np.float64(1.5),
        np.float64(-0.0),
        np.bool_(True),
        np.int64(5),
        np.longlong(5),
        np.ulonglong(5),
        np.longdouble(1) / 3,
        np.clongdouble(1j),
        np.datetime64("2020-01-01"),
        np.datetime64("NaT"),
        np.timedelta64(3, "W"),
        np.str_("a\0"),
        np.str_(""),
        np.str_("\U0001f40d"),
        np.bytes_(b"a\0\0"),
        np.bytes_(b""),
        np.void(b"abc"),
        np.void(b""),
        np.ones(1, [("a", ">i4"), ("b", "f8", (2,))])[0],
        np.ones(1, [])[0],
    ],
    ids=repr,
)
def test_special_scalars_round_trip(value: Any) -> None:
    back = round_trip(value)
    assert type(back) is type(value)
    round_trip([value, (value,)])


@given(numpy_dtypes)
def test_dtypes_round_trip(dtype: Any) -> None:
    assert same_dtype(dtype_from_bytes(dtype_to_bytes(dtype)), dtype)


SPECIAL_DTYPES = [
    *(np.dtype(char) for char in "?bhilqBHILQefdgFDGSUVMm"),
    *(np.dtype(char).newbyteorder() for char in "hilqHILQefdgFDGMm"),
    *(np.dtype(f"{byte}M8[{unit}]") for byte in "<>" for unit in ("Y", "2D", "ns", "7as", "25s")),
    np.dtype([("a", "i1"), ("b", "i8")], align=True),
    np.dtype([("a", "i1"), ("b", "i8")]),
    np.dtype([("o", np.dtype([("a", "i1"), ("b", "q")], align=True)), ("c", "i1")]),
    np.dtype({"names": ["a", "b"], "formats": ["i4", "i2"], "offsets": [0, 2]}),
    np.dtype({"names": ["a", "b"], "formats": ["i4", "i2"], "offsets": [9, 1], "itemsize": 40}),
    np.dtype({"names": ["a"], "formats": ["i4"], "titles": ["Alpha"]}),
    np.dtype({"names": ["a", "b"], "formats": ["i4", "i4"], "titles": [None, "B!"]}),
    np.dtype({"names": [], "formats": [], "itemsize": 12}),
    np.dtype(("f4", (2, 3))),
    np.dtype(([("x", "f4", (2,)), ("y", ("U3", (1,)))], (2,))),
    np.dtype([("é \n", "S3")]),
    np.dtype("U536870911"),
]


@pytest.mark.parametrize("dtype", SPECIAL_DTYPES, ids=str)
def test_special_dtypes_round_trip(dtype: Any) -> None:
    encoded = dtype_to_bytes(dtype)
    back = dtype_from_bytes(encoded)
    assert same_dtype(back, dtype) and back.fields == dtype.fields
    assert dtype_to_bytes(back) == encoded


def test_changing_a_decoded_dtype_changes_no_other() -> None:
    data = encode(np.zeros(2, [("a", "i4"), ("b", "i4")])).tobytes()
    first = decode(data, zero_copy=True)
    first.dtype.names = ("x", "y")
    assert decode(data, zero_copy=True).dtype.names == ("a", "b")
    assert encode(first).tobytes() != data


def test_foreign_dtypes_are_refused() -> None:
    with pytest.raises(InvalidError, match="astype"):
        encode(np.zeros(2, ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    "dtype",
    [
        np.dtype("O"),
        np.dtype([("a", "O")]),
        np.dtype(("O", (2,))),
        np.dtypes.StringDType(),
        np.dtype((np.record, [("a", "i4")])),
        np.dtype((np.record, "V8")),
        np.dtype([("r", (np.record, [("a", "i4")]))]),
        np.dtype([("\ud800", "i4")]),
    ],
    ids=lambda d: repr(d)[:50],
)
def test_dtypes_that_would_not_come_back_are_refused(dtype: Any) -> None:
    dtype_to_bytes(np.dtype("V8"))  # in the cache, and equal to one of the refused
    with pytest.raises(InvalidError):
        dtype_to_bytes(dtype)


def test_a_dtype_nested_too_deep_is_refused() -> None:
    dtype = np.dtype("i4")
    for _ in range(40):
        dtype = np.dtype([("a", dtype)])
    with pytest.raises(InvalidError, match="levels"):
        dtype_to_bytes(dtype)


# ---------------------------------------------------------------- describe


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (b"x", "bytes"),
        ("x", "str"),
        (None, "none"),
        (True, "bool"),
        (1, "int"),
        (1.0, "float"),
        (1j, "complex"),
        (datetime(2020, 1, 1), "datetime"),
        (date(2020, 1, 1), "date"),
        ([1], "list"),
        ((1,), "tuple"),
        ({"a": 1}, "dict"),
        ([(1,)], "list"),
        ((2**99,), "tuple"),
        ({"a": 1j}, "dict"),
    ],
)
def test_describe_plain(value: object, kind: str) -> None:
    data = encode(value).tobytes()
    assert describe(data) == (kind, None, None, 8, len(data) - 8)
    assert describe(memoryview(data)).kind == kind


def test_describe_arrays_and_scalars() -> None:
    array = np.zeros((2, 3), ">f4", order="F")
    data = encode(array).tobytes()
    described = describe(data)
    assert described == ("array", (2, 3), np.dtype(">f4"), 64, 24)
    assert len(data) == described.data_offset + described.nbytes
    scalar = describe(encode(np.float32(1.5)).tobytes())
    assert (scalar.kind, scalar.shape, scalar.dtype) == ("scalar", (), np.dtype("f4"))


# ---------------------------------------------------------------- the format itself

GOLDEN = {
    "none": (None, "e501010000000000"),
    "bool": (True, "e50102000000000001"),
    "int": (-300, "e501030000000000d4fe"),
    "float": (1.5, "e501040000000000000000000000f83f"),
    "complex": (1j, "e5010500000000000000000000000000000000000000f03f"),
    "str": ("hé", "e50106000000000068c3a9"),
    "bytes": (b"\x00\xff", "e50107000000000000ff"),
    "naive": (
        datetime(2024, 2, 29, 1, 2, 3, 4, fold=1),
        "e501080000000000e807021d010203040000000100",
    ),
    "utc": (
        datetime(2024, 2, 29, tzinfo=UTC),
        "e501080000000000e807021d0000000000000000010000000000000000",
    ),
    "zone": (
        datetime(2024, 2, 29, tzinfo=ZoneInfo("UTC")),
        "e501080000000000e807021d000000000000000003555443",
    ),
    "date": (date(2024, 2, 29), "e501090000000000e807021d"),
    "list": ([1, None, "a"], "e5010a00000000009301c0a161"),
    "tuple": ((1,), "e5010b00000000009101"),
    "dict": ({"from": 1, "to": 2}, "e5010c000000000082a466726f6d01a2746f02"),
    "extended": ([(1,)], "e5010a01000000000500000000000000" + "91d50b9101"),
    "scalar": (np.float32(1), "e5010d00000000000400a33c66340000803f"),
    "array": (
        np.array([[1, 2, 3], [4, 5, 6]], "<u2", order="F"),
        "e5010e0000000000" + "0400000002000000" + "0200000000000000" + "0300000000000000"
        "0100" + "a33c7532" + "00" * 26 + "010004000200050003000600",
    ),
}


@pytest.mark.parametrize(("value", "expected"), GOLDEN.values(), ids=list(GOLDEN))
def test_the_bytes_never_change(value: object, expected: str) -> None:
    assert encode(value).tobytes().hex() == expected
    assert same(value, decode(bytes.fromhex(expected), zero_copy=True))


def test_a_newer_format_asks_for_an_upgrade() -> None:
    data = bytearray(encode(1).tobytes())
    data[1] = 2
    for read in (lambda d: decode(d, zero_copy=True), describe, view_array):
        with pytest.raises(InvalidError, match="upgrade"):
            read(bytes(data))


def test_an_encrypted_value_is_not_misread() -> None:
    data = bytearray(encode(b"secret").tobytes())
    data[4] = 7
    with pytest.raises(InvalidError, match="key 7"):
        decode(bytes(data), zero_copy=True)


def test_nothing_of_arrow_is_imported_until_it_is_needed() -> None:
    code = (
        "import sys; import everpool.values as v; import numpy as np;"
        "v.decode(v.encode({'a': np.zeros(3)}).tobytes(), zero_copy=True);"
        "assert 'pyarrow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- Arrow


def arrow_columns(pa: Any) -> dict[str, Any]:
    n = 13
    columns = {
        "ints": pa.array([1, None, 3] * 4 + [1]),
        "floats": pa.array(np.arange(13.0)),
        "bools": pa.array([True, None] * 6 + [False]),
        "text": pa.array(["x" * i for i in range(n)]),
        "large_text": pa.array(["é" * i for i in range(n)], pa.large_string()),
        "text_views": pa.array(["a" * (3 * i) for i in range(n)], pa.string_view()),
        "bytes": pa.array([b"x" * i for i in range(n)]),
        "fixed_bytes": pa.array([b"abc"] * n, pa.binary(3)),
        "lists": pa.array([[i] * (i % 4) for i in range(n)]),
        "large_lists": pa.array([[str(i)] * (i % 4) for i in range(n)], pa.large_list(pa.string())),
        "fixed_lists": pa.array([[1, 2]] * n, pa.list_(pa.int32(), 2)),
        "list_views": pa.array([[i] * (i % 4) for i in range(n)], pa.list_view(pa.int16())),
        "structs": pa.array([{"a": i, "b": ["q" * i]} for i in range(n)]),
        "maps": pa.array([[("k", i)] for i in range(n)], pa.map_(pa.string(), pa.int64())),
        "categories": pa.array(["a", "b", "c", None] * 3 + ["a"]).dictionary_encode(),
        "nested_categories": pa.array([["a", "b"]] * n).cast(
            pa.list_(pa.dictionary(pa.int8(), pa.string()))
        ),
        "runs": pa.RunEndEncodedArray.from_arrays([5, n], ["a", "b"]),
        "dense_union": pa.UnionArray.from_dense(
            pa.array([0, 1] * 6 + [0], pa.int8()),
            pa.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6], pa.int32()),
            [pa.array(range(7)), pa.array(["a"] * 6)],
        ),
        "decimals": pa.array([decimal.Decimal("1.23")] * n),
        "times": pa.array([datetime(2020, 1, 1)] * n, pa.timestamp("us", "Europe/Paris")),
        "dates": pa.array([date(2020, 1, 1)] * n, pa.date64()),
        "nulls": pa.nulls(n),
        "halves": pa.array(np.ones(n, "f2")),
    }
    if hasattr(pa, "uuid"):
        columns["uuids"] = pa.array([b"0123456789abcdef"] * n, pa.uuid())
    return columns


def tables(pa: Any) -> Iterator[Any]:
    columns = arrow_columns(pa)
    yield pa.table(columns)
    for name, column in columns.items():
        yield pa.table({name: column})
        yield pa.table({name: column.slice(3, 7)})
        yield pa.table({name: pa.chunked_array([column, column.slice(0, 0), column.slice(5)])})
    yield pa.table({})
    yield pa.table({"a": [1, 2, 3]}).select([])
    yield pa.table({"a": pa.chunked_array([], pa.string())})
    yield pa.table([[1], ["x"]], names=["same", "same"])
    yield pa.table({"a": [1]}).replace_schema_metadata({"k": "v"})
    yield pa.table(
        {
            "a": pa.chunked_array(
                [pa.array(["x", "y"]).dictionary_encode(), pa.array(["z"]).dictionary_encode()]
            )
        }
    )


def test_tables_and_batches_round_trip() -> None:
    pa = pytest.importorskip("pyarrow")
    for table in tables(pa):
        round_trip(table)
        assert describe(encode(table).tobytes())[:3] == ("table", table.shape, None)
        for batch in table.to_batches():
            round_trip(batch)
            assert describe(encode(batch).tobytes()).kind == "batch"


def test_tables_inside_containers() -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"a": [1, 2], "b": ["x", None]})
    round_trip({"t": table, "more": (table.to_batches()[0], np.arange(3), [table])})


def test_tables_are_read_without_a_copy() -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table(arrow_columns(pa))
    data = mmap_of(encode(table).tobytes())
    raw = np.frombuffer(data, np.uint8)
    start, end = raw.ctypes.data, raw.ctypes.data + len(raw)
    back = decode(memoryview(data), zero_copy=True)
    owning = decode(memoryview(data), zero_copy=False)
    for name in back.column_names:
        for buffer in back[name].chunk(0).buffers():
            if buffer is not None and buffer.size:
                assert start <= buffer.address < buffer.address + buffer.size <= end, name
                assert (buffer.address - start) % 64 == 0 and not buffer.is_mutable
        for buffer in owning[name].chunk(0).buffers():
            assert buffer is None or not start <= buffer.address < end


def test_tables_are_streamed() -> None:
    pa = pytest.importorskip("pyarrow")
    chunk = np.arange(1 << 20, dtype="f8")
    table = pa.table({"a": pa.chunked_array([pa.array(chunk)] * 8)})
    text = pa.array(["text"] * (1 << 20))
    # Slices, so that Arrow must copy offsets, of one batch at a time.
    table = table.append_column("b", pa.chunked_array([text] * 8).slice(0)).slice(5)
    before = pa.total_allocated_bytes()
    encoded = encode(table)
    size, most = 0, 0
    for buffer in encoded.buffers():
        size += len(buffer)
        most = max(most, pa.total_allocated_bytes() - before)
    assert size == encoded.size > 96 << 20
    assert most < 16 << 20
    first = next(iter(table["a"].chunk(0).buffers()[1:]))
    shared = np.frombuffer(first, np.uint8)
    assert any(
        len(buffer) > 1 << 20 and np.shares_memory(np.frombuffer(buffer, np.uint8), shared)
        for buffer in encoded.buffers()
    )


def test_the_stream_is_plain_arrow_ipc() -> None:
    pa = pytest.importorskip("pyarrow")
    for table in tables(pa):
        data = encode(table).tobytes()
        assert pa.ipc.open_stream(data[64:]).read_all().equals(table)


def test_without_pyarrow_a_table_is_an_invalid_call(monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    data = encode(pa.table({"a": [1]})).tobytes()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InvalidError, match="pip install pyarrow"):
        decode(data, zero_copy=True)
    assert describe(data).shape == (1, 1)


def test_other_arrow_types_are_refused() -> None:
    pa = pytest.importorskip("pyarrow")
    for value in (pa.array([1]), pa.chunked_array([[1]]), pa.scalar(1), pa.schema([])):
        with pytest.raises(InvalidError, match=r"pyarrow\.table"):
            encode(value)
