"""Import and export: every object goes out as a plain file and comes back as it was."""

import datetime as dt
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import everpool
from everpool.cli import exporting, importing
from everpool.cli.layout import Layout, escape_name
from support.cli import EVERPOOL, contents, out_of, run


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return tmp_path / "pool"


ODD_NAMES = [
    "a", "A", "a/b", "a/b/c", "a.npy", "..", ".", "../../etc/passwd", "/etc/passwd", "//", "x/",
    "manifest.json", "manifest.json.part", "con:*?", "back\\slash", "line\nend", "tab\t", "%41",
    "100%", "dot.", "space ", "ß", "SS", "ss", "e\u0301", "\u00e9", "n" * 1024, "é" * 512,
    "/".join("d" * 512), "x.part", "x", "X.part", "a%2", "~", "-rf", " lead", "💾/💾", "../a",
]  # fmt: skip


def fill(path: Path, extra: Callable[[everpool.Pool], None] | None = None) -> None:
    """Make a pool with one of everything."""
    with everpool.open(path) as pool:
        pool["bytes"] = b"\x00\xff" * 100
        pool["empty"] = b""
        pool["big"] = os.urandom(200_000)
        pool["text"] = "grüße"
        pool["json/deep"] = {"a": [1, 2.5, None, True, (1, b"x")], "big": 10**400, "z": 1 + 2j}
        pool["json/times"] = [dt.date(2024, 5, 1), dt.datetime(2024, 5, 1, 12, fold=1)]
        pool["json/odd"] = [math.inf, -0.0, {"$everpool": "bytes"}, np.float32(1.5), np.str_("s")]
        pool["array/f"] = np.asfortranarray(np.random.default_rng(0).normal(size=(50, 60)))
        pool["array/big-endian"] = np.arange(5, dtype=">u4")
        pool["array/0d"] = np.array(7, "M8[s]")
        pool["array/none"] = np.zeros((0, 3), "c16")
        pool["array/record"] = np.zeros(3, [("x", "i1"), ("y", "f8", (2,))])
        odd = np.dtype({"names": ["a", "b"], "formats": ["i4", "i2"], "offsets": [4, 0]})
        pool["array/odd"] = np.ones((2, 2), odd)
        pool.allocate("memory", 300_000)[100:105] = b"bytes"
        live = pool.allocate_array("live", (10, 3), "<u2")
        live[3:5] = 9
        if extra is not None:
            extra(pool)


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_export_and_import_restore_everything(pool: Path, tmp_path: Path) -> None:
    fill(pool)
    summary = json.loads(out_of("export", pool, tmp_path / "out", "--json"))
    with everpool.open(pool, create=False) as opened:
        assert summary["pool_version"] == opened.version and summary["objects"] == len(opened)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())["objects"]
    assert manifest["live"]["kind"] == "memory-array" and manifest["live"]["shape"] == [10, 3]
    assert (np.load(tmp_path / "out" / "live.npy")[3:5] == 9).all()
    assert (tmp_path / "out" / "text.json").read_text() == '"gr\\u00fc\\u00dfe"\n'
    out_of("import", tmp_path / "other", tmp_path / "out")
    assert contents(tmp_path / "other") == contents(pool)
    assert out_of("verify", tmp_path / "other") == "ok: every checksum holds\n"


