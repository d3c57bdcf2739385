"""A pool written out as a tree of plain files that any program reads."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    describe,
)
from everpool.cli.files import CHUNK_BYTES, DATA_HASH_FROM_BYTES, FileWriter, pieces
from everpool.cli.layout import JOURNAL, Layout
from everpool.cli.manifest import Journal, Unfinished
from everpool.cli.tagged import to_json
from everpool.cli.terminal import Meter
from everpool.errors import (
    ConflictError,
    CorruptionError,
    ExistsError,
    InvalidError,
    NotFoundError,
)

_ATTEMPTS = 3

Reader = everpool.Pool | everpool.Transaction


@dataclass
class Exported:
    """What an export wrote."""

    folder: str
    objects: int = 0
    bytes: int = 0
    pool_version: int | None = None
    damaged: dict[str, str] = field(default_factory=dict[str, str])


def export_pool(
    pool: everpool.Pool,
    folder: Path,
    *,
    prefix: str = "",
    force: bool = False,
    live: bool = False,
    meter: Meter,
) -> Exported:
    """Write every object whose name begins with `prefix` to `folder`, and a manifest.

    All objects are of one version, read in one transaction; with `live` each is as it is when its
    turn comes, and memory chunk by chunk. Objects that are damaged are left out and named in the
    result. A run that was interrupted is finished by running it again.

    Raises `ExistsError` when the folder holds anything but an unfinished export and `force` is
    not given, and `ConflictError` when others changed what was being read, three times in a row.
    """
    stale = _prepare(folder, force)
    journal = Journal(folder, prefix=prefix, force=force)
    try:
        if live:
            result, written = _write_all(pool, pool, folder, journal, prefix, meter)
        else:
            result, written = _write_snapshot(pool, folder, journal, prefix, meter)
        for file in stale - written:
            (folder / file).unlink(missing_ok=True)
        journal.finish(result.pool_version, result.damaged)
    finally:
        journal.close()
    return result


def _prepare(folder: Path, force: bool) -> set[str]:
    """Make the folder ready; returns the files that an interrupted export left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / JOURNAL).exists():
        unfinished = Unfinished(folder)
        if unfinished.settings.get("force") and not force:
            raise ExistsError(f"the unfinished export in {folder} was begun with --force: add it")
        return unfinished.files
    if not force and any(folder.iterdir()):
        raise ExistsError(
            f"{folder} is not empty: name another folder, or overwrite its files with --force"
        )
    return set()


def _write_snapshot(
    pool: everpool.Pool, folder: Path, journal: Journal, prefix: str, meter: Meter
) -> tuple[Exported, set[str]]:
    conflict = None
    for _ in range(_ATTEMPTS):
        journal.restart()
        try:
            with pool.transaction() as tx:
                result, written = _write_all(pool, tx, folder, journal, prefix, meter)
        except ConflictError as error:
            conflict = error
            continue
        result.pool_version = tx.version
        return result, written
    raise ConflictError(
        f"others kept changing what was being exported ({conflict}): pause them, or use --live to "
        "take each object as it is when its turn comes"
    )


def _write_all(
    pool: everpool.Pool, reader: Reader, folder: Path, journal: Journal, prefix: str, meter: Meter
) -> tuple[Exported, set[str]]:
    result = Exported(str(folder))
    written: set[str] = set()
    names = list(reader.names(prefix))
    layout = Layout(names)
    for name in names:
        try:
            facts = _write_object(pool, reader, name, folder, layout, meter)
        except CorruptionError as error:
            result.damaged[name] = str(error)
            continue
        except NotFoundError:
            continue  # deleted since the names were read
        journal.add(name, facts)
        written.add(facts["file"])
        result.objects += 1
        result.bytes += facts["size"]
    return result, written


def _write_object(
    pool: everpool.Pool, reader: Reader, name: str, folder: Path, layout: Layout, meter: Meter
) -> dict[str, Any]:
    value: Any = reader[name]
    facts = describe(name, value)
    kind = facts["kind"]
    suffix = arrow_files.suffix_for(value) if kind in (TABLE, BATCH) else _SUFFIXES[kind]
    path = layout.path_of(name, suffix)
    _make_parents(folder, folder / path)
    meter.begin(name, facts["size"])
    memory = kind in (MEMORY, MEMORY_ARRAY)
    data_hash = memory and facts["size"] >= DATA_HASH_FROM_BYTES
    with FileWriter(folder / path, meter, data_hash=data_hash) as file:
        if memory:
            if kind == MEMORY_ARRAY:
                npy.write_header(value.dtype, value.shape, file)
            write_memory(reader.memory(name), pool.memory(name).extents(), file)
        else:
            write_value(kind, value, file, suffix)
    del facts["name"]
    if "dtype" in facts and (items := npy.layout_of(value.dtype)) is not None:
        facts["layout"] = items
    return {"file": str(path), **facts, "file_size": file.size, **file.hash}


def _make_parents(folder: Path, path: Path) -> None:
    """Create the folders that lead to `path`, none of which may be a link to elsewhere."""
    steps = path.relative_to(folder).parts[:-1]
    here = folder
    for step in steps:
        here = here / step
        here.mkdir(exist_ok=True)
        if here.is_symlink():
            raise InvalidError(f"{here} is a link: everpool writes only inside {folder}; remove it")


def write_memory(
    memory: MemoryHandle, extents: Iterable[tuple[int, int]], file: FileWriter
) -> None:
    """Append the bytes of memory, of which all outside of `extents` are zero.

    They are read in pieces of 4 MiB, each an untorn copy; those that a transaction reads are all
    of its version.
    """
    done = 0
    for offset, size in pieces(extents, memory.size):
        file.skip(offset - done)
        file.write(memory.read(offset, size))
        done = offset + size
    file.skip(memory.size - done)
    # In a transaction this raises when the name stands for another object now.
    memory.read(0, 1)


def write_value(kind: str, value: Any, file: FileWriter, suffix: str) -> None:
    """Write a value of `kind` to `file`; `suffix` chooses among the formats of a table."""
    if kind in (TABLE, BATCH):
        arrow_files.write_table(value, file, suffix)
    else:
        _WRITERS[kind](value, file)


def _write_json(value: object, file: FileWriter) -> None:
    file.write(to_json(value, indent=2).encode() + b"\n")


def _write_bytes(value: bytes, file: FileWriter) -> None:
    for start in range(0, len(value), CHUNK_BYTES):
        file.write(memoryview(value)[start : start + CHUNK_BYTES])


_WRITERS: dict[str, Callable[[Any, FileWriter], None]] = {
    BYTES: _write_bytes,
    TEXT: _write_json,
    JSON: _write_json,
    ARRAY: npy.write_array,
}

_SUFFIXES = {
    BYTES: "",
    TEXT: ".json",
    JSON: ".json",
    ARRAY: ".npy",
    MEMORY: "",
    MEMORY_ARRAY: ".npy",
}
