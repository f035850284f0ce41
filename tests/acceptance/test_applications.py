"""easyjobs' documented applications, end to end: a manager and workers as processes, used over HTTP."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from core4.producers import get_producer_channel
from tests.applications import Manager, application, example
from tests.helpers import eventually, free_port
from tests.rabbit import Rabbit

WORKERS = 2  # the document starts five; `core4 worker --processes 5` does so in its own test
MINUTES = bool(os.environ.get("CORE4_TEST_MINUTES"))


@pytest.mark.timeout(240)
@pytest.mark.row("F2", "F3", "F17", "F20", "F28")
def test_the_basic_usage(tmp_path: Path) -> None:
    """The README's manager, on a database of its own where it is told, and its worker, started as several."""
    state = tmp_path / "jobs_database"
    moved = ("os.environ['DB_PATH'] = '/mnt/jobs_database/'", f"os.environ['CORE4_HOME'] = '{state}'")
    (tmp_path / "job_manager.py").write_text(example("readme_manager", moved))
    manager = Manager(tmp_path, "job_manager")
    where = (
        ("manager_host='192.168.1.18'", "manager_host='127.0.0.1'"),
        ("manager_port=8220", f"manager_port={manager.port}"),
    )
    (tmp_path / "job_worker.py").write_text(example("readme_worker", *where))
    port = free_port()

    with ExitStack() as everything:
        everything.enter_context(manager)
        here = manager.submit("basic_job", arg1=1, arg2="b", arg3=[3])
        more = manager.submit("basic_job", arg1=1, arg2="b", arg3=[3], args=[4, {"x": 5}])
        for n in range(WORKERS):
            own = {"CORE4_HOME": str(tmp_path / f"home{n}"), "CORE4_WORKER_NAME": f"app{n}"}
            everything.enter_context(application(tmp_path, "job_worker", port, own))
        # Twice as many as one worker takes at a time.
        ids = [manager.submit("work_a", a=n, b=None, c="c") for n in range(3 * WORKERS)]

        assert [manager.pull(each) for each in (here, more)] == [[1, "b", [3]]] * 2
        assert manager.printed(here) == ["basic_job: 1 b [3] - args ()"]
        assert manager.printed(more) == ["basic_job: 1 b [3] - args (4, {'x': 5})"]
        jobs = [manager.wait_for_state(each, "complete") for each in ids]
        assert [manager.pull(each) for each in ids] == [{"result": [n, None, "c"]} for n in range(len(ids))]
        assert manager.request("GET", "/job/pull/result", params={"job_id": ids[0]}).status_code == 410

        rows = manager.data("GET", "/worker")

    assert len({row["_id"] for row in rows}) == len(rows) == 1 + WORKERS
    ran = {job["history"][-1]["worker"].partition("@")[0] for job in jobs}
    assert ran <= {f"app{n}" for n in range(WORKERS)}
    assert (state / "database").is_dir()
    assert not (tmp_path / "home" / "database").exists()


@pytest.mark.timeout(240)
@pytest.mark.row("F4", "F28")
def test_the_basic_usage_with_a_broker(
    mongo_url: str, database_name: str, rabbit: Rabbit, tmp_path: Path
) -> None:
    """A message in the format of the document, and a call over HTTP beside it."""
    (tmp_path / "job_manager.py").write_text(
        example("readme_broker", ("amqp://guest:guest@127.0.0.1/", rabbit.url))
    )
    own = {"CORE4_MONGO_URL": mongo_url, "CORE4_MONGO_DATABASE": database_name}
    with Manager(tmp_path, "job_manager", **own) as manager:
        called = manager.submit("basic_job", arg1=1, arg2=2, arg3=3)
        with get_producer_channel(rabbit.url, "DEFAULT") as channel:
            job = {"namespace": "DEFAULT", "name": "basic_job", "args": [4, 5, 6, 7, 8], "kwargs": {}}
            sent = channel.send_job(job)
        assert manager.pull(called) == [1, 2, 3]
        assert manager.pull(sent, key="request_id") == [4, 5, 6]


PROBE = """
from pathlib import Path
from types import SimpleNamespace

def virtual_memory():
    return SimpleNamespace(percent=float(Path("memory").read_text()))

def cpu_percent():
    return float(Path("cpu").read_text())
"""


@pytest.mark.timeout(240)
@pytest.mark.row("F46", "F56", "F57", "F58")
def test_the_pausing_example(mongo_url: str, database_name: str, tmp_path: Path) -> None:
    """What it measures is said by files; it looks each second instead of each minute, unless
    ``CORE4_TEST_MINUTES`` is set.
    """
    changed = [("import psutil\n", "import probe as psutil\n")]
    if not MINUTES:
        changed.append(("every_minute = '* * * * *'", "every_minute = '* * * * * *'"))
    (tmp_path / "paused.py").write_text(example("pausing_example", *changed))
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "cpu").write_text("1.5")
    (tmp_path / "memory").write_text("80")
    own = {"CORE4_MONGO_URL": mongo_url, "CORE4_MONGO_DATABASE": database_name}

    with Manager(tmp_path, "paused", **own) as manager:

        def is_paused(wanted: bool) -> bool:
            (row,) = manager.data("GET", "/worker")
            return bool(row["paused_here"] is wanted and row["running"] == 0)

        first = manager.submit("basic_task", a="x", b=1, c=0.5)
        manager.command.wait_for("monitor_utilization - cpu 1.5 - mem 80.0", 100)
        eventually(lambda: is_paused(True), what="it is paused and idle")
        waiting = manager.submit("basic_task", a="y", b=2, c=1.5)
        assert manager.data("GET", f"/job/{waiting}")["state"] == "pending"
        (tmp_path / "memory").write_text("10")
        manager.command.wait_for("monitor_utilization - cpu 1.5 - mem 10.0", 100)
        eventually(lambda: is_paused(False), what="it goes on")
        assert manager.pull(first) == {"results": ["x", 1, 0.5]}
        assert manager.pull(waiting) == {"results": ["y", 2, 1.5]}