def test_tables_come_back_with_their_types(pool: Path, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    plain = pa.table({"x": [1, None], "y": ["a", "b"]})
    dictionary = pa.array(["a", "b", "a"]).dictionary_encode().cast(pa.dictionary("int8", "string"))
    seconds = pa.array([0, 1, 2], pa.time32("s"))
    odd = pa.table({"d": dictionary, "t": seconds, "n": pa.nulls(3)})
    batch = pa.record_batch({"x": [1, 2, 3]})
    nothing = pa.record_batch({"x": pa.array([], "int16")})
    stored = {"plain": plain, "odd": odd, "batch": batch, "nothing": nothing}
    with everpool.open(pool) as opened:
        opened.update(stored)
    out_of("export", pool, tmp_path / "out")
    assert (tmp_path / "out" / "plain.parquet").exists()
    out_of("import", tmp_path / "other", tmp_path / "out")
    with everpool.open(tmp_path / "other") as other:
        for name, value in stored.items():
            assert type(other[name]) is type(value)
            assert other[name].equals(value) and other[name].schema.equals(value.schema)


def test_odd_names_stay_inside_and_come_back(pool: Path, tmp_path: Path) -> None:
    def add(opened: everpool.Pool) -> None:
        for number, name in enumerate(ODD_NAMES):
            opened[name] = [np.arange(number), bytes([number]), {"n": number}][number % 3]

    fill(pool, add)
    out = tmp_path / "deep" / "er" / "out"
    out_of("export", pool, out)
    assert {p.name for p in tmp_path.iterdir()} == {"pool", "deep"}
    assert [p.name for p in (tmp_path / "deep" / "er").iterdir()] == ["out"]
    assert len({str(p).casefold() for p in out.rglob("*")}) == len(list(out.rglob("*")))
    out_of("import", tmp_path / "other", out)
    assert contents(tmp_path / "other") == contents(pool)


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@given(st.lists(names, unique=True))
def test_paths_are_unique_and_plain(names: list[str]) -> None:
    layout = Layout(names)
    paths = [layout.path_of(name, suffix) for name in names for suffix in ("", ".npy")]
    folders = {str(parent).casefold() for path in paths for parent in path.parents}
    assert len({str(path).casefold() for path in paths}) == len(paths)
    for path in paths:
        assert not path.is_absolute() and ".." not in path.parts and "\\" not in str(path)
        assert all(len(part.encode()) < 256 for part in path.parts)
        assert str(path).casefold() not in folders


def test_ordinary_names_are_their_own_paths() -> None:
    for name in ("a", "scans/t1", "README.md", "x y/ü-1_2.tar.gz", ".hidden"):
        assert str(escape_name(name)) == name


def test_a_plain_tree_goes_in_and_comes_out(pool: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    np.save(data / "sub" / "a.npy", np.arange(10))
    (data / "sub" / "broken.npy").write_bytes(b"not an array")
    (data / "text.txt").write_bytes(b"hello")
    (data / "empty").write_bytes(b"")
    (data / "manifest.json").write_bytes(b'{"somebody": "else"}')
    os.mkfifo(data / "pipe")
    os.symlink("text.txt", data / "link")
    done = run("import", pool, data, "--prefix", "in/")
    assert done.code == 0 and "broken.npy" in done.err and "pipe" in done.err
    with everpool.open(pool, create=False) as opened:
        assert (opened["in/sub/a.npy"] == np.arange(10)).all()
        assert opened["in/text.txt"] == opened["in/link"] == b"hello"
        assert len(opened) == 6
    os.unlink(data / "pipe")
    out_of("export", pool, tmp_path / "out")
    assert tree(tmp_path / "out" / "in") == tree(data)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["in", "manifest.json"]


def test_a_pool_inside_the_tree_is_not_imported_into_itself(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    out_of("import", tmp_path / "pool", tmp_path)
    assert out_of("ls", tmp_path / "pool") == "file\n"
    assert run("export", tmp_path / "pool", tmp_path / "pool" / "out").code == 2


def test_import_refuses_to_replace_and_can_be_told_to(pool: Path, tmp_path: Path) -> None:
    fill(pool)
    out_of("export", pool, tmp_path / "out")
    before = contents(pool)
    assert "15 were there already" in out_of("import", pool, tmp_path / "out")
    with everpool.open(pool) as opened:
        opened["text"] = "changed"
        opened.memory("memory")[0:1] = b"!"
        del opened["bytes"]
    done = run("import", pool, tmp_path / "out")
    assert done.code == 1 and "'text'" in done.err and "'memory'" in done.err
    assert "bytes" not in contents(pool)  # nothing at all was imported
    out_of("import", pool, tmp_path / "out", "--force")
    assert contents(pool) == before


def test_import_notices_damaged_files_and_manifests(pool: Path, tmp_path: Path) -> None:
    fill(pool)
    out = tmp_path / "out"
    out_of("export", pool, out)
    (out / "big").write_bytes(b"other")
    done = run("import", tmp_path / "other", out)
    assert done.code == 1 and "SHA-256" in done.err
    manifest = json.loads((out / "manifest.json").read_text())
    (tmp_path / "secret").write_bytes(b"secret")
    os.symlink(tmp_path, out / "away")
    for file in ("../secret", str(tmp_path / "secret"), "away/secret", "", "missing"):
        manifest["objects"] = {"x": {"file": file, "kind": "bytes"}}
        (out / "manifest.json").write_text(json.dumps(manifest))
        assert run("import", tmp_path / "third", out).code in (1, 2)
    for objects in ([], {"x": 1}, {"x": {"file": 1}}, {"x": {"file": "big", "kind": "code"}}):
        manifest["objects"] = objects
        (out / "manifest.json").write_text(json.dumps(manifest))
        assert run("import", tmp_path / "third", out).code in (1, 2)
    manifest |= {"objects": {}, "format_version": 2}
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert "newer everpool" in run("import", tmp_path / "third", out).err


def test_export_refuses_to_overwrite_and_can_be_told_to(pool: Path, tmp_path: Path) -> None:
    fill(pool)
    out = tmp_path / "out"
    out.mkdir()
    (out / "text.json").write_text("mine")
    done = run("export", pool, out)
    assert done.code == 1 and "--force" in done.err
    assert tree(out) == {"text.json": b"mine"}
    out_of("export", pool, out, "--force")
    assert (out / "text.json").read_bytes() != b"mine"
    os.symlink(tmp_path, out / "link")
    with everpool.open(pool) as opened:
        opened["link/escape"] = b"x"
    done = run("export", pool, out, "--force")
    assert done.code == 2 and "link" in done.err and not (tmp_path / "escape").exists()


def test_export_of_a_prefix_and_live(pool: Path, tmp_path: Path) -> None:
    fill(pool)
    out_of("export", pool, tmp_path / "some", "--prefix", "array/", "--live")
    manifest = json.loads((tmp_path / "some" / "manifest.json").read_text())
    assert manifest["pool_version"] is None
    assert all(name.startswith("array/") for name in manifest["objects"]) and manifest["objects"]


def test_export_gives_up_on_a_pool_that_never_rests(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(pool)
    written = exporting.npy.write_array

    with everpool.open(pool) as other:

        def disturb(array: Any, file: Any) -> None:
            other["text"] = str(time.monotonic_ns())
            written(array, file)

        monkeypatch.setitem(exporting._WRITERS, "array", disturb)  # pyright: ignore
        done = run("export", pool, tmp_path / "out")
    assert done.code == 3 and "--live" in done.err
    # The same folder can be used again, for a second try.
    monkeypatch.setitem(exporting._WRITERS, "array", written)  # pyright: ignore
    out_of("export", pool, tmp_path / "out")


def test_an_interrupted_export_is_finished_by_a_second(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(pool)
    out = tmp_path / "out"

    def interrupt(value: object, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(exporting._WRITERS, "str", interrupt)  # pyright: ignore
        assert run("export", pool, out).code == 130
    assert (out / "manifest.json.part").exists() and not (out / "text.json").exists()
    done = run("import", tmp_path / "other", out)
    assert done.code == 2 and "unfinished" in done.err
    with everpool.open(pool) as opened:
        del opened["big"]  # what the first run wrote and the second must not leave
    out_of("export", pool, out)
    assert "big" not in tree(out) and "manifest.json.part" not in tree(out)
    out_of("import", tmp_path / "other", out)
    assert contents(tmp_path / "other") == contents(pool)


@pytest.mark.parametrize("moment", [0.4, 0.6, 0.9])
def test_ctrl_c_leaves_an_import_that_a_second_run_completes(
    pool: Path, tmp_path: Path, moment: float
) -> None:
    fill(pool, lambda opened: opened.allocate("large", 40 << 20).write(1, b"x" * (39 << 20)))
    out_of("export", pool, tmp_path / "out")
    command = [*EVERPOOL, "import", str(tmp_path / "other"), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        time.sleep(moment)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate()
    assert child.returncode in (0, 130, -signal.SIGINT), err
    out_of("import", tmp_path / "other", tmp_path / "out")
    assert contents(tmp_path / "other") == contents(pool)


def test_memory_that_was_half_filled_is_filled_by_a_second_run(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with everpool.open(pool) as opened:
        opened.allocate("large", 40 << 20).write(0, os.urandom(40 << 20))
    out_of("export", pool, tmp_path / "out")
    read = importing.data_chunks

    def interrupted(*arguments: Any) -> Any:
        yield next(read(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(importing, "data_chunks", interrupted)
        assert run("import", tmp_path / "other", tmp_path / "out").code == 130
    assert contents(tmp_path / "other") != contents(pool)
    out_of("import", tmp_path / "other", tmp_path / "out")
    assert contents(tmp_path / "other") == contents(pool)


def test_huge_sparse_memory_costs_what_was_written(pool: Path, tmp_path: Path) -> None:
    with everpool.open(pool) as opened:
        huge = opened.allocate("huge", 1 << 42)
        huge[(1 << 41) + 5] = 7
        huge[(1 << 42) - 1] = 9
        opened.allocate("untouched", 1 << 42)
        opened.allocate_array("array", (1 << 38,), "f8")[-1] = 1.5
    begin = time.monotonic()
    out_of("export", pool, tmp_path / "out")
    assert (tmp_path / "out" / "huge").stat().st_blocks * 512 < 1 << 20
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())["objects"]
    assert len({facts["data_sha256"] for facts in manifest.values()}) == 3
    out_of("import", tmp_path / "other", tmp_path / "out")
    assert "3 were there already" in out_of("import", tmp_path / "other", tmp_path / "out")
    assert time.monotonic() - begin < 60
    with everpool.open(tmp_path / "other") as other:
        huge = other.memory("huge")
        assert huge.size == 1 << 42 and huge[(1 << 41) + 5] == 7 and huge[-1] == 9
        assert other.array("array")[-1] == 1.5 and len(huge.extents()) == 2
    with (tmp_path / "out" / "huge").open("r+b") as file:
        file.seek(1 << 30)
        file.write(b"!")
    done = run("import", tmp_path / "third", tmp_path / "out")
    assert done.code == 1 and "SHA-256" in done.err


def test_large_memory_of_somebody_else_is_not_replaced(pool: Path, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) + bytes(30 << 20) + b"end"
    with everpool.open(pool) as opened:
        opened.allocate("large", len(data)).write(0, data)
    out_of("export", pool, tmp_path / "out")
    assert (tmp_path / "out" / "large").stat().st_blocks * 512 < 4 << 20  # holes stay holes
    with everpool.open(tmp_path / "other") as other:
        other.allocate("large", len(data)).write(0, b"somebody else's")
    assert run("import", tmp_path / "other", tmp_path / "out").code == 1
    out_of("import", tmp_path / "other", tmp_path / "out", "--force")
    assert contents(tmp_path / "other") == contents(pool)


def test_big_arrays_are_imported_without_loading_them(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    size = 512 << 20
    array = np.lib.format.open_memmap(tmp_path / "data" / "a.npy", "w+", "u1", (size,))
    array[:: 1 << 20] = 1
    array.flush()
    del array
    script = (
        "import resource, sys; from everpool.cli.app import app; "
        "resource.setrlimit(resource.RLIMIT_DATA, (256 << 20, 256 << 20)); "
        "app(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "import", str(pool), str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "512.0 MiB" in done.stdout
