"""Launcher, keeper and job process as real processes, without worker and database."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from core4.config import Settings
from core4.worker import handle, protocol
from core4.worker.handle import Exit, JobProcess, Launcher, LauncherDied, Loaded, load_all
from core4.worker.protocol import Message
from tests.helpers import eventually_async

JOBS = Path(__file__).parent.parent / "jobs"
UNRULY, AWAITING = str(JOBS / "unruly.py"), str(JOBS / "awaiting.py")
NAME = "tests.jobs.Unruly"

THREADED = """
import threading, time
threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
from core4 import CoreJob
class Threaded(CoreJob):
    author = "me"
    def execute(self, what=None):
        return threading.active_count()
"""

ECHO = """
from core4 import CoreJob
class A(CoreJob):
    author = "me"
    def execute(self, what):
        return what
"""


@dataclass
class Ran:
    """All that a job said, and how it ended."""

    frames: list[Message] = field(default_factory=list)
    stdout: bytes = b""
    stderr: bytes = b""
    exit: Exit | None = None

    @property
    def end(self) -> Message:
        return self.frames[-1] if self.frames else {}

    @property
    def logs(self) -> list[Message]:
        return [frame["log"] for frame in self.frames if "log" in frame]


@dataclass
class Bench:
    """A launcher with loaded jobs, and what is needed to run one."""

    launcher: Launcher
    loaded: Loaded

    async def begin(self, name: str = NAME, **args: Any) -> JobProcess:
        entry = self.loaded.entries[name]
        process = await self.launcher.start(fresh=entry["fresh"])
        process.give(self.order(name, args))
        return process

    def order(self, name: str, args: Mapping[str, Any]) -> Message:
        entry = self.loaded.entries[name]
        return {
            "job": {
                "id": "1" * 24,
                "name": name,
                "args": args,
                "attempt": 2,
                "options": entry["options"],
            },
            "entry": {key: entry[key] for key in ("target", "module", "qualname")},
            "result_limit": 100_000,
        }

    async def follow(self, process: JobProcess) -> Ran:
        ran = Ran()

        async def frames() -> None:
            while message := await protocol.read(process.channel):
                ran.frames.append(message)

        async with asyncio.timeout(60):
            _, ran.stdout, ran.stderr, ran.exit = await asyncio.gather(
                frames(), process.stdout.read(), process.stderr.read(), process.wait()
            )
        process.close()
        return ran

    async def run(self, what: str, name: str = NAME, **args: Any) -> Ran:
        return await self.follow(await self.begin(name, what=what, **args))


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    settings = Settings.load(environ={})
    launcher, loaded = await load_all(Launcher.spawn(settings), settings, [UNRULY, AWAITING])
    assert not loaded.problems
    bench = Bench(launcher, loaded)
    yield bench
    bench.launcher.close()


async def pid_in(path: Path) -> int:
    """The pid that a job has written to a file."""

    async def look() -> int:
        return int(path.read_text() or 0) if path.exists() else 0

    return await eventually_async(look)


def is_gone(pid: int) -> bool:
    """True if no living process has this pid."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def all_gone(pids: set[int]) -> None:
    """Wait until no living process has any of these pids."""

    async def look() -> bool:
        return all(map(is_gone, pids))

    await eventually_async(look, what=f"{pids} are gone")


async def test_a_job_returns_its_result(bench: Bench) -> None:
    ran = await bench.run("answer", value={"a": [1, 2.5, None, "ü"]})

    assert ran.end == {"complete": {"result": {"a": [1, 2.5, None, "ü"]}}}
    assert ran.exit is not None
    assert (ran.exit.code, ran.exit.signal, ran.exit.maxrss > 0) == (0, None, True)


