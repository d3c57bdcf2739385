"""What of a log in a bucket may be deleted, and that nothing which is needed ever is."""

import random
from typing import Any

import pytest

from everpool.errors import EverpoolError, NotFoundError
from everpool.log.bucket import BucketLog
from everpool.store.memory import Fault, MemoryStore, Shelf

HEAD_BYTES = 600


def make(shelf: Shelf, fault: Any = lambda call, key: None, **options: Any) -> BucketLog:
    return BucketLog(MemoryStore(shelf, fault), "log", head_bytes=HEAD_BYTES, **options)


def delete(shelf: Shelf, log: BucketLog, kept: list[tuple[int, int]]) -> int:
    keys = [listed.key for listed in log.garbage(kept)]
    MemoryStore(shelf).delete(keys)
    return len(keys)


@pytest.mark.parametrize("seed", range(30))
def test_what_lies_in_a_span_stays(seed: int) -> None:
    choose = random.Random(seed)
    shelf = Shelf()
    log = make(shelf, chance=random.Random(seed))
    entries = {}
    for _ in range(60):
        entry = choose.randbytes(choose.choice([20, 90, 400, 2000]))
        entries[log.append(entry)] = entry
        if choose.random() < 0.1:
            log.trim(choose.randrange(len(entries) + 1), b"note")
    trimmed = log.end().trimmed
    places = sorted(choose.sample(range(61), 4))
    kept = [(places[0], places[1]), (places[2], 1 << 62)]
    delete(shelf, log, kept)
    for after, last in kept:
        found = list(make(shelf).history(after, last))
        assert [item.position for item in found] == list(range(after + 1, min(last, 60) + 1))
        assert all(entries[item.position] == item.entry for item in found)
    assert [item.position for item in log.read(trimmed, 1 << 30)] == list(range(trimmed + 1, 61))
    assert not delete(shelf, log, kept), "all of it goes at once"


def test_all_goes_that_no_span_needs() -> None:
    shelf = Shelf()
    log = make(shelf)
    for number in range(200):
        log.append(bytes([number]) * (500 if number % 3 else 30))
    log.trim(200, b"")
    before = len(shelf.objects)
    assert delete(shelf, log, []) > 150
    assert len(shelf.objects) < before / 10
    # What stands in the head goes with its chunk, later.
    log.append(b"more")
    assert log.read(200)[0].entry == b"more"
    with pytest.raises(NotFoundError):
        list(log.history(0))


def test_what_there_is_comes_before_the_gap() -> None:
    shelf = Shelf()
    log = make(shelf)
    for number in range(60):
        log.append(bytes([number]) * 100)
    log.trim(60, b"")
    delete(shelf, log, [(10, 20)])
    found = []
    with pytest.raises(NotFoundError):
        for item in log.history(10):
            found.append(item.position)
    assert found[:10] == list(range(11, 21))


def test_an_append_that_came_to_nothing_leaves_nothing() -> None:
    shelf = Shelf()
    faults: list[Fault | None] = []
    log = make(shelf, lambda call, key: faults.pop() if faults and call == "swap" else None)
    log.append(b"first")
    faults += [Fault.DENIED]
    with pytest.raises(EverpoolError):
        log.append(b"large" * 200)
    assert any(key.startswith("log/entries/") for key in shelf.objects)
    assert not delete(shelf, log, []), "it may be under way"
    for _ in range(30):
        log.append(b"x" * 100)
    log.trim(20, b"")
    assert delete(shelf, log, [])
    assert not any(key.startswith("log/entries/") for key in shelf.objects)
    assert len(log.read(20)) == 31 - 20


def test_a_large_append_that_slept_is_put_again() -> None:
    """Its object is deleted between two attempts: the head that it goes into is trimmed past it."""
    shelf = Shelf()
    other = make(shelf)
    for _ in range(5):
        other.append(b"x" * 100)

    def fault(call: str, key: str) -> Fault | None:
        if call == "swap" and not slept:
            slept.append(key)
            for _ in range(20):
                other.append(b"y" * 100)
            other.trim(20, b"")
            bodies = {key for key in shelf.objects if key.startswith("log/entries/")}
            assert len(bodies) == 1 and delete(shelf, other, [])
            assert not bodies & set(shelf.objects), "else this shows nothing"
            log.end()
            return Fault.REFUSED
        return None

    slept: list[str] = []
    log = make(shelf, fault)
    log.end()
    position = log.append(b"large" * 200)
    assert slept
    assert make(shelf).read(position - 1)[0].entry == b"large" * 200


@pytest.mark.parametrize("seed", range(40))
def test_under_any_faults_nothing_is_deleted_that_is_needed(seed: int) -> None:
    choose = random.Random(seed)
    shelf = Shelf()

    def fault(call: str, key: str) -> Fault | None:
        if choose.random() < 0.1:
            return choose.choice([Fault.REFUSED, Fault.NEVER, Fault.LOST, Fault.LATE])
        return None

    settings: dict[str, Any] = {"timeout_s": 0.5, "busy_poll_s": 0.001}
    logs = [make(shelf, fault, chance=random.Random(n), **settings) for n in range(2)]
    start = 0
    for _ in range(60):
        log = choose.choice(logs)
        try:
            dice = choose.random()
            if dice < 0.75:
                log.append(choose.randbytes(choose.choice([30, 100, 700])))
            elif dice < 0.9:
                end = log.end().position
                log.trim(end, b"")
                start = max(start, choose.randint(0, end))
            else:
                MemoryStore(shelf).delete(
                    [item.key for item in log.garbage([(start, 1 << 62)]) if choose.random() < 0.8]
                )
        except EverpoolError:
            pass
        if choose.random() < 0.3:
            shelf.deliver()
    shelf.deliver()
    log = make(shelf)
    end = log.end()
    found = [item.position for item in log.history(start)]
    assert found == list(range(start + 1, end.position + 1))


def test_a_span_is_read_while_what_follows_is_half_deleted() -> None:
    shelf = Shelf()
    log = make(shelf)
    for number in range(60):
        log.append(bytes([number]) * (500 if number % 3 else 30))
    log.trim(60, b"")
    for listed in list(log.garbage([(5, 20), (50, 1 << 62)])):
        MemoryStore(shelf).delete([listed.key])
        found = []
        with pytest.raises(NotFoundError):
            for item in make(shelf).history(5):
                found.append(item.position)
        assert found[:15] == list(range(6, 21)), listed.key


def test_another_one_deletes_meanwhile() -> None:
    shelf = Shelf()
    log, other = make(shelf), make(shelf)
    for number in range(200):
        log.append(bytes([number]) * (500 if number % 3 else 30))
    log.trim(200, b"")
    found = log.garbage([])
    next(found)
    assert delete(shelf, other, []) > 100
    MemoryStore(shelf).delete([listed.key for listed in found])
    assert not delete(shelf, log, [])
