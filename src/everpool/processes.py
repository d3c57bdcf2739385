"""What the kernel tells of another process."""

import contextlib
from pathlib import Path


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal or a debugger; False when that cannot be known."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "tT"
    return False
