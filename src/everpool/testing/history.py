"""Records what clients did to a pool, and checks that one serial order explains all of it.

Each client appends to a file of its own, one JSON object a line, so that a killed process leaves
what it had done. `Recorder` writes them, `load` reads them, `check` judges:

    recorder = Recorder("client-1.jsonl", client=1)
    for _ in range(100):
        play(pool, recorder, random.Random(1))
    ...
    problems = check(load(["client-1.jsonl", "client-2.jsonl"]), final_state(pool))

What is read and written are *cells*: a name whose value is a number, or eight bytes of memory.
Every write stores a number that is stored nowhere else, so a read tells whose write it saw. The
versions are known, and commit order must be version order, which makes the check exact. A
dependency graph of the transactions gets these edges:

- *version*: from each commit to the next one,
- *read*: from the commit that wrote a number to who read it,
- *overwrite*: from who read a number to the commit that replaced it,
- *client*: from one transaction of a client to the next that began after it ended,
- *seen*: from the newest commit that a client knew of (its own, or by `sync`) to what it began.

A cycle is something that no serial order explains. Transactions that were aborted count with what
they read: they must not be shown a mix of versions either. The edges are those of A. Adya, "Weak
Consistency" (1999), section 3.1.
"""

import json
import random
import re
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from everpool.errors import CommitUnknownError, EverpoolError

CELLS = "history/cells"
NAMES = [f"history/{number}" for number in range(3)]
DEFAULT_CELLS = [*NAMES, *(f"{CELLS}[{number}]" for number in range(5))]
_IN_MEMORY = re.compile(r"(.+)\[(\d+)\]")


class Problem(NamedTuple):
    """What no correct pool does. `kind` is cycle, lost, doubled, stale, phantom or order."""

    kind: str
    detail: str


@dataclass
class Recorded:
    """A transaction as its client saw it. `version` is None unless it committed something."""

    label: str
    client: int
    began_ns: int
    seen_version: int
    reads: dict[str, int] = field(default_factory=dict[str, int])
    writes: dict[str, int] = field(default_factory=dict[str, int])
    state: str = "unknown"
    version: int | None = None
    ended_ns: int | None = None


class Synced(NamedTuple):
    """A call of `sync` and what it returned."""

    client: int
    began_ns: int
    version: int


@dataclass
class History:
    """Everything that was recorded, and what is wrong with the record itself."""

    transactions: list[Recorded] = field(default_factory=list[Recorded])
    syncs: list[Synced] = field(default_factory=list[Synced])
    problems: list[Problem] = field(default_factory=list[Problem])


class Recorder:
    """Appends what one client does to a file. Not for several threads."""

    def __init__(self, path: str | Path, client: int) -> None:
        self.client = client
        self._file = Path(path).open("a", buffering=1)  # noqa: SIM115
        self._count = 0
        self._numbers = 0
        self._seen_version = 0

    @contextmanager
    def transaction(self, pool: Any) -> Iterator["RecordedTransaction"]:
        """A transaction whose reads, writes and outcome are recorded.

        A line is written before the commit is tried and one after it, so that a client that dies
        in between leaves a transaction of unknown outcome.
        """
        self._count += 1
        label = f"{self.client}/{self._count}"
        began_ns = time.monotonic_ns()
        recorded = RecordedTransaction(self)
        state, version = "aborted", None
        try:
            with pool.transaction() as tx:
                recorded.tx = tx
                self._note("begin", label, began_ns=began_ns, seen=self._seen_version)
                yield recorded
                self._note("try", label, reads=recorded.reads, writes=recorded.writes)
            state, version = "committed", tx.version if recorded.writes else None
        except CommitUnknownError:
            state = "unknown"
            raise
        finally:
            if version is not None:
                self._seen_version = max(self._seen_version, version)
            self._note("end", label, state=state, version=version, reads=recorded.reads)

    def sync(self, pool: Any) -> None:
        """Call `pool.sync()` and record what it returned."""
        began_ns = time.monotonic_ns()
        version = pool.sync()
        self._seen_version = max(self._seen_version, version)
        self._note("sync", "", began_ns=began_ns, version=version)

    def unique(self) -> int:
        """Return a number that no client has stored before."""
        self._numbers += 1
        return (self.client + 1) << 32 | self._numbers

    def close(self) -> None:
        self._file.close()

    def _note(self, event: str, label: str, **facts: object) -> None:
        line = {"event": event, "t": label, "client": self.client, "at_ns": time.monotonic_ns()}
        self._file.write(json.dumps({**line, **facts}) + "\n")


