"""Values as JSON text and back, exactly.

What JSON can say is said plainly: null, true, numbers, strings, lists, objects. The rest is an
object with the key `$everpool`, which names its type:

    {"$everpool": "bytes", "value": "aGVsbG8="}                base64
    {"$everpool": "tuple", "value": [1, 2]}
    {"$everpool": "int", "value": "0x1f..."}                   more than 1,024 bits, hexadecimal
    {"$everpool": "float", "value": "nan"}                     or inf, -inf, a NaN's 16 hex digits
    {"$everpool": "complex", "value": [1.0, -2.5]}
    {"$everpool": "datetime", "value": "2024-05-01T12:00:00"}  "fold": 1 where it is set, and
                 either "zone": "Europe/Paris" or "offset_us": 7200000000 with its "zone_name"
    {"$everpool": "date", "value": "2024-05-01"}
    {"$everpool": "scalar", "value": "..."}                    base64 of an .npy file of 0 axes
    {"$everpool": "numpy.str_", "value": "text"}               or numpy.bytes_, in base64
    {"$everpool": "array", "value": "..."}                     base64 of an .npy file
    {"$everpool": "table", "value": "..."}                     base64 of an Arrow IPC stream
    {"$everpool": "batch", "value": "..."}                     the same, of one record batch
    {"$everpool": "dict", "value": [["$everpool", 1]]}         a dict that has such a key itself
"""

import base64
import binascii
import datetime as dt
import io
import json
import math
import struct
from collections.abc import Callable
from typing import Any, cast
from zoneinfo import ZoneInfo

import numpy as np

from everpool.cli.arrow_files import arrow
from everpool.errors import InvalidError

TAG = "$everpool"
_NATIVE_INT_BITS = 1024
_JSON_LIKE = (bool, int, float, complex, list, tuple, dict, dt.date, np.generic)
_CANONICAL_NAN = struct.pack(">d", math.nan)


def to_json(value: object, *, indent: int | None = None) -> str:
    """Return `value` as JSON text; raises `InvalidError` for a type that no pool holds."""
    try:
        return json.dumps(_plain(value), allow_nan=False, indent=indent)
    except RecursionError:
        raise InvalidError("the value is nested too deeply for JSON") from None


def from_json(text: str | bytes) -> Any:
    """Return the value that `text` says; raises `InvalidError` when it is no such JSON."""
    try:
        return _value(json.loads(text))
    except RecursionError:
        raise InvalidError("the JSON is nested too deeply") from None
    except (ValueError, KeyError, TypeError, binascii.Error, struct.error, OverflowError) as error:
        if isinstance(error, InvalidError):
            raise
        raise InvalidError(f"not JSON that everpool can read: {error}") from None


def is_json_like(value: object) -> bool:
    """Return whether `value` is neither bytes, text, an array, a table nor memory."""
    return value is None or isinstance(value, _JSON_LIKE)


def _tagged(kind: str, value: object, **more: object) -> dict[str, object]:
    return {TAG: kind, "value": value, **more}


