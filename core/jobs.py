"""The job: one document of the queue or the journal, as values.

No I/O here. The fields keep core4's names; what is added is described at the field.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from bson import ObjectId

from core4.options import DEFAULTS, PRIORITY_LIMIT, Rate, stored
from core4.results import has_ended
from core4.states import State, highstate

NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,100}")
HISTORY_LIMIT = 200  # transitions kept on a document; the oldest go first

# Log sequence numbers: the fence in the high bits, a counter in the low ones. Both fit into
# the 53 bits that JavaScript's numbers hold exactly.
SEQ_BITS = 32

ROW_FIELDS = (
    "_id name started_at finished_at runtime force worker attempts_left attempts enqueued priority state "
    "trial prog args inactive_at zombie_at killed_at removed_at wall_at namespace query_at held due "
    "error_cat rev request_id"
).split()


def utcnow() -> datetime:
    """The time of this machine, cut to the milliseconds that the database keeps."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


@dataclass(frozen=True)
class Kind:
    """How a worker was started, and what it was told then.

    Args:
        type: one of inprocess, subprocess, tmux.
        nr: the number it wants; it gets another one if that is taken.
        timeout: seconds that any job may run on it; None for any.
        debug: it serves the debug jobs and nothing else.
        launch: made by whoever started it and looks after it; None if nobody does.
    """

    type: str = "inprocess"
    nr: int | None = None
    timeout: float | None = None
    debug: bool = False
    launch: str | None = None


@dataclass(frozen=True)
class Owner:
    """Who holds a lease: one process from its start to its end.

    ``id`` is made anew at each start: host names and pids come back, and with them a stranger's leases.
    """

    id: str
    worker: str
    hostname: str
    pid: int
    kind: Kind = Kind()


@dataclass(frozen=True)
class Lease:
    """The right of one owner to write a running job; `id` is made by the claimant."""

    id: str
    owner: str
    at: datetime

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Lease:
        return cls(id=document["id"], owner=document["owner"], at=document["at"])


