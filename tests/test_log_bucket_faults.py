"""A log in a bucket under faults: nothing acknowledged is lost or doubled, whatever gets lost."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest

from everpool.errors import (
    ClosedError,
    CommitUnknownError,
    ConflictError,
    CorruptionError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from everpool.log import Appended, End
from everpool.log.bucket import BucketLog
from everpool.log.bucket.clock import StoreClock
from everpool.store.memory import Fault, MemoryStore, Shelf

FaultHook = Callable[[str, str], Fault | None]


def never(call: str, key: str) -> None:
    """No fault."""


def at_swap(number: int, fault: Fault) -> FaultHook:
    """A fault in one of the swaps, counted from 1."""
    count = 0

    def hook(call: str, key: str) -> Fault | None:
        nonlocal count
        count += call == "swap"
        return fault if call == "swap" and count == number else None

    return hook


def entries(shelf: Shelf, after: int = 0) -> list[bytes]:
    log = BucketLog(MemoryStore(shelf))
    found: list[Appended] = []
    while more := log.read(found[-1].position if found else after):
        found += more
    log.close()
    return [item.entry for item in found]


@pytest.mark.parametrize("fault", [Fault.REFUSED, Fault.NEVER, Fault.LOST, Fault.LATE])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_one_fault_is_nobodys_business(fault: Fault, number: int) -> None:
    shelf = Shelf()
    log = BucketLog(MemoryStore(shelf, at_swap(number, fault)))
    assert [log.append(b"%d" % at) for at in range(4)] == [1, 2, 3, 4]
    shelf.deliver()
    assert log.end().position == 4
    assert entries(shelf) == [b"0", b"1", b"2", b"3"]


def test_a_request_that_comes_late_is_not_taken_twice() -> None:
    """The first attempt arrives after the second was sent, before it, and long after."""
    shelf = Shelf()
    store = MemoryStore(shelf, at_swap(2, Fault.LATE))
    log = BucketLog(store)
    log.append(b"0")

    def deliver(call: str, key: str) -> Fault | None:
        if call == "swap":
            shelf.deliver()
        return None

    thread = threading.Thread(target=log.append, args=(b"1",))
    thread.start()
    while not shelf.late:
        time.sleep(0.001)
    store.fault = deliver
    thread.join(30)
    assert entries(shelf) == [b"0", b"1"]
    assert log.append(b"2") == 3


def test_a_lost_answer_is_found_in_a_sealed_chunk() -> None:
    shelf = Shelf()
    other = BucketLog(MemoryStore(shelf), head_bytes=600)
    other.append(b"0")

    def hook(call: str, key: str) -> Fault | None:
        nonlocal lost
        if call == "swap" and not lost:
            lost = True
            return Fault.LOST
        if call.startswith("get") and lost and key.endswith("/head") and not moved:
            moved.append([other.append(b"%d" % at * 200) for at in range(9)])
        return None

    lost, moved = False, list[list[int]]()
    log = BucketLog(MemoryStore(shelf, hook), head_bytes=600)
    log.end()
    lost = False
    moved.clear()
    assert log.append(b"mine") in (2, 11)
    assert moved
    assert Counter(entries(shelf))[b"mine"] == 1


@pytest.mark.parametrize("gone", [False, True])
def test_a_lost_answer_is_found_in_what_was_trimmed(gone: bool) -> None:
    """As long as the chunks are there; when a collector took them, the outcome is unknown."""
    shelf = Shelf()
    other = BucketLog(MemoryStore(shelf), head_bytes=600)
    other.append(b"0")
    lost, moved = False, False

    def hook(call: str, key: str) -> Fault | None:
        nonlocal lost, moved
        if call == "swap" and not lost:
            lost = True
            return Fault.LOST
        if call.startswith("get") and lost and not moved:
            moved = True
            for at in range(9):
                other.append(b"%d" % at * 200)
            other.trim(10, b"checkpoint")
            if gone:
                with shelf.lock:
                    for key in [key for key in shelf.objects if "/chunks/" in key]:
                        del shelf.objects[key]
        return None

    store = MemoryStore(shelf)
    log = BucketLog(store, head_bytes=600)
    log.end()
    store.fault = hook
    if gone:
        with pytest.raises(CommitUnknownError) as caught:
            log.append(b"mine")
        assert len(bytes.fromhex(str(caught.value.id))) == 16
    else:
        assert log.append(b"mine") == 2
    assert moved
    assert log.end().trimmed == 10


def test_what_cannot_be_settled_in_time_is_unknown() -> None:
    shelf = Shelf()
    store = MemoryStore(shelf)
    log = BucketLog(store, timeout_s=0.3)
    log.append(b"0")
    store.fault = lambda call, key: Fault.NEVER
    began = time.monotonic()
    with pytest.raises(CommitUnknownError, match="no answer"):
        log.append(b"1")
    assert 0.25 < time.monotonic() - began < 1.5
    store.fault = never
    assert log.append(b"2") == 2
    assert entries(shelf) == [b"0", b"2"]


def test_what_is_refused_is_not_there() -> None:
    shelf = Shelf()
    store = MemoryStore(shelf)
    log = BucketLog(store, timeout_s=0.2)
    log.append(b"0")
    store.fault = lambda call, key: Fault.REFUSED
    for call in (lambda: log.append(b"1"), log.end, lambda: log.trim(1, b"")):
        with pytest.raises(UnavailableError):
            call()
    assert not log.wait(1, 0.05)
    store.fault = never
    assert entries(shelf) == [b"0"]
    assert log.append(b"2") == 2


def test_what_is_denied_fails_at_once() -> None:
    shelf = Shelf()
    store = MemoryStore(shelf)
    log = BucketLog(store, timeout_s=60)
    log.append(b"0")
    store.fault = lambda call, key: Fault.DENIED
    calls: list[Callable[[], object]] = [
        lambda: log.append(b"1"),
        log.end,
        lambda: log.trim(1, b""),
        lambda: log.wait(1, 60),
    ]
    for call in calls:
        with pytest.raises(InvalidError, match="rights"):
            call()
    store.fault = lambda call, key: Fault.DENIED if call == "swap" else None
    with pytest.raises(InvalidError, match="rights"):
        log.append(b"1")
    store.fault = never
    assert log.append(b"1") == 2


def test_a_denial_after_a_lost_answer_settles_nothing() -> None:
    shelf = Shelf()
    store = MemoryStore(shelf)
    log = BucketLog(store)
    log.append(b"0")
    faults = iter([Fault.LOST])
    store.fault = lambda call, key: next(faults, Fault.DENIED)
    with pytest.raises(CommitUnknownError):
        log.append(b"1")
    store.fault = never
    assert entries(shelf) == [b"0", b"1"]


def test_a_lost_trim_is_done_again() -> None:
    shelf = Shelf()
    store = MemoryStore(shelf)
    log = BucketLog(store, timeout_s=0.5)
    for at in range(4):
        log.append(b"%d" % at)
    for fault in (Fault.LOST, Fault.NEVER, Fault.REFUSED, Fault.LATE):
        store.fault = at_swap(1, fault)
        log.trim(2, fault.name.encode())
        shelf.deliver()
        assert log.end() == End(4, 2, fault.name.encode())
    store.fault = lambda call, key: Fault.NEVER
    with pytest.raises(UnavailableError, match="again"):
        log.trim(3, b"")


def test_closing_tells_what_is_not_known() -> None:
    shelf = Shelf()
    store = MemoryStore(shelf)
    log = BucketLog(store)
    log.append(b"0")
    store.fault = lambda call, key: Fault.NEVER
    errors: list[BaseException] = []

    def append() -> None:
        try:
            log.append(b"1")
        except (CommitUnknownError, ClosedError) as error:
            errors.append(error)

    threads = [threading.Thread(target=append) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.15)
    log.close()
    for thread in threads:
        thread.join(10)
    assert len(errors) == 3
    assert any(isinstance(error, CommitUnknownError) for error in errors)


def test_a_log_that_went_back_is_refused() -> None:
    shelf = Shelf()
    log = BucketLog(MemoryStore(shelf))
    log.append(b"0")
    kept = shelf.objects["log/head"]
    log.append(b"1")
    newest = shelf.objects["log/head"]
    shelf.objects["log/head"] = kept
    with pytest.raises(CorruptionError, match="ends at 1, after 2"):
        log.end()
    with pytest.raises((CorruptionError, CommitUnknownError), match="ends at 1, after 2"):
        log.append(b"2")
    del shelf.objects["log/head"]
    with pytest.raises(CorruptionError, match="gone"):
        log.end()
    BucketLog(MemoryStore(shelf)).append(b"anew")
    with pytest.raises(CorruptionError, match="anew"):
        log.end()
    shelf.objects["log/head"] = newest
    assert log.append(b"2") == 3


def test_a_chunk_that_is_gone_or_damaged_is_no_news() -> None:
    shelf = Shelf()
    log = BucketLog(MemoryStore(shelf), head_bytes=400)
    for at in range(9):
        log.append(b"%d" % at * 150)
    log.append(b"large" * 100)
    reader = BucketLog(MemoryStore(shelf))
    assert len(reader.read(0)) == 10
    for key in [key for key in shelf.objects if not key.endswith("head")]:
        kept = shelf.objects.pop(key)
        with pytest.raises(CorruptionError, match="gone"):
            BucketLog(MemoryStore(shelf)).read(0)
        flipped = bytearray(kept.data)
        flipped[len(flipped) // 2] ^= 1
        shelf.objects[key] = kept._replace(data=bytes(flipped))
        with pytest.raises(CorruptionError, match="restore"):
            BucketLog(MemoryStore(shelf)).read(0)
        shelf.objects[key] = kept
    assert len(BucketLog(MemoryStore(shelf)).read(0)) == 10


def test_a_reader_whose_entries_are_collected_starts_from_the_checkpoint() -> None:
    shelf = Shelf()
    log = BucketLog(MemoryStore(shelf), head_bytes=400)
    for at in range(9):
        log.append(b"%d" % at * 150)
    reader = BucketLog(MemoryStore(shelf))
    reader.end()
    log.trim(6, b"")
    for key in [key for key in shelf.objects if "/chunks/" in key]:
        if int(key.rpartition("/")[2].split("-")[1]) <= 6:
            del shelf.objects[key]
    with pytest.raises(NotFoundError, match="checkpoint"):
        reader.read(0)
    assert [item.position for item in reader.read(6)] == [7, 8, 9]


def test_an_append_that_nobody_contends_with_is_one_request() -> None:
    shelf = Shelf()
    log = BucketLog(MemoryStore(shelf))
    log.append(b"0")
    before = shelf.requests
    for _ in range(50):
        log.append(b"x" * 100)
    assert shelf.requests - before == 50


def test_threads_share_swaps() -> None:
    shelf = Shelf()
    store = MemoryStore(shelf, lambda call, key: time.sleep(0.01))
    log = BucketLog(store)
    log.append(b"0")
    before = shelf.requests
    threads = [threading.Thread(target=log.append, args=(b"%d" % at,)) for at in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert log.end().position == 31
    assert shelf.requests - before < 15


def test_what_was_given_up_before_it_was_swapped_in_never_comes() -> None:
    """The swap of both is delayed by a chunk that has to be put first."""
    shelf = Shelf()
    store = MemoryStore(shelf)
    log = BucketLog(store, head_bytes=300, timeout_s=0.4)
    log.append(bytes(100))
    sealing = threading.Event()

    def slow(call: str, key: str) -> None:
        if call == "swap" and not sealing.is_set():
            time.sleep(0.2)  # so that both wait for this one, and go together then
        if "/chunks/" in key:
            sealing.set()
            time.sleep(0.6)

    store.fault = slow
    first = threading.Thread(target=log.append, args=(b"first",))
    first.start()
    time.sleep(0.05)
    told: dict[bytes, bool] = {}

    def append(entry: bytes) -> None:
        try:
            told[entry] = bool(log.append(entry))
        except UnavailableError:
            told[entry] = False

    both = [b"one" + bytes(140), b"other"]
    threads = [threading.Thread(target=append, args=(entry,)) for entry in both]
    for thread in threads:
        thread.start()
    for thread in [first, *threads]:
        thread.join(10)
    assert sealing.is_set()
    assert False in told.values()
    found = entries(shelf)[2:]
    assert sorted(found) == sorted(entry for entry in both if told[entry])


def test_waiters_share_the_requests_and_ask_less_often_when_idle() -> None:
    shelf = Shelf()
    log = BucketLog(MemoryStore(shelf), idle_poll_s=0.2)
    log.append(b"0")
    before = shelf.requests
    threads = [threading.Thread(target=log.wait, args=(1, 1.0)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert 4 <= shelf.requests - before <= 20


@pytest.mark.parametrize("wrong_s", [3600, -3600])
def test_the_time_is_the_stores_where_it_is_known(wrong_s: int) -> None:
    """This machine's clock is an hour fast, or slow; a look at an own swap puts it right."""
    shelf = Shelf()
    wrong_ns = wrong_s * 10**9
    BucketLog(MemoryStore(shelf)).trim(0, b"the head is there")
    log = BucketLog(MemoryStore(shelf), clock_ns=lambda: time.time_ns() + wrong_ns)
    log.trim(0, b"a swap")
    log.end()
    log.append(b"0")
    assert abs(log.read(0)[0].time_ns - time.time_ns()) < 5 * 10**9


