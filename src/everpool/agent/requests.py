"""What a client has asked and has no answer to yet."""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from everpool.agent.frames import pack
from everpool.records import RecordId

_MOST_COMMITS = 4096
_MOST_BYTES = 256 << 20


class Request:
    """Something that is asked. `done` is called when `result` or `error` is there."""

    __slots__ = ("arguments", "deadline", "done", "error", "id", "number", "result", "size", "verb")

    def __init__(
        self,
        verb: str,
        arguments: tuple[Any, ...],
        deadline: float,
        done: "Callable[[Request], None]",
    ) -> None:
        self.verb = verb
        self.arguments = arguments
        self.deadline = deadline
        self.done = done
        self.number = 0
        self.size = 0
        self.id: RecordId | None = None
        self.result: Any = None
        self.error: BaseException | None = None

    def packed(self) -> bytes:
        """Return its frame."""
        return pack(self.number, self.verb, *self.arguments)


class Requests:
    """The requests of a client, in order. Its mutex must be held for all that is done here.

    `room` is told when one goes.
    """

    def __init__(self, mutex: threading.Lock, first: int) -> None:
        """The numbers of requests begin at `first`."""
        self.room = threading.Condition(mutex)
        # No request is late before.
        self.due = math.inf
        self._requests: OrderedDict[int, Request] = OrderedDict()
        self._commits = 0
        self._bytes = 0
        self._number = first - 1

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests.values()))

    def get(self, number: int) -> Request | None:
        """Return the request with that number, if there still is one."""
        return self._requests.get(number)

    @property
    def last(self) -> int:
        """The number that was given last."""
        return self._number

    @property
    def is_full(self) -> bool:
        """Whether another commit must wait until one goes."""
        return self._commits >= _MOST_COMMITS or self._bytes >= _MOST_BYTES

    def add(self, request: Request) -> bytes:
        """Give it a number and keep it; returns its frame. Raises `InvalidError`: too large."""
        self._number += 1
        request.number = self._number
        data = request.packed()
        self._requests[request.number] = request
        if request.verb == "commit":
            self._commits += 1
            self._bytes += request.size
        return data

    def remove(self, number: int) -> Request | None:
        """Take a request out."""
        request = self._requests.pop(number, None)
        if request is not None and request.verb == "commit":
            self._commits -= 1
            self._bytes -= request.size
        self.room.notify_all()
        return request

    def oldest_commit(self) -> float:
        """Return the number of the oldest commit, or infinity."""
        if not self._commits:
            return math.inf
        return next(one.number for one in self._requests.values() if one.verb == "commit")

    def late(self, now: float) -> list[Request]:
        """Return those whose time is over, and look when the next ones' will be."""
        requests = self._requests.values()
        self.due = min((one.deadline for one in requests if one.deadline > now), default=math.inf)
        return [one for one in requests if one.deadline <= now]
