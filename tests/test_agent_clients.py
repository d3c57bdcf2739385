"""Clients of a host's agent: many, dying, stopping, forking, and leaving."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

import everpool
from everpool.agent.frames import Frames, pack
from everpool.records import Put, Record, encode_record
from everpool.values import encode
from support.agents import Host, end_agents, is_alive, processes_of, wait_until
from support.interrupts import press_at_every_line
from support.isolation import own_process
from support.processes import Child, Worker, call, ending, stop


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    yield Host(tmp_path)
    end_agents(tmp_path)


def put(pool: Any, name: str, value: Any = 1) -> None:
    pool[name] = value


# Clients die, stop, and talk nonsense


def test_clients_that_die_in_the_middle_of_a_request_leave_nothing(host: Host) -> None:
    choose = random.Random()
    with host.open() as pool:
        pool.allocate("m", 40 << 20)
        for number in range(8):
            worker = Worker(host.url, cache_dir=host.cache)
            with ending(worker):
                worker.start(choose.choice([store_much, fetch_much]), number + 1)
                time.sleep(choose.uniform(0, 0.1))
            began = time.monotonic()
            pool["a"] = number
            assert time.monotonic() - began < 2
            with pool.transaction() as tx:
                kept = {tx.memory("m").read(at << 20, 1) for at in range(40)}
            assert len(kept) == 1, "half of a transaction was committed"
        wait_until(lambda: pool.stats()["clients"] == 1)


def store_much(pool: Any, number: int) -> None:
    with pool.transaction() as tx:
        memory = tx.memory("m")
        for at in range(40):
            memory.write(at << 20, bytes([number]) * 500_000)


def fetch_much(pool: Any, number: int) -> None:
    while True:
        assert len(bytes(pool.memory("m").view())) == 40 << 20
        pool.engine()._fetch_blocks(pool.memory("m").id, [(0, 40 << 20)])


def test_a_stopped_client_with_much_on_its_way_holds_up_nobody(host: Host) -> None:
    worker = Worker(host.url, cache_dir=host.cache)
    with host.open() as pool, ending(worker):
        pool["a"] = 0
        for _ in range(4):
            worker.start(pipeline_much, 3000)
            time.sleep(0.02)
            worker.stop()
            for number in range(20):
                began = time.monotonic()
                pool["a"] = number
                assert time.monotonic() - began < 1.0
            worker.go_on()
            versions = worker.receive()
            assert len(versions) == 3000 and versions == sorted(versions)


def pipeline_much(pool: Any, count: int) -> list[int]:
    futures: list[Any] = []
    for number in range(count):
        with pool.transaction(wait=False) as tx:
            tx[f"p/{number % 10}"] = "x" * 100
        futures.append(tx.committed)
    return [future.result(30) for future in futures]


def test_what_a_client_that_was_stopped_is_told_is_true(host: Host) -> None:
    """A client that sleeps over its deadline first reads what it was told before that."""
    choose = random.Random()
    kinds: list[str] = []
    pool = host.open()
    worker = Worker(host.url, cache_dir=host.cache, timeout_s=0.2)
    with pool, ending(worker):
        for number in range(14):
            name = f"c/{number}"
            worker.start(try_to_put, name)
            time.sleep(choose.uniform(0, 0.002))
            worker.stop()
            time.sleep(0.22)
            worker.go_on()
            kind, id = worker.receive()
            pool.sync()
            if kind == "commit_unknown":
                kind = pool.outcome(id).state
            assert (kind == "committed") == (name in pool), (kind, name)
            kinds.append(kind)
    assert "committed" in kinds


def try_to_put(pool: Any, name: str) -> tuple[str, str]:
    try:
        pool[name] = 1
    except everpool.EverpoolError as error:
        return error.kind, str(getattr(error, "id", ""))
    return "committed", ""


def test_nonsense_on_the_socket_harms_nobody(host: Host) -> None:
    with host.open() as pool:
        pool["a"] = 1
        pid = host.agent()
        nonsense = [
            pack(3, "nothing", 1),
            pack(3),
            pack("x", "y"),
            pack(4, "commit"),
            pack(5, "map"),
        ]
        for data in (b"", b"\1", b"\xff" * 100, b"\1\0\0\0\5", *nonsense):
            for cut in (data, data[:-1]):
                link = socket.socket(socket.AF_UNIX)
                os.chdir(host.folder())
                link.connect("agent.sock")
                link.sendall(cut)
                link.close()
        pool["a"] = 2
        wait_until(lambda: pool.stats()["clients"] == 1)
        assert host.agent() == pid and "Traceback" not in host.log()


# Many at once, and the last one


def test_forty_clients_come_and_go_at_once(host: Host) -> None:
    children = [Child(come_and_go, host, number) for number in range(40)]
    with ending(*children):
        for child in children:
            child.receive()
        assert len(processes_of(host.cache)) == 1
        for child in children:
            assert child.join() == 0
    with host.open() as pool:
        assert len(list(pool.names("c/"))) == 40 * 3
        assert pool.memory("n").fetch_add(0, 0) == 40 * 3


def come_and_go(link: Connection, host: Host, number: int) -> None:
    for turn in range(3):
        with host.open() as pool:
            pool[f"c/{number}/{turn}"] = 1
            with contextlib.suppress(everpool.ExistsError):
                pool.allocate("n", 8)
            pool.memory("n").fetch_add(0, 1)
    link.send("done")


def test_one_agent_is_started_by_many_at_once(tmp_path: Path) -> None:
    host = Host(tmp_path)
    try:
        children = [Child(open_and_stay, host) for _ in range(8)]
        with ending(*children):
            pids = {child.receive() for child in children}
            assert len(pids) == 1 == len(processes_of(host.cache))
    finally:
        end_agents(tmp_path)


def open_and_stay(link: Connection, host: Host) -> None:
    pool = host.open()
    link.send(pool.stats()["agent"])
    link.recv()


def test_agents_that_end_as_somebody_comes(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERPOOL_AGENT_IDLE_S", "0.2")
    choose = random.Random()
    pids: set[int] = set()
    for number in range(7):
        with host.open() as pool:
            pool["a"] = number
            pids.add(pool.stats()["agent"])
        time.sleep(choose.uniform(0.15, 0.35))
    assert len(pids) > 1
    with host.open() as pool:
        assert pool["a"] == 6


def test_when_the_last_client_has_left_nothing_is_left_of_the_agent(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERPOOL_AGENT_IDLE_S", "0.3")
    with host.open() as pool:
        pool.allocate("m", 1 << 20).write(0, b"x")
        pool["large"] = bytes(200_000)
        pid = host.agent()
        time.sleep(1)
        assert is_alive(pid), "somebody is connected"
    wait_until(lambda: not is_alive(pid), 5)
    assert not processes_of(host.cache)
    assert not (host.folder() / "agent.sock").exists()
    with open(host.folder() / "agent.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert host.log() == ""


# Forks, threads


def test_a_forked_child_has_a_link_of_its_own(host: Host) -> None:
    with host.open() as pool:
        memory = pool.allocate("m", 8)
        view = memory.view()
        with pool.transaction(wait=False) as tx:
            tx["on its way"] = 1
        child = Child(use_inherited, pool, memory, view, tx)
        with ending(child):
            assert tx.committed.result(10)
            assert child.receive() == 1
            pool["from parent"] = 1
            assert child.join() == 0
        assert pool["from child"] == os.getpid()
        assert memory.read(0, 4) == b"kids"
        wait_until(lambda: pool.stats()["clients"] == 1)


def use_inherited(link: Connection, pool: Any, memory: Any, view: memoryview, tx: Any) -> None:
    with pytest.raises(everpool.ClosedError):
        tx.committed.result(5)
    pool["from child"] = os.getppid()
    memory.write(0, b"kids")
    assert bytes(view[:4]) == b"kids" == memory.read(0, 4)
    link.send(pool.sync() and 1)


def test_a_child_outlives_its_parent(host: Host) -> None:
    parent = Child(have_a_child, host)
    with ending(parent):
        pid = parent.receive()
        parent.kill()
    with host.open() as pool:
        # The child keeps nothing of its parent's: only its own link is there, when it has one.
        wait_until(lambda: pool.stats()["clients"] == 1)
        memory = pool.memory("m")
        memory.write(0, b"1")
        host.kill_agent()  # another one must find the region that the child still sees
        memory.write(1, b"2")
        pool["go"] = 1
        wait_until(lambda: "seen" in pool)
        assert pool["seen"] == b"12"
    wait_until(lambda: not is_alive(pid))


def have_a_child(link: Connection, host: Host) -> None:
    pool = host.open()
    memory = pool.allocate("m", 8)
    view = memory.view()
    pid = os.fork()
    if pid:
        link.send(pid)
        link.recv()
    with contextlib.suppress(BaseException):
        time.sleep(2)
        deadline = time.monotonic() + 20
        while "go" not in pool and time.monotonic() < deadline:
            time.sleep(0.01)
        pool["seen"] = bytes(view[:2])
    os._exit(0)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(host: Host, method: str) -> None:
    context = multiprocessing.get_context(method)
    with host.open() as pool:
        array = pool.allocate_array("n", 4, "i8")
        processes = [context.Process(target=add, args=(pool, array, cell)) for cell in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert array[:].tolist() == [1, 1, 1, 3]


def add(pool: Any, array: Any, cell: int) -> None:
    array.fetch_add(cell, 1)
    pool.array("n").fetch_add(3, 1)


def test_threads_share_one_link(host: Host) -> None:
    with host.open() as pool:
        memory = pool.allocate("m", 8)
        found: list[int] = []

        def add_often() -> None:
            for _ in range(50):
                found.append(memory.fetch_add(0, 1))

        threads = [threading.Thread(target=add_often) for _ in range(8)]
        for thread in threads:
            thread.start()
        host.kill_agent()
        for thread in threads:
            thread.join(60)
        assert sorted(found) == list(range(400))
        assert pool.stats()["clients"] == 1


# Endings


def test_closing_in_the_middle_of_traffic(host: Host) -> None:
    host.open().close()
    for _ in range(3):
        pool = host.open()
        told: list[str] = []

        def work(pool: Any = pool, told: list[str] = told) -> None:
            number = 0
            with contextlib.suppress(everpool.ClosedError):
                while True:
                    number += 1
                    name = f"t/{threading.get_ident()}/{number}"
                    pool[name] = 1
                    told.append(name)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        pool.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        with host.open() as again:
            assert set(told) <= set(again.names("t/"))


_SCRIPT = """
import sys, everpool
pool = everpool.open(sys.argv[1], cache_dir=sys.argv[2])
for number in range(1000):
    with pool.transaction(wait=False) as tx:
        tx["x"] = number
