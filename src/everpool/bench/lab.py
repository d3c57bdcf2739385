"""Where rows are measured: folders, servers and sizes, and the list of rows.

A row is a function that sets up its contenders in a `Lab` and yields them; what it borrowed from
the lab is closed and removed when the row is done, in reverse order.
"""

import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import everpool
from everpool.bench import buckets, servers
from everpool.bench.contenders import Store, open_store
from everpool.bench.measure import Contender, Goal, Result, Style, interleave

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class Closeable(Protocol):
    def close(self) -> None: ...


C = TypeVar("C", bound=Closeable)


@dataclass(frozen=True)
class Sizes:
    """How much a run measures."""

    rounds: int
    turn_s: float  # how long one contender's turn in a round lasts, where that can be chosen
    threads: int
    processes: int
    names: int
    touch_bytes: int
    bulk_bytes: int
    large_bytes: int  # of the large sparse arrays
    bucket_bytes: int  # of an array that goes to a bucket
    hosts: int
    pages: int  # that a checkpoint finds dirty
    still_s: float  # how long nothing happens where that is measured


FULL = Sizes(
    rounds=25,
    turn_s=0.06,
    threads=32,
    processes=4,
    names=1_000_000,
    touch_bytes=64 * MIB,
    bulk_bytes=GIB,
    large_bytes=10 * GIB,
    bucket_bytes=64 * MIB,
    hosts=8,
    pages=1000,
    still_s=5.0,
)
QUICK = Sizes(
    rounds=2,
    turn_s=0.02,
    threads=32,
    processes=2,
    names=20_000,
    touch_bytes=4 * MIB,
    bulk_bytes=16 * MIB,
    large_bytes=10 * GIB,
    bucket_bytes=8 * MIB,
    hosts=2,
    pages=64,
    still_s=1.0,
)


class Lab:
    """The place of one run, below `folder`, which everybody's files share."""

    def __init__(self, folder: Path, sizes: Sizes, tell: Callable[[str], None]) -> None:
        self.sizes = sizes
        self.tell = tell
        self._folder = folder
        self._row_folder = folder / "row"
        self._stack = ExitStack()
        self._notes: list[str] = []
        self._million: Path | None = None
        self._whole_run = ExitStack()
        self._s3: buckets.S3 | None = None

    def close(self) -> None:
        """End what all rows share."""
        self._whole_run.close()

    def measure(self, row: "Row", rounds: int, after_round: Callable[[], None]) -> Result:
        """Measure one row from its setting up to its tidying up."""
        self._notes = []
        self._row_folder.mkdir()
        result = Result(row.name, row.title(self.sizes), row.style, goals=row.goals)
        try:
            with ExitStack() as self._stack:
                contenders = list(row.contenders(self))
                interleave(contenders, result, min(rounds, row.rounds_at_most), after_round)
        finally:
            shutil.rmtree(self._row_folder, ignore_errors=True)
        result.notes = list(dict.fromkeys(self._notes))
        return result

    def path(self, name: str) -> Path:
        """A path of this row that does not exist yet."""
        return self._row_folder / name

    def keep(self, thing: C) -> C:
        """Close `thing` when the row is done."""
        self._stack.callback(thing.close)
        return thing

    def note(self, text: str) -> None:
        """Say something below the table about this row."""
        self._notes.append(text)

    def pool(self, name: str = "everpool") -> everpool.Pool:
        """A pool of this row."""
        return self.keep(everpool.open(self.path(name)))

    def store(self, kind: str) -> Store:
        """A store of this row; see `contenders.open_store`."""
        return self.keep(open_store(kind, self.path(kind), 0))

    def redis(self) -> servers.RedisServer | None:
        """A Redis of this row, or None and a note."""
        missing = servers.redis_missing()
        if missing:
            self.note(missing)
            return None
        return self.keep(servers.RedisServer(self.path("redis-server")))

    def ray(self, object_bytes: int) -> servers.RaySession | None:
        """A Ray of this row that holds objects of that size, or None and a note."""
        missing = servers.ray_missing()
        if missing:
            self.note(missing)
            return None
        store_bytes = max(256 * MIB, int(2.5 * object_bytes))
        if shutil.disk_usage("/dev/shm").free < store_bytes:
            self.note("Ray did not take part: /dev/shm is too small for its objects.")
            return None
        return self.keep(servers.RaySession(store_bytes))

    def bucket(self) -> "buckets.Bucket | None":
        """A folder of this row in a bucket, or None and a note; one server is for all rows."""
        missing = buckets.missing()
        if missing:
            self.note(missing)
            return None
        if self._s3 is None:
            self.tell("starting SeaweedFS, an S3 server")
            self._s3 = buckets.S3(self._folder / "s3")
            self._whole_run.callback(self._s3.close)
        return self.keep(self._s3.bucket(self.path("bucket")))

    def million(self) -> Path:
        """A folder with the same many names in a pool (`everpool`) and in raw LMDB (`lmdb`).

        The pool also has 100 GiB of sparse memory. It is made once, for all rows that want it.
        """
        if self._million is None:
            self._million = self._folder / "million"
            self.tell(f"making a pool with {self.sizes.names:,} names")
            for kind in ("lmdb", "everpool"):
                store = open_store(kind, self._million / kind, 0)
                encode = str.encode if kind == "lmdb" else str
                store.load((encode(f"name/{i:07d}"), b"8 bytes.") for i in range(self.sizes.names))
                store.close()
            with everpool.open(self._million / "everpool") as pool:
                for index in range(10):
                    pool.allocate(f"memory/{index}", self.sizes.large_bytes)
        return self._million


@dataclass(frozen=True)
class Row:
    """One line of the table: an operation, who can do it, and what it may cost."""

    name: str
    title: Callable[[Sizes], str]
    style: Style
    goals: tuple[Goal, ...]
    contenders: Callable[[Lab], Iterable[Contender]]
    rounds_at_most: int


ROWS: dict[str, Row] = {}


def row(
    name: str,
    title: str | Callable[[Sizes], str],
    style: Style = "time",
    goals: Iterable[Goal] = (),
    rounds_at_most: int = 1000,
) -> Callable[[Callable[[Lab], Iterable[Contender]]], Callable[[Lab], Iterable[Contender]]]:
    """Enter the decorated function into `ROWS`."""

    def enter(
        contenders: Callable[[Lab], Iterable[Contender]],
    ) -> Callable[[Lab], Iterable[Contender]]:
        def words(sizes: Sizes) -> str:
            return title if isinstance(title, str) else title(sizes)

        ROWS[name] = Row(name, words, style, tuple(goals), contenders, rounds_at_most)
        return contenders

    return enter


def at_most(subject: str, factor: float, against: str | tuple[str, ...], text: str) -> Goal:
    """The goal that `subject` costs at most `factor` times `against` (worst of several)."""
    others = (against,) if isinstance(against, str) else against
    return Goal(subject, "<=", factor, others, text)


def at_least(subject: str, factor: float, against: str | tuple[str, ...], text: str) -> Goal:
    """The goal that `subject` is at least `factor` times as fast as `against`."""
    others = (against,) if isinstance(against, str) else against
    return Goal(subject, ">=", factor, others, text)


def below(subject: str, cost: float, text: str) -> Goal:
    """The goal that `subject` costs at most so many seconds or bytes."""
    return Goal(subject, "<=", cost, (), text)


def size_in_words(size: int) -> str:
    """`10 GiB`, `64 MiB` or `1 KiB`."""
    for scale, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= scale:
            return f"{size // scale} {unit}"
    return f"{size} B"
