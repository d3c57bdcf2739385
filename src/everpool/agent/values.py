"""Large values of a pool in a bucket: segments there, and files of the host's cache here.

The segment `values/NAME` has the bytes of a bulk file (see `everpool.replica.bulk`), and so has
the file, which is made when somebody first wants the value. A segment's name begins with the
version that its writer was at when the upload began, so that a record which refers to it tells
everybody how old the upload is.
"""

import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from everpool.errors import (
    ClosedError,
    CorruptionError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from everpool.records import Reference
from everpool.replica.bulk import (
    BulkFiles,
    Sealed,
    Staged,
    damage_of,
    key_of_value,
    map_file,
    stored_bytes,
)
from everpool.replica.index import translated
from everpool.segments.format import new_name
from everpool.store import Store

# Few and long ones: many writers to one file are in each other's way.
_PIECE_BYTES = 8 << 20
_PIECES_AT_ONCE = 4


class Uploaded(Staged):
    """A segment that no record names yet."""

    def __init__(self, reference: Reference) -> None:
        super().__init__(reference, -1)

    def release(self) -> None:
        """Let go of it; without a record it is garbage, which a collection finds."""

    def exists(self) -> bool:
        """Whether a record may name it: the verdict tells."""
        return True


class CachedValues(BulkFiles):
    """The large values of one host's replica. `fetch` makes a file that is not there yet.

    `upload` makes a segment of a staged file, for who cannot use the store: a forked child.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        version: Callable[[], int],
        fetch: Callable[[Reference], None],
        upload: Callable[[str, str, int], None] | None = None,
    ) -> None:
        super().__init__(folder)
        self._upload = upload
        self._store = store
        self._version = version
        self._fetch = fetch

    def stage(self, pieces: Iterable[bytes | memoryview], size: int) -> Staged:
        """Upload `size` bytes as a new segment; memory needed: a few parts of the upload."""
        name = new_name(self._version())
        sealed = Sealed(pieces, size)
        try:
            self._store.put_pieces(key_of_value(name), sealed, stored_bytes(size))
        except ClosedError:
            if self._upload is None:
                raise
            with translated("storing a large value for the agent to upload"):
                staged = super().stage(pieces, size)
            try:
                self._upload(staged.reference.file, name, size)
            finally:
                super().discard(staged)
            return Uploaded(Reference(name, size, staged.reference.checksum))
        return Uploaded(Reference(name, size, sealed.checksum))

    def upload(self, file: str, name: str, size: int) -> None:
        """Make the segment `name` of a file that somebody has staged.

        Raises `UnavailableError` when the file is not there any more.
        """
        try:
            with (self._staging / file).open("rb") as staged:
                pieces = iter(lambda: staged.read(_PIECE_BYTES), b"")
                self._store.put_pieces(key_of_value(name), pieces, stored_bytes(size))
        except FileNotFoundError:
            raise UnavailableError(
                "another agent has swept what was to be uploaded: try again"
            ) from None

    def discard(self, staged: Staged) -> None:
        """Delete a segment that no record will name, some time soon."""

        def delete() -> None:
            with contextlib.suppress(Exception):  # a collection would find it, too
                self._store.delete([key_of_value(staged.reference.file)])

        # Whoever tells the outcomes of commits must not wait for a store.
        threading.Thread(target=delete, name="everpool-discard", daemon=True).start()

    def local(self, reference: Reference) -> memoryview:
        """Return the value's bytes when they are here; raises `FileNotFoundError` otherwise."""
        return super().map(reference)

    def map(self, reference: Reference) -> memoryview:
        """Return the value's bytes, mapped read-only; fetched first where need be."""
        try:
            return self.local(reference)
        except FileNotFoundError:
            self._fetch(reference)
            return self.local(reference)

    def publish(self, reference: Reference) -> None:
        """Do nothing: a value comes into the cache when somebody wants it."""

    def sweep(self) -> None:
        """Delete what an interrupted fetch left."""
        for path in list(self._staging.iterdir()):
            path.unlink(missing_ok=True)

    def download(self, reference: Reference) -> None:
        """Make the file of a value, from its segment. For the agent, once at a time for each.

        Raises `CorruptionError` when the segment is damaged, and `NotFoundError` when it is gone.
        """
        with self._downloaded(reference) as (path, descriptor):
            damage = _damage_in(descriptor, reference)
            if damage:
                raise CorruptionError(
                    f"the segment {key_of_value(reference.file)} is damaged: {damage[0]}: restore "
                    "it from a copy of the bucket"
                )
            os.rename(path, self._values / reference.file)

    def stored_damage(self, reference: Reference) -> list[str]:
        """Read the whole segment; returns what is wrong with it, in words."""
        try:
            with self._downloaded(reference) as (_, descriptor):
                return _damage_in(descriptor, reference)
        except NotFoundError:
            return [f"its segment {key_of_value(reference.file)} is missing"]
        except InvalidError as error:
            return [str(error)]

    @contextlib.contextmanager
    def _downloaded(self, reference: Reference) -> Iterator[tuple[Path, int]]:
        size = stored_bytes(reference.size)
        path = self._staging / f"{reference.file}.{uuid.uuid4().hex}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

        def fetch(start: int) -> None:
            # One request each: a store would join ranges that touch.
            piece = start, min(start + _PIECE_BYTES, size)
            (data,) = self._store.get_ranges(key_of_value(reference.file), [piece])
            _write_at(descriptor, data, start)

        try:
            if hasattr(os, "posix_fallocate"):  # all at once, not block by block
                os.posix_fallocate(descriptor, 0, size)
            with ThreadPoolExecutor(_PIECES_AT_ONCE, "everpool-download") as threads:
                for _ in threads.map(fetch, range(0, size, _PIECE_BYTES)):
                    pass
            yield path, descriptor
        finally:
            os.close(descriptor)
            path.unlink(missing_ok=True)


def _damage_in(descriptor: int, reference: Reference) -> list[str]:
    # By its descriptor: an agent that begins meanwhile sweeps the name away.
    try:
        mapped = map_file(descriptor, reference)
    except CorruptionError as error:
        return [str(error)]
    return damage_of(memoryview(mapped)[: reference.size], mapped, reference)


def _write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view = view[done:]
        offset += done
