"""What the processes of a host commit, packed into entries of the agent's session.

One thread takes what is waiting, appends it as one entry, plays the log up to it, and answers with
the verdicts. So hosts contend for the log, not processes, and commits that come while an append is
on its way share the next one.

A commit gets its id before its entry is appended, and whoever waits is told at once: when this
process dies in between, its successor can be asked what became of it. A commit whose deadline has
passed by then is not appended.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from everpool.agent.host import Host
from everpool.errors import CommitUnknownError, EverpoolError, UnavailableError
from everpool.records import (
    Entry,
    Fence,
    Operation,
    Record,
    RecordId,
    encode_entry,
    new_session,
)
from everpool.replica.batch import Result
from everpool.verdict import VOID

_BATCH_RECORDS = 1024
_BATCH_BYTES = 4 << 20
_QUEUE_RECORDS = 16384
_QUEUE_BYTES = 256 << 20
_LOOK_S = 0.1


@contextlib.contextmanager
def ending_the_process() -> Iterator[None]:
    """End an agent that does what nobody foresaw: its successor begins with what is true."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(4)


class Sender(Protocol):
    """Whoever commits."""

    def ready(self) -> bool | None:
        """Whether it takes what it is told; None when it is gone."""
        ...

    def tell(self, session: bytes, pairs: list[tuple[int, int]]) -> bool:
        """Tell it the ids of commits, as (number, sequence).

        True when it cannot miss them any more, whatever becomes of this process.
        """
        ...

    def settle(self, session: bytes, found: "list[tuple[int, Result]]") -> None:
        """Say what became of its commits."""
        ...

    def refuse(self, number: int, error: EverpoolError) -> None:
        """Say why a commit has failed."""
        ...


class Commit(NamedTuple):
    """One record that somebody wants committed. `deadline` is of the monotonic clock."""

    sender: Sender
    number: int
    record: Record
    size: int
    deadline: float


