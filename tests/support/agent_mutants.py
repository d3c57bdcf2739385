"""Agents that break one rule each, for the tests to find; and bad luck that brings it to light.

Each is a function that patches the agent's process, which `support.patched_agent` starts.
"""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from everpool import collection, verdict
from everpool.agent import blocks, commits, server, steward
from everpool.errors import CommitUnknownError, EverpoolError, UnavailableError
from everpool.records import RecordId
from everpool.replica.player import Player
from everpool.store.directory import DirectoryStore
from everpool.verdict import Add


def mixed_checkpoint() -> None:
    """Takes a block that was uploaded for good, also when it was written meanwhile."""

    def left(self: Any, pages: dict[steward.Place, Any]) -> list[steward.Place]:
        dirty = self._host.blocks.dirty()
        return [(id, b) for id, some in dirty.items() for b in some if (id, b) not in pages]

    steward.Steward._left = left  # type: ignore[method-assign]


def redo_adds() -> None:
    """Adds again to what is in memory, where it should write what the addition left."""
    redo = Player._redo

    def redo_twice(self: Any, row: Any, applied: int) -> None:
        apply = self._apply

        def adding(effect: Any, resolved: Any) -> None:
            if isinstance(effect, Add):
                there = self._replica.stores.read(resolved.id, effect.offset, len(resolved.new))
                kind = np.dtype(effect.dtype)
                total = np.frombuffer(there, kind) + np.frombuffer(effect.delta, kind)
                resolved = msgspec.structs.replace(resolved, new=total.tobytes())
            apply(effect, resolved)

        self._apply = adding
        try:
            redo(self, row, applied)
        finally:
            del self._apply

    Player._redo = redo_twice  # type: ignore[method-assign]


def fill_without_tail() -> None:
    """Shows a page as it was stored, without what was committed since."""
    blocks.BlockMemories._stores = lambda *_: []  # type: ignore[method-assign]


def adoption_forgets_all() -> None:
    """Forgets also what was written behind the checkpoint that is taken over."""
    blocks.BlockMemories.forget = (  # type: ignore[method-assign]
        lambda self, flushed: self._written.clear()
    )


def lost_answer_sent_again() -> None:
    """Sends a record whose answer was lost again, as a new one."""
    append = commits.Commits._append

    def again(self: Any, records: Any, first: int) -> Any:
        told = [RecordId(self._session, first + at) for at in range(len(records))]
        try:
            return append(self, records, first)
        except CommitUnknownError:
            pass
        while True:
            self._begin_session()
            self._sequence = -len(records)  # those that count are the new ones
            try:
                found = append(self, records, 1)
            except EverpoolError:
                continue
            ids = [RecordId(self._session, 1 + at) for at in range(len(records))]
            return {old: found[new] for old, new in zip(told, ids, strict=True)}

    commits.Commits._append = again  # type: ignore[method-assign]


def deadline_ignored() -> None:
    """Appends what is too late."""

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return 0.0

    vars(commits)["time"] = Clock


def blackout() -> None:
    """No mutant: while there is a file `blackout`, a swap takes effect, and no answer comes."""
    file = Path(sys.argv[1]).parent / "blackout"
    swap = DirectoryStore.swap
    vars(server)["_APPEND_S"] = 0.5

    swapper: list[int] = []

    def swapping(self: Any, key: str, data: Any, e_tag: str | None) -> str:
        dark = file.exists()
        if dark:  # before anybody could see what it did
            swapper[:] = [threading.get_ident()]
        found = swap(self, key, data, e_tag)
        if dark:
            swapper[:] = [0]
            file.with_name("swapped").touch()
            raise CommitUnknownError("the answer was lost", id=None)
        return found

    def hidden(name: str) -> None:
        function = getattr(DirectoryStore, name)

        def called(self: Any, *args: Any) -> Any:
            if swapper not in ([], [threading.get_ident()]) and file.exists():
                raise UnavailableError("the bucket is away")
            return function(self, *args)

        setattr(DirectoryStore, name, called)

    DirectoryStore.swap = swapping  # type: ignore[method-assign]
    for name in ("get", "get_if_changed", "get_ranges"):
        hidden(name)


def late_uploads_count() -> None:
    """Takes uploads that a collection has voided."""
    vars(verdict)["_check_upload"] = lambda *_: None


def restored_is_dead() -> None:
    """Calls dead what was brought back meanwhile."""
    refusal = collection.refusal

    def refusing(record: Any, checkpoint: int, horizon: Any, pins: Any, now: int) -> Any:
        horizon = msgspec.structs.replace(horizon, restored=0)
        return refusal(record, checkpoint, horizon, pins, now)

    vars(verdict)["refusal"] = refusing


def snapshots_are_overlooked() -> None:
    """Lets go of the version of a snapshot that was taken meanwhile."""
    refusal = collection.refusal
    vars(verdict)["refusal"] = lambda *args: refusal(*args[:3], (), args[4])


MUTANTS: dict[str, Callable[[], None]] = {
    one.__name__: one
    for one in (
        mixed_checkpoint,
        redo_adds,
        fill_without_tail,
        adoption_forgets_all,
        lost_answer_sent_again,
        deadline_ignored,
        blackout,
        late_uploads_count,
        restored_is_dead,
        snapshots_are_overlooked,
    )
}
