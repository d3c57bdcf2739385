"""What the demo checks once every writer is dead: each check says what it proves."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

import everpool
from everpool.demo.sources import Volume, read_table, read_volumes
from everpool.demo.storm import Storm, Transfer
from everpool.demo.teller import ACCOUNTS


class Check(NamedTuple):
    """One statement, whether it held, and the figures behind it."""

    statement: str
    held: bool
    figures: str


def audit(pool: everpool.Pool, storm: Storm, opening_balance: int) -> Iterator[Check]:
    """Yield the checks one by one, as they are done."""
    noted = _audit_entries(pool)
    acknowledged = {k: v for teller in storm.tellers for k, v in teller.acknowledged.items()}
    yield _nothing_lost(noted, acknowledged)
    balances = np.array(pool.array(ACCOUNTS)[:])
    yield _nothing_doubled(noted, balances, opening_balance)
    yield _sum_conserved(balances, opening_balance)
    for volume in read_volumes():
        yield _volume_intact(pool, volume)
    table: Any = pool["airports"]
    yield Check(
        "The table of airports equals its file, cell by cell.",
        bool(table.equals(read_table())),
        f"{table.num_rows:,} rows",
    )
    report = pool.verify()
    yield Check(
        "Every checksum in the pool holds.",
        bool(report.ok),
        "no damage" if report.ok else f"{len(report.damage)} damaged",
    )


def _audit_entries(pool: everpool.Pool) -> dict[str, Transfer]:
    entries: dict[str, Transfer] = {}
    for name in pool.names("audit/"):
        entry: Any = pool[name]
        entries[name] = Transfer(entry["from"], entry["to"], entry["amount"])
    return entries


def _nothing_lost(noted: dict[str, Transfer], acknowledged: dict[str, Transfer]) -> Check:
    lost = sum(noted.get(name) != transfer for name, transfer in acknowledged.items())
    unreported = len(noted) - len(acknowledged)
    return Check(
        "No transfer that was acknowledged is missing.",
        lost == 0 and unreported >= 0,
        f"{len(acknowledged):,} acknowledged, {lost} lost; {unreported:,} more were stored, "
        "whose tellers died before they could say so",
    )


def _nothing_doubled(
    noted: dict[str, Transfer], balances: "np.ndarray[Any, Any]", opening_balance: int
) -> Check:
    expected = np.full_like(balances, opening_balance)
    for source, target, amount in noted.values():
        expected[source] -= amount
        expected[target] += amount
    wrong = int((expected != balances).sum())
    return Check(
        "None was applied twice, or by half: the audit trail, added up, gives every balance.",
        wrong == 0,
        f"{len(balances):,} accounts, {wrong} wrong",
    )


def _sum_conserved(balances: "np.ndarray[Any, Any]", opening_balance: int) -> Check:
    total, expected = int(balances.sum()), opening_balance * len(balances)
    return Check(
        "No money appeared or vanished.",
        total == expected and int(balances.min()) >= 0,
        f"{total:,} of {expected:,}",
    )


def _volume_intact(pool: everpool.Pool, volume: Volume) -> Check:
    stored: Any = pool[volume.name]
    same = (
        stored.dtype == volume.voxels.dtype
        and stored.shape == volume.voxels.shape
        and stored.tobytes() == volume.voxels.tobytes()
        and np.array_equal(pool[volume.name + "/affine"], volume.affine)
    )
    shape = " x ".join(map(str, volume.voxels.shape))
    return Check(
        f"The {volume.what} equals its file, byte for byte.",
        same,
        f"{shape}, {volume.voxels.nbytes:,} bytes",
    )
