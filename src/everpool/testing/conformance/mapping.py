"""A pool is a mapping from names to values, in the order of the names' UTF-8 bytes."""

# Pools, transactions and what they hand out are `Any` here, so that every engine fits.
# pyright: reportUnknownLambdaType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false

from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest

from everpool.errors import InvalidError, NotFoundError
from everpool.testing.conformance.base import ConformanceBase

UNICODE_NAMES = [
    "~",
    "a",
    "B",
    "é",
    "e\u0301",
    "ß",
    "中文",
    "\ufb01",
    "😀",
    "\U0010ffff",
    "a/1",
    "a b",
]
BAD_NAMES = ["", "a\0b", "\0", "n" * 1025, "é" * 513, "\ud800", 5, None, b"bytes"]
SHARED = "shared/" * 86  # 602 bytes: longer than the keys of many stores


class MappingGuarantees(ConformanceBase):
    """What `pool[name]`, `in`, `len`, iteration and the `MutableMapping` methods do."""

    def test_a_new_pool_is_empty(self, pool: Any) -> None:
        assert len(pool) == 0
        assert list(pool) == []
        assert list(pool.names()) == []

    def test_a_pool_is_a_mutable_mapping(self, pool: Any) -> None:
        assert isinstance(pool, MutableMapping)

    def test_what_is_put_comes_back(self, pool: Any) -> None:
        pool["greeting"] = b"hello"
        assert pool["greeting"] == b"hello"

    def test_a_size_is_told_of_values_and_memory(self, pool: Any) -> None:
        pool["small"], pool["large"] = b"some", bytes(1 << 20)
        pool.allocate("memory", 1 << 40)
        assert 4 <= pool.size_of("small") < 100
        assert 0 <= pool.size_of("large") - (1 << 20) < 100
        assert pool.size_of("memory") == 1 << 40
        with pytest.raises(NotFoundError):
            pool.size_of("none")

    def test_a_put_replaces_the_value(self, pool: Any) -> None:
        pool["a"] = 1
        pool["a"] = "two"
        assert pool["a"] == "two"
        assert len(pool) == 1

    def test_a_deleted_name_is_gone(self, pool: Any) -> None:
        pool["a"] = 1
        del pool["a"]
        assert "a" not in pool
        assert list(pool) == []
        with pytest.raises(NotFoundError):
            pool["a"]

    def test_a_deleted_name_can_be_put_again(self, pool: Any) -> None:
        pool["a"] = 1
        del pool["a"]
        pool["a"] = 2
        assert pool["a"] == 2

    def test_contains_tells_whether_a_name_exists(self, pool: Any) -> None:
        pool["a"] = None
        assert "a" in pool
        assert "b" not in pool
        assert "" not in list(pool)

    def test_len_counts_values_and_memory(self, pool: Any) -> None:
        pool["value"] = 1
        pool.allocate("memory", 8)
        pool.allocate_array("array", 3)
        assert len(pool) == 3

    def test_get_returns_the_value_or_the_default(self, pool: Any) -> None:
        pool["a"] = 1
        assert pool.get("a") == 1
        assert pool.get("b") is None
        assert pool.get("b", 7) == 7

    def test_pop_removes_and_returns(self, pool: Any) -> None:
        pool["a"] = 1
        assert pool.pop("a") == 1
        assert "a" not in pool
        assert pool.pop("a", "gone") == "gone"
        with pytest.raises(NotFoundError):
            pool.pop("a")

    def test_setdefault_puts_only_what_is_missing(self, pool: Any) -> None:
        assert pool.setdefault("a", 1) == 1
        assert pool.setdefault("a", 2) == 1
        assert pool["a"] == 1

    def test_update_puts_every_item(self, pool: Any) -> None:
        pool.update({"a": 1, "b": 2}, c=3)
        assert dict(pool) == {"a": 1, "b": 2, "c": 3}

    def test_keys_values_and_items_agree_with_iteration(self, pool: Any) -> None:
        pool.update({"b": 2, "a": 1, "c": 3})
        assert list(pool.keys()) == ["a", "b", "c"]
        assert list(pool.values()) == [1, 2, 3]
        assert list(pool.items()) == [("a", 1), ("b", 2), ("c", 3)]

    def test_clear_removes_every_name(self, pool: Any) -> None:
        pool.update({"a": 1, "b": 2})
        pool.allocate("m", 8)
        pool.clear()
        assert len(pool) == 0

    def test_iteration_is_in_the_order_of_utf8_bytes(self, pool: Any) -> None:
        with pool.transaction() as tx:
            for number, name in enumerate(UNICODE_NAMES):
                tx[name] = number
        assert list(pool) == sorted(UNICODE_NAMES, key=str.encode)

    def test_names_that_only_look_alike_are_different(self, pool: Any) -> None:
        composed, decomposed = "\u00e9", "e\u0301"
        pool[composed] = 1
        pool[decomposed] = 2
        pool["K"] = 3
        pool["k"] = 4
        assert (pool[composed], pool[decomposed], pool["K"], pool["k"]) == (1, 2, 3, 4)

    def test_names_returns_an_iterator(self, pool: Any) -> None:
        pool.update({"a": 1, "b": 2})
        names = pool.names()
        assert isinstance(names, Iterator)
        assert next(names) == "a"

    def test_names_lists_what_begins_with_the_prefix(self, pool: Any) -> None:
        names = ["a", "a/", "a/1", "a/2", "a/2/x", "a0", "b/1", "é/1", "é/2", "😀", "😀/x"]
        with pool.transaction() as tx:
            for name in names:
                tx[name] = 0
        for prefix in [
            "",
            "a",
            "a/",
            "a/2",
            "b",
            "é",
            "é/",
            "😀",
            "😀/x",
            "c",
            "a/9",
            "\U0010ffff",
        ]:
            expected = sorted((n for n in names if n.startswith(prefix)), key=str.encode)
            assert list(pool.names(prefix)) == expected, prefix

    def test_names_with_the_highest_characters_are_listed_under_their_prefix(
        self, pool: Any
    ) -> None:
        top = "\U0010ffff"
        names = [top, top + top, "z" + top, "z" + top + "a", "z" + top + top]
        for name in names:
            pool[name] = 0
        assert list(pool.names("z" + top)) == ["z" + top, "z" + top + "a", "z" + top + top]
        assert list(pool.names(top)) == [top, top + top]

    def test_a_listing_is_in_order_and_without_doubles_while_names_come_and_go(
        self, pool: Any
    ) -> None:
        with pool.transaction() as tx:
            for number in range(500):
                tx[f"{number:04}"] = number
        seen: list[str] = []
        for name in pool.names():
            seen.append(name)
            if len(seen) % 50 == 0:
                del pool[name]
                pool[f"{len(seen):04}-new"] = 0
        assert seen == sorted(set(seen))
        assert {f"{number:04}" for number in range(500)} <= set(seen)

    def test_a_name_may_have_1024_bytes(self, pool: Any) -> None:
        for name in ["n" * 1024, "é" * 512, "中" * 341 + "x"]:
            assert len(name.encode()) == 1024
            pool[name] = name
            assert pool[name] == name
        assert len(pool) == 3

    @pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:12])
    def test_what_cannot_be_a_name_is_refused(self, pool: Any, name: Any) -> None:
        for call in (
            lambda: pool[name],
            lambda: pool.__setitem__(name, 1),
            lambda: pool.__delitem__(name),
            lambda: pool.allocate(name, 8),
            lambda: pool.allocate_array(name, 8),
            lambda: pool.memory(name),
            lambda: pool.array(name),
        ):
            with pytest.raises(InvalidError):
                call()
        assert len(pool) == 0

    def test_long_names_that_share_their_first_600_bytes_are_listed_in_order(
        self, pool: Any
    ) -> None:
        names = [
            SHARED + f"{number * 7919 % 300:04}" + "x" * (number % 300) for number in range(300)
        ]
        names += [SHARED, SHARED[:-1], "sharec", "shared0"]
        with pool.transaction() as tx:
            for number, name in enumerate(names):
                tx[name] = number
        assert list(pool) == sorted(names, key=str.encode)
        assert list(pool.names(SHARED + "01")) == sorted(
            (n for n in names if n.startswith(SHARED + "01")), key=str.encode
        )
        assert list(pool.names(SHARED[:550])) == sorted(
            (n for n in names if n.startswith(SHARED[:550])), key=str.encode
        )

    def test_long_names_that_share_their_first_600_bytes_are_different(self, pool: Any) -> None:
        with pool.transaction() as tx:
            for number in range(100):
                tx[f"{SHARED}{number}"] = number
        for number in range(0, 100, 2):
            del pool[f"{SHARED}{number}"]
        for number in range(100):
            assert pool.get(f"{SHARED}{number}") == (number if number % 2 else None)
        assert len(pool) == 50

    def test_a_missing_name_is_a_not_found_error_that_names_it(self, pool: Any) -> None:
        for call in (
            lambda: pool["nowhere"],
            lambda: pool.__delitem__("nowhere"),
            lambda: pool.memory("nowhere"),
            lambda: pool.array("nowhere"),
        ):
            with pytest.raises(NotFoundError, match="nowhere") as caught:
                call()
            assert caught.value.kind == "not_found"
            assert isinstance(caught.value, KeyError)
