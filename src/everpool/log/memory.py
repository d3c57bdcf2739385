"""A log in memory: the reference that other engines are compared with, for tests and simulation."""

import threading
import time
from bisect import bisect_right
from collections.abc import Callable

from everpool.errors import ClosedError, ConflictError, InvalidError, NotFoundError
from everpool.log import Appended


class MemoryLog:
    """A `Log` that lives and dies with its process. Appends never lose their answer.

    `clock_ns` gives the time stamps. The bytes of an entry are copied once, when it is appended.
    """

    def __init__(self, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._clock_ns = clock_ns
        self._changed = threading.Condition()
        self._entries: list[Appended] = []
        self._end = 0
        self._trimmed = 0
        self._time_ns = 0
        self._closed = False

    def append(self, entry: bytes, expected: int | None = None) -> int:
        """Append `entry` and return its position, the last one plus 1."""
        data = bytes(entry)
        if not data:
            raise InvalidError("an entry without bytes cannot be appended")
        with self._changed:
            self._check_open()
            if expected is not None and expected != self._end:
                raise ConflictError(
                    f"the log ends at {self._end}, not at {expected}",
                    end=self._end,
                    expected=expected,
                )
            self._end += 1
            self._time_ns = max(self._time_ns, self._clock_ns())
            self._entries.append(Appended(self._end, self._time_ns, data))
            self._changed.notify_all()
            return self._end

    def read(self, after: int, limit_bytes: int = 1 << 20) -> list[Appended]:
        """Return the entries behind `after`; see `Log.read`."""
        with self._changed:
            self._check_open()
            if after < self._trimmed:
                raise NotFoundError(
                    f"the log was trimmed up to {self._trimmed}, it cannot be read behind {after}:"
                    " start from a checkpoint",
                    trimmed=self._trimmed,
                    after=after,
                )
            first = bisect_right(self._entries, after, key=_position)
            found: list[Appended] = []
            size = 0
            for at in range(first, len(self._entries)):
                item = self._entries[at]
                size += len(item.entry)
                if found and size > limit_bytes:
                    break
                found.append(item)
            return found

    def end(self) -> int:
        """Return the position of the last entry ever appended, trimmed or not."""
        with self._changed:
            self._check_open()
            return self._end

    def wait(self, after: int, timeout_s: float) -> bool:
        """Wait for an entry behind `after`; False when there is none after `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._end > after, timeout_s)
            self._check_open()
            return self._end > after

    def trim(self, position: int) -> None:
        """Drop the entries up to `position`."""
        with self._changed:
            self._check_open()
            self._trimmed = max(self._trimmed, min(position, self._end))
            del self._entries[: bisect_right(self._entries, self._trimmed, key=_position)]

    def close(self) -> None:
        """Wake who waits, and refuse every later call."""
        with self._changed:
            self._closed = True
            self._entries.clear()
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the log is closed")


def _position(item: Appended) -> int:
    return item.position
