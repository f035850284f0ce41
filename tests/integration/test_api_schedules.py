"""Schedules over HTTP: who sees and changes them, what is refused, and what a trigger makes."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import pytest
from bson import ObjectId

from core4 import cron
from core4.schedules import ScheduleStore
from core4.users import UserStore
from tests.helpers import eventually_async
from tests.integration.driver import Answer, Api, Runner

SCHEMA = {
    "type": "object",
    "properties": {"month": {"type": "string"}},
    "required": ["month"],
    "additionalProperties": False,
}
USERS = {
    "nobody": [],
    "reader": [r"job://tests\.Report/r"],
    "doer": [r"job://tests\.Report/x"],
    "boss": ["cop"],
}
PASSWORD = "secret"
SPEC = {"qual_name": "tests.Report", "expression": "0 6 * * *", "args": {"month": "2026-01"}}


@pytest.fixture
def schedules(database: Any) -> ScheduleStore:
    return ScheduleStore(database)


@pytest.fixture(autouse=True)
async def people(users: UserStore, runner: Runner) -> None:
    """One user of each kind, and a job with a required argument."""
    await runner.publish("tests.Report", schema=SCHEMA)
    for name, rights in USERS.items():
        await users.add(name, PASSWORD, rights)


async def make(api: Api, name: str = "daily", **more: Any) -> dict[str, Any]:
    schedule: dict[str, Any] = (await api.call("PUT", f"/schedule/{name}", json={**SPEC, **more})).data
    return schedule


# ---------------------------------------------------------------------- making and changing


async def test_an_operator_makes_a_schedule(api: Api) -> None:
    """It is shown with what is in force, who said so, and when it fires next."""
    made = await make(api, zone="Europe/Berlin", missed="all")

    assert (made["_id"], made["source"], made["state"]) == ("daily", "operator", "active")
    assert made["code"] is None
    assert made["override"] == {**SPEC, "zone": "Europe/Berlin", "missed": "all"}
    assert (made["limit"], made["enabled"]) == (100, True)
    since = datetime.fromisoformat(made["since"]).replace(tzinfo=UTC)
    following = cron.fires_between("0 6 * * *", since, since.replace(year=2100), "Europe/Berlin", 5)
    assert [datetime.fromisoformat(text).replace(tzinfo=UTC) for text in made["next"]] == following
    assert (await api.call("GET", "/schedule/daily")).data == made


async def test_an_unserved_job_is_warned_of(api: Api) -> None:
    answer = await api.call("PUT", "/schedule/daily", json=SPEC)
    assert answer.status == 200
    assert "no worker is up that runs [tests.Report]" in answer.body["flash"][0]["message"]


@pytest.mark.parametrize(("scope", "target"), [("everything", ""), ("job", "tests.Report")])
async def test_one_that_a_pause_keeps_from_firing_says_so(api: Api, scope: str, target: str) -> None:
    """It has no next time then, alone and in the list."""
    await make(api)
    await api.call("PUT", "/control/pause", json={"scope": scope, "target": target})
    shown = (await api.call("GET", "/schedule/daily")).data
    (listed,) = (await api.call("GET", "/schedule")).data
    await api.call("PUT", "/control/resume", json={"scope": scope, "target": target})
    after = (await api.call("GET", "/schedule/daily")).data

    assert shown == listed
    assert (shown["state"], shown["next"]) == ("held", [])
    assert "is paused by" in shown["reason"]
    assert (after["state"], len(after["next"])) == ("active", 5)


async def test_the_operator_wins_over_the_code_until_reset(api: Api, schedules: ScheduleStore) -> None:
    """Field by field; both are shown, and a new publication changes nothing about it."""
    code = {**SPEC, "name": "tests.Report", "options": {"priority": 3}}
    await schedules.publish([code])
    changed = await api.call(
        "PUT", "/schedule/tests.Report", json={"qual_name": "tests.Report", "expression": "30 7 * * *"}
    )
    await schedules.publish([{**code, "missed": "all"}])

    assert changed.data["override"] == {"expression": "30 7 * * *"}
    shown = (await api.call("GET", "/schedule/tests.Report")).data
    assert (shown["source"], shown["expression"], shown["missed"]) == ("code", "30 7 * * *", "all")
    assert shown["code"]["expression"] == "0 6 * * *"
    assert shown["updated_by"] == "admin"

    reset = await api.call("PUT", "/schedule/reset/tests.Report", json={"fields": ["expression"]})
    assert (reset.data["override"], reset.data["expression"]) == ({}, "0 6 * * *")


async def test_pause_and_resume(api: Api) -> None:
    await make(api)
    paused = (await api.call("PUT", "/schedule/pause/daily")).data
    assert (paused["state"], paused["paused"]["by"], paused["next"]) == ("paused", "admin", [])
    resumed = (await api.call("PUT", "/schedule/resume/daily")).data
    assert (resumed["state"], resumed["paused"]) == ("active", None)
    assert len(resumed["next"]) == 5


async def test_delete(api: Api, schedules: ScheduleStore) -> None:
    """An operator's own; what the code has would come back."""
    await make(api)
    assert (await api.call("DELETE", "/schedule/daily")).data is True
    assert (await api.call("GET", "/schedule/daily")).status == 404
    assert (await api.call("DELETE", "/schedule/daily")).status == 404

    await schedules.publish([{**SPEC, "name": "coded"}])
    refused = await api.call("DELETE", "/schedule/coded")
    assert refused.status == 409
    assert "comes from the code" in refused.body["detail"]


