"""Collectors that die, wait, or are several; and agents with a rule of collection switched off.

Each test is a scenario with real agents over a folder as the bucket.
"""

import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everpool
from everpool.errors import CorruptionError, EverpoolError, UnavailableError
from support.agents import end_agents
from support.pictures import PLACES, picture
from test_bucket_attacks import World, checkpoint_in_time, same

POINTS = ["planned", "listed", "decided", "deleted"]
NOTHING = datetime.timedelta(0)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(tmp_path, monkeypatch)
    world.timeout_s = 12.0  # a mutant may well be stuck
    yield world
    end_agents(tmp_path)


def prepare(pool: everpool.Pool) -> None:
    pool.retain(age=NOTHING, versions=0)
    pool.allocate("memory", 1 << 30)
    for number in range(1, 5):
        change(pool, number)
        checkpoint_in_time(pool)
    pool.snapshot("old")
    for number in range(5, 8):
        change(pool, number)
        checkpoint_in_time(pool)


def change(pool: everpool.Pool, number: int) -> None:
    """Replace everything that is large."""
    pool["large"] = np.full(20_000, number)
    pool[f"large/{number % 3}"] = np.full(20_000, number)
    pool.memory("memory").write(PLACES[number % 4], bytes([number]) * 60)
    pool["entry"] = b"x" * 50_000 + bytes([number])


def collect_in_time(pool: everpool.Pool) -> Any:
    """Collect; others may be at it."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return pool.collect()
        except UnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def catch_up(pool: everpool.Pool) -> None:
    """Sync; a replica that lags behind what is kept is begun anew, which one is told."""
    with contextlib.suppress(UnavailableError):
        pool.sync()
    pool.sync()


def check_everywhere(world: World, old: Any) -> None:
    """What is kept is there on every host, and the rest goes in the end."""
    with world.open("one") as one, world.open("two") as two, world.open("late") as late:
        for pool in (one, two, late):
            catch_up(pool)
        for pool in (one, two, late):
            assert picture(pool) == picture(one) and pool.verify().ok
            with pool.at("old") as past:
                assert picture(past) == old and past.verify().ok
        same(one, two, late)
        two.forget_snapshot("old")
        change(two, 9)
        collect_in_time(two)
        collect_in_time(two)
        values = list((world.folder / "bucket" / "values").iterdir())
        assert len(values) == 4
        assert len(list((world.folder / "bucket" / "checkpoints").iterdir())) <= 3
        for pool in (one, late):
            catch_up(pool)
            assert picture(pool) == picture(two) and pool.verify().ok


@pytest.mark.parametrize("action", ["die", "wait"])
@pytest.mark.parametrize("point", POINTS)
def test_a_collector_that_sleeps_or_dies(point: str, action: str, world: World) -> None:
    with world.open("one") as one, world.open("two") as two:
        prepare(one)
        with one.at("old") as past:
            old = picture(past)
        trap = world.trap("one", point, action)

        def collecting() -> None:
            for _ in range(2):  # the first one finds what is dead, the second deletes
                with contextlib.suppress(EverpoolError):
                    one.collect()

        thread = threading.Thread(target=collecting)
        thread.start()
        trap.await_reached()
        two.sync()
        change(two, 8)
        collect_in_time(two)
        two.restore("old")
        assert picture(two) == old
        collect_in_time(two)
        checkpoint_in_time(two)
        collect_in_time(two)
        trap.let_go()
        thread.join(60)
        assert not thread.is_alive()
        two.sync()
        assert picture(two) == old and two.verify().ok
    check_everywhere(world, old)


def upload_that_slept(world: World) -> None:
    """A value is uploaded, a collection voids it, and only then is it named."""
    with world.open("one") as one, world.open("two") as two:
        prepare(one)
        engine = two.engine()
        staged = engine.stage(everpool.values.encode(np.full(20_000, 77)))
        for number in range(3):
            change(one, number)
            checkpoint_in_time(one)
        collect_in_time(one)
        collect_in_time(one)
        record = everpool.records.Record(
            two.version, [], [], [], [everpool.records.Put("late", staged.reference)]
        )
        with contextlib.suppress(everpool.ConflictError):
            engine.write(record, [staged]).version()
        two.sync()
        picture(two)
        assert two.verify().ok


def steward_that_slept(world: World) -> None:
    """A checkpoint builds on one that others have replaced and let go of meanwhile."""
    with world.open("one") as one, world.open("two") as two:
        prepare(one)
        trap = world.trap("one", "uploaded", "wait")
        change(one, 8)

        def checkpointing() -> None:
            with contextlib.suppress(EverpoolError):
                one.checkpoint()

        thread = threading.Thread(target=checkpointing)
        thread.start()
        trap.await_reached()
        two.sync()
        for number in range(9, 12):
            change(two, number)
            collect_in_time(two)
        expected = picture(two)
        trap.let_go()
        thread.join(60)
        with world.open("late") as late:
            assert picture(late) == expected and late.verify().ok


def restore_between_look_and_decision(world: World) -> None:
    """What nothing named is named again just before it is called dead."""
    with world.open("one") as one, world.open("two") as two:
        prepare(one)
        with one.at("old") as past:
            old = picture(past)
        trap = world.trap("one", "listed", "wait")

        def collecting() -> None:
            with contextlib.suppress(EverpoolError):
                one.collect()

        thread = threading.Thread(target=collecting)
        thread.start()
        trap.await_reached()
        two.sync()
        two.restore("old")
        trap.let_go()
        thread.join(60)
        two.forget_snapshot("old")
        for _ in range(3):
            checkpoint_in_time(two)
            collect_in_time(two)
        with world.open("late") as late:
            assert picture(late) == old and late.verify().ok


def snapshot_between_look_and_decision(world: World) -> None:
    """A snapshot is taken of a version that is just being let go of."""
    with world.open("one") as one, world.open("two") as two:
        prepare(one)
        change(one, 8)
        then, version = picture(one), one.version
        change(one, 9)
        checkpoint_in_time(one)
        change(one, 10)
        trap = world.trap("one", "planned", "wait")

        told: list[object] = []

        def collecting() -> None:
            try:
                told.append(one.collect())
            except EverpoolError as error:
                told.append(error)

        thread = threading.Thread(target=collecting)
        thread.start()
        trap.await_reached()
        two.sync()
        two.snapshot("new", version)
        trap.let_go()
        thread.join(60)
        assert "there is a snapshot" in str(told[0])
        for _ in range(2):
            collect_in_time(two)
        with two.at("new") as past:
            assert picture(past) == then and past.verify().ok


# That a checkpoint builds on the newest one is shown by the simulation: with as few names as here,
# each checkpoint has all of them.
SCENARIOS: list[Callable[[World], None]] = [
    upload_that_slept,
    steward_that_slept,
    restore_between_look_and_decision,
    snapshot_between_look_and_decision,
]
MUTANTS: dict[str, Callable[[World], None]] = {
    "late_uploads_count": upload_that_slept,
    "restored_is_dead": restore_between_look_and_decision,
    "snapshots_are_overlooked": snapshot_between_look_and_decision,
}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.__name__)
def test_what_happens_when(scenario: Callable[[World], None], world: World) -> None:
    scenario(world)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_it_is_noticed_when_an_agent_has(mutant: str, world: World) -> None:
    world.break_rule(mutant)
    with pytest.raises((AssertionError, CorruptionError)):
        MUTANTS[mutant](world)
