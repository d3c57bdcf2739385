"""Nothing acknowledged is lost, and nothing is half, however the power goes.

Pools lie on a disk that keeps only what was synced (`support.forgetful`). Actors work on them
(`support.power_loss_script`), the disk's log is cut, and what survives is opened again and
compared with what was promised before the cut (`support.power_loss_audit`).
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace

import everpool
from support.forgetful import ForgetfulDisk, NotAvailableError
from support.power_loss import Cut, Cuts, Recording, Run, put_on_disk, running
from support.power_loss_audit import Auditor
from support.power_loss_mutants import ACCIDENTS, MUTANTS
from support.power_loss_script import (
    COUNTING_MIX,
    FLUSHING_MIX,
    FULL_MIX,
    LARGE_MIX,
    ONE_BY_ONE,
    SMALL_MIX,
)
from support.power_loss_workload import POOL, Order
from support.processes import Worker, call, ending

pytestmark = [pytest.mark.fuse, pytest.mark.xdist_group("power loss")]

FIRST, LATER = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))  # boots before and after a cut
INDEX, MEMORY, STAGING = f"{POOL}/index/data.mdb", f"{POOL}/memory*", f"{POOL}/staging*"
ROOM_BYTES = 1 << 30

Trouble = Callable[[Run], None]


def mounted(folder: Path) -> ForgetfulDisk:
    try:
        return ForgetfulDisk(folder).__enter__()
    except NotAvailableError as problem:
        pytest.skip(str(problem))


@pytest.fixture(scope="module")
def auditor() -> Iterator[Auditor]:
    with Auditor() as made:
        yield made


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """Where cuts are opened: in memory, if there is room, since they need no disk."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and os.access(shared, os.W_OK)
    roomy = roomy and shutil.disk_usage(shared).free > ROOM_BYTES
    folder = Path(tempfile.mkdtemp(prefix="everpool-", dir=shared if roomy else None))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def pick() -> random.Random:
    return random.Random(20)


def orders(
    processes: int,
    threads: int,
    steps: int,
    *,
    mix: Mapping[str, int] = FULL_MIX,
    seed: int = 1,
    later: bool = False,
    **facts: Any,
) -> Callable[[Path], list[Order]]:
    """Orders for a disk: the first process makes the pool, unless it is a later boot."""

    def make(disk: Path) -> list[Order]:
        return [
            Order(
                str(disk),
                tuple(f"{'later' * later}{process}{thread}" for thread in range(threads)),
                seed,
                steps,
                mix,
                create=not later and process == 0,
                boot=LATER if later else FIRST,
                **facts,
            )
            for process in range(processes)
        ]

    return make


def record(
    folder: Path, make: Callable[[Path], list[Order]], trouble: Trouble | None = None
) -> Recording:
    """Play on a disk of its own, with some trouble meanwhile."""
    disk = mounted(folder)
    with contextlib.closing(disk), running(disk, make(disk.path)) as run:
        if trouble is not None:
            trouble(run)
        return run.finish()


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """One process, a few threads."""
    return record(tmp_path_factory.mktemp("one") / "disk", orders(1, 3, 110))


def marks_of(cuts: Cuts) -> dict[str, int]:
    """How many marks of each kind a recording has."""
    return dict(cuts.promises(len(cuts.recording.log)).counts)


# -- power cuts -----------------------------------------------------------------------------------


def test_cuts_of_one_process(
    recording: Recording, auditor: Auditor, scratch: Path, pick: random.Random
) -> None:
    cuts = Cuts(recording, scratch)
    cuts.check(auditor, cuts.choose(pick, 80))
    assert cuts.read_only > cuts.checked / 10, "hardly anything could be opened read-only"


