"""What cannot be right in a stored job document, and what would make it right. Pure.

A `Flaw` is something that no update of the product leaves behind: a hand in the database did it, a restored
backup, or a mistake of ours. Most carry the fields that mend them, so that finding and mending are one rule.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from bson import ObjectId

from core4 import jobs
from core4.jobs import HISTORY_LIMIT, Job
from core4.results import has_ended
from core4.states import FINAL, MOVES, WAITING, State
from core4.transitions import HOLD, LINE, Change, deliverable, entry, leaves

# What may follow what in a history; moves that keep the state keep each of theirs.
_STEPS = {(state.value, state.value) for state in State} | {
    (source.value, target.value)
    for move in MOVES.values()
    if move.sources != move.targets
    for source in move.sources
    for target in move.targets
}
_REASONS = {"worker", "paused", "max_running", "rate_limit"}  # why a waiting job may be held


@dataclass(frozen=True)
class Flaw:
    """One thing that is wrong with a document; `set` and `unset` are the fields that mend it, if any do."""

    kind: str
    reason: str
    set: Mapping[str, Any] = field(default_factory=dict)
    unset: Collection[str] = ()

    @property
    def mendable(self) -> bool:
        """True if one update of the document makes it right."""
        return bool(self.set or self.unset)


def flaws(job: Job) -> list[Flaw]:
    """All that is wrong with this document by itself, wherever it is kept."""
    return [*_history(job), *(_in_journal(job) if job.journal else _in_queue(job))]


def mend(seen: Job, by: str) -> Change | None:
    """One update that makes right what can be made right; None if there is nothing."""
    found = [flaw for flaw in flaws(seen) if flaw.mendable]
    if not found:
        return None
    fields: dict[str, Any] = {}
    unset: list[str] = []
    for flaw in found:
        fields |= flaw.set
        unset += flaw.unset
    rev = fields.pop("rev", seen.rev) + 1
    reason = "repaired: " + "; ".join(flaw.reason for flaw in found)
    note = {**entry(seen, seen.state, reason=reason[:500], by=by), "rev": rev}
    return Change("mend", fields, unset=[name for name in unset if name not in fields], entry=note, rev=rev)


def recalled(job: Job, by: str) -> dict[str, Any]:
    """The queue's document of a job that is in the journal without an end: it waits, outside of the line."""
    state = State.PENDING if job.state is State.RUNNING else job.state
    note = entry(job, state, reason="repaired: it was in the journal without an end", by=by)
    gone = ("settle", *LINE, *HOLD)
    document = {name: value for name, value in job.document.items() if name not in gone}
    history = [*job.document["history"], note][-HISTORY_LIMIT:]
    return {**document, "state": state.value, "locked": None, "rev": job.rev + 1, "history": history}


def with_child(seen: Job, child_id: ObjectId, by: str) -> Change:
    """Note a child once more that was promised and is not there."""
    child = {"kind": "restart", "target": child_id, "index": seen.document.get("restarts", 1) - 1}
    child |= {"by": by, "hostname": "", "promised": True}
    note = entry(seen, seen.state, reason=f"repaired: its child {child_id} was missing", by=by)
    return Change("mend", {"outbox": [child], "settle": True}, entry=note)


def _in_queue(job: Job) -> Iterator[Flaw]:
    # Once it is on its way out, the journal's copy counts: nothing else is to be said of it.
    if job.document.get("settle"):
        yield from _settling(job)
        return
    yield from _settling(job)
    if job.state in WAITING and not job.removed_at:
        yield from _waiting(job)
    else:
        yield from _out_of_line(job)
    yield from _holding(job)
    yield from _place(job)
    if job.state not in FINAL and jobs.urgency(job.rank) != jobs.urgency(_rank(job)):
        yield Flaw("rank", f"its rank does not fit priority {job.priority} and force", {"rank": _rank(job)})
    yield from _fence(job)


def _in_journal(job: Job) -> Iterator[Flaw]:
    if not has_ended(job.document):
        yield Flaw("journal_open", f"it is {job.state} and in the journal, where nobody runs it")
        return
    yield from _settling(job)
    left = [name for name in (*LINE, *HOLD) if job.document.get(name) is not None]
    if left:
        yield Flaw("line", f"it is in the journal and has {', '.join(left)}", unset=left)


def _settling(job: Job) -> Iterator[Flaw]:
    """What has ended leaves the queue, and its children are made, while `settle` says so."""
    marked, outbox = bool(job.document.get("settle")), job.document.get("outbox")
    if not has_ended(job.document):
        if marked and not deliverable(job) and job.state is not State.BLOCKED:
            yield Flaw("unsettled", f"it is {job.state} and marked as ended", unset=("settle",))
    elif marked:
        yield Flaw("unsettled", "it has ended, and what follows from that has not been done")
    elif outbox:
        yield Flaw("unsettled", "it has ended, and nobody makes its children", {"settle": True})
    elif not job.journal and leaves(job):
        yield Flaw("unsettled", "it has ended and does not leave the queue", {"settle": True})


