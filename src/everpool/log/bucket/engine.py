"""The log in a bucket: one head object, replaced by compare-and-swap, and immutable chunks.

A lost answer is settled by looking for the append's own id. All attempts at one append are based
on heads in the order in which these were in force, and none is based on a newer head before the
entries between the two were looked through: so at most one of them takes effect, however late the
store receives them.
"""

import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from xxhash import xxh3_128_digest

from everpool.errors import (
    ClosedError,
    CommitUnknownError,
    ConflictError,
    CorruptionError,
    EverpoolError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from everpool.log import NOTE_BYTES, Appended, End
from everpool.log.bucket.archive import Archive
from everpool.log.bucket.clock import StoreClock
from everpool.log.bucket.draft import Draft
from everpool.log.bucket.format import (
    ENTRY_BYTES,
    HEAD_KEY,
    Head,
    Stored,
    decode_head,
)
from everpool.log.bucket.turns import Turns
from everpool.store import Listed, Store, check_key

_FOREVER = 1 << 62
_MOST_WAITING = 1024
_FIRST_PAUSE_S = 0.02
_MOST_PAUSE_S = 1.0
_MOST_LOOKS = 24
_MOST_SWAPS = 4
_NO_HEAD = Head(b"", b"", 0, 0, 0, 0, b"", (), ())


class _Known(NamedTuple):
    """A head, its tag (None: there is none yet), and when the request began that brought it."""

    head: Head
    e_tag: str | None
    asked: float


class _Waiter:
    """Something that waits to be swapped in."""

    def __init__(self, id: bytes, arrived: float, deadline: float) -> None:
        self.id = id
        self.arrived = arrived
        self.deadline = deadline
        self.done = False
        self.position = 0
        self.error: EverpoolError | None = None
        # While an attempt may have taken effect, or may still: the head it was based on, and the
        # position behind which the entry would stand.
        self.doubtful = False
        self.base: str | None = None
        self.after = 0

    def clear(self) -> None:
        """No attempt so far has taken effect, nor will."""
        self.doubtful = False
        self.base = None


class _Append(_Waiter):
    def __init__(
        self,
        id: bytes,
        arrived: float,
        deadline: float,
        stored: Stored,
        data: bytes,
        expected: int | None,
    ) -> None:
        super().__init__(id, arrived, deadline)
        self.stored = stored
        self.data = data
        self.expected = expected

    def place(self, draft: Draft) -> bool | None:
        """Put it into the draft; None: not in this swap, False: never."""
        if self.expected is not None and self.expected != draft.end:
            self.position = draft.end
            return False
        if not draft.append(self.stored):
            return None
        self.position = draft.end
        return True


class _Trim(_Waiter):
    def __init__(
        self, id: bytes, arrived: float, deadline: float, position: int, note: bytes
    ) -> None:
        super().__init__(id, arrived, deadline)
        self.upto = position
        self.note = note


_Ticket = _Append | _Trim


class BucketLog:
    """A `Log` in the folder `prefix` of `store`, which is created with the first append.

    *Durability.* That of the store: an append returns when the store has acknowledged the head.
    *Cost.* An append that nobody contends with is one request; a full head (`head_bytes`) adds
    one that seals it, an entry of more than half of that one of its own. Threads that append at
    the same time share a swap.
    *Waiting.* `append` and `trim` give up `timeout_s` after they began, and may take one request
    longer; `wait` asks the store after `busy_poll_s` when something happened lately, and ever
    less often down to every `idle_poll_s`.
    *Time.* The store's clock, as far as its answers tell of it, else that of this machine.

    Trimmed chunks stay in the store, as an archive: `everpool.log.bucket.format` names them, and
    who collects them lists the folder. The store is not closed with the log.
    """

    def __init__(
        self,
        store: Store,
        prefix: str = "log",
        *,
        timeout_s: float = 30.0,
        head_bytes: int = 64 << 10,
        busy_poll_s: float = 0.01,
        idle_poll_s: float = 1.0,
        cache_bytes: int = 32 << 20,
        clock_ns: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], float] = time.monotonic,
        chance: random.Random | None = None,
    ) -> None:
        check_key(prefix)
        self._store = store
        self._prefix = prefix
        self._head_key = f"{prefix}/{HEAD_KEY}"
        self._timeout_s = timeout_s
        self._head_bytes = head_bytes
        self._busy_poll_s, self._idle_poll_s = busy_poll_s, idle_poll_s
        self._monotonic = monotonic
        # Ids must differ between processes that were forked, or began with the same seed.
        self._chance = chance or random.Random(secrets.randbits(128))
        self._writer = self._chance.randbytes(8)
        self._archive = Archive(store, prefix, cache_bytes)
        self._clock = StoreClock(clock_ns, monotonic)
        self._turns = Turns(self._writer, self._chance)
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._known: _Known | None = None
        self._waiting: list[_Ticket] = []
        self._leading = False
        self._polling = False
        self._poll_s = busy_poll_s
        self._next_poll = 0.0
        self._trouble: EverpoolError | None = None
        self._swappers: ThreadPoolExecutor | None = None
        self._closed = False

    # Appending and trimming

    def append(self, entry: bytes, expected: int | None = None) -> int:
        """Append `entry` and return its position, the last one plus 1; see `Log.append`."""
        data = bytes(entry)
        if not 0 < len(data) <= ENTRY_BYTES:
            raise InvalidError(
                f"an entry has 1 to {ENTRY_BYTES} bytes, not {len(data)}: append less at a time"
            )
        self._check_open()
        now = self._monotonic()
        with self._changed:
            id = self._chance.randbytes(16)
        stored = Stored(id, self._writer, 0, len(data), data)
        if len(data) > self._head_bytes // 2:
            known = self._known or self._refresh()
            hash = xxh3_128_digest(data)
            stored = stored._replace(data=None, hash=hash, put_at=known.head.end)
            self._store.put(f"{self._prefix}/{stored.key}", data)
        return self._submit(_Append(id, now, now + self._timeout_s, stored, data, expected))

    def trim(self, position: int, start: bytes) -> None:
        """Drop what is sealed up to `position` from the head, and keep `start`; see `Log.trim`."""
        if len(start) > NOTE_BYTES:
            raise InvalidError(f"a note of {len(start)} bytes is too long: {NOTE_BYTES} at most")
        known = self._known
        if known is not None and position < known.head.trimmed:
            return self._check_open()
        now = self._monotonic()
        ticket = _Trim(b"", now, now + self._timeout_s, position, bytes(start))
        try:
            self._submit(ticket)
        except CommitUnknownError as error:
            # To trim twice is harmless, so this is no question that anybody has to settle.
            raise UnavailableError(f"{error.message}; trim again", **error.facts) from error

    def _submit(self, ticket: _Ticket) -> int:
        """Wait for the ticket to be swapped in, or lead the swaps of all who wait."""
        leads = False
        try:
            with self._changed:
                self._check_open()
                if len(self._waiting) >= _MOST_WAITING:
                    raise UnavailableError(
                        f"{_MOST_WAITING} appends wait for {self._where()} already: try again"
                    )
                self._waiting.append(ticket)
                while not ticket.done and self._leading:
                    remaining = ticket.deadline - self._monotonic()
                    if remaining <= 0:
                        self._give_up(ticket)
                    else:
                        self._changed.wait(remaining)
                if not ticket.done:
                    leads = self._leading = True
            if leads:
                self._lead(ticket)
        finally:
            with self._changed:
                if leads:
                    self._leading = False
                if not ticket.done and ticket in self._waiting:  # an interrupt: nobody waits for it
                    self._waiting.remove(ticket)
                    ticket.done = True
                self._changed.notify_all()
        if ticket.error is not None:
            raise ticket.error
        return ticket.position

    def _lead(self, own: _Ticket) -> None:
        """Swap for all who wait, until `own` is done."""
        pause_s = 0.0
        losses = 0
        while not own.done:
            self._sleep(pause_s)
            self._expire()
            if own.done:
                return
            try:
                swapped = self._round()
                losses = 0 if swapped else losses + 1
                pause_s = 0.0 if swapped else self._turns.scatter_s(losses)
            except UnavailableError as error:
                self._trouble = error
                backoff_s = min(max(2 * pause_s, _FIRST_PAUSE_S), _MOST_PAUSE_S)
                pause_s = backoff_s * self._chance.uniform(0.5, 1.0)
            except EverpoolError as error:
                self._fail(error)

    def _round(self) -> bool:
        """Try one swap; False when another one was faster, or nobody knows."""
        known = self._take_turn()
        self._settle(known)
        self._put_again(known.head)
        placed, refused, draft = self._place(known)
        if not draft.changed():
            if any(ticket.arrived > known.asked for ticket in placed + refused):
                self._refresh()  # a head from before the call cannot tell
            else:
                self._finish(placed, refused, known.head.end)
            return True
        log_id = known.head.log_id or self._chance.randbytes(16)
        written = draft.write(log_id, self._chance.randbytes(16))
        for key, data in written.objects:
            self._store.put(f"{self._prefix}/{key}", data)
        certain = self._doubt(placed, known)
        if certain is None:
            return True
        asked, sending = self._monotonic(), self._clock.sending()
        try:
            e_tag = self._swap(written.data, known)
        except (ConflictError, CommitUnknownError) as error:
            if isinstance(error, ConflictError):
                self._turns.lost(self._monotonic())
            self._trouble = error
            self._refresh()
            return False
        except EverpoolError:
            with self._changed:
                for ticket in certain:
                    ticket.clear()
            raise
        self._turns.won(self._monotonic() - asked)
        self._clock.sent(e_tag, sending)
        self._adopt(_Known(written.head, e_tag, asked))
        self._finish(placed, refused, written.head.end)
        return True

    def _swap(self, data: bytes, known: _Known) -> str:
        """Swap the head, and wait no longer for an answer than is worth it.

        Some stores let a swap queue for seconds when others swap at the same time. By then the
        head has moved on, so that it can take no effect any more, and need not be waited for.
        """
        e_tag = known.e_tag
        with self._changed:
            self._check_open()
            if self._swappers is None:
                self._swappers = ThreadPoolExecutor(_MOST_SWAPS, "everpool-swap")
            answer = self._swappers.submit(self._store.swap, self._head_key, data, e_tag)
        patience_s = self._turns.patience_s()
        while True:
            try:
                return answer.result(patience_s)
            except TimeoutError:
                patience_s *= 2
            try:
                moved = self._refresh().e_tag != e_tag
            except EverpoolError as error:
                raise self._unanswered(error.message) from error
            if moved and not answer.done():
                raise self._unanswered("the head has moved on")

    def _unanswered(self, why: str) -> CommitUnknownError:
        return CommitUnknownError(f"a swap of {self._head_key} has no answer: {why}", id=None)

    def _take_turn(self) -> _Known:
        """Return the head to base a swap on; wait for those whose turn it is before."""
        known = self._known or self._refresh()
        if not self._turns.contended(self._monotonic()):
            return known
        for _ in range(_MOST_LOOKS):
            now = self._monotonic()
            pause_s = self._turns.pause_s(_writers(known)) - (now - known.asked)
            if pause_s <= 0:
                break
            self._sleep(pause_s)
            before, known = known, self._refresh()
            swaps = known.head.generation - before.head.generation
            self._turns.watched(swaps, known.asked)
            if not swaps:
                break
        if self._turns.stale(self._monotonic() - known.asked):
            return self._refresh()
        return known

    def _put_again(self, head: Head) -> None:
        """Put large entries again that this head must not take up: see `format`."""
        with self._changed:
            waiting = [one for one in self._waiting if isinstance(one, _Append)]
        for ticket in waiting:
            if ticket.stored.data is None and ticket.stored.put_at < head.trimmed:
                stored = ticket.stored._replace(put_at=head.end)
                self._store.put(f"{self._prefix}/{stored.key}", ticket.data)
                ticket.stored = stored

    def _place(self, known: _Known) -> tuple[list[_Ticket], list[_Append], Draft]:
        """Put into a draft what waits, as far as there is room."""
        draft = Draft(known.head, self._head_bytes)
        time_ns = max(known.head.time_ns, self._clock.now_ns())
        placed: list[_Ticket] = []
        refused: list[_Append] = []
        with self._changed:
            waiting = [ticket for ticket in self._waiting if not ticket.done]
        for ticket in waiting:
            if isinstance(ticket, _Trim):
                draft.trim(ticket.upto, ticket.note)
                placed.append(ticket)
                continue
            ticket.stored = ticket.stored._replace(time_ns=time_ns)
            fits = ticket.place(draft)
            if fits is None:
                break
            if fits:
                placed.append(ticket)
            else:
                refused.append(ticket)
        return placed, refused, draft

    def _doubt(self, placed: Sequence[_Ticket], known: _Known) -> list[_Ticket] | None:
        """Note that the tickets are about to be swapped in; returns those not in doubt before.

        None when one was given up meanwhile: it must not come into the log any more.
        """
        with self._changed:
            if any(ticket.done for ticket in placed):
                return None
            certain = [ticket for ticket in placed if not ticket.doubtful]
            for ticket in certain:
                ticket.doubtful, ticket.base, ticket.after = True, known.e_tag, known.head.end
            return certain

    def _settle(self, known: _Known) -> None:
        """Find out about attempts that were based on heads before this one.

        While the head is the one that an attempt was based on, that may still take effect; another
        attempt on the same head is no danger, for only one of the two can.
        """
        with self._changed:
            doubtful = [one for one in self._waiting if one.doubtful and one.base != known.e_tag]
        for ticket in doubtful:
            try:
                position = (
                    None
                    if isinstance(ticket, _Trim)
                    else self._archive.find(known.head, ticket.id, ticket.after)
                )
            except NotFoundError as gone:
                self._end_unknown(ticket, gone.message)
                continue
            with self._changed:
                if position is None:
                    ticket.clear()
                else:
                    ticket.position = position
                    self._done(ticket)

    def _finish(self, placed: Sequence[_Ticket], refused: Sequence[_Append], end: int) -> None:
        with self._changed:
            for ticket in placed:
                self._done(ticket)
            for ticket in refused:
                end = ticket.position
                self._done(
                    ticket,
                    ConflictError(
                        f"the log ends at {end}, not at {ticket.expected}",
                        end=end,
                        expected=ticket.expected,
                    ),
                )

    def _done(self, ticket: _Ticket, error: EverpoolError | None = None) -> None:
        """The lock must be held."""
        if not ticket.done:
            ticket.done, ticket.error = True, error
            self._waiting.remove(ticket)
            self._changed.notify_all()

    def _fail(self, error: EverpoolError) -> None:
        """End everything that waits: the store will not do it, however often it is asked."""
        with self._changed:
            for ticket in list(self._waiting):
                if ticket.doubtful:
                    self._end_unknown(ticket, error.message)
                else:
                    self._done(ticket, error)

    def _expire(self) -> None:
        now = self._monotonic()
        with self._changed:
            for ticket in list(self._waiting):
                if self._closed or now >= ticket.deadline:
                    self._give_up(ticket)

    def _give_up(self, ticket: _Ticket) -> None:
        """End a ticket without success; the lock must be held."""
        words = "the log was closed" if self._closed else f"not within {self._timeout_s:g} s"
        if self._trouble is not None:
            words += f" ({self._trouble.message})"
        if ticket.doubtful:
            self._end_unknown(ticket, words)
        elif self._closed:
            self._done(ticket, ClosedError(f"{self._where()} was closed before the append"))
        else:
            self._done(
                ticket, UnavailableError(f"nothing was appended to {self._where()}: {words}")
            )

    def _end_unknown(self, ticket: _Ticket, why: str) -> None:
        with self._changed:
            self._done(
                ticket,
                CommitUnknownError(
                    f"whether append {ticket.id.hex()} came into {self._where()}"
                    f" could not be learned: {why}",
                    id=ticket.id.hex(),
                ),
            )

    # Reading

    def history(self, after: int, last: int | None = None) -> Iterator[Appended]:
        """Yield the entries behind `after`, trimmed or not; see `ArchivedLog.history`."""
        self._check_open()
        head = self._refresh().head
        yield from self._archive.history(head, after, _FOREVER if last is None else last)

    def garbage(self, kept: Sequence[tuple[int, int]]) -> Iterator[Listed]:
        """Yield what may be deleted, by its whole key; see `ArchivedLog.garbage`."""
        self._check_open()
        yield from self._archive.garbage(self._refresh().head, kept)

    def read(self, after: int, limit_bytes: int = 1 << 20) -> list[Appended]:
        """Return the entries behind `after` that this log has heard of; see `Log.read`.

        It hears of them by its own calls: `wait`, `end`, and those that write. The first call
        asks the store.
        """
        self._check_open()
        head = (self._known or self._refresh()).head
        gone = ""
        for _ in range(2):
            if after < head.trimmed:
                raise NotFoundError(
                    f"the log was trimmed up to {head.trimmed}, it cannot be read behind {after}:"
                    " start from a checkpoint",
                    trimmed=head.trimmed,
                    after=after,
                )
            try:
                return self._archive.read(head, after, limit_bytes)
            except NotFoundError as error:
                gone = error.message
                head = self._refresh().head
        raise CorruptionError(
            f"{self._where()} is damaged, an object that its head names is gone:"
            f" {gone}; restore it from a copy",
            after=after,
        )

    def end(self) -> End:
        """Ask the store where the log ends; see `Log.end`."""
        self._check_open()
        head = self._refresh().head
        return End(head.end, head.trimmed, head.note)

    def wait(self, after: int, timeout_s: float) -> bool:
        """Wait for an entry behind `after`; all who wait share the requests."""
        deadline = self._monotonic() + timeout_s
        while True:
            with self._changed:
                while True:
                    self._check_open()
                    if self._known is not None and self._known.head.end > after:
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
            self._refresh()
        except UnavailableError as error:
            self._trouble = error
        finally:
            with self._changed:
                self._polling = False
                if self._generation() == before:
                    self._poll_s = min(1.5 * self._poll_s, self._idle_poll_s)
                pause_s = self._poll_s * self._chance.uniform(0.75, 1.25)
                self._next_poll = self._monotonic() + pause_s
                self._changed.notify_all()

    @property
    def trouble(self) -> EverpoolError | None:
        """Why the store could not be reached when it was last asked; None when it could."""
        return self._trouble

    def _generation(self) -> int:
        return self._known.head.generation if self._known is not None else 0

    def _refresh(self) -> _Known:
        """Read the head; returns what was in force at some moment of this call, or later."""
        before = self._known
        asked = self._monotonic()
        try:
            if before is None or before.e_tag is None or self._clock.wants():
                found = self._store.get(self._head_key)
            else:
                found = self._store.get_if_changed(self._head_key, before.e_tag)
        except NotFoundError:
            if before is not None and before.e_tag is not None:
                raise self._went_back("its head is gone", "gone") from None
            return _Known(_NO_HEAD, None, asked)
        self._trouble = None
        if found is None:
            assert before is not None
            return self._adopt(before._replace(asked=asked))
        head = decode_head(found.data)
        self._clock.saw(found.e_tag, found.modified_ns)
        if before is not None and before.head.log_id != head.log_id:
            raise self._went_back("it was created anew", "anew")
        if before is not None and before.head.generation > head.generation:
            raise self._went_back(f"it ends at {head.end}, after {before.head.end}", "shorter")
        return self._adopt(_Known(head, found.e_tag, asked))

    def _went_back(self, how: str, went_back: str) -> CorruptionError:
        return CorruptionError(
            f"{self._where()} is not the log that it was, {how}: restore it from a copy,"
            " or open the pool again",
            went_back=went_back,
        )

    def _adopt(self, known: _Known) -> _Known:
        """Keep the newest head, and wake who waits for one; returns the newest."""
        with self._changed:
            current = self._known
            if current is None or known.head.generation > current.head.generation:
                self._poll_s = self._busy_poll_s
                self._next_poll = min(self._next_poll, self._monotonic() + self._poll_s)
                self._known = known
                self._changed.notify_all()
            elif known.e_tag == current.e_tag and known.asked > current.asked:
                self._known = known
            assert self._known is not None
            return self._known

    def close(self) -> None:
        """Wake who waits, and refuse every later call."""
        with self._changed:
            self._closed = True
            if not self._leading:
                self._expire()
            self._changed.notify_all()
            if self._swappers is not None:
                self._swappers.shutdown(wait=False)
        self._archive.close()

    def _sleep(self, seconds: float) -> None:
        """Wait, but not for a closed log."""
        if seconds > 0:
            with self._changed:
                self._changed.wait_for(lambda: self._closed, seconds)

    def _check_open(self) -> None:
        if self._closed or self._pid != os.getpid():
            raise ClosedError(f"{self._where()} is closed, or belongs to another process")

    def _where(self) -> str:
        return f"the log in {self._prefix!r}"


def _writers(known: _Known) -> list[bytes]:
    """Return who wrote the entries in the head, the newest last."""
    return [one.writer for one in known.head.entries]