def test_cuts_of_several_processes_one_of_which_dies(
    tmp_path: Path, auditor: Auditor, scratch: Path, pick: random.Random
) -> None:
    def kill_one(run: Run) -> None:
        while run.playing() and run.disk.position() < 1500:
            time.sleep(0.005)
        run.kill(2)

    cuts = Cuts(record(tmp_path / "disk", orders(3, 2, 60, seed=2), kill_one), scratch)
    cuts.check(auditor, cuts.choose(pick, 60))


def test_cuts_of_a_pool_that_keeps_its_past(
    tmp_path: Path, auditor: Auditor, scratch: Path, pick: random.Random
) -> None:
    make = orders(2, 2, 60, seed=3, past=True)
    cuts = Cuts(record(tmp_path / "disk", make), scratch)
    cuts.check(auditor, cuts.choose(pick, 80))


def test_cuts_while_a_pool_is_made(
    recording: Recording, auditor: Auditor, scratch: Path, pick: random.Random
) -> None:
    cuts = Cuts(recording, scratch)
    places = cuts.places()["creation"]
    cuts.check(auditor, [Cut(at, pick.getrandbits(32), pick.random() < 0.3) for at in places])


def test_folders_above_a_new_pool_survive(
    tmp_path: Path, scratch: Path, pick: random.Random
) -> None:
    disk = mounted(tmp_path / "disk")
    with contextlib.closing(disk):
        call(make_deep_pool, disk.path)
        for seed in range(20):
            target = scratch / f"deep-{seed}"
            disk.cut(seed, target)
            assert call(names_of, target / "a" / "b" / "c") == []


def make_deep_pool(disk: Path) -> None:
    everpool.open(disk / "a" / "b" / "c").close()


def names_of(path: Path) -> list[str]:
    with everpool.open(path, create=False) as pool:
        return list(pool)


# -- power cuts in the middle of making up for a power cut ----------------------------------------


def no_fault(disk: ForgetfulDisk) -> None:
    pass


def full(disk: ForgetfulDisk) -> None:
    disk.full = True


def first_flush(disk: ForgetfulDisk) -> None:
    disk.fail("sync", glob=INDEX)


def second_flush(disk: ForgetfulDisk) -> None:
    """That of the entry which only the ring has."""
    disk.fail("sync", glob=INDEX, after=1)


def second_and_third_flush(disk: ForgetfulDisk) -> None:
    disk.fail("sync", 2, glob=INDEX, after=1)


Fault = Callable[[ForgetfulDisk], None]


FAULTS = [no_fault, full, first_flush, second_flush, second_and_third_flush]


@pytest.mark.parametrize("fault", FAULTS)
def test_cuts_while_a_cut_is_made_up_for(
    fault: Fault,
    recording: Recording,
    tmp_path: Path,
    auditor: Auditor,
    scratch: Path,
    pick: random.Random,
) -> None:
    first = Cuts(recording, scratch)
    for number, cut in enumerate(unfinished(first, auditor, pick, 2)):
        again = recover(tmp_path / str(number), first, cut, fault)
        cuts = Cuts(again, scratch)
        cuts.check(auditor, cuts.choose(pick, 12, AFTER_OPENING))
        assert fault in (no_fault, full) or marks_of(cuts)["unopened"]


def unfinished(cuts: Cuts, auditor: Auditor, pick: random.Random, count: int) -> list[Cut]:
    """Cuts after which the newest commit is in the ring only."""
    found: list[Cut] = []
    for cut in cuts.choose(pick, 20 * count, ("done",)):
        auditor.submit(cuts.make(cut))
        answer = auditor.answer()
        assert not answer.problem, f"{cut} of {cuts.keep()}: {answer.problem}"
        if answer.behind:
            found.append(cut)
            if len(found) == count:
                break
    return found


AFTER_OPENING = ("anywhere", "unopened", "opened", "saw", "sync", "done")