class Commits:
    """Commits for one host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._queue: deque[Commit] = deque()
        self._bytes = 0
        self._mutex = threading.Lock()
        self._work = threading.Condition(self._mutex)
        self._room = threading.Condition(self._mutex)
        self._closed = False
        self._session = b""
        self._sequence = 0
        # Records whose append was never answered: fenced before anything else is committed.
        self._doubtful: list[RecordId] = []
        self._thread = threading.Thread(target=self._serve, name="everpool-commits", daemon=True)
        self._thread.start()

    def submit(self, commit: Commit) -> None:
        """Queue a commit; waits while too much is queued."""
        with self._mutex:
            while len(self._queue) >= _QUEUE_RECORDS or self._bytes >= _QUEUE_BYTES:
                self._room.wait()
            self._queue.append(commit)
            self._bytes += commit.size
            self._work.notify()

    def look_again(self) -> None:
        """Somebody who was not ready may be now, or is gone."""
        with self._mutex:
            self._work.notify()
            self._room.notify_all()

    def close(self) -> None:
        """Commit what is queued of whoever is ready, and stop; the others ask the next agent."""
        with self._mutex:
            self._closed = True
            self._work.notify()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            batch = self._take()
            if not batch:
                return
            with ending_the_process():
                try:
                    self._commit(batch)
                except EverpoolError as error:
                    for commit in batch:
                        commit.sender.refuse(commit.number, error)

    def _take(self) -> list[Commit]:
        """Wait for commits, and take those of whoever is ready, in order."""
        with self._mutex:
            while not (batch := self._chosen()) and not self._closed:
                self._work.wait(_LOOK_S if self._queue else None)
            return batch

    def _chosen(self) -> list[Commit]:
        """Take out what can be committed now, and what is too late. The mutex must be held."""
        batch: list[Commit] = []
        kept: list[Commit] = []
        ready: dict[Sender, bool | None] = {}
        size = 0
        now = time.monotonic()
        while self._queue and len(batch) < _BATCH_RECORDS and size < _BATCH_BYTES:
            commit = self._queue.popleft()
            sender = commit.sender
            if sender not in ready:
                ready[sender] = sender.ready()
            if ready[sender] is False and commit.deadline >= now:
                kept.append(commit)
                continue
            self._bytes -= commit.size
            if ready[sender] is None:
                continue
            if commit.deadline < now:
                sender.refuse(commit.number, _too_late())
            else:
                batch.append(commit)
                size += commit.size
        self._queue.extendleft(reversed(kept))
        self._room.notify_all()
        return batch

    def _commit(self, batch: list[Commit]) -> None:
        try:
            self._host.reach()
        except EverpoolError as error:
            raise UnavailableError(f"{error.message}; nothing was committed") from error
        self._fence_doubtful()
        if not self._session:
            self._begin_session()
        session, first = self._session, self._sequence + 1
        batch = _by_sender(batch)
        told = [sender.tell(session, pairs) for sender, pairs in _pairs(batch, first).items()]
        now = time.monotonic()
        if not all(told) or any(commit.deadline < now for commit in batch):
            # No other record may take an id that was told: begin anew, with who is in time.
            self._session = b""
            self._again(batch)
            return
        ids = [RecordId(session, first + at) for at in range(len(batch))]
        try:
            found = self._append([commit.record for commit in batch], first)
        except CommitUnknownError as error:
            self._session = b""
            self._doubtful += ids
            for commit, id in zip(batch, ids, strict=True):
                commit.sender.refuse(commit.number, CommitUnknownError(error.message, id=id))
            return
        except BaseException:
            self._session = b""
            raise
        self._sequence += len(batch)
        void: list[Commit] = []
        settled: dict[Sender, list[tuple[int, Result]]] = {}
        for commit, id in zip(batch, ids, strict=True):
            result = found[id]
            if result.verdict in VOID:
                # The session was forgotten meanwhile: the record is void, for good.
                self._session = b""
                void.append(commit)
            else:
                settled.setdefault(commit.sender, []).append((commit.number, result))
        for sender, results in settled.items():
            sender.settle(session, results)
        self._again(void)

    def _again(self, batch: list[Commit]) -> None:
        with self._mutex:
            self._queue.extendleft(reversed(batch))
            self._bytes += sum(commit.size for commit in batch)
            self._work.notify()

    def _begin_session(self) -> None:
        self._session, self._sequence = new_session(self._host.version), 0
        self._host.expect(self._session)

    def _append(self, records: list[Record], first: int) -> dict[RecordId, Result]:
        """Append an entry and play up to it; returns what became of its records."""
        host = self._host
        host.play()  # where that fails, nothing must come into the log
        state = host.replica.state()
        for record in records:
            if not (record.ranges or record.names or record.prefixes):
                record.snapshot = state.version  # it saw nothing that could be too old
        entry = Entry(self._session, first, state.position, state.hash, records)
        position = host.append(encode_entry(entry))
        try:
            host.play(position)
        except EverpoolError as error:
            raise _unknown(self._session, first, str(error)) from error
        found = host.results()
        if len(found) < len(records):
            raise _unknown(self._session, first, "its entry was not played")
        return found

    def _fence_doubtful(self) -> None:
        """Void what may still come, before what was submitted later."""
        if not self._doubtful:
            return
        self._begin_session()
        fences: list[Operation] = [Fence(*id) for id in self._doubtful]
        try:
            self._append([Record(self._host.version, [], [], [], fences)], 1)
        except EverpoolError as error:
            self._session = b""
            raise UnavailableError(
                f"what became of an earlier commit cannot be settled yet: {error}"
            ) from error
        self._doubtful = []
        self._sequence = 1


def _by_sender(batch: list[Commit]) -> list[Commit]:
    """Return the commits with those of each sender together, in their order."""
    grouped: dict[Sender, list[Commit]] = {}
    for commit in batch:
        grouped.setdefault(commit.sender, []).append(commit)
    return [commit for commits in grouped.values() for commit in commits]


def _pairs(batch: list[Commit], first: int) -> dict[Sender, list[tuple[int, int]]]:
    """Return each sender's commits as (number, sequence), numbered from `first` on."""
    found: dict[Sender, list[tuple[int, int]]] = {}
    for sequence, commit in enumerate(batch, first):
        found.setdefault(commit.sender, []).append((commit.number, sequence))
    return found


def _unknown(session: bytes, first: int, detail: str) -> CommitUnknownError:
    return CommitUnknownError(
        f"the commit is in the log, but what became of it cannot be told yet: {detail}: ask "
        "`outcome(id)`",
        id=RecordId(session, first),
    )


def _too_late() -> UnavailableError:
    return UnavailableError("the commit's time was over before it was sent: nothing was committed")
