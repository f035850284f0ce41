"""The states of a job and every legal move between them, as data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Literal


class State(StrEnum):
    """Where a job stands."""

    BLOCKED = "blocked"  # waits for its prerequisites
    PENDING = "pending"  # waits for a worker
    RUNNING = "running"  # held by a worker under a lease
    COMPLETE = "complete"  # final: returned a result
    FAILED = "failed"  # an attempt failed, another one follows at query_at
    ERROR = "error"  # final: the last attempt failed
    DEFERRED = "deferred"  # asked to be run later, due again at query_at
    KILLED = "killed"  # final: ended on request
    INACTIVE = "inactive"  # final: deferred past its window


FINAL = frozenset({State.COMPLETE, State.ERROR, State.KILLED, State.INACTIVE})
STOPPED = frozenset({State.ERROR, State.KILLED, State.INACTIVE})
WAITING = frozenset({State.PENDING, State.FAILED, State.DEFERRED})
IDLE = WAITING | {State.BLOCKED}  # nobody holds the job and it has no outcome yet


Flag = Literal["wall", "zombie"]  # what a running job may be marked with: too long, too silent


@dataclass(frozen=True)
class Move:
    """One legal move: from any of `sources` to one of `targets`; `held` moves need the lease."""

    sources: frozenset[State]
    targets: frozenset[State]
    held: bool


def _move(sources: frozenset[State] | set[State], *targets: State, held: bool = False) -> Move:
    return Move(frozenset(sources), frozenset(targets), held)


_RUNNING = {State.RUNNING}

MOVES = MappingProxyType(
    {
        "claim": _move(WAITING, State.RUNNING),
        # By whoever makes a job wait for this one: its end has to be told.
        "await": _move(IDLE | {State.RUNNING}, *(IDLE | {State.RUNNING})),
        # By the end of a prerequisite: one less to wait for, or none; or it failed, and so does this one.
        "unblock": _move({State.BLOCKED}, State.BLOCKED, State.PENDING),
        "depend": _move({State.BLOCKED}, State.ERROR),
        "start": _move(_RUNNING, State.RUNNING, held=True),
        "progress": _move(_RUNNING, State.RUNNING, held=True),
        "release": _move(_RUNNING, State.PENDING, State.KILLED, State.ERROR, held=True),
        "finish": _move(
            _RUNNING, State.COMPLETE, State.FAILED, State.ERROR, State.DEFERRED, State.KILLED, held=True
        ),
        # The holder notes that the job runs too long, or has been silent too long; it goes on.
        "flag_wall": _move(_RUNNING, State.RUNNING, held=True),
        "flag_zombie": _move(_RUNNING, State.RUNNING, held=True),
        # By whoever finds the holder dead; guarded by the dead holder's lease.
        "rescue": _move(_RUNNING, State.PENDING, State.ERROR, State.KILLED, held=True),
        # The same of a job that nobody holds: a hand in the database.
        "reclaim": _move(_RUNNING, State.PENDING, State.ERROR, State.KILLED),
        "mend": _move(frozenset(State), *State),  # makes a document right again, keeps the state
        # By the claimant, before the start: the job is paused or over a limit and leaves the line.
        # By the claimant, before the start: one of the slots of `max_running`.
        "take_slot": _move(_RUNNING, State.RUNNING, held=True),
        "wake": _move(WAITING, *WAITING),  # a slot is free, or time has passed: back in line
        "put_aside": _move(_RUNNING, State.PENDING, State.KILLED, held=True),
        "flag_kill": _move(_RUNNING, State.RUNNING),
        "kill": _move(IDLE, State.KILLED),
        "expire": _move({State.DEFERRED}, State.INACTIVE),
        "retire": _move(STOPPED, *STOPPED),  # to the journal after a time, keeps the state
        "retry": _move({State.FAILED, State.DEFERRED}, State.FAILED, State.DEFERRED),
        "restart": _move(FINAL, *FINAL),  # names the child, keeps the state
        "wish_restart": _move(_RUNNING, State.RUNNING),  # while a kill is under way
        "remove": _move(IDLE | STOPPED, *(IDLE | STOPPED)),  # to the journal, keeps the state
        "wish_remove": _move(_RUNNING, State.RUNNING),
        "consume": _move(FINAL | IDLE, *(FINAL | IDLE)),  # the result was pulled, keeps the state
        "settle": _move(frozenset(State), *State),  # housekeeping of the outbox, keeps the state
    }
)


def highstate(state: str) -> str | None:
    """The board a job is shown on: waiting, running, stopped; None for complete (core4's reading)."""
    if state in IDLE:
        return "waiting"
    if state == State.RUNNING:
        return "running"
    return "stopped" if state in STOPPED else None
