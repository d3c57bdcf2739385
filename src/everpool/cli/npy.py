"""Arrays in .npy files, those included whose type the format cannot say.

NumPy's format (numpy.lib.format) describes a structured type as a list of fields in order. Where
fields overlap or stand out of order that fails: such arrays are written as items of opaque bytes
(`|V24`), and the manifest carries the type under `layout`, in the words of numpy.dtype's own
dictionary form.
"""

import struct
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from everpool.errors import InvalidError

Array = np.ndarray[Any, Any]


class Sink(Protocol):
    """What arrays are written to."""

    def write(self, data: Any) -> int: ...


def npy_dtype(dtype: "np.dtype[Any]") -> "np.dtype[Any]":
    """Return the type that a file gives to items of `dtype`: the same, or opaque bytes."""
    try:
        back = np.lib.format.descr_to_dtype(np.lib.format.dtype_to_descr(dtype))
    except (ValueError, TypeError):
        back = None
    return dtype if back == dtype else np.dtype(f"V{dtype.itemsize}")


def write_header(dtype: "np.dtype[Any]", shape: tuple[int, ...], file: Sink) -> None:
    """Write what stands before the items of a C-ordered array.

    That is version 1 of the format where the text fits 64 KiB, else 2; 3 for field names outside
    Latin-1.
    """
    descr = np.lib.format.dtype_to_descr(npy_dtype(dtype))
    text = repr({"descr": descr, "fortran_order": False, "shape": shape})
    try:
        body, version = text.encode("latin1"), (1 if len(text) < 65_000 else 2)
    except UnicodeEncodeError:
        body, version = text.encode(), 3
    length_format = "<H" if version == 1 else "<I"
    before = len(np.lib.format.magic(version, 0)) + struct.calcsize(length_format)
    body += b" " * (-(before + len(body) + 1) % 64) + b"\n"
    file.write(np.lib.format.magic(version, 0) + struct.pack(length_format, len(body)) + body)


def write_array(array: Array, file: Sink) -> None:
    """Write a whole array, piece by piece."""
    stored = npy_dtype(array.dtype)
    if stored != array.dtype:
        array = array.view(stored)
    np.lib.format.write_array(cast(Any, file), array, allow_pickle=False)


def read_array(path: Path, layout: dict[str, Any] | None = None) -> Array:
    """Return the array in an .npy file, mapped rather than loaded where it has any bytes.

    `layout` is the type of opaque items. Raises `InvalidError` when the file is no .npy file, or
    holds Python objects.
    """
    try:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError:
            # An empty array cannot be mapped.
            array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it holds several arrays, as .npz files do")
        plain = np.asarray(cast(Array, array))
        return plain if layout is None else plain.view(dtype_from_layout(layout))
    except (ValueError, TypeError, KeyError, EOFError, SyntaxError, MemoryError) as error:
        raise InvalidError(f"{path} is not an .npy file that everpool can read: {error}") from None


def data_offset(path: Path) -> int:
    """Return where the items begin in an .npy file that `read_array` can read."""
    with path.open("rb") as file:
        major, _ = np.lib.format.read_magic(file)
        length = file.read(2) if major == 1 else file.read(4)
        return file.tell() + int.from_bytes(length, "little")


def layout_of(dtype: "np.dtype[Any]") -> dict[str, Any] | None:
    """Return what the manifest must say of `dtype` beyond the file, if anything."""
    return None if npy_dtype(dtype) == dtype else _layout(dtype)


def _layout(dtype: "np.dtype[Any]") -> Any:
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return {"base": _layout(base), "shape": list(shape)}
    if dtype.fields is None or dtype.names is None:
        return dtype.str
    fields = [cast(Any, dtype.fields)[name] for name in dtype.names]
    return {
        "names": list(dtype.names),
        "formats": [_layout(field[0]) for field in fields],
        "offsets": [field[1] for field in fields],
        "titles": [field[2] if len(field) > 2 else None for field in fields],
        "itemsize": dtype.itemsize,
    }


def dtype_from_layout(layout: Any) -> "np.dtype[Any]":
    """Return the type that `layout_of` described."""
    if isinstance(layout, str):
        return np.dtype(layout)
    if "base" in layout:
        return np.dtype((dtype_from_layout(layout["base"]), tuple(layout["shape"])))
    fields = {**layout, "formats": [dtype_from_layout(one) for one in layout["formats"]]}
    if not any(fields["titles"]):
        del fields["titles"]
    return np.dtype(cast(Any, fields))
