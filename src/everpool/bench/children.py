"""What the benchmark measures in processes of their own: `python -m everpool.bench.children JOB`.

A fresh process has touched nothing yet, so its memory and first opening mean something. A child
answers with one line of JSON per question, reads its questions from standard input, and ends when
that is closed: no child outlives the benchmark.
"""

import contextlib
import ctypes
import gc
import json
import mmap
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from types import TracebackType
from typing import Any

import lmdb
import numpy as np

import everpool
from everpool.bench.buckets import end_process
from everpool.bench.contenders import LMDB_MAP_BYTES, open_store
from everpool.bench.servers import RedisClient, dying_with_us

PIECE_BYTES = 1 << 20
SYNC_FILE_RANGE: Any = getattr(ctypes.CDLL(None), "sync_file_range", None)


class Child:
    """A child process at work; a context manager that ends it."""

    def __init__(self, job: str, *arguments: object) -> None:
        # The child must find the same everpool that runs here, installed or not.
        paths = [os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[2])]
        self._answers_only = job.startswith("watch")
        self._process = subprocess.Popen(
            dying_with_us(
                [sys.executable, "-m", "everpool.bench.children", job, *map(str, arguments)]
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            start_new_session=True,
        )

    def tell(self, question: object = None) -> None:
        """Send one line without waiting for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """The child's next line; RuntimeError when it died instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a child of the benchmark ended with {self._process.wait()}")
        return json.loads(line)

    def ask(self, question: object = None) -> Any:
        """Send one line and wait for its answer."""
        self.tell(question)
        return self.answer()

    def __enter__(self) -> "Child":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child: a worker goes when its input is closed, a watcher has to be told."""
        if self._answers_only:
            self._process.terminate()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def say(answer: object) -> None:
    """Answer the parent with one line."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def memory_bytes(field: str) -> int:
    """`VmRSS` (resident now) or `VmHWM` (its peak) of this process; 0 where there is no /proc."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def forget_peak() -> None:
    """Start `VmHWM` afresh, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def work(kind: str, folder: str, redis_port: str, what: str, first_key: str, keys: str) -> None:
    """Do as many reads or commits as the parent asks for, over some keys in turn."""
    store = open_store(kind, Path(folder), int(redis_port))
    places = range(int(first_key), int(first_key) + int(keys))
    turns = cycle([store.key(place) for place in places])
    value = bytes(range(128))
    if kind == "dict":
        store.load((store.key(place), value) for place in places)
    get, put = store.get, store.put
    say("ready")
    for line in sys.stdin:
        count = json.loads(line)
        if what == "get":
            for key in islice(turns, count):
                get(key)
        else:
            for key in islice(turns, count):
                put(key, value)
        say("done")
    store.close()


def commit_for(url: str, cache: str) -> None:
    """Commit small values to a pool in a bucket for as long as asked; tell how many, and when."""
    mine = secrets.token_hex(4)
    value = bytes(range(128))
    pool = everpool.open(url, cache_dir=cache)
    pool[f"{mine}/ready"] = value
    agent = int(pool.stats()["agent"])
    say("ready")
    for line in sys.stdin:
        made, started = 0, time.perf_counter()
        end = started + json.loads(line)
        while True:
            pool[f"{mine}/{made % 100}"] = value
            made += 1
            now = time.perf_counter()
            if now >= end:
                break
        say([made, now - started])
    pool.close()
    end_process(agent)


def watch_everpool(folder: str) -> None:
    """Tell the moment at which each change under `w/` arrives."""
    with everpool.open(Path(folder)) as pool:
        changes = iter(pool.watch("w/"))
        say("ready")
        while True:
            next(changes)
            say(time.monotonic_ns())


def watch_redis(port: str) -> None:
    """Tell the moment at which each message of the channel `w` arrives."""
    client = RedisClient(int(port))
    client.call(b"SUBSCRIBE", b"w")
    say("ready")
    while True:
        client.answer()
        say(time.monotonic_ns())


def watch_pipe() -> None:
    """Tell the moment at which each line on standard input arrives."""
    say("ready")
    while os.read(0, 1000):
        say(time.monotonic_ns())


def open_million(kind: str, folder: str) -> None:
    """Open a large store, read one name (and touch one memory), and tell time and memory."""
    np.zeros(1)
    gc.collect()
    forget_peak()
    before = memory_bytes("VmRSS")
    started = time.perf_counter()
    close: Callable[[], None]
    if kind == "everpool":
        pool = everpool.open(Path(folder))
        assert len(pool["name/0000500"]) == 8  # type: ignore[arg-type]
        bytes(pool.memory("memory/3").view(1 << 20, 8))
        close = pool.close
    else:
        environment = lmdb.open(folder, map_size=LMDB_MAP_BYTES)
        with environment.begin(buffers=True) as txn:
            assert len(txn.get(b"name/0000500")) == 8  # type: ignore[arg-type]
        close = environment.close
    spent = time.perf_counter() - started
    peak = max(memory_bytes("VmHWM"), memory_bytes("VmRSS"))
    close()
    say({"seconds": spent, "bytes": max(peak - before, 1)})


def bulk_memory(kind: str, folder: str, size: str) -> None:
    """Write a large array and tell how much memory that took beyond the array itself."""
    source = np.full(int(size) // 8, 7.0)
    pool = everpool.open(Path(folder)) if kind == "everpool" else None
    gc.collect()
    forget_peak()
    before = memory_bytes("VmRSS")
    if pool is not None:
        pool["bulk"] = source
    else:
        path = Path(folder) / "file"
        path.parent.mkdir(parents=True)
        write_file(path, source.data.cast("B"))
    say({"bytes": max(memory_bytes("VmHWM") - before, 1)})
    if pool is not None:
        pool.close()


def write_file(path: Path, data: memoryview, early: bool = False) -> None:
    """Write a new file, 1 MiB at a time, and flush it.

    With `early` the kernel is told to start writing to the disk while more is being copied, which
    Linux alone can.
    """
    with open(path, "xb", buffering=0) as file:
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            while piece:
                piece = piece[file.write(piece) or 0 :]
            if early and start // PIECE_BYTES % 8 == 7:
                begun = start + PIECE_BYTES - 8 * PIECE_BYTES
                SYNC_FILE_RANGE(
                    file.fileno(),
                    ctypes.c_int64(begun),
                    ctypes.c_int64(8 * PIECE_BYTES),
                    ctypes.c_uint(2),  # SYNC_FILE_RANGE_WRITE
                )
        os.fsync(file.fileno())


def map_file(path: Path, size: int) -> mmap.mmap:
    """A read-only shared mapping of a file, which is closed again at once."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return mmap.mmap(fd, size, prot=mmap.PROT_READ)
    finally:
        os.close(fd)


JOBS: dict[str, Callable[..., None]] = {
    "work": work,
    "commit-for": commit_for,
    "watch-everpool": watch_everpool,
    "watch-redis": watch_redis,
    "watch-pipe": watch_pipe,
    "open-million": open_million,
    "bulk-memory": bulk_memory,
}

if __name__ == "__main__":
    JOBS[sys.argv[1]](*sys.argv[2:])
