"""Bodies that are coroutine functions, or no classes at all."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest

from core4 import CoreJob, discovery, errors
from core4.attempts import is_async, perform, perform_async
from core4.context import JobContext, current
from core4.states import State
from core4.testing import run_job


class Awaits(CoreJob):
    """Sleeps, reports, and does `what`."""

    author = "tests"

    async def execute(self, what: str = "") -> Any:
        await asyncio.sleep(0)
        self.progress(0.5, "half")
        if what == "defer":
            self.defer("until %s", "noon")
        if what == "raise":
            raise ValueError("as told")
        if what == "exit":
            sys.exit(3)
        return what


class Parent(CoreJob):
    author = "tests"

    async def execute(self) -> str:
        return await self.enqueue_async(Awaits, what="x")


async def function(value: int) -> tuple[int, str | None]:
    await asyncio.sleep(0)
    inner = asyncio.create_task(whose())
    return value, await inner


def plain(value: int) -> int:
    return value


async def whose() -> str | None:
    job = current()
    return job.job_id if job else None


@pytest.mark.parametrize(
    ("what", "state", "error"),
    [
        ("", State.COMPLETE, None),
        ("defer", State.DEFERRED, "until noon"),
        ("raise", State.ERROR, "ValueError('as told')"),
        ("exit", State.ERROR, "SystemExit(3)"),
    ],
)
def test_an_asynchronous_job_ends_like_any_other(what: str, state: State, error: str | None) -> None:
    outcome = run_job(Awaits, what=what)

    assert (outcome.state, outcome.error, outcome.progress) == (state, error, ((0.5, "half"),))
    assert "perform" not in "".join(outcome.traceback)


async def test_an_asynchronous_test_can_run_an_asynchronous_job() -> None:
    assert run_job(Awaits, what="x").result == "x"
    with pytest.raises(ValueError, match="as told"):
        run_job(Awaits, what="raise", debug=True)


def test_an_asynchronous_job_enqueues() -> None:
    outcome = run_job(Parent)

    assert outcome.result == f"{1:024x}"
    assert outcome.enqueued == ((Awaits.qual_name, {"what": "x"}),)


def test_a_function_is_a_body_too() -> None:
    assert (is_async(function), is_async(plain), is_async(Awaits)) == (True, False, True)
    assert perform(plain, JobContext("1" * 24, "x.y", {"value": 7})).result == 7
    assert perform(function, JobContext("1" * 24, "x.y", {"value": 7})).result == (7, "1" * 24)


async def test_jobs_on_one_loop_know_which_they_are() -> None:
    contexts = [JobContext(str(n) * 24, "x.y", {"value": n}) for n in range(3)]

    ended = await asyncio.gather(*(perform_async(function, one) for one in contexts))

    assert [one.result for one in ended] == [(n, str(n) * 24) for n in range(3)]
    assert current() is None


def test_a_function_is_located_by_its_entry() -> None:
    entry = {"target": __name__, "module": __name__, "qualname": "function"}

    assert discovery.locate(entry) is function
    with pytest.raises(errors.JobInvalid, match="does not define nothing"):
        discovery.locate({**entry, "qualname": "nothing"})
    with pytest.raises(errors.JobInvalid, match="does not define State"):
        discovery.locate({**entry, "qualname": "State"})


def test_where_a_job_runs_is_published() -> None:
    shared = type("Shared", (Awaits,), {"author": "me", "inline": True})

    assert discovery.describe(Awaits)["runs"] == "process"
    assert discovery.describe(shared)["runs"] == "inline"


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"inline": "yes"}, "inline is 'yes'"),
        ({"inline": True, "execute": lambda self: None}, "inline is for `async def execute`"),
        ({"inline": True, "memory_limit": "1GB"}, "memory_limit needs a process of its own"),
    ],
)
def test_what_makes_no_sense_inline_is_refused_where_it_is_written(
    attributes: dict[str, Any], words: str
) -> None:
    with pytest.raises(errors.BadOption, match=words):
        type("Declared", (Awaits,), {"author": "me", **attributes})


def test_only_a_coroutine_function_loads_asyncio() -> None:
    code = (
        "import sys, core4.attempts as a, core4.context as c\n"
        "a.perform(lambda: None, c.JobContext('1', 'x.y'))\n"
        "print('asyncio' in sys.modules)"
    )

    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
