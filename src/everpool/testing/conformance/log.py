"""The guarantees of a log as tests, one guarantee each, for every engine to subclass.

    class TestMyLog(LogConformance):
        def make_log(self, tmp_path):
            return MyLog(tmp_path / "log")

`make_log` is called once for every client of a test: all logs that it returns for one `tmp_path`
must be one log, as they would be from several processes.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from everpool.errors import ClosedError, ConflictError, InvalidError, NotFoundError
from everpool.log import NOTE_BYTES, Appended, End, Log
from everpool.testing.conformance.base import PATIENCE_S, in_threads

MakeLog = Callable[[], Log]


# What `ArchivedLog` adds, and why the store is out of reach.
_OPTIONAL = {"history", "trouble", "garbage"}


class LogConformance:
    """`make_log` is the one thing that an engine overrides."""

    def make_log(self, tmp_path: Path) -> Log:
        """Return a client of the log of this test, which is empty at first."""
        raise NotImplementedError

    @pytest.fixture
    def open_log(self, tmp_path: Path) -> Iterator[MakeLog]:
        """Opens one more client; all are closed after the test."""
        with contextlib.ExitStack() as opened:

            def open_one() -> Log:
                return opened.enter_context(contextlib.closing(self.make_log(tmp_path)))

            yield open_one

    @pytest.fixture
    def log(self, open_log: MakeLog) -> Log:
        """A client of a new log."""
        return open_log()

    @pytest.fixture
    def other(self, log: Log, open_log: MakeLog) -> Log:
        """A second client of the same log."""
        return open_log()

    def test_it_has_no_more_methods_than_a_log(self, log: Log) -> None:
        public = {name for name in vars(type(log)) if not name.startswith("_")}
        assert public >= {"append", "read", "end", "wait", "trim", "close"}
        assert public - _OPTIONAL == {name for name in vars(Log) if not name.startswith("_")}

    def test_an_empty_log_ends_at_0(self, log: Log) -> None:
        assert log.end() == End(0, 0, b"")
        assert log.read(0) == []
        assert not log.wait(0, timeout_s=0)

    def test_entries_are_read_in_the_order_they_were_appended(self, log: Log) -> None:
        positions = [log.append(bytes([at])) for at in range(5)]
        assert positions == sorted(set(positions)) and positions[0] > 0
        assert [(item.position, item.entry) for item in log.read(0)] == [
            (position, bytes([at])) for at, position in enumerate(positions)
        ]
        assert [item.position for item in log.read(positions[2])] == positions[3:]
        assert log.read(positions[-1]) == []
        assert log.end() == End(positions[-1], 0, b"")

    def test_another_client_sees_the_same(self, log: Log, other: Log) -> None:
        positions = [log.append(bytes([at])) for at in range(5)]
        assert other.end() == log.end() == End(positions[-1], 0, b"")
        assert other.read(0) == log.read(0)
        positions.append(other.append(b"more"))
        assert log.end().position == positions[-1]
        assert [item.position for item in log.read(0)] == positions

    def test_what_was_appended_outlives_its_writer(self, log: Log, open_log: MakeLog) -> None:
        positions = [log.append(bytes([at])) for at in range(3)]
        before = log.read(0)
        log.close()
        again = open_log()
        assert again.end().position == positions[-1]
        assert again.read(0) == before
        assert again.append(b"after") > positions[-1]

    def test_the_end_is_never_stale(self, log: Log, other: Log) -> None:
        for at in range(20):
            writer, reader = (log, other) if at % 2 else (other, log)
            reader.end()
            position = writer.append(b"x")
            assert reader.end().position == position
            assert reader.read(position - 1)[0].position == position

    def test_an_entry_does_not_change_with_the_buffer_it_came_in(self, log: Log) -> None:
        buffer = bytearray(b"before")
        log.append(buffer)  # type: ignore[arg-type]
        buffer[:] = b"behind"
        assert log.read(0)[0].entry == b"before"

    def test_an_empty_entry_is_refused(self, log: Log) -> None:
        with pytest.raises(InvalidError):
            log.append(b"")
        assert log.end().position == 0

    def test_entries_may_be_large(self, log: Log, other: Log) -> None:
        rng = random.Random(7)
        entries = [rng.randbytes(size) for size in (1, 300_000, 10, 2_000_000, 70_000, 40_000)]
        positions = [log.append(entry) for entry in entries]
        other.end()
        found = _read_all(other, 100_000)
        assert [item.entry for item in found] == entries
        assert [item.position for item in found] == positions

    def test_entries_may_be_many(self, log: Log, other: Log) -> None:
        rng = random.Random(11)
        entries = [b"%d:" % at + rng.randbytes(rng.randint(1, 1200)) for at in range(300)]
        positions = [log.append(entry) for entry in entries]
        other.end()
        for reader in (log, other):
            found = _read_all(reader, rng.choice([1, 5_000, 1 << 20]))
            assert [item.entry for item in found] == entries
            assert [item.position for item in found] == positions
            after = rng.randrange(300)
            assert reader.read(positions[after])[:3] == found[after + 1 : after + 4]

    def test_the_time_of_an_entry_never_falls(self, log: Log, other: Log) -> None:
        began = time.time_ns()
        for at in range(40):
            (log, other)[at % 2].append(b"x" * 100)
        log.end()
        times = [item.time_ns for item in _read_all(log)]
        assert times == sorted(times)
        assert times[-1] >= began - 60_000_000_000

    def test_an_append_may_insist_on_the_end_it_knows(self, log: Log, other: Log) -> None:
        first = log.append(b"1", expected=0)
        with pytest.raises(ConflictError) as caught:
            log.append(b"2", expected=0)
        assert caught.value.facts == {"end": first, "expected": 0}
        with pytest.raises(ConflictError):
            other.append(b"2", expected=0)
        second = other.append(b"2", expected=first)
        with pytest.raises(ConflictError):
            log.append(b"3", expected=first)
        assert log.append(b"3", expected=second) == log.end().position
        assert [item.entry for item in log.read(0)] == [b"1", b"2", b"3"]

    def test_one_may_insist_on_an_end_that_another_made(self, log: Log, other: Log) -> None:
        first, second = log.append(b"1"), other.append(b"2")
        assert first < second
        third = log.append(b"3", expected=second)
        assert [item.position for item in log.read(second)] == [third]

    def test_of_those_who_insist_on_one_end_one_wins(self, log: Log, other: Log) -> None:
        def swap(number: int) -> list[int]:
            won: list[int] = []
            mine = (log, other)[number % 2]
            for _ in range(15):
                end = mine.end().position
                with contextlib.suppress(ConflictError):
                    won.append(mine.append(b"x", expected=end))
            return won

        won = [position for one in in_threads(4, swap) for position in one]
        log.end()
        assert sorted(won) == [item.position for item in _read_all(log)]

    def test_a_read_is_limited_but_never_empty_without_reason(self, log: Log) -> None:
        for _ in range(4):
            log.append(bytes(100))
        assert len(log.read(0, limit_bytes=250)) == 2
        assert len(log.read(0, limit_bytes=200)) == 2
        assert len(log.read(0, limit_bytes=1)) == 1
        assert len(log.read(0)) == 4

    def test_what_was_trimmed_cannot_be_read(self, log: Log, other: Log) -> None:
        positions = [log.append(bytes([at])) for at in range(4)]
        log.trim(positions[1], b"checkpoint 1")
        log.trim(positions[0], b"checkpoint 0")
        for reader in (log, other):
            assert reader.end() == End(positions[-1], positions[1], b"checkpoint 1")
            assert [item.position for item in reader.read(positions[1])] == positions[2:]
            with pytest.raises(NotFoundError, match="start from a checkpoint"):
                reader.read(positions[0])
            with pytest.raises(NotFoundError):
                reader.read(0)

    def test_a_trim_of_the_same_entries_replaces_the_note(self, log: Log, other: Log) -> None:
        last = log.append(b"x")
        log.trim(0, b"nothing trimmed, but a note")
        assert other.end() == End(last, 0, b"nothing trimmed, but a note")
        log.trim(last, b"one")
        other.trim(last, b"other")
        other.trim(last, b"other")
        assert log.end() == End(last, last, b"other")

    def test_many_entries_are_trimmed_bit_by_bit(self, log: Log, other: Log) -> None:
        positions: list[int] = []
        for at in range(12):
            positions += [log.append(b"%d" % at * 900) for _ in range(12)]
            trimmed = positions[max(0, len(positions) - 17)]
            (log, other)[at % 2].trim(trimmed, b"%d" % at)
            assert other.end() == End(positions[-1], trimmed, b"%d" % at)
            found = _read_all(other, after=trimmed)
            assert [item.position for item in found] == [p for p in positions if p > trimmed]

    def test_a_note_has_a_limit(self, log: Log) -> None:
        log.append(b"x")
        log.trim(1, bytes(NOTE_BYTES))
        with pytest.raises(InvalidError, match="too long"):
            log.trim(1, bytes(NOTE_BYTES + 1))
        assert log.end().start == bytes(NOTE_BYTES)

    def test_positions_are_never_given_out_again(self, log: Log, open_log: MakeLog) -> None:
        last = [log.append(b"x") for _ in range(3)][-1]
        log.trim(last + 100, b"all")
        assert log.end() == End(last, last, b"all")
        log.close()
        log = open_log()
        assert log.end() == End(last, last, b"all")
        behind = log.append(b"y")
        assert behind > last
        assert [item.entry for item in log.read(last)] == [b"y"]
        with pytest.raises(ConflictError):
            log.append(b"z", expected=0)

    def test_a_reader_is_woken_by_an_append(self, log: Log) -> None:
        def follow(reader: Log, after: int) -> list[Appended]:
            assert reader.wait(after, timeout_s=PATIENCE_S)
            return reader.read(after)

        self._while_others_wait(log, log, follow)
        assert not log.wait(log.end().position, timeout_s=0.01)

    def test_a_reader_elsewhere_is_woken_too(self, log: Log, other: Log) -> None:
        def follow(reader: Log, after: int) -> list[Appended]:
            assert reader.wait(after, timeout_s=PATIENCE_S)
            return reader.read(after)

        log.append(b"old")
        self._while_others_wait(log, other, follow)

    def _while_others_wait(
        self, writer: Log, reader: Log, follow: Callable[[Log, int], list[Appended]]
    ) -> None:
        after = writer.end().position
        found: list[list[Appended]] = []
        threads = [
            threading.Thread(target=lambda: found.append(follow(reader, after))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        writer.append(b"news")
        for thread in threads:
            thread.join(PATIENCE_S)
        assert [[item.entry for item in items] for items in found] == [[b"news"]] * 3

    def test_threads_append_in_one_order(self, log: Log, other: Log) -> None:
        def write(number: int) -> None:
            mine = (log, other)[number % 2]
            last = 0
            for at in range(40):
                position = mine.append(bytes([number, at]))
                assert position > last
                last = position

        in_threads(4, write)
        log.end()
        entries = [item.entry for item in _read_all(log)]
        assert len(entries) == len(set(entries)) == 160
        for number in range(4):
            mine = [entry for entry in entries if entry[0] == number]
            assert mine == sorted(mine)

    def test_an_entry_stands_behind_those_whose_append_had_returned(
        self, log: Log, other: Log
    ) -> None:
        last = 0
        for at in range(20):
            position = (log, other)[at % 2].append(b"x")
            assert position > last
            last = position

    def test_readers_see_a_prefix_while_others_write(self, log: Log, other: Log) -> None:
        written = 120
        done = threading.Event()

        def play(_: int) -> list[Appended]:
            seen: list[Appended] = []
            while len(seen) < written:
                after = seen[-1].position if seen else 0
                assert other.wait(after, PATIENCE_S)
                seen += other.read(after, limit_bytes=3_000)
            done.set()
            return seen

        def write(number: int) -> list[Appended]:
            if number < 2:
                return play(number)
            for at in range(written // 2):
                log.append(b"%d/%d" % (number, at) + bytes(300))
            return []

        seen = in_threads(4, write)[:2]
        assert done.is_set()
        assert seen[0] == seen[1] == _read_all(log)

    def test_a_closed_log_refuses_everything_and_wakes_who_waits(
        self, log: Log, open_log: MakeLog
    ) -> None:
        log.append(b"kept")
        woken = threading.Event()

        def follow() -> None:
            try:
                log.wait(1 << 40, timeout_s=PATIENCE_S)
            except ClosedError:
                woken.set()

        thread = threading.Thread(target=follow)
        thread.start()
        time.sleep(0.02)
        log.close()
        log.close()
        thread.join(PATIENCE_S)
        assert woken.is_set()
        calls: list[Callable[[], object]] = [
            lambda: log.append(b"x"),
            lambda: log.read(0),
            log.end,
            lambda: log.wait(0, 0),
            lambda: log.trim(1, b""),
        ]
        for call in calls:
            with pytest.raises(ClosedError):
                call()


def _read_all(log: Log, limit_bytes: int = 1 << 20, after: int = 0) -> list[Appended]:
    """Read to the end in steps, each of which must go on where the last one stopped."""
    found: list[Appended] = []
    while more := log.read(found[-1].position if found else after, limit_bytes):
        size = sum(len(item.entry) for item in more)
        assert len(more) == 1 or size <= limit_bytes
        found += more
    return found
