"""A storm of kills: writers that do a bit of everything, and the audit of what they left.

Each writer is a process with one thread a duty. A duty notes in a file of its own what it is about
to commit and, when the commit returned, that it did. A note is one `write` to the file: no SIGKILL
takes it back, so nothing that was acknowledged can go missing unnoticed.

    count      additions to numbers, one of its own and one that all share
    move       money moves between accounts, in a transaction with an entry in the books
    replace    one large value is replaced by another, whose name holds its checksum
    write      stretches of memory of all sizes are overwritten; now and then it is made anew
    pipeline   names are bound without waiting for each
"""

import os
import random
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from xxhash import xxh64_hexdigest

import everpool
from support import scenes
from support.processes import Failure
from support.scenes import number_of, pattern

WRITERS = 3
ACCOUNTS = 20
START = 1000
# Value sizes: inline, just above, and of several blocks.
_VALUE_SIZES = (40, 70_000, 70_008, 300_000, 1_500_000)
# One place in memory for each size, so that each has its own number.
_STRETCHES = (8, 5000, 70_000, (1 << 20) + 8)
_ROOM = 2 << 20
_MOST_PIPELINED = 30


def prepare(path: Path | str) -> None:
    """Make the pool that the storm goes over."""
    with everpool.open(path) as pool:
        pool.allocate_array("accounts", ACCOUNTS, "i8")[:] = START
        pool.allocate_array("counters", WRITERS + 1, "i8")
        for writer in range(WRITERS):
            pool.allocate(f"memory/{writer}", _ROOM * len(_STRETCHES))


class Notes:
    """What one duty of one writer was about to do (`i`), and what was acknowledged (`a`)."""

    def __init__(self, folder: Path, duty: str, writer: int) -> None:
        self.path = folder / f"{duty}.{writer}"
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def start(self) -> int:
        """Return the first number that was never used."""
        used = [number for _, number, _ in self.read()]
        self._add("s", 0, 0)
        return max(used, default=0) + 1

    def intend(self, number: int, fact: int = 0) -> None:
        self._add("i", number, fact)

    def acknowledge(self, number: int, fact: int = 0) -> None:
        self._add("a", number, fact)

    def read(self) -> list[tuple[str, int, int]]:
        lines = [line.split() for line in self.path.read_text().splitlines()]
        return [(kind, int(number), int(fact)) for kind, number, fact in lines]

    def forget(self) -> None:
        """Keep the last number only."""
        used = [number for _, number, _ in self.read()]
        self.path.write_text(f"n {max(used, default=0)} 0\n")

    def _add(self, kind: str, number: int, fact: int) -> None:
        line = f"{kind} {number} {fact}\n".encode()
        assert os.write(self._descriptor, line) == len(line)


# Writers


def live(link: Connection, path: Path | str, folder: Path, writer: int) -> None:
    """Be a writer until killed; says what went wrong, should anything."""
    began = time.monotonic()
    pool = everpool.open(path, create=False)
    link.send(time.monotonic() - began)
    mutex = threading.Lock()

    def guarded(duty: str, work: Any) -> None:
        try:
            work(pool, Notes(folder, duty, writer), writer)
        except BaseException:
            with mutex:
                link.send(Failure(f"{duty} of writer {writer}:\n{traceback.format_exc()}"))

    for duty, work in DUTIES.items():
        threading.Thread(target=guarded, args=(duty, work), daemon=True).start()
    threading.Event().wait()


def _count(pool: Any, notes: Notes, writer: int) -> None:
    counters = pool.array("counters")
    for number in _from(notes.start()):
        cell = writer if number % 2 else WRITERS
        notes.intend(number, cell)
        notes.acknowledge(number, counters.fetch_add(cell, 1))


def _move(pool: Any, notes: Notes, writer: int) -> None:
    choose = random.Random()

    for number in _from(notes.start()):
        giver, taker = choose.sample(range(ACCOUNTS), 2)
        amount = choose.randint(1, 50)

        def move(tx: Any, number: int, giver: int, taker: int, amount: int) -> None:
            accounts = tx.array("accounts")
            accounts[giver] -= amount
            accounts[taker] += amount
            tx[f"books/{writer}/{number}"] = [giver, taker, amount]

        notes.intend(number)
        pool.run(lambda tx, facts=(number, giver, taker, amount): move(tx, *facts))
        notes.acknowledge(number)


