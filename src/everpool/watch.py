"""Watching: what changes under a prefix, as it changes."""

import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from everpool.errors import ClosedError, InvalidError
from everpool.records import payload_size
from everpool.replica.effects import effects_of, entry_of
from everpool.replica.index import Resolved, TailRow
from everpool.verdict import Add, Bind, BindMemory, Effect, Store, Unbind

if TYPE_CHECKING:
    from everpool.pool import Pool

_ENTRIES_AT_ONCE = 256
_NAP_S = 0.1


class Change(NamedTuple):
    """One committed change. `kind` is put, delete, allocate or write.

    `offset` and `size` are the bytes of memory that were written; for the other kinds offset is 0
    and size the bytes of the new value or memory.
    """

    name: str
    kind: str
    version: int
    offset: int
    size: int


class Watch:
    """An endless iterator of changes, in order, none left out.

    Nothing is queued in between: changes are read from the pool's tail when asked for. A watch
    that falls back further than the tail reaches raises `InvalidError`.
    """

    def __init__(self, pool: "Pool", prefix: str, since: int | None) -> None:
        if type(prefix) is not str:
            raise InvalidError(f"a prefix is a str, not {prefix!r}")
        self._pool = pool
        self._prefix = prefix
        self._ready: deque[Change] = deque()
        self._closed = False
        engine = pool.engine()
        self._lineage = engine.lineage
        newest = engine.replica.version()
        if since is not None and (type(since) is not int or not 0 <= since <= newest):
            raise InvalidError(f"since is a version from 0 to {newest}, not {since!r}")
        self._version = newest if since is None else since
        self._fetch()

    @property
    def version(self) -> int:
        """Everything up to this version was handed out or did not concern the prefix."""
        return self._ready[0].version - 1 if self._ready else self._version

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Change]:
        return self

    def __next__(self) -> Change:
        try:
            change = self.get()
        except ClosedError:
            if self._closed:
                raise StopIteration from None
            raise
        assert change is not None
        return change

    def get(self, timeout_s: float | None = None) -> Change | None:
        """Return the next change; None when there is none within `timeout_s`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if self._closed:
                raise ClosedError("the watch is closed")
            if self._ready:
                return self._ready.popleft()
            shared = self._pool.engine().replica.shared
            seen = shared.publications()
            if self._fetch():
                continue
            left_s = _NAP_S if deadline is None else min(_NAP_S, deadline - time.monotonic())
            if left_s <= 0:
                return None
            shared.wait(seen, left_s)

    def close(self) -> None:
        """End the iteration, also in another thread that waits for a change."""
        self._closed = True

    def _fetch(self) -> bool:
        """Read the next entries of the tail; returns whether there were any."""
        engine = self._pool.engine()
        if engine.lineage != self._lineage:
            raise InvalidError(
                "the pool's log was replaced by another one: read what you need afresh and watch "
                "from there"
            )
        floor, rows = engine.replica.changes(self._version, _ENTRIES_AT_ONCE)
        first = rows[0][1].first_version if rows else None
        if self._version < floor and (first is None or first > self._version + 1):
            raise InvalidError(
                f"the changes after version {self._version} are no longer kept, only those after "
                f"{floor}: read what you need afresh and watch from there",
                oldest=floor,
            )
        for last, row in rows:
            self._ready.extend(self._changes(row))
            self._version = last
        return bool(rows)

    def _changes(self, row: TailRow) -> Iterator[Change]:
        after = self._version
        for version, effect, resolved in effects_of(entry_of(row), row):
            if version > after:
                change = _change(version, effect, resolved)
                if change is not None and change.name.startswith(self._prefix):
                    yield change


def _change(version: int, effect: Effect, resolved: Resolved) -> Change | None:
    match effect:
        case Store(_, offset, payload):
            return Change(resolved.name, "write", version, offset, payload_size(payload))
        case Add(_, offset, _, delta):
            return Change(resolved.name, "write", version, offset, len(delta))
        case Bind(name, _, payload):
            return Change(name, "put", version, 0, payload_size(payload))
        case BindMemory(name, _, size):
            return Change(name, "allocate", version, 0, size)
        case Unbind(name):
            return Change(name, "delete", version, 0, 0)
        case _:
            return None
