"""What the command line makes of its words, and what it says about a job that waits."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest

from core4 import cli
from core4.commands_bulk import meant, selecting
from core4.commands_jobs import why_waiting
from core4.console import arguments, printable

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ([], {}),
        (["sleep=10"], {"sleep": 10}),
        (["month=2026-01", "name=Ada Lovelace"], {"month": "2026-01", "name": "Ada Lovelace"}),
        (["a=1.5", "b=true", "c=null", 'd="7"'], {"a": 1.5, "b": True, "c": None, "d": "7"}),
        (["list=[1, 2]", 'map={"k": "v"}'], {"list": [1, 2], "map": {"k": "v"}}),
        (["query=a=b", "empty="], {"query": "a=b", "empty": ""}),
        (["n=NaN", "m=Infinity"], {"n": "NaN", "m": "Infinity"}),
        (['{"month": "2026-01", "top": 3}'], {"month": "2026-01", "top": 3}),
    ],
)
def test_arguments_of_a_job(words: list[str], given: dict[str, Any]) -> None:
    """Values are JSON if they can be, else text; or all is one JSON object."""
    assert arguments(words) == given


@pytest.mark.parametrize("words", [["sleep"], ["=1"], ["a=1", "a=2"], ["{broken"], ["{}", "a=1"]])
def test_words_that_are_no_arguments(words: list[str]) -> None:
    """A word that is no key=value is bad usage and names itself."""
    with pytest.raises(click.UsageError):
        arguments(words)


@pytest.mark.parametrize(
    ("ids", "options", "selected"),
    [
        (["1"], [], False),
        ([], ["--all"], True),
        ([], ["--state", "error"], True),
        ([], ["--search", "x", "--dry-run"], True),
        ([], [], "either by id or by"),
        ([], ["--filter", ""], "either by id or by"),
        (["1"], ["--all"], "either by id or by"),
        (["1"], ["--dry-run"], "--dry-run goes with"),
    ],
)
def test_jobs_by_id_or_by_filter(ids: list[str], options: list[str], selected: bool | str) -> None:
    """One of the two, never nothing: a filter that a script left empty must not mean all jobs."""
    picked = click.Command("kill", params=selecting(lambda: None).__click_params__[::-1])  # type: ignore[attr-defined]
    given = picked.make_context("kill", options).params
    if isinstance(selected, bool):
        assert meant(given, bool(ids)) is selected
        return
    with pytest.raises(click.UsageError, match=selected):
        meant(given, bool(ids))


def test_output_of_jobs_does_not_steer_the_terminal() -> None:
    """Escape sequences in what a job wrote are shown, not obeyed."""
    assert printable("a\x1b[2Jb\rc\x07\n\tä€") == "a\\x1b[2Jb\\x0dc\\x07\n\tä€"


def commands(group: click.Group, path: str = "core4") -> list[tuple[str, click.Command]]:
    """All commands below a group with their full names."""
    found: list[tuple[str, click.Command]] = []
    for name, command in group.commands.items():
        found.append((f"{path} {name}", command))
        if isinstance(command, click.Group):
            found += commands(command, f"{path} {name}")
    return found


COMMANDS = commands(cli.core4)


@pytest.mark.parametrize(
    ("name", "command"),
    [pytest.param(*each, id=each[0]) for each in COMMANDS if not isinstance(each[1], click.Group)],
)
def test_each_command_explains_itself(name: str, command: click.Command) -> None:
    """The help of every command says what it does and shows how to call it."""
    with click.Context(command, info_name=name) as context:
        text = command.get_help(context)

    assert "Example" in text
    assert f"core4 {name.split()[-1]}" in text or name.removeprefix("core4 ") in text


@pytest.mark.parametrize(
    "words",
    [
        ["nosuch"],
        ["job", "enqueue"],
        ["job", "queue", "--state", "sleeping"],
        ["job", "queue", "--filter", "[1]"],
        ["job", "enqueue", "a.B", "novalue"],
        ["up", "--port", "high"],
        ["up", "--port", "70000"],
        ["up", "no_such_file.py"],
        ["worker", "no_such_file.py"],
        ["worker", "no/such/file", "--processes", "2"],
        ["worker", "no_such_file.py", "--tmux", "2"],
        ["worker", "./"],
        ["run", "no.such.Job"],
        ["run", "examples.DummyJob", "sleep"],
        ["run", "some_file.py:Job"],
        ["run", "TASKS:add", "a=1"],
        ["init", "no_folder/first.py"],
        ["events", "--since", "yesterday"],
        ["worker", "--namespace", "bad ns!"],
        ["init", "not-a-module.txt"],
        ["--config", "no_such.toml", "config"],
    ],
    ids=" ".join,
)
def test_bad_usage_is_exit_code_2(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is called wrongly ends with code 2, one message and no traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CORE4_HOME", str(tmp_path / "home"))

    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert "Error: " in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, and a list of places of its own that modules are looked for in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_init_writes_a_job_that_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first job file runs as it is, and is not overwritten."""
    assert cli.main(["init", "first_steps.py"]) == 0
    assert cli.main(["run", "first_steps.Hello", "name=Ada", "pause=0"]) == 0
    assert '"greeting": "Hello, Ada!"' in capsys.readouterr().out
    assert cli.main(["init", "first_steps.py"]) == 2
    assert "exists" in capsys.readouterr().err


