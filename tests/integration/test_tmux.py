"""Workers in windows of a real tmux."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from core4 import workers
from core4.controls import ControlStore
from core4.database import Database
from core4.errors import ConfigError
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.tmux import SUPERVISOR, Windows
from tests.helpers import FAST, clean_environ, eventually, eventually_async, has_ended, program
from tests.integration.test_pool import LEDGER, Work, count_up

pytestmark = pytest.mark.asyncio


@pytest.fixture
def environ(mongo_url: str, database_name: str, tmp_path: Path) -> Iterator[Mapping[str, str]]:
    """Settings of the test's database; no window is left behind."""
    home = tmp_path / "home"
    home.mkdir()
    yield clean_environ(
        **FAST,
        CORE4_MONGO_URL=mongo_url,
        CORE4_MONGO_DATABASE=database_name,
        CORE4_HOME=str(home),
    )
    Windows(home).kill()


def core4(environ: Mapping[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """Run the installed program to its end."""
    return subprocess.run(
        [program("core4"), *words], env=environ, capture_output=True, text=True, check=False, timeout=120
    )


def shown(environ: Mapping[str, str]) -> dict[str, int]:
    """The windows that `core4 tmux list` tells, with their pids."""
    rows = json.loads(core4(environ, "tmux", "list", "-o", "json").stdout)
    return {row["window"]: row["pid"] for row in rows if not row["ended"]}


@pytest.mark.row("M28", "M33")
async def test_two_workers_in_windows(
    environ: Mapping[str, str], registry: WorkerRegistry, database: Database, queue: JobQueue, tmp_path: Path
) -> None:
    """They appear, are there once however often they are started, run jobs, and one of them is halted."""
    work, controls = Work(queue, tmp_path / "ledger"), ControlStore(database)
    await controls.prepare()
    assert core4(environ, "worker", LEDGER, "--tmux", "2").returncode == 0
    await eventually_async(lambda: count_up(registry, 2), 60, what="two workers are up")
    first, second = sorted(await registry.up(), key=lambda row: str(row["label"]))
    again = core4(environ, "worker", LEDGER, "--tmux", "2")
    await work.put(4, 0.1)
    await eventually_async(work.done, 60, what="the jobs are done")
    windows = shown(environ)
    await controls.stop(first["_id"], by="ann")
    await eventually_async(lambda: count_up(registry, 1), 60, what="w1 has ended")
    rows = {row["_id"]: row["state"] for row in await registry.list()}
    left = await eventually_async(lambda: only(environ, "w2"), what="its window is closed")

    assert (first["label"], second["label"], first["type"]) == ("w1", "w2", "tmux")
    assert "2 workers from now on" in again.stdout
    assert windows == {"w1": first["pid"], "w2": second["pid"]}
    assert rows == {first["_id"]: "down", second["_id"]: "up"}
    assert left == {"w2": second["pid"]}

    assert core4(environ, "tmux", "stop").stdout == "stopped\n"
    assert await registry.up() == []
    eventually(lambda: has_ended(second["pid"]), what="the process of w2 is gone")
    assert core4(environ, "tmux", "stop").stdout == "there are no windows\n"


async def only(environ: Mapping[str, str], name: str) -> dict[str, int]:
    windows = shown(environ)
    assert list(windows) == [name]
    return windows


@pytest.mark.row("M28")
async def test_windows_are_kept_up(
    environ: Mapping[str, str], registry: WorkerRegistry, queue: JobQueue, tmp_path: Path
) -> None:
    """A killed worker, one whose window is closed and the supervisor come back; no job is lost.

    A frozen one cannot be shown here: tmux wakes what is stopped in its windows.
    """
    work = Work(queue, tmp_path / "ledger")
    core4(environ, "worker", LEDGER, "--tmux", "3")
    await eventually_async(lambda: count_up(registry, 3), 60, what="three workers are up")
    before = shown(environ)
    everybody = psutil.process_iter(["cmdline", "name"])  # among them some that have ended meanwhile
    (supervisor,) = (
        each
        for each, words in ((each, each.info["cmdline"] or []) for each in everybody)
        if words[-2:] == ["tmux", "supervise"]
        and f"{environ['CORE4_HOME']}/" in " ".join(words)
        and each.info["name"] != "sh"
    )
    supervisor.kill()
    os.kill(before["w1"], signal.SIGKILL)
    socket = Windows(Path(environ["CORE4_HOME"])).socket
    subprocess.run(["tmux", "-L", socket, "kill-window", "-t", "core4:w2"], check=True)
    await work.put(6, 0.1)

    async def replaced() -> bool:
        now = shown(environ)
        assert list(now) == list(before), now
        assert before["w1"] not in now.values(), now
        assert before["w2"] not in now.values(), now
        return True

    await eventually_async(replaced, 90, what="other workers in the windows", every=0.5)
    await eventually_async(work.done, 60, what="all jobs are done")
    errors = {row["pid"]: row["error"] for row in await registry.list() if row["state"] == "dead"}

    assert shown(environ)["w3"] == before["w3"]
    assert before["w1"] in errors
    assert before["w2"] not in shown(environ).values()
    assert core4(environ, "tmux", "stop", "--now").returncode == 0


async def test_the_name_of_one_that_has_ended_is_given_again(environ: Mapping[str, str]) -> None:
    """Though its window is not closed yet: a supervisor that comes back starts others before it clears up."""
    windows = Windows(Path(environ["CORE4_HOME"]))
    session = ["new-session", "-d", "-s", "core4", "-n", SUPERVISOR, "cat", ";"]
    keep = ["set-option", "-g", "remain-on-exit", "on"]
    subprocess.run(["tmux", "-L", windows.socket, "-f", os.devnull, *session, *keep], check=True)
    windows.start("first")  # there is no file with its settings: it ends at once
    eventually(lambda: windows.all()[0].ended, what="it has ended")
    windows.start("second")
    names = [window.name for window in windows.all()]

    assert names == ["w1", "w1"]
    assert windows.ended()["first"] == "exit code 2"
    assert "first" not in [window.launch for window in windows.all()]


async def test_one_looks_at_a_window(environ: Mapping[str, str]) -> None:
    """`attach` shows it in this terminal; of one that is not there it says so."""
    core4(environ, "worker", LEDGER, "--tmux", "1")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(program("core4"), ["core4", "tmux", "attach"], {**environ, "TERM": "xterm"})
    seen = b""
    while SUPERVISOR.encode() not in seen:
        seen += os.read(terminal, 10_000)
    os.kill(pid, signal.SIGHUP)
    os.waitpid(pid, 0)
    os.close(terminal)

    missing = core4(environ, "tmux", "attach", "w9")
    assert (missing.returncode, "no window w9" in missing.stderr) == (2, True)


@pytest.mark.parametrize(
    "words", [("worker", "--tmux", "2"), *(("tmux", w) for w in ("list", "attach", "stop"))]
)
async def test_without_tmux_it_says_what_to_do(
    environ: Mapping[str, str], tmp_path: Path, words: tuple[str, ...]
) -> None:
    """Nothing is started then."""
    bare = {**environ, "PATH": str(tmp_path)}
    done = core4(bare, *words)

    assert done.returncode == 2
    assert done.stderr.startswith("Error: tmux is not installed")
    assert "--processes" in done.stderr


async def test_without_tmux_nothing_is_opened_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for start in (workers.worker_tmux_start, workers.workers_tmux_start):
        with pytest.raises(ConfigError, match="tmux is not installed"):
            start(home=tmp_path / "home")
    assert not (tmp_path / "home").exists()
