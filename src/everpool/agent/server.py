"""The agent's process: who asks it for what, and when it ends.

    python -m everpool.agent FOLDER URL

Whoever opens the pool first starts it. It holds a lock (flock) on `agent.lock` while it lives, so
that there is one for each folder, and ends when nobody was connected for a while. Each client has
a connection with a thread of its own here; what may take long is done by others.
"""

import contextlib
import fcntl
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from everpool.agent.collector import Collector
from everpool.agent.commits import Commits, ending_the_process
from everpool.agent.connection import Connection
from everpool.agent.failures import leave_failure
from everpool.agent.host import LOG, Host, folder_name
from everpool.agent.outcomes import commit, settle
from everpool.agent.pools import Marker, open_pool_store, read_marker
from everpool.agent.starting import address
from everpool.agent.steward import Steward
from everpool.errors import (
    ClosedError,
    EverpoolError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from everpool.log.bucket import BucketLog
from everpool.records import Record, RecordId, Reference
from everpool.replica.batch import Result
from everpool.replica.index import translated
from everpool.store import open_store, without_secrets

IDLE_S = float(os.environ.get("EVERPOOL_AGENT_IDLE_S", "10"))
# How often the store is looked through for what nothing needs.
COLLECT_S = float(os.environ.get("EVERPOOL_COLLECT_S", "3600"))
_POLL_S = 1.0
_RETRY_S = 0.5
_TEND_AGAIN_S = 10.0
_APPEND_S = 20.0
_WORKERS = 16
_LOCK_S = 5.0
_LOCK_PAUSE_S = 0.01
_BACKLOG = 1024


class Server:
    """One agent. `lock` is the descriptor of its lock."""

    def __init__(self, folder: Path, url: str, lock: int) -> None:
        self.folder = folder
        self._lock = lock
        marker = _marker(folder, url)
        store = open_store(url) if marker is None else open_pool_store(url, marker)
        self._log = BucketLog(store, LOG, timeout_s=_APPEND_S)
        pool, start = (None, "") if marker is None else (marker.pool(), marker.start)
        self.host = Host(folder, pool, store, self._log, start)
        self.commits = Commits(self.host)
        self._steward = Steward(self.host, self.commit_own)
        self._stewarding = threading.Lock()
        self._collection: Collection | None = None
        self._collect_at = time.monotonic() + random.uniform(0.5, 1.5) * COLLECT_S
        self.workers = ThreadPoolExecutor(_WORKERS, "everpool-worker")
        self._connections: set[Connection] = set()
        self._mutex = threading.Lock()
        self._ending = threading.Event()
        # When the log was last known to be reached, and why it is not.
        self._heard_at = time.monotonic()
        self._last_busy = time.monotonic()

    def serve(self) -> None:
        """Serve until nobody has been connected for a while."""
        signal.signal(signal.SIGTERM, self._terminate)
        self.host.begin()
        listener = listen(self.folder)
        follower = threading.Thread(target=self._follow, name="everpool-follower", daemon=True)
        follower.start()
        threading.Thread(target=self._tend, name="everpool-steward", daemon=True).start()
        listener.settimeout(min(0.5, IDLE_S / 4))
        while not self._ending.is_set() and not self._is_idle():
            self._check_folder()
            try:
                link, _ = listener.accept()
            except TimeoutError:
                continue
            link.settimeout(None)
            connection = Connection(self, link)
            with self._mutex:
                self._connections.add(connection)
            connection.start()
        with contextlib.suppress(OSError):
            (self.folder / "agent.sock").unlink()
        listener.close()
        self._end()

    def _terminate(self, number: int, frame: object) -> None:
        self._ending.set()

    def _end(self) -> None:
        self._ending.set()
        self.commits.close()
        with self._mutex:
            connections = list(self._connections)
        for connection in connections:
            connection.hang_up()
        self.workers.shutdown(cancel_futures=True)
        self.host.close()

    def _is_idle(self) -> bool:
        with self._mutex:
            if self._connections:
                self._last_busy = time.monotonic()
            return time.monotonic() - self._last_busy > IDLE_S

    def _check_folder(self) -> None:
        """Leave when the folder is not there any more: others begin again in a new one."""
        try:
            status = os.stat(self.folder / "agent.lock")
        except FileNotFoundError:
            status = None
        mine = os.fstat(self._lock)
        if status is None or (status.st_dev, status.st_ino) != (mine.st_dev, mine.st_ino):
            self.host.leave(f"{self.folder} was deleted")

    def forget(self, connection: Connection) -> None:
        """A client has left."""
        with self._mutex:
            self._connections.discard(connection)
            self._last_busy = time.monotonic()
        self.commits.look_again()

    def answer(self, connection: Connection, number: int, verb: str, arguments: list[Any]) -> None:
        """Have one of the workers answer."""
        work = _VERBS.get(verb)
        if work is None:
            error = InvalidError(f"this agent knows no {verb!r}: end it, and a newer one starts")
            connection.refuse(number, error)
            return
        if verb in _QUICK:
            connection.answer(number, lambda: work(self, *arguments))
            return
        with contextlib.suppress(RuntimeError):  # it is ending
            self.workers.submit(connection.answer, number, lambda: work(self, *arguments))

    # The log

    def sync(self) -> int:
        """Play everything that was committed anywhere before the call."""
        version = self.host.sync()
        self._heard()
        return version

    def _heard(self, trouble: str = "") -> None:
        """Note whether the log can be reached, and tell the clients when that has changed."""
        if not trouble:
            self._heard_at = time.monotonic()
        if trouble != self.host.trouble:
            self.host.trouble = trouble
            with self._mutex:
                connections = list(self._connections)
            for connection in connections:
                connection.say(0, "trouble", trouble)

    def _follow(self) -> None:
        """Play what others append, as it is heard of."""
        with ending_the_process():
            self._follow_on()

    def _follow_on(self) -> None:
        while not self._ending.is_set():
            try:
                self.host.follow(_POLL_S)
                trouble = self._log.trouble
                self._heard(trouble.message if trouble is not None else "")
            except EverpoolError as error:
                if not self._ending.is_set():
                    self._heard(error.message)
                self._ending.wait(_RETRY_S)

    # Checkpoints

    def commit_own(self, record: Record) -> Result:
        """Commit a record of the agent's own; see `outcomes.commit`."""
        return commit(self.commits, record)

    def checkpoint(self) -> int:
        """Make a checkpoint now; returns its version."""
        with self._stewarding:
            return self._steward.checkpoint()

    def _tend(self) -> None:
        """Take over others' checkpoints, and make one when it is due."""
        while not self._ending.wait(_POLL_S):
            try:
                self.host.adopt()
                if self._steward.due():
                    # Others see that it is due at the same moment: let one of them be first.
                    self._ending.wait(random.uniform(0, 2 * _POLL_S))
                    if self._steward.due():
                        self.checkpoint()
                self._collect_when_due()
            except EverpoolError as error:
                if not self._ending.is_set():
                    print(f"everpool agent: no checkpoint: {error}", file=sys.stderr, flush=True)
                self._ending.wait(_TEND_AGAIN_S)

    # Collection

    def _collect_when_due(self) -> None:
        """Collect now and then, unless somebody else did, or nothing was committed."""
        if time.monotonic() < self._collect_at:
            return
        self._collect_at = time.monotonic() + random.uniform(0.5, 1.5) * COLLECT_S
        state = self.host.replica.state()
        if state.time_ns - state.horizon.collected_ns > COLLECT_S / 2 * 1e9:
            with self._stewarding:
                Collector(self.host, self.commit_own).collect()

    def collect(self, begin: bool, dry_run: bool) -> dict[str, Any]:
        """Begin a collection, unless one is under way; returns how far it is."""
        with self._mutex:
            if begin and (self._collection is None or self._collection.done):
                self._collection = Collection(self, dry_run)
                self._collection.start()
            current = self._collection
        if current is None:
            raise UnavailableError("the agent that was collecting is gone: begin again")
        return current.look()

    def collect_all(self, collector: Collector, dry_run: bool) -> None:
        """Collect as one who waits for it wants it: with everything that was committed before."""
        if dry_run:
            collector.collect(dry_run)
            return
        self.checkpoint()
        with self._stewarding:
            dead = collector.collect()
        if dead and not self.host.replica.state().horizon.age_ns:
            # Nothing old is to be kept: once no replica begins before, all of it may go.
            self.checkpoint()
            with self._stewarding:
                collector.collect()

    def stats(self) -> dict[str, Any]:
        """Return facts about the host's replica."""
        behind_s = time.monotonic() - self._heard_at
        with self._mutex:
            clients = len(self._connections)
        return {
            "agent": os.getpid(),
            "clients": clients,
            "position": self.host.position,
            "seconds_behind": behind_s if self.host.trouble or behind_s > 2 * _POLL_S else 0.0,
            "trouble": self.host.trouble,
        }


class Collection(threading.Thread):
    """One collection that somebody asked for."""

    def __init__(self, server: Server, dry_run: bool) -> None:
        super().__init__(name="everpool-collection", daemon=True)
        self._server = server
        self._dry_run = dry_run
        self._collector = Collector(server.host, server.commit_own)
        self._error: EverpoolError | None = None
        self.done = False

    def run(self) -> None:
        """Collect."""
        with ending_the_process():
            try:
                self._server.collect_all(self._collector, self._dry_run)
            except EverpoolError as error:
                self._error = error
            self.done = True

    def look(self) -> dict[str, Any]:
        """Return how far it is; raises what it failed with."""
        if self._error is not None:
            raise self._error
        return {"done": self.done, **vars(self._collector.progress)}


def _hello(
    server: Server,
    pid: int,
    replica: str,
    position: int,
    hash: bytes,
    regions: list[tuple[int, int]],
) -> dict[str, Any]:
    host = server.host
    if replica == host.name and host.blocks.strangers(regions):
        host.leave(f"process {pid} has memory of it that could not be found")
    return {
        "pid": os.getpid(),
        "replica": host.name,
        "continues": host.knows(position, hash),
        "trouble": host.trouble,
    }


def _strangers(server: Server, regions: list[tuple[int, int]]) -> list[int]:
    return server.host.blocks.strangers(regions)


def _version(server: Server) -> int:
    return server.host.version


def _fetch(server: Server, id: int, ranges: list[tuple[int, int]]) -> bool:
    server.host.fetch(id, ranges)
    return True


def _extents(server: Server, id: int) -> list[tuple[int, int]]:
    return server.host.blocks.written_extents(id)


def _value(server: Server, file: str, size: int, checksum: bytes) -> bool:
    server.host.download(Reference(file, size, checksum))
    return True


def _upload(server: Server, file: str, name: str, size: int) -> bool:
    server.host.values.upload(file, name, size)
    return True


def _sync(server: Server) -> int:
    return server.sync()


def _outcomes(
    server: Server, ids: list[tuple[bytes, int]]
) -> list[tuple[str, int | None, list[bytes]]]:
    server.sync()
    return settle(server.host, server.commits, [RecordId(*id) for id in ids])


def _checkpoint(server: Server) -> int:
    return server.checkpoint()


def _collect(server: Server, begin: bool, dry_run: bool) -> dict[str, Any]:
    return server.collect(begin, dry_run)


def _stats(server: Server) -> dict[str, Any]:
    return server.stats()


_VERBS: dict[str, Callable[..., Any]] = {
    "hello": _hello,
    "version": _version,
    "fetch": _fetch,
    "extents": _extents,
    "value": _value,
    "upload": _upload,
    "sync": _sync,
    "outcomes": _outcomes,
    "checkpoint": _checkpoint,
    "collect": _collect,
    "stats": _stats,
    "strangers": _strangers,
}
# What waits for nothing, and so needs no worker, of whom all may be waiting for the log.
_QUICK = {"hello", "version", "stats", "strangers"}


def _marker(folder: Path, url: str) -> Marker | None:
    """Return what is said of the pool, or None when it is out of reach.

    Raises `ClosedError` when there is another pool by now, which others have a folder for.
    """
    where = without_secrets(url)
    try:
        with contextlib.closing(open_store(url)) as store:
            marker = read_marker(store, where)
    except (UnavailableError, NotFoundError):
        return None
    if folder_name(url, marker.pool()) != folder.name:
        raise ClosedError(f"the pool at {where} was deleted, and another one made: open it again")
    return marker


def listen(folder: Path) -> socket.socket:
    """Return the agent's socket. Only the holder of the agent's lock may call this."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    path, descriptor = address(folder)
    try:
        (folder / "agent.sock").unlink(missing_ok=True)
        listener.bind(path)
        os.chmod(folder / "agent.sock", 0o600)
        listener.listen(_BACKLOG)
    finally:
        os.close(descriptor)
    return listener


def main() -> None:
    """Be the agent of a folder, unless there is one."""
    folder, url = Path(sys.argv[1]), sys.argv[2]
    try:
        with translated(f"beginning as the agent of {folder}"):
            lock = _locked(folder)
            if lock is not None:
                Server(folder, url, lock).serve()
    except EverpoolError as error:
        print(f"everpool agent: {error}", file=sys.stderr, flush=True)
        leave_failure(folder, error)
        raise SystemExit(1) from None


def _locked(folder: Path) -> int | None:
    """Return the agent's lock, or None while somebody else holds it: one that ends lets it go."""
    lock = os.open(folder / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline or (folder / "agent.sock").exists():
                return None
        time.sleep(_LOCK_PAUSE_S)
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock
