"""Functions that are sent as source, over a real API to a real worker; one of each for all tests here."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import pytest_asyncio
import requests
from bson import DBRef, ObjectId

from core4 import callers, client
from core4.actions import ACTION
from core4.api.keys import SEATS
from core4.callers import Functions, Job
from core4.callers_async import AsyncFunctions, AsyncJob
from core4.client import ApiError, Client, QueueTimeout
from core4.config import DEBUG, Settings
from core4.database import Database
from core4.errors import BadArguments, FreeName, SourceRefused
from core4.handles import JobFailed, WaitTimeout
from core4.jobs import utcnow
from core4.logs import LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.users import UserStore
from tests.helpers import FAST, eventually, eventually_async
from tests.integration.driver import Api, serving
from tests.integration.test_worker import House
from tests.jobs import sandboxed, shipped

pytestmark = pytest.mark.asyncio(loop_scope="module")

ANN = ("ann", "ann's password")
KEY = "ann:" + "k" * 40
DUMMY = "core4.queue.helper.job.example.DummyJob"
T = TypeVar("T")


class Site:
    """An API that takes functions, a worker that runs them, and whoever sends them."""

    def __init__(self, house: House, api: Api, folder: Path) -> None:
        self.house, self.api, self.folder = house, api, folder

    def functions(self, user: tuple[str, str] = ANN, key: str = KEY) -> Functions:
        return Functions(Client(self.api.root, user), key=key)

    async def do(self, script: Callable[[Functions], T], **who: Any) -> T:
        """Run a script, which blocks, beside the API and the worker."""

        def run() -> T:
            with self.functions(**who) as functions:
                return script(functions)

        return await asyncio.to_thread(run)

    def file(self) -> Path:
        """A file that functions may see, and that is not there."""
        return self.folder / os.urandom(8).hex()

    async def log_of(self, job: Job) -> list[str]:
        return [row["message"] for row in await self.house.lines(ObjectId(job.id))]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(mongo_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    home = tmp_path_factory.mktemp("functions")
    name = f"test_functions_{os.getpid()}"
    settings = Settings.load(
        environ=FAST,
        mongo_url=mongo_url,
        mongo_database=name,
        home=home,
        slots=4,
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
        async with serving(settings, database) as api, house.worker("core4.examples"):
            yield Site(house, api, home)
    finally:
        users.close()
        await database.drop()
        await database.close()


# ---------------------------------------------------------------------- as in myjobs' own tests


@pytest.mark.row("M1", "M8", "M16")
async def test_basic(site: Site) -> None:
    """Upstream's test 1."""

    def script(functions: Functions) -> None:
        before = time.time()
        job = functions.schedule(shipped.addition, a=1, b=2)
        assert (job.state, job.category, job.timeout, job.running) == ("NEW", "", 0, False)
        assert functions.scheduled_ids == [job.id]
        assert functions.results() == [3]
        job.load()
        assert (job.state, job.error, job.error_cat, job.result) == ("OK", {}, "NA", 3)
        assert before - 1 < job.time_created <= job.time_start <= job.time_stop < time.time() + 1
        assert job.check_ready() is True
        assert job.id in [each.id for each in functions.find(state="OK", method="addition")]
        second = functions.schedule(shipped.addition, a=3, b=4)
        assert functions.results([second.id]) == [7]
        third = functions.schedule(shipped.addition, a=5, b=6, timeout="60")  # type: ignore[arg-type]
        assert third.wait() is True
        assert (third.result, third.timeout) == (11, 60)
        assert functions.results(third) == functions.results(third.id) == [11]
        assert [job.id for job in functions.wait(third)] == [third.id]

    await site.do(script)


@pytest.mark.row("M5", "M6", "M19")
async def test_an_error_is_told_or_raised(site: Site) -> None:
    """Upstream's test 2: the exception carries the job and what the other side said."""

    def script(functions: Functions) -> None:
        job = functions.schedule(shipped.divide, a=1)
        with pytest.raises(JobFailed, match="division by zero") as raised:
            functions.results()
        assert raised.value.job.id == job.id
        assert job.id in str(raised.value)
        assert "return a / b" in str(raised.value.__cause__)
        with pytest.raises(JobFailed):
            job.wait(die=True)

        (again,) = functions.wait([job], die=False)
        assert (again.state, again.error_cat) == ("ERROR", "ERROR")
        assert set(again.error) == {"message", "traceback"}
        assert "ZeroDivisionError" in json.loads(json.dumps(again.error))["traceback"]
        assert functions.results([job.id], die=False) == [None]
        assert job.wait(die=False) is True
        good = functions.schedule(shipped.addition, a=1, b=1)
        assert (good.wait(die=False), good.state, good.error) == (True, "OK", {})

    await site.do(script)


@pytest.mark.row("M15", "M17")
async def test_the_causes_of_an_error(site: Site) -> None:
    """Upstream's test of a timeout, here for a loop that never yields; and the other categories."""

    def script(functions: Functions) -> None:
        late = functions.schedule(shipped.spins, timeout=0.5)
        crash = functions.schedule(shipped.kills_itself)
        halted = functions.schedule(shipped.spins)
        wrong = functions.schedule(shipped.divide, a=1)
        left = functions.schedule(shipped.exits)
        fine = functions.schedule(shipped.addition, a=1, b=1, timeout=0)
        # Not only claimed: killed then, it would never have been started.
        eventually(lambda: halted.load().time_start > 0)
        halted.kill()
        jobs = functions.wait([late, crash, halted, wrong, left, fine], die=False)

        cats = [job.error_cat for job in jobs]
        assert cats == ["TIMEOUT", "CRASH", "HALTED", "ERROR", "ERROR", "NA"]
        assert [job.state for job in jobs] == ["ERROR"] * 5 + ["OK"]
        assert all(job.time_stop >= job.time_start > 0 for job in jobs)
        assert "SIGKILL" in crash.error["message"]

    await site.do(script)


