"""The hosts of a simulation: each plays the log into a replica and serves sessions.

A session submits records in order and several at a time. It learns what became of them only by
what the host's replica finds in the log; what it does not find in time, or finds void behind a
gap, it sends again under the same ids.
"""

from collections.abc import Callable

from everpool.errors import NotFoundError
from everpool.log import Appended
from everpool.records import Entry, Fence, Floor, Record, RecordId, encode_entry
from everpool.testing.memory_replica import Decided, Disk, MemoryReplica, Outcome
from everpool.testing.simulation.witness import Attempt, committed, demand
from everpool.testing.simulation.workload import draw
from everpool.testing.simulation.world import World
from everpool.verdict import Verdict

Settled = Callable[[Outcome], None]


class Session:
    """A writer on a host, for as long as its process lives and its session is not forgotten."""

    def __init__(self, world: World, host: "Host") -> None:
        self.world = world
        self.host = host
        self._watching = False
        self._renew()

    def submit(self, attempt: Attempt, settled: Settled | None = None) -> RecordId:
        """Give the attempt the next id, and send it with what else is waiting."""
        self._last += 1
        id = RecordId(self.id, self._last)
        self.pending[id.sequence] = (attempt, settled)
        self.world.witness.submitted(id, attempt)
        self.world.ids.append(id)
        if not self._unsent:
            self._later(self.world.rng.randint(0, 15), self._flush)
        self._unsent.append(id.sequence)
        return id

    def learn(self, decided: Decided) -> None:
        """React to what became of a record of this session."""
        sequence, verdict = decided.id.sequence, decided.verdict
        if verdict is Verdict.FORGOTTEN:
            self._forgotten()
        elif sequence not in self.pending:
            return
        elif verdict is Verdict.GAP:
            self._close_gap()
        else:
            demand(
                verdict is not Verdict.DUPLICATE,
                f"{decided.id} is void as a duplicate of what was never decided",
            )
            ended = "committed" if committed(decided) else "aborted"
            self._settle(sequence, Outcome(ended, decided.version, int(verdict), decided.results))

    def look_up(self) -> None:
        """Settle what was decided in a part of the log that the host has not seen.

        A record that is fenced but not decided must still be sent: its successors wait for it.
        """
        for sequence in sorted(self.pending):
            outcome = self.host.replica.outcome(RecordId(self.id, sequence))
            if outcome.version or outcome.state == "expired":
                self._settle(sequence, outcome)

    def _settle(self, sequence: int, outcome: Outcome) -> None:
        _, settled = self.pending.pop(sequence)
        if sequence in self._unsent:
            self._unsent.remove(sequence)
        self._tell(RecordId(self.id, sequence), outcome, settled)

    def _tell(self, id: RecordId, outcome: Outcome, settled: Settled | None) -> None:
        self.world.witness.answered(id, self.host.replica.version, outcome)
        if settled is not None:
            settled(outcome)

    def _forgotten(self) -> None:
        """Nothing of this session will ever be decided any more: begin another one."""
        self.world.happened("session renewed")
        id, pending = self.id, self.pending
        self._renew()
        for sequence, (_, settled) in sorted(pending.items(), key=_sequence):
            outcome = Outcome("aborted", 0, Verdict.FORGOTTEN)
            self._tell(RecordId(id, sequence), outcome, settled)

    def _renew(self) -> None:
        version = self.host.replica.version
        self.id = version.to_bytes(8, "big") + self.world.rng.randbytes(8)
        self._last = 0
        self._quiet_until = 0
        self._unsent: list[int] = []
        self.pending: dict[int, tuple[Attempt, Settled | None]] = {}

    def _later(self, delay: int, call: Callable[[], None]) -> None:
        """Call `call` later, unless by then the process or the session is no more."""
        id = self.id

        def due() -> None:
            if self in self.host.sessions and self.id == id:
                call()

        self.world.clock.after(delay, due)

    def _flush(self) -> None:
        waiting, self._unsent = self._unsent, []
        self._send(waiting)

    def _send_again(self) -> None:
        """Send everything from the gap on, packed in another way perhaps."""
        if self.pending:
            self.world.happened("sent again")
            self._unsent = []
            self._send(sorted(self.pending))

    def _close_gap(self) -> None:
        """Send again soon, but once for all the records that one gap has voided.

        To answer each of them would void more records behind more gaps, without end.
        """
        now = self.world.clock.now
        if now >= self._quiet_until:
            self._quiet_until = now + self.world.settings.delay
            self._later(self.world.rng.randint(1, 20), self._send_again)

    def _send(self, sequences: list[int]) -> None:
        rng, replica = self.world.rng, self.host.replica
        while sequences:
            size = rng.randint(1, 3)
            packed, sequences = sequences[:size], sequences[size:]
            assert packed == list(range(packed[0], packed[0] + len(packed))), "a gap of our own"
            records = [self.pending[sequence][0].record for sequence in packed]
            self.world.send(
                encode_entry(Entry(self.id, packed[0], replica.position, replica.hash, records))
            )
        if not self._watching:
            self._watching = True
            self.world.clock.after(self.world.settings.patience, self._watch)

    def _watch(self) -> None:
        self._watching = bool(self.pending) and self in self.host.sessions
        if self._watching:
            self._send_again()
            self.world.clock.after(self.world.settings.patience, self._watch)


