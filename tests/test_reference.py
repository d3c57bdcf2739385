"""The suites run on the reference pool, and notice a reference whose rule is broken."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from everpool.testing.conformance import Harness, PoolConformance
from everpool.testing.reference import ReadSet, ReferencePool, WriteSet, conflict
from everpool.testing.stateful import pool_machine


def make_pool() -> Harness:
    """Return a harness for a new reference pool."""
    pool = ReferencePool()
    return Harness(pool.connect)


class TestReferenceConformance(PoolConformance):
    def make_pool(self, tmp_path: Path) -> Harness:
        return make_pool()


class TestReferenceStateful(pool_machine(make_pool).TestCase):
    pass


def ranges_not_checked(reads: ReadSet, later: list[WriteSet]) -> str | None:
    return conflict(ReadSet(reads.names, reads.prefixes), later)


def names_not_checked(reads: ReadSet, later: list[WriteSet]) -> str | None:
    return conflict(ReadSet(set(), reads.prefixes, reads.ranges), later)


def listings_not_checked(reads: ReadSet, later: list[WriteSet]) -> str | None:
    return conflict(ReadSet(reads.names, set(), reads.ranges), later)


def last_byte_not_checked(reads: ReadSet, later: list[WriteSet]) -> str | None:
    shorter = {(object_id, start, stop - 1) for object_id, start, stop in reads.ranges}
    return conflict(ReadSet(reads.names, reads.prefixes, shorter), later)


def ranges_rounded_up(reads: ReadSet, later: list[WriteSet]) -> str | None:
    wider = {(id, start // 16 * 16, -(-stop // 16) * 16) for id, start, stop in reads.ranges}
    return conflict(ReadSet(reads.names, reads.prefixes, wider), later)


def listings_widened(reads: ReadSet, later: list[WriteSet]) -> str | None:
    return conflict(ReadSet(reads.names, {"" for _ in reads.prefixes}, reads.ranges), later)


def listings_touched_by_puts(reads: ReadSet, later: list[WriteSet]) -> str | None:
    return conflict(reads, [WriteSet(each.names, each.names, each.ranges) for each in later])


def first_commit_not_checked(reads: ReadSet, later: list[WriteSet]) -> str | None:
    return conflict(reads, later[1:])


@pytest.mark.parametrize(
    "rule",
    [
        ranges_not_checked,
        names_not_checked,
        listings_not_checked,
        last_byte_not_checked,
        ranges_rounded_up,
        listings_widened,
        listings_touched_by_puts,
        first_commit_not_checked,
    ],
)
def test_the_state_machine_notices_a_broken_rule(
    rule: Callable[[ReadSet, list[WriteSet]], str | None],
) -> None:
    """Missed conflicts are found, and needless ones too."""

    def make_broken_pool() -> Harness:
        return Harness(ReferencePool(rule=rule).connect)

    thorough = settings(max_examples=1000, phases=[Phase.generate], database=None, derandomize=True)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(pool_machine(make_broken_pool), settings=thorough)


def test_no_guarantee_hides_another_of_the_same_name() -> None:
    names = [
        name
        for group in PoolConformance.__mro__
        for name in vars(group)
        if name.startswith("test_")
    ]
    assert len(names) == len(set(names))
