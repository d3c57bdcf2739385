"""Where errors become exit codes, and examples become help: every command passes through here."""

import functools
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import typer
from rich.markup import escape

from everpool.cli.terminal import say
from everpool.errors import (
    CommitUnknownError,
    ConflictError,
    EverpoolError,
    InvalidError,
    UnavailableError,
)

DONE = 0
FAILED = 1
USAGE = 2
TRY_AGAIN = 3
INTERRUPTED = 130
BROKEN_PIPE = 141

EXIT_CODES = {
    DONE: "done",
    FAILED: "not done: no such name, a taken name, damage, an unreadable file",
    USAGE: "the command, or a value in it, is wrong",
    TRY_AGAIN: "not now: the pool is busy, full or was changed; try again later",
    INTERRUPTED: "stopped by Ctrl-C; a second run goes on where this one stopped",
}

_P = ParamSpec("_P")


class Example(NamedTuple):
    """One line of a shell, and what it is for."""

    purpose: str
    line: str


# What `--help` shows, by command; the tests run each line.
EXAMPLES: dict[str, tuple[Example, ...]] = {}


def exit_code(error: EverpoolError) -> int:
    """Return the exit code for `error`, as `EXIT_CODES` describes it."""
    if isinstance(error, InvalidError):
        return USAGE
    if isinstance(error, UnavailableError | ConflictError | CommitUnknownError):
        return TRY_AGAIN
    return FAILED


def add_command(
    app: typer.Typer, name: str, *examples: Example, **settings: object
) -> Callable[[Callable[_P, None]], Callable[_P, None]]:
    """Register the function below as the command `name` of `app`, with `examples` in its help.

    An error that Everpool or the system raises on purpose is shown as one line, without a
    traceback, and ends the command with its exit code.
    """
    EXAMPLES[name] = examples

    def register(function: Callable[_P, None]) -> Callable[_P, None]:
        @functools.wraps(function)
        def command(*args: _P.args, **kwargs: _P.kwargs) -> None:
            _run(lambda: function(*args, **kwargs))

        epilog = examples_text(examples)
        more: dict[str, Any] = settings
        app.command(name, help=help_text(function), epilog=epilog, **more)(command)
        return command

    return register


def help_text(function: Callable[..., object]) -> str:
    """Return a function's docstring with each paragraph on one line, for any width to wrap."""
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    lines = [p if p.startswith(" ") else " ".join(p.split()) for p in paragraphs]
    return escape("\n\n".join(lines))


def examples_text(examples: tuple[Example, ...]) -> str:
    """Return `examples` as the markup that closes a help page."""
    lines = [f"  [dim]# {escape(purpose)}[/dim]\n  {escape(line)}" for purpose, line in examples]
    # The line end before the title keeps the lines below it indented.
    return "\n[bold]Examples[/bold]\n\n" + "\n".join(lines) if lines else ""


def exit_codes_text() -> str:
    """Return the table of exit codes as markup."""
    rows = [f"  [bold]{code:>3}[/bold]  {escape(text)}" for code, text in EXIT_CODES.items()]
    return "[bold]Exit codes[/bold]\n\n" + "\n".join(rows)


def _run(call: Callable[[], None]) -> None:
    try:
        call()
        sys.stdout.flush()
    except EverpoolError as error:
        say(f"[red]{escape(error.kind)}:[/red] {escape(str(error))}")
        raise typer.Exit(exit_code(error)) from None
    except (KeyboardInterrupt, typer.Abort):
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # Whoever read our output has enough; the interpreter must not complain at its end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None
    except OSError as error:
        say(f"[red]system:[/red] {escape(str(error))}")
        raise typer.Exit(FAILED) from None
