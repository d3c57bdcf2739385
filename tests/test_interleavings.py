"""Moments in which something else happens: each test makes one of them happen on purpose.

Another thread, another process, a fork, a failing disk or a power cut comes at the one place where
it could do harm. Every test runs in a process of its own, which it may change as it likes.
"""

import contextlib
import errno
import fcntl
import io
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import lmdb
import numpy as np
import pytest

import everpool
from everpool import (
    ClosedError,
    CommitUnknownError,
    ConflictError,
    InvalidError,
    UnavailableError,
    commit,
)
from everpool.commit import Committer, Submission
from everpool.embedded import Engine
from everpool.records import Put, Record, RecordId, Write
from everpool.replica import applier, flush, ring, verify
from everpool.replica.bulk import BulkFiles
from everpool.replica.flush import Flusher
from everpool.replica.lock import WriterLock
from everpool.replica.memories import MemoryFiles
from everpool.replica.replica import Replica
from everpool.replica.ring import Ring
from everpool.replica.writer import Writer
from support import scenes
from support.isolation import (
    cut_power,
    elsewhere,
    held_back,
    in_one_batch,
    meta_pages,
    new_boot,
    own_process,
    pipelined,
    rebooted,
)
from support.processes import Child, call, ending


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pool"


def bind(name: str, value: Any) -> Callable[[Any], None]:
    """Return a change: `name` is bound to `value`."""
    return lambda names: names.__setitem__(name, value)


def fail(*_: object) -> NoReturn:
    raise OSError(errno.EIO, "I/O error")


def nothing(*_: object) -> None:
    pass


class FailingTransaction:
    """An LMDB transaction whose flush fails."""

    def __init__(self, txn: lmdb.Transaction) -> None:
        self._txn = txn

    def commit(self) -> NoReturn:
        self._txn.abort()
        raise lmdb.DiskError("I/O error")


@contextlib.contextmanager
def failing_disk() -> Any:
    """Let commits fail, and the mending of the index, too."""
    whole, mend = Writer._commit, Ring.mend

    def commit(self: Writer, txn: Any, *rest: Any) -> None:
        whole(self, FailingTransaction(txn), *rest)

    Writer._commit, Ring.mend = commit, fail
    try:
        yield
    finally:
        Writer._commit, Ring.mend = whole, mend


