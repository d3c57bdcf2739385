"""The stores keep what `Store` promises."""

import contextlib
import errno
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everpool.errors import (
    ClosedError,
    CommitUnknownError,
    ConflictError,
    InvalidError,
    UnavailableError,
)
from everpool.log.bucket import BucketLog
from everpool.store import Store, directory, open_store
from everpool.store.directory import DirectoryStore
from everpool.store.memory import MemoryStore, Shelf
from everpool.testing.conformance.store import StoreConformance
from support.processes import Child
from support.s3 import ACCESS_KEY, READER_KEY, SECRET_KEY, Server


class TestMemory(StoreConformance):
    @pytest.fixture(autouse=True)
    def shelf(self) -> None:
        self._shelf = Shelf()

    def make_store(self, tmp_path: Path) -> Store:
        return MemoryStore(self._shelf)


class TestDirectory(StoreConformance):
    def make_store(self, tmp_path: Path) -> Store:
        return DirectoryStore(tmp_path / "new" / "store")


class TestS3(StoreConformance):
    @pytest.fixture(autouse=True)
    def folder(self, s3: Server) -> None:
        self._url, self._options = s3.make_url(), s3.options

    def make_store(self, tmp_path: Path) -> Store:
        return open_store(self._url, **self._options)


def keep_swapping(link: Any, root: Path, number: int) -> None:
    """Count an object up for ever, and tell each number that was acknowledged."""
    store = DirectoryStore(root)
    while True:
        try:
            found = store.get("count")
            value = int(found.data.split()[0]) + 1
            store.swap("count", b"%d " % value + b"x" * 5_000, found.e_tag)
            store.put(f"kept/{value}", b"%d by %d" % (value, number))
        except ConflictError:
            continue
        link.send(value)


def test_a_directory_survives_processes_that_are_killed_as_they_swap(tmp_path: Path) -> None:
    root, rng = tmp_path / "store", random.Random(2)
    store = DirectoryStore(root)
    store.swap("count", b"0 " + b"x" * 5_000, None)
    acknowledged: set[int] = set()
    for life in range(25):
        children = [Child(keep_swapping, root, life * 2 + number) for number in range(2)]
        time.sleep(rng.uniform(0.02, 0.12))
        for child in children:
            child.kill()
            acknowledged |= set(child.said)
        found = store.get("count")
        assert found.data[-5_001:] == b" " + b"x" * 5_000
        assert int(found.data.split()[0]) >= max(acknowledged, default=0)
        store.swap("count", found.data, found.e_tag)  # nobody's lock outlives it
    assert len(acknowledged) > 50
    for listed in store.list("kept"):
        assert store.get(listed.key).data.startswith(listed.key[5:].encode() + b" by")
    assert {f"kept/{value}" for value in acknowledged} <= {one.key for one in store.list("kept")}


def test_what_a_crashed_writer_left_is_removed_a_day_later(tmp_path: Path) -> None:
    DirectoryStore(tmp_path).put("a", b"x")
    old, new = tmp_path / ".part" / "old", tmp_path / ".part" / "new"
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    store = DirectoryStore(tmp_path)
    assert [one.key for one in store.list("")] == ["a"]
    assert not old.exists() and new.exists()


def hold_lock(link: Any, root: Path) -> None:
    DirectoryStore(root)
    with directory._locked(root / ".lock", 1):
        link.send("held")
        time.sleep(60)


def test_a_stopped_process_delays_a_swap_no_longer_than_told(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, timeout_s=0.3)
    child = Child(hold_lock, tmp_path)
    assert child.receive() == "held"
    began = time.monotonic()
    with pytest.raises(UnavailableError, match="another process has held"):
        store.swap("head", b"x", None)
    assert 0.2 < time.monotonic() - began < 2
    store.put("a", b"others wait for nobody")
    child.kill()
    assert store.swap("head", b"x", None)
    assert not list((tmp_path / ".part").iterdir())


def test_a_full_or_forbidden_directory_raises_our_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DirectoryStore(tmp_path)
    tag = store.swap("head", b"old", None)
    for code, kind in ((errno.ENOSPC, UnavailableError), (errno.EACCES, InvalidError)):

        def fail(*_: object, code: int = code) -> int:
            raise OSError(code, os.strerror(code))

        for name in ("write", "fsync"):
            with monkeypatch.context() as patched:
                patched.setattr(f"everpool.store.directory.os.{name}", fail)
                with pytest.raises(kind, match=os.strerror(code)):
                    store.put("a", b"x")
                with pytest.raises(kind):
                    store.swap("head", b"new", tag)
        assert not list((tmp_path / ".part").iterdir())
        assert store.get("head")[:2] == (b"old", tag)
    with monkeypatch.context() as patched:
        patched.setattr("everpool.store.directory._flush_folder", fail)
        with pytest.raises(CommitUnknownError, match="not flushed"):
            store.swap("head", b"new", tag)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "pool",
        "ftp://host/pool",
        "file://host/pool",
        "file:///pool?timeout_s=1",
        "s3://",
        "s3://user:password@bucket/pool",
        "s3://bucket/pool?secret_access_key=hush",
        "s3://bucket/pool?access_key_id=hush",
        "s3://bucket/pool?timeout_s=never",
        "s3://bucket/pool?timeout_s=-1",
        "s3://bucket/pool?endpoint=http://example.com",
        "s3://bucket/pool?endpoint=http://127.0.0.1.example.com",
        "s3://bucket/pool?endpoint=ftp://127.0.0.1",
        "s3://bucket/../pool",
        "s3://bucket/pool#part",
        "az://container/pool?nonsense=1",
    ],
)
def test_what_is_no_address_of_a_store_is_refused(url: str) -> None:
    with pytest.raises(InvalidError) as caught:
        open_store(url)
    assert "hush" not in str(caught.value) and "password" not in str(caught.value)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(InvalidError, match="nonsense"):
        open_store("s3://bucket", nonsense=1, secret_access_key="hush")
    with pytest.raises(InvalidError, match="nonsense"):
        open_store("file:///tmp/never-made", nonsense=1)


