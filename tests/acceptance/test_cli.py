"""`core4 job ...` against a running stack: for people on a terminal and for scripts."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import Stack, clean_environ, eventually, program, running_stack

DUMMY = "core4.queue.helper.job.example.DummyJob"
HERE = Path(__file__).parent

JOBS = '''
from core4 import CoreJob

class Fails(CoreJob):
    """Raise an error."""
    author = "tests"
    def execute(self, n: int = 0):
        self.logger.warning("about to fail")
        raise ValueError("not today")

class Held(CoreJob):
    author = "tests"
    def execute(self, n: int = 0):
        pass

class Defers(CoreJob):
    author = "tests"
    defer_time = 0.2
    defer_max = 0.5
    def execute(self):
        self.defer("later")

class Retries(CoreJob):
    author = "tests"
    attempts = 2
    error_time = 600
    def execute(self):
        raise ValueError("again")
'''


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One running stack for all tests of this file, with one slot."""
    home = tmp_path_factory.mktemp("stack")
    (home / "cli_jobs.py").write_text(JOBS)
    with running_stack(home, "cli_jobs.py", CORE4_SLOTS="4", CORE4_COUNT_EVERY="1") as stack:
        yield stack


class Cli:
    """Runs `core4` as a user of the stack's machine would."""

    def __init__(self, stack: Stack) -> None:
        self.environ = clean_environ(CORE4_HOME=str(stack.home), COLUMNS="200", TERM="xterm")

    def __call__(self, *words: str, code: int = 0, **environ: str) -> str:
        """Run a command that must end with `code`; its output, stderr after stdout."""
        ended = subprocess.run(
            [program("core4"), *words],
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )
        assert ended.returncode == code, f"{words}: {ended.returncode}\n{ended.stdout}{ended.stderr}"
        return ended.stdout + ended.stderr

    def json(self, *words: str) -> Any:
        """What a command prints with `-o json`."""
        return json.loads(self(*words, "-o", "json"))

    def terminal(self, *words: str) -> Terminal:
        """Start a command on a terminal."""
        return Terminal([program("core4"), *words], self.environ)


