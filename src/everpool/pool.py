"""The pool: names, values and memory, as a user sees them."""

import random
import time
from collections.abc import Callable, Iterator, MutableMapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from everpool import forks, values
from everpool.arrays import header_of, make_layout
from everpool.engine import INLINE_BYTES, Engine
from everpool.errors import ClosedError, ConflictError, ExistsError, InvalidError, NotFoundError
from everpool.memory import Array, Memory, ValueArray, open_array
from everpool.records import (
    Allocate,
    Delete,
    Operation,
    Payload,
    Pin,
    Put,
    Record,
    RecordId,
    Unpin,
    check_name,
)
from everpool.replica.bulk import Staged
from everpool.replica.index import BODY, INLINE, MEMORY, NameRow
from everpool.replica.replica import MOST_KEPT, Replica
from everpool.replica.verify import Report
from everpool.snapshots import (
    Collected,
    Retention,
    Snapshot,
    check_unlocked,
    restoring,
    retaining,
    retention_of,
    snapshots_of,
    version_of,
)
from everpool.transaction import Transaction, check_size
from everpool.watch import Watch

T = TypeVar("T")
_SHORTEST_WAIT_S = 0.0002
_LONGEST_WAIT_S = 0.05
_LOOKUP_TRIES = 20
_LONGEST_LOCK_S = 36_525 * 86_400
_MISSING = object()
_IMMUTABLE = frozenset({bytes, str, int, float, complex, bool})
_CACHED_BYTES = 4096
# What the encoding of every bytes value begins with: the bytes follow.
_BYTES_HEADER = values.encode(b"").tobytes()
_BYTES_AT = BODY + len(_BYTES_HEADER)


class Outcome(NamedTuple):
    """What became of a record: "committed", "aborted" or "expired".

    `version` is the one it committed as, `results` the old bytes of its additions, in order.
    Expired means that it was decided longer ago than outcomes are kept.
    """

    state: str
    version: int | None
    results: list[bytes]


