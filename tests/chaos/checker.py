"""The judge: reads what a run left behind and says which promises were broken, by which job, and why.

Pure, and on purpose without a line of the product: what it knows of states and ids it knows by itself.

C1   an acknowledged enqueue is never lost               C7   in the end nothing is open
C8   what follows from a job, follows once, and then
C2   no job that nobody asked for                        C9   one job per fire of a schedule
C3   what came of an unknown answer was really asked     C11  only legal moves, a final state is never left
C4   one document, one outcome, by the holder            C12  a follower sees all, once, in order, one end
C5   who has lost the lease writes nothing               C13  an acknowledged kill or remove holds
C6   no execution too many, none at the same time        C10  one job per confirmed message
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tests.chaos.evidence import Document, Event, Evidence, Follower, Note, Operation

FINAL = {"complete", "error", "killed", "inactive"}
WAITING = {"pending", "failed", "deferred"}
LEGAL: Mapping[str, set[str]] = {
    "blocked": {"pending", "killed", "error"},
    "pending": {"running", "killed"},
    "failed": {"running", "killed"},
    "deferred": {"running", "killed", "inactive"},
    "running": {"complete", "failed", "error", "deferred", "killed", "pending"},
}
KILL_PATIENCE = 15.0  # seconds after an acknowledged kill in which an execution under way may begin to end
RUN_STATES = {"failed", "deferred", "pending"}  # what an execution ends in if another one follows


@dataclass(frozen=True)
class Violation:
    """One broken promise."""

    check: str
    job: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.check} {self.job or '-'}: {self.reason}"


@dataclass
class Verdict:
    """All violations, and the figures of the run."""

    violations: list[Violation]
    figures: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.violations

    def broken(self) -> set[str]:
        """The names of the checks that failed."""
        return {violation.check for violation in self.violations}

    def __str__(self) -> str:
        lines = [str(violation) for violation in self.violations[:50]]
        return "\n".join([*lines, f"{len(self.violations)} violations; {self.figures}"])


@dataclass(frozen=True)
class Case:
    """The evidence, indexed for the checks."""

    evidence: Evidence
    documents: Mapping[str, Document]  # journal over queue
    copies: Mapping[str, int]
    notes: Mapping[str, Sequence[Note]]

    @property
    def fires(self) -> frozenset[str]:
        """The jobs that a schedule had to make, or could."""
        return (self.evidence.fires or frozenset()) | self.evidence.may_fire

    def operations(self, *names: str, kind: str = "ok") -> Iterator[Operation]:
        return (each for each in self.evidence.operations if each.op in names and each.kind == kind)


def check(evidence: Evidence) -> Verdict:
    """Hold the evidence against every promise."""
    documents = {str(document["_id"]): document for document in (*evidence.queue, *evidence.journal)}
    copies = Counter(str(document["_id"]) for document in (*evidence.queue, *evidence.journal))
    notes: dict[str, list[Note]] = defaultdict(list)
    for note in evidence.ledger:
        notes[note.job].append(note)
    case = Case(evidence, documents, copies, notes)
    violations = [
        Violation(name, job, reason) for name, found in CHECKS.items() for job, reason in found(case)
    ]
    return Verdict(violations, figures(case))


Found = Iterator[tuple[str | None, str]]


def c1_lost(case: Case) -> Found:
    for each in case.operations("enqueue", "restart"):
        if each.result not in case.documents:
            yield each.result, f"{each.op} of {each.target} was acknowledged, the job is nowhere"


ASKING = ("enqueue", "message")  # what a client may have to do with a job of its key


def c2_unexpected(case: Case) -> Found:
    asked = Counter(each.target for each in case.evidence.operations if each.op in ASKING)
    acknowledged = {each.result for each in case.operations("enqueue", "restart")}
    for job, document in case.documents.items():
        yield from _unnamed(case, job, document)
        if job in acknowledged or job in case.fires or job in _children(case, document):
            continue
        parent = document["enqueued"].get("parent_id")
        if parent is not None or not asked[str(document["args"].get("key"))]:
            yield job, f"nobody asked for it (parent {parent}, key {document['args'].get('key')})"


def _unnamed(case: Case, job: str, document: Document) -> Found:
    """The newest child of a parent is named by it; else nobody who looks at the parent finds it."""
    parent = case.documents.get(str(document["enqueued"].get("parent_id")))
    if parent is None or job != restart_id(str(parent["_id"]), parent.get("restarts", 0) - 1):
        return
    if str(parent["enqueued"].get("child_id")) != job:
        yield job, f"its parent {parent['_id']} does not name it"


def c3_recovered(case: Case) -> Found:
    """Unacknowledged jobs of a key are at most as many as its requests without an answer."""
    unknown = Counter(each.target for each in case.operations("enqueue", kind="info"))
    for key, jobs in recovered(case).items():
        if len(jobs) > unknown[key]:
            yield jobs[0], f"{len(jobs)} jobs {jobs} came of {unknown[key]} unknown enqueues of {key}"


def recovered(case: Case) -> Mapping[str, Sequence[str]]:
    """Jobs that came of an enqueue whose answer was lost, by key."""
    asked = {each.target for each in case.evidence.operations if each.op == "enqueue"}
    acknowledged = {each.result for each in case.operations("enqueue")}
    found: dict[str, list[str]] = defaultdict(list)
    for job, document in case.documents.items():
        key = str(document["args"].get("key"))
        if job not in acknowledged and document["enqueued"].get("parent_id") is None and key in asked:
            found[key].append(job)
    return found


def c4_one_outcome(case: Case) -> Found:
    for job, document in case.documents.items():
        if case.copies[job] > 1:
            yield job, f"{case.copies[job]} documents in queue and journal"
        outcomes = [entry for before, entry in steps(document) if entry["state"] in FINAL]
        if len(outcomes) > 1:
            yield job, f"{len(outcomes)} outcomes: {[entry['state'] for entry in outcomes]}"
        if document["state"] in FINAL and not outcomes:
            yield job, f"is {document['state']}, but its history tells no outcome"
        if not outcomes:
            continue
        outcome = outcomes[-1]
        if outcome["state"] != document["state"]:
            yield job, f"is {document['state']}, its history says {outcome['state']}"
        claims = _claims(document)
        if outcome["lease"] is not None and (not claims or claims[-1]["lease"] != outcome["lease"]):
            yield job, f"outcome by lease {outcome['lease']}, which was not the last one granted"
        if document["state"] == "complete":
            yield from _own_result(case, job, document, outcome)


def _own_result(case: Case, job: str, document: Document, outcome: Mapping[str, Any]) -> Found:
    if outcome["lease"] is None:
        yield job, "complete, but by no lease"
    result = document.get("result")
    if not isinstance(result, Mapping) or "token" not in result:
        return
    writers = {note.token: note.attempt for note in case.notes.get(job, ()) if note.what == "end"}
    attempt = writers.get(result["token"])
    if attempt is None:
        yield job, f"has the result {result['token']}, which none of its executions returned"
    elif attempt != document["trial"]:
        yield job, f"trial {document['trial']} has the result of attempt {attempt}"


def c5_fenced(case: Case) -> Found:
    granted: dict[str, list[Operation]] = defaultdict(list)
    for each in case.operations("claim"):
        granted[each.target].append(each)
    for each in case.operations("start", "progress", "finish", "release"):
        own = next((claim for claim in granted[each.target] if claim.lease == each.lease), None)
        for claim in granted[each.target]:
            newer = own is not None and claim.begin > own.end
            if newer and claim.lease != each.lease and claim.end < each.begin:
                yield (
                    each.target,
                    f"{each.op} under {each.lease} was taken after {claim.lease} had been granted",
                )
    yield from _finishes(case)


def _finishes(case: Case) -> Found:
    """An acknowledged finish is in the history, a refused one is not."""
    for kind in ("ok", "fail"):
        for each in case.operations("finish", kind=kind):
            document = case.documents.get(each.target)
            if document is None or not whole(document):
                continue
            written = any(
                entry["lease"] == each.lease and not _is_claim(entry) for entry in document["history"]
            )
            if written and kind == "fail":
                yield each.target, f"finish under {each.lease} was refused and yet recorded"
            if not written and kind == "ok":
                yield each.target, f"finish under {each.lease} was acknowledged and is not recorded"


def c6_executions(case: Case) -> Found:
    for job, notes in case.notes.items():
        starts = [note for note in notes if note.what == "start"]
        document = case.documents.get(job)
        if document is None:
            yield job, "was executed, but is in no collection"
            continue
        for attempt, count in Counter(note.attempt for note in starts).items():
            if count > 1:
                yield job, f"attempt {attempt} was started {count} times"
        if whole(document):
            again = sum(entry["state"] in RUN_STATES for before, entry in steps(document) if before)
            if len(starts) > 1 + again:
                yield job, f"{len(starts)} starts, but only {again} reasons to start again"
        # Also of a history that has lost its beginning: one that long is suspicious in itself.
        failures = sum(entry["state"] == "failed" for _, entry in steps(document))
        if failures > document["attempts"] - 1:
            yield job, f"failed {failures} times before its end, {document['attempts']} attempts allowed"
        if not case.evidence.pauses:
            yield from _overlap(job, notes)


def _overlap(job: str, notes: Sequence[Note]) -> Found:
    newest = 0
    for note in notes:
        if note.attempt < newest:
            yield job, f"attempt {note.attempt} still ran ({note.what}) after attempt {newest} had started"
            return
        newest = max(newest, note.attempt)


def c7_drained(case: Case) -> Found:
    for document in case.evidence.queue:
        job = str(document["_id"])
        if document["state"] not in FINAL:
            yield job, f"is still {document['state']}"
        elif document["state"] == "complete" or not document.get("keep_stopped", True):
            yield job, f"is {document['state']} and has not left the queue"
        if document.get("removed_at"):
            yield job, "was removed and has not left the queue"
    for document in (*case.evidence.queue, *case.evidence.journal):
        for name in ("outbox", "settle", "lease"):
            if document.get(name):
                yield str(document["_id"]), f"still has {name}: {document[name]}"


def c8_chains(case: Case) -> Found:
    """Each follower of what completed is there, and nothing of it began too early."""
    for job, document in case.documents.items():
        began = next(iter(_claims(document)), None)
        prerequisites = [chain_id(job, "before", n) for n in range(len(document.get("run_before") or ()))]
        prerequisites += [str(each) for each in document.get("dependencies") or ()]
        for each in prerequisites:
            before = case.documents.get(each)
            if began is not None and (before is None or before["state"] != "complete"):
                yield job, f"was started, its prerequisite {each} has not completed"
            elif began is not None and before is not None and before["finished_at"] > began["at"]:
                yield job, f"was started before its prerequisite {each} had completed"
        if document["state"] != "complete" or document.get("chain_killed"):
            continue
        for number, name in enumerate(document.get("run_after") or ()):
            follower = case.documents.get(chain_id(job, "after", number))
            if follower is None:
                yield job, f"completed, its follower {name} is nowhere"
            elif follower["enqueued"]["at"] < document["finished_at"]:
                yield job, f"its follower {name} was there before it had completed"
            elif not _passed_on(document, follower):
                yield job, f"its follower {name} was given {follower['args']}, not what it has returned"


def _passed_on(document: Document, follower: Document) -> bool:
    """False if the follower has arguments of these names, and other values."""
    result, args = document.get("result"), follower["args"]
    return not isinstance(result, Mapping) or set(result) != set(args) or dict(result) == dict(args)


def c9_fires(case: Case) -> Found:
    if case.evidence.fires is None:
        return
    for fire in sorted(case.evidence.fires - case.documents.keys()):
        yield fire, "this fire of a schedule made no job"
    for job, document in case.documents.items():
        if document.get("schedule_id") is not None and job not in case.fires:
            yield job, f"schedule {document['schedule_id']} was not due then, or fired twice"


def c10_messages(case: Case) -> Found:
    """However often a message was sent, delivered or read: its id is that of one job, or of a dead letter."""
    evidence = case.evidence
    for message in sorted(evidence.malformed ^ evidence.dead):
        yield message, "is no dead letter" if message in evidence.malformed else "is a dead letter"
    made = defaultdict(list)
    for job, document in case.documents.items():
        made[document.get("request_id")].append(job)
    for message in sorted({str(each.result) for each in case.operations("message")}):
        jobs = made[message]
        if len(jobs) != 1:
            yield jobs[0] if jobs else message, f"the confirmed message {message} made {len(jobs)} jobs"


def c11_moves(case: Case) -> Found:
    for job, document in case.documents.items():
        revs = [entry["rev"] for entry in document["history"]]
        if revs != sorted(set(revs)) or (revs and revs[-1] > document["rev"]):
            yield job, f"revisions do not rise: {revs}, document {document['rev']}"
        seqs = [entry["log_seq"] for entry in document["history"]]
        if seqs != sorted(seqs):
            yield job, f"log numbers do not rise: {seqs}"
        for before, entry in steps(document):
            if before and entry["state"] not in LEGAL.get(before, ()):
                yield job, f"moved from {before} to {entry['state']} at revision {entry['rev']}"
        leases = [entry["lease"] for entry in _claims(document)]
        if len(set(leases)) != len(leases):
            yield job, "a lease was granted twice"
        if whole(document):
            if document["history"][0]["rev"] != 1:
                yield job, f"its history begins with revision {document['history'][0]['rev']}"
            if document["fence"] != len(leases):
                yield job, f"fence {document['fence']} after {len(leases)} leases"


def c12_followers(case: Case) -> Found:
    lines: dict[str, set[int]] = defaultdict(set)
    for chunk in case.evidence.log:
        lines[str(chunk["job"])] |= {line["s"] for line in chunk["lines"]}
    for follower in case.evidence.followers:
        for reason in _followed(follower, lines[follower.job], case.evidence.crashed_database):
            yield follower.job, reason


def _followed(follower: Follower, stored: set[int], crashed: bool) -> Iterator[str]:
    events = follower.events
    seqs = [event.seq for event in events if event.kind == "log"]
    if len(set(seqs)) != len(seqs):
        yield "a follower got a log line twice"
    if seqs != sorted(seqs):
        yield "a follower got log lines out of order"
    revs = [event.rev for event in events if event.kind == "state"]
    if revs != sorted(revs):
        yield f"a follower got states out of order: {revs}"
    closes = [number for number, event in enumerate(events) if event.kind == "close"]
    if follower.ended and len(closes) != 1:
        yield f"a follower got {len(closes)} ends"
    if closes and closes[0] != len(events) - 1:
        yield "a follower got events behind the end"
    yield from _gaps(seqs, stored, closed=bool(closes), crashed=crashed)


def _gaps(seqs: Sequence[int], stored: set[int], *, closed: bool, crashed: bool) -> Iterator[str]:
    wanted = stored if closed else {seq for seq in stored if seqs and seq <= seqs[-1]}
    missing = sorted(wanted - set(seqs))
    if missing:
        yield f"a follower missed {len(missing)} log lines, the first is {missing[0]}"
    if not crashed and (invented := set(seqs) - stored):
        yield f"a follower got {len(invented)} log lines that are not stored"


def c13_control(case: Case) -> Found:
    for each in case.operations("kill"):
        document = case.documents.get(each.target)
        if document is None:
            yield each.target, "was killed and is nowhere"
            continue
        if document["state"] not in ("killed", "complete"):
            yield each.target, f"its kill was acknowledged, it is {document['state']}"
        yield from _ended_by(case, each)
    for each in case.operations("remove"):
        document = case.documents.get(each.target)
        if document is None or not document.get("removed_at"):
            yield each.target, "its removal was acknowledged, it is not marked removed"
    for job, document in case.documents.items():
        asked = False
        for entry in document["history"]:
            asked = asked or (entry["state"] == "running" and entry["reason"] == "kill requested")
            if asked and _is_claim(entry):
                yield job, "was claimed again after its kill was requested"
    for job, notes in case.notes.items():
        for pid in {note.pid for note in notes} & case.evidence.alive:
            yield job, f"its process {pid} is still alive"


def _ended_by(case: Case, kill: Operation) -> Found:
    for note in case.notes.get(kill.target, ()):
        if note.what == "start" and note.at > kill.end + KILL_PATIENCE:
            yield kill.target, f"attempt {note.attempt} started {note.at - kill.end:.1f} s after the kill"


CHECKS: Mapping[str, Callable[[Case], Found]] = {
    "C1": c1_lost,
    "C2": c2_unexpected,
    "C3": c3_recovered,
    "C4": c4_one_outcome,
    "C5": c5_fenced,
    "C6": c6_executions,
    "C7": c7_drained,
    "C8": c8_chains,
    "C9": c9_fires,
    "C10": c10_messages,
    "C11": c11_moves,
    "C12": c12_followers,
    "C13": c13_control,
}


def figures(case: Case) -> dict[str, int]:
    """What the run was made of."""
    kinds = Counter(each.kind for each in case.evidence.operations)
    entries = [entry for document in case.documents.values() for entry in document["history"]]
    return {
        "jobs": len(case.documents),
        "ok": kinds["ok"],
        "fail": kinds["fail"],
        "info": kinds["info"],
        "recovered": sum(map(len, recovered(case).values())),
        "executions": sum(note.what == "start" for note in case.evidence.ledger),
        "leases": sum(map(_is_claim, entries)),
        "rescues": sum(_is_rescue(entry) for entry in entries),
        "killed": sum(document["state"] == "killed" for document in case.documents.values()),
        "followers": len(case.evidence.followers),
        "chained": sum(bool(document.get("chain_id")) for document in case.documents.values()),
    }


def steps(document: Document) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The entries that changed the state, each with the state before ("" for the first known)."""
    before = ""
    for entry in document["history"]:
        if entry["state"] != before or _is_claim(entry):
            yield before, entry
        before = entry["state"]


