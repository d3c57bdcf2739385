"""Processes that die by SIGKILL: at every step of all that changes a pool, and in storms."""

import os
import random
import shutil
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import everpool
from support import scenes, storm
from support.processes import Child, Failure, Worker, call, ending
from support.scenes import SCENES
from support.tracing import Tracee, why_not

# More than any of these operations has, so that a loop that never ends fails.
_MOST_STEPS = 300
_SLOW_OPENING_S = 5.0
_no_tracing = why_not()
traced = pytest.mark.skipif(bool(_no_tracing), reason=_no_tracing or "can be traced")

Pause = Callable[[], None]


class Death(NamedTuple):
    """A process that was killed after the `count`-th time it made a step, done or not."""

    step: str
    count: int
    done: bool


def killed_everywhere(function: Callable[..., None], *args: Any) -> Iterator[Death]:
    """Run `function(pause, link, *args)` again and again, each time killed after another step.

    Ends after a run in which every step was one that was killed before.
    """
    tried: set[tuple[str, int]] = set()
    for _ in range(_MOST_STEPS):
        death = killed_somewhere_new(tried, function, *args)
        if death is None:
            return
        yield death
    raise AssertionError("it never ends")


def killed_somewhere_new(
    tried: set[tuple[str, int]], function: Callable[..., None], *args: Any
) -> Death | None:
    """Kill one run after the first step that is not among those tried; None when there is none."""
    seen: Counter[str] = Counter()
    tracee = Tracee(function, *args)
    with ending(tracee):
        while step := tracee.next_step():
            seen[step] += 1
            if (step, seen[step]) not in tried:
                break
        else:
            tracee.finish()
            assert tracee.said == ["done"]
            return None
    tried.add((step, seen[step]))
    return Death(step, seen[step], tracee.said == ["done"])


class Found(NamedTuple):
    """What a new process found in the pool."""

    opened_s: float
    state: int
    leftovers: list[str]


def inspect(path: Path, scene: str, thorough: bool, boot: str | None = None) -> Found:
    """Open the pool and look around."""
    reboot(boot)
    began = time.monotonic()
    with everpool.open(path, create=False) as pool:
        opened_s = time.monotonic() - began
        state = SCENES[scene].look(pool)
        found = Found(opened_s, state, scenes.leftovers(pool))
    if thorough:
        scenes.check_sound(path)
    return found


def reboot(boot: str | None) -> None:
    """Make this process believe that the machine has booted, when there is a boot to tell from."""
    if boot is not None:
        os.environ["EVERPOOL_BOOT_ID"] = boot


def make_pool(folder: Path) -> Path:
    call(scenes.prepare, folder / "pool")
    return folder / "pool"


def touch(pool: Any) -> None:
    pool["touched"] = time.time_ns()


def look(pool: Any, scene: str) -> int:
    return SCENES[scene].look(pool)


# Commits


def commit_once(pause: Pause, link: Connection, path: Path, scene: str) -> None:
    pool = everpool.open(path, create=False)
    pause()
    SCENES[scene].act(pool)
    link.send("done")
    pause()


@traced
@pytest.mark.parametrize(
    ("scene", "others"),
    [("change", 0), ("change", 1), ("put", 1), ("store", 1), ("row", 1), ("add", 1)],
)
def test_killed_at_every_step_of_a_commit(tmp_path: Path, scene: str, others: int) -> None:
    path = make_pool(tmp_path)
    steps: list[str] = []
    state = 0
    workers = [Worker(path) for _ in range(others)]
    with ending(*workers):
        for number, death in enumerate(killed_everywhere(commit_once, path, scene)):
            steps.append(death.step)
            least = state + death.done
            for worker in workers:
                least = max(least, worker.ask(look, scene))
                if number % 2:
                    worker.ask(touch)  # who finds the lock free finishes for the dead
                    least = max(least, worker.ask(look, scene))
            found = call(inspect, path, scene, number % 8 == 0)
            assert least <= found.state <= state + 1, death
            assert not found.leftovers, death
            assert found.opened_s < _SLOW_OPENING_S, death
            state = found.state
        assert call(inspect, path, scene, True).state == state + 1
    assert steps.count("store") >= 6
    assert {"pwrite64 data.mdb", "fdatasync data.mdb"} <= set(steps)
    if scene in ("change", "put", "store"):
        assert {"openat", "fsync staging", "rename"} <= set(steps)