def recover(
    folder: Path, cuts: Cuts, cut: Cut, fault: Fault = no_fault, mutant: str = ""
) -> Recording:
    """Open a cut on a disk of its own, with a fault meanwhile, and go on working there."""
    disk = mounted(folder)
    with contextlib.closing(disk):
        begun = put_on_disk(disk, cuts, cut)
        assert begun.base is not None
        watched = tuple(begun.base.states)
        make = orders(2, 1, 8, mix=ONE_BY_ONE, later=True, watched=watched, mutant=mutant)
        fault(disk)
        with running(disk, make(disk.path)) as run:
            if disk.full:
                time.sleep(0.2)
                disk.full = False
            recording = run.finish()
    recording.start, recording.base = begun.start, begun.base
    return recording


# -- disks that fail ------------------------------------------------------------------------------


def failing(glob: str, *, most: int = 3) -> Trouble:
    """Now and then a few flushes of such files fail."""

    def trouble(run: Run) -> None:
        chance = random.Random(1)
        wait_until_open(run)
        while run.playing():
            run.disk.fail("sync", chance.randint(1, most), glob=glob, after=chance.randrange(3))
            time.sleep(chance.uniform(0, 0.04))
            run.disk.heal()
            time.sleep(chance.uniform(0, 0.04))

    return trouble


def full_now_and_then(run: Run) -> None:
    chance = random.Random(1)
    wait_until_open(run)
    while run.playing():
        run.disk.full = True
        time.sleep(chance.uniform(0, 0.03))
        run.disk.full = False
        time.sleep(chance.uniform(0, 0.1))


def wait_until_open(run: Run) -> None:
    while run.playing() and run.disk.position() < 150:
        time.sleep(0.002)


ALL = f"{POOL}/*"


TROUBLES = [
    ("index", failing(INDEX)),
    ("memory", failing(MEMORY)),
    ("staging", failing(STAGING)),
    ("everything", failing(ALL)),
    ("full", full_now_and_then),
]


@pytest.mark.parametrize(("kind", "trouble"), TROUBLES, ids=[kind for kind, _ in TROUBLES])
def test_cuts_of_a_disk_that_fails(
    kind: str,
    trouble: Trouble,
    tmp_path: Path,
    auditor: Auditor,
    scratch: Path,
    pick: random.Random,
) -> None:
    recording = record(tmp_path / "disk", orders(2, 2, 60, mix=ONE_BY_ONE), trouble)
    cuts = Cuts(recording, scratch)
    assert marks_of(cuts)["refused"] > 3, "there was hardly any trouble"
    cuts.check(auditor, cuts.choose(pick, 30))


def test_writes_to_the_index_that_fail(tmp_path: Path, scratch: Path) -> None:
    """LMDB may then refuse to work until the pool is opened again, but nothing is lost or half."""
    disk = mounted(tmp_path / "disk")
    promised: dict[str, int] = {}
    with contextlib.closing(disk):
        for after in range(7):
            worker = Worker(disk.path / str(after))
            with ending(worker):
                worker.ask(make_counter)
                disk.fail("write", glob=f"{after}/index/data.mdb", after=after)
                promised[str(after)] = worker.ask(count_up)
                disk.heal()
                worker.close()
        for seed in range(12):
            target = scratch / f"written-{seed}"
            disk.cut(seed, target)
            assert {name: call(counter_of, target / name) for name in promised} == promised


def make_counter(pool: everpool.Pool) -> None:
    pool.allocate("counter", 8)


def count_up(pool: everpool.Pool) -> int:
    """Add one a few times, in spite of all errors; returns how often that was acknowledged."""
    counter, done = pool.memory("counter"), 0
    unknown: list[object] = []
    for _ in range(8):
        try:
            counter.fetch_add(0, 1)
            done += 1
        except everpool.CommitUnknownError as error:
            unknown.append(error.id)
        except everpool.UnavailableError as error:
            assert "again" in str(error), "the message has no remedy"
    pool.close()
    with everpool.open(pool.path) as again:
        done += sum(again.outcome(str(id)).state == "committed" for id in unknown)
        again.memory("counter").fetch_add(0, 1)
    return done + 1


