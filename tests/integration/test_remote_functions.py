"""Functions that are sent as source to a worker without a database; one API and one such worker for all.

What is refused is refused as by a worker with a database: the tests are those of `test_functions`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from bson import ObjectId

from core4.callers import Functions, Job
from core4.config import Settings
from core4.database import Database
from core4.errors import ConfigError
from core4.functions import NAMESPACE
from core4.jobs import JobOrder
from core4.logs import LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.users import UserStore
from core4.worker import functions
from core4.worker.backend import Refused
from tests.helpers import FAST, eventually, eventually_async
from tests.integration.driver import serving
from tests.integration.test_functions import ANN, KEY, Site, changed, refused, site
from tests.integration.test_remote import SECRET, Caller, caller, is_up, remote_worker
from tests.integration.test_worker import House
from tests.jobs import shipped

__all__ = ["site"]  # a fixture

pytestmark = pytest.mark.asyncio(loop_scope="module")

CLAIM = {"limit": 1, "rooms": {}, "forced": False, "awaited": False}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def far(mongo_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """As `site`, with a worker over HTTP."""
    home = tmp_path_factory.mktemp("far")
    name = f"test_far_{os.getpid()}"
    settings = Settings.load(
        environ=FAST,
        mongo_url=mongo_url,
        mongo_database=name,
        home=home,
        slots=2,
        worker_secret=SECRET,
        functions=True,
        function_keys=(KEY,),
        function_folders=(str(home),),
    )
    database = await Database.connect(mongo_url, name)
    queue, logs, registry = JobQueue(database, settings), LogStore(database), WorkerRegistry(database)
    users = UserStore(database, settings)
    for store in (queue.store, logs, registry, users):
        await store.prepare()
    await users.add(*ANN, allow=["cop", "code"])
    house = House(database, settings, queue, logs, registry)
    try:
        # The keys of those who sign are the worker's: the manager is given none.
        async with (
            serving(replace(settings, function_keys=()), database) as api,
            remote_worker(settings, api.root, "core4.examples") as running,
        ):
            await eventually_async(lambda: is_up(house, running), 60, what="it is registered")
            yield Site(house, api, home)
    finally:
        users.close()
        await database.drop()
        await database.close()


@pytest.mark.row("M1", "M5", "M15", "M23", "F18")
async def test_functions_run_over_http(far: Site) -> None:
    """Result, failure, limit of time and what the function is told of those before it."""

    def script(functions: Functions) -> Job:
        first, second = (functions.schedule(shipped.addition, a=n, b=2) for n in (1, 3))
        total = functions.schedule(shipped.sums_up, dependencies=[first, second])
        late = functions.schedule(shipped.spins, timeout=0.5)
        bad = functions.schedule(shipped.divide, a=1)
        after = functions.schedule(shipped.sums_up, dependencies=[first, bad])
        functions.wait(die=False)
        assert total.load().result == {"sum": 8, "ids": [first.id, second.id]}
        assert [job.error_cat for job in (late.load(), bad.load())] == ["TIMEOUT", "ERROR"]
        assert "return a / b" in bad.error["traceback"]
        assert (after.load().state, after.error["dependency_failure"]) == ("ERROR", bad.id)
        return total

    assert "adding j" in " ".join(await far.log_of(await far.do(script)))


async def test_results_that_are_too_large_are_not_handed_over(far: Site) -> None:
    def script(functions: Functions) -> None:
        large = [functions.schedule(shipped.makes_text, size=1_000_000, mark=n) for n in range(9)]
        functions.wait(large)
        job = functions.schedule(shipped.sums_up, dependencies=large)
        job.wait(die=False)
        assert "results of its dependencies are too much" in job.error["message"]
        assert functions.schedule(shipped.has_no_context, dependencies=large, wait=True).result == 1

    await far.do(script)


# ---------------------------------------------------------------------- what is refused


async def test_what_the_worker_refuses(far: Site) -> None:
    """A source that was changed, a wrong key, one that is not trusted, and one that was revoked."""

    def revoke(functions: Functions, job: Job) -> Any:
        return asyncio.to_thread(functions.revoke, job.action_id, "found to be evil")

    evil = "def template():\n    return 'evil'\n"
    assert "has another hash" in await refused(far, changed(far, code=evil))
    assert "is wrong" in await refused(far, key="ann:" + "w" * 40)
    assert "does not trust the key [eve]" in await refused(far, key="eve:" + "k" * 40)
    assert "revoked by ann: found to be evil" in await refused(far, revoke)


@pytest.mark.parametrize("where", ["site", "far"])
async def test_what_is_revoked_while_its_process_is_made_does_not_start(
    where: str,
    site: Site,
    far: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Checked when it was claimed, and once more behind the last moment at which anything may hold it up.

    What makes processes is frozen meanwhile; the function's folder tells that the first check is over.
    """
    here = {"site": site, "far": far}[where]
    await here.do(lambda functions: functions.schedule(shipped.addition, wait=True, a=1, b=1))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    launchers = [
        each for each in psutil.Process().children() if "core4.worker.launcher" in " ".join(each.cmdline())
    ]
    assert launchers

    def script(functions: Functions) -> None:
        values = {"name": os.urandom(8).hex()}
        for each in launchers:
            each.send_signal(signal.SIGSTOP)
        try:
            job = functions.schedule(shipped.template, args_replace=values)
            eventually(lambda: list(tmp_path.glob("core4-function-*")), 60, what="it was checked")
            functions.revoke(job.action_id, "late")
        finally:
            for each in launchers:
                each.send_signal(signal.SIGCONT)
        job.wait(die=False)
        assert (job.state, job.result) == ("ERROR", None)
        assert "revoked by ann: late" in job.error["message"]

        eventually(lambda: not list(tmp_path.glob("core4-function-*")), 60, what="its folder is deleted")

    await here.do(script)


