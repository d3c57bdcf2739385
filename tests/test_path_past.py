"""The past of a pool at a path: what begins it, what it costs, and what survives a death."""

import datetime
import os
import pickle
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everpool
from everpool import CorruptionError, ExistsError, InvalidError, NotFoundError, UnavailableError
from everpool.past import keeper
from everpool.replica import flush
from support import disks, scenes
from support.agents import end_agents
from support.cli import contents, out_of
from support.disks import Disk, on_own_disk
from support.pictures import change, note, noted, picture
from support.processes import Child, call, ending
from support.tracing import killed_somewhere_new, why_not

_no_tracing = why_not()
traced = pytest.mark.skipif(bool(_no_tracing), reason=_no_tracing or "can be traced")
SOAK = os.environ.get("EVERPOOL_SOAK") == "1"
Pictures = dict[int, dict[str, Any]]


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "pool"
    end_agents(tmp_path)


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_in(folder))


def short_tail() -> None:
    """Keep so little of the tail that every flush trims it."""
    flush.KEPT_VERSIONS = 5


def check_past(path: Path, pictures: Pictures) -> None:
    """Look at each of the versions."""
    with everpool.open(path, create=False) as pool:
        for version, expected in pictures.items():
            with pool.at(version) as past:
                assert picture(past) == expected, version


# What begins a past


def test_a_pool_without_a_past_pays_nothing_and_says_how_to_begin_one(path: Path) -> None:
    with everpool.open(path) as pool:
        pool["large"] = np.arange(100_000)
        pool["large"] = np.arange(200_000)
        pool.engine().flush()
        with pytest.raises(InvalidError, match=r"pool\.checkpoint\(\)"):
            pool.at(pool.version)
        with pytest.raises(InvalidError, match="no past yet"):
            pool.restore(1)
        assert pool.snapshots() == []
        assert not (path / "past").exists()
        assert len(files_in(path / "values")) == 1, "what was replaced is gone at once"


@pytest.mark.parametrize("way", ["snapshot", "checkpoint", "branch", "backup"])
def test_the_past_begins_with_the_first_of_these(path: Path, tmp_path: Path, way: str) -> None:
    with everpool.open(path) as pool:
        pool["a"] = 1
        pool["large"] = np.arange(100_000)
        memory = pool.allocate("m", 1 << 40)
        memory.write(1 << 39, b"far away")
        began = pool.version
        {
            "snapshot": lambda: pool.snapshot("first"),
            "checkpoint": pool.checkpoint,
            "branch": lambda: pool.branch(f"file://{tmp_path}/branch"),
            "backup": lambda: pool.checkpoint(f"file://{tmp_path}/backup"),
        }[way]()
        pool["a"] = 2
        pool["large"] = "small"
        memory.write(1 << 39, b"elsewhere")
        with pool.at(began) as past:
            assert past["a"] == 1 and len(past["large"]) == 100_000
            assert past.memory("m").read(1 << 39, 8) == b"far away"
        with pytest.raises(InvalidError, match=f"begins with version {began}"):
            pool.at(began - 1)
        with pytest.raises(InvalidError, match="cannot be looked at"):
            pool.snapshot("too old", began - 1)
        with pytest.raises(InvalidError, match="younger"):
            pool.at(everpool.pool.datetime(2001, 1, 1))


def test_a_pool_that_is_open_read_only_can_look_back_but_not_begin(path: Path) -> None:
    with everpool.open(path) as pool:
        pool["a"] = 1
        pool.snapshot("one")
        pool["a"] = 2
    with everpool.open(path, read_only=True) as pool:
        with pool.at("one") as past:
            assert past["a"] == 1
        for act in (pool.checkpoint, lambda: pool.snapshot("two"), lambda: pool.restore("one")):
            with pytest.raises(InvalidError, match="read-only"):
                act()


def test_the_past_may_be_deleted_and_begun_again(path: Path) -> None:
    with everpool.open(path) as pool:
        pool["large"] = np.arange(100_000)
        pool.checkpoint()
        pool["large"] = np.arange(50_000)
        shutil.rmtree(path / "past")
        with pytest.raises(InvalidError, match="no past yet"):
            pool.at(pool.version)
        assert pool.verify().ok and len(pool["large"]) == 50_000
        pool.checkpoint()
        version = pool.version
        pool["large"] = 1
        with pool.at(version) as past:
            assert len(past["large"]) == 50_000
    with everpool.open(path, create=False) as pool:
        assert pool["large"] == 1


