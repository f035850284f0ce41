"""What the daemons print: every line is JSON and says which request, job or daemon it is about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from bson import ObjectId

from core4.database import Database
from core4.jobs import Job
from core4.queues import JobQueue
from core4.states import State
from core4.users import UserStore
from tests.helpers import BASE, FAST, Command, eventually_async, free_port, program
from tests.integration.driver import ADMIN, Api, basic

UNRULY = str(Path(__file__).parent.parent / "jobs" / "unruly.py")
NAME = "tests.jobs.Unruly"
PASSWORD = "not-the-default"


def lines_of(command: Command) -> list[dict[str, Any]]:
    """Everything it printed; fails on a line that is no JSON object."""
    found = [json.loads(line) for line in command.lines]
    assert all(
        isinstance(line, dict) and {"time", "level", "logger", "event"} <= line.keys() for line in found
    )
    return found


async def enqueue(session: aiohttp.ClientSession, url: str, headers: dict[str, str], **args: Any) -> Any:
    body = {"qual_name": NAME, "args": {"pidfile": "", **args}, "follow": False}
    async with session.post(f"{url}/job", json=body, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.headers["X-Request-ID"] == headers["X-Request-ID"]
        found = await answer.json()
        assert found["_id"] == headers["X-Request-ID"]
        return found["data"]


async def ended(queue: JobQueue, job_id: str) -> Job:
    async def look() -> Job | None:
        job = await queue.store.get(ObjectId(job_id))
        return job if job.state in (State.COMPLETE, State.ERROR) else None

    found = await eventually_async(look, what="the job ends")
    assert found is not None
    return found


@pytest.mark.row("S51")
async def test_every_line_of_the_daemons_says_whom_it_is_about(
    mongo_url: str, database_name: str, database: Database, users: UserStore, queue: JobQueue, tmp_path: Path
) -> None:
    """One request with an id of the client's, from the API's log to the job's document and its worker's."""
    await users.set_password(ADMIN[0], PASSWORD)
    port = free_port()
    environ = {
        **FAST,
        "CORE4_MONGO_URL": mongo_url,
        "CORE4_MONGO_DATABASE": database_name,
        "CORE4_PORT": str(port),
        "CORE4_WORKER_NAME": "reader",
    }
    url = f"http://127.0.0.1:{port}{BASE}"
    api = Command([program("core4"), "api"], environ)
    worker = Command([program("core4"), "worker", UNRULY], environ, cwd=tmp_path)
    with api, worker:
        api.wait_for("ready")
        worker.wait_for("ready")
        async with aiohttp.ClientSession(headers=basic(ADMIN[0], PASSWORD)) as session:
            good = await enqueue(session, url, {"X-Request-ID": "proxy-1"}, what="answer", value=1)
            bad = await enqueue(session, url, {"X-Request-ID": "proxy-2"}, what="raises", value=2)
            jobs = [await ended(queue, each) for each in (good, bad)]

    said = lines_of(api)
    requests = [line for line in said if line.get("request_id")]
    assert [(line["identifier"], line["event"], line["user"]) for line in requests] == [
        ("proxy-1", "request.done", ADMIN[0]),
        ("proxy-2", "request.done", ADMIN[0]),
    ]
    assert all(line["identifier"].startswith("api@") for line in said if line not in requests)

    said = lines_of(worker)
    assert [job.document["request_id"] for job in jobs] == ["proxy-1", "proxy-2"]
    for job, request_id in zip(jobs, ("proxy-1", "proxy-2"), strict=True):
        of_job = [line for line in said if line.get("job_id") == str(job.id)]
        assert [line["event"] for line in of_job] == ["job.started", "job.ended"]
        lease = next(entry["lease"] for entry in job.document["history"] if entry["state"] == "running")
        for line in of_job:
            assert line["identifier"] == str(job.id)
            assert (line["attempt"], line["lease"], line["request_id"]) == (1, lease, request_id)
            assert line["worker"].startswith("reader@")
    rest = [line for line in said if "job_id" not in line and "worker" in line]
    assert {line["identifier"] for line in rest} == {rest[0]["worker"]}
    assert {line["owner"] for line in rest} == {rest[0]["owner"]}
    assert "worker.ended" in {line["event"] for line in rest}
    assert PASSWORD not in api.output + worker.output
    rows = await database.collection("sys.log").find({}).to_list(None)
    assert {row["job"] for row in rows} == {job.id for job in jobs}


@pytest.mark.parametrize("sent", ["", "a b", "x" * 129, "-first", "caf\u00e9", '"quoted"', "{}"])
async def test_a_request_id_that_cannot_be_kept_is_replaced(api: Api, sent: str) -> None:
    """Ours has 24 hexadecimal digits, in the header and in the body; so has that of an error."""
    for path in ("/job/count", "/job/nonsense"):
        answer = await api.call("GET", path, headers={"X-Request-ID": sent})

        assert ObjectId.is_valid(answer.body["_id"])
        assert answer.headers["X-Request-ID"] == answer.body["_id"]


async def test_a_repeated_request_id_is_no_idempotency_key(api: Api) -> None:
    """Two jobs under one id of a request; under one key it is one, and the second answer says so."""
    body = {"qual_name": "tests.Job", "follow": False}
    headers = {"X-Request-ID": "again"}
    first = await api.call("POST", "/job", json={**body, "args": {"n": 1}}, headers=headers)
    second = await api.call("POST", "/job", json={**body, "args": {"n": 2}}, headers=headers)
    assert first.data != second.data

    keyed = {**headers, "Idempotency-Key": "k"}
    answers = [
        await api.call("POST", "/job", json={**body, "args": {"n": 3}}, headers=keyed) for _ in range(2)
    ]
    assert answers[0].data == answers[1].data
    assert [answer.headers.get("Idempotent-Replayed") for answer in answers] == [None, "true"]
    rows = await api.call("GET", "/job", json={"filter": {"request_id": "again"}})
    assert {row["_id"] for row in rows.data} == {first.data, second.data, answers[0].data}
    assert {row["request_id"] for row in rows.data} == {"again"}