@pytest.mark.parametrize(
    "name", ["a.b.C", "reports/daily/morning", "ns:task", "a@b", "pause", "ümlaut", "x-1"]
)
async def test_names_that_look_like_paths(api: Api, name: str) -> None:
    """Every verb reaches it, escaped or not."""
    path = quote(name, safe="")
    assert (await make(api, path))["_id"] == name
    for verb in ("pause", "resume", "reset"):
        body = {"fields": ["zone"]} if verb == "reset" else {}
        assert (await api.call("PUT", f"/schedule/{verb}/{path}", json=body)).data["_id"] == name
    assert (await api.call("GET", f"/schedule/{name}")).data["_id"] == name
    assert ObjectId.is_valid((await api.call("PUT", f"/schedule/trigger/{path}")).data)
    assert (await api.call("DELETE", f"/schedule/{path}")).status == 200


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("new", {"expression": "@daily"}, 400, "needs its qual_name"),
        ("new", {"qual_name": "tests.Job"}, 422, "needs its expression"),
        ("new", {**SPEC, "expression": "61 * * * *"}, 400, "minute: 61 is not from 0 to 59"),
        ("new", {**SPEC, "expression": 5}, 400, "expected a cron expression"),
        ("new", {**SPEC, "zone": "Mars/Olympus"}, 400, "not a time zone"),
        ("new", {**SPEC, "zone": "../../etc/passwd"}, 400, "not a time zone"),
        ("new", {**SPEC, "zone": None}, 400, "must not be null"),
        ("new", {**SPEC, "missed": "some"}, 400, "skip, one or all"),
        ("new", {**SPEC, "limit": 1e9}, 400, "from 1 to 1000"),
        ("new", {**SPEC, "options": {"priority": "high"}}, 400, "priority is 'high'"),
        ("new", {**SPEC, "options": {"colour": 1}}, 400, "mapping with some of"),
        ("new", {**SPEC, "colour": 1}, 400, "unknown argument [colour]"),
        ("new", {**SPEC, "args": {}}, 422, "month"),
        ("new", {**SPEC, "args": {"month": 5}}, 422, "/month"),
        ("new", {**SPEC, "args": {"month": "x" * 300_000}}, 413, "pass a reference"),
        ("new", {**SPEC, "args": []}, 400, "a JSON object"),
        ("new", {**SPEC, "qual_name": "tests.Never"}, 404, "unknown job [tests.Never]"),
        ("next", SPEC, 422, "an address of its own"),
        ("a%20b", SPEC, 422, "name is 'a b'"),
        ("x" * 201, SPEC, 422, "1 to 200"),
        ("%00", SPEC, 422, "1 to 200"),
        ("daily", {"qual_name": "tests.Job"}, 409, "for another job"),
        ("daily", {"args": {"year": 1}}, 422, "year"),
        ("reset/daily", {"fields": ["colour"]}, 400, "expected some of"),
        ("reset/daily", {"fields": [{}]}, 400, "expected some of"),
        ("reset/daily", {}, 422, "needs its qual_name"),
        ("tests.Job", SPEC, 409, "the name of another job"),
        ("pause/nothing", {}, 404, "no schedule [nothing]"),
        ("trigger/nothing", {}, 404, "no schedule [nothing]"),
    ],
)
async def test_refused(api: Api, path: str, body: dict[str, Any], status: int, words: str) -> None:
    """With the reason, and nothing is changed."""
    before = await make(api)
    answer = await api.call("PUT", f"/schedule/{path}", json=body)

    assert answer.status == status, answer.body
    assert words in answer.body["detail"]
    assert answer.body["status"] == status
    rows = (await api.call("GET", "/schedule", json={"count": 5})).data
    assert [row["rev"] for row in rows] == [before["rev"]]


