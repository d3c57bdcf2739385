"""Branches: pools that begin as another one was, and share its segments.

    build the parent as of the version, in private
    upload the pages that only its log has, the rows of its index, and a manifest
    pin the version in the parent
    write the marker of the branch: from here on it is a pool

Whoever dies in between leaves objects that nothing refers to, and perhaps a pin.
"""

import contextlib
import uuid
from collections.abc import Callable

from everpool.agent.past import PastEngine
from everpool.agent.pools import check_free, create_branch
from everpool.paging.regions import BLOCK_BYTES, BLOCK_SHIFT
from everpool.replica.index import is_of_the_past
from everpool.segments.checkpoints import write_manifest, write_pages, write_runs
from everpool.segments.format import Manifest
from everpool.store import Store, open_store, without_secrets

_PAGES_AT_ONCE = 256


def branch(past: PastEngine, parent: str, url: str, pin: Callable[[], None]) -> None:
    """Make a pool at `url` that begins as `past`, of the pool at `parent`."""
    where = without_secrets(url)
    with contextlib.closing(open_store(url)) as store:
        check_free(store, where)
        pool = uuid.uuid4().bytes
        start = write_start(past, store, pool)
        pin()
        create_branch(store, where, pool, parent, start)


def write_start(past: PastEngine, store: Store, pool: bytes) -> str:
    """Write what a new pool needs to begin as a pool was, but for what that has in segments
    already; returns the manifest's key.
    """
    index, blocks = past.replica.index, past.blocks
    pages: dict[tuple[int, int], bytes] = {}
    began = past.replica.version()
    places = [(id, block) for id, known in blocks.dirty().items() for block in known]
    for at in range(0, len(places), _PAGES_AT_ONCE):
        part = places[at : at + _PAGES_AT_ONCE]
        for id, block in part:
            blocks.fill_if_there(id, [(block << BLOCK_SHIFT, BLOCK_BYTES)])
        written = write_pages(store, began, (blocks.copy(id, block) for id, block in part))
        pages.update((place, page.row()) for place, page in zip(part, written, strict=True))
    with index.env.begin(buffers=True) as txn:
        state = index.state(txn)
        # The past is the parent's business: there is none to look at here.
        rows = (row for row in index.dump(txn) if not is_of_the_past(row[0]))
        runs = write_runs(store, began, rows, 0, state.version)
        placed = index.rows_of(txn, set(), set(), pages, set(), state.version)
        rows = (row for row in placed if not is_of_the_past(row[0]))
        runs += write_runs(store, began, rows, 1, state.version)
    manifest = Manifest(pool, state.version, 0, state.hash, state.time_ns, runs, [])
    return write_manifest(store, began, manifest)
