"""Ctrl-C at any line of a commit, sync or flush leaves a pool that works, here and elsewhere."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import everpool
from everpool.commit import Turn
from everpool.interrupts import check, deferred
from support.isolation import own_process
from support.processes import Worker, call, ending

# What holds locks of threads or processes, or LMDB's own.
_GUARDED = ("/commit.py", "/replica/lock.py", "/replica/writer.py", "/replica/flush.py")
_EVERY = 3


class Interrupter:
    """Presses Ctrl-C at the n-th line of guarded code that the main thread runs."""

    def __init__(self, at: int) -> None:
        self._left = at
        self.pressed = False

    def __enter__(self) -> "Interrupter":
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        main = threading.current_thread() is threading.main_thread()
        return self._line if main and name.endswith(_GUARDED) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and not self.pressed:
            self._left -= 1
            if self._left < 0:
                self.pressed = True
                signal.raise_signal(signal.SIGINT)
        return self._line


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
        press_again_and_again(path, other, act)


def press_again_and_again(path: Path, other: Worker, act: Callable[..., None]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pool = everpool.open(path, timeout_s=5)
    at, interrupted = 0, 0
    while True:
        pool["x"] = 0
        try:
            with Interrupter(at) as interrupter:
                act(pool)
        except KeyboardInterrupt:
            interrupted += 1
        if not interrupter.pressed:
            break
        other.ask(put_elsewhere, timeout_s=10)
        done = threading.Thread(target=put, args=(pool,), daemon=True)
        done.start()
        done.join(5)
        assert not done.is_alive(), f"interrupted at line {at}, it hangs"
        at += _EVERY
    assert interrupted > 3


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
