"""A pool and all that it handed out, before and after a fork."""

import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everpool
from everpool import ClosedError, embedded
from everpool.replica import shared
from everpool.replica.writer import Writer
from support import scenes
from support.processes import PATIENCE_S, Child, call, ending, state_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    call(scenes.prepare, tmp_path / "pool")
    return tmp_path / "pool"


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """Fork with everything open, and return what the child finds."""
    return call(function, *args, timeout_s=30)


def own_process(test: Callable[[Path], None]) -> Callable[[Path], None]:
    """Run a test in a process of its own, so that the pools it leaves open die with it."""

    def run(path: Path) -> None:
        call(test, path, timeout_s=2 * PATIENCE_S)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


# Both sides use what was opened before


@own_process
def test_parent_and_child_both_use_a_pool_opened_before(path: Path) -> None:
    pool = everpool.open(path)

    def child() -> tuple[Any, int]:
        assert pool["number"] == 0
        pool["from the child"] = 1
        pool.memory("counter").fetch_add(0, 5)
        return pool["before"], pool.version

    pool["before"] = "x"
    version = pool.version
    assert in_child(child) == ("x", version + 2)
    assert pool["from the child"] == 1
    assert pool.memory("counter").fetch_add(0, 1) == 5
    assert pool.version == version + 3


@own_process
def test_handles_and_views_work_in_the_child(path: Path) -> None:
    pool = everpool.open(path)
    memory, accounts, large = pool.memory("mem"), pool.array("accounts"), pool["value"]
    view, live = memory.view(0, 8), np.asarray(accounts)
    memory[0:8] = b"12345678"
    accounts[0] = 17
    watch = pool.watch()

    def child() -> None:
        assert memory.read(0, 8) == bytes(view) == b"12345678"
        assert accounts[0] == live[0] == 17
        assert scenes.number_of(large) == 0
        memory[0:8] = b"abcdefgh"
        accounts[0] += 1
        assert accounts.fetch_add(1, 2) == scenes.START
        assert bytes(view) == b"abcdefgh" and live[0] == 18
        change = watch.get(5)
        assert change is not None and change.name == "mem"
        assert memory.compare_and_swap(8, bytes(8), b"in child")

    in_child(child)
    assert memory.read(0, 16) == bytes(memory.view(0, 16)) == b"abcdefghin child"
    assert bytes(view) == b"abcdefgh"
    assert accounts[0] == live[0] == 18 and accounts[1] == scenes.START + 2
    assert [change.name for change in (watch.get(5), watch.get(5)) if change] == ["mem", "accounts"]


@own_process
def test_both_sides_commit_at_once(path: Path) -> None:
    pool = everpool.open(path)
    counter = pool.memory("counter")

    def child(link: Connection) -> None:
        for _ in range(200):
            counter.fetch_add(8, 1)
        link.send("done")

    children = [Child(child) for _ in range(2)]
    with ending(*children):
        for _ in range(200):
            counter.fetch_add(8, 1)
        for process in children:
            assert process.receive() == "done"
    assert int.from_bytes(counter.read(8, 8), "little") == 600


@own_process
def test_a_grandchild_uses_the_pool(path: Path) -> None:
    pool = everpool.open(path)

    def child() -> int:
        pool["child"] = 1

        def grandchild() -> int:
            pool["grandchild"] = pool["child"] + 1
            return pool["grandchild"]

        return in_child(grandchild)

    assert in_child(child) == 2
    assert pool["grandchild"] == 2


@own_process
def test_a_pool_open_read_only_works_in_the_child(path: Path) -> None:
    pool = everpool.open(path, read_only=True)

    def child() -> str:
        assert scenes.changed(pool) == 0
        try:
            pool["a"] = 1
        except everpool.InvalidError as error:
            return error.kind
        return "wrote"

    assert in_child(child) == "invalid"


@own_process
def test_threads_of_the_child_share_one_engine(path: Path) -> None:
    pool = everpool.open(path)

    def child() -> int:
        barrier = threading.Barrier(8)

        def use(number: int) -> None:
            barrier.wait()
            pool[f"thread/{number}"] = number

        threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(list(pool.names("thread/"))) == 8
        pool.close()
        return len(embedded._engines)

    for _ in range(20):
        assert in_child(child) == 0, "closing did not close the engine"


# What belongs to the parent


