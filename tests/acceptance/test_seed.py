"""The job API document: its snippets run unmodified, top to bottom, against `core4 up`.

The sleeps of its jobs are shortened by a setting of the test stack; with ``CORE4_TEST_SEED_FULL=1`` they
take the 60 seconds that the document says.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from core4.client import EventParser
from tests.acceptance.document import MARK, statements
from tests.helpers import (
    ROOT,
    Command,
    Stack,
    eventually,
    port_is_free,
    running_stack,
)

DUMMY = "core4.queue.helper.job.example.DummyJob"
SNIPPETS = ROOT / "tests/data/job_api.txt"
ORIGINAL = ROOT.parent / "shared" / "seeds"
PORT = 5001
FULL = os.environ.get("CORE4_TEST_SEED_FULL") == "1"
SHORT = {} if FULL else {"CORE4_DUMMY_SLEEP_MAX": "6"}


def events_of(printed: str) -> list[tuple[str, dict[str, Any]]]:
    """The events in what `for line in rv: print(line)` has printed: chunks of bytes, cut anywhere."""
    parser = EventParser()
    chunks = [ast.literal_eval(line) for line in printed.splitlines() if line.startswith(("b'", 'b"'))]
    return [(event.event, json.loads(event.data)) for chunk in chunks for event in parser.feed(chunk)]


def progressed(events: list[tuple[str, dict[str, Any]]]) -> set[float]:
    """The different values of progress of a running job that these events show."""
    return {
        data["prog"]["value"]
        for name, data in events
        if name == "state" and data["state"] == "running" and data["prog"]["value"]
    }


class Reading:
    """What the document's process has printed: the outcome of each statement and what came before it."""

    def __init__(self, output: str) -> None:
        self.steps: list[dict[str, Any]] = []
        self.printed: list[str] = []
        rest: list[str] = []
        for line in output.splitlines():
            if line.startswith(MARK):
                self.steps.append(json.loads(line.removeprefix(MARK)))
                self.printed.append("\n".join(rest))
                rest = []
            else:
                rest.append(line)
        self.pending = "\n".join(rest)

    @property
    def answers(self) -> list[dict[str, Any]]:
        """The steps that made a request."""
        return [step for step in self.steps if "status" in step]

    def streams(self) -> list[list[tuple[str, dict[str, Any]]]]:
        """The events of each loop over a stream, in order."""
        return [
            events_of(printed)
            for step, printed in zip(self.steps, self.printed, strict=True)
            if step["code"].startswith("for line in rv")
        ]


@pytest.fixture
def on_5001(tmp_path: Path) -> Iterator[Stack]:
    """`core4 up` on the port that the document names."""
    assert port_is_free(PORT), (
        f"port {PORT} is taken, and the document's snippets use it: stop what listens there"
    )
    with running_stack(tmp_path, port=PORT, **SHORT) as stack:
        yield stack


def assert_ends_well(events: list[tuple[str, dict[str, Any]]], job_id: str, kinds: set[str]) -> None:
    """A stream of these kinds of events about one job, and one close at its end that counts them."""
    names = [name for name, _ in events]
    assert names.count("close") == 1
    assert names[-1] == "close"
    assert set(names) == kinds | {"close"}
    counts = events[-1][1]
    assert {kind: counts[kind] for kind in kinds} == {kind: names.count(kind) for kind in kinds}
    assert {data["_id"] for name, data in events if name == "state"} <= {job_id}
    assert {data["identifier"] for name, data in events if name == "log"} <= {job_id}


