"""easyjobs' ETL example as a whole: every line as its document has it, but for imports and application.

Once as an application beside its manager's, with the tasks inside its function; once as a file of tasks.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core4.catalogue import Catalogue
from core4.jobs import Job, derived_id
from core4.logs import LogStore
from core4.orders import make_order
from core4.queues import JobQueue
from core4.states import FINAL, State
from tests.applications import Manager, application, example
from tests.helpers import FAST, Command, eventually_async, free_port, program

FILES = ("'/home/josh/Documents/python/easyjobs'", "os.path.join(os.path.dirname(__file__), 'files')")

# What a file of tasks says otherwise: where they are registered.
APPLICATION = re.compile(r"server = web.Application\(\).*?\n    \)\n", re.DOTALL)
CHANGED = (
    ("from aiohttp import web\n", ""),
    ("from core4 import JobWorker\n", "from core4 import task\n"),
    ("@worker.task(", '@task(namespace="ETL", '),
)

# The file that the document does not show.
COMPUTE = """
from core4 import subprocess

@subprocess
def work(data):
    return {"computed": data}

if __name__ == "__main__":
    work()
"""


def tasks() -> str:
    head, body = APPLICATION.split(example("etl_example", FILES))
    text = head + textwrap.dedent(body)
    for old, new in CHANGED:
        assert old in text, old
        text = text.replace(old, new)
    return text


@pytest.fixture(params=["application", "file"])
def serving(
    request: pytest.FixtureRequest, mongo_url: str, database_name: str, tmp_path: Path
) -> Iterator[None]:
    """A worker of the example, in one of both forms, with as many slots as it says."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "compute.py").write_text(COMPUTE)
    patient = {
        "CORE4_DEAD_AFTER": "20",
        "CORE4_SCHEDULER": "false",  # the minute that comes meanwhile would make more of them
    }
    own = {**patient, "CORE4_MONGO_URL": mongo_url, "CORE4_MONGO_DATABASE": database_name}
    if request.param == "file":
        (tmp_path / "etl_example.py").write_text(tasks())
        environ = {**FAST, **own, "CORE4_SLOTS": "5", "CORE4_NAMESPACES": "ETL"}
        with Command([program("core4"), "worker", "etl_example.py"], environ, cwd=tmp_path):
            yield
        return
    moved = ("os.environ['DB_PATH'] = '/mnt/jobs_database/'", "")
    (tmp_path / "job_manager.py").write_text(example("readme_manager", moved))
    with Manager(tmp_path, "job_manager", **own) as manager:
        port = ("manager_port=8220", f"manager_port={manager.port}")
        (tmp_path / "etl_example.py").write_text(example("etl_example", FILES, port))
        home = {"CORE4_HOME": str(tmp_path / "worker")}
        with application(tmp_path, "etl_example", free_port(), {**patient, **home}):
            yield


@pytest.mark.row("F47")
@pytest.mark.row("F48")
@pytest.mark.usefixtures("serving")
async def test_the_etl_example(queue: JobQueue, catalogue: Catalogue, logs: LogStore) -> None:
    async def ended(job_id: Any) -> Job:
        async def look() -> Job | None:
            found = await queue.store.document(job_id)
            return Job.from_document(found[0]) if found and State(found[0]["state"]) in FINAL else None

        job = await eventually_async(look, 90, what=f"the end of [{job_id}]")
        assert job is not None
        assert job.state is State.COMPLETE, job.document["last_error"]
        return job

    async def printed(job: Job) -> list[str]:
        return [row["message"] for row in await logs.tail(job.id, 0) if row["source"] == "stdout"]

    async def published(name: str) -> dict[str, Any]:
        entry = await eventually_async(lambda: catalogue.get(name), 60, what=f"{name} is published")
        assert entry is not None
        return entry

    called = await published("ETL:pipeline")  # the last one
    entry = await published("ETL:extract")
    # As its schedule does: with the author's own arguments, a list for a text among them.
    assert entry["schedule"]["expression"] == "* * * * *"
    assert entry["default_args"] == {"url": ["http://stats"]}
    order = make_order({**entry, "schema": {}}, entry["default_args"], args_cap=1000)
    extract = (await queue.enqueue(order)).id
    pipeline = (await queue.enqueue(make_order(called, {}, args_cap=1000))).id

    chain = [await ended(extract)]
    for _ in ("transform", "load", "compute"):
        chain.append(await ended(derived_id(chain[-1].id, "after", 0)))
    result = await ended(pipeline)

    assert [job.name for job in chain] == ["ETL:extract", "ETL:transform", "ETL:load", "ETL:compute"]
    assert chain[1].document["result"] == {"data": {"a": 3, "b": 4, "c": 5}}
    assert chain[3].document["result"] == {"computed": {"a": 3, "b": 4, "c": 5}}
    assert result.document["result"] == {"computed": {"test": "data"}}
    assert await printed(chain[0]) == ["extract started", "get_data: ['http://stats']", "extract finished"]
    assert await printed(result) == [
        "pipline started",
        "pipline - result is {'computed': {'test': 'data'}} - finished",
    ]
    rows = await queue.store.page({"chain_id": pipeline}, journal=True, per_page=100)
    assert sorted(row["name"] for row in rows.rows) == [
        "ETL:compute",
        "ETL:configure_environment",
        "ETL:deploy_environment",
        "ETL:prepare_db",
    ]
    assert {bool(row.get("consumed")) for row in rows.rows} == {True}
