"""Reading everything and comparing it with its checksums.

LMDB trusts its own pages: a damaged one can crash whoever reads it. So the reading is done by a
child process (`python -m everpool.replica.verify FOLDER`) that reports in JSON lines, and whose
death is reported as damage.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lmdb

from everpool import values
from everpool.errors import EverpoolError
from everpool.records import decode_entry, next_hash
from everpool.replica.dirty import BLOCK_SHIFT, Dirty
from everpool.replica.effects import effects_of, entry_of
from everpool.replica.flush import block_checksum
from everpool.replica.index import BULK, INLINE, MEMORY, NameRow
from everpool.replica.replica import Replica

_REPORT_EVERY_S = 0.1
_LOOKS = 100


class Damage(NamedTuple):
    """One thing that is not as it was written: what it concerns, and what is wrong."""

    name: str
    detail: str


class Report(NamedTuple):
    """What `verify` found. `ok` means that all checksums matched."""

    damage: list[Damage]
    bytes_read: int
    names: int

    @property
    def ok(self) -> bool:
        return not self.damage


def verify_folder(
    folder: Path, progress: Callable[[int, int], None] | None = None, *, index_only: bool = False
) -> Report:
    """Check the pool in `folder` in a child process."""
    command = [sys.executable, "-m", "everpool.replica.verify", os.fspath(folder)]
    if index_only:
        command.append("--index-only")
    damage: list[Damage] = []
    last: dict[str, Any] = {}
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as child:
        try:
            assert child.stdout is not None and child.stderr is not None
            for line in child.stdout:
                last = json.loads(line)
                if "damage" in last:
                    damage.append(Damage(*last["damage"]))
                elif progress is not None:
                    progress(last["read"], last["total"])
            trouble = child.stderr.read().decode(errors="replace").strip()
        except BaseException:
            child.kill()
            raise
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        damage.append(Damage("index", f"reading it ended in {name}: its pages are damaged"))
    elif child.returncode > 1:
        damage.append(Damage("index", f"reading it failed: {trouble.splitlines()[-1:]}"))
    return Report(damage, last.get("read", 0), last.get("names", 0))


def walk_index(folder: Path) -> list[str]:
    """Return what is wrong with the index, in words."""
    return [detail for _, detail in verify_folder(folder, index_only=True).damage]


class _Checker:
    """The child's side."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read = self.total = self.names = 0
        self.found = 0
        self._reported = 0.0

    def say(self, **facts: Any) -> None:
        print(json.dumps(facts), flush=True)

    def damage(self, name: str, detail: str) -> None:
        self.found += 1
        self.say(damage=[name, detail], read=self.read, total=self.total, names=self.names)

    def count(self, size: int) -> None:
        self.read += size
        now = time.monotonic()
        if now - self._reported > _REPORT_EVERY_S:
            self._reported = now
            self.say(read=self.read, total=max(self.total, self.read), names=self.names)

    def run(self, index_only: bool) -> int:
        try:
            self.replica = Replica(self.folder, read_only=True)
        except (EverpoolError, OSError, lmdb.Error) as error:
            self.damage("pool", f"it cannot be opened: {error}")
            return 1
        for check in (self.check_rows, self.check_tail):
            self._guarded("index", check)
        if not index_only:
            self._guarded("index", self.check_names)
        self.say(read=self.read, total=self.read, names=self.names)
        return 1 if self.found else 0

    def _guarded(self, name: str, check: Callable[[], None]) -> None:
        try:
            check()
        except (EverpoolError, OSError, lmdb.Error, ValueError) as error:
            self.damage(name, str(error))

    def check_rows(self) -> None:
        """Read every row, so that a damaged page shows."""
        index = self.replica.index
        with index.read() as txn:
            index.state(txn)
            expected, rows, previous = txn.stat()["entries"], 0, b""
            for view, row in txn.cursor():
                rows += 1
                self.total += len(row)
                key = bytes(view)
                if rows > expected or key <= previous:
                    raise ValueError("its pages are damaged: keys are out of order")
                previous = key
            if rows != expected:
                self.damage("index", f"it has {rows} rows instead of {expected}")
            index.sessions(txn)
            for id in index.memory_ids(txn):
                index.memory_row(txn, id)

    def check_tail(self) -> None:
        """Check that the entries follow one another, and lead to where the index is."""
        index = self.replica.index
        with index.read() as txn:
            state = index.state(txn)
            running, version = b"", -1
            for last, row in index.tail_after(txn, 0):
                base = decode_entry(row.entry).base_hash
                if running and (base != running or row.first_version != version + 1):
                    self.damage(
                        "tail", f"version {row.first_version} does not follow the one before"
                    )
                running, version = next_hash(base, row.entry), last
                self.count(len(row.entry))
            if running and (running != state.hash or version != state.version):
                self.damage("tail", f"it ends at version {version}, the index at {state.version}")

    def check_names(self) -> None:
        """Check every name and what it is bound to."""
        for name in self.replica.names(""):
            self._guarded(name, lambda name=name: self._check_name(name))

    def _check_name(self, name: str) -> None:
        row = self.replica.find(name).row
        if row is None:
            return  # deleted meanwhile
        self.names += 1
        if row.kind == INLINE:
            values.decode(row.body, zero_copy=False)
            self.count(len(row.body))
        elif row.kind == BULK:
            self.total += row.size
            details = self.replica.bulk.damage(row.reference())
            if details and self._same(name, row):
                for detail in details:
                    self.damage(name, detail)
            elif not details:
                values.describe(self.replica.bulk.map(row.reference()))
            self.count(row.size)
        elif row.kind == MEMORY:
            self._check_memory(name, row)

    def _same(self, name: str, row: NameRow) -> bool:
        now = self.replica.find(name).row
        return now is not None and now.id == row.id

    def _check_memory(self, name: str, row: NameRow) -> None:
        replica = self.replica
        try:
            view = memoryview(replica.memories.map(row.id, row.size))
        except FileNotFoundError:
            if self._same(name, row):
                self.damage(name, "its file is missing")
            return
        with replica.index.read() as txn:
            checksums = replica.index.block_checksums(txn, row.id)
        self.total += len(checksums) << BLOCK_SHIFT
        suspects = [
            block for block, expected in checksums.items() if self._differs(view, block, expected)
        ]
        for block in suspects:
            if self._is_damaged(view, row.id, block) and self._same(name, row):
                start = block << BLOCK_SHIFT
                end = min(start + (1 << BLOCK_SHIFT), row.size)
                self.damage(name, f"bytes {start} to {end} do not match their checksum")

    def _differs(self, view: memoryview, block: int, expected: int) -> bool:
        self.count(1 << BLOCK_SHIFT)
        return block_checksum(view, block) != expected

    def _is_damaged(self, view: memoryview, id: int, block: int) -> bool:
        """Whether a block is not what was flushed, and nothing was stored in it since.

        The bytes are read first: what is stored in them later shows in the tail, unless there was
        a flush in between.
        """
        index = self.replica.index
        for _ in range(_LOOKS):
            before = self.replica.state().flushed
            found = block_checksum(view, block)
            with index.read() as txn:
                flushed = index.state(txn).flushed
                if flushed != before:
                    continue
                expected = index.block_checksums(txn, id).get(block)
                dirty = Dirty()
                for _, row in index.tail_after(txn, flushed):
                    dirty.add_all(effects_of(entry_of(row), row), flushed)
            return (
                expected is not None
                and found != expected
                and block not in dirty.blocks.get(id, set())
            )
        return False  # flushed all the time: the next check will tell


def main() -> None:
    """Check the pool named on the command line; exits with 1 when it is damaged."""
    raise SystemExit(_Checker(Path(sys.argv[1])).run("--index-only" in sys.argv))


if __name__ == "__main__":
    main()
