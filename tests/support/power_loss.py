"""Runs workloads on a forgetful disk, and cuts what was recorded.

    with recorded(folder, orders) as run:            # processes play, faults may be made meanwhile
        ...
    cuts = Cuts(run.finish(), scratch)
    cuts.check(auditor, cuts.choose(random, 100))    # AssertionError names the cut that failed

One recording gives any number of cuts. A cut is a position in the log, a seed, and whether
sectors tear; what may then be in the pool follows from the marks before the position.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec

from .forgetful import ForgetfulDisk
from .forgetful_model import DiskModel, Mark, Name, Operation, Sync, Write
from .power_loss_audit import Answer, Auditor, Job
from .power_loss_script import script
from .power_loss_workload import Order

POOL = "pool"
START_S = 60
END_S = 180
OUTCOMES = 6


class Recording(msgspec.Struct):
    """The log of a disk, and what was ordered. `known` is what it held of earlier actors."""

    orders: list[Order]
    log: list[Operation]
    start: int = 0
    known: list[Mark] = []


class Cut(NamedTuple):
    """Where the power goes, and what chance does then."""

    position: int
    seed: int
    torn_sectors: bool


# -- running --------------------------------------------------------------------------------------


class Run:
    """Processes that play on a disk. `faults` may be called while they do."""

    def __init__(self, disk: ForgetfulDisk, orders: Sequence[Order]) -> None:
        self.disk = disk
        self.orders = list(orders)
        self._processes: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        """Start the processes and let them begin at the same time."""
        boot = os.environ | {"EVERPOOL_BOOT_ID": str(uuid.uuid4())}
        for order in self.orders:
            self._processes.append(
                subprocess.Popen(
                    [
                        *(sys.executable, "-m", f"{__package__}.power_loss_workload"),
                        msgspec.json.encode(order._asdict()).decode(),
                    ],
                    cwd=Path(__file__).parents[1],
                    env=boot,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        for process in self._processes:
            assert process.stdout is not None and process.stdin is not None
            if not process.stdout.readline():
                raise AssertionError(process.communicate()[1])
        for process in self._processes:
            assert process.stdin is not None
            print(file=process.stdin, flush=True)

    def running(self) -> bool:
        """Whether any process still plays."""
        return any(process.poll() is None for process in self._processes)

    def kill(self, number: int) -> None:
        """End a process at once, whatever it is doing."""
        self._processes[number].kill()

    def finish(self, killed: Iterable[int] = ()) -> Recording:
        """Wait for all processes; AssertionError when one failed."""
        for number, process in enumerate(self._processes):
            try:
                _, trouble = process.communicate(timeout=END_S)
            except subprocess.TimeoutExpired:
                self.stop()
                raise AssertionError(f"process {number} of {self.orders} hangs") from None
            if number not in killed:
                assert process.returncode == 0, trouble
        return Recording(self.orders, self.disk.record())

    def stop(self) -> None:
        """End what still runs."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


@contextlib.contextmanager
def running(disk: ForgetfulDisk, orders: Sequence[Order]) -> Iterator[Run]:
    """Start the processes; whatever happens, none outlives the block."""
    run = Run(disk, orders)
    try:
        run.start()
        yield run
    finally:
        run.stop()


# -- what was promised ----------------------------------------------------------------------------


@dataclass
class Promises:
    """What the marks so far say: `least` steps of each actor count, and `most` at the most."""

    created: bool = False
    stocked: bool = False
    version: int = 0
    least: dict[str, int] = field(default_factory=dict[str, int])
    most: dict[str, int] = field(default_factory=dict[str, int])
    outcomes: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])

    def note(self, text: str) -> None:
        """Take one more mark into account."""
        what, *rest = text.split()
        if what == "created":
            self.created = True
        elif what == "opened":
            self.stocked = True
        elif what in ("begun", "done", "refused", "unknown"):
            actor, at, *facts = rest
            if what == "begun":
                self.least.setdefault(actor, 0)
                self.most[actor] = int(at) + 1
            elif what == "done":
                self.least[actor] = int(at) + 1
                if facts:
                    self.version = max(self.version, int(facts[0]))
                    self.outcomes.append((facts[1], int(facts[0])))
            elif what == "refused":
                self.most[actor] = int(at)


# -- cutting --------------------------------------------------------------------------------------


