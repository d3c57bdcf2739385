"""Checkpoints: nothing is lost by them, new hosts begin with them, and their bytes are checked."""

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import everpool
from everpool.errors import CorruptionError, EverpoolError, InvalidError
from everpool.segments.checkpoints import read_pages, write_pages
from everpool.segments.format import (
    Manifest,
    Past,
    Run,
    decode_manifest,
    decode_run,
    encode_manifest,
    encode_run,
)
from everpool.store.memory import MemoryStore
from support.agents import end_agents


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    yield f"file://{tmp_path}/bucket"
    end_agents(tmp_path)


def open_on(url: str, tmp_path: Path, host: str) -> Any:
    return everpool.open(url, cache_dir=tmp_path / host)


def uploaded(tmp_path: Path) -> int:
    """Return the bytes of all checkpoints' parts."""
    folders = [tmp_path / "bucket" / name for name in ("pages", "index", "checkpoints")]
    return sum(p.stat().st_size for f in folders if f.exists() for p in f.iterdir())


def test_a_new_host_begins_from_a_checkpoint(url: str, tmp_path: Path) -> None:
    array = np.arange(100_000)
    with open_on(url, tmp_path, "first") as pool:
        pool["large"] = array
        pool["n" * 1024] = "long"
        pool.update({f"name/{number}": number for number in range(500)})
        memory = pool.allocate("m", 1 << 40)
        memory.write(1 << 39, b"far")
        grid = pool.allocate_array("grid", (300, 400), "f4")
        grid[7] = 1.5
        for number in range(300):
            pool[f"name/{number}"] = -number
        del pool["name/499"]
        assert pool.checkpoint() == pool.version - 1
        memory.write((1 << 39) + 3, b"!")
        grid[8] = 2.5
    with open_on(url, tmp_path, "second") as other:
        other.sync()
        assert other.stats()["checkpoint"] > 0
        assert len(other) == 503
        assert np.array_equal(other["large"], array) and other["n" * 1024] == "long"
        assert other["name/299"] == -299 and other["name/498"] == 498
        assert other.memory("m").read((1 << 39) - 1, 6) == b"\0far!\0"
        assert other.array("grid")[7:9].tolist() == [[1.5] * 400, [2.5] * 400]
        assert other.memory("m").fetch_add(1 << 39, 0, "|u1") == ord("f")
        assert other.verify().ok


def test_a_checkpoint_costs_what_changed(url: str, tmp_path: Path) -> None:
    pages = 100
    with open_on(url, tmp_path, "host") as pool:
        memory = pool.allocate("m", 10 << 30)
        pool.update({f"name/{number}": bytes(100) for number in range(3000)})
        pool.checkpoint()
        before = uploaded(tmp_path)
        with pool.transaction() as tx:
            handle = tx.memory("m")
            for number in range(pages):
                handle.write(number * (70 << 20), b"x")
        pool.checkpoint()
        grown = uploaded(tmp_path) - before
        assert pages << 16 <= grown <= 1.5 * (pages << 16)
        assert memory.read(70 << 20, 1) == b"x"


def test_many_checkpoints_keep_what_was_written_and_deleted(url: str, tmp_path: Path) -> None:
    choose = random.Random(5)
    with open_on(url, tmp_path, "host") as pool:
        array = pool.allocate_array("array", 200_000, "i8")
        expected, names = np.zeros(200_000, "i8"), {}
        for round in range(14):  # enough for runs to be merged
            for number in range(30):
                place = choose.randrange(200_000)
                array[place] = expected[place] = number
                name = f"n/{choose.randrange(40)}"
                if name in names and choose.random() < 0.4:
                    del pool[name]
                    del names[name]
                else:
                    pool[name] = names[name] = number
            if round % 3 == 0:
                pool.pop("memory", None)
                pool.allocate("memory", 1 << 20).write(round << 16, b"round")
            pool.checkpoint()
        for host in ("host", "other"):
            with open_on(url, tmp_path, host) as seen:
                seen.sync()
                assert {name: seen[name] for name in seen.names("n/")} == names
                assert np.array_equal(seen.array("array")[...], expected)
                assert seen.memory("memory").read(12 << 16, 5) == b"round"
                assert seen.memory("memory").read(9 << 16, 5) == bytes(5)


