"""Functions sent as source to installed programs: the document as it is written, and one that spies."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient
from pymongo.uri_parser import parse_uri

from core4.callers import Functions
from core4.client import Client
from core4.config import Settings
from core4.database import Database
from core4.users import UserStore
from tests.helpers import FAST, ROOT, Command, program
from tests.integration.driver import Api, serving
from tests.jobs import hostile, shipped

ANN = ("ann", "ann's password")
KEY = "ann:" + "k" * 40

# Verbatim, but for the first two lines.
DOCUMENT = """
from core4.client import Functions
from types import SimpleNamespace
j = SimpleNamespace(servers=SimpleNamespace(myjobs=Functions()))

def addition(a, b):
    return a + b


job = j.servers.myjobs.schedule(addition, a=1, b=2)
job.wait(die=False) # if die is passed as true excpetion will be propagated
if job.state == "OK":
    print(job.result)
else:
    print("Job failed")
"""

# Opens a file that what it becomes inherits, then becomes the command of its arguments without any privilege
# that root has.
WITHOUT_PRIVILEGES = """
import ctypes, os, sys
os.set_inheritable(os.open(sys.argv[1], os.O_RDONLY), True)
for capability in range(64):
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture
async def api(mongo_url: str, database: Database, database_name: str, tmp_path: Path) -> AsyncIterator[Api]:
    """An API that takes functions, and Ann, who may send them."""
    settings = Settings.load(environ=FAST, mongo_url=mongo_url, mongo_database=database_name, functions=True)
    users = UserStore(database, settings)
    await users.prepare()
    await users.add(*ANN, allow=["code", r"job://core4\.function\..*/x"])
    async with serving(settings, database) as api:
        yield api
    users.close()


def worker(mongo_url: str, database_name: str, *command: str | Path, **more: str) -> Command:
    environ = {
        **FAST,
        "CORE4_MONGO_URL": mongo_url,
        "CORE4_MONGO_DATABASE": database_name,
        "CORE4_FUNCTIONS": "true",
        "CORE4_FUNCTION_KEYS": KEY,
        **more,
    }
    return Command([*command, program("core4"), "worker"], environ)


def environment(api: Api) -> dict[str, str]:
    """Of whoever sends functions."""
    variables = {"CORE4_URL": api.root, "CORE4_USER": ANN[0], "CORE4_PASSWORD": ANN[1]}
    return {**os.environ, **variables, "CORE4_FUNCTION_KEY": KEY}


@pytest.mark.row("M1", "M27")
async def test_the_document_runs_as_it_is_written(
    api: Api, mongo_url: str, database_name: str, tmp_path: Path
) -> None:
    """Without a worker the job stays NEW; then it is 3."""
    script = tmp_path / "document.py"
    script.write_text(DOCUMENT)
    with Command([sys.executable, script], environment(api)) as document:
        with Functions(Client(api.root, ANN), key=KEY) as functions:
            (job,) = await asyncio.to_thread(first, functions)
            assert (job.state, job.time_start) == ("NEW", 0.0)
            with worker(mongo_url, database_name) as running:
                assert await asyncio.to_thread(document.wait) == 0
                assert running.process.poll() is None
        assert document.output == "3\n"


def first(functions: Functions) -> list[Any]:
    from tests.helpers import eventually

    return eventually(functions.find, what="a job of a function")


async def test_a_spy_finds_nothing(api: Api, mongo_url: str, database_name: str, tmp_path: Path) -> None:
    """Canaries in environment, settings file, database URL and open files of the worker."""
    file, opened = tmp_path / "core4.toml", tmp_path / "opened"
    file.write_text('worker_name = "spied"  # canary-file\n')
    opened.write_text("canary-opened")
    url = f"{mongo_url}{'&' if '?' in mongo_url else '/?'}appName=canary-url"
    secrets = {"SOME_SECRET": "canary-environment", "CORE4_CONFIG": str(file)}
    paths = [str(file), str(opened)]
    ports = [port for _, port in parse_uri(mongo_url)["nodelist"]]  # of what asks for no password
    call = f"snoops([], {paths!r}, {ports!r})"
    naked = f"import json; from tests.jobs.hostile import snoops; print(json.dumps({call}))"
    control = subprocess.run(
        [sys.executable, "-c", naked],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        env={**os.environ, **secrets},
    )
    seen = " ".join(json.loads(control.stdout.splitlines()[-1])["found"])
    assert "canary-environment" in seen, "the spy does not see what it should see here"
    assert "canary-file" in seen
    assert "is connected" in seen

    with worker(url, database_name, sys.executable, "-c", WITHOUT_PRIVILEGES, opened, **secrets) as running:
        running.wait_for("ready")
        pids = [running.process.pid, os.getpid(), os.getppid()]

        def script() -> tuple[dict[str, Any], int, str]:
            with Functions(Client(api.root, ANN), key=KEY) as functions:
                job = functions.schedule(hostile.snoops, pids=pids, paths=paths, ports=ports)
                job.wait(timeout=60)
                log = [line["message"] for line in functions.client.log(job.id, per_page=500).rows]
                after = functions.schedule(shipped.addition, wait=True, a=1, b=2)
                return job.result, after.result, " ".join(log)

        result, after, log = await asyncio.to_thread(script)

    assert result["found"] == []
    assert result["refused"] > result["made"] / 2
    assert "canary" not in log
    assert after == 3, "the worker lives"
    assert running.process.returncode == 0
    with MongoClient(mongo_url) as client:  # type: ignore[var-annotated]
        stored = client[database_name]
        told = [(name, str(row)) for name in stored.list_collection_names() for row in stored[name].find()]
    assert len(told) > 5
    assert [row for row in told if "canary" in row[1]] == []