def _plain(value: Any) -> object:
    if isinstance(value, np.generic):
        return _plain_scalar(cast("np.generic[Any]", value))
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value if value.bit_length() <= _NATIVE_INT_BITS else _tagged("int", hex(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else _tagged("float", _not_finite(value))
    if isinstance(value, list):
        return [_plain(item) for item in cast(list[object], value)]
    if isinstance(value, dict):
        return _plain_dict(cast(dict[str, object], value))
    if isinstance(value, tuple):
        return _tagged("tuple", [_plain(item) for item in cast(tuple[object, ...], value)])
    if isinstance(value, bytes):
        return _tagged("bytes", _base64(value))
    if isinstance(value, complex):
        return _tagged("complex", [_plain(value.real), _plain(value.imag)])
    if isinstance(value, dt.datetime):
        return _plain_datetime(value)
    if isinstance(value, dt.date):
        return _tagged("date", value.isoformat())
    if isinstance(value, np.ndarray):
        return _tagged("array", _base64(_npy_bytes(cast("np.ndarray[Any, Any]", value))))
    return _plain_arrow(value)


def _plain_scalar(value: "np.generic[Any]") -> object:
    # An array would drop the zeros at the end of such texts and bytes.
    if isinstance(value, np.str_):
        return _tagged("numpy.str_", str(value))
    if isinstance(value, np.bytes_):
        return _tagged("numpy.bytes_", _base64(bytes(value)))
    return _tagged("scalar", _base64(_npy_bytes(np.asarray(value))))


def _plain_datetime(value: dt.datetime) -> object:
    more: dict[str, object] = {"fold": 1} if value.fold else {}
    zone = value.tzinfo
    if isinstance(zone, ZoneInfo):
        more["zone"] = zone.key
    elif zone is not None:
        offset = cast(dt.timedelta, value.utcoffset())
        more["offset_us"] = offset // dt.timedelta(microseconds=1)
        if value.tzname() != dt.timezone(offset).tzname(None):
            more["zone_name"] = value.tzname()
    return _tagged("datetime", value.replace(tzinfo=None, fold=0).isoformat(), **more)


def _plain_dict(value: dict[str, object]) -> object:
    if TAG in value:
        return _tagged("dict", [[key, _plain(item)] for key, item in value.items()])
    return {key: _plain(item) for key, item in value.items()}


def _plain_arrow(value: Any) -> object:
    module = type(value).__module__
    if module.startswith("pyarrow") and hasattr(value, "schema"):
        pa = arrow()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, value.schema) as writer:
            writer.write(value)
        kind = "table" if isinstance(value, pa.Table) else "batch"
        return _tagged(kind, _base64(sink.getvalue().to_pybytes()))
    raise InvalidError(f"a {module}.{type(value).__name__} cannot be written as JSON")


def _value(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_value(item) for item in cast(list[object], plain)]
    if not isinstance(plain, dict):
        return plain
    fields = cast(dict[str, Any], plain)
    if TAG not in fields:
        return {key: _value(item) for key, item in fields.items()}
    if fields[TAG] == "datetime":
        return _datetime(fields)
    read = _READERS.get(str(fields[TAG]))
    if read is None:
        raise InvalidError(f"the JSON names an unknown type {fields[TAG]!r} under {TAG}")
    return read(fields["value"])


def _datetime(fields: dict[str, Any]) -> dt.datetime:
    zone: dt.tzinfo | None = None
    if "zone" in fields:
        zone = ZoneInfo(fields["zone"])
    elif "offset_us" in fields:
        offset = dt.timedelta(microseconds=fields["offset_us"])
        name = fields.get("zone_name")
        zone = dt.timezone(offset) if name is None else dt.timezone(offset, name)
    naive = dt.datetime.fromisoformat(fields["value"])
    return naive.replace(tzinfo=zone, fold=fields.get("fold", 0))


def _not_finite(value: float) -> str:
    bits = struct.pack(">d", value)
    return bits.hex() if math.isnan(value) and bits != _CANONICAL_NAN else str(value)


def _float(text: str) -> float:
    if len(text) == 16:
        return struct.unpack(">d", bytes.fromhex(text))[0]
    return float(text)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _npy_bytes(array: "np.ndarray[Any, Any]") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=False)
    return file.getvalue()


def _array(text: str) -> "np.ndarray[Any, Any]":
    return np.lib.format.read_array(io.BytesIO(_bytes(text)), allow_pickle=False)


def _table(text: str) -> object:
    return arrow().ipc.open_stream(_bytes(text)).read_all()


def _batch(text: str) -> object:
    return arrow().ipc.open_stream(_bytes(text)).read_next_batch()


def _complex(parts: list[Any]) -> complex:
    real, imag = (_value(part) for part in parts)
    return complex(real, imag)


_READERS: dict[str, Callable[[Any], Any]] = {
    "bytes": _bytes,
    "tuple": lambda items: tuple(_value(item) for item in items),
    "int": lambda text: int(text, 16),
    "float": _float,
    "complex": _complex,
    "scalar": lambda text: _array(text)[()],
    "numpy.str_": np.str_,
    "numpy.bytes_": lambda text: np.bytes_(_bytes(text)),
    "date": dt.date.fromisoformat,
    "array": _array,
    "table": _table,
    "batch": _batch,
    "dict": lambda pairs: {key: _value(item) for key, item in pairs},
}