# What is kept


def test_replaced_values_go_into_the_past_when_the_tail_is_trimmed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flush, "KEPT_VERSIONS", 5)
    with everpool.open(path) as pool:
        pool.checkpoint()
        versions = {}
        for number in range(1, 30):
            pool["large"] = np.arange(10_000 * number)
            versions[pool.version] = 10_000 * number
            if number % 7 == 0:
                pool.checkpoint()
        pool.checkpoint()
        for _ in range(20):
            pool["small"] = 1
        pool.engine().flush()
        for _ in range(40):
            pool["small"] = 1
        assert len(files_in(path / "values")) < 5, "the pool has what it needs, and no more"
        assert not scenes.leftovers(pool)
        state = pool.engine().replica.state()
        assert state.floor == state.checkpoint, "what no checkpoint has stays in the tail"
        for version, length in versions.items():
            with pool.at(version) as past:
                assert len(past["large"]) == length
                assert past.verify().ok


def test_a_checkpoint_writes_what_changed(path: Path) -> None:
    with everpool.open(path) as pool:
        memory = pool.allocate("m", 1 << 30)
        for block in range(0, 512):
            memory.write(block << 16, os.urandom(100))
        pool.update({f"n/{number}": number for number in range(5000)})
        pool.checkpoint()
        before = bytes_in(path / "past")
        assert before > 512 << 16
        memory.write(7 << 16, b"changed")
        memory.write(900 << 20, b"changed")
        pool["n/1"] = "changed"
        pool.checkpoint()
        assert bytes_in(path / "past") - before < 200_000
        assert pool.checkpoint() == pool.checkpoint(), "nothing changed"


def test_many_checkpoints_are_merged(path: Path) -> None:
    choose = random.Random(5)
    pictures: Pictures = {}
    with everpool.open(path) as pool:
        pool["first"] = 1
        for _ in range(25):
            for _ in range(4):
                change(pool, choose)
            pool.checkpoint()
            pictures[pool.version] = picture(pool)
        manifest, _ = pool.engine()._keeper().newest()
        assert len({run.version for run in manifest.runs}) <= 9
    check_past(path, pictures)


def test_places_beyond_those_that_a_manifest_keeps_are_found(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "needed_places", lambda places, *_: places[-3:])
    pictures: Pictures = {}
    with everpool.open(path) as pool:
        pool["number"] = -1
        for number in range(20):
            pool["number"] = number
            pool.checkpoint()
            pictures[pool.version] = {"number": number}
        first = datetime_of(pool, min(pictures))
        with pool.at(first) as past:
            assert past["number"] == 0
    check_past(path, pictures)


def datetime_of(pool: Any, version: int) -> Any:
    with pool.at(version) as past:
        time_ns = past.stats()["time_ns"]
    return everpool.pool.datetime.fromtimestamp(time_ns / 1e9 + 1e-5)


def test_checkpoints_are_made_by_themselves(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flush, "FLUSH_VERSIONS", 100)
    monkeypatch.setattr(flush, "KEPT_VERSIONS", 50)
    with everpool.open(path) as pool:
        pool.checkpoint()
        numbers = {}
        for number in range(600):
            pool["number"] = number
            numbers[pool.version] = number
            if number % 100 == 50:
                time.sleep(0.1)
        deadline = time.monotonic() + 20
        while pool.engine().replica.state().checkpoint < 300:
            assert time.monotonic() < deadline
            pool["again"] = 1
            time.sleep(0.01)
        state = pool.engine().replica.state()
        assert state.floor <= state.checkpoint
        for version in sorted(numbers)[100::70]:
            with pool.at(version) as past:
                assert past["number"] == numbers[version]


