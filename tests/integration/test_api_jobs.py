"""The job API: every row of core4.md 1.2 that does not stream, against the real stores."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from bson import ObjectId

from core4 import store
from core4.api.jobs import whole
from core4.config import Settings
from core4.database import Database
from core4.retries import Outcome
from core4.store import QUEUE
from core4.users import UserStore
from tests.helpers import eventually_async
from tests.integration.driver import Api, Runner, bearer, order, serving

UNKNOWN = "5f6252b42e84fa29038a3e3f"


async def test_enqueue(api: Api, runner: Runner) -> None:
    """The answer is the id, in the body and in headers; what is stored is what was asked for."""
    answer = await api.call(
        "POST",
        "/job",
        json={"qual_name": "tests.Job", "args": {"n": 1}, "follow": False, "priority": 5, "attempts": 3}
        | {"memory_limit": "512MB", "timeout": 90, "backoff": 2},
    )
    job = await runner.queue.store.get(ObjectId(answer.data))

    assert answer.headers["X-Job-Id"] == answer.data
    assert answer.headers["Location"] == f"/core4/api/v1/job/{answer.data}"
    assert "flash" not in answer.body
    assert (job.memory_limit, job.timeout, job.backoff) == (512_000_000, 90, 2)
    assert (job.name, job.args, job.priority, job.attempts) == ("tests.Job", {"n": 1}, 5, 3)
    assert job.username == "admin"
    assert job.document["request_id"] == answer.body["_id"]


async def test_options_among_the_arguments(api: Api, runner: Runner) -> None:
    """core4 took options from `args`; a parameter of the same name is an argument."""
    await runner.publish("tests.Own", schema={"type": "object", "properties": {"priority": {}}})
    job_id = await api.enqueue(priority=7, n=1)
    own_id = await api.enqueue("tests.Own", priority=7)

    job, own = await runner.queue.store.get(job_id), await runner.queue.store.get(own_id)
    assert (job.priority, job.args) == (7, {"n": 1})
    assert (own.priority, own.args) == (0, {"priority": 7})


async def test_options_of_the_class(api: Api, runner: Runner) -> None:
    """The class's options stand where the request has none."""
    await runner.publish("tests.Patient", options={"attempts": 4, "priority": 1}, namespace="slow")
    answer = await api.call(
        "POST", "/job", json={"qual_name": "tests.Patient", "priority": 2, "follow": False}
    )
    job = await runner.queue.store.get(ObjectId(answer.data))

    assert (job.attempts, job.priority, job.namespace) == (4, 2, "slow")


async def test_nobody_runs_it(api: Api, runner: Runner) -> None:
    """Known, but no worker is up: accepted with a warning."""
    await runner.publish("tests.Idle")
    answer = await api.call("POST", "/job", json={"qual_name": "tests.Idle", "follow": False})

    assert answer.data
    assert [note["level"] for note in answer.body["flash"]] == ["WARNING"]
    assert "tests.Idle" in answer.body["flash"][0]["message"]


async def test_unknown_name(api: Api) -> None:
    """Never published: 404 that says what to do."""
    answer = await api.call("POST", "/job", json={"qual_name": "tests.Nope"})

    assert (answer.status, answer.body["type"]) == (404, "urn:core4:problem:unknown_job")
    assert "core4 worker" in answer.body["detail"]


@pytest.mark.parametrize("path", ["/job", "/schedule/x", "/NONE/task/extract"])
async def test_an_unknown_name_is_held_against_those_that_are_known(
    api: Api, runner: Runner, users: UserStore, path: str
) -> None:
    """A task without its namespace, a word that is misspelt; nobody is told of what is not for him."""
    for name in ("ETL:extract", "CIA:extract", "tests.Report"):
        await runner.publish(name)
    await users.add("ann", "x" * 12, allow=["job://ETL:.*/x", "job://[a-z]*\\.[A-Z].*/x", "job://extract/x"])

    async def told(name: str) -> str:
        method, body = "POST", {"qual_name": name}
        if path.startswith("/schedule"):
            method, body = "PUT", {**body, "expression": "@daily"}
        if path.startswith("/NONE"):
            body = {}
        answer = await api.call(method, path, json=body, auth=("ann", "x" * 12))
        assert answer.status == 404
        return str(answer.body["detail"])

    assert (await told("extract")).endswith("did you mean ETL:extract?")
    if "task" not in path:
        assert (await told("tests.Raport")).endswith("did you mean tests.Report?")


