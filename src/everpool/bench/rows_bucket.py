"""Rows about speed in a bucket, beside what a plain client of the same store needs.

The store is a real S3 server on this machine, so its answers come within milliseconds: what
Everpool adds shows more than beside a store some tens of milliseconds away.
"""

import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import count as counting
from typing import Any

import numpy as np

import everpool
from everpool.bench.buckets import Bucket
from everpool.bench.children import Child
from everpool.bench.contenders import EverpoolStore
from everpool.bench.lab import MIB, Lab, Sizes, at_least, at_most, below, row, size_in_words
from everpool.bench.measure import Contender, timed
from everpool.bench.rows_reading import reading

VALUE = bytes(range(128))
ROUNDS = 7
RANGE_BYTES = 4 * MIB
KEYS = 1000
SWAP = "one compare-and-swap put"
PUTS = "one put each"
LOCAL = "pool at a path"
TURNS = 50  # a turn lasts so many times as long as one without a network


def _fresh_array(size: int) -> Any:
    return np.frombuffer(secrets.token_bytes(size), np.float64)


def _bulk_title(what: str) -> Callable[[Sizes], str]:
    return lambda sizes: f"{what} an array of {size_in_words(sizes.bucket_bytes)} in a bucket"


@row(
    "bucket-write",
    _bulk_title("write"),
    style="bandwidth",
    goals=[at_least("Everpool", 0.9, "multipart put", "≥ 0.9 x the limit")],
    rounds_at_most=ROUNDS,
)
def bucket_write(lab: Lab) -> Iterator[Contender]:
    bucket = lab.bucket()
    if bucket is None:
        return
    import obstore

    raw, pool, numbers = bucket.raw(), bucket.pool(), counting()
    array = _fresh_array(lab.sizes.bucket_bytes)

    def put_parts() -> float:
        started = time.perf_counter()
        obstore.put(raw, f"{next(numbers)}", memoryview(array).cast("B"), use_multipart=True)
        return (time.perf_counter() - started) / array.nbytes

    def store() -> float:
        started = time.perf_counter()
        pool[f"{next(numbers)}"] = array
        return (time.perf_counter() - started) / array.nbytes

    yield Contender("multipart put", "limit", put_parts)
    yield Contender("Everpool", "everpool", store)


@row(
    "bucket-read",
    _bulk_title("read, on another host and for the first time,"),
    style="bandwidth",
    goals=[at_least("Everpool", 0.9, "parallel range get", "≥ 0.9 x the limit")],
    rounds_at_most=ROUNDS,
)
def bucket_read(lab: Lab) -> Iterator[Contender]:
    bucket = lab.bucket()
    if bucket is None:
        return
    import obstore

    raw, writer, reader, numbers = bucket.raw(), bucket.pool(), bucket.pool("other"), counting()
    array = _fresh_array(lab.sizes.bucket_bytes)
    starts = range(0, array.nbytes, RANGE_BYTES)
    ends = [min(start + RANGE_BYTES, array.nbytes) for start in starts]

    def get_ranges() -> float:
        key = f"{next(numbers)}"
        obstore.put(raw, key, memoryview(array).cast("B"))
        started = time.perf_counter()
        # Neighbours would be joined to one request, which is slower.
        obstore.get_ranges(raw, key, starts=list(starts), ends=ends, coalesce=0)
        return (time.perf_counter() - started) / array.nbytes

    def read() -> float:
        name = f"{next(numbers)}"
        writer[name] = array
        reader.sync()
        started = time.perf_counter()
        found = reader[name]
        spent = time.perf_counter() - started
        assert found.nbytes == array.nbytes
        return spent / array.nbytes

    yield Contender("parallel range get", "limit", get_ranges)
    yield Contender("Everpool", "everpool", read)


