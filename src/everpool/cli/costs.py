"""What carrying objects will move: how many bytes, and about how many requests of a bucket.

All of it is known from the index, so that nothing is fetched in order to count.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import everpool
from everpool.cli.opening import is_url
from everpool.cli.terminal import count, human_size, print_json, print_line, printable, say_each
from everpool.errors import CorruptionError, InvalidError, NotFoundError

# How large values and memory travel: in parts of an upload, and in pieces of a download.
_INLINE_BYTES = 64 << 10
_PART_BYTES = 8 << 20
_PIECE_BYTES = 4 << 20
_OPENING_REQUESTS = 10


class Item(NamedTuple):
    """An object, and its bytes: those of a value, or those of memory that were ever written to."""

    name: str
    kind: str
    bytes: int

    @property
    def is_memory(self) -> bool:
        """Whether it is memory."""
        return self.kind == "memory"

    @property
    def comes_with_the_index(self) -> bool:
        """Whether whoever has opened the pool has it already."""
        return not self.is_memory and self.bytes <= _INLINE_BYTES


def _item(pool: everpool.Pool, name: str) -> Item:
    try:
        memory = pool.memory(name)
    except InvalidError:
        return Item(name, "value", pool.size_of(name))
    return Item(name, "memory", sum(size for _, size in memory.extents()))


@dataclass
class Requests:
    """About how many requests of each kind are made of buckets, and how many bytes these give."""

    put: int = 0
    get: int = 0
    egress_bytes: int = 0

    def open(self, pool: str) -> None:
        """Count the opening of a pool, if it is at a URL."""
        self.get += _OPENING_REQUESTS * is_url(pool)

    def read(self, item: Item) -> None:
        """Count the reading of an object out of a bucket."""
        if not item.comes_with_the_index:
            self.get += -(-item.bytes // _PIECE_BYTES)
            self.egress_bytes += item.bytes

    def upload(self, item: Item) -> None:
        """Count the uploading of a value, without the commit that names it."""
        if not item.comes_with_the_index:
            parts = -(-item.bytes // _PART_BYTES)
            self.put += parts if parts == 1 else parts + 2

    def in_words(self) -> str:
        """Return one line for people."""
        puts = f"{self.put:,} PUT and " if self.put else ""
        egress = f", {human_size(self.egress_bytes)} of egress" if self.egress_bytes else ""
        return f"about {puts}{self.get:,} GET requests{egress}"


class Plan:
    """Objects that a command would carry, and what that takes."""

    def __init__(self) -> None:
        self.requests = Requests()
        self._rows: list[tuple[str, Item, dict[str, Any]]] = []
        self._left_out: dict[str, str] = {}

    def items(self, pool: everpool.Pool, names: Iterable[str]) -> Iterator[Item]:
        """Yield the objects with those names, but those whose rows in the index are damaged."""
        for name in names:
            try:
                yield _item(pool, name)
            except CorruptionError as error:
                self._left_out[name] = str(error)
            except NotFoundError:
                continue  # deleted since the names were read

    def add(self, item: Item, mark: str, **facts: Any) -> None:
        """Add an object; `mark` is shown to people, and `facts` to programs."""
        self._rows.append((mark, item, facts))

    def show(self, doing: str, as_json: bool) -> None:
        """Print it on stdout; `doing` is what it is a plan of."""
        say_each("left out", self._left_out)
        items = [item for _, item, _ in self._rows]
        total = sum(item.bytes for item in items)
        if as_json:
            objects = [{**item._asdict(), **facts} for _, item, facts in self._rows]
            print_json({"objects": objects, "bytes": total, "requests": asdict(self.requests)})
            return
        for mark, item, _ in self._rows:
            print_line(f"{mark:<8} {human_size(item.bytes):>10}  {printable(item.name)}")
        print_line(f"would {doing} {count(len(items), 'object')}, {human_size(total)}")
        if self.requests.get or self.requests.put:
            print_line(self.requests.in_words())
