"""What became of a record, as the tail and the sessions tell."""

from collections.abc import Iterable

from everpool.records import RecordId, session_start
from everpool.replica.effects import entry_of
from everpool.replica.index import Index
from everpool.verdict import VOID, Verdict

Outcome = tuple[str, int | None, list[bytes]]


def decided(index: Index, ids: Iterable[RecordId]) -> dict[RecordId, Outcome]:
    """Return what became of those records that the tail still has."""
    found: dict[RecordId, Outcome] = {}
    wanted: dict[bytes, set[int]] = {}
    for id in ids:
        wanted.setdefault(id.session, set()).add(id.sequence)
    with index.read() as txn:
        for _, row in index.tail_backwards(txn):
            if not wanted:
                break
            entry = entry_of(row)
            sequences = wanted.get(entry.session)
            if sequences is None:
                continue
            for at, outcome in enumerate(row.outcomes):
                sequence = entry.first_sequence + at
                if sequence not in sequences:
                    continue
                if outcome.verdict == Verdict.COMMITTED:
                    old = [resolved.old for resolved in outcome.resolved if resolved.old]
                    state: Outcome = "committed", row.first_version + at, old
                elif outcome.verdict in VOID and outcome.verdict != Verdict.FENCED:
                    continue  # void where it stands: it may have been decided elsewhere
                else:
                    state = "aborted", None, []
                found[RecordId(entry.session, sequence)] = state
                sequences.discard(sequence)
            if not sequences:
                del wanted[entry.session]
    return found


def forgotten(index: Index, id: RecordId) -> Outcome:
    """Return the outcome of a fenced record that the tail does not have."""
    with index.read() as txn:
        known = index.session(txn, id.session)
        floor = index.state(txn).floor
    if known is None or known.last_version < floor:
        return ("expired" if session_start(id.session) < floor else "aborted"), None, []
    return ("expired" if id.sequence <= known.last_sequence else "aborted"), None, []
