"""The judge itself: a clean history passes, and each broken promise is found under its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from core4 import schedules
from tests.chaos.checker import CHECKS, chain_id, check, fire_id, restart_id
from tests.chaos.evidence import Event, Evidence, Follower, Note, Operation, opened, read_history

JOB, CHILD = "a" * 24, restart_id("a" * 24, 0)


def entry(rev: int, state: str, lease: str | None = None, **more: Any) -> dict[str, Any]:
    return {"rev": rev, "state": state, "lease": lease, "log_seq": 0, "reason": None, **more}


# Two executions: the first worker was lost, the second one finished.
HISTORY = (
    entry(1, "pending"),
    entry(2, "running", "lease-1"),
    entry(4, "pending", reason="worker lost"),
    entry(6, "running", "lease-2"),
    entry(8, "complete", "lease-2", log_seq=20),
)


def document(job: str = JOB, history: tuple[Mapping[str, Any], ...] = HISTORY, **more: Any) -> dict[str, Any]:
    claims = [each for each in history if each["lease"] and each["state"] == "running"]
    return {
        "_id": job,
        "state": history[-1]["state"],
        "args": {"key": "k1"},
        "enqueued": {"parent_id": None},
        "trial": len(claims),
        "attempts": 1,
        "fence": len(claims),
        "rev": history[-1]["rev"],
        "history": list(history),
        "result": {"token": "t2"} if history[-1]["state"] == "complete" else None,
        **more,
    }


def asked(op: str, target: str, kind: Any = "ok", *, at: float = 1.0, **more: Any) -> Operation:
    return Operation("client", op, target, kind, at, at + 0.5, **more)


ENQUEUED = asked("enqueue", "k1", result=JOB)
LEDGER = (
    Note("start", JOB, 1, "t1", 11, 2.0),
    Note("start", JOB, 2, "t2", 12, 8.0),
    Note("end", JOB, 2, "t2", 12, 9.0),
)
FOLLOWER = Follower(
    JOB,
    (
        Event(1, "state", 2, 0),
        Event(1, "log", 2, 10),
        Event(2, "log", 2, 20),
        Event(2, "state", 8, 20),
        Event(2, "close", 8, 21),
    ),
)
CLEAN = Evidence(
    operations=(
        ENQUEUED,
        asked("claim", JOB, lease="lease-1", at=2),
        asked("claim", JOB, lease="lease-2", at=6),
        asked("finish", JOB, "fail", lease="lease-1", at=7),
        asked("finish", JOB, lease="lease-2", at=8),
    ),
    ledger=LEDGER,
    journal=(document(),),
    log=({"job": JOB, "lines": [{"s": 10}, {"s": 20}]},),
    followers=(FOLLOWER,),
)
KILLED = document(
    history=(*HISTORY[:4], entry(7, "running", reason="kill requested"), entry(9, "killed", "lease-2"))
)


def test_clean_evidence_passes() -> None:
    """A lost worker, a refused finish and a reconnected follower are no violation."""
    verdict = check(CLEAN)

    assert verdict.ok, str(verdict)
    assert verdict.figures["jobs"] == 1
    assert verdict.figures["rescues"] == 1
    assert verdict.figures["leases"] == 2


def test_one_job_of_a_message_sent_twice_passes() -> None:
    assert check(
        replace(
            CLEAN,
            operations=(MESSAGE, asked("message", "k1", "info"), *CLEAN.operations[1:]),
            journal=(document(request_id="m1"),),
        )
    ).ok


def test_a_chain_and_a_fan_in_pass() -> None:
    for evidence in (chained(), gathered()):
        verdict = check(replace(evidence, followers=()))

        assert verdict.ok, str(verdict)


def test_more_clean_evidence_passes() -> None:
    """An unknown enqueue that came out, a killed job, a removed one, a restarted one and its child."""
    parent = document(history=(*HISTORY[:4], entry(8, "error", "lease-2")), restarts=1)
    parent["enqueued"] = {"parent_id": None, "child_id": CHILD}
    child = document(CHILD, enqueued={"parent_id": JOB}, result=None)
    waited = document(
        "b" * 24, (entry(1, "pending"), entry(2, "killed"), entry(3, "killed")), args={"key": "k2"}
    )
    removed = document("c" * 24, (entry(1, "pending"), entry(2, "pending")), args={"key": "k3"}, removed_at=3)
    verdict = check(
        Evidence(
            operations=(
                ENQUEUED,
                asked("enqueue", "k2", "info"),
                asked("enqueue", "k2", "info"),
                asked("enqueue", "k3", result="c" * 24),
                asked("restart", JOB, result=CHILD),
                asked("kill", "b" * 24),
                asked("remove", "c" * 24),
            ),
            ledger=(*LEDGER[:2],),
            journal=(parent, child, waited, removed),
        )
    )

    assert verdict.ok, str(verdict)
    assert verdict.figures["recovered"] == 1


def with_history(*entries: Mapping[str, Any], **more: Any) -> Evidence:
    return replace(CLEAN, journal=(document(history=entries, **more),), operations=(ENQUEUED,), followers=())


def with_events(*events: Event, ended: bool = True) -> Evidence:
    return replace(CLEAN, followers=(Follower(JOB, events, ended),))


def with_operations(*operations: Operation, **more: Any) -> Evidence:
    return replace(CLEAN, operations=(ENQUEUED, *operations), **more)


def with_notes(*notes: Note) -> Evidence:
    return replace(CLEAN, ledger=notes)


NEXT = chain_id(JOB, "after", 0)
ONE, TWO = (chain_id(JOB, "before", n) for n in range(2))


def chained(job: str = NEXT, *, parent: Mapping[str, Any] | None = None, **more: Any) -> Evidence:
    """A job that completed at 9, and its follower."""
    waiting = (entry(1, "pending"), entry(2, "killed"))
    given: dict[str, Any] = {"enqueued": {"parent_id": JOB, "at": 9}, "args": {"token": "t2"}, **more}
    first = document(run_after=["t:next"], finished_at=9, **(parent or {}))
    return replace(CLEAN, journal=(first, document(job, waiting, **given)))


def gathered(**one: Mapping[str, Any] | None) -> Evidence:
    """A job that began at 5 when two others had completed; what is different about `one` of them."""
    history = (entry(1, "blocked"), entry(2, "pending"), *(replaced_at(each, 5) for each in HISTORY[1:]))
    parent = document(history=history, run_before=["t:one", "t:two"])
    more: dict[str, Any] = {"enqueued": {"parent_id": JOB}, "result": None, "finished_at": 4}
    rows = [document(TWO, **more)]
    if (different := one.get("one", {})) is not None:
        rows.append(document(ONE, **{**more, **different}))
    return replace(CLEAN, journal=(parent, *rows))


def replaced_at(each: Mapping[str, Any], at: float) -> dict[str, Any]:
    return {**each, "rev": each["rev"] + 1, "at": at}


E1, E2, E3, E4, E5 = HISTORY
MESSAGE = asked("message", "k1", result="m1")


BROKEN: Mapping[str, tuple[str, Callable[[], Evidence]]] = {
    "lost": ("C1", lambda: replace(CLEAN, journal=(), ledger=(), followers=())),
    "lost-child": ("C1", lambda: with_operations(asked("restart", JOB, result=CHILD))),
    "unexpected": ("C2", lambda: replace(CLEAN, operations=())),
    "child-of-nobody": (
        "C2",
        lambda: replace(
            CLEAN, journal=(document(), document("d" * 24, enqueued={"parent_id": JOB}, result=None))
        ),
    ),
    "child-that-its-parent-forgot": (
        "C2",
        lambda: with_operations(
            asked("restart", JOB, result=CHILD),
            journal=(document(restarts=1), document(CHILD, enqueued={"parent_id": JOB}, result=None)),
        ),
    ),
    "two-jobs-of-one-request": (
        "C3",
        lambda: replace(
            CLEAN, journal=(document(), document("d" * 24, result=None)), operations=(ENQUEUED,), followers=()
        ),
    ),
    "follower-that-is-nowhere": ("C8", lambda: replace(CLEAN, journal=(document(run_after=["t:next"]),))),
    "follower-too-early": ("C8", lambda: chained(enqueued={"parent_id": JOB, "at": 8})),
    "follower-with-other-arguments": ("C8", lambda: chained(args={"token": "t1"})),
    "follower-of-a-failure": ("C2", lambda: chained(parent={"state": "error"})),
    "follower-twice": ("C2", lambda: chained("d" * 24)),
    "fan-in-without-one": ("C8", lambda: gathered(one=None)),
    "fan-in-with-a-failure": ("C8", lambda: gathered(one={"state": "error"})),
    "fan-in-too-early": ("C8", lambda: gathered(one={"finished_at": 6})),
    "begun-before-its-prerequisite": (
        "C8",
        lambda: replace(CLEAN, journal=(document(dependencies=[CHILD]),)),
    ),
    "in-both": ("C4", lambda: replace(CLEAN, queue=(document(),))),
    "two-outcomes": ("C4", lambda: with_history(*HISTORY, entry(9, "error", "lease-2"))),
    "no-outcome-told": ("C4", lambda: with_history(*HISTORY[:4], state="complete")),
    "outcome-of-an-older-lease": ("C4", lambda: with_history(*HISTORY[:4], entry(8, "complete", "lease-1"))),
    "outcome-by-nobody": ("C4", lambda: with_history(*HISTORY[:4], entry(8, "complete"))),
    "stranger's-result": ("C4", lambda: replace(CLEAN, journal=(document(result={"token": "t9"}),))),
    "older-result": (
        "C4",
        lambda: replace(
            CLEAN,
            ledger=(*LEDGER, Note("end", JOB, 1, "t1", 11, 9.1)),
            journal=(document(result={"token": "t1"}),),
        ),
    ),
    "stale-progress": (
        "C5",
        lambda: replace(CLEAN, operations=(*CLEAN.operations, asked("progress", JOB, lease="lease-1", at=7))),
    ),
    "refused-and-recorded": ("C5", lambda: with_operations(asked("finish", JOB, "fail", lease="lease-2"))),
    "acknowledged-and-lost": ("C5", lambda: with_operations(asked("finish", JOB, lease="lease-1"))),
    "started-twice": ("C6", lambda: with_notes(*LEDGER, Note("start", JOB, 2, "t3", 13, 9.5))),
    "too-many-starts": ("C6", lambda: with_notes(*LEDGER, Note("start", JOB, 3, "t3", 13, 9.5))),
    "overlap": ("C6", lambda: with_notes(*LEDGER, Note("tick", JOB, 1, "t1", 11, 9.5))),
    "too-many-failures": (
        "C6",
        lambda: with_history(E1, E2, entry(4, "failed", "lease-1"), entry(6, "running", "lease-2"), E5),
    ),
    "still-open": ("C7", lambda: replace(CLEAN, journal=(), queue=(document(history=HISTORY[:4]),))),
    "complete-in-queue": ("C7", lambda: replace(CLEAN, journal=(), queue=(document(),))),
    "outbox-left": ("C7", lambda: replace(CLEAN, journal=(document(outbox=[1]),))),
    "missed-fire": ("C9", lambda: replace(CLEAN, fires=frozenset({"f" * 24}))),
    "double-fire": ("C9", lambda: replace(CLEAN, fires=frozenset(), journal=(document(schedule_id="s"),))),
    "malformed-message-lost": ("C10", lambda: replace(CLEAN, malformed=frozenset({"bad1"}))),
    "good-message-buried": ("C10", lambda: replace(CLEAN, dead=frozenset({"m1"}))),
    "message-lost": ("C10", lambda: with_operations(MESSAGE)),
    "message-doubled": (
        "C10",
        lambda: with_operations(
            MESSAGE, journal=(document(request_id="m1"), document("b" * 24, request_id="m1"))
        ),
    ),
    "left-a-final-state": (
        "C11",
        lambda: with_history(*HISTORY, entry(9, "running", "lease-3"), entry(11, "complete", "lease-3")),
    ),
    "claimed-while-held": ("C11", lambda: with_history(E1, E2, entry(4, "running", "lease-2"), E5)),
    "revisions-fall": ("C11", lambda: with_history(E1, E2, E3, entry(4, "running", "lease-2"), E5)),
    "one-lease-twice": (
        "C11",
        lambda: with_history(E1, E2, E3, entry(6, "running", "lease-1"), entry(8, "complete", "lease-1")),
    ),
    "fence-does-not-count": ("C11", lambda: replace(CLEAN, journal=(document(fence=1),))),
    "line-missed": ("C12", lambda: with_events(*FOLLOWER.events[:2], *FOLLOWER.events[3:])),
    "line-twice": ("C12", lambda: with_events(*FOLLOWER.events[:2], *FOLLOWER.events[1:])),
    "line-invented": ("C12", lambda: with_events(Event(1, "log", 2, 5), *FOLLOWER.events[1:])),
    "no-end": ("C12", lambda: with_events(*FOLLOWER.events[:4])),
    "behind-the-end": ("C12", lambda: with_events(*FOLLOWER.events, Event(2, "state", 9, 21))),
    "states-out-of-order": ("C12", lambda: with_events(Event(1, "state", 9, 0), *FOLLOWER.events)),
    "killed-yet-error": (
        "C13",
        lambda: with_operations(
            asked("kill", JOB), journal=(document(history=(*HISTORY[:4], entry(8, "error", "lease-2"))),)
        ),
    ),
    "runs-after-its-kill": (
        "C13",
        lambda: with_operations(
            asked("kill", JOB, at=7),
            journal=(KILLED,),
            ledger=(LEDGER[0], Note("start", JOB, 2, "t2", 12, 90.0)),
        ),
    ),
    "claimed-after-its-kill": (
        "C13",
        lambda: with_history(E1, E2, entry(3, "running", reason="kill requested"), *HISTORY[2:]),
    ),
    "process-left": ("C13", lambda: replace(CLEAN, alive=frozenset({12}))),
    "removed-yet-there": ("C13", lambda: with_operations(asked("remove", JOB))),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_evidence_is_named(name: str) -> None:
    """Each broken promise is found under its number, with the job."""
    number, evidence = BROKEN[name]
    verdict = check(evidence())

    assert number in verdict.broken(), str(verdict)
    assert all(violation.job for violation in verdict.violations)


def test_every_check_has_a_broken_history() -> None:
    """No check is there that was never seen to fail."""
    assert {number for number, _ in BROKEN.values()} == set(CHECKS)


def test_what_was_never_answered_is_unknown(tmp_path: Path) -> None:
    """A client that died between request and answer leaves an `info`."""
    with opened(tmp_path / "history") as history:
        history.invoke("c", "enqueue", "k1")
        known = history.invoke("c", "kill", JOB)
        history.answer(known, "fail", "409")
    first, second = read_history(tmp_path / "history")

    assert (first.kind, first.end, first.result) == ("info", float("inf"), None)
    assert (second.kind, second.target, second.result) == ("fail", JOB, "409")
    assert second.begin <= second.end


def test_the_ids_of_fires_are_those_of_the_product() -> None:
    """Computed without a line of it, so that a change of theirs is a change of the promise."""
    instant = datetime(2026, 3, 29, 1, 30, 7, tzinfo=UTC)

    assert fire_id("chaos/two", instant) == str(schedules.fire_id("chaos/two", instant))


def test_a_fire_around_the_pause_may_be_there_or_not() -> None:
    """Neither missing nor one too many."""
    fire = document("f" * 24, schedule_id="s", result=None, args={"key": "fire"})
    evidence = replace(CLEAN, fires=frozenset(), may_fire=frozenset({"f" * 24}))

    assert check(evidence).ok
    assert check(replace(evidence, journal=(*CLEAN.journal, fire))).ok