def test_a_checkpoint_is_of_one_version_while_others_write(path: Path) -> None:
    with everpool.open(path) as pool:
        array = pool.allocate_array("a", 1 << 20, "i8")
        array[:] = 0
        pool.checkpoint()
        ending_it = threading.Event()

        def write() -> None:
            number = 0
            choose = random.Random(1)
            while not ending_it.is_set():
                number += 1
                with pool.transaction() as tx:  # all of them are equal, always
                    for place in (3, 1 << 17, 1 << 19, choose.randrange(4, 1 << 17)):
                        tx.array("a")[place] = number
                    tx["number"] = number

        thread = threading.Thread(target=write)
        thread.start()
        try:
            versions = [pool.checkpoint() for _ in range(25)]
        finally:
            ending_it.set()
            thread.join()
        for version in versions[1::3]:
            with pool.at(version) as past:
                found = past.array("a")[np.array([3, 1 << 17, 1 << 19])].tolist()
                assert found == [past["number"]] * 3, version
                assert past.array("a")[...].max() == found[0]
        assert pool.verify().ok


def test_two_processes_make_checkpoints_at_once(path: Path) -> None:
    with everpool.open(path) as pool:
        pool.checkpoint()

    def work(link: Connection, start: int) -> None:
        choose = random.Random(start)
        pictures: Pictures = {}
        with everpool.open(path) as pool:
            for number in range(60):
                with pool.transaction() as tx:
                    tx[f"w/{start}"] = choose.random()
                    tx[f"v/{start}"] = np.full(9000, number)
                if number % 5 == start:
                    pool.checkpoint()
                pictures[pool.version] = {}
        link.send(sorted(pictures))

    children = [Child(work, start) for start in range(2)]
    with ending(*children):
        versions = [version for child in children for version in child.receive()]
    with everpool.open(path) as pool:
        for version in versions[::9]:
            with pool.at(version) as past:
                for start in range(2):
                    if f"v/{start}" in past:
                        assert len(past[f"v/{start}"]) == 9000 and f"w/{start}" in past
        assert pool.verify().ok


# Bringing back


def test_what_was_brought_back_stays_when_the_entry_that_removed_it_is_trimmed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flush, "KEPT_VERSIONS", 5)
    with everpool.open(path) as pool:
        pool["large"] = np.arange(100_000)
        pool.snapshot("good")
        for _ in range(3):
            del pool["large"]
            pool.restore("good")
        for _ in range(3):
            pool.checkpoint()
            for _ in range(30):
                pool["small"] = 1
        assert np.array_equal(pool["large"], np.arange(100_000))
        assert pool.verify().ok
        pool["large"] = 1
        pool.checkpoint()
        for _ in range(30):
            pool["small"] = 1
        pool.restore("good")
        assert np.array_equal(pool["large"], np.arange(100_000))


