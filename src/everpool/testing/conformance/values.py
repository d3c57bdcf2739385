"""Values come back equal and of the same type, and never change under their holder."""

# Pools, transactions and what they hand out are `Any` here, so that every engine fits.
# pyright: reportUnknownLambdaType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false

import datetime
import gc
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

from everpool.errors import ExistsError, InvalidError
from everpool.testing.conformance.base import ConformanceBase

UTC = datetime.UTC
PLAIN_VALUES: list[Any] = [
    b"",
    b"\x00\xff",
    b"x" * 100_000,
    "",
    "é😀\0",
    "s" * 100_000,
    None,
    True,
    False,
    0,
    -1,
    2**63,
    -(2**64),
    10**400,
    0.0,
    -1.5,
    1e308,
    math.inf,
    5e-324,
    1 + 2j,
    complex(-0.0, math.inf),
    datetime.datetime(2024, 2, 29, 12, 30, 15, 123456),
    datetime.datetime(1, 1, 1),
    datetime.datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
    datetime.datetime(2024, 6, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=-3.5))),
    datetime.date(2024, 2, 29),
    [],
    (),
    {},
    [1, [2, [3, ()]]],
    (1, "a", None, (True, 1.0)),
    {"b": 1, "a": {"nested": [1, 2, {"deep": (b"x",)}]}, "": None},
    {"big": 10**30, "when": datetime.date(2000, 1, 1), "z": 3j},
    [{"row": number, "tags": ("a", "b")} for number in range(2000)],
]
ARRAYS: list[Any] = [
    np.arange(10),
    np.arange(10, dtype="u1"),
    np.arange(6, dtype=">i4").reshape(2, 3),
    np.linspace(0, 1, 7, dtype="f2"),
    np.array([1 + 1j, 2], dtype="c8"),
    np.array([True, False]),
    np.array(3.5),
    np.array(b"abc"),
    np.zeros((0,)),
    np.zeros((3, 0, 2), dtype="i2"),
    np.asfortranarray(np.arange(12).reshape(3, 4)),
    np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
    np.arange(20)[::-3],
    np.array(["a", "é😀"]),
    np.array([b"ab", b"c"]),
    np.array(["2024-01-01", "NaT"], dtype="M8[D]"),
    np.array([1, 2], dtype="m8[ns]"),
    np.array([(1, 2.5, b"x")], dtype=[("n", "i4"), ("v", "f8"), ("t", "S3")]),
    np.zeros(3, dtype=np.dtype([("a", "u1"), ("b", "<i8", (2, 2))], align=True)),
    np.arange(100_000, dtype="f8"),
]


class Refused:
    """A type that a pool does not know."""


REFUSED: list[Any] = [
    Refused(),
    Refused,
    len,
    {1, 2},
    {1: "int key"},
    [1, [Refused()]],
    {"a": (Refused(),)},
    np.array([object()]),
    np.array([(1, None)], dtype=[("a", "i4"), ("b", object)]),
    range(3),
]


def same(stored: Any, value: Any) -> bool:
    """Whether two values are equal and of the same types throughout."""
    if type(stored) is not type(value):
        return False
    if isinstance(value, np.ndarray):
        return same_array(stored, value)
    if isinstance(value, dict):
        return list(stored) == list(value) and all(same(stored[k], value[k]) for k in value)
    if isinstance(value, list | tuple):
        return len(stored) == len(value) and all(map(same, stored, value))
    return bool(stored == value) and repr(stored) == repr(value)


def same_array(stored: np.ndarray[Any, Any], value: np.ndarray[Any, Any]) -> bool:
    """Whether two arrays have one type, one shape and equal elements."""
    return (
        stored.dtype == value.dtype
        and stored.shape == value.shape
        and np.ascontiguousarray(stored).tobytes() == np.ascontiguousarray(value).tobytes()
    )


def describe(value: Any) -> str:
    """Return a short name of a value for a test's id."""
    kind = f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else repr(value)
    return f"{type(value).__name__}-{kind}"[:40].replace("\0", "0")