def whole(document: Document) -> bool:
    """True if the bounded history still has its beginning."""
    history = document["history"]
    return bool(history) and (history[0]["rev"] == 1 or len(history) < 200)


def _claims(document: Document) -> list[Mapping[str, Any]]:
    return [entry for entry in document["history"] if _is_claim(entry)]


def _is_claim(entry: Mapping[str, Any]) -> bool:
    return entry["state"] == "running" and entry["lease"] is not None


def _is_rescue(entry: Mapping[str, Any]) -> bool:
    reason = str(entry["reason"] or "")
    return entry["lease"] is None and (
        reason.startswith(("worker lost", "poison")) or "never started" in reason
    )


def _children(case: Case, document: Document) -> set[str]:
    """The ids that this job may have as the child of a restart of its parent, or by a hook of it."""
    parent = case.documents.get(str(document["enqueued"].get("parent_id")))
    if parent is None:
        return set()
    found = {restart_id(str(parent["_id"]), number) for number in range(parent.get("restarts", 0))}
    ends = parent["rev"] if parent.get("on_failure") else 0
    numbers = {
        "before": len(parent.get("run_before") or ()),
        "after": len(parent.get("run_after") or ()) if parent["state"] == "complete" else 0,
        "failure": ends,
    }
    return found | {
        chain_id(str(parent["_id"]), edge, n) for edge, most in numbers.items() for n in range(most)
    }


def restart_id(parent: str, number: int) -> str:
    """The id of the child of a parent's restart of this number, from 0: it keeps the parent's time."""
    return chain_id(parent, "restart", number)


def chain_id(parent: str, edge: str, number: int) -> str:
    """The id of a job that comes of another one by an edge of this number."""
    return _derived(parent, edge, number)


def fire_id(schedule: str, instant: datetime) -> str:
    """The id of the job that a schedule makes for an instant: it has the instant's time."""
    time = f"{int(instant.timestamp()):08x}" + "0" * 16
    return _derived(time, "schedule", schedule, instant.isoformat())


def _derived(head: str, *scope: object) -> str:
    text = "|".join(map(str, (head, *scope)))
    return head[:8] + hashlib.sha256(text.encode()).digest()[4:12].hex()


__all__ = ["Event", "Evidence", "Follower", "Note", "Operation", "Verdict", "Violation", "check"]
