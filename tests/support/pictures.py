"""What can be seen of a pool, as plain data, and random changes to it."""

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np

import everpool

PLACES = [0, 100, 1 << 20, 1 << 29]


def picture(pool: Any) -> dict[str, Any]:
    """Return what can be seen of a pool, as plain data."""
    return {name: plain(pool[name]) for name in pool}


def plain(found: Any) -> Any:
    """Return what can be seen of one object."""
    if isinstance(found, everpool.Memory):
        return "memory", found.size, [found.read(place, 60) for place in PLACES]
    if isinstance(found, everpool.Array):
        return "array", found[...].tolist()
    if isinstance(found, np.ndarray):
        return "value", len(found), found[:5].tolist()
    return found


def change(pool: Any, choose: random.Random) -> None:
    """Do something at random."""
    kind, name, memory = choose.random(), f"n/{choose.randrange(20)}", f"m/{choose.randrange(3)}"
    if kind < 0.3:
        pool[name] = choose.randrange(1000)
    elif kind < 0.4:
        pool[name] = np.arange(choose.randrange(9000, 12000))
    elif kind < 0.5:
        pool.pop(name, None)
    elif kind < 0.6:
        pool.pop(memory, None)
        pool.allocate(memory, 1 << 30)
    elif kind < 0.7:
        if "array" not in pool:
            pool.allocate_array("array", 50, "i8")
        pool.array("array")[choose.randrange(50)] = choose.randrange(100)
    elif memory in pool:
        place = choose.choice(PLACES)
        if kind < 0.85:
            pool.memory(memory).write(place, choose.randbytes(30))
        else:
            pool.memory(memory).fetch_add(place, choose.randrange(50))


def note(notes: Path, pool: Any) -> None:
    """Append to a file what can be seen of a pool now; nobody else may change it meanwhile."""
    data = pickle.dumps((pool.version, picture(pool)))
    with notes.open("ab") as file:
        file.write(len(data).to_bytes(4, "big") + data)


def noted(notes: Path) -> dict[int, Any]:
    """Return what was noted, by version; a note that was cut short does not count."""
    found: dict[int, Any] = {}
    data = notes.read_bytes()
    while len(data) > 4 and len(data) >= 4 + int.from_bytes(data[:4], "big"):
        size = int.from_bytes(data[:4], "big")
        version, seen = pickle.loads(data[4 : 4 + size])
        found[version] = seen
        data = data[4 + size :]
    return found
