"""What becomes of a job that ran: an outcome and the job's limits give the next state. Pure."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from core4.jobs import Job
from core4.states import State

ErrorCat = Literal["ERROR", "TIMEOUT", "CRASH", "HALTED", "DEPENDENCY"]


@dataclass(frozen=True)
class Outcome:
    """How one attempt ended. Build it with one of the constructors below."""

    kind: Literal["complete", "failed", "deferred", "killed"]
    result: Any = None
    exception: str | None = None
    traceback: list[str] | None = None
    error_cat: ErrorCat | None = None

    @classmethod
    def complete(cls, result: Any) -> Outcome:
        """The job returned `result` (JSON)."""
        return cls("complete", result=result)

    @classmethod
    def failed(cls, exception: str, traceback: list[str], error_cat: ErrorCat = "ERROR") -> Outcome:
        """The job raised; `exception` is its repr."""
        return cls("failed", exception=exception, traceback=traceback, error_cat=error_cat)

    @classmethod
    def crashed(cls, reason: str, traceback: list[str] | None = None) -> Outcome:
        """The job's process ended by itself without a result."""
        return cls("failed", exception=reason, traceback=traceback, error_cat="CRASH")

    @classmethod
    def timed_out(cls, reason: str, traceback: list[str] | None = None) -> Outcome:
        """The worker ended the attempt because it took too long."""
        return cls("failed", exception=reason, traceback=traceback, error_cat="TIMEOUT")

    @classmethod
    def deferred(cls, message: str) -> Outcome:
        """The job asked to be run later."""
        return cls("deferred", exception=message)

    @classmethod
    def killed(cls, reason: str) -> Outcome:
        """The worker ended the job on request."""
        return cls("killed", exception=reason)


@dataclass(frozen=True)
class Decision:
    """The state a job goes to, what is left of its attempts and when it is due again, None for at once."""

    state: State
    attempts_left: int
    query_at: datetime | None = None


def decide(job: Job, outcome: Outcome, now: datetime) -> Decision:
    """The next state of a running `job` after `outcome` at `now`.

    A result that arrives under a kill flag stands: the job was faster. A failure under a kill flag is
    the kill's doing, or would be retried against the user's wish: both end as killed.
    """
    left = job.attempts_left - 1
    if outcome.kind == "complete":
        return Decision(State.COMPLETE, max(left, 0))
    if outcome.kind == "killed" or job.killed_at is not None:
        return Decision(State.KILLED, job.attempts_left)
    if outcome.kind == "deferred":
        return Decision(State.DEFERRED, job.attempts_left, now + timedelta(seconds=job.defer_time))
    if left > 0:
        delay = retry_delay(job, left)
        return Decision(State.FAILED, left, now + timedelta(seconds=delay) if delay else None)
    return Decision(State.ERROR, 0)


def retry_delay(job: Job, left: int) -> float:
    """Seconds until the next attempt of a `job` that failed and has `left` attempts.

    `error_time` after the first failure, `backoff` times longer after each further one, up to
    `error_time_max`; `jitter` takes off up to that share. The same for the same attempt whenever it is
    asked: a decision that is made again must not differ.
    """
    failures = job.attempts - left
    try:
        grown = job.error_time * job.backoff ** max(failures - 1, 0)
    except OverflowError:
        grown = math.inf
    # The cap is for what backoff makes of it: an error_time above it was asked for.
    delay = max(min(grown, job.error_time_max), job.error_time)
    return float(delay * (1 - job.jitter * _share(job)))


def _share(job: Job) -> float:
    """A number from 0 to 1, below 1, that looks random and belongs to one attempt of one job."""
    digest = hashlib.sha256(f"{job.id}|{job.trial}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