@pytest.mark.parametrize("seed", range(40))
def test_under_any_faults_what_is_told_is_true(seed: int) -> None:
    """Writers with small heads, large entries and trims, on a store that loses what it can."""
    rng = random.Random(seed)
    shelf = Shelf()
    calm = threading.Event()
    lock = threading.Lock()

    def fault(call: str, key: str) -> Fault | None:
        with lock:
            if rng.random() < 0.1:
                shelf.deliver()
            if calm.is_set() or rng.random() > 0.25:
                return None
            kinds = [Fault.REFUSED, Fault.NEVER, Fault.LOST, Fault.LATE]
            return rng.choice(kinds)

    acknowledged: dict[bytes, int] = {}
    refused: list[bytes] = []
    unknown: list[bytes] = []

    def write(number: int) -> None:
        mine = random.Random(seed * 10 + number)
        log = BucketLog(
            MemoryStore(shelf, fault),
            head_bytes=400,
            timeout_s=0.3,
            chance=random.Random(seed * 10 + number),
        )
        for at in range(12):
            entry = b"%d/%d " % (number, at) + bytes(mine.choice([1, 80, 150, 700]))
            expected = None
            try:
                if mine.random() < 0.3:
                    expected = log.end().position
                acknowledged[entry] = log.append(entry, expected)
                if mine.random() < 0.1:
                    log.trim(acknowledged[entry] - 20, b"%d" % at)
            except (ConflictError, UnavailableError):
                if entry not in acknowledged:
                    refused.append(entry)
            except CommitUnknownError:
                unknown.append(entry)
        log.close()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    calm.set()
    shelf.deliver()
    reader = BucketLog(MemoryStore(shelf, fault))
    end = reader.end()
    found = {item.position: item.entry for item in reader.read(end.trimmed, 1 << 30)}
    assert list(found) == list(range(end.trimmed + 1, end.position + 1))
    counted = Counter(found.values())
    assert not counted or max(counted.values()) == 1
    positions = {entry: position for position, entry in found.items()}
    for entry, position in acknowledged.items():
        assert position <= end.trimmed or found[position] == entry
    for entry in refused:
        assert entry not in positions
    assert len(set(acknowledged.values())) == len(acknowledged)
    known = set(acknowledged) | set(unknown)
    assert set(found.values()) <= known