def test_without_hard_links_values_are_copied(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(flush, "KEPT_VERSIONS", 5)
    with everpool.open(path) as pool:
        pool["large"] = np.arange(100_000)
        pool.snapshot("good")
        version = pool.version
        pool["large"] = np.arange(20_000)
        for _ in range(30):
            pool["small"] = 1
        pool.checkpoint()
        for _ in range(30):
            pool["small"] = 1
        assert len(files_in(path / "values")) == 1
        with pool.at(version) as past:
            assert len(past["large"]) == 100_000
        pool.restore("good")
        assert np.array_equal(pool["large"], np.arange(100_000))
        branch = f"file://{path.parent}/branch"
        pool.branch(branch)
        with everpool.open(branch, cache_dir=path.parent / "cache") as opened:
            assert len(opened["large"]) == 100_000


def test_the_past_goes_to_another_process(path: Path) -> None:
    with everpool.open(path) as pool:
        pool["a"] = 1
        pool.snapshot("one")
        pool["a"] = 2
        with pool.at("one") as past:
            assert call(lambda data: pickle.loads(data)["a"], pickle.dumps(past)) == 1


def test_a_forked_child_looks_back_and_makes_checkpoints(path: Path) -> None:
    def child(pool: Any, version: int) -> None:
        pool["child"] = 1
        pool.checkpoint()
        with pool.at(version) as past:
            assert past["a"] == 1 and "child" not in past

    with everpool.open(path) as pool:
        pool["a"] = 1
        pool.checkpoint()
        version = pool.version
        pool["a"] = 2
        with pool.at(version) as before:
            assert call(lambda: before["a"]) == before["a"] == 1
        call(child, pool, version)
        assert pool["child"] == 1
        pool.checkpoint()
        with pool.at(version) as past:
            assert past["a"] == 1


# Damage


def test_a_missing_part_of_the_past_is_an_error_of_the_past_only(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flush, "KEPT_VERSIONS", 5)
    with everpool.open(path) as pool:
        pool["large"] = np.arange(100_000)
        pool.checkpoint()
        version = pool.version
        pool["large"] = 1
        pool["other"] = 1
        for _ in range(30):
            pool["small"] = 1
        pool.checkpoint()
        for _ in range(30):
            pool["small"] = 1
        (value,) = files_in(path / "past" / "values")
        value.rename(path / "aside")
        with pool.at(version) as past:
            with pytest.raises(CorruptionError, match="missing"):
                past["large"]
            assert not past.verify().ok
        with pool.at(version + 2) as past:
            assert past["other"] == 1
        for chunk in files_in(path / "past" / "log"):
            chunk.unlink()
        with pytest.raises((NotFoundError, CorruptionError)):
            pool.at(version + 2)
        assert pool.verify().ok and pool["large"] == 1


def test_the_past_of_a_pool_is_not_opened_as_one(path: Path) -> None:
    with everpool.open(path) as pool:
        pool.checkpoint()
    for read_only in (False, True):
        with pytest.raises(InvalidError, match="folder above"):
            everpool.open(f"file://{path}/past", read_only=read_only)


# Deaths


def prepare_deaths(path: Path) -> Pictures:
    short_tail()
    with everpool.open(path) as pool:
        pool["before"] = "the past"
        pool["large"] = np.arange(9000)
        pool.allocate("memory", 1 << 30).write(100, b"before the past")
        pool.checkpoint()
        return {pool.version: picture(pool)}


def change_some(path: Path, seed: int) -> Pictures:
    """Do what gives a checkpoint something to do; returns how it was in between."""
    short_tail()
    choose = random.Random(seed)
    with everpool.open(path, create=False) as pool:
        pool["seed"] = seed
        pool.memory("memory").write(choose.choice([0, 100, 1 << 29]), choose.randbytes(30))
        found = {pool.version: picture(pool)}
        if seed % 10 == 0:  # each file that is replaced is a step more
            for _ in range(6):
                change(pool, choose)
            pool["large"] = np.arange(9000 + seed)
            found[pool.version] = picture(pool)
            del pool["large"]
            pool["large"] = np.full(9000, seed)
            found[pool.version] = picture(pool)
    return found


def make_checkpoint(pause: Any, link: Connection, path: Path) -> None:
    short_tail()
    pool = everpool.open(path, create=False)
    pause()
    pool.checkpoint()
    pool["small"] = 1  # which trims
    pool["small"] = 2
    link.send("done")
    pause()


def look_around(path: Path, pictures: Pictures, seed: int) -> None:
    short_tail()
    choose = random.Random(seed)
    some = choose.sample(sorted(pictures), min(4, len(pictures)))
    check_past(path, {version: pictures[version] for version in {*some, max(pictures)}})
    if seed % 10 == 0:
        with everpool.open(path, create=False) as pool:
            assert pool.verify().ok
            pool.engine().flush()
            pool["small"] = 3
            pool["small"] = 4


@traced
def test_killed_at_every_step_of_a_checkpoint(path: Path) -> None:
    pictures = call(prepare_deaths, path)
    tried: set[tuple[str, int]] = set()
    deaths = 0
    for number in range(600):
        pictures |= call(change_some, path, number)
        if not killed_somewhere_new(tried, (1 << 30) if SOAK else 3, make_checkpoint, path):
            break
        deaths += 1
        call(look_around, path, pictures, number)
    else:
        raise AssertionError("it never ends")
    call(check_past, path, pictures)
    steps = {step for step, _ in tried}
    assert deaths > 20 and {"link", "rename", "fsync .part"} <= steps, sorted(steps)


def live(path: Path, notes: Path, seed: int) -> None:
    """Change the pool at random, noting how it is, while a thread makes checkpoints."""
    flush.KEPT_VERSIONS, flush.FLUSH_VERSIONS = 30, 25
    choose = random.Random(seed)
    with everpool.open(path) as pool:

        def make_checkpoints() -> None:
            while True:
                time.sleep(choose.random() * 0.02)
                pool.checkpoint()

        threading.Thread(target=make_checkpoints, daemon=True).start()
        while True:
            change(pool, choose)
            # Nobody else changes anything, so what is noted is of this version, or of one with it.
            note(notes, pool)


def storm(path: Path, notes: Path, seconds: float, seed: int) -> int:
    choose = random.Random(seed)
    deaths = 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        child = Child(lambda _: live(path, notes, choose.randrange(1 << 30)))
        time.sleep(choose.uniform(0.2, 0.9))
        child.kill()
        deaths += 1
        pictures = noted(notes)
        some = choose.sample(sorted(pictures), min(6, len(pictures)))
        call(check_past, path, {version: pictures[version] for version in some})
    pictures = noted(notes)
    some = choose.sample(sorted(pictures), min(80, len(pictures)))
    call(check_past, path, {version: pictures[version] for version in some})
    with everpool.open(path) as pool:
        assert pool.verify().ok
    return deaths


def test_every_version_is_there_after_a_storm_of_kills(path: Path, tmp_path: Path) -> None:
    with everpool.open(path) as pool:
        pool.checkpoint()
    (tmp_path / "notes").touch()
    assert storm(path, tmp_path / "notes", seconds=6, seed=random.randrange(1 << 30)) > 3


def fill_up(disk: Disk) -> int:
    """Make checkpoints with no room, a little more, and so on, until there is enough."""
    path = disk.path / "pool"
    short_tail()
    failed = number = spare = 0
    pictures: Pictures = {}
    with everpool.open(path) as pool:
        pool["large"] = np.arange(9000)
        pool.allocate("m", 1 << 20).write(0, b"x" * 300_000)
        while spare < 2000:
            disk.fill(spare)
            try:
                pool.checkpoint()
                pool.engine().flush()
                if number > 3:
                    break
            except UnavailableError as error:
                assert "full" in str(error) or "No space" in str(error), error
                failed += 1
            disk.clear()
            number += 1
            pool["number"] = number
            pool["large"] = np.arange(9000 + number)
            pool.memory("m").write(7000 * number, b"y" * 100_000)
            if (pool.path / "past").exists() and pool.engine().replica.state().manifest:
                pictures[pool.version] = {"number": number, "length": 9000 + number}
            spare += 1 + spare // 3
        disk.clear()
        pool.checkpoint()
        for version, expected in pictures.items():
            with pool.at(version) as past:
                assert (past["number"], len(past["large"])) == tuple(expected.values())
        assert pool.verify().ok
    return failed


@pytest.mark.skipif(bool(disks.why_not()), reason=disks.why_not() or "has disks")
def test_a_full_disk_is_an_error_and_nothing_else(tmp_path: Path) -> None:
    assert on_own_disk(fill_up, tmp_path / "disk", size_bytes=64 << 20) > 3


# Branches and backups


def test_a_branch_shares_nothing_and_copies_nothing(path: Path, tmp_path: Path) -> None:
    there, cache = f"file://{tmp_path}/branch", tmp_path / "cache"
    with everpool.open(path) as pool:
        pool["large"] = np.arange(1_000_000)
        memory = pool.allocate("m", 1 << 30)
        memory.write(1 << 29, b"before" * 100_000)
        pool.checkpoint()
        memory.write(0, b"behind the checkpoint")
        then = pool.version
        pool["large"] = "replaced"
        pool.branch(there, then)
        assert pool.snapshots() == []
        links = [path for path in files_in(tmp_path / "branch") if path.stat().st_nlink > 1]
        copied = bytes_in(tmp_path / "branch") - sum(path.stat().st_size for path in links)
        assert len(links) > 1 and copied < 1_500_000
        with pytest.raises(ExistsError, match="choose another"):
            pool.branch(there)
    shutil.rmtree(path)
    with everpool.open(there, cache_dir=cache) as branch:
        assert branch.version == then and np.array_equal(branch["large"], np.arange(1_000_000))
        assert branch.memory("m").read(0, 21) == b"behind the checkpoint"
        assert branch.memory("m").read((1 << 29) + 6, 6) == b"before"
        branch["name"] = "branch"
        branch.checkpoint()
        assert branch.verify().ok


def test_a_backup_is_brought_up_to_date_until_it_is_opened_for_writing(
    path: Path, tmp_path: Path
) -> None:
    there, cache = f"file://{tmp_path}/backup", tmp_path / "cache"
    sent: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        sent.append((done, total))

    with everpool.open(path) as pool:
        pool["large"] = np.arange(1_000_000)
        memory = pool.allocate("m", 1 << 30)
        memory.write(1 << 29, b"before" * 100_000)
        version = pool.checkpoint(there, progress)
        assert sent[-1][0] == sent[-1][1] > 8_000_000
        sent.clear()
        assert pool.checkpoint(there, progress) == version and not sent
        with everpool.open(there, cache_dir=cache, read_only=True) as backup:
            assert backup.version == version and len(backup["large"]) == 1_000_000
            memory.write(0, b"later")
            assert pool.checkpoint(there, progress) > version
            assert sent[-1][0] == sent[-1][1] < 300_000
            assert backup.memory("m").read(0, 5) == bytes(5), "as it was opened"
        pool["name"] = "parent"
        last = pool.checkpoint(there)
    with everpool.open(there, cache_dir=cache) as backup:
        assert backup["name"] == "parent" and backup.version == last
        assert backup.memory("m").read(0, 5) == b"later"
        backup["name"] = "backup"
        assert backup.verify().ok
    with everpool.open(path) as pool:
        for _ in range(2):
            with pytest.raises(ExistsError, match="choose another"):
                pool.checkpoint(there)
        assert pool["name"] == "parent" and pool.snapshots() == []
    with everpool.open(there, cache_dir=tmp_path / "other host") as backup:
        assert backup["name"] == "backup" and len(backup["large"]) == 1_000_000


def test_a_backup_does_not_replace_another_pool(path: Path, tmp_path: Path) -> None:
    there, cache = f"file://{tmp_path}/bucket", tmp_path / "cache"
    with everpool.open(there, cache_dir=cache) as other:
        other["a"] = 1
    with everpool.open(path) as pool, everpool.open(tmp_path / "second") as second:
        with pytest.raises(ExistsError, match="no backup of this one"):
            pool.checkpoint(there)
        pool["a"] = 2
        pool.checkpoint(f"file://{tmp_path}/backup")
        with pytest.raises(ExistsError, match="no backup of this one"):
            second.checkpoint(f"file://{tmp_path}/backup")
    with everpool.open(there, cache_dir=cache) as other:
        assert other["a"] == 1
        with pytest.raises(InvalidError, match="branch"):
            other.checkpoint(f"file://{tmp_path}/backup")


def back_up(link: Connection, path: Path, there: str) -> None:
    with everpool.open(path) as pool:
        pool.checkpoint(there)
    link.send("done")


def test_a_backup_that_was_killed_is_finished_by_another_run(path: Path, tmp_path: Path) -> None:
    there = f"file://{tmp_path}/backup"
    choose = random.Random(3)
    with everpool.open(path) as pool:
        for number in range(60):
            pool[f"large/{number}"] = np.arange(50_000 + number)
        pool.allocate("m", 64 << 20).write(0, os.urandom(16 << 20))
        pool.checkpoint()
    sizes: list[int] = []
    for _ in range(50):
        child = Child(back_up, path, there)
        time.sleep(choose.uniform(0.05, 0.25))
        child.kill()
        sizes.append(bytes_in(tmp_path / "backup") if (tmp_path / "backup").exists() else 0)
        if "done" in child.said:
            break
        assert not (tmp_path / "backup" / "everpool.json").exists()
    else:
        call(lambda: back_up_to(path, there))
    with everpool.open(there, cache_dir=tmp_path / "cache") as backup:
        assert len(backup) == 61 and backup.verify().ok
    with everpool.open(path) as pool:
        pool.branch(f"file://{tmp_path}/branch")
        assert not [one for one in pool.snapshots() if "branch" in one.name]


def back_up_to(path: Path, there: str) -> None:
    with everpool.open(path) as pool:
        pool.checkpoint(there)


def test_an_empty_pool_has_a_past_and_a_backup(path: Path, tmp_path: Path) -> None:
    there = f"file://{tmp_path}/backup"
    with everpool.open(path) as pool:
        assert pool.checkpoint(there) == 0
        pool["a"] = 1
        with pool.at(0) as past:
            assert list(past) == []
        assert pool.checkpoint(there) == 1
    with everpool.open(there, cache_dir=tmp_path / "cache") as backup:
        assert dict(backup) == {"a": 1}


# What a past must not change


def test_a_copy_and_an_export_leave_the_past_behind(path: Path, tmp_path: Path) -> None:
    with everpool.open(path) as pool:
        pool["large"] = np.arange(100_000)
        pool.allocate("m", 1 << 20).write(5, b"memory")
        pool.snapshot("one")
        pool["large"] = np.arange(50_000)
    out_of("copy", path, tmp_path / "copy")
    out_of("export", path, tmp_path / "tree")
    assert out_of("verify", path)
    assert contents(tmp_path / "copy") == contents(path)
    assert not (tmp_path / "copy" / "past").exists()
    assert not list((tmp_path / "tree").rglob("checkpoints"))


def test_ctrl_c_ends_a_checkpoint_and_leaves_no_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "_BLOCKS_AT_ONCE", 4)
    with everpool.open(path) as pool:
        pool.allocate("m", 256 << 20).write(0, os.urandom(64 << 20))
        interrupt = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            while True:
                pool.checkpoint()
                pool.memory("m").write(0, os.urandom(64 << 20))
        call(make_one, path)
        pool.checkpoint()
        with pool.at(pool.version) as past:
            assert past.memory("m").read(0, 99) == pool.memory("m").read(0, 99)


