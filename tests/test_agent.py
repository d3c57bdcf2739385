"""The agent of a host dies, stops, hangs and comes back; so do its clients. Nothing is lost."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everpool
from everpool.agent.failures import failure_in, leave_failure
from everpool.testing import history
from support import storm
from support.agents import Host, end_agents, is_alive, wait_until
from support.processes import Child, Failure, Worker, call, ending, stop

GRACE_S = 0.5


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    yield Host(tmp_path)
    end_agents(tmp_path)


# The agent is killed


def test_nothing_acknowledged_is_lost_or_doubled_when_agents_are_killed(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERPOOL_CACHE_DIR", str(host.cache))
    notes = tmp_path / "notes"
    notes.mkdir()
    call(prepare_storm, host.url)
    choose = random.Random()
    clients = [Child(storm.live, host.url, notes, number) for number in range(storm.WRITERS)]
    players = [Child(play_history, host.url, tmp_path, number) for number in range(2)]
    kills = 0
    with ending(*clients, *players):
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            time.sleep(choose.choice([0.0, 0.05, 0.3, 0.6]))
            host.kill_agent()
            kills += 1
            before = acknowledged(notes)
            wait_until(lambda before=before: acknowledged(notes) > before, 10)
        time.sleep(0.5)
        for child in [*clients, *players]:
            child.kill()
            for said in child.said:
                assert not isinstance(said, Failure), said.text
    found = call(storm.audit, host.url, notes, storm.FIRST, False)
    assert found.acknowledged > 300 and kills > 8, (found, kills)
    records = [tmp_path / f"history-{number}" for number in range(2)]
    final = call(final_state, host.url)
    assert history.check(history.load(records), final) == []


def prepare_storm(url: str) -> None:
    storm.prepare(url)
    with everpool.open(url) as pool:
        history.prepare(pool)


def play_history(link: Connection, url: str, folder: Path, number: int) -> None:
    pool = everpool.open(url, create=False)
    recorder = history.Recorder(folder / f"history-{number}", number)
    choose = random.Random()
    while True:
        history.play(pool, recorder, choose)


def final_state(url: str) -> dict[str, int]:
    with everpool.open(url, create=False) as pool:
        return history.final_state(pool)


def acknowledged(notes: Path) -> int:
    return sum(path.read_text().count("\na") for path in notes.iterdir())


def test_a_killed_agent_is_replaced_within_a_second_or_so(host: Host) -> None:
    with host.open() as pool:
        pool["a"] = 0
        took: list[float] = []
        for number in range(5):
            host.kill_agent()
            began = time.monotonic()
            pool["a"] = number
            took.append(time.monotonic() - began)
        assert sorted(took)[2] < 1.5, took
        assert pool["a"] == 4


def test_pipelined_commits_keep_their_order_across_deaths(host: Host) -> None:
    with host.open() as pool:
        pool["x"] = -1
        seen: list[int] = []
        with pool.watch("x") as watch:
            futures: list[Any] = []
            for number in range(3000):
                with pool.transaction(wait=False) as tx:
                    tx["x"] = number
                futures.append(tx.committed)
                if number % 700 == 350:
                    host.kill_agent()
            versions = [future.result(30) for future in futures]
            assert versions == sorted(set(versions))
            assert pool["x"] == 2999
            while (change := watch.get(0.5)) is not None:
                seen.append(change.version)
        assert seen == versions


def test_additions_are_neither_lost_nor_doubled(host: Host) -> None:
    with host.open() as pool:
        memory = pool.allocate("m", 8)
        olds: list[int] = []
        for number in range(200):
            if number % 50 == 10:
                threading.Timer(0.001, host.kill_agent).start()
            olds.append(memory.fetch_add(0, 1))
        assert olds == list(range(200))


# Views outlive agents


def test_views_go_on_showing_what_is_committed(host: Host) -> None:
    with host.open() as pool:
        memory = pool.allocate("m", 1 << 20)
        array = np.asarray(pool.allocate_array("n", 1000, "i8"))
        view = memory.view()
        for number in range(4):
            memory.write(number << 16, bytes([number + 1]) * 10)
            pool.array("n")[number] = number + 1
            host.kill_agent()
            pool["wake"] = number
        memory.write(5, b"end")
        assert bytes(view[5:8]) == b"end"
        assert [view[number << 16] for number in range(4)] == [1, 2, 3, 4]
        assert array[:4].tolist() == [1, 2, 3, 4]
        region = Path(f"/proc/{os.getpid()}/fd")
        links = {os.readlink(entry) for entry in region.iterdir() if entry.is_symlink()}
        assert len([link for link in links if "everpool" in link and "memfd" in link]) == 2


def test_agents_die_as_they_hand_out_memory(host: Host) -> None:
    choose = random.Random()
    with host.open() as pool:
        for number in range(6):
            memory = pool.allocate(f"m/{number}", 100)
            pid = host.agent()
            threading.Timer(choose.uniform(0, 0.003), os.kill, (pid, signal.SIGKILL)).start()
            time.sleep(0.001)
            view = memory.view()
            memory.write(0, b"first")
            wait_until(lambda pid=pid: not is_alive(pid))
            memory.write(5, b"second")
            assert bytes(view[:11]) == b"firstsecond"


def test_a_view_of_a_closed_pool_and_one_of_a_stopped_client_live_on(host: Host) -> None:
    reader, writer = Worker(host.url, cache_dir=host.cache), host.open()
    with ending(reader), writer:
        memory = writer.allocate("m", 100)
        reader.ask(keep_view_and_close)
        host.kill_agent()
        reader.stop()
        memory.write(0, b"first")
        host.kill_agent()
        memory.write(5, b"second")
        reader.go_on()
        assert reader.ask(kept_view, 11) == b"firstsecond"


_kept: list[memoryview] = []


def keep_view_and_close(pool: Any) -> None:
    _kept.append(pool.memory("m").view())
    pool.close()


def kept_view(pool: Any, size: int) -> bytes:
    return bytes(_kept[0][:size])


def test_clients_come_back_in_any_order_with_one_region_for_all(host: Host) -> None:
    workers = [Worker(host.url, cache_dir=host.cache) for _ in range(4)]
    with ending(*workers):
        workers[0].ask(allocate)
        for worker in workers[:3]:  # the fourth has not mapped it
            worker.ask(look)
        choose = random.Random()
        for number in range(4):
            order = list(workers)
            choose.shuffle(order)
            for worker in order[1:]:
                worker.stop()
            host.kill_agent()
            order[0].ask(store, number)
            for worker in order[1:]:
                worker.go_on()
            wait_until(lambda n=number: all(worker.ask(look) == n for worker in workers), 10)


def allocate(pool: Any) -> None:
    pool.allocate("m", 1 << 17)


_view: list[memoryview] = []


def look(pool: Any) -> int:
    if not _view:
        _view.append(pool.memory("m").view())
    return _view[0][70_000]


def store(pool: Any, number: int) -> None:
    pool.memory("m").write(70_000, bytes([number]))


# The agent is stopped


def test_a_stopped_agent_does_not_stop_reads_and_commits_end_in_time(host: Host) -> None:
    with host.open(timeout_s=1.0) as pool:
        pool["a"] = 1
        memory = pool.allocate("m", 8)
        memory.write(0, b"12345678")
        view = memory.view()
        pid = host.agent()
        stop(pid)
        try:
            assert pool["a"] == 1 and memory.read(0, 8) == bytes(view) == b"12345678"
            for act in (lambda: put(pool), lambda: memory.fetch_add(0, 1), pool.sync, pool.stats):
                began = time.monotonic()
                with pytest.raises(everpool.EverpoolError) as caught:
                    act()
                assert time.monotonic() - began < 1.0 + GRACE_S
                assert caught.value.kind in ("unavailable", "commit_unknown")
                assert f"process {pid}" in str(caught.value) and "is stopped" in str(caught.value)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert pool.sync() and pool["a"] == 1
        assert memory.read(0, 8) == b"12345678"


def put(pool: Any) -> None:
    pool["a"] = 2


def test_opening_behind_a_stopped_agent_ends_in_time(host: Host) -> None:
    host.open().close()
    pid = host.agent()
    stop(pid)
    try:
        began = time.monotonic()
        assert "is stopped" in call(open_soon, host.url, str(host.cache))
        assert time.monotonic() - began < 3
    finally:
        os.kill(pid, signal.SIGCONT)


def open_soon(url: str, cache: str) -> str:
    try:
        everpool.open(url, cache_dir=cache, timeout_s=0.5)
    except everpool.UnavailableError as error:
        return str(error)
    return "open"


def test_what_was_said_not_to_be_committed_never_is(host: Host) -> None:
    """The agent is stopped and goes on at random moments around the deadlines of commits."""
    choose = random.Random()
    with host.open() as observer:
        observer["x"] = 0
        workers = [Worker(host.url, cache_dir=host.cache, timeout_s=0.15) for _ in range(2)]
        with ending(*workers):
            pid = host.agent()
            for number, worker in enumerate(workers):
                worker.start(commit_many, number, 4.0)
            deadline = time.monotonic() + 3.5
            while time.monotonic() < deadline:
                time.sleep(choose.uniform(0, 0.05))
                stop(pid)
                time.sleep(choose.choice([0.01, 0.14, 0.15, 0.151, 0.16, 0.3]))
                os.kill(pid, signal.SIGCONT)
            told = [worker.receive() for worker in workers]
        observer.sync()
        kept = set(observer.names("c/"))
        kinds: dict[str, int] = {}
        for worker in told:
            for name, (kind, id, took_s) in worker.items():
                kinds[kind] = kinds.get(kind, 0) + 1
                assert took_s < 0.15 + GRACE_S, (name, kind, took_s)
                if kind == "committed":
                    assert name in kept
                elif kind == "unavailable":
                    assert name not in kept, "it was said that nothing was committed"
                else:
                    settled = observer.outcome(id).state
                    assert (settled == "committed") == (name in kept), (settled, name)
        assert kinds["committed"] > 20 and len(kinds) > 1, kinds
        assert set(observer.names("c/")) == kept


def commit_many(pool: Any, client: int, seconds: float) -> dict[str, tuple[str, str, float]]:
    """Commit, by itself and pipelined, small and large, and return what was said of each."""
    told: dict[str, tuple[str, str, float]] = {}
    deadline = time.monotonic() + seconds
    count = 0

    def note(name: str, began: float, error: BaseException | None) -> None:
        took_s = time.monotonic() - began
        if error is None:
            told[name] = "committed", "", took_s
        else:
            assert isinstance(error, everpool.EverpoolError), error
            told[name] = error.kind, str(getattr(error, "id", "")), took_s

    while time.monotonic() < deadline:
        count += 1
        name = f"c/{client}/{count}"
        began = time.monotonic()
        size = 50_000 if count % 7 == 0 else 10
        if count % 3:
            try:
                pool[name] = b"x" * size
                note(name, began, None)
            except everpool.EverpoolError as error:
                note(name, began, error)
        else:
            try:
                with pool.transaction(wait=False) as tx:
                    tx[name] = b"y" * size
            except everpool.EverpoolError as error:
                note(name, began, error)
                continue
            tx.committed.add_done_callback(
                lambda future, name=name, began=began: note(name, began, future.exception())
            )
    try:
        pool.sync()
    except everpool.EverpoolError:
        pool.engine().drain()
    return told


# What is told of a start that failed


def test_an_agent_that_cannot_start_says_why(tmp_path: Path) -> None:
    leave_failure(tmp_path, everpool.NotFoundError("no pool there", name="scan", version=3))
    error = failure_in(tmp_path)
    assert isinstance(error, everpool.NotFoundError)
    assert (error.message, error.facts) == ("no pool there", {"name": "scan", "version": 3})


def test_an_agent_that_could_not_say_why_points_to_its_log(tmp_path: Path) -> None:
    for torn in (None, b"", b'["NotFoundError", "no po'):
        if torn is not None:
            (tmp_path / "agent.error").write_bytes(torn)
        error = failure_in(tmp_path)
        assert isinstance(error, everpool.UnavailableError)
        assert f"{tmp_path}/agent.log" in error.message


def test_nobody_else_may_look_into_the_cache(host: Host) -> None:
    with host.open() as pool:
        pool["secret"] = "word"
        assert host.folder().stat().st_mode & 0o77 == 0
