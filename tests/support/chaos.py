"""A storm over a pool in a bucket: clients of several hosts that do a bit of everything, and the
audit of what they left.

    python -m support.chaos URL CACHE FOLDER CLIENT     a client, until there is FOLDER/stop

Each client notes in a file of its own what it is about to commit, and afterwards what became of
it: `a` acknowledged, or settled as committed by `outcome`; `x` never committed, as it was told. A
note is one `write`: no SIGKILL takes it back. What has neither note was in doubt when its client
was killed: it may have happened or not. A note names the places that it changes and what they hold
then, so that the audit knows for every place what it may hold.

Clients also record a history for the checker of `everpool.testing.history`, and one more process
samples what is there at some versions.
"""

import contextlib
import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import everpool
from everpool import CommitUnknownError, ConflictError, NotFoundError, UnavailableError
from everpool.agent import starting
from everpool.agent.past import History, PastEngine
from everpool.store import open_store
from everpool.testing import history
from support import patched_agent
from support.scenes import number_of, pattern

ACCOUNTS = 12
START = 1000
CELLS = 4
_ROOM = 256 << 10
# One stretch of memory for each size: in a block, over a border, over several blocks.
_STRETCHES = (8, 6000, 140_000)
_SMALL = 6
_LARGE_BYTES = 200_000
_TIMEOUT_S = 5.0
Doing = tuple[dict[str, Any], Callable[[Any], Any]]


def prepare(pool: Any, clients: int) -> None:
    """Make the objects that the storm goes over."""
    pool.allocate_array("accounts", ACCOUNTS, "i8")[:] = START
    pool.allocate_array("counters", CELLS, "i8")
    for client in range(clients):
        pool.allocate(f"memory/{client}", _ROOM * len(_STRETCHES))
    history.prepare(pool)


class Notes:
    """What one client was about to do, and what became of it."""

    def __init__(self, folder: Path, client: int) -> None:
        self._path = folder / f"notes.{client}"
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._number = len(self._path.read_bytes())

    def intend(self, places: dict[str, Any]) -> int:
        """Note what will be where; returns a number that was never used."""
        self._number += 1
        self._add(self._number, "i", places)
        return self._number

    def settle(self, number: int, state: str) -> None:
        self._add(number, state, None)

    def _add(self, *line: Any) -> None:
        data = json.dumps(line).encode() + b"\n"
        assert os.write(self._descriptor, data) == len(data)


# Clients


