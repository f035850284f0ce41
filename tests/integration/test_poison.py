"""Jobs that do what they can to harm their worker: all of them at once, with harmless ones beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId

from core4.config import Settings
from core4.jobs import Job, JobOrder
from core4.logs import LogStore
from core4.queues import JobQueue
from core4.states import FINAL, State
from tests.helpers import FAST, Command, described, eventually_async, marked, program

UNRULY = str(Path(__file__).parent.parent / "jobs" / "unruly.py")
NAME = "tests.jobs.Unruly"
LOG_CAP = 65536
MIB = 1024 * 1024
LIMIT = 120.0  # seconds until all of it is over, whatever this machine does meanwhile

# The row of the plan, in its words: each has to have a case below.
PLAN = (
    "segfault",
    "os._exit",
    "SIGKILL self",
    "sys.exit",
    "memory hog",
    "busy loop",
    "SIGTERM ignored",
    "double-fork daemon",
    "fork bomb",
    "closed stdout",
    "1 GB output",
    "10 MB line",
    "binary/NUL/invalid UTF-8",
    "NaN result",
    "bytes result",
    "cycle result",
    "lambda result",
    "17 MB result",
    "1,000-deep result",
    "1,000-deep args",
    "import error",
    "thread that never ends",
)


@dataclass(frozen=True)
class Poison:
    """What a job does, with which limits, and how it has to end: state, category, words of the reason."""

    what: str
    words: str = ""
    category: str | None = "ERROR"
    value: Any = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    log: Callable[[list[dict[str, Any]]], bool] = bool

    @property
    def state(self) -> State:
        return State.ERROR if self.words else State.COMPLETE


def harmless(what: str, value: Any = 1, log: Callable[[list[dict[str, Any]]], bool] = bool) -> Poison:
    """One that completes, whatever it leaves behind."""
    return Poison(what, value=value, log=log)


def is_cut(lines: list[dict[str, Any]]) -> bool:
    texts = [line["message"] for line in lines]
    return sum("output cut: " in text for text in texts) == 1 and sum(map(len, texts)) < 2 * LOG_CAP


def is_escaped(lines: list[dict[str, Any]]) -> bool:
    return any(line["message"] == "café \\xff\\xfe \\x00 end" for line in lines)


def ends_with_after(lines: list[dict[str, Any]]) -> bool:
    """Its pieces are over the cap of this worker."""
    return is_cut(lines) and max(len(line["message"]) for line in lines) <= LOG_CAP + 100


SOON = {"timeout": 1.5}
SUITE: Mapping[str, Poison] = {
    "segfault": Poison("segfault", "SIGSEGV", "CRASH"),
    "os._exit": Poison("exit_hard", "exit code 7", "CRASH"),
    "SIGKILL self": Poison("kill_itself", "SIGKILL", "CRASH"),
    "sys.exit": Poison("exit_softly", "SystemExit('that is it')"),
    "memory hog": Poison(
        "eat", "memory: used", "CRASH", value=250_000_000, options={"memory_limit": "150MB"}
    ),
    "busy loop": Poison("spin", "timeout: ", "TIMEOUT", options=SOON),
    "SIGTERM ignored": Poison("ignore_term", "timeout: ", "TIMEOUT", options=SOON),
    "double-fork daemon": harmless("double_fork", value=""),
    "fork bomb": Poison("fork_bomb", "processes: it had ", "CRASH", value=200, options={"timeout": 60}),
    "closed stdout": harmless("close_streams"),
    "1 GB output": harmless("flood", 1024, is_cut),
    "10 MB line": harmless("long_line", log=ends_with_after),
    "binary/NUL/invalid UTF-8": harmless("output", log=is_escaped),
    "NaN result": Poison("odd_result", "JSON", value="nan"),
    "bytes result": Poison("odd_result", "JSON", value="bytes"),
    "cycle result": Poison("odd_result", "JSON", value="cycle"),
    "lambda result": Poison("odd_result", "JSON", value="lambda"),
    "17 MB result": Poison("odd_result", "over the limit", value=17 * MIB),
    "1,000-deep result": Poison("odd_result", "result is not JSON", value="deep"),
    "1,000-deep args": Poison("deep_child", "nested too deep"),
    "import error": Poison("missing_import", "ModuleNotFoundError"),
    "thread that never ends": harmless("stray_thread"),
}


def test_the_list_is_whole() -> None:
    """Nothing of the plan is missing."""
    assert set(SUITE) == set(PLAN)


@pytest.fixture
def command(settings: Settings, tmp_path: Path) -> Command:
    """A worker with three slots, low limits, and a file beside the jobs that cannot be imported."""
    (tmp_path / "broken_file.py").write_text("import no_such_module_anywhere\n")
    environ = {
        **FAST,
        "CORE4_MONGO_URL": str(settings.mongo_url),
        "CORE4_MONGO_DATABASE": settings.mongo_database,
        "CORE4_HOME": str(settings.home),
        "CORE4_SLOTS": "3",
        "CORE4_MAX_PROCESSES": "40",
        "CORE4_LOG_CAP": str(LOG_CAP),
        "CORE4_DEAD_AFTER": "20",  # it lives however busy the machine is
    }
    return Command([program("core4"), "worker", UNRULY, tmp_path / "broken_file.py"], environ, cwd=tmp_path)


def complaint(poison: Poison, job: Job, lines: list[dict[str, Any]]) -> str | None:
    """What is wrong with the end of a poisonous job."""
    error = (job.document["last_error"] or {}).get("exception") or ""
    if (job.state, job.document["error_cat"]) != (poison.state, poison.category if poison.words else None):
        return f"is {job.state} {job.document['error_cat']}: {error}"
    if poison.words not in error:
        return f"says {error:.300}"
    if job.trial != 1 or job.crashes:
        return f"was started {job.trial} times, crashes {job.crashes}"
    if not lines or not lines[-1]["message"].startswith(f"done execution with [{poison.state}]"):
        return f"its log ends with {lines[-1:]}"
    return None if poison.log(lines) else f"its log has {len(lines)} lines: {lines[:3]}"


async def log_of(logs: LogStore, job_id: ObjectId) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while rows := await logs.tail(job_id, found[-1]["seq"] if found else 0):
        found += rows
    return found


@pytest.mark.row("S42")
@pytest.mark.timeout(300)
async def test_the_worker_survives_them_all(
    command: Command, queue: JobQueue, logs: LogStore, tmp_path: Path
) -> None:
    """Each ends final with a clear reason, no process stays, and a harmless job beside each completes."""
    with command:
        command.wait_for("ready")
        ours = {process.pid for process in marked(command.mark)}
        poisons: dict[str, ObjectId] = {}
        neighbours: list[ObjectId] = []
        for number, (name, poison) in enumerate(SUITE.items()):
            args = {"what": poison.what, "pidfile": str(tmp_path / f"pid{number}"), "value": poison.value}
            order = JobOrder(name=NAME, args=args, options=poison.options)
            poisons[name] = (await queue.enqueue(order)).id
            order = JobOrder(name=NAME, args={"what": "answer", "value": number})
            neighbours.append((await queue.enqueue(order)).id)

        async def all_ended() -> bool:
            left = [
                name for name, each in poisons.items() if (await queue.store.get(each)).state not in FINAL
            ]
            left += [str(each) for each in neighbours if (await queue.store.get(each)).state not in FINAL]
            assert not left, left
            return True

        async def none_left() -> bool:
            left = [process for process in marked(command.mark) if process.pid not in ours]
            assert not left, described(left)
            return True

        await eventually_async(all_ended, LIMIT, every=0.5)
        await eventually_async(none_left, 10)
        done = [await queue.store.get(each) for each in neighbours]
        assert {job.state for job in done} == {State.COMPLETE}
        assert [job.document["result"] for job in done] == list(range(len(SUITE)))
        wrong = {
            name: complaint(SUITE[name], await queue.store.get(each), await log_of(logs, each))
            for name, each in poisons.items()
        }
        assert {name: text for name, text in wrong.items() if text} == {}
        command.process.terminate()
        assert command.wait() == 0
    assert "jobs.broken" in command.output
    for event in ("job.helper_failed", "worker.failed", "launcher.died"):
        assert event not in command.output