def test_run_says_what_it_cannot_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A task is a function; a job that cannot be read opens no debugger that nobody has asked for."""
    (folder / "task_of_mine.py").write_text(
        "from core4 import task\n@task(namespace='MINE')\ndef add(a): return a\n"
    )

    for name, said in (
        ("task_of_mine.add", "[task_of_mine.add] is a task"),
        ("MINE:add", "[MINE:add] is a task"),
        ("task_of_mine.py:add", "name its file with -m FILE.py"),
    ):
        assert cli.main(["run", name, "a=1", "-m", "task_of_mine.py"]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["init", "first_steps_too.py"]) == 0
    assert cli.main(["run", "first_steps_too.Hello", "name"]) == 2
    assert "argument 'name' does not look like key=value" in capsys.readouterr().err


def test_run_runs_a_coroutine_function(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "awaiting_one.py").write_text(
        "import asyncio\nfrom core4 import CoreJob\n"
        "class Hello(CoreJob):\n    author = 'me'\n    inline = True\n"
        "    async def execute(self, name):\n        await asyncio.sleep(0)\n"
        "        return f'Hello, {name}!'\n"
    )

    assert cli.main(["run", "awaiting_one.Hello", "name=Ada"]) == 0
    assert capsys.readouterr().out == '"Hello, Ada!"\n'


def worker(**fields: Any) -> dict[str, Any]:
    """A worker that is up and could run `a.Job`."""
    return {
        "name": "w@h",
        "state": "up",
        "jobs": ["a.Job"],
        "namespaces": ["DEFAULT"],
        "running": 0,
        "slots": 2,
        **fields,
    }


def job(**fields: Any) -> dict[str, Any]:
    """A pending job `a.Job`."""
    return {
        "qual_name": "a.Job",
        "namespace": "DEFAULT",
        "state": "pending",
        "query_at": None,
        "worker": None,
        "held": None,
        "max_parallel": None,
        **fields,
    }


LATER = (NOW + timedelta(seconds=90)).replace(tzinfo=None).isoformat()


@pytest.mark.parametrize(
    ("found", "workers", "words"),
    [
        pytest.param(
            job(state="failed", query_at=LATER),
            [worker()],
            "90 s from now: its last attempt failed",
            id="retry",
        ),
        pytest.param(
            job(state="deferred", query_at=LATER), [worker()], "asked to be run later", id="deferred"
        ),
        pytest.param(job(), [], "no worker is up", id="no-worker"),
        pytest.param(
            job(), [worker(state="dead"), worker(state="drain")], "no worker is up", id="workers-gone"
        ),
        pytest.param(job(worker="x@y", held="worker"), [worker()], "worker x@y only", id="pinned-to-absent"),
        pytest.param(job(held="paused"), [worker()], "held: paused", id="held"),
        pytest.param(
            job(held="rate_limit", rate_limit="10/60s"), [worker()], "10/60s of a.Job are started", id="rate"
        ),
        pytest.param(
            job(), [worker(jobs=["b.Job"])], "no worker that is up runs a.Job", id="name-not-served"
        ),
        pytest.param(job(namespace="X"), [worker()], "serves the namespace X", id="namespace-not-served"),
        pytest.param(job(), [worker(running=2), worker(running=3)], "slots", id="all-busy"),
        pytest.param(job(), [worker(gate="memory: 1 MiB")], "only jobs with force now (memory", id="gate"),
        pytest.param(job(force=True), [worker(gate="cpu: 100 %")], "its turn", id="forced-through-the-gate"),
        pytest.param(job(), [worker(gate="cpu: 100 %"), worker()], "its turn", id="one-gate-is-open"),
        pytest.param(job(), [worker(running=2), worker()], "its turn", id="next"),
        pytest.param(job(max_parallel=15), [worker()], "max_parallel", id="limited"),
        pytest.param(job(query_at="2026-01-01T00:00:00"), [worker()], "its turn", id="due"),
    ],
)
def test_why_a_job_waits(found: dict[str, Any], workers: list[dict[str, Any]], words: str) -> None:
    """`core4 job show` names the one thing that keeps a job from running."""
    (reason,) = why_waiting(found, workers, NOW)

    assert words in reason
