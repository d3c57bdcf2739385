"""Everything Everpool raises on purpose, grouped by what the caller can do next.

EverpoolError
├── ConflictError        retry: another commit changed what this one read
├── CommitUnknownError   ask: `pool.outcome(error.id)` settles it for good
├── UnavailableError     wait: a lock, a disk or a service is busy, full or away
├── NotFoundError        the name or object does not exist (also a KeyError)
├── ExistsError          the name is taken
├── InvalidError         fix the call (also a ValueError)
├── CorruptionError      restore: stored bytes are not what was written
└── ClosedError          open the pool again
"""

from typing import ClassVar


class EverpoolError(Exception):
    """The base of every error that Everpool raises on purpose.

    `kind` is stable across releases; `facts` holds the names, versions and offsets that the
    message mentions, for programs.
    """

    kind: ClassVar[str] = "error"

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts

    def __str__(self) -> str:
        # KeyError's own __str__ would show the message's repr.
        return self.message


class ConflictError(EverpoolError):
    """Something this transaction read was changed by a later commit: run it again."""

    kind = "conflict"


class CommitUnknownError(EverpoolError):
    """The outcome could not be learned in time; `pool.outcome(error.id)` settles it."""

    kind = "commit_unknown"

    def __init__(self, message: str, *, id: object, **facts: object) -> None:
        super().__init__(message, id=id, **facts)
        self.id = id


class UnavailableError(EverpoolError):
    """The pool cannot do this now; it may later, without any change to the call."""

    kind = "unavailable"


class NotFoundError(EverpoolError, KeyError):
    """There is no such name, or the object behind a handle was deleted."""

    kind = "not_found"


class ExistsError(EverpoolError):
    """The name is taken."""

    kind = "exists"


class InvalidError(EverpoolError, ValueError):
    """The call itself is wrong and will fail again until it is changed."""

    kind = "invalid"


class CorruptionError(EverpoolError):
    """Stored bytes are not what was written: restore them from a copy."""

    kind = "corruption"


class ClosedError(EverpoolError):
    """The pool, transaction or watch was closed, or belongs to another process."""

    kind = "closed"