@pytest.mark.row("M10", "M14", "M16")
async def test_states_are_seen_by_queries(site: Site) -> None:
    """Upstream's test 3, and each state in its turn: NEW, RUNNING, OK or ERROR, DONE."""
    gate, end = site.file(), site.file()

    def script(functions: Functions) -> None:
        def count(state: str) -> int:
            return len(functions.find(category="data", state=state))

        first = functions.schedule(shipped.waits_for, path=str(gate))
        jobs = [
            functions.schedule(shipped.waits_for, category="data", dependencies=[first], path=str(end))
            for _ in range(6)
        ]
        functions.schedule(shipped.addition, category="other", a=1, b=1)
        bad = functions.schedule(shipped.divide, category="data", dependencies=[jobs[0]], a=1)
        assert [job.time_start for job in functions.find(category="data", state="NEW")] == [0.0] * 7
        assert (count("RUNNING"), count("OK")) == (0, 0)
        gate.touch()
        eventually(lambda: (count("NEW"), count("RUNNING")) == (3, 4))  # it has four slots
        end.touch()
        assert functions.results(jobs) == ["OK"] * 6
        assert bad.wait(die=False)
        counts = {state: count(state) for state in ("NEW", "RUNNING", "OK", "ERROR", "DONE")}
        assert counts == {"NEW": 0, "RUNNING": 0, "OK": 6, "ERROR": 1, "DONE": 0}

        assert jobs[0].collect() == "OK"
        assert (jobs[0].state, jobs[0].ended, jobs[0].result) == ("DONE", True, None)
        assert (count("OK"), count("DONE")) == (5, 1)
        with pytest.raises(ApiError) as gone:
            jobs[0].collect()
        assert gone.value.status == 410
        after = functions.schedule(shipped.addition, dependencies=[jobs[0]], a=1, b=1)
        assert functions.results([after]) == [2]
        assert {job.category for job in functions.find(category="other")} == {"other"}
        for wrong in ("FINISHED", ["OK", "FINISHED"]):
            with pytest.raises(
                ApiError, match=r"state. expected one of NEW, RUNNING, OK, ERROR, DONE, or a list"
            ):
                functions.find(state=wrong)

    await site.do(script)


@pytest.mark.row("M40")
async def test_jobs_are_found_and_changed_by_field(site: Site) -> None:
    """A state is for who runs the job. What may be done is done to all of a field."""
    gate, mark = site.file(), os.urandom(8).hex()

    def script(functions: Functions) -> None:
        first = functions.schedule(shipped.waits_for, path=str(gate))
        a, b = (
            [
                functions.schedule(shipped.addition, category=mark + name, dependencies=[first], a=n, b=1)
                for n in range(3)
            ]
            for name in "ab"
        )
        rows = functions.client.queue(filter={"category": mark + "a"}).rows
        assert {row["_id"] for row in rows} == {job.id for job in a}
        told = functions.client.bulk("kill", {"category": mark + "a", "name": "core4.function.addition"})
        assert (told["matched"], told["changed"]) == (3, 3)
        functions.look([*a, *b])
        assert [job.error_cat for job in a] == ["HALTED"] * 3
        assert [job.state for job in b] == ["NEW"] * 3
        gate.touch()
        assert functions.results(b) == [1, 2, 3]
        with pytest.raises(AttributeError):
            a[0].state = "OK"  # type: ignore[misc]

    await site.do(script)


@pytest.mark.row("M26")
async def test_placeholders_are_filled(site: Site) -> None:
    """Upstream's test 6, with values in place of pasted text: they become no code."""

    def script(functions: Functions) -> None:
        name = '"; import os; os._exit(1) #{count}'
        count, options = 3, {"deep": [1, None, -0.5, True]}
        job = functions.schedule(shipped.template, args_replace=locals())
        assert functions.results([job]) == [[f"hello {name}", count, options, "{unknown}"]]
        other = functions.schedule(shipped.template, args_replace={"name": "you", "count": 3})
        assert other.wait()
        assert other.result == ["hello you", 3, "{options}", "{unknown}"]
        assert other.action_id != job.action_id
        with pytest.raises(SourceRefused, match=r"args_replace.*is not JSON"):
            functions.schedule(shipped.template, args_replace={"name": object()})

    await site.do(script)


@pytest.mark.row("M11", "M12")
async def test_many_are_waited_for(site: Site) -> None:
    """Upstream's test 7."""

    def script(functions: Functions) -> None:
        jobs = [functions.schedule(shipped.addition, a=n, b=n) for n in range(10)]
        assert [job.id for job in functions.wait([*jobs, jobs[0]])] == functions.scheduled_ids
        assert all(job.state == "OK" for job in jobs)
        assert functions.results() == functions.results(jobs) == [2 * n for n in range(10)]
        assert functions.results([jobs[3].id, jobs[1]]) == [6, 2]
        assert functions.results(job for job in jobs[:2]) == [0, 2]
        assert functions.check_all() is True
        bad = functions.schedule(shipped.divide, a=1)
        with pytest.raises(JobFailed) as raised:
            functions.results()
        assert raised.value.job.id == bad.id
        assert functions.results([]) == []
        with pytest.raises(ValueError, match="no job to wait for"):
            functions.wait([])

    await site.do(script)


@pytest.mark.row("M21", "M22", "M23")
async def test_dependencies(site: Site) -> None:
    """Upstream's test 9: results of others, and what fails with them."""
    gate = site.file()

    def script(functions: Functions) -> Job:
        first = functions.schedule(shipped.addition, a=1, b=2)
        second = functions.schedule(shipped.addition, a=3, b=4)
        third = functions.schedule(shipped.sums_up, dependencies=[second.id, first])
        plain = functions.schedule(shipped.has_no_context, dependencies=[first, second])
        assert third.dependencies == [second.id, first.id]
        assert functions.results([third, plain]) == [{"sum": 10, "ids": [second.id, first.id]}, 1]
        functions.look([first, second])
        assert max(first.time_stop, second.time_stop) <= third.time_start

        bad = functions.schedule(shipped.divide, a=1)
        waiting = functions.schedule(shipped.sums_up, dependencies=[first, bad])
        last = functions.schedule(shipped.has_no_context, dependencies=[waiting])
        functions.wait([bad, waiting, last], die=False)
        assert [bad.state, waiting.state, last.state, first.state] == ["ERROR", "ERROR", "ERROR", "OK"]
        assert waiting.error["dependency_failure"] == bad.id
        assert last.error["dependency_failure"] == waiting.id
        assert bad.id in last.error["message"]
        assert [waiting.time_start, last.time_start] == [0.0, 0.0]
        with pytest.raises(ApiError, match="not found"):
            functions.schedule(shipped.has_no_context, dependencies=["0" * 24])

        open_ = functions.schedule(shipped.waits_for, path=str(gate))
        doomed = functions.schedule(shipped.sums_up, dependencies=[open_, bad])
        (doomed,) = functions.wait([doomed], die=False)
        assert doomed.error["dependency_failure"] == bad.id
        assert open_.load().state in ("NEW", "RUNNING"), "the failure of one is enough"
        gate.touch()
        assert open_.wait()
        assert doomed.load().state == "ERROR", "it stays so, whatever the other comes to"
        return third

    assert "adding j" in " ".join(await site.log_of(await site.do(script)))


