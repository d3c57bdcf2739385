"""Runs workloads on a forgetful disk, and cuts what was recorded.

    with running(disk, orders) as run:               # processes play; faults may be made meanwhile
        ...
        cuts = Cuts(run.finish(), scratch)
    cuts.check(auditor, cuts.choose(random, 100))    # AssertionError names the cut that failed

One recording gives any number of cuts. A cut is a position in the log, a seed, and whether
sectors tear; what may then be in the pool follows from the marks before the position.

    python -m support.power_loss RECORDING POSITION SEED TORN

repeats one cut of the recording that a failed test names; TORN is 0 or 1.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from .forgetful import ForgetfulDisk
from .forgetful_model import DiskModel, Mark, Name, Operation, Sync, Write
from .power_loss_audit import Auditor, Job
from .power_loss_script import Script, digest_of_state
from .power_loss_workload import POOL, Order, work
from .processes import Child, Failure

END_S = 120
OUTCOMES = 6
# For so many operations after a failed sync something may be amiss.
AFTERMATH = 60


class Recording(msgspec.Struct):
    """The log of a disk, and what was ordered.

    What lies on the disk before position `start` is the cut of an earlier recording, `base`.
    """

    orders: list[Order]
    log: list[Operation]
    start: int = 0
    base: Job | None = None


class Cut(NamedTuple):
    """Where the power goes, and what chance does then."""

    position: int
    seed: int
    torn_sectors: bool


# -- running --------------------------------------------------------------------------------------


class Run:
    """Processes that play on a disk."""

    def __init__(self, disk: ForgetfulDisk, orders: Sequence[Order]) -> None:
        self.disk = disk
        self.orders = list(orders)
        self.killed: set[int] = set()
        self.children = [Child(work, order) for order in orders]
        for child in self.children:
            child.receive(END_S)

    def start(self) -> None:
        """Let all that are not late begin at the same time."""
        for number, order in enumerate(self.orders):
            if not order.late:
                self.begin(number)

    def begin(self, number: int) -> None:
        """Let one begin."""
        self.children[number].send("begin")

    def playing(self) -> bool:
        """Whether any process still plays."""
        return any(child.alive() for child in self.children)

    def kill(self, number: int) -> None:
        """End a process at once, whatever it is doing."""
        self.killed.add(number)
        self.children[number].kill()

    def finish(self) -> Recording:
        """Wait until all have played; AssertionError when one failed."""
        for number, child in enumerate(self.children):
            if number not in self.killed:
                status = child.join(END_S)
                said = [it.text for it in child.said if isinstance(it, Failure)]
                assert status == 0, f"process {number} ended with {status}:\n{''.join(said)}"
        return Recording(self.orders, self.disk.record())


@contextlib.contextmanager
def running(disk: ForgetfulDisk, orders: Sequence[Order]) -> Iterator[Run]:
    """Start the processes; whatever happens, none outlives the block."""
    run = Run(disk, orders)
    try:
        run.start()
        yield run
    finally:
        for child in run.children:
            if child.alive():
                child.kill()


# -- what was promised ----------------------------------------------------------------------------


class Promises:
    """What the marks so far say: `least` steps of each actor count, and `most` at the most."""

    def __init__(self) -> None:
        self.created = False
        self.stocked = False
        self.version = 0
        self.least: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self.seen: dict[str, str] = {}
        self.outcomes: list[tuple[str, int]] = []
        self.counts: dict[str, int] = {}

    def note(self, text: str) -> None:
        """Take one more mark into account."""
        what, *rest = text.split()
        self.counts[what] = self.counts.get(what, 0) + 1
        if what == "created":
            self.created = True
        elif what == "opened":
            self.stocked = True
        elif what == "saw":
            self.seen[rest[0]] = rest[1]
        elif what not in ("unopened", "flushed"):
            actor, at, *facts = rest
            self._note_step(what, actor, int(at), facts)

    def _note_step(self, what: str, actor: str, at: int, facts: list[str]) -> None:
        if what == "begun":
            self.least.setdefault(actor, 0)
            self.most[actor] = at + 1
        elif what == "refused":
            self.most[actor] = at
        elif what == "done":
            self.least[actor] = at + 1
            if facts:
                self.version = max(self.version, int(facts[0]))
                self.outcomes.append((facts[1], int(facts[0])))


# -- cutting --------------------------------------------------------------------------------------


class Cuts:
    """Makes and checks the cuts of one recording."""

    def __init__(self, recording: Recording, scratch: Path) -> None:
        self.recording = recording
        self.checked = 0
        self.read_only = 0
        self._scratch = scratch
        self._rewind()

    def choose(self, pick: random.Random, count: int, kinds: Sequence[str] = ()) -> list[Cut]:
        """A good mixture of cuts: at syncs, behind answers, and wherever else something happens.

        Each kind of place gets its share; `kinds` leaves only some of those in `places`.
        """
        places = [there for kind, there in self.places().items() if not kinds or kind in kinds]
        return sorted(
            Cut(pick.choice(pick.choice(places)), pick.getrandbits(32), pick.random() < 0.3)
            for _ in range(count)
        )

    def places(self) -> dict[str, list[int]]:
        """Positions by what goes on there."""
        log, start = self.recording.log, self.recording.start
        places: dict[str, list[int]] = {"anywhere": list(range(start, len(log) + 1))}
        paths = {1: ""}
        created = self.recording.base is not None
        failed_at = -AFTERMATH
        for at, operation in enumerate(log):
            kinds: list[str] = []
            match operation:
                case Name(changes):
                    for folder, name, inode in changes:
                        if inode:
                            paths[inode] = f"{paths[folder]}/{os.fsdecode(name)}"
                        kinds = [f"names in {_part_of_pool(paths[folder])}"]
                case Sync(inode, failed=failed):
                    kinds = ["sync", f"sync of {_part_of_pool(paths[inode])}"]
                    failed_at = at if failed else failed_at
                case Write(inode):
                    kinds = [f"write to {_part_of_pool(paths[inode])}"]
                case Mark(text):
                    kinds = [text.split()[0]]
                    created |= kinds == ["created"]
                case _:
                    pass
            kinds += ["creation"] * (not created) + ["aftermath"] * (at < failed_at + AFTERMATH)
            for kind in kinds if at >= start else ():
                # Just before what ends a promise, and just behind what makes one.
                places.setdefault(kind, []).append(at + isinstance(operation, Mark))
        for kind in ("sync of index", "flushed", "done"):
            later = [at for at in places.get(kind, ()) if at > failed_at >= 0]
            if later:
                places[f"first {kind} after trouble"] = later[:3]
        return places

    def check(self, auditor: Auditor, cuts: Sequence[Cut]) -> None:
        """Make and audit the cuts, in order. AssertionError for the first that fails."""
        failed = self.first_failure(auditor, cuts)
        if failed is not None:
            cut, problem = failed
            how = f"{self.keep()} {cut.position} {cut.seed} {int(cut.torn_sectors)}"
            raise AssertionError(f"python -m support.power_loss {how}\n{problem}")

    def first_failure(
        self, auditor: Auditor, cuts: Iterable[Cut], *, thorough_every: int = 40
    ) -> tuple[Cut, str] | None:
        """Audit until a cut fails; returns it and what is wrong. Fastest in order."""
        waiting: list[Cut] = []
        for number, cut in enumerate(cuts):
            job = self.make(cut)
            job.thorough = bool(thorough_every) and number % thorough_every == thorough_every - 1
            auditor.submit(job)
            waiting.append(cut)
            if len(waiting) > 1:  # one cut is audited while the next one is made
                if problem := self._answer(auditor):
                    auditor.close()  # with it goes what it was asked since
                    return waiting[0], problem
                del waiting[0]
        for cut in waiting:
            if problem := self._answer(auditor):
                return cut, problem
        return None

    def _answer(self, auditor: Auditor) -> str:
        answer = auditor.answer()
        self.checked += 1
        self.read_only += answer.read_only
        return answer.problem

    def make(self, cut: Cut, target: Path | None = None) -> Job:
        """Put what the disk may hold into a folder; returns what to ask of it."""
        promises = self.promises(cut.position)
        tree = self._model.survivors(cut.seed, torn_sectors=cut.torn_sectors)
        if target is None:
            target = Path(tempfile.mkdtemp(prefix="cut-", dir=self._scratch))
        tree.write_to(target)
        base = self.recording.base
        job = Job(str(target / POOL), promises.created, promises.stocked, promises.version)
        job.outcomes = promises.outcomes[-OUTCOMES:]
        job.seed = cut.seed
        if base is not None:
            self._add_base(job, base, promises.seen)
        for actor, most in promises.most.items():
            part, least = self._script(actor), promises.least[actor]
            job.states[actor] = part.states[least : most + 1]
            job.shared[actor] = part.shared[least : most + 1]
        return job

    def _add_base(self, job: Job, base: Job, seen: dict[str, str]) -> None:
        job.created |= base.created
        job.stocked |= base.stocked
        job.version = max(job.version, base.version)
        job.outcomes = base.outcomes + job.outcomes
        for actor, states in base.states.items():
            # What was seen once must stay.
            kept = [
                k for k, it in enumerate(states) if seen.get(actor) in (None, digest_of_state(it))
            ]
            job.states[actor] = [states[k] for k in kept]
            job.shared[actor] = [base.shared[actor][k] for k in kept]

    def promises(self, position: int) -> Promises:
        """What was promised when the disk's log was so long."""
        if position < self._played:
            self._rewind()
        for operation in self.recording.log[self._played : position]:
            self._model.apply(operation)
            if isinstance(operation, Mark):
                self._promises.note(operation.text)
        self._played = position
        return self._promises

    def _rewind(self) -> None:
        self._model, self._promises, self._played = DiskModel(), Promises(), 0

    def _script(self, actor: str) -> Script:
        for order in self.recording.orders:
            if actor in order.actors:
                return order.script(actor)
        raise AssertionError(f"nobody ordered {actor}")

    def keep(self) -> Path:
        """Write the recording to a file, for the command at the top."""
        path = Path(tempfile.mkdtemp(prefix="everpool-recording-")) / "recording"
        path.write_bytes(msgspec.msgpack.encode(self.recording))
        return path


def _part_of_pool(path: str) -> str:
    """The folder of the pool that a path belongs to, or the file in the pool itself."""
    parts = path.split("/")
    return parts[2] if len(parts) > 2 else path


def put_on_disk(disk: ForgetfulDisk, cuts: Cuts, cut: Cut) -> Recording:
    """Put a cut on a disk, all of it durable; returns the beginning of a recording of that disk."""
    job = cuts.make(cut, disk.path)
    for folder, _, files in os.walk(disk.path, topdown=False):
        for path in (*(Path(folder) / name for name in files), Path(folder)):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    return Recording([], [], disk.position(), job)


def main() -> None:
    """Repeat one cut."""
    file, position, seed, torn_sectors = sys.argv[1:]
    recording = msgspec.msgpack.decode(Path(file).read_bytes(), type=Recording)
    with tempfile.TemporaryDirectory() as scratch, Auditor() as auditor:
        cut = Cut(int(position), int(seed), torn_sectors == "1")
        failed = Cuts(recording, Path(scratch)).first_failure(auditor, [cut])
        print(failed[1] if failed else "all is well")


if __name__ == "__main__":
    main()
