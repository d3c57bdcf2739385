"""Several processes on one pool: what they see of each other, and what a stopped one holds up."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everpool
from everpool import ClosedError, EverpoolError, NotFoundError, UnavailableError
from everpool.replica import index
from everpool.replica.writer import Writer
from support import scenes
from support.processes import Child, Worker, call, ending, state_of
from support.scenes import SCENES
from support.tracing import Tracee, why_not

_no_tracing = why_not()
traced = pytest.mark.skipif(bool(_no_tracing), reason=_no_tracing or "can be traced")

Pause = Callable[[], None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    call(scenes.prepare, tmp_path / "pool")
    return tmp_path / "pool"


def read(pool: Any, name: str) -> Any:
    return pool[name]


def bind(pool: Any, name: str, value: Any) -> None:
    pool[name] = value


def size(pool: Any) -> int:
    return len(pool)


# Seeing each other


def test_a_commit_is_seen_by_others_at_once(path: Path) -> None:
    one, other = Worker(path), Worker(path)
    with ending(one, other):
        for turn in range(30):
            writer, reader = (one, other) if turn % 2 else (other, one)
            writer.ask(bind, "turn", turn)
            assert reader.ask(read, "turn") == turn
            large = scenes.pattern(turn, 80_000)
            writer.ask(bind, "large", large)
            assert reader.ask(read, "large") == large
        one.close()
        other.close()


def keep_handle(pool: Any) -> None:
    """Keep a handle and a view for the next question."""
    pool.kept = pool.memory("mem")
    pool.kept_view = pool.kept.view(0, 16)


def read_handle(pool: Any) -> tuple[bytes, bytes]:
    return pool.kept.read(0, 16), bytes(pool.kept_view)


def write_memory(pool: Any, data: bytes) -> None:
    pool.memory("mem").write(0, data)


def remove(pool: Any, name: str) -> None:
    del pool[name]


def fails_with(pool: Any, function: Callable[[Any], Any]) -> str:
    try:
        function(pool)
    except EverpoolError as error:
        return error.kind
    return ""


def test_handles_and_views_of_one_process_show_what_another_writes(path: Path) -> None:
    writer, reader = Worker(path), Worker(path)
    with ending(writer, reader):
        reader.ask(keep_handle)
        for turn in range(20):
            data = scenes.pattern(turn, 16)
            writer.ask(write_memory, data)
            assert reader.ask(read_handle) == (data, data)
        writer.ask(remove, "mem")
        assert reader.ask(fails_with, read_handle) == "not_found"


def commit_numbers(pool: Any, writer: int, count: int) -> None:
    for number in range(count):
        if number % 3 == 2:
            with pool.transaction() as tx:
                tx[f"news/{writer}/{number}"] = number
                del tx[f"news/{writer}/{number - 1}"]
        else:
            pool[f"news/{writer}/{number}"] = number


def hear(link: Connection, path: Path, since: int) -> None:
    pool = everpool.open(path, create=False)
    heard: list[tuple[str, str, int]] = []
    with pool.watch("news/", since=since) as watch:
        link.send("listening")
        for change in watch:
            heard.append((change.name, change.kind, change.version))
            if change.name == "news/end":
                break
    link.send(heard)


def test_a_watcher_hears_all_changes_of_others_in_order(path: Path) -> None:
    writers = [Worker(path) for _ in range(2)]
    version = call(version_of, path)
    watchers = [Child(hear, path, version) for _ in range(2)]
    with ending(*writers, *watchers):
        for watcher in watchers:
            assert watcher.receive() == "listening"
        for number, writer in enumerate(writers):
            writer.start(commit_numbers, number, 150)
        for writer in writers:
            writer.receive()
        writers[0].ask(bind, "news/end", 0)
        heard = [watcher.receive() for watcher in watchers]
    assert heard[0] == heard[1]
    versions = [version for _, _, version in heard[0]]
    assert versions == sorted(versions)
    for writer in range(2):
        mine = [(name, kind) for name, kind, _ in heard[0] if name.startswith(f"news/{writer}/")]
        expected: list[tuple[str, str]] = []
        for number in range(150):
            expected.append((f"news/{writer}/{number}", "put"))
            if number % 3 == 2:
                expected.append((f"news/{writer}/{number - 1}", "delete"))
        assert mine == expected


def version_of(path: Path) -> int:
    with everpool.open(path, create=False) as pool:
        return pool.version


# A writer that is stopped


def stop_in_commit(pool: Any) -> None:
    """Make the next commit of this process stop with the lock in its hands."""
    whole = Writer.commit

    def stopping(self: Writer, *args: Any) -> Any:
        Writer.commit = whole
        os.kill(os.getpid(), signal.SIGSTOP)
        return whole(self, *args)

    Writer.commit = stopping


def wait_for_state(pid: int, state: str) -> None:
    deadline = time.monotonic() + 30
    while state_of(pid) != state:
        assert time.monotonic() < deadline, f"process {pid} is {state_of(pid)}, not {state}"
        time.sleep(0.002)


def stopped_writer(path: Path) -> Worker:
    worker = Worker(path)
    worker.ask(stop_in_commit)
    worker.start(bind, "slept", 1)
    wait_for_state(worker.pid, "T")
    return worker


def try_to_commit(pool: Any) -> tuple[str, str, dict[str, object], float]:
    began = time.monotonic()
    try:
        pool["other"] = 1
    except UnavailableError as error:
        return error.kind, str(error), error.facts, time.monotonic() - began
    return "committed", "", {}, time.monotonic() - began


def look_around(pool: Any) -> tuple[int, int, int]:
    return scenes.changed(pool), scenes.glanced(pool), pool.version


def open_and_look(path: Path, read_only: bool) -> tuple[int, int, int]:
    with everpool.open(path, create=False, read_only=read_only, timeout_s=0.2) as pool:
        return look_around(pool)


def test_a_stopped_writer_is_named_and_holds_up_no_reader(path: Path) -> None:
    other = Worker(path, timeout_s=0.3)
    version = other.ask(look_around)[2]
    writer = stopped_writer(path)
    with ending(other, writer):
        kind, message, facts, waited_s = other.ask(try_to_commit)
        assert kind == "unavailable", "it committed past the lock"
        assert str(writer.pid) in message and "stopped" in message and "nothing" in message
        assert facts["pid"] == writer.pid
        assert 0.25 < waited_s < 10
        assert other.ask(look_around) == (0, 0, version)
        assert call(open_and_look, path, False) == (0, 0, version)
        assert call(open_and_look, path, True) == (0, 0, version)
        writer.go_on()
        assert writer.receive() is None
        assert other.ask(read, "slept") == 1
        assert other.ask(try_to_commit)[0] == "committed"
        assert writer.ask(read, "other") == 1
        assert writer.ask(try_to_commit)[0] == "committed"


def sleep_in_commit(pool: Any) -> None:
    whole = Writer.commit

    def sleeping(self: Writer, *args: Any) -> Any:
        Writer.commit = whole
        time.sleep(1.5)
        return whole(self, *args)

    Writer.commit = sleeping


def test_a_slow_writer_is_not_called_stopped(path: Path) -> None:
    other, writer = Worker(path, timeout_s=0.2), Worker(path)
    with ending(other, writer):
        writer.ask(sleep_in_commit)
        writer.start(bind, "slow", 1)
        time.sleep(0.3)
        kind, message, facts, _ = other.ask(try_to_commit)
        assert kind == "unavailable" and facts["pid"] == writer.pid
        assert "stopped" not in message
        writer.receive()
        assert other.ask(try_to_commit)[0] == "committed"


def commit_from_everywhere(pool: Any) -> tuple[list[str], float]:
    """Commit from many threads and through the queue; returns what each ended in."""
    ends: list[str] = []
    began = time.monotonic()
    futures: list[Future[int]] = []
    for number in range(10):
        with pool.transaction(wait=False) as tx:
            tx[f"queued/{number}"] = number
        futures.append(tx.committed)

    def commit(number: int) -> None:
        try:
            pool[f"thread/{number}"] = number
        except EverpoolError as error:
            ends.append(error.kind)
        else:
            ends.append("committed")

    threads = [threading.Thread(target=commit, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for future in futures:
        error = future.exception(30)
        ends.append(getattr(error, "kind", "committed"))
    return ends, time.monotonic() - began


def test_all_threads_learn_in_time_that_the_writer_is_stopped(path: Path) -> None:
    other = Worker(path, timeout_s=0.5)
    writer = stopped_writer(path)
    with ending(other, writer):
        ends, waited_s = other.ask(commit_from_everywhere)
        assert set(ends) == {"unavailable"} and len(ends) == 18
        assert waited_s < 10, "one after the other waited"
        writer.go_on()
        writer.receive()
        ends, _ = other.ask(commit_from_everywhere)
        assert set(ends) == {"committed"}
        assert writer.ask(try_to_commit)[0] == "committed", "somebody kept the lock"


def test_a_writer_killed_while_stopped_frees_the_lock(path: Path) -> None:
    other = Worker(path, timeout_s=30)
    writer = stopped_writer(path)
    with ending(other, writer):
        other.start(try_to_commit)
        time.sleep(0.1)
        writer.kill()
        assert other.receive()[0] == "committed"
        assert other.ask(fails_with, read_slept) == "not_found"


def read_slept(pool: Any) -> Any:
    return pool["slept"]


def act_once(pause: Pause, link: Connection, path: Path, scene: str) -> None:
    pool = everpool.open(path, create=False)
    pause()
    SCENES[scene].act(pool)
    pause()


def tidy_once(pause: Pause, link: Connection, path: Path) -> None:
    scenes.short_tail()
    pool = everpool.open(path, create=False)
    pause()
    scenes.tidy(pool)
    pool["after"] = 1
    pause()


def open_once(pause: Pause, link: Connection, path: Path) -> None:
    pause()
    everpool.open(path, create=False)
    pause()


def view_number(pool: Any) -> int | None:
    """Return the number in a live view, or None when it is not to be had now."""
    try:
        return scenes.number_of(pool.memory("mem").view(700_000, 8000))
    except UnavailableError:
        return None


def look_at(pool: Any, scene: str) -> int:
    """Return the state of a scene, looked at in every way that there is."""
    state = SCENES[scene].look(pool)
    if scene == "change":
        assert scenes.glanced(pool) == state
        # Whoever wants a view finishes for the dead, if nobody else does.
        assert view_number(pool) in (None, state, SCENES[scene].look(pool))
    return SCENES[scene].look(pool)


def look_afresh(path: Path, scene: str, read_only: bool) -> int:
    with everpool.open(path, create=False, read_only=read_only, timeout_s=0.05) as pool:
        return look_at(pool, scene)


class Onlookers:
    """Processes that look at a pool while another one stands still; time only goes forwards."""

    def __init__(self, path: Path, scene: str) -> None:
        self._path = path
        self._scene = scene
        self.workers = [Worker(path, timeout_s=0.05, read_only=it) for it in (False, True)]
        self._seen = [0, 0]
        self._looks = 0

    def look(self, step: str) -> int:
        """Return the state that all see; fails when they do not agree."""
        found = [worker.ask(look_at, self._scene) for worker in self.workers]
        assert all(now >= before for now, before in zip(found, self._seen, strict=True)), step
        self._seen = list(found)
        self._looks += 1
        if self._looks % 4 == 0:
            found.append(call(look_afresh, self._path, self._scene, self._looks % 8 == 0))
        assert len(set(found)) == 1, f"after {step}: {found}"
        return found[0]


@traced
@pytest.mark.parametrize("scene", SCENES)
def test_readers_see_a_prefix_wherever_a_writer_stands_still(path: Path, scene: str) -> None:
    onlookers = Onlookers(path, scene)
    with ending(*onlookers.workers):
        for state in range(2):
            states: list[int] = []
            tracee = Tracee(act_once, path, scene, locks=True)
            with ending(tracee):
                while step := tracee.next_step():
                    states.append(onlookers.look(step))
                tracee.finish()
            assert states == sorted(states)
            assert states.count(state) > 5 and states.count(state + 1) > 5, states


@traced
def test_readers_notice_nothing_of_a_flush_that_stands_still(path: Path) -> None:
    onlookers = Onlookers(path, "change")
    with ending(*onlookers.workers):
        onlookers.workers[0].ask(scenes.change)
        tracee = Tracee(tidy_once, path, locks=True)
        steps: list[str] = []
        with ending(tracee):
            while step := tracee.next_step():
                steps.append(step)
                assert onlookers.look(step) == 1, step
            tracee.finish()
    assert "fsync memory" in steps


@traced
@pytest.mark.parametrize(
    "last", ["fdatasync data.mdb", "pwrite64 data.mdb", "rename"], ids=["early", "durable", "half"]
)
def test_readers_see_a_prefix_wherever_a_recovery_stands_still(path: Path, last: str) -> None:
    """A writer dies in the midst of it, and who comes to finish for it is stopped."""
    onlookers = Onlookers(path, "change")
    with ending(*onlookers.workers):
        assert onlookers.look("nothing") == 0
        victim = Tracee(act_once, path, "change")
        with ending(victim):
            for step in ("fdatasync data.mdb", last):
                while last != step and victim.next_step() != step:
                    pass
            while victim.next_step() != last:
                pass
        states = [onlookers.look("the death")]
        helper = Tracee(open_once, path, locks=True)
        with ending(helper):
            while step := helper.next_step():
                states.append(onlookers.look(step))
            helper.finish()
        assert states == sorted(states)
        assert states[-1] == (last != "fdatasync data.mdb")


# Readers and writers at once


def move_money(pool: Any, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    choose = np.random.default_rng(os.getpid())
    moved = 0
    while time.monotonic() < deadline:
        giver, taker = (int(n) for n in choose.choice(scenes.ACCOUNTS, 2, replace=False))

        def move(tx: Any, giver: int = giver, taker: int = taker) -> None:
            accounts = tx.array("accounts")
            accounts[giver] -= 7
            accounts[taker] += 7

        pool.run(move)
        moved += 1
    return moved


def keep_pairing(pool: Any, seconds: float) -> int:
    """Change everything that `changed` looks at, again and again."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        scenes.change(pool)
    return scenes.changed(pool)


