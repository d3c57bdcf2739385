"""A pool as it was: a private replica, begun from a checkpoint and played up to a version.

It lives in the process that asked for it, in a folder that goes with that. It costs the index of
names; pages and values come when they are touched, as everywhere.
"""

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from everpool import forks
from everpool.agent.blocks import BlockMemories
from everpool.agent.checking import Check
from everpool.agent.host import LOG, make_replica
from everpool.agent.scratch import Scratch
from everpool.agent.values import CachedValues
from everpool.collection import end_of
from everpool.commit import Submission
from everpool.errors import InvalidError, NotFoundError
from everpool.log import Appended
from everpool.log.bucket import BucketLog
from everpool.records import Record, RecordId, Reference, decode_entry, encode_entry
from everpool.replica.bulk import Staged
from everpool.replica.outcomes import decided
from everpool.replica.player import Player
from everpool.replica.replica import Parts, Replica
from everpool.replica.verify import Report
from everpool.segments.checkpoints import read_manifest, read_pages
from everpool.segments.format import Past
from everpool.store import Store
from everpool.values import Encoded


class Entries(Protocol):
    """The entries of a log, trimmed or not."""

    def history(self, after: int, last: int | None = None) -> Iterator[Appended]:
        """Yield the entries behind `after`, up to `last`, or to the end."""
        ...

    def close(self) -> None:
        """Release what is held."""
        ...


class History:
    """The checkpoints and entries of a pool in a store."""

    def __init__(
        self, store: Store, manifest: str, start: str, log: Entries | None = None
    ) -> None:
        """`manifest` is that of the newest checkpoint, `start` the one a branch began with.

        `log` has the entries when these are not those of a log in the store.
        """
        self._store = store
        self._log: Entries = BucketLog(store, LOG) if log is None else log
        # Where a replica may begin, oldest first. Version 0 is the empty pool.
        self.places: list[Past] = [] if start else [Past(0, 0, 0, "")]
        if manifest:
            newest = read_manifest(store, manifest)
            self.places += [*newest.past, newest.place(manifest)]

    def close(self) -> None:
        """Close the log."""
        self._log.close()

    def before(self, version: int) -> Past:
        """Return the newest place that is not behind a version."""
        found = [place for place in self.places if place.version <= version]
        if not found:
            raise InvalidError(
                f"this branch began at version {self.places[0].version}: look for version "
                f"{version} in the pool that it branched from"
            )
        return found[-1]

    def version_at(self, time_ns: int) -> int:
        """Return the newest version that is not younger than a time."""
        found = [place for place in self.places if place.time_ns <= time_ns]
        place = found[-1] if found else self.places[0]
        version = place.version
        end = next((one.position for one in self.places if one.time_ns > time_ns), None)
        try:
            for item in self._log.history(place.position, end):
                if item.time_ns > time_ns:
                    break
                version += len(decode_entry(item.entry).records)
        except NotFoundError as error:
            # The next version is younger when the next place is its.
            if not any(later.version == version + 1 for later in self.places):
                raise InvalidError(
                    "what the pool was at that time was collected: snapshots tell which versions "
                    "of that age are kept"
                ) from error
        return version

    def play(self, player: Player, blocks: BlockMemories, place: Past, version: int) -> None:
        """Play what follows a place, up to a version."""
        reached = place.version
        if reached == version:
            return
        for item in self._log.history(place.position, end_of(self.places, version)):
            entry = decode_entry(item.entry)
            data = item.entry
            if reached + len(entry.records) > version:
                # The version is in the midst of an entry: play a part of it.
                data = encode_entry(entry._replace(records=entry.records[: version - reached]))
            played = player.play(item.position, item.time_ns, data, place.version)
            blocks.note(player.progress[0], played.batch.applied)
            reached = player.progress[0]
            if reached >= version:
                return
        raise NotFoundError(f"the pool's newest version is {reached}: {version} is in the future")


