"""The order of a stream, and how its events are written."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core4.api.frames import ENOUGH, Batch, Cursor, Frame, close_frame, merge, transitions
from core4.errors import BadRequest
from core4.results import has_ended


def seq(fence: int, number: int) -> int:
    return (fence << 32) + number


def line(fence: int, number: int) -> dict[str, Any]:
    return {"seq": seq(fence, number), "message": f"{fence}/{number}"}


def entry(rev: int, state: str, log_seq: int = 0, attempt: int = 1) -> dict[str, Any]:
    return {"rev": rev, "state": state, "log_seq": log_seq, "attempt": attempt, "worker": "w@h", "at": None}


# A job that fails once, is retried and completes; revisions between the entries are progress.
HISTORY = [
    entry(1, "pending", attempt=0),
    entry(2, "running"),
    entry(5, "failed", seq(1, 3)),
    entry(7, "running", seq(1, 3), attempt=2),
    entry(9, "complete", seq(2, 2), attempt=2),
]
LINES = [line(1, 1), line(1, 2), line(1, 3), line(2, 1), line(2, 2)]
WHOLE = [
    *(("state", 1), ("state", 2), ("log", seq(1, 1)), ("log", seq(1, 2)), ("log", seq(1, 3)), ("state", 5)),
    *(("state", 7), ("log", seq(2, 1)), ("log", seq(2, 2)), ("state", 9)),
]


def document(upto: int, rev: int | None = None, **more: Any) -> dict[str, Any]:
    """The job after the first `upto` entries of its history."""
    last = HISTORY[upto - 1]
    return {
        "_id": "id",
        "state": last["state"],
        "rev": rev or last["rev"],
        "fence": sum(entry["state"] == "running" for entry in HISTORY[:upto]),
        "log_seq": last["log_seq"],
        "history": HISTORY[:upto],
        "result": "later",
        **more,
    }


def shown(batch: Batch) -> list[tuple[str, int]]:
    return [(frame.kind, frame.number) for frame in batch.frames]


def test_a_finished_job_from_its_beginning() -> None:
    """States and lines in the one order, and the end."""
    batch = merge(document(5), LINES, Cursor(), more=False)

    assert shown(batch) == WHOLE
    assert batch.ended
    assert batch.cursor == Cursor(9, seq(2, 2))


@pytest.mark.parametrize("cut", range(len(WHOLE) + 1))
def test_resume_gives_the_rest(cut: int) -> None:
    """Wherever a reader stopped, what follows is what he has not got."""
    cursor = Cursor()
    for kind, number in WHOLE[:cut]:
        cursor = Frame(kind, number, b"").after(cursor)  # type: ignore[arg-type]
    rest = [line for line in LINES if line["seq"] > cursor.seq]

    assert shown(merge(document(5), rest, cursor, more=False)) == WHOLE[cut:]


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_reading_in_pieces_gives_the_same(first: int, second: int, limit: int) -> None:
    """However a job is read while it runs, the transitions and lines are those of the whole."""
    got: list[tuple[str, int]] = []
    cursor = Cursor()
    for upto in sorted({first, second, 5}):
        stored = [line for line in LINES if line["seq"] <= document(upto)["log_seq"]]
        while True:
            rest = [line for line in stored if line["seq"] > cursor.seq]
            batch = merge(document(upto), rest[:limit], cursor, more=len(rest) > limit)
            got += shown(batch)
            cursor = batch.cursor
            if not batch.more:
                break

    assert got == WHOLE


def test_states_of_a_large_job_come_in_pieces() -> None:
    """Each state repeats the arguments: two hundred of them at once would be fifty megabytes per reader."""
    large = document(5, args={"text": "x" * (ENOUGH // 2)})
    got: list[tuple[str, int]] = []
    cursor = Cursor()
    while True:
        batch = merge(large, [line for line in LINES if line["seq"] > cursor.seq], cursor, more=False)
        assert sum(frame.kind == "state" for frame in batch.frames) <= 2
        got += shown(batch)
        cursor = batch.cursor
        if not batch.more:
            break

    assert got == WHOLE
    assert batch.ended


def test_lines_of_an_attempt_wait_for_its_start() -> None:
    """The document was read before the second attempt began: its lines come after that is known."""
    batch = merge(document(3), LINES, Cursor(), more=False)

    assert shown(batch) == WHOLE[:5]
    assert batch.more
    assert shown(merge(document(4), LINES[3:], batch.cursor, more=False)) == WHOLE[5:9]


def test_progress_is_one_more_state() -> None:
    """A revision without an entry shows the document as it is, once."""
    batch = merge(document(2, rev=4), LINES[:1], Cursor(), more=False)

    assert shown(batch) == [("state", 1), ("state", 2), ("log", seq(1, 1)), ("state", 4)]
    assert shown(merge(document(2, rev=4), [], batch.cursor, more=False)) == []
    assert not batch.ended


def test_what_is_done_with_a_finished_job_is_not_in_its_stream() -> None:
    """A restart and the move to the journal write the document; the stream stays the same."""
    history = [*HISTORY, entry(10, "complete"), entry(11, "complete")]
    after = document(5, rev=12) | {"history": history}

    assert shown(merge(after, LINES, Cursor(), more=False)) == WHOLE


def test_the_end_waits_for_lines_that_are_counted() -> None:
    """The lines may arrive behind the outcome; for a while they are waited for."""
    early = merge(document(5), LINES[:4], Cursor(), more=False, patient=True)

    assert early.waiting
    assert shown(early)[-1] == ("log", seq(2, 1))
    assert shown(merge(document(5), LINES[4:], early.cursor, more=False, patient=True)) == WHOLE[8:]
    assert merge(document(5), LINES[:4], Cursor(), more=False).ended


def test_an_attempt_without_lines_is_not_waited_for() -> None:
    """Its count is where its numbers begin."""
    silent = document(5) | {"log_seq": seq(2, 0)}

    assert merge(silent, LINES[:3], Cursor(), more=False, patient=True).ended


@pytest.mark.parametrize(
    ("state", "removed", "ended"),
    [
        ("complete", None, True),
        ("killed", None, True),
        ("inactive", None, True),
        ("error", None, True),
        ("failed", None, False),
        ("deferred", None, False),
        ("pending", "now", True),
        ("running", "now", False),
    ],
)
def test_when_a_stream_ends(state: str, removed: str | None, ended: bool) -> None:
    """Retries do not end it; a job that is removed will not run again."""
    assert has_ended({"state": state, "removed_at": removed}) is ended


def test_only_the_newest_state_has_what_came_last() -> None:
    """An older state does not tell the result."""
    frames = merge(document(5), LINES, Cursor(), more=False).frames
    states = [json.loads(frame.body) for frame in frames if frame.kind == "state"]

    assert ["result" in state for state in states] == [False] * 4 + [True]
    assert [state["state"] for state in states] == [entry["state"] for entry in HISTORY]
    assert [state["trial"] for state in states] == [0, 1, 1, 2, 2]
    assert states[1]["locked"]["worker"] == "w@h"
    assert states[2]["locked"] is None


def test_transitions_end_with_the_job() -> None:
    """Whatever follows the first final state is not part of it."""
    later = [*HISTORY, entry(12, "complete")]

    assert transitions({"history": later}) == HISTORY


def test_bytes_of_a_line() -> None:
    """One event: id, name, one line of data with its mode."""
    frame = merge(document(5), LINES, Cursor(2, 0), more=False).frames[0]

    assert frame.encode(Cursor(2, seq(1, 1)), "prelog") == (
        b'id: 2.4294967297\nevent: log\ndata: {"seq":4294967297,"message":"1/1","mode":"prelog"}\n\n'
    )


@given(st.text())
def test_no_line_can_forge_an_event(message: str) -> None:
    """Whatever a job writes stays within the one line of its event."""
    frames = merge(document(5), [line(1, 1) | {"message": message}], Cursor(2, 0), more=True).frames
    text = frames[0].encode(Cursor(), "watchlog")

    assert text.count(b"\n") == 4
    assert b"\r" not in text
    assert json.loads(text.split(b"data: ")[1])["message"] == message


def test_close_counts_and_moves_on() -> None:
    """Who has got `close` is further than who has got the last line; what never came is not counted."""
    assert (
        close_frame(Cursor(9, 5), {"state": 2, "log": 0}) == b'id: 9.6\nevent: close\ndata: {"state":2}\n\n'
    )


@pytest.mark.parametrize("cursor", [Cursor(), Cursor(3, 0), Cursor(9, seq(2, 7))])
def test_cursor_round_trip(cursor: Cursor) -> None:
    """An id says where to go on."""
    assert Cursor.parse(str(cursor)) == cursor


def test_no_cursor_is_the_beginning() -> None:
    """Who has read nothing starts at the beginning."""
    assert Cursor.parse("") == Cursor(0, 0)


@pytest.mark.parametrize(
    "text",
    ["x", "1", "1.", ".1", "-1.2", "1.2.3", "1.2\n", "1" * 30 + ".1", "1.9999999999999999999", "\u0661.1"],
)
def test_bad_cursor(text: str) -> None:
    """Anything else is refused."""
    with pytest.raises(BadRequest):
        Cursor.parse(text)
