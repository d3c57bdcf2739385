"""A tree of files, or an exported folder, carried into a pool."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

import everpool
from everpool.cli import arrow_files, npy
from everpool.cli.describe import (
    ARRAY,
    BATCH,
    BYTES,
    JSON,
    MEMORY,
    MEMORY_ARRAY,
    TABLE,
    TEXT,
    MemoryHandle,
    kind_of,
)
from everpool.cli.files import (
    add_array,
    data_chunks,
    data_hash_file,
    file_extents,
    hash_file,
    pieces,
)
from everpool.cli.manifest import read_manifest
from everpool.cli.markers import IMPORTING, marker_of
from everpool.cli.tagged import from_json, to_json
from everpool.cli.terminal import Meter
from everpool.errors import CorruptionError, ExistsError, InvalidError

_BATCH_BYTES = 4 << 20
_BATCH_OBJECTS = 256
_ONE_COMMIT_BYTES = 16 << 20


@dataclass(frozen=True)
class Item:
    """A file, and the object it is to become."""

    name: str
    path: Path
    kind: str
    file_size: int
    sha256: str | None = None
    data_sha256: str | None = None
    layout: dict[str, Any] | None = None


@dataclass
class Imported:
    """What an import stored, found equal already, and left out (with the reason)."""

    folder: str
    objects: int = 0
    bytes: int = 0
    unchanged: int = 0
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    as_bytes: list[str] = field(default_factory=list[str])


def import_tree(
    pool: everpool.Pool,
    folder: Path,
    *,
    pool_path: Path | None,
    prefix: str = "",
    force: bool = False,
    meter: Meter,
) -> Imported:
    """Store every file below `folder` under its relative path with `prefix` before it.

    `pool_path` is the pool's own folder, resolved, which is not imported; None: it has none.

    An .npy file becomes an array, any other file bytes. A folder written by export is recognised
    by its manifest: names and types are restored, and each file must be what its SHA-256 says. A
    name that exists is left alone when it holds the same already, so a run that was interrupted
    is finished by running it again; when it holds something else nothing is imported and
    `ExistsError` is raised, unless `force` replaces it.
    """
    result = Imported(str(folder))
    items = list(_items(folder, pool_path, prefix, result))
    todo = _not_there_yet(pool, items, force, meter)
    result.unchanged = len(items) - len(todo)
    meter.begin("storing", sum(item.file_size for item in todo))
    small: list[tuple[Item, object]] = []
    size_bytes = 0
    for item in todo:
        _check_file(item)
        if item.kind in (MEMORY, MEMORY_ARRAY):
            _store_memory(pool, item, meter)
        else:
            small.append((item, load_value(item)))
            size_bytes += item.file_size
        if size_bytes >= _BATCH_BYTES or len(small) >= _BATCH_OBJECTS:
            _store_values(pool, small, force, meter)
            small, size_bytes = [], 0
        result.objects += 1
        result.bytes += item.file_size
    _store_values(pool, small, force, meter)
    return result


def _items(folder: Path, pool_path: Path | None, prefix: str, result: Imported) -> Iterator[Item]:
    if not folder.is_dir():
        raise InvalidError(f"{folder} is not a folder: name one, or store a file with everpool put")
    manifest = read_manifest(folder)
    if manifest is None:
        yield from _plain_items(folder, pool_path, prefix, result)
        return
    for name, facts in manifest.items():
        path = folder / facts["file"]
        kind = str(facts.get("kind"))
        if kind not in _KINDS:
            raise InvalidError(f"the manifest gives {name!r} a kind that is not known: {kind!r}")
        known = {key: facts.get(key) for key in ("sha256", "data_sha256", "layout")}
        yield Item(prefix + name, path, kind, path.stat().st_size, **known)


def _plain_items(
    folder: Path, pool_path: Path | None, prefix: str, result: Imported
) -> Iterator[Item]:
    for parent, folders, files in os.walk(folder):
        # The pool itself may lie inside the tree.
        folders[:] = sorted(f for f in folders if (Path(parent) / f).resolve() != pool_path)
        for file in sorted(files):
            path = Path(parent) / file
            relative = path.relative_to(folder).as_posix()
            try:
                relative.encode()
            except UnicodeEncodeError:
                result.left_out[ascii(relative)] = "its name is not UTF-8"
                continue
            if not path.is_file():
                result.left_out[relative] = "neither a file nor a link to one"
                continue
            kind = ARRAY if path.suffix == ".npy" else BYTES
            if kind == ARRAY and not _is_npy(path):
                kind = BYTES
                result.as_bytes.append(relative)
            yield Item(prefix + relative, path, kind, path.stat().st_size)


def _is_npy(path: Path) -> bool:
    try:
        npy.read_array(path)
    except InvalidError:
        return False
    return True


def _not_there_yet(pool: everpool.Pool, items: list[Item], force: bool, meter: Meter) -> list[Item]:
    """Return the items that must be stored; raises before any is when a name is taken."""
    todo: list[Item] = []
    taken: list[str] = []
    meter.begin("comparing with what the pool holds", sum(item.file_size for item in items))
    for item in items:
        if item.name not in pool or marker_of(IMPORTING, item.name) in pool:
            todo.append(item)
        elif not _holds_the_same(pool, item):
            todo.append(item)
            taken.append(item.name)
        meter.advance(item.file_size)
    if taken and not force:
        shown = ", ".join(repr(name) for name in taken[:3])
        more = f" and {len(taken) - 3} more" if len(taken) > 3 else ""
        raise ExistsError(
            f"the pool holds something else under {shown}{more}: import under another --prefix, "
            "or replace them with --force",
            names=taken,
        )
    return todo


def _holds_the_same(pool: everpool.Pool, item: Item) -> bool:
    stored: Any = pool[item.name]
    if kind_of(stored) != item.kind:
        return False
    if item.kind in (MEMORY, MEMORY_ARRAY):
        return _same_memory(pool, stored, item)
    value = load_value(item)
    if item.kind == ARRAY:
        return _same_array(stored, value)
    if item.kind in (TABLE, BATCH):
        return stored.equals(value, check_metadata=True)
    return stored == value if item.kind == BYTES else to_json(stored) == to_json(value)


def _same_array(one: "np.ndarray[Any, Any]", other: "np.ndarray[Any, Any]") -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    order = "F" if one.flags.fnc and other.flags.fnc else "C"
    return _digest(one, order) == _digest(other, order)


def _digest(array: "np.ndarray[Any, Any]", order: Literal["C", "F"]) -> bytes:
    digest = hashlib.blake2b()
    add_array(digest, array, order)
    return digest.digest()


def _same_memory(pool: everpool.Pool, stored: Any, item: Item) -> bool:
    memory = pool.memory(item.name)
    before = _bytes_before(item)
    if item.kind == MEMORY_ARRAY:
        array = npy.read_array(item.path, item.layout)
        if stored.dtype != array.dtype or stored.shape != array.shape:
            return False
    if memory.size != item.file_size - before:
        return False
    with item.path.open("rb") as file:
        extents = sorted([*memory.extents(), *file_extents(file, before)])
        return all(
            memory.read(offset, size) == os.pread(file.fileno(), size, before + offset)
            for offset, size in pieces(extents, memory.size)
        )


def _bytes_before(item: Item) -> int:
    """Return how many bytes stand before the memory's own in its file."""
    return npy.data_offset(item.path) if item.kind == MEMORY_ARRAY else 0