# ---------------------------------------------------------------------- what is accepted


@pytest.mark.row("M2")
async def test_arguments_are_json_and_fit(site: Site) -> None:
    def script(functions: Functions) -> Job:
        job = functions.schedule(shipped.numbered, number=5, text="n°")
        assert (job.kwargs, functions.results([job])) == ({"number": 5, "text": "n°"}, ["n°5"])
        for wrong in ({1, 2}, object(), b"bytes", float("nan"), {1: 2}):
            with pytest.raises(SourceRefused, match=r"argument .number. is not JSON"):
                functions.schedule(shipped.numbered, number=wrong)
        with pytest.raises(BadArguments, match=r"needs .number."):
            functions.schedule(shipped.numbered)
        with pytest.raises(BadArguments, match=r"has no parameter .nmber."):
            functions.schedule(shipped.numbered, number=1, nmber=2)
        return job

    assert "this is 5" in await site.log_of(await site.do(script))


async def test_arguments_with_names_of_options(site: Site) -> None:
    def script(functions: Functions) -> None:
        job = functions.schedule(shipped.sleeps, name="mine", kwargs={"name": "its", "wait": False})
        assert functions.results([job]) == [["its", False]]
        assert job.name == "mine"
        with pytest.raises(TypeError, match="given in kwargs and by name"):
            functions.schedule(shipped.addition, kwargs={"a": 1}, a=1)

    await site.do(script)


@pytest.mark.row("M3")
async def test_nothing_of_its_module_is_there(site: Site) -> None:
    def script(functions: Functions) -> None:
        with pytest.raises(NameError, match=r"name .LIMIT. is not defined inside uses_a_global"):
            functions.schedule(shipped.uses_a_global, a=1)
        with pytest.raises(FreeName, match="math"):
            functions.schedule(shipped.uses_an_import, a=1)
        around, root = (
            functions.schedule(shipped.looks_for_a_global),
            functions.schedule(shipped.imports_inside, a=9),
        )
        assert functions.results([around, root]) == [["looks_for_a_global"], 3.0]

    await site.do(script)


@pytest.mark.row("M4")
async def test_what_has_no_source_is_refused(site: Site) -> None:
    def script(functions: Functions) -> None:
        typed: dict[str, Any] = {}
        exec("def typed(): return 1", typed)
        for wrong, why in (
            (lambda: 1, "lambda"),
            (len, "no function written in Python"),
            (shipped.Actor, "no function written in Python"),
            (typed["typed"], "must be defined in a file"),
            (shipped.with_decorator, "decorated"),
        ):
            with pytest.raises(SourceRefused, match=why):
                functions.schedule(wrong)
        method = functions.schedule(shipped.Actor().method, a=1)
        assert functions.results([method]) == [2]
        assert functions.scheduled_ids == [method.id]

    await site.do(script)


@pytest.mark.row("M7")
async def test_the_limit_of_a_wait_is_its_own(site: Site) -> None:
    end = site.file()

    def script(functions: Functions) -> None:
        job = functions.schedule(shipped.waits_for, path=str(end))
        with pytest.raises(WaitTimeout, match=r"has not ended|have not ended") as passed:
            job.wait(timeout=0.2)
        assert [each.id for each in passed.value.jobs] == [job.id]
        assert job.wait(timeout=0.1, die=False) is False
        (same,) = functions.wait([job], timeout=0.1, die=False)
        assert same.state in ("NEW", "RUNNING")
        assert job.check_ready() is False
        end.touch()
        assert job.wait()
        assert job.result == "OK"

    await site.do(script)


@pytest.mark.row("M17")
async def test_the_limit_of_a_job_counts_from_its_start(site: Site) -> None:
    """It may wait for longer than it may run."""
    end = site.file()

    def script(functions: Functions) -> None:
        first = functions.schedule(shipped.waits_for, path=str(end))
        job = functions.schedule(shipped.addition, dependencies=[first], timeout=3, a=1, b=2)
        eventually(lambda: time.time() > job.time_created + job.timeout + 1)
        assert job.load().state == "NEW"
        end.touch()
        assert functions.results([job]) == [3]

    await site.do(script)


@pytest.mark.row("M5")
async def test_a_wait_is_one_request(site: Site) -> None:
    """The API answers it when the job has ended; nobody asks again and again."""
    end = site.file()

    def looks() -> float:
        lines = requests.get(f"{site.api.root}/metrics", auth=ANN, timeout=60).text.splitlines()
        rows = [line for line in lines if line.startswith("core4_http_requests_total")]
        return sum(float(row.split()[-1]) for row in rows if "/function/job" in row)

    def script(functions: Functions) -> None:
        job = functions.schedule(shipped.waits_for, path=str(end))
        eventually(lambda: job.load().running)
        before = looks()
        threading.Timer(2, end.touch).start()
        assert job.wait(timeout=15)
        assert (job.result, looks() - before) == ("OK", 1)

    await site.do(script)


