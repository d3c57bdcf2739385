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
from support import mutants

SOAK = bool(os.environ.get("EVERPOOL_SOAK"))
SEEDS = 20_000 if SOAK else 120
CHUNK = 500 if SOAK else 20
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
