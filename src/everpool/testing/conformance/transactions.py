"""Transactions are atomic, read their own writes, and may be pipelined."""

# Pools, transactions and what they hand out are `Any` here, so that every engine fits.
# pyright: reportUnknownLambdaType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false

from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from everpool.errors import (
    ClosedError,
    ConflictError,
    ExistsError,
    InvalidError,
    NotFoundError,
)
from everpool.testing.conformance.base import PATIENCE_S, ConformanceBase, in_threads


class Boom(Exception):
    """What a transaction's body raises in these tests."""


class TransactionGuarantees(ConformanceBase):
    """One transaction by itself."""

    def test_all_of_a_transaction_is_committed(self, pool: Any, other: Any) -> None:
        pool["old"] = 1
        pool.allocate("m", 16)
        with pool.transaction() as tx:
            tx["new"] = 2
            del tx["old"]
            tx.memory("m")[0:4] = b"done"
            tx.allocate_array("a", 3)[1] = 0.5
        other.sync()
        for client in (pool, other):
            assert list(client) == ["a", "m", "new"]
            assert client["new"] == 2
            assert client.memory("m")[0:4] == b"done"
            assert client.array("a")[:].tolist() == [0, 0.5, 0]

    def test_nothing_of_a_transaction_is_seen_before_it_commits(
        self, pool: Any, other: Any
    ) -> None:
        pool["old"] = 1
        pool.allocate("m", 16)
        with pool.transaction() as tx:
            tx["new"] = 2
            del tx["old"]
            tx.memory("m")[0:4] = b"soon"
            tx.allocate("n", 8)
            other.sync()
            for client in (pool, other):
                assert list(client) == ["m", "old"]
                assert client.memory("m")[0:4] == bytes(4)

    def test_an_exception_aborts_and_propagates(self, pool: Any) -> None:
        pool["a"] = 1
        pool.allocate("m", 8)
        before = pool.version
        with pytest.raises(Boom), pool.transaction() as tx:
            tx["a"] = 2
            tx["b"] = 3
            tx.memory("m")[0:2] = b"no"
            tx.allocate("n", 8)
            raise Boom
        assert list(pool) == ["a", "m"]
        assert pool["a"] == 1
        assert pool.memory("m")[0:2] == bytes(2)
        assert pool.version == before

    def test_abort_leaves_without_commit_and_without_error(self, pool: Any) -> None:
        with pool.transaction() as tx:
            tx["a"] = 1
            tx.abort()
        assert "a" not in pool

    def test_a_transaction_reads_its_own_values(self, pool: Any) -> None:
        pool.update({"kept": 0, "changed": 0, "deleted": 0})
        with pool.transaction() as tx:
            tx["changed"] = 1
            tx["new"] = 2
            del tx["deleted"]
            assert (tx["kept"], tx["changed"], tx["new"]) == (0, 1, 2)
            assert "deleted" not in tx
            assert "new" in tx
            with pytest.raises(NotFoundError, match="deleted"):
                tx["deleted"]
            assert tx.get("deleted") is None
            assert list(tx) == ["changed", "kept", "new"]
            assert len(tx) == 3
            assert list(tx.names("n")) == ["new"]
            tx["deleted"] = 3
            assert tx["deleted"] == 3
            del tx["new"]
            assert "new" not in tx
        assert dict(pool) == {"kept": 0, "changed": 1, "deleted": 3}

    def test_a_transaction_reads_its_own_bytes(self, pool: Any) -> None:
        pool.allocate("m", 16)[:] = b"0123456789abcdef"
        with pool.transaction() as tx:
            memory = tx.memory("m")
            memory[2:6] = b"AAAA"
            memory.write(4, b"BBBB")
            assert memory[0:10] == b"01AABBBB89"
            assert memory[5] == ord("B")
            assert tx.memory("m").read(3, 2) == b"AB"
            memory[0] = 33
            assert memory[:] == b"!1AABBBB89abcdef"
        assert pool.memory("m")[:] == b"!1AABBBB89abcdef"

    def test_a_transaction_reads_its_own_elements(self, pool: Any) -> None:
        pool.allocate_array("a", (3, 4), "i4")[...] = np.arange(12).reshape(3, 4)
        expected = np.arange(12).reshape(3, 4)
        with pool.transaction() as tx:
            array = tx.array("a")
            for key, value in [((1, 2), -1), (slice(0, 2), 7), ((slice(None), 3), [1, 2, 3])]:
                array[key] = value
                expected[key] = value
                assert np.array_equal(array[...], expected)
            array[0, 0] -= 5
            assert array[0].tolist() == [2, 7, 7, 1]
            assert (array.shape, array.dtype, len(array)) == ((3, 4), np.dtype("i4"), 3)

    def test_memory_allocated_in_a_transaction_can_be_used_in_it(self, pool: Any) -> None:
        with pool.transaction() as tx:
            memory = tx.allocate("m", 32)
            array = tx.allocate_array("a", (2, 2), "i4")
            assert memory[:] == bytes(32)
            memory[8:12] = b"abcd"
            array[1] = 5
            assert tx["m"][8:12] == b"abcd"
            assert tx["a"][1].tolist() == [5, 5]
            with pytest.raises(ExistsError, match="m"):
                tx.allocate("m", 8)
        assert pool.memory("m")[0:16] == bytes(8) + b"abcd" + bytes(4)
        assert pool.array("a")[...].tolist() == [[0, 0], [5, 5]]

    def test_memory_can_be_deleted_and_allocated_anew_in_one_transaction(self, pool: Any) -> None:
        old = pool.allocate("m", 8)
        old[:] = b"oldbytes"
        with pool.transaction() as tx:
            del tx["m"]
            new = tx.allocate("m", 4)
            assert new[:] == bytes(4)
            new[0:1] = b"n"
        assert pool.memory("m")[:] == b"n\0\0\0"
        with pytest.raises(NotFoundError):
            old.read(0, 1)

    def test_a_value_can_take_the_name_of_memory_deleted_in_the_same_transaction(
        self, pool: Any
    ) -> None:
        pool.allocate("m", 8)
        with pool.transaction() as tx:
            del tx["m"]
            tx["m"] = 1
            assert tx["m"] == 1
        assert pool["m"] == 1

    def test_a_value_does_not_replace_memory_in_a_transaction(self, pool: Any) -> None:
        """A put is blind: the refusal comes when the transaction is left, at the latest."""
        pool.allocate("m", 8)
        with pytest.raises(ExistsError, match="m"), pool.transaction() as tx:
            tx["a"] = 1
            tx["m"] = 1
        assert "a" not in pool
        assert pool.memory("m")[:] == bytes(8)
        with pytest.raises(ExistsError, match="n"), pool.transaction() as tx:
            tx.allocate("n", 8)
            tx["n"] = 1
        assert "n" not in pool

    def test_what_is_put_and_deleted_in_one_transaction_never_was(self, pool: Any) -> None:
        with pool.transaction() as tx:
            tx["a"] = 1
            del tx["a"]
            tx.allocate("m", 8)
            del tx["m"]
            tx["b"] = 1
        assert list(pool) == ["b"]

    def test_fetch_add_and_compare_and_swap_work_in_a_transaction(self, pool: Any) -> None:
        pool.allocate("m", 16)
        pool.allocate_array("a", 3, "i8")
        with pool.transaction() as tx:
            memory = tx.memory("m")
            assert memory.fetch_add(0, 5) == 0
            assert memory.fetch_add(0, 5) == 5
            assert memory.compare_and_swap(8, b"\0", b"x") is True
            assert memory.compare_and_swap(8, b"\0", b"y") is False
            assert tx.array("a").fetch_add(1, 7) == 0
            assert tx.array("a")[1] == 7
        assert pool.memory("m")[:] == (10).to_bytes(8, "little") + b"x" + bytes(7)
        assert pool.array("a")[:].tolist() == [0, 7, 0]

    def test_what_a_transaction_reads_is_a_copy(self, pool: Any) -> None:
        pool.allocate_array("a", 4, "i8")[:] = 1
        with pool.transaction() as tx:
            for read in (tx.array("a")[1:3], np.asarray(tx.array("a"))):
                if read.flags.writeable:
                    read[:] = 9
            assert tx.array("a")[:].tolist() == [1, 1, 1, 1]
            tx["other"] = 1
        assert pool.array("a")[:].tolist() == [1, 1, 1, 1]

    def test_a_transaction_gives_no_live_views(self, pool: Any) -> None:
        pool.allocate("m", 8)
        with pool.transaction() as tx, pytest.raises((InvalidError, AttributeError)):
            tx.memory("m").view()

    def test_a_transaction_reads_arrays_that_are_values(self, pool: Any) -> None:
        pool["v"] = np.arange(50_000)
        with pool.transaction() as tx:
            assert tx["v"][49_999] == 49_999
            assert tx.array("v")[10:13].tolist() == [10, 11, 12]
            with pytest.raises(InvalidError):
                tx.array("v")[0] = 1
            tx["v"] = tx["v"][:3] * 2
        assert pool["v"].tolist() == [0, 2, 4]

    def test_a_transaction_is_a_mapping(self, pool: Any) -> None:
        pool.update({"a": 1, "b": 2})
        with pool.transaction() as tx:
            assert tx.pop("a") == 1
            assert tx.setdefault("b", 5) == 2
            assert tx.setdefault("c", 3) == 3
            tx.update({"d": 4})
            assert list(tx.items()) == [("b", 2), ("c", 3), ("d", 4)]
        assert dict(pool) == {"b": 2, "c": 3, "d": 4}

    def test_a_caught_error_leaves_the_transaction_usable(self, pool: Any) -> None:
        pool.allocate("m", 8)
        with pool.transaction() as tx:
            for call in (
                lambda: tx["missing"],
                lambda: tx.__delitem__("missing"),
                lambda: tx.memory("m").read(0, 9),
                lambda: tx.__setitem__("bad", object()),
                lambda: tx.__setitem__("", 1),
                lambda: tx.allocate("m", 8),
            ):
                with pytest.raises((NotFoundError, InvalidError, ExistsError)):
                    call()
            tx["fine"] = 1
        assert pool["fine"] == 1

    def test_a_transaction_that_is_over_is_closed(self, pool: Any) -> None:
        pool.allocate("m", 8)
        with pool.transaction() as tx:
            tx["a"] = 1
            memory = tx.memory("m")
        for call in (
            lambda: tx["a"],
            lambda: tx.__setitem__("a", 2),
            lambda: list(tx.names()),
            lambda: memory.read(0, 1),
            lambda: memory.write(0, b"1"),
        ):
            with pytest.raises(ClosedError) as caught:
                call()
            assert caught.value.kind == "closed"
        assert pool["a"] == 1

    def test_a_transaction_of_a_pool_closed_meanwhile_does_not_commit(
        self, pool: Any, other: Any
    ) -> None:
        with pytest.raises(ClosedError), pool.transaction() as tx:
            tx["a"] = 1
            pool.close()
        other.sync()
        assert "a" not in other

    def test_commit_order_is_version_order(self, pool: Any, other: Any) -> None:
        versions: list[int] = []
        for number in range(6):
            client = (pool, other)[number % 2]
            with client.transaction() as tx:
                tx["a"] = number
            versions.append(tx.version)
            assert client.version >= tx.version
        assert versions == sorted(set(versions))
        assert pool.sync() >= versions[-1]

    def test_committed_holds_the_version_after_a_waiting_commit_too(self, pool: Any) -> None:
        with pool.transaction() as tx:
            tx["a"] = 1
        assert tx.committed.result(0) == tx.version == pool.version

    def test_every_transaction_has_an_id_of_its_own(self, pool: Any, other: Any) -> None:
        ids: list[Any] = []
        for client in (pool, other, pool):
            with client.transaction() as tx:
                tx["a"] = 1
            ids.append(tx.id)
        assert len(set(ids)) == len({str(id) for id in ids}) == 3

    def test_a_transaction_without_writes_commits_nothing(self, pool: Any) -> None:
        pool["a"] = 1
        before = pool.version
        with pool.transaction() as tx:
            assert tx["a"] == 1
            assert list(tx) == ["a"]
        with pool.transaction():
            pass
        assert pool.version == before

    def test_a_large_transaction_is_atomic(self, pool: Any, other: Any) -> None:
        with pool.transaction() as tx:
            for number in range(1000):
                tx[f"n/{number:04}"] = number
            tx["large"] = np.arange(100_000)
            tx.allocate("m", 1 << 20)[:] = b"x" * (1 << 20)
        other.sync()
        assert len(list(other.names("n/"))) == 1000
        assert other["large"][-1] == 99_999
        assert other.memory("m")[:] == b"x" * (1 << 20)

    def test_run_returns_what_the_function_returns(self, pool: Any) -> None:
        pool["a"] = 1

        def increment(tx: Any) -> int:
            tx["a"] += 1
            return tx["a"]

        assert pool.run(increment) == 2
        assert pool["a"] == 2

    def test_run_tries_again_after_a_conflict(self, pool: Any, other: Any) -> None:
        pool["a"] = 0
        calls: list[int] = []

        def increment(tx: Any) -> None:
            calls.append(tx["a"])
            if len(calls) < 3:
                other["a"] = len(calls) * 10
            tx["a"] = calls[-1] + 1

        pool.run(increment)
        assert calls == [0, 10, 20]
        assert pool["a"] == 21

    def test_run_gives_up_after_its_attempts(self, pool: Any, other: Any) -> None:
        pool["a"] = 0
        calls: list[int] = []

        def lose(tx: Any) -> None:
            calls.append(tx["a"])
            other["a"] = len(calls)
            tx["b"] = 1

        with pytest.raises(ConflictError):
            pool.run(lose, attempts=3)
        assert len(calls) == 3
        assert "b" not in pool

    def test_run_does_not_retry_other_errors(self, pool: Any) -> None:
        calls: list[Any] = []

        def fail(tx: Any) -> None:
            calls.append(tx)
            tx["a"] = 1
            raise Boom

        with pytest.raises(Boom):
            pool.run(fail)
        assert len(calls) == 1
        assert "a" not in pool

    def test_contended_runs_lose_no_update(self, pool: Any, other: Any) -> None:
        pool["n"] = 0
        other.sync()

        def increment(tx: Any) -> None:
            tx["n"] += 1

        def work(thread: int) -> None:
            for _ in range(12):
                (pool, other)[thread % 2].run(increment)

        in_threads(4, work)
        pool.sync()
        assert pool["n"] == 48