def counter_of(path: Path) -> int:
    os.environ["EVERPOOL_BOOT_ID"] = LATER
    with everpool.open(path, create=False) as pool:
        return int.from_bytes(pool.memory("counter").read(0, 8), "little")


def one_dies(glob: str) -> Trouble:
    """Flushes fail until the first process dies of it."""

    def trouble(run: Run) -> None:
        wait_until_open(run)
        while run.children[0].alive():
            run.disk.fail("sync", glob=glob)
            time.sleep(0.01)
            run.disk.heal()
        run.killed.add(0)
        for number, order in enumerate(run.orders):
            if order.late:
                run.begin(number)

    return trouble


def victim(
    accident: str,
    mutant: str = "",
    *,
    mix: Mapping[str, int] = ONE_BY_ONE,
    later_mix: Mapping[str, int] | None = None,
    seed: int = 1,
    late: bool = False,
) -> Callable[[Path], list[Order]]:
    """Two processes, of which the first one has an accident; the other may begin after that."""
    make = orders(2, 2, 60, mix=mix, seed=seed)

    def make_both(disk: Path) -> list[Order]:
        first, second = make(disk)
        second = replace(second, mutant=mutant, late=late, mix=later_mix or mix)
        return [replace(first, mutant=accident), second]

    return make_both


ACCIDENTS_AT = {
    "dies_when_the_index_is_not_flushed": INDEX,
    "dies_when_memory_is_not_flushed": MEMORY,
}


@pytest.mark.parametrize("late", [False, True], ids=["seen", "unseen"])
@pytest.mark.parametrize("accident", ACCIDENTS)
def test_cuts_after_a_process_died_of_a_failed_flush(
    accident: str, late: bool, tmp_path: Path, auditor: Auditor, scratch: Path, pick: random.Random
) -> None:
    trouble = one_dies(ACCIDENTS_AT[accident])
    cuts = Cuts(record(tmp_path / "disk", victim(accident, late=late), trouble), scratch)
    cuts.check(auditor, cuts.choose(pick, 25))


# -- and again, and again -------------------------------------------------------------------------


@pytest.mark.soak
def test_thousands_of_cuts(tmp_path: Path, auditor: Auditor, scratch: Path) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")  # what the processes do in what order is chance all the same
    pick = random.Random(seed)
    deadline = time.monotonic() + 60 * float(os.environ.get("EVERPOOL_SOAK_MINUTES", "30"))
    checked = 0
    while checked < THOUSANDS and time.monotonic() < deadline:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            trouble = pick.choice([None, None, *(trouble for _, trouble in TROUBLES)])
            recording = record(Path(folder) / "disk", some_orders(pick, trouble), trouble)
            cuts = Cuts(recording, scratch)
            cuts.check(auditor, cuts.choose(pick, 150))
            checked += cuts.checked
            for cut in unfinished(cuts, auditor, pick, 2):
                fault = pick.choice(FAULTS)
                again = Cuts(recover(Path(folder) / str(cut.seed), cuts, cut, fault), scratch)
                again.check(auditor, again.choose(pick, 40))
                checked += again.checked
    print(f"{checked} cuts")


THOUSANDS = 5000


def some_orders(pick: random.Random, trouble: Trouble | None) -> Callable[[Path], list[Order]]:
    mixes = [ONE_BY_ONE, SMALL_MIX, FLUSHING_MIX, COUNTING_MIX, LARGE_MIX]
    return orders(
        pick.randint(1, 3),
        pick.randint(1, 4),
        pick.randint(30, 120),
        mix=pick.choice(mixes if trouble else [FULL_MIX, FULL_MIX, *mixes]),
        seed=pick.getrandbits(32),
        flush_versions=pick.choice((10, 40, 200)),
        kept_versions=pick.choice((0, 5, 30, 100)),
    )


# -- what the test is worth -----------------------------------------------------------------------


