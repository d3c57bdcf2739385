"""Bad days of a bucket: it denies, throttles, is slow, is away, or its answers are lost."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import everpool
from everpool import CommitUnknownError, EverpoolError, UnavailableError
from everpool.paging.regions import BLOCK_BYTES
from support.agents import end_agents, wait_until
from support.proxy import Proxy, proxying
from support.s3 import Server


@pytest.fixture
def proxy(s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with proxying(s3.port) as proxy:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy
        proxy.mode = "pass"
        end_agents(tmp_path)


class Ledger:
    """Additions to one number, and what is known of each."""

    def __init__(self, pool: everpool.Pool) -> None:
        self.pool = pool
        self.done = 0
        self.unknown: list[Any] = []
        self.refusals: list[EverpoolError] = []

    def add(self) -> None:
        try:
            self.pool.memory("sum").fetch_add(0, 1)
            self.done += 1
        except CommitUnknownError as error:
            self.unknown.append(error.id)
        except EverpoolError as error:
            assert isinstance(error, UnavailableError) or "403" in error.message, error
            self.refusals.append(error)

    def settle(self) -> int:
        """Return how many additions there are, once all is well."""
        for id in self.unknown:
            outcome = self.pool.outcome(id)
            assert outcome.state in ("committed", "aborted"), outcome
            self.done += outcome.state == "committed"
        self.unknown = []
        return self.done


def in_time(act: Any, patience_s: float = 30.0) -> Any:
    """Do what may not work at once after a bad day."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return act()
        except UnavailableError:
            if time.monotonic() > deadline:
                raise


@pytest.mark.parametrize("mode", ["deny", "throttle", "cut", "lose", "drop"])
def test_writes_fail_clearly_and_reads_go_on_when_the_bucket(
    mode: str, s3: Server, proxy: Proxy, tmp_path: Path
) -> None:
    url = f"{s3.make_url()}?timeout_s=3"
    with (
        everpool.open(url, cache_dir=tmp_path / "one", timeout_s=3) as one,
        everpool.open(url, cache_dir=tmp_path / "two", timeout_s=3) as two,
    ):
        one.allocate("sum", 8)
        one.allocate("memory", 4 * BLOCK_BYTES).write(0, b"here")
        one["name"] = "value"
        two.sync()
        ledgers = [Ledger(one), Ledger(two)]
        for ledger in ledgers:
            ledger.add()
        assert [ledger.done for ledger in ledgers] == [1, 1]
        assert one.memory("memory").read(0, 4) == b"here"

        proxy.mode = mode
        for ledger in ledgers:
            began = time.monotonic()
            ledger.add()
            assert time.monotonic() - began < 6
            assert ledger.done == 1
        assert one["name"] == two["name"] == "value"
        assert one.memory("memory").read(0, 4) == b"here"
        assert one.version >= 5
        with pytest.raises(EverpoolError, match="403" if mode == "deny" else None):
            one.sync()
        wait_until(lambda: one.stats()["trouble"] != "" and one.stats()["seconds_behind"] > 1)
        before = one.stats()["seconds_behind"]
        time.sleep(0.2)
        assert one.stats()["seconds_behind"] > before

        proxy.mode = "pass"
        for pool in (one, two):
            in_time(pool.sync)
            wait_until(lambda pool=pool: pool.stats()["trouble"] == "")
            assert pool.stats()["seconds_behind"] == 0
        done = sum(in_time(ledger.settle) for ledger in ledgers)
        for ledger in ledgers:
            in_time(ledger.add)
        assert sum(ledger.settle() for ledger in ledgers) == done + 2
        for pool in (one, two):
            pool.sync()
            assert int.from_bytes(pool.memory("sum").read(0, 8), "little") == done + 2
            assert pool["name"] == "value"


@pytest.mark.parametrize("mode", ["lose_puts", "lose", "slow"])
def test_additions_are_exact_while_answers_are_lost_or_late(
    mode: str, s3: Server, proxy: Proxy, tmp_path: Path
) -> None:
    url = s3.make_url()
    pools = [everpool.open(url, cache_dir=tmp_path / f"{n}", timeout_s=5) for n in range(2)]
    pools[0].allocate("sum", 8)
    for pool in pools:
        pool.sync()
    ledgers = [Ledger(pool) for pool in pools]
    stop = threading.Event()

    def work(ledger: Ledger) -> None:
        while not stop.is_set():
            ledger.add()

    threads = [threading.Thread(target=work, args=(ledger,)) for ledger in ledgers]
    for thread in threads:
        thread.start()
    for _ in range(8):
        proxy.mode = mode
        time.sleep(0.2)
        proxy.mode = "pass"
        time.sleep(0.3)
    stop.set()
    for thread in threads:
        thread.join()
    assert mode == "slow" or proxy.lost > 0
    done = sum(in_time(ledger.settle) for ledger in ledgers)
    assert done > 10
    for pool in pools:
        pool.sync()
        assert int.from_bytes(pool.memory("sum").read(0, 8), "little") == done
        pool.close()
    with everpool.open(url, cache_dir=tmp_path / "late") as late:
        late.sync()
        assert int.from_bytes(late.memory("sum").read(0, 8), "little") == done


@pytest.mark.parametrize("mode", ["deny", "cut"])
def test_a_pool_is_opened_on_a_bad_day(mode: str, s3: Server, proxy: Proxy, tmp_path: Path) -> None:
    url = s3.make_url()
    with everpool.open(url, cache_dir=tmp_path / "one", timeout_s=3) as one:
        one["name"] = "value"
    proxy.mode = mode
    with pytest.raises(EverpoolError) as caught:
        everpool.open(url, cache_dir=tmp_path / "other", timeout_s=3)
    assert caught.value.kind in ("unavailable", "invalid"), caught.value
    proxy.mode = "pass"
    with everpool.open(url, cache_dir=tmp_path / "other", timeout_s=10) as other:
        assert other["name"] == "value"
