"""The description of the API: valid, complete, for whom it is made, and of what is served just now."""

from __future__ import annotations

import re
from typing import Any

import pytest
from bson import ObjectId
from openapi_spec_validator import validate

from core4.api.routes import ROUTES
from core4.api.system import FILES
from core4.decorated import entries
from core4.signatures import schema
from core4.users import UserStore
from tests.integration.driver import ADMIN, Api, Runner, basic
from tests.jobs import etl

BASE = "/core4/api/v1"
DESCRIPTION = "/openapi.json"


def example(
    n: int, ratio: float, on: bool, word: str, data: dict[str, int], rows: list[str], last: int | None = 3
) -> None:
    """Do it.

    Slowly.
    """


SCHEMA = schema(example)


async def described(api: Api, **options: Any) -> dict[str, Any]:
    answer = await api.call("GET", DESCRIPTION, **options)
    assert answer.status == 200
    return answer.body


def tasks_of(document: dict[str, Any]) -> list[str]:
    return [path for path in document["paths"] if re.search("/[^{}]+/task/[^{}]+", path)]


async def test_it_is_valid_and_complete(api: Api, runner: Runner) -> None:
    """OpenAPI 3.1; every address of the table with its arguments, answers and errors."""
    await runner.publish("tests.Job", schema=SCHEMA)
    document = await described(api)
    validate(document)

    for route in ROUTES:
        if route.method == "*" or route.path.endswith("/task/{name}"):
            continue
        operation = document["paths"][re.sub(r":[^/]*(?=})", "", route.path)][route.method.lower()]
        statuses = set(operation["responses"])
        assert operation["summary"], route
        assert "400" in statuses
        assert {"401", "403"} <= statuses or route.access == "open"
        assert any(code < "400" for code in statuses) or route.handler.__name__ == "missing_id"
        given = {each["name"] for each in operation["parameters"]}
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        given |= set(body.get("schema", {}).get("properties", {}))
        wanted = {field.data_key or name for name, field in route.takes().fields.items()}
        assert wanted <= given, route
    ids = [each["operationId"] for path in document["paths"].values() for each in path.values()]
    assert len(ids) == len(set(ids))


@pytest.mark.row("F24")
async def test_a_section_per_namespace(api: Api, runner: Runner) -> None:
    """What can be enqueued stands in the section of its namespace; the rest is the manager's."""
    await runner.publish("tests.Job", schema=SCHEMA)
    await runner.publish("other:extract", namespace="other")
    await runner.up_also("other:extract")
    document = await described(api)
    paths = document["paths"]

    assert tasks_of(document) == [f"{BASE}/other/task/extract", f"{BASE}/DEFAULT/task/tests.Job"]
    assert paths[f"{BASE}/other/task/extract"]["post"]["tags"] == ["other"]
    assert paths[f"{BASE}/DEFAULT/task/tests.Job"]["post"]["tags"] == ["DEFAULT"]
    names = [tag["name"] for tag in document["tags"]]
    assert names[:2] == ["DEFAULT", "other"]
    assert all(name.startswith("Manager: ") for name in names[2:])
    assert paths[f"{BASE}/job/pull/result"]["get"]["tags"] == ["Manager: results"]


@pytest.mark.row("F22")
async def test_the_namespace_of_a_task_is_in_its_path(api: Api, runner: Runner) -> None:
    """DEFAULT unless one is named; a function in two has an address in each, and none elsewhere."""
    published = [entry for task in (etl.basic, etl.twice) for entry in entries(task)]
    await runner.catalogue.publish([{**entry, "file": "etl.py", "target": "etl.py"} for entry in published])
    await runner.up_also("DEFAULT:basic", "A:twice", "B:twice")
    paths = ("DEFAULT/task/basic?a=1&b=2", "A/task/twice?n=1", "B/task/twice?n=1", "DEFAULT/task/twice?n=1")
    answers = [await api.call("POST", f"/{path}") for path in paths]
    jobs = [(await api.call("GET", f"/job/{each.data}")).data for each in answers[:3]]

    assert [each.status for each in answers] == [200, 200, 200, 404]
    assert [job["namespace"] for job in jobs] == ["DEFAULT", "A", "B"]
    listed = tasks_of(await described(api))
    assert {path.removeprefix(f"{BASE}/") for path in listed} == {
        "DEFAULT/task/tests.Job",
        "DEFAULT/task/basic",
        "A/task/twice",
        "B/task/twice",
    }


