"""Hypothesis profiles, and explained assertions in the public suites."""

import os

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("everpool.testing")

_common = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "print_blob": True,
}
settings.register_profile("ci", max_examples=60, stateful_step_count=40, **_common)
settings.register_profile("soak", max_examples=2000, stateful_step_count=80, **_common)
settings.load_profile("soak" if os.environ.get("EVERPOOL_SOAK") == "1" else "ci")
