"""Manager and worker in an application: a real aiohttp application on a real port."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from core4 import JobManager, JobWorker, task
from core4.api.keys import BASE
from core4.database import Database
from core4.errors import (
    BadOption,
    ConfigError,
    Core4Error,
    JobNotFound,
    ResultGone,
    Unauthenticated,
    UsageError,
)
from core4.store import JOURNAL
from core4.timers import Timers
from core4.worker.local import Local
from tests.helpers import FAST, eventually_async
from tests.integration.driver import basic

SECRET = "abcd1234"
KEY = web.AppKey("job_manager", JobManager)
WORKER = web.AppKey("worker", JobWorker)
Setup = Callable[[web.Application], Awaitable[None]]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch, mongo_url: str, database: Database, tmp_path: Path) -> None:
    """Settings of an application come from its environment."""
    own = {"CORE4_MONGO_URL": mongo_url, "CORE4_MONGO_DATABASE": database.name, "CORE4_HOME": str(tmp_path)}
    for name, value in {**FAST, **own}.items():
        monkeypatch.setenv(name, value)


class Site:
    """A running application and its client."""

    def __init__(self, app: web.Application, port: int, session: aiohttp.ClientSession) -> None:
        self.app, self.port, self.session = app, port, session
        self.root = f"http://127.0.0.1:{port}"

    async def call(
        self, method: str, path: str, *, auth: tuple[str, str] | None = ("admin", SECRET), **more: Any
    ) -> tuple[int, Any]:
        headers = {**(basic(*auth) if auth else {}), **more.pop("headers", {})}
        async with self.session.request(method, self.root + path, headers=headers, **more) as response:
            body = await response.json() if "json" in response.content_type else await response.text()
            return response.status, body

    async def submit(self, name: str, namespace: str = "DEFAULT", **args: Any) -> str:
        """Enqueue a task by its own address, as soon as it is published."""

        async def look() -> Any:
            status, body = await self.call("POST", f"{BASE}/{namespace}/task/{name}", json=args)
            assert status == 200, body
            return body

        return str((await eventually_async(look, what=f"{name} is published"))["data"])


@asynccontextmanager
async def served(setup: Setup, *, port: int = 0) -> AsyncIterator[Site]:
    """An application that is set up on startup, until the end of the block."""
    app = web.Application()
    app.router.add_get("/", own_page)
    app.on_startup.append(setup)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    try:
        await site.start()
        async with aiohttp.ClientSession() as session:
            yield Site(app, runner.addresses[0][1], session)
    finally:
        async with asyncio.timeout(40):
            await runner.cleanup()


async def own_page(request: web.Request) -> web.Response:
    return web.Response(text="mine")


@pytest.mark.row("F1", "F2", "F20", "F21", "F22")
async def test_a_manager_in_an_application(tmp_path: Path) -> None:
    """API, page and local tasks on the application's port; afterwards nothing is left of it."""
    before, loop_thread = asyncio.all_tasks(), os.getpid()

    async def setup(app: web.Application) -> None:
        manager = app[KEY] = await JobManager.create(app, SECRET)

        @manager.task()
        async def here(a: int, b: int = 1) -> dict[str, Any]:
            print("said here")
            await asyncio.sleep(0)
            return {"pid": os.getpid(), "sum": a + b}

        @manager.task(namespace="other")
        def apart(seconds: float) -> int:
            print("said apart")
            time.sleep(seconds)
            return os.getpid()

    async with served(setup) as site:
        manager: JobManager = site.app[KEY]
        assert await site.call("GET", "/") == (200, "mine")
        assert (await site.call("GET", "/nothing"))[0] == 404
        assert (await site.call("GET", "/docs"))[0] == 200
        assert (await site.call("GET", f"{BASE}/job"))[0] == 200
        slow = await site.submit("apart", "other", seconds=1.0)
        quick = await site.submit("here", a=2)

        assert await manager.get_job_result(quick) == {"pid": loop_thread, "sum": 3}
        assert await manager.get_job_result(slow) != loop_thread
        for job_id, text in ((quick, "said here"), (slow, "said apart")):
            lines = (await site.call("GET", f"{BASE}/job/log/{job_id}", params={"per_page": 50}))[1]["data"]
            assert text in [line["message"] for line in lines]
        with pytest.raises(ResultGone):
            await manager.get_job_result(quick)
        with pytest.raises(JobNotFound):
            await manager.get_job_result("0" * 24)

    assert asyncio.all_tasks() - before == set()


async def test_what_an_application_awaits_of_its_tasks_is_a_job(database: Database) -> None:
    """From its loop and its threads; a task of a task, too; and what comes of a failure."""

    async def setup(app: web.Application) -> None:
        manager = await JobManager.create(app, SECRET)

        @manager.task()
        async def here(a: int, *args: int) -> list[int]:
            return [a, *args]

        @manager.task(namespace="other")
        def apart(a: int) -> int:
            return here.call(a)[0] + os.getpid()  # type: ignore[no-any-return]

        @manager.task(retry_policy="never")
        async def fails() -> None:
            raise ValueError("as it has to")

        async def result(request: web.Request) -> web.Response:
            with pytest.raises(UsageError, match="submit_async"):
                here.submit(1)
            with pytest.raises(Core4Error, match="as it has to"):
                await fails()
            job_id = await here.submit_async(3)
            found = [await here(1, 2), await apart(5), await asyncio.to_thread(apart.call, 6)]
            return web.json_response([*found, await manager.get_job_result(job_id)])

        app.router.add_get("/result", result)

    async with served(setup) as site:
        status, found = await site.call("GET", "/result")
        assert status == 200, found
        expected = ["DEFAULT:fails", *4 * ["DEFAULT:here"], *2 * ["other:apart"]]

        async def kept() -> bool:
            names = sorted([row["name"] async for row in database.collection(JOURNAL).find({})])
            assert names == expected
            return True

        await eventually_async(kept, what="all of them are in the journal")
    assert (found[0], found[3]) == ([1, 2], [3])
    assert {found[1] - 5, found[2] - 6} & {os.getpid()} == set()


@pytest.mark.row("F3")
async def test_where_the_state_is_can_be_said(mongo_url: str, database_name: str) -> None:
    """Two managers with two databases: neither knows of the other's jobs, or is asked to run them."""

    def setup(name: str, log: list[str]) -> Setup:
        async def create(app: web.Application) -> None:
            manager = app[KEY] = await JobManager.create(
                app, SECRET, mongo_url=mongo_url, mongo_database=name
            )

            @manager.task()
            async def noted(text: str) -> None:
                log.append(text)

        return create

    second = f"{database_name}_2"
    logs: tuple[list[str], list[str]] = [], []
    async with served(setup(database_name, logs[0])) as one, served(setup(second, logs[1])) as other:
        ids = [await site.submit("noted", text=text) for site, text in ((one, "here"), (other, "there"))]
        for site, job_id, foreign in ((one, ids[0], ids[1]), (other, ids[1], ids[0])):
            await site.app[KEY].get_job_result(job_id)
            assert (await site.call("GET", f"{BASE}/job/{job_id}"))[0] == 200
            assert (await site.call("GET", f"{BASE}/job/{foreign}"))[0] == 404
    assert logs == (["here"], ["there"])
    left = await Database.connect(mongo_url, second, app_name="tests")
    await left.drop()
    await left.close()


async def test_a_task_of_an_application_can_be_killed() -> None:
    """On the loop and in a fork, where it takes its processes along."""

    async def setup(app: web.Application) -> None:
        manager = app[KEY] = await JobManager.create(app, SECRET)

        @manager.task(retry_policy="never")
        async def waits() -> None:
            await asyncio.sleep(600)

        @manager.task(retry_policy="never")
        def sleeps() -> None:
            time.sleep(600)

        @manager.task(retry_policy="never")
        def dies() -> None:
            os.kill(os.getpid(), 9)

    async with served(setup) as site:
        for name in ("waits", "sleeps"):
            job_id = await site.submit(name)

            async def running(job_id: str = job_id) -> bool:
                return bool((await site.call("GET", f"{BASE}/job/{job_id}"))[1]["data"]["state"] == "running")

            await eventually_async(running, what=f"{name} runs")
            assert (await site.call("PUT", f"{BASE}/job/kill/{job_id}"))[0] == 200
            with pytest.raises(Core4Error, match="kill"):
                await site.app[KEY].get_job_result(job_id)
        with pytest.raises(Core4Error, match="signal 9"):
            await site.app[KEY].get_job_result(await site.submit("dies"))


@pytest.mark.parametrize("steps", [0, 1, 3])
async def test_a_task_that_is_cancelled_at_once_leaves_no_socket(steps: int) -> None:
    local = Local()
    local.add(task(namespace="A")(work_a))
    before = set(Path("/proc/self/fd").iterdir())
    place = await local.start(local.entries["A:work_a"])
    for _ in range(steps):
        await asyncio.sleep(0)
    (body,) = local._bodies
    body.cancel()
    await place.wait()
    place.close()

    async def closed() -> bool:
        return {each for each in Path("/proc/self/fd").iterdir() if each.exists()} <= before

    await eventually_async(closed, what="its sockets are closed")


async def test_without_users_it_is_for_this_machine_only() -> None:
    async def setup(app: web.Application) -> None:
        app[KEY] = await JobManager.create(app, SECRET)

    async with served(setup) as site:
        path = f"{BASE}/job"
        assert (await site.call("GET", path))[0] == 200
        assert (await site.call("GET", path, auth=None))[0] == 401
        assert (await site.call("GET", path, auth=("admin", "abcd12345")))[0] == 401
        assert (await site.call("GET", path, auth=("ann", SECRET)))[0] == 401
        status, body = await site.call("GET", path, headers={"Host": "manager.example.org"})
        assert (status, "users=" in body["detail"]) == (401, True)


async def test_with_users_the_secret_opens_nothing() -> None:
    async def setup(app: web.Application) -> None:
        app[KEY] = await JobManager.create(app, SECRET, users={"ann": "her own"})

    async with served(setup) as site:
        assert (await site.call("GET", f"{BASE}/job", auth=("ann", "her own")))[0] == 200
        assert (await site.call("GET", f"{BASE}/job"))[0] == 401


async def test_what_a_manager_does_not_accept() -> None:
    app = web.Application()
    with pytest.raises(ConfigError, match="8 to 1000 characters"):
        await JobManager.create(app, "short")
    with pytest.raises(ConfigError, match="broker_path"):
        await JobManager.create(app, SECRET, broker_type="rabbitmq")