@pytest.mark.row("F25")
async def test_a_refresh_shows_what_came_and_went(api: Api, runner: Runner) -> None:
    """A new task is there at once; when its last worker leaves it is hidden, and its address still works."""
    before = await api.call("GET", DESCRIPTION)
    await runner.publish("later:load", namespace="later")
    unserved = await described(api)
    await runner.up_also("later:load")
    after = await api.call("GET", DESCRIPTION)
    await runner.registry.leave(runner.owner)
    gone = await described(api)
    enqueued = await api.call("POST", "/later/task/load")

    new = f"{BASE}/later/task/load"
    assert new not in before.body["paths"]
    assert new not in unserved["paths"]
    assert new in after.body["paths"]
    assert tasks_of(gone) == []
    assert before.headers["ETag"] != after.headers["ETag"]
    assert "the job waits until one is started" in enqueued.body["flash"][0]["message"]


async def test_nothing_new_is_not_sent_again(api: Api, runner: Runner) -> None:
    """The same description has the same tag."""
    first = await api.call("GET", DESCRIPTION)
    again = await api.call("GET", DESCRIPTION, headers={"If-None-Match": first.headers["ETag"]})

    assert (again.status, again.body) == (304, {})
    assert first.headers["Cache-Control"] == "private, no-cache"


async def test_only_what_one_may_enqueue(api: Api, runner: Runner, users: UserStore) -> None:
    """Who has no right to a job does not read of it; without a user there is nothing to read."""
    await users.add("reader", "secret", [r"job://tests\.Job/r"])
    await users.add("doer", "secret", [r"job://tests\.Job/x"])

    assert tasks_of(await described(api, auth=("reader", "secret"))) == []
    assert tasks_of(await described(api, auth=("doer", "secret"))) == [f"{BASE}/DEFAULT/task/tests.Job"]
    assert (await api.call("GET", DESCRIPTION, auth=None)).status == 401
    assert (await api.call("GET", "docs", auth=None)).status == 401


async def test_parameters_are_the_functions_own(api: Api, runner: Runner) -> None:
    """Names, types and defaults: simple ones in the query, others by name in the body."""
    await runner.publish("tests.Job", schema=SCHEMA, doc=example.__doc__)
    operation = (await described(api))["paths"][f"{BASE}/DEFAULT/task/tests.Job"]["post"]
    query = {each["name"]: each for each in operation["parameters"] if each["in"] == "query"}
    body = operation["requestBody"]["content"]["application/json"]["schema"]

    assert {name: each["schema"] for name, each in query.items()} == {
        "n": {"type": "integer"},
        "ratio": {"type": "number"},
        "on": {"type": "boolean"},
        "word": {"type": "string"},
        "last": {"type": ["integer", "null"], "default": 3},
    }
    assert [name for name, each in query.items() if not each["required"]] == ["last"]
    assert body["properties"] == {
        "data": {"type": "object", "additionalProperties": {"type": "integer"}},
        "rows": {"type": "array", "items": {"type": "string"}},
    }
    assert body["required"] == ["data", "rows"]
    assert (operation["summary"], operation["description"]) == ("Do it.", "Slowly.")


