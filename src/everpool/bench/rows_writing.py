"""Rows about durable writing: small commits, many at once, and bulk."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from everpool.bench.children import SYNC_FILE_RANGE, Child, write_file
from everpool.bench.contenders import (
    AppendFile,
    EverpoolStore,
    GroupAppend,
    LmdbStore,
    RedisStore,
    Store,
)
from everpool.bench.lab import (
    GIB,
    MIB,
    Lab,
    at_least,
    at_most,
    below,
    row,
    size_in_words,
)
from everpool.bench.measure import Contender, timed

VALUE = bytes(range(128))
LIMIT = "append + fdatasync"
REDIS_PIECE = 64 * MIB
SETTLE_S = 0.3
RAM_DISK = "/dev/shm"


def appending(lab: Lab) -> Contender:
    """The limit of every durable small write."""
    file = lab.keep(AppendFile(lab.path("appended")))

    def append(count: int) -> None:
        for _ in range(count):
            file.append()

    return Contender(LIMIT, "limit", timed(append, lab.sizes.turn_s))


def committing(store: Store, first_key: int = 0) -> Callable[[int], None]:
    """Operations that put one small value each, over some keys in turn."""
    keys = cycle([store.key(first_key + index) for index in range(200)])

    def commit(count: int) -> None:
        put = store.put
        for key in islice(keys, count):
            put(key, VALUE)

    return commit


def writing_words(array: Any) -> Callable[[int], None]:
    """Operations that write 8 bytes each, all over an array of int64."""
    rng = np.random.default_rng(9)

    def write(count: int) -> None:
        for place in rng.integers(0, len(array), count).tolist():
            array[place] = place

    return write


@row(
    "commit-one",
    "durable small commit, one thread",
    goals=[
        at_most("Everpool, a value", 1.5, LIMIT, "≤ 1.5 x the limit"),
        at_most("Everpool, 8 bytes", 1.5, LIMIT, "the same for 8 bytes"),
        at_most(
            "Everpool, a value",
            1.05,
            ("raw LMDB", "SQLite", "Redis"),
            "no slower than any peer (within 5 %)",
        ),
    ],
)
def commit_one(lab: Lab) -> Iterator[Contender]:
    turn_s = lab.sizes.turn_s
    yield appending(lab)
    stores = [lab.store("lmdb"), lab.store("sqlite")]
    if server := lab.redis():
        stores.append(lab.keep(RedisStore(server.port)))
    for store in stores:
        yield Contender(store.title, "peer", timed(committing(store), turn_s))
    pool = lab.keep(EverpoolStore(lab.path("everpool")))
    yield Contender("Everpool, a value", "everpool", timed(committing(pool), turn_s))
    array = pool.pool.allocate_array("array", (MIB // 8,), "int64")
    yield Contender("Everpool, 8 bytes", "everpool", timed(writing_words(array), turn_s))
    if os.path.isdir(RAM_DISK):
        # What is left of a commit when the disk costs nothing: the interpreter, and copying.
        folder = lab.keep(RamFolder())
        in_ram = lab.keep(EverpoolStore(folder.path))
        yield Contender("Everpool, without a disk", "everpool", timed(committing(in_ram), turn_s))


class RamFolder:
    """A folder in RAM."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="everpool-bench-", dir=RAM_DISK))

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class Crew:
    """Threads that share the operations they are given; a context that ends them."""

    def __init__(self, workers: list[Callable[[int], None]]) -> None:
        self._count = 0
        self._failures: list[BaseException] = []
        self._gate = threading.Barrier(len(workers) + 1)
        self._threads = [
            threading.Thread(target=self._serve, args=(index, worker), daemon=True)
            for index, worker in enumerate(workers)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, count: int) -> None:
        """Do `count` operations in all and return when the last is done."""
        self._count = count
        self._gate.wait()
        self._gate.wait()
        if self._failures:
            raise self._failures[0]

    def _serve(self, index: int, worker: Callable[[int], None]) -> None:
        members = len(self._threads)
        try:
            while True:
                self._gate.wait()
                try:
                    worker(self._count // members + (index < self._count % members))
                except BaseException as error:
                    self._failures.append(error)
                self._gate.wait()
        except threading.BrokenBarrierError:
            return

    def close(self) -> None:
        self._gate.abort()
        for thread in self._threads:
            thread.join(timeout=10)


@row(
    "commit-threads",
    lambda sizes: f"durable small commits, {sizes.threads} threads",
    style="rate",
    goals=[
        at_least("Everpool, all threads", 5, "Everpool, one thread", "≥ 5 x one thread"),
    ],
)
def commit_threads(lab: Lab) -> Iterator[Contender]:
    # Waking a crew of threads takes a millisecond or two, which is not to count.
    threads, turn_s = lab.sizes.threads, 3 * lab.sizes.turn_s

    def crew(stores: list[Any]) -> Callable[[], float]:
        workers = [committing(store, 1000 * index) for index, store in enumerate(stores)]
        return timed(lab.keep(Crew(workers)).run, turn_s)

    yield appending(lab)
    group = lab.keep(GroupAppend(lab.path("appended-in-groups")))

    def hand_over(count: int) -> None:
        for _ in range(count):
            group.append()

    bare = timed(lab.keep(Crew([hand_over] * threads)).run, turn_s)
    yield Contender("the same in groups, all threads", "limit", bare)
    lmdb_store = lab.keep(LmdbStore(lab.path("lmdb")))
    yield Contender("raw LMDB", "peer", crew([lmdb_store] * threads))
    if server := lab.redis():
        clients = [lab.keep(RedisStore(server.port)) for _ in range(threads)]
        yield Contender("Redis", "peer", crew(clients))
    lab.note("SQLite and raw LMDB have one writer at a time: threads do not help them.")
    store = lab.keep(EverpoolStore(lab.path("everpool")))
    yield Contender("Everpool, one thread", "everpool", timed(committing(store), turn_s))
    yield Contender("Everpool, all threads", "everpool", crew([store] * threads))


@row(
    "commit-pipelined",
    "durable small commits, one thread that does not wait in between",
    style="rate",
    goals=[at_least("Everpool, pipelined", 15, "Everpool, waiting", "≥ 15 x one thread")],
)
def commit_pipelined(lab: Lab) -> Iterator[Contender]:
    # Long enough that filling and draining the pipeline does not count for much.
    turn_s = 3 * lab.sizes.turn_s

    def pipelining(store: EverpoolStore | RedisStore) -> Callable[[int], None]:
        keys: Any = cycle([store.key(1000 + index) for index in range(200)])
        return lambda count: store.put_pipelined(list(islice(keys, count)), VALUE)

    yield appending(lab)
    if server := lab.redis():
        client = lab.keep(RedisStore(server.port))
        yield Contender("Redis, pipelined", "peer", timed(pipelining(client), turn_s))
    store = lab.keep(EverpoolStore(lab.path("everpool")))
    yield Contender("Everpool, waiting", "everpool", timed(committing(store), turn_s))
    yield Contender("Everpool, pipelined", "everpool", timed(pipelining(store), turn_s))


@row(
    "write-large",
    "durable write of 8 bytes at random places of an array",
    goals=[
        at_most(
            "Everpool, 10 GiB",
            1.1,
            "Everpool, 1 MiB",
            "as fast as 1 MiB (within 10 %)",
        )
    ],
)
def write_large(lab: Lab) -> Iterator[Contender]:
    turn_s = lab.sizes.turn_s
    yield appending(lab)
    yield Contender("a 10 GiB file", "peer", timed(_writing_file(lab, 10 * GIB), turn_s))
    pool = lab.pool()
    for size, words in ((MIB, "1 MiB"), (10 * GIB, "10 GiB")):
        array = pool.allocate_array(words, (size // 8,), "int64")
        yield Contender(f"Everpool, {words}", "everpool", timed(writing_words(array), turn_s))


def _writing_file(lab: Lab, size: int) -> Callable[[int], None]:
    """Write 8 bytes in place and flush: what a program does that can lose half a write."""
    fd = os.open(lab.path("sparse"), os.O_RDWR | os.O_CREAT, 0o600)
    lab.keep(_Descriptor(fd))
    os.truncate(fd, size)
    rng = np.random.default_rng(10)

    def write(count: int) -> None:
        for place in rng.integers(0, size // 8, count).tolist():
            os.pwrite(fd, b"8 bytes.", place * 8)
            os.fdatasync(fd)

    return write


class _Descriptor:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        os.close(self._fd)


@row(
    "bulk-write",
    lambda sizes: f"durable write of an array of {size_in_words(sizes.bulk_bytes)}",
    style="bandwidth",
    goals=[at_least("Everpool", 0.9, "file write + fsync", "≥ 0.9 x the limit")],
    rounds_at_most=9,
)
def bulk_write(lab: Lab) -> Iterator[Contender]:
    size = lab.sizes.bulk_bytes
    source = np.full(size // 8, 7.0)
    data = source.data.cast("B")

    def per_byte(act: Callable[[], Any], remove: Callable[[Any], None]) -> float:
        started = time.perf_counter()
        written = act()
        spent = time.perf_counter() - started
        remove(written)
        del written
        # The file system frees the room only now, and a server may still be writing; the next
        # contender must not pay for it.
        _flush_folder(lab)
        os.sync()
        time.sleep(SETTLE_S)
        os.sync()
        return spent / size

    def write(early: bool) -> Any:
        path = lab.path("bulk")
        write_file(path, data, early)
        return path

    yield Contender(
        "file write + fsync", "limit", lambda: per_byte(lambda: write(False), os.unlink)
    )
    if SYNC_FILE_RANGE is not None:
        yield Contender(
            "the same, begun early", "peer", lambda: per_byte(lambda: write(True), os.unlink)
        )
    if ray := lab.ray(size):
        # Ray frees an object when its last reference goes, which `per_byte` sees to.
        yield Contender(
            "Ray put (RAM only)",
            "peer",
            lambda: per_byte(lambda: ray.put(source), lambda reference: None),
        )
    if server := lab.redis():
        client = lab.keep(RedisStore(server.port))

        def put_pieces() -> None:
            for start in range(0, size, REDIS_PIECE):
                client.put(b"bulk/%d" % start, bytes(data[start : start + REDIS_PIECE]))

        yield Contender(
            "Redis (64 MiB pieces)",
            "peer",
            lambda: per_byte(put_pieces, lambda _: client.client.call(b"FLUSHALL")),
        )
    pool = lab.pool()

    def put_array() -> str:
        pool["bulk"] = source
        return "bulk"

    yield Contender("Everpool", "everpool", lambda: per_byte(put_array, pool.__delitem__))


def _flush_folder(lab: Lab) -> None:
    fd = os.open(lab.path("."), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@row(
    "bulk-memory",
    lambda sizes: f"extra memory for that write of {size_in_words(sizes.bulk_bytes)}",
    style="bytes",
    goals=[below("Everpool", 64 * MIB, "< 64 MiB")],
    rounds_at_most=3,
)
def bulk_memory(lab: Lab) -> Iterator[Contender]:
    turns = iter(range(1_000_000))

    def measure(kind: str) -> float:
        folder = lab.path(f"{kind}{next(turns)}")
        with Child("bulk-memory", kind, folder, lab.sizes.bulk_bytes) as child:
            return float(child.answer()["bytes"])

    yield Contender("file write + fsync", "limit", lambda: measure("file"))
    yield Contender("Everpool", "everpool", lambda: measure("everpool"))
