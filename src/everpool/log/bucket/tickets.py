"""Appends and trims on their way into the log, and how they end.

A ticket is *doubtful* while an attempt to swap it in may have taken effect, or may still: nobody
knows until a later head is looked through. One that ends in doubt ends as unknown.
"""

import threading
from collections.abc import Iterable, Sequence

from everpool.errors import (
    ClosedError,
    CommitUnknownError,
    ConflictError,
    EverpoolError,
    UnavailableError,
)
from everpool.log.bucket.draft import Draft
from everpool.log.bucket.format import Head, Stored

_MOST_WAITING = 1024


class _Waiter:
    """Something that waits to be swapped in."""

    def __init__(self, id: bytes, arrived: float, deadline: float) -> None:
        self.id = id
        self.arrived = arrived
        self.deadline = deadline
        self.done = False
        self.position = 0
        self.error: EverpoolError | None = None
        self.doubtful = False
        # While it is doubtful: the tag of the head that the first attempt was based on, and the
        # position behind which the entry would stand.
        self.base: str | None = None
        self.after = 0

    def clear(self) -> None:
        """No attempt so far has taken effect, nor will."""
        self.doubtful = False
        self.base = None


class Append(_Waiter):
    """An entry to append; `expected` is where the log must end before it, or None."""

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

    def must_be_put_again(self, head: Head) -> bool:
        """Whether the head must not take up the object that the entry's bytes are in."""
        return self.stored.data is None and self.stored.put_at < head.trimmed

    def place(self, draft: Draft) -> bool | None:
        """Put it into the draft; None: not in this swap, False: never."""
        if self.expected is not None and self.expected != draft.end:
            self.position = draft.end
            return False
        if not draft.append(self.stored):
            return None
        self.position = draft.end
        return True


class Trim(_Waiter):
    """What is sealed up to the position `upto` is to leave the head, and `note` to be kept."""

    def __init__(
        self, id: bytes, arrived: float, deadline: float, position: int, note: bytes
    ) -> None:
        super().__init__(id, arrived, deadline)
        self.upto = position
        self.note = note


Ticket = Append | Trim


class Tickets:
    """The tickets that wait, in order.

    Whoever waits for one waits for the condition `changed`, which is told when one ends. `where`
    names the log in messages.
    """

    def __init__(self, changed: threading.Condition, where: str) -> None:
        self._changed = changed
        self._where = where
        self._waiting: list[Ticket] = []

    def add(self, ticket: Ticket) -> None:
        """Let a ticket wait; raises `UnavailableError` when too many do."""
        with self._changed:
            if len(self._waiting) >= _MOST_WAITING:
                raise UnavailableError(
                    f"{_MOST_WAITING} appends wait for {self._where} already: try again"
                )
            self._waiting.append(ticket)

    def waiting(self) -> list[Ticket]:
        """Return those that wait now."""
        with self._changed:
            return list(self._waiting)

    def withdraw(self, ticket: Ticket) -> None:
        """Nobody waits for it any more; harmless when it has ended."""
        with self._changed:
            if ticket in self._waiting:
                self._end(ticket)

    # Attempts

    def doubt(self, placed: Sequence[Ticket], e_tag: str | None, end: int) -> list[Ticket] | None:
        """Note that tickets are about to be swapped in for a head with that tag and end.

        Returns those that were not in doubt before; None when one has ended meanwhile: it must not
        come into the log any more.
        """
        with self._changed:
            if any(ticket.done for ticket in placed):
                return None
            certain = [ticket for ticket in placed if not ticket.doubtful]
            for ticket in certain:
                ticket.doubtful, ticket.base, ticket.after = True, e_tag, end
            return certain

    def doubtful(self, e_tag: str | None) -> list[Ticket]:
        """Return those with attempts that were based on another head than that with this tag."""
        with self._changed:
            return [one for one in self._waiting if one.doubtful and one.base != e_tag]

    def settle(self, ticket: Ticket, position: int | None) -> None:
        """It was found that a doubtful ticket's entry is at a position, or nowhere (None)."""
        with self._changed:
            if position is None:
                ticket.clear()
            else:
                ticket.position = position
                self._end(ticket)

    def clear(self, tickets: Iterable[Ticket]) -> None:
        """The last attempt, which was the first to take these, has failed for certain."""
        with self._changed:
            for ticket in tickets:
                ticket.clear()

    # How they end

    def finish(self, placed: Iterable[Ticket], refused: Iterable[Append]) -> None:
        """Those that were placed are in the log; the log ends elsewhere than refused ones want."""
        with self._changed:
            for ticket in placed:
                self._end(ticket)
            for ticket in refused:
                end = ticket.position
                self._end(
                    ticket,
                    ConflictError(
                        f"the log ends at {end}, not at {ticket.expected}",
                        end=end,
                        expected=ticket.expected,
                    ),
                )

    def fail(self, error: EverpoolError) -> None:
        """End everything that waits: the store will not do it, however often it is asked."""
        with self._changed:
            for ticket in list(self._waiting):
                if ticket.doubtful:
                    self.end_unknown(ticket, error.message)
                else:
                    self._end(ticket, error)

    def give_up(self, ticket: Ticket, why: str, *, closed: bool) -> None:
        """End a ticket without success."""
        with self._changed:
            if ticket.doubtful:
                self.end_unknown(ticket, why)
            elif closed:
                self._end(ticket, ClosedError(f"{self._where} was closed before the append"))
            else:
                words = f"nothing was appended to {self._where}: {why}"
                self._end(ticket, UnavailableError(words))

    def end_unknown(self, ticket: Ticket, why: str) -> None:
        """End a ticket of which nobody can learn whether it came into the log."""
        words = f"whether append {ticket.id.hex()} came into {self._where} could not be learned"
        self._end(ticket, CommitUnknownError(f"{words}: {why}", id=ticket.id.hex()))

    def _end(self, ticket: Ticket, error: EverpoolError | None = None) -> None:
        with self._changed:
            if not ticket.done:
                ticket.done, ticket.error = True, error
                self._waiting.remove(ticket)
                self._changed.notify_all()
