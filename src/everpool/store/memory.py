"""A store in memory: the reference that other engines are compared with, and a place for faults.

    shelf = Shelf()
    store = MemoryStore(shelf, fault=lambda call, key: Fault.LOST if call == "swap" else None)

Stores on one shelf see the same objects, as processes with the same bucket do.
"""

import enum
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from xxhash import xxh3_128_hexdigest

from everpool.errors import (
    ClosedError,
    CommitUnknownError,
    ConflictError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from everpool.store import Data, Listed, Object, check_key, check_ranges


class Fault(enum.Enum):
    """What goes wrong with one call."""

    REFUSED = "an error before any effect, known to have had none"
    NEVER = "the request is lost: no effect, and no answer"
    LOST = "the effect happens, and its answer is lost"
    LATE = "no answer, and the effect happens later, at the shelf's next `deliver`"
    DENIED = "the rights are missing"


class _Kept(NamedTuple):
    data: bytes
    e_tag: str
    modified_ns: int


class Shelf:
    """The objects of a store in memory, and the requests that are still on their way."""

    def __init__(self, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self.clock_ns = clock_ns
        self.lock = threading.RLock()
        self.objects: dict[str, _Kept] = {}
        self.late: list[Callable[[], object]] = []
        self.requests = 0

    def deliver(self) -> None:
        """Let the late requests arrive, in the order in which they were sent."""
        with self.lock:
            late, self.late = self.late, []
            for request in late:
                request()


class MemoryStore:
    """A `Store` that lives and dies with its process.

    `fault` is asked before each call, with the method's name and the key, what is to go wrong. It
    may also sleep, for a store that is slow.
    """

    def __init__(
        self,
        shelf: Shelf | None = None,
        fault: Callable[[str, str], Fault | None] = lambda call, key: None,
    ) -> None:
        self.shelf = shelf or Shelf()
        self.fault = fault
        self._closed = False

    def get(self, key: str) -> Object:
        """Return the object under `key`."""
        self._begin("get", key)
        return self._get(key)

    def get_if_changed(self, key: str, e_tag: str) -> Object | None:
        """Return the object unless its tag is `e_tag`."""
        self._begin("get_if_changed", key)
        found = self._get(key)
        return None if found.e_tag == e_tag else found

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Return slices of the object."""
        check_ranges(key, ranges)
        self._begin("get_ranges", key)
        data = memoryview(self._get(key).data)
        for start, end in ranges:
            if end > len(data):
                raise InvalidError(
                    f"bytes {start} to {end} are not in {key!r}, which has {len(data)}"
                )
        return [data[start:end] for start, end in ranges]

    def put(self, key: str, data: Data) -> None:
        """Copy the bytes."""
        kept = bytes(data)
        self._change("put", key, lambda: self._keep(key, kept))

    def swap(self, key: str, data: Data, e_tag: str | None) -> str:
        """Replace the object if its tag is `e_tag`."""
        kept = bytes(data)

        def effect() -> str:
            current = self.shelf.objects.get(key)
            if (current and current.e_tag) != e_tag:
                raise ConflictError(f"{key!r} is another object by now", key=key)
            return self._keep(key, kept)

        return self._change("swap", key, effect)

    def put_pieces(self, key: str, pieces: Iterable[Data], size: int) -> None:
        """Join the pieces."""
        self._check_open()
        kept = b"".join(bytes(piece) for piece in pieces)
        if len(kept) != size:
            raise InvalidError(f"{key!r} was to have {size} bytes, its pieces have {len(kept)}")
        self._change("put_pieces", key, lambda: self._keep(key, kept))

    def list(self, prefix: str, after: str = "") -> Iterator[Listed]:
        """Yield what is there when the iteration begins."""
        self._begin("list", prefix or "-")
        folder = f"{prefix}/" if prefix else ""
        with self.shelf.lock:
            objects = dict(self.shelf.objects)
        for key in sorted(objects, key=str.encode):
            if key.startswith(folder) and key.encode() > after.encode():
                yield Listed(key, len(objects[key].data), objects[key].modified_ns)

    def delete(self, keys: Sequence[str]) -> None:
        """Forget the objects."""

        def effect(key: str) -> str:
            self.shelf.objects.pop(key, None)
            return ""

        for key in keys:
            self._change("delete", key, lambda key=key: effect(key))

    def close(self) -> None:
        """Refuse every later call. The shelf keeps its objects."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the store is closed")

    def _begin(self, call: str, key: str) -> Fault | None:
        self._check_open()
        check_key(key)
        with self.shelf.lock:
            self.shelf.requests += 1
        fault = self.fault(call, key)
        match fault:
            case Fault.DENIED:
                raise InvalidError(f"may not {call} {key!r}: give the rights to it", key=key)
            case Fault.REFUSED:
                raise UnavailableError(f"cannot {call} {key!r} now", key=key)
            case Fault.NEVER | Fault.LOST | Fault.LATE if call.startswith(("get", "list")):
                raise UnavailableError(f"no answer to {call} {key!r}", key=key)
            case _:
                return fault

    def _change(self, call: str, key: str, effect: Callable[[], str]) -> str:
        """Have the effect of a call that changes something, as its fault allows."""
        fault = self._begin(call, key)
        with self.shelf.lock:
            if fault is Fault.LATE:
                self.shelf.late.append(lambda: _quietly(effect))
            elif fault is Fault.LOST:
                _quietly(effect)
            elif fault is not Fault.NEVER:
                return effect()
        if call == "swap":
            raise CommitUnknownError(f"no answer to the swap of {key!r}", id=key)
        raise UnavailableError(f"no answer to {call} {key!r}", key=key)

    def _get(self, key: str) -> Object:
        with self.shelf.lock:
            kept = self.shelf.objects.get(key)
        if kept is None:
            raise NotFoundError(f"there is no object {key!r}", key=key)
        return Object(*kept)

    def _keep(self, key: str, data: bytes) -> str:
        with self.shelf.lock:
            kept = _Kept(data, xxh3_128_hexdigest(data), self.shelf.clock_ns())
            self.shelf.objects[key] = kept
        return kept.e_tag


def _quietly(effect: Callable[[], str]) -> None:
    """A request whose answer nobody gets may also find that it comes too late."""
    try:
        effect()
    except ConflictError:
        return
