"""The forgetful disk forgets what a disk may forget, and nothing else."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import mmap
import os
import random
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import pytest

from support import forgetful_fuse
from support.forgetful import ForgetfulDisk, NotAvailableError, is_mounted, marks, sync_positions
from support.forgetful_model import (
    PAGE_BYTES,
    ROOT,
    Make,
    Name,
    Sync,
    Tree,
    Write,
    state_after,
)

pytestmark = pytest.mark.fuse

HERE = Path(__file__).parent
SEEDS = range(60)
OLD, NEW = b"o" * PAGE_BYTES, b"n" * PAGE_BYTES


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[ForgetfulDisk]:
    with contextlib.ExitStack() as stack:
        try:
            mounted = stack.enter_context(ForgetfulDisk(tmp_path / "disk"))
        except NotAvailableError as problem:
            pytest.skip(str(problem))
        yield mounted


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def store(path: Path, data: bytes) -> None:
    """A file that must survive: it and its name are synced."""
    path.write_bytes(data)
    sync(path)
    sync(path.parent)


def write(path: Path, data: bytes, offset: int = 0, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags)
    try:
        os.pwrite(descriptor, data, offset)
    finally:
        os.close(descriptor)


PUNCH_HOLE, ZERO_RANGE, KEEP_SIZE = 3, 0x10, 1


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """What os.posix_fallocate has no mode for."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        raise OSError(ctypes.get_errno(), "fallocate")


def states(disk: ForgetfulDisk, *, torn_sectors: bool = False) -> list[Tree]:
    """What cuts now may leave, by many seeds."""
    now = disk.position()
    return [disk.state_at(now, seed, torn_sectors=torn_sectors) for seed in SEEDS]


def outcomes(disk: ForgetfulDisk, name: str) -> set[bytes | None]:
    """Every content with which a file is found after a cut now; None when it is not there."""
    return {tree.read(name) if name in tree.files else None for tree in states(disk)}


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process; it may import what this module may."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=HERE,  # where `support` is
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# -- what survives --------------------------------------------------------------------------------


def test_synced_data_survives_every_cut(disk: ForgetfulDisk, tmp_path: Path) -> None:
    content = os.urandom(3 * PAGE_BYTES + 17)
    store(disk.path / "a", content)
    assert outcomes(disk, "a") == {content}
    write(disk.path / "b", NEW)
    assert outcomes(disk, "a") == {content}
    for seed in range(5):
        disk.cut(seed, tmp_path / str(seed))
        assert (tmp_path / str(seed) / "a").read_bytes() == content


def test_unsynced_data_may_survive_or_vanish(disk: ForgetfulDisk) -> None:
    store(disk.path / "a", OLD)
    write(disk.path / "a", NEW)
    assert outcomes(disk, "a") == {OLD, NEW}
    assert (disk.path / "a").read_bytes() == NEW, "a cut harmed the living files"


def test_pages_of_one_write_survive_independently(disk: ForgetfulDisk) -> None:
    store(disk.path / "a", OLD * 2)
    write(disk.path / "a", NEW * 2)
    assert outcomes(disk, "a") == {OLD * 2, NEW * 2, OLD + NEW, NEW + OLD}


def test_sectors_tear_only_when_asked(disk: ForgetfulDisk) -> None:
    store(disk.path / "a", OLD)
    write(disk.path / "a", NEW)
    torn = {tree.read("a") for tree in states(disk, torn_sectors=True)}
    assert torn > {OLD, NEW}
    assert all(set(data[i : i + 512]) < {*b"on"} for data in torn for i in range(0, 4096, 512))


def test_a_page_may_hold_any_version_since_its_last_sync(disk: ForgetfulDisk) -> None:
    path = disk.path / "a"
    for digit in b"012":
        store(path, bytes([digit]) * PAGE_BYTES)
    for digit in b"3456":
        write(path, bytes([digit]) * PAGE_BYTES)
    assert outcomes(disk, "a") == {bytes([digit]) * PAGE_BYTES for digit in b"23456"}


def test_each_page_holds_a_version_of_its_own(disk: ForgetfulDisk) -> None:
    store(disk.path / "a", OLD * 2)
    for data in (b"1", b"2"):
        write(disk.path / "a", data * PAGE_BYTES)
        write(disk.path / "a", data * PAGE_BYTES, PAGE_BYTES)
    found = {(data[0], data[-1]) for data in outcomes(disk, "a") if data}
    assert found == {(first, second) for first in b"o12" for second in b"o12"}