class PastEngine:
    """The engine of a pool as it was at one version; nothing can be changed through it.

    It closes the store and the history that it is given.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        history: History,
        pool: bytes,
        version: int,
        timeout_s: float,
        reopener: tuple[Callable[..., Any], tuple[Any, ...]],
        make_values: Callable[[Path], CachedValues] | None = None,
    ) -> None:
        """`folder` is where the replica gets a folder of its own; `make_values` returns its large
        values, when these are not fetched from the store.
        """
        self.read_only = True
        self.timeout_s = timeout_s
        self.generation = forks.generation
        self.lineage = uuid.uuid4().bytes
        self._reopener = reopener
        self._version = version
        self._store = store
        self._make_values = make_values
        try:
            with contextlib.closing(history):
                self._scratch = Scratch(folder)
                try:
                    self._open(history, pool, version)
                except BaseException:
                    self._scratch.remove()
                    raise
        except BaseException:
            store.close()
            raise

    def _open(self, history: History, pool: bytes, version: int) -> None:
        place = history.before(version)
        name = uuid.uuid4().hex
        path = make_replica(self._scratch.path, name, self._store, pool, place.key)
        store = self._store
        self.blocks = BlockMemories(name, lambda rows: read_pages(store, rows), threading.RLock())
        if self._make_values is None:
            self._values = CachedValues(path, store, lambda: version, self._download)
        else:
            self._values = self._make_values(path)
        parts = Parts(memories=self.blocks, bulk=self._values)
        self.replica = Replica(path, read_only=False, parts=parts)
        try:
            player = Player(self.replica)
            self.blocks.attach(self.replica, ())
            player.recover()
            history.play(player, self.blocks, place, version)
        except BaseException:
            self.blocks.close()
            self.replica.close()
            raise

    def _download(self, reference: Any) -> None:
        self._values.download(reference)

    def is_ours(self) -> bool:
        """Whether this process opened it."""
        return self.generation == forks.generation

    def release(self) -> None:
        """Close the replica and remove its folder; views that are in use live on."""
        self.blocks.close()
        self.replica.close()
        self._scratch.remove()
        self._store.close()

    def reopener(self, read_only: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return what opens the same past in another process."""
        return self._reopener

    def write(self, record: Record, staged: list[Staged]) -> Submission:
        """Refuse: the past does not change."""
        raise self._refusal()

    def pipeline(self, record: Record, staged: list[Staged]) -> Submission:
        """Refuse: the past does not change."""
        raise self._refusal()

    def stage(self, encoded: Encoded) -> Staged:
        """Refuse: the past does not change."""
        raise self._refusal()

    def stage_bytes(self, data: memoryview) -> Staged:
        """Refuse: the past does not change."""
        raise self._refusal()

    def _refusal(self) -> InvalidError:
        return InvalidError(
            f"this is the pool as of version {self._version}: change the pool of today, or bring "
            "this back with its `restore`"
        )

    def settle(self) -> None:
        """Do nothing: memory is where the index is."""

    def drain(self) -> None:
        """Do nothing."""

    def sync(self) -> int:
        """Return the version, which stays."""
        return self._version

    def outcome(self, id: RecordId) -> tuple[str, int | None, list[bytes]]:
        """Return what had become of a record."""
        found = decided(self.replica.index, [id]).get(id)
        if found is None:
            raise InvalidError(f"{id} was not decided at version {self._version}: ask the pool")
        return found

    def begin_past(self, version: int | None = None) -> None:
        """Refuse: the past does not change."""
        raise self._refusal()

    def again(self, reference: Reference) -> tuple[Reference, list[Staged]]:
        """Refuse: the past does not change."""
        raise self._refusal()

    def backup(self, url: str, progress: Callable[[int, int], None] | None) -> int:
        """Refuse: ask the pool of today."""
        raise self._refusal()

    def past(self, version: int) -> Any:
        """Refuse: ask the pool of today."""
        raise self._refusal()

    def version_at(self, time_ns: int) -> int:
        """Refuse: ask the pool of today."""
        raise self._refusal()

    def branch(self, url: str, version: int) -> None:
        """Refuse: ask the pool of today."""
        raise self._refusal()

    def lock(self, name: str, period_s: float | None) -> None:
        """Refuse: ask the pool of today."""
        raise self._refusal()

    def checkpoint(self) -> int:
        """Refuse: the past does not change."""
        raise self._refusal()

    def collect(
        self, dry_run: bool, progress: Callable[[dict[str, Any]], None] | None
    ) -> dict[str, Any]:
        """Refuse: ask the pool of today."""
        raise self._refusal()

    def stats(self) -> dict[str, Any]:
        """Return facts about the pool as it was."""
        state = self.replica.state()
        return {
            "kind": "past",
            "version": state.version,
            "names": state.names,
            "versions_behind": 0,
            "seconds_behind": 0.0,
            "time_ns": state.time_ns,
            "read_only": True,
        }

    def verify(self, progress: Callable[[int, int], None] | None) -> Report:
        """Compare everything with its checksums, in the store."""
        return Check(self.replica, self._values, self._store, progress).run()