async def test_a_job_that_is_gone_can_still_be_disabled(api: Api, schedules: ScheduleStore) -> None:
    await schedules.publish([{"name": "old", "qual_name": "tests.Gone", "expression": "@daily"}])
    disabled = (await api.call("PUT", "/schedule/old", json={"enabled": False})).data
    assert (disabled["state"], disabled["next"]) == ("disabled", [])
    assert (await api.call("PUT", "/schedule/old", json={"args": {}})).status == 404
    assert (await api.call("PUT", "/schedule/trigger/old")).status == 404


# ---------------------------------------------------------------------- rights


@pytest.mark.parametrize("who", USERS)
async def test_rights(api: Api, who: str) -> None:
    """Reading: r, x or cop. Changing: x or cop, also for a name that is new."""
    await make(api)
    auth = (who, PASSWORD)
    may_read, may_change = who != "nobody", who in ("doer", "boss")

    listed = await api.call("GET", "/schedule", auth=auth)
    assert [row["_id"] for row in listed.data] == (["daily"] if may_read else [])
    assert listed.body["total_count"] == (1 if may_read else 0)
    assert (await api.call("GET", "/schedule/daily", auth=auth)).status == (200 if may_read else 403)
    for method, path, body in (
        ("PUT", "daily", {"expression": "0 7 * * *"}),
        ("PUT", "other", SPEC),
        ("PUT", "pause/daily", {}),
        ("PUT", "resume/daily", {}),
        ("PUT", "trigger/daily", {}),
        ("PUT", "reset/daily", {"fields": ["zone"]}),
        ("DELETE", "daily", {}),
    ):
        answer = await api.call(method, f"/schedule/{path}", auth=auth, json=body)
        assert answer.status == (200 if may_change else 403), path
    assert (await api.call("GET", "/schedule", auth=None)).status == 401
    assert (await api.call("PUT", "/schedule/other", auth=None, json=SPEC)).status == 401


async def test_nobody_takes_over_a_job_that_is_not_his(api: Api, schedules: ScheduleStore) -> None:
    """Naming one's own job does not open another's schedule."""
    await schedules.publish([{"name": "theirs", "qual_name": "tests.Job", "expression": "@daily"}])
    answer = await api.call("PUT", "/schedule/theirs", auth=("doer", PASSWORD), json=SPEC)
    assert answer.status == 403
    assert (await schedules.get("theirs")).document["override"] == {}


async def test_a_key_of_slots_is_shared_if_the_code_says_so(
    api: Api, runner: Runner, schedules: ScheduleStore
) -> None:
    await schedules.publish([{**SPEC, "name": "coded", "options": {"max_running_key": "licence"}}])
    await make(api, "made", options={"max_running_key": "licence"})
    keys = []
    for name in ("coded", "made"):
        job_id = (await api.call("PUT", f"/schedule/trigger/{name}")).data
        keys.append((await api.detail(job_id))["max_running_key"])

    assert keys == ["licence", "tests.Report:licence"]


