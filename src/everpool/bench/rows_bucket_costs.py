"""Rows about what a pool in a bucket costs there: requests and bytes, as the server counts them."""

import secrets
import time
from collections.abc import Callable, Iterator
from itertools import count as counting

import numpy as np

import everpool
from everpool.bench.buckets import Bucket
from everpool.bench.lab import GIB, KIB, Lab, at_most, below, row
from everpool.bench.measure import Contender

VALUE = bytes(range(128))
PAGE_BYTES = 64 * KIB
SPARSE_BYTES = 100 * GIB
COMMITS = 100
PIPELINED = 1000
PAGES_AT_ONCE = 16


def _spent(bucket: Bucket, work: Callable[[], object]) -> float:
    """How many requests the server had to answer meanwhile."""
    before = sum(bucket.requests().values())
    work()
    return sum(bucket.requests().values()) - before


def _one_put(bucket: Bucket) -> Contender:
    import obstore

    raw = bucket.raw()

    def put() -> float:
        # Of an open pool's agent there are requests, too, but none of this kind.
        before = bucket.requests().get("PUT", 0.0)
        obstore.put(raw, "key", VALUE)
        return bucket.requests().get("PUT", 0.0) - before

    return Contender("a put", "limit", put)


@row(
    "bucket-open",
    "requests for a new host to open a pool and read a byte of 100 GiB of sparse memory",
    style="count",
    goals=[below("Everpool", 10, "≤ 10")],
    rounds_at_most=3,
)
def bucket_open_requests(lab: Lab) -> Iterator[Contender]:
    bucket = lab.bucket()
    if bucket is None:
        return
    hosts = counting()
    # Nobody else may ask the server while its requests are counted.
    first = bucket.pool()
    memory = first.allocate("sparse", SPARSE_BYTES)
    memory[SPARSE_BYTES // 2] = 7
    bucket.leave(first)

    def read_on_a_new_host() -> None:
        pool = bucket.pool(f"new-{next(hosts)}")
        assert pool.memory("sparse")[SPARSE_BYTES // 2] == 7
        opened.append(pool)

    opened: list[everpool.Pool] = []

    def measure() -> float:
        spent = _spent(bucket, read_on_a_new_host)
        bucket.leave(opened.pop())
        return spent

    def begin_with_a_checkpoint() -> float:
        if not folded:
            pool = bucket.pool()
            pool.checkpoint()
            bucket.leave(pool)
            folded.append(True)
        return measure()

    folded: list[bool] = []
    yield _one_put(bucket)
    yield Contender("Everpool", "everpool", begin_with_a_checkpoint)


@row(
    "bucket-requests",
    "requests of one commit in a bucket, those of listening included",
    style="count",
    rounds_at_most=3,
)
def bucket_commit_requests(lab: Lab) -> Iterator[Contender]:
    bucket = lab.bucket()
    if bucket is None:
        return
    pool = bucket.pool()

    def one_by_one() -> None:
        for number in range(COMMITS):
            pool[f"key/{number}"] = VALUE

    def pipelined() -> None:
        for number in range(PIPELINED):
            with pool.transaction(wait=False) as tx:
                tx[f"key/{number}"] = VALUE
        pool.sync()

    yield _one_put(bucket)
    yield Contender("Everpool", "everpool", lambda: _spent(bucket, one_by_one) / COMMITS)
    yield Contender(
        "Everpool, pipelined", "everpool", lambda: _spent(bucket, pipelined) / PIPELINED
    )


@row(
    "bucket-idle",
    "requests in an hour in which a host has the pool open and nothing happens",
    style="count",
    rounds_at_most=3,
)
def bucket_idle_requests(lab: Lab) -> Iterator[Contender]:
    bucket = lab.bucket()
    if bucket is None:
        return
    pool = bucket.pool()
    pool["first"] = VALUE
    time.sleep(lab.sizes.still_s)  # it asks less and less often

    def measure() -> float:
        still_s = 2 * lab.sizes.still_s
        return max(1.0, _spent(bucket, lambda: time.sleep(still_s))) * 3600 / still_s

    yield _one_put(bucket)
    yield Contender("Everpool", "everpool", measure)


@row(
    "bucket-pages",
    lambda sizes: f"upload for a checkpoint of {sizes.pages:,} dirty pages in a 10 GiB array",
    style="bytes",
    goals=[at_most("Everpool", 1.5, "the pages", "≤ 1.5 x the pages")],
    rounds_at_most=3,
)
def bucket_checkpoint(lab: Lab) -> Iterator[Contender]:
    bucket = lab.bucket()
    if bucket is None:
        return
    pool = bucket.pool()
    array = pool.allocate_array("array", (lab.sizes.large_bytes,), "u1")
    rng = np.random.default_rng(3)
    chosen = rng.choice(lab.sizes.large_bytes // PAGE_BYTES, lab.sizes.pages, replace=False)
    pages = (chosen * PAGE_BYTES).tolist()
    for at in range(0, len(pages), PAGES_AT_ONCE):
        # Random bytes, which nothing could make smaller.
        with pool.transaction(wait=False) as tx:
            for start in pages[at : at + PAGES_AT_ONCE]:
                tx.memory("array").write(start, secrets.token_bytes(PAGE_BYTES))
    pool.sync()
    pool.checkpoint()

    def measure() -> float:
        with pool.transaction() as tx:
            for start in pages:
                tx.memory("array").write(start, secrets.token_bytes(8))
        before = bucket.received_bytes()
        pool.checkpoint()
        return bucket.received_bytes() - before

    assert array.nbytes == lab.sizes.large_bytes
    yield Contender("the pages", "limit", lambda: float(len(pages) * PAGE_BYTES))
    yield Contender("Everpool", "everpool", measure)
