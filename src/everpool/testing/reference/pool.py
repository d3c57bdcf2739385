"""A client of the pool: every plain call is a transaction that nothing interleaves with."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, TypeVar

from everpool.errors import ClosedError, ConflictError, InvalidError
from everpool.records import RecordId
from everpool.testing.reference.handles import (
    ReferenceArray,
    ReferenceArrayValue,
    ReferenceMemory,
    array_handle,
    handle,
)
from everpool.testing.reference.log import (
    Log,
    Memory,
    Outcome,
    ReadSet,
    Report,
    WriteSet,
    conflict,
)
from everpool.testing.reference.transaction import ReferenceTransaction
from everpool.testing.reference.watch import ReferenceWatch

T = TypeVar("T")


class ReferencePool(MutableMapping[str, object]):
    """A client of a pool in memory; the same public methods as `everpool.open` returns.

    `rule` decides conflicts; tests pass broken ones to show that they are noticed.
    """

    live = True

    def __init__(
        self,
        *,
        rule: Callable[[ReadSet, list[WriteSet]], str | None] = conflict,
        log: Log | None = None,
    ) -> None:
        self._log = Log(rule) if log is None else log
        self._session = os.urandom(16)
        self._sequence = 0
        self._closed = False

    def connect(self) -> "ReferencePool":
        """Return another client of the same pool."""
        return ReferencePool(log=self._log)

    @contextlib.contextmanager
    def alone(self) -> Iterator[ReferenceTransaction]:
        """A transaction that nothing interleaves with: what one plain call is."""
        with self._log.changed, self.transaction() as tx:
            yield tx

    def __getitem__(self, name: str) -> object:
        with self.alone() as tx:
            target = tx.bound(name)
            if isinstance(target, Memory):
                return handle(self, target)
            return target.decoded()

    def __setitem__(self, name: str, value: object) -> None:
        with self.alone() as tx:
            tx[name] = value

    def __delitem__(self, name: str) -> None:
        with self.alone() as tx:
            del tx[name]

    def __contains__(self, name: object) -> bool:
        with self.alone() as tx:
            return name in tx

    def __len__(self) -> int:
        return len(list(self.names()))

    def __iter__(self) -> Iterator[str]:
        return self.names()

    def names(self, prefix: str = "") -> Iterator[str]:
        with self.alone() as tx:
            return tx.names(prefix)

    def size_of(self, name: str) -> int:
        with self.alone() as tx:
            target = tx.bound(name)
        return target.size if isinstance(target, Memory) else len(target.encoded)

    def allocate(self, name: str, size: int) -> ReferenceMemory:
        with self.alone() as tx:
            return ReferenceMemory(self, tx.allocate(name, size).memory)

    def allocate_array(self, name: str, shape: Any, dtype: Any = "float64") -> ReferenceArray:
        with self.alone() as tx:
            return ReferenceArray(self, tx.allocate_array(name, shape, dtype).memory)

    def memory(self, name: str) -> ReferenceMemory:
        with self.alone() as tx:
            return ReferenceMemory(self, tx.memory(name).memory)

    def array(self, name: str) -> ReferenceArray | ReferenceArrayValue:
        with self.alone() as tx:
            array = tx.array(name)
        return array if isinstance(array, ReferenceArrayValue) else array_handle(self, array.memory)

    def transaction(self, wait: bool = True) -> ReferenceTransaction:
        self.check_open()
        with self._log.changed:
            self._sequence += 1
            return ReferenceTransaction(self, RecordId(self._session, self._sequence), wait)

    def run(
        self,
        function: Callable[[ReferenceTransaction], T],
        attempts: int = 1000,
        timeout_s: float = 60.0,
    ) -> T:
        deadline = time.monotonic() + timeout_s
        for attempt in range(attempts):
            try:
                with self.transaction() as tx:
                    return function(tx)
            except ConflictError:
                if attempt + 1 == attempts or time.monotonic() > deadline:
                    raise
                time.sleep(0.0001 * attempt)
        raise InvalidError(f"attempts={attempts}: at least one is needed")

    def watch(self, prefix: str = "", since: int | None = None) -> ReferenceWatch:
        self.check_open()
        return ReferenceWatch(self, prefix, self.version if since is None else since)

    @property
    def version(self) -> int:
        self.check_open()
        return self._log.version

    def sync(self) -> int:
        return self.version

    def stats(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "names": len(self),
            "versions_behind": 0,
            "seconds_behind": 0.0,
        }

    def verify(self) -> Report:
        self.check_open()
        return Report(True, [])

    def outcome(self, id: RecordId) -> Outcome:
        self.check_open()
        with self._log.changed:
            for record in self._log.records:
                if record.id == id and record.committed:
                    return Outcome("committed", record.version, [])
        return Outcome("aborted", None, [])

    def close(self) -> None:
        with self._log.changed:
            self._closed = True
            self._log.changed.notify_all()

    def __enter__(self) -> "ReferencePool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def log(self) -> Log:
        return self._log

    def check_open(self) -> None:
        if self._closed:
            raise ClosedError("this pool was closed: open it again")
