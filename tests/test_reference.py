"""The suites run on the reference pool: the specification agrees with itself."""

from pathlib import Path

from everpool.testing.conformance import Harness, PoolConformance
from everpool.testing.reference import ReferencePool
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
