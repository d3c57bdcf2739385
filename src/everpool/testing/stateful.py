"""A state machine that compares an engine with the reference, transaction by transaction.

    class TestMyEngine(pool_machine(make_pool).TestCase):
        pass

Several clients' transactions, plain calls, closings and crashes are interleaved, one step at a
time. Every step is done to the engine and to the reference, and must show the same:

- What a transaction reads is the reference's state at its snapshot, under its own writes.
- A transaction conflicts if and only if the reference says so. The engine may raise
  `ConflictError` at a read or at the end; in both cases the reference must find a conflict in what
  was read so far. A needless conflict is a failure too. The one that the contract allows, a
  snapshot below the floor, is told by `"floor"` in the error's facts.
- Plain calls never conflict. What was not committed before a crash never was; everything else is
  there afterwards.
"""

import sys
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from everpool.errors import ClosedError, ConflictError, EverpoolError
from everpool.testing import actions
from everpool.testing.actions import Action, plain, result_of
from everpool.testing.harness import Harness
from everpool.testing.reference import ReferencePool, ReferenceTransaction

CLIENTS = 3
PATIENCE_S = 30.0


@dataclass(eq=False)
class Pair:
    """One transaction, open on the engine and on the reference."""

    client: int
    engine: Any
    model: ReferenceTransaction
    number: int