@pytest.mark.row("F18", "F19", "F60", "F26")
async def test_a_worker_in_another_application() -> None:
    """Its tasks are described as local ones are, run there, and are there again when the manager is."""

    async def setup(app: web.Application) -> None:
        manager = app[KEY] = await JobManager.create(app, SECRET)
        manager.task(namespace="LOCAL")(work_a)

    async def setup_worker(app: web.Application) -> None:
        worker = app[WORKER] = await JobWorker.create(
            app,
            server_secret=SECRET,
            manager_host="127.0.0.1",
            manager_port=port,
            manager_secret=SECRET,
            jobs_queue="REMOTE",
        )
        with pytest.raises(ConfigError, match="REMOTE"):
            worker.task(namespace="OTHER")
        worker.task()(work_a)

    async with served(setup) as first:
        port = first.port
        worker = served(setup_worker)
        other = await worker.__aenter__()
        try:
            job_id = await first.submit("work_a", "REMOTE", a=1, b={"x": 2})
            assert await first.app[KEY].get_job_result(job_id) == {"result": [1, {"x": 2}, 3]}
            paths = (await first.call("GET", f"{BASE}/openapi.json"))[1]["paths"]
            local, remote = (paths[f"{BASE}/{name}/task/work_a"]["post"] for name in ("LOCAL", "REMOTE"))
            assert {**local, "tags": 0, "operationId": 0} == {**remote, "tags": 0, "operationId": 0}
        except BaseException:
            await worker.__aexit__(None, None, None)
            raise
    try:
        async with served(setup, port=port) as second:
            job_id = await second.submit("work_a", "REMOTE", a=1, b={})
            assert await second.app[KEY].get_job_result(job_id) == {"result": [1, {}, 3]}
            assert other.app[WORKER]._worker.owner.id
    finally:
        await worker.__aexit__(None, None, None)


async def work_a(a: int, b: dict[str, int], c: int | None = 3) -> dict[str, Any]:
    """Do the work."""
    return {"result": [a, b, c]}


@pytest.mark.row("F18")
async def test_a_worker_with_a_wrong_secret_is_refused() -> None:
    async def setup(app: web.Application) -> None:
        app[KEY] = await JobManager.create(app, SECRET)

    async with served(setup) as site:
        with pytest.raises(Unauthenticated, match="does not know the secret"):
            await JobWorker.create(
                web.Application(),
                manager_host="127.0.0.1",
                manager_port=site.port,
                manager_secret="wrong one",
            )
        rows = (await site.call("GET", f"{BASE}/worker"))[1]["data"]
        assert len(rows) == 1  # the manager's own


@pytest.mark.row("F55", "F56", "F57")
async def test_pause_and_resume(tmp_path: Path) -> None:
    """What runs goes on, what comes waits; that it is paused and idle is to be seen."""
    gate = tmp_path / "gate"

    async def setup(app: web.Application) -> None:
        manager = app[KEY] = await JobManager.create(app, SECRET)

        @manager.task()
        async def until_told() -> str:
            while not gate.exists():
                await asyncio.sleep(0.02)
            return "done"

        @manager.task()
        async def quick() -> int:
            return 1

    async with served(setup) as site:
        manager = site.app[KEY]
        running = await site.submit("until_told")

        async def state(job_id: str) -> str:
            return str((await site.call("GET", f"{BASE}/job/{job_id}"))[1]["data"]["state"])

        async def runs() -> bool:
            return await state(running) == "running"

        async def shown(running: int) -> bool:
            (row,) = (await site.call("GET", f"{BASE}/worker"))[1]["data"]
            return bool(row["paused_here"] and row["running"] == running)

        await eventually_async(runs, what="it runs")
        manager.toggle_workers(pause=True)
        await eventually_async(lambda: shown(1), what="it is shown as paused")
        waiting = await site.submit("quick")
        gate.touch()
        assert await manager.get_job_result(running) == "done"
        await eventually_async(lambda: shown(0), what="it is shown as paused and idle")
        assert await state(waiting) == "pending"
        manager.toggle_workers(pause=False)
        assert await manager.get_job_result(waiting) == 1

        manager.toggle_workers(pause=True, scope="all")

        async def closed() -> bool:
            return bool((await site.call("GET", f"{BASE}/control"))[1]["data"]["pauses"])

        await eventually_async(closed, what="everything is paused")
        manager.toggle_workers(pause=False, scope="all")
        assert await manager.get_job_result(await site.submit("quick")) == 1


