"""Errors on their way from an agent to its clients: in a frame, or in the file `agent.error`.

An error is told by the name of its class, its message and its facts; in the file, these three are
an array in JSON.
"""

import contextlib
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from everpool import errors
from everpool.errors import CommitUnknownError, EverpoolError, UnavailableError
from everpool.records import RecordId
from everpool.replica.index import ours

Told = tuple[str, str, dict[str, Any]]

_FILE = "agent.error"


def told(error: BaseException) -> Told:
    """Return an error's class, message and facts, as far as they can be sent."""
    if isinstance(error, (OSError, lmdb.Error)):
        error = ours(error, "asking the pool's agent")
    if not isinstance(error, EverpoolError):
        return "UnavailableError", f"the pool's agent failed: {error!r}", {}
    facts = {
        name: fact for name, fact in error.facts.items() if isinstance(fact, str | int | float)
    }
    if isinstance(error, CommitUnknownError) and isinstance(error.id, RecordId):
        facts["session"], facts["sequence"] = error.id.session.hex(), error.id.sequence
    return type(error).__name__, error.message, facts


def error_of(name: str, message: str, facts: dict[str, Any]) -> EverpoolError:
    """Return the error that was told."""
    kind = getattr(errors, name, EverpoolError)
    if kind is CommitUnknownError:
        id = RecordId(bytes.fromhex(facts["session"]), facts["sequence"])
        return CommitUnknownError(message, id=id)
    return kind(message, **facts)


def leave_failure(folder: Path, error: EverpoolError) -> None:
    """Leave word of what keeps the folder's agent from starting."""
    with contextlib.suppress(OSError):
        (folder / _FILE).write_bytes(msgspec.json.encode(told(error)))


def forget_failure(folder: Path) -> None:
    """Remove what an earlier agent has left."""
    (folder / _FILE).unlink(missing_ok=True)


def failure_in(folder: Path) -> EverpoolError:
    """Return what kept the folder's agent from starting, as far as it could say so."""
    try:
        return error_of(*msgspec.json.decode((folder / _FILE).read_bytes(), type=Told))
    except (FileNotFoundError, msgspec.DecodeError):  # an agent that was killed left half of it
        return UnavailableError(f"the pool's agent ended at once: see {folder}/agent.log")