class Case(NamedTuple):
    """How a mutant is to be caught: by cuts at some kinds of places of some recording.

    `role` says who is the mutant: the processes that play, the one that opens what a cut left, or
    those that recover from a cut on a disk which is then cut again.
    """

    role: str = "plays"
    make: Callable[..., Callable[[Path], list[Order]]] = partial(orders, 1, 2, 50)
    trouble: Trouble | None = None
    kinds: tuple[str, ...] = ()
    fault: Fault = no_fault

    def recordings(self, name: str, auditor: Auditor, scratch: Path) -> Iterator[Recording]:
        """Record until the mutant is caught. AssertionError when it was already while playing."""
        mutant = {"mutant": name} if self.role == "plays" else {}
        with tempfile.TemporaryDirectory(prefix="everpool-") as folder:
            for number in range(RECORDINGS):
                here = Path(folder) / str(number)
                made = record(here / "first", self.make(seed=number, **mutant), self.trouble)
                if self.role != "recovers":
                    yield made
                    continue
                cuts = Cuts(made, scratch)
                for cut in unfinished(cuts, auditor, random.Random(number), 3):
                    yield recover(here / str(cut.position), cuts, cut, self.fault, name)


ANSWERS = ("done", "refused")
FLUSHING = partial(orders, 1, 1, 80, mix=FLUSHING_MIX, kept_versions=0)
COUNTING = partial(orders, 1, 1, 80, mix=COUNTING_MIX)
LARGE = partial(orders, 1, 2, 40, mix=LARGE_MIX)
PAST = partial(orders, 1, 2, 60, kept_versions=0, past=True)
SMALL = partial(orders, 2, 2, 50, mix=SMALL_MIX)
CASES = {
    "no_fsync": Case(kinds=ANSWERS),
    "bulk_files_not_flushed": Case(kinds=ANSWERS),
    "folders_not_flushed": Case(kinds=ANSWERS),
    "staging_not_flushed": Case(kinds=ANSWERS),
    "folders_not_flushed_with_memory": Case(kinds=ANSWERS),
    "memory_files_not_flushed": Case(kinds=ANSWERS),
    "sizes_of_unwritten_memory_not_flushed": Case(kinds=ANSWERS),
    "ring_not_written": Case(kinds=ANSWERS),
    "ring_of_one_slot": Case(kinds=("sync of index", "write to index")),
    "index_not_flushed": Case(kinds=ANSWERS),
    "large_entries_not_flushed": Case(make=LARGE, kinds=ANSWERS),
    "memory_before_index": Case(make=COUNTING, kinds=("sync of index",)),
    "past_values_not_flushed": Case(make=PAST),
    "replaced_values_removed_at_once": Case(make=PAST, kinds=ANSWERS),
    "trimmed_before_flush": Case(kinds=ANSWERS),
    "trimmed_by_unflushed_mark": Case(make=FLUSHING, kinds=("flushed",)),
    "marker_before_folders": Case(make=partial(orders, 1, 1, 0), kinds=(f"sync of /{POOL}",)),
    "failed_entry_stays_in_ring": Case(make=SMALL, trouble=failing(INDEX), kinds=("refused",)),
    "meta_pages_not_written_again": Case(
        make=SMALL, trouble=failing(INDEX, most=1), kinds=("aftermath",)
    ),
    "nothing_mended": Case(make=SMALL, trouble=failing(INDEX), kinds=("refused",)),
    "ids_used_again": Case(make=SMALL, trouble=failing(INDEX)),
    "memory_not_written_again": Case(
        make=partial(orders, 2, 2, 80, mix=COUNTING_MIX),
        trouble=failing(MEMORY),
        kinds=("flushed", "done"),
    ),
    "failed_flush_kept_secret": Case(
        make=partial(victim, "dies_when_memory_is_not_flushed", mix=COUNTING_MIX, late=True),
        trouble=one_dies(MEMORY),
        kinds=("first flushed after trouble",),
    ),
    "dead_writers_index_not_mended": Case(
        make=partial(victim, "dies_when_the_index_is_not_flushed", mix=SMALL_MIX, late=True),
        trouble=one_dies(INDEX),
        kinds=("first sync of index after trouble",),
    ),
    "boot_ignored": Case("opens", kinds=ANSWERS),
    "ring_not_played": Case("opens", kinds=ANSWERS),
    "ring_adds_twice": Case("opens", COUNTING, kinds=("sync of staging",)),
    "tail_not_played": Case("opens", kinds=ANSWERS),
    "swept_too_early": Case("opens", kinds=ANSWERS),
    "nothing_swept": Case("opens"),
    "swept_files_come_back": Case(
        "opens",
        partial(
            victim,
            "dies_when_the_index_is_not_flushed",
            mix={"rebuild": 1},
            later_mix={"inline": 1},
            late=True,
        ),
        one_dies(INDEX),
        ("first done after trouble",),
    ),
    "trimmed_files_come_back": Case("opens", FLUSHING, kinds=("flushed", "done")),
    "read_only_without_ring": Case("opens", kinds=ANSWERS),
    "trusted_before_replay": Case("recovers", kinds=AFTER_OPENING, fault=second_flush),
    "failed_replay_forgotten": Case("recovers", kinds=AFTER_OPENING, fault=second_flush),
    "ring_written_while_played": Case("recovers", LARGE, kinds=("sync",)),
}
CAUGHT_SOON = {
    "past_values_not_flushed",
    "replaced_values_removed_at_once",
    "bulk_files_not_flushed",
    "staging_not_flushed",
    "folders_not_flushed_with_memory",
    "memory_files_not_flushed",
    "ring_not_written",
    "index_not_flushed",
    "trimmed_before_flush",
    "failed_entry_stays_in_ring",
    "memory_not_written_again",
    "failed_flush_kept_secret",
    "boot_ignored",
    "ring_not_played",
    "ring_adds_twice",
    "trusted_before_replay",
}
RECORDINGS, CUTS_OF_EACH = 14, 24


