"""The conformance suite on pools in a bucket: on one host, and on a host for each client."""

import itertools
from pathlib import Path
from typing import Any

import pytest

import everpool
from everpool.testing import remote
from everpool.testing.conformance import Harness, PoolConformance, SharingConformance
from everpool.testing.conformance.clients import ClientGuarantees
from everpool.testing.conformance.transactions import TransactionGuarantees
from everpool.testing.conformance.watching import WatchGuarantees
from support.agents import end_agents


class TestOneHost(PoolConformance):
    def make_pool(self, tmp_path: Path) -> Harness:
        url = f"file://{tmp_path}/bucket"
        return Harness(
            lambda: everpool.open(url, cache_dir=tmp_path / "host"),
            remove=lambda: end_agents(tmp_path),
        )


class TwoHosts:
    """Each client is on a host of its own, every second one in another process, too."""

    def make_pool(self, tmp_path: Path) -> Harness:
        count = itertools.count()
        url = f"file://{tmp_path}/bucket"

        def connect() -> Any:
            number = next(count)
            cache = str(tmp_path / f"host{number}")
            if number % 2:
                return remote.connect(open_on, url, cache)
            return open_on(url, cache)

        return Harness(connect, remove=lambda: end_agents(tmp_path))


class TestTwoHosts(TwoHosts, ClientGuarantees, WatchGuarantees, TransactionGuarantees):
    """The guarantees in which hosts meet."""


@pytest.mark.soak
class TestTwoHostsAtLength(TwoHosts, SharingConformance):
    """All that several clients take part in."""


def open_on(url: str, cache: str) -> Any:
    return everpool.open(url, cache_dir=cache)
