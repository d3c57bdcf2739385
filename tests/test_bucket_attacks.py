"""Agents that die, wait or are stopped at the worst moment; and that the tests would notice.

Each test here is a scenario with real agents over a folder as the bucket. `MUTANTS` are agents
that break one rule: the scenario named beside each must fail with it.
"""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import everpool
from everpool.agent.host import LOG
from everpool.errors import CommitUnknownError, EverpoolError, UnavailableError
from everpool.log.bucket import BucketLog
from everpool.paging.regions import BLOCK_BYTES
from everpool.store import open_store
from support import agent_mutants
from support.agents import agents_under, end_agents, wait_until
from support.chaos import check_verdicts
from support.patched_agent import Traps
from support.processes import stop

POINTS = ["uploaded", "gathered", "runs", "manifest", "committed", "adopted", "trimmed"]
BLOCKS = 12


class World:
    """Hosts with one pool."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.url = f"file://{folder}/bucket"
        self._monkeypatch = monkeypatch
        self.traps = Traps(monkeypatch)
        self.timeout_s = 30.0

    def break_rule(self, mutant: str) -> None:
        """Have every agent break a rule, or have bad luck, from now on."""
        assert mutant in agent_mutants.MUTANTS
        hosts = ("one", "two", "late")
        known = self.traps.mutants
        self.traps.mutants = {host: [*known.get(host, []), mutant] for host in hosts}

    def open(self, host: str, **options: Any) -> everpool.Pool:
        options.setdefault("timeout_s", self.timeout_s)
        return everpool.open(self.url, cache_dir=self.folder / host, **options)

    def trap(self, host: str, point: str, action: str) -> Any:
        return self.traps.set(self.folder / host, point, action)

    def trimmed(self) -> int:
        """Return up to where the log is trimmed."""
        store = open_store(self.url)
        log = BucketLog(store, LOG)
        try:
            return log.end().trimmed
        finally:
            log.close()
            store.close()

    def agent(self, host: str) -> int:
        """Return the pid of a host's agent."""
        found: list[int] = []

        def look() -> bool:
            found[:] = agents_under(self.folder / host)
            return len(found) == 1

        wait_until(look)
        return found[0]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    yield World(tmp_path, monkeypatch)
    end_agents(tmp_path)


def prepare(pool: everpool.Pool) -> None:
    pool.allocate("memory", BLOCKS * BLOCK_BYTES)
    pool.allocate_array("sums", 4, "i8")
    pool["gone"] = 0


def change(pool: everpool.Pool, number: int) -> None:
    """Leave the number everywhere."""
    memory = pool.memory("memory")
    for block in range(BLOCKS):
        memory.write(block * BLOCK_BYTES + 8 * (number % 5), number.to_bytes(8, "little"))
    pool[f"name/{number}"] = number
    pool.memory("sums").fetch_add(0, number)
    pool.pop("gone", None)


def check(pool: everpool.Pool, last: int) -> None:
    """All that numbers up to the last one left must be there, and nothing else."""
    pool.sync()
    memory = pool.memory("memory")
    for block in range(BLOCKS):
        found = memory.read(block * BLOCK_BYTES, 40)
        for place in range(5):
            number = max((n for n in range(1, last + 1) if n % 5 == place), default=0)
            assert int.from_bytes(found[8 * place : 8 * place + 8], "little") == number, block
        assert memory.read(block * BLOCK_BYTES + 40, 8) == bytes(8)
    assert list(pool.names("name/")) == sorted(f"name/{n}" for n in range(1, last + 1))
    assert pool.array("sums")[0] == sum(range(last + 1))
    assert "gone" not in pool


def same(*pools: everpool.Pool) -> None:
    """All replicas have played the same log."""
    deadline = time.monotonic() + 10
    while True:
        for pool in pools:
            pool.sync()
        states = {
            (s.position, s.version, s.hash, s.names, s.next_id, s.floor, s.checkpoint, s.manifest)
            for s in (pool.engine().replica.state() for pool in pools)
        }
        if len({position for position, *_ in states}) == 1:
            break
        assert time.monotonic() < deadline
    assert len(states) == 1, states
    check_verdicts(list(pools))


def check_everywhere(world: World, last: int) -> None:
    """Those that were there all the time, and one that begins now, have the same."""
    with world.open("one") as one, world.open("two") as two, world.open("late") as late:
        for pool in (one, two, late):
            check(pool, last)
            assert pool.verify().ok
        same(one, two, late)


