"""The fixtures that every group of guarantees uses."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from everpool.testing.harness import Harness

T = TypeVar("T")
PATIENCE_S = 20.0


class ConformanceBase:
    """`make_pool` is the one thing that an engine overrides."""

    def make_pool(self, tmp_path: Path) -> Harness:
        """Return a harness for a pool that does not exist yet; keep what it needs in `tmp_path`."""
        raise NotImplementedError

    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[Harness]:
        """The way to the pool of this test."""
        harness = self.make_pool(tmp_path)
        yield harness
        harness.close()

    @pytest.fixture
    def pool(self, harness: Harness) -> Any:
        """A client of a new pool."""
        return harness.open()

    @pytest.fixture
    def other(self, pool: Any, harness: Harness) -> Any:
        """A second client of the same pool."""
        return harness.open()


def in_threads(count: int, function: Callable[[int], T]) -> list[T]:
    """Return what `function(0)` to `function(count - 1)` return, called in as many threads."""
    with ThreadPoolExecutor(count) as threads:
        futures = [threads.submit(function, number) for number in range(count)]
        return [future.result(PATIENCE_S) for future in futures]
