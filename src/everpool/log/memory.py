"""A log in memory: the reference that other engines are compared with, for tests and simulation."""

import threading
import time
from bisect import bisect_right
from collections.abc import Callable

from everpool.errors import ClosedError, ConflictError, InvalidError, NotFoundError
from everpool.log import NOTE_BYTES, Appended, End


class Tape:
    """What the clients of one log in memory share."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.entries: list[Appended] = []
        self.end = End(0, 0, b"")
        self.time_ns = 0


class MemoryLog:
    """A `Log` that lives and dies with its process. Appends never lose their answer.

    `clock_ns` gives the time stamps. The bytes of an entry are copied once, when it is appended.
    Logs with one `tape` are clients of one log.
    """

    def __init__(
        self, clock_ns: Callable[[], int] = time.time_ns, tape: Tape | None = None
    ) -> None:
        self._clock_ns = clock_ns
        self._tape = tape or Tape()
        self._changed = self._tape.changed
        self._closed = False

    def append(self, entry: bytes, expected: int | None = None) -> int:
        """Append `entry` and return its position, the last one plus 1."""
        data = bytes(entry)
        if not data:
            raise InvalidError("an entry without bytes cannot be appended")
        tape = self._tape
        with self._changed:
            self._check_open()
            end = tape.end.position
            if expected is not None and expected != end:
                raise ConflictError(
                    f"the log ends at {end}, not at {expected}", end=end, expected=expected
                )
            tape.end = tape.end._replace(position=end + 1)
            tape.time_ns = max(tape.time_ns, self._clock_ns())
            tape.entries.append(Appended(end + 1, tape.time_ns, data))
            self._changed.notify_all()
            return end + 1

    def read(self, after: int, limit_bytes: int = 1 << 20) -> list[Appended]:
        """Return the entries behind `after`; see `Log.read`."""
        with self._changed:
            self._check_open()
            trimmed = self._tape.end.trimmed
            if after < trimmed:
                raise NotFoundError(
                    f"the log was trimmed up to {trimmed}, it cannot be read behind {after}:"
                    " start from a checkpoint",
                    trimmed=trimmed,
                    after=after,
                )
            entries = self._tape.entries
            first = bisect_right(entries, after, key=_position)
            found: list[Appended] = []
            size = 0
            for at in range(first, len(entries)):
                item = entries[at]
                size += len(item.entry)
                if found and size > limit_bytes:
                    break
                found.append(item)
            return found

    def end(self) -> End:
        """Return the position of the last entry ever appended, and the last trim."""
        with self._changed:
            self._check_open()
            return self._tape.end

    def wait(self, after: int, timeout_s: float) -> bool:
        """Wait for an entry behind `after`; False when there is none after `timeout_s`."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._tape.end.position > after, timeout_s
            )
            self._check_open()
            return self._tape.end.position > after

    def trim(self, position: int, start: bytes) -> None:
        """Drop the entries up to `position`, and keep `start`."""
        if len(start) > NOTE_BYTES:
            raise InvalidError(f"a note of {len(start)} bytes is too long: {NOTE_BYTES} at most")
        tape = self._tape
        with self._changed:
            self._check_open()
            position = min(position, tape.end.position)
            if position >= tape.end.trimmed:
                tape.end = tape.end._replace(trimmed=position, start=bytes(start))
                del tape.entries[: bisect_right(tape.entries, position, key=_position)]

    def close(self) -> None:
        """Wake who waits, and refuse every later call."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the log is closed")


def _position(item: Appended) -> int:
    return item.position