class ValueGuarantees(ConformanceBase):
    """What can be stored, and what it is when it comes back."""

    @pytest.mark.parametrize("value", PLAIN_VALUES, ids=describe)
    def test_a_value_comes_back_equal_and_of_the_same_type(self, pool: Any, value: Any) -> None:
        pool["v"] = value
        assert same(pool["v"], value)

    def test_nan_comes_back(self, pool: Any) -> None:
        pool["v"] = [math.nan]
        assert math.isnan(pool["v"][0])

    @pytest.mark.parametrize("value", ARRAYS, ids=describe)
    def test_an_array_comes_back_equal_and_of_the_same_type(self, pool: Any, value: Any) -> None:
        pool["v"] = value
        assert type(pool["v"]) is np.ndarray
        assert same_array(pool["v"], value)

    @pytest.mark.parametrize("value", REFUSED, ids=describe)
    def test_a_value_of_another_type_is_refused(self, pool: Any, value: Any) -> None:
        with pytest.raises(InvalidError) as caught:
            pool["v"] = value
        assert caught.value.kind == "invalid"
        assert isinstance(caught.value, ValueError)
        assert "v" not in pool

    def test_a_refused_value_leaves_the_old_one(self, pool: Any) -> None:
        pool["v"] = 1
        with pytest.raises(InvalidError):
            pool["v"] = Refused()
        assert pool["v"] == 1

    def test_the_refusal_names_the_type(self, pool: Any) -> None:
        with pytest.raises(InvalidError, match="Refused"):
            pool["v"] = {"deep": [Refused()]}

    def test_changing_the_original_changes_nothing_in_the_pool(self, pool: Any) -> None:
        original = {"list": [1, 2]}
        array = np.arange(50_000)
        pool["v"], pool["a"] = original, array
        original["list"].append(3)
        array[:] = -1
        assert pool["v"] == {"list": [1, 2]}
        assert np.array_equal(pool["a"], np.arange(50_000))

    def test_changing_what_was_read_changes_nothing_in_the_pool(self, pool: Any) -> None:
        pool["v"] = {"list": [1, 2]}
        pool["v"]["list"].append(3)
        assert pool["v"] == {"list": [1, 2]}

    @pytest.mark.parametrize("elements", [20_000, 1_000_000])
    def test_a_large_array_is_read_only_and_not_copied(self, pool: Any, elements: int) -> None:
        pool["v"] = np.arange(elements, dtype="f8")
        gc.collect()
        tracemalloc.start()
        try:
            array = pool["v"]
            allocated = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert allocated < elements * 4
        assert not array.flags.writeable
        assert not array.flags.owndata
        with pytest.raises(ValueError):
            array[0] = 1
        assert array[-1] == elements - 1

    @pytest.mark.parametrize("elements", [3, 20_000, 300_000])
    def test_an_array_never_changes_under_its_holder(self, pool: Any, elements: int) -> None:
        first = np.arange(elements)
        pool["v"] = first
        held = pool["v"]
        part = held[1:]
        pool["v"] = first * 2
        replaced = pool["v"]
        del pool["v"]
        for number in range(5):
            pool[f"w{number}"] = np.full(elements, number)
        assert np.array_equal(held, first)
        assert np.array_equal(part, first[1:])
        assert np.array_equal(replaced, first * 2)

    def test_an_array_outlives_its_pool(self, pool: Any) -> None:
        pool["v"] = np.arange(100_000)
        held = pool["v"]
        pool.close()
        gc.collect()
        assert np.array_equal(held, np.arange(100_000))

    def test_an_arrow_table_comes_back_equal_and_of_the_same_type(self, pool: Any) -> None:
        arrow: Any = pytest.importorskip("pyarrow")
        table = arrow.table({"n": [1, 2, None], "s": ["a", "é", None], "l": [[1], [], None]})
        batch = table.to_batches()[0]
        pool["table"], pool["batch"] = table, batch
        pool["empty"] = table.slice(0, 0)
        assert type(pool["table"]) is arrow.Table
        assert pool["table"].equals(table, check_metadata=True)
        assert type(pool["batch"]) is arrow.RecordBatch
        assert pool["batch"].equals(batch)
        assert pool["empty"].equals(table.slice(0, 0))

    def test_a_large_arrow_table_is_not_copied(self, pool: Any) -> None:
        arrow: Any = pytest.importorskip("pyarrow")
        table = arrow.table({"n": np.arange(500_000)})
        pool["v"] = table
        del table
        before = arrow.total_allocated_bytes()
        read = pool["v"]
        assert arrow.total_allocated_bytes() - before < 100_000
        assert read["n"][-1].as_py() == 499_999

    def test_an_arrow_table_never_changes_under_its_holder(self, pool: Any) -> None:
        arrow: Any = pytest.importorskip("pyarrow")
        pool["v"] = arrow.table({"n": np.arange(100_000)})
        held = pool["v"]
        pool["v"] = arrow.table({"n": np.zeros(100_000)})
        del pool["v"]
        assert held["n"].to_numpy().sum() == sum(range(100_000))

    def test_an_array_handle_on_a_value_reads_it(self, pool: Any) -> None:
        value = np.arange(60_000, dtype="i4").reshape(200, 300)
        pool["v"] = value
        handle = pool.array("v")
        assert (handle.name, handle.shape, handle.dtype) == ("v", (200, 300), np.dtype("i4"))
        assert (handle.ndim, handle.size, handle.nbytes) == (2, 60_000, 240_000)
        assert len(handle) == 200
        assert handle[3, 4] == value[3, 4]
        assert np.array_equal(handle[10:20], value[10:20])
        assert np.array_equal(handle[:, [5, 1]], value[:, [5, 1]])
        assert np.array_equal(np.asarray(handle), value)
        assert not np.asarray(handle).flags.writeable

    def test_an_array_handle_on_a_value_refuses_assignment(self, pool: Any) -> None:
        pool["v"] = np.arange(10)
        with pytest.raises(InvalidError, match="v"):
            pool.array("v")[0] = 1
        assert pool["v"][0] == 0

    def test_a_value_that_is_no_array_has_no_array_handle(self, pool: Any) -> None:
        pool["text"] = "abc"
        with pytest.raises(InvalidError, match="text"):
            pool.array("text")

    def test_a_value_is_not_memory(self, pool: Any) -> None:
        pool["v"] = b"12345678"
        with pytest.raises(InvalidError, match="v"):
            pool.memory("v")

    def test_a_value_does_not_replace_memory(self, pool: Any) -> None:
        pool.allocate("m", 8)
        pool.allocate_array("a", 3)
        for name in ("m", "a"):
            with pytest.raises(ExistsError, match=name) as caught:
                pool[name] = 1
            assert caught.value.kind == "exists"
        assert pool.memory("m")[0:8] == bytes(8)
        del pool["m"]
        pool["m"] = 1
        assert pool["m"] == 1