async def test_a_job_process_has_no_driver_no_secret_and_no_foreign_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secrets = {
        "CORE4_MONGO_URL": "mongodb://u:p@h",
        "CORE4_PASSWORD": "p",
        "CORE4_TOKEN": "t",
        "CORE4_CONFIG": "f",
    }
    environ = {**os.environ, **secrets, "MINE": "kept"}
    settings = Settings.load(environ={"CORE4_DATA_ROOTS": "/srv/data", "CORE4_MONGO_URL": "mongodb://u:p@h"})
    launcher, loaded = await load_all(Launcher.spawn(settings, environ), settings, [UNRULY])
    bench = Bench(launcher, loaded)
    busy = [await bench.begin(what="sleep", pidfile="/dev/null", value=600) for _ in range(3)]
    ran = await bench.run("about")
    launcher_environ = psutil.Process(launcher.pid).environ()
    for process in busy:
        process.close()
    launcher.close()

    about = ran.end["complete"]["result"]
    ours = {name: value for name, value in about["environ"].items() if name.startswith("CORE4_")}
    assert ours == {"CORE4_DATA_ROOTS": "/srv/data"}
    assert not secrets.keys() & launcher_environ.keys()
    assert about["environ"]["MINE"] == "kept"
    assert about["modules"] == []
    assert about["files"] == [0, 1, 2, 3, 4]  # 4 is the listing itself
    assert about["session"]
    assert about["job"] == ["1" * 24, 2, NAME, "about"]
    assert about["sigterm"]
    assert about["sigint"]
    assert about["stdin"] == ""
    assert about["cwd"] == os.getcwd()
    assert about["threads"] == 1


async def test_two_jobs_draw_different_random_numbers(bench: Bench) -> None:
    drawn = {(await bench.run("random")).end["complete"]["result"] for _ in range(3)}

    assert len(drawn) == 3


@pytest.mark.row("S42")
@pytest.mark.parametrize(
    ("what", "code", "number"),
    [
        ("segfault", None, signal.SIGSEGV),
        ("exit_hard", 7, None),
        ("kill_itself", None, signal.SIGKILL),
        ("close_everything", 70, None),
    ],
)
async def test_a_process_that_dies_says_how_and_disturbs_nobody(
    bench: Bench, what: str, code: int | None, number: int | None
) -> None:
    ran = await bench.run(what)

    assert ran.exit is not None
    assert (ran.exit.code, ran.exit.signal) == (code, number)
    assert not {"complete", "failed"} & ran.end.keys()
    assert (await bench.run("answer", value=1)).end == {"complete": {"result": 1}}


async def test_sys_exit_is_a_failure(bench: Bench) -> None:
    ran = await bench.run("exit_softly")

    assert ran.end["failed"]["message"] == "SystemExit('that is it')"


async def test_an_asynchronous_job_has_a_loop_of_its_own(bench: Bench) -> None:
    name = "tests.jobs.Awaiting"
    ran = await bench.run("answer", name=name, value=7)
    failed = (await bench.run("raises", name=name)).end["failed"]
    left = await bench.run("leaves_a_task", name=name)

    assert [row["message"] for row in ran.logs] == ["before"]
    assert ran.end == {"complete": {"result": 7}}
    assert 'raise RuntimeError("as told")' in "".join(failed["traceback"])
    assert "attempts.py" not in "".join(failed["traceback"])
    assert left.end == {"complete": {"result": "left"}}
    assert left.stderr == b""


async def test_a_failure_has_the_traceback_of_the_users_code(bench: Bench) -> None:
    failed = (await bench.run("raises")).end["failed"]

    assert failed["message"] == "RuntimeError('as told')"
    assert 'raise RuntimeError("as told")' in "".join(failed["traceback"])
    _, *frames, _ = failed["traceback"]
    assert frames
    assert all(f'File "{UNRULY}"' in frame for frame in frames)


async def test_wrong_arguments_are_a_failure(bench: Bench) -> None:
    process = await bench.begin(which="x")
    failed = (await bench.follow(process)).end["failed"]

    assert "unexpected keyword argument 'which'" in failed["message"]


async def test_defer_and_progress(bench: Bench) -> None:
    assert (await bench.run("defers")).end == {"deferred": {"message": "not yet", "traceback": []}}
    reports = [frame["progress"] for frame in (await bench.run("reports")).frames if "progress" in frame]
    assert reports == [{"value": step / 5, "message": f"step {step}"} for step in range(5)]


@pytest.mark.parametrize(("value", "words"), [({"big": "x" * 100_000}, "over the limit of 100000")])
async def test_a_result_over_the_limit_is_a_failure(bench: Bench, value: Any, words: str) -> None:
    process = await bench.begin(what="answer", value=value)

    assert words in (await bench.follow(process)).end["failed"]["message"]


async def test_closed_streams_break_nothing(bench: Bench) -> None:
    ran = await bench.run("close_streams")

    assert ran.end == {"complete": {"result": "still here"}}
    assert ran.stdout == b"before\n"


