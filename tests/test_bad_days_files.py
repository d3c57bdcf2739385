"""Damaged files: each is healed, or a clear error, or at least found by `verify`.

Only damaged pages of the index may end a process; `verify` survives that, since it reads in a
process of its own.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import everpool
from everpool import CorruptionError, EverpoolError, InvalidError, NotFoundError
from everpool.replica import verify
from everpool.replica.verify import Damage, verify_folder
from support import scenes
from support.processes import Child, call, ending
from support.scenes import pattern

NAMES = 60
# Long enough for a walk of the index and all files on a busy machine.
_PATIENCE_S = 60.0


def fill(path: Path) -> None:
    """Make a pool with objects of every kind, all of it flushed."""
    with everpool.open(path) as pool:
        with pool.transaction() as tx:
            for number in range(NAMES):
                tx[f"small/{number}"] = pattern(number, 800)
        pool["x" * 700] = "a long name"
        pool["large"] = pattern(7, 3 << 20)
        pool["array"] = np.arange(30_000)
        memory = pool.allocate("memory", 1 << 20)
        memory.write(0, pattern(8, 200_000))
        memory.write(500_000, pattern(9, 100_000))
        pool.allocate_array("counts", 1000, "i8")[:] = np.arange(1000)
        scenes.tidy(pool)
        pool["after the flush"] = 1


class Seen(NamedTuple):
    """What a process found in the pool: contents by name, and what it could not read."""

    contents: dict[str, Any]
    errors: dict[str, str]
    wrote: str


def look(path: Path, write: bool) -> Seen:
    """Open the pool, read everything and write something; errors other than ours pass through."""
    contents: dict[str, Any] = {}
    errors: dict[str, str] = {}
    wrote = ""
    try:
        with everpool.open(path, create=False, timeout_s=5) as pool:
            for name in pool.names():
                try:
                    contents[name] = read(pool, name)
                except EverpoolError as error:
                    errors[name] = f"{error.kind}: {error}"
            if write:
                try:
                    pool["written"] = 1
                    pool.memory("memory").write(900_000, b"written")
                except EverpoolError as error:
                    wrote = f"{error.kind}: {error}"
    except EverpoolError as error:
        errors["the pool"] = f"{error.kind}: {error}"
    return Seen(contents, errors, wrote)


def read(pool: Any, name: str) -> Any:
    found = pool[name]
    if isinstance(found, everpool.Memory):
        return found.read(0, found.size)
    if isinstance(found, np.ndarray | everpool.Array):
        return np.asarray(found).tobytes()
    return bytes(found) if isinstance(found, bytes | memoryview) else found


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "pool"
    call(fill, path)
    return path


@pytest.fixture(scope="module")
def expected(original: Path) -> dict[str, Any]:
    seen = call(look, original, False)
    assert not seen.errors and len(seen.contents) == NAMES + 6
    return seen.contents


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A copy of the pool, to be damaged."""
    shutil.copytree(original, tmp_path / "pool")
    return tmp_path / "pool"


def survey(path: Path, write: bool = True) -> Seen | int:
    """Return what a process found, or the signal that ended it; never a hang, or another error."""
    child = Child(surveyor, path, write)
    with ending(child):
        try:
            seen = child.receive(_PATIENCE_S)
        except AssertionError:
            child.kill()
            code = -child.join()
            assert code in (signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT), "it hung, or raised"
            return code
        assert child.join() == 0
    return seen


def surveyor(link: Connection, path: Path, write: bool) -> None:
    link.send(look(path, write))


def damage_of(path: Path) -> list[Damage]:
    """Do what `verify` does, in a child that is cheaper to start."""
    said = path.parent / "said by verify"
    child = Child(verifier, path, said)
    with ending(child):
        try:
            code = child.receive(_PATIENCE_S)
        except AssertionError:
            child.kill()
            assert child.join() != -signal.SIGKILL, "it hung"
            return [Damage("index", "reading it ends a process")]
        child.join()
    lines = (json.loads(line) for line in said.read_text().splitlines())
    found = [Damage(*line["damage"]) for line in lines if "damage" in line]
    assert bool(found) == bool(code)
    return found


def verifier(link: Connection, path: Path, said: Path) -> None:
    sys.argv[1:] = [os.fspath(path)]
    with open(said, "w") as out, contextlib.redirect_stdout(out):
        try:
            verify.main()
        except SystemExit as end:
            out.flush()
            link.send(end.code)


def is_sound(path: Path) -> bool:
    return not damage_of(path)


