"""Memory is zeroed, mutable byte by byte, shared live, and bounded."""

# Pools, transactions and what they hand out are `Any` here, so that every engine fits.
# pyright: reportUnknownLambdaType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false

import gc
from typing import Any

import numpy as np
import pytest

from everpool.errors import ExistsError, InvalidError, NotFoundError
from everpool.testing.conformance.base import ConformanceBase, in_threads

NUMBER_TYPES = ["i1", "u1", "<i2", ">u2", "<i4", ">i4", "<i8", "<u8", ">i8"]


class MemoryGuarantees(ConformanceBase):
    """What `allocate` gives: bytes."""

    def test_new_memory_is_zeroed(self, pool: Any) -> None:
        memory = pool.allocate("m", 10_000)
        assert memory[0:10_000] == bytes(10_000)
        assert (memory.name, memory.size, len(memory)) == ("m", 10_000, 10_000)

    def test_memory_is_sparse(self, pool: Any) -> None:
        size = 1 << 40
        memory = pool.allocate("m", size)
        memory[size - 4 : size] = b"last"
        assert memory.read(size - 8, 8) == b"\0\0\0\0last"
        assert memory.read(size // 2, 4) == bytes(4)
        assert len(memory) == size

    @pytest.mark.parametrize("size", [0, -1, 2**46 + 1, 2**70, 1.5, "8", None])
    def test_a_size_that_is_not_1_to_2_46_bytes_is_refused(self, pool: Any, size: Any) -> None:
        with pytest.raises(InvalidError, match="m"):
            pool.allocate("m", size)
        assert "m" not in pool

    def test_a_taken_name_is_not_allocated(self, pool: Any) -> None:
        pool["value"] = 1
        pool.allocate("memory", 8)[0:4] = b"keep"
        for name in ("value", "memory"):
            for call in (
                lambda n=name: pool.allocate(n, 8),
                lambda n=name: pool.allocate_array(n, 8),
            ):
                with pytest.raises(ExistsError, match=name) as caught:
                    call()
                assert caught.value.kind == "exists"
        assert pool["value"] == 1
        assert pool.memory("memory")[0:4] == b"keep"

    def test_the_name_of_memory_gives_a_handle(self, pool: Any) -> None:
        pool.allocate("m", 8)[0:2] = b"hi"
        assert pool["m"][0:2] == b"hi"
        assert pool["m"].size == 8

    def test_written_bytes_come_back(self, pool: Any) -> None:
        memory = pool.allocate("m", 100)
        memory[10:15] = b"hello"
        assert memory[8:17] == b"\0\0hello\0\0"
        assert memory[10] == ord("h")
        assert memory[-90] == ord("h")
        assert memory[10:] == b"hello" + bytes(85)
        assert memory[:12] == bytes(10) + b"he"
        assert type(memory[10:15]) is bytes

    def test_read_and_write_take_an_offset(self, pool: Any) -> None:
        memory = pool.allocate("m", 100)
        memory.write(95, b"12345")
        assert memory.read(95, 5) == b"12345"
        assert memory.read(100, 0) == b""

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, np.frombuffer])
    def test_any_bytes_like_object_can_be_written(self, pool: Any, kind: Any) -> None:
        memory = pool.allocate("m", 8)
        memory[2:6] = kind(b"abcd") if kind is not np.frombuffer else np.frombuffer(b"abcd", "u1")
        assert memory[0:8] == b"\0\0abcd\0\0"

    def test_a_write_across_pages_comes_back(self, pool: Any) -> None:
        data = bytes(range(256)) * 64
        memory = pool.allocate("m", 1 << 20)
        memory.write(4095, data)
        assert memory.read(4094, len(data) + 2) == b"\0" + data + b"\0"

    def test_a_large_write_comes_back(self, pool: Any) -> None:
        data = np.arange(1 << 19, dtype="<u8").tobytes()
        memory = pool.allocate("m", len(data) + 2)
        memory.write(1, data)
        assert memory[:] == b"\0" + data + b"\0"

    def test_a_write_leaves_other_memory_alone(self, pool: Any) -> None:
        first, second = pool.allocate("1", 64), pool.allocate("2", 64)
        first[:] = b"a" * 64
        second[:] = b"b" * 64
        assert first[:] == b"a" * 64

    def test_an_assignment_of_another_length_is_refused(self, pool: Any) -> None:
        memory = pool.allocate("m", 16)
        for data in (b"", b"123", b"12345"):
            with pytest.raises(InvalidError):
                memory[0:4] = data
        assert memory[:] == bytes(16)

    def test_a_step_is_refused(self, pool: Any) -> None:
        memory = pool.allocate("m", 16)
        with pytest.raises(InvalidError):
            memory[0:8:2]
        with pytest.raises(InvalidError):
            memory[0:8:2] = b"1234"

    def test_what_lies_outside_is_refused(self, pool: Any) -> None:
        memory = pool.allocate("outer", 16)
        for call in (
            lambda: memory[16],
            lambda: memory[-17],
            lambda: memory.read(0, 17),
            lambda: memory.read(-1, 2),
            lambda: memory.read(17, 0),
            lambda: memory.read(8, -1),
            lambda: memory.write(14, b"123"),
            lambda: memory.write(-1, b"1"),
            lambda: memory.view(0, 17),
            lambda: memory.view(17),
            lambda: memory.fetch_add(9, 1),
            lambda: memory.fetch_add(-8, 1),
            lambda: memory.compare_and_swap(15, b"ab", b"cd"),
        ):
            with pytest.raises(InvalidError, match="outer"):
                call()
        assert memory[:] == bytes(16)

    def test_what_was_read_is_a_copy(self, pool: Any) -> None:
        memory = pool.allocate("m", 8)
        before = memory[0:8]
        memory[0:8] = b"12345678"
        assert before == bytes(8)

    def test_a_view_is_live(self, pool: Any, other: Any) -> None:
        memory = pool.allocate("m", 8192)
        view = memory.view()
        part = memory.view(4090, 10)
        memory.write(4094, b"mine")
        assert bytes(part) == b"\0\0\0\0mine\0\0"
        other.sync()
        other.memory("m").write(4094, b"yours")
        pool.sync()
        assert bytes(part) == b"\0\0\0\0yours\0"
        assert bytes(view[4094:4099]) == b"yours"

    def test_a_view_is_read_only(self, pool: Any) -> None:
        view = pool.allocate("m", 64).view()
        assert isinstance(view, memoryview)
        assert view.readonly
        assert len(view) == 64
        with pytest.raises(TypeError):
            view[0] = 1

    def test_a_view_stays_readable_after_its_memory_is_deleted(self, pool: Any) -> None:
        view = pool.allocate("m", 8192).view()
        del pool["m"]
        pool.allocate("m", 8192).write(0, b"new")
        gc.collect()
        assert bytes(view) == bytes(8192)

    def test_a_view_stays_readable_after_the_pool_is_closed(self, pool: Any) -> None:
        memory = pool.allocate("m", 8192)
        memory[0:4] = b"left"
        view = memory.view()
        del memory
        pool.close()
        gc.collect()
        assert bytes(view[:5]) == b"left\0"

    def test_deleted_memory_is_gone_for_its_handles(self, pool: Any) -> None:
        memory = pool.allocate("gone", 16)
        del pool["gone"]
        for call in (
            lambda: memory[0:8],
            lambda: memory[0],
            lambda: memory.read(0, 8),
            lambda: memory.write(0, b"1"),
            lambda: memory.__setitem__(slice(0, 1), b"1"),
            lambda: memory.view(),
            lambda: memory.fetch_add(0, 1),
            lambda: memory.compare_and_swap(0, b"\0", b"1"),
        ):
            with pytest.raises(NotFoundError, match="gone"):
                call()

    def test_an_old_handle_does_not_reach_new_memory_of_the_same_name(
        self, pool: Any, other: Any
    ) -> None:
        old = pool.allocate("m", 16)
        other.sync()
        del other["m"]
        new = other.allocate("m", 16)
        pool.sync()
        with pytest.raises(NotFoundError):
            old.write(0, b"lost")
        with pytest.raises(NotFoundError):
            old.fetch_add(0, 1)
        with pytest.raises(NotFoundError):
            old.read(0, 4)
        assert new[:] == bytes(16)

    def test_memory_that_is_allocated_again_is_zeroed(self, pool: Any) -> None:
        pool.allocate("m", 5000)[:] = b"x" * 5000
        del pool["m"]
        assert pool.allocate("m", 5000)[:] == bytes(5000)

    def test_fetch_add_returns_the_old_number(self, pool: Any) -> None:
        memory = pool.allocate("m", 64)
        assert [memory.fetch_add(8, 5) for _ in range(3)] == [0, 5, 10]
        assert memory.fetch_add(8, -20) == 15
        assert np.frombuffer(memory[:], "<i8").tolist() == [0, -5, 0, 0, 0, 0, 0, 0]
        assert type(memory.fetch_add(8, 0)) is int

    @pytest.mark.parametrize("dtype", NUMBER_TYPES)
    def test_fetch_add_wraps_integers_around(self, pool: Any, dtype: str) -> None:
        memory = pool.allocate("m", 32)
        limits = np.iinfo(dtype)
        memory.write(3, np.array(limits.max, dtype).tobytes())
        assert memory.fetch_add(3, 1, dtype=dtype) == limits.max
        assert memory.fetch_add(3, -1, dtype=dtype) == limits.min
        assert memory.fetch_add(3, 0, dtype=dtype) == limits.max
        assert memory[0:3] == bytes(3)
        assert memory.read(3 + np.dtype(dtype).itemsize, 8) == bytes(8)

    @pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8"])
    def test_fetch_add_adds_floats(self, pool: Any, dtype: str) -> None:
        memory = pool.allocate("m", 32)
        assert memory.fetch_add(1, 0.5, dtype=dtype) == 0.0
        old = memory.fetch_add(1, 1, dtype=dtype)
        assert (old, type(old)) == (0.5, float)
        assert np.frombuffer(memory.read(1, np.dtype(dtype).itemsize), dtype)[0] == 1.5

    @pytest.mark.parametrize("dtype", ["c16", "S8", "M8[s]", "O", "nonsense", "?", [("a", "i4")]])
    def test_fetch_add_refuses_what_is_not_a_number_type(self, pool: Any, dtype: Any) -> None:
        memory = pool.allocate("m", 32)
        with pytest.raises(InvalidError):
            memory.fetch_add(0, 1, dtype=dtype)
        assert memory[:] == bytes(32)

    def test_fetch_add_refuses_a_fraction_for_an_integer(self, pool: Any) -> None:
        memory = pool.allocate("m", 8)
        with pytest.raises(InvalidError):
            memory.fetch_add(0, 0.5)
        assert memory[:] == bytes(8)

    def test_concurrent_fetch_adds_lose_nothing_and_never_conflict(
        self, pool: Any, other: Any
    ) -> None:
        pool.allocate("m", 64)
        other.sync()
        clients = [pool.memory("m"), other.memory("m")]

        def add(thread: int) -> list[int]:
            return [clients[thread % 2].fetch_add(16, 1) for _ in range(25)]

        seen = [old for olds in in_threads(4, add) for old in olds]
        assert sorted(seen) == list(range(100))
        pool.sync()
        assert pool.memory("m").fetch_add(16, 0) == 100

    def test_compare_and_swap_swaps_only_what_was_expected(self, pool: Any) -> None:
        memory = pool.allocate("m", 16)
        memory[4:8] = b"then"
        assert memory.compare_and_swap(4, b"nope", b"lost") is False
        assert memory[4:8] == b"then"
        assert memory.compare_and_swap(4, b"then", b"next") is True
        assert memory[:] == bytes(4) + b"next" + bytes(8)

    def test_compare_and_swap_refuses_unequal_lengths(self, pool: Any) -> None:
        with pytest.raises(InvalidError):
            pool.allocate("m", 16).compare_and_swap(0, b"\0\0", b"abc")

    def test_one_of_many_compare_and_swaps_wins(self, pool: Any, other: Any) -> None:
        pool.allocate("m", 8)
        other.sync()
        clients = [pool.memory("m"), other.memory("m")]
        won = in_threads(
            4, lambda n: clients[n % 2].compare_and_swap(0, bytes(8), bytes([n + 1] * 8))
        )
        assert sorted(won) == [False, False, False, True]
        pool.sync()
        assert pool.memory("m")[:] == bytes([won.index(True) + 1] * 8)

    def test_the_version_of_memory_is_that_of_its_last_write(self, pool: Any) -> None:
        memory, neighbour = pool.allocate("m", 8), pool.allocate("n", 8)
        memory[0:1] = b"1"
        written = pool.version
        neighbour[0:1] = b"2"
        assert memory.version == written
        assert neighbour.version == pool.version > written

    def test_a_read_is_never_torn(self, pool: Any, other: Any) -> None:
        size = 64 * 1024
        memory = pool.allocate("m", size)
        other.sync()
        reader = other.memory("m")

        def work(thread: int) -> int:
            if thread == 0:
                for number in range(1, 41):
                    memory[:] = bytes([number]) * size
                return 0
            reads = [reader[:] for _ in range(150)]
            return sum(read != read[:1] * size for read in reads)

        assert in_threads(3, work) == [0, 0, 0]


