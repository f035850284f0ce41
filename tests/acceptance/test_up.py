"""`core4 up` as a user has it: real processes, real signals, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from tests.helpers import (
    ADMIN,
    BASE,
    FAST,
    Command,
    Stack,
    clean_environ,
    eventually,
    free_port,
    marked,
    port_is_free,
    program,
    running_stack,
)

DUMMY = "core4.queue.helper.job.example.DummyJob"


def up(home: Path, *words: str | Path, **environ: str) -> Command:
    """`core4 up` on `home`, not started yet."""
    return Command([program("core4"), "up", *words], {"CORE4_HOME": str(home), **FAST, **environ}, cwd=home)


def refusal(home: Path, *words: str | Path, **environ: str) -> tuple[int, str]:
    """Exit code and output of a `core4 up` that is to fail; nothing of it may be left."""
    home.mkdir(exist_ok=True)
    with up(home, *words, **environ) as command:
        code = command.wait(60)
        command.assert_nothing_left()
        return code, command.output


def child(stack: Stack, words: str) -> psutil.Process:
    """The process of the stack whose command line contains `words`."""
    found = [each for each in marked(stack.command.mark) if words in " ".join(each.cmdline())]
    assert found, f"no process with {words!r}"
    return found[0]


@contextlib.contextmanager
def listening() -> Iterator[int]:
    """A port that somebody else uses."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_ready_means_that_a_job_runs(tmp_path: Path) -> None:
    """At the moment of the ready line a job can be enqueued, and it runs to its end."""
    port = free_port()
    with up(tmp_path, "--port", str(port)) as command:
        command.wait_for("\nready ")
        stack = Stack(f"http://127.0.0.1:{port}", tmp_path, command)
        job_id = stack.enqueue(DUMMY, sleep=0.2)
        assert stack.wait_for_state(job_id, "complete")["state"] == "complete"

    assert f"http://localhost:{port}" in command.output
    assert "WARNING" in command.output
    assert "default credentials" in command.output


def test_ready_with_functions(tmp_path: Path) -> None:
    """That its worker runs them is published nowhere, and not waited for."""
    key = "ann:" + "k" * 40
    with running_stack(tmp_path, CORE4_FUNCTIONS="true", CORE4_FUNCTION_KEYS=key) as stack:
        job_id = stack.enqueue(DUMMY, sleep=0.1)
        assert stack.wait_for_state(job_id, "complete")["state"] == "complete"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_stops_everything(tmp_path: Path, number: signal.Signals) -> None:
    """One signal ends all processes in order, with exit code 0, and frees the port."""
    with running_stack(tmp_path) as stack:
        assert len(marked(stack.command.mark)) > 3
        stack.command.process.send_signal(number)
        assert stack.command.wait() == 0
        stack.command.assert_nothing_left(0)
        assert port_is_free(int(stack.url.rpartition(":")[2]))

    assert not list(tmp_path.glob("*.json"))


def test_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    """Whoever does not want to wait for running jobs interrupts twice; the job is not lost."""
    with running_stack(tmp_path, CORE4_DRAIN="600") as stack:
        job_id = stack.enqueue(DUMMY, sleep=600)
        stack.wait_for_state(job_id, "running")
        stack.command.process.send_signal(signal.SIGINT)
        stack.command.wait_for("stopping")
        stack.command.process.send_signal(signal.SIGINT)
        assert stack.command.wait() == 130
        stack.command.assert_nothing_left()
    with running_stack(tmp_path) as stack:
        assert stack.job(job_id)["state"] in ("pending", "running")


@pytest.mark.row("F14")
def test_kill_9_leaves_nothing_and_loses_nothing(tmp_path: Path) -> None:
    """All children die with `core4 up`, job processes too; the next start has the data and runs on."""
    with running_stack(tmp_path) as stack:
        done = stack.enqueue(DUMMY, sleep=0.1)
        stack.wait_for_state(done, "complete")
        held = stack.enqueue(DUMMY, sleep=3600)
        stack.command.wait_for(f'"event": "job.started", "identifier": "{held}"')
        stack.command.process.kill()
        stack.command.assert_nothing_left()
    with running_stack(tmp_path, CORE4_DUMMY_SLEEP_MAX="0.1") as stack:
        assert stack.job(done)["state"] == "complete"
        assert stack.wait_for_state(held, "complete")["crashes"] == 1


