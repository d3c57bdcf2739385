"""Names that say of memory that it is half filled: a copy or an import was interrupted there."""

import hashlib

import everpool
from everpool.cli.describe import MEMORY, MEMORY_ARRAY, kind_of

COPYING = "everpool/copying/"
IMPORTING = "everpool/importing/"
_WORDS = {COPYING: "copied", IMPORTING: "imported"}


def marker_of(prefix: str, name: str) -> str:
    """Return the name that exists while memory `name` is half filled."""
    return prefix + hashlib.sha256(name.encode()).hexdigest()[:32]


def is_marker(name: str) -> bool:
    """Return whether a name is a marker, and no object of a user's."""
    return name.startswith((COPYING, IMPORTING))


def half_filled(pool: everpool.Pool, name: str) -> str | None:
    """Return 'copied' or 'imported' for memory that is so only by half.

    A marker that outlived its memory, because somebody deleted or replaced that, says nothing.
    """
    for prefix, word in _WORDS.items():
        if marker_of(prefix, name) in pool and kind_of(pool.get(name)) in (MEMORY, MEMORY_ARRAY):
            return word
    return None