@pytest.mark.row("S45")
async def test_output_of_python_of_children_and_of_c_is_caught(bench: Bench) -> None:
    ran = await bench.run("output")

    assert ran.stdout == (
        b"caf\xc3\xa9 \xff\xfe \x00 end\nprinted \\udcff\nfrom a child\nanew\nfrom the C library\n"
    )
    assert ran.stderr == b"to stderr\nunterminated"


async def test_log_records_come_as_frames(bench: Bench) -> None:
    ran = await bench.run("logs")

    assert [(row["level"], row["message"]) for row in ran.logs] == [
        ("DEBUG", "own debug"),
        ("DEBUG", "module debug"),
        ("WARNING", "library warning"),
        ("ERROR", "caught it"),
        ("WARNING", "own level"),
    ]
    error = ran.logs[3]["exception"]
    assert error["info"] == "ValueError('inner')"
    assert "raise ValueError" in "".join(error["text"])
    assert b"a warning" in ran.stderr
    assert b"Logging error" in ran.stderr
    assert all(row["epoch"] > 1.7e9 for row in ran.logs)


@pytest.mark.row("S51")
async def test_the_worst_case_tells_what_was_held_back_once(bench: Bench) -> None:
    """The last thousand suppressed records come ahead of the first CRITICAL one, and of the failure."""
    ran = await bench.run("worst_case", value=1100)

    told = [row["message"] for row in ran.logs]
    chatter = [f"chatter {number}" for number in range(100, 1100)]
    assert told == ["from inside", *chatter, "first", "between", "second", "last words"]
    assert ran.end["failed"]["message"] == "RuntimeError('as told')"


async def test_forked_children_have_no_voice_in_the_channel(bench: Bench) -> None:
    ran = await bench.run("forks")

    assert ran.frames == [{"complete": {"result": "from the parent"}}]
    assert b"WARNING in a child" in ran.stderr


async def test_what_a_job_leaves_behind_dies_with_it(bench: Bench, tmp_path: Path) -> None:
    ran = await bench.run("double_fork", pidfile=str(tmp_path / "pid"))

    assert ran.exit is not None
    assert ran.exit.code == 0
    assert is_gone(await pid_in(tmp_path / "pid"))


async def test_a_detached_child_dies_with_a_kill(bench: Bench, tmp_path: Path) -> None:
    process = await bench.begin(what="subprocess_tree", pidfile=str(tmp_path / "pid"))
    child = await pid_in(tmp_path / "pid")

    process.kill()
    ran = await bench.follow(process)

    assert ran.exit is not None
    assert ran.exit.signal == signal.SIGKILL
    assert is_gone(child)


@pytest.mark.row("S42")
async def test_term_reaches_the_job_and_kill_ends_who_ignores_it(bench: Bench, tmp_path: Path) -> None:
    stubborn = await bench.begin(what="ignore_term", pidfile=str(tmp_path / "stubborn"))
    polite = await bench.begin(what="handle_term", pidfile=str(tmp_path / "polite"))
    pid = await pid_in(tmp_path / "stubborn")
    await pid_in(tmp_path / "polite")

    stubborn.terminate()
    polite.terminate()
    ended = await bench.follow(polite)

    assert ended.end == {"complete": {"result": "tidied up"}}
    assert not is_gone(pid)
    stubborn.kill()
    exit_of_stubborn = (await bench.follow(stubborn)).exit
    assert exit_of_stubborn is not None
    assert exit_of_stubborn.signal == signal.SIGKILL
    assert is_gone(pid)


@pytest.mark.parametrize("what", ["ignore_term", "double_fork", "subprocess_tree"])
async def test_the_end_of_the_worker_ends_everything(bench: Bench, tmp_path: Path, what: str) -> None:
    process = await bench.begin(what=what, pidfile=str(tmp_path / "pid"), value="stay")
    pids = {process.pid, await pid_in(tmp_path / "pid")}

    process.close()  # what the kernel does when a worker is killed

    await all_gone(pids)


async def test_a_killed_worker_takes_launcher_and_jobs_with_it(tmp_path: Path) -> None:
    """The same with a real process that is killed, launcher included."""
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, UNRULY, str(tmp_path / "pid")], stdout=subprocess.PIPE
    )
    assert worker.stdout is not None
    pids = {int(word) for word in worker.stdout.readline().split()} | {await pid_in(tmp_path / "pid")}
    assert not any(map(is_gone, pids))

    worker.kill()
    worker.wait()
    worker.stdout.close()

    await all_gone(pids)