async def test_job_exists(api: Api) -> None:
    """The same job twice is a conflict that names the first."""
    first = await api.enqueue(a=1, b=[2])
    answer = await api.call("POST", "/job", json={"qual_name": "tests.Job", "args": {"b": [2], "a": 1}})

    assert (answer.status, answer.body["type"]) == (409, "urn:core4:problem:job_exists")
    assert answer.body["job_id"] == str(first)


@pytest.mark.parametrize(
    ("args", "pointer"),
    [
        ({}, "/n"),
        ({"n": "one"}, "/n"),
        ({"n": 1, "m": 2}, "/m"),
        ({"n": 2**63}, "/n"),
        ({"n": 1, "attempts": 0}, "/attempts"),
        ({"n": {"$ref": 1}}, "/n"),
    ],
)
async def test_arguments_that_do_not_fit(api: Api, runner: Runner, args: Any, pointer: str) -> None:
    """422 with a pointer to each; nothing is queued."""
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    await runner.publish("tests.Strict", schema=schema)
    answer = await api.call("POST", "/job", json={"qual_name": "tests.Strict", "args": args, "follow": False})

    assert answer.status == 422, answer.body
    assert pointer in [error["pointer"] for error in answer.body["errors"]]
    assert await runner.queue.store.counts() == {}


async def test_too_large_arguments(api: Api, settings: Settings) -> None:
    """Beyond the limit: 413."""
    answer = await api.call(
        "POST", "/job", json={"qual_name": "tests.Job", "args": {"text": "x" * settings.args_cap}}
    )

    assert answer.status == 413


async def test_a_write_goes_on_when_the_client_hangs_up() -> None:
    """The request is cancelled with its connection, what it has begun is not."""
    begun, go_on, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await go_on.wait()
        done.set()

    request = asyncio.create_task(whole(work()))
    await begun.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    go_on.set()
    await asyncio.wait_for(done.wait(), 5)

    assert done.is_set()


@pytest.mark.row("S11", "S17")
async def test_pages(api: Api, runner: Runner) -> None:
    """25 jobs: both listings agree, and pages cover all rows without overlap."""
    ids = [str((await runner.queue.enqueue(order(args={"n": n}))).id) for n in range(25)]
    ways: list[tuple[str, str]] = [("GET", "/job"), ("POST", "/job/queue"), ("GET", "/job/queue")]
    first = [await api.call(method, path) for method, path in ways]

    for answer in first:
        assert {key: answer.body[key] for key in ("page", "per_page", "page_count", "count")} == {
            "page": 0,
            "per_page": 10,
            "page_count": 3,
            "count": 10,
        }
        assert isinstance(answer.body["total_count"], float)
        assert answer.body["total_count"] == 25
        assert [row["_id"] for row in answer.data] == sorted(ids)[:10]
    rows = [
        row["_id"]
        for page in range(3)
        for row in (await api.call("GET", f"/job?page={page}&per_page=11")).data
    ]
    assert sorted(rows) == sorted(ids)


@pytest.mark.row("S17", "S18")
@pytest.mark.parametrize(
    ("query", "numbers"),
    [
        ({"page": -1}, [20, 21, 22, 23, 24]),
        ({"page": -3}, list(range(10))),
        ({"page": -4}, []),
        ({"page": 3}, []),
        ({"page": 2**31}, []),
        ({"per_page": 500}, list(range(25))),
        ({"filter": {"args.n": {"gte": 20}}, "sort": [["_id", -1]]}, [24, 23, 22, 21, 20]),
        ({"filter": {"args.n": {"gte": 4}}, "per_page": 3, "page": 1}, [7, 8, 9]),
        ({"filter": {"args.n": 99}}, []),
        ({"filter": {"qual_name": "tests.Job", "state": {"in": ["pending"]}}, "per_page": 2}, [0, 1]),
    ],
)
async def test_filter_sort_and_page(
    api: Api, runner: Runner, query: dict[str, Any], numbers: list[int]
) -> None:
    """They combine, in a body as in a query string."""
    for n in range(25):
        await runner.queue.enqueue(order(args={"n": n}))
    texts = {key: json.dumps(value) if not isinstance(value, int) else value for key, value in query.items()}
    answers = [await api.call("POST", "/job/queue", json=query), await api.call("GET", "/job", params=texts)]

    for answer in answers:
        assert [row["args"]["n"] for row in answer.data] == numbers
        assert answer.body["count"] == len(numbers)


