"""A host's replica: rebooted, deleted, without disk or bucket, and of a log that is another one."""

import contextlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import everpool
from everpool.agent import host as hosts
from everpool.agent import server as servers
from everpool.agent.pools import read_marker
from everpool.agent.server import Server
from everpool.log.bucket import BucketLog
from everpool.log.bucket.format import HEAD_KEY
from everpool.records import Entry, FetchAdd, Put, Record, Write, encode_entry, new_session
from everpool.store import open_store
from everpool.values import encode
from support import disks
from support.agents import Host, end_agents, is_alive, processes_of, wait_until
from support.disks import Disk, on_own_disk
from support.isolation import own_process
from support.processes import Child, Worker, call, ending
from test_crash import killed_somewhere_new, traced

needs_disks = pytest.mark.skipif(bool(disks.why_not()), reason=disks.why_not() or "can mount")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    yield Host(tmp_path)
    end_agents(tmp_path)


def fill(pool: Any) -> None:
    pool["a"] = 1
    pool["large"] = b"l" * 300_000
    pool.allocate("m", 1 << 20).write(70_000, b"memory")


def is_filled(pool: Any) -> bool:
    memory = pool.memory("m")
    return (
        pool["a"] == 1
        and pool["large"] == b"l" * 300_000
        and memory.read(70_000, 6) == b"memory"
        and bytes(memory.view(70_000, 6)) == b"memory"
        and memory.read(0, 5) == bytes(5)
    )