WORKER = """
import asyncio, sys
from core4.config import Settings
from core4.worker.handle import Launcher, load_all
async def main():
    settings = Settings.load(environ={})
    launcher, loaded = await load_all(Launcher.spawn(settings), settings, [sys.argv[1]])
    entry = loaded.entries["tests.jobs.Unruly"]
    process = await launcher.start(fresh=False)
    args = {"what": "double_fork", "pidfile": sys.argv[2], "value": "stay"}
    await process.send({
        "job": {"id": "1", "name": entry["_id"], "args": args, "attempt": 1, "options": {}},
        "entry": entry, "result_limit": 1000})
    print(launcher.pid, process.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.parametrize("fresh", [False, True])
async def test_a_process_waits_for_the_next_job(bench: Bench, fresh: bool) -> None:
    """It is taken once, and only for jobs of its kind."""
    bench.launcher.start_ahead(fresh=fresh)
    bench.launcher.start_ahead(fresh=fresh)
    ((ahead, _),) = bench.launcher._ahead.values()
    waiting = (await ahead).pid
    other = await bench.launcher.take(fresh=not fresh)
    first, second = [await bench.launcher.take(fresh=fresh) for _ in range(2)]
    assert first.pid == waiting
    assert len({first.pid, second.pid, other.pid}) == 3
    first.give(bench.order(NAME, {"what": "answer", "value": 7}))
    assert (await bench.follow(first)).end == {"complete": {"result": 7}}
    second.close()
    other.close()


async def test_one_that_died_while_it_waited_gets_no_job(bench: Bench) -> None:
    bench.launcher.start_ahead(fresh=False)
    ((ahead, _),) = bench.launcher._ahead.values()
    waiting = await ahead
    os.kill(waiting.pid, signal.SIGKILL)

    async def noticed() -> bool:
        return not waiting.waits

    await eventually_async(noticed, what="its end is noticed")
    process = await bench.launcher.take(fresh=False)
    assert process.pid != waiting.pid
    process.close()


async def test_who_waits_in_vain_goes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, and with the launcher."""
    monkeypatch.setattr(handle, "AHEAD_FOR", 0.1)
    bench.launcher.start_ahead(fresh=False)
    ((ahead, _),) = bench.launcher._ahead.values()
    process = await ahead
    assert process.keeper is not None
    await all_gone({process.pid, process.keeper})
    assert not bench.launcher._ahead

    monkeypatch.undo()
    bench.launcher.start_ahead(fresh=False)
    ((ahead, _),) = bench.launcher._ahead.values()
    process = await ahead
    assert process.keeper is not None
    bench.launcher.close()
    await all_gone({process.pid, process.keeper})
    bench.launcher.start_ahead(fresh=False)
    assert not bench.launcher._ahead


async def test_jobs_outlive_their_launcher(bench: Bench, tmp_path: Path) -> None:
    process = await bench.begin(what="handle_term", pidfile=str(tmp_path / "pid"))
    await pid_in(tmp_path / "pid")
    os.kill(bench.launcher.pid, signal.SIGKILL)
    with pytest.raises(LauncherDied):
        await bench.launcher.start(fresh=False)

    process.terminate()

    assert (await bench.follow(process)).end == {"complete": {"result": "tidied up"}}


async def test_a_killed_keeper_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    ran = await bench.run("kill_its_keeper", pidfile=str(tmp_path / "pid"))
    child = await pid_in(tmp_path / "pid")

    assert ran.exit is None
    await all_gone({child})
    assert (await bench.run("answer", value=1)).end == {"complete": {"result": 1}}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_signals_to_all_do_not_hit_launcher_and_keepers(
    bench: Bench, tmp_path: Path, number: int
) -> None:
    process = await bench.begin(what="handle_term", pidfile=str(tmp_path / "pid"))
    await pid_in(tmp_path / "pid")
    keeper = psutil.Process(process.pid).ppid()

    os.kill(keeper, number)
    os.kill(bench.launcher.pid, number)
    assert (await bench.run("answer", value=1)).end == {"complete": {"result": 1}}
    process.terminate()

    assert (await bench.follow(process)).end == {"complete": {"result": "tidied up"}}
    assert len({os.getsid(0), os.getsid(bench.launcher.pid)}) == 2


