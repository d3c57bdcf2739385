"""A host's replica of a pool in a bucket: opened or begun, played, and left behind when wrong.

The folder of a pool on a host:

    agent.lock      held by the agent while it lives (see `server`)
    agent.sock      where it listens
    agent.error     what kept the last one from starting
    agent.log       what agents said on their stderr
    start.lock      held by a client that starts an agent
    clients/PID     a process that has, or had, the pool open
    past/           replicas of the past, each of one process (see `scratch`)
    REPLICA/        the replica: `index/`, `shared`, `values/`, `staging/`; its name is random

A replica counts under the boot in which it was made, and while the log agrees with it. Otherwise
another one is begun, under another name.
"""

import contextlib
import hashlib
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NoReturn, TypeVar

from msgspec.structs import replace

from everpool.agent.blocks import BlockMemories
from everpool.agent.pools import read_marker
from everpool.agent.values import CachedValues
from everpool.collection import upload_version
from everpool.errors import (
    CorruptionError,
    EverpoolError,
    NotFoundError,
    UnavailableError,
)
from everpool.log import Appended, ArchivedLog
from everpool.records import EMPTY_HASH, RecordId, Reference
from everpool.replica.batch import Result
from everpool.replica.index import FORMAT, Index, State, is_page, translated
from everpool.replica.player import Player
from everpool.replica.replica import Parts, Replica
from everpool.replica.shared import SharedPage
from everpool.segments.checkpoints import read_manifest, read_pages, read_runs
from everpool.store import Store
from everpool.verdict import SetCheckpoint

LOG = "log"
_TRIMMED_AT_ONCE = 1024
T = TypeVar("T")
_FOLDERS = ("index", "values", "staging")


def folder_name(url: str, pool: bytes) -> str:
    """Return the name of the folder that a host has for the pool at a URL."""
    return hashlib.blake2b(url.encode() + pool, digest_size=12).hexdigest()