@pytest.mark.row("M1", "M12")
async def test_without_an_object(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of `core4.client`, with client and key from the environment."""
    given = {"URL": site.api.root, "USER": ANN[0], "PASSWORD": ANN[1], "FUNCTION_KEY": KEY}
    for name, value in given.items():
        monkeypatch.setenv(f"CORE4_{name}", value)
    monkeypatch.setattr(callers, "_here", None)

    def script() -> None:
        jobs = [client.schedule(shipped.addition, a=n, b=1) for n in range(2)]
        assert [job.state for job in client.wait(jobs)] == ["OK", "OK"]
        assert client.results() == [1, 2]
        callers._functions().close()

    await asyncio.to_thread(script)


@pytest.mark.row("M9")
async def test_names(site: Site) -> None:
    end = site.file()

    def script(functions: Functions) -> None:
        assert functions.schedule(shipped.addition, a=1, b=1).name.startswith("j")
        job = functions.schedule(shipped.waits_for, "nightly", path=str(end))
        with pytest.raises(ApiError, match=r"nightly.*has not ended") as taken:
            functions.schedule(shipped.addition, "nightly", a=1, b=1)
        assert (taken.value.status, taken.value.body["job_id"]) == (409, job.id)
        end.touch()
        assert job.wait()
        again = functions.schedule(shipped.addition, "nightly", a=1, b=1)
        assert again.wait()
        assert [each.id for each in functions.find(name="nightly")] == [again.id, job.id]
        assert functions.jobs.get(job.id).name == "nightly"
        assert [functions.jobs.exists(each) for each in (job.id, "0" * 24)] == [True, False]

    await site.do(script)


@pytest.mark.row("M13")
async def test_schedule_and_wait_in_one(site: Site) -> None:
    def script(functions: Functions) -> None:
        assert functions.schedule(shipped.addition, wait=True, a=2, b=2).result == 4
        with pytest.raises(JobFailed):
            functions.schedule(shipped.divide, wait=True, a=2)

    await site.do(script)


@pytest.mark.row("M18")
async def test_a_result_that_is_no_json_is_an_error(site: Site) -> None:
    def script(functions: Functions) -> None:
        jobs = [
            functions.schedule(each)
            for each in (shipped.returns_a_set, shipped.returns_an_object, shipped.returns_a_reference)
        ]
        late = functions.schedule(shipped.sums_up, dependencies=[jobs[2]])
        functions.wait([*jobs, late], die=False)
        for job, words in zip(jobs, ["is not JSON", "is not JSON", "begins with `$`"], strict=True):
            assert (job.state, job.error_cat, job.result) == ("ERROR", "ERROR", None)
            assert words in job.error["message"]
        assert late.error["dependency_failure"] == jobs[2].id

    await site.do(script)


@pytest.mark.row("M20")
async def test_die_is_kept_with_the_job(site: Site) -> None:
    def script(functions: Functions) -> None:
        quiet = functions.schedule(shipped.divide, die=False, a=1)
        assert quiet.wait() is True
        assert (functions.get(quiet.id).die, quiet.state) == (False, "ERROR")
        assert functions.results([quiet]) == [None]
        with pytest.raises(JobFailed):
            quiet.wait(die=True)
        assert functions.schedule(shipped.addition, a=1, b=1).die is True

    await site.do(script)


# ---------------------------------------------------------------------- actions


@pytest.mark.row("M24", "M25")
async def test_one_action_per_source(site: Site) -> None:
    values = {"name": os.urandom(8).hex()}  # a source that nobody has sent before

    def script(functions: Functions) -> list[str]:
        jobs = [functions.schedule(shipped.template, args_replace=values) for _ in range(5)]
        functions.wait()
        return [job.action_id for job in jobs]

    keys = await asyncio.gather(*(site.do(script) for _ in range(3)))
    (key,) = {each for some in keys for each in some}
    stored = (
        await site.house.database.collection(ACTION).find({"code": {"$regex": values["name"]}}).to_list(None)
    )
    assert [row["_id"] for row in stored] == [key]

    def look(functions: Functions) -> None:
        action = functions.action(key)
        assert action["key"] == hashlib.sha256(action["code"].encode()).hexdigest()
        assert (action["methodname"], action["actorname"]) == ("template", "tests.jobs.shipped")
        assert action["signatures"] == [{"by": "ann", "signer": "ann"}]
        assert key in [row["key"] for row in functions.actions()]

    await site.do(look)

    collection = site.house.database.collection(ACTION)
    long_ago = utcnow() - timedelta(minutes=2)
    await collection.update_one({"_id": key}, {"$set": {"used_at": long_ago}})
    await site.do(script)
    found = await collection.find_one({"_id": key})
    assert found is not None
    assert found["used_at"] > long_ago + timedelta(minutes=1), "it is told that it was used again"


async def test_every_start_and_end_of_an_action_is_audited(site: Site) -> None:
    values = {"name": os.urandom(8).hex()}

    def script(functions: Functions) -> None:
        key = functions.schedule(shipped.template, args_replace=values).action_id
        functions.revoke(key, "a test")
        lines = functions.client.events(filter={"name": {"in": ["function.new", "function.revoke"]}}).rows
        mine = [(line["name"], line["author"]) for line in lines if line["data"]["action"] == key]
        assert sorted(mine) == [("function.new", "ann"), ("function.revoke", "ann")]

    await site.do(script)


@pytest.mark.row("M41")
async def test_a_finished_job_runs_again(site: Site) -> None:
    def script(functions: Functions) -> None:
        job = functions.schedule(shipped.numbered, "counted", category="c", number=1)
        with pytest.raises(ApiError):
            job.start()
        job.wait()
        again = job.start()
        again.wait()
        assert again.id != job.id
        assert (again.result, again.name, again.category) == ("1", "counted", "c")
        assert (again.action_id, again.kwargs) == (job.action_id, {"number": 1})

    await site.do(script)


# ---------------------------------------------------------------------- what is refused


async def refused(site: Site, spoil: Callable[[Functions, Job], Any] | None = None, **how: Any) -> str:
    """Why a job was not run whose action was spoilt while it waited."""
    gate = site.file()
    values = {"name": os.urandom(8).hex()}

    def schedule(functions: Functions) -> Job:
        first = functions.schedule(shipped.waits_for, path=str(gate))
        with site.functions(**how) as mine:
            return mine.schedule(shipped.template, args_replace=values, dependencies=[first.id])

    job = await site.do(schedule)
    if spoil is not None:
        spoilt = spoil(site.functions(), job)
        if asyncio.iscoroutine(spoilt):
            await spoilt
    gate.touch()

    def look(functions: Functions) -> str:
        (ended,) = functions.wait([job.id], die=False)
        assert (ended.state, ended.error_cat, ended.result) == ("ERROR", "ERROR", None)
        return str(ended.error["message"])

    return await site.do(look)


def changed(site: Site, **fields: Any) -> Callable[[Functions, Job], Any]:
    """A hand in the database, on the action of a job."""

    async def spoil(_: Functions, job: Job) -> None:
        done = await site.house.database.collection(ACTION).update_one(
            {"_id": job.action_id}, {"$set": fields}
        )
        assert done.modified_count == 1

    return spoil


async def test_a_tampered_action_is_refused(site: Site) -> None:
    evil = "def template():\n    return 'evil'\n"

    assert "has another hash" in await refused(site, changed(site, code=evil))


async def test_an_action_that_nobody_signed_is_refused(site: Site) -> None:
    """Its hash is right: whoever can write to the database can store what he likes, and sign nothing."""
    code = "def template():\n    return 'evil'\n"
    key = hashlib.sha256(code.encode()).hexdigest()

    async def spoil(_: Functions, job: Job) -> None:
        actions = site.house.database.collection(ACTION)
        honest = await actions.find_one({"_id": job.action_id}) or {}
        await actions.insert_one({**honest, "_id": key, "code": code})
        queue = site.house.database.collection("sys.queue")
        done = await queue.update_one({"_id": ObjectId(job.id)}, {"$set": {"function.key": key}})
        assert done.modified_count == 1

    assert "signature of [ann]" in await refused(site, spoil)


async def test_a_wrong_signature_is_refused(site: Site) -> None:
    assert "is wrong" in await refused(site, key="ann:" + "w" * 40)
    assert "does not trust the key [eve]" in await refused(site, key="eve:" + "k" * 40)


async def test_another_users_signature_is_no_help_and_no_harm(site: Site) -> None:
    """Each user's signature is his own: a wrong one of somebody else spoils nothing."""
    await site.api.users.add("eve", "eve's password", allow=["cop", "code"])
    eve = ("eve", "eve's password")

    def script(functions: Functions) -> None:
        with site.functions(eve, "ann:" + "w" * 40) as hers:
            (job,) = hers.wait([hers.schedule(shipped.addition, a=1, b=1)], die=False)
            assert "is wrong" in job.error["message"]
        assert functions.results([functions.schedule(shipped.addition, a=1, b=1)]) == [2]

    await site.do(script)


async def test_a_revoked_action_is_refused(site: Site) -> None:
    def revoke(functions: Functions, job: Job) -> Any:
        return asyncio.to_thread(functions.revoke, job.action_id, "found to be evil")

    assert "revoked by ann: found to be evil" in await refused(site, revoke)

    def script(functions: Functions) -> None:
        values = {"name": os.urandom(8).hex()}
        job = functions.schedule(shipped.template, args_replace=values)
        assert functions.revoke(job.action_id)["revoked"]["by"] == "ann"
        with pytest.raises(ApiError, match="was revoked by ann") as again:
            functions.schedule(shipped.template, args_replace=values)
        assert again.value.status == 409

    await site.do(script)


async def test_an_action_that_is_gone_is_refused(site: Site) -> None:
    async def spoil(_: Functions, job: Job) -> None:
        await site.house.database.collection(ACTION).delete_one({"_id": job.action_id})

    assert "is gone" in await refused(site, spoil)


@pytest.mark.parametrize(
    ("rights", "why"),
    [
        (["cop"], "no right to send functions as source"),
        (["job://.*/x"], "no right to send functions as source"),
        (["code"], "no right to execute job .core4.function.addition."),
        (["code", "job://.*/r"], "no right to execute job .core4.function.addition."),
    ],
)
async def test_a_submitter_without_permission_is_refused(site: Site, rights: list[str], why: str) -> None:
    name = "user" + os.urandom(4).hex()
    await site.api.users.add(name, "a password", allow=rights)

    def script(functions: Functions) -> None:
        with pytest.raises(ApiError, match=why) as refusal:
            functions.schedule(shipped.addition, a=1, b=2)
        assert refusal.value.status == 403

    await site.do(script, user=(name, "a password"))


async def test_who_may_not_read_a_job_cannot_depend_on_it(site: Site) -> None:
    """Its result would be handed to the function."""
    await site.api.users.add("tim", "a password", allow=["code", r"job://core4\.function\.sums_up/x"])

    def script(functions: Functions) -> None:
        job = functions.schedule(shipped.addition, a=1, b=2)
        with site.functions(("tim", "a password")) as his:
            with pytest.raises(ApiError, match="no right to read"):
                his.schedule(shipped.sums_up, dependencies=[job.id])
            mine = his.schedule(shipped.sums_up)
            assert his.results() == [{"sum": 0, "ids": []}]
            assert mine.id in [each.id for each in his.find()]
            assert {each.row["qual_name"] for each in his.find()} == {"core4.function.sums_up"}
            assert {row["methodname"] for row in his.actions()} == {"sums_up"}
            with pytest.raises(ApiError, match="no right to read"):
                his.action(job.action_id)

    await site.do(script)


async def test_a_user_sees_what_became_of_the_functions_that_he_may_read(site: Site) -> None:
    """In return queues and lists of results, too; and of others' functions he cannot count anything."""
    await site.api.users.add("uma", "a password", allow=["code", r"job://core4\.function\.has_no_context/x"])
    mark = os.urandom(8).hex()

    def script(functions: Functions) -> None:
        theirs = functions.schedule(
            shipped.addition, wait=True, category=mark, return_queues=[mark], a=1, b=1
        )
        with site.functions(("uma", "a password")) as hers:
            mine = hers.schedule(shipped.has_no_context, wait=True, category=mark, return_queues=[mark])
            eventually(lambda: len(functions.client.show_queue(mark)) == 2)
            assert [row["job_id"] for row in hers.client.show_queue(mark)] == [mine.id]
            assert [job.id for job in hers.wait_queues([mark], 1)] == [mine.id]
            found = hers.client.journal(filter={"category": {"gte": mark, "lte": mark}})
            assert ([row["_id"] for row in found.rows], found.total) == ([mine.id], 1)
            assert mine.id in {row["job_id"] for row in hers.client.results(namespace="FUNCTIONS").rows}
            assert theirs.id not in {row["job_id"] for row in hers.client.results(namespace="FUNCTIONS").rows}

    await site.do(script)


async def test_names_are_of_their_user(site: Site) -> None:
    """Nobody takes another user's name away, nor learns of the job that has it."""
    await site.api.users.add("vera", "a password", allow=["code", r"job://core4\.function\.has_no_context/x"])
    end, name = site.file(), os.urandom(8).hex()

    def script(functions: Functions) -> None:
        job = functions.schedule(shipped.waits_for, name, path=str(end))
        with site.functions(("vera", "a password")) as hers:
            assert hers.schedule(shipped.has_no_context, name, wait=True).name == name
        with pytest.raises(ApiError, match="has not ended") as taken:
            functions.schedule(shipped.has_no_context, name)
        assert taken.value.body["job_id"] == job.id
        end.touch()
        assert job.wait()

    await site.do(script)


@pytest.mark.parametrize(
    "code",
    [
        "def f(): return LIMIT",
        "@print\ndef f(): pass",
        "def f(): pass\ndef g(): pass",
        "import os",
        "f = lambda: 1",
        "def f(: pass",
        "def f(a=__import__('os').environ, b=evil): pass",
        " def f():\n  pass\nx=1\n",
        "def f():\n    pass\n#\n",
        "def f():" + "\n if 1:".join(" " * n for n in range(1, 90)) + "pass",
    ],
)
async def test_the_api_checks_the_source_itself(site: Site, code: str) -> None:
    """Whoever sends requests of his own need not use the client library."""
    body = {"code": code, "signer": "ann", "signature": "0" * 64}
    answer = await site.api.call("POST", "/function", json=body, auth=ANN)

    assert answer.status == 400, answer.body
    assert answer.body["type"].endswith(("source_refused", "free_name"))


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ('{"complete": {"result": 1e999}}', "1e999 is no JSON"),
        ('{"complete": {"result": {"$ref": "x", "$id": 1}}}', "begins with `$`"),
        ('{"drop": 1e999}', "1e999 is no JSON"),
        ('{"enqueue": {}, "number": 1e999}', "1e999 is no JSON"),
        ('{"drop": "one"}', "makes no sense"),
    ],
)
async def test_a_forged_frame_ends_its_job(site: Site, frame: str, words: str) -> None:
    """A function can write to the pipe of its job."""

    def script(functions: Functions) -> None:
        (job,) = functions.wait([functions.schedule(shipped.forges_frames, frames=[frame])], die=False)
        assert (job.state, words in job.error["message"]) == ("ERROR", True), job.error
        assert functions.schedule(shipped.addition, wait=True, a=1, b=1).result == 2

    await site.do(script)