def flush_once(pause: Pause, link: Connection, path: Path) -> None:
    scenes.short_tail()
    pool = everpool.open(path, create=False)
    scenes.change(pool)
    scenes.store_large(pool)
    pause()
    scenes.tidy(pool)
    pool["after"] = 1  # every commit trims, too
    pool["after"] = 2
    link.send("done")
    pause()


def flush_and_inspect(path: Path) -> Found:
    with everpool.open(path, create=False) as pool:
        scenes.tidy(pool)
        assert not scenes.leftovers(pool)
    return inspect(path, "change", False)


@traced
def test_killed_at_every_step_of_a_flush(tmp_path: Path) -> None:
    path = make_pool(tmp_path)
    steps: list[str] = []
    for number, death in enumerate(killed_everywhere(flush_once, path)):
        steps.append(death.step)
        state = number + 1
        assert call(inspect, path, "store", number % 4 == 0).state == state, death
        assert call(flush_and_inspect, path).state == state, death
    assert {"fsync memory", "fdatasync data.mdb", "unlink"} <= set(steps)


# Making a pool


def create_once(pause: Pause, link: Connection, path: Path) -> None:
    pause()
    everpool.open(path)
    link.send("done")
    pause()


def finish_creation(path: Path) -> list[str]:
    """Open a pool whose creation was cut off, use it, and return what lies in its folder."""
    with everpool.open(path) as pool:
        assert pool.version == 0 and list(pool) == []
        pool["a"] = 1
        pool.allocate("m", 8)[:] = b"12345678"
    with everpool.open(path, create=False) as pool:
        assert pool["a"] == 1 and pool.memory("m").read(0, 8) == b"12345678"
        assert not scenes.leftovers(pool)
    scenes.check_sound(path)
    return sorted(os.listdir(path))


def try_without_creating(path: Path) -> str:
    try:
        everpool.open(path, create=False).close()
    except everpool.EverpoolError as error:
        return error.kind
    return "open"


