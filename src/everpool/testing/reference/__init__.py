"""A naive pool in one process's memory: the specification, and the model that tests compare with.

Everything happens under one lock. The log is a list of records that is never trimmed, and every
name and every memory object keeps its whole history, so a transaction simply reads as of its
snapshot. The rule that decides whether a record commits is `conflict`, written in the most obvious
way. Nothing here is fast, and nothing outlives the process.

    pool = ReferencePool()
    other = pool.connect()          # another client of the same pool, as if in another process
"""

from everpool.testing.reference.log import ReadSet, WriteSet, conflict
from everpool.testing.reference.pool import ReferencePool
from everpool.testing.reference.transaction import ReferenceTransaction

__all__ = ["ReadSet", "ReferencePool", "ReferenceTransaction", "WriteSet", "conflict"]