@pytest.mark.row("F55", "F57")
async def test_a_worker_elsewhere_pauses_for_itself() -> None:
    """Its manager goes on with its own jobs; those of the worker wait until it goes on, too."""

    async def setup(app: web.Application) -> None:
        app[KEY] = await JobManager.create(app, SECRET)
        app[KEY].task(namespace="LOCAL")(work_a)

    async def setup_worker(app: web.Application) -> None:
        worker = app[WORKER] = await JobWorker.create(
            app,
            manager_host="127.0.0.1",
            manager_port=site.port,
            manager_secret=SECRET,
            jobs_queue="REMOTE",
        )
        worker.task()(work_a)

    async with served(setup) as site:
        manager = site.app[KEY]
        async with served(setup_worker) as other:

            async def shown(*paused: bool) -> bool:
                rows = (await site.call("GET", f"{BASE}/worker"))[1]["data"]
                return sorted((row["paused_here"], row["running"]) for row in rows) == [
                    (each, 0) for each in paused
                ]

            first = await site.submit("work_a", "REMOTE", a=1, b={})
            assert await manager.get_job_result(first) == {"result": [1, {}, 3]}
            other.app[WORKER].toggle_workers(pause=True)
            await eventually_async(lambda: shown(False, True), 60, what="one is paused and idle")
            waiting = await site.submit("work_a", "REMOTE", a=2, b={})
            local = await site.submit("work_a", "LOCAL", a=3, b={})
            assert await manager.get_job_result(local) == {"result": [3, {}, 3]}
            assert (await site.call("GET", f"{BASE}/job/{waiting}"))[1]["data"]["state"] == "pending"
            other.app[WORKER].toggle_workers(pause=False)
            assert await manager.get_job_result(waiting) == {"result": [2, {}, 3]}


@pytest.mark.row("F46", "F58")
async def test_functions_by_the_clock(caplog: pytest.LogCaptureFixture) -> None:
    """Plain and coroutine functions, each tick; an exception does not stop the later ones."""
    timers, called = Timers(), []

    @timers(schedule="* * * * * *", default_args={"args": ["plain"], "kwargs": {"n": 1}})
    def plain(word: str, n: int) -> None:
        called.append((word, n))

    @timers(schedule="* * * * * *")
    async def coroutine() -> None:
        called.append(("coroutine", len(called)))
        raise ValueError("every time")

    async def both() -> bool:
        words = [word for word, _ in called]
        return words.count("plain") >= 2 and words.count("coroutine") >= 2

    try:
        await eventually_async(both, what="both are called again")
    finally:
        await timers.close()
    assert "timer.failed" in caplog.messages
    with pytest.raises(BadOption):
        timers(schedule="no cron")
    with pytest.raises(TypeError):
        timers(schedule="* * * * * *")(plain)


@pytest.mark.row("F49", "F53")
async def test_a_manager_runs_the_file_of_a_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without any worker; the manager serves others while the file keeps its own interpreter busy."""
    files = Path(__file__).parent.parent / "jobs" / "files"
    monkeypatch.setenv("WORKER_TASK_DIR", str(files))
    flag = str(tmp_path / "flag")

    async def setup(app: web.Application) -> None:
        manager = app[KEY] = await JobManager.create(app, SECRET)

        @manager.task(subprocess=True)
        async def basic_blocking(a: int, b: int, c: int) -> None:
            raise AssertionError("the body of a shell is never run")

        @manager.task(subprocess=True)
        async def spins(until: str) -> None: ...

        @manager.task()
        async def releases(path: str) -> None:
            Path(path).touch()

        with pytest.raises(BadOption, match="there is no file"):

            @manager.task(subprocess=True)
            async def absent() -> None: ...

    async with served(setup) as site:
        manager: JobManager = site.app[KEY]
        busy = await site.submit("spins", until=flag)
        told = await manager.get_job_result(await site.submit("basic_blocking", a=1, b=2, c=3))
        await manager.get_job_result(await site.submit("releases", path=flag))
        count = await manager.get_job_result(busy)

    assert told["result"] == "blocking with 1 2 3"
    assert told["pid"] != os.getpid()
    assert "asyncio" not in told["modules"]
    assert count > 0