def check_sums(pool: Any, seconds: float) -> tuple[int, int]:
    """Read all accounts in every way; the sum must be right each time."""
    deadline = time.monotonic() + seconds
    accounts, total = pool.array("accounts"), scenes.ACCOUNTS * scenes.START
    reads = conflicts = 0
    while time.monotonic() < deadline:
        assert accounts[:].sum() == total
        assert np.frombuffer(pool.memory("accounts").read(0, accounts.nbytes), "i8").sum() == total
        assert accounts[np.arange(scenes.ACCOUNTS)].sum() == total
        try:
            with pool.transaction() as tx:
                mine = tx.array("accounts")
                assert sum(int(mine[at]) for at in range(scenes.ACCOUNTS)) == total
        except everpool.ConflictError:
            conflicts += 1
        reads += 1
    return reads, conflicts


def check_pairs(pool: Any, seconds: float) -> int:
    """Look at names, values and memory that change together."""
    deadline = time.monotonic() + seconds
    last = looks = 0
    while time.monotonic() < deadline:
        try:
            now = scenes.changed(pool)
        except everpool.ConflictError:
            continue
        assert now >= last, "time went backwards"
        last = now
        looks += 1
    return looks


def test_readers_find_invariants_kept_while_others_write(path: Path) -> None:
    seconds = 3.0
    jobs: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (move_money, {}),
        (move_money, {}),
        (keep_pairing, {}),
        (check_sums, {}),
        (check_sums, {"read_only": True}),
        (check_pairs, {}),
        (check_pairs, {"read_only": True}),
    ]
    workers = [Worker(path, **options) for _, options in jobs]
    with ending(*workers):
        for worker, (job, _) in zip(workers, jobs, strict=True):
            worker.start(job, seconds)
        moved, more, changes, sums, more_sums, looks, more_looks = (
            worker.receive() for worker in workers
        )
    assert min(moved, more, changes, sums[0], more_sums[0]) > 5
    assert looks + more_looks > 5


