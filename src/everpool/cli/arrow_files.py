"""Arrow tables in files: Parquet where that keeps every type, else Arrow's own format."""

import importlib
from pathlib import Path
from typing import Any, BinaryIO, cast

from everpool.errors import InvalidError


def arrow() -> Any:
    """Return the module pyarrow; raises `InvalidError` that says how to install it."""
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError:
        raise InvalidError(
            "tables need pyarrow, which is not installed: pip install 'everpool[arrow]'"
        ) from None


def suffix_for(table: Any) -> str:
    """Return `.parquet` when a Parquet file gives this schema back unchanged, else `.arrow`."""
    pa = arrow()
    try:
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(table.schema.empty_table(), sink)
        back = pa.parquet.read_schema(pa.BufferReader(sink.getvalue()))
    except (pa.ArrowException, NotImplementedError):
        return ".arrow"
    return ".parquet" if back.equals(table.schema, check_metadata=True) else ".arrow"


def write_table(table: Any, file: object, suffix: str) -> None:
    """Write a table or record batch to a file object in the format that `suffix` names."""
    pa = arrow()
    if not isinstance(table, pa.Table):
        table = pa.Table.from_batches([table])
    sink = pa.PythonFile(cast(BinaryIO, file), mode="w")
    if suffix == ".parquet":
        pa.parquet.write_table(table, sink)
    elif suffix == ".arrow":
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        raise InvalidError(f"a table cannot be written as {suffix!r}: use .parquet or .arrow")


def read_table(path: Path, kind: str) -> Any:
    """Return the table in a .parquet or .arrow file, as a record batch when `kind` is "batch"."""
    pa = arrow()
    try:
        if path.suffix == ".arrow":
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        else:
            # Not `read_table`, which takes folder names such as `a=1` for columns.
            table = pa.parquet.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise InvalidError(f"{path} is not a table that Arrow can read: {error}") from None
    if kind != "batch":
        return table
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
