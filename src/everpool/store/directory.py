"""A store in a folder of this machine, for several processes, safe against crashes and power cuts.

    folder/.lock            locked by who swaps
    folder/.part/...        objects that are being written; never seen as objects
    folder/chunks/7         the object `chunks/7`, its bytes and nothing else

An object is written to a file in `.part`, flushed, renamed to its place, and the folder flushed:
a crash at any line leaves the old object or the new one, and perhaps a file in `.part`, which the
first to open the store a day later removes. In names, what is not a letter, a digit or one of
`-_=.` is written as `%` and the hexadecimal digits of its UTF-8 bytes, and so is a first `.`.

Locks and renames of network file systems do not promise what this relies on: not for NFS.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from xxhash import xxh3_128_hexdigest

from everpool.errors import (
    ClosedError,
    CommitUnknownError,
    ConflictError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from everpool.store import Data, Listed, Object, check_key, check_ranges

_PARTS = ".part"
_LOCK = ".lock"
_ABANDONED_S = 24 * 3600
_NAME_BYTES = 255
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_UNLINKABLE = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
_SHAPE = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG)


def open_directory(url: str, *, timeout_s: float = 10.0, **unknown: object) -> "DirectoryStore":
    """Return the store at a `file:///folder` URL; `timeout_s` is how long a swap may wait."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path or parts.query or parts.fragment:
        raise InvalidError(f"{url!r} is no folder of this machine: write file:///folder")
    if unknown:
        raise InvalidError(f"a directory has no option {min(unknown)!r}, only timeout_s")
    return DirectoryStore(Path(unquote(parts.path)), timeout_s=timeout_s)