def start(function: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def join(thread: threading.Thread) -> None:
    thread.join(10)
    assert not thread.is_alive(), "the thread hangs"


# What is written to the log can be read again


@own_process
def test_a_bool_offset_is_stored_as_a_number(path: Path) -> None:
    with everpool.open(path) as pool:
        memory = pool.allocate("m", 4096)
        memory.write(True, b"x")
        memory[True] = 120
        memory.fetch_add(False, 1, "<i4")
        pool.allocate("one byte", True)
        pool.allocate_array("row", (True, 3))
        with pool.transaction() as tx:
            tx.memory("m").read(False, 8)
            tx.memory("m").write(np.int64(8), b"y")
        watch = pool.watch(since=0)
        assert [watch.get(1).version for _ in range(7)] == [1, 2, 3, 4, 5, 6, 7]
        pool.engine().flush()
    assert rebooted(path, lambda pool: pool["m"].read(0, 9)) == b"\1x\0\0\0\0\0\0y"


@own_process
def test_an_odd_argument_fails_only_its_caller(path: Path) -> None:
    pool = everpool.open(path)
    with held_back(pool):
        before = pipelined(pool, bind("before", 1))
        odd = pool.engine().pipeline(Record(0, [], [], [], [Put("odd", object())]), [])
        after = pipelined(pool, bind("after", 1))
    assert before.committed.result(5) < after.committed.result(5)
    assert odd.future().exception(5) is not None
    assert list(pool) == ["after", "before"]


# What is durable


@own_process
def test_a_value_cannot_mislead_the_ring(path: Path) -> None:
    pool = everpool.open(path)
    with pool.engine().replica.index.read() as txn:
        mark = bytes(txn.get(ring.KEY)[:128])
    start = pool.engine().replica.index.ring._start
    for turn in range(12):
        pool[f"doc{turn % 5}"] = b"notes: " + ring._MARK
        pool[f"copy{turn % 5}"] = mark * (1 + turn % 3)
        assert elsewhere(path, lambda pool: pool.engine().replica.index.ring._start) == start
    pages = meta_pages(path)
    pool["acknowledged"] = 1
    pool.close()
    cut_power(path, pages)
    assert rebooted(path, lambda pool: pool["acknowledged"]) == 1


def commit_large_entry(link: Connection, path: Path) -> None:
    """Stop right after an entry became visible that is too large for the ring."""

    def commit(self: Writer, txn: Any, batch: Any, results: Any) -> None:
        pages = meta_pages(path)
        txn.commit()
        link.send((pages, str(results[0].id)))
        time.sleep(60)

    with everpool.open(path) as pool:
        Writer._commit = commit
        pool.update({f"part/{number}": os.urandom(60_000) for number in range(6)})


@own_process
def test_an_entry_too_large_for_the_ring_survives_a_power_cut_right_after_it_is_visible(
    path: Path,
) -> None:
    elsewhere(path, bind("first", 1))
    child = Child(commit_large_entry, path)
    with ending(child):
        pages, id = child.receive()
        assert elsewhere(path, lambda pool: pool.outcome(id).state) == "committed"
    cut_power(path, pages)
    assert rebooted(path, lambda pool: (pool.outcome(id).state, len(pool))) == ("committed", 7)


@own_process
def test_a_power_cut_after_a_flush_leaves_what_must_be_done_again(path: Path) -> None:
    flush.KEPT_BYTES = 1 << 20
    with everpool.open(path) as pool:
        memory = pool.allocate("m", 16 << 20)
        memory.write(0, b"\1" * (2 << 20))  # by a file
        for _ in range(4):
            memory.write(4 << 20, os.urandom(1 << 20))
        pages = meta_pages(path)
        pool.engine().flush()
    cut_power(path, pages)
    for _ in range(2):
        assert rebooted(path, lambda pool: pool["m"][0]) == 1


@own_process
def test_a_flush_makes_the_length_of_new_memory_durable(path: Path) -> None:
    pool = everpool.open(path)
    pool.allocate("m", 1 << 20)
    synced, whole = set(), os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        whole(descriptor)

    os.fsync = fsync
    pool.engine().flush()
    assert os.fspath(path / "memory" / "1") in synced


# After a failed flush


def die_in_flush(link: Connection, path: Path) -> None:
    MemoryFiles.sync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    everpool.open(path).engine().flush()


@own_process
def test_a_rewrite_after_a_failed_flush_shows_no_old_bytes(path: Path) -> None:
    pool = everpool.open(path)
    memory = pool.allocate("m", 4096)
    for _ in range(3):
        memory.fetch_add(0, 1)
    assert Child(die_in_flush, path).join() == -signal.SIGKILL
    seen, whole = set(), MemoryFiles.write

    def write(*args: Any) -> None:
        whole(*args)
        seen.add(memory.live()[0])

    MemoryFiles.write = write
    pool.engine().flush()
    assert seen == {3}


@own_process
def test_what_a_failed_flush_lost_is_written_again_by_whoever_flushes_next(path: Path) -> None:
    pool = everpool.open(path)
    memory = pool.allocate("m", 4096)
    memory.write(0, b"A")
    whole, MemoryFiles.sync = MemoryFiles.sync, fail
    with pytest.raises(UnavailableError):
        pool.engine().flush()
    MemoryFiles.sync = whole
    with open(path / "memory" / "1", "r+b") as file:
        file.write(b"\0")  # the kernel dropped the page
    elsewhere(path, lambda pool: pool.engine().flush())
    assert memory.read(0, 1) == b"A"


# After a failed commit


@own_process
def test_ids_of_an_unknown_commit_are_not_taken_again(path: Path) -> None:
    pool = everpool.open(path)
    pool["a"] = 1
    for change in (nothing, bind("in between", 1)):
        with failing_disk(), pytest.raises(CommitUnknownError) as unknown:
            pool["lost"] = 1
        change(pool)
        assert pool.outcome(unknown.value.id).state == "aborted"
        assert "lost" not in pool


@own_process
def test_each_record_of_a_batch_whose_commit_is_unknown_learns_its_own_id(path: Path) -> None:
    pool = everpool.open(path)
    pool["a"] = 1
    with failing_disk():
        txs = in_one_batch(pool, bind("b", 1), bind("c", 1), bind("d", 1))
        errors = [tx.committed.exception(5) for tx in txs]
    assert all(isinstance(error, CommitUnknownError) for error in errors)
    assert len({str(error.id) for error in errors}) == 3


@own_process
def test_a_durable_batch_is_never_committed_again(path: Path) -> None:
    pool = everpool.open(path)
    memory = pool.allocate("m", 8 << 20)
    engine, whole = pool.engine(), Writer._commit
    staged = engine.stage_bytes(memoryview(b"x" * (2 << 20)))

    def commit(self: Writer, *args: Any) -> None:
        whole(self, *args)
        os.truncate(path / "staging" / staged.reference.file, 5)  # the disk damages it

    Writer._commit = commit
    with held_back(pool):
        tx = pipelined(pool, bind("a", 1))
        operation = Write(memory.id, 0, staged.reference)
        store = engine.pipeline(Record(1, [], [], [], [operation]), [staged])
    assert tx.committed.result(5) == 2
    assert store.future().result(5) == 3
    assert pool.version == 3


@own_process
def test_a_failing_discard_does_not_end_the_commit_thread(path: Path) -> None:
    pool = everpool.open(path)
    pool["x"] = 1
    refused = pool.transaction(wait=False)
    refused["large"] = bytes(1 << 17) + str(refused["x"]).encode()
    pool["x"] = 2
    BulkFiles.discard = fail
    with held_back(pool):
        with refused:
            pass
        same_batch = pipelined(pool, bind("y", 1))
    assert isinstance(refused.committed.exception(5), ConflictError)
    assert same_batch.committed.result(5)
    assert pipelined(pool, bind("z", 1)).committed.result(5)


# What a record is judged by


@own_process
def test_an_old_snapshot_is_judged_although_a_flush_is_late(path: Path) -> None:
    Flusher.due = lambda *_: False
    applier._UNTRIMMED_VERSIONS = 16
    pool = everpool.open(path)
    pool.update({"x": 1, "other": 0})
    old = pool.transaction()
    old["y"] = old["x"]
    with pool.transaction() as tx:
        tx["z"] = tx["other"]  # from here on the writer remembers what was written
    pool["x"] = 2
    base = pool.engine().committer._writer._judge.writes.base
    for number in range(33 + base - pool.version):  # now it is about to forget some
        pool["n"] = number
    with pytest.raises(ConflictError), old:
        pass


@own_process
def test_blind_writes_do_not_mind_the_floor(path: Path) -> None:
    scenes.short_tail()
    pool = everpool.open(path)
    memory = pool.allocate("m", 4096)
    whole = Engine.write

    def write(self: Engine, *args: Any) -> Any:
        """The floor passes between a caller's look at the version and the commit."""
        Engine.write = whole
        for number in range(5):
            pool["n"] = number
        pool.engine().flush()
        Engine.write = write
        return whole(self, *args)

    Engine.write = write
    pool["k"] = 1
    memory.write(8, b"x")
    assert memory.fetch_add(0, 1) == 0


@own_process
def test_a_fence_does_not_reorder_a_pipeline(path: Path) -> None:
    pool = everpool.open(path)
    with pool.transaction() as tx:
        tx["x"] = 0
    assert pool.outcome(RecordId(tx.id.session, tx.id.sequence + 3)).state == "aborted"
    txs = in_one_batch(pool, *(bind("x", number) for number in (1, 2, 3)))
    versions = [tx.committed.result(5) for tx in txs]
    assert versions == sorted(versions)
    assert pool["x"] == 3


@own_process
def test_a_read_only_pool_settles_nothing(path: Path) -> None:
    pool = everpool.open(path)
    with pool.transaction() as tx:
        tx["a"] = 1
    id = RecordId(tx.id.session, tx.id.sequence + 1)
    whole, asked = Writer._commit, []

    def ask(reader: Any) -> str:
        try:
            return str(reader.outcome(id).state)
        except InvalidError as error:
            return error.kind

    def commit(self: Writer, *args: Any) -> None:
        asked.append(elsewhere(path, ask, read_only=True))
        whole(self, *args)

    Writer._commit = commit
    pool["b"] = 2
    assert asked == ["invalid"]
    assert elsewhere(path, ask, read_only=True) == "committed"


# Futures, callbacks and threads


@own_process
def test_a_future_cannot_be_cancelled(path: Path) -> None:
    pool = everpool.open(path)
    with held_back(pool):
        tx = pipelined(pool, bind("a", 1))
        assert not tx.committed.cancel()
    assert pool.sync() == tx.committed.result(5)


@pytest.mark.parametrize("what", ["commit", "sync", "close"])
@own_process
def test_a_callback_that_commits_is_refused(path: Path, what: str) -> None:
    pool = everpool.open(path)
    use = {"commit": lambda: bind("b", 1)(pool), "sync": pool.sync, "close": pool.close}[what]
    raised: list[BaseException] = []

    def callback(_: object) -> None:
        try:
            use()
        except everpool.EverpoolError as error:
            raised.append(error)

    with held_back(pool):
        tx = pipelined(pool, bind("a", 1))
        tx.committed.add_done_callback(callback)
    tx.committed.result(5)
    pool["c"] = 1
    assert [type(error) for error in raised] == [InvalidError]


@own_process
def test_a_callback_that_exits_does_not_end_the_commit_thread(path: Path) -> None:
    pool = everpool.open(path)
    with held_back(pool):
        tx = pipelined(pool, bind("a", 1))
        tx.committed.add_done_callback(lambda _: exit(1))
    tx.committed.result(5)
    assert pipelined(pool, bind("b", 1)).committed.result(5) == pool.sync()


def no_more_threads(_: threading.Thread) -> NoReturn:
    raise RuntimeError("can't start new thread")


@own_process
def test_a_commit_succeeds_although_its_flush_gets_no_thread(path: Path) -> None:
    pool = everpool.open(path)
    memory = pool.allocate("m", 8)
    Flusher.due = lambda *_: True
    threading.Thread.start = no_more_threads
    assert [memory.fetch_add(0, 1) for _ in range(3)] == [0, 1, 2]


@own_process
def test_a_pipeline_without_a_thread_fails_and_works_later(path: Path) -> None:
    pool = everpool.open(path)
    whole, threading.Thread.start = threading.Thread.start, no_more_threads
    with pytest.raises(UnavailableError):
        pipelined(pool, bind("a", 1))
    threading.Thread.start = whole
    pipelined(pool, bind("b", 1)).committed.result(5)
    pool["c"] = 1
    assert list(pool) == ["b", "c"]


# Forks


@own_process
def test_a_forked_child_opens_the_pool_anew(path: Path) -> None:
    pool = everpool.open(path)
    pool["a"] = 1
    with pool.engine().replica.index.read():  # as another thread may at the moment of a fork

        def child() -> Any:
            pool["b"] = pool["a"] + 1
            return pool["b"]

        assert call(child) == 2
    assert pool["b"] == 2


@own_process
def test_a_forked_child_opens_the_pool_anew_while_threads_read_and_commit(path: Path) -> None:
    pool = everpool.open(path)
    memory = pool.allocate("m", 64)
    pool["a"] = stop = []

    def work() -> None:
        while not stop:
            memory.fetch_add(0, 1)
            assert pool["a"] == []

    def child() -> int:
        memory.fetch_add(8, 1)
        return len(pool["a"])

    threads = [start(work) for _ in range(3)]
    for _ in range(10):
        assert call(child, timeout_s=10) == 0
    stop.append(True)
    for thread in threads:
        join(thread)
    assert memory.fetch_add(8, 0) == 10


@own_process
def test_a_forked_child_does_not_delete_its_parents_staged_file(path: Path) -> None:
    pool = everpool.open(path)

    def leave(link: Connection) -> None:
        link.recv()
        with contextlib.suppress(SystemExit), tx:
            exit()

    tx = pool.transaction()
    tx["large"] = np.arange(1 << 17)
    child, whole = Child(leave), Writer._commit

    def commit(self: Writer, *args: Any) -> None:
        child.send("leave")
        child.join()
        whole(self, *args)

    Writer._commit = commit
    with tx:
        pass
    assert pool["large"][-1] == (1 << 17) - 1


@own_process
def test_a_fork_during_take_abandons_the_batch(path: Path) -> None:
    pool = everpool.open(path)
    taken, go_on, whole = threading.Event(), threading.Event(), Committer._take

    def take(self: Committer) -> Any:
        batch = whole(self)
        if batch:
            taken.set()
            go_on.wait()
        return batch

    Committer._take = take
    tx = pipelined(pool, bind("a", 1))
    assert taken.wait(5)
    assert isinstance(call(lambda: tx.committed.exception(5)), ClosedError)
    go_on.set()
    assert tx.committed.result(5) == 1


# Opening and closing


def lock_is_free(path: Path) -> bool:
    """Ask from a process that has not opened the pool."""
    with open(path / "lock", "r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
        except OSError:
            return False
    return True


def hold_lock(link: Connection, path: Path) -> None:
    """Take the writer's lock, and free it when told to."""
    assert everpool.open(path).engine().replica.lock.acquire(5)
    link.send("held")
    link.recv()


@own_process
def test_the_lock_survives_closing_and_reopening(path: Path) -> None:
    pool = everpool.open(path, timeout_s=0.2)
    pool.allocate("m", 8)
    slow, whole_block, whole_write = threading.Event(), WriterLock._block, MemoryFiles.write

    def block(self: WriterLock, byte: int) -> None:
        whole_block(self, byte)
        if byte == 0:
            slow.wait(10)  # a waiter that has the lock and does not know that nobody wants it

    WriterLock._block = block
    child = Child(hold_lock, path)
    with ending(child):
        child.receive()
        with pytest.raises(UnavailableError):
            pool["a"] = 1
        (waiter,) = (thread for thread in threading.enumerate() if thread.name == "everpool-lock")
        child.send("free it")
        child.join()
    pool.close()
    pool = everpool.open(path, timeout_s=5)
    free: list[bool] = []

    def write(*args: Any) -> None:
        slow.set()
        join(waiter)
        free.append(call(lock_is_free, path))
        whole_write(*args)

    MemoryFiles.write = write
    pool["m"].write(0, b"x")
    assert free == [False]
    assert call(lock_is_free, path)


@own_process
def test_closing_under_a_reader_leaves_what_it_reads(path: Path) -> None:
    pool = everpool.open(path)
    pool["a"] = "x" * 1000
    reading, closed, found = threading.Event(), threading.Event(), []

    def read() -> None:
        index = pool.engine().replica.index
        with index.read() as txn:
            row = index.name(txn, "a")
            assert row is not None
            reading.set()
            closed.wait(0.3)  # closing may wait for this reader
            found.append(bytes(row.body).count(b"x"))

    reader = start(read)
    assert reading.wait(5)
    pool.close()
    closed.set()
    join(reader)
    assert found == [1000]


@own_process
def test_closing_under_readers_raises_closed_and_does_not_crash(path: Path) -> None:
    uses: list[Callable[[Any], Any]] = [
        lambda pool: [pool[f"name/{number}"] for number in range(2000)],
        lambda pool: list(pool.names()),
        lambda pool: [pool.watch(since=0).get(0) for _ in range(2000)],
        bind("x", 1),
    ]
    with everpool.open(path) as pool:
        pool.update({f"name/{number}": [number] * 50 for number in range(2000)})
    ends: list[str] = []

    def repeat(pool: Any, use: Callable[[Any], Any]) -> None:
        try:
            while True:
                use(pool)
        except BaseException as error:
            ends.append(repr(error) if not isinstance(error, ClosedError) else "closed")

    for _ in range(5):
        with everpool.open(path) as pool:
            threads = [start(lambda use=use, pool=pool: repeat(pool, use)) for use in uses]
            time.sleep(0.05)
        for thread in threads:
            join(thread)
    assert ends == ["closed"] * 20


@own_process
def test_a_commit_that_comes_while_the_pool_closes_is_refused(path: Path) -> None:
    pool = everpool.open(path)
    engine = pool.engine()
    with engine.committer._flushing:  # closing waits for a flush
        closing = start(pool.close)
        time.sleep(0.1)
        with pytest.raises(ClosedError):
            engine.write(Record(0, [], [], [], [Put("a", b"")]), [])
    join(closing)


@own_process
def test_a_large_value_stored_while_the_pool_closes_is_refused(path: Path) -> None:
    pool = everpool.open(path)
    whole = BulkFiles.stage

    def stage(self: BulkFiles, *args: Any) -> Any:
        staged = whole(self, *args)
        pool.close()
        return staged

    BulkFiles.stage = stage
    with pytest.raises(ClosedError):
        pool["large"] = bytes(1 << 17)


@own_process
def test_a_pool_can_be_opened_after_an_open_that_failed(path: Path) -> None:
    call(lambda: everpool.open(path).close())
    child = Child(hold_lock, path)
    with ending(child):
        child.receive()
        new_boot()  # now opening needs the lock
        for _ in range(2):
            with pytest.raises(UnavailableError):
                everpool.open(path, timeout_s=0.1)
    with everpool.open(path) as pool:
        pool["a"] = 1


# Waiting for others


def stop_in_commit(link: Connection, path: Path) -> None:
    def write(*_: object) -> None:
        link.send("in the middle")
        time.sleep(60)

    pool = everpool.open(path)
    MemoryFiles.write = write
    pool["m"].write(0, b"x")


@own_process
def test_sync_does_not_wait_for_a_dead_writer(path: Path) -> None:
    pool = everpool.open(path, timeout_s=20)
    memory = pool.allocate("m", 8)
    child = Child(stop_in_commit, path)
    with ending(child):
        child.receive()
        threading.Timer(0.2, os.kill, (child.pid, signal.SIGKILL)).start()
        began = time.monotonic()
        assert pool.sync() == 2
    assert time.monotonic() - began < 5
    assert memory.view()[0] == ord("x")


@own_process
def test_a_stopped_holder_is_named_whoever_held_the_lock_last(path: Path) -> None:
    pool = everpool.open(path, timeout_s=0.2)
    pool["a"] = 1
    child = Child(hold_lock, path)
    with ending(child):
        child.receive()
        child.stop()
        with pytest.raises(UnavailableError, match=f"process {child.pid} .* is stopped"):
            pool["b"] = 1


def wait_for_lock(link: Connection, path: Path) -> None:
    """Say so when the turnstile is passed and only the lock is waited for."""
    whole = WriterLock._block

    def block(self: WriterLock, byte: int) -> None:
        if byte == 0:
            link.send("waits")
        whole(self, byte)

    WriterLock._block = block
    everpool.open(path)["waiter"] = 1


@own_process
def test_a_stopped_waiter_holds_nobody_up(path: Path) -> None:
    pool = everpool.open(path, timeout_s=5)
    lock = pool.engine().replica.lock
    assert lock.acquire(1)
    child = Child(wait_for_lock, path)
    with ending(child):
        child.receive()
        time.sleep(0.1)
        child.stop()
        lock.release()
        pool["a"] = 1


# Reading memory


@own_process
def test_an_untrusted_reader_sees_new_bytes(path: Path) -> None:
    def prepare(link: Connection) -> None:
        with everpool.open(path) as pool:
            pool.allocate("m", 4096).write(0, b"old")
            pool.engine().flush()

    assert Child(prepare).join() == 0
    new_boot()
    memory = everpool.open(path, read_only=True)["m"]

    class Slow:
        """Memory that is written to, and made durable, right after it was copied."""

        def __getitem__(self, key: slice) -> bytes:
            copy = bytes(memory.live()[key])
            elsewhere(path, write_and_flush, b"new")
            return copy

    replica = memory._pool.engine().replica
    data, version = replica.read_memory(memory.id, "m", Slow(), 0, 3)
    assert bytes(data) == b"new" or version == 2


def write_and_flush(pool: Any, data: bytes) -> None:
    pool["m"].write(0, data)
    pool.engine().flush()


@own_process
def test_reading_while_the_tail_is_trimmed(path: Path) -> None:
    scenes.short_tail()
    pool = everpool.open(path)
    memory = pool.allocate("m", 4 << 20)
    done: set[str] = set()

    def once(what: str, *args: Any) -> None:
        if what not in done:
            done.add(what)
            elsewhere(path, *args)

    def trim(pool: Any) -> None:
        for _ in range(2):
            pool.engine().flush()
            pool["z"] = 1

    class Slow:
        def __getitem__(self, key: slice) -> memoryview:
            once("write", write_and_flush, b"y" * (2 << 20))  # by a file
            return memory.live()[key]

    whole = Replica._play

    def play(self: Replica, *args: Any) -> bool:
        once("trim", trim)
        return whole(self, *args)

    Replica._play = play
    data, _ = pool.engine().replica.read_memory(memory.id, "m", Slow(), 0, 4)
    assert done == {"write", "trim"}
    assert bytes(data) == b"yyyy"


# Looking after the pool


@own_process
def test_verify_gives_no_false_alarm(path: Path) -> None:
    with everpool.open(path) as pool:
        pool.allocate("m", 1 << 16)
        write_and_flush(pool, b"1")

    def write() -> None:
        elsewhere(path, lambda pool: pool["m"].write(0, os.urandom(8)))

    class Checker(verify._Checker):
        """The block is written to between any two looks."""

        def _differs(self, *args: Any) -> bool:
            write()
            differs = super()._differs(*args)
            elsewhere(path, lambda pool: pool.engine().flush())
            return differs

        def _written_since_flush(self, id: int) -> set[int]:
            written = super()._written_since_flush(id)
            write()
            return written

    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = Checker(path).run(False)
    assert code == 0, said.getvalue()


@own_process
def test_verify_gives_no_false_alarm_after_a_late_flush(path: Path) -> None:
    scenes.short_tail()
    pool = everpool.open(path)
    pool.allocate("m", 1 << 20).write(0, b"old")
    whole = Flusher.sync

    def overtake(pool: Any) -> None:
        with contextlib.suppress(UnavailableError):
            write_and_flush(pool, b"new")
            for number in range(3):
                pool["x"] = number
            pool.engine().flush()

    def sync(self: Flusher, *args: Any) -> Any:
        flushed = whole(self, *args)
        Flusher.sync = whole
        elsewhere(path, overtake, timeout_s=0.2)
        return flushed

    Flusher.sync = sync
    pool.engine().flush()
    for number in range(3):
        pool["x"] = number
    assert pool.verify().ok


def die_in_allocate(link: Connection, path: Path) -> None:
    Ring.put = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    everpool.open(path).allocate("new", 1 << 20)


@own_process
def test_an_allocation_that_died_before_its_commit_leaves_no_file(path: Path) -> None:
    pool = everpool.open(path)
    assert Child(die_in_allocate, path).join() == -signal.SIGKILL
    pool["x"] = 1
    assert "new" not in pool
    assert scenes.leftovers(pool) == []


@own_process
def test_memory_that_another_process_deleted_is_let_go_of(path: Path) -> None:
    pool = everpool.open(path)
    pool.allocate("m", 1 << 20).write(0, b"x")
    elsewhere(path, lambda pool: pool.__delitem__("m"))
    pool.engine().flush()
    descriptors = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    targets = [os.readlink(path) for path in descriptors if path.is_symlink()]
    assert not [target for target in targets if "/memory/1" in target]


@own_process
def test_a_large_value_replaced_in_its_transaction_leaves_no_file(path: Path) -> None:
    pool = everpool.open(path)
    with pool.transaction() as tx:
        tx["a"] = bytes(1 << 17)
        tx["a"] = b"x" * (1 << 17)
    assert pool["a"] == b"x" * (1 << 17)
    assert len(list((path / "values").iterdir())) == 1
    assert not list((path / "staging").iterdir())


# Waiters, callbacks and flushes


class Page:
    queued = 0


@own_process
def test_a_waiter_that_comes_late_is_no_second_holder(path: Path) -> None:
    """Its process got the lock otherwise meanwhile, and gave it back."""
    file = path.parent / "lock"
    mine = WriterLock(file)
    mine.page = Page()
    stopped, other = Child(take_byte, file, 1), Child(try_byte, file)
    slow, go, free = threading.Event(), threading.Event(), mine._free

    def free_slowly(byte: int) -> None:
        free(byte)
        if byte == 1 and threading.current_thread().name == "everpool-lock":
            slow.set()
            go.wait(10)

    with ending(stopped, other):
        stopped.receive()
        mine.page.queued = 1
        mine._free = free_slowly  # type: ignore[method-assign]
        assert mine.acquire(5)
        stopped.kill()
        assert slow.wait(5)
        mine.release()
        threading.Timer(0.01, go.set).start()
        assert mine.acquire(5)
        other.send("try")
        assert other.receive() is False


def take_byte(link: Connection, file: Path, byte: int) -> None:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, byte)
    link.send("taken")
    time.sleep(60)


def try_byte(link: Connection, file: Path) -> None:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    link.recv()
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
        link.send(True)
    except OSError:
        link.send(False)


@own_process
def test_a_flush_that_ends_at_once_is_not_the_last(path: Path) -> None:
    flush.FLUSH_VERSIONS = 1
    pool = everpool.open(path)
    committer = pool.engine().committer
    starts = threading.Thread.start

    def start_and_wait(self: threading.Thread) -> None:
        starts(self)
        if self.name == "everpool-flush":
            self.join()

    def refused(self: Committer, timeout_s: float) -> None:
        raise UnavailableError("another process flushes")

    threading.Thread.start = start_and_wait  # type: ignore[method-assign]
    Committer._flush = refused  # type: ignore[method-assign]
    for number in range(5):
        pool["x"] = number
        assert not committer._flush_begun


@own_process
def test_callbacks_that_read_or_pipeline_do_not_wait_for_themselves(path: Path) -> None:
    pool = everpool.open(path)
    memory = pool.allocate("m", 8)
    found: list[Any] = []

    def called(_: Any) -> None:
        pool.engine().committer.recover(wait=False)
        found.append(bytes(memory.view()))
        for number in range(5000):
            with pool.transaction(wait=False) as tx:
                tx["z"] = number
        try:
            pool.verify()
        except InvalidError as error:
            found.append(error.kind)
        through.set()

    through = threading.Event()
    with pool.transaction(wait=False) as tx:
        tx["x"] = 1
    with held_back(pool):
        tx.committed.add_done_callback(called)
    assert through.wait(20)
    pool.sync()
    assert found == [bytes(8), "invalid"] and pool["z"] == 4999


@own_process
def test_verify_gives_no_false_alarm_when_a_flush_comes_between_its_looks(path: Path) -> None:
    with everpool.open(path) as pool:
        memory = pool.allocate("m", 1 << 16)
        memory.write(0, b"one")
        pool.engine().flush()
        memory.write(0, b"two")
    whole, looks = verify.block_checksum, []

    def checksum(view: Any, block: int) -> int:
        found = whole(view, block)
        looks.append(block)
        if len(looks) == 2:
            call(write_and_flush_at, path)
        return found

    verify.block_checksum = checksum
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = verify._Checker(path).run(False)
    assert code == 0 and len(looks) > 2, said.getvalue()


def write_and_flush_at(path: Path) -> None:
    with everpool.open(path) as pool:
        pool.memory("m").write(0, b"three")
        pool.engine().flush()


@own_process
def test_an_outcome_that_comes_while_its_future_is_made(path: Path) -> None:
    pool = everpool.open(path)
    with pool.transaction() as tx:
        tx["a"] = 1
    done = tx._submission
    late = Submission(done.record, [])

    class Overtaken(Future):  # type: ignore[type-arg]
        def set_running_or_notify_cancel(self) -> bool:
            late.settle(done.result, None, pool.engine().replica.bulk)
            return super().set_running_or_notify_cancel()

    commit.Future = Overtaken  # type: ignore[misc]
    assert late.future().result(5) == tx.version
