"""Collection: what is kept stays readable, what is not goes, whoever collects and dies over it."""

import contextlib
import datetime
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everpool
from everpool import InvalidError
from everpool.agent.collector import Collector
from everpool.agent.host import folder_name
from everpool.agent.pools import read_marker
from everpool.agent.server import Server
from everpool.records import Collect, Put, Record
from everpool.replica.batch import Result
from everpool.snapshots import restoring
from everpool.store import open_store
from support.agents import end_agents
from support.pictures import change, picture

NOTHING = datetime.timedelta(0)


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    yield f"file://{tmp_path}/bucket"
    end_agents(tmp_path)


@pytest.fixture
def pool(url: str, tmp_path: Path) -> Iterator[Any]:
    with everpool.open(url, cache_dir=tmp_path / "host") as pool:
        yield pool


def objects(tmp_path: Path, folder: str) -> dict[str, int]:
    """Return what lies in a folder of the bucket, with its size."""
    found = (tmp_path / "bucket" / folder).glob("**/*")
    return {path.name: path.stat().st_size for path in found if path.is_file()}


@pytest.mark.parametrize("seed", range(4))
def test_what_is_kept_stays_and_the_rest_goes(
    pool: Any, url: str, tmp_path: Path, seed: int
) -> None:
    choose = random.Random(seed)
    pictures: dict[int, Any] = {}
    snapshots: dict[str, int] = {}
    for number in range(90):
        change(pool, choose)
        pictures[pool.version] = picture(pool)
        dice = choose.random()
        if dice < 0.08:
            pool.checkpoint()
        elif dice < 0.14:
            name = f"snapshot {number}"
            snapshots[name] = pool.snapshot(name).version
            pictures[pool.version] = picture(pool)
            pictures[snapshots[name]] = picture(pool)
        elif dice < 0.18 and snapshots:
            name = choose.choice(sorted(snapshots))
            pool.forget_snapshot(name)
            del snapshots[name]
        elif dice < 0.22:
            pool.retain(age=NOTHING, versions=choose.choice([0, 5, 20, 60]))
        elif dice < 0.28:
            kept = pool.collect().kept
            for version, expected in pictures.items():
                if version >= kept or version in snapshots.values():
                    with pool.at(version) as past:
                        assert picture(past) == expected, version
                else:
                    with pytest.raises(InvalidError, match="was collected"):
                        pool.at(version)
        elif dice < 0.32:
            version = choose.choice(sorted(snapshots.values()) or [pool.version])
            pool.restore(version)
            assert picture(pool) == pictures[version]
        elif dice < 0.36:
            with everpool.open(url, cache_dir=tmp_path / f"host {number}") as other:
                assert picture(other) == picture(pool)
                assert other.verify().ok
    pool.retain(age=NOTHING, versions=0)
    for name in snapshots:
        pool.forget_snapshot(name)
    current = picture(pool)
    pool.collect()
    assert pool.collect(dry_run=True).dead <= 3  # the checkpoint before, as every time
    large = {name for name, found in current.items() if found and "value" in str(found)[:9]}
    assert len(objects(tmp_path, "values")) == len(large)
    assert len(objects(tmp_path, "checkpoints")) <= 2
    with everpool.open(url, cache_dir=tmp_path / "new") as other:
        assert picture(other) == current and other.verify().ok


def test_a_pool_that_keeps_nothing_stays_small(pool: Any, tmp_path: Path) -> None:
    pool.retain(age=NOTHING, versions=0)
    memory = pool.allocate("memory", 1 << 20)
    sizes = []
    for round in range(8):
        for number in range(30):
            pool[f"value/{number}"] = np.full(20_000, round)
            memory[number << 15 : (number << 15) + 8] = bytes([round]) * 8
            pool[f"small/{number}"] = b"x" * 40_000
        pool.checkpoint()
        pool.collect()
        # Beside these there is the index, with the last 64 MiB of the log, for slow readers.
        parts = ("values", "pages", "log", "checkpoints")
        sizes.append([sum(objects(tmp_path, part).values()) for part in parts])
    values, pages, log, checkpoints = (max(part) for part in zip(*sizes, strict=True))
    assert values < 1.1 * 30 * 160_000 and pages < 1.1 * (1 << 20) and checkpoints < 4096, sizes
    assert log < 5 << 20, sizes  # large entries go with the head that they stood in, 4 MiB at most
    assert len(objects(tmp_path, "index")) < 20