class RecordedTransaction:
    """Reads and writes cells in a transaction, and remembers both. A missing cell reads as 0."""

    def __init__(self, recorder: Recorder) -> None:
        self.tx: Any = None
        self.reads: dict[str, int] = {}
        self.writes: dict[str, int] = {}
        self._recorder = recorder

    def read(self, cell: str) -> int:
        number = read_cell(self.tx, cell)
        if cell not in self.writes:
            self.reads[cell] = number
        return number

    def write(self, cell: str) -> int:
        number = self.writes[cell] = self._recorder.unique()
        in_memory = _IN_MEMORY.fullmatch(cell)
        if in_memory:
            memory = self.tx.memory(in_memory[1])
            memory.write(8 * int(in_memory[2]), number.to_bytes(8, "little"))
        else:
            self.tx[cell] = number
        return number


def read_cell(pool: Any, cell: str) -> int:
    """Return the number in a cell of a pool or transaction."""
    in_memory = _IN_MEMORY.fullmatch(cell)
    if in_memory is None:
        return pool.get(cell, 0)
    return int.from_bytes(pool.memory(in_memory[1]).read(8 * int(in_memory[2]), 8), "little")


def prepare(pool: Any) -> None:
    """Allocate the memory in which the default cells lie."""
    pool.allocate(CELLS, 8 * len(DEFAULT_CELLS))


def play(
    pool: Any, recorder: Recorder, choose: random.Random, cells: list[str] = DEFAULT_CELLS
) -> None:
    """Run one random transaction, recorded: some reads, mostly some writes, now and then a sync."""
    if choose.random() < 0.1:
        recorder.sync(pool)
    reads = choose.sample(cells, choose.randint(0, 3))
    writes = choose.sample(cells, choose.choice([0, 1, 1, 2]))
    try:
        with recorder.transaction(pool) as tx:
            for cell in reads:
                tx.read(cell)
                time.sleep(choose.choice([0, 0, 0.0002]))
            for cell in writes:
                tx.write(cell)
    except EverpoolError as error:
        if error.kind not in {"conflict", "commit_unknown"}:
            raise


def final_state(pool: Any, cells: list[str] = DEFAULT_CELLS) -> dict[str, int]:
    """Return the number in every cell."""
    pool.sync()
    return {cell: read_cell(pool, cell) for cell in cells}


def load(paths: Iterable[str | Path]) -> History:
    """Read what clients recorded. A last line that was cut off by a kill is passed over."""
    history = History()
    known: dict[str, Recorded] = {}
    for path in paths:
        lines = Path(path).read_text().split("\n")
        for line in lines[:-1]:
            _add(history, known, json.loads(line))
    history.transactions = list(known.values())
    return history


def _add(history: History, known: dict[str, Recorded], line: dict[str, Any]) -> None:
    label = line["t"]
    match line["event"]:
        case "begin":
            known[label] = Recorded(label, line["client"], line["began_ns"], line["seen"])
        case "try":
            known[label].reads = line["reads"]
            known[label].writes = line["writes"]
        case "end":
            tx = known.setdefault(label, Recorded(label, line["client"], line["at_ns"], 0))
            tx.reads = line["reads"]
            tx.ended_ns = line["at_ns"]
            if tx.state == "committed" and (line["state"], line["version"]) != (
                tx.state,
                tx.version,
            ):
                history.problems.append(
                    Problem(
                        "doubled", f"{label} was decided twice: {tx.version}, {line['version']}"
                    )
                )
            tx.state, tx.version = line["state"], line["version"]
        case "sync":
            history.syncs.append(Synced(line["client"], line["began_ns"], line["version"]))
        case event:
            raise ValueError(f"a history has no event {event!r}")


def check(history: History, final: dict[str, int] | None = None) -> list[Problem]:
    """Return everything that no correct pool would have done; `final` is what is left in the end.

    A commit of unknown outcome counts as committed when somebody saw what it wrote, else not.
    """
    judge = _Judge(history, final or {})
    problems = [*history.problems, *judge.versions(), *judge.phantoms(), *judge.stale()]
    problems += judge.lost()
    return problems + judge.cycles()


