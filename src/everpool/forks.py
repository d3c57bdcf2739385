"""Counts forks, so that what was opened before one is known to belong to the parent process."""

import os
import threading

generation: int = 0
# Held while a pool that was inherited opens itself again.
switching = threading.Lock()


def _begin_in_child() -> None:
    global generation, switching
    generation += 1
    switching = threading.Lock()


os.register_at_fork(after_in_child=_begin_in_child)
