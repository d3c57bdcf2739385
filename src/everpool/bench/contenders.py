"""The stores that are compared, each used the way its own manual would have it.

Every store is durable on return of `put`. A key is made ready by `key` outside the timed part, so
that nobody pays for its spelling; what a call must do each time (a transaction, a statement, a
request) it does each time.
"""

import os
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, Protocol

import lmdb

import everpool
from everpool.bench.servers import RedisClient, request

LMDB_MAP_BYTES = 1 << 38
BATCH = 5_000


class Store(Protocol):
    """A durable map from names to bytes."""

    title: str

    def key(self, index: int) -> Any: ...
    def get(self, key: Any) -> bytes: ...
    def put(self, key: Any, value: bytes) -> None: ...
    def load(self, items: Iterable[tuple[Any, bytes]]) -> None: ...
    def close(self) -> None: ...


class DictStore:
    """The limit of a read: a Python dict, which shares with nobody and forgets everything."""

    title = "dict"

    def __init__(self) -> None:
        self._items: dict[str, bytes] = {}

    def key(self, index: int) -> str:
        return f"key/{index:07d}"

    def get(self, key: str) -> bytes:
        return self._items[key]

    def put(self, key: str, value: bytes) -> None:
        self._items[key] = value

    def load(self, items: Iterable[tuple[str, bytes]]) -> None:
        self._items.update(items)

    def close(self) -> None:
        self._items.clear()


class EverpoolStore:
    """The pool under test, by its public interface."""

    title = "Everpool"

    def __init__(self, folder: Path) -> None:
        self.pool = everpool.open(folder)

    def key(self, index: int) -> str:
        return f"key/{index:07d}"

    def get(self, key: str) -> Any:
        return self.pool[key]

    def put(self, key: str, value: bytes) -> None:
        self.pool[key] = value

    def load(self, items: Iterable[tuple[str, bytes]]) -> None:
        for batch in batches(items):
            with self.pool.transaction() as tx:
                for key, value in batch:
                    tx[key] = value

    def put_pipelined(self, keys: Sequence[str], value: bytes) -> None:
        """Commit one transaction per key without waiting; return when all are durable."""
        for key in keys:
            with self.pool.transaction(wait=False) as tx:
                tx[key] = value
        self.pool.sync()

    def close(self) -> None:
        self.pool.close()


class LmdbStore:
    """Raw LMDB with its default durability: the floor under everything built on it."""

    title = "raw LMDB"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = lmdb.open(str(folder), map_size=LMDB_MAP_BYTES, max_readers=1024)

    def key(self, index: int) -> bytes:
        return b"key/%07d" % index

    def get(self, key: bytes) -> bytes:
        with self.environment.begin(buffers=True) as txn:
            return bytes(txn.get(key))  # type: ignore[arg-type]

    def put(self, key: bytes, value: bytes) -> None:
        with self.environment.begin(write=True) as txn:
            txn.put(key, value)

    def load(self, items: Iterable[tuple[bytes, bytes]]) -> None:
        for batch in batches(items):
            with self.environment.begin(write=True) as txn:
                for key, value in batch:
                    txn.put(key, value)

    def close(self) -> None:
        self.environment.close()


class SqliteStore:
    """SQLite with a write-ahead log that is flushed at every commit (synchronous=FULL)."""

    title = "SQLite"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(
            folder / "file.db", isolation_level=None, timeout=60, check_same_thread=False
        )
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS items (key TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID"
        )

    def key(self, index: int) -> str:
        return f"key/{index:07d}"

    def get(self, key: str) -> bytes:
        found = self._connection.execute("SELECT value FROM items WHERE key=?", (key,))
        return found.fetchone()[0]

    def put(self, key: str, value: bytes) -> None:
        self._connection.execute("INSERT OR REPLACE INTO items VALUES (?, ?)", (key, value))

    def load(self, items: Iterable[tuple[str, bytes]]) -> None:
        self._connection.execute("BEGIN")
        self._connection.executemany("INSERT OR REPLACE INTO items VALUES (?, ?)", items)
        self._connection.execute("COMMIT")

    def close(self) -> None:
        self._connection.close()


class RedisStore:
    """Redis over a loopback socket; see `servers` for how it runs."""

    title = "Redis"

    def __init__(self, port: int) -> None:
        self.client = RedisClient(port)

    def key(self, index: int) -> bytes:
        return b"key/%07d" % index

    def get(self, key: bytes) -> bytes:
        return self.client.call(b"GET", key)

    def put(self, key: bytes, value: bytes) -> None:
        self.client.call(b"SET", key, value)

    def load(self, items: Iterable[tuple[bytes, bytes]]) -> None:
        for batch in batches(items):
            self._pipeline(batch)

    def put_pipelined(self, keys: Sequence[bytes], value: bytes) -> None:
        """Send the writes without waiting in between; return when all are durable."""
        for batch in batches((key, value) for key in keys):
            self._pipeline(batch)

    def _pipeline(self, batch: list[tuple[bytes, bytes]]) -> None:
        self.client.send_raw(b"".join(request(b"SET", key, value) for key, value in batch))
        for _ in batch:
            self.client.answer()

    def close(self) -> None:
        self.client.close()


class AppendFile:
    """The limit of a durable small write: append 512 bytes to a file and flush its data."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._block = bytes(512)

    def append(self) -> None:
        os.write(self._fd, self._block)
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class GroupAppend:
    """The least that threads which share a flush must do: one thread appends and flushes what the
    others have handed to it, and wakes them.
    """

    def __init__(self, path: Path) -> None:
        self._file = AppendFile(path)
        self._waiting: deque[Any] = deque()
        self._work = Event()
        self._closed = False
        self._leader = Thread(target=self._serve, daemon=True)
        self._leader.start()

    def append(self) -> None:
        woken = Lock()
        woken.acquire()
        self._waiting.append(woken)
        if not self._work.is_set():
            self._work.set()
        woken.acquire()

    def close(self) -> None:
        self._closed = True
        self._work.set()
        self._leader.join()
        self._file.close()

    def _serve(self) -> None:
        while not self._closed:
            self._work.wait()
            self._work.clear()
            while self._waiting:
                batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
                self._file.append()
                for woken in batch:
                    woken.release()


def open_store(kind: str, folder: Path, redis_port: int) -> Store:
    """A store by its kind: `dict`, `everpool`, `lmdb`, `sqlite` or `redis`."""
    makers: dict[str, Callable[[], Store]] = {
        "dict": DictStore,
        "everpool": lambda: EverpoolStore(folder),
        "lmdb": lambda: LmdbStore(folder),
        "sqlite": lambda: SqliteStore(folder),
        "redis": lambda: RedisStore(redis_port),
    }
    return makers[kind]()


def batches(items: Iterable[tuple[Any, bytes]]) -> Iterable[list[tuple[Any, bytes]]]:
    """The items in lists of at most `BATCH`."""
    batch: list[tuple[Any, bytes]] = []
    for item in items:
        batch.append(item)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
