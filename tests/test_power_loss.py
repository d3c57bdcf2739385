"""Nothing acknowledged is lost, and nothing is half, however the power goes.

Pools lie on a disk that keeps only what was synced (`support.forgetful`). Actors work on them
(`support.power_loss_script`), the disk's log is cut, and what survives is opened again and
compared with what was promised before the cut (`support.power_loss_audit`).
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import everpool
from support.forgetful import ForgetfulDisk, NotAvailableError, mark
from support.power_loss import Cut, Cuts, Recording, Run, put_on_disk, running
from support.power_loss_audit import Auditor
from support.power_loss_mutants import MUTANTS
from support.power_loss_script import FULL_MIX, ONE_BY_ONE, SMALL_MIX
from support.power_loss_workload import POOL, Order
from support.processes import call

pytestmark = pytest.mark.fuse

LATER = str(uuid.UUID(int=2))  # the boot after the first cut
INDEX, MEMORY, STAGING = f"{POOL}/index/data.mdb", f"{POOL}/memory*", f"{POOL}/staging*"
ROOM_BYTES = 1 << 30

Trouble = Callable[[Run], None]


def mounted(folder: Path) -> ForgetfulDisk:
    try:
        return ForgetfulDisk(folder).__enter__()
    except NotAvailableError as problem:
        pytest.skip(str(problem))


@pytest.fixture(scope="module")
def auditor() -> Iterator[Auditor]:
    with Auditor() as made:
        yield made


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """Where cuts are opened: in memory, if there is room, since they need no disk."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and os.access(shared, os.W_OK)
    roomy = roomy and shutil.disk_usage(shared).free > ROOM_BYTES
    folder = Path(tempfile.mkdtemp(prefix="everpool-", dir=shared if roomy else None))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def pick() -> random.Random:
    return random.Random(20)


def orders(
    processes: int, threads: int, steps: int, *, mix=FULL_MIX, seed: int = 1, **facts
) -> Callable[[Path], list[Order]]:
    """Orders for a disk: the first process makes the pool."""

    def make(disk: Path) -> list[Order]:
        return [
            Order(
                str(disk),
                tuple(f"{'abcdefgh'[process]}{thread}" for thread in range(threads)),
                seed,
                steps,
                mix,
                create=process == 0,
                **facts,
            )
            for process in range(processes)
        ]

    return make


def record(
    folder: Path, make: Callable[[Path], list[Order]], trouble: Trouble | None = None
) -> Recording:
    """Play on a disk of its own, with some trouble meanwhile."""
    disk = mounted(folder)
    with contextlib.closing(disk), running(disk, make(disk.path)) as run:
        if trouble is not None:
            trouble(run)
        return run.finish()


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """One process, a few threads."""
    return record(tmp_path_factory.mktemp("one") / "disk", orders(1, 3, 110))


def marks_of(cuts: Cuts) -> dict[str, int]:
    """How many marks of each kind a recording has."""
    return dict(cuts.promises(len(cuts.recording.log)).counts)


# -- power cuts -----------------------------------------------------------------------------------


def test_cuts_of_one_process(
    recording: Recording, auditor: Auditor, scratch: Path, pick: random.Random
) -> None:
    cuts = Cuts(recording, scratch)
    cuts.check(auditor, cuts.choose(pick, 150))
    assert cuts.read_only > cuts.checked / 10, "hardly anything could be opened read-only"


def test_cuts_of_several_processes_one_of_which_dies(
    tmp_path: Path, auditor: Auditor, scratch: Path, pick: random.Random
) -> None:
    def kill_one(run: Run) -> None:
        while run.playing() and run.disk.position() < 1500:
            time.sleep(0.005)
        run.kill(2)

    cuts = Cuts(record(tmp_path / "disk", orders(3, 2, 60, seed=2), kill_one), scratch)
    cuts.check(auditor, cuts.choose(pick, 120))


def test_cuts_while_a_pool_is_made(
    recording: Recording, auditor: Auditor, scratch: Path, pick: random.Random
) -> None:
    cuts = Cuts(recording, scratch)
    places = [at for at in cuts.places()["creation"] for _ in range(2)]
    cuts.check(auditor, [Cut(at, pick.getrandbits(32), pick.random() < 0.3) for at in places])