class Host:
    """The replica of one pool on one host, for its agent. Threads share it."""

    def __init__(
        self,
        folder: Path,
        pool: bytes | None,
        store: Store,
        log: ArchivedLog,
        start: str = "",
    ) -> None:
        """`pool` is its id; None when that cannot be learned now: then the replica tells.

        `start` is the manifest that a branch began with.
        """
        self._start = start
        self.folder = folder
        self.store = store
        self.log = log
        self._pool = pool
        # Why the log cannot be reached, as far as is known.
        self.trouble = ""
        # Held by the one thread that reads the log and plays what it reads, so that each entry is
        # read once, and played once and in order. It may wait for the network.
        self._reading = threading.RLock()
        # Held while one entry is played or a block is published. Taken behind `_reading`.
        self.playing = threading.RLock()
        self._downloads: dict[str, threading.Lock] = {}
        self._downloading = threading.Lock()
        # Who commits on this host, and what became of its records that nobody has asked for yet.
        self._session = b""
        self._results: dict[RecordId, Result] = {}
        self._open_newest()

    @property
    def is_branch(self) -> bool:
        """Whether the pool began with a version of another one."""
        return bool(self._start)

    @property
    def name(self) -> str:
        """The name of the replica's folder."""
        return self.replica.folder.name

    @property
    def position(self) -> int:
        """The last position of the log that was played."""
        return self._position

    @property
    def version(self) -> int:
        """The version of the replica."""
        return self.player.progress[0]

    def close(self) -> None:
        """Close the replica; it stays for the next agent."""
        with self._reading, self.playing:
            self.blocks.close()
            self.replica.close()
        self.log.close()
        self.store.close()

    # Playing

    def play(self, position: int | None = None) -> None:
        """Play what the log has at hand, at least up to `position`.

        Does not return when the log is not the one that was played: see `leave`.
        """
        with self._reading:
            while True:
                items = self._asked(self._read)
                if not items:
                    if position is not None and self._position < position:
                        raise UnavailableError(
                            f"the log ends at {self._position} here, {position} was promised: try "
                            "again"
                        )
                    return
                for item in items:
                    with self.playing:
                        self._play(item)

    def _read(self) -> list[Appended]:
        """Return what comes next, also when it was trimmed before it was played here."""
        try:
            return self.log.read(self._position)
        except NotFoundError:
            pass
        try:
            return list(islice(self.log.history(self._position), _TRIMMED_AT_ONCE))
        except NotFoundError:
            self.leave(f"the log was trimmed past {self._position}, and the archive collected")

    def _play(self, item: Appended) -> None:
        try:
            played = self.player.play(item.position, item.time_ns, item.entry, self._flushed)
        except (CorruptionError, NotFoundError) as error:
            if "base" in error.facts and not self._is_new:
                self.leave(error.message)
            self._leave_when_behind(error)
            raise
        self.blocks.note(self.version, played.batch.applied)
        self._position = item.position
        self._bytes_since += len(item.entry)
        if any(isinstance(effect, SetCheckpoint) for effect, _ in played.batch.applied):
            self._bytes_since = 0
        self._is_new = False
        if played.entry.session == self._session:
            for result in played.results:
                self._results.setdefault(result.id, result)

    def _leave_when_behind(self, error: EverpoolError) -> None:
        """Leave when what cannot be played is older than what new hosts begin with.

        What it takes may have been collected, also while the log still has it.
        """
        start = self._asked(self.log.end).start.decode()
        if upload_version(start) > self.version:
            self.leave(f"what it would play was collected, new hosts begin with {start}: {error}")

    def append(self, entry: bytes) -> int:
        """Append to the log; returns the position."""
        played = self._position
        position = self._asked(lambda: self.log.append(entry))
        if position <= played:
            self.leave(f"the log ends at {position}, it was played up to {played}")
        return position

    def begin(self) -> None:
        """Catch up with the log; a new replica is of no use before.

        One that was played under an earlier agent is, also while the log is out of reach.
        """
        try:
            self.sync()
            self._compare()
        except UnavailableError as error:
            if self._is_new:
                raise
            self.trouble = error.message

    def _compare(self) -> None:
        """Leave unless the last entry that was played under an earlier agent is still there."""
        with self.playing, self.replica.index.read() as txn:
            rows = self.replica.index.tail_backwards(txn)
            last = next((row for _, row in rows), None)
        if last is None:
            return
        with contextlib.suppress(NotFoundError):  # trimmed
            items = self._asked(lambda: self.log.read(self._position - 1, 1))
            if not items or items[0].entry != last.entry:
                self.leave(f"the entry at position {self._position} is not the one it was")

    def reach(self) -> None:
        """Raise `UnavailableError` when the log could not be reached lately, and still cannot."""
        if self.trouble:
            self.sync()

    def follow(self, timeout_s: float) -> None:
        """Play what is heard of within a while; raises what keeps the log from being reached."""
        self.reach()
        self._asked(lambda: self.log.wait(self._position, timeout_s))
        self.play()

    def _asked(self, call: Callable[[], T]) -> T:
        """Return what the log answers, unless it is not the one that it was."""
        try:
            return call()
        except CorruptionError as error:
            if "went_back" not in error.facts:
                raise
            self._check_marker()
            if error.facts["went_back"] == "gone":
                raise UnavailableError(error.message) from error
            self.leave(error.message)

    def _check_marker(self) -> None:
        """Leave when there is another pool at the URL; raises `UnavailableError` for none."""
        try:
            pool = read_marker(self.store, "the pool's URL").pool()
        except NotFoundError as error:
            raise UnavailableError(
                "there is no pool in the bucket any more: bring it back"
            ) from error
        if pool != self._pool:
            self.leave("the pool was deleted, and another one was made at its URL")

    def leave(self, why: str) -> NoReturn:
        """Leave the replica behind and end: whoever needs an agent starts one, which begins anew.

        Nothing in this process knows what of it is still true.
        """
        print(f"everpool agent: leaving its replica behind: {why}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            folder = self.replica.folder
            os.rename(folder, folder.with_suffix(".left"))
        os._exit(3)

    def expect(self, session: bytes) -> None:
        """Keep what becomes of a session's records, until `results` is asked for it."""
        with self.playing:
            self._session = session
            self._results = {}

    def results(self) -> dict[RecordId, Result]:
        """Return what became of the expected session's records since this was last asked."""
        with self.playing:
            found, self._results = self._results, {}
            return found

    def sync(self) -> int:
        """Play everything that was committed anywhere before the call; returns the version."""
        played = self._position  # others may play on while the log is asked
        end = self._asked(self.log.end)
        if end.position < played:
            self._check_marker()  # an empty bucket has an empty log
            self.leave(f"the log ends at {end.position}, it was played up to {played}")
        self.play(end.position)
        return self.version

    def knows(self, position: int, hash: bytes) -> bool:
        """Whether this replica's log had that running hash there, as far as it remembers."""
        return self.player.knows(position, hash)

    # What clients ask for

    def fetch(self, id: int, ranges: list[tuple[int, int]]) -> None:
        """Bring blocks of memory in; see `BlockMemories.fill`."""
        before = self._flushed
        try:
            self.blocks.fill(id, ranges)
        except CorruptionError:
            # What an old checkpoint and the entries behind it take may have been collected.
            self.sync()
            self.adopt()
            if self._flushed == before:
                raise
            self.blocks.fill(id, ranges)

    def download(self, reference: Reference) -> None:
        """Bring a large value into the cache, once for all who ask."""
        with self._downloading:
            lock = self._downloads.setdefault(reference.file, threading.Lock())
        try:
            with lock:
                try:
                    self.values.local(reference)
                except FileNotFoundError:
                    self.values.download(reference)
        finally:
            with self._downloading:
                self._downloads.pop(reference.file, None)

    # Checkpoints

    @property
    def flushed(self) -> int:
        """The version up to which memory can be had from pages, without the tail."""
        return self._flushed

    @property
    def bytes_since_checkpoint(self) -> int:
        """About how many bytes the log has had since the newest checkpoint."""
        return self._bytes_since

    def adopt(self) -> None:
        """Take over where the newest checkpoint has pages, so that the tail can be trimmed."""
        state = self.replica.state()
        if not state.manifest or state.checkpoint <= self._flushed:
            return
        manifest = read_manifest(self.store, state.manifest)
        # A later run may cover what an earlier one does, too.
        runs = [run for run in manifest.runs if run.version > self._flushed]
        rows = [row for row in read_runs(self.store, runs) if is_page(row[0])]
        with self.playing, translated("taking over a checkpoint"):
            index = self.replica.index
            with index.env.begin(write=True, buffers=True) as txn:
                index.load_pages(txn, rows)
                now = index.state(txn)
                now.flushed = manifest.version
                index.put_state(txn, now)
            self._flushed = manifest.version
            self.blocks.forget(manifest.version)

    # Beginning

    def _open_newest(self) -> None:
        for path in sorted(self.folder.iterdir()):
            if path.suffix in (".left", ".new"):
                shutil.rmtree(path, ignore_errors=True)
                continue
            if path.is_dir() and (path / "index").is_dir():
                try:
                    self._open(path)
                    return
                except (EverpoolError, OSError):
                    shutil.rmtree(path, ignore_errors=True)
        path = self._begin()
        self._open(path)
        self._is_new = True

    def _begin(self) -> Path:
        """Make a new replica, from the checkpoint that the log begins at."""
        if self._pool is None:
            raise UnavailableError("there is no replica yet, and the pool is out of reach")
        start = self._asked(self.log.end).start.decode()
        while True:
            first = start or self._start
            try:
                return make_replica(self.folder, uuid.uuid4().hex, self.store, self._pool, first)
            except NotFoundError:
                # Others have made checkpoints since, and collected this one.
                before, start = start, self._asked(self.log.end).start.decode()
                if start == before:
                    raise

    def _open(self, path: Path) -> None:
        page = SharedPage(path / "shared", writable=False)
        trusted = page.trusted()
        page.close()
        if not trusted or path.suffix:
            raise UnavailableError("a replica of another boot")
        self.blocks = BlockMemories(
            path.name, lambda rows: read_pages(self.store, rows), self.playing
        )
        self.values = CachedValues(path, self.store, lambda: self.version, self.download)
        self.replica = Replica(
            path, read_only=False, parts=Parts(memories=self.blocks, bulk=self.values)
        )
        try:
            if self.replica.index.missing_bytes:
                raise UnavailableError("a replica whose end is missing")
            state = self.replica.state()
            if self._pool is None:
                self._pool = state.pool
            elif state.pool != self._pool:
                raise UnavailableError("a replica of another pool")
            self.player = Player(self.replica)
            self.blocks.attach(self.replica, self._clients())
            self.player.recover()
            self.blocks.sweep(lambda id: self.replica.memory_row(id) is None)
            self.values.sweep()
        except BaseException:
            self.blocks.close()
            self.replica.close()
            raise
        self._position, self._flushed = state.position, state.flushed
        self._bytes_since = state.tail_bytes
        self._is_new = state.version == 0

    def _clients(self) -> list[int]:
        folder = self.folder / "clients"
        if not folder.is_dir():
            return []
        found: list[int] = []
        for mark in folder.iterdir():
            if mark.name.isdigit() and Path("/proc", mark.name).exists():
                found.append(int(mark.name))
            else:
                mark.unlink(missing_ok=True)
        return found


def make_replica(folder: Path, name: str, store: Store, pool: bytes, start: str) -> Path:
    """Make a replica in a folder, from the checkpoint with the manifest `start` or, when that is
    empty, with nothing in it; returns its folder.
    """
    path = folder / f"{name}.new"
    with translated(f"making a replica in {folder}"):
        for part in _FOLDERS:
            (path / part).mkdir(parents=True)
        index = Index(path / "index", read_only=False, create=True, durable=False)
        try:
            version = _fill(index, store, pool, start)
        finally:
            index.close()
        page = SharedPage(path / "shared", writable=True)
        page.reset(version)
        page.close()
        ready = path.with_suffix("")
        os.rename(path, ready)
    return ready


def _fill(index: Index, store: Store, pool: bytes, start: str) -> int:
    with index.env.begin(write=True, buffers=True) as txn:
        if not start:
            state = State(FORMAT, pool, 0, 0, EMPTY_HASH, 0, 0, 1, 0, 0, 0)
            index.put_state(txn, state)
            return 0
        manifest = read_manifest(store, start)
        index.load(txn, read_runs(store, manifest.runs))
        index.drop_lost_pages(txn)
        state = index.state(txn)
        found = (manifest.pool, state.version, state.hash)
        if found != (pool, manifest.version, manifest.hash):
            raise CorruptionError(
                f"the checkpoint {start} does not hold what it says: restore it from a copy of the "
                "bucket"
            )
        # Which checkpoint is in force is told by the log alone: the record that names this one is
        # yet to be played, and must be judged as everywhere. A branch has another id, and a log of
        # its own, in which nothing names the one that it began with.
        state.pool, state.position = pool, manifest.position
        if not manifest.position:
            state.checkpoint, state.manifest = manifest.version, start
            version = manifest.version
            state.horizon = replace(
                state.horizon, kept=version, start=version, restored=0, voided=version
            )
        state.flushed = manifest.version
        index.put_state(txn, state)
        return state.version
