"""Finding a folder's agent, and starting one where there is none."""

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from everpool.agent.failures import failure_in, forget_failure
from everpool.replica.index import translated

# So long somebody else may be about to start an agent.
_STARTER_S = 5.0
_started: "list[subprocess.Popen[bytes]]" = []


class Finder:
    """Connects to the agent of a folder. Not for several threads."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        self._url = url
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = -1
        self._since = 0.0

    def connect(self) -> socket.socket | None:
        """Return a connection to the agent; None when there is none yet: call again soon.

        Waits for nothing. Raises what kept an agent from starting.
        """
        _reap()
        with translated(f"looking for the agent of {self._folder}"):
            link, refused = _try(self._folder)
            if link is not None:
                self.give_up()
            elif refused:
                self._start()
        return link

    def give_up(self) -> None:
        """Let others try."""
        self._process = None
        self._since = 0.0
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _start(self) -> None:
        """Start an agent, unless somebody is at it."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            failed = self._process.poll() != 0
            self._process = None
            if failed:
                self.give_up()
                raise failure_in(self._folder)
        self._folder.mkdir(0o700, parents=True, exist_ok=True)
        now = time.monotonic()
        if not self._since:
            self._since = now
        if self._lock < 0 and not self._lock_start() and now < self._since + _STARTER_S:
            return
        forget_failure(self._folder)
        self._process = start(self._folder, self._url)

    def _lock_start(self) -> bool:
        """Take the lock of who starts the agent: one process is enough. The kernel frees it."""
        lock = os.open(self._folder / "start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        self._lock = lock
        return True


def _try(folder: Path) -> tuple[socket.socket | None, bool]:
    """Return a connection, or whether nobody is there to be connected to."""
    try:
        path, descriptor = address(folder)
    except FileNotFoundError:
        return None, True
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        link.connect(path)
        return link, False
    except BlockingIOError:  # so many are waiting for it
        link.close()
        return None, False
    except (FileNotFoundError, ConnectionRefusedError):
        link.close()
        return None, True
    except BaseException:
        link.close()
        raise
    finally:
        os.close(descriptor)


def address(folder: Path) -> tuple[str, int]:
    """Return an address of the agent's socket, and a descriptor to keep open while it is used.

    The address of a Unix socket has at most 107 bytes; by the descriptor it is always short.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return f"/proc/self/fd/{descriptor}/agent.sock", descriptor


def start(folder: Path, url: str) -> "subprocess.Popen[bytes]":
    """Start an agent; it ends at once when there is one already."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    log = os.open(
        folder / "agent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
    )
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "everpool.agent", os.fspath(folder), url],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    finally:
        os.close(log)
    _started.append(process)
    return process


def _reap() -> None:
    """Let the agents that this process started and that ended be gone."""
    _started[:] = [process for process in _started if process.poll() is None]


def _forget_in_child() -> None:
    for process in _started:
        process.returncode = 0  # the parent's to reap
    _started.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def agent_pid(folder: Path) -> int:
    """Return the pid of the folder's agent, or 0."""
    with contextlib.suppress(OSError, ValueError):
        return int((folder / "agent.lock").read_text())
    return 0
