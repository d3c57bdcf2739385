"""Storms over pools in a bucket: what can be killed or stopped is, and nothing is lost."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import everpool
from support import chaos
from support.agents import agents_under, end_agents
from support.patched_agent import Traps
from support.s3 import Server, serving

CLIENTS = {"one": (0, 1), "two": (2,), "three": (3,)}


@pytest.fixture(autouse=True)
def often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("EVERPOOL_CHECKPOINT_VERSIONS", "60")
    Traps(monkeypatch)  # whose agents keep little
    yield
    end_agents(tmp_path)


class Storm:
    """Clients on hosts, and what befalls them. A `server` may be killed and stopped as well."""

    def __init__(self, url: str, folder: Path, seed: int, server: Server | None) -> None:
        self.url = url
        self.folder = folder
        self.notes = folder / "notes"
        self.notes.mkdir()
        self.choose = random.Random(seed)
        self.server = server
        self.pool = everpool.open(url, cache_dir=folder / "calm", timeout_s=10)
        chaos.prepare(self.pool, sum(len(some) for some in CLIENTS.values()))
        self.clients = [
            chaos.Process(url, folder / host, self.notes, client)
            for host, some in CLIENTS.items()
            for client in some
        ]
        self.sampler = chaos.Process(url, folder / "sampler", self.notes, "sampler")

    def rage(self, seconds: float) -> None:
        """Do harm for a while."""
        harms: list[Callable[[], None]] = [self.kill_client, self.kill_agent, self.stop_agent]
        harms += [self.checkpoint, self.checkpoint]
        if self.server is not None:
            harms.append(self.stop_server)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(self.choose.uniform(0.2, 1.0))
            self.choose.choice(harms)()
            for process in (*self.clients, self.sampler):
                process.check()

    def checkpoint(self) -> None:
        """Make one, unless others are at it."""
        with contextlib.suppress(everpool.UnavailableError):
            self.pool.checkpoint()

    def kill_client(self) -> None:
        client = self.choose.choice(self.clients)
        client.kill()
        client.start()

    def _agent(self) -> int | None:
        agents = agents_under(self.folder / self.choose.choice(list(CLIENTS)))
        return agents[0] if agents else None

    def kill_agent(self) -> None:
        agent = self._agent()
        if agent is not None:
            os.kill(agent, signal.SIGKILL)

    def stop_agent(self) -> None:
        agent = self._agent()
        if agent is not None:
            os.kill(agent, signal.SIGSTOP)
            time.sleep(self.choose.uniform(0.2, 1.5))
            os.kill(agent, signal.SIGCONT)

    def stop_server(self) -> None:
        assert self.server is not None
        self.server.stop()
        time.sleep(self.choose.uniform(0.2, 1.5))
        self.server.go_on()

    def kill_server(self) -> None:
        """Kill the bucket's server, go on with the rest, and have it back."""
        assert self.server is not None
        self.server.kill()
        self.kill_client()
        self.kill_agent()
        self.server.start()
        self.server.await_ready()

    def calm(self, samples: int) -> int:
        """End it, and see whether everything is right; returns how much was acknowledged."""
        (self.notes / "stop").touch()
        for process in (*self.clients, self.sampler):
            process.join()
        self.checkpoint()
        hosts = [*CLIENTS, "late"]
        pools = [self.pool] + [
            everpool.open(self.url, cache_dir=self.folder / host) for host in hosts
        ]
        acknowledged = [chaos.audit(pool, self.notes) for pool in pools]
        chaos.check_agreement(pools)
        chaos.check_history(pools[0], self.notes)
        assert pools[0].stats()["checkpoint"] > 0
        chaos.check_the_past(pools[0], self.url, self.notes, samples, self.choose)
        for pool in pools:
            pool.close()
        return acknowledged[0]


def test_a_storm_over_a_folder(tmp_path: Path) -> None:
    storm = Storm(f"file://{tmp_path}/bucket", tmp_path, 1, None)
    storm.rage(10)
    assert storm.calm(8) > 20


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def test_a_storm_over_s3(server: Server, tmp_path: Path) -> None:
    storm = Storm(server.make_url(), tmp_path, 2, server)
    storm.rage(4)
    storm.kill_server()
    storm.rage(4)
    assert storm.calm(4) > 20


@pytest.mark.soak
def test_storms_over_s3(server: Server, tmp_path: Path) -> None:
    end = time.monotonic() + 60 * float(os.environ.get("EVERPOOL_SOAK_MINUTES", "30"))
    seed = random.randrange(1 << 32)
    while time.monotonic() < end:
        seed += 1
        print("seed", seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        storm = Storm(server.make_url(), folder, seed, server)
        for _ in range(3):
            storm.rage(15)
            storm.kill_server()
        storm.rage(15)
        storm.calm(12)
        end_agents(folder)


@pytest.mark.soak
def test_storms_over_a_folder(tmp_path: Path) -> None:
    end = time.monotonic() + 60 * float(os.environ.get("EVERPOOL_SOAK_MINUTES", "30"))
    seed = random.randrange(1 << 32)
    while time.monotonic() < end:
        seed += 1
        print("seed", seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        storm = Storm(f"file://{folder}/bucket", folder, seed, None)
        storm.rage(45)
        storm.calm(12)
        end_agents(folder)