def test_a_file_may_have_grown_without_its_data(disk: ForgetfulDisk) -> None:
    store(disk.path / "a", OLD)
    write(disk.path / "a", NEW, PAGE_BYTES)
    assert outcomes(disk, "a") == {OLD, OLD + bytes(PAGE_BYTES), OLD + NEW}


def test_truncation_is_forgotten_too(disk: ForgetfulDisk) -> None:
    store(disk.path / "a", OLD)
    os.truncate(disk.path / "a", 10)
    assert {OLD, OLD[:10]} <= outcomes(disk, "a")
    sync(disk.path / "a")
    os.truncate(disk.path / "a", 20)
    sync(disk.path / "a")
    assert outcomes(disk, "a") == {OLD[:10] + bytes(10)}


def test_a_hole_is_forgotten_too(disk: ForgetfulDisk) -> None:
    store(disk.path / "a", OLD)
    with (disk.path / "a").open("r+b") as file:
        fallocate(file.fileno(), PUNCH_HOLE, 10, PAGE_BYTES)
        holed = OLD[:10] + bytes(PAGE_BYTES - 10)
        assert file.read() == holed
        assert outcomes(disk, "a") == {OLD, holed}
        os.fsync(file.fileno())
        assert outcomes(disk, "a") == {holed}


def test_a_name_is_durable_only_once_its_directory_is_synced(disk: ForgetfulDisk) -> None:
    write(disk.path / "a", NEW)
    sync(disk.path / "a")
    assert outcomes(disk, "a") == {None, NEW}
    sync(disk.path)
    assert outcomes(disk, "a") == {NEW}
    (disk.path / "a").unlink()
    assert outcomes(disk, "a") == {None, NEW}
    sync(disk.path)
    assert outcomes(disk, "a") == {None}


def test_a_new_folder_needs_a_sync_of_its_parent(disk: ForgetfulDisk) -> None:
    (disk.path / "folder").mkdir()
    store(disk.path / "folder" / "a", NEW)
    assert outcomes(disk, "folder/a") == {None, NEW}
    sync(disk.path)
    assert outcomes(disk, "folder/a") == {NEW}


def test_a_rename_may_survive_before_the_data(disk: ForgetfulDisk) -> None:
    store(disk.path / "a", OLD)
    write(disk.path / "new", NEW)
    os.rename(disk.path / "new", disk.path / "a")
    found = outcomes(disk, "a")
    assert {OLD, NEW} < found and None not in found
    assert found & {b"", bytes(PAGE_BYTES)}


def test_a_rename_after_a_sync_is_old_or_new(disk: ForgetfulDisk) -> None:
    store(disk.path / "a", OLD)
    write(disk.path / "new", NEW)
    sync(disk.path / "new")
    os.rename(disk.path / "new", disk.path / "a")
    assert outcomes(disk, "a") == {OLD, NEW}
    assert all(len(tree.files) == 1 for tree in states(disk) if tree.read("a") == NEW)
    sync(disk.path)
    assert outcomes(disk, "a") == {NEW} and outcomes(disk, "new") == {None}


def test_a_rename_across_folders_never_loses_or_doubles_the_file(disk: ForgetfulDisk) -> None:
    for name in "xyz":
        (disk.path / name).mkdir()
    sync(disk.path)
    store(disk.path / "x" / "a", OLD)
    os.rename(disk.path / "x" / "a", disk.path / "y" / "a")
    assert {tuple(tree.files) for tree in states(disk)} == {("x/a",), ("y/a",)}
    os.rename(disk.path / "y" / "a", disk.path / "z" / "a")
    sync(disk.path / "z")
    assert {tuple(tree.files) for tree in states(disk)} == {("z/a",)}
    os.rename(disk.path / "z" / "a", disk.path / "x" / "a")
    sync(disk.path / "z")
    assert {tuple(tree.files) for tree in states(disk)} == {("x/a",)}


def test_changes_of_one_name_keep_their_order(disk: ForgetfulDisk) -> None:
    store(disk.path / "a", OLD)
    os.rename(disk.path / "a", disk.path / "b")
    store_without_name = disk.path / "a"
    write(store_without_name, NEW)
    sync(store_without_name)
    for tree in states(disk):
        assert OLD in [state.read() for state in tree.files.values()], "a renamed file was lost"