@dataclass(frozen=True, kw_only=True)
class JobOrder:
    """What is to be enqueued. `options` are the effective ones; what is absent takes its default."""

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    namespace: str = "DEFAULT"
    options: Mapping[str, Any] = field(default_factory=dict)
    unique: bool = True
    keep_stopped: bool = True
    username: str = ""
    hostname: str = ""
    request_id: str | None = None
    request_hash: str | None = None  # of the body, where the client may send the same request again
    parent_id: ObjectId | None = None
    category: str | None = None
    schedule_id: str | None = None
    signature: str | None = None  # what the arguments were checked against, see core4.signatures.digest
    dependencies: Sequence[ObjectId] = ()  # jobs that have to complete before this one starts
    retry_policy: str | None = None
    run_before: Sequence[str] = ()  # hooks of a task, and what is to be known of them: see core4.chains
    run_after: Sequence[str] = ()
    on_failure: str | None = None
    hooks: Sequence[Mapping[str, Any]] = ()
    chain_id: ObjectId | None = None
    consumed_by: ObjectId | None = None  # a job that waits for it and takes its result: nobody else gets that
    fence: int | None = None  # the fence of that job's attempt, if it has called this one
    place: int | None = None  # the rank of that job: with it, it stands in line since that one does
    depth: int = 0  # how many jobs wait for one another above it
    label: str | None = None  # a name of the caller's, which only one of his open jobs may have
    function: Mapping[str, Any] | None = None  # the shipped function that it calls: see core4.functions


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job document, frozen; `document` is all that is stored."""

    id: ObjectId
    name: str
    args: Mapping[str, Any]
    state: State
    namespace: str
    worker: str | None
    attempts: int
    attempts_left: int
    trial: int
    crashes: int
    claims: int
    fence: int
    rev: int
    rank: int
    priority: int
    force: bool
    max_parallel: int | None
    progress_interval: float
    error_time: float
    backoff: float
    error_time_max: float
    jitter: float
    timeout: float | None
    memory_limit: int | None
    zombie_time: float
    zombie_action: str
    wall_time: float | None
    wall_action: str
    defer_time: float
    defer_max: float
    max_crashes: int | None
    lease: Lease | None
    unique_key: str | None
    keep_stopped: bool
    log_seq: int
    runtime: float
    started_at: datetime | None
    inactive_at: datetime | None
    killed_at: datetime | None
    removed_at: datetime | None
    journal: bool
    document: Mapping[str, Any]

    @classmethod
    def from_document(cls, document: Mapping[str, Any], *, journal: bool = False) -> Job:
        """The job a stored document describes."""
        lease = document.get("lease")
        job = cls.__new__(cls)
        # Not by `__init__`: of a frozen class it takes three times as long, and each step of a job does this.
        job.__dict__.update(
            id=document["_id"],
            name=document["name"],
            args=document["args"],
            state=State(document["state"]),
            namespace=document["namespace"],
            worker=document.get("worker"),
            attempts=document["attempts"],
            attempts_left=document["attempts_left"],
            trial=document["trial"],
            crashes=document.get("crashes", 0),
            claims=document.get("claims", 0),
            fence=document["fence"],
            rev=document["rev"],
            rank=document["rank"],
            priority=document["priority"],
            force=document["force"],
            max_parallel=document.get("max_parallel"),
            progress_interval=document["progress_interval"],
            error_time=document["error_time"],
            backoff=_option(document, "backoff"),
            error_time_max=_option(document, "error_time_max"),
            jitter=_option(document, "jitter"),
            timeout=_option(document, "timeout"),
            memory_limit=_option(document, "memory_limit"),
            zombie_time=_option(document, "zombie_time"),
            zombie_action=_option(document, "zombie_action"),
            wall_time=_option(document, "wall_time"),
            wall_action=_option(document, "wall_action"),
            defer_time=document["defer_time"],
            defer_max=document["defer_max"],
            max_crashes=_option(document, "max_crashes"),
            lease=Lease.from_document(lease) if lease else None,
            unique_key=document.get("unique_key"),
            keep_stopped=document.get("keep_stopped", True),
            log_seq=document["log_seq"],
            runtime=document.get("runtime") or 0.0,
            started_at=document.get("started_at"),
            inactive_at=document.get("inactive_at"),
            killed_at=document.get("killed_at"),
            removed_at=document.get("removed_at"),
            journal=journal,
            document=document,
        )
        return job

    @property
    def username(self) -> str:
        """Who enqueued the job."""
        return str(self.document["enqueued"].get("username") or "")

    @property
    def evicted(self) -> int:
        """How often the host it ran on inline ended, and not by its doing."""
        return int(self.document.get("evicted", 0))

    @property
    def outbox(self) -> Sequence[Mapping[str, Any]]:
        """What has to be done to other documents."""
        found: Sequence[Mapping[str, Any]] = self.document.get("outbox", ())
        return found

    @property
    def has_ended(self) -> bool:
        """True if nothing more will come of the job: it has an outcome, or was removed without one."""
        return has_ended(self.document)

    def slots(self) -> list[str]:
        """The slots of which the job needs one to run; none for a job without `max_running`."""
        limit, key = self.document.get("max_running"), self.document.get("slot_key")
        return [f"{key}#{n}" for n in range(limit)] if limit and key else []

    @property
    def rate_limit(self) -> Rate | None:
        """How often jobs of this name may be started."""
        text = self.document.get("rate_limit")
        return Rate.parse(text) if text else None

    def held_by(self, lease_id: str) -> bool:
        """True while the lease of this id holds the job."""
        return self.lease is not None and self.lease.id == lease_id

    def written_by(self, lease_id: str) -> bool:
        """True if the lease of this id has recorded how its attempt ended."""
        history: Sequence[Mapping[str, Any]] = self.document.get("history", ())
        return any(entry.get("lease") == lease_id and entry["state"] != State.RUNNING for entry in history)


def _option(document: Mapping[str, Any], name: str) -> Any:
    """An option that documents of older versions do not have."""
    return document.get(name, DEFAULTS[name])


def new_document(order: JobOrder, job_id: ObjectId, now: datetime) -> dict[str, Any]:
    """The queue document of a job just enqueued."""
    options = stored(order.options)
    pinned = options["worker"] is not None
    document: dict[str, Any] = {
        "_id": job_id,
        "name": order.name,
        "args": dict(order.args),
        "_hash": args_hash(order.args),
        "state": State.PENDING.value,
        "namespace": order.namespace,
        **options,
        "rank": rank(force=options["force"], priority=options["priority"]),
        "attempts_left": options["attempts"],
        "trial": 0,
        "crashes": 0,
        "claims": 0,
        "fence": 0,
        "rev": 1,
        "log_seq": 0,
        "enqueued": {
            "at": now,
            "hostname": order.hostname,
            "username": order.username,
            "parent_id": order.parent_id,
        },
        "unique": order.unique,
        "keep_stopped": order.keep_stopped,
        "category": order.category,
        "request_id": order.request_id,
        **({"request_hash": order.request_hash} if order.request_hash else {}),
        "started_at": None,
        "finished_at": None,
        "runtime": None,
        "inactive_at": None,
        "killed_at": None,
        "removed_at": None,
        "zombie_at": None,
        "wall_at": None,
        "locked": None,
        "prog": {"value": None, "message": None},
        "last_error": None,
        "error_cat": None,
        "result": None,
        "sources": [],
        "history": [entry(1, State.PENDING, attempt=0, at=now, by=order.username)],
    }
    # A job for one worker is never in the index that the others claim from.
    document.update({"held": "worker"} if pinned else {"due": True})
    if order.schedule_id is not None:
        document["schedule_id"] = order.schedule_id
    chained = {
        "signature": order.signature,
        "dependencies": list(order.dependencies),
        "retry_policy": order.retry_policy,
        "run_before": list(order.run_before),
        "run_after": list(order.run_after),
        "on_failure": order.on_failure,
        "hooks": list(order.hooks),
        "chain_id": order.chain_id,
    }
    if order.consumed_by is not None:
        taken: dict[str, Any] = {
            "at": now,
            "by": f"job {order.consumed_by}",
            "id": str(order.consumed_by),
        }
        taken |= {} if order.fence is None else {"fence": order.fence}
        document |= {"consumed": taken, "awaited": True, "depth": order.depth}
    if order.place is not None:
        document["rank"] = in_place(document["rank"], order.place)
    # Most jobs hang together with no other: they do not pay for it.
    document.update({name: value for name, value in chained.items() if value})
    if options["max_running"] is not None:
        document["slot_key"] = options["max_running_key"] or order.name
    if order.label is not None:
        document["label"] = order.label
    if order.function is not None:
        document["function"] = dict(order.function)
    if order.unique:
        document["unique_key"] = unique_key_of(document)
    return document


def entry(
    rev: int,
    state: State,
    *,
    attempt: int,
    at: datetime,
    worker: str | None = None,
    reason: str | None = None,
    lease: str | None = None,
    log_seq: int = 0,
    by: str | None = None,
    ended: str | None = None,
    started: datetime | None = None,
) -> dict[str, Any]:
    """One line of a job's history: the transition that revision `rev` made, and why.

    `lease` is that of the holder who wrote it. A line with which an attempt ended, whoever wrote it, has
    the lease that `ended` and when the attempt had `started`; one that never started has no start.
    """
    end = {} if ended is None else {"ended": ended, "started": started}
    return {
        "rev": rev,
        "state": state.value,
        "attempt": attempt,
        "worker": worker,
        "at": at,
        "reason": reason,
        "lease": lease,
        "log_seq": log_seq,
        "by": by,
        **end,
    }


_EPOCH = datetime(2025, 1, 1, tzinfo=UTC)
_TIME_BITS = 50  # microseconds: 35 years
_PRIORITY_BITS = 11
FORCED_BELOW = 1 << (_PRIORITY_BITS + _TIME_BITS)  # the rank of every job with force, and of no other


def rank(*, force: bool, priority: int, at: datetime | None = None) -> int:
    """Where a job stands in line, lowest first: force, then priority, then enqueue time, in one int64."""
    elapsed = (datetime.now(UTC) if at is None else at) - _EPOCH
    micros = (elapsed.days * 86400 + elapsed.seconds) * 1_000_000 + elapsed.microseconds
    urgency: int = (0 if force else 1) << _PRIORITY_BITS | (PRIORITY_LIMIT - priority)
    return urgency << _TIME_BITS | (micros & ((1 << _TIME_BITS) - 1))


def in_place(own: int, other: int) -> int:
    """The rank of a job that stands in line since another does, with force and priority of its own."""
    mask = (1 << _TIME_BITS) - 1
    return own & ~mask | other & mask


def urgency(rank: int) -> int:
    """The part of a rank that force and priority make, without the time."""
    return rank >> _TIME_BITS


# Made once: `json.dumps` makes one for each call.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical(value: Any) -> str:
    """One text for equal JSON values, whatever the order of their keys."""
    return _CANONICAL.encode(value)


def too_deep(value: Any, most: int) -> bool:
    """True if lists and objects in a JSON value are nested deeper than `most` levels."""
    level = [value]
    for _ in range(most + 1):
        level = [child for item in level for child in _children(item)]
        if not level:
            return False
    return True


def _children(item: Any) -> Iterable[Any]:
    if isinstance(item, Mapping):
        return item.values()
    return item if isinstance(item, list | tuple) else ()


def args_hash(args: Mapping[str, Any]) -> str | None:
    """Hash of the arguments, None for none (core4's `_hash`, by SHA-256)."""
    return hashlib.sha256(canonical(dict(args)).encode()).hexdigest() if args else None


def unique_key(name: str, args: Mapping[str, Any]) -> str:
    """What two jobs must share to be the same job."""
    return hashlib.sha256(canonical([name, dict(args)]).encode()).hexdigest()


def unique_key_of(document: Mapping[str, Any]) -> str:
    """The `unique_key` of a stored job that has one: by its user's label, or by its name and arguments."""
    label = document.get("label")
    if label is not None:
        by = str((document.get("function") or {}).get("by", "")).lower()
        return unique_key("label", {by: label})
    return unique_key(document["name"], document["args"])


def derived_id(*scope: object) -> ObjectId:
    """The id that belongs to this scope, the same wherever and however often it is derived.

    Behind another id it keeps that one's time, so that a listing by `_id` shows the two together.
    """
    digest = hashlib.sha256("|".join(str(part) for part in scope).encode()).digest()
    head = scope[0].binary[:4] if isinstance(scope[0], ObjectId) else digest[:4]
    return ObjectId(head + digest[4:12])


def seq_fence(seq: int) -> int:
    """The fence of the attempt that wrote the log line of this number."""
    return seq >> SEQ_BITS


def first_seq(fence: int) -> int:
    """The number of the first log line an attempt may write."""
    return (fence << SEQ_BITS) + 1


def view(document: Mapping[str, Any], *, journal: bool, now: datetime) -> dict[str, Any]:
    """A stored document as readers get it: named and enriched as core4 does (core4.md 1.2)."""
    row = dict(document)
    row["qual_name"] = row.pop("name")
    row.setdefault("query_at", None)
    row["highstate"] = highstate(row["state"])
    row["flag"] = {
        "zombie": bool(row.get("zombie_at")),
        "killed": bool(row.get("killed_at")),
        "removed": bool(row.get("removed_at")),
        "nonstop": bool(row.get("wall_at")),
    }
    row["age"] = (now - row["enqueued"]["at"]).total_seconds()
    prog = row.get("prog") or {}
    row["prog"] = {"value": prog.get("value") or 0.0, "message": prog.get("message")}
    row["journal"] = journal
    return row