async def test_arguments_of_many_levels(api: Api) -> None:
    args = '{"a": ' + "[" * 960 + "]" * 960 + "}"
    text = json.dumps({**SPEC, "args": 0})
    kind = {"Content-Type": "application/json"}
    whole = text.replace('"args": 0', f'"args": {args}')
    body = await api.call("PUT", "/schedule/x", data=whole, headers=kind)
    query = await api.call("PUT", "/schedule/x", params={**SPEC, "args": args})
    assert (body.status, query.status) == (400, 400)


# ---------------------------------------------------------------------- lists and previews


async def test_a_list_is_filtered_sorted_and_cut(api: Api) -> None:
    for name in ("a", "b", "c"):
        await make(api, name)
    await api.call("PUT", "/schedule/pause/b")
    await make(api, "jobs", qual_name="tests.Job", args={})

    async def ids(**query: Any) -> list[str]:
        return [row["_id"] for row in (await api.call("GET", "/schedule", json=query)).data]

    assert await ids(per_page=2) == ["a", "b"]
    assert await ids(per_page=3, page=-1) == ["jobs"]
    assert await ids(sort=[["_id", -1]]) == ["jobs", "c", "b", "a"]
    assert await ids(filter={"state": "paused"}) == ["b"]
    assert await ids(filter={"qual_name": {"in": ["tests.Job"]}}) == ["jobs"]
    assert await ids(search="job") == ["jobs"]
    assert await ids(search="report") == ["a", "b", "c"]
    answer = await api.call("GET", "/schedule", json={"filter": {"override": 1}})
    assert answer.status == 400


async def test_a_preview_stores_nothing(api: Api, schedules: ScheduleStore) -> None:
    query = {"expression": "*/15 8 * * *", "zone": "Europe/Berlin", "count": "4"}
    data = (await api.call("GET", "/schedule/next", params=query)).data

    assert len(data["next"]) == 4
    assert data["zone"] == "Europe/Berlin"
    assert await schedules.all() == []
    for bad in (
        {},
        {**query, "expression": "59/15 * * * *"},
        {**query, "count": "101"},
        {**query, "zone": "X"},
    ):
        assert (await api.call("GET", "/schedule/next", params=bad)).status == 400


# ---------------------------------------------------------------------- triggers


async def test_a_trigger_makes_one_job_per_key(api: Api, runner: Runner) -> None:
    """Whatever the schedule's state; the key is the user's own."""
    await make(api, options={"priority": 7})
    await api.call("PUT", "/schedule/pause/daily")

    async def trigger(who: str, key: str | None) -> str:
        headers = {"Idempotency-Key": key} if key else {}
        answer = await api.call("PUT", "/schedule/trigger/daily", auth=(who, PASSWORD), headers=headers)
        assert answer.headers["X-Job-Id"] == answer.data
        return str(answer.data)

    first = await trigger("boss", "k")
    assert await trigger("boss", "k") == first
    assert (
        len({first, await trigger("doer", "k"), await trigger("boss", None), await trigger("boss", None)})
        == 4
    )
    job = await api.detail(ObjectId(first))
    assert (job["qual_name"], job["args"], job["priority"]) == ("tests.Report", {"month": "2026-01"}, 7)
    assert job["enqueued"]["username"] == "boss"


async def test_a_trigger_of_arguments_that_fit_no_more(api: Api, runner: Runner) -> None:
    await make(api)
    await runner.publish("tests.Report", schema={**SCHEMA, "required": ["month", "year"]})

    async def refused() -> Answer | None:
        answer = await api.call("PUT", "/schedule/trigger/daily")
        return answer if answer.status == 422 else None

    # The API remembers what was published before for a moment.
    answer = await eventually_async(refused)
    assert answer is not None
    assert answer.body["errors"]