@pytest.mark.row("S12", "S18")
async def test_filter_counts_what_matches(api: Api, runner: Runner) -> None:
    """The pager counts behind the filter; nothing found is no page."""
    for n in range(27):
        await runner.queue.enqueue(order(args={"segment": n % 3, "n": n}))
    found = await api.call("POST", "/job/queue", json={"filter": {"args.segment": 1}})
    nothing = await api.call("POST", "/job/queue", json={"filter": {"args.segment": 9}})

    assert (len(found.data), found.body["total_count"], found.body["page_count"]) == (9, 9, 1)
    assert (nothing.data, nothing.body["total_count"], nothing.body["page_count"]) == ([], 0, 0)


async def test_search_in_the_queue(api: Api, runner: Runner) -> None:
    """Part of a name, in any case, with wildcards."""
    for name in ("tests.DummyJob", "tests.Other"):
        await runner.queue.enqueue(order(name))

    assert [r["qual_name"] for r in (await api.call("GET", "/job?search=dummy")).data] == ["tests.DummyJob"]
    assert len((await api.call("POST", "/job/queue", json={"search": "t?sts.*"})).data) == 2
    assert (await api.call("GET", "/job?search=[a-z]")).data == []


async def test_enrichment(api: Api, runner: Runner) -> None:
    """Rows and details tell what core4's do."""
    job_id = await api.enqueue(n=1)
    row = (await api.call("GET", "/job")).data[0]
    detail = await api.detail(job_id)

    for document in (row, detail):
        assert document["qual_name"] == "tests.Job"
        assert "name" not in document
        assert document["highstate"] == "waiting"
        assert document["flag"] == {"zombie": False, "killed": False, "removed": False, "nonstop": False}
        assert document["prog"]["value"] == 0.0
        assert document["age"] >= 0
        assert document["journal"] is False
    assert "history" in detail
    assert "history" not in row


@pytest.mark.row("S13")
async def test_detail(api: Api, runner: Runner) -> None:
    """Both addresses agree, for jobs in the queue and in the journal; no id is 400, an unknown one 404."""
    job_id = await api.enqueue()
    queued = await api.call("GET", f"/job/detail/{job_id}")
    assert queued.data["_id"] == str(job_id)
    assert {**queued.data, "age": 0} == {**await api.detail(job_id), "age": 0}
    await (await runner.start()).finish()

    done = await api.detail(job_id)

    assert (done["state"], done["journal"], done["result"]) == ("complete", True, {"done": True})
    for text in (UNKNOWN, "nope", "%00", "%ff", "a" * 500):
        missing = await api.call("GET", f"/job/{text}")
        assert (missing.status, missing.body["type"]) == (404, "urn:core4:problem:job_not_found"), text
        assert "not found" in missing.body["error"]
    assert (await api.call("GET", "/job/detail")).status == 400


@pytest.mark.row("S15")
async def test_catalogue(api: Api, runner: Runner) -> None:
    """What can be enqueued, by name, search and filter."""
    await runner.publish("my.DummyJob", tag=["demo"])
    every = await api.call("GET", "/job/list")
    search = await api.call("GET", "/job/list?page=0&search=dummy")
    by_name = await api.call("POST", "/job/list", json={"filter": {"qual_name": "tests.Job"}, "search": "no"})
    by_tag = await api.call("POST", "/job/list", json={"filter": {"tag": "demo"}, "sort": [["_id", -1]]})

    assert [row["_id"] for row in every.data] == ["my.DummyJob", "tests.Job"]
    assert {"author", "created_at", "updated_at", "doc", "schedule", "tag"} <= every.data[0].keys()
    assert [row["workers"] for row in every.data] == [0, 1]
    assert [row["_id"] for row in search.data] == ["my.DummyJob"]
    assert [row["_id"] for row in by_name.data] == ["tests.Job"]
    assert [row["_id"] for row in by_tag.data] == ["my.DummyJob"]


