"""A process of its own for a test, a power cut for its pool, and commits that are held back.

@own_process
def test_...(path): ...            # may change modules, hang or crash: it ends with its process

with held_back(pool): ...          # what is pipelined here becomes one batch
pages = meta_pages(path)           # how far LMDB's file is durable for sure, until the next flush
cut_power(path, pages)             # takes back the rest; close the pool first
rebooted(path, function, *args)    # function(pool, *args), in another process and boot
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import everpool
from support.processes import call

LIMIT_S = 30.0
_META_BYTES = 8192
# Behind LMDB's own bytes, in the first sector of each, entries may lie.
_SECTOR_BYTES = 512


def own_process(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a process of its own; one that hangs or crashes there fails."""

    @functools.wraps(test)
    def run(**given: Any) -> None:
        call(functools.partial(test, **given), timeout_s=LIMIT_S)

    return run


@contextlib.contextmanager
def held_back(pool: Any) -> Iterator[None]:
    """Let no queued commit begin before the end of the block."""
    with pool.engine().committer._leader:
        yield


def in_one_batch(pool: Any, *changes: Callable[[Any], None]) -> list[Any]:
    """Pipeline a transaction for each of the changes, all in one batch."""
    with held_back(pool):
        return [pipelined(pool, change) for change in changes]


def pipelined(pool: Any, change: Callable[[Any], None]) -> Any:
    """Return a transaction that is on its way."""
    with pool.transaction(wait=False) as tx:
        change(tx)
    return tx


def meta_pages(path: Path) -> bytes:
    """Return the pages that say what the rest of the index's file means."""
    with open(path / "index" / "data.mdb", "rb") as file:
        return file.read(_META_BYTES)


def cut_power(path: Path, pages: bytes) -> None:
    """Take back every change of what LMDB has in the meta pages since `pages` were read."""
    with open(path / "index" / "data.mdb", "r+b") as file:
        for start in range(0, _META_BYTES, _META_BYTES // 2):
            file.seek(start)
            file.write(pages[start : start + _SECTOR_BYTES])


def new_boot() -> None:
    """Let this process take what it opens from now on for the leftovers of an earlier boot."""
    os.environ["EVERPOOL_BOOT_ID"] = os.urandom(16).hex()


def rebooted(path: Path, function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(pool, *args)` of a process that finds the pool after a reboot."""

    def look() -> Any:
        new_boot()
        with everpool.open(path) as pool:
            return function(pool, *args)

    return call(look, timeout_s=LIMIT_S)


def elsewhere(path: Path, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return `function(pool, *args)` of another process."""

    def look() -> Any:
        with everpool.open(path, **options) as pool:
            return function(pool, *args)

    return call(look, timeout_s=LIMIT_S)
