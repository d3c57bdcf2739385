"""What kind of object a value or handle is, as `ls -l` and the manifest name it."""

from typing import Any, Protocol, TypeGuard

import numpy as np

from everpool.cli.tagged import is_json_like, to_json

BYTES = "bytes"
TEXT = "str"
JSON = "json"
ARRAY = "array"
TABLE = "table"
BATCH = "batch"
MEMORY = "memory"
MEMORY_ARRAY = "memory-array"


class MemoryHandle(Protocol):
    """What pools and transactions return for memory."""

    @property
    def size(self) -> int: ...

    @property
    def version(self) -> int: ...

    def read(self, offset: int, size: int) -> bytes: ...

    def write(self, offset: int, data: bytes) -> None: ...


class ArrayHandle(Protocol):
    """What pools and transactions return for an allocated array."""

    @property
    def dtype(self) -> "np.dtype[Any]": ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def version(self) -> int: ...


def is_memory(value: object) -> TypeGuard[MemoryHandle]:
    """Return whether `value` is a handle on memory that was allocated as plain bytes."""
    return hasattr(value, "compare_and_swap")


def is_memory_array(value: object) -> TypeGuard[ArrayHandle]:
    """Return whether `value` is a handle on memory that was allocated as an array."""
    return hasattr(value, "fetch_add") and hasattr(value, "dtype")


def kind_of(value: object) -> str:
    """Return the kind of a pool's object: one of this module's constants."""
    if is_json_like(value):
        return JSON
    if isinstance(value, bytes):
        return BYTES
    if isinstance(value, str):
        return TEXT
    if isinstance(value, np.ndarray):
        return ARRAY
    if is_memory_array(value):
        return MEMORY_ARRAY
    if is_memory(value):
        return MEMORY
    return BATCH if type(value).__name__ == "RecordBatch" else TABLE


def describe(name: str, value: Any) -> dict[str, Any]:
    """Return the facts about an object: name, kind, size in bytes, and what its kind adds."""
    kind = kind_of(value)
    facts: dict[str, Any] = {"name": name, "kind": kind, "size": _size(kind, value)}
    if kind in (ARRAY, MEMORY_ARRAY):
        facts |= {"dtype": str(value.dtype), "shape": list(value.shape)}
    if kind in (TABLE, BATCH):
        facts |= {"rows": value.num_rows, "columns": list(value.schema.names)}
    if kind in (MEMORY, MEMORY_ARRAY):
        facts["version"] = value.version
    return facts


def summary(facts: dict[str, Any]) -> str:
    """Return what sets an object apart beyond kind and size, such as `float64 (3, 4)`."""
    if "shape" in facts:
        return f"{facts['dtype']} {tuple(facts['shape'])}"
    if "rows" in facts:
        return f"{facts['rows']} rows x {len(facts['columns'])} columns"
    return ""


def _size(kind: str, value: Any) -> int:
    if kind == BYTES:
        return len(value)
    if kind == TEXT:
        return len(value.encode("utf-8", "surrogatepass"))
    if kind == JSON:
        return len(to_json(value))
    return value.size if kind == MEMORY else value.nbytes
