"""Functions sent as source to installed programs: the document as it is written, and one that spies."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pymongo import MongoClient
from pymongo.uri_parser import parse_uri

from core4.callers import Functions
from core4.client import Client
from core4.config import Settings
from core4.database import Database
from core4.users import UserStore
from tests.helpers import FAST, ROOT, Command, eventually_async, program
from tests.integration.driver import Api, serving
from tests.jobs import hostile, shipped

ANN = ("ann", "ann's password")
KEY = "ann:" + "k" * 40
SECRET = "canary-secret-0123456789"  # of workers over HTTP

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

NOBODY = 65534
# Opens a file that what it becomes inherits, then becomes the command of its arguments: as another user,
# without any privilege of root. That user is shown the folders of Python and of ours, should they be in one
# that is closed to others; nobody else sees that.
WITHOUT_PRIVILEGES = """
import ctypes, os, sys
from pathlib import Path
opened, user, root, command = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]
libc = ctypes.CDLL(None, use_errno=True)

def mount(source, target, kind, flags, data=None):
    if libc.mount(source.encode(), target.encode(), kind, flags, data) != 0:
        raise OSError(ctypes.get_errno(), target)

def closed(folder):
    return [str(each) for each in reversed(Path(folder).parents) if not each.stat().st_mode & 1][:1]

def show(folders):
    REC, PRIVATE, BIND = 0x4000, 0x40000, 0x1000
    hidden = {above for folder in folders for above in closed(folder)}
    if hidden and libc.unshare(0x20000) == 0:
        mount('none', '/', None, REC | PRIVATE)
        held = {folder: os.open(folder, os.O_RDONLY) for folder in folders if closed(folder)}
        for above in hidden:
            mount('none', above, b'tmpfs', 0, b'mode=755')
        for folder, fd in held.items():
            os.makedirs(folder, exist_ok=True)
            mount(f'/proc/self/fd/{fd}', folder, None, BIND)

if opened:
    os.set_inheritable(os.open(opened, os.O_RDONLY), True)
if user != os.getuid():
    show({sys.base_prefix, sys.prefix, root})
for capability in range(64):
    libc.prctl(24, capability, 0, 0, 0)
if user != os.getuid():
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
os.execv(command[0], command)
"""


def become(user: int, opened: str = "") -> list[str]:
    """What a command is put behind to run as this user, without privileges."""
    return [sys.executable, "-c", WITHOUT_PRIVILEGES, opened, str(user), str(ROOT)]


@functools.cache
def somebody() -> int:
    """A user without privileges: ourselves, or another one if we are root and he may run this interpreter."""
    if os.getuid() != 0:
        return os.getuid()
    tried = subprocess.run([*become(NOBODY), sys.executable, "-c", "import core4"], check=False)
    return 0 if tried.returncode else NOBODY


@pytest.fixture
async def api(mongo_url: str, database: Database, database_name: str, tmp_path: Path) -> AsyncIterator[Api]:
    """An API that takes functions, and Ann, who may send them."""
    given = {"mongo_url": mongo_url, "mongo_database": database_name, "worker_secret": SECRET}
    settings = Settings.load(environ=FAST, **given, functions=True)
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
    given = {name: value for name, value in environ.items() if value}
    return Command([*command, program("core4"), "worker"], given)


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


@pytest.fixture
def nest() -> Iterator[Path]:
    """A folder that belongs to who runs the worker."""
    with tempfile.TemporaryDirectory(prefix="core4-nest-") as name:
        folder = Path(name)
        for each in (folder, folder / "spy"):
            each.mkdir(exist_ok=True)
            os.chown(each, somebody(), -1)
        yield folder


def snoop(nest: Path, *where: Any, **secrets: str) -> dict[str, Any]:
    """What the spy finds as that user when nothing shuts it in; it sends signal 0."""
    call = f"import json; from tests.jobs.hostile import snoops; print(json.dumps(snoops(*{where!r}, 0)))"
    done = subprocess.run(
        [*become(somebody()), sys.executable, "-c", call],
        capture_output=True,
        text=True,
        cwd=nest / "spy",
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **secrets},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("over", ["database", "http"])
async def test_a_spy_finds_nothing(
    over: str, api: Api, mongo_url: str, database: Database, database_name: str, nest: Path
) -> None:
    """Canaries in environment, settings file, database URL, secret and open files of the worker.

    That runs as a user without privileges, as the spy does: of what it owns only the doors of a shipped
    function keep it away, and its own process is not to be looked into even by a spy without them.
    """
    user = somebody()
    file, opened = nest / "core4.toml", nest / "opened"
    for path, content in ((file, 'worker_name = "spied"  # canary-file\n'), (opened, "canary-opened")):
        path.write_text(content)
        path.chmod(0o600)
        os.chown(path, user, -1)
    url = f"{mongo_url}{'&' if '?' in mongo_url else '/?'}appName=canary-url"
    secrets = {"SOME_SECRET": "canary-environment", "CORE4_CONFIG": str(file), "CORE4_HOME": str(nest)}
    how = {"CORE4_MONGO_URL": url}
    if over == "http":
        how = {"CORE4_MONGO_URL": "", "CORE4_MANAGER": api.root, "CORE4_WORKER_SECRET": SECRET}
    paths = [str(file), str(opened)]
    ports = [api.port, *(port for _, port in parse_uri(mongo_url)["nodelist"])]  # which asks for no password
    control = " ".join(snoop(nest, [], paths, ports, **secrets)["found"])
    for word in ("canary-environment", "canary-file", "is connected"):
        assert word in control, "the spy does not see what it should see here"

    with worker(url, database_name, *become(user, str(opened)), **secrets, **how) as running:
        await asyncio.to_thread(running.wait_for, "ready")  # the API is on this loop
        assert psutil.Process(running.process.pid).uids().real == user
        outside = await asyncio.to_thread(snoop, nest, [running.process.pid], [], [])
        pids = [running.process.pid, os.getpid(), os.getppid()]

        def script() -> tuple[dict[str, Any], int, str]:
            with Functions(Client(api.root, ANN), key=KEY) as functions:
                job = functions.schedule(hostile.snoops, pids=pids, paths=paths, ports=ports)
                job.wait(timeout=120)
                log = [line["message"] for line in functions.client.log(job.id, per_page=500).rows]
                after = functions.schedule(shipped.addition, wait=True, a=1, b=2)
                return job.result, after.result, " ".join(log)

        result, after, log = await asyncio.to_thread(script)
        await asyncio.to_thread(running.stop)

    assert outside["found"] == [], "the worker can be looked into"
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


async def test_the_folders_of_a_killed_worker_are_deleted_by_the_next(
    api: Api, mongo_url: str, database_name: str, tmp_path: Path
) -> None:
    def folders() -> set[Path]:
        return set(tmp_path.glob("core4-function-call-*"))

    with worker(mongo_url, database_name, TMPDIR=str(tmp_path)) as first:
        with Functions(Client(api.root, ANN), key=KEY) as functions:
            await asyncio.to_thread(functions.schedule, shipped.spins)
        left = await eventually_async(lambda: asyncio.to_thread(folders), what="a function has its folder")
        first.process.kill()
        first.process.wait()
    assert folders() == left
    with worker(mongo_url, database_name, TMPDIR=str(tmp_path)) as second:
        await eventually_async(
            lambda: asyncio.to_thread(lambda: not left & folders()), what="what the first has left is gone"
        )
        await asyncio.to_thread(second.stop)
    assert folders() == set()
