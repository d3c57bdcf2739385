"""The index: what a replica keeps in LMDB. All LMDB errors are translated here.

Each row ends with 8 bytes: XXH3-64 of what is before, big-endian, seeded with XXH3-64 of the
row's key, so that neither a damaged nor a misplaced row is taken for a sound one.

    key                               row
    "/"                               room for the newest entries (see `ring`)
    "0" key of an object              version at which its upload began (8), version from which on
                                      nothing names it (8)
    "1" object id, block (8 + 8)      XXH3-64 of a block of memory (8)
    "2" name (see `_place`)           kind (1 byte), object id (8), version (8), size (8), body:
                                      an inline value, a `Reference`, or an array's header
    "3" last version (8, big-endian)  MessagePack, `TailRow`: an entry of the tail
    "4" object id (8, big-endian)     version (8), size (8), name: memory
    "5" session                       MessagePack, `SessionState`
    "6"                               MessagePack, `State`
    "7"                               MessagePack, snapshots: name to `PinRow`

All of it is one B-tree, and what every commit changes stands at its end, so that a small commit
changes few pages.
Other integers in rows are little-endian. Kinds: 1 inline value, 2 value in a bulk file, 3 memory.
LMDB keys are at most 511 bytes: a name longer than 500 bytes lies in the row of its first 500
bytes and a NUL, which holds a MessagePack map of the rests of such names to their rows.
"""

import contextlib
import ctypes
import errno
import os
import struct
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import lmdb
import msgspec
from xxhash import xxh3_64_digest, xxh3_64_intdigest

from everpool.collection import Horizon
from everpool.errors import (
    ClosedError,
    CorruptionError,
    EverpoolError,
    InvalidError,
    UnavailableError,
)
from everpool.records import Reference, decode_entry
from everpool.replica import ring
from everpool.replica.ring import Ring
from everpool.verdict import SessionState

FORMAT = 1
INLINE, BULK, MEMORY = 1, 2, 3
# Address space, not disk: LMDB maps this much once and is never resized.
_MAP_BYTES = 1 << 42
_MAX_READERS = 4096
_CLOSE_S = 5.0
_LOCK_FILE_BYTES = 64 * _MAX_READERS + 4096
_GARBAGE, _BLOCKS, _NAMES, _TAIL, _MEMORIES = b"0", b"1", b"2", b"3", b"4"
_SESSIONS, _STATE, _PINS = b"5", b"6", b"7"
_TAIL_END = _MEMORIES
_NAME = struct.Struct("<BQQQ")
BODY = _NAME.size
_MEMORY = struct.Struct("<QQ")
_LIFE = struct.Struct("<QQ")
_LONG_NAME_BYTES = 500
_SCAN_ROWS = 8192


class State(msgspec.Struct, array_like=True):
    """Where the replica is in its log. `hash` is the running hash at `position`.

    Memory up to version `flushed` can be had without the tail. `checkpoint` is the version of the
    newest checkpoint in the log, and `manifest` its key; `horizon` is what is kept of the past.
    """

    format: int
    pool: bytes
    version: int
    position: int
    hash: bytes
    floor: int
    flushed: int
    next_id: int
    names: int
    tail_bytes: int
    time_ns: int
    checkpoint: int = 0
    manifest: str = ""
    horizon: Horizon = Horizon()


class NameRow(NamedTuple):
    """What a name is bound to. `size` is the bytes of memory, or of the encoded value."""

    kind: int
    id: int
    version: int
    size: int
    body: memoryview | bytes

    def reference(self) -> Reference:
        return _decode_reference(self.body)


class PinRow(msgspec.Struct, array_like=True, frozen=True):
    """A snapshot: its version, and the time when it was made; see `records.Pin` for the rest."""

    version: int
    time_ns: int
    locked_until_ns: int = 0
    lock: str = ""


class MemoryRow(NamedTuple):
    """A memory object: the last version that changed it, its size and its name."""

    version: int
    size: int
    name: str


