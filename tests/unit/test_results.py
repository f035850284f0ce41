"""A result in easyjobs' words: every state has one, and any JSON value is a result."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from core4.context import result_problem
from core4.results import Status, has_ended, result_of, status_of
from core4.states import State

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def document(state: State, **fields: Any) -> dict[str, Any]:
    base = {"_id": 1, "name": "n", "namespace": "DEFAULT", "args": {}, "enqueued": {"at": NOW}, "trial": 2}
    return {**base, "state": state.value, **fields}


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (State.BLOCKED, Status.QUEUED),
        (State.PENDING, Status.QUEUED),
        (State.FAILED, Status.QUEUED),
        (State.DEFERRED, Status.QUEUED),
        (State.RUNNING, Status.RUNNING),
        (State.COMPLETE, Status.COMPLETED),
        (State.ERROR, Status.FAILED),
        (State.KILLED, Status.FAILED),
        (State.INACTIVE, Status.FAILED),
    ],
)
def test_every_state_has_a_word(state: State, status: Status) -> None:
    """A failed attempt that is tried again is no failed job."""
    found = document(state)

    assert status_of(found) is status
    assert has_ended(found) is (status in (Status.COMPLETED, Status.FAILED))


@pytest.mark.parametrize("value", [None, 0, "", [], False, {"a": [{}]}])
def test_any_value_is_a_result(value: Any) -> None:
    """The status says whether there is one, not the value."""
    found = result_of(document(State.COMPLETE, result=value))

    assert (found["status"], found["result"], found["error"]) == ("Completed", value, None)


def test_what_failed_says_why() -> None:
    """Message, category and attempt; the traceback where it is asked for."""
    last = {"exception": "ValueError('no')", "timestamp": NOW, "traceback": ["line\n"]}
    found = document(State.ERROR, last_error=last, error_cat="ERROR", result=None)

    error = {"message": "ValueError('no')", "state": "error", "category": "ERROR", "attempt": 2}
    assert result_of(found)["error"] == error
    assert result_of(found, traceback=True)["error"] == {**error, "traceback": ["line\n"]}


def test_what_was_removed_has_failed() -> None:
    """Nothing will come of it; while it runs it is not removed yet."""
    removed = result_of(document(State.PENDING, removed_at=NOW))
    running = result_of(document(State.RUNNING, removed_at=NOW))

    assert (removed["status"], removed["error"]["message"]) == ("Failed", "removed while pending")
    assert (running["status"], running["error"]) == ("Running", None)


def test_a_retry_hides_the_error_before() -> None:
    """What runs again after a failed attempt has neither result nor error."""
    found = result_of(document(State.RUNNING, last_error={"exception": "no"}, result=None))

    assert (found["result"], found["error"]) == (None, None)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"$ref": "x", "$id": 1}, "begins with `$`"),
        ([{"a": ({"$code": "x"},)}], "begins with `$`"),
        ({"a\0b": 1}, "has NUL"),
        ({1: 2}, "the key 1 is not a text"),
        ({"a": float("inf")}, "result is not JSON"),
        ("x" * 100, "over the limit of 90"),
    ],
)
def test_what_would_not_come_back_is_no_result(result: Any, words: str) -> None:
    """Arguments refuse the same, and a driver would make a reference of the first."""
    assert words in (result_problem(result, 90) or "")


def test_names_may_have_dollars_and_dots_in_them() -> None:
    assert result_problem({"a$": {"b.c": [1, 1.5, None, ""]}}, 90) is None