class _Judge:
    def __init__(self, history: History, final: dict[str, int]) -> None:
        self.history = history
        self.final = final
        self.writer = {
            (cell, number): tx for tx in history.transactions for cell, number in tx.writes.items()
        }
        seen = {item for tx in history.transactions for item in tx.reads.items()}
        seen |= set(final.items())
        self.committed = [
            tx
            for tx in history.transactions
            if tx.writes
            and (
                tx.state == "committed"
                or (tx.state == "unknown" and any(item in seen for item in tx.writes.items()))
            )
        ]
        self.in_order = sorted(
            (tx for tx in self.committed if tx.version is not None), key=_version
        )
        self.writes: dict[str, list[Recorded]] = {}
        """The commits of known version that wrote a cell, in order."""
        for tx in self.in_order:
            for cell in tx.writes:
                self.writes.setdefault(cell, []).append(tx)
        self.seen_unknown: dict[str, list[Recorded]] = {}
        """The commits of unknown version that wrote a cell, and of which somebody saw something."""
        for tx in self.committed:
            for cell in tx.writes if tx.version is None else ():
                self.seen_unknown.setdefault(cell, []).append(tx)

    def versions(self) -> Iterator[Problem]:
        """Two commits never share a version, and a later one has a higher version."""
        for earlier, later in zip(self.in_order, self.in_order[1:], strict=False):
            if earlier.version == later.version:
                yield Problem(
                    "doubled", f"{earlier.label} and {later.label} are both version {later.version}"
                )
        highest: Recorded | None = None
        by_end = sorted((tx for tx in self.in_order if tx.ended_ns is not None), key=_ended)
        by_start = sorted(self.in_order, key=lambda tx: tx.began_ns)
        ended = 0
        for tx in by_start:
            while ended < len(by_end) and _ended(by_end[ended]) < tx.began_ns:
                if highest is None or _version(by_end[ended]) > _version(highest):
                    highest = by_end[ended]
                ended += 1
            if highest is not None and _version(highest) > _version(tx):
                yield Problem(
                    "order",
                    f"{tx.label} began after {highest.label} was version {highest.version}, "
                    f"and is version {tx.version}",
                )

    def phantoms(self) -> Iterator[Problem]:
        """Nobody reads what nobody committed."""
        for tx in self.history.transactions:
            for cell, number in tx.reads.items():
                writer = self.writer.get((cell, number))
                if number and (writer is None or writer.state == "aborted"):
                    what = "nobody wrote" if writer is None else f"{writer.label} aborted"
                    yield Problem("phantom", f"{tx.label} read {number} in {cell}: {what}")

    def stale(self) -> Iterator[Problem]:
        """Whoever knows of a version sees it; a sync reaches what was acknowledged before it."""
        for tx in self.history.transactions:
            for cell, number in tx.reads.items():
                newer = self._overwriter(cell, number)
                if newer is not None and _version(newer) <= tx.seen_version:
                    yield Problem(
                        "stale",
                        f"{tx.label} knew of version {tx.seen_version} and read {number} in "
                        f"{cell}, which version {newer.version} ({newer.label}) had replaced",
                    )
        ends = sorted((_ended(tx), _version(tx)) for tx in self.in_order if tx.ended_ns)
        for sync in self.history.syncs:
            before = [version for ended_ns, version in ends if ended_ns < sync.began_ns]
            if before and max(before) > sync.version:
                yield Problem(
                    "stale",
                    f"client {sync.client} synced to version {sync.version} after version "
                    f"{max(before)} was acknowledged",
                )

    def lost(self) -> Iterator[Problem]:
        """What was acknowledged is there at the end, unless it was replaced."""
        for cell, number in self.final.items():
            writes = self.writes.get(cell, [])
            writer = self.writer.get((cell, number))
            if writer is not None and writer.state == "unknown":
                continue  # it may have come after all the others
            if writes and writes[-1].writes[cell] != number:
                last = writes[-1]
                yield Problem(
                    "lost",
                    f"{cell} holds {number} at the end; version {last.version} ({last.label}) "
                    f"had written {last.writes[cell]}",
                )
            elif number and (writer is None or writer.state == "aborted"):
                yield Problem("phantom", f"{cell} holds {number} at the end, which is no commit's")
            elif not number:
                for tx in self.seen_unknown.get(cell, []):
                    yield Problem("lost", f"{cell} holds nothing at the end, {tx.label} wrote it")

    def cycles(self) -> list[Problem]:
        """Some serial order explains everything."""
        edges = self._edges()
        problems: list[Problem] = []
        for component in _components(edges):
            if len(component) > 1:
                words = " -> ".join(_shortest_cycle(component, edges))
                problems.append(Problem("cycle", words))
        return problems

    def _edges(self) -> dict[str, dict[str, str]]:
        edges: dict[str, dict[str, str]] = {tx.label: {} for tx in self.history.transactions}

        def add(source: Recorded, target: Recorded, why: str) -> None:
            if source is not target:
                edges[source.label].setdefault(target.label, why)

        for earlier, later in zip(self.in_order, self.in_order[1:], strict=False):
            add(earlier, later, f"version {earlier.version} < {later.version}")
        for tx in self.history.transactions:
            for cell, number in tx.reads.items():
                writer = self.writer.get((cell, number))
                if writer is not None:
                    add(writer, tx, f"wrote {cell}, read by")
                newer = self._overwriter(cell, number)
                if newer is not None:
                    add(tx, newer, f"read {cell}, overwritten by")
                for unknown in () if number else self.seen_unknown.get(cell, []):
                    add(tx, unknown, f"read nothing in {cell}, overwritten by")
        self._add_client_edges(add)
        return edges

    def _add_client_edges(self, add: Any) -> None:
        versions = [_version(tx) for tx in self.in_order]
        last: dict[int, Recorded] = {}
        for tx in sorted(self.history.transactions, key=lambda tx: tx.began_ns):
            at = bisect_right(versions, tx.seen_version)
            if at:
                add(self.in_order[at - 1], tx, f"was seen as version {versions[at - 1]} by")
            before = last.get(tx.client)
            if before is not None and before.ended_ns is not None:
                add(before, tx, f"was before in client {tx.client}:")
            last[tx.client] = tx

    def _overwriter(self, cell: str, number: int) -> Recorded | None:
        """Return the first commit of known version that replaced the number in the cell."""
        writes = self.writes.get(cell, [])
        if not number:
            return writes[0] if writes else None
        writer = self.writer.get((cell, number))
        if writer is None or writer.version is None:
            return None
        at = bisect_right(writes, writer.version, key=_version)
        return writes[at] if at < len(writes) else None


