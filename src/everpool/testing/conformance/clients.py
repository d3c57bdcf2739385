"""Clients share one pool, what is committed outlives them, and a closed client says so."""

# Pools, transactions and what they hand out are `Any` here, so that every engine fits.
# pyright: reportUnknownLambdaType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false

import random
from typing import Any

import numpy as np
import pytest

from everpool.errors import ClosedError, ConflictError, NotFoundError
from everpool.testing.conformance.base import ConformanceBase, in_threads
from everpool.testing.harness import Harness


class ClientGuarantees(ConformanceBase):
    """Two clients at a time, and one after another."""

    def test_clients_see_each_others_commits(self, pool: Any, other: Any) -> None:
        pool["a"] = 1
        other.sync()
        assert other["a"] == 1
        other["a"] = 2
        other["b"] = np.arange(100_000)
        del_me = other.allocate_array("m", 4, "i4")
        del_me[:] = 7
        pool.sync()
        assert pool["a"] == 2
        assert pool["b"][-1] == 99_999
        assert pool.array("m")[:].tolist() == [7] * 4
        del pool["b"]
        other.sync()
        assert list(other) == ["a", "m"]

    def test_a_client_sees_its_own_commits_at_once(self, pool: Any) -> None:
        for number in range(50):
            pool["a"] = number
            assert pool["a"] == number

    def test_sync_reaches_every_commit_made_before_it(self, pool: Any, other: Any) -> None:
        for number in range(20):
            pool["a"] = number
            committed = pool.version
            assert other.sync() >= committed
            assert other.version >= committed
            assert other["a"] == number

    def test_the_version_never_goes_back(self, pool: Any, other: Any) -> None:
        seen: list[int] = []
        for number in range(10):
            (pool, other)[number % 2]["a"] = number
            seen.append(pool.sync())
        assert seen == sorted(seen)
        assert all(isinstance(version, int) for version in seen)

    def test_a_client_that_opens_later_sees_everything(self, pool: Any, harness: Harness) -> None:
        pool["a"] = 1
        pool.allocate("m", 10_000).write(5000, b"data")
        late = harness.open()
        assert late["a"] == 1
        assert late.memory("m").read(5000, 4) == b"data"

    def test_what_was_committed_is_there_after_reopening(self, pool: Any, harness: Harness) -> None:
        array = np.arange(50_000)
        with pool.transaction() as tx:
            tx["small"] = {"a": [1, 2]}
            tx["large"] = array
            tx["n" * 1024] = "long"
            tx["gone"] = 1
            tx.allocate("m", 1 << 40).write(1 << 39, b"far")
            tx.allocate_array("grid", (3, 4), ">i4")[1] = 5
        del pool["gone"]
        version = pool.version
        again = harness.reopen()
        assert again.version >= version
        assert sorted(again) == sorted(["small", "large", "n" * 1024, "m", "grid"])
        assert again["small"] == {"a": [1, 2]}
        assert np.array_equal(again["large"], array)
        assert again.memory("m").read((1 << 39) - 1, 5) == b"\0far\0"
        assert again.array("grid")[...].tolist() == [[0] * 4, [5] * 4, [0] * 4]
        assert again.array("grid").dtype == np.dtype(">i4")

    def test_what_was_not_committed_is_not_there_after_reopening(
        self, pool: Any, harness: Harness
    ) -> None:
        pool["a"] = 1
        with pool.transaction() as tx:
            tx["b"] = 2
            tx.abort()
        assert list(harness.reopen()) == ["a"]

    def test_versions_go_on_after_reopening(self, pool: Any, harness: Harness) -> None:
        pool["a"] = 1
        version = pool.version
        again = harness.reopen()
        with again.transaction() as tx:
            tx["a"] = 2
        assert tx.version > version

    def test_outcomes_are_known_after_reopening(
        self, pool: Any, other: Any, harness: Harness
    ) -> None:
        pool["a"] = 1
        with pool.transaction() as kept:
            kept["b"] = 2
        with pytest.raises(ConflictError), pool.transaction() as refused:
            refused["b"] = refused["a"]
            other["a"] = 2
        again = harness.reopen()
        assert again.outcome(kept.id).state == "committed"
        assert again.outcome(kept.id).version == kept.version
        assert again.outcome(refused.id).state == "aborted"

    def test_what_was_deleted_stays_deleted_after_reopening(
        self, pool: Any, harness: Harness
    ) -> None:
        pool.allocate("m", 100).write(0, b"old")
        del pool["m"]
        again = harness.reopen()
        assert "m" not in again
        assert again.allocate("m", 100).read(0, 3) == bytes(3)

    def test_a_pool_is_a_context_manager(self, pool: Any, other: Any) -> None:
        with pool as entered:
            assert entered is pool
            pool["a"] = 1
        with pytest.raises(ClosedError):
            pool["a"]
        other.sync()
        assert other["a"] == 1

    def test_everything_on_a_closed_pool_says_that_it_is_closed(self, pool: Any) -> None:
        pool["a"] = 1
        memory = pool.allocate("m", 8)
        array = pool.allocate_array("arr", 4)
        with pool.transaction() as tx:
            tx["b"] = 1
        pool.close()
        for call in (
            lambda: pool["a"],
            lambda: pool.__setitem__("a", 2),
            lambda: pool.__delitem__("a"),
            lambda: "a" in pool,
            lambda: len(pool),
            lambda: list(pool),
            lambda: list(pool.names()),
            lambda: pool.get("a"),
            lambda: pool.allocate("n", 8),
            lambda: pool.allocate_array("n", 8),
            lambda: pool.memory("m"),
            lambda: pool.array("arr"),
            lambda: pool.transaction().__enter__(),
            lambda: pool.run(lambda tx: None),
            lambda: pool.watch().get(0.01),
            lambda: pool.version,
            lambda: pool.sync(),
            lambda: pool.stats(),
            lambda: pool.verify(),
            lambda: pool.outcome(tx.id),
            lambda: memory[0:8],
            lambda: memory.write(0, b"x"),
            lambda: memory.fetch_add(0, 1),
            lambda: memory.compare_and_swap(0, b"a", b"b"),
            lambda: memory.view(),
            lambda: array[0],
            lambda: array.__setitem__(0, 1),
        ):
            with pytest.raises(ClosedError) as caught:
                call()
            assert caught.value.kind == "closed"

    def test_closing_twice_is_harmless(self, pool: Any) -> None:
        pool.close()
        pool.close()

    def test_closing_one_client_leaves_the_others(self, pool: Any, other: Any) -> None:
        pool["a"] = 1
        pool.close()
        other.sync()
        other["b"] = other["a"]
        assert other["b"] == 1

    def test_stats_tell_how_far_behind_the_client_is(self, pool: Any) -> None:
        pool["a"] = 1
        pool.sync()
        stats = pool.stats()
        assert stats["version"] == pool.version
        assert stats["names"] == 1
        assert stats["versions_behind"] == 0
        assert stats["seconds_behind"] >= 0

    def test_a_sound_pool_verifies(self, pool: Any) -> None:
        pool["small"] = 1
        pool["large"] = np.arange(100_000)
        pool["n" * 1024] = 1
        pool.allocate("m", 1 << 30).write(1 << 20, b"data" * 3000)
        pool["replaced"] = np.zeros(100_000)
        pool["replaced"] = 1
        del pool["small"]
        report = pool.verify()
        assert report.ok
        assert list(report.damage) == []

    def test_transfers_of_many_threads_conserve_the_sum(self, pool: Any, other: Any) -> None:
        accounts = 8
        pool.allocate_array("accounts", accounts, "i8")[:] = 100
        other.sync()

        def transfer(thread: int) -> None:
            choose = random.Random(thread)
            client = (pool, other)[thread % 2]
            for number in range(10):
                source, target = choose.sample(range(accounts), 2)

                def move(tx: Any, s: int = source, t: int = target, n: int = number) -> None:
                    array = tx.array("accounts")
                    array[s] -= 1
                    array[t] += 1
                    tx[f"audit/{thread}/{n}"] = [s, t]
                    assert tx.array("accounts")[...].sum() == 100 * accounts

                client.run(move)

        in_threads(4, transfer)
        pool.sync()
        assert pool.array("accounts")[...].sum() == 100 * accounts
        balances = [100] * accounts
        for name in pool.names("audit/"):
            source, target = pool[name]
            balances[source] -= 1
            balances[target] += 1
        assert pool.array("accounts")[...].tolist() == balances

    def test_readers_see_whole_commits_while_others_write(self, pool: Any, other: Any) -> None:
        with pool.transaction() as tx:
            tx.update({"x": 0, "y": 0})
        other.sync()

        def work(thread: int) -> int:
            if thread == 0:
                for number in range(1, 31):
                    with pool.transaction() as tx:
                        tx["x"] = number
                        tx["y"] = number
                return 0
            mixed = 0
            for _ in range(100):
                try:
                    with (pool, other)[thread % 2].transaction() as tx:
                        mixed += tx["x"] != tx["y"]
                except ConflictError:
                    pass
            return mixed

        assert in_threads(3, work) == [0, 0, 0]

    def test_deleted_names_are_missing_for_every_client(self, pool: Any, other: Any) -> None:
        pool["a"] = 1
        other.sync()
        del pool["a"]
        other.sync()
        with pytest.raises(NotFoundError):
            other["a"]
