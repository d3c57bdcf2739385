"""Locked snapshots, on a real S3 server with object lock: what is held cannot be destroyed."""

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everpool
from everpool import (
    CorruptionError,
    ExistsError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from everpool.store import open_store
from everpool.store.locks import Locks, open_locks
from everpool.store.objects import ObjectStore
from support.agents import end_agents
from support.cli import out_of, run
from support.locked import Attack, client_of, make_bucket
from support.s3 import Server, serving

pytestmark = pytest.mark.xdist_group("locked")

pytest.importorskip("botocore")
_numbers = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def plain(server: Server) -> str:
    """A bucket with object lock that locks nothing by itself."""
    return make_bucket(server)


@pytest.fixture(scope="module")
def locking(server: Server) -> str:
    """A bucket that locks what is put, for two days, against everybody."""
    return make_bucket(server, "compliance", days=2)


@pytest.fixture(scope="module")
def governed(server: Server) -> str:
    return make_bucket(server, "governance", days=2)


@pytest.fixture(autouse=True)
def environment(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("EVERPOOL_CACHE_DIR", str(tmp_path / "host"))
    yield
    end_agents(tmp_path)


def url_in(bucket: str) -> str:
    return f"s3://{bucket}/{next(_numbers)}"


@pytest.fixture
def url(plain: str) -> str:
    return url_in(plain)


def fill(pool: Any) -> None:
    """Have objects of all kinds, before a checkpoint, between two and behind the last."""
    pool["small"] = "before"
    pool["large"] = np.arange(100_000)
    pool["n" * 700] = np.arange(20_000)
    memory = pool.allocate("memory", 1 << 30)
    memory.write(1 << 29, bytes(range(256)) * 1024)
    pool.checkpoint()
    pool["large"] = np.arange(100_001)
    memory.write(0, b"between")
    pool.checkpoint()
    memory.write(1 << 20, b"x" * (1 << 20))
    pool["n" * 701] = np.arange(20_001)


def is_filled(pool: Any) -> bool:
    memory = pool.memory("memory")
    return (
        pool["small"] == "before"
        and len(pool["large"]) == 100_001
        and len(pool["n" * 700]) == 20_000
        and len(pool["n" * 701]) == 20_001
        and memory.read(1 << 29, 1 << 18) == bytes(range(256)) * 1024
        and memory.read(0, 7) == b"between"
        and memory.read(1 << 20, 1 << 20) == b"x" * (1 << 20)
    )


def open_again(url: str, cache: Path) -> everpool.Pool:
    """Open a pool on a host that may have to begin anew, of which the first call is told."""
    for _ in range(3):
        pool = everpool.open(url, create=False, cache_dir=cache)
        try:
            pool.sync()
            return pool
        except UnavailableError:
            pool.close()
    raise AssertionError("the host does not begin anew")


def ruin(pool: Any) -> None:
    """Do harm through the pool itself."""
    pool.memory("memory").write(0, b"RUINED!")
    for name in list(pool):
        if name != "memory":
            del pool[name]


# What is held


@pytest.mark.parametrize("kind", ["plain", "locking"])
def test_what_is_locked_cannot_be_destroyed_and_comes_back(
    kind: str, server: Server, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = url_in(request.getfixturevalue(kind))
    with everpool.open(url) as pool:
        fill(pool)
        before = pool.version
        made = pool.snapshot("safe", locked=timedelta(days=1))
        assert made.lock == "compliance" and made.version >= before
        assert made.locked_until is not None
        assert timedelta(hours=23) < made.locked_until - datetime.now(UTC) < timedelta(days=3)
        assert pool.snapshots() == [made]
        ruin(pool)
        pool.checkpoint()
    end_agents(tmp_path)
    attack = Attack(server, url)
    attack.destroy()
    attack.delete()
    assert attack.seen() == []
    with pytest.raises(NotFoundError):
        everpool.open(url, create=False)
    assert everpool.undelete(url, dry_run=True).shown > 5
    assert attack.seen() == [], "nothing was to be done"
    done = everpool.undelete(url)
    assert done.shown > 5 and done.replaced == done.hidden == 0
    for host in ("host", "new host"):
        with everpool.open(url, create=False, cache_dir=tmp_path / host) as pool:
            assert pool.snapshots() == [made]
            with pool.at("safe") as then:
                assert is_filled(then) and then.verify().ok
            if host == "host":
                pool.restore("safe")
            pool.sync()
            assert is_filled(pool) and pool.verify().ok


def test_old_objects_are_locked_for_longer(server: Server, locking: str) -> None:
    url = url_in(locking)
    with everpool.open(url) as pool:
        fill(pool)
        began = datetime.now(UTC)
        made = pool.snapshot("long", locked=timedelta(days=5))
        own = {key for key, lock in Attack(server, url).locks().items() if lock}
    assert made.locked_until is not None
    assert timedelta(days=4.9) < made.locked_until - began < timedelta(days=5.1)
    longer = [
        key
        for key, lock in Attack(server, url).locks().items()
        if lock is not None and lock[1] > began + timedelta(days=4.9)
    ]
    for folder in ("/values/", "/pages/", "/index/", "/checkpoints/", "/everpool.json"):
        assert any(folder in key for key in longer), folder
    assert len(longer) < len(own), "what the snapshot does not need keeps its lock"


def test_by_default_the_buckets_own_period_counts(locking: str) -> None:
    with everpool.open(url_in(locking)) as pool:
        pool["a"] = 1
        made = pool.snapshot("a", locked=True)
    assert made.locked_until is not None and made.lock == "compliance"
    left = made.locked_until - datetime.now(UTC)
    assert timedelta(days=1.9) < left < timedelta(days=2.1)


def test_governance_is_told_apart_from_compliance(server: Server, governed: str) -> None:
    url = url_in(governed)
    with everpool.open(url) as pool:
        fill(pool)
        assert pool.snapshot("safe", locked=True).lock == "governance"
    attack = Attack(server, url)
    before = len(attack.versions())
    attack.destroy(bypass=False)
    assert len(attack.versions()) == before
    attack.delete()
    everpool.undelete(url)
    with everpool.open(url, create=False) as pool:
        assert is_filled(pool)


def test_while_others_commit_all_that_is_needed_is_locked(
    server: Server, url: str, tmp_path: Path
) -> None:
    stop = threading.Event()

    def write() -> None:
        with everpool.open(url, cache_dir=tmp_path / "other") as other:
            for number in itertools.count():
                if stop.is_set():
                    return
                other[f"other/{number % 50}"] = os.urandom(3000)
                other["other/large"] = np.full(10_000, number)
                other["other/wide"] = os.urandom(50_000)
                if number % 20 == 19:
                    other.checkpoint()

    with everpool.open(url) as pool:
        fill(pool)
        writer = threading.Thread(target=write)
        writer.start()
        try:
            time.sleep(0.5)
            made = pool.snapshot("safe", locked=timedelta(hours=1))
            time.sleep(0.5)
        finally:
            stop.set()
            writer.join()
    assert made.lock == "compliance"
    end_agents(tmp_path)
    attack = Attack(server, url)
    attack.destroy()
    attack.delete()
    everpool.undelete(url)
    with everpool.open(url, create=False) as pool:
        with pool.at("safe") as then:
            assert is_filled(then) and then.verify().ok
        assert pool.verify().ok


def test_a_collection_takes_nothing_of_it(server: Server, url: str, tmp_path: Path) -> None:
    with everpool.open(url) as pool:
        pool.retain(age=timedelta(0), versions=1)
        fill(pool)
        made = pool.snapshot("safe", locked=timedelta(hours=1))
        ruin(pool)
        for _ in range(2):
            pool.checkpoint()
            pool["more"] = os.urandom(20)
            pool.collect()
        assert pool.snapshots() == [made]
        with pool.at("safe") as then:
            assert is_filled(then) and then.verify().ok
    end_agents(tmp_path)
    attack = Attack(server, url)
    attack.destroy()
    attack.delete()
    everpool.undelete(url)
    with everpool.open(url, create=False) as pool, pool.at("safe") as then:
        assert is_filled(then) and then.verify().ok


def test_what_a_branch_shares_is_locked_in_its_parent(
    server: Server, url: str, plain: str, tmp_path: Path
) -> None:
    there = url_in(plain)
    with everpool.open(url) as pool:
        fill(pool)
        pool.branch(there)
    with everpool.open(there) as branch:
        branch["own"] = np.arange(30_000)
        assert branch.snapshot("safe", locked=timedelta(hours=1)).lock == "compliance"
    end_agents(tmp_path)
    for place in (url, there):
        attack = Attack(server, place)
        attack.destroy()
        attack.delete()
        everpool.undelete(place)
    with everpool.open(there, create=False) as branch, branch.at("safe") as then:
        assert is_filled(then) and len(then["own"]) == 30_000 and then.verify().ok


# Going back in the bucket


def test_what_was_overwritten_comes_back_also_for_hosts_that_were_there(
    server: Server, locking: str, tmp_path: Path
) -> None:
    url = url_in(locking)
    with everpool.open(url, cache_dir=tmp_path / "old") as old:
        fill(old)
        good = old.version
        time.sleep(1.1)
        moment = datetime.now(UTC)
        time.sleep(1.1)
        old["later"] = 1
        old.checkpoint()
        attack = Attack(server, url)
        attack.overwrite()
        attack.delete()
        assert attack.seen() == []
    done = everpool.undelete(url, moment)
    assert done.replaced > 5 and done.shown == 0
    assert everpool.undelete(url, moment, dry_run=True).replaced == 0
    for host in ("old", "new"):
        with open_again(url, tmp_path / host) as pool:
            assert is_filled(pool) and "later" not in pool and pool.verify().ok
            assert pool.version >= good
            for number in range(100):
                pool[f"{host}/{number}"] = os.urandom(2000)
    with everpool.open(url, create=False, cache_dir=tmp_path / "newest") as pool:
        pool.sync()
        assert len(list(pool.names("old/"))) == len(list(pool.names("new/"))) == 100


def test_heads_of_what_was_destroyed_are_passed_over_by_the_time_of_the_snapshot(
    server: Server, url: str, tmp_path: Path
) -> None:
    with everpool.open(url) as pool:
        fill(pool)
        made = pool.snapshot("safe", locked=timedelta(hours=1))
        time.sleep(1.1)
        ruin(pool)
        pool.checkpoint()
    end_agents(tmp_path)
    attack = Attack(server, url)
    attack.destroy(spare="log/head")
    attack.delete()
    everpool.undelete(url)
    with pytest.raises(everpool.EverpoolError):
        everpool.open(url, create=False, cache_dir=tmp_path / "new", timeout_s=5)
    everpool.undelete(url, made.time)
    with everpool.open(url, create=False, cache_dir=tmp_path / "newer") as pool:
        assert is_filled(pool) and pool.verify().ok


def test_a_pool_that_was_made_in_its_place_gives_way(
    server: Server, url: str, tmp_path: Path
) -> None:
    with everpool.open(url) as pool:
        fill(pool)
        pool.snapshot("safe", locked=timedelta(hours=1))
    time.sleep(1.1)
    moment = datetime.now(UTC)
    time.sleep(1.1)
    Attack(server, url).delete()
    end_agents(tmp_path)
    with everpool.open(url) as another:  # somebody's job, which makes what it does not find
        another["small"] = "another"
        another.checkpoint()
    done = everpool.undelete(url, moment)
    assert done.shown > 5 and done.replaced == 2 and done.hidden >= 2
    with everpool.open(url, create=False) as pool:
        pool.sync()
        assert is_filled(pool) and pool.verify().ok


def test_a_moment_before_the_pool_brings_nothing_back(url: str) -> None:
    with everpool.open(url) as pool:
        pool["a"] = 1
    with pytest.raises(NotFoundError, match="old enough"):
        everpool.undelete(url, datetime(2001, 1, 1))
    with everpool.open(url, create=False) as pool:
        assert pool["a"] == 1
    with pytest.raises(NotFoundError, match="check the address"):
        everpool.undelete(url + "/nothing")
    for store in (f"file://{Path.cwd()}", "gs://bucket/pool"):
        with pytest.raises(InvalidError, match="not known"):
            everpool.undelete(store)


def test_a_bucket_without_versions_is_left_alone(server: Server) -> None:
    url = server.make_url()
    with everpool.open(url) as pool:
        fill(pool)
    before = Attack(server, url).seen()
    for moment in (None, datetime(2001, 1, 1), datetime.now(UTC)):
        with pytest.raises(InvalidError, match="keeps no versions"):
            everpool.undelete(url, moment)
    assert Attack(server, url).seen() == before


# What is advisory


def test_without_object_lock_it_is_only_our_word(server: Server, tmp_path: Path) -> None:
    for place, why in (
        (server.make_url(), "no object lock"),
        (f"file://{tmp_path}/bucket", "not known"),
    ):
        with everpool.open(place) as pool:
            pool["a"] = 1
            made = pool.snapshot("safe", locked=timedelta(seconds=3))
            assert made.lock.startswith("advisory: ") and why in made.lock
            with pytest.raises(InvalidError, match=r"locked until .*advisory.*: forget it then"):
                pool.forget_snapshot("safe")
            time.sleep(3)
            pool.forget_snapshot("safe")
            assert pool.snapshots() == []
            with pytest.raises(NotFoundError):
                pool.forget_snapshot("safe")


def test_what_the_store_refuses_to_lock_is_advisory(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Locks._do

    def refuse(self: Locks, what: str, key: str, call: Any) -> Any:
        if what == "lock" and key.startswith("values/"):
            raise InvalidError("403")
        return whole(self, what, key, call)

    monkeypatch.setattr(Locks, "_do", refuse)
    with everpool.open(url) as pool:
        fill(pool)
        made = pool.snapshot("safe", locked=True)
        assert made.lock.startswith("advisory: 3 of ") and made.locked_until is not None
        assert made.locked_until > datetime.now(UTC) + timedelta(days=29)


def test_locks_that_cannot_be_prolonged_count_until_they_end(
    locking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Locks._do

    def refuse(self: Locks, what: str, key: str, call: Any) -> Any:
        if what == "lock":
            raise InvalidError("403")
        return whole(self, what, key, call)

    monkeypatch.setattr(Locks, "_do", refuse)
    with everpool.open(url_in(locking)) as pool:
        fill(pool)
        made = pool.snapshot("safe", locked=timedelta(days=9))
    assert made.lock == "compliance" and made.locked_until is not None
    left = made.locked_until - datetime.now(UTC)
    assert timedelta(days=1.9) < left < timedelta(days=2.1)


# What is refused


def test_a_missing_object_is_told_and_no_snapshot_left(server: Server, url: str) -> None:
    with everpool.open(url) as pool:
        fill(pool)
        pool.checkpoint()
        attack = Attack(server, url)
        gone = next(key for key in attack.seen() if "/pages/" in key)
        attack.client.delete_object(Bucket=url.split("/")[2], Key=gone)
        with pytest.raises(CorruptionError, match="--undelete"):
            pool.snapshot("safe", locked=timedelta(hours=1))
        assert pool.snapshots() == []
        everpool.undelete(url)
        assert pool.snapshot("safe", locked=timedelta(hours=1)).lock == "compliance"


def test_what_cannot_be_locked_is_refused(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with everpool.open(tmp_path / "path") as embedded:
        embedded["a"] = 1
        with pytest.raises(InvalidError, match="everpool copy"):
            embedded.snapshot("safe", locked=True)
    with everpool.open(url) as pool:
        with pytest.raises(InvalidError, match="empty pool"):
            pool.snapshot("safe", locked=True)
        pool["a"] = 1
        for wrong in (timedelta(0), timedelta(days=-1), timedelta(days=99_999)):
            with pytest.raises(InvalidError, match="century"):
                pool.snapshot("safe", locked=wrong)
        with pytest.raises(InvalidError, match="newest"):
            pool.snapshot("safe", 1, locked=True)
        pool.snapshot("safe", locked=timedelta(hours=1))
        with pytest.raises(ExistsError, match="safe"):
            pool.snapshot("safe", locked=timedelta(hours=1))
        assert len(pool.snapshots()) == 1
        monkeypatch.setitem(sys.modules, "botocore.session", None)
        with pytest.raises(InvalidError, match=r"everpool\[lock\]"):
            pool.snapshot("more", locked=True)


def test_errors_of_the_store_are_ours_and_hold_no_secret(server: Server, plain: str) -> None:
    away = open_locks("s3://bucket/x", **server.options | {"endpoint": "http://127.0.0.1:9"})
    assert away is not None
    with pytest.raises(UnavailableError, match="endpoint is up"):
        away.rule()
    for options, bucket in (
        ({"secret_access_key": "wrong-but-long-enough"}, plain),
        ({}, "there-is-no-such-bucket"),
    ):
        locks = open_locks(f"s3://{bucket}/x", **server.options | options)
        assert locks is not None
        with pytest.raises(InvalidError) as caught:
            locks.rule()
        assert server.options["secret_access_key"] not in str(caught.value)
    with pytest.raises(InvalidError, match="https"):
        open_locks("s3://bucket/x", endpoint="http://elsewhere.example")


def test_more_versions_than_one_answer_has_are_all_seen(server: Server, plain: str) -> None:
    client = client_of(server)
    for number in range(1050):
        client.put_object(Bucket=plain, Key="many/versions", Body=b"%d" % number)
    locks = open_locks(f"s3://{plain}/many")
    assert locks is not None
    found = list(locks.versions())
    assert len({version.id for version in found}) == len(found) == 1050
    assert [one.is_latest for one in found] == [True] + [False] * 1049


def test_a_bucket_that_wants_checksums_gets_them(server: Server) -> None:
    url = server.make_url()
    with contextlib.closing(open_store(f"{url}?checksum_algorithm=sha256")) as store:
        store.put("small", b"x")
        store.put_pieces("large", [bytes(5 << 20)] * 4, 20 << 20)
    client, (bucket, folder) = client_of(server), url.removeprefix("s3://").split("/")
    for key in ("small", "large"):
        told = client.head_object(Bucket=bucket, Key=f"{folder}/{key}", ChecksumMode="ENABLED")
        assert told["ChecksumSHA256"]
    refusal = Exception(
        "status code: 400 <Code>InvalidRequest</Code> Content-MD5 OR x-amz-checksum- HTTP header "
        "is required for Put Object requests with Object Lock parameters"
    )
    with contextlib.closing(open_store(url)) as plain:
        assert isinstance(plain, ObjectStore)
        assert "AWS_CHECKSUM_ALGORITHM" in str(plain._translated("put", "a", refusal))


# The commands


def test_the_commands_lock_list_refuse_and_bring_back(server: Server, url: str) -> None:
    out_of("put", url, "greeting", "hello")
    said = out_of("snapshot", url, "safe", "--locked", "--for-days", "1")
    assert said.startswith("safe is version 1, locked until ") and said.endswith("(compliance)\n")
    (line,) = out_of("snapshots", url).splitlines()
    assert "locked until" in line and line.endswith("(compliance)")
    (found,) = [json.loads(line) for line in out_of("snapshots", url, "--json").splitlines()]
    assert found["lock"] == "compliance" and datetime.fromisoformat(found["locked_until"])
    done = run("snapshot", url, "safe", "--forget")
    assert done.code == 2 and "locked until" in done.err
    for words in (["--for-days", "1"], ["--locked", "--at", "1"], ["--locked", "--forget"]):
        assert run("snapshot", url, "more", *words).code == 2
    Attack(server, url).delete()
    assert run("get", url, "greeting").code == 1
    assert "would bring back" in out_of("recover", url, "--undelete", "--dry-run")
    assert out_of("recover", url, "--undelete").startswith("brought back ")
    assert out_of("get", url, "greeting") == "hello\n"
    done = run("recover", url)
    assert done.code == 2 and "--undelete" in done.err
    assert run("recover", "./folder", "--undelete").code == 2
    assert run("recover", url, "--undelete", "--to", "safe").code == 2