def test_by_default_a_week_is_kept(pool: Any, tmp_path: Path) -> None:
    assert pool.retention == (datetime.timedelta(days=7), 16_384)
    pool["a"] = np.zeros(20_000)
    pool["a"] = np.ones(20_000)
    version = pool.checkpoint()
    pool["a"] = 1
    found = pool.collect()
    assert found.deleted == 0 and len(objects(tmp_path, "values")) == 2
    with pool.at(version) as past:
        assert past["a"][0] == 1


def test_a_dry_run_changes_nothing_and_tells_the_truth(pool: Any, tmp_path: Path) -> None:
    pool.retain(age=NOTHING, versions=0)
    for number in range(20):
        pool["a"] = np.full(20_000, number)
        pool["b"] = b"x" * 60_000
    pool.checkpoint()
    pool["a"] = 1
    pool.checkpoint()
    before = objects(tmp_path, "")
    version = pool.version
    expected = pool.collect(dry_run=True)
    assert objects(tmp_path, "") == before and pool.version == version
    assert expected.dead >= 20 and expected.dead_bytes > 20 * 160_000
    done = pool.collect()
    assert done.deleted >= expected.dead
    left = set(before) - set(objects(tmp_path, ""))
    assert len(left) >= expected.dead


def test_an_upload_that_slept_is_void(pool: Any, tmp_path: Path) -> None:
    pool.retain(age=NOTHING, versions=0)
    engine = pool.engine()
    staged = engine.stage(everpool.values.encode(np.zeros(20_000)))
    for number in range(3):
        pool["n"] = number
        pool.checkpoint()
    pool.collect()
    assert staged.reference.file not in objects(tmp_path, "values")
    record = Record(pool.version, [], [], [], [Put("late", staged.reference)])
    with pytest.raises(everpool.ConflictError, match="upload that began"):
        engine.write(record, [staged]).version()
    assert "late" not in pool


def test_an_upload_under_way_is_left_alone(pool: Any, tmp_path: Path) -> None:
    pool.retain(age=NOTHING, versions=3)
    for number in range(8):
        pool["n"] = number
    pool.checkpoint()
    engine = pool.engine()
    staged = engine.stage(everpool.values.encode(np.arange(20_000)))
    pool["n"] = 8
    pool.collect()
    assert engine.replica.state().horizon.start > 0, "else no upload is void"
    assert staged.reference.file in objects(tmp_path, "values")
    record = Record(pool.version, [], [], [], [Put("late", staged.reference)])
    engine.write(record, [staged]).version()
    assert pool["late"][5] == 5 and pool.verify().ok


def test_a_branch_keeps_what_it_shares(pool: Any, url: str, tmp_path: Path) -> None:
    pool.retain(age=NOTHING, versions=0)
    pool["value"] = np.arange(20_000)
    memory = pool.allocate("memory", 1 << 20)
    memory[:100] = b"a" * 100
    pool.checkpoint()
    branch = f"file://{tmp_path}/branch"
    pool.branch(branch)
    pool["value"] = np.ones(20_000)
    memory[:100] = b"b" * 100
    pool.checkpoint()
    pool.collect()
    with everpool.open(branch, cache_dir=tmp_path / "host") as other:
        assert other["value"][7] == 7 and other.memory("memory").read(0, 3) == b"aaa"
        other.retain(age=NOTHING, versions=0)
        other["value"] = np.zeros(20_000)
        other.checkpoint()
        other.collect()
        other.collect()
        assert other["value"][7] == 0 and other.memory("memory").read(0, 3) == b"aaa"
        assert other.verify().ok
    assert pool["value"][7] == 1 and pool.verify().ok
    pool.forget_snapshot(f"branch at {branch}")
    pool.checkpoint()
    pool.collect()
    assert len(objects(tmp_path, "values")) == 1


def test_less_than_nothing_cannot_be_kept(pool: Any) -> None:
    with pytest.raises(InvalidError, match="less than nothing"):
        pool.retain(age=datetime.timedelta(days=-1))
    with pytest.raises(InvalidError, match="less than nothing"):
        pool.retain(versions=-1)
    assert pool.retain(versions=5) == (datetime.timedelta(days=7), 5)


def test_agents_collect_by_themselves(url: str, tmp_path: Path) -> None:
    script = (
        "import datetime, sys, time, everpool, numpy\n"
        "pool = everpool.open(sys.argv[1], cache_dir=sys.argv[2])\n"
        "pool.retain(age=datetime.timedelta(0), versions=0)\n"
        "for number in range(60):\n"
        "    pool['a'] = numpy.full(20_000, number)\n"
        "    if number % 5 == 4:\n"
        "        pool.checkpoint()\n"
        "    time.sleep(0.1)\n"
        "pool.close()\n"
    )
    command = [sys.executable, "-c", script, url, str(tmp_path / "host")]
    environment = {**os.environ, "EVERPOOL_COLLECT_S": "1"}
    subprocess.run(command, env=environment, check=True, timeout=100)
    assert len(objects(tmp_path, "values")) < 40
    with everpool.open(url, cache_dir=tmp_path / "new") as pool:
        assert pool["a"][0] == 59 and pool.verify().ok


@pytest.mark.parametrize(
    "key",
    ["values/" + "€" * 240, "checkpoints/" + "f" * 40 + "-x", "values/../" + "0" * 32, ""],
)
def test_no_key_stops_a_replica(pool: Any, key: str) -> None:
    """LMDB takes 511 bytes as a key, and 8 bytes are for a version."""
    pool.retain(age=NOTHING, versions=0)
    pool["a"] = 1
    pool.checkpoint()
    pool.collect()
    state = pool.engine().replica.state()
    kept = state.horizon
    collect = Collect(state.version, kept.kept, kept.start, [], [key])
    with pytest.raises(InvalidError, match="not to be collected"):
        pool.engine().write(Record(pool.version, [], [], [], [collect]), []).version()
    pool["b"] = 1
    assert pool["b"] == 1


def test_what_others_left_in_the_bucket_stays(pool: Any, tmp_path: Path) -> None:
    pool.retain(age=NOTHING, versions=0)
    pool["a"] = np.full(20_000, 1)
    values = tmp_path / "bucket" / "values"
    names = {"x" * 250, "ü" * 100, "a b", "f" * 40 + "-x", "copy of " + "0" * 32}
    for name in names:
        (values / name).write_bytes(b"theirs")
    pool["a"] = np.full(20_000, 2)
    pool.collect()
    assert len(objects(tmp_path, "values")) == len(names) + 1


def test_a_branch_knows_nothing_of_what_its_parent_has_let_go_of(
    pool: Any, url: str, tmp_path: Path
) -> None:
    """Neither a host that was there from its beginning, nor one that begins from a checkpoint."""

    def dead(pool: Any) -> list[Any]:
        index = pool.engine().replica.index
        with index.read() as txn:
            return list(index.garbage(txn))

    pool.retain(age=NOTHING, versions=0)
    pool["a"] = np.full(20_000, 1)
    pool.checkpoint()
    pool["a"] = np.full(20_000, 2)
    pool.collect()
    assert dead(pool)
    branch = f"file://{tmp_path}/branch"
    pool.branch(branch)
    with everpool.open(branch, cache_dir=tmp_path / "first") as first:
        first["x"] = 1
        first.checkpoint()
        with everpool.open(branch, cache_dir=tmp_path / "second") as second:
            assert dead(first) == dead(second) == []


