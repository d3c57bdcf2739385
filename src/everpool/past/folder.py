"""Where the past of a pool at a path is."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from everpool.agent.pools import Marker, begin_marker, read_marker
from everpool.errors import NotFoundError
from everpool.replica.bulk import PAST_MARKER, PAST_VALUES, UNLINKABLE, BulkFiles, sync_folder
from everpool.replica.index import translated
from everpool.segments.checkpoints import read_manifest
from everpool.segments.format import Manifest
from everpool.store import Store
from everpool.store.directory import DirectoryStore

_PARTS = "values.part"


class PastFolder:
    """The past beside one pool."""

    def __init__(self, pool: Path, bulk: BulkFiles) -> None:
        self.path = pool / PAST_MARKER.parent
        self._values = pool / PAST_VALUES
        self._bulk = bulk

    def open(self) -> DirectoryStore:
        """Return the store that the past is in."""
        return DirectoryStore(self.path)

    def marker(self) -> Marker | None:
        """Return what is said of the past; None when there is none."""
        if not self._bulk.keeps_past():
            return None
        with contextlib.closing(self.open()) as store:
            try:
                return read_marker(store, os.fspath(self.path))
            except NotFoundError:  # deleted meanwhile
                return None

    def is_of_use(self, store: Store, key: str) -> bool:
        """Whether there is a version to look back at; `key` is the newest checkpoint's manifest."""
        marker = self.marker()
        return marker is not None and (
            not marker.began or self.manifest(store, key) is not None
        )

    def begin(self, pool: bytes, version: int) -> None:
        """Begin to keep a past. Call with the writer's lock held."""
        with contextlib.closing(self.open()) as store:
            begin_marker(store, pool, version)

    def manifest(self, store: Store, key: str) -> Manifest | None:
        """Return the newest checkpoint's manifest; None when there is no checkpoint here."""
        try:
            return read_manifest(store, key) if key else None
        except NotFoundError:
            return None

    def keep(self, files: Iterable[str]) -> None:
        """See to it, durably, that large values are here before the pool removes them."""
        with translated("keeping large values of the past"):
            kept = [file for file in files if self._keep(file)]
            if kept:
                sync_folder(self._values)

    def _keep(self, file: str) -> bool:
        target = self._values / file
        if target.exists():
            return True
        try:
            source = self._bulk.find(file)
        except FileNotFoundError:
            return False  # a value of before the past began
        if not self._values.is_dir():
            self._values.mkdir(exist_ok=True)
            sync_folder(self.path)
        try:
            os.link(source, target)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in UNLINKABLE:
                raise
            self._copy(source, target)
        return True

    def _copy(self, source: Path, target: Path) -> None:
        folder = self.path / _PARTS
        folder.mkdir(exist_ok=True)
        part = folder / uuid.uuid4().hex
        try:
            shutil.copyfile(source, part)
            descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(part, target)
        finally:
            part.unlink(missing_ok=True)
