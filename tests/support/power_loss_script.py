"""What the actors of a power-loss test do, step by step, and what the pool holds after each step.

An actor is a thread that owns the names under its own, and shares a bank and a counter with the
others. Its script is a pure function of its name, a seed and a mix, so whoever knows how many of
its steps were acknowledged and begun knows what the pool may hold of it after a power cut: what
it held after k steps, for some k in between, and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from xxhash import xxh3_64_hexdigest

ACCOUNTS = 8
OPENING_BALANCE = 1000
BANK, TOTAL = "bank", "total"
LEDGER_BYTES = 3 * 4096 + 500
BIG_BYTES = 3 << 19
RING_BYTES = 256 << 10

# Steps of a kind in a hundred or so; see `_Author`.
FULL_MIX: Mapping[str, int] = {
    "inline": 12,
    "bulk": 8,
    "delete": 6,
    "word": 14,
    "huge": 3,
    "beyond_ring": 3,
    "own_count": 8,
    "shared_count": 8,
    "transfer": 12,
    "mixed": 12,
    "rebuild": 6,
    "pipeline": 4,
    "flush": 5,
}
# Without pipelines, of which one may be refused and the next not.
ONE_BY_ONE: Mapping[str, int] = {k: n for k, n in FULL_MIX.items() if k != "pipeline"}
COUNTING_MIX: Mapping[str, int] = {"own_count": 1, "shared_count": 1, "flush": 1}
FLUSHING_MIX: Mapping[str, int] = {"huge": 2, "word": 2, "flush": 1}
LARGE_MIX: Mapping[str, int] = {"beyond_ring": 1, "word": 2, "inline": 1}
NEEDS_NO_MEMORY = {"inline", "bulk", "delete", "rebuild", "flush"}
# No large files: many commits in little time.
SMALL_MIX: Mapping[str, int] = {
    k: FULL_MIX[k] for k in ("inline", "delete", "word", "own_count", "shared_count", "mixed")
}


@dataclass(frozen=True)
class Operation:
    """One change: put, delete, allocate, write, add, share (add to the common counter), move."""

    kind: str
    name: str = ""
    offset: int = 0
    size: int = 0
    key: str = ""  # what the content is made of
    amount: int = 0
    accounts: tuple[int, int] = (0, 0)

    def content(self) -> bytes:
        return content(self.key, self.size)


@dataclass(frozen=True)
class Step:
    """Operations that count together; `how` is direct, transaction, pipelined or flush."""

    how: str
    operations: tuple[Operation, ...] = ()


State = dict[str, str]
"""What an actor's names hold: for each a digest of the value's or memory's bytes."""


@dataclass
class Script:
    """The steps of one actor. `states[k]` and `shared[k]` are of the time after k steps."""

    steps: list[Step] = field(default_factory=list[Step])
    states: list[State] = field(default_factory=lambda: [{}])
    shared: list[int] = field(default_factory=lambda: [0])


def content(key: str, size: int) -> bytes:
    """Bytes that only this key gives."""
    return random.Random(key).randbytes(size)


def digest(kind: str, data: bytes | bytearray | memoryview) -> str:
    """What stands for an object's bytes; `kind` is value or memory."""
    return f"{kind} of {len(data)}: {xxh3_64_hexdigest(data)}"


def digest_of_state(state: State) -> str:
    """What stands for all that an actor's names hold."""
    return xxh3_64_hexdigest(repr(sorted(state.items())).encode())


def transfer_text(operation: Operation) -> bytes:
    """What a transfer writes down under its name."""
    source, target = operation.accounts
    return f"{source} {target} {operation.amount}".encode()


@cache
def script(actor: str, seed: int, steps: int, kinds: tuple[tuple[str, int], ...]) -> Script:
    """The script of an actor; `kinds` is a mix as items."""
    author = _Author(actor, seed)
    names, weights = zip(*kinds, strict=True)
    if not NEEDS_NO_MEMORY.issuperset(names):
        author.begin()
    while len(author.script.steps) < steps:
        author.write_one(author.random.choices(names, weights)[0])
    return author.script