def test_the_order_of_two_files_may_be_reversed(disk: ForgetfulDisk) -> None:
    for name in "ab":
        store(disk.path / name, OLD)
    for name in "ab":
        write(disk.path / name, NEW)
    found = {(tree.read("a"), tree.read("b")) for tree in states(disk)}
    assert found == {(OLD, OLD), (OLD, NEW), (NEW, OLD), (NEW, NEW)}


def test_a_hard_link_is_the_same_file(disk: ForgetfulDisk, tmp_path: Path) -> None:
    store(disk.path / "a", OLD)
    os.link(disk.path / "a", disk.path / "b")
    with (disk.path / "b").open("rb") as file:
        seen = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        write(disk.path / "a", NEW)
        assert seen[:] == NEW and os.fstat(file.fileno()).st_nlink == 2
        seen.close()
    sync(disk.path / "b")
    sync(disk.path)
    disk.cut(1, tmp_path / "cut")
    assert (tmp_path / "cut" / "a").samefile(tmp_path / "cut" / "b")
    assert (tmp_path / "cut" / "a").read_bytes() == NEW


# -- how data gets synced -------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [os.O_DSYNC, os.O_SYNC])
def test_a_write_through_a_synced_descriptor_is_durable(disk: ForgetfulDisk, flag: int) -> None:
    store(disk.path / "a", OLD)
    write(disk.path / "a", NEW, flags=flag)
    assert outcomes(disk, "a") == {NEW}


def test_mapped_memory_and_writes_are_one(disk: ForgetfulDisk) -> None:
    store(disk.path / "a", OLD * 4)
    descriptor = os.open(disk.path / "a", os.O_RDWR)
    reader = run(
        "import mmap, sys\n"
        "f = open(sys.argv[1], 'rb')\n"
        "m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "for line in sys.stdin: print(m[int(line)], flush=True)",
        disk.path / "a",
    )
    mapped = mmap.mmap(descriptor, 0)
    assert reader.stdin and reader.stdout
    for index in range(200):
        at, value = random.Random(index).randrange(4 * PAGE_BYTES), index % 256
        if index % 2:
            os.pwrite(descriptor, bytes([value]), at)
        else:
            mapped[at] = value
        reader.stdin.write(f"{at}\n")
        reader.stdin.flush()
        assert int(reader.stdout.readline()) == value == mapped[at]
        assert os.pread(descriptor, 1, at) == bytes([value])
    reader.communicate()
    mapped.close()
    os.close(descriptor)


def test_mapped_memory_is_durable_once_synced(disk: ForgetfulDisk) -> None:
    store(disk.path / "a", OLD)
    descriptor = os.open(disk.path / "a", os.O_RDWR)
    mapped = mmap.mmap(descriptor, 0)
    mapped[:] = NEW
    assert OLD in outcomes(disk, "a")
    mapped.flush()
    assert outcomes(disk, "a") == {NEW}
    mapped[:] = OLD
    os.fsync(descriptor)
    assert outcomes(disk, "a") == {OLD}
    mapped.close()
    os.close(descriptor)


def test_locks_hold_between_processes_and_end_with_them(disk: ForgetfulDisk) -> None:
    store(disk.path / "lock", b"x")
    holder = run(
        "import fcntl, sys\n"
        "f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX)\n"
        "print('held', flush=True); sys.stdin.read()",
        disk.path / "lock",
    )
    assert holder.stdout and holder.stdout.readline() == "held\n"
    with (disk.path / "lock").open("r+b") as file:
        with pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        holder.kill()
        holder.communicate()
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# -- faults ---------------------------------------------------------------------------------------


def test_a_failed_sync_is_not_made_good_by_another(disk: ForgetfulDisk) -> None:
    store(disk.path / "a", OLD)
    descriptor = os.open(disk.path / "a", os.O_RDWR)
    os.pwrite(descriptor, NEW, 0)
    disk.fail("sync", 2)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            os.fdatasync(descriptor)
    os.fsync(descriptor)
    assert outcomes(disk, "a") == {OLD, NEW}
    os.pwrite(descriptor, NEW[:1], 0)  # makes the page dirty again
    os.fsync(descriptor)
    assert outcomes(disk, "a") == {NEW}
    os.close(descriptor)