class Terminal:
    """A command whose three streams are a terminal."""

    def __init__(self, command: list[str], environ: Mapping[str, str]) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, env=dict(environ), stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self.raw = b""

    @property
    def text(self) -> str:
        """What was written so far, without colours and movements."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw.decode(errors="replace")).replace("\r", "\n")

    def read_until(self, words: str) -> str:
        """Read until `words` have appeared, or the end if they are empty."""
        while not words or words not in self.text:
            try:
                data = os.read(self.master, 4096)
            except OSError:  # how Linux tells that the other side is closed
                data = b""
            if not data:
                assert not words, f"ended before {words!r}:\n{self.text}"
                break
            self.raw += data
        return self.text

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> int:
        """Read to the end; the exit code."""
        self.read_until("")
        os.close(self.master)
        return self.process.wait(30)


def output_of(command: list[str], environ: Mapping[str, str]) -> str:
    """What a command that must succeed prints."""
    return subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def cli(stack: Stack) -> Cli:
    return Cli(stack)


def test_catalogue(cli: Cli) -> None:
    """`job list` shows what can be enqueued, whole for scripts."""
    rows = cli.json("job", "list")

    assert {"cli_jobs.Fails", DUMMY} <= {row["_id"] for row in rows}
    assert "Raise an error." in cli("job", "list", "fails")
    assert DUMMY not in cli("job", "list", "fails")


def test_outcome_is_the_exit_code(cli: Cli, stack: Stack) -> None:
    """Complete is 0, error 1, killed 3, inactive 4."""
    cli("job", "enqueue", DUMMY, "sleep=0.1", "--follow", code=0)
    assert "not today" in cli("job", "enqueue", "cli_jobs.Fails", "n=1", "--follow", code=1)
    cli("job", "enqueue", "cli_jobs.Defers", "--follow", code=4)
    job_id = cli("job", "enqueue", DUMMY, "sleep=600", "loop_time=0.1", "--key", "once").strip()
    assert cli("job", "enqueue", DUMMY, "sleep=600", "loop_time=0.1", "--key", "once").strip() == job_id
    stack.wait_for_state(job_id, "running")
    assert "killed" in cli("job", "kill", job_id)
    cli("job", "follow", job_id, code=3)


def test_following_in_a_pipe_prints_lines(cli: Cli) -> None:
    """Without a terminal there are log lines and states, no bar and no colours."""
    output = cli("job", "enqueue", DUMMY, "sleep=0.3", "loop_time=0.1", "--follow")

    assert re.search(r"^[0-9a-f]{24} running$", output, re.MULTILINE)
    assert re.search(r"^\d\d:\d\d:\d\d INFO    sleeping for 0.3 sec.$", output, re.MULTILINE)
    assert re.search(r"^[0-9a-f]{24} complete$", output, re.MULTILINE)
    assert "\x1b" not in output


def test_following_as_json_is_one_event_a_line(cli: Cli) -> None:
    """Scripts get every event with its id; the last one is `close`."""
    output = cli("job", "enqueue", DUMMY, "sleep=0.2", "loop_time=0.05", "--follow", "-o", "json")

    events = [json.loads(line) for line in output.splitlines()]
    assert {event["event"] for event in events} == {"state", "log", "close"}
    assert events[-1]["event"] == "close"
    assert all(event["id"] for event in events)


def test_following_on_a_terminal(cli: Cli) -> None:
    """On a terminal a bar stays below the log lines and ends at 100 %."""
    terminal = cli.terminal("job", "enqueue", DUMMY, "sleep=2", "loop_time=0.2", "--follow")
    code = terminal.close()

    assert code == 0
    assert "\x1b[" in terminal.raw.decode(errors="replace")
    assert "INFO    sleeping for 2 sec." in terminal.text
    assert re.search(r"complete .*100%", terminal.text)


def test_ctrl_c_detaches_and_says_how_to_attach_again(cli: Cli, stack: Stack) -> None:
    """The job goes on; the command that is named shows the rest, without what was seen."""
    terminal = cli.terminal("job", "enqueue", DUMMY, "sleep=600", "loop_time=0.3", "--follow")
    terminal.read_until("sleeping for 600")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.close() == 130
    again = re.search(r"core4 (job follow ([0-9a-f]{24}) --after \S+)", terminal.text)
    assert again
    job_id = again[2]
    assert stack.job(job_id)["state"] == "running"

    cli("job", "kill", job_id)
    rest = cli(*again[1].split(), code=3)
    assert "killed" in rest
    assert "sleeping for 600" not in rest


def test_queue_log_and_history(cli: Cli, stack: Stack) -> None:
    """Listings show a job where it is; `log` filters by level and tail."""
    job_id = cli("job", "enqueue", "cli_jobs.Fails", "n=2").strip()
    stack.wait_for_state(job_id, "error")

    assert job_id in cli("job", "queue", "--state", "error", "--search", "fails")
    assert job_id not in cli("job", "queue", "--state", "running")
    assert [row["_id"] for row in cli.json("job", "queue", "--filter", '{"args.n": 2}')] == [job_id]
    assert "about to fail" in cli("job", "log", job_id, "--level", "warning")
    assert "about to fail" not in cli("job", "log", job_id, "--tail", "1")
    shown = cli("job", "show", job_id)
    assert "ValueError('not today')" in shown
    assert "line 9, in execute" in shown

    cli("job", "remove", job_id)
    assert job_id in {row["_id"] for row in cli.json("job", "history", "--state", "error")}
    assert "(journal)" in cli("job", "show", job_id)


def test_many_at_once(cli: Cli) -> None:
    """By filter: shown with --dry-run, asked for on a terminal, refused without --yes elsewhere."""
    ids = [
        cli("job", "enqueue", "cli_jobs.Held", f"n={n}", "worker=nobody@nowhere").strip() for n in range(3)
    ]
    picked = ("--search", "held", "--filter", '{"args.n": {"lt": 2}}')

    told = cli("job", "kill", *picked, "--dry-run")
    assert "kill: 2 jobs, would be: 2 changed" in told
    assert (ids[0] in told, ids[2] in told) == (True, False)
    assert "2 jobs match: kill them with --yes" in cli("job", "kill", *picked, code=2)

    with_no = cli.terminal("job", "kill", *picked)
    with_no.read_until("kill 2 jobs?")
    with_no.type("n\n")
    assert with_no.close() == 2
    assert {cli.json("job", "show", job_id)["state"] for job_id in ids} == {"pending"}

    with_yes = cli.terminal("job", "kill", *picked)
    with_yes.read_until("kill 2 jobs?")
    with_yes.type("y\n")
    assert with_yes.close() == 0
    assert "kill: 2 jobs, 2 changed" in with_yes.text
    assert [cli.json("job", "show", job_id)["state"] for job_id in ids] == ["killed", "killed", "pending"]

    # Not all can be done: the exit code says so, and why.
    refused = cli("job", "restart", "--search", "held", "--yes", code=2)
    assert f"{ids[2]}: job [{ids[2]}] is pending: there is nothing to restart" in refused
    assert "restart: 3 jobs, 2 changed, 1 refused" in refused
    report = cli.json("job", "kill", "--search", "held", "--state", "pending", "--yes")
    assert (report["matched"], report["changed"]) == (3, 3)
    assert "remove: 3 jobs, 3 changed" in cli("job", "remove", "--search", "held", "--yes")
    assert "remove: 0 jobs" in cli("job", "remove", "--search", "held")


def test_restart(cli: Cli, stack: Stack) -> None:
    """Restart of an ended job prints the id of a new one; with --follow its outcome is the exit code."""
    job_id = cli("job", "enqueue", "cli_jobs.Fails", "n=3").strip()
    stack.wait_for_state(job_id, "error")

    assert "not today" in cli("job", "restart", job_id, "--follow", code=1)


def test_show_says_why_a_job_waits(cli: Cli, stack: Stack) -> None:
    """A pending job names what keeps it waiting."""
    elsewhere = cli("job", "enqueue", DUMMY, "sleep=0.11", "--namespace", "NOBODY").split()[0]
    pinned = cli("job", "enqueue", DUMMY, "sleep=0.12", "--worker", "other@nowhere").split()[0]
    failed = cli("job", "enqueue", "cli_jobs.Retries").strip()
    stack.wait_for_state(failed, "failed")

    assert "serves the namespace NOBODY" in cli("job", "show", elsewhere)
    assert "other@nowhere only" in cli("job", "show", pinned)
    assert "its last attempt failed" in cli("job", "show", failed)
    assert cli.json("job", "show", pinned)["waiting"]
    cli("job", "kill", elsewhere, pinned, failed)


def test_workers(cli: Cli) -> None:
    """The worker of the stack is listed with what it serves, under both names of the command."""
    (row,) = cli.json("workers")

    assert row["slots"] == 4
    assert DUMMY in row["jobs"]
    assert row["name"] in cli("job", "workers")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["job", "show", "0" * 24], "not found"),
        (["job", "follow", "0" * 24], "not found"),
        (["job", "kill", "no-id"], "not found"),
        (["job", "kill"], "either by id or by --filter"),
        (["job", "kill", "--filter", '{"$where": 1}', "--yes"], "unknown field"),
        (["job", "enqueue", "no.such.Job"], "unknown job"),
        (["job", "enqueue", DUMMY, "slep=1"], "slep"),
        (["job", "queue", "--filter", '{"$where": "1"}'], "unknown field"),
    ],
)
def test_refused_is_exit_code_2(cli: Cli, words: list[str], message: str) -> None:
    """What the API refuses is told in its words, without a traceback."""
    output = cli(*words, code=2)

    assert message in output.lower()
    assert "Traceback" not in output


def test_nobody_answers(cli: Cli) -> None:
    """Without an API the code is 69, and the message says what to do."""
    output = cli("job", "queue", code=69, CORE4_URL="http://127.0.0.1:9")

    assert "core4 up" in output
    assert "CORE4_URL" in output


def test_wrong_password(cli: Cli) -> None:
    """Credentials that are refused name the variables, and are not repeated."""
    output = cli("job", "queue", code=2, CORE4_USER="admin", CORE4_PASSWORD="wr0ng")

    assert "CORE4_PASSWORD" in output
    assert "wr0ng" not in output


def test_closed_pipe_is_quiet(cli: Cli) -> None:
    """`core4 job list | head -0` says nothing."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(
            [program("core4"), "job", "list"],
            env=cli.environ,
            stdout=writing,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(writing)

    assert ended.stderr == b""
    assert ended.returncode == 141