@traced
def test_killed_at_every_step_of_making_a_pool(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "pool"
    kinds: list[str] = []
    for death in killed_everywhere(create_once, path):
        kinds.append(call(try_without_creating, path))
        assert kinds[-1] == "open" or not death.done, death
        files = call(finish_creation, path)
        assert files == ["everpool.json", "index", "lock", "memory", "shared", "staging", "values"]
        shutil.rmtree(path.parent)
    order = {"not_found": 0, "invalid": 1, "open": 2}
    assert [order[kind] for kind in kinds] == sorted(order[kind] for kind in kinds)
    assert set(kinds) == set(order), "it was killed before, between and after"


# Recovery


def commit_after_boot(
    pause: Pause, link: Connection, path: Path, scene: str, boot: str | None
) -> None:
    reboot(boot)
    if boot is not None:
        with everpool.open(path, create=False) as pool:
            scenes.tidy(pool)  # so that the next boot has not ever more to do
    commit_once(pause, link, path, scene)


def open_after_boot(pause: Pause, link: Connection, path: Path, boot: str | None) -> None:
    reboot(boot)
    pause()
    everpool.open(path, create=False)
    link.send("done")
    pause()


def killed_after(steps: tuple[str, ...], path: Path, boot: str | None) -> None:
    """Leave a pool whose writer died when it had made these steps, among others, in this order."""
    tracee = Tracee(commit_after_boot, path, "change", boot)
    with ending(tracee):
        for step in steps:
            while (found := tracee.next_step()) != step:
                assert found is not None, f"no {step!r} is left to die at"


_FLUSHED = "fdatasync data.mdb"


@traced
@pytest.mark.parametrize(
    ("steps", "reboots", "counts"),
    [
        ((_FLUSHED,), False, False),
        ((_FLUSHED,), True, True),
        ((_FLUSHED, "pwrite64 data.mdb"), False, True),
        ((_FLUSHED, "pwrite64 data.mdb", "rename"), False, True),
        ((_FLUSHED, "pwrite64 data.mdb", "rename"), True, True),
    ],
    ids=["in-ring", "in-ring-boot", "committed", "half-applied", "half-applied-boot"],
)
def test_recovery_killed_at_every_step(
    tmp_path: Path, steps: tuple[str, ...], reboots: bool, counts: bool
) -> None:
    path = make_pool(tmp_path)
    choose = random.Random(1)
    boot = uuid.uuid4().hex if reboots else None
    state = 0
    deaths = 0
    tried: set[tuple[str, int]] = set()
    while True:
        killed_after(steps, path, boot)
        if reboots:
            boot = uuid.uuid4().hex
        state += counts
        death = killed_somewhere_new(tried, open_after_boot, path, boot)
        if death is None:
            break
        deaths += 1
        if deaths % 3 == 0:  # and the one that comes to help
            some = set(choose.sample(sorted(tried), len(tried) // 2))
            killed_somewhere_new(some, open_after_boot, path, boot)
        found = call(inspect, path, "change", deaths % 8 == 0, boot)
        assert found.state == state, death
        assert not found.leftovers, death
    assert deaths > 10


# Storms


class Weather(NamedTuple):
    """What a storm did."""

    kills: int
    blackouts: int
    acknowledged: int


def run_storm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, seed: int
) -> Weather:
    """Kill writers at random and replace them, and audit the pool after each blackout.

    After some blackouts the machine seems to have booted, so that all marks count for nothing.
    """
    path, folder = tmp_path / "pool", tmp_path / "notes"
    folder.mkdir()
    call(storm.prepare, path)
    choose = random.Random(seed)
    deadline = time.monotonic() + seconds
    base, done = storm.FIRST, Weather(0, 0, 0)
    while time.monotonic() < deadline:
        kills = blow(path, folder, choose)
        if choose.random() < 0.4:
            monkeypatch.setenv("EVERPOOL_BOOT_ID", uuid.uuid4().hex)
        thorough = done.blackouts % 4 == 0
        found = call(storm.audit, path, folder, base, thorough)
        assert found.opened_s < _SLOW_OPENING_S
        base = found.base
        done = Weather(
            done.kills + kills, done.blackouts + 1, done.acknowledged + found.acknowledged
        )
    with everpool.open(path, create=False) as pool:
        report = pool.verify()
        assert report.ok, report
    return done


def blow(path: Path, folder: Path, choose: random.Random) -> int:
    """Let writers live and die until all die at once; returns how many died."""
    writers = {number: Child(storm.live, path, folder, number) for number in range(storm.WRITERS)}
    kills = 0
    try:
        for turn in range(choose.randint(5, 60)):
            time.sleep(choose.uniform(0, 0.1))
            number = choose.choice(list(writers))
            victim = writers[number]
            if choose.random() < 0.1:
                victim.stop()
                time.sleep(choose.uniform(0, 0.05))
                if choose.random() < 0.5:
                    victim.go_on()
            victim.kill()
            check_last_words(victim)
            kills += 1
            writers[number] = Child(storm.live, path, folder, number)
            if turn % 20 == 19:
                call(storm.glance, path)
        time.sleep(choose.uniform(0, 0.3))
    finally:
        for writer in writers.values():
            os.kill(writer.pid, signal.SIGKILL)
        for writer in writers.values():
            writer.kill()
    for writer in writers.values():
        check_last_words(writer)
    return kills + len(writers)


def check_last_words(writer: Child) -> None:
    for said in writer.said:
        assert not isinstance(said, Failure), said.text
        assert said < _SLOW_OPENING_S, "opening takes long"


def test_nothing_acknowledged_is_lost_in_a_storm_of_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_storm(tmp_path, monkeypatch, seconds=22, seed=random.randrange(1 << 30))
    print(done)
    assert done.kills > 50 and done.blackouts > 0 and done.acknowledged > 1000, done


@pytest.mark.soak
def test_nothing_acknowledged_is_lost_in_a_long_storm_of_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes = float(os.environ.get("EVERPOOL_SOAK_MINUTES", "30"))
    done = run_storm(tmp_path, monkeypatch, seconds=60 * minutes, seed=random.randrange(1 << 30))
    print(done)
    assert done.kills > 100 * minutes, done
