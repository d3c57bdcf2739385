"""Processes that die by SIGKILL: at every step of all that changes a pool, and in storms."""

import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import everpool
from support import scenes
from support.processes import Worker, call, ending
from support.scenes import SCENES
from support.tracing import Tracee, why_not

# More than any of these operations has, so that a loop that never ends fails.
_MOST_STEPS = 300
_SLOW_OPENING_S = 5.0
_no_tracing = why_not()
traced = pytest.mark.skipif(bool(_no_tracing), reason=_no_tracing or "can be traced")

Pause = Callable[[], None]


class Death(NamedTuple):
    """One process that was killed: after how many steps, after which, and whether it was done."""

    number: int
    step: str
    done: bool


def killed_everywhere(function: Callable[..., None], *args: Any) -> Iterator[Death]:
    """Kill `function(pause, link, *args)` after its first step, the next one after two, and so on.

    Ends after a run that came through.
    """
    for number in range(1, _MOST_STEPS):
        tracee = Tracee(function, *args)
        with ending(tracee):
            steps = [tracee.next_step() for _ in range(number)]
            if steps[-1] is None:
                tracee.finish()
                assert tracee.said == ["done"]
                return
        yield Death(number, steps[-1], tracee.said == ["done"])
    raise AssertionError("it never ends")


class Found(NamedTuple):
    """What a new process found in the pool."""

    opened_s: float
    state: int
    leftovers: list[str]


def inspect(path: Path, scene: str, thorough: bool, boot: str | None = None) -> Found:
    """Open the pool and look around."""
    reboot(boot)
    began = time.monotonic()
    with everpool.open(path, create=False) as pool:
        opened_s = time.monotonic() - began
        state = SCENES[scene].look(pool)
        found = Found(opened_s, state, scenes.leftovers(pool))
    if thorough:
        scenes.check_sound(path)
    return found


def reboot(boot: str | None) -> None:
    """Make this process believe that the machine has booted, when there is a boot to tell from."""
    if boot is not None:
        os.environ["EVERPOOL_BOOT_ID"] = boot


def make_pool(folder: Path) -> Path:
    call(scenes.prepare, folder / "pool")
    return folder / "pool"


def touch(pool: Any) -> None:
    pool["touched"] = time.time_ns()


def look(pool: Any, scene: str) -> int:
    return SCENES[scene].look(pool)


# Commits


def commit_once(pause: Pause, link: Connection, path: Path, scene: str) -> None:
    pool = everpool.open(path, create=False)
    pause()
    SCENES[scene].act(pool)
    link.send("done")
    pause()


@traced
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside-others"])
@pytest.mark.parametrize("scene", SCENES)
def test_killed_at_every_step_of_a_commit(tmp_path: Path, scene: str, alone: bool) -> None:
    path = make_pool(tmp_path)
    others = [] if alone else [Worker(path)]
    steps: list[str] = []
    state = 0
    with ending(*others):
        for death in killed_everywhere(commit_once, path, scene):
            steps.append(death.step)
            least = state + death.done
            for other in others:
                least = max(least, other.ask(look, scene))
                if death.number % 2:
                    other.ask(touch)  # who finds the lock free finishes for the dead
                    least = max(least, other.ask(look, scene))
            found = call(inspect, path, scene, death.number % 4 == 0)
            assert least <= found.state <= state + 1, death
            assert not found.leftovers, death
            assert found.opened_s < _SLOW_OPENING_S, death
            state = found.state
        assert call(inspect, path, scene, True).state == state + 1
    assert steps.count("store") >= 6
    assert {"pwrite64 data.mdb", "fdatasync data.mdb"} <= set(steps)
