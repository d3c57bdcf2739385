"""Full disks, disks and folders that refuse, wrong places, too few descriptors, odd errors."""

import errno
import gc
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

import everpool
from everpool import (
    ClosedError,
    CorruptionError,
    EverpoolError,
    ExistsError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from everpool.replica import layout
from everpool.replica.index import translate, translate_os, translated
from support import disks, scenes
from support.disks import Disk, on_own_disk
from support.processes import call, ending
from support.scenes import number_of, pattern
from support.tracing import Tracee
from support.tracing import why_not as why_not_traced

# What a message tells the user to do.
REMEDY = re.compile(
    r"try again|free some space|open (it )?with|restore|ulimit|upgrade|choose|change the perm|"
    r"run `everpool verify`|use a local disk|close some"
)


@pytest.fixture
def point(tmp_path: Path) -> Path:
    """A place to mount a small disk at."""
    reason = disks.why_not()
    if reason:
        pytest.skip(reason)
    return tmp_path / "disk"


# Full disks

_HOLE_BYTES = 1 << 30


def put_value(pool: Any, number: int) -> None:
    pool["counted"] = pattern(number, 8000)


def put_large(pool: Any, number: int) -> None:
    pool["counted"] = pattern(number, 100_000)


def put_many(pool: Any, number: int) -> None:
    names = {f"many/{number}/{at}": pattern(number, 3000) for at in range(30)}
    pool.update(names | {"counted": pattern(number, 8)})


def write_hole(pool: Any, number: int) -> None:
    with pool.transaction() as tx:
        tx.memory("hole").write(number * 200_000 + 4000, pattern(number, 20_000))
        tx["counted"] = pattern(number, 8)


def add_in_hole(pool: Any, number: int) -> None:
    pool.memory("hole").fetch_add(number * 200_000 + 100_000, number)
    pool["counted"] = pattern(number, 8)


def store_in_hole(pool: Any, number: int) -> None:
    pool.memory("hole").write(number << 21, pattern(number, scenes.STORE_BYTES))
    pool["counted"] = pattern(number, 8)


def write_row(pool: Any, number: int) -> None:
    with pool.transaction() as tx:
        tx.memory("hole").write(number << 19, pattern(number, scenes.ROW_BYTES))
        tx["counted"] = pattern(number, 8)


def allocate(pool: Any, number: int) -> None:
    with pool.transaction() as tx:
        tx.allocate(f"new/{number}", 1 << 20).write(5000, pattern(number, 10_000))
        tx["counted"] = pattern(number, 8)


def flush(pool: Any, number: int) -> None:
    scenes.tidy(pool)
    pool["counted"] = pattern(number, 8)


FILLING = [
    put_value, put_large, put_many, write_hole, add_in_hole, store_in_hole, write_row, allocate,
    flush,
]  # fmt: skip


def read_everything(pool: Any) -> int:
    """Return the count; whatever is read must be whole."""
    for name in pool:
        value = pool[name]
        if isinstance(value, bytes):
            number_of(value)
    assert pool.memory("hole").read(_HOLE_BYTES - 8, 8) == bytes(8)
    assert scenes.changed(pool) == 0
    return number_of(pool["counted"])


def read_afresh(path: Path, read_only: bool) -> int:
    with everpool.open(path, read_only=read_only) as pool:
        return read_everything(pool)


def fill_up(disk: Disk, act: Callable[[Any, int], None]) -> tuple[int, int]:
    """Do it with no room, a little more, and so on, until there is enough."""
    path = disk.path / "pool"
    scenes.short_tail()
    scenes.prepare(path)
    failed = done = number = 0
    with everpool.open(path) as pool:
        pool.allocate("hole", _HOLE_BYTES)
        pool["counted"] = pattern(0, 8)
        spare = 0
        while done < 2:
            disk.fill(spare)
            before = read_everything(pool)
            number += 1
            try:
                act(pool, number)
            except UnavailableError as error:
                assert "full" in str(error) and REMEDY.search(str(error)), error
                failed += 1
                assert read_everything(pool) == before, "a part of it was done"
            else:
                done += 1
                assert read_everything(pool) == number
            assert call(read_afresh, path, False) in (before, number)
            assert call(read_afresh, path, True) == number_of(pool["counted"])
            disk.clear()
            number += 1
            act(pool, number)
            assert read_everything(pool) == number
            assert not scenes.leftovers(pool)
            if act is store_in_hole:
                scenes.tidy(pool)  # what was stored lies in a file of its own until then
            if spare % 5 == 0:
                call(scenes.check_sound, path)
            spare += 1 + spare // 4
            assert spare < 5000, "it never succeeds"
    return failed, done


@pytest.mark.parametrize("act", FILLING, ids=lambda act: act.__name__)
def test_a_full_disk_is_an_error_and_nothing_else(
    point: Path, act: Callable[[Any, int], None]
) -> None:
    failed, _ = on_own_disk(fill_up, point, act, size_bytes=96 << 20)
    assert failed > 0 or act is flush


def create_on_full(disk: Disk) -> int:
    failed = 0
    for spare in [*range(8), *range(8, 400, 16)]:
        path = disk.path / "pool"
        disk.fill(spare)
        try:
            everpool.open(path).close()
        except UnavailableError as error:
            assert "full" in str(error), error
            failed += 1
        disk.clear()
        with everpool.open(path) as pool:
            pool["a"] = 1
            pool.allocate("m", 100)[0:3] = b"abc"
        call(scenes.check_sound, path)
        shutil.rmtree(path)
    return failed


def test_a_pool_begun_on_a_full_disk_is_finished_when_there_is_room(point: Path) -> None:
    assert on_own_disk(create_on_full, point, size_bytes=8 << 20) > 5


def change_when_told(pause: Callable[[], None], link: Connection, path: Path) -> None:
    pool = everpool.open(path)
    pause()
    scenes.change(pool)
    pause()


def die_and_fill(disk: Disk) -> list[int]:
    """Leave a commit that is durable and nowhere applied, and take all room away."""
    path = disk.path / "pool"
    scenes.prepare(path)
    states: list[int] = []
    for _ in range(3):
        tracee = Tracee(change_when_told, path)
        with ending(tracee):
            for wanted in ("fdatasync data.mdb", "pwrite64 data.mdb"):
                while tracee.next_step() != wanted:
                    pass
        disk.fill(0)
        states.append(call(open_and_look, path))
        disk.clear()
        call(scenes.check_sound, path)
    return states


def open_and_look(path: Path) -> int:
    with everpool.open(path) as pool:
        assert scenes.glanced(pool) == scenes.changed(pool)
        assert not scenes.leftovers(pool)
        return scenes.changed(pool)


@pytest.mark.skipif(bool(why_not_traced()), reason=why_not_traced() or "can be traced")
def test_what_is_durable_is_applied_even_on_a_full_disk(point: Path) -> None:
    assert on_own_disk(die_and_fill, point, size_bytes=32 << 20) == [1, 2, 3]


def want_stretch(pool: Any) -> None:
    pool.memory("hole").write(0, bytes(1 << 20))


def want_stretches(pool: Any) -> None:
    with pool.transaction() as tx:
        for at in range(30):
            tx.memory("hole").write((at << 20) + (1 << 29), bytes(100_000))


def want_large_value(pool: Any) -> None:
    pool["large"] = bytes(3 << 20)


def want_many_values(pool: Any) -> None:
    pool.update({f"inline/{at}": bytes(60_000) for at in range(50)})


def want_almost(pool: Any) -> None:
    """Leave room for the copy of the newest entry, and not for the index."""
    pool.update({f"inline/{at}": bytes(60_000) for at in range(9)})


def squeeze(disk: Disk) -> None:
    path = disk.path / "pool"
    with everpool.open(path) as pool:
        pool.allocate("hole", _HOLE_BYTES)
        for number in range(30):
            pool[f"small/{number}"] = bytes(200)
        for want in (want_stretch, want_stretches, want_large_value, want_many_values, want_almost):
            disk.fill(180)
            before = disk.free_pages()
            with pytest.raises(UnavailableError):
                want(pool)
            # Pages that were added to the index stay there, for the next commits.
            kept = before if want is want_almost else 10
            lost = before - disk.free_pages()
            assert lost <= kept, f"{want.__name__} took {lost} pages of {before} for nothing"
            if want is want_almost:
                copies = [file.stat().st_size for file in (path / "index").glob("large-*")]
                assert copies and sum(copies) == 0, "its copy was kept"
            disk.clear()
        disk.fill(180)
        check_neighbours(pool)
        disk.fill(0)
        del pool["small/0"]  # on a full disk one can still make room
        pool["small/1"] = 1


def check_neighbours(pool: Any) -> None:
    """In one batch, only what there is no room for must fail."""
    futures = []
    for number in range(30):
        with pool.transaction(wait=False) as tx:
            if number % 5 == 4:
                tx.memory("hole").write(number << 24, bytes(3 << 20))
            else:
                tx[f"small/{number}"] = pattern(number, 8)
        futures.append(tx.committed)
    errors = [future.exception(60) for future in futures]
    for number, error in enumerate(errors):
        if number % 5 == 4:
            assert isinstance(error, UnavailableError), (number, error)
        else:
            assert error is None and number_of(pool[f"small/{number}"]) == number, number


def test_what_there_is_no_room_for_takes_none_and_fails_nothing_else(point: Path) -> None:
    on_own_disk(squeeze, point, size_bytes=32 << 20)


# Disks and folders that refuse


def error_of(function: Callable[..., Any], *args: Any, **options: Any) -> EverpoolError | None:
    try:
        found = function(*args, **options)
    except EverpoolError as error:
        return error
    if isinstance(found, everpool.Pool):
        found.close()
    return None


def kind_of(function: Callable[..., Any], *args: Any, **options: Any) -> str:
    error = error_of(function, *args, **options)
    return "none" if error is None else error.kind


def read_only_disk(disk: Disk) -> None:
    path, view = disk.path / "pool", disk.path / "view"
    scenes.prepare(path)
    disk.read_only_view(path, view)
    assert refused(everpool.open, view)
    with everpool.open(path) as pool:
        scenes.change(pool)
        assert call(look_read_only, view) == (1, 1), "while another process writes"
    assert call(look_read_only, view) == (1, 1)
    del pool
    gc.collect()
    disk.refuse_writes()
    assert refused(everpool.open, path)
    assert refused(everpool.open, disk.path / "new")
    with everpool.open(path, read_only=True) as pool:
        assert scenes.changed(pool) == 1
        assert pool.verify().ok
    disk.allow_writes()
    with everpool.open(path) as pool:
        scenes.change(pool)
        assert scenes.changed(pool) == 2


def look_read_only(path: Path) -> tuple[int, int]:
    with everpool.open(path, read_only=True) as pool:
        assert kind_of(pool.__setitem__, "a", 1) == "invalid"
        assert call(scenes.changed, pool) == scenes.changed(pool)
        return scenes.changed(pool), scenes.glanced(pool)


def refused(function: Callable[..., Any], *args: Any) -> bool:
    error = error_of(function, *args)
    assert isinstance(error, InvalidError), error
    return REMEDY.search(str(error)) is not None


def test_a_read_only_file_system_serves_readers(point: Path) -> None:
    on_own_disk(read_only_disk, point, size_bytes=32 << 20)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can enter."""
    if os.geteuid():
        pytest.skip("becoming another user takes root")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def as_nobody(function: Callable[..., Any], *args: Any) -> Any:
    def act() -> Any:
        os.setgid(65534)
        os.setuid(65534)
        return function(*args)

    return call(act)


def without_permission(path: Path) -> tuple[str, str, str]:
    error = error_of(everpool.open, path)
    assert isinstance(error, InvalidError), error
    reading = error_of(everpool.open, path, read_only=True)
    return error.kind, str(error), "none" if reading is None else str(reading)


def test_a_pool_of_another_user(open_folder: Path) -> None:
    path = open_folder / "pool"
    call(scenes.prepare, path)
    _, message, reading = as_nobody(without_permission, path)
    assert "ermission" in message and REMEDY.search(message)
    # LMDB's readers enter themselves in its lock file.
    assert reading == "none" or "lock.mdb" in reading, reading
    (path / "index" / "lock.mdb").chmod(0o666)
    assert as_nobody(read_states, path) == (0, 0)
    for hidden in (path, path / "index", path / "index" / "data.mdb", path / "everpool.json"):
        mode = hidden.stat().st_mode
        hidden.chmod(0o700 if hidden.is_dir() else 0o600)
        _, message, reading = as_nobody(without_permission, path)
        assert "ermission" in message and "ermission" in reading, (hidden, message, reading)
        hidden.chmod(mode)
    with everpool.open(path) as pool:
        scenes.change(pool)


def read_states(path: Path) -> tuple[int, int]:
    with everpool.open(path, read_only=True) as pool:
        return scenes.changed(pool), scenes.glanced(pool)


def test_a_place_where_one_may_not_write(open_folder: Path) -> None:
    error = as_nobody(error_of, everpool.open, open_folder / "pool")
    assert isinstance(error, InvalidError) and "ermission" in str(error)
    assert not (open_folder / "pool").exists()


# Wrong places


def test_places_that_are_no_pool(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    empty = tmp_path / "empty"
    empty.mkdir()
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere" / "there")
    for path, create, kind, word in [
        (file, True, InvalidError, "not a folder"),
        (file, False, InvalidError, "not a folder"),
        (file / "below", True, InvalidError, "choose another path"),
        (file / "below", False, NotFoundError, "below"),
        (foreign, True, InvalidError, "thesis.tex"),
        (foreign, False, InvalidError, "not a pool"),
        (empty, False, InvalidError, "not a pool"),
        (tmp_path / "missing", False, NotFoundError, "create=True"),
        (dangling, False, NotFoundError, "dangling"),
        (tmp_path / ("x" * 300), True, InvalidError, "too long"),
        ("ftp://bucket/pool", True, InvalidError, "use s3://"),
        (17, True, InvalidError, "17"),
        (None, True, InvalidError, "None"),
        ("a\0b", True, InvalidError, "a"),
        ("", False, EverpoolError, ""),
    ]:
        with pytest.raises(kind) as caught:
            everpool.open(path, create=create)
        assert word in str(caught.value), caught.value
    assert sorted(os.listdir(foreign)) == ["thesis.tex"]
    assert os.listdir(empty) == [] and not (tmp_path / "missing").exists()
    for path in (empty, os.fspath(tmp_path / "as-text"), os.fsencode(tmp_path / "as-bytes")):
        with everpool.open(path) as pool:
            pool["a"] = 1
    with pytest.raises(NotFoundError):
        everpool.open(tmp_path / "missing", read_only=True)


def test_a_pool_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    everpool.open(path).close()
    marker = path / "everpool.json"
    text = marker.read_text()
    marker.write_text(text.replace(":1", ":2", 1))
    assert marker.read_text() != text
    with pytest.raises(InvalidError, match="upgrade"):
        everpool.open(path)
    marker.write_text(text)
    everpool.open(path).close()


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
31 22 0:27 / /net rw,relatime shared:2 - nfs4 server:/export rw,vers=4.2
32 31 0:28 / /net/disk rw,relatime shared:3 - xfs /dev/vdb rw
33 22 0:29 / /with\\040space rw,relatime - cifs //server/share rw
34 22 0:30 / /d\u00e4t\u00e4 rw,relatime - fuse.sshfs host:/ rw
35 22 0:31 / /network rw,relatime - tmpfs tmpfs rw
36 22 0:32 / /over rw,relatime - ext4 /dev/vdc rw
37 22 0:33 / /over rw,relatime master:5 propagate_from:2 - ceph mon:/ rw
38 22 0:34 / /again rw - nfs server:/ rw
39 22 0:35 / /again rw - btrfs /dev/vdd rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/home/pool", ""),
        ("/net/pool", "nfs4"),
        ("/net", "nfs4"),
        ("/net/disk/pool", ""),
        ("/net/disks/pool", "nfs4"),
        ("/with space/a/b", "cifs"),
        ("/d\u00e4t\u00e4/pool", "fuse.sshfs"),
        ("/network/pool", ""),
        ("/over/pool", "ceph"),
        ("/again/pool", ""),
    ],
)
def test_file_systems_of_several_machines_are_refused(
    monkeypatch: pytest.MonkeyPatch, folder: str, kind: str
) -> None:
    read = Path.read_text

    def fake(self: Path, *args: Any, **options: Any) -> str:
        return MOUNTS if os.fspath(self) == "/proc/self/mountinfo" else read(self, *args, **options)

    monkeypatch.setattr(Path, "read_text", fake)
    if not kind:
        layout.check_place(Path(folder))
        return
    with pytest.raises(InvalidError, match="network file system") as caught:
        layout.check_place(Path(folder))
    assert kind in str(caught.value) and "local disk" in str(caught.value)


def test_a_pool_is_neither_made_nor_opened_on_a_network_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everpool.open(tmp_path / "pool").close()
    monkeypatch.setattr(layout, "_file_system", lambda folder: "nfs4")
    for name in ("pool", "new"):
        with pytest.raises(InvalidError, match="nfs4"):
            everpool.open(tmp_path / name)
    assert not (tmp_path / "new").exists()


# Too few descriptors


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd")) - 1


def starve(path: Path, act: Callable[[Path, int], None]) -> tuple[int, int]:
    """Try with no descriptor to spare, one, two, ...; returns how often it failed and worked."""
    failed = worked = 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for spare in range(40):
        held = [os.open("/dev/null", os.O_RDONLY) for _ in range(64)]
        highest = max(held)
        for descriptor in held[:spare]:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        try:
            act(path, spare)
        except UnavailableError as error:
            assert REMEDY.search(str(error)), error
            failed += 1
        else:
            worked += 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in held[spare:]:
                os.close(descriptor)
        act(path, spare)
        if worked > 3:
            break
    return failed, worked


def starved_opening(path: Path, number: int) -> None:
    with everpool.open(path) as pool:
        assert scenes.changed(pool) == 0


def starved_creation(path: Path, number: int) -> None:
    with everpool.open(path.with_name(f"new {number}")) as pool:
        assert len(pool) == 0


_held: list[Any] = []


def starved_use(path: Path, number: int) -> None:
    """Do everything with a pool that was opened in better times."""
    if not _held:
        _held.append(everpool.open(path))
    pool = _held[0]
    pool["value"] = pattern(number, 100_000)
    assert number_of(pool["value"]) == number
    with pool.transaction() as tx:
        for name in tx.names("new/"):
            del tx[name]
        tx.allocate("new/a", 100)[0:8] = pattern(number, 8)
    assert number_of(pool.memory("new/a").read(0, 8)) == number
    scenes.tidy(pool)


@pytest.mark.parametrize("act", [starved_opening, starved_creation, starved_use])
def test_running_out_of_descriptors_is_an_error_and_nothing_else(
    tmp_path: Path, act: Callable[[Path, int], None]
) -> None:
    path = tmp_path / "pool"
    call(scenes.prepare, path)

    def run() -> tuple[int, int]:
        if act is starved_use:
            act(path, 0)
        found = starve(path, act)
        for pool in _held:
            assert not scenes.leftovers(pool)
            pool.close()
        return found

    failed, worked = call(run)
    assert failed > 0 and worked > 0
    call(scenes.check_sound, path)


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    def run() -> tuple[int, int]:
        path = tmp_path / "pool"
        scenes.prepare(path)
        starved_opening(path, 0)
        before = open_descriptors()
        for number in range(5):
            with everpool.open(path) as pool:
                scenes.change(pool)
                pool["value"] = pattern(number, 100_000)
                scenes.tidy(pool)
        with pytest.raises(InvalidError):
            everpool.open(path / "index")
        return before, open_descriptors()

    before, after = call(run)
    assert after <= before, "each time something stays open"


# Closed pools


def test_everything_refuses_after_closing(tmp_path: Path) -> None:
    pool = everpool.open(tmp_path / "pool")
    memory, accounts = pool.allocate("m", 100), pool.allocate_array("a", 4)
    pool["v"] = pattern(7, 100_000)
    value, view, live = pool["v"], memory.view(), np.asarray(accounts)
    watch, tx = pool.watch(), pool.transaction()
    tx["x"] = 1
    pool.close()
    uses: list[Callable[[], Any]] = [
        lambda: pool["v"],
        lambda: pool.__setitem__("v", 1),
        lambda: pool.__delitem__("v"),
        lambda: "v" in pool,
        lambda: len(pool),
        lambda: list(pool),
        lambda: pool.get("v"),
        lambda: pool.allocate("n", 1),
        lambda: pool.memory("m"),
        lambda: pool.array("a"),
        lambda: pool.transaction(),
        lambda: pool.run(lambda tx: None),
        lambda: pool.watch(),
        lambda: pool.version,
        lambda: pool.sync(),
        lambda: pool.stats(),
        lambda: pool.verify(),
        lambda: memory.read(0, 1),
        lambda: memory.write(0, b"x"),
        lambda: memory.fetch_add(0, 1),
        lambda: memory.view(),
        lambda: memory.version,
        lambda: accounts[0],
        lambda: accounts.__setitem__(0, 1),
        lambda: tx["x"],
        lambda: tx.__exit__(None, None, None),
        lambda: watch.get(0.1),
    ]
    for use in uses:
        with pytest.raises(ClosedError):
            use()
    pool.close()
    assert number_of(value) == 7 and view[0] == 0 and live.sum() == 0, "what is in use lives on"
    with everpool.open(tmp_path / "pool") as again:
        assert "x" not in again
        with pytest.raises(ClosedError):
            memory.read(0, 1)


# Calls that are wrong


def test_wrong_names_sizes_and_types_are_named(tmp_path: Path) -> None:
    with everpool.open(tmp_path / "pool") as pool:
        memory, accounts = pool.allocate("m", 100), pool.allocate_array("a", (4,), "i4")
        pool["v"] = 1
        wrong: list[tuple[type[EverpoolError], Callable[[], Any]]] = [
            (NotFoundError, lambda: pool["missing"]),
            (NotFoundError, lambda: pool.__delitem__("missing")),
            (NotFoundError, lambda: pool.memory("missing")),
            (NotFoundError, lambda: pool.array("missing")),
            (InvalidError, lambda: pool.memory("v")),
            (InvalidError, lambda: pool.array("v")),
            (InvalidError, lambda: pool.array("m")),
            (ExistsError, lambda: pool.allocate("m", 1)),
            (ExistsError, lambda: pool.allocate("v", 1)),
            (ExistsError, lambda: pool.__setitem__("m", 1)),
            *((InvalidError, lambda name=name: pool[name]) for name in ("", "a\0", 7, "\udc80")),
            (InvalidError, lambda: pool["x" * 1025]),
            *((InvalidError, lambda n=n: pool.allocate("n", n)) for n in (0, -1, 2**46 + 1, "1")),
            *((InvalidError, lambda n=n: pool.allocate_array("n", n)) for n in (-1, "a", (2, -1))),
            *(
                (InvalidError, lambda d=d: pool.allocate_array("n", 4, d))
                for d in ("O", "nonsense", "U0")
            ),
            (InvalidError, lambda: memory.read(99, 2)),
            (InvalidError, lambda: memory.read(-1, 1)),
            (InvalidError, lambda: memory.write(99, b"ab")),
            (InvalidError, lambda: memory.__setitem__(slice(0, 4), b"abc")),
            (InvalidError, lambda: memory.__setitem__(slice(0, 4, 2), b"ab")),
            (InvalidError, lambda: memory.write(0, 5)),
            (InvalidError, lambda: memory.fetch_add(97, 1)),
            (InvalidError, lambda: memory.fetch_add(0, 1, "U4")),
            (InvalidError, lambda: memory.fetch_add(0, "one")),
            (InvalidError, lambda: memory.compare_and_swap(0, b"a", b"bc")),
            (InvalidError, lambda: accounts[4]),
            (InvalidError, lambda: accounts.__setitem__(0, "x")),
            (InvalidError, lambda: accounts.__setitem__(slice(0, 2), [1, 2, 3])),
            (InvalidError, lambda: accounts.fetch_add(slice(0, 2), 1)),
            (InvalidError, lambda: pool.__setitem__("o", object())),
            (InvalidError, lambda: pool.watch(since=10**6)),
            (InvalidError, lambda: pool.outcome("nonsense")),
        ]
        version = pool.version
        for kind, use in wrong:
            with pytest.raises(kind) as caught:
                use()
            assert type(caught.value) is kind and str(caught.value)
        assert list(pool) == ["a", "m", "v"] and pool["v"] == 1
        assert pool.version - version < 10, "most of it must not even reach the log"


# Errors from below

LMDB_ERRORS = [
    kind for kind in vars(lmdb).values() if isinstance(kind, type) and issubclass(kind, lmdb.Error)
]


def test_every_error_of_lmdb_is_translated() -> None:
    assert len(LMDB_ERRORS) > 15
    for kind in LMDB_ERRORS:
        for text in ("mdb_put", "mdb_txn_commit: No space left on device", "x: Permission denied"):
            with pytest.raises(EverpoolError) as caught, translated("doing something"):
                raise kind(text)
            error = caught.value
            assert type(error) is not EverpoolError and isinstance(error.__cause__, kind)
            assert str(error).startswith("doing something: ") and REMEDY.search(str(error)), error
    for kind, expected in [
        (lmdb.CorruptedError, CorruptionError),
        (lmdb.PageNotFoundError, CorruptionError),
        (lmdb.InvalidError, CorruptionError),
        (lmdb.VersionMismatchError, CorruptionError),
        (lmdb.MapFullError, UnavailableError),
        (lmdb.ReadersFullError, UnavailableError),
        (lmdb.DiskError, UnavailableError),
        (lmdb.ReadonlyError, InvalidError),
    ]:
        assert type(translate(kind("x"), "doing")) is expected


def test_every_error_of_the_system_is_translated() -> None:
    wrong = {errno.EACCES, errno.EPERM, errno.EROFS}
    wrong |= {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
    for number in errno.errorcode:
        raised = OSError(number, os.strerror(number), "/some/file")
        with pytest.raises(EverpoolError) as caught, translated("doing something"):
            raise raised
        error = caught.value
        assert type(error) is (InvalidError if number in wrong else UnavailableError)
        assert "/some/file" in str(error) and REMEDY.search(str(error)), error
        assert error.__cause__ is raised
    for number in (errno.ENOSPC, errno.EDQUOT):
        assert "full" in str(translate_os(OSError(number, "x"), "committing"))
