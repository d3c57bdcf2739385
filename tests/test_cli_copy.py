"""`everpool copy`: between pools of both kinds, interrupted, compared; and commands on URLs."""

import contextlib
import datetime as dt
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import everpool
from everpool.cli import transfer
from everpool.cli.markers import COPYING, IMPORTING, marker_of
from everpool.cli.transfer import digest_of
from support.agents import end_agents
from support.cli import EVERPOOL, out_of, run

MIB = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("EVERPOOL_CACHE_DIR", str(tmp_path / "cache"))
    yield
    end_agents(tmp_path)


def places(folder: Path, kind: str) -> str:
    return f"file://{folder}/bucket" if kind == "bucket" else str(folder / "pool")


VALUES: dict[str, Any] = {
    "text": "grüße",
    "bytes": b"\x00\xff",
    "long bytes": bytes(range(256)) * 1000,
    "json": {"b": 1, "a": [1.0, -0.0, None, True, (1, 2)], "when": dt.date(2024, 5, 1)},
    "nan": float("nan"),
    "scalar": np.float32(1.5),
    "array": np.array([[1.0, np.nan], [-0.0, 2.0]]),
    "large array": np.arange(100_000, dtype=">i4"),
    "fortran": np.asfortranarray(np.arange(40_000.0).reshape(200, 200)),
    "structured": np.zeros(3, np.dtype([("a", "<i2"), ("b", "S5")], align=True)),
    "table": pa.table({"x": [1.0, float("nan"), None], "y": ["a", "b", None]}),
    "batch": pa.record_batch({"x": pa.array(range(50_000))}),
}


def fill(where: str) -> None:
    with everpool.open(where) as pool:
        pool.update(VALUES)
        memory = pool.allocate("memory", 1 << 36)
        memory[5 << 30 : (5 << 30) + 4] = b"abcd"
        pool.allocate_array("live", (4, MIB), "<f8")[2] = np.arange(MIB)
        pool.allocate("empty", 100)


def written_bytes(pool: everpool.Pool, name: str) -> int:
    return sum(size for _, size in pool.memory(name).extents())


@pytest.mark.parametrize(("one", "other"), [("folder", "bucket"), ("bucket", "folder")])
def test_a_copy_is_equal_in_value_type_and_holes(tmp_path: Path, one: str, other: str) -> None:
    source, target = places(tmp_path / "1", one), places(tmp_path / "2", other)
    fill(source)
    done = json.loads(out_of("copy", source, target, "--json", "--verify"))
    count = len(VALUES) + 3
    assert (done["objects"], done["unchanged"], done["verified"]) == (count, 0, count)
    with everpool.open(source) as before, everpool.open(target) as after:
        assert list(before.names()) == list(after.names())
        for name, value in VALUES.items():
            found: Any = after[name]
            assert type(found) is type(before[name])
            assert digest_of(before, name) == digest_of(after, name) is not None
            if isinstance(value, np.ndarray):
                assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert after.memory("memory").size == 1 << 36
        assert after.memory("memory").read(5 << 30, 5) == b"abcd\0"
        assert written_bytes(after, "memory") <= 128 << 10
        assert written_bytes(after, "live") <= 9 * MIB
        live = after.array("live")
        assert (live.dtype, live.shape) == (np.dtype("<f8"), (4, MIB))
        assert live[2, -1] == MIB - 1
        assert written_bytes(after, "empty") == 0
        version = after.version
    again = json.loads(out_of("copy", source, target, "--json"))
    assert (again["objects"], again["bytes"], again["unchanged"]) == (0, 0, count)
    with everpool.open(target) as after:
        assert after.version == version