def open_patiently(url: str, cache: Path) -> Any:
    """Open the pool, when the bucket is there again."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return everpool.open(url, create=False, cache_dir=cache, timeout_s=_TIMEOUT_S)
        except UnavailableError:
            if time.monotonic() > deadline:
                raise


class Client:
    def __init__(self, url: str, cache: Path, folder: Path, client: int) -> None:
        self.client = client
        self.folder = folder
        self.choose = random.Random()
        self.notes = Notes(folder, client)
        # No number is used twice, whatever happens to a client.
        self.numbers = time.time_ns()
        life = len(list(folder.glob(f"history.{client}.*")))
        self.recorder = history.Recorder(
            folder / f"history.{client}.{life}", client=client + 100 * life
        )
        self.pool = open_patiently(url, cache)

    def live(self) -> None:
        duties = [
            *(self.move for _ in range(4)),
            *(self.count for _ in range(3)),
            *(self.put for _ in range(2)),
            self.put_large,
            *(self.write for _ in range(2)),
            self.renew,
            self.delete,
            *(self.record for _ in range(4)),
        ]
        while not (self.folder / "stop").exists():
            if self.choose.random() < 0.01:
                with contextlib.suppress(UnavailableError):
                    self.pool.checkpoint()
            doing = self.choose.choice(duties)()
            if doing is not None:
                places, act = doing
                number = self.notes.intend(places)
                self.notes.settle(number, self.attempt(act))
        self.pool.close()

    def attempt(self, act: Callable[[Any], Any]) -> str:
        """Do it, and settle what became of it."""
        try:
            act(self.pool)
            return "a"
        except (ConflictError, UnavailableError, NotFoundError):
            return "x"
        except CommitUnknownError as error:
            id = error.id
        assert isinstance(id, everpool.RecordId)
        (self.folder / "unknown").touch()
        while True:
            with contextlib.suppress(UnavailableError):
                outcome = self.pool.outcome(id)
                # Outcomes are kept for a while only, which is short here.
                return {"committed": "a", "aborted": "x", "expired": "?"}[outcome.state]

    def fresh(self) -> int:
        self.numbers += 1
        return self.numbers

    def move(self) -> Doing:
        giver, taker = self.choose.sample(range(ACCOUNTS), 2)
        amount = self.choose.randint(1, 50)
        book = f"books/{self.fresh()}"

        def act(pool: Any) -> None:
            with pool.transaction() as tx:
                accounts = tx.array("accounts")
                accounts[giver] -= amount
                accounts[taker] += amount
                tx[book] = [giver, taker, amount]

        return {book: [giver, taker, amount]}, act

    def count(self) -> Doing:
        cell = self.choose.randrange(CELLS)
        return {f"+{cell}": 1}, lambda pool: pool.array("counters").fetch_add(cell, 1)

    def put(self) -> Doing:
        name, number = f"small/{self.client}/{self.choose.randrange(_SMALL)}", self.fresh()
        return {name: number}, lambda pool: pool.__setitem__(name, number)

    def delete(self) -> Doing:
        name = f"small/{self.client}/{self.choose.randrange(_SMALL)}"
        return {name: 0}, lambda pool: pool.pop(name, None)

    def put_large(self) -> Doing:
        name, number = f"large/{self.client}", self.fresh()
        return {name: number}, lambda pool: pool.__setitem__(name, pattern(number, _LARGE_BYTES))

    def write(self) -> Doing:
        name, number = f"memory/{self.client}", self.fresh()
        at = self.choose.randrange(len(_STRETCHES))
        data = pattern(number, _STRETCHES[at])
        return {f"{name}#{at}": number}, lambda pool: pool.memory(name).write(at * _ROOM, data)

    def renew(self) -> Doing:
        name, number = f"memory/{self.client}", self.fresh()

        def act(pool: Any) -> None:
            with pool.transaction() as tx:
                del tx[name]
                memory = tx.allocate(name, _ROOM * len(_STRETCHES))
                memory.write(0, pattern(number, _STRETCHES[0]))

        left = {f"{name}#{at}": 0 for at in range(len(_STRETCHES))}
        return {**left, f"{name}#0": number}, act

    def record(self) -> None:
        with contextlib.suppress(UnavailableError):
            history.play(self.pool, self.recorder, self.choose)


class Process:
    """A client, or the one that samples, in a process of its own."""

    def __init__(self, url: str, cache: Path, folder: Path, client: int | str) -> None:
        """`client` is its number, or "sampler"."""
        self._arguments = [url, os.fspath(cache), os.fspath(folder), str(client)]
        self._output = folder / f"output.{client}"
        self.start()

    def start(self) -> None:
        path = [os.fspath(Path(__file__).parents[1]), *filter(None, sys.path)]
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.chaos", *self._arguments],
                stdout=output,
                stderr=output,
                env=dict(os.environ, PYTHONPATH=os.pathsep.join(path)),
            )

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def check(self) -> None:
        """Fail when it has ended by itself."""
        assert not self._process.poll(), self._output.read_text()[-4000:]

    def join(self) -> None:
        """Wait until it has ended well."""
        try:
            status = self._process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it does not end: {self._output.read_text()}") from None
        assert not status, self._output.read_text()[-4000:]


# Samples


def sample(pool: Any) -> tuple[int, Any]:
    """Return what is in a part of the pool, and the version that it is of."""
    while True:
        with contextlib.suppress(ConflictError), pool.transaction() as tx:
            part = _part(tx)
            return tx.snapshot, part


def _part(pool: Any) -> Any:
    cells = pool.array("counters")[:].tolist()
    names = {name: pool[name] for name in pool.names("small/")}
    return [pool.array("accounts")[:].tolist(), cells, names]


def keep_sampling(url: str, cache: Path, folder: Path) -> None:
    pool = open_patiently(url, cache)
    with (folder / "samples").open("a", buffering=1) as file:
        while not (folder / "stop").exists():
            with contextlib.suppress(UnavailableError):
                file.write(json.dumps(sample(pool)) + "\n")
            time.sleep(0.1)
    pool.close()


# The audit


def _notes_of(folder: Path) -> Iterator[list[tuple[dict[str, Any], str]]]:
    """Yield, for each client, what it intended, in order, and what it knew to have come of it."""
    for path in folder.glob("notes.*"):
        intended: dict[int, dict[str, Any]] = {}
        states: dict[int, str] = {}
        for line in path.read_text().splitlines():
            number, kind, places = json.loads(line)
            if kind == "i":
                intended[number] = places
            else:
                states[number] = kind
        yield [(places, states.get(number, "?")) for number, places in intended.items()]


def audit(pool: Any, folder: Path) -> int:
    """Compare the pool with the notes; returns how much was acknowledged."""
    pool.sync()
    found = _found(pool)
    possible: dict[str, list[Any]] = {}
    least, most = [0] * CELLS, [0] * CELLS
    acknowledged = 0
    for notes in _notes_of(folder):
        for places, state in notes:
            acknowledged += state == "a"
            for place, value in places.items():
                if place.startswith("+"):
                    least[int(place[1:])] += state == "a"
                    most[int(place[1:])] += state != "x"
                    continue
                allowed = possible.setdefault(place, [0])
                if state == "a":
                    possible[place] = [value]
                elif state == "?":
                    allowed.append(value)
    for place, allowed in possible.items():
        there = found.pop(place, 0)
        assert there in allowed, f"{place} holds {there}, and may hold {allowed}"
    left = {place for place, value in found.items() if value and not place.startswith("memory/")}
    assert not left, f"nobody wrote {left}"
    counters = pool.array("counters")[:].tolist()
    for cell, value in enumerate(counters):
        assert least[cell] <= value <= most[cell], f"{least} <= {counters} <= {most}"
    balances = [START] * ACCOUNTS
    for name in pool.names("books/"):
        giver, taker, amount = pool[name]
        balances[giver] -= amount
        balances[taker] += amount
    assert pool.array("accounts")[:].tolist() == balances
    return acknowledged


def _found(pool: Any) -> dict[str, Any]:
    found = {name: pool[name] for name in pool.names("books/")}
    found |= {name: pool[name] for name in pool.names("small/")}
    found |= {name: number_of(pool[name]) for name in pool.names("large/")}
    for name in pool.names("memory/"):
        for at, size in enumerate(_STRETCHES):
            data = pool.memory(name).read(at * _ROOM, size)
            found[f"{name}#{at}"] = number_of(data)
    return found


def check_history(pool: Any, folder: Path) -> None:
    """No client may have seen what no serial order explains."""
    recorded = history.load(sorted(folder.glob("history.*")))
    problems = history.check(recorded, history.final_state(pool))
    assert not problems, problems[:5]


def digest(pool: Any) -> str:
    """Return a hash of all names, values and memory."""
    whole = hashlib.blake2b()
    for name in pool.names():
        value = pool[name]
        if hasattr(value, "fetch_add") and hasattr(value, "view"):
            memory = pool.memory(name)
            value = bytes(memory.read(0, memory.size))
        whole.update(pickle.dumps((name, value)))
    return whole.hexdigest()


def check_agreement(pools: list[Any]) -> None:
    """All replicas have played the same log, and hold the same."""
    deadline = time.monotonic() + 30
    while True:
        for pool in pools:
            pool.sync()
        states = [pool.engine().replica.state() for pool in pools]
        if len({state.position for state in states}) == 1:
            break
        assert time.monotonic() < deadline, "checkpoints do not end"
    facts = {
        (s.version, s.hash, s.names, s.next_id, s.floor, s.checkpoint, s.manifest) for s in states
    }
    assert len(facts) == 1, states
    check_verdicts(pools)
    assert len({digest(pool) for pool in pools}) == 1
    for pool in pools:
        report = pool.verify()
        assert report.ok, report


def check_verdicts(pools: list[Any]) -> None:
    """All replicas have judged alike the records that they remember."""
    known: dict[int, list[tuple[int, str]]] = {}
    for pool in pools:
        index = pool.engine().replica.index
        with index.read() as txn:
            for version, row in index.tail_backwards(txn):
                verdicts = [(outcome.verdict, outcome.detail) for outcome in row.outcomes]
                assert known.setdefault(version, verdicts) == verdicts, version


@contextlib.contextmanager
def played_from_the_start(pool: Any, url: str, version: int) -> Iterator[Any]:
    """The pool as it was, by playing every entry that there ever was, without a checkpoint."""
    id = pool.engine().replica.state().pool
    folder = pool.engine().folder / "past"

    def acquire(create: bool) -> Any:
        store = open_store(url)
        history = History(store, "", "")
        return PastEngine(folder, store, history, id, version, 30.0, (acquire, ()))

    with everpool.Pool(url, acquire, create=False, read_only=True) as past:
        yield past


def check_the_past(pool: Any, url: str, folder: Path, count: int, choose: random.Random) -> None:
    """Versions are what they were when they were the newest, and what all entries make of them."""
    samples = dict(json.loads(line) for line in (folder / "samples").read_text().splitlines())
    for version in choose.sample(sorted(samples), min(count, len(samples))):
        with pool.at(version) as past:
            assert json.loads(json.dumps(_part(past))) == samples[version], version
    now = pool.sync()
    for version in [now, *(choose.randint(1, now) for _ in range(count // 4))]:
        with pool.at(version) as past, played_from_the_start(pool, url, version) as whole:
            assert digest(past) == digest(whole), version


def main() -> None:
    url, cache, folder, client = sys.argv[1:]
    starting.start = patched_agent.start
    if client == "sampler":
        keep_sampling(url, Path(cache), Path(folder))
    else:
        Client(url, Path(cache), Path(folder), int(client)).live()


if __name__ == "__main__":
    main()
