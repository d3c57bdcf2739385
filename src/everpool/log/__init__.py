"""The log of a pool: entries in one total order, which every replica plays.

A log engine keeps bytes; what they mean is the business of `everpool.records`, and what becomes of
them that of `everpool.verdict`. An engine must be right about three things only: one order for
all, durability, and an end that is not stale. It may deliver an entry twice when a writer sends
it twice: duplicates, gaps and reordered entries of a session are sorted out by the verdict.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from everpool.store import Listed

NOTE_BYTES = 16 << 10
"""How long the note of a trim may be."""


class Appended(NamedTuple):
    """One entry of the log, where it stands and when the engine took it."""

    position: int
    time_ns: int
    entry: bytes


class End(NamedTuple):
    """Where a log ends and where it begins.

    The last entry is at `position` (0: there never was one). Entries up to `trimmed` may be gone:
    who has not played them begins with `start`, the note that came with the trim.
    """

    position: int
    trimmed: int
    start: bytes


class Log(Protocol):
    """Where entries are appended and read, by any number of writers and readers.

    *Order.* Positions are above zero and grow along the log; they may skip numbers. All readers
    see the same entries at the same positions, and an entry never changes.

    *Time.* `time_ns` is the engine's clock in nanoseconds since 1970, raised to at least that of
    the entry before: equal for all readers, and never falling along the log.

    *Threads.* All methods may be called from several threads at once. After `close` they raise
    `ClosedError`.
    """

    def append(self, entry: bytes, expected: int | None = None) -> int:
        """Append `entry`, durably, and return its position.

        When it returns, the entry survives everything the engine promises to survive, and stands
        behind every entry whose `append` had returned before this call. With `expected`, the
        entry is appended only if the log still ends at that position (0: is empty).

        Raises `ConflictError` when the log ends elsewhere, and `UnavailableError` when the engine
        is certain that the entry is not in the log and will not come into it: both may be sent
        again freely. Raises `CommitUnknownError` when the answer was lost: the entry may stand in
        the log already, may still come, or never. Then only the log itself tells; sending the
        same records again is safe, for the verdict voids the second of two.
        """
        ...

    def read(self, after: int, limit_bytes: int = 1 << 20) -> list[Appended]:
        """Return the entries behind position `after`, in order and without a gap.

        Returns what is at hand without waiting, at most `limit_bytes` of entries but always one
        when there is one. An empty list means that nothing behind `after` has been heard of; it
        may be stale. Raises `NotFoundError` when an entry behind `after` was trimmed: the reader
        must start from a checkpoint.
        """
        ...

    def end(self) -> End:
        """Return where the log ends and begins; never a stale answer.

        Every entry whose `append` returned before this call, anywhere, stands at or before the
        position returned, and every `trim` that returned is in it. Who has played the log up to
        that position has seen them all. Raises `UnavailableError` when this cannot be learned now.
        """
        ...

    def wait(self, after: int, timeout_s: float) -> bool:
        """Wait until `read(after)` has something to return; False when `timeout_s` ran out."""
        ...

    def trim(self, position: int, start: bytes) -> None:
        """Allow the engine to drop the entries up to `position`, which a checkpoint covers.

        `start` says where that checkpoint is, in at most 16 KiB that the engine does not look
        into; `end` returns it. Positions are never given out again. A trim of less than was
        trimmed already changes nothing; trimming later or twice is harmless.

        Raises `UnavailableError` when it could not be done or its answer was lost: call it again.
        """
        ...

    def close(self) -> None:
        """Release what the engine holds; calls that wait are woken. May be called twice."""
        ...


class ArchivedLog(Log, Protocol):
    """A log that keeps what was trimmed, until it is collected."""

    def history(self, after: int, last: int | None = None) -> Iterator[Appended]:
        """Yield the entries behind `after`, trimmed or not, up to `last`, or to the end.

        Raises `NotFoundError` for entries that were collected.
        """
        ...

    def garbage(self, kept: Sequence[tuple[int, int]]) -> Iterator[Listed]:
        """Yield the objects that only trimmed entries outside of all spans need.

        A span (after, last) is the positions behind `after` up to `last`. They may be deleted, in
        this order, by anybody, at any time. What is yielded depends on nothing that is deleted
        only later.
        """
        ...
