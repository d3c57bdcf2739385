"""Tellers that move money while one after another is killed, and what they reported."""

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

_START_DEADLINE_S = 60.0


class Transfer(NamedTuple):
    """Money that moved between two accounts."""

    source: int
    target: int
    amount: int


class DemoFailedError(Exception):
    """Something happened that the demo exists to rule out, or it could not run at all."""


@dataclass
class Teller:
    """A teller's process, and the transfers that it reported."""

    number: int
    process: "subprocess.Popen[bytes]"
    acknowledged: dict[str, Transfer] = field(default_factory=dict[str, Transfer])
    killed: bool = False

    def listen(self) -> None:
        """Note what the teller reports, until its end of the pipe closes."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            name, *numbers = line.decode().split()
            self.acknowledged[name] = Transfer(*map(int, numbers))


class Storm:
    """Runs `count` tellers at a time on the pool at `path`; a context manager that ends them."""

    def __init__(self, path: Path, count: int, seed: int) -> None:
        self.tellers: list[Teller] = []
        self._path = path
        self._count = count
        self._random = random.Random(seed)
        self._listeners: list[threading.Thread] = []

    def __enter__(self) -> "Storm":
        return self

    def __exit__(self, *_: object) -> None:
        for teller in self.tellers:
            teller.process.kill()
        self._wait()

    @property
    def kills(self) -> int:
        return sum(teller.killed for teller in self.tellers)

    @property
    def acknowledged(self) -> int:
        return sum(len(teller.acknowledged) for teller in self.tellers)

    def rage(self, seconds: float, interval_s: float, report: Callable[[], None]) -> None:
        """Kill a teller about every `interval_s` for `seconds`, each time starting another."""
        while len(self._living()) < self._count:
            self._start()
        self._wait_until(lambda: all(teller.acknowledged for teller in self._living()))
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(interval_s * self._random.uniform(0.5, 1.5))
            self._kill_one()
            self._start()
            report()
        # The last ones die as well: nobody closes the pool in an orderly way.
        while self._living():
            self._kill_one()
        self._wait()
        report()

    def _start(self) -> None:
        number = len(self.tellers)
        command = [sys.executable, "-m", "everpool.demo.teller", str(self._path), str(number)]
        with _uninterrupted():
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for us: we end the tellers
            )
            teller = Teller(number, process)
            listener = threading.Thread(target=teller.listen, daemon=True)
            listener.start()
            self.tellers.append(teller)
            self._listeners.append(listener)

    def _living(self) -> list[Teller]:
        return [teller for teller in self.tellers if not teller.killed]

    def _kill_one(self) -> None:
        # One that has begun to work is in the middle of a commit nearly all the time.
        self._wait_until(lambda: any(teller.acknowledged for teller in self._living()))
        teller = self._random.choice([one for one in self._living() if one.acknowledged])
        teller.killed = True
        teller.process.kill()

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_DEADLINE_S
        while not condition():
            for teller in self._living():
                code = teller.process.poll()
                if code is not None:
                    raise DemoFailedError(f"teller {teller.number} ended by itself, with {code}")
            if time.monotonic() > deadline:
                raise DemoFailedError(f"no teller moved any money in {_START_DEADLINE_S:.0f} s")
            time.sleep(0.01)

    def _wait(self) -> None:
        for teller, listener in zip(self.tellers, self._listeners, strict=True):
            teller.process.wait()
            listener.join()
            assert teller.process.stdout is not None
            teller.process.stdout.close()


@contextmanager
def _uninterrupted() -> Generator[None, None, None]:
    """Put off Ctrl-C and SIGTERM to the end of the block: no process is started and forgotten."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: caught.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt
