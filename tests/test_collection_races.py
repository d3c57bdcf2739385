"""Collections that others come in between: each test is one interleaving, with real agents."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everpool
from everpool.agent import branching
from everpool.agent import host as hosts
from everpool.agent.host import LOG
from everpool.agent.host import Host as Replica
from everpool.agent.past import History
from everpool.agent.pools import read_marker
from everpool.errors import (
    ConflictError,
    EverpoolError,
    ExistsError,
    InvalidError,
    UnavailableError,
)
from everpool.log.bucket import BucketLog
from everpool.records import Entry, Put, Record, Reference, encode_entry
from everpool.segments.checkpoints import write_manifest
from everpool.segments.format import Manifest, Past
from everpool.store import open_store
from everpool.store.memory import MemoryStore
from everpool.values import encode
from support.agents import Host, end_agents, wait_until
from support.pictures import picture
from support.processes import stop
from test_bucket_attacks import World, checkpoint_in_time
from test_collection_attacks import NOTHING, catch_up, change, collect_in_time, prepare


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    yield World(tmp_path, monkeypatch)
    end_agents(tmp_path)


@contextlib.contextmanager
def collecting_until(world: World, pool: everpool.Pool, point: str) -> Iterator[None]:
    """Collect in a thread, up to a trap; go on behind it afterwards."""
    trap = world.trap("one", point, "wait")

    def collecting() -> None:
        with contextlib.suppress(EverpoolError):
            pool.collect()

    thread = threading.Thread(target=collecting)
    thread.start()
    trap.await_reached()
    yield
    trap.let_go()
    thread.join(60)
    assert not thread.is_alive()


def test_an_old_upload_is_named_between_look_and_decision(world: World) -> None:
    with world.open("one") as one, world.open("two", timeout_s=60) as two:
        prepare(one)
        two.sync()
        engine = two.engine()
        staged = engine.stage(encode(np.full(20_000, 77)))
        change(one, 8)
        with collecting_until(world, one, "listed"):
            two.sync()
            record = Record(two.version, [], [], [], [Put("late", staged.reference)])
            with contextlib.suppress(ConflictError):
                engine.write(record, [staged]).version()
        for number in range(9, 11):
            change(one, number)
            collect_in_time(one)
        with world.open("late") as late:
            picture(late)
            assert late.verify().ok


def test_memory_of_a_restore_that_slept(world: World) -> None:
    """Its uploads are from before what a collection has declared void."""
    from everpool.snapshots import restoring

    with world.open("one") as one, world.open("two", timeout_s=60) as two:
        one.retain(age=NOTHING, versions=0)
        memory = one.allocate("memory", 8 << 20)
        memory.write(0, os.urandom(6 << 20))
        one.snapshot("old")
        memory.write(0, os.urandom(6 << 20))
        checkpoint_in_time(one)
        two.sync()
        engine = two.engine()
        with two.at("old") as then:
            record, staged = restoring(engine, then.engine())
        assert staged
        collect_in_time(one)
        collect_in_time(one)
        with contextlib.suppress(ConflictError):
            engine.write(record, list(staged)).version()
        for pool in (one, two):
            pool.sync()
            assert len(pool.memory("memory").read(0, 6 << 20)) == 6 << 20
        with world.open("late") as late:
            late.memory("memory").read(0, 6 << 20)
            assert late.verify().ok


def test_an_entry_counts_once_when_the_store_goes_away_in_its_midst(tmp_path: Path) -> None:
    """It is in the index, and what it stores in memory cannot be fetched: it is finished later."""
    host = Host(tmp_path, "one")
    with host.open() as one:
        memory = one.allocate("memory", 8 << 20)
        store = open_store(host.url)
        (tmp_path / "two").mkdir()
        pool = read_marker(store, host.url).pool()
        replica = Replica(tmp_path / "two", pool, store, BucketLog(store, LOG))
        replica.begin()
        replica.fetch(1, [(0, 8 << 20)])
        data = os.urandom(6 << 20)
        memory.write(0, data)
        download, replica.values.download = replica.values.download, away
        with pytest.raises(UnavailableError):
            replica.sync()
        replica.values.download = download
        replica.sync()
        assert replica.replica.state().hash == one.engine().replica.state().hash
        assert replica.version == one.version and len(replica.blocks.dirty()[1]) > 1
        assert replica.blocks.copy(1, 0) == data[: len(replica.blocks.copy(1, 0))]
        replica.close()
    end_agents(tmp_path)


def away(reference: Reference) -> None:
    raise UnavailableError("the bucket is away")


@pytest.mark.parametrize("what", ["a store", "an addition"])
def test_a_host_that_slept_plays_what_is_gone(what: str, tmp_path: Path) -> None:
    """The log's head has what it missed, the store not what that takes: it begins anew."""
    hosts = [Host(tmp_path, name) for name in ("one", "two")]
    with hosts[0].open() as one, hosts[1].open(timeout_s=20) as two:
        one.retain(age=NOTHING, versions=0)
        memory = one.allocate("memory", 1 << 30)
        memory.write(0, b"first")
        version = checkpoint_in_time(one)
        wait_until(lambda: two.sync() > 0 and two.stats()["checkpoint"] == version)
        if what == "a store":
            assert two.memory("memory").read(0, 5) == b"first"  # so that it is changed at once
        agent = hosts[1].agent()
        stop(agent)
        if what == "a store":
            memory.write(0, os.urandom(6 << 20))
        else:
            memory.fetch_add(0, 1)
        memory.write(0, b"other")
        for _ in range(3):
            collect_in_time(one)
        os.kill(agent, signal.SIGCONT)
        catch_up(two)
        assert two.memory("memory").read(0, 5) == b"other"
        assert picture(two) == picture(one) and two.verify().ok
    end_agents(tmp_path)


