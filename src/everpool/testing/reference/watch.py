"""A watch: the changes of names under a prefix, in commit order."""

from collections.abc import Iterator
from typing import Protocol

from everpool.errors import ClosedError, UnavailableError
from everpool.testing.reference.log import Bind, Change, Log, Memory, Operation, Store, Unbind


class Client(Protocol):
    """The pool that is watched."""

    @property
    def log(self) -> Log: ...

    def check_open(self) -> None: ...


class ReferenceWatch:
    """The changes of names under a prefix, in commit order, from a version on."""

    def __init__(self, pool: Client, prefix: str, since: int) -> None:
        self._pool = pool
        self._prefix = prefix
        self._version = since
        self._ready: list[Change] = []
        self._closed = False

    def get(self, timeout_s: float | None = None) -> Change | None:
        """Return the next change, or None when there was none for `timeout_s` seconds."""
        log = self._pool.log
        with log.changed:
            log.changed.wait_for(lambda: self._closed or self._advance(), timeout_s)
            if self._closed:
                raise ClosedError("this watch was closed")
            return self._ready.pop(0) if self._ready else None

    def _advance(self) -> bool:
        """Move on to the next record that changed something under the prefix, if there is one."""
        self._pool.check_open()
        records = self._pool.log.records
        while not self._ready and self._version < len(records):
            record = records[self._version]
            self._version += 1
            changes = [_change(operation, record.version) for operation in record.operations]
            self._ready = [change for change in changes if change.name.startswith(self._prefix)]
        return bool(self._ready)

    def __iter__(self) -> Iterator[Change]:
        return self

    def __next__(self) -> Change:
        try:
            change = self.get()
        except ClosedError:
            raise StopIteration from None
        if change is None:
            raise UnavailableError("a watch woke up without a change")
        return change

    def close(self) -> None:
        with self._pool.log.changed:
            self._closed = True
            self._pool.log.changed.notify_all()

    def __enter__(self) -> "ReferenceWatch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _change(operation: Operation, version: int) -> Change:
    match operation:
        case Bind(name, Memory(size=size)):
            return Change(name, "allocate", version, 0, size)
        case Bind(name, target):
            return Change(name, "put", version, 0, len(target.encoded))  # type: ignore[union-attr]
        case Unbind(name):
            return Change(name, "delete", version, 0, 0)
        case Store(target, offset, data):
            return Change(target.name, "write", version, offset, len(data))