async def test_counts_and_journal(api: Api, runner: Runner) -> None:
    """How many there are of each, and what has ended."""
    for n in range(3):
        await api.enqueue(n=n)
    await (await runner.start()).finish()
    await runner.start()
    counts = (await api.call("GET", "/job/count")).data
    journal = await api.call("GET", "/job/journal")

    assert {state: n for state, n in counts.items() if n} == {"pending": 1, "running": 1, "journal": 1}
    assert {"complete", "error", "killed", "blocked"} <= counts.keys()
    assert [row["state"] for row in journal.data] == ["complete"]
    assert journal.data[0]["journal"] is True
    assert journal.body["total_count"] == 1


@pytest.mark.row("S14")
async def test_log_pages(api: Api, runner: Runner) -> None:
    """310 lines are 31 pages of 10; order and filter work on lines."""
    job_id = await api.enqueue()
    attempt = await runner.start()
    for start in range(0, 310, 31):
        await attempt.log(*(f"line {n}" for n in range(start, start + 31)))
    await attempt.log("alas", level="ERROR")
    first = await api.call("GET", f"/job/log/{job_id}")
    last = await api.call("GET", f'/job/log/{job_id}?page=-1&sort=[["_id",-1]]')
    found = await api.call("GET", f"/job/log/{job_id}", json={"filter": {"level": "ERROR"}})
    rows = [
        row["message"]
        for page in range(32)
        for row in (await api.call("GET", f"/job/log/{job_id}?page={page}")).data
    ]

    assert (first.body["total_count"], first.body["page_count"]) == (311, 32)
    assert rows == [*(f"line {n}" for n in range(310)), "alas"]
    assert [row["message"] for row in last.data] == ["line 0"]
    assert [row["message"] for row in found.data] == ["alas"]
    assert first.data[0]["identifier"] == str(job_id)
    assert (await api.call("GET", f"/job/log/{job_id}", json={"sort": [["message", 1]]})).status == 400


async def test_log_by_cursor(api: Api, runner: Runner) -> None:
    """Each answer leads to the lines behind it, of all or of those to keep, and nothing is counted."""
    job_id = await api.enqueue()
    attempt = await runner.start()
    for start in range(0, 90, 30):
        await attempt.log(*(f"line {n}" for n in range(start, start + 30)))
        await attempt.log(f"alas {start}", level="ERROR")

    async def told(**query: Any) -> list[list[str]]:
        found: list[list[str]] = []
        cursor: str | None = ""
        while cursor is not None:
            answer = await api.call("GET", f"/job/log/{job_id}", json={"cursor": cursor, **query})
            assert (answer.body["total_count"], answer.body["page_count"]) == (None, None)
            found.append([row["message"] for row in answer.data])
            cursor = answer.body["next"]
        return found

    parts = await told(per_page=31)
    assert [len(part) for part in parts] == [31, 31, 31]
    assert [line for part in parts for line in part if line.startswith("line")] == [
        f"line {n}" for n in range(90)
    ]
    assert await told(per_page=2, filter={"level": "ERROR"}) == [["alas 0", "alas 30"], ["alas 60"]]
    for bad in ({"cursor": "x"}, {"cursor": "9" * 19}, {"cursor": "-1"}, {"cursor": "1", "page": 1}):
        assert (await api.call("GET", f"/job/log/{job_id}", json=bad)).status == 400
    back = {"cursor": "", "sort": [["_id", -1]]}
    assert "ascending" in (await api.call("GET", f"/job/log/{job_id}", json=back)).body["detail"]


@pytest.mark.row("S43")
async def test_kill_of_a_waiting_job(api: Api, runner: Runner) -> None:
    """It is killed at once; twice is no error and no change."""
    job_id = await api.enqueue()
    first = await api.call("PUT", f"/job/kill/{job_id}")
    second = await api.call("PUT", f"/job/kill/{job_id}")

    assert first.data is True
    assert first.body["job"] == {"_id": str(job_id), "state": "killed", "changed": True}
    assert second.body["job"] == {"_id": str(job_id), "state": "killed", "changed": False}


async def test_kill_waits_for_the_outcome(api: Api, runner: Runner) -> None:
    """The answer comes when the worker has done it."""
    job_id = await api.enqueue()
    attempt = await runner.start()
    request = asyncio.create_task(api.call("PUT", f"/job/kill/{job_id}"))
    while (await runner.queue.store.get(job_id)).killed_at is None:
        await asyncio.sleep(0.01)
    assert not request.done()
    await attempt.finish(Outcome.killed("on request"))
    answer = await request

    assert answer.body["job"] == {"_id": str(job_id), "state": "killed", "changed": True}