class Resolved(msgspec.Struct, array_like=True):
    """What an operation came to, beside what it says itself.

    `id` is the object; `size` its size or the object it replaced; `name` the name of the memory,
    or the bulk file that became garbage; `old` and `new` the bytes before and after an addition.
    """

    id: int = 0
    size: int = 0
    name: str = ""
    old: bytes = b""
    new: bytes = b""


class RecordOutcome(msgspec.Struct, array_like=True):
    """The verdict on one record and what its operations came to."""

    verdict: int
    detail: str
    resolved: list[Resolved]


class TailRow(msgspec.Struct, array_like=True):
    """One entry of the log, with what the replica worked out from it.

    `garbage` names the bulk files that only this row needs, `removed` those that only the rows
    needed which this entry trimmed.
    """

    first_version: int
    time_ns: int
    outcomes: list[RecordOutcome]
    entry: bytes
    garbage: list[str]
    removed: list[str] = []


encode = msgspec.msgpack.Encoder().encode
_decode_state = msgspec.msgpack.Decoder(State).decode
_decode_session = msgspec.msgpack.Decoder(SessionState).decode
_decode_tail = msgspec.msgpack.Decoder(TailRow).decode
_decode_reference = msgspec.msgpack.Decoder(Reference).decode
_decode_pins = msgspec.msgpack.Decoder(dict[str, PinRow]).decode
_decode_long = msgspec.msgpack.Decoder(dict[bytes, bytes]).decode


def is_page(key: bytes) -> bool:
    """Whether the row with that key tells where a page of memory is."""
    return key[:1] == _BLOCKS


def page_in(key: bytes, row: bytes) -> bytes:
    """Return where a page of memory is, from its row as `Index.dump` yields it."""
    return bytes(_unseal(key, memoryview(row), "the row of a page"))


def files_in(key: bytes, row: bytes) -> list[str]:
    """Return the files that the names of a row refer to, from the row as `Index.dump` yields it."""
    if key[:1] != _NAMES or (row[0] != BULK and key[-1] != 0):
        return []  # as nearly always
    names = {key: row}
    if key[-1] == 0:
        long = _decode_long(_unseal(key, memoryview(row), "a row of long names"))
        names = {key[:-1] + rest: sealed for rest, sealed in long.items()}
    rows = (_name_row(name, memoryview(sealed), repr(name)) for name, sealed in names.items())
    return [row.reference().file for row in rows if row.kind == BULK]


def is_of_the_past(key: bytes) -> bool:
    """Whether the row with that key tells of the pool's past: of snapshots, or dead objects."""
    return key[:1] in (_GARBAGE, _PINS)


def key_of(number: int) -> bytes:
    """Return a key that sorts as the number does."""
    return number.to_bytes(8, "big")


def _seal(key: bytes, row: bytes) -> bytes:
    return row + xxh3_64_digest(row, xxh3_64_intdigest(key))


def _is_sealed(key: bytes, sealed: memoryview | bytes) -> bool:
    return sealed[-8:] == xxh3_64_digest(sealed[:-8], xxh3_64_intdigest(key))