def test_only_what_differs_is_written_again(tmp_path: Path) -> None:
    source, target = places(tmp_path, "folder"), places(tmp_path, "bucket")
    with everpool.open(source) as pool:
        pool["same"], pool["other"], pool["kind"] = 1, 2, 3
        pool["was memory"] = b"v"
        pool.allocate("memory", 64 * MIB)[0 : 8 * MIB] = b"x" * (8 * MIB)
        pool.allocate("size", 200)
    with everpool.open(target) as pool:
        pool["same"], pool["other"], pool["kind"], pool["extra"] = 1, 2.0, "3", "stays"
        pool.allocate("was memory", 10)
        memory = pool.allocate("memory", 64 * MIB)
        memory[0 : 8 * MIB] = b"x" * (8 * MIB)
        memory[7 * MIB : 7 * MIB + 1] = b"!"
        memory[20 * MIB : 20 * MIB + 1] = b"!"
        pool.allocate("size", 100)
        kept = memory.version
    done = json.loads(out_of("copy", source, target, "--json", "--verify"))
    assert (done["objects"], done["unchanged"], done["differs"]) == (5, 1, {})
    assert done["bytes"] < 200_000
    with everpool.open(target) as pool:
        assert (pool["other"], pool["kind"], pool["extra"]) == (2, 3, "stays")
        assert pool["was memory"] == b"v"
        memory = pool.memory("memory")
        assert memory.version > kept  # the same memory, changed in place
        assert memory.read(7 * MIB, 1) == b"x"
        assert memory.read(20 * MIB, 1) == b"\0"


@pytest.mark.parametrize(("one", "other"), [("folder", "bucket"), ("bucket", "folder")])
def test_a_killed_copy_is_marked_and_finished_by_a_second_run(
    tmp_path: Path, one: str, other: str
) -> None:
    source, target = places(tmp_path / "1", one), places(tmp_path / "2", other)
    with everpool.open(source) as pool:
        pool["a"] = b"first"
        memory = pool.allocate("large", 1 << 33)
        for at in range(12):
            memory.write(at << 29, bytes([at + 1]) * (4 * MIB))
        pool["z"] = b"last"
    with everpool.open(target) as pool:
        process = subprocess.Popen([*EVERPOOL, "copy", source, target])
        try:
            deadline = time.monotonic() + 20
            while marker_of(COPYING, "large") not in pool or not pool.memory("large").extents():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.002)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert "z" not in pool
        partly = written_bytes(pool, "large")
        assert marker_of(COPYING, "large") in pool
    # From such a pool the half copied object is not passed on.
    done = run("copy", target, tmp_path / "third")
    assert done.code == 1
    assert "large: it is half copied itself" in done.err
    done = json.loads(out_of("copy", source, target, "--json", "--verify"))
    assert done["bytes"] <= 48 * MIB - partly + len(b"last") + MIB
    with everpool.open(target) as pool:
        assert list(pool.names()) == ["a", "large", "z"]
        assert [pool.memory("large")[at << 29] for at in range(12)] == list(range(1, 13))


def test_an_interrupt_ends_with_its_exit_code_and_no_half_copied_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = places(tmp_path, "folder"), str(tmp_path / "other")
    with everpool.open(source) as pool:
        pool.allocate("memory", MIB)[0:5] = b"hello"
        pool["value"] = b"x"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "digest_value", interrupt)
        patch.setattr(transfer.Copier, "_store_batch", interrupt)
        assert run("copy", source, target).code == 130
    with everpool.open(target) as pool:
        assert list(pool.names()) == ["memory"]
        assert pool.memory("memory").read(0, 5) == b"hello"
    assert "copied 1 object" in out_of("copy", source, target)


def test_memory_is_of_one_version_while_others_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = places(tmp_path, "folder"), str(tmp_path / "other")
    with everpool.open(source) as pool:
        memory = pool.allocate("memory", 16 * MIB)
        memory.write(0, b"1" * (16 * MIB))
        runs = transfer._runs
        disturbed = 0

        def disturb(offset: int, data: bytes, old: bytes) -> Any:
            nonlocal disturbed
            if offset == 4 * MIB and disturbed < 2:
                disturbed += 1
                memory.write(0, bytes([disturbed % 256]) * (16 * MIB))
            return runs(offset, data, old)

        monkeypatch.setattr(transfer, "_runs", disturb)
        out_of("copy", source, target, "--verify")
        with everpool.open(target) as copied:
            assert copied.memory("memory").read(0, 16 * MIB) == b"\2" * (16 * MIB)
        disturbed = -100
        memory.write(0, b"3" * (16 * MIB))
        pool["a"] = pool["z"] = 1
        done = run("copy", source, target)
        assert done.code == 3
        assert "pause its writers" in done.err
        with everpool.open(target) as copied:
            assert copied["a"] == copied["z"] == 1  # it keeps nothing else back


