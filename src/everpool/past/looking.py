"""A pool at a path as it was: its places to begin from, and its large values where they lie."""

import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from everpool.agent.past import History, PastEngine
from everpool.agent.values import CachedValues
from everpool.errors import CorruptionError, InvalidError
from everpool.past.entries import PathEntries
from everpool.past.folder import PastFolder
from everpool.records import Reference
from everpool.replica.bulk import BulkFiles, map_at
from everpool.replica.replica import Replica
from everpool.segments.checkpoints import read_manifest
from everpool.segments.format import Past
from everpool.store import Store

_HOW = "`pool.checkpoint()`, or a first `pool.snapshot(name)`, begins one"


class PathHistory(History):
    """The checkpoints and entries of a pool at a path."""

    def __init__(self, folder: PastFolder, replica: Replica, store: Store) -> None:
        state = replica.state()
        self._store = store
        self._entries = PathEntries(replica, store, state.pool)
        super().__init__(store, "", "none", self._entries)
        marker = folder.marker()
        manifest = None
        if marker is not None:
            manifest = folder.manifest(store, state.manifest)
        if marker is not None and not marker.began:
            self.places.append(Past(0, 0, 0, ""))  # the empty pool
        if manifest is not None:
            self.places += [*manifest.past, manifest.place(state.manifest)]
        if not self.places:
            raise InvalidError(f"{folder.path.parent} keeps no past yet: {_HOW}")

    def before(self, version: int) -> Past:
        """Return the newest place that is not behind a version.

        Raises `InvalidError` for a version of before the past began.
        """
        self._reach(lambda place: place.version <= version)
        if self.places[0].version > version:
            raise InvalidError(
                f"the past of this pool begins with version {self.places[0].version}: version "
                f"{version} cannot be looked at any more"
            )
        return super().before(version)

    def version_at(self, time_ns: int) -> int:
        """Return the newest version that is not younger than a time.

        Raises `InvalidError` for a time before the past began.
        """
        self._reach(lambda place: place.time_ns <= time_ns)
        if self.places[0].time_ns > time_ns:
            raise InvalidError(
                f"the past of this pool begins with version {self.places[0].version}, which is "
                "younger than that time"
            )
        return super().version_at(time_ns)

    def _reach(self, is_enough: Callable[[Past], bool]) -> None:
        """Go back to earlier places: each manifest keeps only so many."""
        at = 1 if not self.places[0].key else 0  # behind the empty pool
        while len(self.places) > at and not is_enough(self.places[at]):
            earlier = read_manifest(self._store, self.places[at].key).past
            if not earlier:
                return
            self.places[at:at] = earlier


class PathValues(CachedValues):
    """The large values of a pool at a path and of its past, mapped where they are."""

    def __init__(self, folder: Path, store: Store, version: int, pool: BulkFiles) -> None:
        """`folder` is that of the replica, `pool` has the pool's own values."""
        super().__init__(folder, store, lambda: version, self._missing)
        self._pool = pool

    def _open(self, reference: Reference) -> mmap.mmap:
        return map_at(self._pool.find(reference.file), reference)

    def _missing(self, reference: Reference) -> None:
        raise CorruptionError(
            f"the large value {reference.file} is missing in the pool and its past: restore it "
            "from a copy"
        )

    def stored_damage(self, reference: Reference) -> list[str]:
        """Read the whole file; returns what is wrong with it, in words."""
        return BulkFiles.damage(self, reference)


def open_at(
    folder: PastFolder,
    replica: Replica,
    version: int,
    timeout_s: float,
    reopen: Callable[..., Any],
) -> PastEngine:
    """Open the pool that has this past as it was at a version.

    `reopen(path, version, timeout_s, None)` does so in another process.
    """
    state = replica.state()
    if not 0 <= version <= state.version:
        raise InvalidError(f"the pool has the versions 0 to {state.version}, not {version}")
    pool = os.fspath(folder.path.parent)
    place: tuple[Any, ...] = (pool, version, timeout_s, None)
    store = folder.open()
    try:
        history = PathHistory(folder, replica, store)
        history.before(version)
    except BaseException:
        store.close()
        raise
    return PastEngine(
        Path(tempfile.gettempdir(), f"everpool-past-{os.getuid()}"),
        store,
        history,
        state.pool,
        version,
        timeout_s,
        (reopen, place),
        lambda path: PathValues(path, store, version, replica.bulk),
    )
