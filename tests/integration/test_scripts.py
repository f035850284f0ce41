"""Tasks in files of their own on a real worker, one for all tests of this module."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from core4.config import Settings
from core4.database import Database
from core4.errors import BadArguments
from core4.jobs import Job
from core4.logs import LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.states import State
from tests.helpers import FAST, eventually_async
from tests.integration.test_task_runs import Floor
from tests.integration.test_worker import House, gone

pytestmark = pytest.mark.asyncio(loop_scope="module")

JOBS = Path(__file__).parent.parent / "jobs"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def floor(mongo_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Floor]:
    home = tmp_path_factory.mktemp("scripts")
    name = f"test_scripts_{os.getpid()}"
    settings = Settings.load(
        environ=FAST,
        mongo_url=mongo_url,
        mongo_database=name,
        home=home,
        slots=2,
        worker_task_dir=JOBS / "files",
    )
    database = await Database.connect(mongo_url, name)
    queue, logs, registry = JobQueue(database, settings), LogStore(database), WorkerRegistry(database)
    for store in (queue.store, logs, registry):
        await store.prepare()
    house = House(database, settings, queue, logs, registry)
    try:
        async with house.worker(str(JOBS / "blocking.py")):
            yield Floor(house, home / "ledger")
    finally:
        await database.drop()
        await database.close()


async def run(floor: Floor, name: str, **args: Any) -> Job:
    return await floor.ended(await floor.submit(f"DEFAULT:{name}", **args))


@pytest.mark.row("F49")
async def test_it_has_an_interpreter_of_its_own(floor: Floor) -> None:
    """Of its own pid, fresh, and told neither its arguments nor anything secret where others can read it."""
    job = await run(floor, "basic_blocking", a=711711, b=2, c=3)
    again = await run(floor, "basic_blocking", a=711711, b=2, c=3)

    assert job.state is State.COMPLETE
    told, other = job.document["result"], again.document["result"]
    assert told["result"] == "blocking with 711711 2 3"
    assert len({told["pid"], other["pid"], os.getpid()}) == 3
    assert {"pymongo", "bson", "motor", "asyncio", "blocking"} & set(told["modules"]) == set()
    assert told["argv"] == [str(JOBS / "files" / "basic_blocking.py")]
    assert "711711" not in told["command"] + told["environ"]
    assert "CORE4_MONGO_URL" not in told["environ"]


async def test_what_it_says_is_in_its_log(floor: Floor) -> None:
    job = await run(floor, "basic_blocking", a=1, b=2, c=3)
    lines = await floor.house.lines(job.id)

    said = [(row["source"], row["level"], row["message"]) for row in lines]
    assert ("stdout", "INFO", "printed 1") in said
    assert ("log", "DEBUG", "logged 2") in said


@pytest.mark.row("F49")
async def test_a_busy_one_delays_no_other(floor: Floor, tmp_path: Path) -> None:
    """It computes until another job of the same worker has run; then its slot is free again."""
    flag = str(tmp_path / "flag")
    busy = await floor.submit("DEFAULT:spins", until=flag)

    async def progress() -> bool:
        found = await floor.queue.store.get(busy)
        return bool(found.document["prog"]["message"] == "round and round")

    await eventually_async(progress, what="its progress")

    assert (await run(floor, "releases", path=flag)).state is State.COMPLETE
    assert (await floor.ended(busy)).state is State.COMPLETE
    both = await asyncio.gather(*(run(floor, "spins", until=flag) for _ in range(3)))
    assert {job.state for job in both} == {State.COMPLETE}


@pytest.mark.row("F51")
async def test_the_shell_is_only_a_signature(floor: Floor) -> None:
    assert (await run(floor, "basic_blocking", a=1, b=2, c=3)).trial == 1
    for wrong in ({"a": 1, "b": 2}, {"a": "x", "b": 2, "c": 3}, {"a": 1, "b": 2, "c": 3, "d": 4}):
        with pytest.raises(BadArguments):
            await floor.submit("DEFAULT:basic_blocking", **wrong)


@pytest.mark.row("F52")
async def test_inner_names_are_free(floor: Floor) -> None:
    """One is `work`, the other a coroutine function `anything_else`, which imports a neighbour."""
    plain = await run(floor, "basic_blocking", a=1, b=2, c=3)
    coroutine = await run(floor, "other_name", args=[1, 2], offset=10)

    assert plain.document["result"]["result"] == "blocking with 1 2 3"
    assert (coroutine.state, coroutine.document["result"]) == (State.COMPLETE, [11, 12])


@pytest.mark.row("F54")
@pytest.mark.parametrize(
    ("what", "category", "words"),
    [
        ("raises", "ERROR", "RuntimeError('on purpose')"),
        ("exits", "ERROR", "unruly_file.py ended with exit code 3"),
        ("leaves at once", "CRASH", "ended with exit code 4"),
        ("kills itself", "CRASH", "SIGKILL"),
        ("no JSON", "ERROR", "result is not JSON"),
        ("forges", "CRASH", "a frame came without the token of the job"),
    ],
)
async def test_every_bad_end_is_a_failure(
    floor: Floor, tmp_path: Path, what: str, category: str, words: str
) -> None:
    """Tried once more, then failed."""
    ledger = tmp_path / "ledger"
    job = await run(floor, "unruly_file", what=what, ledger=str(ledger))

    assert (job.state, job.document["error_cat"]) == (State.ERROR, category)
    assert words in job.document["last_error"]["exception"]
    assert len(ledger.read_text().splitlines()) == 2
    if what == "raises":
        frames = [line for line in job.document["last_error"]["traceback"] if line.startswith("  File")]
        assert all("unruly_file.py" in line for line in frames), frames


async def test_a_file_that_calls_nothing_says_so(floor: Floor) -> None:
    job = await run(floor, "says_nothing")

    assert job.state is State.ERROR
    assert "has called no function under @subprocess" in job.document["last_error"]["exception"]


async def test_a_kill_ends_all_of_it(floor: Floor, tmp_path: Path) -> None:
    """Also what it has started in a session of its own."""
    ledger = tmp_path / "ledger"
    job_id = await floor.submit("DEFAULT:unruly_file", what="lingers", ledger=str(ledger))

    async def family() -> set[int]:
        main = psutil.Process(int(ledger.read_text().split()[-1])) if ledger.exists() else None
        return {main.pid, *(one.pid for one in main.children())} if main and main.children() else set()

    pids = await eventually_async(family, what="the job and its program")
    await floor.queue.kill(job_id, by="ann")
    assert (await floor.ended(job_id)).state is State.KILLED
    for pid in pids:
        await gone(pid)
