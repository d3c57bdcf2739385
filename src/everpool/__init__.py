"""Everpool: one named, byte-addressable, transactional pool of memory that survives crashes."""

from everpool.errors import (
    ClosedError,
    CommitUnknownError,
    ConflictError,
    CorruptionError,
    EverpoolError,
    ExistsError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from everpool.memory import Array, Memory
from everpool.opening import open_pool as open
from everpool.pool import Outcome, Pool
from everpool.records import RecordId
from everpool.recovery import undelete
from everpool.snapshots import Collected, Retention, Snapshot
from everpool.transaction import Transaction
from everpool.watch import Change, Watch

__version__ = "0.1.0"

__all__ = [
    "Array",
    "Change",
    "ClosedError",
    "Collected",
    "CommitUnknownError",
    "ConflictError",
    "CorruptionError",
    "EverpoolError",
    "ExistsError",
    "InvalidError",
    "Memory",
    "NotFoundError",
    "Outcome",
    "Pool",
    "RecordId",
    "Retention",
    "Snapshot",
    "Transaction",
    "UnavailableError",
    "Watch",
    "open",
    "undelete",
]
