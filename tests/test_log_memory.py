"""The reference log keeps what `Log` promises."""

import threading

import pytest

from everpool.errors import ClosedError, ConflictError, InvalidError, NotFoundError
from everpool.log import Appended, Log
from everpool.log.memory import MemoryLog


@pytest.fixture
def log() -> MemoryLog:
    return MemoryLog()


def test_it_is_a_log(log: MemoryLog) -> None:
    engine: Log = log
    public = {name for name in vars(Log) if not name.startswith("_")}
    assert public == {"append", "read", "end", "wait", "trim", "close"}
    assert all(hasattr(engine, name) for name in public)


def test_an_empty_log_ends_at_0(log: MemoryLog) -> None:
    assert log.end() == 0
    assert log.read(0) == []
    assert not log.wait(0, timeout_s=0)


def test_entries_are_read_in_the_order_they_were_appended(log: MemoryLog) -> None:
    positions = [log.append(bytes([at])) for at in range(5)]
    assert positions == sorted(set(positions)) and positions[0] > 0
    assert [(item.position, item.entry) for item in log.read(0)] == [
        (position, bytes([at])) for at, position in enumerate(positions)
    ]
    assert [item.position for item in log.read(positions[2])] == positions[3:]
    assert log.read(positions[-1]) == []
    assert log.end() == positions[-1]


def test_an_entry_does_not_change_with_the_buffer_it_came_in(log: MemoryLog) -> None:
    buffer = bytearray(b"before")
    log.append(buffer)
    buffer[:] = b"behind"
    assert log.read(0)[0].entry == b"before"


def test_an_empty_entry_is_refused(log: MemoryLog) -> None:
    with pytest.raises(InvalidError):
        log.append(b"")


def test_the_time_of_an_entry_never_falls() -> None:
    times = iter([5, 3, 9, 9, 1])
    log = MemoryLog(clock_ns=lambda: next(times))
    for _ in range(5):
        log.append(b"x")
    assert [item.time_ns for item in log.read(0)] == [5, 5, 9, 9, 9]


def test_an_append_may_insist_on_the_end_it_knows(log: MemoryLog) -> None:
    first = log.append(b"1", expected=0)
    with pytest.raises(ConflictError) as caught:
        log.append(b"2", expected=0)
    assert caught.value.facts == {"end": first, "expected": 0}
    assert log.append(b"2", expected=first) == log.end()
    assert [item.entry for item in log.read(0)] == [b"1", b"2"]


def test_of_those_who_insist_on_one_end_one_wins(log: MemoryLog) -> None:
    won: list[int] = []

    def swap() -> None:
        for _ in range(50):
            end = log.end()
            try:
                won.append(log.append(b"x", expected=end))
            except ConflictError:
                continue

    threads = [threading.Thread(target=swap) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [item.position for item in log.read(0)]


def test_a_read_is_limited_but_never_empty_without_reason(log: MemoryLog) -> None:
    for _ in range(4):
        log.append(bytes(100))
    assert len(log.read(0, limit_bytes=250)) == 2
    assert len(log.read(0, limit_bytes=200)) == 2
    assert len(log.read(0, limit_bytes=1)) == 1
    assert len(log.read(0)) == 4


def test_what_was_trimmed_cannot_be_read(log: MemoryLog) -> None:
    positions = [log.append(bytes([at])) for at in range(4)]
    log.trim(positions[1])
    log.trim(positions[0])
    assert [item.position for item in log.read(positions[1])] == positions[2:]
    with pytest.raises(NotFoundError, match="start from a checkpoint"):
        log.read(positions[0])
    with pytest.raises(NotFoundError):
        log.read(0)


def test_positions_are_never_given_out_again(log: MemoryLog) -> None:
    last = [log.append(b"x") for _ in range(3)][-1]
    log.trim(last + 100)
    assert log.end() == last
    assert log.append(b"y") == last + 1
    assert [item.entry for item in log.read(last)] == [b"y"]
    with pytest.raises(ConflictError):
        log.append(b"z", expected=0)


def test_a_reader_is_woken_by_an_append(log: MemoryLog) -> None:
    found: list[list[Appended]] = []

    def follow() -> None:
        if log.wait(0, timeout_s=30):
            found.append(log.read(0))

    thread = threading.Thread(target=follow)
    thread.start()
    log.append(b"news")
    thread.join(30)
    assert [item.entry for item in found[0]] == [b"news"]
    assert not log.wait(log.end(), timeout_s=0.01)


def test_threads_append_in_one_order(log: MemoryLog) -> None:
    def write(number: int) -> None:
        for at in range(100):
            log.append(bytes([number, at]))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = [item.entry for item in log.read(0)]
    assert len(set(entries)) == 400
    for number in range(4):
        mine = [entry for entry in entries if entry[0] == number]
        assert mine == sorted(mine)


def test_a_closed_log_refuses_everything_and_wakes_who_waits(log: MemoryLog) -> None:
    woken = threading.Event()

    def follow() -> None:
        try:
            log.wait(0, timeout_s=30)
        except ClosedError:
            woken.set()

    thread = threading.Thread(target=follow)
    thread.start()
    log.close()
    log.close()
    thread.join(30)
    assert woken.is_set()
    for call in (lambda: log.append(b"x"), lambda: log.read(0), log.end, lambda: log.trim(1)):
        with pytest.raises(ClosedError):
            call()