class Host:
    """A machine: a disk, a replica on it while it runs, and sessions."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.disk: Disk | None = None
        self.sessions: list[Session] = []
        self.handles: dict[str, int] = {}
        self.asking = 0
        self.up = False
        self._life = 0
        self.start()

    def start(self) -> None:
        """Recover from the disk, or from a checkpoint; may crash again meanwhile."""
        world = self.world
        if self.disk is None:
            self.replica = self._fresh()
        else:
            self.replica = world.replica_type(self.disk)
            for _ in self.replica.recover():
                if world.chance(world.settings.crash):
                    return self.crash()
        self.disk = self.replica.disk
        self.up = True
        self._life += 1
        self.handles = {}
        self.sessions = [Session(world, self) for _ in range(world.settings.sessions)]
        self._soon(world.settings.poll, self._poll)
        for session in self.sessions:
            self._work(session)

    def crash(self) -> None:
        """Stop between two steps: the process, the whole machine, or machine and disk."""
        world = self.world
        self.up = False
        self._life += 1
        for session in self.sessions:
            world.orphans += [RecordId(session.id, sequence) for sequence in session.pending]
        self.sessions = []
        self.asking = 0
        kind = world.rng.random()
        if kind < 0.2:
            self.disk = None
        elif kind < 0.5 and self.disk is not None:
            self.disk.cut_power(world.rng)
        world.happened("disk lost" if kind < 0.2 else "power cut" if kind < 0.5 else "killed")
        world.clock.after(world.rng.randint(1, 300), self.start)

    def settled(self) -> bool:
        """Whether nobody on this host waits for anything."""
        return self.up and not self.asking and not any(s.pending for s in self.sessions)

    def ask(self, ids: list[RecordId]) -> None:
        """Ask for the outcome of records: what is not decided is fenced first, in one record."""
        open_ids: list[RecordId] = []
        for id in ids:
            outcome = self.replica.outcome(id)
            if outcome.state == "undecided":
                open_ids.append(id)
            else:
                self.world.witness.answered(id, self.replica.version, outcome)
        if not open_ids:
            return
        self.asking += 1
        self.world.happened("fence")
        record = Record(self.replica.version, [], [], [], [Fence(*id) for id in open_ids])

        def fenced(outcome: Outcome) -> None:
            self.asking -= 1
            if outcome.state == "committed":
                for id in open_ids:
                    answer = self.replica.outcome(id)
                    self.world.witness.answered(id, self.replica.version, answer)
            else:
                self.ask(open_ids)

        self.world.rng.choice(self.sessions).submit(Attempt("fence", record, ()), fenced)

    def steward(self) -> None:
        """Raise the floor, and keep a checkpoint when that is done."""
        if not self.up:
            return
        world = self.world
        floor = max(0, self.replica.version - world.rng.randint(0, world.settings.floor_lag))
        record = Record(self.replica.version, [], [], [], [Floor(floor)])

        def raised(outcome: Outcome) -> None:
            if outcome.state == "committed":
                world.keep(self.replica)

        world.rng.choice(self.sessions).submit(Attempt("floor", record, ()), raised)

    def _fresh(self) -> MemoryReplica:
        """Return a replica from the newest checkpoint, or an empty one."""
        checkpoint = self.world.newest_checkpoint()
        replica_type = self.world.replica_type
        if checkpoint is None:
            return replica_type()
        self.world.happened("started from a checkpoint")
        return replica_type.from_checkpoint(checkpoint)

    def _soon(self, limit: int, call: Callable[[], None]) -> None:
        """Call `call` within `limit` ticks, unless the host crashes before."""
        life = self._life
        self.world.clock.after(
            self.world.rng.randint(1, limit), lambda: call() if life == self._life else None
        )

    def _poll(self) -> None:
        world = self.world
        try:
            found = world.log.read(self.replica.position, world.rng.choice([1, 300, 2000, 10000]))
        except NotFoundError:
            self.replica = self._fresh()
            self.disk = self.replica.disk
            for session in self.sessions:
                session.look_up()
            found = []
        for item in found:
            if not self._play(item):
                return
        if world.rng.random() < 0.2:
            self.replica.flush()
        self._soon(world.settings.poll, self._poll)

    def _play(self, item: Appended) -> bool:
        """Play one entry; False when the host crashed over it."""
        world = self.world
        decided: list[Decided] = []
        for _ in self.replica.play(item, decided):
            if world.chance(world.settings.crash):
                if decided:
                    world.witness.played(self.replica, decided)
                self.crash()
                return False
        world.witness.played(self.replica, decided)
        for one in decided:
            for session in self.sessions:
                if session.id == one.id.session:
                    session.learn(one)
        return True

    def _work(self, session: Session) -> None:
        """Begin a transaction now and then."""
        world = self.world
        if world.calm or session not in self.sessions:
            return
        if world.chance(world.settings.asked) and world.ids:
            orphans = bool(world.orphans) and world.rng.random() < 0.6
            known = (world.orphans if orphans else world.ids)[-12:]
            at = world.rng.randrange(len(known))
            self.ask(known[at : at + world.rng.randint(1, 3)])
        if len(session.pending) < world.settings.window:
            self._begin(session)
        self._soon(60, lambda: self._work(session))

    def _begin(self, session: Session) -> None:
        world = self.world
        world.begun += 1
        attempt = draw(world.rng, self.replica, self.handles)
        world.witness.viewed(attempt.record.snapshot, attempt.sights)
        if not attempt.record.operations:
            return
        slow = world.chance(world.settings.slow_transaction)
        self._soon(400 if slow else 20, lambda: self._submit(session, attempt))

    def _submit(self, session: Session, attempt: Attempt) -> None:
        if session in self.sessions:
            session.submit(attempt)


def _sequence(item: tuple[int, object]) -> int:
    return item[0]