async def test_kill_does_not_wait_for_ever(
    api: Api, runner: Runner, settings: Settings, database: Database
) -> None:
    """A worker that takes long: the wish is recorded, the state is still running."""
    job_id = await api.enqueue()
    await runner.start()
    async with serving(replace(settings, kill_wait=0.1), database) as hasty:
        answer = await hasty.call("PUT", f"/job/kill/{job_id}")

    assert answer.body["job"] == {"_id": str(job_id), "state": "running", "changed": True}
    assert (await runner.queue.store.get(job_id)).killed_at is not None


async def test_kill_of_what_has_ended(api: Api, runner: Runner) -> None:
    """A complete job cannot be killed, and the answer says what it is."""
    job_id = await api.enqueue()
    await (await runner.start()).finish()
    answer = await api.call("PUT", f"/job/kill/{job_id}")

    assert (answer.status, answer.body["state"]) == (409, "complete")


async def test_remove(api: Api, runner: Runner) -> None:
    """A waiting job goes to the journal; a second time there is nothing to remove."""
    job_id = await api.enqueue()
    removed = await api.call("PUT", f"/job/remove/{job_id}")
    again = await api.call("PUT", f"/job/remove/{job_id}")

    assert removed.data is True
    assert (await api.call("GET", "/job")).data == []
    assert (await api.detail(job_id))["flag"]["removed"] is True
    assert again.status == 404


async def test_remove_of_a_running_job(api: Api, runner: Runner) -> None:
    """It has to be killed first."""
    job_id = await api.enqueue()
    await runner.start()

    assert (await api.call("PUT", f"/job/remove/{job_id}")).status == 409


async def test_kill_then_restart_at_once(api: Api, runner: Runner) -> None:
    """The document's steps, on a waiting and on a running job: a new id, the old one in the journal."""
    for running in (False, True):
        job_id = await api.enqueue(running=running)
        attempt = await runner.start() if running else None
        kill = asyncio.create_task(api.call("PUT", f"/job/kill/{job_id}"))
        while (await runner.queue.store.get(job_id)).killed_at is None:
            await asyncio.sleep(0.01)
        restart = asyncio.create_task(api.call("PUT", f"/job/restart/{job_id}", json={"follow": False}))
        if attempt:
            await attempt.finish(Outcome.killed("on request"))
        await kill
        child_id = ObjectId((await restart).data)

        assert child_id != job_id
        assert (await api.detail(child_id))["state"] == "pending"
        assert (await api.detail(child_id))["enqueued"]["parent_id"] == str(job_id)
        old = await api.detail(job_id)
        assert (old["state"], old["journal"]) == ("killed", True)
        assert old["enqueued"]["child_id"] == str(child_id)
        again = await api.call("PUT", f"/job/restart/{job_id}", json={"follow": False})
        assert again.data == str(child_id)


async def test_restart_of_a_failed_job(api: Api, runner: Runner) -> None:
    """It is due at once, under the same id."""
    job_id = await api.enqueue(attempts=2)
    await (await runner.start()).finish(Outcome.failed("Boom()", []))
    answer = await api.call("PUT", f"/job/restart/{job_id}?follow=no")
    attempt = await runner.start()

    assert answer.data == str(job_id)
    assert answer.headers["X-Job-Id"] == str(job_id)
    assert attempt.job.id == job_id


async def test_restart_of_a_waiting_job(api: Api) -> None:
    """There is nothing to restart."""
    job_id = await api.enqueue()

    assert (await api.call("PUT", f"/job/restart/{job_id}", json={"follow": False})).status == 409


@pytest.mark.parametrize("action", ["kill", "remove", "restart"])
async def test_actions_on_unknown_jobs(api: Api, action: str) -> None:
    """404 for an id that is unknown or none."""
    for text in (UNKNOWN, "nope"):
        answer = await api.call("PUT", f"/job/{action}/{text}")
        assert (answer.status, answer.body["job_id"]) == (404, text)


