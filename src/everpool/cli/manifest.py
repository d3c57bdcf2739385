"""What an exported folder says about itself: which file is which object.

While an export runs, `manifest.json.part` holds one line of JSON for the export and one for each
object that is complete; so an interrupted export is recognised and can be finished. At the end
they become `manifest.json`:

    {
      "format": "everpool-export", "format_version": 1,
      "pool_version": 17,                      null when objects were read one by one (--live)
      "objects": {
        "scans/t1": {"file": "scans/t1.npy", "kind": "array", "size": 8675289, "sha256": "...",
                     "file_size": 8675417, "dtype": "uint8", "shape": [197, 233, 189]}
      },
      "damaged": {}                            names that could not be read, and why
    }

`size` counts the object's own bytes; `sha256` and `file_size` describe the file. Memory of 1 GiB
and more has `data_sha256` instead, which is explained in `everpool.cli.files`.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, cast

from everpool.cli.layout import JOURNAL, MANIFEST, NEW_MANIFEST
from everpool.errors import InvalidError

FORMAT = "everpool-export"
FORMAT_VERSION = 1


class Journal:
    """The manifest in the making: one line for each object whose file is complete."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self._folder = folder
        self._file = (folder / JOURNAL).open("w", encoding="utf-8")
        self._settings = {"format": FORMAT, "format_version": FORMAT_VERSION, **settings}
        self.restart()

    def restart(self) -> None:
        """Forget every object noted so far."""
        self._file.seek(0)
        self._file.truncate()
        self._line(self._settings)

    def add(self, name: str, facts: dict[str, Any]) -> None:
        """Note that the file of `name` is complete."""
        self._line({"name": name, **facts})

    def finish(self, pool_version: int | None, damaged: dict[str, str]) -> None:
        """Turn the journal into the manifest; from then on the export is whole."""
        self._file.close()
        part = self._folder / NEW_MANIFEST
        with part.open("w", encoding="utf-8") as file:
            file.write(f'{{\n  "format": "{FORMAT}",\n  "format_version": {FORMAT_VERSION},\n')
            file.write(f'  "pool_version": {json.dumps(pool_version)},\n  "objects": {{')
            separator = "\n"
            for entry in _entries(self._folder / JOURNAL):
                name = json.dumps(entry.pop("name"), ensure_ascii=False)
                file.write(f"{separator}    {name}: {json.dumps(entry, ensure_ascii=False)}")
                separator = ",\n"
            file.write(f'\n  }},\n  "damaged": {json.dumps(damaged, ensure_ascii=False)}\n}}\n')
        # One call for all files: syncing each would cost more than writing most of them.
        os.sync()
        os.replace(part, self._folder / MANIFEST)
        (self._folder / JOURNAL).unlink()

    def close(self) -> None:
        """Leave the journal as it is, for a second run."""
        self._file.close()

    def _line(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()


class Unfinished:
    """What an interrupted export left in its folder."""

    def __init__(self, folder: Path) -> None:
        self.files: set[str] = {str(entry["file"]) for entry in _entries(folder / JOURNAL)}
        with (folder / JOURNAL).open(encoding="utf-8") as file:
            self.settings = _parsed(file.readline())


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Return the objects of an exported folder by name, or None when it is no export.

    Raises `InvalidError` when the export is unfinished, of a newer format, or names files outside
    the folder.
    """
    if (folder / JOURNAL).exists():
        raise InvalidError(
            f"the export in {folder} is unfinished: run it again, or remove {JOURNAL} "
            "to import its files as they are"
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or cast(dict[str, Any], manifest).get("format") != FORMAT:
        return None  # somebody else's manifest.json: a file like any other
    fields = cast(dict[str, Any], manifest)
    if fields.get("format_version") != FORMAT_VERSION:
        raise InvalidError(
            f"{folder / MANIFEST} has format version {fields.get('format_version')}, and this "
            f"everpool reads {FORMAT_VERSION}: use a newer everpool"
        )
    try:
        objects = {str(name): dict(facts) for name, facts in fields["objects"].items()}
        for facts in objects.values():
            _check_inside(folder, facts["file"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InvalidError):
            raise
        raise InvalidError(f"{folder / MANIFEST} is damaged: {error!r}") from None
    return objects


def _check_inside(folder: Path, file: str) -> None:
    path = PurePosixPath(file)
    inside = not path.is_absolute() and ".." not in path.parts and path.parts
    if not inside or not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise InvalidError(f"{folder / MANIFEST} names a file outside its folder: {file!r}")


def _entries(journal: Path) -> Iterator[dict[str, Any]]:
    with journal.open(encoding="utf-8") as file:
        file.readline()
        for line in file:
            if entry := _parsed(line):
                yield entry


def _parsed(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:
        return {}  # the line that an interruption cut