def cut(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def only(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda file: file.stat().st_size)


# The marker


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", CorruptionError),
        (b"{", CorruptionError),
        (b"[]", CorruptionError),
        (b"\xff\xfe", CorruptionError),
        (b'{"everpool": 1}', CorruptionError),
        (b'{"everpool": "one", "pool": "x"}', CorruptionError),
        (b'{"everpool": 2, "pool": "x"}', InvalidError),
    ],
)
def test_a_damaged_marker(path: Path, content: bytes, kind: type[EverpoolError]) -> None:
    (path / "everpool.json").write_bytes(content)
    for options in ({}, {"create": False}, {"read_only": True}):
        with pytest.raises(kind) as caught:
            everpool.open(path, **options)
        assert "everpool.json" in str(caught.value) or "upgrade" in str(caught.value)


def test_a_missing_marker_never_costs_the_contents(path: Path, expected: dict[str, Any]) -> None:
    """Whoever opens a folder to make a pool in it must not empty one that lost its marker."""
    marker = (path / "everpool.json").read_bytes()
    (path / "everpool.json").unlink()
    before = (path / "index" / "data.mdb").stat()
    with pytest.raises(InvalidError, match="not a pool"):
        everpool.open(path, create=False)
    with pytest.raises((InvalidError, CorruptionError)) as caught:
        everpool.open(path)
    assert "everpool.json" in str(caught.value)
    after = (path / "index" / "data.mdb").stat()
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)
    (path / "everpool.json").write_bytes(marker)
    seen = survey(path)
    assert isinstance(seen, Seen) and seen.contents == expected and not seen.errors


# What is made anew


@pytest.mark.parametrize("file", ["lock", "shared", "index/lock.mdb"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: cut(file, 0),
        lambda file: cut(file, 5),
        lambda file: file.write_bytes(bytes(file.stat().st_size)),
        lambda file: file.write_bytes(b"\xff" * 8192),
        lambda file: file.write_bytes(random.Random(1).randbytes(8192)),
    ],
    ids=["missing", "empty", "cut", "zeros", "ones", "noise"],
)
def test_files_that_hold_nothing_are_made_anew(
    path: Path, expected: dict[str, Any], file: str, damage: Callable[[Path], None]
) -> None:
    damage(path / file)
    seen = survey(path)
    assert isinstance(seen, Seen), f"signal {seen}"
    assert seen.contents == expected and not seen.errors and not seen.wrote
    assert is_sound(path)
    again = survey(path)
    assert isinstance(again, Seen) and again.contents["written"] == 1


def test_every_flipped_bit_of_the_shared_page_is_healed_or_harmless(
    path: Path, expected: dict[str, Any]
) -> None:
    """Nobody has the pool open: the page must not be believed more than the index."""
    pristine = (path / "shared").read_bytes()
    for offset in range(0, 64, 3):
        flip(path / "shared", offset, offset % 8)
        seen = survey(path, write=False)
        assert isinstance(seen, Seen), f"byte {offset}: signal {seen}"
        assert seen.contents == expected and not seen.errors, (offset, seen.errors)
        (path / "shared").write_bytes(pristine)
    assert is_sound(path)


def test_garbage_in_staging_is_swept(path: Path, expected: dict[str, Any]) -> None:
    (path / "staging" / "leftover").write_bytes(b"x" * 1000)
    seen = survey(path)
    assert isinstance(seen, Seen) and seen.contents == expected
    assert os.listdir(path / "staging") == []


def test_strange_files_do_no_harm(path: Path, expected: dict[str, Any]) -> None:
    for folder in ("", "memory", "values", "index"):
        (path / folder / "notes.txt").write_text("x")
    seen = survey(path)
    assert isinstance(seen, Seen) and seen.contents == expected and not seen.wrote
    assert (path / "memory" / "notes.txt").exists()
    assert is_sound(path)


# Values and memory


def damaged_name(path: Path, expected: dict[str, Any], name: str) -> None:
    """Only `name` may suffer: reading it is a `CorruptionError`, and verify names it."""
    seen = survey(path)
    assert isinstance(seen, Seen), f"signal {seen}"
    assert set(seen.errors) == {name} and seen.errors[name].startswith("corruption: "), seen.errors
    assert "restore" in seen.errors[name]
    rest = {other: value for other, value in expected.items() if other != name}
    assert seen.contents == rest
    damage = damage_of(path)
    assert damage and {found.name for found in damage} == {name}, damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: cut(file, 0),
        lambda file: cut(file, file.stat().st_size - 1),
        lambda file: cut(file, file.stat().st_size + 1),
        lambda file: flip(file, file.stat().st_size - 1, 7),
        lambda file: flip(file, file.stat().st_size - 40, 0),
    ],
    ids=["missing", "empty", "shorter", "longer", "footer", "magic"],
)
def test_a_damaged_value_file(
    path: Path, expected: dict[str, Any], damage: Callable[[Path], None]
) -> None:
    damage(only(path / "values")[-1])
    damaged_name(path, expected, "large")