def test_users(cli: Cli, stack: Stack) -> None:
    """A user is made while the stack runs, may do what was allowed, and is disabled again."""
    cli("user", "add", "carol", "--allow", "job://cli_jobs.*/r", CORE4_NEW_PASSWORD="carol's password")
    carol = {"CORE4_USER": "carol", "CORE4_PASSWORD": "carol's password"}

    assert {"name": "carol", "active": True, "rights": ["job://cli_jobs.*/r"]} in cli.json("user", "list")
    assert "no right" in cli("job", "enqueue", DUMMY, code=2, **carol)
    assert "exists" in cli("user", "add", "carol", code=2, CORE4_NEW_PASSWORD="x" * 10)
    assert "carol has cop" in cli("user", "rights", "carol", "--allow", "cop")
    assert {"name": "carol", "active": True, "rights": ["cop"]} in cli.json("user", "list")
    assert "neither" in cli("user", "rights", "carol", "--allow", "everything", code=2)
    cli("user", "passwd", "carol", CORE4_NEW_PASSWORD="another password")
    eventually(lambda: cli("job", "queue", code=2, **carol), what="the old password is refused")
    cli("user", "disable", "carol")
    carol["CORE4_PASSWORD"] = "another password"
    eventually(lambda: cli("job", "queue", code=2, **carol), what="a disabled user is refused")


