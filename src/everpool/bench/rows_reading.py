"""Rows about reading: small values, and views of arrays."""

import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

import everpool
from everpool.bench.children import map_file
from everpool.bench.contenders import EverpoolStore, RedisStore, Store
from everpool.bench.lab import GIB, KIB, MIB, Lab, at_least, at_most, row, size_in_words
from everpool.bench.measure import Contender, Role, timed

VIEWS = 32
READ_KEYS = 20_000
SAME = "same cost (within 25 %)"


def reading(store: Store, keys: list[Any]) -> Callable[[int], None]:
    """Operations that read the keys in turn."""
    turns = cycle(keys)

    def read(count: int) -> None:
        get = store.get
        for key in islice(turns, count):
            get(key)

    return read


@row(
    "read-small",
    "read a value of 128 bytes",
    goals=[
        at_most("Everpool", 2, "raw LMDB", "≤ 2 x raw LMDB"),
        at_least("Everpool", 30, "Redis", "≥ 30 x faster than Redis"),
    ],
)
def read_small(lab: Lab) -> Iterator[Contender]:
    turn_s = lab.sizes.turn_s
    stores = [lab.store(kind) for kind in ("dict", "lmdb", "sqlite")]
    if server := lab.redis():
        stores.append(lab.keep(RedisStore(server.port)))
    for store in stores:
        role: Role = "limit" if store.title == "dict" else "peer"
        yield Contender(store.title, role, timed(reading(store, loaded(store)), turn_s))
    pool = lab.keep(EverpoolStore(lab.path("everpool")))
    keys = loaded(pool)
    # A process keeps what it has read until somebody commits; a peer that looks a value up every
    # time is to be compared with a pool that has to. So a commit comes before every turn, in
    # which no name is read twice.
    measure = timed(reading(pool, keys), turn_s, READ_KEYS, lambda: pool.put("tick", b""))
    yield Contender("Everpool", "everpool", measure)
    yield Contender("Everpool, again", "everpool", timed(reading(pool, keys[:1000]), turn_s))


def loaded(store: Store) -> list[Any]:
    """Put values of 128 bytes under `READ_KEYS` keys and return these."""
    keys = [store.key(index) for index in range(READ_KEYS)]
    store.load((key, bytes(range(128))) for key in keys)
    return keys


@row(
    "view-open",
    "open a view of an array for the first time",
    goals=[at_most("Everpool, 10 GiB", 1.25, "Everpool, 1 KiB", SAME)],
)
def view_open(lab: Lab) -> Iterator[Contender]:
    sizes = {KIB: "1 KiB", MIB: "1 MiB", 10 * GIB: "10 GiB"}
    path = lab.path("sparse")
    with open(path, "wb") as file:
        file.truncate(10 * GIB)
    yield Contender("mmap of a file, 10 GiB", "limit", lambda: _time_maps(path, 10 * GIB))
    if ray := lab.ray(MIB * VIEWS):
        for size in (KIB, MIB):
            values = [np.zeros(size, dtype=np.uint8) for _ in range(VIEWS)]
            references = [ray.put(value) for value in values]
            yield Contender(
                f"Ray get, {sizes[size]}", "peer", lambda r=references: _time_each(ray.get, r)
            )
    folder = lab.path("everpool")
    with everpool.open(folder) as pool:
        for size, words in sizes.items():
            for index in range(VIEWS):
                pool.allocate_array(f"{words}/{index}", (size,), "u1")
        pool.allocate_array("first", (8,), "u1")
    for words in sizes.values():
        yield Contender(
            f"Everpool, {words}", "everpool", lambda w=words: _time_first_views(folder, w)
        )
    yield Contender(
        "Everpool, 10 GiB again",
        "everpool",
        lambda: _time_first_views(folder, "10 GiB", again=True),
    )


def _time_each(call: Callable[[Any], Any], arguments: list[Any]) -> float:
    """Seconds for one call; the results stay alive until all are there."""
    results: list[Any] = []
    started = time.perf_counter()
    for argument in arguments:
        results.append(call(argument))
    return (time.perf_counter() - started) / len(arguments)


def _time_maps(path: Any, size: int) -> float:
    def view(_: int) -> Any:
        return np.frombuffer(map_file(path, size), dtype=np.uint8)

    return _time_each(view, list(range(VIEWS)))


def _time_first_views(folder: Any, words: str, again: bool = False) -> float:
    """Seconds to open a view that a freshly opened pool has not opened before."""
    with everpool.open(folder) as pool:

        def view(name: str) -> Any:
            return np.asarray(pool.array(name))

        view("first")
        names = [f"{words}/{index}" for index in range(VIEWS)]
        if again:
            kept = [view(name) for name in names]
            spent = _time_each(view, names)
            del kept
            return spent
        return _time_each(view, names)


def touching(lab: Lab, operation: Callable[[NDArray[np.float64]], object]) -> Iterator[Contender]:
    """Contenders that do something with all of an array's bytes, wherever these lie."""
    count = lab.sizes.touch_bytes // 8
    in_ram = np.random.default_rng(7).random(count)
    path = lab.path("file")
    in_ram.tofile(path)
    mapped = np.frombuffer(map_file(path, in_ram.nbytes))
    pool = lab.pool()
    memory = pool.allocate_array("memory", (count,), "float64")
    step = MIB // 8
    for start in range(0, count, step):
        memory[start : start + step] = in_ram[start : start + step]
    pool["value"] = in_ram
    arrays: list[tuple[str, Any, NDArray[np.float64]]] = [
        ("NumPy in RAM", "limit", in_ram),
        ("NumPy on a mapped file", "peer", mapped),
        ("Everpool, memory", "everpool", np.asarray(memory)),
        ("Everpool, value", "everpool", pool["value"]),  # type: ignore[list-item]
    ]
    for name, role, array in arrays:
        assert np.array_equal(array, in_ram)

        def operations(times: int, array: NDArray[np.float64] = array) -> None:
            for _ in range(times):
                operation(array)

        yield Contender(name, role, timed(operations, lab.sizes.turn_s))


TOUCH_GOALS = [
    at_most("Everpool, memory", 1.05, "NumPy in RAM", "1.0 x NumPy (within 5 %)"),
    at_most("Everpool, value", 1.05, "NumPy in RAM", "the same for a value"),
]


@row(
    "view-sum",
    lambda sizes: f"sum {size_in_words(sizes.touch_bytes)} through a view",
    goals=TOUCH_GOALS,
)
def view_sum(lab: Lab) -> Iterator[Contender]:
    return touching(lab, lambda array: array.sum())


@row(
    "view-gather",
    lambda sizes: f"gather random items of {size_in_words(sizes.touch_bytes)} through a view",
    goals=TOUCH_GOALS,
)
def view_gather(lab: Lab) -> Iterator[Contender]:
    count = lab.sizes.touch_bytes // 8
    places = np.random.default_rng(8).integers(0, count, count // 8)
    target = np.empty(len(places))
    return touching(lab, lambda array: array.take(places, out=target, mode="clip"))


@row(
    "view-copy",
    lambda sizes: f"copy {size_in_words(sizes.touch_bytes)} out of a view",
    goals=TOUCH_GOALS,
)
def view_copy(lab: Lab) -> Iterator[Contender]:
    target = np.zeros(lab.sizes.touch_bytes // 8)
    return touching(lab, lambda array: np.copyto(target, array))
