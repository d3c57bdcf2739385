"""Ctrl-C at one line after the other of some code, and what must still work behind each."""

import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType
from typing import Any

_PATIENCE_S = 10.0


class Interrupter:
    """Presses Ctrl-C at the n-th line of guarded files that the main thread runs."""

    def __init__(self, guarded: tuple[str, ...], at: int) -> None:
        """`guarded` has the ends of the files' names."""
        self._guarded = guarded
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
        return self._line if main and name.endswith(self._guarded) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and not self.pressed:
            self._left -= 1
            if self._left < 0:
                self.pressed = True
                signal.raise_signal(signal.SIGINT)
        return self._line


def press_at_every_line(
    act: Callable[[], object],
    then: Callable[[], object],
    *,
    guarded: tuple[str, ...],
    every: int,
) -> None:
    """Run `act` until Ctrl-C was pressed at one of `every` so many lines of the guarded files.

    After each time, `then` must work, in another thread and in time. This wants the main thread of
    a process of its own.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    at = interrupted = 0
    while True:
        try:
            with Interrupter(guarded, at) as interrupter:
                act()
        except KeyboardInterrupt:
            interrupted += 1
        if not interrupter.pressed:
            break
        try:
            _in_time(then)
        except TimeoutError:
            raise AssertionError(f"interrupted at line {at}, it hangs") from None
        at += every
    assert interrupted > 3


def _in_time(act: Callable[[], object]) -> None:
    done: Future[object] = Future()

    def run() -> None:
        try:
            done.set_result(act())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    done.result(_PATIENCE_S)
