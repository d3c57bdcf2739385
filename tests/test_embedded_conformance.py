"""The conformance suite on the pool at a path, with both clients in one process and in two."""

import itertools
from pathlib import Path
from typing import Any

import pytest

import everpool
from everpool.replica import flush
from everpool.testing import remote
from everpool.testing.conformance import Harness, PoolConformance, SharingConformance


class TestOneProcess(PoolConformance):
    def make_pool(self, tmp_path: Path) -> Harness:
        return Harness(lambda: everpool.open(tmp_path / "pool"))


class TestTwoProcesses(SharingConformance):
    """The first client of each test is in this process, the second in another, and so on."""

    def make_pool(self, tmp_path: Path) -> Harness:
        count = itertools.count()

        def connect() -> Any:
            if next(count) % 2:
                return remote.connect(everpool.open, str(tmp_path / "pool"))
            return everpool.open(tmp_path / "pool")

        return Harness(connect)


class TestWithAPast(PoolConformance):
    """Large values stay until their records are archived, and checkpoints are made meanwhile."""

    @pytest.fixture(autouse=True)
    def flush_often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(flush, "FLUSH_VERSIONS", 60)

    def make_pool(self, tmp_path: Path) -> Harness:
        with everpool.open(tmp_path / "pool") as pool:
            pool.checkpoint()
        return Harness(lambda: everpool.open(tmp_path / "pool"))
