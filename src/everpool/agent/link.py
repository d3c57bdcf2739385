"""A connection to an agent, at the client's end: what is to be sent, and what has come.

Nothing here ever waits.
"""

import contextlib
import os
import socket
from collections import deque
from collections.abc import Container, Iterator
from typing import Any

from everpool.agent.frames import Frames, Nonsense

_RECEIVED_BYTES = 64 << 10
_ANCILLARY_BYTES = socket.CMSG_SPACE(16 * 4)


class HungUp(Exception):
    """The agent is gone, and everything it said was read; or it says what nobody understands."""


class Link:
    """One connection. One thread reads it; who sends holds a lock of the client's."""

    def __init__(self, link: socket.socket) -> None:
        link.setblocking(False)
        self._socket = link
        self._out: deque[tuple[int, memoryview]] = deque()
        self._frames = Frames()
        self._received = bytearray(_RECEIVED_BYTES)
        self._descriptors: deque[int] = deque()

    def fileno(self) -> int:
        """Return the socket's descriptor, for `poll`."""
        return self._socket.fileno()

    @property
    def wants_room(self) -> bool:
        """Whether there is something left to send."""
        return bool(self._out)

    def put(self, number: int, data: bytes) -> None:
        """Send the frame of a request, now or when there is room."""
        self._out.append((number, memoryview(data)))
        if len(self._out) == 1:
            self.flush()

    def flush(self) -> None:
        """Send what there is room for."""
        with contextlib.suppress(OSError):  # its end shows when it is read
            while self._out:
                number, view = self._out[0]
                sent = self._socket.send(view, socket.MSG_NOSIGNAL)
                if sent == len(view):
                    self._out.popleft()
                else:
                    self._out[0] = (-abs(number), view[sent:])  # begun: it must be finished

    def withdraw(self, numbers: Container[int]) -> None:
        """Do not send requests of which nothing was sent yet."""
        self._out = deque(item for item in self._out if item[0] not in numbers)

    def receive(self) -> Iterator[list[Any]] | None:
        """Read what there is, or some of it; returns the frames that are whole with that.

        None when there was nothing. Raises `HungUp`, also while the frames are iterated.
        """
        try:
            size, ancillary, _, _ = self._socket.recvmsg_into(
                [self._received], _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except OSError:
            size, ancillary = 0, []
        for _, _, descriptors in ancillary:
            self._descriptors.extend(memoryview(descriptors).cast("i"))
        if not size:
            raise HungUp
        return self._whole(memoryview(self._received)[:size])

    def _whole(self, data: memoryview) -> Iterator[list[Any]]:
        try:
            yield from self._frames.feed(data)
        except Nonsense as error:
            raise HungUp from error

    def take_descriptor(self) -> int:
        """Return the descriptor that came with the frame at hand; the caller's to close."""
        return self._descriptors.popleft()

    def close(self) -> None:
        """Close it, and the descriptors that nobody took."""
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())
