"""A job that enqueues others."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests

from core4.client import Client, CloseEvent, LogEvent
from tests.helpers import ROOT, running_stack

CHILDREN = 10


@pytest.mark.row("S16")
def test_a_job_enqueues_ten_children(tmp_path: Path) -> None:
    """The parent's stream ends with the parent; its children complete later, once though it is retried."""
    ledger = tmp_path / "ledger"
    with running_stack(tmp_path, ROOT / "tests/jobs/ledger.py", CORE4_SLOTS="1") as stack:
        client = Client(stack.url, auth=stack.auth)
        parent = client.enqueue("tests.jobs.FamilyJob", {"ledger": str(ledger), "children": CHILDREN})
        events = list(client.follow(parent))
        job = stack.job(parent)
        documents = [stack.wait_for_state(child, "complete") for child in job["result"]]
        total = requests.get(
            f"{stack.api}/job/journal", auth=stack.auth, params={"filter": '{"name": "tests.jobs.LedgerJob"}'}
        ).json()["total_count"]

    assert isinstance(events[-1], CloseEvent)
    messages = [event.message for event in events if isinstance(event, LogEvent)]
    assert messages.count("refused: unknown_job") == messages.count("refused: bad_arguments") == 2
    assert (job["state"], job["trial"]) == ("complete", 2)
    assert len(set(job["result"])) == CHILDREN == total
    assert {document["enqueued"]["parent_id"] for document in documents} == {parent}
    assert {document["enqueued"]["username"] for document in documents} == {"admin"}
    assert sorted(document["args"]["n"] for document in documents) == list(range(CHILDREN))
    assert ledger.read_text().count("start") == CHILDREN