def test_checkpoints_of_two_hosts_while_both_commit(url: str, tmp_path: Path) -> None:
    hosts = [open_on(url, tmp_path, host) for host in ("one", "two")]
    hosts[0].allocate_array("sums", 64, "i8")
    hosts[1].sync()
    failures: list[BaseException] = []

    def work(number: int) -> None:
        pool, choose = hosts[number], random.Random(number)
        try:
            for turn in range(60):
                pool.array("sums")
                pool.memory("sums").fetch_add(8 * choose.randrange(64), 1)
                if turn % 12 == 11:
                    try:
                        pool.checkpoint()
                    except everpool.UnavailableError as error:
                        assert "try again" in str(error)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    with open_on(url, tmp_path, "late") as late:
        late.sync()
        assert late.array("sums")[...].sum() == 120
    for pool in hosts:
        pool.sync()
        assert pool.array("sums")[...].sum() == 120
        pool.close()


def test_damaged_pages_are_named_and_never_shown(url: str, tmp_path: Path) -> None:
    with open_on(url, tmp_path, "host") as pool:
        pool.allocate("m", 1 << 20).write(1 << 19, b"data" * 100)
        pool.checkpoint()
    (segment,) = (tmp_path / "bucket" / "pages").iterdir()
    data = bytearray(segment.read_bytes())
    data[100] ^= 1
    os.chmod(segment, 0o600)
    segment.write_bytes(data)
    with open_on(url, tmp_path, "other") as other:
        with pytest.raises(CorruptionError, match=segment.name):
            other.memory("m").read(1 << 19, 4)
        assert other.memory("m").read(0, 4) == bytes(4)
        report = other.verify()
        assert [damage.name for damage in report.damage] == ["m"]


def test_verify_asks_the_store_also_for_what_is_here(url: str, tmp_path: Path) -> None:
    with open_on(url, tmp_path, "host") as pool:
        pool.allocate("m", 1 << 20).write(1 << 19, b"data" * 100)
        pool.checkpoint()
        assert pool.verify().ok
        (segment,) = (tmp_path / "bucket" / "pages").iterdir()
        data = bytearray(segment.read_bytes())
        data[100] ^= 1
        os.chmod(segment, 0o600)
        segment.write_bytes(data)
        assert pool.memory("m").read(1 << 19, 4) == b"data"
        assert [damage.name for damage in pool.verify().damage] == ["m"]


@pytest.mark.parametrize("size", [None, 10])
def test_lost_pages_are_damage_with_a_remedy(url: str, tmp_path: Path, size: int | None) -> None:
    with open_on(url, tmp_path, "host") as pool:
        pool.allocate("m", 1 << 20).write(1 << 19, b"data" * 100)
        pool.checkpoint()
    (segment,) = (tmp_path / "bucket" / "pages").iterdir()
    os.chmod(segment, 0o600)
    if size is None:
        segment.unlink()
    else:
        os.truncate(segment, size)
    with open_on(url, tmp_path, "other") as other:
        with pytest.raises(CorruptionError, match="restore it from a copy"):
            other.memory("m").read(1 << 19, 4)
        assert [damage.name for damage in other.verify().damage] == ["m"]


MANIFEST = Manifest(
    bytes(16), 7, 3, bytes(16), 99, [Run("index/x", 10, 0, 7)], [Past(3, 50, 2, "checkpoints/y")]
)
ROWS = [(b"a", b"1"), (b"b", None)]


def test_manifests_and_runs_come_back() -> None:
    assert decode_manifest("k", encode_manifest(MANIFEST)) == MANIFEST
    assert decode_run("k", encode_run(ROWS)) == ROWS


def test_what_is_damaged_is_told_with_the_remedy() -> None:
    manifest, run = encode_manifest(MANIFEST), encode_run(ROWS)
    for damaged in (run, manifest[:10], manifest[:-1], manifest[:-1] + b"x"):
        with pytest.raises(CorruptionError, match=r"^checkpoints/9 .*: restore it from a copy"):
            decode_manifest("checkpoints/9", damaged)


@given(st.data())
def test_nonsense_is_never_decoded(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([encode_manifest(MANIFEST), encode_run(ROWS)]))
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(changed[: data.draw(st.integers(0, len(changed)))])
    for decode in (decode_manifest, decode_run):
        try:
            assert decode("k", cut) in (MANIFEST, ROWS)
        except EverpoolError as error:
            assert isinstance(error, (CorruptionError, InvalidError))


def test_pages_are_read_in_any_order() -> None:
    store = MemoryStore()
    pages = [bytes([number]) * (1000 + number) for number in range(40)]
    rows = [page.row() for page in write_pages(store, 0, pages)]
    order = random.Random(1).sample(range(40), 40)
    assert read_pages(store, [rows[at] for at in order]) == [pages[at] for at in order]
