"""A watch tells of every committed change under its prefix, in commit order."""

# Pools, transactions and what they hand out are `Any` here, so that every engine fits.
# pyright: reportUnknownLambdaType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false

import threading
import time
from typing import Any

import pytest

from everpool.errors import ClosedError, ConflictError
from everpool.testing.conformance.base import PATIENCE_S, ConformanceBase


def drain(watch: Any, until: str) -> list[Any]:
    """Return the changes up to the one of the name `until`, without it."""
    changes: list[Any] = []
    while True:
        change = watch.get(PATIENCE_S)
        assert change is not None, f"no change of {until!r} within {PATIENCE_S} s: {changes}"
        if change.name == until:
            return changes
        changes.append(change)


class WatchGuarantees(ConformanceBase):
    """What `watch` yields."""

    def test_a_watch_tells_what_happened_to_which_name(self, pool: Any) -> None:
        with pool.watch() as watch:
            pool["a"] = 1
            pool["a"] = 2
            memory = pool.allocate("m", 100)
            memory.write(10, b"12345")
            del pool["a"]
            del pool["m"]
            pool["end"] = 0
            changes = drain(watch, "end")
        assert [(change.name, change.kind) for change in changes] == [
            ("a", "put"),
            ("a", "put"),
            ("m", "allocate"),
            ("m", "write"),
            ("a", "delete"),
            ("m", "delete"),
        ]

    def test_a_write_is_told_with_its_bytes(self, pool: Any) -> None:
        memory = pool.allocate("m", 100)
        array = pool.allocate_array("a", (4, 4), "i4")
        with pool.watch() as watch:
            memory[10:15] = b"12345"
            memory.fetch_add(24, 1)
            assert memory.compare_and_swap(50, b"\0\0", b"ab")
            assert not memory.compare_and_swap(50, b"\0\0", b"cd")
            array[1] = 5
            pool["end"] = 0
            changes = drain(watch, "end")
        assert [(c.name, c.kind, c.offset, c.size) for c in changes] == [
            ("m", "write", 10, 5),
            ("m", "write", 24, 8),
            ("m", "write", 50, 2),
            ("a", "write", 16, 16),
        ]

    def test_a_watch_hears_other_clients(self, pool: Any, other: Any) -> None:
        with pool.watch() as watch:
            other["a"] = 1
            change = watch.get(PATIENCE_S)
        assert (change.name, change.kind) == ("a", "put")

    def test_a_watch_hears_only_names_under_its_prefix(self, pool: Any) -> None:
        with pool.watch("dir/") as watch:
            for name in ("a", "dir", "dir/1", "dir0", "dir/2/x", "é", "dir/end"):
                pool[name] = 0
            pool.allocate("dir/m", 8)
            assert [change.name for change in drain(watch, "dir/m")] == [
                "dir/1",
                "dir/2/x",
                "dir/end",
            ]

    def test_changes_come_in_commit_order_with_their_versions(self, pool: Any, other: Any) -> None:
        expected: list[tuple[str, int]] = []
        with other.watch() as watch:
            for number in range(30):
                client = (pool, other)[number % 2]
                with client.transaction() as tx:
                    tx[f"{number}"] = number
                expected.append((f"{number}", tx.version))
            pool["end"] = 0
            changes = drain(watch, "end")
        assert [(change.name, change.version) for change in changes] == expected

    def test_the_changes_of_one_transaction_share_its_version(self, pool: Any) -> None:
        pool.allocate("m", 8)
        with pool.watch() as watch:
            with pool.transaction() as tx:
                tx["a"] = 1
                tx["b"] = 2
                tx.memory("m").write(0, b"x")
            pool["end"] = 0
            changes = drain(watch, "end")
        assert {change.version for change in changes} == {tx.version}
        assert sorted((change.name, change.kind) for change in changes) == [
            ("a", "put"),
            ("b", "put"),
            ("m", "write"),
        ]

    def test_a_watch_never_hears_what_was_not_committed(self, pool: Any, other: Any) -> None:
        pool["a"] = 0
        with pool.watch() as watch:
            with pool.transaction() as tx:
                tx["aborted"] = 1
                tx.abort()
            with pytest.raises(ConflictError), pool.transaction() as tx:
                tx["refused"] = tx["a"]
                other["a"] = 1
            pool["end"] = 0
            assert [change.name for change in drain(watch, "end")] == ["a"]

    def test_a_watch_begins_with_what_comes_after_it(self, pool: Any) -> None:
        pool["before"] = 1
        with pool.watch() as watch:
            assert watch.get(0.01) is None
            pool["after"] = 1
            assert watch.get(PATIENCE_S).name == "after"
            assert watch.get(0.01) is None

    def test_since_replays_what_was_committed_after_a_version(self, pool: Any, other: Any) -> None:
        pool["a"] = 1
        start = pool.version
        pool["b"] = 1
        del pool["a"]
        memory = pool.allocate("m", 64)
        memory.write(8, b"1234")
        other.sync()
        for client in (pool, other):
            with client.watch(since=start) as watch:
                changes = [watch.get(PATIENCE_S) for _ in range(4)]
                assert watch.get(0.01) is None
            assert [(c.name, c.kind) for c in changes] == [
                ("b", "put"),
                ("a", "delete"),
                ("m", "allocate"),
                ("m", "write"),
            ]
            assert all(change.version > start for change in changes)
            assert (changes[3].offset, changes[3].size) == (8, 4)

    def test_a_replay_and_what_follows_leave_no_gap_and_no_double(
        self, pool: Any, other: Any
    ) -> None:
        start = pool.version
        writer = threading.Thread(
            target=lambda: [other.__setitem__(f"{number}", number) for number in range(100)]
        )
        pool["first"] = 0
        writer.start()
        with pool.watch(since=start) as watch:
            changes = drain(watch, "99")
        writer.join()
        assert sorted(c.name for c in changes) == sorted(["first", *map(str, range(99))])
        assert [c.version for c in changes] == sorted({c.version for c in changes})

    def test_a_watch_resumes_from_the_last_version_it_told(self, pool: Any) -> None:
        with pool.watch() as watch:
            pool["a"] = 1
            last = watch.get(PATIENCE_S).version
        pool["b"] = 1
        with pool.watch(since=last) as watch:
            assert watch.get(PATIENCE_S).name == "b"

    def test_a_waiting_watch_wakes_up(self, pool: Any, other: Any) -> None:
        heard: list[Any] = []
        with pool.watch("w") as watch:
            waiter = threading.Thread(target=lambda: heard.append(next(iter(watch))))
            waiter.start()
            time.sleep(0.05)
            other["w"] = 1
            waiter.join(PATIENCE_S)
        assert [change.name for change in heard] == ["w"]

    def test_closing_a_watch_ends_who_waits_for_it(self, pool: Any) -> None:
        ended = threading.Event()
        watch = pool.watch()

        def wait() -> None:
            try:
                for _ in watch:
                    pass
            except ClosedError:
                pass
            ended.set()

        waiter = threading.Thread(target=wait, daemon=True)
        waiter.start()
        time.sleep(0.05)
        watch.close()
        assert ended.wait(PATIENCE_S)

    def test_a_closed_watch_says_so(self, pool: Any) -> None:
        watch = pool.watch()
        watch.close()
        with pytest.raises(ClosedError):
            watch.get(0.01)

    def test_two_watches_do_not_share_their_changes(self, pool: Any) -> None:
        with pool.watch() as first, pool.watch() as second:
            pool["a"] = 1
            assert first.get(PATIENCE_S).name == "a"
            assert second.get(PATIENCE_S).name == "a"