class Cuts:
    """Makes and checks the cuts of one recording."""

    def __init__(self, recording: Recording, scratch: Path) -> None:
        self.recording = recording
        self._scratch = scratch
        self._model = DiskModel()
        self._promises = Promises()
        self._noted = 0
        self.checked = 0
        self.read_only = 0

    def choose(self, pick: random.Random, count: int, *, after: int = 0) -> list[Cut]:
        """A good mixture of cuts: at syncs, behind acknowledgements, everywhere."""
        places = [[at for at in group if at >= after] for group in self._places()]
        places = [group for group in places if group]
        chosen = [
            Cut(pick.choice(pick.choice(places)), pick.getrandbits(32), pick.random() < 0.3)
            for _ in range(count)
        ]
        return sorted(chosen)

    def _places(self) -> list[list[int]]:
        """Positions by what goes on there: each kind gets its share of the cuts."""
        places: dict[str, list[int]] = {}
        paths: dict[int, str] = {1: ""}
        created = False
        for at, operation in enumerate(self.recording.log):
            kind = ""
            match operation:
                case Name(changes):
                    for folder, name, inode in changes:
                        if inode:
                            paths[inode] = f"{paths[folder]}/{os.fsdecode(name)}"
                        kind = f"names in {paths[folder]}"
                case Sync(inode):
                    kind = f"sync of {_place(paths[inode])}"
                    places.setdefault("sync", []).append(at)
                case Write(inode):
                    kind = f"write to {_place(paths[inode])}"
                case Mark(text):
                    what = text.split()[0]
                    created |= what == "created"
                    kind = f"mark {what}"
                    if what in ("done", "refused"):
                        places.setdefault("answered", []).append(at + 1)
                case _:
                    pass
            for group in [kind or "other"] if created else ["creation"]:
                places.setdefault(group, []).append(at)
        places["anywhere"] = list(range(len(self.recording.log) + 1))
        return list(places.values())

    def check(self, auditor: Auditor, cuts: Sequence[Cut], *, thorough_every: int = 25) -> None:
        """Make and audit the cuts, in order. AssertionError for the first that fails."""
        failed = self.first_failure(auditor, cuts, thorough_every=thorough_every)
        if failed is not None:
            cut, problem = failed
            kept = self.keep()
            raise AssertionError(f"{cut} of {kept}:\n{problem}")

    def first_failure(
        self, auditor: Auditor, cuts: Sequence[Cut], *, thorough_every: int = 0
    ) -> tuple[Cut, str] | None:
        """Audit until a cut fails; returns it and what is wrong."""
        waiting: list[Cut] = []
        for number, cut in enumerate(cuts):
            job = self.make(cut)
            job.thorough = bool(thorough_every) and number % thorough_every == 0
            auditor.submit(job)
            waiting.append(cut)
            if len(waiting) > 1 and (problem := self._answer(auditor)):
                return waiting[0], problem
            del waiting[:-1]
        for cut in waiting:
            if problem := self._answer(auditor):
                return cut, problem
        return None

    def _answer(self, auditor: Auditor) -> str:
        answer: Answer = auditor.answer()
        self.checked += 1
        self.read_only += answer.read_only
        return answer.problem

    def make(self, cut: Cut, target: Path | None = None) -> Job:
        """Put what the disk may hold into a folder; returns what to ask of it."""
        promises = self._up_to(cut.position)
        tree = self._model.survivors(cut.seed, torn_sectors=cut.torn_sectors)
        if target is None:
            target = Path(tempfile.mkdtemp(prefix="cut-", dir=self._scratch))
        tree.write_to(target)
        return Job(
            path=str(target / POOL),
            created=promises.created,
            stocked=promises.stocked,
            version=promises.version,
            states={
                actor: self._script(actor).states[promises.least[actor] : most + 1]
                for actor, most in promises.most.items()
            },
            shared={
                actor: self._script(actor).shared[promises.least[actor] : most + 1]
                for actor, most in promises.most.items()
            },
            outcomes=promises.outcomes[-OUTCOMES:],
            seed=cut.seed,
        )

    def _up_to(self, position: int) -> Promises:
        if position < self._noted:
            self._model, self._promises, self._noted = DiskModel(), Promises(), 0
        for operation in self.recording.log[self._noted : position]:
            self._model.apply(operation)
            if isinstance(operation, Mark):
                self._promises.note(operation.text)
        self._noted = position
        return self._promises

    def _script(self, actor: str):
        for order in self.recording.orders:
            if actor in order.actors:
                return script(actor, order.seed, order.steps, tuple(sorted(order.mix.items())))
        raise AssertionError(f"nobody ordered {actor}")

    def keep(self) -> Path:
        """Write the recording to a file that `load` reads."""
        path = Path(tempfile.mkdtemp(prefix="everpool-recording-")) / "recording.msgpack"
        path.write_bytes(msgspec.msgpack.encode(self.recording))
        return path


def _place(path: str) -> str:
    """The folder of the pool that a path belongs to, or the file in the pool itself."""
    parts = path.split("/")
    return parts[2] if len(parts) > 2 else path


def load(path: Path) -> Recording:
    """Read what `keep` wrote."""
    return msgspec.msgpack.decode(path.read_bytes(), type=Recording)