def test_a_failed_sync_of_a_directory_may_be_tried_again(disk: ForgetfulDisk) -> None:
    (disk.path / "a").touch()
    disk.fail("sync")
    with pytest.raises(OSError, match="Input/output"):
        sync(disk.path)
    assert outcomes(disk, "a") == {None, b""}
    sync(disk.path)
    assert outcomes(disk, "a") == {b""}


def test_only_syncs_of_matching_paths_fail(disk: ForgetfulDisk) -> None:
    (disk.path / "folder").mkdir()
    disk.fail("sync", glob="folder/*.log")
    store(disk.path / "folder" / "a", OLD)
    with pytest.raises(OSError, match="Input/output"):
        write(disk.path / "folder" / "b.log", OLD, flags=os.O_DSYNC)
    disk.fail("sync", glob="folder")
    with pytest.raises(OSError, match="Input/output"):
        sync(disk.path / "folder")
    disk.fail("write", glob="folder/b.log", error=errno.EROFS)
    disk.heal()
    write(disk.path / "folder" / "b.log", NEW, flags=os.O_DSYNC)
    assert (disk.path / "folder" / "b.log").read_bytes() == NEW


def no_room(action: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:
        action()
    assert caught.value.errno == errno.ENOSPC


def test_a_full_disk_takes_nothing_new(disk: ForgetfulDisk) -> None:
    store(disk.path / "a", OLD)
    store(disk.path / "allocated", b"")
    descriptor = os.open(disk.path / "allocated", os.O_RDWR)
    os.posix_fallocate(descriptor, 0, 4 * PAGE_BYTES)
    disk.full = True
    no_room(lambda: write(disk.path / "a", NEW, PAGE_BYTES))
    no_room(lambda: os.posix_fallocate(descriptor, 4 * PAGE_BYTES, 1))
    write(disk.path / "a", NEW)
    os.pwrite(descriptor, NEW * 4, 0)
    os.truncate(disk.path / "a", 1 << 40)
    disk.full = False
    write(disk.path / "a", NEW, 1 << 39)
    assert (disk.path / "allocated").read_bytes() == NEW * 4
    with (disk.path / "a").open("rb") as file:
        assert os.lseek(file.fileno(), PAGE_BYTES, os.SEEK_DATA) == 1 << 39
        assert file.read(PAGE_BYTES + 1) == NEW + b"\0"
    os.close(descriptor)


def test_a_disk_has_the_capacity_it_is_given(disk: ForgetfulDisk) -> None:
    disk.capacity_bytes = 4 * PAGE_BYTES
    descriptor = os.open(disk.path / "a", os.O_RDWR | os.O_CREAT)
    assert os.pwrite(descriptor, NEW * 6, 10) == 4 * PAGE_BYTES - 10
    no_room(lambda: os.pwrite(descriptor, NEW, 8 * PAGE_BYTES))
    assert os.statvfs(disk.path).f_bavail == 0
    os.unlink(disk.path / "a")
    no_room(lambda: write(disk.path / "b", NEW))  # still open: still there
    os.close(descriptor)
    for _ in range(100):
        write(disk.path / "b", NEW * 4)
        os.unlink(disk.path / "b")  # makes room at once


def test_allocation_allocates_and_writes_nothing(disk: ForgetfulDisk) -> None:
    descriptor = os.open(disk.path / "a", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(descriptor, 0, 1 << 20)
    assert os.fstat(descriptor).st_blocks * 512 == os.fstat(descriptor).st_size == 1 << 20
    os.close(descriptor)
    assert not [operation for operation in disk.record() if isinstance(operation, Write)]


def test_a_delayed_sync_holds_up_nobody_else(disk: ForgetfulDisk) -> None:
    for name in "ab":
        store(disk.path / name, OLD)
    write(disk.path / "a", NEW)
    disk.sync_delay_s = 1
    started = time.monotonic()
    syncing = threading.Thread(target=sync, args=(disk.path / "a",))
    syncing.start()
    time.sleep(0.3)
    write(disk.path / "b", NEW)
    assert syncing.is_alive()
    assert outcomes(disk, "a") == {OLD, NEW}
    syncing.join()
    assert time.monotonic() - started >= 1
    assert outcomes(disk, "a") == {NEW}
    *_, meanwhile, synced = disk.record()
    assert isinstance(meanwhile, Write) and isinstance(synced, Sync)
    assert synced.before < disk.position() - 1, "covers what was written after it began"


def test_a_sync_covers_what_was_before_it_alone() -> None:
    log = [
        Make(2, stat.S_IFREG | 0o644),
        Name(((ROOT, b"a", 2),)),
        Sync(ROOT, before=2),
        Write(2, 0, OLD),
        Write(2, 0, NEW),
        Sync(2, before=4),
    ]
    assert {state_after(log, seed).read("a") for seed in SEEDS} == {OLD, NEW}


# -- the record -----------------------------------------------------------------------------------


def test_a_cut_depends_on_the_record_and_the_seed_alone(disk: ForgetfulDisk) -> None:
    for index in range(20):
        write(disk.path / str(index % 3), bytes([index]) * PAGE_BYTES, PAGE_BYTES * (index % 5))
    log = disk.record()
    for position in (7, len(log), 20, 0):
        for seed in range(5):
            assert disk.state_at(position, seed) == state_after(log[:position], seed)
    write(disk.path / "later", NEW)
    assert disk.state_at(len(log), 3) == state_after(log, 3)
    disk.forget_record()
    with pytest.raises(ValueError, match="not in the record"):
        disk.state_at(len(log), 3)
    sync(disk.path)
    assert all("later" in tree.files for tree in states(disk))


def test_marks_of_any_process_are_in_order_with_the_syncs(disk: ForgetfulDisk) -> None:
    writers = [
        run(
            "import os, sys\n"
            "from support.forgetful import mark\n"
            "folder, name = sys.argv[1:]\n"
            "f = os.open(f'{folder}/{name}', os.O_RDWR | os.O_CREAT)\n"
            "os.fsync(os.open(folder, os.O_RDONLY))\n"
            "for i in range(1, 40):\n"
            "    os.pwrite(f, bytes([i]), 0)\n"
            "    os.fsync(f)\n"
            "    mark(folder, f'{name} {i}')",
            *(disk.path, name),
        )
        for name in "ab"
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    log = disk.record()
    assert sorted(marks(log)) == sorted(f"{name} {i}" for name in "ab" for i in range(1, 40))
    behind = 0
    for position in sync_positions(log):
        tree = disk.state_at(position, seed=position)
        for name in "ab":
            promised = [int(m.split()[1]) for m in marks(log[:position]) if m[0] == name]
            if promised:
                assert tree.read(name)[0] in (promised[-1], promised[-1] + 1)
                behind += tree.read(name)[0] == promised[-1]
    assert behind, "what was not yet synced survived every cut"


def test_processes_go_on_through_cuts(disk: ForgetfulDisk, tmp_path: Path) -> None:
    writer = run(
        "import os, sys\n"
        "f = os.open(sys.argv[1] + '/a', os.O_RDWR | os.O_CREAT)\n"
        "os.fsync(os.open(sys.argv[1], os.O_RDONLY))\n"
        "for i in range(2000):\n"
        "    os.pwrite(f, i.to_bytes(4, 'big'), 4096 * (i % 8)); os.fsync(f); print(i, flush=True)",
        disk.path,
    )
    assert writer.stdout
    acknowledged = -1
    for seed in range(20):
        for _ in range(30):
            acknowledged = int(writer.stdout.readline())
        disk.cut(seed, tmp_path / str(seed))
        data = (tmp_path / str(seed) / "a").read_bytes()
        found = max(int.from_bytes(data[at : at + 4], "big") for at in range(0, len(data), 4096))
        assert found >= acknowledged
    assert writer.poll() is None or acknowledged == 1999
    assert writer.communicate()[0].splitlines()[-1] == "1999" and writer.returncode == 0


def test_a_record_that_grew_too_long_is_refused(tmp_path: Path, disk: ForgetfulDisk) -> None:
    with ForgetfulDisk(tmp_path / "other", log_limit_bytes=100_000) as other:
        for _ in range(30):
            write(other.path / "a", NEW)
        with pytest.raises(ValueError, match="limit"):
            other.record()


# -- the living file system -----------------------------------------------------------------------


def random_step(rng: random.Random, folders: list[Path]) -> None:
    """The same random operation in each of several folders; it must end alike in all."""
    name, other = rng.choices("abcdef", k=2)
    offset, length = rng.randrange(20_000), rng.randrange(1, 9_000)
    data = rng.randbytes(length)
    steps: list[Callable[[Path], object]] = [
        lambda folder: write(folder / name, data, offset),
        lambda folder: os.truncate(folder / name, offset),
        lambda folder: os.rename(folder / name, folder / other),
        lambda folder: os.link(folder / name, folder / other),
        lambda folder: os.unlink(folder / name),
        lambda folder: (folder / f"{name}{name}").mkdir(),
        lambda folder: (folder / f"{name}{name}").rmdir(),
        lambda folder: os.rename(folder / name, folder / f"{other}{other}" / name),
        lambda folder: os.rename(folder / f"{name}{name}", folder / f"{other}{other}"),
        lambda folder: allocate(folder / name),
    ]
    mode = rng.choice((0, KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE))

    def allocate(path: Path) -> None:
        with path.open("r+b") as file:
            fallocate(file.fileno(), mode, offset, length)

    step = rng.choice(steps)
    ends: list[int | None] = []
    for folder in folders:
        try:
            step(folder)
            ends.append(None)
        except OSError as problem:
            ends.append(problem.errno)
    assert len(set(ends)) == 1, ends


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("seed", range(3))
def test_it_behaves_as_any_file_system(disk: ForgetfulDisk, tmp_path: Path, seed: int) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    rng = random.Random(seed)
    for _ in range(300):
        random_step(rng, [disk.path, plain])
    assert contents(disk.path) == contents(plain)
    for path in [disk.path, *disk.path.rglob("*")]:
        sync(path)
    for cut in range(3):
        disk.cut(cut, tmp_path / f"cut{cut}")
        assert contents(tmp_path / f"cut{cut}") == contents(plain)


def test_a_file_lives_on_while_it_is_open(disk: ForgetfulDisk) -> None:
    store(disk.path / "a", OLD)
    with (disk.path / "a").open("r+b", buffering=0) as file:
        (disk.path / "a").unlink()
        assert os.listdir(disk.path) == []
        file.write(NEW + NEW)
        assert os.pread(file.fileno(), 3 * PAGE_BYTES, 0) == NEW + NEW


def test_a_long_listing_is_complete(disk: ForgetfulDisk) -> None:
    names = {f"{index:05}{'x' * 200}" for index in range(500)}
    for name in names:
        (disk.path / name).touch()
    assert set(os.listdir(disk.path)) == names


# -- LMDB -----------------------------------------------------------------------------------------

WRITE_LMDB = """
import lmdb, os, random, sys
from support.forgetful import mark
folder, sync = sys.argv[1], sys.argv[2] == "True"
environment = lmdb.open(folder, map_size=1 << 24, sync=sync)
for place in (folder, folder + "/.."):
    os.fsync(os.open(place, os.O_RDONLY))
for number in range(60):
    with environment.begin(write=True) as transaction:
        for key in {number, random.Random(number).randrange(number + 1)}:
            transaction.put(b"%08d" % key, b"%d/%d " % (key, number) * 100)
        transaction.put(b"last", b"%d" % number)
    mark(folder, str(number))
"""


def lmdb_last_commit(folder: Path) -> int:
    """The last commit that is whole in an LMDB; AssertionError or lmdb.Error when it is damaged."""
    with lmdb.open(str(folder), map_size=1 << 24) as environment, environment.begin() as reader:
        last = int(reader.get(b"last", b"-1"))
        found = {bytes(key): bytes(value) for key, value in reader.cursor()}
    expected: dict[int, int] = {}
    for number in range(last + 1):
        expected |= dict.fromkeys({number, random.Random(number).randrange(number + 1)}, number)
    for key, number in expected.items():
        assert found.pop(b"%08d" % key) == b"%d/%d " % (key, number) * 100
    assert set(found) <= {b"last"}
    return last


def in_fork(function: Callable[[], int]) -> int | None:
    """The function's result, worked out in a fork; None when that raised, crashed or hung."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        faulthandler.disable()  # a crash is an answer here
        with contextlib.suppress(BaseException):
            os.write(writing, str(function()).encode())
        os._exit(0)
    os.close(writing)
    try:
        if not select.select([reading], [], [], 10)[0]:
            os.kill(child, signal.SIGKILL)
        answer = os.read(reading, 100)
        return int(answer) if answer else None
    finally:
        os.waitpid(child, 0)
        os.close(reading)


def lmdb_losses(disk: ForgetfulDisk, tmp_path: Path, *, sync: bool) -> list[str]:
    """What 100 cuts of a run of commits lost or damaged, a line each."""
    (disk.path / "lmdb").mkdir()
    assert run(WRITE_LMDB, disk.path / "lmdb", sync).wait() == 0
    log = disk.record()
    opened = next(at for at in range(len(log)) if marks(log[at : at + 1]))
    losses: list[str] = []
    for seed in range(100):
        position = random.Random(seed).randrange(opened + 1, len(log) + 1)
        target = tmp_path / f"cut{seed}"
        disk.cut_at(position, seed, target, torn_sectors=seed % 2 == 1)
        promised = int(marks(log[:position])[-1])
        found = in_fork(lambda target=target: lmdb_last_commit(target / "lmdb"))
        if found is None or found < promised:
            losses.append(f"seed {seed}, operation {position}: {found} instead of {promised}")
    return losses


def test_lmdb_keeps_every_acknowledged_commit(disk: ForgetfulDisk, tmp_path: Path) -> None:
    assert lmdb_losses(disk, tmp_path, sync=True) == []


def test_lmdb_without_sync_is_caught(disk: ForgetfulDisk, tmp_path: Path) -> None:
    losses = lmdb_losses(disk, tmp_path, sync=False)
    assert any("None" in loss for loss in losses), "no cut damaged it"
    assert any("None" not in loss for loss in losses), "no cut lost a commit only"


# -- leaving nothing behind -----------------------------------------------------------------------


def disk_processes(folder: Path) -> list[str]:
    found: list[str] = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (place / "cmdline").read_bytes().split(b"\0")
            if b"support.forgetful" in arguments and str(folder).encode() in arguments:
                found.append(place.name)
    return found


def test_nothing_is_left_after_an_exception(disk: ForgetfulDisk, tmp_path: Path) -> None:
    other = tmp_path / "other"
    in_use: list[int] = []
    with pytest.raises(KeyError), ForgetfulDisk(other) as mounted:
        in_use.append(os.open(mounted.path / "a", os.O_RDWR | os.O_CREAT))
        assert is_mounted(other) and disk_processes(other)
        raise KeyError
    with contextlib.suppress(OSError):
        os.close(in_use.pop())
    assert not is_mounted(other) and not disk_processes(other) and not other.exists()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_owner_is_ended(
    disk: ForgetfulDisk, tmp_path: Path, ending: signal.Signals
) -> None:
    other = tmp_path / "other"
    owner = run(
        "import os, sys\n"
        "from support.forgetful import ForgetfulDisk\n"
        "with ForgetfulDisk(sys.argv[1]):\n"
        "    if os.fork(): print('mounted', flush=True)\n"
        "    sys.stdin.read()  # a fork that outlives the owner",
        other,
    )
    assert owner.stdout and owner.stdout.readline() == "mounted\n" and is_mounted(other)
    owner.send_signal(ending)
    owner.wait(8)
    deadline = time.monotonic() + 5
    while (is_mounted(other) or disk_processes(other)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_mounted(other) and not disk_processes(other)
    owner.communicate()


def test_a_disk_whose_process_died_says_so(disk: ForgetfulDisk, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with ForgetfulDisk(other) as mounted:
        for process in disk_processes(other):
            os.kill(int(process), signal.SIGKILL)
        with pytest.raises(RuntimeError, match="died"):
            mounted.position()
    assert not is_mounted(other) and not other.exists()


def test_a_machine_without_fuse_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(forgetful_fuse.os.path, "exists", lambda path: path != "/dev/fuse")
    with pytest.raises(forgetful_fuse.UnavailableHere, match="/dev/fuse"):
        forgetful_fuse.mount(str(tmp_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give up the right to mount")
def test_a_user_who_may_not_mount_is_told_so(disk: ForgetfulDisk, tmp_path: Path) -> None:
    powerless = run(
        "import ctypes, sys\n"
        "from support.forgetful import ForgetfulDisk, NotAvailableError\n"
        "ctypes.CDLL(None).prctl(24, 21)  # drops CAP_SYS_ADMIN for what is started from here\n"
        "try: ForgetfulDisk(sys.argv[1]).__enter__()\n"
        "except NotAvailableError as problem: print(problem)",
        tmp_path / "other",
    )
    assert "mounting is refused" in powerless.communicate()[0]
    assert not (tmp_path / "other").exists()
