"""A pool's past: every version can be looked at and brought back, also over checkpoints."""

import datetime
import gc
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everpool
from everpool import ConflictError, ExistsError, InvalidError, NotFoundError
from everpool.agent.past import History
from everpool.agent.scratch import Scratch
from support.agents import end_agents
from support.pictures import change, picture
from support.processes import Child, ending

IN_A_BUCKET = pytest.mark.parametrize("place", ["bucket"], indirect=True)


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    yield f"file://{tmp_path}/bucket"
    end_agents(tmp_path)


@pytest.fixture(params=["bucket", "path"])
def place(request: pytest.FixtureRequest, url: str, tmp_path: Path) -> str:
    """Where a pool is that keeps a past: at a URL, or at a path."""
    return url if request.param == "bucket" else str(tmp_path / "path")


@pytest.fixture
def pool(place: str, tmp_path: Path) -> Iterator[Any]:
    with everpool.open(place, cache_dir=tmp_path / "host") as pool:
        pool.checkpoint()  # at a path, the past begins
        yield pool


@pytest.mark.parametrize("seed", range(3))
def test_every_version_can_be_looked_at_and_brought_back(pool: Any, seed: int) -> None:
    choose = random.Random(seed)
    pictures = {0: {}}
    for _ in range(150):
        change(pool, choose)
        if choose.random() < 0.05:
            pool.checkpoint()
        if choose.random() < 0.15:
            pictures[pool.version] = picture(pool)
    for version, expected in pictures.items():
        with pool.at(version) as past:
            assert past.version == version and picture(past) == expected, version
    now, current = pool.version, picture(pool)
    for version in choose.sample(sorted(pictures), 5):
        pool.restore(version)
        assert picture(pool) == pictures[version], version
    pool.restore(now)
    assert picture(pool) == current
    assert pool.verify().ok


def test_a_version_in_the_midst_of_an_entry_can_be_looked_at(pool: Any) -> None:
    futures = []
    for number in range(300):
        with pool.transaction(wait=False) as tx:
            tx["number"] = number
        futures.append(tx.committed)
    versions = [future.result(20) for future in futures]
    for number in range(0, 300, 37):
        with pool.at(versions[number]) as past:
            assert past["number"] == number


def test_a_time_stands_for_the_version_of_that_moment(pool: Any) -> None:
    moments = []
    for number in range(4):
        pool["number"] = number
        time.sleep(0.02)
        moments.append(datetime.datetime.now(datetime.UTC))
        time.sleep(0.02)
        if number == 1:
            pool.checkpoint()
    for number, moment in enumerate(moments):
        with pool.at(moment) as past:
            assert past["number"] == number
    with pool.at(datetime.datetime(2001, 1, 1)) as past:
        assert past.version == 0 and list(past) == []


def test_snapshots_have_names_on_every_host(pool: Any, place: str, tmp_path: Path) -> None:
    pool["a"] = 1
    made = pool.snapshot("first")
    assert made.version == pool.version and made.time.tzinfo is not None
    pool["a"] = 2
    pool.snapshot("older", made.version - 1)
    with pytest.raises(ExistsError, match="first"):
        pool.snapshot("first")
    pool.checkpoint()
    with everpool.open(place, cache_dir=tmp_path / "other") as other:
        assert [found.name for found in other.snapshots()] == ["older", "first"]
        with other.at("first") as past:
            assert past["a"] == 1
        other.restore("first")
    pool.sync()
    assert pool["a"] == 1
    pool.forget_snapshot("first")
    assert [found.name for found in pool.snapshots()] == ["older"]
    with pytest.raises(NotFoundError, match="first"):
        pool.at("first")
    with pytest.raises(NotFoundError):
        pool.forget_snapshot("first")


