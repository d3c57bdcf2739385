"""Conflicts are exactly what the contract says: by name, by listed prefix and by byte range.

Every test interleaves one open transaction of `pool` with whole commits of `other`. Where a commit
must be refused, the engine may say so at a read inside the transaction or at its end.
"""

# Pools, transactions and what they hand out are `Any` here, so that every engine fits.
# pyright: reportUnknownLambdaType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false

import contextlib
from typing import Any

import numpy as np
import pytest

from everpool.errors import ConflictError, EverpoolError, ExistsError, NotFoundError
from everpool.testing.conformance.base import ConformanceBase

refused = pytest.raises(ConflictError)


class ConflictGuarantees(ConformanceBase):
    """Two transactions at a time."""

    @pytest.fixture
    def stocked(self, pool: Any, other: Any) -> Any:
        """Values `a` to `c`, 16 KiB of memory `m`, and a 6 by 8 array `grid`; returns `other`."""
        with pool.transaction() as tx:
            tx.update({"a": 1, "b": 2, "c": 3, "dir/1": 0, "dir/2": 0})
            tx.allocate("m", 16384)
            tx.allocate_array("grid", (6, 8), "i8")
        other.sync()
        return other

    # Names

    def test_a_value_that_was_read_and_replaced_conflicts(self, pool: Any, stocked: Any) -> None:
        with pytest.raises(ConflictError, match="'a'") as caught, pool.transaction() as tx:
            tx["b"] = tx["a"]
            stocked["a"] = 5
        assert caught.value.kind == "conflict"
        assert pool["b"] == 2

    def test_a_value_that_was_read_and_deleted_conflicts(self, pool: Any, stocked: Any) -> None:
        with refused, pool.transaction() as tx:
            tx["b"] = tx["a"]
            del stocked["a"]

    def test_a_value_that_was_replaced_by_an_equal_one_conflicts(
        self, pool: Any, stocked: Any
    ) -> None:
        with refused, pool.transaction() as tx:
            tx["b"] = tx["a"]
            stocked["a"] = 5
            stocked["a"] = 1

    def test_a_value_that_was_deleted_and_created_again_conflicts(
        self, pool: Any, stocked: Any
    ) -> None:
        with refused, pool.transaction() as tx:
            tx["b"] = tx["a"]
            del stocked["a"]
            stocked["a"] = 1

    @pytest.mark.parametrize(
        "look",
        [lambda tx: "new" in tx, lambda tx: tx.get("new"), lambda tx: tx.pop("new", None)],
        ids=["in", "get", "pop"],
    )
    def test_a_name_that_was_missed_and_created_conflicts(
        self, pool: Any, stocked: Any, look: Any
    ) -> None:
        with refused, pool.transaction() as tx:
            assert not look(tx)
            stocked["new"] = 1
            tx["b"] = 0

    def test_a_name_that_was_seen_and_deleted_conflicts(self, pool: Any, stocked: Any) -> None:
        with refused, pool.transaction() as tx:
            assert "a" in tx
            del stocked["a"]
            tx["b"] = 0

    def test_two_deletes_of_one_name_conflict(self, pool: Any, stocked: Any) -> None:
        with refused, pool.transaction() as tx:
            del tx["a"]
            del stocked["a"]

    def test_sibling_names_do_not_conflict(self, pool: Any, stocked: Any) -> None:
        with pool.transaction() as tx:
            assert (tx["a"], "x" in tx, tx["dir/1"]) == (1, False, 0)
            stocked["b"] = 5
            stocked["a/1"] = 5
            stocked["a0"] = 5
            stocked["dir/"] = 5
            del stocked["dir/2"]
            stocked["xy"] = 5
            tx["c"] = 0
        assert pool["c"] == 0

    def test_long_names_that_share_their_first_600_bytes_do_not_conflict(
        self, pool: Any, stocked: Any
    ) -> None:
        long = "n" * 700
        pool.update({long + "1": 1, long + "2": 2})
        with pool.transaction() as tx:
            assert tx[long + "1"] == 1
            stocked.sync()
            stocked[long + "2"] = 5
            stocked[long + "3"] = 5
            tx["c"] = 0
        with refused, pool.transaction() as tx:
            assert tx[long + "1"] == 1
            stocked[long + "1"] = 5
            tx["c"] = 1

    def test_a_name_of_memory_that_was_looked_up_and_deleted_conflicts(
        self, pool: Any, stocked: Any
    ) -> None:
        with pytest.raises((ConflictError, NotFoundError)), pool.transaction() as tx:
            tx.memory("m").write(0, b"lost")
            del stocked["m"]
            stocked["m"] = 1
        assert pool.sync() and pool["m"] == 1

    def test_writes_to_memory_do_not_conflict_with_who_looked_its_name_up(
        self, pool: Any, stocked: Any
    ) -> None:
        with pool.transaction() as tx:
            assert "m" in tx
            assert tx["m"].size == 16384
            stocked.memory("m").write(0, b"data")
            tx["c"] = 0
        assert pool["c"] == 0

    # Blind writes

    def test_blind_puts_never_conflict_and_the_later_commit_wins(
        self, pool: Any, stocked: Any
    ) -> None:
        with pool.transaction() as tx:
            tx["a"] = "mine"
            tx["new"] = "mine"
            stocked["a"] = "theirs"
            stocked["new"] = "theirs"
        stocked.sync()
        for client in (pool, stocked):
            assert (client["a"], client["new"]) == ("mine", "mine")

    def test_blind_puts_do_not_mind_a_delete(self, pool: Any, stocked: Any) -> None:
        with pool.transaction() as tx:
            tx["a"] = "mine"
            del stocked["a"]
        assert pool["a"] == "mine"

    def test_blind_writes_of_the_same_bytes_never_conflict(self, pool: Any, stocked: Any) -> None:
        with pool.transaction() as tx:
            tx.memory("m").write(0, b"mine")
            tx.array("grid")[1:3, 2:4] = 7
            stocked.memory("m").write(2, b"theirs")
            stocked.array("grid")[...] = 1
        assert pool.memory("m").read(0, 8) == b"mineirs\0"[:4] + b"eirs"
        expected = np.ones((6, 8))
        expected[1:3, 2:4] = 7
        assert np.array_equal(pool.array("grid")[...], expected)

    def test_reading_back_what_it_wrote_is_no_read_of_the_pool(
        self, pool: Any, stocked: Any
    ) -> None:
        with pool.transaction() as tx:
            tx["a"] = "mine"
            assert tx["a"] == "mine"
            assert "a" in tx
            memory = tx.memory("m")
            memory.write(8, b"12345678")
            assert memory.read(10, 4) == b"3456"
            stocked["a"] = "theirs"
            stocked.memory("m").write(8, b"theirs..")
        assert pool["a"] == "mine"
        assert pool.memory("m").read(8, 8) == b"12345678"

    def test_a_blind_put_does_not_replace_memory_made_meanwhile(
        self, pool: Any, stocked: Any
    ) -> None:
        with pytest.raises((ConflictError, ExistsError)), pool.transaction() as tx:
            tx["new"] = 1
            tx["b"] = "lost"
            stocked.allocate("new", 8).write(0, b"kept")
        pool.sync()
        assert pool.memory("new").read(0, 4) == b"kept"
        assert pool["b"] == 2

    def test_of_two_that_allocate_one_name_one_is_refused(self, pool: Any, stocked: Any) -> None:
        with pytest.raises((ConflictError, ExistsError)), pool.transaction() as tx:
            tx.allocate("new", 8).write(0, b"lost")
            stocked.allocate("new", 8).write(0, b"kept")
        pool.sync()
        assert pool.memory("new").read(0, 4) == b"kept"

    # Listings

    @pytest.mark.parametrize(
        "listing",
        [lambda tx: list(tx.names("dir/")), list, len, lambda tx: dict(tx.items()).keys()],
        ids=["names", "iter", "len", "items"],
    )
    @pytest.mark.parametrize("change", ["create", "delete", "allocate"])
    def test_a_listing_conflicts_with_what_appears_or_disappears_in_it(
        self, pool: Any, stocked: Any, listing: Any, change: str
    ) -> None:
        with refused, pool.transaction() as tx:
            assert listing(tx)
            if change == "create":
                stocked["dir/3"] = 1
            elif change == "delete":
                del stocked["dir/1"]
            else:
                stocked.allocate("dir/m", 8)
            tx["c"] = 0

    def test_an_empty_listing_conflicts_with_the_first_name_in_it(
        self, pool: Any, stocked: Any
    ) -> None:
        with refused, pool.transaction() as tx:
            assert list(tx.names("empty/")) == []
            stocked["empty/1"] = 1
            tx["c"] = 0

    def test_a_listing_does_not_conflict_with_names_outside_it(
        self, pool: Any, stocked: Any
    ) -> None:
        with pool.transaction() as tx:
            assert list(tx.names("dir/")) == ["dir/1", "dir/2"]
            stocked["di"] = 1
            stocked["dir"] = 1
            stocked["dir0"] = 1
            stocked["other/1"] = 1
            del stocked["a"]
            tx["c"] = 0
        assert pool["c"] == 0

    def test_a_listing_does_not_conflict_with_changes_of_content(
        self, pool: Any, stocked: Any
    ) -> None:
        with pool.transaction() as tx:
            assert "m" in list(tx.names())
            stocked["dir/1"] = 5
            stocked.memory("m").write(0, b"data")
            tx["c"] = 0
        assert pool["c"] == 0

    def test_a_partly_read_listing_is_never_a_lie(self, pool: Any, stocked: Any) -> None:
        with contextlib.suppress(ConflictError), pool.transaction() as tx:
            first = next(tx.names("dir/"))
            stocked["dir/0"] = 1
            tx["smallest"] = first
        pool.sync()
        assert "smallest" not in pool

    # Bytes

    @pytest.mark.parametrize(
        ("offset", "size"), [(100, 1), (99, 2), (107, 1), (107, 5), (102, 2), (0, 16384), (100, 8)]
    )
    def test_bytes_that_were_read_and_written_conflict(
        self, pool: Any, stocked: Any, offset: int, size: int
    ) -> None:
        with refused, pool.transaction() as tx:
            tx.memory("m").read(100, 8)
            stocked.memory("m").write(offset, b"x" * size)
            tx["c"] = 0

    @pytest.mark.parametrize(("offset", "size"), [(99, 1), (0, 100), (108, 1), (108, 8000)])
    def test_neighbouring_bytes_do_not_conflict(
        self, pool: Any, stocked: Any, offset: int, size: int
    ) -> None:
        with pool.transaction() as tx:
            assert tx.memory("m").read(100, 8) == bytes(8)
            stocked.memory("m").write(offset, b"x" * size)
            tx.memory("m").write(100, b"y")
        assert pool.memory("m").read(100, 8) == b"y" + bytes(7)

    def test_bytes_written_before_the_transaction_began_do_not_conflict(
        self, pool: Any, stocked: Any
    ) -> None:
        stocked.memory("m").write(100, b"before")
        pool.sync()
        with pool.transaction() as tx:
            assert tx.memory("m").read(100, 6) == b"before"
            tx["c"] = 0
        assert pool["c"] == 0

    def test_the_same_bytes_of_other_memory_do_not_conflict(self, pool: Any, stocked: Any) -> None:
        pool.allocate("n", 64)
        with pool.transaction() as tx:
            assert tx.memory("n").read(0, 64) == bytes(64)
            stocked.memory("m").write(0, b"x" * 64)
            tx["c"] = 0
        assert pool["c"] == 0

    def test_a_rewrite_of_the_same_bytes_conflicts(self, pool: Any, stocked: Any) -> None:
        with refused, pool.transaction() as tx:
            tx.memory("m").read(0, 8)
            stocked.memory("m").write(0, bytes(8))
            tx["c"] = 0

    def test_parts_that_were_not_overwritten_count_as_read(self, pool: Any, stocked: Any) -> None:
        with refused, pool.transaction() as tx:
            memory = tx.memory("m")
            memory.write(2, b"mine")
            memory.read(0, 8)
            stocked.memory("m").write(7, b"x")

    def test_parts_that_were_overwritten_do_not_count_as_read(
        self, pool: Any, stocked: Any
    ) -> None:
        with pool.transaction() as tx:
            memory = tx.memory("m")
            memory.write(2, b"mi")
            memory.write(4, b"ne")
            assert memory.read(0, 8) == b"\0\0mine\0\0"
            assert memory.read(2, 4) == b"mine"
            stocked.memory("m").write(3, b"xx")
        assert pool.memory("m").read(0, 8) == b"\0\0mine\0\0"

    def test_neighbouring_elements_do_not_conflict(self, pool: Any, stocked: Any) -> None:
        grid = stocked.array("grid")
        with pool.transaction() as tx:
            mine = tx.array("grid")
            mine[2, 3] += 1
            mine[4] += 1
            grid[2, 2] = grid[2, 4] = grid[1, 3] = grid[3] = 9
            grid[5] = 9
        assert pool.array("grid")[2, 3] == 1
        assert pool.array("grid")[4].tolist() == [1] * 8
        assert pool.array("grid")[3].tolist() == [9] * 8

    def test_an_element_that_was_read_and_written_conflicts(self, pool: Any, stocked: Any) -> None:
        with refused, pool.transaction() as tx:
            tx.array("grid")[2, 3] += 1
            stocked.array("grid")[2:4] = 9

    def test_columns_do_not_conflict(self, pool: Any, stocked: Any) -> None:
        with pool.transaction() as tx:
            tx.array("grid")[:, 1] += 1
            stocked.array("grid")[:, 0] = 5
            stocked.array("grid")[:, 2:] = 5
        stocked.sync()
        expected = np.full((6, 8), 5)
        expected[:, 1] = 1
        assert np.array_equal(stocked.array("grid")[...], expected)
        with refused, pool.transaction() as tx:
            tx.array("grid")[:, 1] += 1
            stocked.array("grid")[4, 1] = 5

    def test_scattered_elements_do_not_conflict_with_those_between(
        self, pool: Any, stocked: Any
    ) -> None:
        with pool.transaction() as tx:
            tx.array("grid")[[0, 2, 4], [0, 0, 0]] += 1
            stocked.array("grid")[[1, 3], [0, 0]] = 5
        assert pool.array("grid")[:, 0].tolist() == [1, 5, 1, 5, 1, 0]

    def test_fetch_add_conflicts_with_who_read_its_bytes_and_with_nobody_else(
        self, pool: Any, stocked: Any
    ) -> None:
        with pool.transaction() as tx:
            tx.memory("m").read(0, 8)
            stocked.memory("m").fetch_add(8, 1)
            tx["c"] = 0
        with refused, pool.transaction() as tx:
            tx.memory("m").read(0, 9)
            stocked.memory("m").fetch_add(8, 1)
            tx["c"] = 1

    def test_fetch_add_in_a_transaction_counts_as_a_read(self, pool: Any, stocked: Any) -> None:
        with refused, pool.transaction() as tx:
            tx["c"] = tx.memory("m").fetch_add(0, 1)
            stocked.memory("m").fetch_add(0, 1)
        pool.sync()
        assert pool.memory("m").fetch_add(0, 0) == 1

    # Deleted and created again

    def test_who_read_bytes_of_deleted_memory_conflicts(self, pool: Any, stocked: Any) -> None:
        with refused, pool.transaction() as tx:
            tx.memory("m").read(0, 8)
            del stocked["m"]
            tx["c"] = 0

    def test_memory_that_was_deleted_and_created_again_fools_no_reader(
        self, pool: Any, stocked: Any
    ) -> None:
        with refused, pool.transaction() as tx:
            tx.memory("m").read(0, 8)
            del stocked["m"]
            stocked.allocate("m", 16384)
            tx["c"] = 0

    def test_memory_that_was_deleted_and_created_again_is_not_written_by_an_old_transaction(
        self, pool: Any, stocked: Any
    ) -> None:
        with pytest.raises((ConflictError, NotFoundError)), pool.transaction() as tx:
            tx.memory("m").write(0, b"old")
            del stocked["m"]
            stocked.allocate("m", 16384)
        pool.sync()
        assert pool.memory("m").read(0, 3) == bytes(3)

    # Serializability and opacity

    def test_write_skew_is_refused(self, pool: Any, stocked: Any) -> None:
        """Each moves by what it read of the other's name: one of them must not commit."""
        with refused, pool.transaction() as mine:
            mine["a"] = mine["b"] - 1
            with stocked.transaction() as theirs:
                theirs["b"] = theirs["a"] - 1
        pool.sync()
        assert (pool["a"], pool["b"]) == (1, 0)

    def test_write_skew_over_listings_is_refused(self, pool: Any, stocked: Any) -> None:
        with refused, pool.transaction() as mine:
            mine["on/1"] = len(list(mine.names("on/")))
            with stocked.transaction() as theirs:
                theirs["on/2"] = len(list(theirs.names("on/")))
        pool.sync()
        assert list(pool.names("on/")) == ["on/2"]

    def test_write_skew_over_bytes_is_refused(self, pool: Any, stocked: Any) -> None:
        with refused, pool.transaction() as mine:
            mine.array("grid")[0, 0] = 1 - mine.array("grid")[0, 1]
            with stocked.transaction() as theirs:
                theirs.array("grid")[0, 1] = 1 - theirs.array("grid")[0, 0]
        pool.sync()
        assert pool.array("grid")[0, :2].tolist() == [0, 1]

    def test_a_lost_update_is_refused(self, pool: Any, stocked: Any) -> None:
        with refused, pool.transaction() as tx:
            tx["a"] += 1
            stocked.run(lambda theirs: theirs.__setitem__("a", theirs["a"] + 1))
        pool.sync()
        assert pool["a"] == 2

    def test_a_refused_transaction_leaves_nothing(self, pool: Any, stocked: Any) -> None:
        with refused, pool.transaction() as tx:
            tx["x"] = tx["a"]
            tx["b"] = 0
            tx.memory("m").write(0, b"lost")
            tx.allocate("y", 8)
            del tx["c"]
            stocked["a"] = 5
        pool.sync()
        assert "x" not in pool and "y" not in pool
        assert (pool["a"], pool["b"], pool["c"]) == (5, 2, 3)
        assert pool.memory("m").read(0, 4) == bytes(4)

    def test_a_refused_transaction_succeeds_when_run_again(self, pool: Any, stocked: Any) -> None:
        for again in (False, True):
            with contextlib.suppress(ConflictError), pool.transaction() as tx:
                tx["b"] = tx["a"] + 1
                if not again:
                    stocked["a"] = 10
            pool.sync()
        assert pool["b"] == 11

    def test_a_transaction_that_only_reads_commits_whatever_happens(
        self, pool: Any, stocked: Any
    ) -> None:
        with pool.transaction() as tx:
            assert (tx["a"], len(tx), tx.memory("m").read(0, 1)) == (1, 7, b"\0")
            stocked["a"] = 5
            stocked["new"] = 5
            stocked.memory("m").write(0, b"x")

    def test_an_aborted_transaction_does_not_conflict_with_anyone(
        self, pool: Any, stocked: Any
    ) -> None:
        with pool.transaction() as tx:
            assert tx["a"] == 1
            with contextlib.suppress(ConflictError), stocked.transaction() as theirs:
                theirs["a"] = theirs["b"]
                theirs.abort()
            tx["c"] = 0
        assert pool["c"] == 0

    def test_a_transaction_never_shows_values_of_two_versions(
        self, pool: Any, stocked: Any
    ) -> None:
        for _ in range(3):
            with contextlib.suppress(ConflictError), pool.transaction() as tx:
                first = tx["dir/1"]
                with stocked.transaction() as theirs:
                    theirs["dir/1"] = first + 1
                    theirs["dir/2"] = first + 1
                assert tx["dir/2"] == first
            pool.sync()

    def test_a_transaction_never_shows_bytes_of_two_versions(self, pool: Any, stocked: Any) -> None:
        for number in range(1, 4):
            with contextlib.suppress(ConflictError), pool.transaction() as tx:
                memory = tx.memory("m")
                first = memory.read(0, 100)
                with stocked.transaction() as theirs:
                    theirs.memory("m").write(0, bytes([number]) * 16384)
                assert memory.read(8000, 100) == first
            pool.sync()

    def test_a_transaction_never_shows_a_name_and_bytes_of_two_versions(
        self, pool: Any, stocked: Any
    ) -> None:
        with contextlib.suppress(ConflictError), pool.transaction() as tx:
            assert tx["a"] == 1
            with stocked.transaction() as theirs:
                theirs["a"] = 2
                theirs.memory("m").write(0, b"\2")
                theirs["new"] = 2
                del theirs["b"]
            assert tx.memory("m")[0] == 0
            assert "new" not in tx
            assert "b" in list(tx)
            assert tx["b"] == 2

    def test_a_transaction_never_shows_what_was_committed_after_it_began_to_read(
        self, pool: Any, stocked: Any
    ) -> None:
        with contextlib.suppress(ConflictError), pool.transaction() as tx:
            assert tx["a"] == 1
            stocked["b"] = 20
            assert tx["b"] == 2

    def test_three_transactions_in_a_cycle_do_not_all_commit(
        self, pool: Any, stocked: Any, harness: Any
    ) -> None:
        clients = [pool, stocked, harness.open()]
        names = ["a", "b", "c"]
        committed = 0
        with contextlib.ExitStack() as stack:
            txs = [stack.enter_context(_Refusable(client)) for client in clients]
            for number, one in enumerate(txs):
                one.tx[names[number]] = one.tx[names[(number + 1) % 3]]
        committed = sum(one.committed for one in txs)
        assert 1 <= committed < 3

    def test_a_conflict_says_what_and_since_when(self, pool: Any, stocked: Any) -> None:
        cases = [
            (lambda tx: tx["a"], lambda: stocked.update(a=5), "a"),
            (lambda tx: list(tx.names("dir/")), lambda: stocked.update({"dir/9": 5}), "dir/"),
            (
                lambda tx: tx.memory("m").read(0, 8),
                lambda: stocked.memory("m").write(0, b"x"),
                "0|m",
            ),
        ]
        for read, change, mention in cases:
            with pytest.raises(ConflictError, match=mention) as caught, pool.transaction() as tx:
                read(tx)
                change()
                tx["c"] = 0
            assert isinstance(caught.value, EverpoolError)
            assert any(character.isdigit() for character in str(caught.value))
            pool.sync()


class _Refusable:
    """A transaction that notes whether it was committed instead of raising a conflict."""

    def __init__(self, client: Any) -> None:
        self.context = client.transaction()
        self.committed = False

    def __enter__(self) -> "_Refusable":
        self.tx = self.context.__enter__()
        return self

    def __exit__(self, *error: Any) -> bool:
        try:
            self.context.__exit__(*error)
            self.committed = error[0] is None
        except ConflictError:
            self.committed = False
        return True
