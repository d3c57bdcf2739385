"""Handles on memory and arrays.

`Memory` and `Array` are what a pool hands out; inside a transaction the same methods work on what
the transaction sees and buffers. All they need of either is `Bytes`.
"""

import contextlib
import operator
import time
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from everpool.arrays import Layout, Selection, is_basic, layout_of
from everpool.commit import Submission
from everpool.errors import ConflictError, InvalidError, NotFoundError, UnavailableError
from everpool.records import FetchAdd, Operation, Record, Write
from everpool.replica.bulk import Staged
from everpool.replica.index import translate_os
from everpool.replica.replica import gone

if TYPE_CHECKING:
    from everpool.engine import Engine
    from everpool.pool import Pool

# Larger stores go to a file first, not through the index.
INLINE_STORE_BYTES = 1 << 20
_TRIES = 20
_QUIET_TRIES = 50
_QUIET_WAIT_S = 0.001
# Unlike any version, and unlike the -1 of a commit in flight.
_UNKNOWN = -2

Buffer = bytes | bytearray | memoryview | NDArray[Any]


class Bytes(Protocol):
    """The bytes of one object, as an array handle uses them."""

    name: str
    size: int

    def read(self, offset: int, size: int) -> bytes: ...

    def store(self, parts: list[tuple[int, bytes]]) -> None: ...

    def fetch_add(self, offset: int, delta: Any, dtype: DTypeLike = "<i8") -> Any: ...

    @property
    def version(self) -> int: ...


class ByteSlices:
    """Slicing for anything with `name`, `size`, `read` and `store`."""

    name: str
    size: int

    def read(self, offset: int, size: int) -> bytes:
        raise NotImplementedError

    def store(self, parts: list[tuple[int, bytes]]) -> None:
        raise NotImplementedError

    def write(self, offset: int, data: Buffer) -> None:
        """Replace the bytes from `offset` on. Raises `InvalidError` beyond the end."""
        view = as_bytes(data)
        offset, _ = self.check(offset, len(view))
        if len(view):
            self.store([(offset, bytes(view))])

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            start, stop = self._slice(cast("slice[Any, Any, Any]", key))
            return self.read(start, stop - start)
        return self.read(self._position(key), 1)[0]

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, slice):
            try:
                self.write(self._position(key), bytes([operator.index(value)]))
            except (TypeError, ValueError) as error:
                if isinstance(error, InvalidError):
                    raise
                raise InvalidError(f"one byte of {self.name!r} is an int from 0 to 255") from None
            return
        start, stop = self._slice(cast("slice[Any, Any, Any]", key))
        view = as_bytes(value)
        if len(view) != stop - start:
            raise InvalidError(
                f"{len(view)} bytes do not fit {self.name!r}[{start}:{stop}], which has "
                f"{stop - start}: memory does not grow or shrink"
            )
        self.write(start, view)

    def check(self, offset: int, size: int) -> tuple[int, int]:
        """Return the range as plain ints; raises `InvalidError` unless it is inside the object."""
        try:
            # Not bool, not NumPy's: both would be written to the log as something else.
            offset, size = int(operator.index(offset)), int(operator.index(size))
        except TypeError:
            raise InvalidError(f"offset {offset!r} and size {size!r} must be ints") from None
        if offset < 0 or size < 0 or offset + size > self.size:
            raise InvalidError(
                f"bytes {offset} to {offset + size} are outside of {self.name!r}, which has "
                f"{self.size}",
                name=self.name,
            )
        return offset, size

    def _slice(self, key: slice) -> tuple[int, int]:
        if key.step not in (None, 1):
            raise InvalidError(f"slices of {self.name!r} have no step: read and slice the copy")
        start, stop, _ = key.indices(self.size)
        return start, max(start, stop)

    def _position(self, key: Any) -> int:
        try:
            position = int(operator.index(key))
        except TypeError:
            raise InvalidError(f"{key!r} is no index of {self.name!r}: use an int") from None
        if position < 0:
            position += self.size
        self.check(position, 1)
        return position