class Pool(MutableMapping[str, Any]):
    """A named, byte-addressable, transactional memory space. Made by `everpool.open`.

    Every change is atomic and durable when the call that made it returns. Threads may share a
    pool, and any number of processes may open it. In a forked child it opens itself again.
    """

    def __init__(
        self, path: Path | str, acquire: Callable[[bool], Engine], *, create: bool, read_only: bool
    ) -> None:
        """`acquire(create)` returns this process's engine for the pool at `path`."""
        self.path = path
        self._read_only = read_only
        self._acquire = acquire
        self._closed = False
        self._engine = acquire(create)

    def __repr__(self) -> str:
        return f"<everpool.Pool {str(self.path)!r}{' closed' if self._closed else ''}>"

    def __reduce__(self) -> Any:
        return self._engine.reopener(self._read_only)

    # Mapping defines equality by content, which would read the whole pool.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return id(self)

    # Lifetime

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what was pipelined and close. Views and arrays that are in use live on."""
        if not self._closed:
            engine = self._engine
            ours = engine.is_ours()
            if ours:
                engine.drain()
            self._closed = True
            if ours:
                engine.release()

    def engine(self) -> Engine:
        """Return the engine of this process; raises `ClosedError`."""
        if self._closed:
            raise ClosedError(f"the pool {self.path} is closed: open it again")
        engine = self._engine
        if engine.generation != forks.generation:
            engine = self._open_again()
        return engine

    def _open_again(self) -> Engine:
        with forks.switching:
            if self._engine.generation != forks.generation:
                self._engine = self._acquire(False)
            return self._engine

    def writing_engine(self) -> Engine:
        """Return the engine for a change; raises `InvalidError` when open read-only."""
        self.check_writable()
        return self.engine()

    def check_writable(self) -> None:
        """Raise `InvalidError` when the pool is open read-only."""
        if self._read_only:
            raise InvalidError(f"the pool {self.path} is open read-only: open it for writing")

    # The mapping

    def __getitem__(self, name: str) -> Any:
        found = self._find(name)
        if found is _MISSING:
            raise NotFoundError(f"there is no {name!r} in {self.path}", name=name)
        return found

    def get(self, name: str, default: Any = None) -> Any:
        """Return what `name` is bound to, or `default`."""
        found = self._find(name)
        return default if found is _MISSING else found

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        engine = self.writing_engine()
        payload, staged = self.encode_value(value)
        record = Record(engine.replica.version(), [], [], [], [Put(name, payload)])
        engine.write(record, [] if staged is None else [staged]).version()

    def __delitem__(self, name: str) -> None:
        self._commit(Delete(check_name(name)))

    def __contains__(self, name: object) -> bool:
        replica = self.engine().replica
        with replica.index.read() as txn:
            return replica.index.name(txn, check_name(name)) is not None

    def __len__(self) -> int:
        return self.engine().replica.state().names

    def __iter__(self) -> Iterator[str]:
        return self.names()

    def names(self, prefix: str = "") -> Iterator[str]:
        """Yield the names under `prefix` in the order of their UTF-8 bytes.

        Not of one version when they are many and others commit meanwhile; in a transaction they
        are.
        """
        if type(prefix) is not str or "\0" in prefix:
            raise InvalidError(f"a prefix is a str without NUL, not {prefix!r}")
        return self.engine().replica.names(prefix)

    def size_of(self, name: str) -> int:
        """Return how many bytes an object has: memory in all, a value as it is stored.

        Nothing but the index is looked at. Raises `NotFoundError`.
        """
        return self._row(name).size

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Bind several names in one transaction."""
        items = dict(*args, **kwargs)
        self.run(lambda tx: tx.update(items))

    def pop(self, name: str, *default: Any) -> Any:
        """Remove `name` and return what it was bound to, atomically."""
        if len(default) > 1:
            raise TypeError(f"pop takes a name and a default, not {1 + len(default)} defaults")

        def take(tx: Transaction) -> Any:
            if default and name not in tx:
                return default[0]
            found = tx[name]
            del tx[name]
            return found

        return self.run(take)

    def popitem(self) -> tuple[str, Any]:
        """Remove and return the first name and its value, atomically."""

        def take(tx: Transaction) -> tuple[str, Any]:
            for name in tx.names():
                found = tx[name]
                del tx[name]
                return name, found
            raise NotFoundError(f"the pool {self.path} is empty")

        return self.run(take)

    def setdefault(self, name: str, default: Any = None) -> Any:
        """Return what `name` is bound to; bind it to `default` first when it is free."""

        def ensure(tx: Transaction) -> bool:
            if name in tx:
                return False
            tx[name] = default
            return True

        self.run(ensure)
        return self[name]

    def clear(self) -> None:
        """Remove every name in one transaction."""

        def remove(tx: Transaction) -> None:
            for name in list(tx.names()):
                del tx[name]

        self.run(remove)

    # Memory

    def allocate(self, name: str, size: int) -> Memory:
        """Bind a free name to `size` zero bytes of memory, which costs no disk until written to.

        Raises `ExistsError` when the name is taken, `InvalidError` for sizes out of 1 to 2**46.
        """
        self._commit(Allocate(check_name(name), check_size(size), b""))
        return self.memory(name)

    def allocate_array(
        self, name: str, shape: int | tuple[int, ...], dtype: DTypeLike = "float64"
    ) -> Array:
        """Bind a free name to an array of zeros in memory, mutable in place."""
        layout = make_layout(shape, dtype)
        size = max(1, layout.nbytes)
        self._commit(Allocate(check_name(name), size, header_of(layout)))
        return self.array(name)

    def memory(self, name: str) -> Memory:
        """Return a handle on memory. Raises `NotFoundError`, or `InvalidError` for a value."""
        row = self._row(name)
        if row.kind != MEMORY:
            raise InvalidError(f"{name!r} is a value, not memory: read pool[{name!r}]", name=name)
        return Memory(self, name, row.id, row.size, bytes(row.body))

    def array(self, name: str) -> Array:
        """Return a typed handle on an array: writable when allocated, read-only when a value."""
        row = self._row(name)
        if row.kind == MEMORY:
            if not row.body:
                raise InvalidError(
                    f"{name!r} is memory without a type: use pool.memory({name!r})", name=name
                )
            return open_array(self, name, row.id, row.size, bytes(row.body))
        found = self._decode(name, row)
        if not isinstance(found, np.ndarray):
            raise InvalidError(f"{name!r} is no array but {type(found).__name__}", name=name)
        return ValueArray(name, cast("NDArray[Any]", found), row.version)

    # Transactions

    def transaction(self, wait: bool = True) -> Transaction:
        """Begin a transaction; use it in a `with` statement.

        With `wait=False`, leaving the block does not wait for the disk: `tx.committed` is a
        future of the version. Such transactions commit in the order they were left.
        """
        return Transaction(self, wait=wait)

    def run(
        self,
        function: Callable[[Transaction], T],
        *,
        attempts: int | None = None,
        timeout_s: float = 60.0,
    ) -> T:
        """Call `function` with a transaction until it commits; returns what it returned.

        Retries `ConflictError`, waiting longer each time, up to `attempts` times and for
        `timeout_s`, then raises it.
        """
        deadline = time.monotonic() + timeout_s
        wait_s, tried = _SHORTEST_WAIT_S, 0
        while True:
            try:
                with self.transaction() as tx:
                    result = function(tx)
                return result
            except ConflictError:
                tried += 1
                if tried == attempts or time.monotonic() > deadline:
                    raise
            time.sleep(random.uniform(0, wait_s))
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def outcome(self, id: RecordId | str) -> Outcome:
        """Settle for good what became of a record whose answer was lost."""
        try:
            id = RecordId.parse(id) if isinstance(id, str) else RecordId(*id).checked()
        except (TypeError, ValueError) as error:
            raise InvalidError(f"{id!r} is not a record id: {error}") from None
        return Outcome(*self.engine().outcome(id))

    # Watching and looking after it

    def watch(self, prefix: str = "", since: int | None = None) -> Watch:
        """Return an iterator of the changes under `prefix`, from now on or after `since`.

        It waits for the next change. Raises `InvalidError` when `since` is longer ago than
        changes are kept.
        """
        return Watch(self, prefix, since)

    @property
    def version(self) -> int:
        """The newest committed version that this process sees."""
        return self.engine().replica.version()

    def sync(self) -> int:
        """Wait for what this process pipelined; returns the version, with all committed before."""
        return self.engine().sync()

    def stats(self) -> dict[str, Any]:
        """Return facts about the pool and this process's replica of it."""
        return self.engine().stats()

    def verify(self, progress: Callable[[int, int], None] | None = None) -> Report:
        """Read everything and compare it with its checksums, in a process of its own.

        `progress` is called with the bytes read so far and the bytes in all.
        """
        return self.engine().verify(progress)

    # The past

    def snapshot(
        self, name: str, version: int | None = None, *, locked: bool | timedelta = False
    ) -> Snapshot:
        """Give a name to the newest version, or to an older one, so that it can be found again.

        At a path, the first one begins the pool's past: it makes a checkpoint, which copies all
        memory once.

        A `locked` one cannot be forgotten for a period: the one given, else that of the bucket's
        default retention, else 30 days. Where the bucket has object lock, everything that the
        snapshot needs is locked there for as long, old objects included; what came of it is in
        `lock` and `locked_until` of what is returned. It is a checkpoint of the newest version.

        Raises `ExistsError` when there is such a snapshot.
        """
        check_name(name)
        if locked is not False:
            period_s = locked.total_seconds() if isinstance(locked, timedelta) else None
            self._lock(name, version, period_s)
            return next(found for found in self.snapshots() if found.name == name)
        if version == 0:
            raise InvalidError("version 0 is the empty pool, which needs no name: name a later one")
        engine = self.writing_engine()
        engine.sync()
        engine.begin_past(version)
        self._commit(Pin(check_name(name), version or 0))
        return next(found for found in self.snapshots() if found.name == name)

    def _lock(self, name: str, version: int | None, period_s: float | None) -> None:
        if version is not None:
            raise InvalidError(
                "a locked snapshot is of the newest version: leave `version` out, or restore that "
                "version first"
            )
        if period_s is not None and not 1 <= period_s <= _LONGEST_LOCK_S:
            raise InvalidError(f"locked for {period_s:g} seconds: give a second to a century")
        self.writing_engine().lock(name, period_s)

    def snapshots(self) -> list[Snapshot]:
        """Return all snapshots, oldest version first."""
        return snapshots_of(self.engine())

    def forget_snapshot(self, name: str) -> None:
        """Take a snapshot's name away.

        Raises `NotFoundError`, and `InvalidError` for a locked one before its time.
        """
        self.sync()
        check_unlocked(self.snapshots(), name)
        self._commit(Unpin(check_name(name)))

    def at(self, when: "int | str | datetime") -> "Pool":
        """Return the pool as it was: a read-only pool, to be closed when done.

        `when` is a version, the name of a snapshot, or a time (the newest version that is not
        younger; a naive one is local). It costs the index of names; bytes come when touched.
        Raises `InvalidError` for the future, and, for a pool at a path, for what was before its
        past began, with the first snapshot or checkpoint.
        """
        engine = self.engine()
        version = version_of(engine, when)
        return Pool(self.path, engine.past(version), create=False, read_only=True)

    def restore(self, to: "int | str | datetime") -> int:
        """Make everything what it was, in one commit; returns the version.

        It is a commit like any other: the versions before stay, so that it can be undone by
        another `restore`. Raises `ConflictError` when somebody commits meanwhile.
        """
        engine = self.writing_engine()
        with self.at(to) as then:
            engine.sync()
            record, staged = restoring(engine, then.engine())
        if record.operations:
            engine.write(record, staged).version()
        return self.version

    def branch(self, url: str, at: "int | str | datetime | None" = None) -> None:
        """Make a pool at `url` that begins as this one is, or was, and goes its own way from there.

        A branch of a pool at a URL shares its segments: only the index and what no checkpoint has
        yet are copied, so this pool must stay where it is. A snapshot of this pool, `branch at
        URL`, says so. One of a pool at a path shares nothing, so either may be deleted; what lies
        on the same disk is linked instead of copied. Open the branch like any other pool. Raises
        `ExistsError` when there is a pool at `url`.
        """
        engine = self.writing_engine()
        engine.begin_past()
        version = engine.sync() if at is None else version_of(engine, at)
        engine.branch(url, version)

    def checkpoint(
        self, url: str | None = None, progress: Callable[[int, int], None] | None = None
    ) -> int:
        """Make a checkpoint now; returns its version.

        In a bucket, new hosts begin with it. At a path it begins the pool's past, or goes on with
        it. From then on, checkpoints are made by themselves when enough was committed.

        With a `url`, a pool at a path sends the checkpoint there, as a backup: opening that URL
        goes on from it. The first one sends everything, later ones only what is not there yet. What
        was interrupted is finished by calling it again. `progress` is called with the bytes sent so
        far, and the bytes in all. Raises `ExistsError` when there is a pool at `url` that is no
        backup of this one, or that was opened for writing since.
        """
        engine = self.writing_engine()
        return engine.checkpoint() if url is None else engine.backup(url, progress)

    @property
    def retention(self) -> Retention:
        """How long versions are kept; 7 days and 16,384 versions unless `retain` changed it."""
        return retention_of(self.engine())

    def retain(self, age: timedelta | None = None, versions: int | None = None) -> Retention:
        """Say how long versions are kept: while younger than `age`, or among the newest `versions`.

        What is left out stays as it is. Whatever a version needs stays in the store as long as it
        is kept, and those of snapshots are kept until `forget_snapshot`. What was collected does
        not come back. Raises `InvalidError` for less than nothing.
        """
        self.writing_engine()
        self._commit(retaining(self.retention, age, versions))
        return self.retention

    def collect(
        self, dry_run: bool = False, progress: Callable[[dict[str, Any]], None] | None = None
    ) -> Collected:
        """Delete from the store what no version needs that is kept.

        This also happens by itself, about once an hour while something is committed. With
        `dry_run`, nothing is changed, and what is returned is what would be. `progress` is
        called now and then with what was `listed` and `deleted` so far.
        """
        self.writing_engine()
        told = self.engine().collect(dry_run, progress)
        return Collected(**{name: told[name] for name in Collected._fields})

    # Used by transactions

    def encode_value(self, value: Any) -> tuple[Payload, Staged | None]:
        """Return a value as a record's payload, stored first when it is large."""
        encoded = values.encode(value)
        if encoded.size <= INLINE_BYTES:
            return encoded.tobytes(), None
        staged = self.writing_engine().stage(encoded)
        return staged.reference, staged

    def _commit(self, operation: Operation) -> None:
        engine = self.writing_engine()
        record = Record(engine.replica.version(), [], [], [], [operation])
        engine.write(record, []).version()

    def _row(self, name: str) -> NameRow:
        row = self.engine().replica.find(check_name(name)).row
        if row is None:
            raise NotFoundError(f"there is no {name!r} in {self.path}", name=name)
        return row

    def _find(self, name: str) -> Any:
        """Return what `name` is bound to, or `_MISSING`. The short way is for small values."""
        engine = self._engine
        if self._closed or engine.generation != forks.generation:
            engine = self.engine()
        if type(name) is str:
            replica = engine.replica
            version, kept_number, kept = replica.kept
            # While nothing was committed since, an immutable value that was read still is it.
            if version == replica.shared.settled() and replica.trusted:
                found = kept.get(name, _MISSING)
                if found is not _MISSING:
                    return found
            known = replica.index.inline(name)
            if known is not None:
                number, row = known
                if row.startswith(_BYTES_HEADER, BODY):
                    found = row[_BYTES_AT:]
                else:
                    found = values.decode(row[BODY:], zero_copy=False)
                    if type(found) not in _IMMUTABLE:
                        return found
                if len(row) <= _CACHED_BYTES:
                    if number != kept_number:
                        kept = replica.keep(number).values
                    if len(kept) < MOST_KEPT:
                        kept[name] = found
                return found
        return self._find_any(check_name(name), engine.replica)

    def _find_any(self, name: str, replica: Replica) -> Any:
        row = replica.find(name).row
        if row is None:
            return _MISSING
        if row.kind == MEMORY:
            header = bytes(row.body)
            if header:
                return open_array(self, name, row.id, row.size, header)
            return Memory(self, name, row.id, row.size, header)
        return self._decode(name, row)

    def _decode(self, name: str, row: NameRow) -> Any:
        for _ in range(_LOOKUP_TRIES):
            if row.kind == INLINE:
                return values.decode(row.body, zero_copy=False)
            if row.kind == MEMORY:
                raise ExistsError(f"{name!r} is memory now: look it up again", name=name)
            data = self.engine().replica.bulk_data(name, row)
            if data is not None:
                return values.decode(data, zero_copy=True)
            row = self._row(name)  # replaced between the two looks
        raise ConflictError(f"{name!r} is replaced faster than it can be read: try again")
