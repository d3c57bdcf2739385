"""Which file an object goes to when a pool is exported: safe, unique and easy to recognise.

A name such as `scans/t1` becomes the path `scans/t1` below the folder. What file systems, or other
systems than this one, would not keep apart or not allow is escaped:

    `%`, control characters, `\\ : * ? " < > |`        %XX for each byte of their UTF-8
    `.` and `..`, a part that is empty                 %2E, %2E%2E, %
    a dot or space at a part's end                     %2E, %20
    a part too long for a file name, a path too long   cut, and `%~` and a hash of the whole
        or too deep
    a path that is taken, but for upper and lower      `%2`, `%3`, ... before the suffix
        case, or that another name needs as a folder

The paths need not be turned back: the manifest says which name each file is for.
"""

import hashlib
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath

MANIFEST = "manifest.json"
JOURNAL = "manifest.json.part"
NEW_MANIFEST = "manifest.json.new"
PART_SUFFIX = ".part"

_UNSAFE = frozenset('%\\:*?"<>|\x7f') | {chr(code) for code in range(32)}
# 255 bytes is the limit of common file systems; leaves room for a suffix, a number and `.part`.
_MAX_PART_BYTES = 200
_MAX_PATH_BYTES = 1500
_MAX_PARTS = 64


class Layout:
    """Hands out one path for each name, never the same twice."""

    def __init__(self, names: Iterable[str]) -> None:
        self._taken = {_key(own) for own in (MANIFEST, JOURNAL, NEW_MANIFEST)}
        # No file may stand where another name needs a folder.
        for name in names:
            self._taken.update(_key(str(parent)) for parent in escape_name(name).parents)

    def path_of(self, name: str, suffix: str) -> PurePosixPath:
        """Return the relative path for `name`, ending in `suffix` (added unless it does)."""
        path = escape_name(name)
        stem = path.name
        if suffix and stem.lower().endswith(suffix) and len(stem) > len(suffix):
            suffix = stem[-len(suffix) :]
            stem = stem[: -len(suffix)]
        candidate, number = path.with_name(stem + suffix), 1
        while not self._take(candidate):
            number += 1
            candidate = path.with_name(f"{stem}%{number}{suffix}")
        return candidate

    def _take(self, path: PurePosixPath) -> bool:
        # A name may itself end in `.part`, as a file does while it is being written.
        keys = {_key(str(path)), _key(str(path) + PART_SUFFIX)}
        if keys & self._taken:
            return False
        self._taken |= keys
        return True


def escape_name(name: str) -> PurePosixPath:
    """Return `name` as a relative path of one or more parts, none of them special."""
    parts = [_escape_part(part) for part in name.split("/")]
    size_bytes = sum(len(part.encode()) + 1 for part in parts)
    if size_bytes > _MAX_PATH_BYTES or len(parts) > _MAX_PARTS:
        return PurePosixPath(_shorten(name.encode(), "".join(parts)))
    return PurePosixPath(*parts)


def _escape_part(part: str) -> str:
    if part == "":
        return "%"
    if part in (".", ".."):
        return "%2E" * len(part)
    escaped = "".join(_percent(c) if c in _UNSAFE else c for c in part)
    if escaped[-1] in ". ":
        escaped = escaped[:-1] + _percent(escaped[-1])
    if len(escaped.encode()) > _MAX_PART_BYTES:
        return _shorten(part.encode(), escaped)
    return escaped


def _shorten(whole: bytes, readable: str) -> str:
    digest = hashlib.sha256(whole).hexdigest()[:16]
    return readable.encode()[: _MAX_PART_BYTES - 20].decode(errors="ignore") + "%~" + digest


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode())


def _key(path: str) -> str:
    # As the most forgetful file system sees it: without case, accents composed.
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