def _unseal(key: bytes, sealed: memoryview, what: str) -> memoryview:
    if not _is_sealed(key, sealed):
        raise CorruptionError(
            f"{what} does not match its checksum: restore it from a copy; "
            "`everpool verify` lists all damage"
        )
    return sealed[:-8]


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn LMDB's and the system's errors into ours."""
    try:
        yield
    except (lmdb.Error, OSError) as error:
        raise ours(error, doing) from error


def ours(error: lmdb.Error | OSError, doing: str) -> EverpoolError:
    """Return our error for one of LMDB's or the system's."""
    return translate_os(error, doing) if isinstance(error, OSError) else translate(error, doing)


def translate(error: lmdb.Error, doing: str) -> EverpoolError:
    """Return our error for one of LMDB's."""
    text = str(error)
    if isinstance(error, (lmdb.MapFullError, lmdb.DiskError)) or "No space left" in text:
        return UnavailableError(f"{doing}: the disk is full: free some space and try again")
    if "Input/output error" in text:  # LMDB says so, too, when there is room for a part only
        return UnavailableError(
            f"{doing}: the disk is full, or it failed ({text}): free some space and try again"
        )
    if isinstance(error, lmdb.ReadersFullError):
        return UnavailableError(
            f"{doing}: more than {_MAX_READERS} threads read the pool at once: try again later"
        )
    damage = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError)
    if isinstance(error, (*damage, lmdb.VersionMismatchError)):
        return CorruptionError(
            f"{doing}: the index is damaged ({text}): run `everpool verify`, then restore a copy"
        )
    if isinstance(error, lmdb.ReadonlyError) or "ermission denied" in text:
        return InvalidError(f"{doing}: no permission to write: open with read_only=True")
    return UnavailableError(f"{doing}: {text}: try again, or open the pool again")


def translate_os(error: OSError, doing: str) -> EverpoolError:
    """Return our error for one of the system's."""
    text = error.strerror or str(error)
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UnavailableError(f"{doing}{where}: the disk is full: free some space and try again")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return InvalidError(
            f"{doing}{where}: {text}: open with read_only=True, or change the permissions"
        )
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return InvalidError(f"{doing}{where}: {text}: choose another path")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return UnavailableError(f"{doing}{where}: {text}: raise the limit with `ulimit -n`")
    return UnavailableError(f"{doing}{where}: {text}: try again once that is mended")


def _reads(env: lmdb.Environment) -> bool:
    """Whether a thread of this process is reading."""
    pid = str(os.getpid())
    rows = (line.split() for line in env.readers().splitlines())
    return any(len(row) == 3 and row[0] == pid and row[2] != "-" for row in rows)


class _Closed:
    """What is left of an environment that was closed."""

    def __getattr__(self, name: str) -> Any:
        raise ClosedError("the pool is closed: open it again")


