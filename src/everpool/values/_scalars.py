"""The bytes of plain Python values that hold no others: what follows the header of each kind."""

import re
import struct
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from typing import Any, Final
from zoneinfo import ZoneInfo

from everpool.errors import CorruptionError, InvalidError
from everpool.values import _wire as wire
from everpool.values._wire import Buffer

_FLOAT: Final = struct.Struct("<d")
_COMPLEX: Final = struct.Struct("<dd")
_DATE: Final = struct.Struct("<HBB")
_DATETIME: Final = struct.Struct("<H5BIBB")
_OFFSET: Final = struct.Struct("<q")

_NAIVE: Final = 0
_FIXED_OFFSET: Final = 1
_NAMED_OFFSET: Final = 2
_ZONE_KEY: Final = 3

_MICROSECOND: Final = timedelta(microseconds=1)
_KEY_GRAMMAR: Final = re.compile(r"[A-Za-z0-9_+\-]{1,64}(?:/[A-Za-z0-9_+\-]{1,64}){0,4}")


def bool_body(value: bool) -> bytes:
    """Return the byte of a bool."""
    return b"\x01" if value else b"\x00"


def bool_from(body: Buffer) -> bool:
    """Return the bool that `bool_body` wrote."""
    if len(body) != 1 or body[0] > 1:
        raise CorruptionError("the encoded bool is neither 0 nor 1")
    return body[0] == 1


def int_body(value: int) -> bytes:
    """Return an int of any size in two's complement, little-endian."""
    return value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)


def int_from(body: Buffer) -> int:
    """Return the int that `int_body` wrote."""
    if not body:
        raise CorruptionError("the encoded int has no bytes")
    return int.from_bytes(body, "little", signed=True)


def float_body(value: float) -> bytes:
    """Return the eight bytes of a float."""
    return _FLOAT.pack(value)


def float_from(body: Buffer) -> float:
    """Return the float that `float_body` wrote."""
    return _unpack(_FLOAT, body, "float")[0]


def complex_body(value: complex) -> bytes:
    """Return the sixteen bytes of a complex number."""
    return _COMPLEX.pack(value.real, value.imag)


def complex_from(body: Buffer) -> complex:
    """Return the complex number that `complex_body` wrote."""
    return complex(*_unpack(_COMPLEX, body, "complex"))


def date_body(value: date) -> bytes:
    """Return the four bytes of a date."""
    return _DATE.pack(value.year, value.month, value.day)


def date_from(body: Buffer) -> date:
    """Return the date that `date_body` wrote."""
    try:
        return date(*_unpack(_DATE, body, "date"))
    except ValueError as error:
        raise CorruptionError(f"the encoded date is impossible: {error}") from error


def datetime_body(value: datetime) -> bytes:
    """Return a datetime's fields, its fold and its zone: naive, an offset, or a ZoneInfo's key.

    Raises:
        InvalidError: the tzinfo is of another kind, or a ZoneInfo without a key.
    """
    zone_kind, zone = _zone_body(value)
    fields = (value.year, value.month, value.day, value.hour, value.minute, value.second)
    return _DATETIME.pack(*fields, value.microsecond, value.fold, zone_kind) + zone


def _zone_body(value: datetime) -> tuple[int, bytes]:
    zone = value.tzinfo
    if zone is None:
        return _NAIVE, b""
    if type(zone) is timezone:
        offset, *name = _timezone_arguments(zone)
        offset_bytes = _OFFSET.pack(offset // _MICROSECOND)
        if not name:
            return _FIXED_OFFSET, offset_bytes
        return _NAMED_OFFSET, offset_bytes + name[0].encode()
    if type(zone) is ZoneInfo:
        key: Any = zone.key
        if key is None or not _KEY_GRAMMAR.fullmatch(key) or _zone_by_key(key).key != key:
            raise InvalidError(
                "a ZoneInfo without a key cannot be found again: use zoneinfo.ZoneInfo(key)"
            )
        return _ZONE_KEY, key.encode()
    raise InvalidError(
        f"a tzinfo of type {type(zone).__module__}.{type(zone).__qualname__} is not stored: "
        "use zoneinfo.ZoneInfo(key) or datetime.timezone, or value.astimezone(timezone.utc)"
    )


def _timezone_arguments(zone: timezone) -> tuple[Any, ...]:
    # The only way to tell a timezone's own name from the one that is made of its offset.
    arguments: Callable[[], tuple[Any, ...]] = getattr(zone, "__getinitargs__")  # noqa: B009
    return arguments()


def datetime_from(body: Buffer) -> datetime:
    """Return the datetime that `datetime_body` wrote.

    Raises:
        CorruptionError: the bytes are malformed.
        InvalidError: this machine's time zone database lacks the zone.
    """
    if len(body) < _DATETIME.size:
        raise CorruptionError(f"the encoded datetime has {len(body)} bytes")
    *fields, fold, zone_kind = _DATETIME.unpack_from(body)
    try:
        zone = _zone_from(zone_kind, bytes(body[_DATETIME.size :]))
        return datetime(*fields, tzinfo=zone, fold=fold)
    except (ValueError, OverflowError, struct.error) as error:
        if isinstance(error, InvalidError):
            raise
        raise CorruptionError(f"the encoded datetime is impossible: {error}") from error


def _zone_from(zone_kind: int, zone: bytes) -> timezone | ZoneInfo | None:
    if zone_kind == _NAIVE and not zone:
        return None
    if zone_kind == _FIXED_OFFSET:
        return timezone(_OFFSET.unpack(zone)[0] * _MICROSECOND)
    if zone_kind == _NAMED_OFFSET:
        offset = _OFFSET.unpack_from(zone)[0] * _MICROSECOND
        return timezone(offset, zone[_OFFSET.size :].decode())
    if zone_kind == _ZONE_KEY:
        return _zone_by_key(zone.decode())
    raise CorruptionError(f"the encoded datetime has a zone of unknown kind {zone_kind}")


def _zone_by_key(key: str) -> ZoneInfo:
    # ZoneInfo opens a file of that name.
    if not _KEY_GRAMMAR.fullmatch(key):
        raise CorruptionError("the encoded datetime names a malformed time zone")
    try:
        return ZoneInfo(key)
    except (KeyError, ValueError, OSError) as error:
        raise InvalidError(
            f"the time zone {key!r} is not known on this machine: pip install tzdata, or update it",
            key=key,
        ) from error


def _unpack(layout: struct.Struct, body: Buffer, what: str) -> tuple[Any, ...]:
    if len(body) != layout.size:
        raise CorruptionError(f"the encoded {what} has {len(body)} bytes, not {layout.size}")
    return layout.unpack(body)


# Python type, kind, encoder and decoder of the body, for every kind written the same way
# at the top and as an extension type inside a container.
BODIES: Final[tuple[tuple[type, int, Callable[[Any], bytes], Callable[[Buffer], object]], ...]] = (
    (bool, wire.BOOL, bool_body, bool_from),
    (int, wire.INT, int_body, int_from),
    (float, wire.FLOAT, float_body, float_from),
    (complex, wire.COMPLEX, complex_body, complex_from),
    (datetime, wire.DATETIME, datetime_body, datetime_from),
    (date, wire.DATE, date_body, date_from),
)
