"""Changes that touch every part of a pool, and looks that see whether all of one is there.

A scene changes a pool from state k to state k + 1 in one commit, and knows how to tell the state.
A pool that shows a mixture of two states fails the look.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import everpool
from everpool.replica import flush, verify
from everpool.replica.index import BULK

LARGE_BYTES = 100_000  # above what lies inline in the index
STORE_BYTES = (1 << 20) + 5000  # above what a record carries
ROW_BYTES = 300_000  # above what the ring of newest entries holds
_ROW_AT = 3 << 20
ACCOUNTS = 50
START = 1000


def pattern(number: int, size: int) -> bytes:
    """Return bytes in which no two numbers agree anywhere."""
    return (number % (1 << 64)).to_bytes(8, "little") * (size // 8)


def number_of(data: bytes | memoryview) -> int:
    """Return the number whose pattern this is; fails when it is torn."""
    words = np.frombuffer(data, "<u8")
    assert (words == words[0]).all(), f"torn: {np.unique(words)}"
    return int(words[0])


def prepare(path: Path) -> None:
    """Make a pool in state 0 of every scene."""
    with everpool.open(path) as pool:
        pool.allocate("mem", 1 << 20)
        pool.allocate("wide", 4 << 20)
        pool.allocate("counter", 1 << 16)
        pool.allocate_array("accounts", ACCOUNTS, "i8")[:] = START
        pool["value"] = pattern(0, LARGE_BYTES)
        pool.update({"number": 0, "large": pattern(0, LARGE_BYTES)})
        pool["file/0"] = pattern(0, LARGE_BYTES)
        pool.allocate("object/0", 3 << 12)


def change(pool: Any) -> None:
    """Change names, values of both kinds and memory, and replace objects, in one transaction."""
    with pool.transaction() as tx:
        number = tx["number"] + 1
        tx["number"] = number
        tx["large"] = pattern(number, LARGE_BYTES)
        memory = tx.memory("mem")
        memory.write(0, pattern(number, 8))
        memory.write(4088, pattern(number, 16))
        memory.write(700_000, pattern(number, 8000))
        for name in [*tx.names("object/"), *tx.names("file/")]:
            del tx[name]
        tx[f"file/{number}"] = pattern(number, LARGE_BYTES)
        tx.allocate(f"object/{number}", 3 << 12).write(4096, pattern(number, 8))


def changed(pool: Any) -> int:
    """Return the state that `change` left; everything is looked at in one transaction."""
    with pool.transaction() as tx:
        seen = [tx["number"], number_of(tx["large"])]
        memory = tx.memory("mem")
        for offset, size in ((0, 8), (4088, 16), (700_000, 8000)):
            seen.append(number_of(memory.read(offset, size)))
        (file,) = tx.names("file/")
        (object,) = tx.names("object/")
        seen += [int(file[5:]), number_of(tx[file]), int(object[7:])]
        if seen[0]:
            seen.append(number_of(tx.memory(object).read(4096, 8)))
    assert len(set(seen)) == 1, f"states are mixed: {seen}"
    return int(seen[0])


def glanced(pool: Any) -> int:
    """Return the state that `change` left, looked at without a transaction while nothing moves."""
    memory = pool.memory("mem")
    (object,) = pool.names("object/")
    (file,) = pool.names("file/")
    seen = [pool["number"], number_of(pool["large"]), int(object[7:]), int(file[5:])]
    seen += [number_of(memory[0:8]), number_of(memory[4088:4104]), number_of(pool[file])]
    seen += [number_of(memory.read(700_000, 8000))]
    if seen[0]:
        seen.append(number_of(pool.memory(object)[4096:4104]))
    assert len(set(seen)) == 1, f"states are mixed: {seen}"
    return int(seen[0])


def put_large(pool: Any) -> None:
    """Replace a value in a file of its own."""
    pool["value"] = pattern(number_of(pool["value"]) + 1, LARGE_BYTES)


def put(pool: Any) -> int:
    return number_of(pool["value"])


def store_large(pool: Any) -> None:
    """Write more bytes of memory than a record carries."""
    memory = pool.memory("wide")
    memory.write(8, pattern(number_of(memory.read(8, STORE_BYTES)) + 1, STORE_BYTES))


def stored(pool: Any) -> int:
    return number_of(pool.memory("wide").read(8, STORE_BYTES))


def write_row(pool: Any) -> None:
    """Write what makes an entry too large for the ring of newest entries."""
    with pool.transaction() as tx:
        memory = tx.memory("wide")
        memory.write(_ROW_AT, pattern(number_of(memory.read(_ROW_AT, 8)) + 1, ROW_BYTES))


def row_written(pool: Any) -> int:
    return number_of(pool.memory("wide").read(_ROW_AT, ROW_BYTES))


def add(pool: Any) -> None:
    """Add to a number that lies across two pages."""
    pool.memory("counter").fetch_add(4092, 1)


def added(pool: Any) -> int:
    return int.from_bytes(pool.memory("counter").read(4092, 8), "little")


def pipeline(pool: Any) -> None:
    """Commit without waiting, then wait: the same through a queue."""
    with pool.transaction(wait=False) as tx:
        tx["number"] = number = tx["number"]
        tx["pipelined"] = number
    tx.committed.result(60)


def tidy(pool: Any) -> None:
    """Make memory durable and trim the tail, right up to now."""
    pool.engine().flush()


def short_tail() -> None:
    """Keep nothing of the tail that is not needed, so that every flush trims."""
    flush.KEPT_VERSIONS = 0


class Scene(NamedTuple):
    """What one commit does, and how to tell that it was done: `look` counts up by one."""

    act: Callable[[Any], None]
    look: Callable[[Any], int]


SCENES = {
    "change": Scene(change, changed),
    "put": Scene(put_large, put),
    "store": Scene(store_large, stored),
    "row": Scene(write_row, row_written),
    "add": Scene(add, added),
}


def leftovers(pool: Any) -> list[str]:
    """Return the files in the pool's folder that nothing refers to."""
    replica = pool.engine().replica
    index = replica.index
    wanted = {"memory": set[str](), "values": set[str](), "staging": set[str]()}
    with index.read() as txn:
        wanted["memory"] |= {f"{id:x}" for id in index.memory_ids(txn)}
        for _, row in index.tail_after(txn, 0):
            wanted["values"] |= set(row.garbage)
    for name in pool.names():
        row = replica.find(name).row
        if row is not None and row.kind == BULK:
            wanted["values"].add(row.reference().file)
    return [
        f"{folder}/{file}"
        for folder, known in wanted.items()
        for file in os.listdir(pool.path / folder)
        if file not in known
    ]


def check_sound(path: Path) -> None:
    """Read the whole pool and compare it with its checksums. Call it in a process of its own."""
    sys.argv[1:] = [os.fspath(path)]
    said = path.parent / "said by verify"
    with open(said, "w") as out, contextlib.redirect_stdout(out):
        try:
            verify.main()
        except SystemExit as end:
            code = end.code
    assert code == 0, said.read_text()
