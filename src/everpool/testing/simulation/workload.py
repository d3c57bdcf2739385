"""The transactions of a simulation: each breaks visibly when one of the rules does not hold."""

import random
from collections.abc import Callable

from everpool.records import Allocate, Delete, FetchAdd, Operation, Put, Range, Record, Write
from everpool.testing.memory_replica import MemoryReplica
from everpool.testing.simulation.witness import Attempt, SawBytes, SawName, SawNames, Sight

ACCOUNTS = 6
OPENING_BALANCE = 100
CELL = 8
# Offset and type of each counter; they lie close together and none crosses another.
COUNTERS = [(0, "<i8"), (8, "|u1"), (9, "<i4"), (16, "<f8"), (24, ">u2")]
COUNTERS_SIZE = 32
SCRATCH_SIZE = 40
SCRATCHES = 3
DOCUMENTS = 3
ITEMS = 5


class View:
    """A transaction in the making: reads a replica, notes what it sees, collects operations.

    `handles` are ids of memory that its process has got hold of earlier; to use one is not to
    read its name.
    """

    def __init__(self, replica: MemoryReplica, handles: dict[str, int]) -> None:
        self._replica = replica
        self.handles = handles
        self.snapshot = replica.version
        self.names_read: list[str] = []
        self.prefixes: list[str] = []
        self.ranges: list[Range] = []
        self.operations: list[Operation] = []
        self.sights: list[Sight] = []

    def bound(self, name: str) -> tuple[int, bytes | None] | None:
        """Read a name: id and payload; None for the payload of memory."""
        row = self._replica.row(name)
        found = None
        if row is not None:
            found = (
                row.id,
                None if row.size >= 0 or type(row.payload) is not bytes else row.payload,
            )
            if row.size >= 0:
                self.handles[name] = row.id
        self.names_read.append(name)
        self.sights.append(SawName(name, found))
        return found

    def names(self, prefix: str) -> list[str]:
        """List a prefix."""
        found = self._replica.names(prefix)
        self.prefixes.append(prefix)
        self.sights.append(SawNames(prefix, found))
        return found

    def read(self, id: int, start: int, end: int) -> bytes | None:
        """Read bytes of memory; None when it is gone."""
        alive = self._replica.disk.index.memory_size(id) is not None
        found = self._replica.read(id, start, end) if alive else None
        self.ranges.append((id, start, end))
        self.sights.append(SawBytes(id, start, end, found))
        return found

    def attempt(self, kind: str) -> Attempt:
        """Return what the session sends."""
        record = Record(self.snapshot, self.names_read, self.prefixes, self.ranges, self.operations)
        return Attempt(kind, record, self.sights)


def genesis() -> Record:
    """Return the first record of every simulation: accounts and counters."""
    balances = OPENING_BALANCE.to_bytes(CELL, "little") * ACCOUNTS
    return Record(
        0,
        [],
        [],
        [],
        [
            Allocate("accounts", CELL * ACCOUNTS, b""),
            Write(-1, 0, balances),
            Allocate("counters", COUNTERS_SIZE, b"counters"),
        ],
    )


def transfer(rng: random.Random, view: View) -> None:
    """Move money between two accounts: their sum must stay."""
    bound = view.bound("accounts")
    if bound is None:
        return  # a replica that has not played the first record
    poor, rich = rng.sample(range(ACCOUNTS), 2)
    amount = rng.randint(1, 5)
    for cell, change in ((poor, amount), (rich, -amount)):
        data = view.read(bound[0], cell * CELL, (cell + 1) * CELL)
        assert data is not None, "nobody deletes the accounts"
        new = int.from_bytes(data, "little", signed=True) + change
        view.operations.append(
            Write(bound[0], cell * CELL, new.to_bytes(CELL, "little", signed=True))
        )


def count(rng: random.Random, view: View) -> None:
    """Add to counters without reading anything."""
    counters = view.handles.get("counters")
    if counters is None:
        return
    for offset, dtype in rng.sample(COUNTERS, rng.randint(1, 3)):
        size = int(dtype[2:])
        delta = rng.randint(1, 3) if dtype != "<f8" else 0
        data = delta.to_bytes(size, "big" if dtype[0] == ">" else "little")
        if dtype == "<f8":
            data = bytes.fromhex("000000000000f83f")  # 1.5
        view.operations.append(FetchAdd(counters, offset, dtype, data))


def append(rng: random.Random, view: View) -> None:
    """Extend a value by what is in it: a lost update would show."""
    name = f"doc/{rng.randrange(DOCUMENTS)}"
    bound = view.bound(name)
    old = (bound[1] or b"") if bound else b""
    view.operations.append(Put(name, old[-12:] + rng.randbytes(3)))


def summarize(rng: random.Random, view: View) -> None:
    """Write down which items there are."""
    prefix = rng.choice(["item/", "item/1", ""])
    view.operations.append(Put("doc/summary", ",".join(view.names(prefix)).encode()))


