"""Ctrl-C at any line of a commit, sync or flush leaves a pool that works, here and elsewhere."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import everpool
from everpool.commit import Turn
from everpool.interrupts import check, deferred
from support.interrupts import press_at_every_line
from support.isolation import own_process
from support.processes import Worker, call, ending

# What holds locks of threads or processes, or LMDB's own.
_GUARDED = ("/commit.py", "/replica/lock.py", "/replica/writer.py", "/replica/flush.py")


def put(pool: Any) -> None:
    pool["x"] = 1


def pipeline(pool: Any) -> None:
    with pool.transaction(wait=False) as tx:
        tx["x"] = 1


def flush(pool: Any) -> None:
    pool.engine().flush()


def sync(pool: Any) -> None:
    pool.sync()


def put_elsewhere(pool: Any) -> None:
    pool["y"] = pool.version


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with everpool.open(tmp_path / "pool") as pool:
        pool["x"] = 0
        pool.allocate("m", 8)
    return tmp_path / "pool"


@pytest.mark.parametrize("act", [put, pipeline, flush, sync])
def test_ctrl_c_at_any_line_leaves_a_pool_that_works(path: Path, act: Callable[..., None]) -> None:
    call(interrupt_at_every_line, path, act, timeout_s=60)


def interrupt_at_every_line(path: Path, act: Callable[..., None]) -> None:
    other = Worker(path, timeout_s=5)
    with ending(other):
        pool = everpool.open(path, timeout_s=5)

        def then() -> None:
            other.ask(put_elsewhere, timeout_s=5)
            pool["x"] = 0

        press_at_every_line(lambda: act(pool), then, guarded=_GUARDED, every=3)


@own_process
def test_ctrl_c_ends_the_wait_for_a_lock(path: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pool = everpool.open(path, timeout_s=60)
    other = Worker(path)
    with ending(other):
        other.ask(keep_lock)
        began = time.monotonic()
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            pool["x"] = 2
        assert time.monotonic() - began < 5
        other.ask(free_lock)
        pool["x"] = 3
    assert pool["x"] == 3


def keep_lock(pool: Any) -> None:
    assert pool.engine().replica.lock.acquire(5)


def free_lock(pool: Any) -> None:
    pool.engine().replica.lock.release()


@own_process
def test_ctrl_c_ends_the_wait_for_ones_turn(path: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    turn = Turn()
    assert turn.take()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), deferred(), turn:
        pass
    turn.release()
    assert turn.take()


@own_process
def test_a_handler_waits_for_the_end_of_the_block_and_is_put_back(path: Path) -> None:
    seen: list[str] = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append("handled"))
    handler = signal.getsignal(signal.SIGTERM)
    with deferred():
        with deferred():
            signal.raise_signal(signal.SIGTERM)
            seen.append("inner")
        seen.append("outer")
    assert seen == ["inner", "outer", "handled"]
    assert signal.getsignal(signal.SIGTERM) is handler
    with deferred():
        signal.raise_signal(signal.SIGTERM)
        check()
        seen.append("behind")
    assert seen[3:] == ["handled", "behind"]