class DirectoryStore:
    """A `Store` in the folder `root`, which is created when absent.

    A swap waits up to `timeout_s` for another process that swaps. Other calls wait for nobody.
    """

    def __init__(self, root: Path, *, timeout_s: float = 10.0) -> None:
        self._root = root.absolute()
        self._timeout_s = timeout_s
        self._pid = os.getpid()
        self._closed = False
        # Folders whose names this process knows to be on the disk.
        self._durable: set[Path] = set()
        self._sweep()

    def get(self, key: str) -> Object:
        """Read the file; its tag is the hash of its bytes."""
        self._begin(key)
        with self._translated("get", key), self._path(key).open("rb") as file:
            data = file.read()
            modified_ns = os.fstat(file.fileno()).st_mtime_ns
        return Object(data, xxh3_128_hexdigest(data), modified_ns)

    def get_if_changed(self, key: str, e_tag: str) -> Object | None:
        """Read the file, and return it unless its tag is `e_tag`."""
        found = self.get(key)
        return None if found.e_tag == e_tag else found

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Read the ranges one by one: files need no parallel requests."""
        check_ranges(key, ranges)
        self._begin(key)
        found: list[memoryview] = []
        with self._translated("get", key), self._path(key).open("rb") as file:
            for start, end in ranges:
                data = _pread(file.fileno(), start, end)
                if len(data) != end - start:
                    size = os.fstat(file.fileno()).st_size
                    raise InvalidError(
                        f"bytes {start} to {end} are not in {key!r}, which has {size}"
                    )
                found.append(memoryview(data))
        return found

    def put(self, key: str, data: Data) -> None:
        """Write, flush and rename a file."""
        self._begin(key)
        with self._translated("put", key):
            self._install(key, self._write([data], len(data), key))

    def put_pieces(self, key: str, pieces: Iterable[Data], size: int) -> None:
        """Write the pieces to one file, flush and rename it."""
        self._begin(key)
        failed: list[BaseException] = []
        with self._translated("put", key, failed):
            self._install(key, self._write(_watched(pieces, failed), size, key))

    def link(self, key: str, path: Path) -> bool:
        """Store, as an object, a durable file that never changes, without copying it.

        False when that cannot be done here: `path` is on another disk, or there are no hard links.
        """
        self._begin(key)
        target = self._path(key)
        with self._translated("put", key):
            self._make_folder(target.parent)
            try:
                os.link(path, target)
            except FileExistsError:
                pass
            except OSError as error:
                if error.errno in _UNLINKABLE:
                    return False
                raise
            _flush_folder(target.parent)
        return True

    def swap(self, key: str, data: Data, e_tag: str | None) -> str:
        """Replace the file under the lock of the folder."""
        self._begin(key)
        with self._translated("swap", key):
            # Flushed before the lock is taken: others need not wait for it.
            part = self._write([data], len(data), key)
            try:
                with _locked(self._root / _LOCK, self._timeout_s):
                    if self._tag(key) != e_tag:
                        raise ConflictError(f"{key!r} in {self._root} has another tag", key=key)
                    self._install(key, part, swap=True)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    part.unlink()
        return xxh3_128_hexdigest(data)

    def list(self, prefix: str, after: str = "") -> Iterator[Listed]:
        """Walk the folder in the order of keys."""
        self._begin(prefix or "-")
        folder = self._path(prefix) if prefix else self._root
        with self._translated("list", prefix):
            yield from self._walk(folder, f"{prefix}/" if prefix else "", after.encode())

    def delete(self, keys: Sequence[str]) -> None:
        """Remove the files, and flush their folders."""
        folders: set[Path] = set()
        for key in keys:
            self._begin(key)
            path = self._path(key)
            gone = contextlib.suppress(FileNotFoundError, NotADirectoryError)
            with self._translated("delete", key), gone:
                # Also of what is gone: whoever deleted it may have died before the flush.
                folders.add(path.parent)
                path.unlink()
        for folder in folders:
            gone = contextlib.suppress(FileNotFoundError, NotADirectoryError)
            with self._translated("delete", ""), gone:
                _flush_folder(folder)

    def close(self) -> None:
        """Refuse every later call."""
        self._closed = True

    def _begin(self, key: str) -> None:
        if self._closed or self._pid != os.getpid():
            raise ClosedError(f"the store in {self._root} is closed, or of another process")
        check_key(key)

    def _path(self, key: str) -> Path:
        names = [_name_of(part) for part in key.split("/")]
        if any(len(name) > _NAME_BYTES for name in names):
            raise InvalidError(f"{key!r} has a part that is too long for a name of a file")
        return self._root.joinpath(*names)

    def _tag(self, key: str) -> str | None:
        try:
            return xxh3_128_hexdigest(self._path(key).read_bytes())
        except FileNotFoundError:
            return None

    def _write(self, pieces: Iterable[Data], size: int, key: str) -> Path:
        """Return a flushed file in `.part` that holds the pieces."""
        self._make_folder(self._root / _PARTS)  # reading makes nothing
        part = self._root / _PARTS / secrets.token_hex(16)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(part, flags, 0o666)
        try:
            written = 0
            for piece in pieces:
                view = memoryview(piece).cast("B")
                written += len(view)
                while view:
                    view = view[os.write(descriptor, view) :]
            if written != size:
                raise InvalidError(f"{key!r} was to have {size} bytes, its pieces have {written}")
            os.fsync(descriptor)
        except BaseException:
            part.unlink()
            raise
        finally:
            os.close(descriptor)
        return part

    def _install(self, key: str, part: Path, *, swap: bool = False) -> None:
        path = self._path(key)
        try:
            self._make_folder(path.parent)
            part.rename(path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                part.unlink()
            raise
        try:
            _flush_folder(path.parent)
        except OSError as error:
            if not swap:
                raise
            # The new object is seen already, but a power cut may bring back the old one.
            raise CommitUnknownError(
                f"{key!r} in {self._root} was replaced, but its folder not flushed"
                f" ({error.strerror}): read it again",
                id=key,
            ) from error

    def _make_folder(self, folder: Path) -> None:
        """Create the folder durably: its name is flushed, and those above it up to the root.

        Also those that are there already: whoever made them may not have come to that.
        """
        if folder in self._durable and folder.is_dir():
            return
        if folder.parent.is_relative_to(self._root) or not folder.parent.is_dir():
            self._make_folder(folder.parent)
        was_there = folder.is_dir()
        folder.mkdir(exist_ok=True)
        try:
            _flush_folder(folder.parent)
        except PermissionError:
            if not was_there:
                raise
        self._durable.add(folder)

    def _sweep(self) -> None:
        """Remove what crashed writers left long ago, where this user may."""
        before = time.time() - _ABANDONED_S
        with contextlib.suppress(OSError):
            for part in os.scandir(self._root / _PARTS):
                with contextlib.suppress(OSError):
                    if part.stat().st_mtime < before:
                        os.unlink(part.path)

    def _walk(self, folder: Path, prefix: str, after: bytes) -> Iterator[Listed]:
        try:
            entries = [entry for entry in os.scandir(folder) if entry.name[0] != "."]
        except (FileNotFoundError, NotADirectoryError):
            return
        found: list[tuple[bytes, str, os.DirEntry[str]]] = []
        for entry in entries:
            key = prefix + unquote(entry.name) + ("/" if entry.is_dir() else "")
            found.append((key.encode(), key, entry))
        for order, key, entry in sorted(found, key=lambda item: item[0]):
            if entry.is_dir():
                if order > after or after.startswith(order):
                    yield from self._walk(Path(entry.path), key, after)
            elif order > after:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    yield Listed(key, status.st_size, status.st_mtime_ns)

    @contextlib.contextmanager
    def _translated(
        self, call: str, key: str, untouched: Sequence[BaseException] = ()
    ) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error in untouched:
                raise
            where = f"{key!r} in {self._root}" if key else str(self._root)
            if error.errno in _ABSENT and call in ("get", "list"):
                raise NotFoundError(f"there is no object {where}", key=key) from error
            words = f"cannot {call} {where}: {error.strerror}"
            if error.errno in _DENIED:
                raise InvalidError(f"{words}; give this user the rights", key=key) from error
            if error.errno in _SHAPE:
                raise InvalidError(f"{words}; no key may be a folder", key=key) from error
            raise UnavailableError(
                f"{words}; see that the disk works and has room, then try again", key=key
            ) from error


def _name_of(part: str) -> str:
    name = quote(part, safe="-_=.").replace("~", "%7E")
    return "%2E" + name[1:] if name[0] == "." else name


def _watched(pieces: Iterable[Data], failed: list[BaseException]) -> Iterator[Data]:
    """Yield the pieces, and note the error that their iterator raises: it is not the store's."""
    try:
        yield from pieces
    except BaseException as error:
        failed.append(error)
        raise


