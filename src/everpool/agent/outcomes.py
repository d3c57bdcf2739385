"""What became of records whose answers were lost, settled for good."""

import threading
import time
from collections.abc import Sequence

from everpool.agent.commits import Commit, Commits
from everpool.agent.host import Host
from everpool.errors import EverpoolError, UnavailableError
from everpool.records import Fence, Operation, Record, RecordId
from everpool.replica.batch import Result
from everpool.replica.outcomes import Outcome, decided, forgotten

_PATIENCE_S = 30.0
_FENCES = 4096


def settle(host: Host, commits: Commits, ids: Sequence[RecordId]) -> list[Outcome]:
    """Return what became of records. Those that are not decided are fenced first.

    The replica must have everything that was committed before the question.
    """
    index = host.replica.index
    found = decided(index, ids)
    left = [id for id in ids if id not in found]
    for at in range(0, len(left), _FENCES):
        fences: list[Operation] = [Fence(*id) for id in left[at : at + _FENCES]]
        commit(commits, Record(host.version, [], [], [], fences))
    found.update(decided(index, left))
    return [found[id] if id in found else forgotten(index, id) for id in ids]


def commit(commits: Commits, record: Record) -> Result:
    """Commit a record of the agent's own; returns what became of it.

    Raises `UnavailableError` when that is not known in time: it may be tried again.
    """
    sender = _Own()
    size = 100 * len(record.operations)
    commits.submit(Commit(sender, 0, record, size, time.monotonic() + _PATIENCE_S))
    if not sender.done.wait(_PATIENCE_S):
        raise UnavailableError("the log does not answer: try again")
    if sender.error is not None:
        raise UnavailableError(f"nothing could be committed ({sender.error.message}): try again")
    assert sender.result is not None
    return sender.result


class _Own:
    """Sends one commit, as a client would."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.result: Result | None = None
        self.error: EverpoolError | None = None

    def ready(self) -> bool | None:
        return True

    def tell(self, session: bytes, pairs: list[tuple[int, int]]) -> bool:
        return True

    def settle(self, session: bytes, found: list[tuple[int, Result]]) -> None:
        ((_, self.result),) = found
        self.done.set()

    def refuse(self, number: int, error: EverpoolError) -> None:
        self.error = error
        self.done.set()
