"""Rows about size and company: a million names, and several processes at once."""

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import lmdb

import everpool
from everpool.bench.children import Child
from everpool.bench.contenders import LMDB_MAP_BYTES, AppendFile, RedisStore, open_store, request
from everpool.bench.lab import MIB, Lab, Sizes, below, row
from everpool.bench.measure import Contender, Role, timed
from everpool.bench.rows_reading import READ_KEYS
from everpool.bench.rows_writing import appending

STORES = {"lmdb": "raw LMDB", "sqlite": "SQLite", "redis": "Redis", "everpool": "Everpool"}
WATCHED = 25


def _million_title(what: str) -> Callable[[Sizes], str]:
    return lambda sizes: f"{what} with {sizes.names:,} names and 100 GiB (sparse)"


def _opening(lab: Lab, kind: str, what: str) -> Callable[[], float]:
    folder = lab.million() / kind

    def measure() -> float:
        with Child("open-million", kind, folder) as child:
            return float(child.answer()[what])

    return measure


@row(
    "open-million",
    _million_title("open a pool, and read one of it,"),
    goals=[below("Everpool", 0.050, "< 50 ms")],
    rounds_at_most=9,
)
def open_million(lab: Lab) -> Iterator[Contender]:
    yield Contender("raw LMDB", "limit", _opening(lab, "lmdb", "seconds"))
    yield Contender("Everpool", "everpool", _opening(lab, "everpool", "seconds"))


@row(
    "open-memory",
    _million_title("memory for opening a pool"),
    style="bytes",
    goals=[below("Everpool", 50 * MIB, "< 50 MiB")],
    rounds_at_most=3,
)
def open_memory(lab: Lab) -> Iterator[Contender]:
    yield Contender("raw LMDB", "limit", _opening(lab, "lmdb", "bytes"))
    yield Contender("Everpool", "everpool", _opening(lab, "everpool", "bytes"))


@row(
    "scan-names",
    lambda sizes: f"go through {sizes.names:,} names",
    style="rate",
    goals=[below("Everpool", 1 / 500_000, "≥ 500,000/s")],
    rounds_at_most=9,
)
def scan_names(lab: Lab) -> Iterator[Contender]:
    folder = lab.million()
    environment = lab.keep(lmdb.open(str(folder / "lmdb"), map_size=LMDB_MAP_BYTES))
    pool = lab.keep(everpool.open(folder / "everpool"))

    def scan_lmdb() -> int:
        with environment.begin() as txn:
            return sum(1 for _ in txn.cursor().iternext(keys=True, values=False))

    def scan_everpool() -> int:
        return sum(1 for _ in pool.names())

    def per_name(scan: Callable[[], int]) -> float:
        started = time.perf_counter()
        found = scan()
        return (time.perf_counter() - started) / found

    yield Contender("raw LMDB cursor", "limit", lambda: per_name(scan_lmdb))
    yield Contender("Everpool", "everpool", lambda: per_name(scan_everpool))


def _delay(child: Child, send: Callable[[], object]) -> float:
    """Seconds from the start of `send` until the watching process has it: the median of some."""
    delays: list[float] = []
    for _ in range(WATCHED):
        time.sleep(random.uniform(0.001, 0.004))  # the watcher is to be found asleep
        started = time.monotonic_ns()
        send()
        delays.append((child.answer() - started) / 1e9)
    return sorted(delays)[WATCHED // 2]


@row(
    "watch",
    "from the call of a commit to the change in another process",
    goals=[below("Everpool", 0.005, "≤ 5 ms")],
    rounds_at_most=9,
)
def watch(lab: Lab) -> Iterator[Contender]:
    def watcher(
        name: str, role: Role, job: str, argument: Any, send: Callable[[Child], Any]
    ) -> Any:
        child = lab.keep(Child(job, *argument))
        child.answer()
        return Contender(name, role, lambda: _delay(child, lambda: send(child)))

    file = lab.keep(AppendFile(lab.path("appended")))

    def append_and_tell(child: Child) -> None:
        file.append()
        child.tell()

    yield watcher("append + fdatasync + pipe", "limit", "watch-pipe", (), append_and_tell)
    if server := lab.redis():
        client = lab.keep(RedisStore(server.port)).client
        both = request(b"SET", b"w/1", b"x" * 64) + request(b"PUBLISH", b"w", b"1")

        def publish(_: Child) -> None:
            client.send_raw(both)
            client.answer()
            client.answer()

        yield watcher("Redis SET + PUBLISH", "peer", "watch-redis", (server.port,), publish)
    folder = lab.path("everpool")
    pool = lab.pool()
    numbers = iter(range(10_000_000))

    def commit(_: Child) -> None:
        pool[f"w/{next(numbers)}"] = b"x" * 64

    yield watcher("Everpool", "everpool", "watch-everpool", (folder,), commit)


class Workers:
    """Processes that each have the store open and share the operations they are given."""

    def __init__(self, lab: Lab, kind: str, port: int, what: str, keys: int) -> None:
        self._children = [
            lab.keep(Child("work", kind, lab.path(kind), port, what, keys * index, keys))
            for index in range(lab.sizes.processes)
        ]
        for child in self._children:
            child.answer()

    def run(self, count: int) -> None:
        """Do `count` operations in all and return when the last is done."""
        members = len(self._children)
        for index, child in enumerate(self._children):
            child.tell(count // members + (index < count % members))
        for child in self._children:
            child.answer()


def _everybody(lab: Lab, what: str, keys: int) -> Iterator[Contender]:
    server = lab.redis()
    everybodys_keys = lab.sizes.processes * keys
    for kind, title in STORES.items():
        if kind == "redis" and server is None:
            continue
        port = server.port if server else 0
        store = lab.keep(open_store(kind, lab.path(kind), port))
        store.load((store.key(i), bytes(range(128))) for i in range(everybodys_keys))
        workers = Workers(lab, kind, port, what, keys)
        role: Role = "everpool" if kind == "everpool" else "peer"
        # As in `read-small`: a commit before every turn, in which no name is read twice.
        measure = timed(
            workers.run,
            lab.sizes.turn_s,
            everybodys_keys if what == "get" else 1_000_000,
            lambda store=store: store.put(store.key(0), bytes(range(128))),
        )
        yield Contender(title, role, measure)


@row(
    "processes-commit",
    lambda sizes: f"durable small commits, {sizes.processes} processes at once",
    style="rate",
)
def processes_commit(lab: Lab) -> Iterator[Contender]:
    yield appending(lab)
    yield from _everybody(lab, "put", keys=200)


@row(
    "processes-read",
    lambda sizes: f"reads of 128 bytes, {sizes.processes} processes at once",
    style="rate",
)
def processes_read(lab: Lab) -> Iterator[Contender]:
    workers = Workers(lab, "dict", 0, "get", READ_KEYS)
    yield Contender("dict in each", "limit", timed(workers.run, lab.sizes.turn_s))
    yield from _everybody(lab, "get", READ_KEYS)
