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
)
from everpool.log.bucket.heads import Heads, Known
from everpool.log.bucket.tickets import Append, Ticket, Tickets, Trim
from everpool.log.bucket.turns import Turns
from everpool.store import Listed, Store, check_key

_FOREVER = 1 << 62
_FIRST_PAUSE_S = 0.02
_MOST_PAUSE_S = 1.0
_MOST_LOOKS = 24
_MOST_SWAPS = 4


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
        self._monotonic = monotonic
        # Ids must differ between processes that were forked, or began with the same seed.
        self._chance = chance or random.Random(secrets.randbits(128))
        self._writer = self._chance.randbytes(8)
        self._archive = Archive(store, prefix, cache_bytes)
        self._clock = StoreClock(clock_ns, monotonic)
        self._turns = Turns(self._writer, self._chance)
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._tickets = Tickets(self._changed, self._where())
        self._leading = False
        self._heads = Heads(
            store,
            self._head_key,
            self._where(),
            self._changed,
            self._clock,
            busy_poll_s=busy_poll_s,
            idle_poll_s=idle_poll_s,
            monotonic=monotonic,
            chance=self._chance,
        )
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
            known = self._heads.known or self._heads.refresh()
            hash = xxh3_128_digest(data)
            stored = stored._replace(data=None, hash=hash, put_at=known.head.end)
            self._store.put(f"{self._prefix}/{stored.key}", data)
        return self._submit(Append(id, now, now + self._timeout_s, stored, data, expected))

    def trim(self, position: int, start: bytes) -> None:
        """Drop what is sealed up to `position` from the head, and keep `start`; see `Log.trim`."""
        if len(start) > NOTE_BYTES:
            raise InvalidError(f"a note of {len(start)} bytes is too long: {NOTE_BYTES} at most")
        known = self._heads.known
        if known is not None and position < known.head.trimmed:
            return self._check_open()
        now = self._monotonic()
        ticket = Trim(b"", now, now + self._timeout_s, position, bytes(start))
        try:
            self._submit(ticket)
        except CommitUnknownError as error:
            # To trim twice is harmless, so this is no question that anybody has to settle.
            raise UnavailableError(f"{error.message}; trim again", **error.facts) from error

    def _submit(self, ticket: Ticket) -> int:
        """Wait for the ticket to be swapped in, or lead the swaps of all who wait."""
        leads = False
        try:
            with self._changed:
                self._check_open()
                self._tickets.add(ticket)
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
                self._tickets.withdraw(ticket)  # an interrupt: nobody waits for it
                self._changed.notify_all()
        if ticket.error is not None:
            raise ticket.error
        return ticket.position

    def _lead(self, own: Ticket) -> None:
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
                self._heads.trouble = error
                backoff_s = min(max(2 * pause_s, _FIRST_PAUSE_S), _MOST_PAUSE_S)
                pause_s = backoff_s * self._chance.uniform(0.5, 1.0)
            except EverpoolError as error:
                self._tickets.fail(error)

    def _round(self) -> bool:
        """Try one swap; False when another one was faster, or nobody knows."""
        known = self._take_turn()
        self._settle(known)
        self._put_again(known.head)
        placed, refused, draft = self._place(known)
        if not draft.changed():
            if any(ticket.arrived > known.asked for ticket in placed + refused):
                self._heads.refresh()  # a head from before the call cannot tell
            else:
                self._tickets.finish(placed, refused)
            return True
        log_id = known.head.log_id or self._chance.randbytes(16)
        written = draft.write(log_id, self._chance.randbytes(16))
        for key, data in written.objects:
            self._store.put(f"{self._prefix}/{key}", data)
        certain = self._tickets.doubt(placed, known.e_tag, known.head.end)
        if certain is None:
            return True
        asked, sending = self._monotonic(), self._clock.sending()
        try:
            e_tag = self._swap(written.data, known)
        except (ConflictError, CommitUnknownError) as error:
            if isinstance(error, ConflictError):
                self._turns.lost(self._monotonic())
            self._heads.trouble = error
            self._heads.refresh()
            return False
        except EverpoolError:
            self._tickets.clear(certain)
            raise
        self._turns.won(self._monotonic() - asked)
        self._clock.sent(e_tag, sending)
        self._heads.adopt(Known(written.head, e_tag, asked), own=True)
        self._tickets.finish(placed, refused)
        return True

    def _swap(self, data: bytes, known: Known) -> str:
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
                moved = self._heads.refresh().e_tag != e_tag
            except EverpoolError as error:
                raise self._unanswered(error.message) from error
            if moved and not answer.done():
                raise self._unanswered("the head has moved on")

    def _unanswered(self, why: str) -> CommitUnknownError:
        return CommitUnknownError(f"a swap of {self._head_key} has no answer: {why}", id=None)

    def _take_turn(self) -> Known:
        """Return the head to base a swap on; wait for those whose turn it is before."""
        known = self._heads.known or self._heads.refresh()
        if not self._turns.contended(self._monotonic()):
            return known
        for _ in range(_MOST_LOOKS):
            now = self._monotonic()
            pause_s = self._turns.pause_s(_writers(known)) - (now - known.asked)
            if pause_s <= 0:
                break
            self._sleep(pause_s)
            before, known = known, self._heads.refresh()
            swaps = known.head.generation - before.head.generation
            self._turns.watched(swaps, known.asked)
            if not swaps:
                break
        if self._turns.stale(self._monotonic() - known.asked):
            return self._heads.refresh()
        return known

    def _put_again(self, head: Head) -> None:
        """Put large entries again that this head must not take up: see `format`."""
        for ticket in self._tickets.waiting():
            if isinstance(ticket, Append) and ticket.must_be_put_again(head):
                stored = ticket.stored._replace(put_at=head.end)
                self._store.put(f"{self._prefix}/{stored.key}", ticket.data)
                ticket.stored = stored

    def _place(self, known: Known) -> tuple[list[Ticket], list[Append], Draft]:
        """Put into a draft what waits, as far as there is room."""
        draft = Draft(known.head, self._head_bytes)
        time_ns = max(known.head.time_ns, self._clock.now_ns())
        placed: list[Ticket] = []
        refused: list[Append] = []
        for ticket in self._tickets.waiting():
            if isinstance(ticket, Trim):
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

    def _settle(self, known: Known) -> None:
        """Find out about attempts that were based on heads before this one.

        While the head is the one that an attempt was based on, that may still take effect; another
        attempt on the same head is no danger, for only one of the two can.
        """
        for ticket in self._tickets.doubtful(known.e_tag):
            position = None
            try:
                if isinstance(ticket, Append):
                    position = self._archive.find(known.head, ticket.id, ticket.after)
            except NotFoundError as gone:
                self._tickets.end_unknown(ticket, gone.message)
                continue
            self._tickets.settle(ticket, position)

    def _expire(self) -> None:
        now = self._monotonic()
        with self._changed:
            for ticket in self._tickets.waiting():
                if self._closed or now >= ticket.deadline:
                    self._give_up(ticket)

    def _give_up(self, ticket: Ticket) -> None:
        """End a ticket without success."""
        why = "the log was closed" if self._closed else f"not within {self._timeout_s:g} s"
        if self._heads.trouble is not None:
            why += f" ({self._heads.trouble.message})"
        self._tickets.give_up(ticket, why, closed=self._closed)

    # Reading

    def history(self, after: int, last: int | None = None) -> Iterator[Appended]:
        """Yield the entries behind `after`, trimmed or not; see `ArchivedLog.history`."""
        self._check_open()
        head = self._heads.refresh().head
        yield from self._archive.history(head, after, _FOREVER if last is None else last)

    def garbage(self, kept: Sequence[tuple[int, int]]) -> Iterator[Listed]:
        """Yield what may be deleted, by its whole key; see `ArchivedLog.garbage`."""
        self._check_open()
        yield from self._archive.garbage(self._heads.refresh().head, kept)

    def read(self, after: int, limit_bytes: int = 1 << 20) -> list[Appended]:
        """Return the entries behind `after` that this log has heard of; see `Log.read`.

        It hears of them by its own calls: `wait`, `end`, and those that write. The first call
        asks the store.
        """
        self._check_open()
        head = (self._heads.known or self._heads.refresh()).head
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
                head = self._heads.refresh().head
        raise CorruptionError(
            f"{self._where()} is damaged, an object that its head names is gone:"
            f" {gone}; restore it from a copy",
            after=after,
        )

    def end(self) -> End:
        """Ask the store where the log ends; see `Log.end`."""
        self._check_open()
        head = self._heads.refresh().head
        return End(head.end, head.trimmed, head.note)

    def wait(self, after: int, timeout_s: float) -> bool:
        """Wait for an entry behind `after`; all who wait share the requests."""
        return self._heads.wait(after, timeout_s, self._check_open)

    @property
    def trouble(self) -> EverpoolError | None:
        """Why the store could not be reached when it was last asked; None when it could."""
        return self._heads.trouble

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


def _writers(known: Known) -> list[bytes]:
    """Return who wrote the entries in the head, the newest last."""
    return [one.writer for one in known.head.entries]