async def test_the_right_is_asked_for_before_the_source_is_read(site: Site) -> None:
    await site.api.users.add("reader", "a password", allow=["cop"])
    body = {"code": "def f(: pass", "signer": "ann", "signature": "0" * 64}
    answer = await site.api.call("POST", "/function", json=body, auth=("reader", "a password"))

    assert answer.status == 403, answer.body


async def test_results_that_are_no_json_any_more_can_be_looked_at(site: Site) -> None:
    """As versions before this one, or a hand in the database, have stored them; nor do they harm a worker."""

    def begin(functions: Functions) -> list[Job]:
        jobs = [functions.schedule(shipped.numbered, number=number) for number in range(2)]
        functions.wait(jobs)
        return jobs

    reference, infinite = await site.do(begin)
    journal = site.house.queue.store.journal
    for job, result in ((reference, DBRef("x", 1)), (infinite, [float("inf")])):
        change = {"$set": {"result": result}}
        moved = partial(journal.find_one_and_update, {"_id": ObjectId(job.id)}, change)
        await eventually_async(moved, what="it is in the journal")

    def look(functions: Functions) -> None:
        functions.look([reference, infinite])
        assert ("DBRef" in reference.result, infinite.result) == (True, [None])
        assert functions.client.result(reference.id)["result"] == reference.result
        late = [functions.schedule(shipped.sums_up, dependencies=[each]) for each in (reference, infinite)]
        functions.wait(late, die=False)
        assert [job.state for job in late] == ["ERROR"] * 2
        assert all("is not JSON" in job.error["message"] for job in late)
        assert functions.schedule(shipped.addition, wait=True, a=1, b=1).result == 2

    await site.do(look)


