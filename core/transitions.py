"""What each move writes: one job document and a wish in, one update out. Pure.

`JobStore` writes a `Change` only to the document it was made for, so a change may rely on all it saw.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from bson import ObjectId

from core4 import chains, jobs
from core4.errors import Conflict, JobNotFound, LeaseLost, ResultGone
from core4.jobs import HISTORY_LIMIT, Job, Lease, Owner, utcnow
from core4.results import EXPIRY, gone, has_ended
from core4.retries import Outcome, decide
from core4.states import FINAL, Flag, State

# What people and rescuers do: told in the audit under these words. All else is in the job's history.
ACTIONS: Mapping[str, str] = {
    "kill": "kill",
    "flag_kill": "kill",
    "restart": "restart",
    "wish_restart": "restart",
    "retry": "restart",
    "remove": "remove",
    "wish_remove": "remove",
    "rescue": "rescue",
    "reclaim": "rescue",
    "mend": "mend",
}
LINE = ("due", "held", "query_at", "expires", "open_deps")  # what makes a job wait, and for what
HOLD = ("lease", "slot")  # what the holder of a running job has
ERROR_TEXT, TRACEBACK_TEXT = 16_384, 131_072  # characters kept of an exception and its traceback
TRACEBACK_LINES = 2000  # Python's own stop at a thousand frames


@dataclass(frozen=True)
class Change:
    """One update of one job document: the move it makes and the fields it writes."""

    move: str
    set: Mapping[str, Any] = field(default_factory=dict)
    unset: Collection[str] = ()
    entry: Mapping[str, Any] | None = None
    rev: int | None = None  # of the document afterwards, if not the next one


def signed(change: Change, request_id: str | None) -> Change:
    """The change as it is written: an action says that it is one, and has to be told in the audit.

    So has what was done to a job that ends and stays in the queue: no move to the journal sees to it.
    """
    taken = change.set.get("consumed")
    if taken and request_id:
        change = replace(change, set={**change.set, "consumed": {**taken, "request_id": request_id}})
    if change.set.get("stopped_at") and not change.set.get("settle"):
        change = replace(change, set={**change.set, "audit": True})
    action = ACTIONS.get(change.move)
    if action is None or change.entry is None:
        return change
    if action == "rescue" and change.set["state"] == State.ERROR:
        action = "poison"
    note = {**change.entry, "action": action, **({"request_id": request_id} if request_id else {})}
    return replace(change, set={**change.set, "audit": True}, entry=note)


def lease_of(job: Job) -> Lease:
    if job.lease is None:
        raise LeaseLost(job.id, None)
    return job.lease


def require(seen: Job, lease: Lease) -> None:
    if seen.state is not State.RUNNING or not seen.held_by(lease.id):
        raise LeaseLost(seen.id, lease.id)


def entry(
    seen: Job,
    state: State,
    *,
    reason: str | None = None,
    by: str | None = None,
    lease: str | None = None,
    log_seq: int | None = None,
) -> dict[str, Any]:
    """The history entry of the update that follows `seen`; that of an attempt's end tells all of it."""
    ends = seen.state is State.RUNNING and state is not State.RUNNING
    return jobs.entry(
        seen.rev + 1,
        state,
        attempt=seen.trial,
        at=utcnow(),
        worker=(seen.document.get("locked") or {}).get("worker"),
        reason=reason,
        lease=lease,
        log_seq=seen.log_seq if log_seq is None else log_seq,
        by=by,
        ended=seen.lease.id if ends and seen.lease else None,
        started=seen.started_at if ends and seen.claims == 0 else None,
    )


def claim(seen: Job, owner: Owner, begins_in: int | None = None) -> Change:
    """`owner` takes a waiting job under a lease of its own making.

    Args:
        begins_in: the process in which the attempt begins with that, see `start`: no other write is needed.
    """
    now = utcnow()
    lease = Lease(uuid.uuid4().hex, owner.id, now)
    note = jobs.entry(
        seen.rev + 1,
        State.RUNNING,
        attempt=seen.trial + 1,
        at=now,
        worker=owner.worker,
        lease=lease.id,
        log_seq=seen.log_seq,
    )
    fields = {
        "state": State.RUNNING.value,
        "lease": asdict(lease),
        "fence": seen.fence + 1,
        "claims": seen.claims + 1,
        "locked": _locked(owner, now),
    }
    if begins_in is not None:
        fields |= {**_begun(seen, now), "locked": _locked(owner, now, begins_in)}
    return Change("claim", fields, unset=LINE, entry=note)


