"""Agents with traps in them, and, for tests of the tests, with a rule switched off.

    python -m support.patched_agent FOLDER URL everpool.agent [MUTANT...]

    traps = Traps(monkeypatch)
    traps.mutants = {"one": ["mixed_checkpoint"]}             # by the host's cache folder
    trap = traps.set(tmp_path / "one", "gathered", "wait")    # or "die"
    ...                                                       # its agent gets there
    trap.await_reached(); trap.let_go()

A trap snaps once. The points, in the order of a checkpoint:

    uploaded    most dirty blocks are uploaded
    gathered    the last ones are
    runs        the rows are uploaded
    manifest    the manifest is
    committed   the record that names it is committed, and played here
    adopted     this replica has taken over where pages are
    trimmed     the log is trimmed

in that of a collection,

    planned     what is to be kept is known
    listed      what is dead is known
    decided     a record that says so is committed, and played here
    deleted     one object is deleted

and, for a commit, `added`: an addition is in memory, and not yet marked as applied.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from everpool.agent import starting
from support.agents import PATIENCE_S, wait_until


class Trap:
    """One trap, in the cache folder of a host."""

    def __init__(self, cache: Path, point: str, action: str) -> None:
        self._cache, self._point = cache, point
        cache.mkdir(exist_ok=True)
        for old in (self._file("at"), self._file("go")):
            old.unlink(missing_ok=True)
        whole = self._file("half")
        whole.write_text(action)
        whole.rename(self._file("arm"))

    def _file(self, kind: str) -> Path:
        return self._cache / f"{kind}-{self._point}"

    @property
    def reached(self) -> bool:
        """Whether an agent got there."""
        return self._file("at").exists()

    def await_reached(self) -> None:
        wait_until(lambda: self.reached)

    def let_go(self) -> None:
        """Let the agent that waits there go on."""
        self._file("go").touch()


class Traps:
    """Has this process start such agents instead of others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Which ones each host has, by the name of its cache folder.
        self.mutants: dict[str, list[str]] = {}
        monkeypatch.setattr(starting, "start", self._start)

    def set(self, cache: Path, point: str, action: str) -> Trap:
        """Set a trap for the agents under a cache folder."""
        return Trap(cache, point, action)

    def _start(self, folder: Path, url: str) -> "subprocess.Popen[bytes]":
        return start(folder, url, self.mutants.get(folder.parent.name, []))


def start(folder: Path, url: str, mutants: Sequence[str] = ()) -> "subprocess.Popen[bytes]":
    """Do what `everpool.agent.starting.start` does, with such an agent."""
    path = [os.fspath(Path(__file__).parents[1]), *filter(None, sys.path)]
    command = [sys.executable, "-m", "support.patched_agent", os.fspath(folder), url]
    with (folder / "agent.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "everpool.agent", *mutants],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(os.environ, PYTHONPATH=os.pathsep.join(path)),
            cwd="/",
            start_new_session=True,
        )
    vars(starting)["_started"].append(process)
    return process


# In the agent's process


def strike(point: str) -> None:
    """Die or wait here, if somebody wants that."""
    cache = Path(sys.argv[1]).parent
    arm = cache / f"arm-{point}"
    try:
        action = arm.read_text()
        arm.unlink()
    except FileNotFoundError:
        return
    (cache / f"at-{point}").touch()
    if action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + 4 * PATIENCE_S
    while not (cache / f"go-{point}").exists() and time.monotonic() < deadline:
        time.sleep(0.002)


def after(owner: Any, name: str, act: Callable[..., object]) -> None:
    """Have `act` called after each call of a function, with its arguments."""
    function = getattr(owner, name)

    def called(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        act(*args)
        return result

    setattr(owner, name, called)


def install_traps() -> None:
    from everpool.agent import collector, steward
    from everpool.agent.host import Host
    from everpool.log.bucket import BucketLog
    from everpool.replica import flush
    from everpool.replica.player import Player
    from everpool.store.directory import DirectoryStore
    from everpool.verdict import Add

    made = steward.Steward.checkpoint
    making: list[int] = []

    def checkpoint(self: Any) -> int:
        making[:] = [0]
        try:
            return made(self)
        finally:
            making.clear()

    def adopted(_: Host) -> None:
        # The first time is at the beginning of a checkpoint.
        if making:
            making[0] += 1
            if making[0] == 2:
                strike("adopted")

    def uploaded(*_: object) -> None:
        after_pages.append(1)
        strike("uploaded")

    def gathered(*_: object) -> None:
        if after_pages:
            after_pages.clear()
            strike("gathered")

    after_pages: list[int] = []
    steward.Steward.checkpoint = checkpoint
    after(steward.Steward, "_upload_most", uploaded)
    after(steward, "write_pages", gathered)
    # Little is enough for several rounds of uploads, for the log to be sealed and trimmed, and for
    # replicas to trim their tails.
    vars(steward)["_LAST_BLOCKS"] = 4
    BucketLog.__init__.__kwdefaults__["head_bytes"] = 2048
    vars(flush)["KEPT_VERSIONS"] = 40
    vars(flush)["KEPT_BYTES"] = 1 << 20
    after(steward.Steward, "_write_runs", lambda *_: strike("runs"))
    after(steward, "write_manifest", lambda *_: strike("manifest"))
    after(Host, "adopt", adopted)
    after(BucketLog, "trim", lambda *_: strike("trimmed"))
    vars(collector)["_DELETED_AT_ONCE"] = 1
    vars(collector)["MOST_COLLECTED"] = 3
    after(collector.Collector, "_look", lambda *_: strike("planned"))
    after(collector.Collector, "_compare", lambda *_: strike("listed"))
    after(collector.Collector, "_decide", lambda *_: strike("decided"))
    after(DirectoryStore, "delete", lambda *_: strike("deleted"))

    begun = steward.Steward.__init__

    def init(self: Any, host: Host, commit: Callable[[Any], object]) -> None:
        def committing(record: Any) -> Any:
            result = commit(record)
            strike("committed")
            return result

        begun(self, host, committing)

    steward.Steward.__init__ = init

    def applied(_: Player, effect: object, __: object) -> None:
        if isinstance(effect, Add):
            strike("added")

    after(Player, "_apply", applied)


def main() -> None:
    from everpool.agent import server
    from support import agent_mutants

    install_traps()
    for name in sys.argv[4:]:
        agent_mutants.MUTANTS[name]()
    server.main()


if __name__ == "__main__":
    main()