def test_second_start_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    """It says which folder is in use and what to do; the first one is not disturbed."""
    with running_stack(tmp_path) as stack:
        code, output = refusal(tmp_path, CORE4_PORT=str(free_port()))

        assert code == 2
        assert str(tmp_path) in output
        assert "--home" in output
        assert stack.data("GET", "/job/count")["pending"] == 0


def test_taken_port_is_named(tmp_path: Path) -> None:
    """The port is looked at before anything is started; --port helps."""
    with listening() as port:
        code, output = refusal(tmp_path / "home", CORE4_PORT=str(port))

    assert code == 2
    assert f"port {port}" in output
    assert "--port" in output
    assert not list((tmp_path / "home").iterdir())


@pytest.mark.parametrize("part", ["-m core4 worker", "-m core4 api", "/database/"])
def test_part_that_dies_is_started_again(tmp_path: Path, part: str) -> None:
    """kill -9 of one part is told and mended; jobs run again without anybody's help."""
    with running_stack(tmp_path) as stack:
        process = child(stack, part)
        process.kill()
        stack.command.wait_for("started again")

        def runs() -> bool:
            try:
                job_id = stack.enqueue(DUMMY, sleep=0.01, loop_time=0.01)
            except (requests.RequestException, AssertionError):
                return False
            return bool(stack.wait_for_state(job_id, "complete"))

        assert eventually(runs, 60, what="a job runs")
        assert child(stack, part).pid != process.pid


def test_follower_survives_the_death_of_the_api(tmp_path: Path) -> None:
    """A command that follows a job goes on when the API is back, and misses nothing."""
    with running_stack(tmp_path) as stack:
        words = [
            "job",
            "enqueue",
            DUMMY,
            "sleep=8",
            "loop_time=0.2",
            "logging=true",
            "--follow",
            "-o",
            "json",
        ]
        with Command([program("core4"), *words], {"CORE4_HOME": str(tmp_path)}) as follower:
            follower.wait_for('"event": "log"')
            child(stack, "-m core4 api").kill()
            assert follower.wait() == 0

    lines = [line for line in follower.output.splitlines() if line.startswith("{")]
    events = [json.loads(line) for line in lines]
    numbers = [event["data"]["seq"] for event in events if event["event"] == "log"]
    stored = stack_log(tmp_path, events[0]["data"]["_id"])
    assert numbers == stored
    assert [event["event"] for event in events].count("close") == 1
    assert "connection lost" in follower.output


def stack_log(home: Path, job_id: str) -> list[int]:
    """The numbers of all stored lines of a job, read after a new start."""
    with running_stack(home) as stack:
        rows = stack.data("GET", f"/job/log/{job_id}", params={"per_page": 500})
    assert 0 < len(rows) < 500
    return [row["seq"] for row in rows]


def test_no_secret_in_any_command_line(tmp_path: Path) -> None:
    """URLs of the database and passwords travel by environment, where other users cannot read them."""
    with running_stack(tmp_path) as stack:
        words = [" ".join(each.cmdline()) for each in marked(stack.command.mark)]

    assert len(words) > 3
    assert not [line for line in words if "mongodb://" in line or "hans" in line]


def test_first_user_is_asked_for_on_a_real_server(mongo_url: str, database_name: str, tmp_path: Path) -> None:
    """Default credentials exist with the embedded database only."""
    environ = {"CORE4_MONGO_URL": mongo_url, "CORE4_MONGO_DATABASE": database_name}
    port = str(free_port())

    code, output = refusal(tmp_path, "--port", port, **environ)
    assert code == 2
    assert "core4 user add NAME --allow cop" in output

    subprocess.run(
        [program("core4"), "user", "add", "ada", "--allow", "cop"],
        env=clean_environ(**environ, CORE4_NEW_PASSWORD="s3cret password"),
        check=True,
    )
    with up(tmp_path, "--port", port, **environ) as command:
        command.wait_for("\nready ")
        answer = requests.get(
            f"http://127.0.0.1:{port}{BASE}/profile", auth=("ada", "s3cret password"), timeout=10
        )
        refused = requests.get(f"http://127.0.0.1:{port}{BASE}/profile", auth=ADMIN, timeout=10)

    assert answer.status_code == 200
    assert refused.status_code == 401
    assert "default credentials" not in command.output