def test_password_is_asked_for_on_a_terminal(cli: Cli) -> None:
    """The prompt shows no letter; both entries must be the same."""
    terminal = cli.terminal("user", "add", "dora", "--allow", "cop")
    terminal.read_until("Password for dora:")
    terminal.type("dora's password\n")
    terminal.read_until("Repeat for confirmation:")
    terminal.type("dora's password\n")

    assert terminal.close() == 0
    assert "dora's password" not in terminal.text


def test_embedded_database_is_started_for_the_time_being(tmp_path: Path) -> None:
    """Users can be made before anything else runs; nothing goes on running afterwards."""
    environ = clean_environ(CORE4_HOME=str(tmp_path / "home"), CORE4_NEW_PASSWORD="s3cret password")
    subprocess.run([program("core4"), "user", "add", "ada"], env=environ, check=True, capture_output=True)
    listed = subprocess.run(
        [program("core4"), "user", "list", "-o", "json"],
        env=environ,
        check=True,
        capture_output=True,
        text=True,
    )

    assert [row["name"] for row in json.loads(listed.stdout)] == ["ada"]
    assert not (tmp_path / "home" / "embedded.json").exists()


def test_config_shows_origins_and_no_secret(tmp_path: Path) -> None:
    """Each value comes with where it is from; passwords are masked."""
    toml = tmp_path / "core4.toml"
    toml.write_text("slots = 3\n")
    environ = clean_environ(CORE4_MONGO_URL="mongodb://app:s3cret@db1/", CORE4_PORT="7000")
    command = [program("core4"), "--config", str(toml), "config"]
    table = subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout
    rows = json.loads(
        subprocess.run([*command, "-o", "json"], env=environ, check=True, capture_output=True).stdout
    )

    origins = {row["setting"]: (row["value"], row["origin"]) for row in rows}
    assert origins["CORE4_SLOTS"] == (3, f"file {toml}")
    assert origins["CORE4_PORT"] == (7000, "environment CORE4_PORT")
    assert origins["CORE4_MONGO_URL"][0] == "mongodb://***@db1/"
    assert "s3cret" not in table


