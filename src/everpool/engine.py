"""What a pool needs of its engine: the seam between what a user touches and where the log lives."""

from collections.abc import Callable
from typing import Any, Protocol

from everpool.commit import Submission
from everpool.records import Record, RecordId, Reference
from everpool.replica.bulk import Staged
from everpool.replica.replica import Replica
from everpool.replica.verify import Report
from everpool.values import Encoded

# Larger values go to files or segments of their own.
INLINE_BYTES = 64 << 10
DEFAULT_TIMEOUT_S = 30.0


class Engine(Protocol):
    """One process's way to one pool. Threads share it; a forked child needs one of its own."""

    replica: Replica
    read_only: bool
    timeout_s: float
    generation: int
    lineage: bytes
    """What the histories of two engines of one pool have in common when it is equal.

    Then a version, or an object's id, means the same in both.
    """

    def is_ours(self) -> bool:
        """Whether this process opened the engine, and did not inherit it by a fork."""
        ...

    def release(self) -> None:
        """Give the engine back; its last user closes it."""
        ...

    def reopener(self, read_only: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return what opens the pool in another process, for pickling."""
        ...

    def write(self, record: Record, staged: list[Staged]) -> Submission:
        """Commit a record and wait for its outcome."""
        ...

    def pipeline(self, record: Record, staged: list[Staged]) -> Submission:
        """Queue a record and return at once."""
        ...

    def stage(self, encoded: Encoded) -> Staged:
        """Store a large value durably, for a record to name."""
        ...

    def stage_bytes(self, data: memoryview) -> Staged:
        """Store a large piece of memory durably, for a record to name."""
        ...

    def settle(self) -> None:
        """Bring mapped memory up to the index."""
        ...

    def drain(self) -> None:
        """Return when everything that was submitted before has an outcome."""
        ...

    def sync(self) -> int:
        """Wait for what was submitted; returns the version, of everything committed before."""
        ...

    def outcome(self, id: RecordId) -> tuple[str, int | None, list[bytes]]:
        """Settle what became of a record: its state, version and results."""
        ...

    def begin_past(self, version: int | None = None) -> None:
        """Keep a past from now on, where that is not done from the start.

        Raises `InvalidError` when `version` is of before the past began.
        """
        ...

    def again(self, reference: Reference) -> tuple[Reference, list[Staged]]:
        """Return what a record names to bind a large value of the past, and what was stored."""
        ...

    def backup(self, url: str, progress: Callable[[int, int], None] | None) -> int:
        """Make a checkpoint, and have a pool at the URL begin with it; returns its version."""
        ...

    def past(self, version: int) -> "Callable[[bool], Engine]":
        """Return what opens the pool as it was at a version."""
        ...

    def version_at(self, time_ns: int) -> int:
        """Return the newest version that is not younger than a time."""
        ...

    def branch(self, url: str, version: int) -> None:
        """Make a pool at a URL that begins as this was at a version, and shares its segments."""
        ...

    def lock(self, name: str, period_s: float | None) -> None:
        """Make a locked snapshot of the newest version; see `Pool.snapshot`."""
        ...

    def checkpoint(self) -> int:
        """Make a checkpoint now; returns its version."""
        ...

    def collect(
        self, dry_run: bool, progress: Callable[[dict[str, Any]], None] | None
    ) -> dict[str, Any]:
        """Delete what nothing needs from where the past lies; returns what was done."""
        ...

    def stats(self) -> dict[str, Any]:
        """Return facts about the pool and this process's replica of it."""
        ...

    def verify(self, progress: Callable[[int, int], None] | None) -> Report:
        """Compare everything with its checksums."""
        ...
