"""One client's connection, at the agent's end."""

import contextlib
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from everpool.agent.commits import Commit
from everpool.agent.failures import told
from everpool.agent.frames import Frames, Nonsense, pack
from everpool.errors import EverpoolError
from everpool.records import decode_record
from everpool.replica.batch import Result

if TYPE_CHECKING:
    from everpool.agent.server import Server

_RECEIVED_BYTES = 256 << 10


class Connection:
    """One client's connection. Nobody ever waits for a client that does not read."""

    def __init__(self, server: "Server", link: socket.socket) -> None:
        self._server = server
        self._link = link
        self._sending = threading.Lock()
        self._out: deque[tuple[memoryview, int]] = deque()
        self._gone = False
        self._draining = False

    def start(self) -> None:
        """Begin to serve."""
        threading.Thread(target=self._serve, name="everpool-client", daemon=True).start()

    def hang_up(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)

    # What it commits

    def ready(self) -> bool | None:
        """Whether it has room for what it is told; None when it is gone."""
        return None if self._gone else not self._out

    def tell(self, session: bytes, pairs: list[tuple[int, int]]) -> bool:
        """Tell it the ids of commits; True when they are in its socket."""
        return self.say(0, "ids", session, pairs)

    def settle(self, session: bytes, found: list[tuple[int, Result]]) -> None:
        """Say what became of its commits."""
        rows: list[Any] = []
        for number, result in found:
            id, verdict, version, detail, old = result
            rows.append((number, id.sequence, int(verdict), version, detail, old))
        self.say(0, "done", session, rows)

    def refuse(self, number: int, error: BaseException) -> None:
        """Say why something has failed."""
        self.say(number, "error", *told(error))

    # What it asks

    def _serve(self) -> None:
        frames = Frames()
        try:
            while data := self._link.recv(_RECEIVED_BYTES):
                for number, verb, *arguments in frames.feed(data):
                    self._take(number, verb, arguments)
        except (OSError, Nonsense, TypeError, ValueError):
            pass  # it is gone, or does not speak the language
        finally:
            with self._sending:
                self._gone = True
                self._let_go()
            self._link.close()
            self._server.forget(self)

    def _take(self, number: int, verb: str, arguments: list[Any]) -> None:
        if verb == "commit":
            self._commit(number, *arguments)
        elif verb == "map":
            self.answer(number, lambda: self._map(number, *arguments))
        else:
            self._server.answer(self, number, verb, arguments)

    def _commit(self, number: int, data: bytes, deadline: float) -> None:
        try:
            record = decode_record(data)
        except EverpoolError as error:
            self.refuse(number, error)
            return
        self._server.commits.submit(Commit(self, number, record, len(data), deadline))

    def _map(self, number: int, id: int) -> None:
        region = self._server.host.blocks.region(id)
        self.say(number, "region", descriptor=os.dup(region.descriptor))

    def answer(self, number: int, work: Callable[[], Any]) -> None:
        """Say what `work` returns, or raises."""
        try:
            found = work()
        except Exception as error:
            self.refuse(number, error)
        else:
            if found is not None:
                self.say(number, "ok", found)

    # Sending

    def say(self, *frame: Any, descriptor: int = -1) -> bool:
        """Send a frame, now or when there is room; True when all that was said is in its socket.

        With it goes a descriptor, which this closes.
        """
        data = memoryview(pack(*frame))
        with self._sending:
            if self._gone:
                if descriptor >= 0:
                    os.close(descriptor)
                return False
            self._out.append((data, descriptor))
            if not self._draining:
                self._flush()
            if not self._out:
                return True
            if not self._draining and not self._gone:
                self._draining = True
                threading.Thread(target=self._drain, name="everpool-drain", daemon=True).start()
            return False

    def _flush(self) -> None:
        """Send what there is room for. The lock must be held."""
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        try:
            while self._out:
                data, descriptor = self._out[0]
                if descriptor < 0:
                    sent = self._link.send(data, flags)
                else:
                    sent = socket.send_fds(self._link, [data], [descriptor], flags)
                    os.close(descriptor)
                if sent == len(data):
                    self._out.popleft()
                else:
                    self._out[0] = data[sent:], -1
        except BlockingIOError:
            pass
        except OSError:
            self._gone = True
            self._let_go()

    def _let_go(self) -> None:
        for _, descriptor in self._out:
            if descriptor >= 0:
                os.close(descriptor)
        self._out.clear()

    def _drain(self) -> None:
        """Send what is left, as the client reads."""
        poll = select.poll()
        with contextlib.suppress(OSError, ValueError):
            poll.register(self._link, select.POLLOUT)
            while self._out:
                poll.poll(1000)
                with self._sending:
                    self._flush()
                    self._draining = bool(self._out)
        with self._sending:
            self._draining = False
        self._server.commits.look_again()
