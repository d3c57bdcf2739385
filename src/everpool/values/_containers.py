"""Lists, tuples and dicts: MessagePack, with arrays and tables attached behind it."""

import struct
from collections.abc import Callable, Collection
from typing import Any, Final, cast

import msgspec
from msgspec.msgpack import Ext

from everpool.errors import CorruptionError, InvalidError
from everpool.values import _arrays as arrays
from everpool.values import _scalars as scalars
from everpool.values import _tables as tables
from everpool.values import _wire as wire
from everpool.values._refusals import refusal
from everpool.values._wire import Buffer, Encoded

MAX_DEPTH: Final = 200

# As `type`, which a type checker would take for narrowing Any to a partly unknown type.
_type_of: Callable[[object], type] = type

_ATTACHMENT: Final = 64
_LENGTH: Final = struct.Struct("<Q")
_PACKED_AT: Final = wire.HEADER_SIZE + _LENGTH.size
_INT64_MIN: Final = -(2**63)
_UINT64_MAX: Final = 2**64 - 1

_ATOMS: Final[frozenset[type]] = frozenset({type(None), bool, int, float, str, bytes})
_NESTING: Final[frozenset[type]] = frozenset({list, tuple, dict})
_PLAIN: Final[frozenset[type]] = _ATOMS | {list, dict}
_KEYS: Final[frozenset[type]] = frozenset({str})

_PLAIN_HEADERS: Final = {
    kind: wire.header(code)
    for kind, code in ((list, wire.LIST), (tuple, wire.TUPLE), (dict, wire.DICT))
}
_EXTENDED_HEADERS: Final = {
    kind: wire.header(code, wire.EXTENDED)
    for kind, code in ((list, wire.LIST), (tuple, wire.TUPLE), (dict, wire.DICT))
}

_EXTENSION_TYPES: Final[dict[type, tuple[int, Callable[[Any], bytes]]]] = {
    kind: (code, to_body)
    for kind, code, to_body, _ in scalars.BODIES
    if kind not in (bool, int, float)
} | {kind: (wire.SCALAR, arrays.scalar_body) for kind in arrays.SCALAR_TYPES}
_EXTENSION_READERS: Final[dict[int, Callable[[Buffer], object]]] = {
    code: from_body for kind, code, _, from_body in scalars.BODIES if kind not in (bool, float)
} | {wire.SCALAR: arrays.scalar_from}
_ATTACHMENT_READERS: Final[dict[int, Callable[[Buffer, bool], object]]] = {
    wire.header_word(wire.ARRAY): arrays.decode_array,
    wire.header_word(wire.TABLE): tables.decode_table,
    wire.header_word(wire.BATCH): tables.decode_batch,
}


def _survey(root: Collection[object]) -> set[type]:
    """Return the types of the members at all levels, but for containers of nothing but atoms.

    Raises:
        InvalidError: a key is not exactly a str, or the nesting is too deep or cyclic.
    """
    found: set[type] = set()
    level: list[Any] = [root]
    for _ in range(MAX_DEPTH):
        below: dict[int, Any] = {}
        for container in level:
            kind = _type_of(container)
            members: Collection[Any] = container
            if kind is dict:
                members = container.values()
                if not _KEYS.issuperset(map(type, container)):
                    raise _key_error(container)
            if _ATOMS.issuperset(map(type, members)):
                continue
            kinds = set(map(type, members))
            found |= kinds
            if not _NESTING.isdisjoint(kinds):
                # By identity: what is shared, or contains itself, is looked at once a level.
                below.update((id(item), item) for item in members if type(item) in _NESTING)
        if not below:
            return found
        level = list(below.values())
    raise InvalidError(
        f"the value nests more than {MAX_DEPTH} levels deep, or contains itself: "
        "store its parts under names of their own"
    )


def _key_error(container: dict[Any, Any]) -> InvalidError:
    key = next(key for key in container if type(key) is not str)
    return InvalidError(
        f"the dict key {key!r:.100} is of type {type(key).__name__}: keys must be exactly str; "
        "convert them, or store list(value.items())"
    )


def encode_container(value: Any) -> Encoded:
    """Encode a list, tuple or dict with all that it holds.

    Raises:
        InvalidError: something in it is of a type that is not stored, a key is not a str, the
            nesting is too deep or cyclic, or all but its arrays and tables exceeds 4 GiB.
    """
    found = _survey(value)
    if found <= _PLAIN:
        try:
            packed = _pack(value)
        except OverflowError:
            pass  # An int outside of 64 bits: MessagePack has no such number.
        else:
            header = _PLAIN_HEADERS[type(value)]
            return Encoded(wire.HEADER_SIZE + len(packed), (header, packed))
    for kind in found - _PLAIN - _NESTING:
        if kind not in _EXTENSION_TYPES and not _is_attached(kind):
            raise refusal(kind)
    return _encode_extended(value)


def _encode_extended(value: Any) -> Encoded:
    attachments: list[Encoded] = []
    kind = _type_of(value)
    root: Any = list(value) if kind is tuple else value
    packed = _pack(_packable(root, attachments))
    size = _PACKED_AT + len(packed)
    pieces: list[Any] = [_EXTENDED_HEADERS[kind] + _LENGTH.pack(len(packed)), packed]
    for attachment in attachments:
        pieces.append(wire.padding(size))
        pieces.extend(attachment.pieces)
        size = wire.aligned(size) + attachment.size
    return Encoded(size, tuple(pieces))