async def test_unknown_actions(api: Api) -> None:
    """405 that names method and action."""
    answer = await api.call("PUT", f"/job/explode/{UNKNOWN}")

    assert (answer.status, answer.body["detail"]) == (405, "unknown action PUT [explode]")
    assert (await api.call("DELETE", "/job")).status == 405
    assert "POST" in (await api.call("DELETE", "/job")).headers["Allow"]


async def test_workers(api: Api, runner: Runner) -> None:
    """Who is up, and what they run."""
    (worker,) = (await api.call("GET", "/worker")).data

    assert (worker["name"], worker["state"], worker["jobs"]) == ("runner@here", "up", ["tests.Job"])
    assert worker["beat_age"] >= 0


async def test_arguments_of_query_and_body(api: Api, runner: Runner) -> None:
    """A body on GET is read and beats the query; of a repeated name the last stands."""
    for n in range(3):
        await runner.queue.enqueue(order(args={"n": n}))

    assert (await api.call("GET", "/job?per_page=1&per_page=2")).body["count"] == 2
    assert (await api.call("GET", "/job?per_page=1", json={"per_page": 3})).body["count"] == 3
    assert (await api.call("GET", "/job", data=b"  ")).body["count"] == 3


async def test_probes_and_page(api: Api) -> None:
    """Open to everybody; the page brings its own style and script."""
    for path in ("livez", "readyz", "version"):
        assert (await api.call("GET", path, auth=None)).status == 200
    async with api.session.get(api.root + "/") as page:
        text = await page.text()
        policy = page.headers["Content-Security-Policy"]
    assert "core4-jobs" in text
    assert "unsafe-inline" not in policy
    assert "frame-ancestors 'none'" in policy
    assert "http://" not in text
    assert "https://" not in text
    for path in ("page.css", "page.js"):
        assert (await api.call("GET", f"static/{path}", auth=None)).status == 200


async def test_bearer_and_basic_are_the_same_user(api: Api) -> None:
    """Either opens the job API."""
    token = (await api.call("GET", "/login")).data["token"]

    assert (await api.call("GET", "/job", auth=None, headers=bearer(token))).status == 200


async def test_a_blocked_job_says_for_what_and_its_chain_is_killed_by_one_request(
    api: Api, runner: Runner
) -> None:
    """The hooks come from the catalogue; whoever waits shows for whom."""
    await runner.publish("t:first", kind="task")
    await runner.publish("t:last", kind="task", run_before=["t:first"])
    job_id = await api.enqueue("t:last")
    detail = await api.detail(job_id)
    answer = await api.call("PUT", f"/job/kill/{job_id}", json={"chain": True})

    assert detail["state"] == "blocked"
    assert [(row["qual_name"], row["state"]) for row in detail["waits_for"]] == [("t:first", "pending")]
    assert answer.data is True
    assert {(row["state"], row["changed"]) for row in answer.body["jobs"]} == {("killed", True)}
    assert len(answer.body["jobs"]) == 2


async def test_hooks_that_cannot_be_followed_are_refused(api: Api, runner: Runner) -> None:
    await runner.publish("t:round", kind="task", run_after=["t:back"])
    await runner.publish("t:back", kind="task", run_after=["t:round"])
    answer = await api.call("POST", "/job", json={"qual_name": "t:round", "follow": False})

    assert answer.status == 422
    assert "lead back: t:round -> t:back -> t:round" in answer.body["detail"]
    assert (await api.call("GET", "/job/queue")).data == []


async def walk(api: Api, path: str, **query: Any) -> list[dict[str, Any]]:
    """All rows of a list, by its cursors."""
    rows: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        answer = await api.call("POST", path, json={**query, "cursor": cursor})
        rows += answer.data
        assert (answer.body["total_count"], answer.body["page_count"]) == (None, None)
        assert answer.body["count"] == len(answer.data) <= query["per_page"]
        cursor = answer.body["next"]
    return rows


