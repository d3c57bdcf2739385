"""What the state machine does to a pool: each action works on any client or transaction.

An action is applied to the engine and to the reference, and what it returns or raises there must
be the same. Names, offsets and values are few, so that clients meet often.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from everpool.errors import EverpoolError

LONG = "l" * 600  # longer than the keys of many stores
VALUE_NAMES = ["a", "a/1", "é", LONG + "1"]
MEMORY_NAMES = ["m", LONG + "2"]
ARRAY_NAMES = ["n"]
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
SIZES = [24, 9000]
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
        result = cast("NDArray[Any]", result)
        return type(result).__name__, result.dtype.str, result.shape, result.tobytes()
    if hasattr(result, "compare_and_swap"):
        return "memory", result.name, result.size
    if hasattr(result, "fetch_add"):
        return "array", result.name, result.shape, result.dtype.str
    # By its repr, since a float that is not a number is not equal to itself.
    return type(result).__name__, repr(result)


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


def _fill(name: str, offset: int, size: int, byte: int) -> Action:
    return _write(name, offset, bytes([byte]) * size)


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


def _allocate(name: str, size: int) -> Action:
    return Action(f"allocate({name[-6:]!r}, {size})", lambda to: to.allocate(name, size))


def _allocate_array(name: str, dtype: str) -> Action:
    return Action(
        f"allocate_array({name[-6:]!r}, 4, {dtype!r})",
        lambda to: to.allocate_array(name, 4, dtype),
    )


def _get(name: str) -> Action:
    return Action(f"get({name[-6:]!r})", lambda to: to[name])


def _contains(name: str) -> Action:
    return Action(f"contains({name[-6:]!r})", lambda to: name in to)


def _delete(name: str) -> Action:
    return Action(f"delete({name[-6:]!r})", lambda to: to.__delitem__(name))


def _names(prefix: str) -> Action:
    return Action(f"names({prefix[:6]!r})", lambda to: list(to.names(prefix)))


def _choice(items: list[Any]) -> st.SearchStrategy[Any]:
    """As `sampled_from`, but its own text does not hold the items, which are long."""
    return st.integers(0, len(items) - 1).map(lambda at: items[at])


def _mostly(common: list[str]) -> st.SearchStrategy[str]:
    """Names of one kind of object, and now and then another, which is an error or a surprise."""
    return _choice(common * 6 + VALUE_NAMES + MEMORY_NAMES + ARRAY_NAMES)


names = _choice(VALUE_NAMES + MEMORY_NAMES + ARRAY_NAMES)
value_names, memory_names = _mostly(VALUE_NAMES), _mostly(MEMORY_NAMES)
array_names = _mostly(ARRAY_NAMES)
_values = st.integers(0, 3) | _choice(VALUES)
_offsets = st.integers(0, 20) | st.sampled_from([0, 16, 23, 24, 4090, 8999])
_lengths = st.sampled_from([4, 1, 8, 0, 20, 4500])
_keys = st.sampled_from([0, 2, -1, 9, slice(None), slice(1, 3), slice(None, None, 2), [0, 2]])
_bytes = st.sampled_from([b"\0", b"\1", b"\0\0", b"ab"])

_LEN = Action("len", len)
_reads: list[st.SearchStrategy[Action]] = [
    st.builds(_get, value_names),
    st.builds(_contains, names),
    _choice(PREFIXES).map(_names),
    st.just(_LEN),
    st.builds(_read, memory_names, _offsets, _lengths),
    st.builds(_read, memory_names, _offsets, _lengths),
    st.builds(_get_items, array_names, _keys),
]
_writes: list[st.SearchStrategy[Action]] = [
    st.builds(_put, value_names, _values),
    st.builds(_put, value_names, _values),
    st.builds(_delete, names),
    st.builds(_allocate, memory_names, st.sampled_from(SIZES)),
    st.builds(_allocate_array, array_names, st.sampled_from(NUMBERS)),
    st.builds(
        _fill,
        memory_names,
        _offsets,
        _lengths,
        st.integers(1, 3),
    ),
    st.builds(_fetch_add, memory_names, _offsets, st.integers(-2, 2), st.sampled_from(NUMBERS)),
    st.builds(_swap, memory_names, _offsets, _bytes, _bytes),
    st.builds(_set_items, array_names, _keys, st.integers(1, 3)),
    st.builds(_add_item, array_names, st.integers(-1, 5), st.integers(-2, 2)),
]
reads = st.one_of(_reads)
writes = st.one_of(_writes)
look_ups: st.SearchStrategy[Action] = memory_names.map(
    lambda name: Action(f"memory({name[-6:]!r})", lambda to: to.memory(name))
)
_near = st.integers(0, 6)
_few = st.integers(1, 3)
MEETING_PLACES = {"m": _allocate("m", 24), "n": _allocate_array("n", "<i8")}
byte_reads: st.SearchStrategy[Action] = st.one_of(
    st.builds(_read, st.just("m"), _near, _few),
    st.builds(_get_items, st.just("n"), _keys),
)
byte_writes: st.SearchStrategy[Action] = st.one_of(
    st.builds(_fill, st.just("m"), _near, _few, st.just(7)),
    st.builds(_set_items, st.just("n"), _keys, st.integers(1, 3)),
    st.builds(_add_item, st.just("n"), st.integers(0, 3), st.just(1)),
    st.builds(_fetch_add, st.just("m"), _near, st.just(1), st.sampled_from(NUMBERS)),
)
listings: st.SearchStrategy[Action] = _choice(PREFIXES).map(_names)
bindings: st.SearchStrategy[Action] = st.one_of(
    st.builds(_put, _choice(VALUE_NAMES), st.just(0)),
    st.builds(_delete, _choice(VALUE_NAMES)),
    st.builds(_allocate, _choice(MEMORY_NAMES), st.just(24)),
)
actions: st.SearchStrategy[Action] = st.one_of(_reads + _writes)


def stock(target: Any) -> None:
    """Bind some of the names, so that there is something to meet at from the beginning."""
    target["a"] = 0
    target["a/1"] = 0
    target.allocate("m", 24)
    target.allocate_array("n", 4, "<i8")


def _handle_read(offset: int, size: int) -> Action:
    return Action(f"handle.read({offset}, {size})", lambda to: to.read(offset, size))


def _handle_write(offset: int, byte: int) -> Action:
    return Action(
        f"handle.write({offset}, 4 times {byte})", lambda to: to.write(offset, bytes([byte]) * 4)
    )


def _handle_add(offset: int) -> Action:
    return Action(f"handle.fetch_add({offset}, 1)", lambda to: to.fetch_add(offset, 1))


def _handle_view(offset: int) -> Action:
    return Action(f"handle.view({offset}, 1)", lambda to: bytes(to.view(offset, 1)))


handle_actions: st.SearchStrategy[Action] = st.one_of(
    st.builds(_handle_read, _offsets, _lengths),
    st.builds(_handle_write, _offsets, st.integers(1, 3)),
    st.builds(_handle_add, _offsets),
    st.builds(_handle_view, _offsets),
)
"""Actions on a handle of memory that was looked up earlier, and may be gone."""
