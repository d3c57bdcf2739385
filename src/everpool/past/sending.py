"""Branches and backups of a pool at a path: pools at a URL that begin as it was.

    upload what the checkpoint is made of, large values first; what is there already is passed over
    upload the manifest
    write the marker: from here on there is a pool, or a newer backup

Segments and values keep their names, so what was interrupted goes on where it stopped, and a later
backup sends what is new. Whoever dies in between leaves objects that nothing refers to.

A backup may be replaced by a later one until somebody opens it for writing, which takes its mark
away (`agent.pools.claim`). Each one is a pool of its own, with an id of its own, so hosts that only
read an earlier one are not confused.
"""

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import NamedTuple

from everpool.agent.branching import write_start
from everpool.agent.past import PastEngine
from everpool.agent.pools import MARKER, Marker, check_free, create_branch, put_backup, read_marker
from everpool.collection import upload_version
from everpool.errors import (
    ClosedError,
    ConflictError,
    CorruptionError,
    ExistsError,
    NotFoundError,
    UnavailableError,
)
from everpool.past.keeper import Keeper
from everpool.replica.bulk import key_of_value, stored_bytes
from everpool.replica.index import translated
from everpool.segments.checkpoints import key_of_pages, write_manifest
from everpool.segments.format import Manifest, read_page_row
from everpool.store import Store, open_store, without_secrets
from everpool.store.directory import DirectoryStore

_FOLDERS = ("index", "pages", "values")
_AT_ONCE = 4
_PIECE_BYTES = 4 << 20

Progress = Callable[[int, int], None]


class Part(NamedTuple):
    """An object to be sent: its key there, and its file here."""

    key: str
    find: Callable[[], Path]
    size: int


def branch(keeper: Keeper, past: PastEngine, url: str) -> None:
    """Make a pool at `url` that begins as `past`, which is closed then."""
    try:
        where = without_secrets(url)
        with contextlib.closing(open_store(url)) as store:
            check_free(store, where)
            pool, version = uuid.uuid4().bytes, past.sync()
            with _pinned(keeper, f"branch at {where}", version):
                _send(store, _parts_of(keeper, past), None, may_link=True)
                start = write_start(past, store, pool)
            create_branch(store, where, pool, "", start)
    finally:
        past.release()


def back_up(
    keeper: Keeper,
    open_past: Callable[[int], PastEngine],
    url: str,
    progress: Progress | None,
) -> int:
    """Send a checkpoint made now to `url`; returns its version."""
    where = without_secrets(url)
    with contextlib.closing(open_store(url)) as store:
        marker, e_tag = _earlier(keeper, store, where)
        keeper.checkpoint()
        manifest, state = keeper.newest()
        version = 0 if manifest is None else manifest.version
        if marker is not None and upload_version(marker.start) == version:
            return version
        pool, start = uuid.uuid4().bytes, ""
        if manifest is not None:
            with _pinned(keeper, f"backup at {where}", version):
                past = open_past(version)
                try:
                    parts = _parts_of(keeper, past)
                finally:
                    past.release()
                parts += [
                    Part(run.key, partial(keeper.past.path.joinpath, run.key), run.size)
                    for run in manifest.runs
                ]
                _send(store, parts, progress, may_link=False)
            there = Manifest(
                pool, version, 0, manifest.hash, manifest.time_ns, manifest.runs, []
            )
            start = write_manifest(store, version, there)
        try:
            put_backup(store, pool, state.pool, start, e_tag)
        except ConflictError:
            _earlier(keeper, store, where)  # which raises when it is no backup of this pool
            raise UnavailableError(
                f"another backup came to {where} meanwhile: try again"
            ) from None
        return version


def _pinned(
    keeper: Keeper, name: str, version: int
) -> contextlib.AbstractContextManager[None]:
    return keeper.pinned(name, version) if version else contextlib.nullcontext()


def _earlier(keeper: Keeper, store: Store, where: str) -> tuple[Marker | None, str | None]:
    """Return what is at the URL, and its tag: nothing, or an earlier backup of the same pool."""
    try:
        e_tag = store.get(MARKER).e_tag
        marker = read_marker(store, where)
    except NotFoundError:
        return None, None
    if marker.backup != str(uuid.UUID(bytes=keeper.newest()[1].pool)):
        raise _taken(where)
    return marker, e_tag


def _taken(where: str) -> ExistsError:
    return ExistsError(
        f"there is a pool at {where} already that is no backup of this one, or was opened for "
        "writing since it was: choose another URL"
    )


def _parts_of(keeper: Keeper, past: PastEngine) -> list[Part]:
    """Return the large values and the segments of pages that a pool as it was needs."""
    index = past.replica.index
    parts: dict[str, Part] = {}
    with index.read() as txn, translated("listing what is to be sent"):
        for row in index.all_pages(txn):
            key = key_of_pages(read_page_row(row).segment)
            if key not in parts:
                size = (keeper.past.path / key).stat().st_size
                parts[key] = Part(key, partial(keeper.past.path.joinpath, key), size)
        for reference in index.references(txn):
            key = key_of_value(reference.file)
            # When it is sent: it may be replaced, and move into the past, before.
            find = partial(keeper.find, reference.file)
            parts[key] = Part(key, find, stored_bytes(reference.size))
    return sorted(parts.values(), key=lambda part: -part.size)


def _send(store: Store, parts: list[Part], progress: Progress | None, *, may_link: bool) -> None:
    """Store the parts that are not there yet, some at a time."""
    there = {one.key: one.size for folder in _FOLDERS for one in store.list(folder)}
    parts = [part for part in parts if there.get(part.key) != part.size]
    total, done = sum(part.size for part in parts), 0
    if may_link and isinstance(store, DirectoryStore):
        parts = [part for part in parts if not store.link(part.key, part.find())]
    stopped = threading.Event()
    with ThreadPoolExecutor(_AT_ONCE, "everpool-send") as threads:
        waiting: dict[Future[None], Part] = {}
        left = iter(parts)
        try:
            while True:
                for part in left:
                    waiting[threads.submit(_send_part, store, part, stopped)] = part
                    if len(waiting) > _AT_ONCE:
                        break
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    done += waiting.pop(future).size
                    future.result()
                    if progress is not None:
                        progress(done, total)
        except BaseException:
            stopped.set()
            raise


def _send_part(store: Store, part: Part, stopped: threading.Event) -> None:
    def pieces() -> Iterator[bytes]:
        left = part.size
        path = part.find()
        with path.open("rb") as file:
            while left:
                if stopped.is_set():
                    raise ClosedError("another part could not be sent")
                piece = file.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise CorruptionError(f"{path} is cut short: restore it from a copy")
                left -= len(piece)
                yield piece

    with translated(f"sending {part.key}"):
        store.put_pieces(part.key, pieces(), part.size)