async def test_enqueue_by_its_own_address(api: Api, runner: Runner) -> None:
    """Query texts are read as the signature has them; id and request come back; options may stand beside."""
    await runner.publish("tests.Job", schema=SCHEMA)
    query = "n=5&ratio=1.5&on=yes&word=7&last=null&priority=4"
    answer = await api.call(
        "POST",
        f"/DEFAULT/task/tests.Job?{query}",
        json={"data": {"a": 1}, "rows": ["x"]},
        headers={"Idempotency-Key": "k"},
    )
    again = await api.call(
        "POST",
        f"/DEFAULT/task/tests.Job?{query}",
        json={"data": {"a": 1}, "rows": ["x"]},
        headers={"Idempotency-Key": "k"},
    )
    job = await runner.queue.store.get(ObjectId(answer.data))

    assert job.args == {
        "n": 5,
        "ratio": 1.5,
        "on": True,
        "word": "7",
        "last": None,
        "data": {"a": 1},
        "rows": ["x"],
    }
    assert job.priority == 4
    assert answer.headers["X-Job-Id"] == answer.data == again.data
    assert again.headers["Idempotent-Replayed"] == "true"
    assert answer.body["request_id"] == answer.body["_id"] == again.body["request_id"]
    viewed = await api.call("GET", f"/job/view/result?request_id={answer.body['request_id']}")
    assert viewed.body["data"]["job_id"] == answer.data


@pytest.mark.row("F27")
@pytest.mark.parametrize(
    ("query", "body", "pointer", "message"),
    [
        ("", {}, "/n", "is required"),
        ("n=no", {}, "/n", "'no' is not of type 'integer'"),
        ("n=1.5", {}, "/n", "1.5 is not of type 'integer'"),
        ("n=", {}, "/n", "'' is not of type 'integer'"),
        ("", {"n": "1"}, "/n", "'1' is not of type 'integer'"),
        ("n=1&m=2", {}, "/m", "is not an argument"),
        ("n=1", {"rows": [1]}, "/rows", "[1] is not valid"),
        ("n=1&priority=high", {}, "/priority", "priority is 'high'"),
    ],
)
async def test_wrong_arguments_queue_nothing(
    api: Api, runner: Runner, query: str, body: dict[str, Any], pointer: str, message: str
) -> None:
    """422 with a pointer to the argument, and no record; by the general address the same."""

    def few(n: int, rows: list[str] | None = None) -> None: ...

    await runner.publish("tests.Job", schema=schema(few))
    answers = [await api.call("POST", f"/DEFAULT/task/tests.Job?{query}", json=body)]
    if not query:
        given = {"qual_name": "tests.Job", "args": body, "follow": False}
        answers += [await api.call("POST", "/job", json=given)]

    for answer in answers:
        assert (answer.status, answer.body["type"]) == (422, "urn:core4:problem:bad_arguments")
        error = next(each for each in answer.body["errors"] if each["pointer"] == pointer)
        assert error["message"].startswith(message)
    assert sum((await runner.queue.store.counts()).values()) == 0


@pytest.mark.parametrize("path", ["/DEFAULT/task/nobody", "/odd/task/extract", "/DEFAULT/task/other:extract"])
async def test_unknown_tasks(api: Api, runner: Runner, path: str) -> None:
    """404, also for a task of another namespace."""
    await runner.publish("other:extract", namespace="other")

    assert (await api.call("POST", path)).status == 404


async def test_rights_of_a_task(api: Api, runner: Runner, users: UserStore) -> None:
    """The same as by the general address."""
    await users.add("reader", "secret", [r"job://tests\.Job/r"])

    assert (await api.call("POST", "/DEFAULT/task/tests.Job", auth=("reader", "secret"))).status == 403


async def test_the_page_and_its_files(api: Api) -> None:
    """All it needs comes from here; what has a version in its name is kept by browsers."""
    async with api.session.get(api.url("docs"), headers=basic(*ADMIN)) as response:
        page = await response.text()
        policy = response.headers["Content-Security-Policy"]
    links = re.findall(r'(?:src|href)="/static/([^"]+)"', page)
    for name in links:
        async with api.session.get(api.url(f"static/{name}")) as response:
            assert response.status == 200
            kept = response.headers["Cache-Control"]
            assert ("immutable" in kept) is ("swagger-ui-" in name)

    assert len(links) == 3
    assert set(links) <= set(FILES)
    assert "http" not in re.sub(r"http-equiv", "", page)
    assert "script-src 'self';" in policy
    for path in ("static/swagger-ui-5.35.0/LICENSE", "static/../app.py", "static/%2e%2e/app.py"):
        assert (await api.call("GET", path)).status == 404
