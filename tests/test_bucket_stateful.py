"""The state machine on a pool in a bucket: a host for each client, and checkpoints meanwhile."""

import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import everpool
from everpool.testing.harness import Harness
from everpool.testing.stateful import pool_machine
from support.agents import end_agents

pytestmark = [pytest.mark.soak] if os.environ.get("EVERPOOL_SOAK") == "1" else []


def pool_of_hosts() -> Harness:
    """Return a harness whose clients are hosts; every third one begins with a new checkpoint."""
    folder = Path(tempfile.mkdtemp(prefix="everpool-"))
    url, count = f"file://{folder}/bucket", itertools.count()

    def connect() -> Any:
        number = next(count)
        pool = everpool.open(url, cache_dir=folder / f"host{number}")
        if number % 3 == 2:
            pool.sync()
            pool.checkpoint()
        return pool

    def remove() -> None:
        end_agents(folder)
        shutil.rmtree(folder)

    return Harness(connect, remove=remove)


class TestHosts(pool_machine(pool_of_hosts).TestCase):
    settings = settings(max_examples=max(8, settings().max_examples // 8))
