"""A process's way to its host's agent, across the deaths of agents.

All that is asked waits here until it is answered or its time is over. One thread connects, reads
answers, and watches the time; whoever asks sends by itself where that needs no waiting. When an
agent dies, the thread finds or starts another one. What was asked is asked again, in order; of
commits that got an id, the new agent first says what became of them, which settles it for good:
those that came to nothing are sent again, behind a fence.

When the time of a commit is over, the thread first reads everything that is there. A commit
without an id then will never be in the log, for an agent tells the id before it looks at the time,
and looks at the time before it appends.
"""

import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from everpool.agent.failures import error_of
from everpool.agent.frames import pack
from everpool.agent.link import HungUp, Link
from everpool.agent.requests import Request, Requests
from everpool.agent.starting import Finder, agent_pid
from everpool.errors import (
    ClosedError,
    CommitUnknownError,
    ConflictError,
    EverpoolError,
    InvalidError,
    UnavailableError,
)
from everpool.interrupts import NOTICE_S, check, deferred
from everpool.processes import is_stopped
from everpool.records import RecordId
from everpool.replica.batch import Result
from everpool.verdict import Verdict

_HELLO, _OUTCOMES = 1, 2
_CONNECT_S = 0.01
_LONGEST_PAUSE_S = 1.0
_HOPELESS_PAUSE_S = 10.0
_LONGEST_WAIT_S = 3600.0
_log = logging.getLogger("everpool")


class Greeting(NamedTuple):
    """What this process tells an agent of itself.

    The replica that it has open ("" for none yet), where that is in its log, and its regions.
    """

    replica: str
    position: int
    hash: bytes
    regions: list[tuple[int, int]]