SORTS: list[list[list[Any]]] = [
    [["_id", 1]],
    [["_id", -1]],
    [["priority", -1]],
    [["query_at", 1]],
    [["query_at", -1], ["priority", 1]],
    [["error_cat", 1], ["qual_name", -1]],
]


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize("path", ["/job/queue", "/job/journal"])
async def test_a_walk_by_cursors(
    api: Api, runner: Runner, database: Database, path: str, sort: list[list[Any]]
) -> None:
    """Every row once, in the order of the pages, whatever it is sorted by and whether it is set or not."""
    at = datetime(2026, 1, 2, 3, 4, 5, 678000, UTC)
    for n in range(17):
        job = await runner.queue.enqueue(order(args={"n": n}, options={"priority": n % 3}))
        if n % 2:
            await database.collection(QUEUE).update_one({"_id": job.id}, {"$set": {"query_at": at}})
        if path == "/job/journal":
            await runner.queue.remove(job.id, by="test")
    pages = (await api.call("POST", path, json={"sort": sort, "per_page": 100})).data
    rows = await walk(api, path, sort=sort, per_page=4)
    some = await walk(api, path, sort=sort, per_page=4, filter={"priority": 1})

    key = {"qual_name": "name"}.get(sort[0][0], sort[0][0])
    assert sorted(row["_id"] for row in rows) == sorted(row["_id"] for row in pages)
    assert [row[key] for row in rows] == [row[key] for row in pages]
    assert len(rows) == 17
    assert [row["_id"] for row in some] == [row["_id"] for row in rows if row["priority"] == 1]


async def test_rows_that_come_and_go_move_no_others(api: Api, runner: Runner) -> None:
    """Behind a cursor comes what comes behind its row, even if that is gone by then."""
    ids = [await api.enqueue(n=n) for n in range(6)]
    first = await api.call("GET", "/job?per_page=3")
    for job_id in ids[:3]:
        await api.call("PUT", f"/job/remove/{job_id}")
    late = await api.enqueue(n=6)
    second = await api.call("GET", f"/job?per_page=3&cursor={first.body['next']}")
    third = await api.call("GET", f"/job?per_page=3&cursor={second.body['next']}")

    assert [row["_id"] for row in [*first.data, *second.data, *third.data]] == [str(i) for i in [*ids, late]]
    assert third.body["next"] is None
    assert "next" in (await api.call("GET", "/job?per_page=100")).body


@pytest.mark.parametrize(
    "query", [{"cursor": "x"}, {"cursor": "", "page": 1}, {"cursor": 7}, {"cursor": "W10", "sort": []}]
)
async def test_cursors_that_are_none(api: Api, query: dict[str, Any]) -> None:
    """400, and nothing is looked up."""
    answer = await api.call("POST", "/job/queue", json=query)
    assert answer.status == 400
    assert "cursor" in answer.body["error"]


async def test_a_cursor_of_another_order(api: Api, runner: Runner) -> None:
    """It says nothing about this one."""
    for n in range(3):
        await api.enqueue(n=n)
    cursor = (await api.call("GET", "/job?per_page=2")).body["next"]
    answer = await api.call("POST", "/job/queue", json={"cursor": cursor, "sort": [["priority", 1]]})
    assert answer.status == 400


async def test_many_are_not_counted(
    api: Api, runner: Runner, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those behind a filter up to a limit, and the answer says so; the last page is still the last."""
    monkeypatch.setattr(store, "COUNTED", 5)
    for n in range(8):
        await api.enqueue(n=n)
    pending = {"filter": {"state": "pending"}, "per_page": 3}
    some = await api.call("POST", "/job/queue", json=pending)
    last = await api.call("POST", "/job/queue", json={**pending, "page": -1})
    beyond = await api.call("POST", "/job/queue", json={**pending, "page": 2})
    all_of_them = await api.call("POST", "/job/queue", json={"per_page": 3})

    assert some.body["total_count"] == 5
    assert "more than 5 jobs match" in some.body["flash"][0]["message"]
    assert (last.body["total_count"], [row["args"]["n"] for row in last.data]) == (8, [6, 7])
    assert "flash" not in last.body
    assert [row["args"]["n"] for row in beyond.data] == [6, 7]
    assert all_of_them.body["total_count"] == 8
    assert "flash" not in all_of_them.body


async def test_what_is_published_anew_is_in_force_for_an_api_that_remembers(api: Api, runner: Runner) -> None:
    """The entry that the last request read is dropped as soon as its change is told."""
    body = {"qual_name": "tests.Job", "args": {"n": 1}, "follow": False}
    assert (await api.call("POST", "/job", json=body)).status == 200
    await runner.publish("tests.Job", schema={"type": "object", "additionalProperties": False})

    async def refused() -> bool:
        return (await api.call("POST", "/job", json={**body, "args": {"n": 2}})).status == 422

    await eventually_async(refused, what="the new schema is in force")
