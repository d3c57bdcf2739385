"""What a store says of the pool in it: that there is one, and which segments it shares.

Under the key `everpool.json` there is a JSON object: `format` (1), `id` (a UUID), and for a branch
`parent`, the URL of the pool that it shares segments with, and `start`, the manifest that it began
with. A backup has a `start`, too, and in `backup` the id of the pool that it is one of, which goes
when the backup is opened for writing: from then on it is a pool like any other. Where there is the
past of a pool at a path, `began` is the version since which it is kept.
"""

import contextlib
import uuid
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from everpool.errors import (
    ConflictError,
    CorruptionError,
    ExistsError,
    InvalidError,
    NotFoundError,
)
from everpool.replica.layout import no_pool
from everpool.store import Data, Listed, Object, Store, open_store, without_secrets

MARKER = "everpool.json"
_FORMAT = 1
SHARED = ("checkpoints/", "index/", "pages/", "values/")
_MOST_PARENTS = 32


class Marker(msgspec.Struct, omit_defaults=True):
    """What is under the key `everpool.json`."""

    format: int
    id: str
    parent: str = ""
    start: str = ""
    backup: str = ""
    began: int = -1

    def pool(self) -> bytes:
        """Return the pool's id."""
        return uuid.UUID(self.id).bytes


def read_marker(store: Store, where: str) -> Marker:
    """Return what a store says of its pool; raises `NotFoundError` when there is none."""
    try:
        data = store.get(MARKER).data
    except NotFoundError:
        raise no_pool(where) from None
    try:
        marker = msgspec.json.decode(data, type=Marker)
        marker.pool()
    except (msgspec.DecodeError, ValueError) as error:
        if b'"everpool"' in data:
            raise InvalidError(
                f"{where} is the folder of a pool at a path: open it by that path, without file://"
            ) from None
        raise CorruptionError(
            f"{MARKER} at {where} is damaged ({error}): restore it from a copy"
        ) from error
    if marker.format > _FORMAT:
        raise InvalidError(f"the pool at {where} has format {marker.format}: upgrade")
    return marker


def claim(store: Store, where: str, marker: Marker, *, read_only: bool) -> Marker:
    """Return the marker of a pool that is about to be opened.

    A backup that is opened for writing becomes a pool of its own, which no later backup replaces.
    Raises `InvalidError` for the past of a pool at a path.
    """
    if marker.began >= 0:
        raise InvalidError(
            f"{where} is the past of a pool at a path: open that pool, the folder above it"
        )
    while marker.backup and not read_only:
        found = store.get(MARKER)
        marker = read_marker(store, where)
        ours = msgspec.structs.replace(marker, backup="")
        with contextlib.suppress(ConflictError):  # another backup came, or somebody else
            store.swap(MARKER, msgspec.json.encode(ours), found.e_tag)
            return ours
    return marker


def create_marker(store: Store, where: str) -> Marker:
    """Make a pool where there is none; returns what is said of the one that is there."""
    try:
        return read_marker(store, where)
    except NotFoundError:
        with contextlib.suppress(ConflictError):  # somebody else was faster
            _write(store, Marker(_FORMAT, str(uuid.uuid4())))
        return read_marker(store, where)


def check_free(store: Store, where: str) -> None:
    """Raise `ExistsError` when there is a pool, before anything is sent for another one."""
    with contextlib.suppress(NotFoundError):
        store.get(MARKER)
        raise _is_taken(where)


def _is_taken(where: str) -> ExistsError:
    return ExistsError(f"there is a pool at {where} already: choose another URL")


def create_branch(store: Store, where: str, pool: bytes, parent: str, start: str) -> None:
    """Make a branch, all of whose parts are there. Raises `ExistsError` when there is a pool."""
    try:
        _write(store, Marker(_FORMAT, str(uuid.UUID(bytes=pool)), parent, start))
    except ConflictError:
        raise _is_taken(where) from None


def _write(store: Store, marker: Marker) -> None:
    store.swap(MARKER, msgspec.json.encode(marker), None)


def begin_marker(store: Store, pool: bytes, began: int) -> None:
    """Say that there is the past of a pool at a path, since a version; harmless when it is said."""
    with contextlib.suppress(ConflictError):
        _write(store, Marker(_FORMAT, str(uuid.UUID(bytes=pool)), began=began))


def put_backup(store: Store, pool: bytes, of: bytes, start: str, e_tag: str | None) -> None:
    """Say that there is a backup of a pool, all of whose parts are there.

    It replaces the marker with the tag. Raises `ConflictError` when there is another one by now.
    """
    marker = Marker(
        _FORMAT, str(uuid.UUID(bytes=pool)), start=start, backup=str(uuid.UUID(bytes=of))
    )
    store.swap(MARKER, msgspec.json.encode(marker), e_tag)


def open_pool_store(url: str, marker: Marker | None = None) -> Store:
    """Return the store of the pool at a URL, behind which those of its parents stand.

    Raises `NotFoundError` when there is no pool and `marker` was not given.
    """
    store = open_store(url)
    stores = [store]
    try:
        where = without_secrets(url)
        known = read_marker(store, where) if marker is None else marker
        while known.parent:
            if len(stores) > _MOST_PARENTS:
                raise CorruptionError(f"the branches at {where} form a circle")
            stores.append(open_store(known.parent))
            known = read_marker(stores[-1], without_secrets(known.parent))
    except BaseException:
        for opened in stores:
            opened.close()
        raise
    return store if len(stores) == 1 else SharingStore(stores)


class SharingStore:
    """A store that has what its parents have, as far as segments go. Only the first is changed."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self._stores = stores
        self._own = stores[0]

    def get(self, key: str) -> Object:
        """Return an object of the first store that has it."""
        for store in self._having(key)[:-1]:
            with contextlib.suppress(NotFoundError):
                return store.get(key)
        return self._having(key)[-1].get(key)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Return ranges of an object of the first store that has it."""
        for store in self._having(key)[:-1]:
            with contextlib.suppress(NotFoundError):
                return store.get_ranges(key, ranges)
        return self._having(key)[-1].get_ranges(key, ranges)

    def _having(self, key: str) -> Sequence[Store]:
        return self._stores if key.startswith(SHARED) else self._stores[:1]

    def get_if_changed(self, key: str, e_tag: str) -> Object | None:
        """Return an object of the pool's own, unless it has that tag."""
        return self._own.get_if_changed(key, e_tag)

    def put(self, key: str, data: Data) -> None:
        """Store an object."""
        self._own.put(key, data)

    def swap(self, key: str, data: Data, e_tag: str | None) -> str:
        """Replace an object."""
        return self._own.swap(key, data, e_tag)

    def put_pieces(self, key: str, pieces: Iterable[Data], size: int) -> None:
        """Store a large object."""
        self._own.put_pieces(key, pieces, size)

    def list(self, prefix: str, after: str = "") -> Iterator[Listed]:
        """Yield the pool's own objects."""
        return self._own.list(prefix, after)

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects of the pool's own."""
        self._own.delete(keys)

    def close(self) -> None:
        """Close all stores."""
        for store in self._stores:
            store.close()
