"""Collection at a path: what is kept stays, what is not goes, whoever dies over it."""

import datetime
import os
import random
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everpool
from everpool import ClosedError, InvalidError
from everpool.past import collector, keeper
from everpool.replica import flush
from support.pictures import change, note, noted, picture
from support.processes import Child, call
from support.tracing import killed_somewhere_new, why_not

NOTHING = datetime.timedelta(0)
Pictures = dict[int, dict[str, Any]]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(keeper, "COLLECT_S", 1e12)  # only when it is asked for
    return tmp_path / "pool"


def objects(path: Path, folder: str) -> dict[str, int]:
    """Return what lies in a folder of the past, with its size."""
    found = (path / "past" / folder).rglob("*")
    return {
        str(one.relative_to(path / "past")): one.stat().st_size
        for one in found
        if one.is_file() and one.name[0] != "." and one.name != "everpool.json"
    }


def check(pool: Any, pictures: Pictures, pins: list[int], kept: int) -> None:
    for version, expected in pictures.items():
        if version >= kept or version in pins:
            with pool.at(version) as past:
                assert picture(past) == expected, version
        else:
            with pytest.raises(InvalidError, match="was collected: versions from"):
                pool.at(version)


def check_sharply(pool: Any, pictures: Pictures) -> None:
    state = pool.engine().replica.state()
    check(pool, pictures, [one.version for one in pool.snapshots()], state.horizon.kept)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_kept_stays_and_the_rest_goes(
    path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(flush, "KEPT_VERSIONS", 5)
    choose = random.Random(seed)
    pictures: Pictures = {}
    snapshots: dict[str, int] = {}
    with everpool.open(path) as pool:
        if seed % 2:
            pool["before"] = 1
        pool.checkpoint()
        for number in range(150):
            change(pool, choose)
            pictures[pool.version] = picture(pool)
            dice = choose.random()
            if dice < 0.12:
                pool.checkpoint()
            elif dice < 0.17:
                name = f"snapshot {number}"
                snapshots[name] = pool.snapshot(name).version
                pictures[snapshots[name]] = pictures[pool.version] = picture(pool)
            elif dice < 0.2 and snapshots:
                name = choose.choice(sorted(snapshots))
                pool.forget_snapshot(name)
                del snapshots[name]
            elif dice < 0.24:
                pool.retain(age=NOTHING, versions=choose.choice([0, 5, 20, 60]))
            elif dice < 0.32:
                kept = pool.collect().kept
                check(pool, pictures, list(snapshots.values()), kept)
                again = pool.collect(dry_run=True)
                assert again.deleted == 0 or again.kept > kept
            elif dice < 0.36 and snapshots:
                version = choose.choice(sorted(snapshots.values()))
                pool.restore(version)
                assert picture(pool) == pictures[version]
        pool.retain(age=NOTHING, versions=0)
        for name in snapshots:
            pool.forget_snapshot(name)
        current = picture(pool)
        pool["last"] = 1
        pool.checkpoint()
        pool.collect()
        assert not objects(path, "values"), "what the pool has itself it needs nowhere else"
        assert len(objects(path, "checkpoints")) == 1 and not objects(path, "log")
        with pool.at(pool.engine().replica.state().checkpoint) as past:
            assert picture(past) == current | {"last": 1}
            assert past.verify().ok
        assert pool.verify().ok
    with everpool.open(path, create=False) as pool:
        assert picture(pool) == current | {"last": 1}


def test_a_pool_that_keeps_nothing_stays_small(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flush, "KEPT_VERSIONS", 5)
    sizes = []
    with everpool.open(path) as pool:
        pool.retain(age=NOTHING, versions=0)
        memory = pool.allocate("memory", 1 << 20)
        for round in range(20):
            for number in range(16):
                pool[f"value/{number}"] = np.full(20_000, round)
                memory[number << 16 : (number << 16) + 8] = bytes([round]) * 8
                pool[f"small/{number}"] = b"x" * 40_000
            pool.checkpoint()
            pool.collect()
            parts = ("values", "pages", "log", "checkpoints")
            sizes.append([sum(objects(path, part).values()) for part in parts])
        values, pages, log, checkpoints = (max(part) for part in zip(*sizes, strict=True))
        assert not values and pages <= 1 << 20 and checkpoints < 4096 and not log, sizes
        assert len(objects(path, "index")) < 12


def test_by_default_a_week_is_kept(path: Path) -> None:
    with everpool.open(path) as pool:
        pool.checkpoint()
        pool["a"] = np.zeros(20_000)
        pool["a"] = np.ones(20_000)
        version = pool.version
        pool["a"] = 1
        pool.checkpoint()
        before = objects(path, "")
        assert pool.collect()[1:] == (0, 0, 0, 0) and objects(path, "") == before
        for kept in (0, version):
            with pool.at(kept) as past:
                assert len(past) == bool(kept) and (not kept or past["a"][0] == 1)


def test_a_dry_run_changes_nothing_and_tells_the_truth(path: Path) -> None:
    with everpool.open(path) as pool:
        pool.retain(age=NOTHING, versions=0)
        pool.allocate("m", 1 << 20).write(0, b"x" * 300_000)
        for number in range(20):
            pool["a"] = np.full(20_000, number)
            if number % 5 == 1:
                pool.checkpoint()
        pool["a"] = 1
        pool.checkpoint()
        before, version = objects(path, ""), pool.version
        expected = pool.collect(dry_run=True)
        assert objects(path, "") == before and pool.version == version
        assert pool.collect() == expected and expected.deleted >= 20
        left = objects(path, "")
        gone = {key: size for key, size in before.items() if key not in left}
        assert expected.deleted == len(gone) and expected.deleted_bytes == sum(gone.values())


def test_a_pool_without_a_past_has_nothing_to_collect(path: Path) -> None:
    with everpool.open(path) as pool:
        pool["a"] = 1
        assert pool.collect() == (0, 0, 0, 0, 0)
        assert not (path / "past").exists()
    with (
        everpool.open(path, read_only=True) as pool,
        pytest.raises(InvalidError, match="read-only"),
    ):
        pool.collect()


def test_a_snapshot_that_is_taken_meanwhile_is_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with everpool.open(path) as pool:
        pool.retain(age=NOTHING, versions=0)
        pool["a"] = np.arange(20_000)
        pool.checkpoint()
        version = pool.version
        for number in range(3):
            pool["a"] = np.arange(30_000 + number)
            pool.checkpoint()
        plans = []

        def plan(*args: Any) -> Any:
            plans.append(original(*args))
            if len(plans) == 1:
                pool.snapshot("meanwhile", version)
            return plans[-1]

        original = collector.plan
        monkeypatch.setattr(collector, "plan", plan)
        assert pool.collect().kept > version and len(plans) == 2
        with pool.at("meanwhile") as past:
            assert len(past["a"]) == 20_000
        with pytest.raises(InvalidError, match="kept"):
            pool.snapshot("too late", version + 1)
        pool.forget_snapshot("meanwhile")
        assert pool.collect().deleted > 2
        with pytest.raises(InvalidError, match="was collected"):
            pool.at(version)


def test_a_past_that_is_open_fails_clearly_when_it_is_collected(path: Path) -> None:
    with everpool.open(path) as pool:
        pool.retain(age=NOTHING, versions=0)
        pool["a"] = np.arange(20_000)
        pool["b"] = np.arange(20_000)
        pool.allocate("m", 1 << 20).write(0, b"x" * 100_000)
        pool.checkpoint()
        pool.memory("m").write(0, b"y" * 100_000)
        with pool.at(pool.version - 2) as past:
            held = past["a"]
            pool["a"] = pool["b"] = 1
            for _ in range(2):
                pool.checkpoint()
                pool["c"] = 1
            flush.KEPT_VERSIONS, kept = 0, flush.KEPT_VERSIONS
            try:
                pool.engine().flush()
                for _ in range(20):
                    pool["c"] = 1
            finally:
                flush.KEPT_VERSIONS = kept
            assert pool.collect().deleted > 2
            assert np.array_equal(held, np.arange(20_000))
            for read in (lambda: past["b"], lambda: past.memory("m").read(0, 9)):
                with pytest.raises(ClosedError, match="was collected"):
                    read()
        assert pool.verify().ok


def test_what_unfinished_checkpoints_left_is_deleted(path: Path) -> None:
    def die(step: str) -> None:
        def stop(*_: Any, **__: Any) -> None:
            os._exit(0)

        with everpool.open(path) as pool:
            pool.memory("m").write(0, os.urandom(1 << 20))
            pool.engine()._keeper()
            setattr(keeper, step, stop)
            pool.checkpoint()

    with everpool.open(path) as pool:
        pool.allocate("m", 4 << 20).write(0, os.urandom(4 << 20))
        pool.checkpoint()
    before = objects(path, "").keys()
    for step in ("write_runs", "write_manifest", "Checkpoint"):
        child = Child(lambda _, step=step: die(step))
        child.join()
    with everpool.open(path) as pool:
        left = objects(path, "").keys() - before
        assert sum(key.startswith(("checkpoints/", "index/", "pages/")) for key in left) == 3
        pool.checkpoint()
        assert {key[:4] for key in objects(path, "").keys() & left} == {"log/"}
        assert len(objects(path, "checkpoints")) == 2
        with pool.at(pool.engine().replica.state().checkpoint) as past:
            assert past.verify().ok


def live(path: Path, notes: Path, seed: int) -> None:
    """Change the pool at random, noting how it is, while a thread collects."""
    flush.KEPT_VERSIONS, flush.FLUSH_VERSIONS = 30, 25
    choose = random.Random(seed)
    with everpool.open(path) as pool:

        def collect() -> None:
            while True:
                time.sleep(choose.random() * 0.01)
                pool.checkpoint()
                pool.collect()

        threading.Thread(target=collect, daemon=True).start()
        number = 0
        while True:
            number += 1
            change(pool, choose)
            names = [one.name for one in pool.snapshots()]
            if number % 20 == 0:
                pool.snapshot(f"{seed} {number}")
            if len(names) > 4:
                pool.forget_snapshot(choose.choice(names))
            note(notes, pool)


def look_around(path: Path, pictures: Pictures) -> None:
    with everpool.open(path, create=False) as pool:
        check_sharply(pool, pictures)
        pool.checkpoint()
        kept = pool.collect().kept
        check_sharply(pool, pictures)
        assert pool.verify().ok
        again = pool.collect(dry_run=True)
        assert again.deleted == 0 or again.kept > kept


def test_a_storm_of_kills_loses_nothing_that_is_kept(path: Path, tmp_path: Path) -> None:
    with everpool.open(path) as pool:
        pool.retain(age=NOTHING, versions=40)
        pool.checkpoint()
    notes = tmp_path / "notes"
    notes.touch()
    choose = random.Random()
    deadline = time.monotonic() + 12
    deaths = 0
    while time.monotonic() < deadline:
        seed = choose.randrange(1 << 30)
        child = Child(lambda _, seed=seed: live(path, notes, seed))
        time.sleep(choose.uniform(0.3, 0.9))
        child.kill()
        deaths += 1
        pictures = noted(notes)
        some = choose.sample(sorted(pictures), min(40, len(pictures)))
        call(look_around, path, {one: pictures[one] for one in {*some, *sorted(pictures)[-20:]}})
    assert deaths > 1
    with everpool.open(path) as pool:
        pool.retain(versions=0)
        for one in pool.snapshots():
            pool.forget_snapshot(one.name)
        pool["last"] = 1
        pool.checkpoint()
        pool.collect()
        assert len(objects(path, "checkpoints")) == 1 and not objects(path, "values")
        assert pool.verify().ok


def test_it_is_collected_without_being_asked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "COLLECT_S", 0.2)
    with everpool.open(path) as pool:
        pool.retain(age=NOTHING, versions=0)
        deadline = time.monotonic() + 30
        for number in range(1 << 30):
            pool["a"] = np.full(20_000, number)
            pool.checkpoint()
            time.sleep(0.02)
            if number > 30 and len(objects(path, "checkpoints")) < 20:
                break
            assert time.monotonic() < deadline
        assert pool["a"][0] == number
    with everpool.open(path, create=False) as pool:
        assert pool.verify().ok