def claim_pipeline(owner: Owner) -> list[dict[str, Any]]:
    """The same change as `claim`, for a document nobody has read yet."""
    now = utcnow()
    lease = Lease(uuid.uuid4().hex, owner.id, now)
    note = jobs.entry(0, State.RUNNING, attempt=0, at=now, worker=owner.worker, lease=lease.id)
    computed = {
        **{key: {"$literal": value} for key, value in note.items()},
        "rev": {"$add": ["$rev", 1]},
        "attempt": {"$add": ["$trial", 1]},
        "log_seq": "$log_seq",
    }
    fields = {
        "state": State.RUNNING.value,
        "lease": {"$literal": asdict(lease)},
        "locked": {"$literal": _locked(owner, now)},
        "fence": {"$add": ["$fence", 1]},
        "claims": {"$add": ["$claims", 1]},
        "rev": {"$add": ["$rev", 1]},
        "history": {"$slice": [{"$concatArrays": ["$history", [computed]]}, -HISTORY_LIMIT]},
    }
    return [{"$set": fields}, {"$unset": list(LINE)}]


def _locked(owner: Owner, now: datetime, pid: int | None = None) -> dict[str, Any]:
    """What core4's readers know of the holder."""
    return {"at": now, "heartbeat": now, "hostname": owner.hostname, "pid": pid, "worker": owner.worker}


def _begun(seen: Job, now: datetime) -> dict[str, Any]:
    window = timedelta(milliseconds=int(seen.defer_max * 1000))  # the database keeps no more
    return {
        "started_at": now,
        "trial": seen.trial + 1,
        "claims": 0,
        "inactive_at": seen.inactive_at or now + window,
    }


def start(seen: Job, lease: Lease, pid: int | None) -> Change | None:
    """The attempt begins; None if it has begun under this lease before."""
    require(seen, lease)
    if seen.claims == 0:
        return None  # the claim said so, or an earlier call did it and its reply was lost
    now = utcnow()
    return Change("start", {**_begun(seen, now), "locked.pid": pid, "locked.heartbeat": now})


def flag(seen: Job, lease: Lease, what: Flag, reason: str) -> Change | None:
    """The holder notes that its job is overdue; None if that has been noted, in an earlier attempt even."""
    require(seen, lease)
    if seen.document.get(f"{what}_at") is not None:
        return None
    note = entry(seen, State.RUNNING, reason=reason)
    return Change(f"flag_{what}", {f"{what}_at": utcnow()}, entry=note)


def finish(seen: Job, lease: Lease, outcome: Outcome, log_seq: int) -> Change | None:
    """The holder records how its attempt ended; None if it has done so before."""
    if seen.written_by(lease.id):
        return None  # an earlier call did it and its reply was lost
    require(seen, lease)
    now = utcnow()
    decision = decide(seen, outcome, now)
    if decision.state is State.KILLED:
        change = killed(seen, "finish", by=None, lease=lease.id, reason=outcome.exception)
        return _with_log(change, log_seq)
    fields: dict[str, Any] = {
        "state": decision.state.value,
        "attempts_left": decision.attempts_left,
        "finished_at": now,
        "runtime": seen.runtime + _elapsed(seen, now),
        "locked": None,
        "error_cat": outcome.error_cat,
    }
    unset = [*HOLD]
    if decision.state is State.COMPLETE:
        fields |= {"result": outcome.result, "prog": {"value": 1.0, "message": ""}}
        unset.append("unique_key")
    else:
        fields["last_error"] = _last_error(outcome, now)
    if decision.query_at is not None:
        fields["query_at"] = decision.query_at
        fields |= {"held": "worker"} if seen.worker else {}
    elif decision.state is State.FAILED:
        fields |= _in_line(seen)
    if decision.state is State.ERROR:
        fields["stopped_at"] = now
    if decision.state is State.DEFERRED:
        fields["expires"] = seen.inactive_at
    fields |= _follow_up(seen, fields)
    note = entry(seen, decision.state, reason=_reason(outcome), lease=lease.id)
    return _with_log(Change("finish", fields, unset=unset, entry=note), log_seq)