def _waiting(job: Job) -> Iterator[Flaw]:
    """A waiting job is in line, waits for a time, or is held for a reason: one of the three."""
    document = job.document
    due, held, later = bool(document.get("due")), document.get("held"), document.get("query_at")
    wrong = _pinned_line(due, held, later) if job.worker else _free_line(due, held, later)
    if (held == "max_running" and not job.slots()) or (held == "rate_limit" and job.rate_limit is None):
        wrong = "it is held for a limit that it does not have"
    if wrong:
        yield _back_in_line(job, wrong)
    if job.killed_at is not None:
        yield Flaw("killed", "its kill was acknowledged, and it waits for a worker")
    if job.state is State.DEFERRED and document.get("expires") is None and job.inactive_at is not None:
        yield Flaw("line", "it is deferred without an end", {"expires": job.inactive_at})
    elif job.state is not State.DEFERRED and document.get("expires") is not None:
        yield Flaw("line", f"it is {job.state} and has an end as if it were deferred", unset=("expires",))


def _free_line(due: bool, held: str | None, later: Any) -> str | None:
    if held is not None and (held not in _REASONS or held == "worker"):
        return f"it is held for a reason that nobody ends: {held!r:.50}"
    ways = [words for found, words in ((due, "due"), (held, "held"), (later, "to wait for a time")) if found]
    if not ways:
        return "it waits, and no worker will ever see it"
    return f"it is {' and '.join(ways)} at once" if len(ways) > 1 else None


def _pinned_line(due: bool, held: str | None, later: Any) -> str | None:
    if due:
        return "it is for one worker and due for all"
    if held not in _REASONS:
        return "it is for one worker, which will never see it"
    return f"it is held ({held}) and waits for a time at once" if later and held != "worker" else None


def _back_in_line(job: Job, reason: str) -> Flaw:
    if job.worker:
        return Flaw("line", reason, {"held": "worker"}, ("due",))
    if job.document.get("query_at") is not None:
        return Flaw("line", reason, unset=("due", "held"))
    return Flaw("line", reason, {"due": True}, ("held",))


def _out_of_line(job: Job) -> Iterator[Flaw]:
    left = [name for name in LINE if job.document.get(name) is not None]
    if job.state is State.BLOCKED:
        left = [name for name in left if name == "due"]
    if left:
        state = "removed" if job.removed_at and job.state is not State.RUNNING else job.state
        yield Flaw("line", f"it is {state} and in line ({', '.join(left)})", unset=left)


def _holding(job: Job) -> Iterator[Flaw]:
    slot = job.document.get("slot")
    if job.state is not State.RUNNING:
        if job.document.get("lease") is not None:
            yield Flaw("lease", f"it is {job.state} and has a lease", unset=("lease",))
        if slot is not None:
            yield Flaw("slot", f"it is {job.state} and has the slot {slot!r:.200}", unset=("slot",))
    elif job.lease is None:
        yield Flaw("no_lease", "it is running, and nobody holds it")
    elif job.claims == 0 and (slots := job.slots()) and slot not in slots:
        yield Flaw("no_slot", "it is running and has no slot of its limit")


def _place(job: Job) -> Iterator[Flaw]:
    """Its place among the jobs of its name and arguments."""
    document, own = job.document, jobs.unique_key_of(job.document)
    gone = job.state is State.COMPLETE or (job.removed_at is not None and job.state is not State.RUNNING)
    if job.unique_key is not None:
        if gone or not document.get("unique", True):
            why = "it has ended" if gone else "it is not unique"
            yield Flaw("unique_key", f"{why} and keeps others from its place", unset=("unique_key",))
        elif job.unique_key != own:
            yield Flaw("unique_key", "its place is that of other arguments", {"unique_key": own})
        return
    # A child may have found its place taken; so may a parent whose restart was refused.
    special = document["enqueued"].get("parent_id") or document.get("restarts") or document.get("outbox")
    if document.get("unique", True) and not gone and not special:
        yield Flaw("unique_key", "others with its name and arguments may run beside it", {"unique_key": own})


def _rank(job: Job) -> int:
    return jobs.rank(force=job.force, priority=job.priority, at=job.document["enqueued"]["at"])


def _fence(job: Job) -> Iterator[Flaw]:
    claims = sum(row["state"] == State.RUNNING and row["lease"] is not None for row in _rows(job))
    least = max(claims, jobs.seq_fence(job.log_seq))
    if job.fence < least:
        # The numbers of its lines are made from it while it runs.
        fix = {} if job.state is State.RUNNING else {"fence": least}
        yield Flaw("fence", f"its fence is {job.fence}, but it was granted {least} leases", fix)


def _history(job: Job) -> Iterator[Flaw]:
    rows = _rows(job)
    revs = [row["rev"] for row in rows]
    if not rows or len(rows) > HISTORY_LIMIT or revs != sorted(set(revs)):
        yield Flaw("history", f"its history is out of order: revisions {revs!r:.200}")
    elif jumps := [f"{a} to {b}" for a, b in pairwise(row["state"] for row in rows) if (a, b) not in _STEPS]:
        yield Flaw("history", f"its history goes from {', '.join(jumps)}, which nothing does")
    elif rows[-1]["state"] != job.state:
        yield Flaw("history", f"it is {job.state}, its history says {rows[-1]['state']}")
    elif revs[-1] > job.rev:
        reason = f"its revision is {job.rev}, its history goes to {revs[-1]}"
        yield Flaw("rev", reason, {"rev": revs[-1]})


def _rows(job: Job) -> Sequence[Mapping[str, Any]]:
    rows: Sequence[Mapping[str, Any]] = job.document["history"]
    return rows
