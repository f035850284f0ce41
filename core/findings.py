"""What `core4 doctor` may find: each kind with what a repair does and what an operator can do. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Kind:
    """One kind of finding. `repair` is what --repair does, None if it does nothing; `advice` is for people.

    ``wrong`` kinds are never legal at rest; the others wait for something, and this is what for.
    """

    meaning: str
    repair: str | None
    advice: str | None = None
    wrong: bool = True


_KILL = "kill it: its worker ends it; run doctor again then"
_SCHEDULER = "start a worker with CORE4_SCHEDULER on, or read the log of one that is up"

KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "line": Kind(
            "a waiting job that no worker sees, or a job in line that must not be", "its place in line"
        ),
        "rank": Kind("a place in line that does not fit priority and force", "the rank is made anew"),
        "unique_key": Kind(
            "a job without the place of its name and arguments, or one that keeps it for nothing",
            "the place is taken or freed",
            "remove one of the two jobs",
        ),
        "lease": Kind("a lease on a job that does not run", "the lease is taken away"),
        "no_lease": Kind("a running job that nobody holds", "it goes back as from a dead worker"),
        "orphan": Kind("a running job whose worker is gone", "it goes back in line, or ends as poison"),
        "slot": Kind("a slot of max_running held by a job that does not run", "the slot is freed"),
        "no_slot": Kind(
            "a running job without a slot of its max_running", None, "wait for its end, or kill it"
        ),
        "unsettled": Kind(
            "a job that has ended and does not leave, or whose children are not made", "both is done"
        ),
        "twice": Kind("a job in the queue that the journal has as ended", "the queue's is deleted"),
        "journal_open": Kind("a job in the journal without an end", "it goes back to the queue"),
        "overdue": Kind("a job whose time has come and that is not in line", "it is put in line"),
        "expired": Kind("a deferred job past its window", "it ends as inactive"),
        "killed": Kind("a waiting job whose kill was acknowledged", "it ends as killed"),
        "kill_overdue": Kind(
            "a running job that its worker should have killed",
            None,
            "end that worker: its jobs go back or end",
        ),
        "child_missing": Kind("a child that its parent names and that does not exist", "the child is made"),
        "fence": Kind(
            "a fence below what was granted: log lines would get old numbers", "it is raised", _KILL
        ),
        "rev": Kind("a revision below the history's: followers would miss changes", "it is raised"),
        "history": Kind(
            "a history that does not lead to the state",
            None,
            "see the job; restart it if its work is missing, else remove it",
        ),
        "unreadable": Kind(
            "a document that is none of a job", None, "look at it in the database, and delete it"
        ),
        "pause_gone": Kind("jobs held for a pause that has ended", "they go back in line"),
        "slot_free": Kind("jobs held for a limit that has free slots", "as many as fit go back in line"),
        "rate_free": Kind("jobs held by a rate limit that nobody looks after", "they are looked after"),
        "silent": Kind(
            "a worker that is up and does not renew",
            "it is watched for CORE4_DEAD_AFTER seconds and declared dead, its jobs go back",
        ),
        "log_orphan": Kind("log lines of a job that does not exist", "they are deleted"),
        "index": Kind("an index that is missing", "it is made"),
        "schedule_late": Kind("a schedule whose time has long passed", None, _SCHEDULER),
        "schedule_broken": Kind(
            "a schedule that cannot be read", None, "set it anew with `core4 schedule set`"
        ),
        "unserved": Kind("jobs that wait for a worker", None, "start a worker for them", wrong=False),
        "paused": Kind("jobs that wait for the end of a pause", None, "`core4 resume`", wrong=False),
    }
)


@dataclass(frozen=True)
class Finding:
    """One thing that stands wrong or waits. `subject` is job, jobs, worker, schedule, log or index."""

    kind: str
    subject: str
    id: str
    reason: str
    name: str | None = None
    since: datetime | None = None
    advice: str | None = None
    repairable: bool = True

    @property
    def key(self) -> tuple[str, str, str]:
        """What two looks at the same thing share."""
        return self.kind, self.subject, self.id

    @property
    def wrong(self) -> bool:
        """False for what only waits."""
        return KINDS[self.kind].wrong

    @property
    def repair(self) -> str | None:
        """What a repair does; None if there is none."""
        return KINDS[self.kind].repair if self.repairable else None

    def view(self) -> dict[str, Any]:
        """The finding as readers get it."""
        return {
            "kind": self.kind,
            "wrong": self.wrong,
            "subject": self.subject,
            "_id": self.id,
            "name": self.name,
            "reason": self.reason,
            "since": self.since,
            "repair": self.repair,
            "advice": None if self.repair else self.advice or KINDS[self.kind].advice,
        }


@dataclass(frozen=True)
class Report:
    """What remains, what was repaired, and how many findings more there are than are told."""

    findings: tuple[Finding, ...]
    repaired: tuple[Finding, ...] = ()
    more: int = 0

    @property
    def wrong(self) -> int:
        """How many of the findings are wrong and not only waiting."""
        return sum(finding.wrong for finding in self.findings) + self.more

    def view(self) -> dict[str, Any]:
        """The report as readers get it."""
        return {
            "wrong": self.wrong,
            "findings": [finding.view() for finding in self.findings],
            "repaired": [finding.view() for finding in self.repaired],
            "more": self.more,
        }
