"""Results of real jobs, over HTTP, in Python and on the command line."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from core4.client import ApiError, Client
from tests.helpers import ADMIN, Stack, clean_environ, program, running_stack

JOBS = '''
import time
from core4 import CoreJob

RESULTS = {
    "tuple": (1, (2, 3)),
    "none": None,
    "zero": 0,
    "text": "",
    "list": [],
    "false": False,
    "nested": {"a": [{"b": ({"c": None},)}], "": {}},
}

class Returns(CoreJob):
    """Return something."""
    author = "tests"
    def execute(self, what: str, sleep: float = 0):
        time.sleep(sleep)
        if what == "error":
            raise ValueError("not today")
        return RESULTS[what]
'''


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One running stack for all tests of this file."""
    home = tmp_path_factory.mktemp("stack")
    (home / "result_jobs.py").write_text(JOBS)
    with running_stack(home, "result_jobs.py", CORE4_SLOTS="4") as stack:
        yield stack


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    with Client(stack.url, ADMIN) as client:
        yield client


def enqueued(client: Client, what: str, **args: object) -> str:
    return client.enqueue("result_jobs.Returns", {"what": what, **args})


@pytest.mark.row("F29")
def test_any_json_result(client: Client) -> None:
    """A tuple becomes a list; None, nothing and false are results like any other."""
    wanted = {
        "tuple": [1, [2, 3]],
        "none": None,
        "zero": 0,
        "text": "",
        "list": [],
        "false": False,
        "nested": {"a": [{"b": [{"c": None}]}], "": {}},
    }
    jobs = {what: enqueued(client, what) for what in wanted}
    pulled = {what: client.pull(job_id, timeout=50) for what, job_id in jobs.items()}

    assert {what: found["status"] for what, found in pulled.items()} == dict.fromkeys(wanted, "Completed")
    assert {what: found["result"] for what, found in pulled.items()} == wanted
    assert pulled["false"]["result"] is False
    assert pulled["zero"]["result"] is not False


@pytest.mark.row("F31")
def test_a_pull_waits_five_seconds_at_most(client: Client) -> None:
    """A job of 2 s is worth the wait, one of 8 s is asked for again; what was pulled is gone."""
    short, long = enqueued(client, "zero", sleep=2), enqueued(client, "list", sleep=8)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(Client(client.url, ADMIN).pull, short)
        second = threads.submit(Client(client.url, ADMIN).pull, long)
        first_told, second_told = first.result()["status"], second.result()["status"]
    later = client.pull(long, timeout=50)

    assert (first_told, second_told) == ("Completed", "Running")
    assert (later["status"], later["result"]) == ("Completed", [])
    for ask in (client.pull, client.result):
        with pytest.raises(ApiError) as refused:
            ask(short)
        assert (refused.value.status, refused.value.code) == (410, "result_gone")


def test_lists_of_the_client(client: Client) -> None:
    """Results, waiting and running jobs as Python rows."""
    job_id = enqueued(client, "tuple", sleep=0.01)
    client.result(job_id, timeout=50)

    assert job_id in [row["job_id"] for row in client.results(name="result_jobs.Returns")]
    assert client.queued(namespace="nowhere").rows == client.running(name="nobody").rows == []


def core4(stack: Stack, *words: str) -> subprocess.CompletedProcess[str]:
    environ = clean_environ(
        CORE4_URL=stack.url, CORE4_USER=ADMIN[0], CORE4_PASSWORD=ADMIN[1], HOME=os.environ.get("HOME", "/")
    )
    return subprocess.run(
        [program("core4"), "job", "result", *words],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_on_the_command_line(stack: Stack, client: Client) -> None:
    """The result is printed, the outcome is the exit code; pulled results and running jobs are told apart."""
    job_id = enqueued(client, "nested", sleep=0.1)
    failing = enqueued(client, "error")
    waiting = client.enqueue("result_jobs.Returns", {"what": "none"}, namespace="nowhere")
    early = core4(stack, waiting, "--pull")
    found = core4(stack, job_id, "--wait", "--pull")
    gone = core4(stack, job_id)
    failed = core4(stack, failing, "--wait")
    whole = core4(stack, failing, "-o", "json")
    by_request = core4(stack, client.show(failing)["request_id"], "--request")

    assert (early.returncode, early.stdout) == (5, "")
    assert "there is no result yet" in early.stderr
    assert (found.returncode, json.loads(found.stdout)["a"]) == (0, [{"b": [{"c": None}]}])
    assert (gone.returncode, gone.stdout) == (2, "")
    assert "was pulled by admin" in gone.stderr
    assert (failed.returncode, failed.stderr) == (1, "Error: Failed: ValueError('not today')\n")
    assert json.loads(whole.stdout)["error"]["category"] == "ERROR"
    assert (by_request.returncode, by_request.stderr) == (1, failed.stderr)