def test_a_value_file_of_a_newer_format(path: Path) -> None:
    file = only(path / "values")[-1]
    flip(file, file.stat().st_size - 33, 1)
    seen = survey(path)
    assert isinstance(seen, Seen) and seen.errors["large"].startswith("invalid: ")
    assert "upgrade" in seen.errors["large"]


@pytest.mark.parametrize("place", [0, 1 << 20, (1 << 20) - 1, (3 << 20) - 1, (3 << 20) + 3])
def test_a_flipped_bit_of_a_large_value_is_found_by_name(path: Path, place: int) -> None:
    flip(only(path / "values")[-1], place, 3)
    damage = damage_of(path)
    assert damage and {found.name for found in damage} == {"large"}
    block = place >> 20
    if place < 3 << 20:
        assert f"bytes {block << 20} to " in damage[0].detail


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: cut(file, 0),
        lambda file: cut(file, file.stat().st_size - 1),
        lambda file: cut(file, file.stat().st_size + 1),
    ],
    ids=["missing", "empty", "shorter", "longer"],
)
def test_a_damaged_memory_file(
    path: Path, expected: dict[str, Any], damage: Callable[[Path], None]
) -> None:
    damage(only(path / "memory")[-1])
    seen = survey(path)
    assert isinstance(seen, Seen), f"signal {seen}"
    assert set(seen.errors) == {"memory"} and seen.errors["memory"].startswith("corruption: ")
    assert "restore" in seen.errors["memory"]
    assert seen.contents == {name: it for name, it in expected.items() if name != "memory"}
    assert seen.wrote, "it wrote to memory that is not whole"
    assert "memory" in {damage.name for damage in damage_of(path)}


@pytest.mark.parametrize("place", [0, 65_535, 65_536, 199_999, 550_000])
def test_a_flipped_bit_of_memory_is_found_by_name(path: Path, place: int) -> None:
    flip(only(path / "memory")[-1], place, 5)
    (damage,) = damage_of(path)
    assert damage.name == "memory"
    assert f"bytes {place >> 16 << 16} to " in damage.detail


# The index


def check_index_damage(path: Path, expected: dict[str, Any], what: str) -> str:
    """Damage to the index is an error, or verify finds it, or it does no harm at all."""
    ok = is_sound(path)
    seen = survey(path, write=False)
    if isinstance(seen, int):
        assert not ok, f"{what}: signal {seen}, and verify found nothing"
        return "signal"
    for text in seen.errors.values():
        assert text.startswith(("corruption: ", "invalid: ", "unavailable: ")), (what, text)
    if seen.errors:
        assert not ok, f"{what}: {seen.errors}, and verify found nothing"
        return "error"
    wrong = [name for name in expected if seen.contents.get(name) != expected[name]]
    if wrong or len(seen.contents) != len(expected):
        assert not ok, f"{what}: {wrong} is wrong, and verify found nothing"
        return "found"
    return "found" if not ok else "harmless"


def test_flipped_bits_of_the_index_are_found_or_harmless(
    path: Path, expected: dict[str, Any]
) -> None:
    file = path / "index" / "data.mdb"
    pristine = file.read_bytes()
    used = [at for at in range(0, len(pristine), 4096) if any(pristine[at : at + 4096])]
    choose = random.Random(20)
    ends: dict[str, int] = {}
    for turn in range(40):
        # In the first bytes of a page is what LMDB trusts blindly.
        offset = choose.choice(used) + choose.randrange(40 if turn % 2 else 4096)
        flip(file, offset, bit := choose.randrange(8))
        end = check_index_damage(path, expected, f"bit {bit} of byte {offset}")
        ends[end] = ends.get(end, 0) + 1
        file.write_bytes(pristine)
    assert ends.get("harmless", 0) < 40, ends
    assert is_sound(path)