def _version(tx: Recorded) -> int:
    assert tx.version is not None
    return tx.version


def _ended(tx: Recorded) -> int:
    assert tx.ended_ns is not None
    return tx.ended_ns


def _components(edges: dict[str, dict[str, str]]) -> list[list[str]]:
    """Return the strongly connected components: Tarjan's algorithm, without recursion."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    found: list[list[str]] = []
    for root in edges:
        if root in index:
            continue
        work: list[tuple[str, Iterator[str]]] = [(root, iter(edges[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, targets = work[-1]
            target = next(targets, None)
            if target is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    at = stack.index(node)
                    found.append(stack[at:])
                    on_stack.difference_update(stack[at:])
                    del stack[at:]
            elif target not in index:
                index[target] = low[target] = len(index)
                stack.append(target)
                on_stack.add(target)
                work.append((target, iter(edges[target])))
            elif target in on_stack:
                low[node] = min(low[node], index[target])
    return found


def _shortest_cycle(component: list[str], edges: dict[str, dict[str, str]]) -> list[str]:
    """Return a shortest cycle through one of the first transactions, in words."""
    inside = set(component)
    cycles = [_cycle_through(start, inside, edges) for start in component[:100]]
    best = min(cycles, key=len)
    return [f"{a} {edges[a][b]}" for a, b in zip(best, best[1:] + best[:1], strict=True)] + best[:1]


def _cycle_through(start: str, inside: set[str], edges: dict[str, dict[str, str]]) -> list[str]:
    came_from: dict[str, str] = {}
    queue = [start]
    for node in queue:
        for target in edges[node]:
            if target == start:
                path = [node]
                while path[-1] != start:
                    path.append(came_from[path[-1]])
                return path[::-1]
            if target in inside and target not in came_from:
                came_from[target] = node
                queue.append(target)
    raise AssertionError(f"{start} is in no cycle")