def make_one(path: Path) -> None:
    with everpool.open(path) as pool:
        pool["other"] = 1
        pool.checkpoint()


def test_a_backup_and_a_writer_go_on_together(path: Path, tmp_path: Path) -> None:
    there = f"file://{tmp_path}/backup"
    with everpool.open(path) as pool:
        pool.checkpoint()
        ending_it = threading.Event()

        def write() -> None:
            number = 0
            while not ending_it.is_set():
                number += 1
                with pool.transaction() as tx:
                    tx["large"] = np.full(9000, number)
                    tx["number"] = number

        thread = threading.Thread(target=write)
        thread.start()
        try:
            for turn in range(8):
                pool.checkpoint(there)
                with everpool.open(
                    there, read_only=True, cache_dir=tmp_path / f"cache{turn}"
                ) as backup:
                    if "number" in backup:
                        assert backup["large"].tolist() == [backup["number"]] * 9000
        finally:
            ending_it.set()
            thread.join()


def test_a_backup_that_goes_on_is_collected_like_any_pool_in_a_bucket(
    path: Path, tmp_path: Path
) -> None:
    there = f"file://{tmp_path}/backup"
    with everpool.open(path) as pool:
        pool["large"] = np.arange(100_000)
        pool.allocate("m", 1 << 20).write(0, b"memory" * 50_000)
        pool.checkpoint(there)
    with everpool.open(there, cache_dir=tmp_path / "cache") as backup:
        kept = backup.snapshot("kept").version
        backup["large"] = np.arange(50_000)
        backup.memory("m").write(0, b"MEMORY")
        backup.retain(age=datetime.timedelta(0), versions=0)
        for _ in range(3):
            backup.checkpoint()
            backup.collect()
            backup["small"] = 1
        with backup.at(kept) as past:
            assert len(past["large"]) == 100_000 and past.memory("m").read(0, 6) == b"memory"
        backup.restore("kept")
        backup.forget_snapshot("kept")
        assert backup.verify().ok and len(backup["large"]) == 100_000
    with everpool.open(there, cache_dir=tmp_path / "other") as backup:
        assert backup.verify().ok and len(backup["large"]) == 100_000


def test_nobody_else_may_look_at_what_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = path.parent / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with everpool.open(path) as pool:
        pool["secret"] = "word"
        pool.snapshot("then")
        with pool.at("then") as past:
            assert past["secret"] == "word"
            (folder,) = scratch.iterdir()
            assert folder.stat().st_mode & 0o77 == 0


def test_a_backup_whose_snapshot_was_forgotten_is_whole(path: Path, tmp_path: Path) -> None:
    with everpool.open(path) as pool:
        pool["a"] = 1
        keeper = pool.engine()._keeper()  # type: ignore[attr-defined]
        version = pool.checkpoint()
        with keeper.pinned("backup", version):
            pool.forget_snapshot("backup")
        with pytest.raises(ValueError, match="theirs"), keeper.pinned("backup", version):
            pool.forget_snapshot("backup")
            raise ValueError("theirs")
