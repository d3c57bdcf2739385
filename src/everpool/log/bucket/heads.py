"""The head of a log as this process knows it: asked for, adopted, and waited for."""

import random
import threading
from collections.abc import Callable
from typing import NamedTuple

from everpool.errors import CorruptionError, EverpoolError, NotFoundError, UnavailableError
from everpool.log.bucket.clock import StoreClock
from everpool.log.bucket.format import Head, decode_head
from everpool.store import Store

_NO_HEAD = Head(b"", b"", 0, 0, 0, 0, b"", (), ())


class Known(NamedTuple):
    """A head, its tag (None: there is none yet), and when the request began that brought it."""

    head: Head
    e_tag: str | None
    asked: float


class Heads:
    """The newest head that is known of one log.

    It is asked for by who wants it, and, while somebody waits for news, after `busy_poll_s` when
    something happened lately, and ever less often down to every `idle_poll_s`. Whoever waits for
    one waits for the condition `changed`. `where` names the log in messages.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        where: str,
        changed: threading.Condition,
        clock: StoreClock,
        *,
        busy_poll_s: float,
        idle_poll_s: float,
        monotonic: Callable[[], float],
        chance: random.Random,
    ) -> None:
        self._store = store
        self._key = key
        self._where = where
        self._changed = changed
        self._clock = clock
        self._busy_poll_s, self._idle_poll_s = busy_poll_s, idle_poll_s
        self._monotonic = monotonic
        self._chance = chance
        self._polling = False
        self._poll_s = busy_poll_s
        self._next_poll = 0.0
        # The newest head, and why the store could not be reached when it was last asked.
        self.known: Known | None = None
        self.trouble: EverpoolError | None = None

    def refresh(self) -> Known:
        """Read the head; returns what was in force at some moment of this call, or later."""
        before = self.known
        asked = self._monotonic()
        try:
            if before is None or before.e_tag is None or self._clock.wants():
                found = self._store.get(self._key)
            else:
                found = self._store.get_if_changed(self._key, before.e_tag)
        except NotFoundError:
            if before is not None and before.e_tag is not None:
                raise self._went_back("its head is gone", "gone") from None
            return Known(_NO_HEAD, None, asked)
        self.trouble = None
        if found is None:
            assert before is not None
            return self.adopt(before._replace(asked=asked))
        head = decode_head(found.data)
        self._clock.saw(found.e_tag, found.modified_ns)
        if before is not None and before.head.log_id != head.log_id:
            raise self._went_back("it was created anew", "anew")
        if before is not None and before.head.generation > head.generation:
            raise self._went_back(f"it ends at {head.end}, after {before.head.end}", "shorter")
        return self.adopt(Known(head, found.e_tag, asked))

    def _went_back(self, how: str, went_back: str) -> CorruptionError:
        return CorruptionError(
            f"{self._where} is not the log that it was, {how}: restore it from a copy,"
            " or open the pool again",
            went_back=went_back,
        )

    def adopt(self, known: Known, *, own: bool = False) -> Known:
        """Keep the newest head, and wake who waits for one; returns the newest.

        One that was swapped in here (`own`) is as good as an answer: the next question can wait.
        """
        with self._changed:
            current = self.known
            if current is None or known.head.generation > current.head.generation:
                self._poll_s = self._busy_poll_s
                due = self._monotonic() + self._poll_s
                self._next_poll = due if own else min(self._next_poll, due)
                self.known = known
                self._changed.notify_all()
            elif known.e_tag == current.e_tag and known.asked > current.asked:
                self.known = known
            assert self.known is not None
            return self.known

    def wait(self, after: int, timeout_s: float, check_open: Callable[[], None]) -> bool:
        """Wait for an entry behind `after`; all who wait share the requests.

        `check_open` is called again and again, and raises when the log was closed.
        """
        deadline = self._monotonic() + timeout_s
        while True:
            with self._changed:
                while True:
                    check_open()
                    if self.known is not None and self.known.head.end > after:
                        return True
                    now = self._monotonic()
                    if now >= deadline:
                        return False
                    due = deadline if self._polling else min(deadline, self._next_poll)
                    if not self._polling and now >= self._next_poll:
                        self._polling = True
                        break
                    self._changed.wait(due - now)
            self._poll()

    def _poll(self) -> None:
        """Ask the store once, and see when to ask again."""
        before = self._generation()
        try:
            self.refresh()
        except UnavailableError as error:
            self.trouble = error
        finally:
            with self._changed:
                self._polling = False
                if self._generation() == before:
                    self._poll_s = min(1.5 * self._poll_s, self._idle_poll_s)
                pause_s = self._poll_s * self._chance.uniform(0.75, 1.25)
                self._next_poll = self._monotonic() + pause_s
                self._changed.notify_all()

    def _generation(self) -> int:
        return self.known.head.generation if self.known is not None else 0
