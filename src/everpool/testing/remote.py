"""A client of a pool in a process of its own, which a test can use like any other and kill.

    pool = connect(everpool.open, "/tmp/pool")
    pool["a"] = 1                  # happens over there
    pool.kill()                    # SIGKILL; what was acknowledged is in the pool

Every object of the other process that is not plain data is represented by a `Remote`, which
forwards attributes, calls, indexing and `with`. Errors come back as the same classes.
"""

import contextlib
import multiprocessing
import operator
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from everpool import errors

PATIENCE_S = 60.0
# The server is idle and without threads when it forks a client, and has what is slow to import.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["everpool", "everpool.testing.remote", "numpy", "pyarrow"])


def connect(open_pool: Callable[..., Any], *args: Any) -> "RemotePool":
    """Start a process, call `open_pool(*args)` in it, and return its pool."""
    here, there = _processes.Pipe()
    process = _processes.Process(target=_serve, args=(there, open_pool, args), daemon=True)
    process.start()
    there.close()
    link = _Link(here, process)
    try:
        link.ask("wait", 0)
    except BaseException:
        link.kill()
        raise
    return RemotePool(link, 0)


class _Link:
    """The parent's end of the pipe: one question at a time, each with its answer."""

    def __init__(self, connection: Connection, process: BaseProcess) -> None:
        self._connection = connection
        self._process = process

    def ask(self, verb: str, target: int, *args: Any) -> Any:
        try:
            self._connection.send((verb, target, args))
            if not self._connection.poll(PATIENCE_S):
                raise TimeoutError(f"no answer to {verb} {args} within {PATIENCE_S} s")
            kind, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise errors.ClosedError("the process of this client is gone") from error
        if kind == "error":
            raise _error(*answer)
        return Remote(self, answer) if kind == "object" else answer

    def kill(self) -> None:
        self._process.kill()
        self.join()

    def join(self) -> None:
        self._connection.close()
        self._process.join(PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class Remote:
    """An object of the other process."""

    def __init__(self, link: _Link, number: int) -> None:
        self._link = link
        self._number = number

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._link.ask("attribute", self._number, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._link.ask("call", self._number, args, kwargs)

    def __getitem__(self, key: Any) -> Any:
        return self._link.ask("operate", self._number, "getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._link.ask("operate", self._number, "setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        self._link.ask("operate", self._number, "delitem", key)

    def __contains__(self, name: object) -> bool:
        return self._link.ask("operate", self._number, "contains", name)

    def __len__(self) -> int:
        return self._link.ask("length", self._number)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._link.ask("list", self._number))

    def __enter__(self) -> "Remote":
        return self._link.ask("enter", self._number)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._link.ask("exit", self._number, kind is not None)


class RemotePool(Remote):
    """A pool in another process. `close` closes it and ends the process; `kill` only the latter."""

    def close(self) -> None:
        """Close the pool over there and end its process."""
        with contextlib.suppress(errors.ClosedError):
            self._link.ask("close", self._number)
        self._link.join()

    def kill(self) -> None:
        """End the process by SIGKILL."""
        self._link.kill()


def _error(name: str, message: str, facts: dict[str, Any]) -> Exception:
    known = getattr(errors, name, None)
    if known is None:
        return AttributeError(message) if name == "AttributeError" else RuntimeError(message)
    error: errors.EverpoolError = known.__new__(known)
    errors.EverpoolError.__init__(error, message, **facts)
    return error


def _serve(connection: Connection, open_pool: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Answer questions until the parent hangs up or closes the pool."""
    objects: list[Any] = []
    while True:
        try:
            verb, target, details = connection.recv()
        except EOFError:
            return
        try:
            if not objects:
                objects.append(open_pool(*args))
            result = None if verb == "wait" else _VERBS[verb](objects[target], *details)
            answer = _answer(objects, result)
        except Exception as error:
            name = type(error).__name__
            message = str(error) if isinstance(error, errors.EverpoolError) else repr(error)
            answer = "error", (name, message, _plain_facts(error))
        connection.send(answer)
        if verb == "close":
            return


def _exit(target: Any, failed: bool) -> Any:
    return target.__exit__(*((ValueError, ValueError("over there"), None) if failed else [None] * 3))


_VERBS: dict[str, Callable[..., Any]] = {
    "attribute": getattr,
    "call": lambda target, args, kwargs: target(*args, **kwargs),
    "operate": lambda target, name, *args: getattr(operator, name)(target, *args),
    "length": len,
    "list": list,
    "enter": lambda target: target.__enter__(),
    "exit": _exit,
    "close": lambda pool: pool.close(),
}


def _answer(objects: list[Any], result: Any) -> tuple[str, Any]:
    if isinstance(result, memoryview):
        return "value", bytes(result)
    if isinstance(result, Iterator) and not hasattr(result, "close"):
        return "value", list(result)  # pyright: ignore[reportUnknownArgumentType]
    if callable(result) or isinstance(result, Future) or hasattr(result, "__exit__"):
        return _kept(objects, result)
    if hasattr(result, "fetch_add"):
        return _kept(objects, result)
    return "value", result


def _kept(objects: list[Any], result: Any) -> tuple[str, Any]:
    objects.append(result)
    return "object", len(objects) - 1


def _plain_facts(error: Exception) -> dict[str, Any]:
    facts = getattr(error, "facts", {})
    return {name: fact for name, fact in facts.items() if isinstance(fact, str | int | float)}