def _let_children_open() -> None:
    """Let a forked child open what its parent has open.

    py-lmdb refuses to open an environment twice in one process, and tells by the file. A child
    must not use, and cannot safely close, its parent's environment; it opens one of its own.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from lmdb import _envid

        keys = _envid.env_keys

        def env_keys(path: Any, subdir: bool) -> tuple[Any, ...]:
            return tuple((os.getpid(), key) for key in keys(path, subdir))

        _envid.env_keys = env_keys


def _never_free_inherited() -> None:
    """In a forked child: keep the parent's environments for good, also at exit.

    Freeing one would free the parent's reader slots, which lie in a file that both have mapped,
    and would wait for threads of the parent that do not exist here.
    """
    for environment in list(_environments):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(environment))


_environments: weakref.WeakSet[lmdb.Environment] = weakref.WeakSet()
_let_children_open()
os.register_at_fork(after_in_child=_never_free_inherited)


class Index:
    """The LMDB environment of one replica in this process."""

    def __init__(
        self, folder: Path, *, read_only: bool, create: bool, durable: bool = True
    ) -> None:
        """With `durable=False` nothing is flushed, and the index is of no use after a reboot."""
        self.path = folder / "data.mdb"
        self.read_only = read_only
        self._durable = durable
        self._ring: Ring | None = None
        if not create and not self.path.exists():
            raise CorruptionError(f"{self.path} is missing: restore the pool from a copy")
        with translated(f"opening the index in {folder}"):
            if not read_only:
                _reserve_lock_file(folder / "lock.mdb")
            self.env = self._open(folder, create)
            _environments.add(self.env)
            try:
                self._prepare(create)
            except BaseException:
                self.env.close()
                raise

    def _open(self, folder: Path, create: bool) -> lmdb.Environment:
        try:
            return lmdb.open(
                os.fspath(folder),
                map_size=_MAP_BYTES,
                max_readers=_MAX_READERS,
                max_spare_txns=64,
                readonly=self.read_only,
                readahead=False,
                metasync=False,  # the ring makes up for it
                sync=self._durable,
                meminit=False,
                create=create,
                mode=0o666,
            )
        except lmdb.Error as error:
            if not self.read_only or "ermission denied" not in str(error):
                raise
            raise InvalidError(
                f"no permission to read {folder}: reading takes permission to read all files, and "
                "to write lock.mdb, in which readers enter themselves: change the permissions"
            ) from error

    def _prepare(self, create: bool) -> None:
        if not self.read_only:
            self.env.reader_check()
        if create and self._durable:
            with self.env.begin(write=True) as txn:
                ring.create(txn)
        info = self.env.info()
        length = self.path.stat().st_size
        needed = (info["last_pgno"] + 1) * self.env.stat()["psize"]
        self.missing_bytes = max(0, needed - length)

    @property
    def ring(self) -> Ring:
        """The ring of the newest entries. Not to be asked for while pages may be missing."""
        if self._ring is None:
            self._ring = Ring(self.path, self.env, writable=not self.read_only)
        return self._ring

    def close(self) -> None:
        if self._ring is not None:
            self._ring.close()
        env = self.env
        self.env = cast("lmdb.Environment", _Closed())
        # Closing it under a thread that is reading would crash the process.
        deadline = time.monotonic() + _CLOSE_S
        while _reads(env) and time.monotonic() < deadline:
            time.sleep(0.001)
        if not _reads(env):
            env.close()

    def read(self) -> lmdb.Transaction:
        """Begin reading. Keep it short: what it pins cannot be reused."""
        try:
            return self.env.begin(buffers=True)
        except lmdb.ReadersFullError as error:
            if not self.read_only and self.env.reader_check():
                return self.env.begin(buffers=True)
            raise translate(error, "reading the index") from error
        except lmdb.Error as error:
            raise translate(error, "reading the index") from error

    def state(self, txn: lmdb.Transaction) -> State:
        row = _get(txn, _STATE)
        if row is None:
            raise CorruptionError("the index has no state: restore the pool from a copy")
        return _decode_state(_unseal(_STATE, row, "the index's state"))

    def put_state(self, txn: lmdb.Transaction, state: State) -> None:
        txn.put(_STATE, _seal(_STATE, encode(state)))

    # Names

    def name(self, txn: lmdb.Transaction, name: str) -> NameRow | None:
        whole = _NAMES + name.encode()
        key, rest = _place(whole)
        row = _get(txn, key)
        if row is None:
            return None
        if rest is not None:
            found = _decode_long(_unseal(key, row, f"a row of names like {name[:40]!r}")).get(rest)
            if found is None:
                return None
            row = memoryview(found)
        return _name_row(whole, row, name)

    def inline(self, name: str) -> tuple[int, bytes] | None:
        """Return the row of a short name's inline value, without its checksum, and LMDB's number
        of the transaction that read it; None when `name` has to tell.

        The body begins at `BODY`. This is the short way to small values.
        """
        try:
            key = _NAMES + name.encode()
            with self.env.begin() as txn:
                sealed = txn.get(key)
                number = txn.id()
        except (lmdb.Error, UnicodeEncodeError):
            return None
        if not sealed or sealed[0] != INLINE:
            return None
        row = sealed[:-8]
        if xxh3_64_digest(row, xxh3_64_intdigest(key)) != sealed[-8:]:
            return None
        return number, row

    def put_name(self, txn: lmdb.Transaction, name: str, row: NameRow) -> None:
        whole = _NAMES + name.encode()
        sealed = _seal(whole, _NAME.pack(*row[:4]) + row.body)
        key, rest = _place(whole)
        if rest is not None:
            known = self._long(txn, key)
            known[rest] = sealed
            sealed = _seal(key, encode(known))
        txn.put(key, sealed)

    def delete_name(self, txn: lmdb.Transaction, name: str) -> None:
        key, rest = _place(_NAMES + name.encode())
        if rest is not None:
            known = self._long(txn, key)
            known.pop(rest, None)
            if known:
                txn.put(key, _seal(key, encode(known)))
                return
        txn.delete(key)

    def _long(self, txn: lmdb.Transaction, key: bytes) -> dict[bytes, bytes]:
        row = _get(txn, key)
        return {} if row is None else _decode_long(_unseal(key, row, "a row of long names"))

    def list_names(
        self, txn: lmdb.Transaction, prefix: bytes, after: bytes
    ) -> tuple[list[bytes], bytes | None]:
        """Return names under `prefix` in order from the key `after` on, and where to go on."""
        found: list[bytes] = []
        whole = _NAMES + prefix
        with _cursor(txn) as cursor:
            if not cursor.set_range(max(whole[: 1 + _LONG_NAME_BYTES], after)):
                return found, None
            for view in cursor.iternext(keys=True, values=False):
                key = bytes(view)
                if len(found) >= _SCAN_ROWS:
                    return found, key
                if key[-1] == 0 and key[:1] == _NAMES:
                    start = key[:-1]
                    if not start.startswith(whole) and not whole.startswith(start):
                        break
                    long = (start + rest for rest in sorted(self._long(txn, key)))
                    found.extend(name[1:] for name in long if name.startswith(whole))
                elif key.startswith(whole):
                    found.append(key[1:])
                elif key > whole:
                    break
        return found, None

    # Snapshots

    def put_pin(self, txn: lmdb.Transaction, name: str, pin: PinRow | None) -> None:
        """Keep a snapshot, or drop it."""
        pins = self._pins(txn)
        if pin is None:
            pins.pop(name, None)
        else:
            pins[name] = pin
        txn.put(_PINS, _seal(_PINS, encode(pins)))

    def pins(self, txn: lmdb.Transaction) -> list[tuple[str, PinRow]]:
        """Return all snapshots, oldest version first."""
        return sorted(self._pins(txn).items(), key=lambda pin: pin[1].version)

    def _pins(self, txn: lmdb.Transaction) -> dict[str, PinRow]:
        row = _get(txn, _PINS)
        return {} if row is None else _decode_pins(_unseal(_PINS, row, "the snapshots"))

    # Objects in the store that nothing names any more

    def garbage(self, txn: lmdb.Transaction) -> Iterator[tuple[str, int, int]]:
        """Yield the keys of dead objects, with the versions between which they lived."""
        for rest, row in _under(txn, _GARBAGE):
            began, dead = _LIFE.unpack_from(_unseal(_GARBAGE + rest, row, "a dead object's row"))
            yield rest.decode(), began, dead

    def put_garbage(self, txn: lmdb.Transaction, key: str, began: int, dead: int) -> None:
        """Note that nothing has named an object since version `dead`."""
        whole = _GARBAGE + key.encode()
        txn.put(whole, _seal(whole, _LIFE.pack(began, dead)))

    def drop_garbage(self, txn: lmdb.Transaction, key: str) -> None:
        """Forget that an object is dead."""
        txn.delete(_GARBAGE + key.encode())

    # Whole rows, for checkpoints

    def dump(self, txn: lmdb.Transaction) -> Iterator[tuple[bytes, bytes]]:
        """Yield all rows as they are stored, in the order of their keys."""
        with _cursor(txn) as cursor:
            if cursor.set_range(_GARBAGE):
                for key, row in cursor.iternext():
                    yield bytes(key), bytes(row)

    def rows_of(
        self,
        txn: lmdb.Transaction,
        names: set[str],
        ids: set[int],
        pages: dict[tuple[int, int], bytes],
        garbage: set[str],
        after: int,
    ) -> Iterator[tuple[bytes, bytes | None]]:
        """Yield the stored rows of names and memory, of given pages and dead objects, of the tail's
        entries after a version, and of sessions and state, in the order of their keys; None for
        what is gone.
        """
        for key in sorted(_GARBAGE + one.encode() for one in garbage):
            yield key, _copy(_get(txn, key))
        for (id, block), row in sorted(pages.items()):
            key = _BLOCKS + key_of(id) + key_of(block)
            yield key, _seal(key, row)
        for key in sorted({_place(_NAMES + name.encode())[0] for name in names}):
            yield key, _copy(_get(txn, key))
        with _cursor(txn) as cursor:
            found = cursor.set_range(_TAIL + key_of(after + 1))
            while found:
                key = bytes(cursor.key())
                if key >= _TAIL_END:
                    break
                yield key, bytes(cursor.value())
                found = cursor.next()
        for id in sorted(ids):
            key = _MEMORIES + key_of(id)
            yield key, _copy(_get(txn, key))
        for prefix in (_SESSIONS, _STATE, _PINS):
            for rest, row in _under(txn, prefix):
                yield prefix + rest, bytes(row)

    def load(self, txn: lmdb.Transaction, rows: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Store rows as `dump` and `rows_of` gave them."""
        for key, row in rows:
            if row is None:
                txn.delete(key)
            else:
                txn.put(key, row)

    def load_pages(self, txn: lmdb.Transaction, rows: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Store those of the rows that tell of pages of memory that exists."""
        known: dict[bytes, bool] = {}
        for key, row in rows:
            if is_page(key) and row is not None:
                id = key[1:9]
                if id not in known:
                    known[id] = _get(txn, _MEMORIES + id) is not None
                if known[id]:
                    txn.put(key, row)

    def drop_lost_pages(self, txn: lmdb.Transaction) -> None:
        """Remove the rows of pages of memory that does not exist."""
        ids: dict[bytes, bool] = {}
        lost: list[bytes] = []
        for rest, _ in _under(txn, _BLOCKS):
            id = rest[:8]
            if id not in ids:
                ids[id] = _get(txn, _MEMORIES + id) is not None
            if not ids[id]:
                lost.append(_BLOCKS + rest)
        for key in lost:
            txn.delete(key)

    def all_pages(self, txn: lmdb.Transaction) -> Iterator[bytes]:
        """Yield the rows of all stored pages, of all memory."""
        for rest, row in _under(txn, _BLOCKS):
            yield bytes(_unseal(_BLOCKS + rest, row, "the row of a page"))

    def references(self, txn: lmdb.Transaction) -> Iterator[Reference]:
        """Yield what the values in bulk files are, of all names."""
        for rest, row in _under(txn, _NAMES):
            if rest[-1:] == b"\0":
                long = _decode_long(_unseal(_NAMES + rest, row, "a row of long names"))
                rows = [memoryview(one) for one in long.values()]
            else:
                rows = [row]
            for one in rows:
                if one[0] == BULK:
                    yield _decode_reference(one[BODY:-8])

    # Memory, sessions, blocks

    def memory_row(self, txn: lmdb.Transaction, id: int) -> MemoryRow | None:
        key = _MEMORIES + key_of(id)
        row = _get(txn, key)
        if row is None:
            return None
        row = _unseal(key, row, f"the row of memory object {id}")
        version, size = _MEMORY.unpack_from(row)
        return MemoryRow(version, size, str(row[_MEMORY.size :], "utf-8"))

    def put_memory(self, txn: lmdb.Transaction, id: int, row: MemoryRow) -> None:
        key = _MEMORIES + key_of(id)
        txn.put(key, _seal(key, _MEMORY.pack(*row[:2]) + row.name.encode()))

    def delete_memory(self, txn: lmdb.Transaction, id: int) -> None:
        txn.delete(_MEMORIES + key_of(id))
        prefix = _BLOCKS + key_of(id)
        with txn.cursor() as cursor:
            found = cursor.set_range(prefix)
            while found and bytes(cursor.key()[: len(prefix)]) == prefix:
                found = cursor.delete()

    def bulk_files(self, txn: lmdb.Transaction) -> Iterator[str]:
        """Yield the files of all large values, in the order of their names."""
        for key, row in _under(txn, _NAMES):
            whole = _NAMES + key
            rows = self._long(txn, whole).values() if whole[-1] == 0 else (row,)
            for one in rows:
                if one[0] == BULK:
                    yield _decode_reference(one[BODY:-8]).file

    def page_rows(self, txn: lmdb.Transaction) -> Iterator[bytes]:
        """Yield the rows of all pages."""
        for _, row in _under(txn, _BLOCKS):
            yield bytes(row[:-8])

    def memory_ids(self, txn: lmdb.Transaction) -> Iterator[int]:
        """Yield the ids of all memory objects."""
        for key, _ in _under(txn, _MEMORIES):
            yield int.from_bytes(key, "big")

    def session(self, txn: lmdb.Transaction, session: bytes) -> SessionState | None:
        key = _SESSIONS + session
        row = _get(txn, key)
        return None if row is None else _decode_session(_unseal(key, row, "a session's row"))

    def put_session(self, txn: lmdb.Transaction, session: bytes, state: SessionState) -> None:
        key = _SESSIONS + session
        txn.put(key, _seal(key, encode(state)))

    def sessions(self, txn: lmdb.Transaction) -> list[tuple[bytes, SessionState]]:
        """Return all sessions that are remembered."""
        return [
            (key, _decode_session(_unseal(_SESSIONS + key, row, "a session's row")))
            for key, row in _under(txn, _SESSIONS)
        ]

    def forget_sessions(self, txn: lmdb.Transaction, floor: int) -> None:
        """Drop the sessions that were last heard of below `floor`."""
        for key, state in self.sessions(txn):
            if state.last_version < floor:
                txn.delete(_SESSIONS + key)

    def pages(
        self, txn: lmdb.Transaction, id: int, first: int, last: int
    ) -> Iterator[tuple[int, bytes]]:
        """Yield the rows of an object's stored pages from block `first` up to `last`."""
        prefix = _BLOCKS + key_of(id)
        with _cursor(txn) as cursor:
            if cursor.set_range(prefix + key_of(first)):
                for view, row in cursor.iternext():
                    key = bytes(view)
                    block = int.from_bytes(key[9:], "big")
                    if key[:9] != prefix or block > last:
                        return
                    yield block, bytes(_unseal(key, row, f"the row of a page of object {id}"))

    def put_block(self, txn: lmdb.Transaction, id: int, block: int, checksum: int) -> None:
        txn.put(_BLOCKS + key_of(id) + key_of(block), checksum.to_bytes(8, "little"))

    def block_checksums(self, txn: lmdb.Transaction, id: int) -> dict[int, int]:
        """Return the checksums of the object's blocks that have one."""
        return {
            int.from_bytes(key, "big"): int.from_bytes(row, "little")
            for key, row in _under(txn, _BLOCKS + key_of(id))
        }

    # Tail

    def put_tail(self, txn: lmdb.Transaction, last_version: int, row: bytes) -> int:
        """Add an entry's encoded `TailRow`; returns how many bytes are stored."""
        key = _TAIL + key_of(last_version)
        sealed = _seal(key, row)
        txn.put(key, sealed)
        return len(sealed)

    def unplayed(self) -> TailRow | None:
        """Return the entry that follows the index and is only in the ring, as after a power cut."""
        with self.read() as txn:
            state = self.state(txn)
        row = self.ring.find(state.position)
        if row is None:
            return None
        found = _decode_tail(row)
        entry = decode_entry(found.entry)
        return found if (entry.base, entry.base_hash) == (state.position, state.hash) else None

    def tail_after(self, txn: lmdb.Transaction, version: int) -> Iterator[tuple[int, TailRow]]:
        """Yield the entries that hold versions after `version`: last version and row, in order."""
        with _cursor(txn) as cursor:
            if cursor.set_range(_TAIL + key_of(version + 1)):
                for view, row in cursor.iternext():
                    key = bytes(view)
                    if key >= _TAIL_END:
                        return
                    yield self._tail_row(key, row)

    def tail_backwards(self, txn: lmdb.Transaction) -> Iterator[tuple[int, TailRow]]:
        """Yield the entries from the newest to the oldest."""
        with _cursor(txn) as cursor:
            if cursor.set_range(_TAIL_END) and cursor.prev():
                for key, row in cursor.iterprev():
                    if key[:1] != _TAIL:
                        return
                    yield self._tail_row(bytes(key), row)

    def tail_sizes_backwards(self, txn: lmdb.Transaction) -> Iterator[tuple[int, int]]:
        """Yield the last version and the row's bytes of each entry, newest first."""
        with _cursor(txn) as cursor:
            if cursor.set_range(_TAIL_END) and cursor.prev():
                for key, row in cursor.iterprev():
                    if key[:1] != _TAIL:
                        return
                    yield int.from_bytes(key[1:], "big"), len(row)

    def trim_tail(self, txn: lmdb.Transaction, up_to: int, most: int) -> tuple[int, list[str]]:
        """Remove up to `most` of the oldest entries, of those that end at or before `up_to`.

        Returns how many bytes they had, and the bulk files that only they needed.
        """
        size = 0
        garbage: list[str] = []
        with txn.cursor() as cursor:
            found = cursor.set_range(_TAIL)
            while found and most:
                key, row = bytes(cursor.key()), cursor.value()
                if key >= _TAIL_END or int.from_bytes(key[1:], "big") > up_to:
                    break
                size += len(row)
                garbage += self._tail_row(key, row)[1].garbage
                found = cursor.delete()
                most -= 1
        return size, garbage

    def _tail_row(self, key: bytes, row: memoryview) -> tuple[int, TailRow]:
        version = int.from_bytes(key[1:], "big")
        body = _unseal(key, row, f"the tail's entry that ends at version {version}")
        try:
            return version, _decode_tail(body)
        except msgspec.DecodeError as error:
            raise CorruptionError(f"the tail's entry {version} cannot be read: {error}") from error


def _reserve_lock_file(path: Path) -> None:
    """Give LMDB's lock file its disk blocks, which a new reader would else need on a full disk.

    Only before the environment is open: closing a descriptor of the file drops LMDB's own lock on
    it, upon which the next process would think itself alone and reset the table of readers.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, _LOCK_FILE_BYTES)
    finally:
        os.close(descriptor)


def _get(txn: lmdb.Transaction, key: bytes) -> memoryview | None:
    try:
        return txn.get(key)
    except lmdb.Error as error:
        raise translate(error, "reading the index") from error


def _copy(row: memoryview | None) -> bytes | None:
    return None if row is None else bytes(row)


@contextlib.contextmanager
def _cursor(txn: lmdb.Transaction) -> Iterator[lmdb.Cursor]:
    with translated("reading the index"), txn.cursor() as cursor:
        yield cursor


def _under(txn: lmdb.Transaction, prefix: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the rows whose keys begin with `prefix`, and the rest of those keys."""
    with _cursor(txn) as cursor:
        if cursor.set_range(prefix):
            for view, row in cursor.iternext():
                key = bytes(view)
                if not key.startswith(prefix):
                    return
                yield key[len(prefix) :], row


def _place(whole: bytes) -> tuple[bytes, bytes | None]:
    """Return the key that holds a name, and what is left of the name when the key is shared."""
    if len(whole) <= 1 + _LONG_NAME_BYTES:
        return whole, None
    return whole[: 1 + _LONG_NAME_BYTES] + b"\0", whole[1 + _LONG_NAME_BYTES :]


def _name_row(key: bytes, sealed: memoryview, name: str) -> NameRow:
    if not _is_sealed(key, sealed):
        raise CorruptionError(
            f"the index's row of {name!r} does not match its checksum: restore it from a copy",
            name=name,
        )
    kind, id, version, size = _NAME.unpack_from(sealed)
    return NameRow(kind, id, version, size, sealed[BODY:-8])
