"""The guarantees of an object store as tests, one guarantee each, for every engine to subclass.

    class TestMyStore(StoreConformance):
        def make_store(self, tmp_path):
            return MyStore(tmp_path / "store")

`make_store` is called once for every client of a test: all stores that it returns for one
`tmp_path` must be one store, as they would be from several processes.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from everpool.errors import ClosedError, ConflictError, InvalidError, NotFoundError
from everpool.store import Store
from everpool.testing.conformance.base import in_threads

MakeStore = Callable[[], Store]
_KEYS = ["a", "a-b/c", "b/0", "b/00/x", "b/1", "b/1.5", "b/%41", "b/x y", "b/~z", "b/ü", "c/.d"]


class StoreConformance:
    """`make_store` is the one thing that an engine overrides."""

    def make_store(self, tmp_path: Path) -> Store:
        """Return a client of the store of this test, which is empty at first."""
        raise NotImplementedError

    @pytest.fixture
    def open_one(self, tmp_path: Path) -> Iterator[MakeStore]:
        """Opens one more client; all are closed after the test."""
        with contextlib.ExitStack() as opened:
            yield lambda: opened.enter_context(contextlib.closing(self.make_store(tmp_path)))

    @pytest.fixture
    def store(self, open_one: MakeStore) -> Store:
        """A client of a new store."""
        return open_one()

    @pytest.fixture
    def other(self, store: Store, open_one: MakeStore) -> Store:
        """A second client of the same store."""
        return open_one()

    def test_what_was_put_is_read_back(self, store: Store, other: Store) -> None:
        began_ns = time.time_ns()
        for data in (b"", b"x", bytes(range(256)) * 5000):
            store.put("folder/object", data)
            for reader in (store, other):
                found = reader.get("folder/object")
                assert found.data == data and type(found.data) is bytes
                assert abs(found.modified_ns - began_ns) < 120_000_000_000

    def test_any_bytes_like_object_can_be_put(self, store: Store) -> None:
        buffer = bytearray(b"0123456789")
        store.put("a", buffer)
        store.put("b", memoryview(buffer)[2:5])
        tag = store.swap("c", memoryview(buffer)[::1], None)
        buffer[:] = bytes(10)
        assert store.get("a").data == b"0123456789"
        assert store.get("b").data == b"234"
        assert store.get("c")[:2] == (b"0123456789", tag)

    def test_what_does_not_exist_is_not_found(self, store: Store) -> None:
        store.put("a/b", b"x")
        for key in ("b", "a", "a/b/c", "a/c"):
            with pytest.raises(NotFoundError):
                store.get(key)
            with pytest.raises(NotFoundError):
                store.get_if_changed(key, "tag")
            with pytest.raises(NotFoundError):
                store.get_ranges(key, [(0, 1)])

    @pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/./b", "a\nb", "k" * 901])
    def test_what_is_no_key_is_refused(self, store: Store, key: str) -> None:
        calls: list[Callable[[], object]] = [
            lambda: store.get(key),
            lambda: store.put(key, b""),
            lambda: store.swap(key, b"", None),
            lambda: store.put_pieces(key, [b""], 0),
            lambda: store.delete([key]),
        ]
        for call in calls:
            with pytest.raises(InvalidError):
                call()

    def test_a_swap_needs_the_tag_of_what_is_there(self, store: Store, other: Store) -> None:
        first = store.swap("head", b"1", None)
        with pytest.raises(ConflictError):
            other.swap("head", b"2", None)
        second = other.swap("head", b"2", first)
        with pytest.raises(ConflictError):
            store.swap("head", b"3", first)
        with pytest.raises(ConflictError):
            store.swap("absent", b"1", second)
        with pytest.raises(NotFoundError):
            store.get("absent")
        assert store.get("head")[:2] == (b"2", second)

    def test_a_read_may_ask_for_what_has_changed(self, store: Store, other: Store) -> None:
        first = store.swap("head", b"1", None)
        assert other.get_if_changed("head", first) is None
        second = store.swap("head", b"2", first)
        found = other.get_if_changed("head", first)
        assert found is not None and found[:2] == (b"2", second)
        assert other.get_if_changed("head", second) is None

    def test_of_those_who_swap_one_object_one_wins(self, store: Store, other: Store) -> None:
        store.swap("count", b"0", None)

        def count(number: int) -> None:
            mine = (store, other)[number % 2]
            for _ in range(10):
                while True:
                    found = mine.get("count")
                    with contextlib.suppress(ConflictError):
                        mine.swap("count", b"%d" % (int(found.data) + 1), found.e_tag)
                        break

        in_threads(4, count)
        assert store.get("count").data == b"40"

    def test_ranges_are_read_in_the_order_asked_for(self, store: Store) -> None:
        data = bytes(range(256)) * 40_000
        store.put("a", data)
        ranges = [(5_000_000, 5_000_300), (0, 10), (7, 7), (9_000_000, len(data)), (3, 4)]
        found = store.get_ranges("a", ranges)
        assert [bytes(view) for view in found] == [data[start:end] for start, end in ranges]
        assert all(isinstance(view, memoryview) and view.readonly for view in found)
        assert store.get_ranges("a", []) == []

    @pytest.mark.parametrize("wrong", [(0, 11), (10, 11), (20, 30), (5, 4), (-2, 3)])
    def test_a_range_must_be_within_the_object(self, store: Store, wrong: tuple[int, int]) -> None:
        store.put("a", b"0123456789")
        with pytest.raises(InvalidError):
            store.get_ranges("a", [(0, 1), wrong])

    def test_an_object_may_be_put_in_pieces(self, store: Store) -> None:
        pieces = [bytes([at]) * (3 << 20) for at in range(6)]
        store.put_pieces("big", iter([pieces[0], *map(memoryview, pieces[1:])]), 18 << 20)
        assert store.get("big").data == b"".join(pieces)
        store.put_pieces("small", [b"a", bytearray(b"bc")], 3)
        store.put_pieces("none", [], 0)
        assert store.get("small").data == b"abc"
        assert store.get("none").data == b""

    @pytest.mark.parametrize("size", [4, 6, (12 << 20) + 4])
    def test_pieces_of_another_size_leave_nothing(self, store: Store, size: int) -> None:
        pieces = [b"12345"] if size < 10 else [b"12345", bytes(12 << 20)]
        with pytest.raises(InvalidError):
            store.put_pieces("wrong", pieces, size)
        with pytest.raises(NotFoundError):
            store.get("wrong")

    @pytest.mark.parametrize("error", [KeyError("mine"), OSError(5, "mine")])
    def test_an_error_of_the_pieces_is_not_the_stores(self, store: Store, error: Exception) -> None:
        def pieces() -> Iterator[bytes]:
            yield bytes(6 << 20)
            yield bytes(6 << 20)
            raise error

        with pytest.raises(type(error), match="mine") as caught:
            store.put_pieces("wrong", pieces(), 18 << 20)
        assert caught.value is error
        with pytest.raises(NotFoundError):
            store.get("wrong")

    def test_keys_are_listed_in_their_order(self, store: Store, other: Store) -> None:
        for number, key in enumerate(_KEYS):
            store.put(key, bytes(number))
        found = list(other.list(""))
        assert [one.key for one in found] == sorted(_KEYS, key=str.encode)
        assert {one.key: one.size for one in found} == {k: n for n, k in enumerate(_KEYS)}
        assert all(abs(one.modified_ns - time.time_ns()) < 120e9 for one in found)
        assert [one.key for one in store.list("b/1")] == []
        assert [one.key for one in store.list("b/00")] == ["b/00/x"]
        below = sorted((key for key in _KEYS if key.startswith("b/")), key=str.encode)
        assert [one.key for one in store.list("b")] == below
        assert [one.key for one in store.list("b", after=below[2])] == below[3:]
        assert [one.key for one in store.list("b", after="b/0")] == below[below.index("b/0") + 1 :]
        assert [one.key for one in store.list("", after="b/0/")][:1] == ["b/00/x"]
        assert list(store.list("nothing")) == []

    def test_what_was_deleted_is_gone(self, store: Store, other: Store) -> None:
        for key in _KEYS:
            store.put(key, b"x")
        store.delete(["b/1", "nothing", "a-b/c"])
        store.delete(["b/1"])
        store.delete([])
        assert {one.key for one in other.list("")} == set(_KEYS) - {"b/1", "a-b/c"}
        with pytest.raises(NotFoundError):
            other.get("b/1")
        assert other.swap("b/1", b"anew", None)

    def test_what_was_put_outlives_its_writer(self, store: Store, open_one: MakeStore) -> None:
        tag = store.swap("head", b"1", None)
        store.put("a/b", b"x")
        store.close()
        again = open_one()
        assert again.get("head")[:2] == (b"1", tag)
        assert again.get("a/b").data == b"x"

    def test_a_closed_store_refuses_everything(self, store: Store) -> None:
        store.put("a", b"x")
        store.close()
        store.close()
        calls: list[Callable[[], object]] = [
            lambda: store.get("a"),
            lambda: store.get_if_changed("a", "t"),
            lambda: store.get_ranges("a", [(0, 1)]),
            lambda: store.put("a", b""),
            lambda: store.swap("a", b"", None),
            lambda: store.put_pieces("a", [b""], 0),
            lambda: list(store.list("")),
            lambda: store.delete(["a"]),
        ]
        for call in calls:
            with pytest.raises(ClosedError):
                call()
