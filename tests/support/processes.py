"""Processes that a test can ask, stop and kill.

    child = Child(function, *args)     # forks; calls function(link, *args) over there
    child.receive()                    # what the function sent with link.send(...)
    child.kill()

    call(function, *args)              # the function's result, from a process of its own
    worker = Worker(path)              # a process that has the pool open
    worker.ask(function, *args)        # function(pool, *args), over there

Whatever goes wrong in a child fails the test with the child's traceback. No wait is endless.
"""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import everpool

PATIENCE_S = 60.0
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_libc = ctypes.CDLL(None, use_errno=True)


def stop(pid: int) -> None:
    """SIGSTOP, and wait until all threads are stopped: on other cores they go on for a while."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + PATIENCE_S
    while set(thread_states(pid)) != {"T"}:
        assert time.monotonic() < deadline, f"process {pid} does not stop"
        time.sleep(0.001)


class Failure:
    """A traceback on its way to the parent."""

    def __init__(self, text: str) -> None:
        self.text = text


class Child:
    """A forked process that runs `function(link, *args)` and ends."""

    def __init__(self, function: Callable[..., Any], *args: Any, survives: bool = False) -> None:
        """`survives` lets it live on when the thread that started it ends."""
        here, there = multiprocessing.Pipe()
        self.link = here
        self.said: list[Any] = []  # what it sent and nobody received, once it is gone
        self.status: int | None = None
        self.pid = os.fork()
        if not self.pid:
            here.close()
            self._live(there, function, args, survives)
        there.close()

    def _live(
        self, link: Connection, function: Callable[..., Any], args: tuple[Any, ...], survives: bool
    ) -> None:
        code = 1
        try:
            if sys.platform == "linux" and not survives:
                _libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
            faulthandler.enable(sys.__stderr__)
            function(link, *args)
            code = 0
        except BaseException:
            with contextlib.suppress(Exception):
                link.send(Failure(traceback.format_exc()))
        finally:
            os._exit(code)

    def send(self, message: Any) -> None:
        self.link.send(message)

    def receive(self, timeout_s: float = PATIENCE_S) -> Any:
        """Return the child's next message; fails the test when it dies or says nothing."""
        deadline = time.monotonic() + timeout_s
        while not self.link.poll(0.02):
            if not self.alive() and not self.link.poll(0.05):
                raise AssertionError(f"the child died with status {self.status}, saying nothing")
            if time.monotonic() > deadline:
                stacks = stacks_of(self.pid)
                self.kill()
                raise AssertionError(f"the child said nothing for {timeout_s} s{stacks}")
        try:
            message = self.link.recv()
        except EOFError:
            raise AssertionError(f"the child ended with {self.join()}, saying nothing") from None
        if isinstance(message, Failure):
            self.join()
            raise AssertionError("in the child:\n" + message.text)
        return message

    def alive(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = status
        return self.status is None

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self.alive():
            os.kill(self.pid, signal.SIGKILL)
            _, self.status = os.waitpid(self.pid, 0)
        self.join()

    def stop(self) -> None:
        """SIGSTOP, and wait until all its threads are stopped."""
        stop(self.pid)

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def join(self, timeout_s: float = PATIENCE_S) -> int:
        """Return the exit code, or minus the signal; kills and fails a child that does not end."""
        deadline = time.monotonic() + timeout_s
        while self.alive():
            if time.monotonic() > deadline:
                stacks = stacks_of(self.pid)
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.status = signal.SIGKILL
                raise AssertionError(f"the child did not end within {timeout_s} s{stacks}")
            time.sleep(0.001)
        with contextlib.suppress(EOFError, OSError):
            while self.link.poll():
                self.said.append(self.link.recv())
        self.link.close()
        assert self.status is not None
        return os.waitstatus_to_exitcode(self.status)


class Worker(Child):
    """A process with a pool open that calls functions on it when asked."""

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(_serve, path, options)
        self.receive()

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Begin `function(pool, *args)` over there; `receive` returns its result."""
        self.send((function, args))

    def ask(self, function: Callable[..., Any], *args: Any, timeout_s: float = PATIENCE_S) -> Any:
        """Return what `function(pool, *args)` returns over there."""
        self.start(function, *args)
        return self.receive(timeout_s)

    def close(self) -> None:
        """Close the pool over there and end the process."""
        self.send(None)
        assert self.join() == 0


def _serve(link: Connection, path: Path, options: dict[str, Any]) -> None:
    pool = everpool.open(path, **options)
    link.send("ready")
    while True:
        asked = link.recv()
        if asked is None:
            pool.close()
            return
        function, args = asked
        link.send(function(pool, *args))


def call(function: Callable[..., Any], *args: Any, timeout_s: float = PATIENCE_S) -> Any:
    """Return the function's result, worked out in a process of its own."""
    child = Child(_answer, function, args)
    result = child.receive(timeout_s)
    assert child.join() == 0
    return result


def _answer(link: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    link.send(function(*args))


@contextlib.contextmanager
def ending(*children: Child) -> Iterator[None]:
    """Kill what is left of the children at the end, whatever happened."""
    try:
        yield
    finally:
        for child in children:
            if child.alive():
                child.kill()


def state_of(pid: int) -> str:
    """Return the letter by which the kernel tells what a process does."""
    return _state(Path(f"/proc/{pid}/stat"))


def thread_states(pid: int) -> Iterator[str]:
    """Yield that letter for each thread: a signal reaches one after the other."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield _state(task / "stat")


def _state(stat: Path) -> str:
    return stat.read_text().rpartition(")")[2].split()[0]


def stacks_of(pid: int) -> str:
    """Return where a process hangs, as far as the kernel tells."""
    with contextlib.suppress(OSError):
        waits = [
            f"{task.name}: {(task / 'wchan').read_text()}"
            for task in Path(f"/proc/{pid}/task").iterdir()
        ]
        return "; its threads wait in " + ", ".join(waits)
    return ""
