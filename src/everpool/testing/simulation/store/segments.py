"""A replica as objects of a store: rows in runs, blocks of memory in pages, and a manifest.

The objects' bytes are the real ones (`everpool.segments.format`); the rows are those of a simple
replica:

    "0" key             a dead object: the versions between which it lived
    "1" id, block       the row of a page (8 + 8)
    "2" name            what it is bound to
    "4" id              the size of memory (8)
    "6"                 the rest
"""

from collections.abc import Mapping

import msgspec
from xxhash import xxh3_64_intdigest

from everpool.errors import CorruptionError, NotFoundError
from everpool.segments.checkpoints import key_of_pages, read_manifest, read_run
from everpool.segments.format import Manifest, Page, Past, Row, Run, encode_run, read_page_row
from everpool.store import Store
from everpool.testing.memory_replica import Checkpoint, MemoryReplica
from everpool.testing.memory_replica import Row as Bound

BLOCK = 16
Place = tuple[int, int]
Rows = dict[bytes, bytes]
_DEAD, _PAGE, _NAME, _MEMORY, _STATE = b"0", b"1", b"2", b"4", b"6"
_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.decode
_MOST_DELTAS = 3


def rows_of(replica: MemoryReplica, pages: Mapping[Place, bytes]) -> Rows:
    """Return all rows of a replica, whose memory is in pages."""
    state = _decode(replica.checkpoint(), type=Checkpoint)
    rows: Rows = {}
    for key, life in state.garbage:
        rows[_DEAD + key.encode()] = _encode(life)
    for (id, block), row in pages.items():
        rows[page_key((id, block))] = row
    for name, *bound in state.names:
        rows[_NAME + name.encode()] = _encode(bound)
    for id, content in state.memory:
        rows[_MEMORY + id.to_bytes(8, "big")] = _encode(len(content))
    state.garbage, state.names, state.memory = [], [], []
    rows[_STATE] = _encode(state)
    return rows


def page_key(place: Place) -> bytes:
    """Return the key of the row of a page."""
    return _PAGE + place[0].to_bytes(8, "big") + place[1].to_bytes(8, "big")


def pages_in(rows: Rows) -> dict[Place, bytes]:
    """Return the rows of pages of memory that exists, by place."""
    return {
        (id, int.from_bytes(key[9:], "big")): row
        for key, row in rows.items()
        if key[:1] == _PAGE
        and _MEMORY + (id := int.from_bytes(key[1:9], "big")).to_bytes(8, "big") in rows
    }


def changes(before: Rows, after: Rows) -> list[Row]:
    """Return the rows that make `after` of `before`."""
    keys = sorted({*before, *after})
    return [(key, after.get(key)) for key in keys if before.get(key) != after.get(key)]


def put_page(store: Store, key: str, data: bytes) -> Page:
    """Upload one page."""
    store.put(key, data)
    return Page(key.rpartition("/")[2], 0, len(data), xxh3_64_intdigest(data))


def put_run(store: Store, key: str, rows: list[Row], after: int, to: int) -> Run:
    """Upload rows."""
    data = encode_run(rows)
    store.put(key, data)
    return Run(key, len(data), after, to)


def is_folded(runs: list[Run]) -> bool:
    """Whether the next checkpoint is to write all rows anew."""
    return len({run.version for run in runs if run.after}) >= _MOST_DELTAS


def read_rows(store: Store, manifest: Manifest, after: int = -1) -> Rows:
    """Return the rows of those of a manifest's runs that go beyond a version."""
    rows: Rows = {}
    for run in manifest.runs:
        if run.version > after:
            for key, row in read_run(store, run):
                if row is None:
                    rows.pop(key, None)
                else:
                    rows[key] = row
    return rows


def read_page(store: Store, row: bytes) -> bytes:
    """Return a page; raises `CorruptionError` when it is not what its row says."""
    page = read_page_row(row)
    try:
        data = store.get(key_of_pages(page.segment)).data
    except NotFoundError as error:
        raise CorruptionError(f"the page {page.segment} is gone") from error
    if (len(data), xxh3_64_intdigest(data)) != (page.length, page.checksum):
        raise CorruptionError(f"the page {page.segment} is another one")
    return data


def replica_of(
    kind: type[MemoryReplica],
    rows: Rows,
    contents: Mapping[Place, bytes],
    files: Mapping[str, bytes],
) -> MemoryReplica:
    """Return the replica of rows, with the contents of its pages."""
    if not rows:
        return kind(files=files)
    state = _decode(rows[_STATE], type=Checkpoint)
    sizes: dict[int, int] = {}
    for key, row in sorted(rows.items()):
        if key[:1] == _DEAD:
            state.garbage.append((key[1:].decode(), _decode(row, type=tuple[int, int])))
        elif key[:1] == _NAME:
            bound = _decode(row, type=Bound)
            state.names.append((key[1:].decode(), bound.id, bound.size, bound.payload))
        elif key[:1] == _MEMORY:
            sizes[int.from_bytes(key[1:], "big")] = _decode(row, type=int)
    memory = {id: bytearray(size) for id, size in sizes.items()}
    for (id, block), data in contents.items():
        memory[id][block * BLOCK : block * BLOCK + len(data)] = data
    state.memory = [(id, bytes(data)) for id, data in memory.items()]
    return kind.from_checkpoint(_encode(state), files=files)


def places_of(store: Store, key: str) -> list[Past]:
    """Return where a replica may begin, by the manifest under a key; at version 0 at least."""
    places = [Past(0, 0, 0, "")]
    if key:
        found = read_manifest(store, key)
        places += [*found.past, Past(found.version, found.time_ns, found.position, key)]
    return places