def _with_log(change: Change, log_seq: int) -> Change:
    assert change.entry is not None
    return replace(change, set={**change.set, "log_seq": log_seq}, entry={**change.entry, "log_seq": log_seq})


def killed(
    seen: Job, move: str, *, by: str | None, lease: str | None = None, reason: str | None = None
) -> Change:
    """The job ends as killed, whether it waited or ran."""
    now = utcnow()
    error = Outcome.killed(reason or (f"killed by {by}" if by else "killed on request"))
    fields = ended(seen, State.KILLED, last_error=_last_error(error, now))
    if seen.killed_at is None:
        fields["killed_at"] = now
    if seen.state is State.RUNNING:
        fields["runtime"] = seen.runtime + _elapsed(seen, now)
    note = entry(seen, State.KILLED, reason=error.exception, by=by, lease=lease)
    # A restart that was asked for meanwhile hands the place in the queue to the child.
    handed = ("unique_key",) if any(each["kind"] == "restart" for each in seen.outbox) else ()
    return Change(move, fields, unset=(*HOLD, *LINE, *handed), entry=note)


def ended(seen: Job, state: State, **more: Any) -> dict[str, Any]:
    """The fields of any final state but complete."""
    now = utcnow()
    fields = {"state": state.value, "finished_at": now, "stopped_at": now, "locked": None, **more}
    return fields | _follow_up(seen, fields)


