"""What is asked of a pool after a power cut; a process of its own, for one cut after another.

Each cut is opened under a boot id of its own, read-only first, then for writing, then once more.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import traceback
import uuid
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

import everpool
from everpool.records import Put, Write
from everpool.replica.effects import entry_of
from everpool.replica.index import BULK
from everpool.replica.verify import _Checker

from .power_loss_mutants import apply_mutant
from .power_loss_script import ACCOUNTS, BANK, OPENING_BALANCE, TOTAL, State, digest
from .processes import Child

PATIENCE_S = 120
MINE = "audit/"


class Job(msgspec.Struct):
    """A cut and what was promised before it.

    Of each actor `states` are what its names may hold, and `shared` what it may have added to
    the common counter by then. `outcomes` are ids of records that were acknowledged, and their
    versions. `thorough` asks for the slow checks too.
    """

    path: str
    created: bool
    stocked: bool
    version: int
    states: dict[str, list[State]] = {}
    shared: dict[str, list[int]] = {}
    outcomes: list[tuple[str, int]] = []
    seed: int = 0
    thorough: bool = False


class Answer(msgspec.Struct):
    """What was found: `problem` is empty when all is well.

    `read_only` says whether the pool could be read before it was opened for writing, `behind`
    whether it could not even be opened, since its newest commit was in the ring only.
    """

    problem: str = ""
    read_only: bool = False
    behind: bool = False


class Look(msgspec.Struct):
    """All that a pool shows."""

    version: int
    names: State
    bank: list[int] | None = None
    total: int | None = None
    transfers: list[tuple[int, int, int]] = []


def look(pool: everpool.Pool) -> Look:
    """Read everything."""
    found = Look(pool.version, {}, transfers=[])
    for name in pool.names():
        if name == BANK:
            found.bank = pool.array(BANK)[...].tolist()
        elif name == TOTAL:
            found.total = int.from_bytes(pool.memory(TOTAL).read(0, 8), "little")
        else:
            held = pool[name]
            if isinstance(held, everpool.Memory):
                found.names[name] = digest("memory", held.read(0, held.size))
                continue
            found.names[name] = digest("value", held)
            if "/audit/" in name:
                source, target, amount = map(int, bytes(held).split())
                found.transfers.append((source, target, amount))
    return found


def audit(job: Job) -> Answer:
    """Check one cut. AssertionError, or whatever the pool raised."""
    path = Path(job.path)
    answer = Answer()
    boot()
    before = look_only(path, job, answer)
    with everpool.open(path, create=not job.created) as pool:
        seen = look(pool)
        if before is not None:
            assert same(before, seen), f"read-only showed {shorter(before)}, now {shorter(seen)}"
        check_promises(job, seen)
        check_files(pool)
        check_past(pool, seen, random.Random(job.seed))
        for id, version in job.outcomes:
            found = pool.outcome(id)
            assert found.state == "expired" or (found.state, found.version) == (
                "committed",
                version,
            ), f"{id} was acknowledged as version {version}, and is {found}"
        expected = commit_again(pool, seen, random.Random(job.seed))
    check_sums(path)
    boot()
    with everpool.open(path, create=False) as pool:
        again = look(pool)
        assert same(again, expected, versions=False), (
            f"after one more boot: {shorter(again)} instead of {shorter(expected)}"
        )
        check_files(pool)
        if job.thorough:
            report = pool.verify()
            assert report.ok, f"verify found {report.damage}"
    return answer


def boot() -> None:
    """From now on the machine has booted once more."""
    os.environ["EVERPOOL_BOOT_ID"] = str(uuid.uuid4())


def look_only(path: Path, job: Job, answer: Answer) -> Look | None:
    """Look through a read-only pool; None when it says that it must be opened for writing."""
    answer.behind = True
    try:
        with everpool.open(path, read_only=True) as pool:
            answer.behind = False
            seen = look(pool)
            answer.read_only = True
            return seen
    except everpool.UnavailableError as error:
        assert "for writing" in str(error), f"read-only: {error}"
    except (everpool.InvalidError, everpool.NotFoundError) as error:
        assert not job.created, f"read-only: {error}"
    return None


def same(one: Look, other: Look, *, versions: bool = True) -> bool:
    return (one.names, one.bank, one.total) == (other.names, other.bank, other.total) and (
        not versions or one.version == other.version
    )


def shorter(seen: Look) -> str:
    return f"version {seen.version}, bank {seen.bank}, total {seen.total}, {seen.names}"


def check_promises(job: Job, seen: Look) -> None:
    """Nothing acknowledged is lost, nothing is half, nothing else is there."""
    assert seen.version >= job.version, f"version {seen.version}, acknowledged {job.version}"
    if seen.bank is None or seen.total is None:
        assert not job.stocked and seen.bank is seen.total, "the bank or the counter is gone"
    least = most = 0
    strangers = dict(seen.names)
    for actor, states in job.states.items():
        held = {name: strangers.pop(name) for name in seen.names if name.startswith(f"{actor}/")}
        shared = [n for n, state in zip(job.shared[actor], states, strict=True) if state == held]
        assert shared, f"{actor} holds {differences(held, states)}"
        least += min(shared)
        most += max(shared)
    assert not strangers, f"nobody made {strangers}"
    if seen.total is not None:
        assert least <= seen.total <= most, f"total {seen.total}, not {least} to {most}"
    check_bank(seen)


def differences(held: State, states: list[State]) -> str:
    """How far it is from what it may be."""
    lines = [f"none of {len(states)} states it may be in:"]
    for state in states[:3]:
        names = sorted(n for n in held.keys() | state.keys() if held.get(n) != state.get(n))
        lines += [f"{name}: {held.get(name)} instead of {state.get(name)}" for name in names[:5]]
    return "\n  ".join(lines)


def check_files(pool: everpool.Pool) -> None:
    """No file is there that nothing refers to."""
    assert not list((pool.path / "staging").iterdir()), "something is left in staging/"
    replica = pool.engine().replica
    known: set[str] = set()
    with replica.index.read() as txn:
        state = replica.index.state(txn)
        ids = set(replica.index.memory_ids(txn))
        for _, row in replica.index.tail_after(txn, 0):
            known.update(row.garbage)
            for record in entry_of(row).records:
                for operation in record.operations:
                    payload = operation.payload if isinstance(operation, (Put, Write)) else b""
                    if not isinstance(payload, bytes):
                        known.add(payload.file)
    named = [replica.find(name).row for name in pool.names()]
    assert len(named) == len(pool), f"{len(named)} names, the state says {len(pool)}"
    known.update(row.reference().file for row in named if row and row.kind == BULK)
    left = {name for name, _ in replica.bulk.stored()} - known
    assert not left, f"{left} in values/ belong to nothing"
    files = {int(path.name, 16) for path in (pool.path / "memory").iterdir()}
    assert ids <= files, f"files of memory are missing: {ids - files}"
    # An id that was not given away in the end will be given to the next object.
    lost = {id for id in files - ids if id < state.next_id}
    assert not lost, f"files of memory {lost} belong to nothing"


def check_past(pool: everpool.Pool, seen: Look, pick: random.Random) -> None:
    """What the past shows of now is what there is now, and the versions before are whole."""
    began: int | None = None
    try:
        with pool.at(seen.version) as past:
            now = look(past)
            assert same(now, seen), f"the past shows {shorter(now)}, the pool {shorter(seen)}"
        began = int(pool.engine()._past().marker().began)  # type: ignore[union-attr]
    except everpool.InvalidError as error:
        assert "no past yet" in str(error), error
        return
    for _ in range(3):
        version = pick.randint(began, seen.version)
        try:
            with pool.at(version) as past:
                then = look(past)
                assert past.version == then.version == version
                check_bank(then)
                report = past.verify()
                assert report.ok, f"verify of version {version} found {report.damage}"
        except everpool.InvalidError as error:
            assert "begins with version" in str(error), error


def check_bank(seen: Look) -> None:
    """The balances are what the transfers made of them."""
    if seen.bank is not None:
        balances = [OPENING_BALANCE] * ACCOUNTS
        for source, target, amount in seen.transfers:
            balances[source] -= amount
            balances[target] += amount
        assert balances == seen.bank, f"the bank has {seen.bank}, its transfers say {balances}"


def commit_again(pool: everpool.Pool, seen: Look, pick: random.Random) -> Look:
    """Go on working; returns what the pool must show from now on."""
    expected = msgspec.json.decode(msgspec.json.encode(seen), type=Look)
    for name, size in ((f"{MINE}small", 100), (f"{MINE}large", 100_000)):
        data = pick.randbytes(size)
        pool[name] = data
        expected.names[name] = digest("value", data)
    if seen.total is not None:
        assert pool.memory(TOTAL).fetch_add(0, 5) == seen.total
        expected.total = seen.total + 5
    if seen.bank is not None:
        with pool.transaction() as tx:
            tx.array(BANK)[0] += 1
        expected.bank = [seen.bank[0] + 1, *seen.bank[1:]] if seen.bank else None
    data = pick.randbytes(9000)
    pool.allocate(f"{MINE}memory", 9000).write(0, data)
    expected.names[f"{MINE}memory"] = digest("memory", data)
    if pick.random() < 0.5:
        pool.engine().flush()
    return expected


class Checker(_Checker):
    """`verify` without a process of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.said: list[object] = []

    def say(self, **facts: Any) -> None:
        if "damage" in facts:
            self.said.append(facts["damage"])

    def close(self) -> None:
        with contextlib.suppress(AttributeError):
            self.replica.close()


