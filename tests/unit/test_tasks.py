"""What a job class may declare, and what it can do while it runs."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest

from core4 import errors
from core4.attempts import perform
from core4.context import JobContext
from core4.options import DEFAULTS
from core4.states import State
from core4.tasks import CoreAbstractMixin, CoreJob, require_runnable
from core4.testing import run_job

CONTEXT = JobContext(job_id="1" * 24, name="x.Y", args={"a": [1]}, attempt=2)


def declare(**attributes: Any) -> type[CoreJob]:
    """A job class with these attributes, as its author would write it."""
    return type("Declared", (CoreJob,), {"execute": lambda self: None, "author": "me", **attributes})


class Returns(CoreJob):
    author = "tests"

    def execute(self, value: Any = None) -> Any:
        return value


class Steps(CoreJob):
    author = "tests"

    def execute(self, steps: int = 10, force: bool = False) -> None:
        for step in range(steps):
            self.progress(step / steps, "step %d", step, force=force)


@pytest.mark.row("S32")
def test_defaults_are_those_of_the_table() -> None:
    job = declare()

    assert {name: getattr(job, name) for name in DEFAULTS} == dict(DEFAULTS)
    assert (job.schedule, job.tag, job.namespace, job.unique, job.hidden) == (
        None,
        None,
        "DEFAULT",
        True,
        False,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attempts", 0),
        ("attempts", "3"),
        ("attempts", True),
        ("attempts", lambda self: 3),
        ("error_time", -1),
        ("priority", 1001),
        ("priority", 1.5),
        ("max_parallel", 0),
        ("force", None),
        ("wall_time", 0),
        ("worker", ""),
        ("author", ""),
        ("author", 7),
        ("tag", "one"),
        ("tag", [1]),
        ("schedule", "every day"),
        ("schedule", "0 0 30 2 *"),
        ("schedule", 5),
        ("schedule", {}),
        ("schedule", {"zone": "UTC"}),
        ("schedule", {"expression": "every day"}),
        ("schedule", {"expression": "@daily", "zone": "Mars/Olympus"}),
        ("schedule", {"expression": "@daily", "missed": "some"}),
        ("schedule", {"expression": "@daily", "args": {"x": object()}}),
        ("schedule", {"expression": "@daily", "options": {"priority": "high"}}),
        ("schedule", {"expression": "@daily", "qual_name": "a.Job"}),
        ("schedule", {"expression": "@daily", "name": "a b"}),
        ("qual_name", "no dots"),
        ("qual_name", None),
        ("namespace", "a b"),
        ("unique", 1),
    ],
)
def test_a_bad_value_fails_where_it_is_written(name: str, value: Any) -> None:
    with pytest.raises(errors.BadOption, match=rf"Declared.*{name} is "):
        declare(**{name: value})


def test_a_misspelt_option_fails_with_a_hint() -> None:
    with pytest.raises(
        errors.UnknownOption, match="atempts is not an option of a job; did you mean attempts"
    ):
        declare(atempts=3)


def test_a_misspelt_field_of_a_schedule_fails_where_it_is_written() -> None:
    with pytest.raises(errors.UnknownOption, match=r"Declared.*schedule is .*zoen is not a field"):
        declare(schedule={"expression": "@daily", "zoen": "UTC"})


def test_a_schedule_is_an_expression_or_a_mapping() -> None:
    fields = {"expression": "0 6 * * MON-FRI", "zone": "Europe/Berlin", "missed": "all", "name": "mornings"}

    assert declare(schedule="@daily").schedule == "@daily"
    assert declare(schedule=fields).schedule == fields


def test_a_mixin_cannot_bring_a_bad_value() -> None:
    mixin = type("Mixin", (), {"attempts": "many"})
    with pytest.raises(errors.BadOption, match="attempts is 'many'"):
        type("Mixed", (mixin, CoreJob), {})


def test_an_authors_own_names_are_left_alone() -> None:
    job = declare(LIMIT=3, _cache={}, helper=lambda self: 1, total=property(lambda self: 2))

    assert job(CONTEXT).total == 2  # type: ignore[attr-defined]


@pytest.mark.row("S33")
def test_schedule_author_and_tag_are_not_inherited() -> None:
    parent = declare(schedule="*/5 * * * *", tag=["a"], attempts=4, qual_name="a.Parent")
    child: type[CoreJob] = type("Child", (parent,), {})

    assert (child.schedule, child.author, child.tag) == (None, None, None)
    assert child.qual_name.endswith(".Child")
    assert child.attempts == 4
    with pytest.raises(errors.MissingAuthor, match=r"Child names no author"):
        require_runnable(child)


@pytest.mark.row("S33")
@pytest.mark.parametrize(
    "name", ["job_id", "attempt", "args", "name", "logger", "attempts", "author", "priority"]
)
def test_properties_are_read_only_after_construction(name: str) -> None:
    job = Returns(CONTEXT)
    before = getattr(job, name)

    with pytest.raises(errors.UsageError, match=f"{name} is read-only"):
        setattr(job, name, 5)
    with pytest.raises(errors.UsageError, match=f"{name} is read-only"):
        delattr(job, name)
    assert getattr(job, name) == before


def test_a_job_knows_itself_and_the_options_it_was_stored_with() -> None:
    job = Returns(JobContext("1" * 24, "x.Y", {"a": [1]}, 2, {"attempts": 9, "alien": 1}))

    assert (job.job_id, job.name, job.attempt, dict(job.args), job.attempts) == (
        "1" * 24,
        "x.Y",
        2,
        {"a": [1]},
        9,
    )
    assert not hasattr(job, "alien")


def test_abstract_is_only_who_has_the_mixin_as_a_direct_base() -> None:
    base = type("Base", (CoreJob, CoreAbstractMixin), {"execute": lambda self: 1, "author": "me"})
    child = type("Child", (base,), {"author": "me"})

    with pytest.raises(errors.AbstractJob):
        require_runnable(base)
    require_runnable(child)


def test_a_job_needs_an_execute() -> None:
    async def execute(self: CoreJob) -> None: ...

    require_runnable(declare(execute=execute))
    require_runnable(declare(execute=execute, inline=True))
    with pytest.raises(errors.JobInvalid, match="defines no execute"):
        require_runnable(type("Empty", (CoreJob,), {"author": "me"}))


@pytest.mark.row("S46")
def test_progress_is_reported_once_per_interval() -> None:
    outcome = run_job(Steps, steps=10)

    assert outcome.progress == ((0.0, "step 0"),)
    assert outcome.messages == ["progress [0%] - step 0"]
    assert outcome.logs[0].levelno == logging.DEBUG


def test_forced_progress_is_always_reported() -> None:
    assert len(run_job(Steps, steps=10, force=True).progress) == 10


@pytest.mark.parametrize(("given", "reported"), [(-1, 0.0), (7, 1.0), (float("nan"), 0.0), (0.25, 0.25)])
def test_progress_stays_between_0_and_1(given: float, reported: float) -> None:
    seen: list[float] = []
    Returns(JobContext("1" * 24, "x.Y", report=lambda value, message: seen.append(value))).progress(given)

    assert seen == [reported]


def test_defer_is_not_swallowed_by_the_jobs_own_handler() -> None:
    class Defers(CoreJob):
        author = "tests"

        def execute(self) -> None:
            try:
                self.defer("until %s", "noon")
            except Exception:
                self.logger.error("swallowed")

    outcome = run_job(Defers)

    assert (outcome.state, outcome.error, outcome.messages) == (State.DEFERRED, "until noon", [])


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3), KeyboardInterrupt()])
def test_whatever_is_raised_makes_a_failure(error: BaseException) -> None:
    class Raises(CoreJob):
        author = "tests"
        attempts = 2

        def execute(self) -> None:
            raise error

    first, last = run_job(Raises, attempt=1), run_job(Raises, attempt=2)

    assert (first.state, last.state) == (State.FAILED, State.ERROR)
    assert first.error == repr(error)
    assert "raise error" in "".join(first.traceback)
    assert "perform" not in "".join(first.traceback)
    with pytest.raises(type(error)):
        run_job(Raises, debug=True)


def test_an_exception_that_cannot_be_shown_is_still_a_failure() -> None:
    class Odd(Exception):
        def __repr__(self) -> str:
            raise RuntimeError

        __str__ = __repr__

    class Raises(CoreJob):
        author = "tests"

        def execute(self) -> None:
            raise Odd

    assert run_job(Raises).error == "Odd(<repr failed>)"


CIRCULAR: list[Any] = []
CIRCULAR.append(CIRCULAR)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({1: "a"}, "the key 1 is not a text"),
        ([{"deep": {None: 1}}], "the key None is not a text"),
        (float("nan"), "not JSON"),
        (object(), "not JSON"),
        ({1, 2}, "not JSON"),
        (b"bytes", "not JSON"),
        (CIRCULAR, "not JSON"),
    ],
)
def test_a_result_must_be_json(value: Any, words: str) -> None:
    ended = perform(Returns, JobContext("1" * 24, "x.Y", {"value": value}))

    assert ended.kind == "failed"
    assert words in ended.message


def test_a_result_has_a_limit() -> None:
    context = JobContext("1" * 24, "x.Y", {"value": "ä" * 10})

    assert perform(Returns, context, result_limit=22).result == "ä" * 10
    assert perform(Returns, context, result_limit=21).message == "result of 22 bytes is over the limit of 21"


def test_a_tuple_is_a_list_for_json() -> None:
    assert run_job(Returns, value=(1, "a", None, {"b": (2.5,)})).state is State.COMPLETE


def test_arguments_are_checked_as_by_an_enqueue() -> None:
    with pytest.raises(errors.BadArguments, match="stepz: is not an argument; did you mean steps"):
        run_job(Steps, stepz=1)


def test_a_huge_traceback_is_cut() -> None:
    class Raises(CoreJob):
        author = "tests"

        def execute(self) -> None:
            raise ValueError("x" * 1_000_000)

    outcome = run_job(Raises)

    assert sum(map(len, outcome.traceback)) < 200_000
    assert len(outcome.error or "") < 20_000


def test_the_authors_side_loads_neither_driver_nor_asyncio() -> None:
    code = (
        "import sys, core4, core4.tasks, core4.context, core4.examples, core4.discovery, core4.signatures\n"
        "import core4.worker.launcher, core4.worker.process\n"
        "print([m for m in ('asyncio', 'pymongo', 'bson', 'motor', 'jsonschema') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