def _check_file(item: Item) -> None:
    same = item.sha256 is None or hash_file(item.path) == item.sha256
    if item.data_sha256 is not None:
        same = data_hash_file(item.path, _bytes_before(item)) == item.data_sha256
    if not same:
        raise CorruptionError(
            f"{item.path} is not what was exported (its SHA-256 differs): restore it from a copy",
            name=item.name,
        )


def load_value(item: Item) -> Any:
    """Return the value that an item's file holds; raises `InvalidError` when it holds none."""
    if item.kind == BYTES:
        return item.path.read_bytes()
    if item.kind == ARRAY:
        return npy.read_array(item.path, item.layout)
    if item.kind in (TABLE, BATCH):
        return arrow_files.read_table(item.path, item.kind)
    return from_json(item.path.read_bytes())


def _store_values(
    pool: everpool.Pool, values: list[tuple[Item, object]], force: bool, meter: Meter
) -> None:
    """Store values in one commit."""

    def store(tx: everpool.Transaction) -> None:
        for item, value in values:
            _make_room(tx, item.name, force)
            tx[item.name] = value

    if values:
        pool.run(store)
    meter.advance(sum(item.file_size for item, _ in values))


def _make_room(tx: everpool.Transaction, name: str, force: bool) -> None:
    if name in tx:
        if not force:
            raise ExistsError(f"{name!r} was stored by somebody else meanwhile", name=name)
        del tx[name]


def _store_memory(pool: everpool.Pool, item: Item, meter: Meter) -> None:
    """Allocate memory and fill it: in one commit where it is small, else resumable by a marker."""
    before = _bytes_before(item)
    one_commit = item.file_size <= _ONE_COMMIT_BYTES
    marker = marker_of(IMPORTING, item.name)

    def begin(tx: everpool.Transaction) -> None:
        # Taken names were refused before anything was stored, or are to be replaced.
        if item.name in tx:
            del tx[item.name]
        memory = _allocate(tx, item)
        if one_commit:
            _fill(memory, item.path, before)
        else:
            tx[marker] = {"name": item.name, "file": str(item.path)}

    pool.run(begin)
    if one_commit:
        meter.advance(item.file_size)
        return
    _fill(pool.memory(item.name), item.path, before, meter)
    del pool[marker]


def _allocate(tx: everpool.Transaction, item: Item) -> MemoryHandle:
    if item.kind == MEMORY:
        return tx.allocate(item.name, item.file_size)
    array = npy.read_array(item.path, item.layout)
    if not array.flags.c_contiguous:
        raise InvalidError(f"{item.path} is not in C order, as allocated arrays are")
    tx.allocate_array(item.name, array.shape, array.dtype)
    return tx.memory(item.name)


def _fill(memory: MemoryHandle, path: Path, before: int, meter: Meter | None = None) -> None:
    with path.open("rb") as file:
        for offset, data in data_chunks(file, before):
            if np.frombuffer(data, np.uint8).any():
                memory.write(offset, data)
            if meter is not None:
                meter.advance(len(data))


_KINDS = frozenset((ARRAY, BATCH, BYTES, JSON, MEMORY, MEMORY_ARRAY, TABLE, TEXT))