class _Author:
    """Writes one script and plays it on a model as it goes."""

    def __init__(self, actor: str, seed: int) -> None:
        self.actor = actor
        self.random = random.Random(f"{actor} {seed}")
        self.script = Script()
        self._bytes: dict[str, bytes | bytearray] = {}
        self._state: State = {}
        self._shared = 0
        self._keys = 0

    def begin(self) -> None:
        """Make the memory to work on."""
        self._step("direct", Operation("allocate", self._name("ledger"), size=LEDGER_BYTES))
        self._step("direct", Operation("allocate", self._name("big"), size=BIG_BYTES))

    def write_one(self, kind: str) -> None:
        if kind == "flush":
            self._step("flush")
        elif kind == "pipeline":
            for _ in range(self.random.randint(3, 8)):
                self._step("pipelined", *self._mixed())
        elif kind == "mixed":
            self._step("transaction", *self._mixed())
        elif kind == "transfer":
            self._step("transaction", self._transfer())
        else:
            self._step("direct", self._single(kind))

    def _single(self, kind: str) -> Operation:
        pick = self.random
        match kind:
            case "inline":
                return self._put(pick.choice((1, 40, 900, 5000, 60_000)))
            case "bulk":
                return self._put(pick.choice((66_000, 150_000, 300_000, 1_100_000)))
            case "delete":
                values = sorted(name for name in self._state if "/v" in name)
                return Operation("delete", pick.choice(values)) if values else self._put(7)
            case "word":
                return self._word()
            case "huge":
                return self._store(
                    "big", pick.randrange(1 << 18), (1 << 20) + pick.randint(1, 9000)
                )
            case "beyond_ring":
                return self._store(
                    "big", pick.randrange(1 << 18), RING_BYTES + pick.randrange(4096)
                )
            case "own_count":
                return Operation("add", self._name("ledger"), 0, 8, amount=pick.randint(1, 99))
            case "shared_count":
                return Operation("share", amount=pick.randint(1, 99))
            case _:
                return self._rebuild()

    def _mixed(self) -> list[Operation]:
        """Changes of several objects that only count together."""
        chosen = [self._word(), self._put(self.random.choice((20, 3000))), self._word()]
        if self.random.random() < 0.2:
            chosen.append(self._put(70_000))
        if self.random.random() < 0.3:
            chosen.append(self._store("big", 4096 * self.random.randrange(8), 9000))
        return chosen

    def _transfer(self) -> Operation:
        source, target = self.random.sample(range(ACCOUNTS), 2)
        name = self._name(f"audit/{len(self.script.steps)}")
        return Operation("move", name, amount=self.random.randint(1, 50), accounts=(source, target))

    def _rebuild(self) -> Operation:
        """Memory that comes, is written to, and goes."""
        name = self._name("passing")
        known = self._bytes.get(name)
        if known is None:
            return Operation("allocate", name, size=self.random.choice((1, 5000, 70_000)))
        if self.random.random() < 0.6:
            return Operation("delete", name)
        return self._store("passing", 0, len(known))

    def _put(self, size: int) -> Operation:
        name = self._name(f"v{self.random.randrange(5)}")
        return Operation("put", name, size=size, key=self._key())

    def _word(self) -> Operation:
        """Eight bytes, at one of few places, also across pages."""
        offset = self.random.choice((8, 512, 4092, 4096, 8190, LEDGER_BYTES - 8))
        return self._store("ledger", offset, 8)

    def _store(self, where: str, offset: int, size: int) -> Operation:
        return Operation("write", self._name(where), offset, size, self._key())

    def _large_store(self, size: int) -> Operation:
        return self._store("big", self.random.randrange(1 << 18), size)

    def _name(self, rest: str) -> str:
        return f"{self.actor}/{rest}"

    def _key(self) -> str:
        self._keys += 1
        return f"{self.actor} {self._keys}"

    def _step(self, how: str, *operations: Operation) -> None:
        for operation in operations:
            self._play(operation)
        self.script.steps.append(Step(how, operations))
        self.script.states.append(dict(self._state))
        self.script.shared.append(self._shared)

    def _play(self, operation: Operation) -> None:
        name, offset, size = operation.name, operation.offset, operation.size
        match operation.kind:
            case "share":
                self._shared += operation.amount
                return
            case "delete":
                del self._bytes[name], self._state[name]
                return
            case "put":
                self._bytes[name] = operation.content()
            case "move":
                self._bytes[name] = transfer_text(operation)
            case "allocate":
                self._bytes[name] = bytearray(size)
            case _:
                memory = self._bytes[name]
                assert isinstance(memory, bytearray)
                if operation.kind == "add":
                    old = int.from_bytes(memory[offset : offset + 8], "little")
                    memory[offset : offset + 8] = (old + operation.amount).to_bytes(8, "little")
                else:
                    memory[offset : offset + size] = operation.content()
        data = self._bytes[name]
        self._state[name] = digest("memory" if isinstance(data, bytearray) else "value", data)
