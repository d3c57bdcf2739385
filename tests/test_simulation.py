"""The rules under faults: every seed holds with all of them, and some seed fails without each."""

import os
import subprocess
import sys

import pytest

from everpool.errors import CorruptionError
from everpool.log.memory import MemoryLog
from everpool.records import EMPTY_HASH, Entry, Put, Record, encode_entry, next_hash
from everpool.testing.memory_replica import MemoryReplica
from everpool.testing.simulation import Settings, Violation, simulate
from everpool.verdict import Judge
from support import mutants

SOAK = os.environ.get("EVERPOOL_SOAK") == "1"
SEEDS = 20_000 if SOAK else 160
CHUNK = 500 if SOAK else 40
EVENTS = {
    "told committed",
    "told aborted",
    "told expired",
    "sent again",
    "lost entry",
    "doubled entry",
    "fence",
    "checkpoint",
    "started from a checkpoint",
    "session renewed",
    "killed",
    "power cut",
    "disk lost",
}


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_all_promises_hold(first: int) -> None:
    events: set[str] = set()
    verdicts: set[str] = set()
    for seed in range(first, first + CHUNK):
        report = simulate(seed)
        events |= set(report.events)
        verdicts |= set(report.verdicts)
    assert events >= EVENTS, "a fault never happened"
    assert len(verdicts) == 10, "a verdict was never given"


@pytest.mark.parametrize(
    "settings",
    [
        Settings(crash=0.03),
        Settings(hosts=1, sessions=1, window=9),
        Settings(hosts=5, sessions=3, attempts=200),
        Settings(lost=0.5, doubled=0.4, late=0.3),
        Settings(steward_every=40, floor_lag=3),
        Settings(asked=0.6, window=8),
        Settings(lost=0, doubled=0, late=0, crash=0),
    ],
    ids=["crashes", "alone", "crowd", "bad network", "hasty stewards", "many fences", "calm"],
)
def test_all_promises_hold_in_other_weather(settings: Settings) -> None:
    for seed in range(200 if SOAK else 5):
        simulate(seed, settings)


# Each rule that is switched off, with the number of seeds within which a simulation notices.
MUTANTS = {
    mutants.NoDuplicateCheck: 5,
    mutants.NoGapCheck: 5,
    mutants.FencesIgnored: 20,
    mutants.OneFenceARecord: 40,
    mutants.ForgottenSessionsAccepted: 80,
    mutants.SessionsKeptByWhoHasThem: 20,
    mutants.FloorIgnored: 40,
    mutants.FloorFollowsTheLastSteward: 40,
    mutants.AbortsNotCounted: 5,
    mutants.NamesIgnored: 5,
    mutants.PrefixesIgnored: 5,
    mutants.RangesIgnored: 5,
    mutants.RangesMissTheirLastByte: 80,
    mutants.OnlyTheLastVersionLooked: 5,
    mutants.DeletesNotNotedForReaders: 40,
    mutants.ObjectsComparedByName: 10,
    mutants.VerdictByWhatIsLoaded: 5,
    mutants.WritesNotInTheCheckpoint: 20,
    mutants.SessionsNotInTheCheckpoint: 10,
    mutants.FencesNotInTheCheckpoint: 40,
    mutants.RedoAddsAgain: 80,
    mutants.MemoryBeforeTheTail: 80,
    mutants.NoRedo: 10,
    mutants.TailCutBeforeTheFlush: 10,
    mutants.MarkTrustedAfterReboot: 10,
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_each_rule_switched_off_is_caught(mutant: type) -> None:
    replica = mutants.judged_by(mutant) if issubclass(mutant, Judge) else mutant
    for seed in range(MUTANTS[mutant]):
        try:
            simulate(seed, replica_type=replica)
        except Violation as error:
            assert str(error).startswith(f"seed {seed}: ")
            return
    pytest.fail(f"{MUTANTS[mutant]} seeds did not show it")


def test_every_mutant_is_on_the_list() -> None:
    defined = {
        kind
        for name, kind in vars(mutants).items()
        if isinstance(kind, type) and kind.__module__ == mutants.__name__ and name[0] != "_"
    }
    assert defined == set(MUTANTS)


def test_a_seed_is_one_history_in_every_process() -> None:
    script = (
        "from everpool.testing.simulation import simulate\n"
        "for seed in range(3):\n"
        "    report = simulate(seed)\n"
        "    print(report.hash.hex(), sorted(report.verdicts.items()))\n"
        "    print(sorted(report.events.items()))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(outputs) == 1 and outputs.pop().count("\n") == 6
    assert simulate(1).hash != simulate(2).hash


def entry(replica: MemoryReplica, sequence: int, value: bytes) -> bytes:
    record = Record(replica.version, [], [], [], [Put("name", value)])
    return encode_entry(Entry(bytes(16), sequence, replica.position, replica.hash, [record]))


def test_a_writer_with_another_history_is_noticed() -> None:
    log, replica, other = MemoryLog(), MemoryReplica(), MemoryReplica()
    log.append(entry(replica, 1, b"a"))
    replica.apply(log.read(0)[0])
    other.apply(log.read(0)[0]._replace(entry=entry(other, 1, b"b")))
    log.append(entry(other, 2, b"c"))
    with pytest.raises(CorruptionError, match="another log up to 1"):
        replica.apply(log.read(1)[0])


def test_a_log_that_lost_its_tail_is_noticed() -> None:
    log, replica = MemoryLog(), MemoryReplica()
    for sequence in (1, 2):
        log.append(entry(replica, sequence, b"a"))
        replica.apply(log.read(replica.position)[0])
    shorter = MemoryLog()
    shorter.append(log.read(0)[0].entry)
    late = MemoryReplica()
    late.apply(shorter.read(0)[0])
    shorter.append(entry(late, 2, b"other"))
    with pytest.raises(CorruptionError, match="lost its tail"):
        replica.apply(shorter.read(1)[0])
    shorter.append(entry(replica, 3, b"behind"))
    late.apply(shorter.read(1)[0])
    with pytest.raises(CorruptionError, match="another log up to 2"):
        late.apply(shorter.read(2)[0])


def test_a_checkpoint_is_checked() -> None:
    replica = MemoryReplica()
    for data in (b"", b"nonsense", replica.checkpoint()[:-1], replica.checkpoint() + b"x"):
        with pytest.raises(CorruptionError):
            MemoryReplica.from_checkpoint(data)
    assert next_hash(EMPTY_HASH, b"") != MemoryReplica.from_checkpoint(replica.checkpoint()).hash