def toggle(rng: random.Random, view: View) -> None:
    """Make an item, or remove it; sometimes blindly, sometimes to and fro in one record."""
    name = f"item/{rng.randrange(ITEMS)}{rng.randrange(2)}"
    if rng.random() < 0.3:
        view.operations.append(Put(name, rng.randbytes(2)))
        return
    present = view.bound(name) is not None
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        view.operations.append(Delete(name) if present else Put(name, rng.randbytes(2)))
        present = not present


def recreate(rng: random.Random, view: View) -> None:
    """Make memory under a name, remove it, or put other memory in its place."""
    name = f"scratch/{rng.randrange(SCRATCHES)}"
    present = view.bound(name) is not None
    if present:
        view.operations.append(Delete(name))
    if not present or rng.random() < 0.5:
        view.operations.append(Allocate(name, SCRATCH_SIZE, rng.randbytes(1)))
        view.operations.append(Write(-1, rng.randrange(20), rng.randbytes(4)))


def scribble(rng: random.Random, view: View) -> None:
    """Use memory by a handle, whatever its name is bound to meanwhile."""
    name = f"scratch/{rng.randrange(SCRATCHES)}"
    id = view.handles.get(name)
    if id is None or rng.random() < 0.1:
        bound = view.bound(name)
        if bound is None or bound[1] is not None:
            return
        id = bound[0]
    start, size = rng.randrange(SCRATCH_SIZE - 8), rng.choice([1, 2, 4, 7])
    data = bytes(size)
    if rng.random() < 0.6:
        read = view.read(id, start, start + size)
        if read is None:
            del view.handles[name]
        data = read or data
    if rng.random() < 0.3:
        view.operations.append(Put("doc/copy", data))
        return
    at = rng.randrange(SCRATCH_SIZE - 8)
    view.operations.append(Write(id, at, bytes(x ^ 0x55 for x in data) + rng.randbytes(1)))
    if rng.random() < 0.3:
        view.operations.append(FetchAdd(id, at, "<i2", b"\1\0"))


def skew(rng: random.Random, view: View) -> None:
    """Read two documents, write one of them: write skew unless readers are checked."""
    one, other = rng.sample(range(DOCUMENTS), 2)
    seen = [view.bound(f"doc/{at}") for at in (one, other)]
    total = sum(len(bound[1] or b"") + bound[0] for bound in seen if bound)
    view.operations.append(Put(f"doc/{one}", total.to_bytes(4, "big")))


def refuse(rng: random.Random, view: View) -> None:
    """Ask for what cannot be done: the record must abort everywhere, and nothing of it remain."""
    view.operations.append(Put(f"item/{rng.randrange(ITEMS)}0", b"never"))
    accounts, counters = view.handles.get("accounts", 1), view.handles.get("counters", 2)
    view.operations.append(
        rng.choice(
            [
                Put("accounts", b"not over memory"),
                Allocate("counters", 8, b""),
                Delete("nothing"),
                Write(10**9, 0, b"nowhere"),
                Write(-1, 0, b"not allocated"),
                Write(accounts, CELL * ACCOUNTS - 1, b"over the end"),
                Write(accounts, -1, b"x"),
                FetchAdd(counters, COUNTERS_SIZE - 1, "<i8", bytes(8)),
                Allocate("scratch/none", 0, b""),
            ]
        )
    )


def mix(rng: random.Random, view: View) -> None:
    """Do several things at once."""
    for part in rng.sample(
        [transfer, count, append, toggle, recreate, scribble], rng.randint(2, 3)
    ):
        part(rng, view)


def look(rng: random.Random, view: View) -> None:
    """Only read."""
    bound = view.bound("accounts")
    if bound is not None:
        view.read(bound[0], 0, CELL * ACCOUNTS)
    counters = view.handles.get("counters")
    if counters is not None:
        view.read(counters, 0, COUNTERS_SIZE)
    view.names(rng.choice(["", "item/", "scratch/"]))


KINDS: list[tuple[int, Callable[[random.Random, View], None]]] = [
    (5, transfer),
    (4, count),
    (3, append),
    (2, summarize),
    (4, toggle),
    (4, recreate),
    (5, scribble),
    (2, skew),
    (1, refuse),
    (3, mix),
    (2, look),
]
_WEIGHTS = [weight for weight, _ in KINDS]


def draw(rng: random.Random, replica: MemoryReplica, handles: dict[str, int]) -> Attempt:
    """Return a random transaction on what the replica holds now."""
    _, kind = rng.choices(KINDS, _WEIGHTS)[0]
    if "counters" not in handles or rng.random() < 0.02:
        for name in ("accounts", "counters"):
            row = replica.row(name)
            if row is not None:
                handles[name] = row.id
    view = View(replica, handles)
    kind(rng, view)
    return view.attempt(kind.__name__)
