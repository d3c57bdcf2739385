"""NumPy dtypes as bytes, without pickle or eval.

Every name is matched with a grammar before NumPy sees it, since `numpy.dtype` accepts far more
than what is written here (comma strings, type names, registered aliases).
"""

import re
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np

from everpool.errors import CorruptionError, EverpoolError, InvalidError

AnyDType: TypeAlias = np.dtype[Any]

MAX_DTYPE_DEPTH: Final = 32

_UNITS: Final = "Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as"
_NAME: Final = re.compile(
    r"\|b1|\|[iu]1|[<>][iu][248]|[<>][qQ]|[<>]f[248]|[<>]c(?:8|16)"
    r"|\|[SV]\d{1,10}|[<>]U\d{1,10}"
    rf"|[<>][mM]8(?:\[(?:[1-9]\d{{0,9}})?(?:{_UNITS})\])?"
)
_LONG_DOUBLE: Final = re.compile(r"([<>][fc]\d{2}):(\d{1,3})")
_MANTISSA_BITS: Final = int(np.finfo(np.longdouble).nmant)
_CACHE_LIMIT: Final = 1024


class _Subarray(msgspec.Struct, tag="sub", array_like=True, forbid_unknown_fields=True):
    base: "_Layout"
    shape: list[int]


class _Field(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    name: str
    layout: "_Layout"
    offset: int
    title: str | None


class _Record(msgspec.Struct, tag="rec", array_like=True, forbid_unknown_fields=True):
    fields: list[_Field]
    itemsize: int
    aligned: bool


_Layout: TypeAlias = str | _Subarray | _Record

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final[msgspec.msgpack.Decoder[_Layout]] = msgspec.msgpack.Decoder(_Layout)

# Plain dtypes only: a structured dtype's names can be reassigned in place by whoever holds it.
_plain_to_bytes: Final[dict[tuple[type, str], bytes]] = {}
_plain_from_bytes: Final[dict[bytes, AnyDType]] = {}


def dtype_to_bytes(dtype: AnyDType) -> bytes:
    """Return the bytes of a dtype; `dtype_from_bytes` makes an equal one of them.

    Byte order, offsets, titles, padding, subarrays and the aligned flag are kept; `metadata`,
    which NumPy ignores when it compares, is not.

    Raises:
        InvalidError: the dtype holds objects, or would not come back equal.
    """
    plain = dtype.names is None and dtype.subdtype is None
    key = (dtype.type, dtype.str) if plain else None
    if key in _plain_to_bytes:
        return _plain_to_bytes[key]
    encoded = _checked_bytes(dtype)
    if key is not None and len(_plain_to_bytes) < _CACHE_LIMIT:
        _plain_to_bytes[key] = encoded
    return encoded


def _checked_bytes(dtype: AnyDType) -> bytes:
    if dtype.hasobject:
        raise InvalidError(
            f"dtype {dtype} holds Python objects: convert the array to a plain dtype, "
            "fixed-width strings ('U', 'S') or numbers, or store array.tolist()"
        )
    try:
        encoded = _encoder.encode(_layout_of(dtype, 1))
        back = dtype_from_bytes(encoded)
    except (EverpoolError, UnicodeEncodeError) as error:
        raise _refusal(dtype, str(error)) from error
    if not _identical(back, dtype):
        raise _refusal(dtype, f"it would come back as {back!r}")
    return encoded


def _refusal(dtype: AnyDType, reason: str) -> InvalidError:
    if dtype.type is np.record:
        return InvalidError(
            "arrays of numpy.record are not stored: use array.view(numpy.dtype((numpy.void, "
            "array.dtype)), numpy.ndarray), and view it as a recarray after reading"
        )
    return InvalidError(
        f"dtype {dtype} of {dtype.type.__module__}.{dtype.type.__name__} cannot be stored "
        f"({reason}): convert the array with astype to a dtype of NumPy's own"
    )


def _layout_of(dtype: AnyDType, depth: int) -> _Layout:
    if depth > MAX_DTYPE_DEPTH:
        raise InvalidError(f"it nests more than {MAX_DTYPE_DEPTH} levels deep")
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return _Subarray(_layout_of(base, depth + 1), list(shape))
    if dtype.names is None:
        return _plain_name(dtype)
    described: Any = dtype.fields
    fields: list[_Field] = []
    for name in dtype.names:
        base, offset, *rest = described[name]
        title: object = rest[0] if rest else None
        if title is not None and type(title) is not str:
            raise InvalidError(f"the title of field {name!r} is not a str")
        fields.append(_Field(name, _layout_of(base, depth + 1), offset, title))
    return _Record(fields, dtype.itemsize, dtype.isalignedstruct)


def _plain_name(dtype: AnyDType) -> str:
    if dtype.char in "gG":
        return f"{dtype.str}:{_MANTISSA_BITS}"
    # On most machines longlong is as wide as int64 and compares equal, but is another type.
    if dtype.char in "qQ" and np.dtype(dtype.str).char != dtype.char:
        return dtype.str[0] + dtype.char
    return dtype.str


def dtype_from_bytes(encoded: bytes) -> AnyDType:
    """Return the dtype that `dtype_to_bytes` wrote.

    Raises:
        CorruptionError: the bytes are not what `dtype_to_bytes` writes.
        InvalidError: a long double of another kind of processor.
    """
    known = _plain_from_bytes.get(encoded)
    if known is not None:
        return known
    try:
        layout = _decoder.decode(encoded)
        dtype = _dtype_of(layout, 1)
    except EverpoolError:
        raise
    except Exception as error:
        raise CorruptionError(f"the stored dtype is malformed: {error}") from error
    if isinstance(layout, str) and len(_plain_from_bytes) < _CACHE_LIMIT:
        _plain_from_bytes[encoded] = dtype
    return dtype


def _dtype_of(layout: _Layout, depth: int) -> AnyDType:
    if depth > MAX_DTYPE_DEPTH:
        raise CorruptionError(f"the stored dtype nests more than {MAX_DTYPE_DEPTH} levels deep")
    if isinstance(layout, str):
        return _plain_dtype(layout)
    if isinstance(layout, _Subarray):
        return np.dtype((_dtype_of(layout.base, depth + 1), tuple(layout.shape)))
    fields = layout.fields
    spec: Any = {
        "names": [field.name for field in fields],
        "formats": [_dtype_of(field.layout, depth + 1) for field in fields],
        "offsets": [field.offset for field in fields],
        "itemsize": layout.itemsize,
    }
    if any(field.title is not None for field in fields):
        spec["titles"] = [field.title for field in fields]
    dtype: AnyDType = np.dtype(spec, align=layout.aligned)
    return dtype


def _plain_dtype(name: str) -> AnyDType:
    if _NAME.fullmatch(name) is not None:
        dtype: AnyDType = np.dtype(name)
        # NumPy 2.0 lets the sizes of long strings wrap around.
        if _plain_name(dtype) != name:
            raise CorruptionError(f"the stored dtype {name} means {dtype}")
        return dtype
    long_double = _LONG_DOUBLE.fullmatch(name)
    if long_double is None:
        raise CorruptionError(f"the stored dtype has the unknown name {name[:40]!r}")
    base, bits = long_double.groups()
    if int(bits) != _MANTISSA_BITS or int(base[2:]) != _long_double_size(base[1]):
        raise InvalidError(
            f"the dtype is a long double with {bits} mantissa bits, this machine's have "
            f"{_MANTISSA_BITS}: read it on a machine like the one that wrote it"
        )
    return np.dtype(base)


def _long_double_size(kind: str) -> int:
    return np.dtype(np.longdouble if kind == "f" else np.clongdouble).itemsize


def _identical(a: AnyDType, b: AnyDType) -> bool:
    """Whether two dtypes agree in all that `==` compares and in what it overlooks."""
    if a != b or a.type is not b.type or a.isalignedstruct != b.isalignedstruct:
        return False
    if a.subdtype is not None and b.subdtype is not None:
        return a.subdtype[1] == b.subdtype[1] and _identical(a.subdtype[0], b.subdtype[0])
    if a.fields is None or b.fields is None:
        return a.char == b.char
    return all(
        a.fields[name][1:] == b.fields[name][1:] and _identical(a.fields[name][0], other[0])
        for name, other in b.fields.items()
    )