class Memory(ByteSlices):
    """A durable, mutable block of bytes that all processes with the pool open share.

    Reads are untorn copies; views are live. Each write is a transaction of its own, durable on
    return. A handle whose object was deleted raises `NotFoundError`.
    """

    def __init__(self, pool: "Pool", name: str, id: int, size: int, header: bytes) -> None:
        self._pool = pool
        self.name = name
        self.id = id
        self.size = size
        self.header = header
        self._engine: Engine | None = None
        self._lineage = pool.engine().lineage
        self._view = memoryview(b"")
        self._known_version = _UNKNOWN

    def __repr__(self) -> str:
        return f"<everpool.Memory {self.name!r}: {self.size} bytes>"

    def __reduce__(self) -> Any:
        return _reopen_memory, (self._pool, self.name)

    @property
    def version(self) -> int:
        """The last version that changed the object."""
        row = self._pool.engine().replica.memory_row(self.id)
        if row is None:
            raise gone(self.name)
        return row.version

    def read(self, offset: int, size: int) -> bytes:
        """Return an untorn copy of `size` bytes from `offset` on."""
        offset, size = self.check(offset, size)
        settled = self.quiet()
        if settled >= 0:
            self.ensure(offset, size)
            data = bytes(self._view[offset : offset + size])
            if self.quiet() == settled:
                return data
        return bytes(self.read_exact(offset, size)[0])

    def read_exact(self, offset: int, size: int) -> tuple[bytes | bytearray, int]:
        """Return a copy and the version that it is of."""
        engine = self._attach()
        data, version = engine.replica.read_memory(self.id, self.name, self._view, offset, size)
        self._known_version = version
        return data, version

    def view(self, offset: int = 0, size: int | None = None) -> memoryview:
        """Return a read-only view that shows what is committed, as it is committed.

        No bytes are copied. A view can show half of a commit that is just being applied; for a
        stable picture use `read` or a transaction.
        """
        offset, size = self.check(offset, self.size - offset if size is None else size)
        engine = self._attach()
        if engine.read_only and not engine.replica.trusted:
            # Memory is behind the index, and there is nobody who could bring it up to date.
            return memoryview(self.read(offset, size))
        engine.settle()
        if engine.replica.memory_row(self.id) is None:
            raise gone(self.name)
        engine.replica.memories.ensure(self.id, offset, size)
        return self._view[offset : offset + size]

    def extents(self) -> list[tuple[int, int]]:
        """Return (offset, size) of the parts that were ever written to, in order.

        All bytes outside are zero, and always were. The parts are whole blocks of the disk, so
        they may begin and end with zeros. Where it cannot be told, one part is the whole.
        """
        engine = self._attach()
        replica = engine.replica
        if replica.trusted:
            with contextlib.suppress(UnavailableError):
                engine.settle()  # its writer may be dead
        for _ in range(_QUIET_TRIES):
            if self.quiet() >= 0:
                try:
                    return replica.memories.extents(self.id, self.size)
                except FileNotFoundError:
                    raise gone(self.name) from None
                except OSError as error:
                    raise translate_os(error, f"looking at {self.name!r}") from error
            time.sleep(_QUIET_WAIT_S)
        return [(0, self.size)]

    def write(self, offset: int, data: Buffer) -> None:
        """Replace the bytes from `offset` on, atomically and durably."""
        view = as_bytes(data)
        offset, _ = self.check(offset, len(view))
        if len(view) > INLINE_STORE_BYTES:
            engine = self._pool.writing_engine()
            staged = engine.stage_bytes(view)
            self._commit([Write(self.id, offset, staged.reference)], [staged])
        elif len(view):
            self._commit([Write(self.id, offset, bytes(view))], [])

    def store(self, parts: list[tuple[int, bytes]]) -> None:
        """Write several parts as one transaction."""
        if len(parts) == 1:
            self.write(*parts[0])
        elif parts:
            self._commit([Write(self.id, offset, data) for offset, data in parts], [])

    def fetch_add(self, offset: int, delta: Any, dtype: DTypeLike = "<i8") -> Any:
        """Add to the number at `offset` and return what it was before.

        Atomic, never conflicts, durable on return. Integers wrap around.
        """
        kind, encoded = encode_delta(delta, dtype)
        offset, _ = self.check(offset, len(encoded))
        engine = self._pool.writing_engine()
        operation = FetchAdd(self.id, offset, kind.str, encoded)
        record = Record(engine.replica.version(), [], [], [], [operation])
        result = self._write(record, []).result
        assert result is not None
        return np.frombuffer(result.old[0], kind)[0].item()

    def compare_and_swap(self, offset: int, expected: Buffer, new: Buffer) -> bool:
        """Replace `expected` at `offset` by `new`; returns False when something else is there."""
        old, wanted = bytes(as_bytes(expected)), bytes(as_bytes(new))
        if len(old) != len(wanted) or not old:
            raise InvalidError(
                f"expected has {len(old)} bytes and new has {len(wanted)}: they must be equally "
                "long, and not empty"
            )
        offset, _ = self.check(offset, len(old))
        while True:
            found, version = self.read_exact(offset, len(old))
            if found != old:
                return False
            ranges = [(self.id, offset, offset + len(old))]
            record = Record(version, [], [], ranges, [Write(self.id, offset, wanted)])
            try:
                self._write(record, [])
            except ConflictError:
                continue
            return True

    def ensure(self, offset: int, size: int) -> None:
        """Bring bytes into mapped memory, where they are not there already."""
        self._attach().replica.memories.ensure(self.id, offset, size)

    def is_whole(self) -> bool:
        """Whether all bytes are in mapped memory for sure."""
        return self._attach().replica.memories.is_whole(self.id)

    def live(self) -> memoryview:
        """Return the whole mapping without waiting for anything."""
        self._attach()
        return self._view

    def quiet(self) -> int:
        """Return the version that the mapping is exactly of, or -1 while it may be changing.

        Raises `NotFoundError` when the object is gone.
        """
        replica = self._attach().replica
        settled = replica.quiet()
        if settled >= 0 and settled != self._known_version:
            version, row = replica.memory_at(self.id)
            if row is None:
                raise gone(self.name)
            self._known_version = version
        return settled if settled == self._known_version else -1

    def _commit(self, operations: list[Operation], staged: list[Staged]) -> None:
        record = Record(self._pool.writing_engine().replica.version(), [], [], [], operations)
        self._write(record, staged)

    def _write(self, record: Record, staged: list[Staged]) -> Submission:
        submission = self._pool.writing_engine().write(record, staged)
        try:
            submission.version()
        except NotFoundError:
            raise gone(self.name) from None
        return submission

    def _attach(self) -> "Engine":
        engine = self._pool.engine()
        if engine is not self._engine:
            if engine.lineage != self._lineage:
                raise gone(self.name)  # its id may be another object's by now
            try:
                self._view = engine.replica.map_memory(self.id, self.size)
            except FileNotFoundError:
                raise gone(self.name) from None
            self._engine = engine
            self._known_version = _UNKNOWN
        return engine


