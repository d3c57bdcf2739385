"""The agents that a test's pools have started, and a host that has one.

host = Host(tmp_path)
with host.open() as pool: ...          # a pool at file://tmp_path/bucket
host.agent()                           # its agent's pid
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import everpool

PATIENCE_S = 30.0


class Host:
    """One host of one pool, in a folder."""

    def __init__(self, folder: Path, name: str = "host") -> None:
        self.bucket = folder / "bucket"
        self.url = f"file://{self.bucket}"
        self.cache = folder / name

    def open(self, **options: Any) -> everpool.Pool:
        """Open the pool."""
        return everpool.open(self.url, cache_dir=self.cache, **options)

    def folder(self) -> Path:
        """Return the folder that its agent keeps."""
        (lock,) = self.cache.glob("*/agent.lock")
        return lock.parent

    def log(self) -> str:
        """Return what its agents said."""
        return (self.folder() / "agent.log").read_text()

    def agent(self) -> int:
        """Return the pid of its agent, once there is one that lives."""
        found: list[int] = []

        def look() -> bool:
            found[:] = agents_under(self.cache)
            return len(found) == 1

        wait_until(look)
        return found[0]

    def kill_agent(self) -> int:
        """SIGKILL, and wait until it is gone; returns its pid."""
        pid = self.agent()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid))
        return pid


def wait_until(holds: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    """Return when it holds; fails when it does not in time."""
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def agents_under(folder: Path) -> list[int]:
    """Return the pids of the agents whose folders are somewhere under `folder`."""
    found: list[int] = []
    for lock in folder.rglob("agent.lock"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(lock.read_text())
            if os.fspath(folder) in Path(f"/proc/{pid}/cmdline").read_text() and is_alive(pid):
                found.append(pid)
    return found


def processes_of(folder: Path) -> list[int]:
    """Return the pids of all processes that were started as an agent under `folder`."""
    found: list[int] = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit():
                line = (process / "cmdline").read_text().split("\0")
                if "everpool.agent" in line and any(os.fspath(folder) in part for part in line):
                    found.append(int(process.name))
    return [pid for pid in found if is_alive(pid)]


def end_agents(folder: Path) -> None:
    """End them, and wait until they are gone."""
    for pid in processes_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while is_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.005)
