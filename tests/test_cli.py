"""The command line, on real pools: what it prints, what it stores, and how it ends."""

import contextlib
import datetime as dt
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import everpool
from everpool.cli import exporting
from everpool.cli.boundary import EXAMPLES
from everpool.cli.tagged import from_json, to_json
from everpool.cli.terminal import Silent
from support.cli import EVERPOOL, out_of, run


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return tmp_path / "pool"


# put, get, cat


@pytest.mark.parametrize(
    ("words", "stdin", "stored"),
    [
        (["hello"], None, "hello"),
        (["hello", "--bytes"], None, b"hello"),
        (["42", "--json"], None, 42),
        (['{"a": [1, null, 2.5]}', "--json"], None, {"a": [1, None, 2.5]}),
        (["@@home"], None, "@home"),
        (["-"], b"\x00\xff", b"\x00\xff"),
        (["-", "--str"], "grüße\n", "grüße\n"),
        (["-", "--json"], "[true]", [True]),
        (["@file.txt"], None, b"from a file"),
        (["@file.txt", "--str"], None, "from a file"),
    ],
)
def test_put_stores_what_is_meant(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    words: list[str], stdin: str | bytes | None, stored: object,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_bytes(b"from a file")
    assert out_of("put", pool, "name", *words, stdin=stdin) == ""
    with everpool.open(pool, create=False) as opened:
        found = opened["name"]
    assert found == stored and type(found) is type(stored)


def test_put_takes_arrays_and_tables_from_files(pool: Path, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    array = np.arange(12, dtype=">i2").reshape(3, 4)
    np.save(tmp_path / "a.npy", array)
    table = pa.table({"x": [1, 2], "y": ["a", None]})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "t.parquet")
    out_of("put", pool, "a", f"@{tmp_path / 'a.npy'}")
    out_of("put", pool, "t", f"@{tmp_path / 't.parquet'}")
    with everpool.open(pool, create=False) as opened:
        assert opened["a"].dtype == array.dtype and (opened["a"] == array).all()
        assert opened["t"].equals(table)


def test_put_refuses_npy_files_with_objects(pool: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    done = run("put", pool, "a", f"@{tmp_path / 'a.npy'}")
    assert done.code == 2 and "a.npy" in done.err and done.err.count("\n") == 1


def test_get_prints_text_json_and_bytes(pool: Path) -> None:
    with everpool.open(pool) as opened:
        opened["text"] = "grüße"
        opened["data"] = {"n": [1, 2.5, None], "b": b"\xff"}
        opened["raw"] = b"a\nb"
    assert out_of("get", pool, "text") == "grüße\n"
    assert json.loads(out_of("get", pool, "text", "--json")) == "grüße"
    printed = out_of("get", pool, "data")
    assert from_json(printed) == {"n": [1, 2.5, None], "b": b"\xff"}
    assert out_of("get", pool, "raw") == "a\nb"
    assert from_json(out_of("get", pool, "raw", "--json")) == b"a\nb"
    # What get prints, put reads.
    out_of("put", pool, "again", "-", "--json", stdin=printed)
    assert out_of("get", pool, "again") == printed


def test_get_summarises_and_writes_files(pool: Path, tmp_path: Path) -> None:
    array = np.asfortranarray(np.arange(24, dtype="f4").reshape(2, 3, 4))
    with everpool.open(pool) as opened:
        opened["array"] = array
        opened.allocate("memory", 100_000)[5:7] = b"hi"
        opened.allocate_array("live", (3, 5), "i8")[1] = 7
        opened["text"] = "hello"
    assert "float32 (2, 3, 4)" in out_of("get", pool, "array")
    out_of("get", pool, "array", "--out", tmp_path / "a.npy")
    assert (np.load(tmp_path / "a.npy") == array).all()
    out_of("get", pool, "live", "--out", tmp_path / "l.npy")
    assert np.load(tmp_path / "l.npy").tolist() == [[0] * 5, [7] * 5, [0] * 5]
    out_of("get", pool, "memory", "--out", tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == b"\0" * 5 + b"hi" + b"\0" * 99_993
    out_of("get", pool, "text", "-o", tmp_path / "t.txt")
    assert (tmp_path / "t.txt").read_bytes() == b"hello"
    assert run("get", pool, "array", "--json").code == 2
    assert run("get", pool, "array", "--out", tmp_path / "a.txt").code == 2
    assert not list(tmp_path.glob("*.part"))


def test_cat_prints_ranges(pool: Path) -> None:
    with everpool.open(pool) as opened:
        opened.allocate("memory", 64)[10:15] = b"hello"
        opened["array"] = np.arange(4, dtype="<i2")
        opened["fortran"] = np.asfortranarray(np.arange(6, dtype="u1").reshape(2, 3))
        opened["text"] = "grüße"
        opened["json"] = [1]
    assert out_of("cat", pool, "memory", "--offset", 10, "--size", 5) == "hello"
    assert out_of("cat", pool, "memory", "--offset", 60) == "\0" * 4
    assert out_of("cat", pool, "array", "--offset", 2, "--size", 2) == "\x01\0"
    assert out_of("cat", pool, "fortran") == "\0\1\2\3\4\5"
    assert out_of("cat", pool, "text") == "grüße"
    assert run("cat", pool, "memory", "--offset", 60, "--size", 5).code == 2
    assert run("cat", pool, "json").code == 2


# ls, rm, stats, watch, verify


def test_ls_lists_names_and_facts(pool: Path) -> None:
    with everpool.open(pool) as opened:
        opened["b/text"] = "hello"
        opened["b/line\nend"] = 1
        opened["a"] = np.zeros((2, 3), "f4")
        opened.allocate("m", 1 << 40)
    assert out_of("ls", pool) == "a\nb/line\\nend\nb/text\nm\n"
    assert json.loads(out_of("ls", pool, "b/", "--json")) == ["b/line\nend", "b/text"]
    assert json.loads(out_of("ls", pool, "nothing", "--json")) == []
    facts = {entry["name"]: entry for entry in json.loads(out_of("ls", pool, "-l", "--json"))}
    assert facts["a"] == {
        "name": "a", "kind": "array", "size": 24, "dtype": "float32", "shape": [2, 3], "version": 3,
    }  # fmt: skip
    assert facts["m"]["kind"] == "memory" and facts["m"]["size"] == 1 << 40
    long = out_of("ls", pool, "-l").splitlines()
    assert long[0].split() == ["array", "24", "B", "3", "a", "float32", "(2,", "3)"]
    assert "1.0 TiB" in long[3]


def test_rm_is_all_or_nothing(pool: Path) -> None:
    with everpool.open(pool) as opened:
        opened.update({f"x/{n}": n for n in range(5)} | {"y": 1})
    done = run("rm", pool, "x/1", "missing")
    assert done.code == 1 and "missing" in done.err
    assert out_of("ls", pool, "x/1") == "x/1\n"
    out_of("rm", pool, "x/1", "x/2")
    done = run("rm", pool, "--prefix", "x/")
    assert done.code == 2 and "--yes" in done.err
    done = run("rm", pool, "--prefix", "x/", "--yes")
    assert done.code == 0 and "3 objects" in done.err
    assert out_of("ls", pool) == "y\n"
    assert run("rm", pool, "--prefix", "x/", "--yes").code == 1
    assert run("rm", pool).code == 2
    assert run("rm", pool, "y", "--prefix", "").code == 2


def test_stats_and_watch_for_people_and_scripts(pool: Path) -> None:
    with everpool.open(pool) as opened:
        opened["a/1"] = 1
        opened["b"] = 2
        opened.allocate("a/m", 64)[8:12] = b"four"
        del opened["a/1"]
    assert json.loads(out_of("stats", pool, "--json"))["version"] == 5
    assert "version" in out_of("stats", pool)
    lines = out_of("watch", pool, "a/", "--since", 0, "--count", 4, "--json").splitlines()
    changes = [json.loads(line) for line in lines]
    assert [(c["version"], c["kind"], c["name"]) for c in changes] == [
        (1, "put", "a/1"), (3, "allocate", "a/m"), (4, "write", "a/m"), (5, "delete", "a/1"),
    ]  # fmt: skip
    assert (changes[2]["offset"], changes[2]["size"]) == (8, 4)
    shown = out_of("watch", pool, "a/", "--since", 3, "--count", 1)
    assert shown.split() == ["4", "write", "a/m", "[8:12]"]
    assert run("watch", pool, "--since", 99, "--count", 1).code == 2


def test_verify_lists_damage_and_exits_1(pool: Path) -> None:
    with everpool.open(pool) as opened:
        opened["big"] = np.arange(1 << 20, dtype="f8")
        opened["small"] = 1
    assert out_of("verify", pool) == "ok: every checksum holds\n"
    assert json.loads(out_of("verify", pool, "--json")) == {"ok": True, "damage": []}
    largest = max((p for p in pool.rglob("*") if p.is_file()), key=lambda p: p.stat().st_blocks)
    with largest.open("r+b") as file:
        file.seek(1 << 20)
        byte = file.read(1)[0]
        file.seek(1 << 20)
        file.write(bytes([byte ^ 1]))
    done = run("verify", pool)
    assert done.code == 1 and "big" in done.out
    done = run("verify", pool, "--json")
    assert done.code == 1 and "big" in done.out and not json.loads(done.out)["ok"]


def test_verify_survives_a_truncated_index(pool: Path) -> None:
    with everpool.open(pool) as opened:
        opened.update({f"n/{n}": "x" * 1000 for n in range(2000)})
    index = next(p for p in pool.rglob("data.mdb"))
    os.truncate(index, index.stat().st_size // 2)
    done = run("verify", pool, "--json")
    assert done.code == 1 and json.loads(done.out)["damage"]


# Errors


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["get", "POOL", "missing"], 1),
        (["get", "NOWHERE", "name"], 1),
        (["ls", "NOWHERE"], 1),
        (["verify", "NOWHERE"], 1),
        (["put", "POOL", "", "x"], 2),
        (["put", "POOL", "n" * 1025, "x"], 2),
        (["put", "POOL", "n", "{", "--json"], 2),
        (["put", "POOL", "n", "[" * 100_000, "--json"], 2),
        (["put", "POOL", "n", "1", "--json", "--str"], 2),
        (["put", "POOL", "n", '{"$everpool": "code", "value": 1}', "--json"], 2),
        (["put", "POOL", "n", "@missing"], 1),
        (["put", "POOL", "memory", "x"], 1),
        (["import", "POOL", "missing"], 2),
        (["get", "POOL"], 2),
        (["nonsense"], 2),
    ],
)
def test_errors_are_one_line_and_a_code(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    with everpool.open(pool) as opened:
        opened.allocate("memory", 8)
    places = {"POOL": str(pool), "NOWHERE": str(tmp_path / "nowhere")}
    done = run(*(places.get(word, word) for word in words))
    assert done.code == code, done
    assert done.out == "" and "Traceback" not in done.err
    if "Usage" not in done.err:
        assert done.err.count("\n") == 1, done.err


def test_a_reader_that_has_enough_is_no_error(pool: Path) -> None:
    with everpool.open(pool) as opened:
        opened.update({f"name/{n:06d}": None for n in range(20_000)})
    with subprocess.Popen(
        [*EVERPOOL, "ls", pool], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == b"name/000000\n"
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 141


def test_ctrl_c_ends_watch_quietly(pool: Path) -> None:
    with everpool.open(pool) as opened:
        opened["a"] = 1
    command = [*EVERPOOL, "watch", str(pool), "--since", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        assert b"put" in child.stdout.readline()
        child.send_signal(signal.SIGINT)
        assert child.stderr.read() == b""
    assert child.returncode == 130


def test_progress_is_drawn_on_terminals_only(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_bytes(b"x" * 1000)
    command = [*EVERPOOL, "import", str(pool), str(tmp_path / "data")]
    ours, theirs = pty.openpty()
    child = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, timeout=60, check=True)
    os.close(theirs)
    assert b"\x1b[" in os.read(ours, 1 << 16)
    os.close(ours)
    assert child.stdout == b"imported 1 object, 1000 B\n"


# Help


def test_every_command_teaches_by_example() -> None:
    for name in ("put", "get", "cat", "ls", "rm", "import", "export", "watch", "stats", "verify"):
        shown = out_of(name, "--help")
        assert "Examples" in shown and f"everpool {name}" in shown
    top = out_of("--help")
    assert "Exit codes" in top and "Examples" in top
    assert out_of("--version") == f"everpool {everpool.__version__}\n"
    assert "Usage: everpool demo" in out_of("demo", "--help")
    assert "Usage: everpool bench" in out_of("bench", "--help")


def _prepare_examples(folder: Path) -> None:
    rows = np.arange(6.0)
    np.save(folder / "scan.npy", rows)
    (folder / "logo.png").write_bytes(b"\x89PNG")
    (folder / "data").mkdir()
    (folder / "data" / "notes.txt").write_bytes(b"notes")
    with everpool.open(folder / "pool") as pool:
        pool["scans/t1"] = rows
        pool.allocate("ledger", 1 << 20)
        pool["greeting"], pool["limits"], pool["scan"], pool["logo"] = "hi", [1], rows, b"png"
    with everpool.open(folder / "pool") as pool:
        exporting.export_pool(pool, folder / "made", meter=Silent())
    shutil.copytree(folder / "made", folder / "copy")


@pytest.mark.parametrize("command", [name for name, found in EXAMPLES.items() if found])
def test_examples_work(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERPOOL_CACHE_DIR", str(tmp_path / "cache"))
    _prepare_examples(tmp_path)
    if command == "export":
        shutil.rmtree(tmp_path / "copy")
    for example in EXAMPLES[command]:
        # Other programs may be missing here: only our part of a pipe is run.
        own = example.line.split(" | jq")[0].split(" | xxd")[0]
        line = own.replace("everpool ", f"{sys.executable} -m everpool.cli ")
        with SomebodyWhoWrites(tmp_path / "pool", needed="watch" in line):
            done = subprocess.run(
                line, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60
            )
        assert done.returncode == 0, f"{example.line}\n{done.stderr}"
        silent = command in ("put", "rm") or " rm " in line or ">" in line or "--out" in line
        assert done.stdout or silent


class SomebodyWhoWrites:
    """Writes below audit/ while the block runs, so that a watcher has something to see."""

    def __init__(self, path: Path, *, needed: bool) -> None:
        self._path, self._needed = path, needed
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._write)

    def _write(self) -> None:
        with everpool.open(self._path) as pool:
            while not self._over.wait(0.05):
                pool[f"audit/{time.monotonic_ns()}"] = 1

    def __enter__(self) -> None:
        if self._needed:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._needed:
            self._thread.join()


# JSON

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text()
    | st.binary()
    | st.dates()
    | st.datetimes(timezones=st.none() | st.timezones() | st.just(dt.UTC)),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.just("$everpool"), inner)
    ),
    max_leaves=20,
)


@given(values)
def test_json_text_says_a_value_exactly(value: object) -> None:
    again = from_json(to_json(value))
    assert type(again) is type(value) and to_json(again) == to_json(value)
    assert again == value or "nan" in to_json(value) or '"float"' in to_json(value)


keys = st.sampled_from(["$everpool", "value", "x"])
plain_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner),
)


@given(plain_json)
def test_no_json_breaks_the_reader(plain: object) -> None:
    with contextlib.suppress(everpool.InvalidError):
        from_json(json.dumps(plain))


def test_arrays_inside_values_are_said_in_json() -> None:
    value = {"a": np.arange(3), "s": np.float64(1), "b": np.bytes_(b"x\0")}
    again = from_json(to_json(value))
    assert (again["a"] == value["a"]).all() and again["a"].dtype == value["a"].dtype
    assert type(again["s"]) is np.float64 and again["b"].tobytes() == b"x\0"