class Array:
    """A typed handle on an array: allocated memory, or a value (then read-only).

    Indexing copies what is asked for, untorn, and nothing else. `numpy.asarray(handle)` is a
    live, read-only view without a copy.
    """

    def __init__(self, data: Bytes, layout: Layout) -> None:
        self._data = data
        self._layout = layout

    name = property(lambda self: self._data.name, doc="The name.")
    shape = property(lambda self: self._layout.shape, doc="Length of each dimension.")
    dtype = property(lambda self: self._layout.dtype, doc="Type of an element.")
    ndim = property(lambda self: len(self._layout.shape), doc="Number of dimensions.")
    size = property(lambda self: self._layout.items, doc="Number of elements.")
    nbytes = property(lambda self: self._layout.nbytes, doc="Bytes of all elements.")
    version = property(lambda self: self._data.version, doc="The last version that changed it.")

    def __repr__(self) -> str:
        return f"<everpool.Array {self.name!r}: {self.dtype} {self.shape}>"

    def __reduce__(self) -> Any:
        data = self._data
        if isinstance(data, Memory):
            return _reopen_array, data.__reduce__()[1]
        raise InvalidError("only arrays of a pool can be sent to other processes")

    def __len__(self) -> int:
        if not self.shape:
            raise InvalidError(f"{self.name!r} has no dimensions, so it has no length")
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        data = self._data
        if isinstance(data, Memory):
            found = self._copy_live(data, key)
            if found is not None:
                return found
        return self._gather(self._select(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        chosen = self._select(key)
        try:
            wanted = np.empty(chosen.shape, chosen.dtype)
            wanted[...] = value
        except (TypeError, ValueError) as error:
            raise InvalidError(f"this cannot be assigned to {self.name!r}: {error}") from error
        flat = memoryview(wanted.tobytes())
        self._data.store([(to, bytes(flat[at : at + n])) for to, at, n in chosen.runs()])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        view = self.view()
        if copy or (dtype is not None and np.dtype(dtype) != view.dtype):
            if copy is False:
                raise ValueError(f"{self.name!r} is {view.dtype}: {dtype} needs a copy")
            return np.array(self[...], dtype=dtype)
        return view

    def view(self) -> NDArray[Any]:
        """Return the whole array as a live, read-only ndarray; in a transaction, as a copy."""
        data = self._data
        if isinstance(data, Memory):
            return self._shaped(data.view(0, self.nbytes))
        found = self[...]
        found.flags.writeable = False
        return found

    def fetch_add(self, index: Any, delta: Any) -> Any:
        """Add to one element and return what it was before, as `Memory.fetch_add` does."""
        chosen = self._select(index)
        if len(chosen.offsets) != 1 or chosen.run_bytes != self.dtype.itemsize:
            raise InvalidError(f"fetch_add of {self.name!r} takes the index of one element")
        return self._data.fetch_add(int(chosen.offsets[0]), delta, chosen.dtype)

    def _select(self, key: Any) -> Selection:
        try:
            return self._layout.select(key)
        except IndexError as error:
            raise InvalidError(f"{key!r} is outside of {self.name!r} {self.shape}") from error
        except (TypeError, ValueError) as error:
            raise InvalidError(f"{key!r} is no index of {self.name!r}: {error}") from error

    def _shaped(self, data: memoryview) -> NDArray[Any]:
        return np.frombuffer(data, np.uint8, self.nbytes).view(self.dtype).reshape(self.shape)

    def _copy_live(self, data: Memory, key: Any) -> Any:
        """Copy from the mapping while nobody commits; None when that did not succeed."""
        for _ in range(_TRIES if not is_basic(key) else 1):
            settled = data.quiet()
            if settled < 0:
                return None
            if not data.is_whole():
                for offset, _, length in self._select(key).runs():
                    data.ensure(offset, length)
            whole = self._shaped(data.live())
            try:
                found: Any = whole[key]
            except (IndexError, ValueError, TypeError):
                return None  # let `_select` say what is wrong
            if isinstance(found, np.ndarray):
                array = cast("NDArray[Any]", found)
                found = array.copy() if array.base is not None else array
            if data.quiet() == settled:
                return found
        return None

    def _gather(self, chosen: Selection) -> Any:
        """Read the selected bytes from the object."""
        start, end = chosen.bounds()
        result = np.empty(chosen.shape, chosen.dtype)
        if chosen.size:
            flat = result.reshape(-1).view(np.uint8) if result.ndim else result.reshape(1)
            flat = flat.view(np.uint8).reshape(len(chosen.offsets), chosen.run_bytes)
            self._fill(chosen, start, end, flat)
        return result[()] if chosen.scalar else result

    def _fill(self, chosen: Selection, start: int, end: int, flat: NDArray[np.uint8]) -> None:
        data = self._data
        gather = getattr(data, "read_runs", None)
        if gather is not None:
            gather(chosen, flat)
            return
        source = np.frombuffer(data.read(start, end - start), np.uint8)
        for at, offset in enumerate((chosen.offsets - start).tolist()):
            flat[at] = source[offset : offset + chosen.run_bytes]


class ValueArray(Array):
    """A handle on an array value: it never changes, whatever becomes of its name."""

    def __init__(self, name: str, array: NDArray[Any], version: int) -> None:
        self._name = name
        self._array = array
        self._layout = Layout(array.dtype, array.shape)
        self._version = version

    name = property(lambda self: self._name, doc="The name it was found under.")
    version = property(lambda self: self._version, doc="The version that stored it.")

    def __getitem__(self, key: Any) -> Any:
        try:
            found: Any = self._array[key]
        except IndexError as error:
            raise InvalidError(f"{key!r} is outside of {self.name!r} {self.shape}") from error
        return cast("Any", found.copy() if isinstance(found, np.ndarray) else found)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise InvalidError(
            f"{self.name!r} is a value, which is only replaced whole: assign pool[{self.name!r}], "
            "or use allocate_array for an array that changes in place"
        )

    def __reduce__(self) -> Any:
        raise InvalidError(f"send pool[{self.name!r}] itself to the other process, or its name")

    def view(self) -> NDArray[Any]:
        """Return the value, without a copy."""
        return self._array

    def fetch_add(self, index: Any, delta: Any) -> Any:
        """Refuse: a value does not change."""
        self[index] = delta


def open_array(pool: "Pool", name: str, id: int, size: int, header: bytes) -> Array:
    """Return the handle of an allocated array."""
    return Array(Memory(pool, name, id, size, header), layout_of(header))


def as_bytes(data: Any) -> memoryview:
    """Return the bytes of a buffer; raises `InvalidError` for what is none."""
    try:
        view = memoryview(data)
        return view.cast("B") if view.contiguous else memoryview(view.tobytes())
    except TypeError:
        raise InvalidError(
            f"{type(data).__name__} is no buffer of bytes: give bytes, or an array's data"
        ) from None


def encode_delta(delta: Any, dtype: DTypeLike) -> tuple[np.dtype[Any], bytes]:
    """Return the type and the bytes of a number to add; raises `InvalidError`."""
    try:
        kind = np.dtype(dtype)
    except TypeError as error:
        raise InvalidError(f"{dtype!r} is no type of numbers: {error}") from error
    if kind.kind not in "iuf" or kind.itemsize > 8:
        raise InvalidError(f"fetch_add works on integers and floats up to 64 bits, not on {kind}")
    try:
        if kind.kind == "f":
            return kind, np.array(float(delta)).astype(kind).tobytes()
        wrapped = operator.index(delta) % (1 << 8 * kind.itemsize)
    except (TypeError, ValueError) as error:
        raise InvalidError(f"{delta!r} cannot be added to a number of type {kind}") from error
    order = "big" if kind.str.startswith(">") else "little"
    return kind, wrapped.to_bytes(kind.itemsize, order)


def _reopen_memory(pool: "Pool", name: str) -> Memory:
    return pool.memory(name)


def _reopen_array(pool: "Pool", name: str) -> Array:
    return pool.array(name)
