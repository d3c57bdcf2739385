"""What a disk may hold after a power cut, worked out from the log of what was asked of it.

Pure functions of the log: `state_after(log[:k], seed)` is one state that a disk may be in when
the power goes after the k-th operation. The model:

* A synced file keeps its pages and its size. Each page written since holds any one of the
  versions it had since then, chosen page by page; the size is chosen likewise, and what no page
  survived for reads as zeros. With torn sectors the choice is made for each 512 bytes.
* After a failed sync the pages count as clean: they may or may not have reached the disk, and
  a later sync does not change that unless they are written again. The size, which a journal
  keeps, is made durable by the next sync that succeeds.
* A change of names (create, link, unlink, rename, mkdir, rmdir) is atomic, and durable only once
  a directory it touches is synced; a failed sync of a directory changes nothing. Of those not
  synced any subset survives, but changes of one name keep their order: a later one never
  survives an earlier one that is lost.
* A file whose name survives holds whatever of its data survived, perhaps nothing.

A state that no real file system would show (a journal keeps names in order) is still one that
POSIX allows; every state that a journal allows is among those produced.
"""

from __future__ import annotations

import os
import random
import stat
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

PAGE_BYTES = 4096
SECTOR_BYTES = 512
ROOT = 1
ZEROS = bytes(PAGE_BYTES)