"""


def test_the_end_of_a_program_waits_for_what_it_has_pipelined(host: Host) -> None:
    command = [sys.executable, "-c", _SCRIPT, host.url, str(host.cache)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    with host.open() as pool:
        assert pool["x"] == 999


def test_a_watch_elsewhere_hears_quickly(host: Host) -> None:
    worker = Worker(host.url, cache_dir=host.cache)
    with host.open() as pool, ending(worker):
        took: list[float] = []
        for number in range(10):
            worker.start(hear)
            time.sleep(0.05)
            pool[f"w/{number}"] = 1
            done = time.monotonic()
            took.append(worker.receive() - done)
        assert sorted(took)[5] < 0.1, took


def hear(pool: Any) -> float:
    with pool.watch("w/") as watch:
        next(watch)
        return time.monotonic()


def test_stats(host: Host) -> None:
    with host.open() as pool:
        pool["a"] = 1
        found = json.loads(json.dumps(pool.stats()))
        assert found["kind"] == "bucket" and found["path"] == host.url
        assert found["version"] == found["position"] == found["names"] == 1
        assert found["agent"] == host.agent() and found["clients"] == 1
        assert (found["trouble"], found["seconds_behind"], found["versions_behind"]) == ("", 0, 0)
        assert Path(found["replica"]).is_dir() and found["read_only"] is False


def test_a_callback_must_not_wait_for_its_own_thread(host: Host) -> None:
    with host.open() as pool:
        said: list[Any] = []

        def call_back(future: Any) -> None:
            said.append(pool["a"])
            for act in (pool.sync, lambda: put(pool, "b"), pool.stats):
                with pytest.raises(everpool.InvalidError, match="callback"):
                    act()
            with pool.transaction(wait=False) as tx:
                tx["c"] = 1
            said.append(tx)

        with pool.transaction(wait=False) as tx:
            tx["a"] = 1
        tx.committed.add_done_callback(call_back)
        wait_until(lambda: len(said) == 2)
        assert said[0] == 1 and said[1].committed.result(10)


# Ctrl-C


def sync(pool: Any) -> None:
    pool.sync()


def pipeline(pool: Any) -> None:
    with pool.transaction(wait=False) as tx:
        tx["x"] = 1


def write(pool: Any) -> None:
    pool["x"] = 1


@pytest.mark.parametrize("act", [write, pipeline, sync])
def test_ctrl_c_at_any_line_leaves_a_pool_that_works(
    host: Host, act: Callable[[Any], None]
) -> None:
    call(interrupt_at_every_line, host, act, timeout_s=60)


def interrupt_at_every_line(host: Host, act: Callable[[Any], None]) -> None:
    link = ("/agent/client.py", "/agent/link.py", "/agent/requests.py")
    guarded = ("/remote.py", "/commit.py", *link)
    with host.open(timeout_s=5) as pool:
        pool["x"] = 0

        def then() -> None:
            pool["y"] = 1
            pool["x"] = 0

        press_at_every_line(lambda: act(pool), then, guarded=guarded, every=2)


@own_process
def test_ctrl_c_ends_every_wait_for_a_stopped_agent(host: Host) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pool = host.open(timeout_s=30)
    pool["x"] = 1
    pid = host.agent()
    stop(pid)
    for act in (lambda: write(pool), pool.sync, pool.stats):
        assert interrupted(act) < 3
    assert call(interrupted_open, host) < 3
    os.kill(pid, signal.SIGCONT)
    assert pool.sync() >= 1
    pool.close()


def interrupted(act: Callable[[], Any]) -> float:
    began = time.monotonic()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        act()
    return time.monotonic() - began


def interrupted_open(host: Host) -> float:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return interrupted(lambda: host.open(timeout_s=30))


# What the protocol promises


def test_a_commit_is_not_appended_before_its_id_can_be_read(host: Host) -> None:
    """A client that reads nothing: its commits wait, those of others do not."""
    with host.open() as pool:
        pool["a"] = 1
        link = socket.socket(socket.AF_UNIX)
        os.chdir(host.folder())
        link.connect("agent.sock")
        link.settimeout(0.3)
        deadline = time.monotonic() + 30
        with contextlib.suppress(TimeoutError):
            for number in range(3000):
                link.sendall(pack(number + 10, "stats"))
        record = encode_record(Record(1, [], [], [], [Put("never read", encode(1).tobytes())]))
        wait_until(lambda: pool.stats()["clients"] == 2)
        time.sleep(0.3)
        link.sendall(pack(9, "commit", record, deadline))
        for number in range(10):
            pool["a"] = number
        time.sleep(0.3)
        pool.sync()
        assert "never read" not in pool
        frames, said = Frames(), list[Any]()
        while not any(frame[1] == "done" for frame in said):
            said += list(frames.feed(link.recv(1 << 16)))
        names = [frame[1] for frame in said if frame[0] == 0]
        assert names.index("ids") < names.index("done")
        wait_until(lambda: "never read" in pool)
        link.close()


def test_a_commit_whose_time_is_over_is_not_appended(host: Host) -> None:
    with host.open() as pool:
        pool["a"] = 1
        link = socket.socket(socket.AF_UNIX)
        os.chdir(host.folder())
        link.connect("agent.sock")
        record = encode_record(Record(1, [], [], [], [Put("late", encode(1).tobytes())]))
        link.sendall(pack(9, "commit", record, time.monotonic() - 0.001))
        frames, said = Frames(), list[Any]()
        while not said:
            said += list(frames.feed(link.recv(1 << 16)))
        assert said[0][:3] == [9, "error", "UnavailableError"]
        pool.sync()
        assert "late" not in pool and pool.version == 1
        link.close()


def test_a_closed_link_writes_to_nobody_elses_file(host: Host, tmp_path: Path) -> None:
    with host.open() as pool:
        client = pool.engine()._client
        number = client._wake
        client.close()
        with (tmp_path / "mine").open("wb") as file:
            if file.fileno() != number:
                os.dup2(file.fileno(), number)
            client.close()
            assert os.fstat(number).st_size == 0
            if file.fileno() != number:
                os.close(number)
