"""A real S3 server for tests, which all share as the fixture `s3`.

    def test_something(s3):
        store = open_store(s3.make_url(), **s3.options)

    with serving() as server:          # one of the test's own
        server.kill()
        server.start()                 # the same ports, the same data
        server.await_ready()           # it answers 500 for a while

It is ended with the folder it wrote to.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from everpool.bench import seaweed
from everpool.bench.seaweed import ACCESS_KEY, BUCKET, READER_KEY, SECRET_KEY, Server

__all__ = ["ACCESS_KEY", "BUCKET", "READER_KEY", "SECRET_KEY", "Server", "serving"]


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Start a server, wait until it serves, and end it with all it wrote."""
    if seaweed.program() is None:
        pytest.skip("the S3 server is not installed: pip install -r requirements/test.txt")
    folder = Path(tempfile.mkdtemp(prefix="everpool-s3-"))
    try:
        with seaweed.serving(folder) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)