def test_every_mutant_has_a_case() -> None:
    assert CASES.keys() == MUTANTS.keys()
    assert ACCIDENTS_AT.keys() == ACCIDENTS.keys()


def in_turn(name: str) -> Any:
    """The mutants that a few cuts catch are for every run; how many others take depends on luck."""
    return name if name in CAUGHT_SOON else pytest.param(name, marks=pytest.mark.soak)


@pytest.mark.parametrize("name", [in_turn(name) for name in CASES])
def test_a_mutant_is_caught(
    name: str, auditor: Auditor, scratch: Path, pick: random.Random
) -> None:
    case = CASES[name]
    checked, problem = 0, ""
    with Auditor(name) if case.role == "opens" else contextlib.nullcontext(auditor) as judge:
        try:
            for recording in case.recordings(name, auditor, scratch):
                cuts = Cuts(recording, scratch)
                problem = caught(cuts, judge, cuts.choose(pick, CUTS_OF_EACH, case.kinds), pick)
                checked += cuts.checked
                if problem:
                    break
        except AssertionError as failed:
            problem = f"while it played: {failed}"
    print(f"{name}: {checked} cuts: {problem[-300:]}")
    assert problem, f"{name} was not caught by {checked} cuts"
    for broken in ("AttributeError", "TypeError", "NameError"):
        assert broken not in problem, f"the mutant itself does not work: {problem}"


def caught(cuts: Cuts, auditor: Auditor, chosen: list[Cut], pick: random.Random) -> str:
    """What is wrong with the first cut that fails, in an order of chance, more or less."""
    pick.shuffle(chosen)
    for start in range(0, len(chosen), 10):
        failed = cuts.first_failure(auditor, sorted(chosen[start : start + 10]), thorough_every=0)
        if failed is not None:
            return failed[1]
    return ""