class ArrayGuarantees(ConformanceBase):
    """What `allocate_array` gives: a typed array with NumPy's indexing."""

    @pytest.fixture
    def grid(self, pool: Any) -> Any:
        """A 6 by 8 array of 0 to 47."""
        grid = pool.allocate_array("grid", (6, 8), "i8")
        grid[...] = np.arange(48).reshape(6, 8)
        return grid

    def test_an_array_knows_its_form(self, pool: Any) -> None:
        array = pool.allocate_array("a", (3, 4, 5), "<i2")
        assert (array.name, array.shape, array.dtype) == ("a", (3, 4, 5), np.dtype("<i2"))
        assert (array.ndim, array.size, array.nbytes, len(array)) == (3, 60, 120, 3)

    def test_an_array_is_of_float64_unless_said(self, pool: Any) -> None:
        array = pool.allocate_array("a", 5)
        assert (array.shape, array.dtype) == ((5,), np.dtype("float64"))
        assert np.array_equal(array[:], np.zeros(5))

    @pytest.mark.parametrize("dtype", ["u1", ">f4", "c16", "?", "S5", "U3", "M8[us]", "m8[D]"])
    def test_an_array_may_have_any_plain_dtype(self, pool: Any, dtype: str) -> None:
        array = pool.allocate_array("a", 4, dtype)
        expected = np.zeros(4, dtype)
        expected[1:3] = np.array([1, 0]).astype(dtype)
        array[1:3] = expected[1:3]
        assert array.dtype == np.dtype(dtype)
        assert array[:].tobytes() == expected.tobytes()

    def test_an_array_may_be_structured(self, pool: Any) -> None:
        array = pool.allocate_array("a", 3, [("n", "i4"), ("v", "f8")])
        array[1] = (7, 0.5)
        array["v"] = [1, 2, 3]
        assert array[1].item() == (7, 2.0)
        assert array["n"].tolist() == [0, 7, 0]

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [
            (-1, "f8"),
            ((2, -2), "f8"),
            (3, object),
            (3, [("a", "O")]),
            (3, "nonsense"),
            ("x", "f8"),
            (1.5, "f8"),
            (2**62, "f8"),
            (None, "f8"),
        ],
    )
    def test_a_form_that_cannot_be_is_refused(self, pool: Any, shape: Any, dtype: Any) -> None:
        with pytest.raises(InvalidError, match="a"):
            pool.allocate_array("a", shape, dtype)
        assert "a" not in pool

    @pytest.mark.parametrize(
        "key",
        [
            0,
            -1,
            (2, 3),
            (-1, -8),
            slice(1, 3),
            slice(None),
            slice(None, None, 2),
            slice(4, 1, -1),
            (slice(None), 3),
            (slice(1, 5, 2), slice(2, 7, 3)),
            Ellipsis,
            (Ellipsis, 0),
            (None, 2),
            [4, 0, 4],
            ([1, 2], [3, 4]),
            (slice(None), [7, 0]),
            np.arange(48).reshape(6, 8) % 3 == 0,
            np.array([True, False] * 3),
            slice(3, 3),
            (),
        ],
        ids=lambda key: str(key).replace("\n", "")[:24],
    )
    def test_indexing_is_that_of_numpy(self, grid: Any, key: Any) -> None:
        expected = np.arange(48).reshape(6, 8)
        read = grid[key]
        assert type(read) is type(expected[key])
        assert np.array_equal(read, expected[key])
        grid[key] = -7
        expected[key] = -7
        assert np.array_equal(grid[...], expected)

    def test_an_assignment_broadcasts_and_converts_as_in_numpy(self, grid: Any) -> None:
        expected = np.arange(48).reshape(6, 8)
        for key, value in [
            ((slice(0, 2),), np.arange(8.0)),
            ((slice(None), 1), [9]),
            ((0, 0), np.float32(3)),
            (([5, 4], slice(0, 2)), np.array([[1], [2]], "u1")),
        ]:
            grid[key] = value
            expected[key] = value
            assert np.array_equal(grid[...], expected)

    def test_what_was_read_of_an_array_is_a_copy(self, grid: Any) -> None:
        row = grid[2]
        row[:] = 0
        assert grid[2, 5] == 21
        before = grid[:]
        grid[:] = 1
        assert before[5, 7] == 47

    def test_an_index_or_form_that_does_not_fit_is_refused(self, grid: Any) -> None:
        for call in (
            lambda: grid[6],
            lambda: grid[0, 8],
            lambda: grid[0, 0, 0],
            lambda: grid["field"],
            lambda: grid.__setitem__(6, 1),
            lambda: grid.__setitem__(0, [1, 2, 3]),
            lambda: grid.__setitem__(0, "text"),
        ):
            with pytest.raises(InvalidError, match="grid"):
                call()
        assert np.array_equal(grid[...], np.arange(48).reshape(6, 8))

    def test_asarray_is_live_read_only_and_not_copied(self, pool: Any, other: Any) -> None:
        array = pool.allocate_array("a", (100, 10))
        live = np.asarray(array)
        assert np.shares_memory(live, array.view())
        assert not live.flags.writeable
        assert (live.shape, live.dtype) == ((100, 10), np.dtype("f8"))
        array[5] = 2
        other.sync()
        other.array("a")[6, 0] = 3
        pool.sync()
        assert live[5].tolist() == [2] * 10
        assert live[6, 0] == 3
        with pytest.raises(ValueError):
            live[0] = 1

    def test_asarray_converts_when_asked(self, grid: Any) -> None:
        converted = np.asarray(grid, dtype="f4")
        assert converted.dtype == np.dtype("f4")
        copied = np.array(grid)
        copied[:] = 0
        assert grid[0, 1] == 1

    def test_memory_and_array_are_the_same_bytes(self, pool: Any, grid: Any) -> None:
        memory = pool.memory("grid")
        assert memory.size == grid.nbytes
        assert memory[8:16] == (1).to_bytes(8, "little")
        memory.write(8, (99).to_bytes(8, "little"))
        assert grid[0, 1] == 99

    def test_the_name_of_an_array_gives_an_array_handle(self, pool: Any, grid: Any) -> None:
        assert pool["grid"].shape == grid.shape
        assert pool.array("grid")[5, 7] == 47

    def test_memory_that_is_no_array_has_no_array_handle(self, pool: Any) -> None:
        pool.allocate("bytes", 8)
        with pytest.raises(InvalidError, match="bytes"):
            pool.array("bytes")

    def test_fetch_add_adds_to_one_element(self, grid: Any) -> None:
        assert grid.fetch_add((1, 2), 5) == 10
        assert grid.fetch_add((1, 2), -1) == 15
        assert grid[1].tolist() == [8, 9, 14, 11, 12, 13, 14, 15]

    def test_fetch_add_refuses_more_or_other_than_one_element(self, grid: Any) -> None:
        for index in (0, slice(0, 1), (6, 0), (0, 0, 0)):
            with pytest.raises(InvalidError, match="grid"):
                grid.fetch_add(index, 1)
        assert np.array_equal(grid[...], np.arange(48).reshape(6, 8))

    def test_the_version_of_an_array_is_that_of_its_last_write(self, pool: Any, grid: Any) -> None:
        grid[0, 0] = 1
        written = pool.version
        pool["elsewhere"] = 1
        assert grid.version == written

    def test_a_deleted_array_is_gone_for_its_handles(self, pool: Any, grid: Any) -> None:
        del pool["grid"]
        pool.allocate_array("grid", (6, 8), "i8")
        for call in (lambda: grid[0], lambda: grid.__setitem__(0, 1), lambda: grid.view()):
            with pytest.raises(NotFoundError, match="grid"):
                call()
        assert not pool.array("grid")[...].any()
