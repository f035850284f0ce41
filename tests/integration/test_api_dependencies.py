"""Jobs that wait for others, from outside: over HTTP, many at once, and by the command line."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from bson import ObjectId

from core4 import cli
from core4.retries import Outcome
from tests.integration.driver import ADMIN, Answer, Api, Runner

UNKNOWN = "5f6252b42e84fa29038a3e3f"


async def enqueue(api: Api, n: int, *dependencies: Any, **more: Any) -> Answer:
    body = {"qual_name": "tests.Job", "args": {"n": n}, "follow": False, "dependencies": [*dependencies]}
    return await api.call("POST", "/job", json=body, **more)


async def state_of(api: Api, job_id: str) -> str:
    return str((await api.call("GET", f"/job/{job_id}")).data["state"])


async def test_a_job_waits_for_those_it_names(api: Api, runner: Runner) -> None:
    first = (await enqueue(api, 1)).data
    second = (await enqueue(api, 2, first, first)).data
    assert await state_of(api, second) == "blocked"
    await (await runner.start()).finish(Outcome.complete(None))

    assert await state_of(api, second) == "pending"
    assert await state_of(api, (await enqueue(api, 3, first)).data) == "pending", "that has completed"


@pytest.mark.parametrize("wrong", [UNKNOWN, "no id", 5, None, {"_id": UNKNOWN}, "5" * 24 + "\u2028"])
async def test_an_id_of_no_job_is_pointed_to(api: Api, runner: Runner, wrong: Any) -> None:
    first = (await enqueue(api, 1)).data
    answer = await enqueue(api, 2, first, wrong)

    assert answer.status == 422
    assert [error["pointer"] for error in answer.body["errors"]] == ["/dependencies/1"]
    assert (await api.call("GET", "/job/count")).data["blocked"] == 0
    assert (await api.call("GET", "/job/count")).data["pending"] == 1


async def test_one_cannot_ask_for_jobs_that_one_may_not_read(api: Api, runner: Runner) -> None:
    await runner.publish("tests.Other")
    await api.users.add("eve", "secret", allow=["job://tests.Job/x"])
    other = await api.enqueue("tests.Other")
    refused = await enqueue(api, 1, str(other), auth=("eve", "secret"))
    unknown = await enqueue(api, 1, UNKNOWN, auth=("eve", "secret"))

    assert refused.status == 422
    assert refused.body["detail"].replace(str(other), UNKNOWN) == unknown.body["detail"]


async def test_there_is_a_most(api: Api, runner: Runner) -> None:
    assert (await enqueue(api, 1, *[UNKNOWN] * 101)).status == 400


async def test_many_at_once(api: Api, runner: Runner) -> None:
    first = (await enqueue(api, 1)).data
    jobs = [
        {"qual_name": "tests.Job", "args": {"n": n}, "dependencies": [job_id]}
        for n, job_id in enumerate([first, UNKNOWN], 2)
    ]
    good, bad = (await api.call("POST", "/job/batch", json={"jobs": jobs})).data

    assert await state_of(api, good["_id"]) == "blocked"
    assert (bad["outcome"], bad["status"], bad["errors"][0]["pointer"]) == ("refused", 422, "/dependencies/0")


async def test_the_command_line_makes_and_kills_a_chain(
    api: Api, runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CORE4_URL", api.root)
    monkeypatch.setenv("CORE4_USER", ADMIN[0])
    monkeypatch.setenv("CORE4_PASSWORD", ADMIN[1])

    async def core4(*words: str, code: int = 0) -> str:
        assert await asyncio.to_thread(cli.main, words) == code
        return capsys.readouterr().out.strip()

    first = await core4("job", "enqueue", "tests.Job", "n=1")
    second = await core4("job", "enqueue", "tests.Job", "n=2", "--dependency", first)
    third = await core4("job", "enqueue", "tests.Job", "n=3", "--dependency", first, "--dependency", second)
    await core4("job", "enqueue", "tests.Job", "n=4", "--dependency", UNKNOWN, code=2)
    await core4("job", "kill", "--chain", "--all", code=2)
    assert await state_of(api, third) == "blocked"
    assert first in await core4("job", "kill", first, "--chain", "-o", "json")

    for job_id in (first, second, third):
        assert await state_of(api, job_id) in ("killed", "error")


async def test_kill_with_its_chain_names_each_job(
    api: Api, runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prerequisites of a task are ended with it."""
    before = ["tests.One", "tests.Two"]
    await runner.publish("tests.One", "tests.Two", kind="task", unique=False)
    await runner.publish("tests.Parent", kind="task", unique=False, run_before=before)
    parent = str(await api.enqueue("tests.Parent"))
    for name, value in (("URL", api.root), ("USER", ADMIN[0]), ("PASSWORD", ADMIN[1])):
        monkeypatch.setenv(f"CORE4_{name}", value)
    assert await asyncio.to_thread(cli.main, ["job", "kill", parent, "--chain", "-o", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)

    assert len({row["_id"] for row in rows}) == 3
    assert {row["state"] for row in rows} == {"killed"}
    assert ObjectId(parent) in {ObjectId(row["_id"]) for row in rows}