def test_a_dry_run_changes_nothing_and_tells_what_it_would_cost(tmp_path: Path) -> None:
    source, target = places(tmp_path, "folder"), places(tmp_path, "bucket")
    with everpool.open(source) as pool:
        pool["a/small"] = "hello"
        pool["a/large"] = bytes(20 * MIB)
        pool.allocate("b", 1 << 40)[0:3] = b"abc"
    shown = out_of("copy", source, target, "--dry-run", "--prefix", "a/")
    assert "20.0 MiB  a/large" in shown and "a/small" in shown and "b\n" not in shown
    assert "would copy 2 objects" in shown
    with pytest.raises(everpool.NotFoundError):
        everpool.open(target, create=False)
    plan = json.loads(out_of("copy", source, target, "-n", "--json"))
    assert [entry["name"] for entry in plan["objects"]] == ["a/large", "a/small", "b"]
    assert plan["objects"][2]["bytes"] < 100_000
    # Three parts and what frames them, a batch for what is small, one commit for the memory.
    assert 7 <= plan["requests"]["put"] <= 13
    assert "requests" not in out_of("copy", source, tmp_path / "other", "-n")


def test_a_dry_run_fetches_no_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = places(tmp_path, "bucket")
    with everpool.open(url) as pool:
        pool["large"], pool["small"] = bytes(20 * MIB), "hello"
        pool.allocate("memory", 1 << 40)[0:3] = b"abc"
    monkeypatch.setenv("EVERPOOL_CACHE_DIR", str(tmp_path / "fresh"))
    shown = out_of("copy", url, tmp_path / "pool", "-n")
    # Six pieces of the value and its checksums, one of the memory, and opening.
    assert "would copy 3 objects, 20.1 MiB\nabout 17 GET requests, 20.1 MiB of egress\n" in shown
    exporting = out_of("export", url, tmp_path / "out", "-n")
    assert exporting.endswith(shown.partition("would copy")[2])
    assert "would export 3 objects" in exporting and "  large\n" in exporting
    plan = json.loads(out_of("export", url, tmp_path / "out", "--dry-run", "--json"))
    assert [entry["name"] for entry in plan["objects"]] == ["large", "memory", "small"]
    assert plan["requests"] == {"put": 0, "get": 17, "egress_bytes": plan["bytes"] - 13}
    assert not (tmp_path / "out").exists() and not (tmp_path / "pool").exists()
    assert list((tmp_path / "fresh").glob("*/*/values/*")) == []


def test_an_export_of_a_bucket_says_first_what_it_takes(tmp_path: Path) -> None:
    url = places(tmp_path, "bucket")
    with everpool.open(url) as pool:
        pool["large"] = bytes(20 * MIB)
    done = run("export", url, tmp_path / "out", "--json")
    assert done.code == 0 and json.loads(done.out)["objects"] == 1
    assert done.err == "about 16 GET requests, 20.0 MiB of egress\n"
    out_of("copy", url, tmp_path / "pool")
    assert run("export", tmp_path / "pool", tmp_path / "other").err == ""
    shown = out_of("export", tmp_path / "pool", tmp_path / "third", "-n")
    assert shown.endswith("would export 1 object, 20.0 MiB\n")


def test_verify_finds_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = places(tmp_path, "folder"), places(tmp_path, "bucket")
    with everpool.open(source) as pool:
        pool["value"], pool["type"] = 1, 1
        pool.allocate("memory", 16 * MIB)[9 * MIB] = 1
    out_of("copy", source, target)

    def spoil(pool: everpool.Pool) -> None:
        pool["value"], pool["type"] = 2, 1.0
        pool.memory("memory")[3 * MIB] = 7

    stored = transfer.Copier.run

    def run_and_spoil(copier: Any, prefix: str) -> None:
        stored(copier, prefix)
        with everpool.open(target) as pool:
            spoil(pool)

    monkeypatch.setattr(transfer.Copier, "run", run_and_spoil)
    done = run("copy", source, target, "--verify", "--json")
    assert done.code == 1
    differs = json.loads(done.out)["differs"]
    assert sorted(differs) == ["memory", "type", "value"]
    assert f"from {3 * MIB} to {3 * MIB + 65536}" in differs["memory"]


def test_damage_in_the_source_is_named_and_the_rest_copied(tmp_path: Path) -> None:
    source, target = places(tmp_path, "folder"), str(tmp_path / "other")
    with everpool.open(source) as pool:
        pool["a"], pool["large"], pool["z"] = 1, np.ones(100_000), 2
    (file,) = [path for path in (tmp_path / "pool").rglob("*") if path.stat().st_size > 800_000]
    os.truncate(file, 400_000)
    done = run("copy", source, target)
    assert done.code == 1
    assert "left out: large" in done.err
    with everpool.open(target) as pool:
        assert list(pool.names()) == ["a", "z"]


