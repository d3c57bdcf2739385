"""What the tests of the command line share."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from typer.testing import CliRunner

import everpool
from everpool.cli.app import app
from everpool.cli.tagged import to_json

EVERPOOL = [sys.executable, "-m", "everpool.cli"]


class Done(NamedTuple):
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


def run(*words: object, stdin: str | bytes | None = None) -> Done:
    """Run a command in this process, as a shell without a terminal would."""
    result = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


def out_of(*words: object, stdin: str | bytes | None = None) -> str:
    """Run a command that must succeed without a message; returns what it printed."""
    done = run(*words, stdin=stdin)
    assert (done.code, done.err) == (0, ""), done
    return done.out


def contents(path: Path) -> dict[str, Any]:
    """Return a pool's objects in a form that compares, memory and arrays as (type, bytes)."""
    found: dict[str, Any] = {}
    with everpool.open(path, create=False) as pool:
        for name in pool:
            value = pool[name]
            if isinstance(value, everpool.Memory):
                found[name] = ("memory", value.read(0, value.size))
            elif isinstance(value, everpool.Array):
                found[name] = ("live", str(value.dtype), value.shape, value[...].tobytes())
            elif isinstance(value, np.ndarray):
                found[name] = (value.dtype, value.shape, value.tobytes())
            else:
                found[name] = (type(value), to_json(value))
    return found
