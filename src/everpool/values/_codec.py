"""The one place where kinds and Python types meet: encode, decode, describe."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np

from everpool.errors import CorruptionError, EverpoolError, InvalidError
from everpool.values import _arrays as arrays
from everpool.values import _containers as containers
from everpool.values import _scalars as scalars
from everpool.values import _tables as tables
from everpool.values import _wire as wire
from everpool.values._refusals import refusal
from everpool.values._wire import Buffer, Encoded

_HEADER_SIZE: Final = wire.HEADER_SIZE
_BYTES_HEADER: Final = wire.header(wire.BYTES)
_STR_HEADER: Final = wire.header(wire.STR)
_NONE: Final = Encoded(_HEADER_SIZE, (wire.header(wire.NONE),))


def encode(value: object) -> Encoded:
    """Return `value` ready to be written as bytes; it is not copied before that.

    Raises:
        InvalidError: the value, or something in it, is of a type that is not stored; the message
            says what to store instead.
    """
    encoder = _ENCODERS.get(type(value))
    try:
        if encoder is not None:
            return encoder(value)
        if tables.is_tabular(type(value)):
            return tables.encode_tabular(value)
    except EverpoolError:
        raise
    except UnicodeEncodeError as error:
        raise InvalidError(
            f"a str with lone surrogates cannot be stored ({error}): encode it to bytes yourself, "
            "for example with errors='surrogateescape'"
        ) from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise InvalidError(
            f"a value of type {type(value).__name__} cannot be stored: {error}; store its parts "
            "under names of their own"
        ) from error
    raise refusal(type(value))


def _encode_none(_: Any) -> Encoded:
    return _NONE


def _encode_bytes(value: Any) -> Encoded:
    return Encoded(_HEADER_SIZE + len(value), (_BYTES_HEADER, value))


def _encode_str(value: Any) -> Encoded:
    body = value.encode()
    return Encoded(_HEADER_SIZE + len(body), (_STR_HEADER, body))


def _body_encoder(kind: int, to_body: Callable[[Any], bytes]) -> Callable[[Any], Encoded]:
    header = wire.header(kind)

    def encode_body(value: Any) -> Encoded:
        body = to_body(value)
        return Encoded(_HEADER_SIZE + len(body), (header, body))

    return encode_body


_ENCODERS: Final[dict[type, Callable[[Any], Encoded]]] = {
    type(None): _encode_none,
    bytes: _encode_bytes,
    str: _encode_str,
    list: containers.encode_container,
    tuple: containers.encode_container,
    dict: containers.encode_container,
    **{kind: _body_encoder(code, to_body) for kind, code, to_body, _ in scalars.BODIES},
    **dict.fromkeys(arrays.SCALAR_TYPES, arrays.encode_scalar),
    **dict.fromkeys(arrays.ARRAY_TYPES, arrays.encode_array),
}


def decode(data: Buffer, *, zero_copy: bool) -> Any:
    """Return the value of which `data` is the whole encoding.

    Arrays and tables are read-only. With `zero_copy` they alias `data` and keep it alive, else
    they own a copy; everything else is always copied. `data` is bytes or a contiguous
    memoryview of format "B". No bytes make it run code, read outside of `data`, or use more
    time and memory than in proportion to their number.

    Opening an array costs the same whatever its size. Opening a table costs a look at the
    offsets and indices of its columns of variable length or dictionaries, not at their text;
    without `zero_copy` the text is checked as well to be UTF-8.

    Raises:
        CorruptionError: the bytes are malformed.
        InvalidError: they are sound but cannot be read here: a newer format version, an
            encrypted value, an unknown time zone, a table without pyarrow.
    """
    try:
        decoder = _DECODERS.get(wire.read_word(data)[0])
        if decoder is not None:
            return decoder(data, zero_copy)
    except (EverpoolError, MemoryError):
        raise
    except Exception as error:
        if len(data) >= _HEADER_SIZE:
            raise CorruptionError(f"the encoded value is malformed: {error}") from error
    raise wire.header_error(data)


def _decode_none(data: Buffer, zero_copy: bool) -> None:
    if len(data) != _HEADER_SIZE:
        raise CorruptionError("bytes follow the header of an encoded None")


def _decode_bytes(data: Buffer, zero_copy: bool) -> bytes:
    return bytes(data[_HEADER_SIZE:])


def _decode_str(data: Buffer, zero_copy: bool) -> str:
    return str(data[_HEADER_SIZE:], "utf-8")


def _body_decoder(from_body: Callable[[Buffer], object]) -> Callable[[Buffer, bool], object]:
    return lambda data, zero_copy: from_body(data[_HEADER_SIZE:])


def _decode_plain_list(data: Buffer, zero_copy: bool) -> Any:
    return containers.decode_plain(data, list)


def _decode_plain_tuple(data: Buffer, zero_copy: bool) -> Any:
    return tuple(containers.decode_plain(data, list))


def _decode_plain_dict(data: Buffer, zero_copy: bool) -> Any:
    return containers.decode_plain(data, dict)


def _decode_list(data: Buffer, zero_copy: bool) -> Any:
    return containers.decode_extended(data, list, zero_copy)


def _decode_tuple(data: Buffer, zero_copy: bool) -> Any:
    return tuple(containers.decode_extended(data, list, zero_copy))


def _decode_dict(data: Buffer, zero_copy: bool) -> Any:
    return containers.decode_extended(data, dict, zero_copy)


_word = wire.header_word

_DECODERS: Final[dict[int, Callable[[Buffer, bool], object]]] = {
    _word(wire.NONE): _decode_none,
    _word(wire.BYTES): _decode_bytes,
    _word(wire.STR): _decode_str,
    **{_word(code): _body_decoder(from_body) for _, code, _, from_body in scalars.BODIES},
    _word(wire.SCALAR): _body_decoder(arrays.scalar_from),
    _word(wire.LIST): _decode_plain_list,
    _word(wire.TUPLE): _decode_plain_tuple,
    _word(wire.DICT): _decode_plain_dict,
    _word(wire.LIST, wire.EXTENDED): _decode_list,
    _word(wire.TUPLE, wire.EXTENDED): _decode_tuple,
    _word(wire.DICT, wire.EXTENDED): _decode_dict,
    _word(wire.ARRAY): arrays.decode_array,
    _word(wire.TABLE): tables.decode_table,
    _word(wire.BATCH): tables.decode_batch,
}


class Described(NamedTuple):
    """What the header of an encoding tells.

    `kind` is one of bytes, str, none, bool, int, float, complex, datetime, date, list, tuple,
    dict, scalar, array, table, batch. `shape` is an array's, () for a scalar, (rows, columns)
    of a table or batch, else None; `dtype` is an array's or scalar's, else None. The content
    is the `nbytes` bytes from `data_offset` on.
    """

    kind: str
    shape: tuple[int, ...] | None
    dtype: np.dtype[Any] | None
    data_offset: int
    nbytes: int


def describe(data: Buffer) -> Described:
    """Return what `data`, a whole encoding, is, reading no more than its header.

    Raises:
        CorruptionError: the header is malformed, or does not fit the length of `data`.
        InvalidError: a newer format version, or an encrypted value.
    """
    if len(data) < _HEADER_SIZE or wire.read_word(data)[0] not in _DECODERS:
        raise wire.header_error(data)
    code = data[2]
    kind = wire.KIND_NAMES[code]
    size = len(data)
    if code == wire.ARRAY:
        shape, dtype, _, data_at = arrays.array_layout(data)
        return Described(kind, shape, dtype, data_at, size - data_at)
    if code == wire.SCALAR:
        dtype, item_at = arrays.scalar_layout(memoryview(data)[_HEADER_SIZE:])
        data_at = _HEADER_SIZE + item_at
        return Described(kind, (), dtype, data_at, size - data_at)
    if code in (wire.TABLE, wire.BATCH):
        data_at = wire.ALIGNMENT
        return Described(kind, tables.extent(data), None, data_at, size - data_at)
    return Described(kind, None, None, _HEADER_SIZE, size - _HEADER_SIZE)


def view_array(data: Buffer) -> np.ndarray[Any, Any]:
    """Return a read-only, zero-copy view of an encoded array.

    Raises:
        CorruptionError: the bytes are malformed.
        InvalidError: the value is not an array, or cannot be read by this release.
    """
    kind = describe(data).kind
    if kind != "array":
        raise InvalidError(f"the value is of kind {kind}, not an array", kind=kind)
    return arrays.decode_array(data, True)