def collect(pause: Callable[[], None], link: Connection, path: Path) -> None:
    with everpool.open(path, create=False) as pool:
        pause()
        pool.collect()
        link.send("done")
        pause()


def prepare(path: Path, seed: int) -> Pictures:
    """Make changes and checkpoints, and leave a snapshot in the midst of them."""
    keeper.COLLECT_S, flush.KEPT_VERSIONS = 1e12, 5
    choose = random.Random(seed)
    pictures: Pictures = {}
    with everpool.open(path) as pool:
        pool.checkpoint()
        pool.retain(age=NOTHING, versions=10)
        for one in pool.snapshots():
            pool.forget_snapshot(one.name)
        for number in range(24):
            change(pool, choose)
            pictures[pool.version] = picture(pool)
            if number % 6 == 5:
                pool.checkpoint()
        pool.snapshot("midst", sorted(pictures)[9])
        pool["large"] = np.arange(9000 + seed)
        pictures[pool.version] = picture(pool)
        pool.checkpoint()
    return pictures


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "can be traced")
def test_killed_at_every_step_of_a_collection(path: Path) -> None:
    pictures: Pictures = {}
    tried: set[tuple[str, int]] = set()
    for seed in range(400):
        pictures |= call(prepare, path, seed)
        if not killed_somewhere_new(tried, 1 << 30, collect, path):
            break
        call(look_around, path, pictures)
    else:
        raise AssertionError("it never ends")
    assert len([step for step, _ in tried if "unlink" in step]) > 8, tried