@pytest.mark.parametrize("how", ["interrupt", "close"])
def test_who_waits_behind_another_one_leaves_nothing_that_is_appended_later(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, swapping, go_on = Shelf(), threading.Event(), threading.Event()

    def hook(call: str, key: str) -> None:
        if call == "swap" and not go_on.is_set():
            swapping.set()
            go_on.wait(10)

    log = BucketLog(MemoryStore(shelf, hook))
    leader = threading.Thread(target=log.append, args=(b"A",))
    leader.start()
    assert swapping.wait(10)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    if how == "interrupt":
        with monkeypatch.context() as patch:
            patch.setattr(log._changed, "wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                log.append(b"B")
        go_on.set()
        leader.join(10)
        log.append(b"C")
        assert entries(shelf) == [b"A", b"C"]
    else:
        log.close()
        with pytest.raises(ClosedError):
            log.append(b"B")
        go_on.set()
        leader.join(10)
        assert entries(shelf) in ([], [b"A"])


def test_a_log_that_is_closed_while_it_seals_says_so() -> None:
    shelf, sealing, go_on = Shelf(), threading.Event(), threading.Event()

    def hook(call: str, key: str) -> None:
        if call == "put" and not go_on.is_set():
            sealing.set()
            go_on.wait(10)

    log = BucketLog(MemoryStore(shelf, hook), head_bytes=4096)
    failures: list[BaseException] = []

    def append() -> None:
        try:
            for _ in range(10):
                log.append(bytes(1000))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=append)
    thread.start()
    assert sealing.wait(10)
    log.close()
    go_on.set()
    thread.join(10)
    (failure,) = failures
    assert isinstance(failure, ClosedError)


def test_a_clock_that_was_set_right_is_believed_again() -> None:
    wall = mono = 5000.0
    clock = StoreClock(lambda: int((wall - slow) * 1e9), lambda: mono)
    slow = 3600.0
    clock.saw("a", int(wall * 1e9))
    assert abs(clock.now_ns() / 1e9 - wall) < 1
    slow, wall, mono = 0.0, wall + 1, mono + 1
    clock.saw("b", int(wall * 1e9))
    assert abs(clock.now_ns() / 1e9 - wall) < 1


def test_history_is_yielded_as_far_as_it_is_there() -> None:
    shelf = Shelf()
    log = BucketLog(MemoryStore(shelf), head_bytes=600)
    for at in range(40):
        log.append(b"%d" % at * (200 if at % 4 == 3 else 40))
    log.trim(40, b"")
    chunks = sorted(key for key in shelf.objects if "/chunks/" in key)
    first, _, rest = chunks[2].rpartition("/")[2].partition("-")
    last = int(rest.partition("-")[0])
    del shelf.objects[chunks[3]]
    # Somebody was ended as he deleted the next one: its large entries, and not yet itself.
    bodies = sorted(key for key in shelf.objects if "/entries/" in key)
    for key in bodies[len(bodies) // 2 :]:
        del shelf.objects[key]
    for fresh in (log, BucketLog(MemoryStore(shelf), head_bytes=600)):
        found = [item.position for item in fresh.history(int(first) - 1, last)]
        assert found == list(range(int(first), last + 1))
        found.clear()
        with pytest.raises(NotFoundError):
            for item in fresh.history(0):
                found.append(item.position)
        assert found == list(range(1, last + 1)) or fresh is log


def test_two_collect_the_same_chunks() -> None:
    shelf = Shelf()
    log = BucketLog(MemoryStore(shelf), head_bytes=600, cache_bytes=0)
    for at in range(40):
        log.append(b"%d" % at * (200 if at % 4 == 3 else 40))
    log.trim(40, b"")
    one, other = log.garbage([]), log.garbage([])
    next(one)
    keys = [listed.key for listed in other]
    MemoryStore(shelf).delete(keys)
    assert {listed.key for listed in one} <= set(keys)
    assert log.append(b"x") == 41