def _pread(descriptor: int, start: int, end: int) -> bytes:
    """Read a range; shorter only at the end of the file."""
    data = os.pread(descriptor, end - start, start)
    while len(data) < end - start:
        more = os.pread(descriptor, end - start - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Gate:
    """The lock file of one folder, as this process holds it.

    The kernel frees the lock when the process dies, and a forked child does not inherit it. It
    does not exclude threads, so a mutex does; and it goes when any descriptor of the file is
    closed, so there is one, for as long as the process lives.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.mutex = threading.Lock()


_gates: dict[tuple[int, int], _Gate] = {}
_gates_lock = threading.Lock()


def _forget_gates() -> None:
    """A forked child begins anew: a thread that it does not have may hold the mutexes."""
    global _gates_lock
    _gates_lock = threading.Lock()
    for gate in _gates.values():
        os.close(gate.descriptor)
    _gates.clear()


os.register_at_fork(after_in_child=_forget_gates)


def _gate(path: Path) -> _Gate:
    with _gates_lock:
        # Looked up before it is opened: to close a second descriptor would free the lock.
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            known = _gates.get((status.st_dev, status.st_ino))
            if known is not None:
                return known
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        status = os.fstat(descriptor)
        return _gates.setdefault((status.st_dev, status.st_ino), _Gate(descriptor))


@contextlib.contextmanager
def _locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold the lock; raises `UnavailableError` when another holds it for `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    gate = _gate(path)
    if not gate.mutex.acquire(timeout=timeout_s):
        raise _busy(path, timeout_s)
    try:
        _try_until(deadline, lambda: _take(gate), lambda: _busy(path, timeout_s))
        try:
            yield
        finally:
            fcntl.lockf(gate.descriptor, fcntl.LOCK_UN)
    finally:
        gate.mutex.release()


def _take(gate: _Gate) -> bool:
    try:
        fcntl.lockf(gate.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _try_until(deadline: float, attempt: Callable[[], bool], late: Callable[[], Exception]) -> None:
    pause_s = 0.0002
    while not attempt():
        if time.monotonic() >= deadline:
            raise late()
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.005)


def _busy(path: Path, timeout_s: float) -> UnavailableError:
    return UnavailableError(
        f"another process has held {path} for {timeout_s:g} s: wait for it, or see what stops it"
    )
