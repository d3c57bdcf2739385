"""Pools over a real S3 server: the guarantees that several hosts take part in."""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everpool
from everpool import ExistsError, NotFoundError
from everpool.testing.conformance import Harness
from everpool.testing.conformance.clients import ClientGuarantees
from everpool.testing.conformance.transactions import TransactionGuarantees
from support.agents import end_agents
from support.processes import Child, ending
from support.s3 import Server


@pytest.fixture(autouse=True)
def environment(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)


class OverS3:
    @pytest.fixture(autouse=True)
    def keep_server(self, s3: Server) -> None:
        self.s3 = s3

    def make_pool(self, tmp_path: Path) -> Harness:
        count = itertools.count()
        url = self.s3.make_url()
        return Harness(
            lambda: everpool.open(url, cache_dir=tmp_path / f"host{next(count)}"),
            remove=lambda: end_agents(tmp_path),
        )


class TestClients(OverS3, ClientGuarantees):
    pass


@pytest.mark.soak
class TestTransactions(OverS3, TransactionGuarantees):
    pass


def test_checkpoints_the_past_and_a_new_host(s3: Server, tmp_path: Path) -> None:
    url = s3.make_url()
    try:
        with everpool.open(url, cache_dir=tmp_path / "one") as pool:
            large = np.arange(3_000_000)
            pool["large"] = large
            memory = pool.allocate("m", 1 << 34)
            memory.write(1 << 33, os.urandom(3 << 20))
            written = memory.read(1 << 33, 3 << 20)
            pool.snapshot("then")
            pool.checkpoint()
            pool["large"] = 1
            memory.write(1 << 33, b"now")
            with pool.at("then") as past:
                assert np.array_equal(past["large"], large)
                assert past.memory("m").read(1 << 33, 3 << 20) == written
        with everpool.open(url, cache_dir=tmp_path / "two") as other:
            other.sync()
            assert other["large"] == 1
            assert other.memory("m").read(1 << 33, 6) == b"now" + written[3:6]
            other.restore("then")
            assert np.array_equal(other["large"], large) and other.verify().ok
    finally:
        end_agents(tmp_path)


def store_large(link: Any, pool: everpool.Pool, number: int) -> None:
    pool[f"child/{number}"] = np.full(500_000, number)
    pool.memory("m")[number << 20 : (number << 20) + (2 << 20)] = bytes([number]) * (2 << 20)
    assert pool[f"child/{number}"][7] == number
    link.send("stored")


def test_a_forked_child_stores_what_is_large(s3: Server, tmp_path: Path) -> None:
    try:
        with everpool.open(s3.make_url(), cache_dir=tmp_path / "one") as pool:
            pool["parent"] = np.arange(100_000)  # the parent has used the bucket
            pool.allocate("m", 16 << 20)
            for number in (1, 4):
                child = Child(store_large, pool, number)
                with ending(child):
                    assert child.receive(60) == "stored"
            pool.sync()
            assert [int(pool[f"child/{number}"][-1]) for number in (1, 4)] == [1, 4]
            assert pool.memory("m").read(4 << 20, 3) == bytes([4]) * 3
            assert pool.verify().ok
            assert not list(tmp_path.glob("one/*/*/staging/*"))
    finally:
        end_agents(tmp_path)


def test_a_pool_that_is_not_there(s3: Server, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="create=True"):
        everpool.open(s3.make_url(), create=False, cache_dir=tmp_path)



def test_a_pool_at_a_path_is_backed_up(s3: Server, tmp_path: Path) -> None:
    url = s3.make_url()
    sent: list[tuple[int, int]] = []
    try:
        with everpool.open(tmp_path / "pool") as pool:
            large = np.arange(3_000_000)
            pool["large"] = large
            memory = pool.allocate("m", 1 << 34)
            memory.write(1 << 33, os.urandom(9 << 20))
            pool.checkpoint(url)
            memory.write(1 << 33, b"later")
            version = pool.checkpoint(url, lambda done, total: sent.append((done, total)))
            assert sent[-1][0] == sent[-1][1] < 1 << 20
            written = memory.read(1 << 33, 9 << 20)
        with everpool.open(url, cache_dir=tmp_path / "host") as backup:
            assert backup.version == version and np.array_equal(backup["large"], large)
            assert backup.memory("m").read(1 << 33, 9 << 20) == written
            backup["large"] = "goes on"
            assert backup.verify().ok
        with everpool.open(tmp_path / "pool") as pool, pytest.raises(ExistsError):
            pool.checkpoint(url)
    finally:
        end_agents(tmp_path)