@own_process
def test_transactions_and_futures_of_the_parent_are_closed_in_the_child(path: Path) -> None:
    pool = everpool.open(path)
    open_tx = pool.transaction()
    open_tx["a"] = 1
    assert open_tx["number"] == 0
    memory = open_tx.memory("mem")
    stuck = hold_commits()
    waiting = []
    for number in range(3):
        with pool.transaction(wait=False) as tx:
            tx[f"queued/{number}"] = number
        waiting.append((tx, tx.committed))
    with pool.transaction(wait=False) as late:
        late["late"] = 1  # its future is only asked for in the child

    def child() -> None:
        for use in (
            lambda: open_tx["number"],
            lambda: open_tx.__setitem__("b", 1),
            lambda: memory.read(0, 8),
            lambda: open_tx.__exit__(None, None, None),
        ):
            with pytest.raises(ClosedError):
                use()
        for tx, future in waiting:
            with pytest.raises(ClosedError):
                future.result(10)
            with pytest.raises(ClosedError):
                _ = tx.version
        with pytest.raises(ClosedError):
            late.committed.result(10)
        with pool.transaction() as mine:  # and a new one works
            mine["child"] = mine["number"] + 1

    children = [Child(lambda link: link.send(child())) for _ in range(3)]
    with ending(*children):
        time.sleep(0.2)
        stuck.set()
        for process in children:
            process.receive()
    for number, (tx, future) in enumerate(waiting):
        assert future.result(10) == tx.version and pool[f"queued/{number}"] == number
    assert late.committed.result(10)
    with open_tx:
        pass
    assert pool["a"] == 1 and pool["child"] == 1


def hold_commits() -> threading.Event:
    """Make the committer's thread wait, once it has the lock, until the event is set."""
    stuck, whole, process = threading.Event(), Writer.commit, os.getpid()

    def waiting(self: Writer, *args: Any) -> Any:
        if os.getpid() == process:
            stuck.wait(30)
        return whole(self, *args)

    Writer.commit = waiting
    return stuck


@own_process
def test_futures_that_were_done_keep_their_result_in_the_child(path: Path) -> None:
    pool = everpool.open(path)
    with pool.transaction(wait=False) as tx:
        tx["a"] = 1
    version = tx.committed.result(10)
    with pool.transaction() as other:
        other["a"] = 2

    def child() -> tuple[int, int]:
        return tx.committed.result(10), other.committed.result(10)

    assert in_child(child) == (version, version + 1)


@own_process
def test_a_block_left_by_an_error_in_the_child_discards_nothing_of_the_parent(path: Path) -> None:
    pool = everpool.open(path)
    with pool.transaction() as tx:
        tx["value"] = scenes.pattern(5, scenes.LARGE_BYTES)  # stored in a file already

        def child() -> str:
            try:
                with tx:
                    raise RuntimeError("in the child only")
            except RuntimeError:
                pass
            tx.abort()
            return "left"

        assert in_child(child) == "left"
    assert scenes.number_of(pool["value"]) == 5
    assert not scenes.leftovers(pool)


@own_process
def test_the_child_may_end_in_any_way(path: Path) -> None:
    pool = everpool.open(path)
    live = np.asarray(pool.array("accounts"))

    def use() -> None:
        pool["child"] = os.getpid()
        assert pool["number"] == 0

    def ends() -> list[Callable[[], None]]:
        return [
            lambda: os._exit(0),
            lambda: sys.exit(0),
            lambda: (pool.close(), os._exit(0)),
            lambda: (use(), os._exit(0)),
            lambda: (use(), sys.exit(0)),
            lambda: (use(), pool.close(), sys.exit(0)),
            lambda: os.kill(os.getpid(), 9),
            lambda: (use(), os.kill(os.getpid(), 9)),
            lambda: os.execv("/bin/true", ["true"]),
            lambda: (use(), os.execv("/bin/true", ["true"])),
        ]

    for turn, end in enumerate(ends()):
        pid = os.fork()
        if not pid:
            try:
                end()
            except SystemExit:
                # Leave as the interpreter does at its end.
                threading._shutdown()
                import atexit

                atexit._run_exitfuncs()
                os._exit(0)
            os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) in (0, -9)
        pool["parent"] = turn
        assert pool["parent"] == turn and scenes.changed(pool) == 0 and live[0] == scenes.START
        assert call(read_afresh, path) == turn
    with pool.transaction() as tx:
        tx["last"] = 1


def read_afresh(path: Path) -> Any:
    with everpool.open(path, create=False) as pool:
        pool["fresh"] = 1
        return pool["parent"]