async def test_a_function_enqueues_nothing(site: Site) -> None:
    """What jobs enqueue is held against nobody's rights."""

    def script(functions: Functions) -> None:
        (job,) = functions.wait([functions.schedule(shipped.enqueues)], die=False)
        assert "EnqueueRefused" in job.error["message"]

    await site.do(script)


async def test_its_worker_is_out_of_reach(site: Site, tmp_path: Path) -> None:
    """The worker is this process; of the same user as a server on a Unix socket, and as a file."""
    file = tmp_path / "settings"
    file.write_text("secret")
    file.chmod(0o600)

    def script(functions: Functions) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "socket"))
            server.listen()
            jobs = [
                functions.schedule(sandboxed.talks_to, path=server.getsockname(), command=["true"]),
                functions.schedule(sandboxed.presses, pid=os.getpid()),
                functions.schedule(sandboxed.defaces, path=str(file)),
                functions.schedule(sandboxed.calls),
            ]
            sockets, processes, _, calls = functions.results(jobs)
        assert (sockets["stream"], sockets["program"]) == ("PermissionError", "0")
        assert set(processes.values()) == {"EPERM"}
        assert file.stat().st_mode & 0o777 == 0o600
        assert "done" not in calls.values()

    await site.do(script)


async def test_a_folder_too_deep_to_be_deleted_is_deleted(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the worker lives."""
    monkeypatch.setattr(tempfile, "tempdir", str(site.folder))

    def script(functions: Functions) -> None:
        assert functions.results([functions.schedule(sandboxed.digs, depth=3000)]) == [3000]
        eventually(lambda: not list(site.folder.glob("core4-function-*")), what="its folder is deleted")
        assert functions.schedule(shipped.addition, wait=True, a=1, b=2).result == 3

    await site.do(script)


# ---------------------------------------------------------------------- from asyncio, and in queues


async def test_from_asyncio(site: Site) -> None:
    """The same over coroutines, on the loop that has the API and the worker, too."""
    async with AsyncFunctions(site.api.root, ANN, key=KEY) as functions:
        job = await functions.schedule(shipped.addition, a=1, b=2)
        assert await job.wait(timeout=30)
        assert (job.state, job.result) == ("OK", 3)
        bad = await functions.schedule(shipped.divide, category="async", a=1)
        with pytest.raises(JobFailed, match="division by zero"):
            await bad.wait()
        assert await functions.results([job, bad.id], die=False) == [3, None]
        assert [each.id for each in await functions.find(category="async", state="ERROR")] == [bad.id]
        end = site.file()
        late = await functions.schedule(shipped.waits_for, path=str(end))
        with pytest.raises(WaitTimeout):
            await functions.wait([late], timeout=0.1)
        assert await late.check_ready() is False
        end.touch()
        assert (await functions.schedule(shipped.addition, wait=True, dependencies=[late], a=1, b=1)).ended
        assert (await functions.get(late.id)).result == "OK"
        with pytest.raises(ApiError) as unknown:
            await functions.get("0" * 24)
        assert unknown.value.status == 404


@pytest.mark.row("M41", "M42")
async def test_queues_and_handles_from_asyncio(site: Site) -> None:
    """Return queues, all at a look, once more and collected: as in the blocking client."""
    queues = ["functions.async.one", "functions.async.two"]
    async with AsyncFunctions(site.api.root, ANN, key=KEY) as functions:
        for number in range(3):
            await functions.schedule(shipped.numbered, return_queues=queues, number=number)
        jobs = await functions.wait_queues(queues, 3)
        assert {job.id for job in jobs} == set(functions.scheduled_ids)
        assert await functions.check_all() is True
        with pytest.raises(QueueTimeout) as late:
            await functions.wait_queue(queues[0], timeout=0.1)
        assert late.value.records == []

        again = await jobs[0].start()
        assert again.id != jobs[0].id
        assert await functions.results([again], return_queues=queues) == [jobs[0].result]
        assert await (await functions.get(again.id)).collect() == jobs[0].result
        assert (await again.load()).state == "DONE"
        await functions.schedule(shipped.divide, return_queues=queues[:1], a=1)
        with pytest.raises(JobFailed):
            await functions.wait_queue(queues[0])
        with pytest.raises(JobFailed):
            await functions.check_all()


@pytest.mark.row("M42")
async def test_ends_go_to_return_queues(site: Site) -> None:
    """Upstream's test 10: ten through two queues, in the order of their ends; what was left there is not."""

    def script(functions: Functions) -> None:
        queues = ["functions.one", "functions.two"]

        def left() -> list[int]:
            return [len(functions.client.show_queue(queue)) for queue in queues]

        functions.schedule(shipped.numbered, return_queues=queues, number=-1)
        eventually(lambda: left() == [1, 1], what="somebody has left something there")
        functions.scheduled_ids.clear()
        for number in range(10):
            functions.schedule(
                shipped.numbered,
                return_queues=queues,
                return_queues_reset=queues if number == 0 else None,
                number=number,
            )
        jobs = functions.wait_queues(queues, 10)
        assert {job.id for job in jobs} == set(functions.scheduled_ids)
        assert {job.result for job in jobs} == {str(number) for number in range(10)}
        assert jobs[0].return_queues == queues
        assert left() == [0, 0]

        again = [job.start() for job in jobs[:2]]
        found = functions.results(again, return_queues=queues)
        assert (sorted(found), left()) == (sorted(job.result for job in jobs[:2]), [0, 0])
        assert functions.results([], return_queues=queues) == []
        with pytest.raises(QueueTimeout, match="0 of 2 records"):
            functions.results(again, return_queues=queues, timeout=0.1)

    await site.do(script)


@pytest.mark.row("M42", "M22")
async def test_failures_go_to_return_queues(site: Site) -> None:
    """One that failed and one that never ran for that are told as well."""

    def script(functions: Functions) -> None:
        queue = "functions.bad"
        bad = functions.schedule(shipped.divide, return_queues=[queue], a=1)
        after = functions.schedule(shipped.addition, return_queues=[queue], dependencies=[bad], a=1, b=1)
        told = functions.wait_queues([queue], 2, die=False)
        assert [job.id for job in told] == [bad.id, after.id]
        assert told[1].error["dependency_failure"] == bad.id

        both = [
            functions.schedule(shipped.divide, return_queues=queue, a=1),
            functions.schedule(shipped.addition, return_queues=queue, a=1, b=1),
        ]
        with pytest.raises(JobFailed) as raised:
            functions.wait_queues(queue, 2)
        assert raised.value.job.id == both[0].id
        assert {job.id: job.result for job in raised.value.jobs} == {both[0].id: None, both[1].id: 2}

    await site.do(script)


async def test_more_wait_than_may_wait_at_once(site: Site) -> None:
    """Twenty requests of a user may wait. Who is told so comes again, in the time that it was told."""
    end = site.file()
    settings = replace(site.house.settings, streams_per_user=20)

    def told_to_wait() -> bool:
        lines = requests.get(f"{api.root}/metrics", auth=ANN, timeout=60).text.splitlines()
        rows = [line for line in lines if line.startswith("core4_http_requests_total") and '"429"' in line]
        return sum(int(float(row.split()[-1])) for row in rows) >= 8

    def blocks(job: AsyncJob, how: str) -> Any:
        with Functions(Client(api.root, ANN), key=KEY) as mine:
            if how == "queue":
                return mine.wait_queue("functions.busy", timeout=300).id
            if how == "result":
                return mine.client.result(job.id, timeout=50)["job_id"]
            return mine.wait([job.id], timeout=300)[0].id

    async with (
        serving(settings, site.house.database) as api,
        AsyncFunctions(api.root, ANN, key=KEY) as functions,
    ):
        job = await functions.schedule(
            shipped.waits_for, return_queues=["functions.busy"], path=str(end), timeout=300
        )
        waits = [asyncio.create_task(job.wait(timeout=300)) for _ in range(20)]
        await eventually_async(lambda: taken(api, 20), 60, what="all places are taken")
        late = [await functions.get(job.id) for _ in range(5)]
        waits += [asyncio.create_task(each.wait(timeout=300)) for each in late]
        threads = ThreadPoolExecutor(4)
        loop = asyncio.get_running_loop()
        blocked = [loop.run_in_executor(threads, blocks, job, how) for how in ("queue", "result", "wait")]
        await eventually_async(lambda: asyncio.to_thread(told_to_wait), 120, what="eight were told to wait")
        end.touch()
        assert await asyncio.gather(*waits) == [True] * 25
        assert await asyncio.gather(*blocked) == [job.id] * 3
        threads.shutdown()


async def taken(api: Api, count: int) -> bool:
    return api.app[SEATS].open == count


@pytest.mark.row("M43")
async def test_a_function_that_calls_a_debugger_is_a_debug_job(site: Site) -> None:
    """Other workers leave it alone, and run what came later; one for debug jobs runs it, and nothing else."""

    def first(functions: Functions) -> tuple[Job, Job]:
        jobs = [functions.schedule(shipped.stops_at_times, stop=stop) for stop in (False, True)]
        assert "in namespace [_debug]" in functions.client.flash[0]
        plain = functions.schedule(shipped.addition, wait=True, a=1, b=1)
        functions.look(jobs)
        assert [(job.debug, job.state) for job in (*jobs, plain)] == [*[(True, "NEW")] * 2, (False, "OK")]
        return jobs[0], jobs[1]

    def last(functions: Functions) -> None:
        functions.wait(both, timeout=120, die=False)
        assert (both[0].state, both[0].result) == ("OK", "went on")
        assert (both[1].state, "BdbQuit" in both[1].error["message"]) == ("ERROR", True)
        assert [job.id for job in functions.find(method="stops_at_times")] == [both[1].id, both[0].id]

    both = await site.do(first)
    async with site.house.worker("core4.examples", namespaces=(DEBUG,), worker_debug=True):
        await site.do(last)


# ---------------------------------------------------------------------- off, and deleted


@pytest.mark.row("M27", "M41")
async def test_off_unless_switched_on(mongo_url: str, tmp_path: Path) -> None:
    """An API that takes none, a worker that runs none; then those that do; then all is deleted."""
    name = f"test_off_{os.urandom(6).hex()}"
    options: dict[str, Any] = {"mongo_url": mongo_url, "mongo_database": name, "home": tmp_path, "slots": 2}
    off = Settings.load(environ=FAST, **options)
    on = replace(off, functions=True, function_keys=(KEY,), function_folders=(str(tmp_path),))
    database = await Database.connect(mongo_url, name)
    queue, logs, registry = JobQueue(database, off), LogStore(database), WorkerRegistry(database)
    users = UserStore(database, off)
    for store in (queue.store, logs, registry, users):
        await store.prepare()
    await users.add(*ANN, allow=["cop", "code"])
    house = House(database, off, queue, logs, registry)
    try:
        async with serving(off, database) as api:
            with pytest.raises(ApiError, match="takes no functions as source") as refusal:
                await Site(house, api, tmp_path).do(lambda f: f.schedule(shipped.addition, a=1, b=2))
            assert refusal.value.status == 403
        async with serving(on, database) as api:
            site = Site(house, api, tmp_path)
            async with house.worker("core4.examples"):

                def unserved(functions: Functions) -> Job:
                    job = functions.schedule(shipped.addition, a=1, b=2)
                    assert "no worker is up that runs [core4.function]" in functions.client.flash[0]
                    other = functions.client.enqueue(DUMMY, {"sleep": 0})
                    functions.client.wait(other, timeout=30)
                    assert job.load().state == "NEW"
                    return job

                job = await site.do(unserved)
                assert (await queue.store.get(ObjectId(job.id))).fence == 0, "it was not even claimed"
            async with House(database, on, queue, logs, registry).worker("core4.examples"):
                assert await site.do(lambda functions: functions.results([job.id])) == [3]

                def wiped(functions: Functions) -> None:
                    late = functions.schedule(shipped.waits_for, path=str(tmp_path / "never"))
                    eventually(lambda: late.load().state == "RUNNING")
                    functions.reset()
                    assert [functions.find(), functions.actions(), functions.scheduled_ids] == [[], [], []]
                    assert functions.schedule(shipped.addition, wait=True, a=1, b=1).result == 2

                await site.do(wiped)
    finally:
        users.close()
        await database.drop()
        await database.close()


# ---------------------------------------------------------------------- many


@pytest.mark.timeout(1200)  # with a thousand, see below
async def test_many_from_many(site: Site) -> None:
    """4 clients at once with 10 sources: 10 actions, and all results in order."""
    total = int(os.environ.get("CORE4_TEST_FUNCTIONS", "60"))
    mark = os.urandom(8).hex()

    def script(functions: Functions, client: int) -> list[Any]:
        for number in range(client, total, 4):
            functions.schedule(
                shipped.marked, category=mark, args_replace={"mark": f"{mark}-{number % 10}"}, number=number
            )
        return functions.results(timeout=600)

    found = await asyncio.gather(*(site.do(lambda f, c=c: script(f, c)) for c in range(4)))  # type: ignore[misc]
    wanted = [[[f"{mark}-{n % 10}", n] for n in range(client, total, 4)] for client in range(4)]
    assert found == wanted
    actions = await site.house.database.collection(ACTION).count_documents({"code": {"$regex": mark}})
    assert actions == 10
    assert len(await site.do(lambda functions: functions.find(category=mark, state="OK"))) == total