def test_a_marker_without_its_memory_says_nothing(tmp_path: Path) -> None:
    source, target = places(tmp_path, "folder"), str(tmp_path / "other")
    with everpool.open(source) as pool, everpool.open(target) as into:
        pool["m"] = into["m"] = "brand new"
        pool[marker_of(COPYING, "m")] = into[marker_of(COPYING, "m")] = {"name": "m"}
    out_of("copy", source, target, "--verify")
    with everpool.open(target) as pool:
        assert dict(pool) == {"m": "brand new"}


def test_what_is_half_imported_is_not_passed_on(tmp_path: Path) -> None:
    source, target = places(tmp_path, "folder"), str(tmp_path / "other")
    with everpool.open(source) as pool:
        pool.allocate("m", MIB)
        pool[marker_of(IMPORTING, "m")] = {"name": "m"}
    done = run("copy", source, target)
    assert done.code == 1
    assert "m: it is half imported itself" in done.err
    with everpool.open(target) as pool:
        assert not list(pool)


def test_damage_in_the_destination_is_mended(tmp_path: Path) -> None:
    source, target = places(tmp_path, "folder"), str(tmp_path / "other")
    with everpool.open(source) as pool:
        pool["large"] = np.ones(100_000)
    out_of("copy", source, target)
    (file,) = [path for path in (tmp_path / "other").rglob("*") if path.stat().st_size > 800_000]
    os.truncate(file, 400_000)
    out_of("copy", source, target, "--verify")
    with everpool.open(target) as pool:
        assert pool["large"][-1] == 1


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    url = places(tmp_path, "bucket")
    assert run("copy", tmp_path / "none", url).code == 1
    assert not (tmp_path / "bucket").exists()
    out_of("put", url, "a", "1")
    for target in (url, str(tmp_path / "bucket")):
        done = run("copy", url, target)
        assert done.code == 2
        assert "name another destination" in done.err
    done = run("copy", url, "http://host/bucket")
    assert done.code == 2
    assert "use s3://, gs://, az:// or file:///" in done.err
    done = run("ls", f"file:{tmp_path}/bucket")
    assert done.code == 2
    assert "two behind the colon" in done.err
    with pytest.raises(everpool.InvalidError, match="not a Path"):
        everpool.open(Path(url))
    with pytest.raises(everpool.InvalidError, match=f"open it as {url}"):
        everpool.open(tmp_path / "bucket")
    out_of("put", tmp_path / "pool", "a", "1")
    with pytest.raises(everpool.InvalidError, match="without file://"):
        everpool.open(f"file://{tmp_path}/pool")


def test_every_command_takes_a_url(tmp_path: Path) -> None:
    url = places(tmp_path, "bucket")
    out_of("put", url, "greeting", "hello")
    out_of("put", url, "limits", "[1, 2]", "--json")
    assert out_of("get", url, "greeting") == "hello\n"
    assert out_of("cat", url, "greeting") == "hello"
    assert out_of("ls", url) == "greeting\nlimits\n"
    assert "json" in out_of("ls", "-l", url)
    assert "put" in out_of("watch", url, "--since", "0", "--count", "1")
    assert json.loads(out_of("stats", url, "--json"))["kind"] == "bucket"
    assert out_of("verify", url) == "ok: every checksum holds\n"
    assert "exported 2 objects" in run("export", url, tmp_path / "copy").out
    assert "imported 2 objects" in out_of("import", f"file://{tmp_path}/other", tmp_path / "copy")
    assert run("export", url, tmp_path / "bucket" / "copy").code == 2
    out_of("rm", url, "greeting")
    assert run("get", url, "greeting").code == 1


def test_another_hosts_commit_is_seen_at_once(tmp_path: Path) -> None:
    url = places(tmp_path, "bucket")
    out_of("put", url, "a", "1")
    with contextlib.closing(everpool.open(url, cache_dir=tmp_path / "elsewhere")) as other:
        for number in range(5):
            other["a"] = str(number)
            assert out_of("get", url, "a") == f"{number}\n"


def test_markers_are_of_names_that_nobody_else_uses() -> None:
    assert marker_of(COPYING, "a").startswith(COPYING)
    assert len({marker_of(COPYING, name) for name in ("a", "b", "x" * 1000)}) == 3