async def test_no_file_is_left_after_many_jobs(bench: Bench) -> None:
    async def files() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{bench.launcher.pid}/fd"))

    await bench.run("answer")
    await asyncio.sleep(0)
    before = await files()
    for _ in range(20):
        await bench.run("answer")

    async def same() -> bool:
        return await files() <= before

    await eventually_async(same, what=f"no more files than {before}")


# ---------------------------------------------------------------------- loading


async def load(tmp_path: Path, **modules: str) -> tuple[Launcher, Loaded]:
    targets = []
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
        targets.append(str(tmp_path / f"{name}.py"))
    settings = Settings.load(environ={})
    return await load_all(Launcher.spawn(settings), settings, targets)


async def test_a_module_that_starts_threads_gets_fresh_interpreters(tmp_path: Path) -> None:
    launcher, loaded = await load(tmp_path, threaded=THREADED)

    assert loaded.entries["threaded.Threaded"]["fresh"]
    ran = await Bench(launcher, loaded).run("x", name="threaded.Threaded")
    assert ran.end == {"complete": {"result": 2}}
    assert len(os.listdir(f"/proc/{launcher.pid}/task")) == 1
    launcher.close()


@pytest.mark.parametrize(
    "text",
    [
        "import subprocess\nsubprocess.Popen(['sleep', '600'])\n",
        "import socket\nKEPT = socket.socket()\n",
    ],
    ids=["process", "file"],
)
async def test_a_module_that_cannot_be_shared_gets_fresh_interpreters(tmp_path: Path, text: str) -> None:
    launcher, loaded = await load(tmp_path, special=text + ECHO)

    assert loaded.entries["special.A"]["fresh"]
    assert (await Bench(launcher, loaded).run("hello", name="special.A")).end == {
        "complete": {"result": "hello"}
    }
    launcher.close()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import ctypes; ctypes.string_at(0)", "died with signal 11 (SIGSEGV)"),
        ("import os; os._exit(3)", "ended the process with exit code 3"),
        ("1 / 0", "ZeroDivisionError"),
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit", "SystemExit"),
    ],
)
async def test_a_broken_module_is_reported_and_the_rest_runs(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "broken_one.py").write_text(text)
    settings = Settings.load(environ={})
    launcher, loaded = await load_all(
        Launcher.spawn(settings),
        settings,
        [str(tmp_path / "broken_one.py"), UNRULY, str(tmp_path / "missing.py")],
    )

    assert list(loaded.entries) == [NAME]
    assert words in loaded.problems[0].error
    assert "not found" in loaded.problems[1].error
    assert {str(tmp_path / "broken_one.py"), UNRULY, str(tmp_path / "missing.py")} <= set(loaded.files)
    assert (await Bench(launcher, loaded).run("answer", value=1)).end == {"complete": {"result": 1}}
    launcher.close()


async def test_a_module_that_only_breaks_the_launcher_is_kept_out_of_it(tmp_path: Path) -> None:
    """It imports in the probe, and ends the process when it is imported a second time."""
    text = (
        "import os, pathlib\n"
        f"mark = pathlib.Path({str(tmp_path / 'mark')!r})\n"
        "times = len(mark.read_text()) if mark.exists() else 0\n"
        "mark.write_text('x' * (times + 1))\n"
        "if times == 1: os._exit(9)\n"
    )
    launcher, loaded = await load(tmp_path, moody=text + ECHO)

    assert loaded.entries["moody.A"]["fresh"]
    assert (await Bench(launcher, loaded).run("hello", name="moody.A")).end == {
        "complete": {"result": "hello"}
    }
    launcher.close()


async def test_two_files_with_one_published_name_are_both_refused(tmp_path: Path) -> None:
    job = (
        "from core4 import CoreJob\nclass A(CoreJob):\n    author = 'me'\n"
        "    qual_name = 'same.Name'\n    def execute(self): pass\n"
    )
    launcher, loaded = await load(tmp_path, one_of_two=job, two_of_two=job)

    assert loaded.entries == {}
    assert "one_of_two.py" in loaded.problems[0].error
    assert "two_of_two.py" in loaded.problems[0].error
    launcher.close()


def test_the_launcher_loads_neither_asyncio_nor_a_driver() -> None:
    code = (
        "import sys, core4.worker.launcher, core4.worker.process\n"
        "print([m for m in ('asyncio', 'pymongo', 'bson', 'motor', 'jsonschema') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


async def test_a_launcher_without_worker_ends() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "core4.worker.launcher", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
        )
    ours.close()

    assert process.wait(20) == 0