def _replace(pool: Any, notes: Notes, writer: int) -> None:
    for number in _from(notes.start()):
        size = _VALUE_SIZES[number % len(_VALUE_SIZES)]
        data = random.Random(f"{writer} {number}").randbytes(size)

        def replace(tx: Any, number: int, data: bytes) -> None:
            for name in tx.names(f"value/{writer}/"):
                del tx[name]
            tx[f"value/{writer}/{number}-{xxh64_hexdigest(data)}"] = data

        notes.intend(number)
        pool.run(lambda tx, facts=(number, data): replace(tx, *facts))
        notes.acknowledge(number)


def _write(pool: Any, notes: Notes, writer: int) -> None:
    name = f"memory/{writer}"
    memory = pool.memory(name)
    for number in _from(notes.start()):
        notes.intend(number)
        if number % 25 == 0:
            with pool.transaction() as tx:
                del tx[name]
                fresh = tx.allocate(name, _ROOM * len(_STRETCHES))
                fresh.write(0, pattern(number, _STRETCHES[0]))
            memory = pool.memory(name)
        else:
            at = number % len(_STRETCHES)
            memory.write(at * _ROOM, pattern(number, _STRETCHES[at]))
        notes.acknowledge(number)


def _pipeline(pool: Any, notes: Notes, writer: int) -> None:
    waiting: list[Future[int]] = []
    for number in _from(notes.start()):
        notes.intend(number)
        with pool.transaction(wait=False) as tx:
            tx[f"pipe/{writer}/{number}"] = number
        tx.committed.add_done_callback(
            lambda future, number=number: notes.acknowledge(number, future.result())
        )
        waiting.append(tx.committed)
        if len(waiting) >= _MOST_PIPELINED:
            for future in waiting:
                future.result(60)
            waiting.clear()


DUTIES = {
    "count": _count,
    "move": _move,
    "replace": _replace,
    "write": _write,
    "pipeline": _pipeline,
}


def _from(number: int) -> Iterator[int]:
    while True:
        yield number
        number += 1


# Audits


class Base(NamedTuple):
    """What the numbers were when the notes were last forgotten."""

    accounts: list[int]
    counters: list[int]


FIRST = Base([START] * ACCOUNTS, [0] * (WRITERS + 1))


class Findings(NamedTuple):
    """An audit that found nothing wrong."""

    opened_s: float
    acknowledged: int
    base: Base