def run_script(script: str, path: Path) -> None:
    """Run a whole interpreter from its beginning to its end; it must say that it is fine."""
    done = subprocess.run(
        [sys.executable, "-c", script, path],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("fine\n", "", 0)


def test_a_child_that_ends_as_python_does_breaks_nothing(path: Path) -> None:
    """At its end an interpreter frees what it inherited."""
    script = """
import os, sys, everpool, numpy as np
pool = everpool.open(sys.argv[1], create=False)
memory, live = pool.memory("mem"), np.asarray(pool.array("accounts"))
pool["a"] = 1
for use in (False, True):
    pid = os.fork()
    if not pid:
        if use:
            pool["child"] = memory[0]
            with pool.transaction(wait=False) as tx:
                tx["pipelined"] = 1
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    pool["b"] = live[0].item()
    assert pool["b"] == 1000
assert pool["child"] == 0 and pool["pipelined"] == 1, "pipelined work is done at exit"
print("fine")
"""
    run_script(script, path)


def test_children_end_while_threads_of_the_parent_commit_and_read(path: Path) -> None:
    script = """
import os, sys, threading, everpool
pool = everpool.open(sys.argv[1], create=False)
stop, errors = threading.Event(), []
def work(number):
    try:
        at = 0
        while not stop.is_set():
            at += 1
            pool[str(number)] = at
            assert sum(1 for _ in pool.names()) and pool[str(number)] == at
    except BaseException as error:
        errors.append(error)
threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
for thread in threads:
    thread.start()
for turn in range(15):
    pid = os.fork()
    if not pid:
        if turn % 2:
            pool["child"] = turn
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
print(*errors or ["fine"])
"""
    run_script(script, path)


# Locks


@own_process
def test_a_child_that_outlives_its_killed_parent_holds_no_lock(path: Path) -> None:
    for turn in range(12):
        parent = Child(commit_and_fork, path, turn, survives=True)
        orphan = parent.receive()
        time.sleep(random.uniform(0, 0.05))
        parent.kill()
        try:
            assert state_of(orphan) in "SRD", "the orphan lives"
            began = time.monotonic()
            assert call(commit_afresh, path, timeout_s=30) == []
            assert time.monotonic() - began < 10
        finally:
            os.kill(orphan, 9)


def commit_and_fork(link: Connection, path: Path, turn: int) -> None:
    """Commit in threads, large values too, and fork a child that touches nothing."""
    pool = everpool.open(path, create=False)

    def commit(number: int) -> None:
        for at in range(1 << 30):
            pool[f"thread/{number}"] = scenes.pattern(at, scenes.LARGE_BYTES * (at % 2) + 8)

    for number in range(3):
        threading.Thread(target=commit, args=(number,), daemon=True).start()
    time.sleep(0.05)
    link.send(Child(lambda _: time.sleep(60), survives=True).pid)
    threading.Event().wait()


def commit_afresh(path: Path) -> list[str]:
    with everpool.open(path, create=False, timeout_s=8) as pool:
        pool["afresh"] = 1
        return [name for name in scenes.leftovers(pool) if not name.startswith("staging/")]


@own_process
def test_forks_while_threads_commit_never_hang(path: Path) -> None:
    pool = everpool.open(path)
    stop = threading.Event()
    done: list[int] = []
    errors: list[BaseException] = []

    def commit(number: int) -> None:
        counter = pool.memory("counter")
        futures: list[Future[int]] = []
        try:
            while not stop.is_set():
                counter.fetch_add(64 * number, 1)
                with pool.transaction(wait=False) as tx:
                    tx[f"queued/{number}"] = len(done)
                futures.append(tx.committed)
                pool[f"large/{number}"] = scenes.pattern(len(done), 70_000)
                done.append(number)
            for future in futures:
                future.result(30)
        except BaseException as error:
            errors.append(error)

    def child() -> int:
        assert pool["number"] == 0
        pool[f"child/{os.getpid()}"] = 1
        pool.memory("counter").fetch_add(4096, 1)
        with pool.transaction(wait=False) as tx:
            tx["by child"] = 1
        tx.committed.result(20)
        memory = pool.memory("mem")
        memory[0:8] = b"by child"
        return int(scenes.number_of(pool["value"]))

    threads = [threading.Thread(target=commit, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    forks = 60
    for _ in range(forks):
        time.sleep(random.uniform(0, 0.01))
        assert in_child(child) == 0
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a thread of the parent hangs"
    assert not errors, errors
    assert len(done) > 4
    counts = np.frombuffer(pool.memory("counter").read(0, 4104), "<i8")
    assert counts[512] == forks
    assert counts[:512].sum() == len(done)
    assert len(list(pool.names("child/"))) == forks


def test_a_fork_while_another_thread_orders_loads_never_hangs() -> None:
    with shared._order_lock:
        call(shared.order_loads, timeout_s=10)


def test_a_fork_while_another_thread_opens_a_pool_never_hangs(path: Path) -> None:
    with embedded._mutex:
        assert call(read_number, path, timeout_s=20) == 0


def read_number(path: Path) -> Any:
    with everpool.open(path) as pool:
        return pool["number"]


# multiprocessing


def use_all(pool: Any, memory: Any, accounts: Any, number: int) -> tuple[int, bytes, int]:
    pool[f"worker/{number}"] = number
    memory.fetch_add(128, 1)
    accounts[number] = number
    return pool["number"], memory.read(0, 8), int(accounts[number])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pools_and_handles_go_to_other_processes(path: Path, method: str) -> None:
    context = multiprocessing.get_context(method)
    with everpool.open(path) as pool:
        memory, accounts = pool.memory("mem"), pool.array("accounts")
        memory[0:8] = b"12345678"
        with context.Pool(2) as processes:
            jobs = [(pool, memory, accounts, number) for number in range(6)]
            found = processes.starmap_async(use_all, jobs).get(PATIENCE_S)
        assert found == [(0, b"12345678", number) for number in range(6)]
        assert [pool[f"worker/{number}"] for number in range(6)] == list(range(6))
        assert memory.fetch_add(128, 0) == 6
        assert accounts[:6].tolist() == list(range(6))
