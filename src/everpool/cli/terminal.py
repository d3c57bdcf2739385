"""What people see: messages and progress on stderr, results on stdout."""

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


class Meter(Protocol):
    """Hears how far a long piece of work has come."""

    def begin(self, what: str, total_bytes: int | None = None) -> None:
        """Say what is being worked on now; None: its size is not known."""
        ...

    def advance(self, count_bytes: int) -> None:
        """Say that `count_bytes` more are done."""
        ...


class Silent:
    """A meter that shows nothing: for pipes, files and scripts."""

    def begin(self, what: str, total_bytes: int | None = None) -> None:
        """Show nothing."""

    def advance(self, count_bytes: int) -> None:
        """Show nothing."""


class _Bar:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)

    def begin(self, what: str, total_bytes: int | None = None) -> None:
        self._progress.reset(self._task, total=total_bytes, description=printable(what))

    def advance(self, count_bytes: int) -> None:
        self._progress.advance(self._task, count_bytes)


@contextmanager
def meter() -> Generator[Meter, None, None]:
    """Yield a meter that draws a bar on stderr when that is a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield Silent()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bar(progress)


@contextmanager
def spinner(what: str) -> Generator[None, None, None]:
    """Show on a terminal that `what` is under way, and for how long; its end is not known."""
    if not sys.stderr.isatty():
        yield
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(what, total=None)
        yield


def say(markup: str) -> None:
    """Print a message for people on stderr; never wrapped, so that scripts can match its lines."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(markup)


def say_each(what: str, reasons: dict[str, str], colour: str = "red") -> None:
    """Print a message for each of several names: what is with it, and why."""
    for name, reason in reasons.items():
        say(f"[{colour}]{what}:[/{colour}] {escape(printable(name))}: {escape(reason)}")


def print_line(text: str) -> None:
    """Print one line of results on stdout."""
    sys.stdout.write(text + "\n")


def print_json(value: object) -> None:
    """Print `value` on stdout as one line of JSON."""
    print_line(json.dumps(value, ensure_ascii=False, default=str))


def printable(name: str) -> str:
    """Return `name` without line ends and control characters, which could fake other output."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def count(number: int, noun: str) -> str:
    """Return a number of things in words, such as `1 object` or `2,000 objects`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def human_size(size_bytes: int) -> str:
    """Return a size in the largest unit that keeps it at one or more, such as `1.5 GiB`."""
    size, unit = float(size_bytes), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size_bytes} B" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"
