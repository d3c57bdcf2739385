"""The engine of a pool in a bucket: this process's way to its host's agent and replica.

Reading needs no agent: the process maps what the agent maintains. Commits, and what is not in
memory yet, go through it (see `everpool.agent.client`).
"""

import atexit
import contextlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from everpool import forks
from everpool.agent.branching import branch
from everpool.agent.checking import Check
from everpool.agent.client import Client, Greeting, Request
from everpool.agent.host import folder_name
from everpool.agent.locking import ADVISORY, Vault
from everpool.agent.past import History, PastEngine
from everpool.agent.pools import Marker, claim, create_marker, open_pool_store, read_marker
from everpool.agent.values import CachedValues
from everpool.commit import Submission
from everpool.errors import (
    ClosedError,
    EverpoolError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from everpool.interrupts import NOTICE_S, check, deferred
from everpool.paging.regions import SharedMemories
from everpool.records import (
    EMPTY_HASH,
    Operation,
    Pin,
    Record,
    RecordId,
    Reference,
    Unpin,
    encode_record,
)
from everpool.replica.bulk import Staged
from everpool.replica.index import translated
from everpool.replica.replica import Parts, Replica
from everpool.replica.verify import Report
from everpool.snapshots import snapshots_of
from everpool.store import open_store, without_secrets
from everpool.values import Encoded

# How much longer than a commit opening may take: an agent has to start.
_START_S = 2.0
_CHECKPOINT_TRIES = 5
_CHECKPOINT_PAUSE_S = 0.2
_LOOK_S = 0.1


def cache_folder(given: str | os.PathLike[str] | None) -> Path:
    """Return where this host keeps its replicas."""
    chosen = given if given is not None else os.environ.get("EVERPOOL_CACHE_DIR")
    if chosen:
        return Path(os.fspath(chosen)).absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "everpool"
    base = os.environ.get("XDG_CACHE_HOME") or os.fspath(Path.home() / ".cache")
    return Path(base) / "everpool"


class RemoteEngine:
    """What all pools that one process has open at one URL share."""

    def __init__(
        self,
        url: str,
        cache: Path,
        folder: Path,
        *,
        read_only: bool,
        timeout_s: float,
        marker: Marker,
        before: "RemoteEngine | None",
    ) -> None:
        """`before` is what this process, or its parent, had open at the URL."""
        self.url = url
        self.folder = folder
        self.read_only = read_only
        self.timeout_s = timeout_s
        self.users = 0
        self.generation = forks.generation
        # The replica that goes on from this one, in the same history.
        self.continued_as = ""
        self._cache = cache
        self._store = open_pool_store(url, marker)
        self.marker = marker
        self.replica_name = ""
        self._opened: Replica | None = None
        self._memories = SharedMemories(
            self._region, self._confirm, self._fetch_blocks, self._extents
        )
        _leave_mark(folder)
        self._client = Client(folder, url, self._greeting, self._welcome)
        try:
            # By then, it is known which replica there is.
            self._client.ask(time.monotonic() + timeout_s + _START_S, "version")
            place = folder / self.replica_name
            continued = before is not None and before.continued_as == self.replica_name
            self.lineage = before.lineage if before and continued else self.replica_name.encode()
            self._values = CachedValues(
                place,
                self._store,
                lambda: self.replica.version(),
                self._fetch_value,
                lambda file, name, size: self._ask("upload", file, name, size),
            )
            parts = Parts(memories=self._memories, bulk=self._values)
            self.replica = self._opened = Replica(place, read_only=True, parts=parts)
        except BaseException:
            self._client.close()
            self._store.close()
            raise

    def is_ours(self) -> bool:
        """Whether this process opened the engine, and its replica is still the host's."""
        return self.generation == forks.generation

    def release(self) -> None:
        """Give the engine back; its last user closes it."""
        release(self)

    def reopener(self, read_only: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return what opens the pool in another process, for pickling."""
        from everpool.opening import reopen

        return reopen, (self.url, read_only, self.timeout_s, os.fspath(self._cache))

    # Commits

    def write(self, record: Record, staged: list[Staged]) -> Submission:
        """Commit a record and wait for its outcome."""
        self._client.refuse_in_callback()
        submission = Submission(record, staged)
        submission.prepare_wait()
        self._submit(submission)
        submission.wait()
        return submission

    def pipeline(self, record: Record, staged: list[Staged]) -> Submission:
        """Queue a record and return at once."""
        submission = Submission(record, staged)
        self._submit(submission)
        return submission

    def _submit(self, submission: Submission) -> None:
        if self.read_only:
            raise InvalidError(f"the pool {self.url} is open read-only: open it for writing")
        data = encode_record(submission.record)
        deadline = time.monotonic() + self.timeout_s
        self._client.commit(data, deadline, _Settling(submission, self.replica.bulk))

    # The agent

    def _greeting(self) -> Greeting:
        if self._opened is None:
            return Greeting("", 0, EMPTY_HASH, [])
        state = self._opened.state()
        regions = self._memories.regions()
        return Greeting(self.replica_name, state.position, state.hash, regions)

    def _welcome(self, answer: dict[str, Any]) -> bool:
        """Whether the agent's replica is the one that is open here."""
        if not self.replica_name:
            self.replica_name = answer["replica"]
        if answer["replica"] == self.replica_name:
            return True
        self.continued_as = answer["replica"] if answer["continues"] else ""
        self.generation = -1  # whoever uses this engine opens another one
        return False

    def _ask(self, verb: str, *arguments: Any) -> Any:
        return self._client.ask(time.monotonic() + self.timeout_s, verb, *arguments)

    # What is fetched

    def _region(self, id: int) -> int:
        try:
            return self._ask("map", id)
        except NotFoundError as error:
            raise FileNotFoundError(error.message) from error

    def _confirm(self, id: int, inode: int) -> bool:
        return not self._ask("strangers", [(id, inode)])

    def _fetch_blocks(self, id: int, ranges: list[tuple[int, int]]) -> None:
        self._ask("fetch", id, ranges)

    def _extents(self, id: int) -> list[tuple[int, int]]:
        return [(offset, size) for offset, size in self._ask("extents", id)]

    def _fetch_value(self, reference: Reference) -> None:
        try:
            self._ask("value", reference.file, reference.size, reference.checksum)
        except NotFoundError as error:
            raise FileNotFoundError(error.message) from error

    def stage(self, encoded: Encoded) -> Staged:
        """Upload a large value, for a record to name."""
        return self.replica.bulk.stage(encoded.buffers(), encoded.size)

    def stage_bytes(self, data: memoryview) -> Staged:
        """Upload a large piece of memory, for a record to name."""
        return self.replica.bulk.stage([data], len(data))

    # The rest

    def settle(self) -> None:
        """Wait until mapped memory has all that the index has."""
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                self.replica.settle(0.05)
                return
            except UnavailableError:
                if time.monotonic() > deadline:
                    raise
                self._ask("version")  # which takes an agent: a new one finishes what one began

    def drain(self) -> None:
        """Return when everything that was submitted before has an outcome."""
        self._client.drain()

    def sync(self) -> int:
        """Wait for what was submitted; returns the version, of all committed anywhere before."""
        self.drain()
        self._ask("sync")
        self.settle()
        return self.replica.version()

    def outcome(self, id: RecordId) -> tuple[str, int | None, list[bytes]]:
        """Settle for good what became of a record."""
        ((state, version, results),) = self._ask("outcomes", [list(id)])
        return state, version, results

    def begin_past(self, version: int | None = None) -> None:
        """Do nothing: a pool in a bucket keeps its past from the start."""

    def again(self, reference: Reference) -> tuple[Reference, list[Staged]]:
        """Return what another record names to have a value again: the same segment."""
        return reference, []

    def backup(self, url: str, progress: Callable[[int, int], None] | None) -> int:
        """Refuse: a pool in a bucket is where backups go."""
        raise InvalidError(
            "only a pool at a path sends its checkpoints elsewhere: use `branch`, which shares "
            "this bucket's segments, or `everpool copy`"
        )

    def past(self, version: int) -> Callable[[bool], PastEngine]:
        """Return what opens the pool as it was at a version."""
        self.sync()
        state = self.replica.state()
        if not 0 <= version <= state.version:
            raise InvalidError(f"the pool has the versions 0 to {state.version}, not {version}")
        if not state.horizon.keeps(version, (one.version for one in snapshots_of(self))):
            kept = state.horizon.kept
            elsewhere = ", or is in the pool that this one branched from" * bool(self.marker.parent)
            raise InvalidError(
                f"version {version} was collected{elsewhere}: versions from {kept} on are kept, "
                "and those of snapshots; `pool.retain` says for how long",
                kept=kept,
            )
        from everpool.opening import reopen_past

        place = (self.url, version, self.timeout_s, os.fspath(self._cache))

        def open_past(create: bool) -> PastEngine:
            store = open_pool_store(self.url)
            try:
                history = History(store, state.manifest, self.marker.start)
            except BaseException:
                store.close()
                raise
            return PastEngine(
                self.folder / "past",
                store,
                history,
                state.pool,
                version,
                self.timeout_s,
                (reopen_past, place),
            )

        return open_past

    def branch(self, url: str, version: int) -> None:
        """Make a pool at a URL that begins as this was at a version, and shares its segments."""
        past = self.past(version)(False)

        def pin() -> None:
            name = f"branch at {without_secrets(url)}"
            self.sync()
            known = {one.name: one.version for one in snapshots_of(self)}
            if known.get(name, version) != version:
                # A branch may need that one, which was faster, or is where this URL's query led.
                name = f"{name}, of version {version}"
            if name not in known:
                self._commit(Pin(name, version))

        try:
            branch(past, self.url, url, pin)
        finally:
            past.release()

    def lock(self, name: str, period_s: float | None) -> None:
        """Make a locked snapshot of the newest version; see `everpool.agent.locking`."""
        begun_ns = time.time_ns()
        with contextlib.closing(Vault(self.url, self.marker)) as vault:
            self._checkpoint_now()
            state = self.replica.state()
            if not state.manifest:
                raise InvalidError("version 0 is the empty pool: there is nothing to lock yet")
            self._commit(Pin(name, state.checkpoint))
            try:
                held = vault.hold(self._store, state.manifest, period_s, begun_ns)
            except BaseException:
                with contextlib.suppress(EverpoolError):
                    self._commit(Unpin(name))
                raise
            self._commit(Pin(name, state.checkpoint, held.until_ns, held.lock))
            if not held.lock.startswith(ADVISORY):
                # It is held by now; the head that says so would be worth holding, too.
                with contextlib.suppress(EverpoolError):
                    vault.hold(self._store, state.manifest, period_s, begun_ns)

    def _checkpoint_now(self) -> None:
        """Make a checkpoint of all that was committed before, or see that somebody else did."""
        version = self.sync()
        for left in reversed(range(_CHECKPOINT_TRIES)):
            try:
                self.checkpoint()
            except UnavailableError:
                if not left:
                    raise
                time.sleep(_CHECKPOINT_PAUSE_S)
            self.sync()
            if self.replica.state().checkpoint >= version:
                return

    def _commit(self, *operations: Operation) -> None:
        record = Record(self.replica.version(), [], [], [], list(operations))
        self.write(record, []).version()

    def version_at(self, time_ns: int) -> int:
        """Return the newest version that is not younger than a time."""
        self.sync()
        history = History(self._store, self.replica.state().manifest, self.marker.start)
        try:
            return history.version_at(time_ns)
        finally:
            history.close()

    def checkpoint(self) -> int:
        """Make a checkpoint now; returns its version."""
        return self._ask("checkpoint")

    def collect(
        self, dry_run: bool, progress: Callable[[dict[str, Any]], None] | None
    ) -> dict[str, Any]:
        """Delete what nothing needs from the store; returns what was done."""
        told = self._ask("collect", True, dry_run)
        while not told["done"]:
            if progress is not None:
                progress(told)
            time.sleep(_LOOK_S)
            told = self._ask("collect", False, dry_run)
        return told

    def stats(self) -> dict[str, Any]:
        """Return facts about the pool and the host's replica of it."""
        told = self._ask("stats")
        state = self.replica.state()
        return {
            "kind": "bucket",
            "path": without_secrets(self.url),
            "id": str(uuid.UUID(bytes=state.pool)),
            "format": state.format,
            "version": state.version,
            "names": state.names,
            "versions_behind": 0,
            "seconds_behind": told["seconds_behind"],
            "position": told["position"],
            "floor": state.floor,
            "checkpoint": state.flushed,
            "kept": state.horizon.kept,
            "tail_bytes": state.tail_bytes,
            "agent": told["agent"],
            "clients": told["clients"],
            "trouble": told["trouble"],
            "replica": os.fspath(self.replica.folder),
            "read_only": self.read_only,
        }

    def verify(self, progress: Callable[[int, int], None] | None) -> Report:
        """Compare everything with its checksums, in the store where it lies there."""
        self.sync()
        return Check(self.replica, self._values, self._store, progress).run()

    def is_lost(self) -> bool:
        """Whether there is another pool at the URL by now."""
        failure = self._client.failure
        return failure is not None and failure.kind == "closed"

    def close(self) -> None:
        """Wait for what is on its way, and hang up."""
        self.drain()
        self._client.close()
        self.replica.close()
        self._store.close()

    def abandon(self) -> None:
        """In a forked child: let go of what belongs to the parent."""
        self.continued_as = self.replica_name
        for done in self._client.abandon():
            if isinstance(done, _Settling):
                done.submission.abandon()
        if self._memories.regions():
            with contextlib.suppress(EverpoolError):
                _leave_mark(self.folder)  # this process has the parent's views


class _Settling:
    """Takes the answer to a commit."""

    def __init__(self, submission: Submission, bulk: Any) -> None:
        self.submission = submission
        self._bulk = bulk

    def __call__(self, request: Request) -> None:
        self.submission.settle(request.result, request.error, self._bulk)


def _leave_mark(folder: Path) -> None:
    """Tell the agents to come that this process has regions, which they adopt.

    The mark stays while the process lives, for views outlive the pool. Agents remove those of the
    dead.
    """
    with translated(f"opening {folder}"):
        mark = folder / "clients" / str(os.getpid())
        folder.mkdir(0o700, parents=True, exist_ok=True)  # as private as the bucket
        mark.parent.mkdir(exist_ok=True)
        mark.touch()


_engines: dict[tuple[str, str, bool], RemoteEngine] = {}
_mutex = threading.Lock()
# A forked child keeps its parent's engines here: freeing them would close the parent's files.
_inherited: dict[tuple[str, str], RemoteEngine] = {}


def acquire(
    url: str, cache: Path, *, create: bool, read_only: bool, timeout_s: float
) -> RemoteEngine:
    """Return this process's engine for the pool at `url`; pair it with `release`."""
    with deferred(), _opening():
        before = inherited = _inherited.get((url, os.fspath(cache)))
        for mode in (read_only, False):
            known = _engines.get((url, os.fspath(cache), mode))
            if known is not None and known.is_ours() and not known.is_lost():
                known.users += 1
                return known
            before = known or before
        if inherited is not None and inherited is before:
            # Not every store can be asked in a forked child.
            folder, marker = inherited.folder, inherited.marker
        else:
            with contextlib.closing(open_store(url)) as store:
                where = without_secrets(url)
                found = (create_marker if create else read_marker)(store, where)
                marker = claim(store, where, found, read_only=read_only)
            folder = cache / folder_name(url, marker.pool())
        check()
        try:
            engine = RemoteEngine(
                url,
                cache,
                folder,
                read_only=read_only,
                timeout_s=timeout_s,
                marker=marker,
                before=before,
            )
        except ClosedError:
            _inherited.pop((url, os.fspath(cache)), None)  # there is another pool by now
            raise
        engine.users = 1
        _engines[url, os.fspath(cache), read_only] = engine
        return engine


@contextlib.contextmanager
def _opening() -> Iterator[None]:
    while not _mutex.acquire(timeout=NOTICE_S):
        check()
    try:
        yield
    finally:
        _mutex.release()


def release(engine: RemoteEngine) -> None:
    """Give the engine back; the last user closes it."""
    with deferred(), _opening():
        if not engine.is_ours():
            return
        engine.users -= 1
        if engine.users > 0:
            return
        for key, known in list(_engines.items()):
            if known is engine:
                del _engines[key]
        engine.close()


def _after_fork_in_child() -> None:
    global _mutex
    _mutex = threading.Lock()
    for (url, cache, _), engine in _engines.items():
        engine.abandon()
        _inherited[url, cache] = engine
    _engines.clear()


def _drain_at_exit() -> None:
    """Wait for what was pipelined: its thread would end with the interpreter."""
    for engine in list(_engines.values()):
        engine.drain()


atexit.register(_drain_at_exit)
os.register_at_fork(after_in_child=_after_fork_in_child)