def test_many_from_a_file(cli: Cli, tmp_path: Path) -> None:
    """Ids of what was enqueued, refused lines by number, the same ids again; nothing of a broken file."""
    lines = [{"qual_name": "cli_jobs.Held", "args": {"n": 700 + n}, "key": f"file-{n}"} for n in range(3)]
    path = tmp_path / "jobs.ndjson"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    ids = cli("job", "batch", str(path)).split()

    assert len(set(ids)) == 3
    assert cli("job", "batch", str(path)).split() == ids
    path.write_text(path.read_text() + '{"qual_name": "cli_jobs.Held", "args": {"n": "x"}}\n')
    refused = cli("job", "batch", str(path), code=2)
    assert "line 5: " in refused
    assert set(ids) <= set(refused.split())
    path.write_text('{"qual_name": "cli_jobs.Held", "args": {"n": 799}}\n{')
    assert "line 2 is not JSON" in cli("job", "batch", str(path), code=2)
    assert cli.json("job", "history", "--filter", '{"args.n": 799}') == []


def test_who_did_what(cli: Cli) -> None:
    """Each action has its line, found by job and by author; users are changed at this machine."""
    job_id = cli("job", "enqueue", "cli_jobs.Fails", "n=7101", "--worker", "nobody@nowhere").strip()
    cli("job", "kill", job_id)
    cli("user", "add", "edith", "--allow", "cop", CORE4_NEW_PASSWORD="secret")
    cli("user", "add", "edith", code=2, CORE4_NEW_PASSWORD="secret")

    rows = cli.json("events", "--job", job_id)
    assert [(row["name"], row["author"], row["outcome"]) for row in rows] == [
        ("job.kill", "admin", "done"),
        ("job.enqueue", "admin", "done"),
    ]
    assert all(row["request_id"] for row in rows)
    cli("user", "rights", "edith", "--allow", "job://cli_jobs/r")
    cli("user", "rights", "nobody", code=2)

    def about(name: str, user: str) -> list[Any]:
        return [row for row in cli.json("events", "--name", name) if row["data"]["user"] == user]

    (changed,), (unknown,) = about("user.rights", "edith"), about("user.rights", "nobody")
    assert (changed["outcome"], changed["data"]["rights"]) == ("done", ["job://cli_jobs/r"])
    assert unknown["outcome"].startswith("refused: ")
    (refused, added) = about("user.add", "edith")
    assert cli.json("events", "--name", "user.add", "--since", "2026-01-01")
    assert added["data"] == {"user": "edith", "rights": ["cop"]}
    assert (added["outcome"], refused["outcome"]) == ("done", "refused: user [edith] exists")
    assert "secret" not in cli("events", "--name", "user.add")
    assert {"api.start", "worker.start"} <= {row["name"] for row in cli.json("events", "--per-page", "500")}
    cli("job", "remove", job_id)


def test_counts_over_time(cli: Cli) -> None:
    """Taken by a worker, told from the newest on."""
    job_id = cli("job", "enqueue", "cli_jobs.Fails", "n=7102", "--worker", "nobody@nowhere").strip()

    since = (datetime.now(UTC) - timedelta(hours=1)).isoformat()

    def look() -> bool:
        rows = cli.json("counts", "--since", since)
        return bool(rows) and rows[0].get("pending", 0) >= 1

    eventually(look, what="the waiting job is counted", every=0.5)
    assert "pending" in cli("counts")
    assert "endDate" in cli("counts", "--since", "2026-02-01", "--until", "2026-01-01", code=2)
    cli("job", "remove", job_id)