class Client:
    """The way to the agent of one folder. Threads share it; a forked child must not use it."""

    def __init__(
        self,
        folder: Path,
        url: str,
        greet: Callable[[], Greeting],
        welcome: Callable[[dict[str, Any]], bool],
    ) -> None:
        """`welcome(answer)` returns whether the agent's replica is the one of the greeting.

        It is called for each agent; after it returned False, the client settles what it can and
        closes.
        """
        self.pid = 0
        self._folder = folder
        self._finder = Finder(folder, url)
        self._greet = greet
        self._welcome = welcome
        self._mutex = threading.Lock()
        self._requests = Requests(self._mutex, _OUTCOMES + 1)
        self._link: Link | None = None
        # Whether requests are sent, or wait for the outcomes of older ones.
        self._up = False
        self._moved = False
        self._asked: list[Request] = []
        self._attempt_at = 0.0
        self._pause_s = _CONNECT_S
        # Why there is no agent, and why the agent does not reach the log.
        self.failure: EverpoolError | None = None
        self._trouble = ""
        self._closing = False
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._thread = threading.Thread(target=self._serve, name="everpool-agent", daemon=True)
        self._thread.start()

    # Asking

    def ask(self, deadline: float, verb: str, *arguments: Any) -> Any:
        """Return what the agent answers, or raise its error; `UnavailableError` in time."""
        self.refuse_in_callback()
        answered = threading.Event()
        request = Request(verb, arguments, deadline, lambda _: answered.set())
        with deferred():
            self._submit(request)
        try:
            while not answered.wait(NOTICE_S):
                check()
        except BaseException:
            self._forget(request)
            raise
        if request.error is not None:
            raise request.error
        return request.result

    def commit(self, data: bytes, deadline: float, done: Callable[[Request], None]) -> None:
        """Have a record committed, behind those that were before; `done` is called in the end.

        Raises `UnavailableError` when there is no room until the deadline.
        """
        request = Request("commit", (data, deadline), deadline, done)
        request.size = len(data)
        with deferred():
            with self._mutex:
                while self._requests.is_full:
                    if self._closing or threading.get_ident() == self._thread.ident:
                        break
                    if not self._requests.room.wait(NOTICE_S):
                        check()
                    if time.monotonic() > deadline:
                        raise UnavailableError(
                            "earlier commits have not left room in time; nothing was committed: "
                            "try again"
                        )
            self._submit(request)

    def refuse_in_callback(self) -> None:
        """Raise `InvalidError` in the one thread that would have to answer."""
        if threading.get_ident() == self._thread.ident:
            raise InvalidError(
                "the callback of a future waits for the thread that called it: hand that over to "
                "another thread"
            )

    def drain(self) -> None:
        """Return when every commit that was submitted before has an outcome."""
        self.refuse_in_callback()
        with deferred(), self._mutex:
            last = self._requests.last
            while self._requests.oldest_commit() <= last:
                if not self._requests.room.wait(NOTICE_S):
                    check()

    def _submit(self, request: Request) -> None:
        with self._mutex:
            if self._moved and self._closing:
                raise UnavailableError("the pool's replica was begun anew meanwhile: try again")
            if self._closing or self._closed:
                raise ClosedError("the pool is closed: open it again")
            failure = self.failure
            if self._link is None and failure is not None and failure.kind != "unavailable":
                raise _copy(failure)
            data = self._requests.add(request)
            link = self._link
            if link is not None and self._up:
                link.put(request.number, data)
            if request.deadline < self._requests.due:
                self._requests.due = request.deadline
                self._nudge()
            elif link is not None and link.wants_room:
                self._nudge()

    def _forget(self, request: Request) -> None:
        with self._mutex:
            self._requests.remove(request.number)

    def _settle(self, number: int, result: Any, error: BaseException | None) -> bool:
        """Tell the outcome of a request; False when nobody waits for it any more."""
        with self._mutex:
            request = self._requests.remove(number)
        if request is None:
            return False
        request.result, request.error = result, error
        try:
            request.done(request)
        except Exception:
            _log.exception("telling the outcome of a request failed")
        return True

    def close(self) -> None:
        """Hang up. What has no answer yet ends with `ClosedError`."""
        with self._mutex:
            self._closing = True
            self._nudge()
        if threading.get_ident() != self._thread.ident:
            self._thread.join()

    def abandon(self) -> list[Callable[[Request], None]]:
        """In a forked child: close what belongs to the parent, without a word to the agent.

        Returns what would have been called with the answers.
        """
        left, self._mutex = list(self._requests), threading.Lock()
        self._requests = Requests(self._mutex, _OUTCOMES + 1)
        self._closing = self._closed = True
        link, self._link = self._link, None
        if link is not None:
            link.close()
        self._finder.give_up()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
        return [request.done for request in left]

    # The thread

    def _nudge(self) -> None:
        """Wake the thread, if it has not ended. The mutex must be held."""
        if self._wake >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self._wake, 1)

    def _serve(self) -> None:
        try:
            while not self._closing:
                self._step()
            self._end(ClosedError("the pool is closed: open it again"))
        except BaseException as error:
            self._end(UnavailableError(f"the way to the pool's agent failed: {error!r}"))
            raise
        finally:
            with self._mutex:  # by the next line, the number can be that of somebody else's file
                wake, self._wake = self._wake, -1
                os.close(wake)

    def _step(self) -> None:
        """Wait for something to do, and do it."""
        if self._link is None and time.monotonic() >= self._attempt_at:
            self._connect()
        with self._mutex:
            wakes_at = self._requests.due
            if self._link is None:
                wakes_at = min(wakes_at, self._attempt_at)
            else:
                interest = select.POLLIN | (select.POLLOUT if self._link.wants_room else 0)
                self._poll.register(self._link, interest)
        wait_s = min(max(0.0, wakes_at - time.monotonic()), _LONGEST_WAIT_S)
        ready = dict(self._poll.poll(1000 * wait_s + 1 if wait_s else 0))
        now = time.monotonic()
        if ready.pop(self._wake, 0):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        for events in ready.values():
            if events & select.POLLOUT and self._link is not None:
                with self._mutex:
                    self._link.flush()
            if events & ~select.POLLOUT:
                self._receive()
        if now >= self._requests.due:
            # What was there when their time was over is there now.
            while self._link is not None and self._receive():
                pass
            self._expire(now)

    def _receive(self) -> bool:
        """Read what there is, or some of it; False when there was nothing."""
        link = self._link
        assert link is not None
        try:
            frames = link.receive()
            for frame in frames or ():
                self._take(link, *frame)
        except HungUp:
            if self._link is link:  # and this has not hung up itself meanwhile
                self._hung_up()
            return False
        return frames is not None

    def _take(self, link: Link, number: int, what: str, *rest: Any) -> None:
        if what == "ids":
            session, pairs = rest
            with self._mutex:
                for number, sequence in pairs:
                    request = self._requests.get(number)
                    if request is not None:
                        request.id = RecordId(session, sequence)
        elif what == "done":
            session, found = rest
            for number, sequence, verdict, version, detail, old in found:
                id = RecordId(session, sequence)
                self._settle(number, Result(id, Verdict(verdict), version, detail, old), None)
        elif what == "trouble":
            self._trouble = rest[0]
        elif number in (_HELLO, _OUTCOMES):
            self._take_ours(number, what, rest)
        elif what == "ok":
            self._settle(number, rest[0], None)
        elif what == "region":
            descriptor = link.take_descriptor()
            if not self._settle(number, descriptor, None):
                os.close(descriptor)
        else:
            self._settle(number, None, error_of(*rest))

    def _expire(self, now: float) -> None:
        """Give up what is late by a time after which everything was read."""
        with self._mutex:
            late = self._requests.late(now)
            if self._link is not None:
                self._link.withdraw({one.number for one in late})
        why = self._why()
        for request in late:
            error: EverpoolError
            if request.verb != "commit":
                error = UnavailableError(why, pid=self.pid)
            elif request.id is None:
                error = UnavailableError(f"{why}; nothing was committed", pid=self.pid)
            else:
                words = f"{why}; whether the commit came to anything is not known: ask `outcome`"
                error = CommitUnknownError(f"{words} for {request.id}", id=request.id)
            self._settle(request.number, None, error)

    def _why(self) -> str:
        pid = self.pid if self._up else agent_pid(self._folder)
        if self._link is None and self.failure is not None:
            return self.failure.message
        if pid and is_stopped(pid):
            return f"the pool's agent (process {pid}) is stopped: continue it, or end it"
        if self._trouble:
            return f"the pool's log is out of reach ({self._trouble}): try again later"
        if self._link is None:
            return f"the pool's agent did not start in time: see {self._folder}/agent.log"
        return f"the pool's agent (process {pid}) has not answered in time: try again"

    # One agent after the other

    def _connect(self) -> None:
        """Connect and say hello, if there is somebody."""
        try:
            link = self._finder.connect()
        except EverpoolError as error:
            self._failed(error)
            return
        if link is None:
            self._attempt_at = time.monotonic() + _CONNECT_S
            return
        with self._mutex:
            self._link = Link(link)
            self._trouble = ""
            self._link.put(_HELLO, pack(_HELLO, "hello", os.getpid(), *self._greet()))

    def _failed(self, error: EverpoolError) -> None:
        """There is no agent to be had: wait a little, and end what waiting would not help."""
        self.failure = error
        self._attempt_at = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        if error.kind == "unavailable":
            return
        self._attempt_at = time.monotonic() + _HOPELESS_PAUSE_S
        with self._mutex:
            left = list(self._requests)
        for request in left:
            if request.id is None:
                self._settle(request.number, None, _copy(error))

    def _hung_up(self) -> None:
        """The agent is gone, and everything it said was read."""
        link = self._link
        assert link is not None
        self._poll.unregister(link)
        with self._mutex:
            self._link = None
            self._up = False
        link.close()
        self._asked = []
        self._attempt_at = time.monotonic() + self._pause_s - _CONNECT_S
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _take_ours(self, number: int, what: str, rest: tuple[Any, ...]) -> None:
        if what != "ok":
            self._failed(error_of(*rest))
            self._hung_up()
        elif number == _HELLO:
            self._welcomed(rest[0])
        else:
            self._learned(rest[0])

    def _welcomed(self, answer: dict[str, Any]) -> None:
        self.pid = answer["pid"]
        self._trouble = answer["trouble"]
        self.failure = None
        self._moved = not self._welcome(answer)
        with self._mutex:
            self._asked = [one for one in self._requests if one.id is not None]
            if self._asked:
                ids = [list(one.id) for one in self._asked if one.id is not None]
                assert self._link is not None
                self._link.put(_OUTCOMES, pack(_OUTCOMES, "outcomes", ids))
                return
        self._resume()

    def _learned(self, outcomes: list[tuple[str, int, list[bytes]]]) -> None:
        """Settle the commits that a dead agent left; the others can come to nothing any more."""
        asked, self._asked = self._asked, []
        for request, (state, version, old) in zip(asked, outcomes, strict=True):
            id = request.id
            assert id is not None
            if state == "committed":
                result = Result(id, Verdict.COMMITTED, version, "", old)
                self._settle(request.number, result, None)
            elif state == "expired":
                words = f"what became of {id} was decided longer ago than outcomes are kept"
                self._settle(request.number, None, CommitUnknownError(words, id=id))
            else:
                request.id = None
        self._resume()

    def _resume(self) -> None:
        """Send everything that has no answer, in order."""
        if self._moved:
            self._leave()
            return
        self._pause_s = _CONNECT_S
        with self._mutex:
            self._up = True
            assert self._link is not None
            for request in self._requests:
                self._link.put(request.number, request.packed())
            if self._link.wants_room:
                self._nudge()

    def _leave(self) -> None:
        """The replica was begun anew: nothing that was asked of the old one is for the new one."""
        self._closing = True
        with self._mutex:
            left = list(self._requests)
        for request in left:
            if request.verb == "commit":
                words = "the pool's replica was begun anew while this was on its way: run it again"
                self._settle(request.number, None, ConflictError(words))
            else:
                words = "the pool's replica was begun anew meanwhile: try again"
                self._settle(request.number, None, UnavailableError(words))

    def _end(self, error: EverpoolError) -> None:
        with self._mutex:
            self._closing = self._closed = True
            left = list(self._requests)
        if self._link is not None:
            self._hung_up()
        self._finder.give_up()
        for request in left:
            if request.id is None:
                self._settle(request.number, None, error)
            else:
                unknown = CommitUnknownError(f"{error.message}: ask `outcome`", id=request.id)
                self._settle(request.number, None, unknown)


def _copy(error: EverpoolError) -> EverpoolError:
    """Return an error of one's own: it gets a traceback."""
    return type(error)(error.message, **error.facts)