class Make(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A new inode, not yet named; `target` is where a symbolic link leads."""

    inode: int
    mode: int
    target: bytes = b""


class Name(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """One atomic change of names: (directory, name, inode it now leads to, or 0 for none)."""

    changes: tuple[tuple[int, bytes, int], ...]


class Write(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Bytes written; the file grows when they end past its size."""

    inode: int
    offset: int
    data: bytes


class Resize(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A truncation, or growth by a hole."""

    inode: int
    size: int


class Zero(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A range that reads as zeros from now on; the size stays."""

    inode: int
    offset: int
    length: int


class Sync(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A finished sync of a file or directory, covering the operations numbered below `before`."""

    inode: int
    before: int
    failed: bool = False


class Mark(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A note by a process, in order with what was asked of the disk."""

    text: str


Operation = Make | Name | Write | Resize | Zero | Sync | Mark


@dataclass(frozen=True)
class FileState:
    """A file's permission bits, size in bytes and pages by number; absent pages are holes."""

    mode: int
    size: int
    pages: dict[int, bytes]

    def read(self) -> bytes:
        """All its bytes."""
        content = bytearray(self.size)
        for page, data in self.pages.items():
            start = page * PAGE_BYTES
            end = min(start + PAGE_BYTES, self.size)
            if start < end:
                content[start:end] = data[: end - start]
        return bytes(content)


@dataclass
class Tree:
    """One state of the disk: files, folders and symbolic links by path, parents first."""

    files: dict[str, FileState] = field(default_factory=dict[str, FileState])
    folders: dict[str, int] = field(default_factory=dict[str, int])  # path -> mode
    links: dict[str, str] = field(default_factory=dict[str, str])

    def read(self, path: str) -> bytes:
        """A file's bytes; KeyError when it did not survive."""
        return self.files[path].read()

    def write_to(self, target: str | Path) -> None:
        """Makes a plain directory of it; `target` is absent or empty. Hard links stay links."""
        target = Path(target)
        target.mkdir(parents=True, exist_ok=True)
        if any(target.iterdir()):
            raise FileExistsError(f"{target} is not empty: give each cut a folder of its own")
        for path, mode in self.folders.items():
            (target / path).mkdir(mode=mode | stat.S_IRWXU)
        written: dict[int, Path] = {}
        for path, state in self.files.items():
            place = target / path
            if id(state) in written:
                os.link(written[id(state)], place)
            else:
                _write_file(place, state)
                written[id(state)] = place
        for path, leads_to in self.links.items():
            os.symlink(leads_to, target / path)


def _write_file(place: Path, state: FileState) -> None:
    descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, state.mode)
    try:
        run: list[bytes] = []
        pages = sorted(page for page in state.pages if page * PAGE_BYTES < state.size)
        for index, page in enumerate(pages):
            run.append(state.pages[page])
            if len(run) == 256 or index + 1 == len(pages) or pages[index + 1] != page + 1:
                os.pwritev(descriptor, run, (page + 1 - len(run)) * PAGE_BYTES)
                run = []
        os.ftruncate(descriptor, state.size)
    finally:
        os.close(descriptor)


def pieces(offset: int, data: bytes | memoryview) -> Iterator[tuple[int, int, bytes]]:
    """Splits a write by pages: (page number, offset in the page, bytes)."""
    done = 0
    while done < len(data):
        page, start = divmod(offset + done, PAGE_BYTES)
        chunk = bytes(data[done : done + PAGE_BYTES - start])
        yield page, start, chunk
        done += len(chunk)


def patched(old: bytes, start: int, chunk: bytes) -> bytes:
    """The page `old` with `chunk` written into it at `start`."""
    if len(chunk) == PAGE_BYTES:
        return chunk
    return old[:start] + chunk + old[start + len(chunk) :]


def zeroed(pages: Iterable[int], offset: int, end: float) -> Iterator[tuple[int, int, bytes]]:
    """As `pieces` for zeros in [offset, end), for the given pages only."""
    for page in pages:
        start = max(offset - page * PAGE_BYTES, 0)
        stop = min(end - page * PAGE_BYTES, PAGE_BYTES)
        if start < stop:
            yield page, start, ZEROS[start : int(stop)]


Pick = Callable[[Sequence[int], int], int]
"""Which of an inode's versions, given by their operations' numbers, survives; -1 for none."""


class _Fate:
    """What one power cut lets survive: a strategy each for names, sizes and data."""

    def __init__(self, seed: int, pending: list[int]) -> None:
        self._random = random.Random(seed)
        self._cutoff = self._random.choice(pending) if pending else 0
        self._share = self._random.choice((0.1, 0.5, 0.9))
        self._spared: dict[int, bool] = {}
        every: list[Pick] = [
            self._nothing,
            self._everything,
            self._earlier,
            self._later,
            self._by_inode,
            self._scattered,
        ]
        weights = (2, 2, 3, 3, 3, 8)
        self.names, self.sizes, self.data = self._random.choices(every, weights, k=3)
        if self._random.random() < 0.5:  # otherwise uniform extremes would hardly ever occur
            self.names = self.sizes = self.data

    def _nothing(self, numbers: Sequence[int], inode: int) -> int:
        return -1

    def _everything(self, numbers: Sequence[int], inode: int) -> int:
        return len(numbers) - 1

    def _earlier(self, numbers: Sequence[int], inode: int) -> int:
        return bisect_left(numbers, self._cutoff) - 1

    def _later(self, numbers: Sequence[int], inode: int) -> int:
        return len(numbers) - 1 if numbers[-1] >= self._cutoff else -1

    def _by_inode(self, numbers: Sequence[int], inode: int) -> int:
        if inode not in self._spared:
            self._spared[inode] = self._random.random() < 0.5
        return len(numbers) - 1 if self._spared[inode] else -1

    def _scattered(self, numbers: Sequence[int], inode: int) -> int:
        if self._random.random() >= self._share:
            return -1
        if self._random.random() < 0.5:
            return len(numbers) - 1
        return self._random.randrange(len(numbers))


class _File:
    """A file's durable bytes and every version that each page and the size had since."""

    def __init__(self, inode: int, mode: int) -> None:
        self.inode = inode
        self.mode = mode
        self.durable: dict[int, bytes] = {}
        self.durable_size = 0
        self.versions: dict[int, list[tuple[int, bytes]]] = {}
        self.sizes: list[tuple[int, int]] = []
        # The first write to each page that no sync, failed or not, has covered yet.
        self.dirty: dict[int, int] = {}

    def put(self, number: int, parts: Iterable[tuple[int, int, bytes]]) -> None:
        for page, start, chunk in parts:
            versions = self.versions.setdefault(page, [])
            latest = versions[-1][1] if versions else self.durable.get(page, ZEROS)
            versions.append((number, patched(latest, start, chunk)))
            self.dirty.setdefault(page, number)

    def zero(self, number: int, offset: int, end: float) -> None:
        self.put(number, list(zeroed(sorted(self.durable.keys() | self.versions), offset, end)))

    def write(self, number: int, offset: int, data: bytes) -> None:
        self.put(number, pieces(offset, data))
        if offset + len(data) > self.size:
            self.sizes.append((number, offset + len(data)))

    def resize(self, number: int, size: int) -> None:
        if size < self.size:
            self.zero(number, size, float("inf"))
        self.sizes.append((number, size))

    @property
    def size(self) -> int:
        return self.sizes[-1][1] if self.sizes else self.durable_size

    def sync(self, before: int, failed: bool) -> None:
        for page, first in list(self.dirty.items()):
            if first >= before:
                continue
            versions = self.versions[page]
            later = [version for version in versions if version[0] >= before]
            if not failed:
                self._keep(page, versions[-len(later) - 1][1], later)
            if later:
                self.dirty[page] = later[0][0]
            else:
                del self.dirty[page]
        while not failed and self.sizes and self.sizes[0][0] < before:
            self.durable_size = self.sizes.pop(0)[1]

    def _keep(self, page: int, data: bytes, later: list[tuple[int, bytes]]) -> None:
        self.durable[page] = data
        if data == ZEROS:
            del self.durable[page]  # a hole says the same
        if later:
            self.versions[page] = later
        else:
            del self.versions[page]

    def pending(self) -> Iterator[int]:
        for versions in self.versions.values():
            yield from (number for number, _ in versions)
        yield from (number for number, _ in self.sizes)

    def survivor(self, fate: _Fate, piece_bytes: int) -> FileState:
        pages = dict(self.durable)
        for page in sorted(self.versions):
            versions = self.versions[page]
            numbers = [number for number, _ in versions]
            candidates = [data for _, data in versions]
            candidates.append(pages.get(page, ZEROS))  # at index -1
            pages[page] = b"".join(
                candidates[fate.data(numbers, self.inode)][start : start + piece_bytes]
                for start in range(0, PAGE_BYTES, piece_bytes)
            )
        size = self.durable_size
        if self.sizes:
            picked = fate.sizes([number for number, _ in self.sizes], self.inode)
            size = self.sizes[picked][1] if picked >= 0 else size
        return FileState(self.mode, size, pages)


class DiskModel:
    """Plays a log and gives states that the disk may be in if the power goes now."""

    def __init__(self) -> None:
        self.position = 0  # operations played
        self._made: dict[int, Make] = {ROOT: Make(ROOT, stat.S_IFDIR | 0o755)}
        self._files: dict[int, _File] = {}
        self._folders: dict[int, dict[bytes, int]] = {ROOT: {}}
        self._names: list[tuple[int, Name]] = []  # not synced yet

    def apply(self, operation: Operation) -> None:
        """Plays the next operation of the log."""
        number = self.position
        self.position += 1
        match operation:
            case Make(inode, mode):
                self._made[inode] = operation
                if stat.S_ISREG(mode):
                    self._files[inode] = _File(inode, stat.S_IMODE(mode))
                elif stat.S_ISDIR(mode):
                    self._folders[inode] = {}
            case Name():
                self._names.append((number, operation))
            case Write(inode, offset, data):
                self._files[inode].write(number, offset, data)
            case Resize(inode, size):
                self._files[inode].resize(number, size)
            case Zero(inode, offset, length):
                self._files[inode].zero(number, offset, offset + length)
            case Sync(inode, before, failed):
                if inode in self._files:
                    self._files[inode].sync(before, failed)
                elif not failed:
                    self._sync_folder(inode, before)
            case Mark():
                pass

    def _sync_folder(self, folder: int, before: int) -> None:
        """Makes durable what touched the folder, and what came before it under the same names."""
        needed: set[tuple[int, bytes]] = set()
        kept: list[tuple[int, Name]] = []
        durable: list[Name] = []
        for number, change in reversed(self._names):
            touched = {(where, name) for where, name, _ in change.changes}
            here = number < before and any(where == folder for where, _ in touched)
            if here or touched & needed:
                needed |= touched
                durable.append(change)
            else:
                kept.append((number, change))
        for change in reversed(durable):
            _rename(self._folders, change)
        self._names = kept[::-1]

    def survivors(self, seed: int, *, torn_sectors: bool = False) -> Tree:
        """One state of the disk after a power cut now; the same seed gives the same state."""
        pending = {number for number, _ in self._names}
        for file in self._files.values():
            pending.update(file.pending())
        fate = _Fate(seed, sorted(pending))
        folders = {inode: dict(names) for inode, names in self._folders.items()}
        lost: set[tuple[int, bytes]] = set()
        for number, change in self._names:
            touched = {(where, name) for where, name, _ in change.changes}
            if touched & lost or fate.names([number], change.changes[0][0]) < 0:
                lost |= touched
            else:
                _rename(folders, change)
        piece_bytes = SECTOR_BYTES if torn_sectors else PAGE_BYTES
        return self._walk(folders, fate, piece_bytes)

    def _walk(self, folders: dict[int, dict[bytes, int]], fate: _Fate, piece_bytes: int) -> Tree:
        tree = Tree()
        states: dict[int, FileState] = {}
        waiting = [("", ROOT)]
        while waiting:
            prefix, folder = waiting.pop()
            for name, inode in sorted(folders[folder].items()):
                path = prefix + os.fsdecode(name)
                made = self._made[inode]
                if stat.S_ISDIR(made.mode):
                    tree.folders[path] = stat.S_IMODE(made.mode)
                    waiting.append((path + "/", inode))
                elif stat.S_ISLNK(made.mode):
                    tree.links[path] = os.fsdecode(made.target)
                elif stat.S_ISREG(made.mode):
                    if inode not in states:
                        states[inode] = self._files[inode].survivor(fate, piece_bytes)
                    tree.files[path] = states[inode]
        return tree


def _rename(folders: dict[int, dict[bytes, int]], change: Name) -> None:
    for folder, name, inode in change.changes:
        if inode:
            folders[folder][name] = inode
        else:
            folders[folder].pop(name, None)


def state_after(log: Iterable[Operation], seed: int, *, torn_sectors: bool = False) -> Tree:
    """One state that a disk may be in when the power goes after the last operation of `log`."""
    model = DiskModel()
    for operation in log:
        model.apply(operation)
    return model.survivors(seed, torn_sectors=torn_sectors)