def test_a_reboot_begins_a_new_replica(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with host.open() as pool:
        fill(pool)
        old = Path(pool.stats()["replica"])
    host.kill_agent()
    monkeypatch.setenv("EVERPOOL_BOOT_ID", uuid.uuid4().hex)
    with host.open() as pool:
        assert is_filled(pool)
        assert Path(pool.stats()["replica"]) != old and not old.exists()


def test_a_replica_that_was_cut_off_is_begun_anew(host: Host) -> None:
    with host.open() as pool:
        fill(pool)
        replica = Path(pool.stats()["replica"])
    host.kill_agent()
    with open(replica / "index" / "data.mdb", "r+b") as index:
        index.truncate(8192)
    with host.open() as pool:
        assert is_filled(pool)


@pytest.mark.parametrize("whole", [False, True])
def test_the_cache_is_deleted_under_everybody(host: Host, whole: bool) -> None:
    worker = Worker(host.url, cache_dir=host.cache)
    with host.open() as pool, ending(worker):
        fill(pool)
        memory, view = pool.memory("m"), pool.memory("m").view()
        agent = host.agent()
        shutil.rmtree(host.cache if whole else host.folder())
        wait_until(lambda: not is_alive(agent))
        pool.run(lambda tx: tx.update({"b": 2}))
        assert is_filled(pool) and pool["b"] == 2
        assert memory.read(70_000, 6) == b"memory"  # the same log, so the same object
        memory.write(70_000, b"MEMORY")
        assert bytes(pool.memory("m").view(70_000, 6)) == b"MEMORY"
        assert bytes(view[70_000:70_006]) == b"memory"
        wait_until(lambda: worker.ask(get, "b") == 2)
        assert len(processes_of(host.cache)) == 1


def get(pool: Any, name: str) -> Any:
    return pool.get(name)


def test_hosts_that_spell_the_url_differently(tmp_path: Path) -> None:
    spellings = (f"{tmp_path}/bucket", f"{tmp_path}/./bucket/", f"localhost{tmp_path}/bucket")
    urls = [f"file://{spelling}" for spelling in spellings]
    pools = [everpool.open(url, cache_dir=tmp_path / "host") for url in urls]
    try:
        for number, pool in enumerate(pools):
            pool[f"n/{number}"] = number
        for pool in pools:
            pool.sync()
            assert list(pool.names("n/")) == ["n/0", "n/1", "n/2"]
    finally:
        for pool in pools:
            pool.close()
        end_agents(tmp_path)


# The bucket


def test_a_bucket_that_vanishes_and_comes_back(host: Host) -> None:
    with host.open(timeout_s=2.0) as pool:
        fill(pool)
        assert is_filled(pool)
        away = host.bucket.with_suffix(".away")
        os.rename(host.bucket, away)
        wait_until(lambda: pool.stats()["trouble"] != "", 10)
        assert is_filled(pool)
        began = time.monotonic()
        with pytest.raises(everpool.UnavailableError):
            pool["b"] = 1
        with pytest.raises(everpool.UnavailableError):
            pool.sync()
        assert time.monotonic() - began < 5
        wait_until(lambda: pool.stats()["seconds_behind"] > 1.0)
        # An agent that starts now serves what is here.
        host.kill_agent()
        assert is_filled(pool) and pool.stats()["trouble"]
        call(read_only, host)
        if host.bucket.exists():
            shutil.rmtree(host.bucket)
        os.rename(away, host.bucket)
        wait_until(lambda: pool.stats()["trouble"] == "", 10)
        assert "b" not in pool
        pool["b"] = 2
        assert pool.stats()["seconds_behind"] == 0


def read_only(host: Host) -> None:
    """The bucket is away, so a host that comes new learns nothing."""
    with pytest.raises(everpool.EverpoolError) as caught:
        Host(host.bucket.parent, "elsewhere").open(create=False)
    assert caught.value.kind in ("not_found", "unavailable")


def put_on(link: Any, host: Host, name: str, value: Any) -> None:
    with host.open() as pool:
        pool[name] = value
    link.send("done")


def lose_the_tail(host: Host, pool: Any) -> None:
    """Bring the bucket back to what it was before some of the commits."""
    fill(pool)
    kept = host.bucket.with_suffix(".kept")
    shutil.copytree(host.bucket, kept)
    pool["lost"] = 1
    pool.allocate("lost memory", 8).write(0, b"lost")
    shutil.rmtree(host.bucket / "log")
    shutil.copytree(kept / "log", host.bucket / "log")


def test_a_log_that_lost_its_tail_is_noticed_while_its_agent_runs(host: Host) -> None:
    with host.open() as pool, pool.watch() as watch:
        tx = pool.transaction()
        lose_the_tail(host, pool)
        lost = None
        with contextlib.suppress(everpool.NotFoundError):
            lost = pool.memory("lost memory")
        wait_until(lambda: "lost" not in pool, 10)
        assert is_filled(pool)
        assert "leaving its replica behind" in host.log()
        pool.run(lambda tx: tx.update({"b": 2}))
        pool.allocate("other memory", 8).write(0, b"other")
        if lost is not None:
            with pytest.raises(everpool.NotFoundError):
                lost.read(0, 4)  # its id is the other one's now
        with pytest.raises(everpool.ConflictError):
            tx["x"] = 1
        with pytest.raises(everpool.InvalidError, match="replaced"):
            while True:
                watch.get(0.1)
        replicas = [path for path in host.folder().iterdir() if (path / "index").is_dir()]
        assert len(replicas) == 1


@pytest.mark.parametrize("others", [0, 1, 5])
def test_a_log_that_lost_its_tail_is_noticed_by_the_next_agent(host: Host, others: int) -> None:
    with host.open() as pool:
        lose_the_tail(host, pool)
        host.kill_agent()
        host.kill_agent()
    end_agents(host.cache)
    elsewhere = Host(host.bucket.parent, "elsewhere")
    with elsewhere.open() as pool:
        for number in range(others):
            pool[f"new/{number}"] = number
    with host.open() as pool:
        pool.sync()
        assert is_filled(pool) and "lost" not in pool
        assert len(list(pool.names("new/"))) == others
        pool["b"] = 1
        assert pool["b"] == 1


def test_a_commit_into_a_log_that_lost_its_tail_is_not_repeated(host: Host) -> None:
    with host.open() as pool:
        memory = pool.allocate("count", 8)
        lose_the_tail(host, pool)
        with contextlib.suppress(everpool.EverpoolError):
            memory.fetch_add(0, 1)
        wait_until(lambda: "lost" not in pool, 10)
        pool.sync()
        assert pool.memory("count").fetch_add(0, 0) in (0, 1)
        assert pool.version < 15


def test_a_pool_that_is_deleted_and_made_anew_is_another_one(host: Host) -> None:
    worker = Worker(host.url, cache_dir=host.cache, timeout_s=3.0)
    with host.open(timeout_s=3.0) as pool, ending(worker):
        fill(pool)
        memory = pool.memory("m")
        assert is_filled(pool)
        shutil.rmtree(host.bucket)
        call(make_anew, host)

        def refused() -> bool:
            try:
                pool["b"] = 2
            except everpool.ClosedError as error:
                return "another one" in str(error)
            except everpool.EverpoolError:
                return False
            return False

        wait_until(refused, 15)
        # What is here can be read, and is the old one's.
        assert pool["a"] == 1 and memory.read(70_000, 6) == b"memory"
        with host.open() as again:
            again.sync()
            assert again["a"] == "anew" and "b" not in again and "m" not in again


def make_anew(host: Host) -> None:
    other = Host(host.bucket.parent, "elsewhere")
    with other.open() as pool:
        pool["a"] = "anew"
    end_agents(other.cache)


# Disks


@needs_disks
def test_a_full_disk_under_the_cache(tmp_path: Path) -> None:
    on_own_disk(use_full_disk, tmp_path / "disk", tmp_path, size_bytes=64 << 20)


def use_full_disk(disk: Disk, folder: Path) -> None:
    host = Host(folder)
    host.cache = disk.path / "cache"
    try:
        with host.open(timeout_s=3.0) as pool:
            fill(pool)
            assert is_filled(pool)
            pool["other"] = b"o" * 200_000
            disk.fill(0)
            with pytest.raises(everpool.UnavailableError, match="full"):
                pool["other"]
            failed = 0
            for number in range(40):
                try:
                    pool[f"n/{number}"] = b"x" * 50_000
                except everpool.EverpoolError as error:
                    assert error.kind in ("unavailable", "commit_unknown"), error
                    failed += 1
                    if failed > 2:
                        break
            assert failed, "the disk was not full"
            assert is_filled(pool)
            disk.clear()
            wait_until(lambda: works(pool), 20)
            pool.sync()
            assert is_filled(pool)
    finally:
        end_agents(disk.path)


def works(pool: Any) -> bool:
    try:
        pool["works"] = 1
    except everpool.EverpoolError:
        return False
    return True


@needs_disks
def test_a_read_only_disk_under_the_cache(tmp_path: Path) -> None:
    on_own_disk(use_read_only_disk, tmp_path / "disk", tmp_path, size_bytes=64 << 20)


def use_read_only_disk(disk: Disk, folder: Path) -> None:
    host = Host(folder)
    host.cache = disk.path / "cache"
    disk.refuse_writes()
    with pytest.raises(everpool.EverpoolError) as caught:
        host.open(timeout_s=3.0)
    assert caught.value.kind in ("invalid", "unavailable")
    assert os.fspath(host.cache) in str(caught.value)
    disk.allow_writes()
    call(open_and_close, host)
    end_agents(disk.path)
    wait_until(lambda: refuses(disk))
    with pytest.raises(everpool.EverpoolError) as caught:
        host.open(timeout_s=3.0)
    assert caught.value.kind in ("invalid", "unavailable")


def refuses(disk: Disk) -> bool:
    """Whether nobody was in the way of making the disk read-only: the killed take a moment."""
    try:
        disk.refuse_writes()
    except OSError:
        return False
    return True


def open_and_close(host: Host) -> None:
    host.open().close()


def test_a_cache_that_is_no_folder(host: Host) -> None:
    host.cache.write_text("")
    with pytest.raises(everpool.InvalidError):
        host.open()


def test_a_cache_of_somebody_else(host: Host) -> None:
    host.cache.mkdir(mode=0o700)
    child = Child(open_as_nobody, host)
    with ending(child):
        assert child.receive() == "invalid"


def open_as_nobody(link: Any, host: Host) -> None:
    if os.geteuid():
        os.chmod(host.cache, 0)
    else:
        host.bucket.mkdir()
        for folder in (host.bucket, *list(host.bucket.parents)[:4]):
            if folder not in (Path("/tmp"), Path("/")):
                os.chmod(folder, 0o777)
        os.setuid(65534)
    try:
        host.open(timeout_s=3.0)
    except everpool.EverpoolError as error:
        link.send(error.kind)


# The agent dies between any two steps of playing


@traced
def test_an_agent_that_is_killed_at_any_step_of_playing(host: Host) -> None:
    with host.open() as pool:
        pool.allocate("m", 1 << 20).write(0, bytes(8))
        pool["a"] = 0
    host.kill_agent()
    client = Worker(host.url, cache_dir=host.cache)
    steps: list[str] = []
    with ending(client):
        client.ask(keep_view)
        tried: set[tuple[str, int]] = set()
        number = 0
        while True:
            number += 1
            client.stop()
            host.kill_agent()
            death = killed_somewhere_new(tried, play_as_agent, host.url, host.folder(), number)
            client.go_on()
            found = client.ask(look_around)
            assert found == (number, number, number), death
            if death is None:
                break
            steps.append(death.step)
    assert steps.count("store") >= 2 and any("pwrite64" in step for step in steps), steps


_views: list[memoryview] = []


def keep_view(pool: Any) -> None:
    _views.append(pool.memory("m").view())


def look_around(pool: Any) -> tuple[int, int, int]:
    pool.sync()
    memory = pool.memory("m")
    stored = int.from_bytes(memory.read(70_000, 8), "little")
    assert bytes(_views[0][70_000:70_008]) == memory.read(70_000, 8)
    added = int.from_bytes(bytes(_views[0][:8]), "little")
    assert memory.fetch_add(0, 0) == added
    return pool["a"], added, stored


def play_as_agent(pause: Any, link: Any, url: str, folder: Path, number: int) -> None:
    """Do what an agent does with one commit, but in one thread."""
    store = open_store(url)
    host = hosts.Host(folder, None, store, BucketLog(store, hosts.LOG))
    host.sync()
    id = host.replica.find("m").row.id
    operations = [
        Put("a", encode(number).tobytes()),
        FetchAdd(id, 0, "<i8", (1).to_bytes(8, "little")),
        Write(id, 70_000, number.to_bytes(8, "little")),
    ]
    state = host.replica.state()
    record = Record(state.version, [], [], [], operations)
    entry = Entry(new_session(state.version), 1, state.position, state.hash, [record])
    position = host.append(encode_entry(entry))
    pause()
    host.play(position)
    pause()
    link.send("done")


# The log is out of reach while it is read


class Gate:
    """A store in which nobody gets the entries of the log while it is closed."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.is_open = threading.Event()
        self.is_open.set()
        self.somebody_waits = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get(self, key: str) -> Any:
        self._pass(key)
        return self._store.get(key)

    def get_ranges(self, key: str, ranges: Any) -> Any:
        self._pass(key)
        return self._store.get_ranges(key, ranges)

    def _pass(self, key: str) -> None:
        if key.startswith(f"{hosts.LOG}/") and not key.endswith(HEAD_KEY):
            if not self.is_open.is_set():
                self.somebody_waits.set()
            assert self.is_open.wait(10)


class Client:
    """Keeps what an agent answers."""

    def __init__(self) -> None:
        self.answers: list[Any] = []

    def answer(self, number: int, work: Callable[[], Any]) -> None:
        self.answers.append(work())


def serve_behind_a_gate(url: str, cache: Path, patch: pytest.MonkeyPatch) -> tuple[Server, Gate]:
    """Return an agent that nobody is connected to."""
    gate = Gate(open_store(url))
    patch.setattr(servers, "open_pool_store", lambda *_: gate)
    folder = cache / hosts.folder_name(url, read_marker(gate, url).pool())
    folder.mkdir(parents=True)
    server = Server(folder, url, -1)
    server.host.begin()
    return server, gate


@own_process
def test_who_only_says_hello_waits_for_no_network(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with host.open() as pool:
        pool.allocate("m", 1 << 20)
        server, gate = serve_behind_a_gate(host.url, tmp_path / "other", monkeypatch)
        id = server.host.replica.find("m").row.id
        before = server.host.version
        pool["large"] = b"l" * 60_000  # its entry is an object of its own
        gate.is_open.clear()
        sync = threading.Thread(target=server.sync)
        sync.start()
        assert gate.somebody_waits.wait(10)
        client: Any = Client()
        server.answer(client, 1, "hello", [1, server.host.name, 0, bytes(16), []])
        server.answer(client, 2, "version", [])
        server.answer(client, 3, "strangers", [[(id, 1)]])
        assert server.host.blocks.region(id).size == 1 << 20  # which is what "map" hands out
        assert sync.is_alive()
        assert client.answers[0]["replica"] == server.host.name
        assert client.answers[1:] == [before, [id]]
        gate.is_open.set()
        sync.join()
        assert server.host.version == pool.version
        server.host.close()


@own_process
def test_threads_that_play_at_once_play_each_entry_once(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with host.open() as pool:
        memory = pool.allocate("m", 8)
        server, _ = serve_behind_a_gate(host.url, tmp_path / "other", monkeypatch)
        id = server.host.replica.find("m").row.id
        server.host.blocks.ensure(id, 0, 8)
        done = threading.Event()

        def keep_up() -> None:
            while not done.is_set():
                server.sync()

        with ThreadPoolExecutor(4) as threads:
            players = [threads.submit(keep_up) for _ in range(4)]
            for _ in range(150):
                memory.fetch_add(0, 1, dtype="<i8")
            done.set()
            for player in players:
                player.result()
        assert server.sync() == pool.version
        assert server.host.blocks.read(id, 0, 8) == (150).to_bytes(8, "little")
        server.host.close()
