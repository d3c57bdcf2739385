"""What to do instead with a value of a type that is not stored."""

import collections
import datetime
import decimal
import enum
import fractions
import pathlib
import uuid
from typing import Final

import numpy as np

from everpool.errors import InvalidError

_STORED: Final = (
    "bytes, str, None, bool, int, float, complex, datetime, date, list, tuple, dict with str "
    "keys, NumPy arrays and scalars, Arrow tables and record batches"
)

# The first match wins: subclasses stand before what they are subclasses of.
_REMEDIES: Final[tuple[tuple[type | tuple[type, ...], str], ...]] = (
    (enum.Enum, "store value.value"),
    ((bytearray, memoryview), "store bytes(value)"),
    ((set, frozenset), "store sorted(value) or list(value)"),
    (decimal.Decimal, "store str(value)"),
    (fractions.Fraction, "store (value.numerator, value.denominator)"),
    ((uuid.UUID, pathlib.PurePath), "store str(value)"),
    (datetime.timedelta, "store value.total_seconds() or numpy.timedelta64(value)"),
    (datetime.time, "store value.isoformat()"),
    (datetime.datetime, "store a plain datetime (pandas: value.to_pydatetime())"),
    (datetime.date, "store datetime.date(value.year, value.month, value.day)"),
    (np.ma.MaskedArray, "store {'data': value.data, 'mask': value.mask} or value.filled()"),
    (np.recarray, "store value.view(numpy.dtype((numpy.void, value.dtype)), numpy.ndarray)"),
    (np.ndarray, "store numpy.asarray(value)"),
    (np.generic, "store the plain NumPy scalar, for example numpy.float64(value)"),
    (collections.OrderedDict, "store dict(value), which keeps its order"),
    (dict, "store dict(value)"),
    (str, "store str(value)"),
    (bytes, "store bytes(value)"),
    (int, "store int(value)"),
    (float, "store float(value)"),
    (complex, "store complex(value)"),
    (list, "store list(value)"),
    (tuple, "store tuple(value), or value._asdict() of a namedtuple"),
)

_REMEDIES_BY_PACKAGE: Final = {
    "pandas": "store pyarrow.Table.from_pandas(value) or value.to_numpy()",
    "polars": "store value.to_arrow()",
    "pyarrow": "store it as a column, pyarrow.table({'name': value})",
    "torch": "store value.numpy(force=True)",
    "jax": "store numpy.asarray(value)",
    "jaxlib": "store numpy.asarray(value)",
    "tensorflow": "store value.numpy()",
    "scipy": "store its arrays in a dict, for example {'data': ..., 'indices': ...}",
}


def refusal(kind: type) -> InvalidError:
    """Return the error for a value of exactly this type, with the remedy."""
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    remedy = next((text for types, text in _REMEDIES if issubclass(kind, types)), None)
    if remedy is None:
        package = kind.__module__.partition(".")[0]
        remedy = _REMEDIES_BY_PACKAGE.get(package, f"convert it to one of: {_STORED}")
    return InvalidError(f"a value of type {name} cannot be stored: {remedy}", type=name)
