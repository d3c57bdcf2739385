"""What the state machine does to a pool: each action works on any client or transaction.

An action is applied to the engine and to the reference, and what it returns or raises there must
be the same. Names, offsets and values are few, so that clients meet often.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from everpool.errors import EverpoolError

LONG = "l" * 600  # longer than the keys of many stores
NAMES = ["a", "a/1", "b", "é", LONG + "1", LONG + "2"]
PREFIXES = ["", "a", "a/", "é", LONG, "none/"]
VALUES: list[Any] = [
    0,
    "text",
    b"\0bytes",
    None,
    {"list": [1, (2, 3.5)]},
    np.arange(5, dtype=">i2"),
    np.arange(40_000),  # large enough to be kept outside of any index
    np.full((200, 100), 7.25),
]
SIZES = [1, 24, 9000]
NUMBERS = ["<i8", "u1", "<f4"]


@dataclass(frozen=True)
class Action:
    """One call, with its arguments in words: `apply(target)` makes it."""

    words: str
    apply: Callable[[Any], Any]

    def __repr__(self) -> str:
        return self.words


def result_of(action: Action, target: Any) -> tuple[str, Any]:
    """Return what the action returned, as plain data, or the kind of error it raised."""
    try:
        return "returned", plain(action.apply(target))
    except EverpoolError as error:
        return "raised", error.kind


def plain(result: Any) -> Any:
    """Return a result as data that can be compared with `==`."""
    if isinstance(result, np.ndarray | np.generic):
        return type(result).__name__, result.dtype.str, result.shape, result.tobytes()
    if hasattr(result, "compare_and_swap"):
        return "memory", result.name, result.size
    if hasattr(result, "fetch_add"):
        return "array", result.name, result.shape, result.dtype.str
    return type(result).__name__, result


def _put(name: str, value: Any) -> Action:
    return Action(f"[{name[-6:]!r}] = {str(value)[:20]}", lambda to: to.__setitem__(name, value))


def _read(name: str, offset: int, size: int) -> Action:
    return Action(
        f"memory({name[-6:]!r}).read({offset}, {size})",
        lambda to: to.memory(name).read(offset, size),
    )


def _write(name: str, offset: int, data: bytes) -> Action:
    return Action(
        f"memory({name[-6:]!r}).write({offset}, {data[:8]!r} of {len(data)})",
        lambda to: to.memory(name).write(offset, data),
    )


def _fetch_add(name: str, offset: int, delta: int, dtype: str) -> Action:
    return Action(
        f"memory({name[-6:]!r}).fetch_add({offset}, {delta}, {dtype!r})",
        lambda to: to.memory(name).fetch_add(offset, delta, dtype=dtype),
    )


def _swap(name: str, offset: int, expected: bytes, new: bytes) -> Action:
    return Action(
        f"memory({name[-6:]!r}).compare_and_swap({offset}, {expected!r}, {new!r})",
        lambda to: to.memory(name).compare_and_swap(offset, expected, new),
    )


def _get_items(name: str, key: Any) -> Action:
    return Action(f"array({name[-6:]!r})[{key}]", lambda to: to.array(name)[key])


def _set_items(name: str, key: Any, value: int) -> Action:
    return Action(
        f"array({name[-6:]!r})[{key}] = {value}",
        lambda to: to.array(name).__setitem__(key, value),
    )


def _add_item(name: str, index: int, delta: int) -> Action:
    return Action(
        f"array({name[-6:]!r}).fetch_add({index}, {delta})",
        lambda to: to.array(name).fetch_add(index, delta),
    )


def _by_name(words: str, apply: Callable[[Any, str], Any]) -> st.SearchStrategy[Action]:
    return names.map(lambda name: Action(f"{words}({name[-6:]!r})", lambda to: apply(to, name)))


names = st.sampled_from(NAMES)
_values = st.sampled_from(VALUES) | st.integers(0, 3)
_offsets = st.sampled_from([0, 1, 8, 16, 23, 24, 4090, 8999])
_lengths = st.sampled_from([0, 1, 4, 8, 16, 5000])
_keys = st.sampled_from([0, 2, -1, 9, slice(None), slice(1, 3), slice(None, None, 2), [0, 2]])
_bytes = st.sampled_from([b"\0", b"\1", b"\0\0", b"ab"])

puts = st.builds(_put, names, _values)
reads: st.SearchStrategy[Action] = st.one_of(
    _by_name("get", lambda to, name: to[name]),
    _by_name("contains", lambda to, name: name in to),
    st.sampled_from(PREFIXES).map(
        lambda prefix: Action(f"names({prefix[:6]!r})", lambda to: list(to.names(prefix)))
    ),
    st.just(Action("len", len)),
    st.builds(_read, names, _offsets, _lengths),
    st.builds(_get_items, names, _keys),
)
writes: st.SearchStrategy[Action] = st.one_of(
    puts,
    _by_name("delete", lambda to, name: to.__delitem__(name)),
    st.builds(
        lambda name, size: Action(
            f"allocate({name[-6:]!r}, {size})", lambda to: to.allocate(name, size)
        ),
        names,
        st.sampled_from(SIZES),
    ),
    st.builds(
        lambda name, dtype: Action(
            f"allocate_array({name[-6:]!r}, 4, {dtype!r})",
            lambda to: to.allocate_array(name, 4, dtype),
        ),
        names,
        st.sampled_from(NUMBERS),
    ),
    st.builds(
        lambda name, offset, size, byte: _write(name, offset, bytes([byte]) * size),
        names,
        _offsets,
        _lengths,
        st.integers(1, 3),
    ),
    st.builds(_fetch_add, names, _offsets, st.integers(-2, 2), st.sampled_from(NUMBERS)),
    st.builds(_swap, names, _offsets, _bytes, _bytes),
    st.builds(_set_items, names, _keys, st.integers(1, 3)),
    st.builds(_add_item, names, st.integers(-1, 5), st.integers(-2, 2)),
)
actions: st.SearchStrategy[Action] = reads | writes


def handle_actions() -> st.SearchStrategy[Action]:
    """Actions on a handle of memory that was looked up earlier, and may be gone."""
    return st.one_of(
        st.builds(
            lambda offset, size: Action(
                f"handle.read({offset}, {size})", lambda to: to.read(offset, size)
            ),
            _offsets,
            _lengths,
        ),
        st.builds(
            lambda offset, byte: Action(
                f"handle.write({offset}, {byte})", lambda to: to.write(offset, bytes([byte]) * 4)
            ),
            _offsets,
            st.integers(1, 3),
        ),
        st.builds(
            lambda offset: Action(f"handle.fetch_add({offset})", lambda to: to.fetch_add(offset, 1)),
            _offsets,
        ),
        st.builds(
            lambda offset: Action(
                f"bytes(handle.view({offset}, 1))", lambda to: bytes(to.view(offset, 1))
            ),
            _offsets,
        ),
    )
