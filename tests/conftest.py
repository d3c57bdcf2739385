"""Hypothesis profiles, explained assertions in the public suites, and the S3 server."""

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from support.s3 import Server, serving

pytest.register_assert_rewrite("everpool.testing")

# A shell starts what runs in the background without Ctrl-C, which every child would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

_common = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "print_blob": True,
}
settings.register_profile("ci", max_examples=60, stateful_step_count=40, **_common)
settings.register_profile("soak", max_examples=2000, stateful_step_count=80, **_common)
settings.load_profile("soak" if os.environ.get("EVERPOOL_SOAK") == "1" else "ci")


@pytest.fixture(scope="session")
def s3() -> Iterator[Server]:
    """The S3 server that all tests share; each makes a bucket of its own."""
    with serving() as server:
        yield server