@row(
    "bucket-stream",
    "a stream of small transactions from one host to a bucket",
    style="rate",
    goals=[at_least("Everpool", 20, PUTS, "≥ 20 x one put each")],
    rounds_at_most=ROUNDS,
)
def bucket_stream(lab: Lab) -> Iterator[Contender]:
    bucket = lab.bucket()
    if bucket is None:
        return
    import obstore

    raw, pool, keys = bucket.raw(), bucket.pool(), counting()

    def put(count: int) -> None:
        for _ in range(count):
            obstore.put(raw, f"{next(keys) % KEYS}", VALUE)

    def pipeline(count: int) -> None:
        last: Future[int] | None = None
        for _ in range(count):
            with pool.transaction(wait=False) as tx:
                tx[f"key/{next(keys) % KEYS}"] = VALUE
            last = tx.committed
        if last is not None:
            last.result()

    turn_s = TURNS / 5 * lab.sizes.turn_s
    yield Contender(PUTS, "limit", timed(put, turn_s))
    yield Contender("Everpool", "everpool", timed(pipeline, turn_s, 20_000))


@row(
    "bucket-commit",
    "durable small commit in a bucket",
    goals=[at_most("Everpool", 1.3, SWAP, "≤ 1.3 x the limit")],
)
def bucket_commit(lab: Lab) -> Iterator[Contender]:
    bucket = lab.bucket()
    if bucket is None:
        return
    import obstore

    raw, pool, keys = bucket.raw(), bucket.pool(), counting()
    pool["first"] = VALUE
    tag: Any = obstore.put(raw, "head", b"", mode="create")["e_tag"]
    data = b""

    def resize() -> None:
        # As large as what a commit swaps just now: it grows until its entries are sealed.
        nonlocal data
        data = secrets.token_bytes(bucket.head_bytes())

    def swap(count: int) -> None:
        nonlocal tag
        for number in range(count):
            # Equal contents could have equal tags.
            body = number.to_bytes(8, "little") + data[8:]
            tag = obstore.put(raw, "head", body, mode={"e_tag": tag})["e_tag"]

    def commit(count: int) -> None:
        for _ in range(count):
            pool[f"key/{next(keys) % KEYS}"] = VALUE

    turn_s = 5 * lab.sizes.turn_s
    yield Contender(SWAP, "limit", timed(swap, turn_s, before=resize))
    yield Contender("Everpool", "everpool", timed(commit, turn_s))


class Hosts:
    """Processes that commit to one pool in a bucket, each as a host of its own."""

    def __init__(self, lab: Lab, bucket: Bucket, number: int) -> None:
        self._children = [
            lab.keep(Child("commit-for", bucket.url, bucket.cache(f"of-{number}-{host}")))
            for host in range(number)
        ]
        self.slowest = 0.0
        for child in self._children:
            child.answer()

    def run(self, seconds: float) -> float:
        """Let all commit for so long; returns the seconds that one commit took, of all hosts'."""
        for child in self._children:
            child.tell(seconds)
        done = [child.answer() for child in self._children]
        rates = [made / spent for made, spent in done]
        self.slowest = len(rates) * min(rates)
        return 1 / sum(rates)


@row(
    "bucket-hosts",
    lambda sizes: f"durable small commits, {sizes.hosts} hosts at once on one pool in a bucket",
    style="rate",
    goals=[
        at_least("Everpool, all hosts", 0.5, "Everpool, one host", "≥ 0.5 x one host"),
    ],
    rounds_at_most=5,
)
def bucket_hosts(lab: Lab) -> Iterator[Contender]:
    bucket = lab.bucket()
    if bucket is None:
        return
    import obstore

    raw, keys = bucket.raw(), counting()

    def put(count: int) -> None:
        for _ in range(count):
            obstore.put(raw, f"{next(keys) % KEYS}", VALUE)

    seconds = TURNS * lab.sizes.turn_s
    bucket.leave(bucket.pool())  # makes the pool, which is not to be timed
    one, all_hosts = Hosts(lab, bucket, 1), Hosts(lab, bucket, lab.sizes.hosts)
    yield Contender(PUTS, "limit", timed(put, lab.sizes.turn_s))
    yield Contender("Everpool, one host", "everpool", lambda: one.run(seconds))
    yield Contender("Everpool, all hosts", "everpool", lambda: all_hosts.run(seconds))
    # Of the turn of all hosts that was last: what all would do if each were like the slowest.
    slowest = f"Everpool, the slowest host x {lab.sizes.hosts}"
    yield Contender(slowest, "everpool", lambda: 1 / max(all_hosts.slowest, 1e-9))