def checkpoint_in_time(pool: everpool.Pool) -> int:
    """Make a checkpoint; others may be at it."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return pool.checkpoint()
        except UnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_new_host_judges_the_record_of_its_checkpoint_as_others_do(world: World) -> None:
    with world.open("one") as one:
        prepare(one)
        for number in range(1, 5):
            change(one, number)
        checkpoint_in_time(one)
        assert one.stats()["floor"] > 0
        with world.open("late") as late:
            same(one, late)
            change(late, 5)
            checkpoint_in_time(late)
            same(one, late)


def test_memory_that_one_entry_writes_and_deletes_is_no_hindrance(world: World) -> None:
    with world.open("one") as one, world.open("two") as two:
        prepare(one)
        with one.transaction() as tx:
            tx.allocate("brief", BLOCK_BYTES).write(0, b"data")
            del tx["brief"]
        one.allocate("brief", BLOCK_BYTES)
        with one.transaction() as tx:
            tx.memory("brief").write(0, b"data")
            del tx["brief"]
        change(one, 1)
        checkpoint_in_time(one)
        two.sync()
        change(two, 2)
        dead = world.agent("two")
        os.kill(dead, signal.SIGKILL)  # the next one learns from the tail what was written
        check(two, 2)
        checkpoint_in_time(two)
        check(one, 2)


# A checkpoint whose steward dies


@pytest.mark.parametrize("point", POINTS)
def test_a_steward_dies_after(point: str, world: World) -> None:
    with world.open("one") as one, world.open("two") as two:
        prepare(one)
        change(one, 1)
        checkpoint_in_time(one)
        change(one, 2)
        trap = world.trap("one", point, "die")
        dead = world.agent("one")
        with contextlib.suppress(UnavailableError):
            one.checkpoint()  # asked again of the next agent
        assert trap.reached and world.agent("one") != dead
        two.sync()
        change(two, 3)
        check(one, 3)
        assert checkpoint_in_time(two) > 3
        change(one, 4)
        check(two, 4)
        checkpoint_in_time(one)
        change(two, 5)
    check_everywhere(world, 5)


# Two at once


@pytest.mark.parametrize("point", POINTS)
def test_two_stewards_one_of_which_waits_after(point: str, world: World) -> None:
    with world.open("one") as one, world.open("two") as two:
        prepare(one)
        change(one, 1)
        checkpoint_in_time(one)
        change(one, 2)
        two.sync()
        trap = world.trap("one", point, "wait")
        failures: list[BaseException] = []

        def make() -> None:
            try:
                one.checkpoint()
            except EverpoolError as error:
                if not isinstance(error, UnavailableError):
                    failures.append(error)

        thread = threading.Thread(target=make)
        thread.start()
        try:
            trap.await_reached()
            change(two, 3)
            checkpoint_in_time(two)
            change(two, 4)
            checkpoint_in_time(two)
            change(two, 5)
        finally:
            trap.let_go()
            thread.join()
        assert not failures, failures
        check(one, 5)
        change(one, 6)
        checkpoint_in_time(one)
        change(two, 7)
        checkpoint_in_time(two)
    check_everywhere(world, 7)


# Scenarios that catch mutants


def written_while_it_is_uploaded(world: World) -> None:
    """A block is written after it was uploaded, and before the checkpoint's version is known."""
    with world.open("one") as one:
        prepare(one)
        change(one, 1)
        trap = world.trap("one", "uploaded", "wait")
        thread = threading.Thread(target=one.checkpoint)
        thread.start()
        try:
            trap.await_reached()
            change(one, 2)
        finally:
            trap.let_go()
            thread.join()
        change(one, 3)
    with world.open("late") as late:
        check(late, 3)


def died_before_it_was_marked(world: World) -> None:
    """An addition is in memory, its agent dies, and the next one plays the tail again."""
    with world.open("one") as one:
        prepare(one)
        with one.memory("sums").view() as view:  # so that the memory lives on
            for number in range(1, 4):
                change(one, number)
                trap = world.trap("one", "added", "die")
                assert one.memory("sums").fetch_add(8, 1) == number - 1
                assert trap.reached
            check(one, 3)
            assert int.from_bytes(bytes(view[8:16]), "little") == 3
    with world.open("late") as late:
        check(late, 3)
        assert late.array("sums")[1] == 3


