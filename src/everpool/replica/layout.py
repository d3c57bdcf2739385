"""The folder of a pool at a path.

everpool.json     says that this is a pool, its id and its format; written last
lock              the writer's lock
shared            the shared page
index/            LMDB: the index and the tail
memory/           one file for each memory object
values/           one file for each large value
staging/          large values that no record names yet
"""

import contextlib
import os
import re
import uuid
from pathlib import Path

import msgspec

from everpool.errors import (
    CorruptionError,
    EverpoolError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from everpool.records import EMPTY_HASH
from everpool.replica.bulk import sync_folder
from everpool.replica.index import FORMAT, Index, State, translated
from everpool.replica.lock import lock_at
from everpool.replica.shared import SharedPage

MARKER = "everpool.json"
_FOLDERS = ("index", "memory", "values", "staging")
_SHARED_BETWEEN_MACHINES = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "lustre", "gpfs", "afs", "beegfs", "ocfs2"}
    | {"gfs2", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "fuse.cephfs", "afpfs", "webdav"}
)
# How /proc/self/mountinfo writes blanks, line ends and backslashes.
_ESCAPED = re.compile(r"\\([0-7]{3})")


class Marker(msgspec.Struct):
    """The content of `everpool.json`."""

    everpool: int
    pool: str

    def id(self) -> bytes:
        return uuid.UUID(self.pool).bytes


def is_pool(folder: Path) -> bool:
    """Whether a finished pool lies in `folder`."""
    with translated(f"opening {folder}"):
        return (folder / MARKER).exists()


def read_marker(folder: Path) -> Marker:
    """Return the pool's marker; raises when there is none, or it is of a newer format."""
    path = folder / MARKER
    with translated(f"opening {folder}"):
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise _not_a_pool(folder) from None
    try:
        marker = msgspec.json.decode(data, type=Marker)
        if marker.everpool > FORMAT:
            raise InvalidError(
                f"the pool {folder} has format {marker.everpool}, this version reads up to "
                f"{FORMAT}: upgrade everpool"
            )
        marker.id()
    except (msgspec.DecodeError, ValueError) as error:
        if isinstance(error, InvalidError):
            raise
        if b'"format"' in data:
            raise InvalidError(
                f"{folder} plays the bucket of a pool: open it as {folder.absolute().as_uri()}"
            ) from None
        raise CorruptionError(f"{path} is damaged ({error}): restore it from a copy") from error
    return marker


def check_place(folder: Path) -> None:
    """Refuse a file system that several machines may share: locks and mappings do not hold there.

    Raises `InvalidError`.
    """
    kind = _file_system(folder)
    if kind in _SHARED_BETWEEN_MACHINES:
        raise InvalidError(
            f"{folder} lies on a network file system ({kind}), where a pool at a path is not "
            "safe: use a local disk"
        )


def create_pool(folder: Path, timeout_s: float) -> None:
    """Make a pool in `folder`; harmless when another process is doing the same."""
    with translated(f"creating a pool in {folder}"):
        if folder.exists() and not folder.is_dir():
            raise _not_a_pool(folder)
        check_place(folder if folder.exists() else folder.parent)
        strangers = _strangers(folder)
        if strangers:
            raise InvalidError(
                f"{folder} is not a pool and not empty (it holds {strangers[0]!r}): "
                "choose an empty or new folder"
            )
        _make_folder(folder)
        lock = lock_at(folder / "lock")
        try:
            if not lock.acquire(timeout_s):
                raise UnavailableError(
                    f"another process has been creating {folder} for {timeout_s:g} s: try again"
                )
            try:
                if not is_pool(folder):
                    _fill(folder)
            finally:
                lock.release()
        finally:
            lock.close()


def _fill(folder: Path) -> None:
    _refuse_headless(folder)
    for name in _FOLDERS:
        (folder / name).mkdir(exist_ok=True)
    # What an interrupted creation left was never acknowledged.
    for path in [*(folder / "index").iterdir(), *(folder / "staging").iterdir()]:
        path.unlink()
    SharedPage(folder / "shared", writable=True).reset(0)
    pool = uuid.uuid4()
    index = Index(folder / "index", read_only=False, create=True)
    try:
        with translated(f"creating the index in {folder}"):
            with index.env.begin(write=True) as txn:
                state = State(FORMAT, pool.bytes, 0, 0, EMPTY_HASH, 0, 0, 1, 0, 0, 0)
                index.put_state(txn, state)
            index.env.sync(True)
    finally:
        index.close()
    for name in _FOLDERS:
        sync_folder(folder / name)
    sync_folder(folder)  # the marker must not outlive what it stands for
    data = msgspec.json.encode(Marker(FORMAT, str(pool)))
    temporary = folder / (MARKER + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.rename(temporary, folder / MARKER)
    sync_folder(folder)


def check_folders(folder: Path) -> None:
    """Make the folders that may be empty, which some ways of copying leave out."""
    with translated(f"opening {folder}"):
        for name in _FOLDERS[1:]:
            (folder / name).mkdir(exist_ok=True)


def _refuse_headless(folder: Path) -> None:
    """Raise `CorruptionError` when a pool lies in `folder` that only lost its marker."""
    found = [path for name in ("memory", "values") for path in (folder / name).glob("*")]
    if not found and (folder / "index" / "data.mdb").exists():
        with contextlib.suppress(EverpoolError):
            index = Index(folder / "index", read_only=False, create=False)
            try:
                if not index.missing_bytes:
                    with index.read() as txn:
                        found += [index.path] * (index.state(txn).version > 0)
            finally:
                index.close()
    if found:
        raise CorruptionError(
            f"{folder} has no {MARKER}, but holds a pool ({found[0]}): restore {MARKER} from a copy"
        )


def _make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, durably."""
    if not folder.parent.exists():
        _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def _strangers(folder: Path) -> list[str]:
    ours = {*_FOLDERS, "lock", "shared", MARKER, MARKER + ".new"}
    if not folder.exists():
        return []
    return sorted(name for name in os.listdir(folder) if name not in ours)


def _not_a_pool(folder: Path) -> InvalidError | NotFoundError:
    if folder.exists():
        what = "not a folder" if not folder.is_dir() else f"it has no {MARKER}"
        return InvalidError(f"{folder} is not a pool: {what}")
    return no_pool(folder)


def no_pool(where: Path | str) -> NotFoundError:
    """Return the error for a place that has no pool."""
    return NotFoundError(
        f"there is no pool at {where}: see that it is spelt right, or make one with create=True "
        "(from a shell: put, import or copy)"
    )


def _file_system(folder: Path) -> str:
    """Return the type of the file system that `folder` lies on, or "" when that is not told."""
    with contextlib.suppress(OSError):
        real = os.path.realpath(folder)
        best, kind = "", ""
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            point = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), before.split()[4])
            inside = real == point or real.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):
                best, kind = point, after.split()[0]
        return kind
    return ""