def commit_tightly(pool: Any, name: str, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    count = 0
    while time.monotonic() < deadline:
        pool[name] = count
        count += 1
    return count


def test_processes_that_commit_in_tight_loops_take_turns(path: Path) -> None:
    workers = [Worker(path) for _ in range(3)]
    with ending(*workers):
        for number, worker in enumerate(workers):
            worker.start(commit_tightly, f"loop/{number}", 2.0)
        counts = [worker.receive() for worker in workers]
    assert min(counts) > sum(counts) / 12, counts


def create_with_others(path: Path, number: int, barrier: Any) -> str:
    barrier.wait(30)
    with everpool.open(path) as pool:
        pool[f"from/{number}"] = number
        return pool.stats()["id"]


def test_processes_that_create_one_pool_at_once_share_it(tmp_path: Path) -> None:
    for turn in range(4):
        path = tmp_path / f"deep{turn}" / "pool"
        barrier = multiprocessing.get_context("fork").Barrier(8)
        children = [Child(_creator, path, number, barrier) for number in range(8)]
        with ending(*children):
            ids = {child.receive() for child in children}
        assert len(ids) == 1
        with everpool.open(path, create=False) as pool:
            assert list(pool) == [f"from/{number}" for number in range(8)]


def _creator(link: Connection, path: Path, number: int, barrier: Any) -> None:
    link.send(create_with_others(path, number, barrier))


# Reader slots


@pytest.fixture
def crowded(path: Path) -> Path:
    """A pool that has room for a few readers only, as long as somebody keeps it open."""
    (path / "index" / "lock.mdb").unlink()
    return path


def open_with_few_slots(path: Path) -> Any:
    index._MAX_READERS = 8
    index._LOCK_FILE_BYTES = 512
    return everpool.open(path, create=False)


def die_reading(link: Connection, path: Path) -> None:
    pool = open_with_few_slots(path)
    txn = pool.engine().replica.index.read()
    link.send("reading")
    link.recv()
    txn.abort()


def keep_open(link: Connection, path: Path) -> None:
    """Keep a pool open and read from as many transactions at once as it is told."""
    pool = open_with_few_slots(path)
    link.send(len(pool))
    while wanted := link.recv():
        txns: list[Any] = []
        try:
            for _ in range(wanted):
                txns.append(pool.engine().replica.index.read())
            link.send("read")
        except EverpoolError as error:
            link.send(error.kind)
        for txn in txns:
            txn.abort()


def take_all_slots(path: Path) -> list[Child]:
    """Start readers until there is no room for one more, which must be told so."""
    readers: list[Child] = []
    for _ in range(100):
        readers.append(Child(die_reading, path))
        try:
            readers[-1].receive()
        except AssertionError as error:
            assert "UnavailableError" in str(error) and "read the pool" in str(error)
            return readers
    raise AssertionError("there was room for more than there is")


def test_slots_of_dead_readers_are_used_again(crowded: Path) -> None:
    keeper = Child(keep_open, crowded)
    readers: list[Child] = []
    with ending(keeper):
        keeper.receive()
        try:
            readers = take_all_slots(crowded)
            keeper.send(5)
            assert keeper.receive() == "unavailable"
        finally:
            for reader in readers:
                reader.kill()
        keeper.send(5)
        assert keeper.receive() == "read"


def test_a_reader_that_died_does_not_make_the_file_grow(path: Path) -> None:
    """What a dead reader pins would be kept for good."""
    writer = Worker(path)
    with ending(writer):
        victim = Child(die_reading, path)
        assert victim.receive() == "reading"
        victim.kill()
        call(version_of, path)  # whoever opens the pool clears up
        before = (path / "index" / "data.mdb").stat().st_size
        writer.ask(commit_tightly, "again", 0.5)
        writer.ask(flushed_short)
        writer.ask(commit_tightly, "again", 1.0)
        after = (path / "index" / "data.mdb").stat().st_size
    assert after < before + (4 << 20), f"{before} grew to {after}"


def flushed_short(pool: Any) -> None:
    scenes.short_tail()
    scenes.tidy(pool)


def test_a_closed_pool_refuses_in_every_process(path: Path) -> None:
    with everpool.open(path) as pool:
        memory = pool.memory("mem")
    for use in (lambda: pool["number"], lambda: memory.read(0, 8), lambda: pool.version):
        with pytest.raises(ClosedError):
            use()
    with everpool.open(path) as pool, pytest.raises(NotFoundError):
        pool["missing"]
