"""How fast the pool is beside what this machine can do at most, measured in turns."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

import everpool

_BULK_BYTES = 64 << 20
_MIB = 1 << 20


class Speed(NamedTuple):
    """One thing, done by the pool and by what limits it; seconds each."""

    what: str
    pool_s: float
    limit: str
    limit_s: float


def measure(pool: everpool.Pool, folder: Path) -> Iterator[Speed]:
    """Yield the speeds one by one; scratch files go to `folder` and are removed."""
    scratch = folder / "scratch"
    file = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        yield _small_read(pool)
        yield _small_commit(pool, file)
        yield from _bulk(pool, file)
    finally:
        os.close(file)
        scratch.unlink()


def _small_read(pool: everpool.Pool) -> Speed:
    pool["speed/small"] = b"x" * 64
    plain = {"speed/small": b"x" * 64}
    pool_s, limit_s = _in_turns(
        lambda: pool["speed/small"], lambda: plain["speed/small"], rounds=9, repeat=2000
    )
    return Speed("read 64 bytes", pool_s, "a dict", limit_s)


def _small_commit(pool: everpool.Pool, file: int) -> Speed:
    def commit() -> None:
        pool["speed/small"] = b"x" * 64

    def write() -> None:
        os.write(file, b"x" * 512)
        os.fdatasync(file)

    pool_s, limit_s = _in_turns(commit, write, rounds=40, repeat=10)
    return Speed("store 64 bytes, durably", pool_s, "write + fdatasync", limit_s)


def _bulk(pool: everpool.Pool, file: int) -> Iterator[Speed]:
    array = np.random.default_rng(0).integers(0, 255, _BULK_BYTES, dtype=np.uint8)

    def store() -> None:
        pool["speed/bulk"] = array

    def write() -> None:
        os.ftruncate(file, 0)
        os.pwrite(file, array.data, 0)
        os.fsync(file)

    pool_s, limit_s = _in_turns(store, write, rounds=5, repeat=1)
    size = f"{_BULK_BYTES // _MIB} MiB"
    yield Speed(f"store {size}, durably", pool_s, "file write + fsync", limit_s)
    pool_s, limit_s = _in_turns(
        lambda: np.add.reduce(pool["speed/bulk"], dtype=np.uint64),  # type: ignore[call-overload]
        lambda: np.add.reduce(array, dtype=np.uint64),
        rounds=9,
        repeat=1,
    )
    yield Speed(f"open and add up {size}", pool_s, "NumPy in RAM", limit_s)
    del pool["speed/bulk"]


def _in_turns(
    one: Callable[[], object], other: Callable[[], object], *, rounds: int, repeat: int
) -> tuple[float, float]:
    """Return the median seconds of a call to each, over rounds in which they take turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for call, collected in zip((one, other), seconds, strict=True):
            begin = time.perf_counter()
            for _ in range(repeat):
                call()
            collected.append((time.perf_counter() - begin) / repeat)
    return statistics.median(seconds[0]), statistics.median(seconds[1])
