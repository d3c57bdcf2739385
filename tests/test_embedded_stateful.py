"""The state machine on the pool at a path: in one process, and with processes that are killed.

With EVERPOOL_SOAK=1 these run thousands of examples, and count as `soak`.
"""

import os
import shutil
import tempfile

import pytest
from hypothesis import settings

import everpool
from everpool.testing import remote
from everpool.testing.harness import Harness
from everpool.testing.stateful import pool_machine

pytestmark = [pytest.mark.soak] if os.environ.get("EVERPOOL_SOAK") == "1" else []


def pool_in_this_process() -> Harness:
    """Return a harness whose clients share this process."""
    folder = tempfile.mkdtemp(prefix="everpool-")
    return Harness(lambda: everpool.open(f"{folder}/pool"), remove=lambda: shutil.rmtree(folder))


def pool_of_processes() -> Harness:
    """Return a harness whose clients are processes that die by SIGKILL."""
    folder = tempfile.mkdtemp(prefix="everpool-")
    return Harness(
        lambda: remote.connect(everpool.open, f"{folder}/pool"),
        kill=lambda client: client.kill(),
        remove=lambda: shutil.rmtree(folder),
    )


class TestOneProcess(pool_machine(pool_in_this_process).TestCase):
    pass


class TestKilledProcesses(pool_machine(pool_of_processes).TestCase):
    settings = settings(max_examples=max(10, settings().max_examples // 4))
