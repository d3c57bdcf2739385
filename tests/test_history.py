"""The history checker: what it must find, what it must not, and real histories of processes."""

import json
import multiprocessing
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import everpool
from everpool.testing import history
from everpool.testing.history import Problem, Recorder
from everpool.testing.reference import ReadSet, ReferencePool, WriteSet, conflict

Rule = Callable[[ReadSet, list[WriteSet]], str | None]


def no_rule(reads: ReadSet, later: list[WriteSet]) -> str | None:
    return None


def ranges_only(reads: ReadSet, later: list[WriteSet]) -> str | None:
    return conflict(ReadSet(ranges=reads.ranges), later)


def names_only(reads: ReadSet, later: list[WriteSet]) -> str | None:
    return conflict(ReadSet(names=reads.names), later)


def last_commit_only(reads: ReadSet, later: list[WriteSet]) -> str | None:
    return conflict(reads, later[-1:])


def recorded_in_threads(tmp_path: Path, rule: Rule) -> list[Problem]:
    """Let four threads play on a reference pool with this rule, and check what they recorded."""
    pool = ReferencePool(rule=rule)
    history.prepare(pool)
    paths = [tmp_path / f"{number}.jsonl" for number in range(4)]

    def client(number: int) -> None:
        mine = pool.connect()
        recorder = Recorder(paths[number], number)
        choose = random.Random(number)
        for _ in range(60):
            history.play(mine, recorder, choose)
        recorder.close()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return history.check(history.load(paths), history.final_state(pool))


def test_the_right_rule_passes(tmp_path: Path) -> None:
    assert recorded_in_threads(tmp_path, conflict) == []


@pytest.mark.parametrize("rule", [no_rule, ranges_only, names_only, last_commit_only])
def test_a_broken_rule_is_caught(tmp_path: Path, rule: Rule) -> None:
    problems = recorded_in_threads(tmp_path, rule)
    assert "cycle" in {problem.kind for problem in problems}