def check_sums(path: Path) -> None:
    """Compare everything with its checksums."""
    with contextlib.closing(Checker(path)) as checker:
        checker.run(False)
    assert not checker.said, f"damage: {checker.said}"


def answer_jobs(link: Connection, mutant: str) -> None:
    """A child's part: answers one job after another, and removes what was looked at."""
    apply_mutant(mutant)
    while True:
        job: Job = link.recv()
        try:
            answer = audit(job)
        except Exception:
            answer = Answer(traceback.format_exc())
        shutil.rmtree(Path(job.path).parent, ignore_errors=True)
        link.send(answer)


class Auditor:
    """The auditing process, as a test uses it: `submit` a few jobs, then `answer` for each.

    A context manager. `mutant` names what is missing in the pool that it opens.
    """

    def __init__(self, mutant: str = "") -> None:
        self._mutant = mutant
        self._child: Child | None = None

    def __enter__(self) -> Auditor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, job: Job) -> None:
        if self._child is None:
            self._child = Child(answer_jobs, self._mutant)
        with contextlib.suppress(OSError):  # `answer` will tell
            self._child.send(job)

    def answer(self) -> Answer:
        """The answer to the oldest job that has none yet."""
        assert self._child is not None
        try:
            return self._child.receive(PATIENCE_S)
        except (AssertionError, EOFError, OSError) as problem:
            self.close()
            return Answer(f"the audit broke off: {problem}")

    def close(self) -> None:
        """End the process; the next job starts another."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
