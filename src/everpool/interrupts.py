"""Ctrl-C, and other signals whose handlers may raise, are kept out of what must not be cut in two.

Python runs a signal's handler in the main thread between any two instructions, also between a
lock that was taken and the note that it was. Within `deferred` the handlers wait; whoever waits
for something in there calls `check` now and then, which is a good moment.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = (int(signal.SIGINT), int(signal.SIGTERM), int(signal.SIGALRM))
# Where there is one, without the detour through enums, which costs more than the calls themselves.
_plain: Any = sys.modules.get("_signal", signal)
_get, _set = _plain.getsignal, _plain.signal
# How long somebody may wait without a look.
NOTICE_S = 0.05
_depth = 0
_handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
_pending: list[int] = []
_main = threading.main_thread().ident


class deferred:
    """In the main thread, let no handler run in the block, but after it. May be nested."""

    __slots__ = ("_outermost",)

    def __enter__(self) -> None:
        global _depth
        self._outermost = False
        if threading.get_ident() != _main:
            return
        if _depth == 0:
            for number in _SIGNALS:
                handler = _get(number)
                if callable(handler):
                    _handlers[number] = handler
                    _set(number, _hold)
        self._outermost = True
        _depth += 1

    def __exit__(self, *_: object) -> None:
        global _depth
        if not self._outermost:
            return
        _depth -= 1
        if _depth == 0:
            _restore()


def _restore() -> None:
    if not _handlers:
        return
    number, handler = _handlers.popitem()
    try:
        _set(number, handler)
        if number in _pending:
            _pending.remove(number)
            handler(number, None)
    finally:  # whatever that one raised
        _restore()


def _hold(number: int, _: FrameType | None) -> None:
    if number not in _pending:
        _pending.append(number)


def check() -> None:
    """Run the handlers that wait, which may raise."""
    if _pending and threading.get_ident() == _main:
        number = _pending.pop()
        _handlers[number](number, None)


def _after_fork_in_child() -> None:
    """The thread that forked is the main one here, and was not in a block of another's."""
    global _depth, _main
    _main = threading.get_ident()
    _pending.clear()
    if _depth:
        _depth = 0
        _restore()


os.register_at_fork(after_in_child=_after_fork_in_child)
