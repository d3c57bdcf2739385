"""The reference log keeps what `Log` promises."""

from pathlib import Path

import pytest

from everpool.log import Log
from everpool.log.memory import MemoryLog, Tape
from everpool.testing.conformance.log import LogConformance


class TestMemory(LogConformance):
    @pytest.fixture(autouse=True)
    def tape(self) -> None:
        self._tape = Tape()

    def make_log(self, tmp_path: Path) -> Log:
        return MemoryLog(tape=self._tape)


def test_the_time_of_an_entry_never_falls() -> None:
    times = iter([5, 3, 9, 9, 1])
    log = MemoryLog(clock_ns=lambda: next(times))
    for _ in range(5):
        log.append(b"x")
    assert [item.time_ns for item in log.read(0)] == [5, 5, 9, 9, 9]
