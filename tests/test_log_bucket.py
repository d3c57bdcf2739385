"""The log in a bucket keeps what `Log` promises."""

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from everpool.log import Log
from everpool.log.bucket import BucketLog
from everpool.store import open_store
from everpool.store.directory import DirectoryStore
from everpool.store.memory import MemoryStore, Shelf
from everpool.testing.conformance.log import LogConformance
from support.s3 import Server


class TestMemory(LogConformance):
    @pytest.fixture(autouse=True)
    def shelf(self) -> None:
        self._shelf = Shelf()

    def make_log(self, tmp_path: Path) -> Log:
        return BucketLog(MemoryStore(self._shelf), "pool/log")


class TestSmallHeads(TestMemory):
    """Heads of a few entries: everything is sealed, and references are folded into tables."""

    def make_log(self, tmp_path: Path) -> Log:
        return BucketLog(MemoryStore(self._shelf), "log", head_bytes=900, cache_bytes=20_000)


class TestDirectory(LogConformance):
    def make_log(self, tmp_path: Path) -> Log:
        return BucketLog(DirectoryStore(tmp_path / "store"))


class TestS3(LogConformance):
    @pytest.fixture(autouse=True)
    def folder(self, s3: Server) -> None:
        self._url, self._options = s3.make_url(), s3.options

    def make_log(self, tmp_path: Path) -> Log:
        return BucketLog(open_store(self._url, **self._options))


def contend(url: str, options: dict[str, str], number: int, seconds: float, told: Any) -> None:
    """Append for some seconds once all are ready; tells the positions and the longest wait."""
    log = BucketLog(open_store(url, **options))
    log.end()
    told.send("ready")
    told.recv()
    positions: list[int] = []
    longest_s = 0.0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.monotonic()
        positions.append(log.append(b"%d/%d" % (number, len(positions))))
        longest_s = max(longest_s, time.monotonic() - began)
    told.send((positions, longest_s))


def race(url: str, options: dict[str, str], writers: int, seconds: float) -> list[Any]:
    """Return what each of several processes says that append to one log at the same time."""
    # Spawned: a forked child could not use the bucket.
    context = multiprocessing.get_context("spawn")
    links: list[Any] = []
    processes: list[Any] = []
    try:
        for number in range(writers):
            here, there = context.Pipe()
            links.append(here)
            args = (url, options, number, seconds, there)
            processes.append(context.Process(target=contend, args=args, daemon=True))
            processes[-1].start()
        for link in links:
            assert link.poll(60) and link.recv() == "ready"
        for link in links:
            link.send("go")
        said = []
        for link in links:
            assert link.poll(60), "a writer says nothing"
            said.append(link.recv())
        return said
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_eight_processes_contend_and_each_is_served(s3: Server) -> None:
    alone = len(race(s3.make_url(), s3.options, 1, 1.5)[0][0]) / 1.5
    url, seconds = s3.make_url(), 4.0
    said = race(url, s3.options, 8, seconds)
    log = BucketLog(open_store(url, **s3.options))
    end = log.end().position
    found = {item.position: item.entry for item in log.read(0, 1 << 30)}
    assert sorted(found) == list(range(1, end + 1))
    assert sorted(position for positions, _ in said for position in positions) == sorted(found)
    for number, (positions, longest_s) in enumerate(said):
        assert [found[position] for position in positions] == [
            b"%d/%d" % (number, at) for at in range(len(positions))
        ]
        # Shares are of one size where the machine has nothing else to do, which none can count on.
        assert len(positions) >= end / 8 / 8, [len(one) for one, _ in said]
        assert longest_s < seconds
    assert end / seconds > alone / 8, "contention wastes nearly all requests"