def _is_attached(kind: type) -> bool:
    return kind in arrays.ARRAY_TYPES or tables.is_tabular(kind)


def _packable(value: Any, attachments: list[Encoded]) -> Any:
    """Return what MessagePack can say of `value`; arrays and tables go to `attachments`."""
    kind = _type_of(value)
    if kind is int and not _INT64_MIN <= value <= _UINT64_MAX:
        return Ext(wire.INT, scalars.int_body(value))
    if kind in _ATOMS:
        return value
    if kind is list:
        return [_packable(item, attachments) for item in value]
    if kind is dict:
        return {key: _packable(item, attachments) for key, item in value.items()}
    if kind is tuple:
        return Ext(wire.TUPLE, _pack([_packable(item, attachments) for item in value]))
    if kind in _EXTENSION_TYPES:
        code, to_body = _EXTENSION_TYPES[kind]
        return Ext(code, to_body(value))
    if kind in arrays.ARRAY_TYPES:
        attachment = arrays.encode_array(value)
    else:
        attachment = tables.encode_tabular(value)
    attachments.append(attachment)
    return Ext(_ATTACHMENT, _LENGTH.pack(attachment.size))


_pack: Final = msgspec.msgpack.Encoder().encode


def _no_extensions(code: int, data: memoryview) -> object:
    raise CorruptionError(f"extension type {code} in a container without extensions")


_unpack_plain: Final = msgspec.msgpack.Decoder(ext_hook=_no_extensions).decode


class _Reader:
    """The extension types of one extended container, read in the order in which they stand."""

    __slots__ = ("_data", "_depth", "_zero_copy", "end")

    def __init__(self, data: memoryview, end: int, zero_copy: bool) -> None:
        self._data = data
        self._zero_copy = zero_copy
        self._depth = 0
        self.end = end

    def extension(self, code: int, body: memoryview) -> object:
        if code == _ATTACHMENT:
            return self._attachment(body)
        if code == wire.TUPLE:
            return self._tuple(body)
        reader = _EXTENSION_READERS.get(code)
        if reader is None:
            raise CorruptionError(f"a container holds the unknown extension type {code}")
        return reader(body)

    def _tuple(self, body: memoryview) -> object:
        if self._depth == MAX_DEPTH:
            raise CorruptionError(f"a container nests more than {MAX_DEPTH} levels deep")
        self._depth += 1
        members: Any = msgspec.msgpack.decode(body, ext_hook=self.extension)
        self._depth -= 1
        if not isinstance(members, list):
            raise CorruptionError("the members of a tuple are not a list")
        return tuple(cast("list[object]", members))

    def _attachment(self, body: memoryview) -> object:
        # Each starts where the one before ends, so that no byte is decoded more than once.
        if len(body) != _LENGTH.size:
            raise CorruptionError("a container has a malformed attachment")
        start = wire.aligned(self.end)
        end = start + int(_LENGTH.unpack(body)[0])
        if end > len(self._data) or end - start < wire.HEADER_SIZE:
            raise CorruptionError("a container is shorter than its attachments")
        wire.expect_zeros(self._data[self.end : start])
        self.end = end
        attachment = self._data[start:end]
        reader = _ATTACHMENT_READERS.get(wire.read_word(attachment)[0])
        if reader is None:
            raise CorruptionError("a container has an attachment of an unknown kind")
        return reader(attachment, self._zero_copy)


def decode_plain(data: Buffer, kind: type) -> Any:
    """Return the members, as a list or dict, of a container without extension types."""
    members = _unpack_plain(memoryview(data)[wire.HEADER_SIZE :])
    if not _check(members, kind) <= _PLAIN:
        raise CorruptionError("a container without extension types holds a timestamp")
    return members


def decode_extended(data: Buffer, kind: type, zero_copy: bool) -> Any:
    """Return the members, as a list or dict, of a container with extension types."""
    if len(data) < _PACKED_AT:
        raise CorruptionError("the encoded container is shorter than its header")
    packed_end = _PACKED_AT + int(_LENGTH.unpack_from(data, wire.HEADER_SIZE)[0])
    if packed_end > len(data):
        raise CorruptionError("the encoded container is shorter than its members")
    memory = memoryview(data)
    reader = _Reader(memory, packed_end, zero_copy)
    packed = memory[_PACKED_AT:packed_end]
    members = msgspec.msgpack.decode(packed, ext_hook=reader.extension)
    if reader.end != len(data):
        raise CorruptionError("the encoded container is longer than its attachments")
    _check(members, kind)
    return members


def _check(members: Any, kind: type) -> set[type]:
    """Return the types in decoded members, having checked what MessagePack does not."""
    if type(members) is not kind:
        raise CorruptionError(f"the encoded {kind.__name__} holds a {type(members).__name__}")
    try:
        return _survey(members)
    except InvalidError as error:
        raise CorruptionError(f"the encoded container is malformed: {error}") from error
