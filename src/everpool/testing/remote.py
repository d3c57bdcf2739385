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
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from everpool import errors, values

T = TypeVar("T")
PATIENCE_S = 60.0
# The server is idle and without threads when it forks a client, and has what is slow to import.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["everpool", "everpool.testing.remote", "pyarrow", "pytest"])


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
        self._mutex = threading.Lock()

    def ask(self, verb: str, target: int, *args: Any) -> Any:
        with self._mutex:
            kind, answer = self._exchange(verb, target, args)
        if kind == "error":
            raise _error(*answer)
        return Remote(self, answer) if kind == "object" else _unpacked(answer)

    def _exchange(self, verb: str, target: int, args: tuple[Any, ...]) -> tuple[str, Any]:
        try:
            self._connection.send((verb, target, [_packed(arg) for arg in args]))
            if not self._connection.poll(PATIENCE_S):
                raise TimeoutError(f"no answer to {verb} {args} within {PATIENCE_S} s")
            return self._connection.recv()
        except (EOFError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise errors.ClosedError("the process of this client is gone") from error

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

    def run(self, function: Callable[[Any], T], attempts: int = 1000) -> T:
        """Call `function` here with a transaction over there, until it commits."""
        for attempt in range(attempts):
            try:
                with self.transaction() as tx:
                    return function(tx)
            except errors.ConflictError:
                if attempt + 1 == attempts:
                    raise
        raise errors.InvalidError("at least one attempt is needed")

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
            result = (
                None if verb == "wait" else _VERBS[verb](objects[target], *map(_unpacked, details))
            )
            answer = _answer(objects, result)
        except Exception as error:
            name = type(error).__name__
            message = str(error) if isinstance(error, errors.EverpoolError) else repr(error)
            answer = "error", (name, message, _plain_facts(error))
        connection.send(answer)
        if verb == "close":
            return


def _call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return target(*args, **kwargs)


def _operate(target: Any, name: str, *args: Any) -> Any:
    return getattr(operator, name)(target, *args)


def _enter(target: Any) -> Any:
    return target.__enter__()


def _exit(target: Any, failed: bool) -> Any:
    error = ValueError("over there") if failed else None
    return target.__exit__(type(error) if failed else None, error, None)


def _close(target: Any) -> None:
    target.close()


_VERBS: dict[str, Callable[..., Any]] = {
    "attribute": getattr,
    "call": _call,
    "operate": _operate,
    "length": len,
    "list": list,
    "enter": _enter,
    "exit": _exit,
    "close": _close,
}


# What tells a transaction or watch, a handle, and a future from plain data.
_ALIVE = ("__exit__", "fetch_add", "compare_and_swap", "add_done_callback")


def _answer(objects: list[Any], result: Any) -> tuple[str, Any]:
    """Return plain data as it is, and the number of anything else, which is kept here."""
    if isinstance(result, memoryview):
        return "value", cast("memoryview[int]", result).tobytes()
    if callable(result) or any(hasattr(result, name) for name in _ALIVE):
        objects.append(result)
        return "object", len(objects) - 1
    if isinstance(result, Iterator):
        return "value", list(cast("Iterator[Any]", result))
    return "value", _packed(result)


class _Array(NamedTuple):
    """An array on its way: pickling would turn its bytes into the machine's own order."""

    encoded: bytes


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _Array(values.encode(cast("Any", value)).tobytes())
    return value


def _unpacked(value: Any) -> Any:
    return values.decode(value.encoded, zero_copy=True) if isinstance(value, _Array) else value


def _plain_facts(error: Exception) -> dict[str, Any]:
    facts = getattr(error, "facts", {})
    return {name: fact for name, fact in facts.items() if isinstance(fact, str | int | float)}