def written_behind_the_checkpoint(world: World) -> None:
    """A new host has pages that are older than what it must show, before and after it adopts."""
    with world.open("one") as one:
        prepare(one)
        change(one, 1)
        checkpoint_in_time(one)
        change(one, 2)
        with world.open("late") as late:
            check(late, 2)
        check(one, 2)


def adopted_late(world: World) -> None:
    """A checkpoint is taken over by who has played more than that; then pages are fetched."""
    with world.open("one") as one, world.open("two") as two:
        prepare(one)
        change(one, 1)
        two.sync()
        trap = world.trap("one", "manifest", "wait")
        thread = threading.Thread(target=one.checkpoint)
        thread.start()
        try:
            trap.await_reached()
            change(one, 2)  # behind the checkpoint's version, before its record
            two.sync()
        finally:
            trap.let_go()
            thread.join()
        two.sync()
        wait_until(lambda: two.stats()["checkpoint"] == one.stats()["checkpoint"] > 0)
        check(two, 2)
        change(one, 3)
        checkpoint_in_time(two)
        check(one, 3)
    with world.open("late") as late:
        check(late, 3)


def answer_lost(world: World) -> None:
    """The bucket takes an entry, and is away before anybody hears of it."""
    world.break_rule("blackout")
    dark = world.folder / "one" / "blackout"
    with world.open("one", timeout_s=20) as one:
        prepare(one)
        dark.touch()
        answered: list[Any] = []

        def add() -> None:
            try:
                answered.append(one.memory("sums").fetch_add(0, 1))
            except CommitUnknownError as error:
                answered.append(error)

        thread = threading.Thread(target=add)
        thread.start()
        wait_until(lambda: (dark.parent / "swapped").exists())
        thread.join(3)  # several times as long as an append may take
        dark.unlink()
        thread.join()
        (answer,) = answered
        if isinstance(answer, CommitUnknownError):
            outcome = one.outcome(answer.id)
            assert outcome.state == "committed" and outcome.results == [bytes(8)]
        else:
            assert answer == 0
        assert one.memory("sums").fetch_add(0, 1) == 1
    with world.open("late") as late:
        late.sync()
        assert late.array("sums")[0] == 2


def too_late(world: World) -> None:
    """A commit's time is over while its agent is stopped; then that goes on."""
    with world.open("one", timeout_s=1) as one, world.open("two") as two:
        prepare(one)
        agent = world.agent("one")
        stop(agent)
        try:
            with pytest.raises(UnavailableError):
                one["late"] = 1
        finally:
            os.kill(agent, signal.SIGCONT)
        one["next"] = 1
        two.sync()
        assert "late" not in one and "late" not in two


SCENARIOS: list[Callable[[World], None]] = [
    written_while_it_is_uploaded,
    died_before_it_was_marked,
    written_behind_the_checkpoint,
    adopted_late,
    answer_lost,
    too_late,
]
MUTANTS: dict[str, Callable[[World], None]] = {
    "mixed_checkpoint": written_while_it_is_uploaded,
    "redo_adds": died_before_it_was_marked,
    "fill_without_tail": written_behind_the_checkpoint,
    "adoption_forgets_all": adopted_late,
    "lost_answer_sent_again": answer_lost,
    "deadline_ignored": too_late,
}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_what_happens_when(scenario: Callable[[World], None], world: World) -> None:
    scenario(world)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_it_is_noticed_when_an_agent_has(mutant: str, world: World) -> None:
    world.break_rule(mutant)
    with pytest.raises(AssertionError):
        MUTANTS[mutant](world)


# A host that was away


@pytest.mark.parametrize("seed", range(2))
def test_a_host_is_stopped_over_checkpoints_and_trims_of_another(seed: int, world: World) -> None:
    choose = random.Random(seed)
    with world.open("one") as one, world.open("two") as two:
        prepare(one)
        change(one, 1)
        if choose.random() < 0.5:
            checkpoint_in_time(one)
        two.sync()
        if choose.random() < 0.5:
            check(two, 1)  # so that its blocks are filled
        agent = world.agent("two")
        played = two.stats()["position"]
        stop(agent)
        try:
            number = 1
            for _ in range(3):
                for _ in range(choose.randint(1, 3)):
                    number += 1
                    change(one, number)
                checkpoint_in_time(one)
            number += 1
            change(one, number)
            assert world.trimmed() > played
        finally:
            os.kill(agent, signal.SIGCONT)
        check(two, number)
        number += 1
        change(two, number)
        checkpoint_in_time(two)
        check(one, number)
    check_everywhere(world, number)
