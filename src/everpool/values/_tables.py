"""Arrow tables and record batches as Arrow IPC streams; PyArrow is imported on first use."""

import importlib
import itertools
import struct
import sys
from collections.abc import Iterator
from typing import Any, Final

from everpool.errors import CorruptionError, InvalidError
from everpool.values import _wire as wire
from everpool.values._ipc import check_messages, realigned
from everpool.values._wire import Buffer, Encoded

_OLDEST_PYARROW: Final = 15
_EXTENT: Final = struct.Struct("<QI")
_DATA_AT: Final = 64

# How often a nested dictionary may be looked at again, in multiples of the encoding's size.
_MAX_REPETITION: Final = 256


def is_tabular(kind: type) -> bool:
    """Whether a type is exactly pyarrow's Table or RecordBatch, without importing pyarrow."""
    if kind.__module__ != "pyarrow.lib":
        return False
    arrow: Any = sys.modules.get("pyarrow")
    return kind is getattr(arrow, "Table", None) or kind is getattr(arrow, "RecordBatch", None)


def _pyarrow() -> Any:
    try:
        arrow: Any = importlib.import_module("pyarrow")
    except ImportError as error:
        raise InvalidError(
            "the value is an Arrow table and pyarrow is not installed: pip install pyarrow"
        ) from error
    if int(arrow.__version__.partition(".")[0]) < _OLDEST_PYARROW:
        # Before that, reading a schema could unpickle an extension type (CVE-2023-47248).
        raise InvalidError(
            f"pyarrow {arrow.__version__} is too old to read Arrow data safely: "
            f"pip install 'pyarrow>={_OLDEST_PYARROW}'"
        )
    return arrow


def encode_tabular(value: Any) -> Encoded:
    """Encode a Table or RecordBatch; its buffers are handed out as they are, batch by batch.

    Only what Arrow itself must rewrite (offsets and bitmaps of slices) is copied, one batch
    at a time.
    """
    arrow = _pyarrow()
    kind = wire.TABLE if type(value) is arrow.Table else wire.BATCH
    try:
        size = sum(map(len, _stream(arrow, value)))
    except arrow.ArrowException as error:
        raise InvalidError(f"Arrow cannot write this {type(value).__name__}: {error}") from error
    head = wire.header(kind) + _EXTENT.pack(value.num_rows, value.num_columns)
    head += wire.padding(len(head))
    return Encoded(_DATA_AT + size, (head, lambda: _stream(arrow, value)))


def _batches(arrow: Any, value: Any) -> list[Any]:
    if type(value) is not arrow.Table:
        return [value]
    if any(_nests_dictionary(field.type) for field in value.schema):
        # Readers check such a dictionary once for each batch.
        value = value.combine_chunks()
    return value.to_batches()


def _nests_dictionary(data_type: Any) -> bool:
    """Whether a type has dictionaries elsewhere than as the column itself."""
    return any(_is_dictionary(t) or _nests_dictionary(t) for t in _child_types(data_type))


def _is_dictionary(data_type: Any) -> bool:
    return hasattr(data_type, "index_type")


def _child_types(data_type: Any) -> list[Any]:
    if _is_dictionary(data_type):
        return [data_type.value_type]
    if hasattr(data_type, "storage_type"):
        return [data_type.storage_type]
    return [data_type.field(i).type for i in range(data_type.num_fields)]


class _Sink:
    """A file that keeps references to what is written to it."""

    def __init__(self) -> None:
        self.closed = False
        self._pieces: list[memoryview] = []

    def write(self, piece: Any) -> int:
        self._pieces.append(memoryview(piece).cast("B"))
        return len(piece)

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    def close(self) -> None:
        self.closed = True

    def drain(self) -> Iterator[memoryview]:
        pieces, self._pieces = self._pieces, []
        return iter(pieces)


def _stream(arrow: Any, value: Any) -> Iterator[Buffer]:
    """Yield the IPC stream of a table or batch, starting at an aligned offset."""
    sink = _Sink()
    options = arrow.ipc.IpcWriteOptions(allow_64bit=True, use_threads=False)
    target = arrow.PythonFile(sink, mode="w")
    writer = arrow.ipc.new_stream(target, value.schema, options=options)
    for batch in _batches(arrow, value):
        writer.write_batch(batch)
        yield from realigned(sink.drain())
    writer.close()
    yield from realigned(sink.drain())


