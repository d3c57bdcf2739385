"""What became of a record, as the tail and the sessions tell."""

from everpool.records import RecordId, session_start
from everpool.replica.effects import entry_of
from everpool.replica.index import Index
from everpool.verdict import VOID, Verdict

Outcome = tuple[str, int | None, list[bytes]]


def decided(index: Index, id: RecordId) -> Outcome | None:
    """Return state, version and results of a record that the tail still has, or None."""
    with index.read() as txn:
        for _, row in index.tail_backwards(txn):
            entry = entry_of(row)
            at = id.sequence - entry.first_sequence
            if entry.session != id.session or not 0 <= at < len(entry.records):
                continue
            outcome = row.outcomes[at]
            if outcome.verdict == Verdict.COMMITTED:
                old = [resolved.old for resolved in outcome.resolved if resolved.old]
                return "committed", row.first_version + at, old
            if outcome.verdict not in VOID or outcome.verdict == Verdict.FENCED:
                return "aborted", None, []
            # Void where it stands: the same record may have been decided elsewhere.
    return None


def forgotten(index: Index, id: RecordId) -> Outcome:
    """Return the outcome of a fenced record that the tail does not have."""
    with index.read() as txn:
        known = index.session(txn, id.session)
        floor = index.state(txn).floor
    if known is None or known.last_version < floor:
        return ("expired" if session_start(id.session) < floor else "aborted"), None, []
    return ("expired" if id.sequence <= known.last_sequence else "aborted"), None, []
