"""What keeps objects in a store, under faults: all seeds hold, and some fail without each rule."""

import os
import subprocess
import sys
from typing import NamedTuple

import pytest

from everpool.testing.simulation import Violation
from everpool.testing.simulation.store import Parts, Settings, simulate_store
from support import store_mutants as mutants

SOAK = os.environ.get("EVERPOOL_SOAK") == "1"
SEEDS = 4_000 if SOAK else 120
CHUNK = 200 if SOAK else 30
EVENTS = {
    "Collect",
    "Pin",
    "Unpin",
    "Restore",
    "Retain",
    "checkpoint",
    "collection refused",
    "somebody else made a checkpoint",
    "restore refused",
    "commit unknown",
    "stale list",
    "request slept",
    "began from a checkpoint",
    "read what was trimmed",
    "host killed",
    "disk lost",
    "steward killed",
    "steward paused",
    "collector killed",
    "collector paused",
    "writer paused",
    "lost swap",
    "late swap",
    "late put",
    "deleted of checkpoints",
    "deleted of index",
    "deleted of pages",
    "deleted of values",
    "deleted of the log",
}
CALM = Settings(refused=0.002, never=0.002, lost=0.003, late=0.002)
QUICK = CALM._replace(
    hosts=2,
    keepers=2,
    rest=100,
    keep_every=120,
    restores=0.05,
    steward_every=100,
    collect_every=60,
    look_every=9_000,
    crash_every=9_000,
    pause=0.005,
    ticks=5_000,
)
SLOW = QUICK._replace(slow=0.6, slow_ticks=2_500, writers=3, retention=0.1, restores=0)
SLEEPY = CALM._replace(
    rest=60,
    lull_every=90_000,
    keep_every=3_000,
    retention=0.1,
    steward_every=80,
    collect_every=80,
    crash_every=9_000,
    interleaved=0.03,
    sleeps=0.004,
    sleep_ticks=5_000,
    pause=0,
    killed=0,
    ticks=8_000,
)
RESTORING = CALM._replace(
    hosts=2,
    writers=1,
    rest=60,
    lull_every=500,
    lull_ticks=8_000,
    slow=0.7,
    slow_ticks=9_000,
    keep_every=800,
    restores=0.5,
    retention=0,
    steward_every=60,
    collect_every=60,
    look_every=9_000,
    crash_every=9_000,
    stale_list=0,
    interleaved=0.02,
    pause=0,
    killed=0,
    ticks=24_000,
)


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_all_that_is_kept_can_be_had(first: int) -> None:
    events: set[str] = set()
    for seed in range(first, first + CHUNK):
        events |= set(simulate_store(seed).events)
    assert events >= EVENTS, "something never happened"


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (QUICK, Parts()),
        (SLEEPY, Parts()),
        (RESTORING, Parts()),
        (Settings(hosts=5, writers=1), Parts()),
        (Settings(crash_every=400, killed=0.02), Parts()),
        (Settings(refused=0.04, never=0.04, lost=0.1, late=0.08), Parts()),
        (Settings(interleaved=0.5), Parts()),
        (Settings(), Parts(steward=mutants.NeverTrims)),
    ],
    ids=[
        "quick",
        "sleepy",
        "restoring",
        "crowd",
        "crashes",
        "bad network",
        "crossing",
        "untrimmed",
    ],
)
def test_all_that_is_kept_can_be_had_in_other_weather(settings: Settings, parts: Parts) -> None:
    for seed in range(300 if SOAK else 4):
        simulate_store(seed, settings, parts)


class Shown(NamedTuple):
    """In which weather, and by which seeds, a mutant is caught."""

    settings: Settings
    seeds: range


DEFAULT = Settings()
MUTANTS = {
    mutants.AnyCheckpointBefore: Shown(DEFAULT, range(40)),
    mutants.LateUploadsAccepted: Shown(QUICK, range(40)),
    mutants.RestoresMayNameAnything: Shown(RESTORING, range(20, 30)),
    mutants.RestoredNotChecked: Shown(DEFAULT, range(40)),
    mutants.PinsNotChecked: Shown(QUICK, range(50, 60)),
    mutants.MoreToKeepNotChecked: Shown(DEFAULT, range(40)),
    mutants.RevivedStaysDead: Shown(DEFAULT, range(20)),
    mutants.PlacesOfSnapshotsDropped: Shown(DEFAULT, range(20)),
    mutants.CheckpointMixesVersions: Shown(DEFAULT, range(20)),
    mutants.DeadBeforeVoid: Shown(SLOW, range(20)),
    mutants.DeletesBeforeTheRecord: Shown(DEFAULT, range(10)),
    mutants.DeletesByClock: Shown(DEFAULT, range(5)),
    mutants.DecidesByAnOldLook: Shown(DEFAULT, range(40)),
    mutants.LogOfSnapshotsDropped: Shown(DEFAULT, range(20)),
    mutants.NewHostsBeginWithWhatGoes: Shown(DEFAULT, range(10)),
    mutants.LostAnswerIsAFailure: Shown(DEFAULT, range(5)),
    mutants.LostAnswerIsASuccess: Shown(DEFAULT, range(5)),
    mutants.NumberedSlots: Shown(SLEEPY, range(20)),
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_each_rule_switched_off_is_caught(mutant: type) -> None:
    settings, seeds = MUTANTS[mutant]
    for seed in seeds:
        try:
            simulate_store(seed, settings, mutants.parts_of(mutant))
        except Violation as error:
            assert str(error).startswith(f"seed {seed}: ")
            return
    pytest.fail(f"{len(seeds)} seeds did not show it")


def test_every_mutant_is_on_the_list() -> None:
    defined = {
        kind
        for name, kind in vars(mutants).items()
        if isinstance(kind, type) and kind.__module__ == mutants.__name__ and name[0] != "_"
    }
    assert defined == {*MUTANTS, mutants.NeverTrims}


def test_a_seed_is_one_history_in_every_process() -> None:
    script = (
        "from everpool.testing.simulation.store import simulate_store\n"
        "for seed in range(3):\n"
        "    report = simulate_store(seed)\n"
        "    print(report.hash.hex(), sorted(report.events.items()))"
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
    assert len(outputs) == 1 and outputs.pop().count("\n") == 3