def glance(path: Path) -> int:
    """Look at what must hold at every moment, while the writers write; returns the version."""
    with everpool.open(path, create=False) as pool:
        assert pool.array("accounts")[:].sum() == ACCOUNTS * START, "money was made or lost"
        for writer in range(WRITERS):
            for name in pool.names(f"value/{writer}/"):
                data = pool.get(name)
                assert data is None or name.endswith(xxh64_hexdigest(data)), name
            memory = pool.get(f"memory/{writer}")
            for at, size in enumerate(_STRETCHES):
                try:
                    number_of(memory.read(at * _ROOM, size // 8 * 8))
                except (AttributeError, everpool.NotFoundError):
                    break  # it is being made anew
        return int(pool.version)


def audit(path: Path | str, folder: Path, base: Base, thorough: bool) -> Findings:
    """Compare the pool with the notes, when every writer is dead; forget both afterwards."""
    began = time.monotonic()
    with everpool.open(path, create=False) as pool:
        opened_s = time.monotonic() - began
        assert isinstance(path, str) or not scenes.leftovers(pool)
        noted = {
            (duty, writer): Notes(folder, duty, writer)
            for duty in DUTIES
            for writer in range(WRITERS)
        }
        read = {key: notes.read() for key, notes in noted.items()}
        counters = _audit_counters(pool, read, base)
        accounts = _audit_books(pool, read, base)
        for writer in range(WRITERS):
            _audit_value(pool, read["replace", writer], writer)
            _audit_memory(pool, read["write", writer], writer)
            _audit_pipeline(pool, read["pipeline", writer], writer)
        with pool.transaction() as tx:
            for prefix in ("books/", "pipe/"):
                for name in tx.names(prefix):
                    del tx[name]
        for key, notes in noted.items():
            if key[0] not in ("replace", "write"):  # whose state says what came last
                notes.forget()
    if thorough:
        scenes.check_sound(path)
    done = sum(kind == "a" for notes in read.values() for kind, *_ in notes)
    return Findings(opened_s, done, Base(accounts, counters))


_Read = dict[tuple[str, int], list[tuple[str, int, int]]]


def _audit_counters(pool: Any, read: _Read, base: Base) -> list[int]:
    found = pool.array("counters")[:].tolist()
    intended = [0] * (WRITERS + 1)
    olds: list[list[int]] = [[] for _ in range(WRITERS + 1)]
    for writer in range(WRITERS):
        cells = {n: cell for kind, n, cell in read["count", writer] if kind == "i"}
        for cell in cells.values():
            intended[cell] += 1
        for kind, number, old in read["count", writer]:
            if kind == "a":
                olds[cells[number]].append(old)
    for cell, value in enumerate(found):
        least, most = base.counters[cell] + len(olds[cell]), base.counters[cell] + intended[cell]
        assert least <= value <= most, f"cell {cell}: {value} is not within {least} to {most}"
        assert len(set(olds[cell])) == len(olds[cell]), f"cell {cell}: one sum went to two"
        assert all(base.counters[cell] <= old < value for old in olds[cell]), f"cell {cell}"
    return found


def _audit_books(pool: Any, read: _Read, base: Base) -> list[int]:
    with pool.transaction() as tx:
        balances = tx.array("accounts")[:]
        books = {name: tx[name] for name in tx.names("books/")}
    replayed = np.array(base.accounts)
    for giver, taker, amount in books.values():
        replayed[giver] -= amount
        replayed[taker] += amount
    assert balances.tolist() == replayed.tolist(), "the balances are not what the books say"
    for writer in range(WRITERS):
        kept = {
            int(name.rpartition("/")[2]) for name in books if name.startswith(f"books/{writer}/")
        }
        _check_set(f"books/{writer}", kept, read["move", writer])
    return balances.tolist()


def _audit_value(pool: Any, notes: list[tuple[str, int, int]], writer: int) -> None:
    names = list(pool.names(f"value/{writer}/"))
    possible = _possible([(number, 0) for _, number, _ in _intents(notes)], notes)[0]
    if not names:
        assert 0 in possible, f"value/{writer}: the last one is lost"
        return
    (name,) = names
    number, _, checksum = name.rpartition("/")[2].partition("-")
    assert int(number) in possible, f"{name} is not among {possible}"
    assert xxh64_hexdigest(pool[name]) == checksum, f"{name} holds other bytes"


def _audit_memory(pool: Any, notes: list[tuple[str, int, int]], writer: int) -> None:
    memory = pool.memory(f"memory/{writer}")
    writes: list[tuple[int, int]] = []
    for _, number, _ in _intents(notes):
        if number % 25 == 0:
            writes += [(number, at) for at in range(len(_STRETCHES))]
        else:
            writes.append((number, number % len(_STRETCHES)))
    possible = _possible(writes, notes)
    for at, size in enumerate(_STRETCHES):
        found = number_of(memory.read(at * _ROOM, size // 8 * 8))
        allowed = {0 if number % 25 == 0 and at else number for number in possible[at]}
        assert found in allowed, f"memory/{writer}, stretch {at}: {found} is not in {allowed}"


def _audit_pipeline(pool: Any, notes: list[tuple[str, int, int]], writer: int) -> None:
    kept = {int(name.rpartition("/")[2]) for name in pool.names(f"pipe/{writer}/")}
    _check_set(f"pipe/{writer}", kept, notes)
    run: list[int] = []
    for kind, number, _ in [*notes, ("s", 0, 0)]:
        if kind == "i":
            run.append(number)
        elif kind == "s":
            there = [number in kept for number in run]
            assert there == sorted(there, reverse=True), f"pipe/{writer}: not in order: {there}"
            run = []


def _check_set(what: str, kept: set[int], notes: list[tuple[str, int, int]]) -> None:
    """Everything acknowledged must be there, and nothing that nobody intended."""
    intended = {number for _, number, _ in _intents(notes)}
    acknowledged = {number for kind, number, _ in notes if kind == "a"}
    assert acknowledged <= kept, f"{what}: lost {sorted(acknowledged - kept)}"
    assert kept <= intended, f"{what}: nobody wrote {sorted(kept - intended)}"


def _intents(notes: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    return [note for note in notes if note[0] == "i"]


def _possible(
    writes: list[tuple[int, int]], notes: list[tuple[str, int, int]]
) -> dict[int, set[int]]:
    """Return what each place may hold after these (number, place): what is not acknowledged
    may have been done or not."""
    acknowledged = {number for kind, number, _ in notes if kind == "a"}
    possible = {place: {0} for place in range(len(_STRETCHES))}
    for number, place in writes:
        if number in acknowledged:
            possible[place] = {number}
        else:
            possible[place].add(number)
    return possible