def extent(data: Buffer) -> tuple[int, int]:
    """Return the (rows, columns) of an encoded table or batch."""
    if len(data) < _DATA_AT:
        raise CorruptionError("the encoded table is shorter than its header")
    rows, columns = _EXTENT.unpack_from(data, wire.HEADER_SIZE)
    wire.expect_zeros(data[wire.HEADER_SIZE + _EXTENT.size : _DATA_AT])
    return rows, columns


def decode_table(data: Buffer, zero_copy: bool) -> Any:
    """Return the encoded pyarrow.Table, over `data` or over a private copy."""
    arrow = _pyarrow()
    with _reader(arrow, data, zero_copy) as reader:
        table = reader.read_all()
    _check_extent(table, data)
    for column in table.columns:
        _check_chunks(arrow, column.chunks, text=not zero_copy)
    return table


def decode_batch(data: Buffer, zero_copy: bool) -> Any:
    """Return the encoded pyarrow.RecordBatch, over `data` or over a private copy."""
    arrow = _pyarrow()
    with _reader(arrow, data, zero_copy) as reader:
        batches: list[Any] = list(itertools.islice(reader, 2))
    if len(batches) != 1:
        raise CorruptionError("an encoded record batch does not hold one batch")
    _check_extent(batches[0], data)
    for column in batches[0].columns:
        _check_chunks(arrow, [column], text=not zero_copy)
    return batches[0]


def _reader(arrow: Any, data: Buffer, zero_copy: bool) -> Any:
    extent(data)
    memory = memoryview(data).toreadonly()[_DATA_AT:]
    cost = check_messages(memory)
    source = arrow.py_buffer(memory if zero_copy else bytes(memory))
    options = arrow.ipc.IpcReadOptions(use_threads=False)
    reader = arrow.ipc.open_stream(source, options=options)
    repeated = cost.batches * cost.dictionary_bytes > _MAX_REPETITION * len(data)
    if repeated and any(_nests_dictionary(field.type) for field in reader.schema):
        raise CorruptionError("an Arrow stream repeats its nested dictionaries too often")
    return reader


def _check_extent(tabular: Any, data: Buffer) -> None:
    if (tabular.num_rows, tabular.num_columns) != extent(data):
        raise CorruptionError("an encoded table has other rows and columns than its header says")
    tabular.validate()


def _check_chunks(arrow: Any, chunks: list[Any], *, text: bool) -> None:
    """Check that no offset or index leads out of the buffers: Arrow follows them unseen.

    With `text`, check the UTF-8 as well, for which all of it must be read.
    """
    seen: set[tuple[int, ...]] = set()
    for chunk in chunks:
        if not _is_dictionary(chunk.type):
            _check_array(arrow, chunk, text=text)
            continue
        dictionary = chunk.dictionary
        # The chunks of a column mostly share a dictionary, which can be larger than they are.
        buffers = (buffer.address if buffer else 0 for buffer in dictionary.buffers())
        identity = (len(dictionary), dictionary.offset, *buffers)
        if identity not in seen:
            _check_array(arrow, dictionary, text=text)
            seen.add(identity)
        chunk.indices.validate(full=True)
        arrow.DictionaryArray.from_arrays(chunk.indices, arrow.nulls(len(dictionary)), safe=True)


def _check_array(arrow: Any, array: Any, *, text: bool) -> None:
    if not text:
        binary = _as_binary(arrow, array.type)
        if binary != array.type:
            array = array.view(binary)
    array.validate(full=True)


def _as_binary(arrow: Any, data_type: Any) -> Any:
    """Return a type of the same layout with bytes for text, as far as it is known here how."""
    types = arrow.types
    if types.is_string(data_type):
        return arrow.binary()
    if types.is_large_string(data_type):
        return arrow.large_binary()
    if types.is_list(data_type):
        return arrow.list_(_field_as_binary(arrow, data_type.value_field))
    if types.is_large_list(data_type):
        return arrow.large_list(_field_as_binary(arrow, data_type.value_field))
    if types.is_struct(data_type):
        fields = (data_type.field(i) for i in range(data_type.num_fields))
        return arrow.struct([_field_as_binary(arrow, field) for field in fields])
    return data_type


def _field_as_binary(arrow: Any, field: Any) -> Any:
    return field.with_type(_as_binary(arrow, field.type))