def _follow_up(seen: Job, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be done to other documents after the move that writes `fields`."""
    after = {**seen.document, **fields}
    notes = chains.followers(after)
    outbox = [*seen.outbox, *notes]
    final = State(after["state"]) in FINAL
    found: dict[str, Any] = {"outbox": outbox} if notes else {}
    if notes or (final and (outbox or _document_leaves(after))):
        found["settle"] = True
    return found


def _in_line(seen: Job) -> dict[str, Any]:
    """What puts a job in line that waits for nothing but a worker."""
    return {"held": "worker"} if seen.worker else {"due": True}


def settles(job: Job) -> bool:
    """True if what follows from its end is still to be done; a running job has none, whatever its mark."""
    return bool(job.document.get("settle")) and job.state is not State.RUNNING


def leaves(job: Job) -> bool:
    """True if the job has no place in the queue any more."""
    return _document_leaves(job.document)


def _document_leaves(document: Mapping[str, Any]) -> bool:
    if document.get("removed_at"):
        return State(document["state"]) is not State.RUNNING
    if document["state"] not in FINAL:
        return False
    if document.get("retired_at"):
        return True
    stays = document["state"] != State.COMPLETE and document.get("keep_stopped", True)
    return not stays or document["enqueued"].get("child_id") is not None


def back_in_line(seen: Job, move: str, reason: str, *, query_at: datetime | None) -> Change:
    """A held job waits again; `attempts_left` is not touched."""
    fields: dict[str, Any] = {"state": State.PENDING.value, "locked": None}
    if seen.worker:
        fields["held"] = "worker"
    if query_at is not None:
        fields["query_at"] = query_at
    elif not seen.worker:
        fields["due"] = True
    fields["log_seq"] = _last_seq(seen)
    # No lease on this entry: only the holder's own outcome carries one, see Job.written_by.
    note = entry(seen, State.PENDING, reason=reason, log_seq=fields["log_seq"])
    return Change(move, fields, unset=HOLD, entry=note)


def release(seen: Job, lease: Lease, reason: str, delay: float, evicted: int = 0) -> Change:
    """The holder gives the job back, uncharged; `evicted` is added to its count of lost hosts."""
    require(seen, lease)
    if seen.killed_at is not None:
        return _with_log(killed(seen, "release", by=None, lease=lease.id), _last_seq(seen))
    if seen.max_crashes == 1 and seen.claims == 0:
        # It has begun, and may not begin again: whatever its author wanted is not to be done twice.
        outcome = Outcome.failed(f"given up: {reason}; it runs at most once", [], "HALTED")
        lost = ended(seen, State.ERROR, error_cat="HALTED", last_error=_last_error(outcome, utcnow()))
        note = entry(seen, State.ERROR, reason=outcome.exception)
        return _with_log(Change("release", lost, unset=HOLD, entry=note), _last_seq(seen))
    query_at = utcnow() + timedelta(seconds=delay) if delay > 0 else None
    change = back_in_line(seen, "release", reason, query_at=query_at)
    # A release before the start is the worker's doing, not a claim that went wrong.
    fields: dict[str, Any] = {"claims": max(seen.claims - 1, 0)}
    if evicted:
        fields["evicted"] = seen.evicted + evicted
    return replace(change, set={**change.set, **fields})


def take_slot(seen: Job, lease: Lease, slot: str) -> Change:
    """The claimant takes one of the job's slots; the unique index refuses one that is taken."""
    require(seen, lease)
    return Change("take_slot", {"slot": slot})


def wake(seen: Job, reason: str) -> Change:
    """What the job was held for has become free: it is in line again."""
    note = entry(seen, seen.state, reason=reason)
    return Change("wake", _in_line(seen), unset=() if seen.worker else ("held",), entry=note)


def put_aside(seen: Job, lease: Lease, held: str) -> Change:
    """The claimant takes the job out of the line, uncharged, until whoever frees it puts it back."""
    change = release(seen, lease, f"held: {held}", 0.0)
    if change.set["state"] != State.PENDING:
        return change  # killed meanwhile
    fields = {name: value for name, value in change.set.items() if name != "due"}
    return replace(change, move="put_aside", set={**fields, "held": held})


def kill(seen: Job, by: str, *, chain: bool = False) -> Change | None:
    """End what nobody runs, flag what runs; None if that has been done.

    With `chain` nothing follows, even if the job is faster and completes.
    """
    flagged = seen.killed_at is not None and (not chain or seen.document.get("chain_killed"))
    if seen.state is State.KILLED or (seen.state is State.RUNNING and flagged):
        return None
    if seen.state in FINAL or seen.removed_at:
        raise _refused(seen, "is {state} already")
    if seen.state is State.RUNNING:
        note = entry(seen, State.RUNNING, reason="kill requested", by=by)
        more = {"chain_killed": True} if chain else {}
        return Change("flag_kill", {"killed_at": seen.killed_at or utcnow(), **more}, entry=note)
    return killed(seen, "kill", by=by)


def remove(seen: Job, by: str) -> Change:
    """Out of the queue, or as soon as the kill under way is done."""
    if seen.journal or seen.removed_at or seen.state is State.COMPLETE:
        raise JobNotFound(seen.id, f"job [{seen.id}] is not in the queue any more; see the journal")
    note = entry(seen, seen.state, reason="removed", by=by)
    if seen.state is not State.RUNNING:
        fields = {"removed_at": utcnow()}
        fields |= {} if seen.state in FINAL else _follow_up(seen, fields)
        return Change("remove", {**fields, "settle": True}, unset=(*LINE, "unique_key"), entry=note)
    if seen.killed_at is None:
        raise _refused(seen, "is running: kill it first")
    return Change("wish_remove", {"removed_at": utcnow()}, entry=note)


def retire(seen: Job) -> Change:
    """A stopped job that nobody has restarted or removed leaves the queue."""
    fields = {"retired_at": utcnow(), "settle": True}
    note = entry(seen, seen.state, reason="stopped for longer than it is kept")
    return Change("retire", fields, unset=("unique_key", "stopped_at"), entry=note)


def expire(seen: Job) -> Change:
    """A deferred job past its window."""
    note = entry(seen, State.INACTIVE, reason="deferred past its window")
    return Change("expire", ended(seen, State.INACTIVE), unset=LINE, entry=note)


def rescue(seen: Job, max_crashes: int, max_claims: int) -> Change:
    """What becomes of a job whose worker is dead: back in line, or error for what kills its workers.

    What it has called ends. The job's own `max_crashes` beats that of the settings.
    """
    change = _rescued(seen, max_crashes, max_claims)
    if seen.claims:
        return change  # it had not begun
    outbox = [*change.set.get("outbox", seen.outbox), chains.hush(seen)]
    return replace(change, set={**change.set, "outbox": outbox, "settle": True})


def _rescued(seen: Job, max_crashes: int, max_claims: int) -> Change:
    max_crashes = seen.max_crashes or max_crashes
    if seen.killed_at is not None:
        return _with_log(killed(seen, "rescue", by=None), _last_seq(seen))
    started = seen.claims == 0
    crashes = seen.crashes + started
    if crashes < max_crashes and seen.claims < max_claims:
        query_at = utcnow() + timedelta(seconds=min(2**crashes, 60)) if started else None
        change = back_in_line(seen, "rescue", "worker lost", query_at=query_at)
        return replace(change, set={**change.set, "crashes": crashes})
    reason = (
        f"poison: {crashes} of {max_crashes} times its worker was lost while it ran it"
        if started
        else f"claimed {seen.claims} times and never started"
    )
    outcome = Outcome.crashed(reason)
    fields = ended(
        seen,
        State.ERROR,
        crashes=crashes,
        error_cat=outcome.error_cat,
        last_error=_last_error(outcome, utcnow()),
    )
    note = entry(seen, State.ERROR, reason=reason)
    return _with_log(Change("rescue", fields, unset=(*HOLD, *LINE), entry=note), _last_seq(seen))


def _last_seq(seen: Job) -> int:
    """A bound behind the lines of an attempt that did not count them: all its fence allows."""
    return jobs.first_seq(seen.fence + 1) - 2


def retry_now(seen: Job, by: str) -> Change | None:
    """A job that waits for its next attempt is due now; None if it is in line already."""
    if seen.document.get("query_at") is None:
        return None
    note = entry(seen, seen.state, reason="restarted: due now", by=by)
    unset = ("query_at",) if seen.worker else ("query_at", "held")
    return Change("retry", _in_line(seen), unset=unset, entry=note)


def require_ended(seen: Job) -> None:
    """Only what has ended, or is being killed, can be restarted.

    Raises: Conflict for a job that waits, runs or was removed before it ran.
    """
    killing = seen.state is State.RUNNING and seen.killed_at is not None
    if seen.state not in FINAL and not killing:
        raise _refused(seen, "is {state}: there is nothing to restart")


def _refused(seen: Job, text: str) -> Conflict:
    state = "removed" if seen.removed_at and seen.state not in FINAL else seen.state.value
    return Conflict(f"job [{seen.id}] " + text.format(state=state), job_id=str(seen.id), state=state)


def link(
    seen: Job, child_id: ObjectId, by: str, hostname: str, *, wish: bool, request_id: str | None = None
) -> Change:
    """Name the child on its parent, and note it for whoever settles the parent."""
    number = seen.document.get("restarts", 0)
    note = {"kind": "restart", "target": child_id, "index": number}
    note |= {"by": by, "hostname": hostname, "request_id": request_id}
    fields = {
        "enqueued.child_id": child_id,
        "restarts": number + 1,
        # A wish is acknowledged before the child is made: then it has to be made.
        "outbox": [*seen.outbox, {**note, "promised": True} if wish else note],
    }
    line = entry(seen, seen.state, reason=f"restarted as {child_id}", by=by)
    if wish:
        return Change("wish_restart", fields, entry=line)
    return Change("restart", {**fields, "settle": True}, unset=("unique_key",), entry=line)


def consume(seen: Job, by: str, token: str) -> Change | None:
    """Somebody takes the result, which is then gone; None if the call of this `token` has done so before.

    Raises: Conflict for a job that has not ended; ResultGone if somebody else has it.
    """
    if not has_ended(seen.document):
        raise _refused(seen, "is {state}: there is no result yet")
    taken = seen.document.get("consumed")
    if taken is None:
        # No line of history: that ends with the job, and streams are read from it.
        mark = {"at": utcnow(), "by": by, "id": token, "action": "pull"}
        return Change("consume", {"consumed": mark, "result": None, "audit": True})
    if taken["id"] == token:
        return None
    raise ResultGone(gone(seen.document), job_id=str(seen.id))


def expire_result(seen: Job) -> Change | None:
    """The result of a journaled job, which nobody has pulled, goes; None if there is none."""
    if seen.document.get("consumed") is not None or seen.document.get("result") is None:
        return None
    return Change("consume", {"consumed": {"at": utcnow(), "by": EXPIRY, "id": EXPIRY}, "result": None})


def wait_for(seen: Job) -> Change | None:
    """Somebody is going to wait for this job; None if there is nothing to wait for, or that is known."""
    if seen.has_ended or seen.document.get("awaited"):
        return None
    return Change("await", {"awaited": True})


def unblock(seen: Job, done: ObjectId) -> Change | None:
    """A prerequisite has completed; None if this job does not wait for it."""
    waits = seen.document.get("open_deps", ())
    if seen.state is not State.BLOCKED or done not in waits:
        return None
    left = [each for each in waits if each != done]
    if left:
        return Change("unblock", {"open_deps": left})
    fields = {"state": State.PENDING.value, **_in_line(seen)}
    note = entry(seen, State.PENDING, reason="its prerequisites have completed")
    return Change("unblock", fields, unset=("open_deps",), entry=note)


def prerequisite_failed(seen: Job, culprit: ObjectId, why: str) -> Change | None:
    """A prerequisite did not complete: nor does this job, which is not tried; None if it does not wait."""
    if seen.state is not State.BLOCKED or culprit not in seen.document.get("open_deps", ()):
        return None
    text = f"prerequisite {why}"
    error = {**_last_error(Outcome.failed(text, []), utcnow()), "traceback": None}
    fields = ended(
        seen,
        State.ERROR,
        error_cat="DEPENDENCY",
        last_error={**error, "dependency_failure": culprit},
    )
    return Change("depend", fields, unset=LINE, entry=entry(seen, State.ERROR, reason=text[:500]))


def deliverable(job: Job) -> list[Mapping[str, Any]]:
    """The notes of the outbox whose time has come: a restart waits for the end of a kill."""
    return [note for note in job.outbox if note["kind"] != "restart" or job.has_ended]


def settled(job: Job, *, broken: Collection[ObjectId] = ()) -> Change:
    """All that is `deliverable` is done, but for `broken`: children that could not be made are taken back.

    Who waits for such a child is told next. `settle` stays for that, and while the job has to leave the
    queue: a crash before the move is then repaired.
    """
    later = [note for note in job.outbox if note not in deliverable(job)]
    taken_back = [
        {**note, "kind": "release"}
        for note in job.outbox
        if note["kind"] == "restart" and note["target"] in broken
    ]
    left = [*later, *taken_back]
    unset = [] if left else ["outbox"]
    document = dict(job.document)
    if taken_back:
        unset.append("enqueued.child_id")
        document["enqueued"] = {k: v for k, v in document["enqueued"].items() if k != "child_id"}
    if not taken_back and (job.journal or not _document_leaves(document)):
        unset.append("settle")
    return Change("settle", {"outbox": left} if left else {}, unset=unset)


def applied(document: Mapping[str, Any], change: Change, rev: int) -> dict[str, Any]:
    """The document after `change`, as the database has it now."""
    after = dict(document)
    for path, value in change.set.items():
        head, _, tail = path.partition(".")
        after[head] = {**(after.get(head) or {}), tail: value} if tail else value
    for path in change.unset:
        head, _, tail = path.partition(".")
        if tail:
            after[head] = {k: v for k, v in (after.get(head) or {}).items() if k != tail}
        else:
            after.pop(head, None)
    if change.entry is not None:
        after["history"] = [*after.get("history", ()), change.entry][-HISTORY_LIMIT:]
    after["rev"] = rev
    return after


def _last_error(outcome: Outcome, now: datetime) -> dict[str, Any]:
    lines = None if outcome.traceback is None else shortened(outcome.traceback)
    text = clean(outcome.exception or "")[:ERROR_TEXT]
    return {"exception": text, "timestamp": now, "traceback": lines}


def shortened(traceback: Iterable[object]) -> list[str]:
    """A traceback as it is stored: of one that is too long, the first and the last lines."""
    lines = [clean(str(line)) for line in traceback]
    if len(lines) <= TRACEBACK_LINES and sum(map(len, lines)) <= TRACEBACK_TEXT:
        return lines
    head, tail = _fitting(lines), _fitting(reversed(lines))
    return [*head, f"  [{len(lines) - len(head) - len(tail)} lines left out]\n", *reversed(tail)]


def _fitting(lines: Iterable[str]) -> list[str]:
    """The first of them, up to half of what a traceback may have beside the line about what is left out."""
    kept: list[str] = []
    room = TRACEBACK_TEXT // 2 - 50
    for line in lines:
        room -= len(line)
        if room < 0 or len(kept) >= TRACEBACK_LINES // 2 - 1:
            break
        kept.append(line)
    return kept


def clean(text: str) -> str:
    """Text that can be stored: lone surrogates are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def _reason(outcome: Outcome) -> str | None:
    return clean(outcome.exception or "")[:500] or None


def _elapsed(seen: Job, now: datetime) -> float:
    started = seen.started_at if seen.claims == 0 else None
    return max((now - started).total_seconds(), 0.0) if started else 0.0