class PoolMachine(RuleBasedStateMachine):
    """`pool_machine` makes a subclass that says how the engine's pools are made."""

    @staticmethod
    def make_pool() -> Harness:
        """Return a harness for a new pool."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.harness = self.make_pool()
        self.model = ReferencePool()
        self.clients: list[Any] = []
        self.open: list[Pair] = []
        self.handles: list[tuple[int, Any, Any]] = []
        self.last_writer = 0
        self.begun = 0
        self.versions: list[tuple[int, int]] = []
        """Pairs of versions, of the engine and of the reference, that name the same state."""

    @initialize()
    def create(self) -> None:
        self._open_clients()
        for side in (self.clients[0], self.model):
            actions.stock(side)
        self._wrote(0, self.clients[0].version)

    def _open_clients(self) -> None:
        self.clients = [self.harness.open() for _ in range(CLIENTS)]
        self._note_version(self.clients[0].version)
        self.watch = self.clients[0].watch()
        self.model_watch = self.model.watch()

    # Plain calls

    @rule(client=st.integers(0, CLIENTS - 1), action=actions.actions)
    def call(self, client: int, action: Action) -> None:
        """A plain call shows the newest state and takes effect at once."""
        pool = self._current(client)
        self._same(action, result_of(action, pool), result_of(action, self.model))
        self._wrote(client, pool.version)

    @rule(client=st.integers(0, CLIENTS - 1), count=st.integers(1, 5))
    def pipeline(self, client: int, count: int) -> None:
        """Blind writes that are not waited for commit all, in their order."""
        pool = self._current(client)
        futures: list[Any] = []
        for number in range(count):
            for side in (pool, self.model):
                with side.transaction(wait=False) as tx:
                    tx["pipelined"] = number
                    tx[f"pipelined/{number % 2}"] = self.begun
                if side is pool:
                    futures.append(tx.committed)
        versions = [future.result(PATIENCE_S) for future in futures]
        assert versions == sorted(set(versions)), f"pipelined versions {versions}"
        self._wrote(client, versions[-1])

    @rule(client=st.integers(0, CLIENTS - 1), look=actions.look_ups)
    def look_up(self, client: int, look: Action) -> None:
        """Keep a handle, to be used after its memory may be gone."""
        pool = self._current(client)
        mine, theirs = result_of(look, pool), result_of(look, self.model)
        self._same(look, mine, theirs)
        if mine[0] == "returned":
            self.handles.append((client, look.apply(pool), look.apply(self.model)))

    @precondition(lambda self: self.handles)
    @rule(which=st.integers(0, 50), action=actions.handle_actions)
    def use_handle(self, which: int, action: Action) -> None:
        """A handle reaches its own memory, or nothing once that is deleted."""
        client, handle, model = self.handles[which % len(self.handles)]
        pool = self._current(client)
        self._same(action, result_of(action, handle), result_of(action, model))
        self._wrote(client, pool.version)

    # Transactions

    @rule(client=st.integers(0, CLIENTS - 1))
    def begin(self, client: int) -> None:
        engine = self._current(client).transaction().__enter__()
        model = self.model.transaction().__enter__()
        self.begun += 1
        self.open.append(Pair(client, engine, model, self.begun))
        note(f"transaction {self.begun} begins at version {model.snapshot}")

    @rule(steps=st.lists(st.tuples(st.integers(0, 2), actions.actions), min_size=3, max_size=9))
    def interleave(self, steps: list[tuple[int, Action]]) -> None:
        """Two transactions and plain calls, step by step; both are committed at the end."""
        txs: dict[int, Pair] = {}
        for who, action in steps:
            if who == 0:
                self.call(CLIENTS - 1, action)
                continue
            if who not in txs:
                self.begin(who - 1)
                txs[who] = self.open[-1]
            if txs[who] in self.open:
                self.act(self.open.index(txs[who]), [action])
        for pair in txs.values():
            if pair in self.open:
                self.commit(self.open.index(pair))

    @rule(mine=actions.reads, more=actions.actions, theirs=actions.writes)
    def meet(self, mine: Action, more: Action, theirs: Action) -> None:
        """A transaction reads, somebody else writes, and the transaction is committed."""
        self._meet([mine], more, theirs)

    @rule(
        own=st.lists(actions.byte_writes, max_size=2),
        mine=actions.byte_reads,
        more=actions.byte_reads,
        theirs=actions.byte_writes,
    )
    def meet_in_memory(self, own: list[Action], mine: Action, more: Action, theirs: Action) -> None:
        """The same with bytes of one object, near to each other, some of them its own."""
        for name, allocate in actions.MEETING_PLACES.items():
            if name not in self.model:
                self.call(0, allocate)
        self._meet([*own, mine], more, theirs)

    @rule(mine=actions.listings, more=actions.listings, theirs=actions.bindings)
    def meet_in_listing(self, mine: Action, more: Action, theirs: Action) -> None:
        """The same with listings, and names that come, go or stay in them."""
        self._meet([mine], more, theirs)

    def _meet(self, mine: list[Action], more: Action, theirs: Action) -> None:
        self.begin(0)
        pair = self.open[-1]
        blind = Action("['met'] = None", lambda to: to.__setitem__("met", None))
        self.act(len(self.open) - 1, [*mine, blind])
        self.call(1, theirs)
        if self.open and self.open[-1] is pair:
            self.act(len(self.open) - 1, [more])
        if self.open and self.open[-1] is pair:
            self.commit(len(self.open) - 1)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 50), steps=st.lists(actions.actions, min_size=1, max_size=4))
    def act(self, which: int, steps: list[Action]) -> None:
        """What is read in a transaction is the state at its snapshot, under its own writes."""
        pair = self.open[which % len(self.open)]
        for action in steps:
            note(f"in transaction {pair.number}: {action}")
            try:
                mine = "returned", plain(action.apply(pair.engine))
            except ConflictError as error:
                self._align(pair)
                result_of(action, pair.model)
                self._refused_early(pair, action, error)
                return
            except EverpoolError as error:
                mine = "raised", error.kind
            self._align(pair)
            self._same(action, mine, result_of(action, pair.model))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 50))
    def commit(self, which: int) -> None:
        """A transaction commits or conflicts, as the reference does."""
        pair = self.open.pop(which % len(self.open))
        self._align(pair)
        mine, theirs = _end(pair.engine), _end(pair.model)
        expected = "no conflict" if theirs is None else f"{theirs.kind}: {theirs}"
        note(f"transaction {pair.number} ends: {mine!r}, reference: {expected}")
        if mine is not None and theirs is None and _below_floor(mine):
            raise AssertionError("the machine cannot go on below the floor: raise the retention")
        assert (mine is None) == (theirs is None), (
            f"transaction {pair.number} ended with {mine!r}; by the reference: {expected}"
        )
        if mine is not None and theirs is not None:
            assert mine.kind in {theirs.kind, "conflict"}, f"{mine!r} instead of {theirs!r}"
            return
        if pair.model.operations:
            assert pair.engine.committed.result(0) == pair.engine.version
            self._wrote(pair.client, pair.engine.version)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 50), by_error=st.booleans())
    def abort(self, which: int, by_error: bool) -> None:
        """An aborted transaction has no effect."""
        pair = self.open.pop(which % len(self.open))
        note(f"transaction {pair.number} aborts")
        pair.model.abort()
        if not by_error:
            pair.engine.abort()
        self._leave(pair, ValueError("on purpose") if by_error else None)

    # Clients

    @rule(client=st.integers(1, CLIENTS - 1), killed=st.booleans())
    def end_one(self, client: int, killed: bool) -> None:
        """A client that is closed or killed takes its transactions with it, and nothing else."""
        pool = self.clients[client]
        if killed:
            self.harness.kill(pool)
        else:
            pool.close()
        for pair in [pair for pair in self.open if pair.client == client]:
            self.open.remove(pair)
            pair.model.abort()
            if not killed:
                ended = _end(pair.engine)
                empty = ended is None and not pair.model.operations
                assert isinstance(ended, ClosedError) or empty, f"{ended!r} after close()"
        self.handles = [kept for kept in self.handles if kept[0] != client]
        self.clients[client] = self.harness.open()

    @rule()
    def crash(self) -> None:
        """What was committed is there after a crash, and nothing else."""
        self._compare_watches()
        self.harness.crash()
        for pair in self.open:
            pair.model.abort()
        self.open.clear()
        self.handles.clear()
        self.model_watch.close()
        self.clients.clear()
        self._open_clients()
        self.compare_everything()

    @rule()
    def compare_everything(self) -> None:
        """Every client shows the same pool as the reference."""
        for number, pool in enumerate(self.clients):
            pool.sync()
            assert list(pool) == list(self.model), f"names of client {number}"
            for name in self.model:
                for look in (
                    Action(f"get({name[-6:]!r})", lambda to, n=name: to[n]),
                    Action(f"memory({name[-6:]!r})[:]", lambda to, n=name: to.memory(n)[:]),
                ):
                    self._same(look, result_of(look, pool), result_of(look, self.model))

    @rule()
    def compare_watches(self) -> None:
        """A watch tells of every change, in commit order."""
        self._compare_watches()

    def teardown(self) -> None:
        try:
            if self.clients and sys.exc_info()[0] is None:
                self.compare_everything()
                self._compare_watches()
        finally:
            for pair in self.open:
                pair.model.abort()
                pair.engine.abort()
                _end(pair.engine)
            self.open.clear()
            self.harness.close()

    # Helpers

    def _current(self, client: int) -> Any:
        """Return a client that knows all that was committed; its own commits it knows already."""
        pool = self.clients[client]
        if client != self.last_writer:
            pool.sync()
        return pool

    def _wrote(self, client: int, version: int) -> None:
        self.last_writer = client
        self._note_version(version)

    def _note_version(self, version: int) -> None:
        if self.versions:
            last = self.versions[-1]
            assert version >= last[0], f"version {version} after {last[0]}"
            changed = self._changed_between(last[1], self.model.version)
            assert version > last[0] or not changed, "a commit kept the version"
        self.versions.append((version, self.model.version))

    def _changed_between(self, first: int, last: int) -> bool:
        return any(record.committed for record in self.model.log.records[first:last])

    def _align(self, pair: Pair) -> None:
        """Let the reference read at the engine's snapshot, if that says which one it is.

        An engine may take its snapshot at the first read rather than at the beginning.
        """
        snapshot = getattr(pair.engine, "snapshot", None)
        if isinstance(snapshot, int):
            known = bisect_right(self.versions, (snapshot, sys.maxsize)) - 1
            aligned = self.versions[known][1]
            if aligned > pair.model.snapshot:
                pair.model.snapshot = aligned
            else:  # aborted records count versions, but change nothing
                older = self._changed_between(aligned, pair.model.snapshot)
                assert not older, "the snapshot is older than the transaction"

    def _same(self, action: Action, mine: tuple[str, Any], theirs: tuple[str, Any]) -> None:
        assert mine == theirs, f"{action}: {_short(mine)}; by the reference: {_short(theirs)}"

    def _refused_early(self, pair: Pair, action: Action, error: ConflictError) -> None:
        self.open.remove(pair)
        found = pair.model.conflict()
        note(f"transaction {pair.number} is refused at a read; reference: {found}")
        assert found is not None or _below_floor(error), (
            f"{action} in transaction {pair.number} raised {error!r}; by the reference: nothing"
        )
        pair.model.abort()
        self._leave(pair, error)

    def _leave(self, pair: Pair, error: Exception | None) -> None:
        kind = None if error is None else type(error)
        swallowed = pair.engine.__exit__(kind, error, None)
        assert not swallowed, "a transaction swallowed an exception"

    def _compare_watches(self) -> None:
        """Compare, version by version, which names changed; engines may join or split writes."""
        mark = f"mark/{len(self.versions)}"
        for side in (self._current(0), self.model):
            side[mark] = 0
            del side[mark]
        self._wrote(0, self.clients[0].version)
        mine, theirs = _changes(self.watch, mark), _changes(self.model_watch, mark)
        assert mine == theirs, f"watched {mine}; by the reference {theirs}"


def _changes(watch: Any, mark: str) -> list[list[str]]:
    """Return the names that each commit changed, up to the deletion of `mark`."""
    commits: dict[int, set[str]] = {}
    order: list[int] = []
    while True:
        change = watch.get(PATIENCE_S)
        assert change is not None, f"a watch told nothing for {PATIENCE_S} s"
        if (change.name, change.kind) == (mark, "delete"):
            assert order == sorted(order), f"a watch told versions in the order {order}"
            return [sorted(names) for names in commits.values()]
        if change.version not in commits:
            order.append(change.version)
        commits.setdefault(change.version, set()).add(change.name)


def _end(transaction: Any) -> EverpoolError | None:
    """Leave the transaction as a `with` statement would; returns what that raised."""
    try:
        transaction.__exit__(None, None, None)
    except EverpoolError as error:
        return error
    return None


def _below_floor(error: EverpoolError) -> bool:
    return error.kind == "conflict" and "floor" in error.facts


def _short(result: tuple[str, Any]) -> str:
    text = repr(result)
    return text if len(text) < 300 else text[:300] + "…"


def pool_machine(make_pool: Callable[[], Harness]) -> type[PoolMachine]:
    """Return a state machine for the engine whose new pools `make_pool` makes."""
    return type("PoolMachine", (PoolMachine,), {"make_pool": staticmethod(make_pool)})