async def signed_in(far: Site, name: str) -> Caller:
    """A worker of the test's own, which could run functions."""
    one = caller(far.api, name)
    assert (await one.login(namespaces=[NAMESPACE])).status == 200
    await one.call("register", slots=1, jobs=["core4.function"], version="1")
    return one


async def test_a_source_is_given_to_who_holds_its_job_and_to_nobody_else(far: Site) -> None:
    """With the signature of who sent this job, and no other; results only of what it depends on."""
    await far.api.users.add("eve", "eve's password", allow=["cop", "code"])
    ids: list[str] = []
    values = {"name": os.urandom(8).hex()}
    gate = far.file()

    def script(functions: Functions) -> None:
        # Both slots of the real worker are taken: what follows is for ours.
        busy = [functions.schedule(shipped.waits_for, path=str(gate)) for _ in range(2)]
        eventually(lambda: [job.load().state for job in busy] == ["RUNNING"] * 2, 60)
        with far.functions(("eve", "eve's password"), "eve:" + "e" * 40) as hers:
            hers.schedule(shipped.template, args_replace=values).kill()
        ids.append(functions.schedule(shipped.template, args_replace=values).id)

    try:
        await far.do(script)
        one, other = await signed_in(far, "one"), await signed_in(far, "other")
        (held,) = await one.call("claim", **CLAIM)
        assert held["_id"] == ObjectId(ids[0])
        words = {"job_id": ids[0], "lease_id": held["lease"]["id"]}
        action = await one.call("action", **words)
        assert set(action) == {"_id", "code", "revoked", "signatures"}
        assert [entry["by"] for entry in action["signatures"].values()] == ["ann"]
        assert await one.call("dependencies", **words) == {}
        for what in ("action", "dependencies"):
            assert await other.call(what, **words) == "lease_lost"
            assert await one.call(what, **{**words, "lease_id": "made up"}) == "lease_lost"
            assert await one.call(what, **{**words, "job_id": str(ObjectId())}) == "lease_lost"
        ended = await one.call("finish", **words, kind="complete", result=1, log_seq=0)
        assert ended["state"] == "complete"
        assert await one.call("action", **words) == "lease_lost"
        for each in (one, other):
            await each.call("leave")
    finally:
        gate.touch()


async def test_a_job_that_is_no_function_has_no_source(far: Site) -> None:
    one = caller(far.api, "plain")
    await one.login(namespaces=["PLAIN"])
    await one.call("register", slots=1, jobs=["tests.Job"], version="1")
    order = JobOrder(name="tests.Job", args={}, namespace="PLAIN", username="ann")
    job = await far.house.queue.enqueue(order)
    (held,) = await one.call("claim", **CLAIM)
    words = {"job_id": str(job.id), "lease_id": held["lease"]["id"]}
    assert await one.call("action", **words) == "bad_request"
    assert await one.call("finish", **words, kind="complete", result=1, log_seq=0)
    await one.call("leave")


async def test_a_manager_without_functions_has_none_run(far: Site) -> None:
    """A worker that wants to is told why, and ends; one that does not is welcome. No key, no start."""
    settings = far.house.settings
    async with serving(replace(settings, functions=False), far.house.database) as api:
        assert (await caller(api, "off").login(namespaces=["DEFAULT", NAMESPACE])).status == 403
        assert (await caller(api, "off").login(namespaces=["DEFAULT"])).status == 200
        with pytest.raises(Refused, match="CORE4_FUNCTIONS"):
            async with remote_worker(settings, api.root) as running:
                await running.task
    with pytest.raises(ConfigError, match="CORE4_FUNCTION_KEYS"):
        functions.require(replace(settings, manager=far.api.root, function_keys=()))