def test_a_host_begins_with_a_checkpoint_that_is_collected_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path, "one")
    with host.open() as pool:
        pool.retain(age=NOTHING, versions=0)
        pool["a"] = 1
        pool.checkpoint()
        begin = hosts.make_replica

        def late(*args: Any) -> Path:
            monkeypatch.setattr(hosts, "make_replica", begin)
            for number in range(3):
                pool["a"] = number
                pool.collect()
            return begin(*args)

        monkeypatch.setattr(hosts, "make_replica", late)
        store = open_store(host.url)
        (tmp_path / "two").mkdir()
        id = read_marker(store, host.url).pool()
        replica = Replica(tmp_path / "two", id, store, BucketLog(store, LOG))
        replica.begin()
        assert replica.version == pool.version
        replica.close()
    end_agents(tmp_path)


def test_of_two_branches_at_one_url_the_first_keeps_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one names its version in the parent, too, and then finds the marker there."""
    url = f"file://{tmp_path}/branch"
    with Host(tmp_path, "one").open() as pool:
        pool.retain(age=NOTHING, versions=0)
        pool["a"] = np.full(20_000, 1)
        create = branching.create_branch

        def slow(*args: Any) -> None:
            def slower(*others: Any) -> None:
                create(*args)
                create(*others)

            monkeypatch.setattr(branching, "create_branch", slower)
            pool["a"] = 5
            pool.collect()
            pool["a"] = np.full(20_000, 2)
            pool.checkpoint()
            with pytest.raises(ExistsError):
                pool.branch(url)

        monkeypatch.setattr(branching, "create_branch", slow)
        pool.branch(url)
        for number in range(3):
            pool["a"] = np.full(20_000, number)
            pool.collect()
        with everpool.open(url, cache_dir=tmp_path / "branch host") as branch:
            assert branch["a"][0] == 1 and branch.verify().ok
    end_agents(tmp_path)


def test_a_time_of_which_nothing_is_kept_is_no_time_of_a_snapshot() -> None:
    """The log ends right behind the place of a snapshot, and goes on at the next place."""
    store = MemoryStore()
    log = BucketLog(store, LOG, head_bytes=600)  # each entry fills a chunk
    for number in range(1, 31):
        put = Record(0, [], [], [], [Put("a", bytes(180))])
        log.append(encode_entry(Entry(bytes(16), number, 0, bytes(16), [put])))
    times = [item.time_ns for item in log.history(0)]
    places = [Past(n, times[n - 1], n, f"checkpoints/{n}") for n in (10, 20)]
    newest = Manifest(bytes(16), 30, 30, bytes(16), times[29], [], places)
    key = write_manifest(store, 30, newest)
    log.trim(20, b"")
    store.delete([listed.key for listed in log.garbage([(10, 10), (20, 1 << 62)])])
    history = History(store, key, "")
    assert history.version_at(times[21]) == 22
    with pytest.raises(InvalidError, match="was collected"):
        history.version_at(times[14])
