"""The store's clock, as far as its answers tell of it."""

import threading
from collections.abc import Callable

_GRANULARITY_NS = 1_000_000_000
# A clock that moved against the monotonic one by more than this was set.
_SET_NS = 1_000_000_000


class StoreClock:
    """This machine's clock, put right where the store has proved it wrong.

    An object's time of modification is the store's clock at its swap. Seen from elsewhere, the
    store's clock is at least that; if the swap was our own, it was at most that when the swap was
    sent. Times are in nanoseconds since 1970; stores round theirs down to seconds. When this
    machine's clock is set, which the monotonic one tells, all that was learned is forgotten.
    """

    def __init__(self, clock_ns: Callable[[], int], monotonic: Callable[[], float]) -> None:
        self._clock_ns = clock_ns
        self._monotonic = monotonic
        self._apart: int | None = None
        self._lock = threading.Lock()
        self._least: int | None = None
        self._most: int | None = None
        self._sent: tuple[str, int] | None = None

    def now_ns(self) -> int:
        """Return the time."""
        offset = 0
        with self._lock:
            now = self._read()
            if self._most is not None:
                offset = min(offset, self._most)
            if self._least is not None:
                offset = max(offset, self._least)
        return now + offset

    def _read(self) -> int:
        """Return this machine's time; the lock must be held."""
        now = self._clock_ns()
        apart = now - int(self._monotonic() * 1e9)
        if self._apart is not None and abs(apart - self._apart) > _SET_NS:
            self._least = self._most = self._sent = None
        self._apart = apart
        return now

    def sending(self) -> int:
        """Return what `sent` wants to know of the moment before a swap."""
        return self._clock_ns()

    def sent(self, e_tag: str, sending: int) -> None:
        """A swap of ours, sent then, has left this tag."""
        with self._lock:
            if self._most is None:
                self._sent = (e_tag, sending)

    def wants(self) -> bool:
        """Whether to see the time of our own swap would teach anything."""
        return self._sent is not None

    def saw(self, e_tag: str, modified_ns: int) -> None:
        """An object with this tag was modified then."""
        with self._lock:
            at_least = modified_ns - self._read()
            self._least = at_least if self._least is None else max(self._least, at_least)
            if self._sent is not None and self._sent[0] == e_tag:
                self._most = modified_ns + _GRANULARITY_NS - self._sent[1]
            self._sent = None