def test_the_past_does_not_change(pool: Any) -> None:
    memory = pool.allocate("m", 100)
    memory.write(0, b"old")
    with pool.at(pool.version) as past:
        seen = past.memory("m")
        view = seen.view()
        memory.write(0, b"new")
        assert bytes(view[:3]) == seen.read(0, 3) == b"old"
        for act in (
            lambda: past.__setitem__("a", 1),
            lambda: past.allocate("b", 1),
            lambda: seen.write(0, b"x"),
            lambda: past.snapshot("s"),
        ):
            with pytest.raises(InvalidError):
                act()
    assert bytes(view[:3]) == b"old", "a view outlives its pool"


def test_what_cannot_be_gone_back_to(pool: Any) -> None:
    for wrong in (pool.version + 1, -1, 2.5, None):
        with pytest.raises(InvalidError):
            pool.at(wrong)
    with pytest.raises(NotFoundError, match="snapshots"):
        pool.at("never made")


def test_a_restore_conflicts_with_what_comes_in_between(
    pool: Any, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool["a"] = 1
    version = pool.version
    pool["a"] = 2
    whole = everpool.pool.restoring

    def overtaken(*engines: Any) -> Any:
        found = whole(*engines)
        with everpool.open(place, cache_dir=tmp_path / "other") as other:
            other["b"] = 1
        return found

    monkeypatch.setattr(everpool.pool, "restoring", overtaken)
    with pytest.raises(ConflictError):
        pool.restore(version)
    pool.sync()
    assert pool["a"] == 2


@IN_A_BUCKET
def test_a_branch_goes_its_own_way(pool: Any, url: str, tmp_path: Path) -> None:
    large = np.arange(1_000_000)
    pool["large"] = large
    pool["name"] = "parent"
    memory = pool.allocate("m", 1 << 30)
    memory.write(1 << 29, b"before" * 100_000)
    pool.checkpoint()
    memory.write(0, b"behind the checkpoint")
    then = pool.version
    pool["name"] = "parent, later"
    stored = folder_size(tmp_path / "bucket")
    there = f"file://{tmp_path}/branch"
    pool.branch(there, then)
    assert folder_size(tmp_path / "bucket") - stored < 100_000
    assert folder_size(tmp_path / "branch") < 1_500_000, "segments were copied"
    assert [found.name for found in pool.snapshots()] == [f"branch at {there}"]
    with everpool.open(there, cache_dir=tmp_path / "host") as branch:
        assert branch.version == then and branch["name"] == "parent"
        assert np.array_equal(branch["large"], large)
        assert branch.memory("m").read(0, 21) == b"behind the checkpoint"
        assert branch.memory("m").read((1 << 29) + 6, 6) == b"before"
        branch["name"] = "branch"
        branch.memory("m").write(1 << 29, b"BRANCH")
        branch.checkpoint()
        branch["large"] = np.zeros(100_000)
        with branch.at(then) as past:
            assert past["name"] == "parent" and past.memory("m").read(1 << 29, 6) == b"before"
        with pytest.raises(InvalidError, match="branched"):
            branch.at(then - 1)
        branch.branch(f"file://{tmp_path}/twig")
        assert branch.verify().ok
    for host in ("host", "other"):
        with everpool.open(f"file://{tmp_path}/twig", cache_dir=tmp_path / host) as twig:
            assert twig["name"] == "branch" and len(twig["large"]) == 100_000
            assert twig.memory("m").read(1 << 29, 12) == b"BRANCHbefore"
            assert twig.memory("m").read(0, 6) == b"behind"
    pool.sync()
    assert pool["name"] == "parent, later" and memory.read(1 << 29, 6) == b"before"
    with pytest.raises(ExistsError, match="choose another"):
        pool.branch(there)


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@IN_A_BUCKET
def test_restored_memory_goes_into_segments_not_into_the_log(pool: Any, tmp_path: Path) -> None:
    memory = pool.allocate("m", 16 << 20)
    before = pool.snapshot("zeros")
    memory.write(0, b"x" * (16 << 20))
    memory.write(3 << 20, bytes(1 << 16))  # a hole in what differs
    pool.restore(before.version)
    assert memory.read(0, 16 << 20) == bytes(16 << 20)
    log = [path for path in (tmp_path / "bucket" / "log").rglob("*") if path.is_file()]
    assert log and max(path.stat().st_size for path in log) < 2 << 20


@IN_A_BUCKET
def test_a_branch_is_pinned_where_it_begins_also_after_an_earlier_try(
    pool: Any, tmp_path: Path
) -> None:
    pool["a"] = 1
    url = f"file://{tmp_path}/branch"
    pool.snapshot(f"branch at {url}", 1)  # as a try leaves it that died before the rest
    pool["a"] = 2
    begin = pool.version
    pool.branch(url)
    _, pinned = pool.snapshots()
    assert pinned.version >= begin and pinned.name.startswith(f"branch at {url}, of version ")


def test_version_0_gets_no_name(pool: Any) -> None:
    with pytest.raises(InvalidError, match="a later one"):
        pool.snapshot("zero", 0)


# Its folder


def folders(host: Path) -> list[Path]:
    return list(host.glob("*/past/*"))


@IN_A_BUCKET
def test_a_killed_process_leaves_no_folder_behind_the_next_look_back(
    pool: Any, url: str, tmp_path: Path
) -> None:
    pool["a"] = 1
    child = Child(look_back_and_stay, url, tmp_path / "host")
    with ending(child):
        heir = child.receive()
        (left,) = folders(tmp_path / "host")
        with pool.at(1) as past:
            assert past["a"] == 1
            assert left in folders(tmp_path / "host")  # it is in use
        child.kill()
        with pool.at(1):
            assert not left.exists()
            assert len(folders(tmp_path / "host")) == 1
        os.kill(heir, signal.SIGKILL)
    assert folders(tmp_path / "host") == []


def look_back_and_stay(link: Connection, url: str, cache: Path) -> None:
    with everpool.open(url, cache_dir=cache) as pool, pool.at(1) as past:
        assert past["a"] == 1
        heir = os.fork()  # which lives on, and does not keep the folder
        if heir:
            link.send(heir)
        time.sleep(60)


@IN_A_BUCKET
def test_a_past_that_cannot_be_opened_leaves_nothing(
    pool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise everpool.UnavailableError("the store is away: try again")

    pool["a"] = 1
    before = open_files()
    monkeypatch.setattr(History, "play", fail)
    with pytest.raises(everpool.UnavailableError):
        pool.at(1)
    assert folders(tmp_path / "host") == [] and open_files() == before
    monkeypatch.undo()
    for path in (tmp_path / "host").glob("*/past"):
        path.rmdir()
        path.write_text("in the way")
    with pytest.raises(everpool.EverpoolError):
        pool.at(1)
    assert open_files() == before


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_folders_are_made_and_swept_at_once(tmp_path: Path) -> None:
    def make() -> None:
        for _ in range(50):
            made = Scratch(tmp_path)
            (made.path / "file").write_text("mine")
            time.sleep(0.001)
            assert (made.path / "file").exists()
            made.remove()

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(make) for _ in range(8)]:
            done.result()
    assert list(tmp_path.iterdir()) == []


@IN_A_BUCKET
def test_a_branch_has_no_snapshots_of_what_it_cannot_look_at(
    pool: Any, url: str, tmp_path: Path
) -> None:
    pool["a"] = 1
    pool.snapshot("early")
    pool["a"] = 2
    there = f"file://{tmp_path}/branch"
    pool.branch(there)
    with everpool.open(there, cache_dir=tmp_path / "host") as branch:
        assert branch.snapshots() == []
        branch.snapshot("early")
        branch.checkpoint()
        with everpool.open(there, cache_dir=tmp_path / "other") as other:
            assert [found.name for found in other.snapshots()] == ["early"]
            with other.at("early") as past:
                assert past["a"] == 2