class Lines:
    """Writes a history by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self.now = 0

    def add(self, event: str, label: str, **facts: Any) -> None:
        self.now += 1
        client = int(label.split("/")[0])
        facts = {"client": client, "at_ns": self.now, **facts}
        self.lines.append({"event": event, "t": label, **facts})

    def begin(self, label: str, seen: int = 0) -> None:
        self.add("begin", label, began_ns=self.now, seen=seen)

    def end(
        self,
        label: str,
        version: int | None,
        reads: dict[str, int] | None = None,
        writes: dict[str, int] | None = None,
        state: str = "committed",
    ) -> None:
        self.add("try", label, reads=reads or {}, writes=writes or {})
        if state != "killed":
            self.add("end", label, state=state, version=version, reads=reads or {})

    def check(self, final: dict[str, int] | None = None) -> list[str]:
        """Return the kinds of what is found."""
        self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        return sorted({problem.kind for problem in history.check(history.load([self.path]), final)})


@pytest.fixture
def lines(tmp_path: Path) -> Lines:
    return Lines(tmp_path / "history.jsonl")


def test_a_serial_history_passes(lines: Lines) -> None:
    for number in range(1, 5):
        lines.begin(f"{number % 2}/{number}")
        lines.end(f"{number % 2}/{number}", number, {"x": number - 1}, {"x": number})
    assert lines.check({"x": 4}) == []


def test_a_lost_update_is_a_cycle(lines: Lines) -> None:
    lines.begin("1/1")
    lines.begin("2/1")
    lines.end("1/1", 1, {"x": 0}, {"x": 11})
    lines.end("2/1", 2, {"x": 0}, {"x": 21})
    assert lines.check({"x": 21}) == ["cycle"]


def test_a_write_skew_is_a_cycle(lines: Lines) -> None:
    lines.begin("1/1")
    lines.begin("2/1")
    lines.end("1/1", 1, {"x": 0, "y": 0}, {"x": 11})
    lines.end("2/1", 2, {"x": 0, "y": 0}, {"y": 21})
    assert lines.check() == ["cycle"]


def test_a_mix_of_versions_is_a_cycle_even_when_it_was_only_read(lines: Lines) -> None:
    for state in ("committed", "aborted"):
        lines.lines.clear()
        lines.begin("1/1")
        lines.begin("2/1")
        lines.end("1/1", 1, {}, {"x": 11, "y": 12})
        lines.end("2/1", None, {"x": 11, "y": 0}, state=state)
        assert lines.check() == ["cycle"]


def test_a_blind_write_between_is_no_cycle(lines: Lines) -> None:
    lines.begin("1/1")
    lines.begin("2/1")
    lines.end("1/1", 1, {}, {"x": 11})
    lines.end("2/1", 2, {}, {"x": 21})
    assert lines.check({"x": 21}) == []


def test_an_acknowledged_write_that_is_missing_is_lost(lines: Lines) -> None:
    lines.begin("1/1")
    lines.end("1/1", 1, {}, {"x": 11})
    lines.begin("1/2", seen=1)
    lines.end("1/2", 2, {}, {"x": 12})
    assert lines.check({"x": 11}) == ["lost"]
    assert lines.check({"x": 0}) == ["lost"]
    assert lines.check({"x": 12}) == []


def test_a_commit_that_was_killed_may_be_there_or_not(lines: Lines) -> None:
    lines.begin("1/1")
    lines.end("1/1", 1, {}, {"x": 11})
    lines.begin("2/1")
    lines.end("2/1", None, {"x": 11}, {"x": 21, "y": 22}, state="killed")
    assert lines.check({"x": 11, "y": 0}) == []
    assert lines.check({"x": 21, "y": 22}) == []


def test_half_of_a_killed_commit_is_noticed_by_who_reads_it(lines: Lines) -> None:
    lines.begin("2/1")
    lines.end("2/1", None, {}, {"x": 21, "y": 22}, state="killed")
    lines.begin("1/1")
    lines.end("1/1", 2, {"x": 21}, {"z": 11})
    assert lines.check({"x": 21, "y": 0, "z": 11}) == ["lost"]
    lines.begin("3/1")
    lines.end("3/1", None, {"x": 21, "y": 0})
    assert lines.check() == ["cycle"]


def test_what_was_aborted_or_never_written_is_a_phantom(lines: Lines) -> None:
    lines.begin("1/1")
    lines.end("1/1", None, {}, {"x": 11}, state="aborted")
    lines.begin("2/1")
    lines.end("2/1", None, {"x": 11})
    assert lines.check() == ["phantom"]
    assert lines.check({"y": 99}) == ["phantom"]


def test_one_version_for_two_commits_is_doubled(lines: Lines) -> None:
    lines.begin("1/1")
    lines.begin("2/1")
    lines.end("1/1", 1, {}, {"x": 11})
    lines.end("2/1", 1, {}, {"y": 21})
    assert lines.check() == ["doubled"]


def test_two_versions_for_one_commit_are_doubled(lines: Lines) -> None:
    lines.begin("1/1")
    lines.end("1/1", 1, {}, {"x": 11})
    lines.end("1/1", 2, {}, {"x": 11})
    assert lines.check() == ["doubled"]


def test_a_read_older_than_what_was_known_is_stale(lines: Lines) -> None:
    lines.begin("1/1")
    lines.end("1/1", 1, {}, {"x": 11})
    lines.begin("2/1", seen=1)
    lines.end("2/1", None, {"x": 0})
    assert "stale" in lines.check()


def test_a_sync_that_misses_an_acknowledged_commit_is_stale(lines: Lines) -> None:
    lines.begin("1/1")
    lines.end("1/1", 5, {}, {"x": 11})
    lines.add("sync", "2/", began_ns=lines.now + 1, version=4)
    assert lines.check() == ["stale"]


def test_a_later_commit_of_a_lower_version_is_out_of_order(lines: Lines) -> None:
    lines.begin("1/1")
    lines.end("1/1", 5, {}, {"x": 11})
    lines.now += 1
    lines.begin("2/1")
    lines.end("2/1", 4, {}, {"y": 21})
    assert "order" in lines.check()


def test_a_line_cut_off_by_a_kill_is_passed_over(lines: Lines) -> None:
    lines.begin("1/1")
    lines.end("1/1", 1, {}, {"x": 11})
    lines.check()
    with lines.path.open("a") as file:
        file.write('{"event": "begin", "t": "1/')
    assert history.check(history.load([lines.path]), {"x": 11}) == []


def _play_in_process(folder: str, path: str, number: int, transactions: int) -> None:
    with everpool.open(f"{folder}/pool", create=False) as pool:
        recorder = Recorder(path, number)
        choose = random.Random(number)
        for _ in range(transactions):
            history.play(pool, recorder, choose)


def check_killed_processes(tmp_path: Path, seed: int) -> None:
    """Three processes run to their end; others are killed at random moments meanwhile."""
    choose = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["everpool", "everpool.testing.history", "pytest"])
    paths: list[Path] = []

    def start(transactions: int) -> Any:
        paths.append(tmp_path / f"{len(paths)}.jsonl")
        number = 1000 * seed + len(paths)
        process = context.Process(
            target=_play_in_process, args=(str(tmp_path), str(paths[-1]), number, transactions)
        )
        process.start()
        return process

    with everpool.open(tmp_path / "pool") as pool:
        history.prepare(pool)
        workers = [start(150) for _ in range(3)]
        for _ in range(6):
            victim = start(100_000)
            time.sleep(choose.uniform(0.05, 0.3))
            victim.kill()
            victim.join()
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
        recorded = history.load(path for path in paths if path.exists())
        assert sum(tx.state == "committed" for tx in recorded.transactions) > 300
        assert any(tx.state == "aborted" for tx in recorded.transactions)
        assert history.check(recorded, history.final_state(pool)) == [], f"seed {seed}"


def test_a_history_of_processes_that_are_killed_is_serializable(tmp_path: Path) -> None:
    check_killed_processes(tmp_path, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 200))
def test_many_histories_of_killed_processes_are_serializable(tmp_path: Path, seed: int) -> None:
    check_killed_processes(tmp_path, seed)