@pytest.mark.parametrize("number", [0, 17, NAMES - 1])
def test_a_flipped_bit_of_a_small_value_is_found_by_name(
    path: Path, expected: dict[str, Any], number: int
) -> None:
    file = path / "index" / "data.mdb"
    data = file.read_bytes()
    place = data.find(pattern(number, 800))
    while place >= 0:  # it lies in its row, in the tail, and maybe in pages that are free
        flip(file, place + 5, 2)
        place = data.find(pattern(number, 800), place + 800)
    seen = survey(path, write=False)
    assert isinstance(seen, Seen)
    name = f"small/{number}"
    assert seen.errors[name].startswith("corruption: ") and name in seen.errors[name]
    assert name not in seen.contents and len(seen.contents) == len(expected) - 1
    assert name in {damage.name for damage in damage_of(path)}


@pytest.mark.parametrize("part", [0.0, 0.002, 0.3, 0.9, 0.99])
def test_a_truncated_index_is_an_error(path: Path, expected: dict[str, Any], part: float) -> None:
    file = path / "index" / "data.mdb"
    cut(file, int(file.stat().st_size * part))
    seen = survey(path)
    assert isinstance(seen, Seen), f"signal {seen}"
    assert list(seen.errors) == ["the pool"], seen.errors
    assert seen.errors["the pool"].startswith(("corruption: ", "invalid: "))
    assert "restore" in seen.errors["the pool"]
    assert not is_sound(path)


def test_a_missing_index_is_an_error_and_is_not_replaced(path: Path) -> None:
    (path / "index" / "data.mdb").unlink()
    for _ in range(2):
        seen = survey(path)
        assert isinstance(seen, Seen) and list(seen.errors) == ["the pool"], seen
        assert seen.errors["the pool"].startswith("corruption: "), seen.errors
        assert "restore" in seen.errors["the pool"]
    shutil.rmtree(path / "index")
    seen = survey(path)
    assert isinstance(seen, Seen) and seen.errors["the pool"].startswith("corruption: "), seen


@pytest.mark.parametrize("folder", ["memory", "values", "staging"])
def test_a_missing_folder_is_a_clear_error(path: Path, folder: str) -> None:
    shutil.rmtree(path / folder)
    seen = survey(path)
    assert isinstance(seen, Seen), f"signal {seen}"
    if folder == "staging":
        assert set(seen.errors) <= {"the pool"}
    else:
        assert seen.errors, "it read what is not there"
        assert all(text.startswith("corruption: ") for text in seen.errors.values()), seen.errors
        assert not is_sound(path)


def test_an_index_of_another_pool_is_found(path: Path, tmp_path: Path) -> None:
    """The marker and the index name the same pool."""
    other = tmp_path / "other"
    call(fill, other)
    shutil.copy(other / "index" / "data.mdb", path / "index" / "data.mdb")
    seen = survey(path)
    assert isinstance(seen, Seen) and list(seen.errors) == ["the pool"], seen.errors
    assert seen.errors["the pool"].startswith("corruption: ")


# Verify itself


def test_verify_of_a_sound_pool_says_so(path: Path) -> None:
    with everpool.open(path) as pool:
        progress: list[tuple[int, int]] = []
        report = pool.verify(lambda read, total: progress.append((read, total)))
    assert report.ok and report.damage == []
    assert report.names == NAMES + 6
    assert report.bytes_read > 3 << 20
    assert progress and all(0 <= read <= total for read, total in progress)


def test_a_verify_that_dies_is_damage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = path.parent / "dies.py"
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGBUS)\n")

    class Popen(verify.subprocess.Popen):  # type: ignore[name-defined, misc]
        def __init__(self, command: list[str], **options: Any) -> None:
            super().__init__([command[0], os.fspath(script)], **options)

    monkeypatch.setattr(verify.subprocess, "Popen", Popen)
    report = verify_folder(path)
    assert not report.ok and "SIGBUS" in report.damage[0].detail


def test_verify_from_outside_finds_what_reading_does_not(path: Path) -> None:
    """The child that `verify` starts is a whole interpreter of its own."""
    assert call(verify_folder, path, timeout_s=_PATIENCE_S).ok
    flip(only(path / "values")[-1], 5)
    cut(path / "index" / "data.mdb", 600_000)
    report = call(verify_folder, path, timeout_s=_PATIENCE_S)
    assert not report.ok and report.damage


def test_what_is_not_there_cannot_be_verified(tmp_path: Path) -> None:
    assert not call(verify_folder, tmp_path / "nothing", timeout_s=_PATIENCE_S).ok
    with pytest.raises(NotFoundError):
        everpool.open(tmp_path / "nothing", create=False)