@row(
    "bucket-hears",
    "from the call of a commit in a bucket until another host has it",
    goals=[below("Everpool, after a pause", 2.0, "≤ 2 x the poll (1 s)")],
    rounds_at_most=5,
)
def bucket_hears(lab: Lab) -> Iterator[Contender]:
    bucket = lab.bucket()
    if bucket is None:
        return
    import obstore

    raw, writer, listener, numbers = bucket.raw(), bucket.pool(), bucket.pool("other"), counting()
    obstore.put(raw, "told", b"")

    def put_and_get() -> float:
        started = time.perf_counter()
        obstore.put(raw, "told", VALUE)
        obstore.get(raw, "told").bytes()
        return time.perf_counter() - started

    def heard(pause_s: float) -> float:
        writer[f"{next(numbers)}"] = VALUE
        listener.sync()
        time.sleep(pause_s)
        started = time.perf_counter()
        writer["told"] = VALUE
        version = writer.version
        while listener.version < version:
            time.sleep(0.0005)
        return time.perf_counter() - started

    yield Contender("put, then get", "limit", put_and_get)
    yield Contender("Everpool", "everpool", lambda: heard(0.02))
    yield Contender("Everpool, after a pause", "everpool", lambda: heard(lab.sizes.still_s))


@row(
    "bucket-read-here",
    "read a value of 128 bytes that is here already",
    goals=[at_most("in a bucket", 1.1, LOCAL, f"as from a {LOCAL} (within 10 %)")],
)
def bucket_read_local(lab: Lab) -> Iterator[Contender]:
    bucket = lab.bucket()
    if bucket is None:
        return
    folder = lab.keep(EverpoolStore(lab.path("everpool")))
    names = [folder.key(index) for index in range(KEYS)]
    pools: dict[str, Any] = {LOCAL: folder.pool, "in a bucket": bucket.pool()}
    for title, pool in pools.items():
        pool.update({name: VALUE for name in names})

        def again(pool: everpool.Pool = pool) -> None:
            pool["other"] = VALUE  # so that no value is still at hand from the turn before

        role = "limit" if title == LOCAL else "everpool"
        measure = timed(reading(pool, names), lab.sizes.turn_s, KEYS, again)
        yield Contender(title, role, measure)


@row(
    "bucket-sum-here",
    lambda sizes: f"sum {size_in_words(sizes.touch_bytes)} through a view that is here already",
    goals=[
        at_most("memory in a bucket", 1.05, LOCAL, f"as from a {LOCAL} (within 5 %)"),
        at_most("value in a bucket", 1.05, LOCAL, "the same for a value"),
    ],
)
def bucket_sum_local(lab: Lab) -> Iterator[Contender]:
    bucket = lab.bucket()
    if bucket is None:
        return
    source = np.random.default_rng(5).random(lab.sizes.touch_bytes // 8)
    folder, remote = lab.pool(), bucket.pool()
    for pool in (folder, remote):
        pool.allocate_array("memory", source.shape, source.dtype)[:] = source
    remote["value"] = source
    views = {
        LOCAL: np.asarray(folder.array("memory")),
        "memory in a bucket": np.asarray(remote.array("memory")),
        "value in a bucket": remote["value"],
    }

    def adding(view: Any) -> Callable[[int], None]:
        def add(count: int) -> None:
            for _ in range(count):
                view.sum()

        return add

    for title, view in views.items():
        role = "limit" if title == LOCAL else "everpool"
        yield Contender(title, role, timed(adding(view), lab.sizes.turn_s))