@pytest.mark.timeout(500 if FULL else 180)
def test_the_document_runs_verbatim(on_5001: Stack) -> None:
    """Every snippet works in one process, and each step has the outcome that the text around it promises."""
    with Command([sys.executable, ROOT / "tests/acceptance/document.py", SNIPPETS]) as reader:

        def shown() -> list[tuple[str, dict[str, Any]]]:
            reading = Reading(reader.output)
            events = reading.streams()[0] if reading.streams() else events_of(reading.pending)
            assert len(progressed(events)) >= 3, f"progress so far: {progressed(events)}"
            return events

        # Live: the client has three states of progress while the document says running.
        events = eventually(shown, 90, what="three states of progress", every=0.1)
        first_id = events[0][1]["_id"]
        assert on_5001.job(first_id)["state"] == "running"
        code = reader.wait(400 if FULL else 120)
        assert code == 0, reader.output

    reading = Reading(reader.output)
    assert [step["code"] for step in reading.steps] == statements(SNIPPETS.read_text())
    assert not [
        answer for answer in reading.answers if answer["status"] in {401, 403} or answer["status"] >= 500
    ]
    listing, search, _, example, enqueue, queue, kill, restart, new, old, _, _, *ending = reading.answers
    first, followed, logged = reading.streams()

    assert listing["status"] == search["status"] == 200
    assert DUMMY in {row["_id"] for row in listing["body"]["data"]}
    assert {row["_id"] for row in search["body"]["data"]} == {DUMMY}
    assert_ends_well(first, first_id, {"state", "log"})
    assert [data for name, data in first if name == "state"][-1]["state"] == "complete"
    assert (example["status"], example["body"]["code"]) == (404, 404)
    assert "application/" in example["type"]
    assert "json" in example["type"]

    jid = enqueue["body"]["data"]
    assert re.fullmatch(r"[0-9a-f]{24}", jid)
    assert jid != first_id
    assert jid in {row["_id"] for row in queue["body"]["data"]}
    assert {row["qual_name"] for row in queue["body"]["data"]} == {DUMMY}
    assert (kill["status"], kill["body"]["data"]) == (200, True)
    new_jid = restart["body"]["data"]
    assert re.fullmatch(r"[0-9a-f]{24}", new_jid)
    assert new_jid not in {jid, first_id}
    assert new["body"]["data"]["state"] in {"pending", "running"}
    assert new["body"]["data"]["journal"] is False
    assert new["body"]["data"]["enqueued"]["parent_id"] == jid
    assert old["body"]["data"]["state"] == "killed"
    assert old["body"]["data"]["journal"] is True
    assert old["body"]["data"]["enqueued"]["child_id"] == new_jid

    assert_ends_well(followed, new_jid, {"state", "log"})
    assert [data for name, data in followed if name == "state"][-1]["state"] == "complete"
    assert_ends_well(logged, new_jid, {"log"})
    lines = [data["_id"] for name, data in followed if name == "log"]
    assert lines == [data["_id"] for name, data in logged if name == "log"]

    late_kill, late_remove, empty = ending
    assert (late_kill["body"]["code"], late_remove["body"]["code"]) == (
        late_kill["status"],
        late_remove["status"],
    )
    assert late_kill["status"] in {404, 409}
    assert late_remove["status"] in {200, 404, 409}
    assert empty["status"] == 200
    assert (empty["body"]["data"], empty["body"]["total_count"]) == ([], 0)


def test_the_snippets_are_those_of_the_document() -> None:
    """The file in this repository has every line of code of the document, unmodified."""
    kept = SNIPPETS.read_text()

    assert len(statements(kept)) == 36
    for document in ORIGINAL.glob("004_*.txt"):
        lines = [
            line[3:] for line in document.read_text().splitlines() if re.match(r"   (>>>|\.\.\.) ", line)
        ]
        assert lines == kept.splitlines()


def test_both_listings_agree(stack: Stack) -> None:
    """`GET job` and `POST job/queue` give the same rows."""
    job_id = stack.enqueue(DUMMY, sleep=30)
    stack.wait_for_state(job_id, "running")

    def same() -> list[dict[str, Any]]:
        by_get = stack.data("GET", "/job")
        by_post = stack.data("POST", "/job/queue", json={"search": "dummy"})
        for row in [*by_get, *by_post]:
            row.pop("age")
        # A report of progress may come between the two requests.
        assert by_get == by_post
        return list(by_get)

    assert [row["_id"] for row in eventually(same)] == [job_id]


@pytest.mark.parametrize("state", ["pending", "running"])
def test_kill_then_restart_at_once(tmp_path: Path, state: str) -> None:
    """A restart that directly follows a kill gives a new job, which runs; the old one ends as killed."""
    with running_stack(tmp_path, CORE4_SLOTS="1") as stack:
        blocker = stack.enqueue(DUMMY, sleep=60) if state == "pending" else None
        if blocker:
            stack.wait_for_state(blocker, "running")
        old = stack.enqueue(DUMMY, sleep=5)
        stack.wait_for_state(old, state)

        assert stack.data("PUT", f"/job/kill/{old}") is True
        new = stack.data("PUT", f"/job/restart/{old}", json={"follow": False})

        assert re.fullmatch(r"[0-9a-f]{24}", new)
        assert new != old
        killed = stack.wait_for_state(old, "killed")
        eventually(lambda: stack.job(old)["journal"], what="the killed job in the journal")
        assert killed["enqueued"]["child_id"] == new
        if blocker:
            assert stack.job(new)["state"] == "pending"
            stack.data("PUT", f"/job/kill/{blocker}")
        assert stack.wait_for_state(new, "complete")["enqueued"]["parent_id"] == old


def test_an_interrupted_reader_can_kill_and_remove(stack: Stack) -> None:
    """Whoever stops reading the stream can end the running job; the queue is empty soon after."""
    job_id = stack.enqueue(DUMMY, sleep=60)
    with requests.get(
        f"{stack.api}/job/follow/{job_id}", json={"follow": True}, auth=stack.auth, stream=True, timeout=60
    ) as answer:
        parser = EventParser()
        for chunk in answer.iter_content(None):
            if any(json.loads(event.data).get("state") == "running" for event in parser.feed(chunk)):
                break

    assert stack.data("PUT", f"/job/kill/{job_id}") is True
    assert stack.data("PUT", f"/job/remove/{job_id}") is True
    eventually(lambda: stack.data("GET", "/job") == [], what="an empty queue")
    assert stack.job(job_id)["state"] == "killed"
