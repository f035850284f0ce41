"""Where the file of a task is looked for, and what its decorator does outside of jobs."""

from __future__ import annotations

import os
import subprocess as programs
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core4 import cli, discovery, scripts, subprocess, task
from core4.attempts import Runnable, perform
from core4.context import Ended, JobContext
from core4.errors import BadOption
from core4.worker import script

SHELL = """
import os
os.environ["WORKER_TASK_DIR"] = {folder!r}
from core4 import task

@task(subprocess=True)
async def there(a, b): ...
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("WORKER_TASK_DIR", raising=False)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(scripts, "_server", None)
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "there.py").write_text("x = 1\n")
    return folder


@pytest.mark.row("F50")
def test_the_file_has_the_name_of_the_task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORE4_WORKER_TASK_DIR", str(folder))

    @task(subprocess=True)
    def there(a: int) -> None:
        raise AssertionError

    assert there.declarations["DEFAULT"].script == str(folder / "there.py")


@pytest.mark.row("F50")
def test_without_a_folder_or_a_file_it_is_refused_where_it_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadOption, match=r"set WORKER_TASK_DIR or CORE4_WORKER_TASK_DIR"):

        @task(subprocess=True)
        def there() -> None: ...

    monkeypatch.setenv("WORKER_TASK_DIR", str(folder))
    with pytest.raises(BadOption, match=r"there is no file .*files/absent\.py"):

        @task(subprocess=True)
        def absent() -> None: ...


def test_the_variable_of_the_documents_comes_first(folder: Path, tmp_path: Path) -> None:
    environ = {"WORKER_TASK_DIR": str(folder), "CORE4_WORKER_TASK_DIR": str(tmp_path)}

    assert scripts.find("there", environ) == folder / "there.py"


@pytest.mark.row("F50")
def test_a_module_may_name_the_folder_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the documents do; a missing file is a problem of the module, and says which."""
    monkeypatch.setenv("WORKER_TASK_DIR", "")
    good, bad = folder.parent / "shells_good.py", folder.parent / "shells_bad.py"
    good.write_text(SHELL.format(folder=str(folder)))
    bad.write_text(SHELL.format(folder=str(folder)).replace("there", "not_there"))

    found = discovery.load([str(good), str(bad)])

    (entry,) = found.entries
    assert (entry["_id"], entry["runs"]) == ("DEFAULT:there", "script")
    assert entry["script"] == str(folder / "there.py")
    (problem,) = found.problems
    assert "there is no file" in problem.error
    assert "not_there.py" in problem.error


def test_nothing_leads_out_of_the_folder(folder: Path) -> None:
    outside = folder.parent / "outside.py"
    outside.write_text("x = 1\n")
    (folder / "linked.py").symlink_to(outside)
    (folder / "sub").mkdir()
    (folder / "sub" / "deep.py").write_text("x = 1\n")
    environ = {"WORKER_TASK_DIR": str(folder)}

    for name in ("../outside", str(outside.with_suffix("")), "sub/deep", "", ".", "there\0"):
        with pytest.raises(BadOption, match="cannot be the name of a file"):
            scripts.find(name, environ)
    with pytest.raises(BadOption, match="leads out of its folder"):
        scripts.find("linked", environ)
    (folder / "alias.py").symlink_to(folder / "there.py")
    assert scripts.find("alias", environ) == folder / "alias.py"


def test_outside_of_a_job_it_is_the_function() -> None:
    """Called with arguments, as a test of the file's author does."""

    @subprocess
    def plain(a: int) -> int:
        return a + 1

    @subprocess
    async def coroutine(a: int) -> int:
        return a + 2

    assert (plain(1), coroutine(1)) == (2, 3)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        plain()


def test_a_file_can_be_run_by_hand(folder: Path) -> None:
    text = "from core4 import subprocess\n@subprocess\ndef work(a=1):\n    print('by hand', a)\nwork()\n"
    (folder / "there.py").write_text(text)

    command = [sys.executable, str(folder / "there.py")]
    assert programs.check_output(command, env=os.environ, text=True) == "by hand 1\n"


@pytest.mark.row("F52")
def test_the_template_is_such_a_file(folder: Path) -> None:
    """What `core4 init --subprocess` writes serves a task of its name, as it is."""
    assert cli.main(["init", "--subprocess", str(folder / "first.py")]) == 0

    ended = script.attempt(str(folder / "first.py"), _with({"a": 1, "b": "two", "c": None}))

    assert (ended.kind, ended.result) == ("complete", {"result": "blocking with 1 two None"})


def test_a_file_that_left_its_folder_is_not_run(folder: Path) -> None:
    """It was looked for when the task was declared, and is looked for again by each job."""
    (folder / "there.py").unlink()
    (folder.parent / "elsewhere.py").write_text("raise SystemExit('it ran')\n")
    (folder / "there.py").symlink_to(folder.parent / "elsewhere.py")

    with pytest.raises(BadOption, match="leads out of its folder"):
        script.attempt(str(folder / "there.py"), _with({}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("work()\nwork()", "has run its job already"),
        ("pass", "has called no function under @subprocess"),
        ("work()\nraise SystemExit('late')", "ended with exit code 'late'"),
        ("raise ValueError('early')", "ValueError('early')"),
        ("work(\n", "SyntaxError"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(folder: Path, text: str, words: str) -> None:
    head = "from core4 import subprocess\n@subprocess\ndef work():\n    return 1\n"
    (folder / "there.py").write_text(f"{head}{text}\n")

    ended = script.attempt(str(folder / "there.py"), _with({}))

    assert ended.kind == "failed"
    assert words in ended.message


def _with(args: dict[str, Any]) -> Callable[[Runnable], Ended]:
    return lambda found: perform(found, JobContext("1" * 24, "DEFAULT:there", args))