def test_default_user_is_not_shown_to_other_machines(tmp_path: Path) -> None:
    """On another address than loopback there is no default user, neither a new one nor one from before."""
    code, output = refusal(tmp_path, "--host", "0.0.0.0", "--port", str(free_port()))
    assert code == 2
    assert "core4 user add" in output

    with running_stack(tmp_path):
        pass
    code, output = refusal(tmp_path, "--host", "0.0.0.0", "--port", str(free_port()))
    assert code == 2
    assert "core4 user passwd admin" in output


@pytest.mark.parametrize(
    ("environ", "words", "message"),
    [
        ({"CORE4_SLOTS": "many", "CORE4_PROT": "1"}, [], "did you mean CORE4_PORT"),
        ({}, ["missing.py"], "no such file: missing.py"),
        ({}, ["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        ({"CORE4_MONGO_URL": "mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=500"}, [], "database"),
        ({"CORE4_BROKER_URL": "sqs://user:password@queues"}, [], "'sqs': no broker of this name"),
    ],
    ids=["settings", "file", "host", "database", "broker"],
)
def test_what_cannot_start_says_so(
    tmp_path: Path, environ: dict[str, str], words: list[str], message: str
) -> None:
    """A clear message, no traceback, no leftovers."""
    code, output = refusal(tmp_path, "--port", "0", *words, **environ)

    assert code in (2, 69)
    assert message in output
    assert "Traceback" not in output


def test_jobs_of_a_file_are_served(tmp_path: Path) -> None:
    """`core4 up my_jobs.py` runs what is in the file, beside the examples or without them."""
    subprocess.run([program("core4"), "init", "my_jobs.py"], cwd=tmp_path, check=True, capture_output=True)
    with running_stack(tmp_path, "my_jobs.py") as stack:
        listed = {row["_id"] for row in stack.data("GET", "/job/list")}
        job_id = stack.enqueue("my_jobs.Hello", name="Ada", pause=0)

        assert listed == {DUMMY, "core4.examples.AccessLogReport", "my_jobs.Hello"}
        assert stack.wait_for_state(job_id, "complete")["result"] == {"greeting": "Hello, Ada!"}


def test_demo_shows_a_real_job_and_leaves_nothing(tmp_path: Path) -> None:
    """`core4 demo` ends with code 0 and the report, even if its port is taken, and removes its folder."""
    with listening() as port:
        environ = {**FAST, "CORE4_PORT": str(port), "TMPDIR": str(tmp_path)}
        with Command([program("core4"), "demo", "--pace", "0.5"], environ) as command:
            assert command.wait() == 0
            command.assert_nothing_left()

    assert "complete" in command.output
    assert "by_status" in command.output
    assert "core4 up" in command.output
    assert not list(tmp_path.glob("core4-demo-*"))


def test_interrupted_demo_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C in the middle of the demo stops everything it started."""
    environ = {**FAST, "CORE4_PORT": str(free_port()), "TMPDIR": str(tmp_path)}
    with Command([program("core4"), "demo", "--pace", "60"], environ) as command:
        command.wait_for("running")
        command.interrupt()
        assert command.wait() == 130
        command.assert_nothing_left()

    assert not list(tmp_path.glob("core4-demo-*"))


def test_old_python_is_named() -> None:
    """An interpreter that is too old is told before any module is loaded that it cannot read."""
    old = "import runpy, sys; sys.version_info = (3, 9, 2); runpy.run_module('core4', run_name='__main__')"

    ended = subprocess.run([sys.executable, "-c", old], capture_output=True, text=True, check=False)

    assert ended.returncode == 1
    assert "needs Python 3.11 or newer; this is 3.9" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_refused_second_start_leaves_the_first_alone(stack: Stack) -> None:
    """Its port may be free: the data folder is not, and the first goes on being found by the commands."""
    state = (stack.home / "stack.json").read_text()
    environ = {**clean_environ(), "CORE4_HOME": str(stack.home)}
    second = subprocess.run(
        [program("core4"), "up", "--port", str(free_port())],
        check=False,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert second.returncode != 0
    assert "in use" in second.stderr + second.stdout
    assert (stack.home / "stack.json").read_text() == state