def test_a_profile_of_the_aws_tools_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: Server
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    url = s3.make_url()
    with pytest.raises(InvalidError, match="'mine' has no keys"):
        open_store(url, profile="mine")
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(
        f"[mine]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    )
    (tmp_path / ".aws" / "config").write_text(
        f"[profile mine]\nregion = us-east-1\nendpoint_url = {s3.endpoint}\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "mine")
    store = open_store(url)
    store.put("a", b"x")
    assert open_store(url, profile="mine").get("a").data == b"x"
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    assert open_store(f"{url}?region=us-east-1").get("a").data == b"x"
    (tmp_path / ".aws" / "credentials").write_text("[mine\nhush = hush\n")
    with pytest.raises(InvalidError, match="cannot be read") as caught:
        open_store(url, profile="mine")
    assert "hush" not in str(caught.value)


def test_what_s3_denies_raises_our_errors(s3: Server) -> None:
    url = s3.make_url()
    store = open_store(url, **s3.options)
    tag = store.swap("head", b"x", None)
    reader = open_store(url, **(s3.options | {"access_key_id": READER_KEY}))
    assert reader.get("head").data == b"x"
    stranger = open_store(url, **(s3.options | {"secret_access_key": "hush"}))
    calls: list[Callable[[], object]] = [
        lambda: reader.put("a", b"x"),
        lambda: reader.swap("head", b"y", tag),
        lambda: reader.put_pieces("a", [bytes(9 << 20)], 9 << 20),
        lambda: stranger.get("head"),
        lambda: stranger.get_if_changed("head", tag),
        lambda: stranger.get_ranges("head", [(0, 1)]),
        lambda: list(stranger.list("")),
        lambda: stranger.delete(["head"]),
        lambda: stranger.swap("head", b"y", None),
    ]
    for call in calls:
        with pytest.raises(InvalidError, match="credentials") as caught:
            call()
        assert "hush" not in str(caught.value) and caught.value.__cause__ is None
    assert store.get("head")[:2] == (b"x", tag)


def all_calls(store: Store) -> list[Callable[[], object]]:
    return [
        lambda: store.get("head"),
        lambda: store.get_if_changed("head", "tag"),
        lambda: store.get_ranges("head", [(0, 1)]),
        lambda: store.put("a", b"x"),
        lambda: store.put_pieces("a", [bytes(9 << 20)], 9 << 20),
        lambda: list(store.list("")),
        lambda: store.delete(["head"]),
    ]


def test_a_store_that_is_gone_is_unavailable(s3: Server) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        options = s3.options | {"endpoint": f"http://127.0.0.1:{held.getsockname()[1]}"}
        store = open_store("s3://bucket/pool", timeout_s=0.3, bulk_timeout_s=0.3, **options)
        for call in (*all_calls(store), lambda: store.swap("head", b"x", "tag")):
            began = time.monotonic()
            with pytest.raises(UnavailableError, match="reached"):
                call()
            assert time.monotonic() - began < 3


def test_a_store_that_says_nothing_is_unavailable_and_a_swap_unknown(s3: Server) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        options = s3.options | {"endpoint": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        store = open_store("s3://bucket/pool", timeout_s=0.2, bulk_timeout_s=0.2, **options)
        for call in all_calls(store):
            began = time.monotonic()
            with pytest.raises(UnavailableError, match="Timeout"):
                call()
            assert time.monotonic() - began < 3
        with pytest.raises(CommitUnknownError, match="Timeout"):
            store.swap("head", b"x", "tag")
        log = BucketLog(store, timeout_s=0.5)
        began = time.monotonic()
        with pytest.raises((UnavailableError, CommitUnknownError)):
            log.append(b"x")
        with pytest.raises(UnavailableError):
            log.end()
        assert time.monotonic() - began < 3


def use_inherited(link: Any, store: Store, url: str, options: dict[str, str]) -> None:
    for call in (lambda: store.get("a"), lambda: open_store(url, **options).get("a")):
        try:
            call()
        except ClosedError as error:
            link.send(str(error))


def test_a_forked_child_is_told_how_to_use_a_bucket(s3: Server) -> None:
    url = s3.make_url()
    store = open_store(url, **s3.options)
    store.put("a", b"x")
    child = Child(use_inherited, store, url, s3.options)
    assert "spawn" in child.receive() and "spawn" in child.receive()
    child.kill()


def test_without_obstore_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(InvalidError, match=r"pip install 'everpool\[bucket\]'"):
        open_store("s3://bucket/pool")


def test_a_folder_and_an_object_of_one_name_are_told_apart(tmp_path: Path) -> None:
    with contextlib.closing(DirectoryStore(tmp_path)) as store:
        store.put("x/y", b"1")
        with pytest.raises(InvalidError, match="no key may be a folder"):
            store.put("x/y/z", b"2")
        store.delete(["x/y/z", "nowhere/at/all"])
        assert store.get("x/y").data == b"1"
