"""The guarantees of a pool as tests, one guarantee each, for every engine to subclass.

    class TestMyEngine(PoolConformance):
        def make_pool(self, tmp_path):
            return Harness(lambda: everpool.open(tmp_path / "pool"))

The names of the tests state the guarantees. Where a test has two clients, `pool` and `other` are
opened separately on one pool, as two processes would; an engine whose clients lag behind the log
is asked to `sync()` before it must see what the other committed. To have the assertions of these
modules explained by pytest, call `pytest.register_assert_rewrite("everpool.testing")` before
importing them.
"""

from everpool.testing.conformance.base import ConformanceBase
from everpool.testing.conformance.clients import ClientGuarantees
from everpool.testing.conformance.conflicts import ConflictGuarantees
from everpool.testing.conformance.mapping import MappingGuarantees
from everpool.testing.conformance.memory import ArrayGuarantees, MemoryGuarantees
from everpool.testing.conformance.transactions import PipelineGuarantees, TransactionGuarantees
from everpool.testing.conformance.values import ValueGuarantees
from everpool.testing.conformance.watching import WatchGuarantees
from everpool.testing.harness import Harness

__all__ = ["ConformanceBase", "Harness", "PoolConformance", "SharingConformance"]


class SharingConformance(
    MemoryGuarantees,
    ArrayGuarantees,
    TransactionGuarantees,
    ConflictGuarantees,
    PipelineGuarantees,
    WatchGuarantees,
    ClientGuarantees,
):
    """The guarantees that several clients take part in."""


class PoolConformance(MappingGuarantees, ValueGuarantees, SharingConformance):
    """Every guarantee of the public contract. Subclass it and override `make_pool`."""