@contextlib.contextmanager
def other_agent(tmp_path: Path, url: str) -> Iterator[Server]:
    """An agent of another host, in this process and without a listener."""
    with contextlib.closing(open_store(url)) as store:
        marker = read_marker(store, url)
    folder = tmp_path / "other" / folder_name(url, marker.pool())
    folder.mkdir(parents=True)
    server = Server(folder, url, -1)
    server.host.begin()
    yield server
    server.commits.close()
    server.workers.shutdown()
    server.host.close()


@pytest.mark.parametrize("at", [1, 2])
def test_an_upload_that_is_named_while_it_is_collected(
    pool: Any, url: str, tmp_path: Path, at: int
) -> None:
    """Either the record comes in time, and the object stays, or the record aborts."""
    pool.retain(age=NOTHING, versions=0)
    engine = pool.engine()
    staged = engine.stage(everpool.values.encode(np.arange(20_000)))
    pool["n"] = 1
    pool.checkpoint()
    records: list[Record] = []

    with other_agent(tmp_path, url) as server:

        def commit(record: Record) -> Result:
            records.append(record)
            if len(records) == at:
                late = Record(pool.version, [], [], [], [Put("late", staged.reference)])
                with contextlib.suppress(everpool.ConflictError):
                    engine.write(late, [staged]).version()
            return server.commit_own(record)

        Collector(server.host, commit).collect()
        for _ in range(2):
            server.checkpoint()
            Collector(server.host, server.commit_own).collect()
    assert len(records) == at
    pool.sync()
    assert ("late" in pool) == (at == 1)
    assert "late" not in pool or pool["late"][5] == 5
    assert pool.verify().ok


def test_a_restore_that_slept_brings_nothing_back_that_was_collected(pool: Any) -> None:
    pool.retain(age=NOTHING, versions=0)
    memory = pool.allocate("memory", 1 << 20)
    memory[:] = b"a" * (1 << 20)
    pool.snapshot("first")
    memory[:] = b"b" * (1 << 20)
    pool.checkpoint()
    engine = pool.engine()
    with pool.at("first") as then:
        record, staged = restoring(engine, then.engine())
    assert staged
    pool.collect()
    with pytest.raises(everpool.ConflictError, match="upload that began"):
        engine.write(record, staged).version()
    assert memory.read(0, 2) == b"bb" and pool.verify().ok
    pool.restore("first")
    assert memory.read(0, 2) == b"aa" and pool.verify().ok


def test_a_snapshot_can_be_looked_at_when_the_log_behind_it_is_gone(pool: Any) -> None:
    pool.retain(age=NOTHING, versions=0)
    for number in range(6):
        pool["large"] = b"%d" % number * 60_000  # stands in an object of its own
        pool["small"] = b"x" * 9_000
        if number == 1:
            pool.snapshot("early")
    for number in range(30):
        pool["small"] = b"y" * 9_000 + b"%d" % number
    pool.checkpoint()
    for number in range(30):
        pool["small"] = b"z" * 9_000 + b"%d" % number
    pool.collect()
    with pool.at("early") as past:
        assert past["large"] == b"1" * 60_000


def test_a_host_that_slept_begins_anew_when_what_it_would_play_was_collected(
    pool: Any, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.retain(age=NOTHING, versions=0)
    memory = pool.allocate("memory", 4 << 20)

    def leave(why: str) -> None:
        raise InterruptedError(why)

    with other_agent(tmp_path, url) as server:
        monkeypatch.setattr(server.host, "leave", leave)
        memory[:] = b"a" * (4 << 20)
        memory.fetch_add(0, 1)
        memory[:] = b"b" * (4 << 20)
        assert len(objects(tmp_path, "values")) == 2
        pool.collect()
        assert not objects(tmp_path, "values")
        with pytest.raises(InterruptedError, match="was collected"):
            server.host.sync()