class PipelineGuarantees(ConformanceBase):
    """Transactions that do not wait, and what became of a transaction."""

    def test_a_pipelined_transaction_promises_its_version(self, pool: Any) -> None:
        with pool.transaction(wait=False) as tx:
            tx["a"] = 1
        assert isinstance(tx.committed, Future)
        version = tx.committed.result(PATIENCE_S)
        assert version == tx.version
        assert pool.version >= version
        assert pool["a"] == 1

    def test_pipelined_transactions_commit_in_their_order(self, pool: Any) -> None:
        futures: list[Any] = []
        for number in range(200):
            with pool.transaction(wait=False) as tx:
                tx["last"] = number
                tx[f"n/{number}"] = number
            futures.append(tx.committed)
        versions = [future.result(PATIENCE_S) for future in futures]
        assert versions == sorted(set(versions))
        assert pool["last"] == 199
        assert len(list(pool.names("n/"))) == 200

    def test_a_waiting_commit_comes_after_the_pipelined_ones_before_it(self, pool: Any) -> None:
        futures: list[Any] = []
        for number in range(20):
            with pool.transaction(wait=False) as tx:
                tx["a"] = number
            futures.append(tx.committed)
        pool["a"] = "last"
        assert futures[-1].result(PATIENCE_S) < pool.version
        assert pool["a"] == "last"

    def test_a_pipelined_conflict_arrives_in_the_future(self, pool: Any, other: Any) -> None:
        pool["a"] = 1
        with pool.transaction(wait=False) as tx:
            tx["b"] = tx["a"]
            other["a"] = 2
        assert isinstance(tx.committed.exception(PATIENCE_S), ConflictError)
        assert "b" not in pool

    def test_a_pipelined_abort_does_not_void_the_next(self, pool: Any, other: Any) -> None:
        pool["a"] = 1
        with pool.transaction(wait=False) as first:
            first["b"] = first["a"]
            other["a"] = 2
        with pool.transaction(wait=False) as second:
            second["c"] = 3
        assert second.committed.result(PATIENCE_S)
        assert isinstance(first.committed.exception(PATIENCE_S), ConflictError)
        assert pool["c"] == 3

    def test_an_exception_in_a_pipelined_body_propagates(self, pool: Any) -> None:
        with pytest.raises(Boom), pool.transaction(wait=False) as tx:
            tx["a"] = 1
            raise Boom
        assert "a" not in pool

    def test_closing_waits_for_what_is_pipelined(self, pool: Any, other: Any) -> None:
        futures: list[Any] = []
        for number in range(50):
            with pool.transaction(wait=False) as tx:
                tx[f"{number:02}"] = number
            futures.append(tx.committed)
        pool.close()
        assert all(future.done() and future.exception() is None for future in futures)
        other.sync()
        assert len(other) == 50

    def test_pipelined_writes_to_memory_keep_their_order(self, pool: Any) -> None:
        pool.allocate("m", 8)
        expected = bytearray(8)
        futures: list[Any] = []
        for number in range(100):
            with pool.transaction(wait=False) as tx:
                tx.memory("m").write(number % 3, bytes([number]) * 4)
            expected[number % 3 : number % 3 + 4] = bytes([number]) * 4
            futures.append(tx.committed)
        futures[-1].result(PATIENCE_S)
        assert pool.memory("m")[:] == expected

    def test_the_outcome_of_a_commit_is_its_version(self, pool: Any, other: Any) -> None:
        with pool.transaction() as tx:
            tx["a"] = 1
        other.sync()
        for client in (pool, other):
            outcome = client.outcome(tx.id)
            assert (outcome.state, outcome.version) == ("committed", tx.version)

    def test_the_outcome_of_a_conflict_is_aborted(self, pool: Any, other: Any) -> None:
        pool["a"] = 1
        with pytest.raises(ConflictError), pool.transaction() as tx:
            tx["b"] = tx["a"]
            other["a"] = 2
        assert pool.outcome(tx.id).state == "aborted"
        assert other.outcome(tx.id).state == "aborted"
