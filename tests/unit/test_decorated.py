"""What ``@task`` accepts, refuses and publishes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from core4 import signatures, task
from core4.decorated import POLICIES, entries
from core4.errors import BadOption, JobInvalid, UnknownOption, UsageError
from tests.jobs import etl


def test_a_task_stays_the_function_it_is() -> None:
    assert etl.basic(1, 2, 3) == [1, 2, 3]
    assert asyncio.run(etl.transform({"a": 1})) == {"data": {"a": 3}}
    assert etl.basic.qual_name() == "DEFAULT:basic"


@pytest.mark.row("F23")
def test_a_function_in_two_namespaces_is_two_tasks() -> None:
    first, second = entries(etl.twice)

    assert [first["_id"], second["_id"]] == ["B:twice", "A:twice"]
    assert (first["options"]["priority"], second["options"]["priority"]) == (5, 0)
    assert etl.twice.qual_name("A") == "A:twice"
    with pytest.raises(UsageError, match="say namespace="):
        etl.twice.submit(1)
    with pytest.raises(UsageError, match="no task of the namespace C"):
        etl.twice.qual_name("C")


def test_what_is_published_is_json() -> None:
    (entry,) = entries(etl.load)

    assert json.loads(json.dumps(entry)) == entry
    assert (entry["_id"], entry["kind"], entry["runs"]) == ("ETL:load", "task", "inline")
    assert (entry["run_after"], entry["on_failure"]) == (["ETL:compute"], "ETL:failure_notify")
    assert (entry["retry_policy"], entry["options"]["attempts"], entry["unique"]) == ("retry_once", 2, False)
    assert entries(etl.compute)[0]["runs"] == "process"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"retry_polcy": "never"}, UnknownOption, "did you mean retry_policy?"),
        ({"subproces": True}, UnknownOption, "did you mean subprocess?"),
        ({"subprocess": "yes"}, BadOption, "subprocess is 'yes', expected True or False"),
        ({"retry_policy": "sometimes"}, BadOption, "expected one of retry_once, never, retry_always"),
        ({"retry_policy": "never", "attempts": 3}, BadOption, "give one or the other"),
        ({"attempts": 0}, BadOption, "attempts is 0"),
        ({"namespace": "no good"}, BadOption, "namespace is 'no good'"),
        ({"run_after": "not-a-name"}, BadOption, "run_after names 'not-a-name'"),
        ({"on_failure": ["a", "b"]}, BadOption, "expected the name of a task"),
        ({"schedule": "* * *"}, BadOption, "schedule is"),
        ({"schedule": "* * * * *"}, BadOption, "needs default_args for x"),
        ({"default_args": {"x": 1}}, BadOption, "default_args is"),
        ({"default_args": {"args": [1, 2]}}, BadOption, "default_args do not fit"),
        ({"default_args": {"kwargs": {"x": {1}}}}, BadOption, "default_args do not fit"),
    ],
)
def test_what_is_wrong_is_refused_where_it_is_written(
    options: dict[str, Any], error: type[JobInvalid], words: str
) -> None:
    with pytest.raises(error, match=words.replace("?", r"\?")):

        @task(**options)
        def some(x: int) -> None: ...


@pytest.mark.parametrize(("alias", "policy"), [("always", "retry_always"), ("once", "retry_once")])
def test_policies_have_the_names_of_easyjobs_documents(alias: str, policy: str) -> None:
    @task(retry_policy=alias)
    def some() -> None: ...

    declared = some.declarations["DEFAULT"]
    assert declared.retry_policy == policy
    assert declared.options == POLICIES[policy]


@pytest.mark.row("F45")
def test_default_args_are_bound_and_not_type_checked() -> None:
    """A list for a text, as in easyjobs' own example; and both kinds of arguments."""

    @task(schedule="* * * * *", default_args={"args": [1], "kwargs": {"url": ["http://stats"]}})
    def some(n: int, url: str) -> None: ...

    assert some.declarations["DEFAULT"].default_args == {"n": 1, "url": ["http://stats"]}


def test_positional_arguments_have_names() -> None:
    assert signatures.named_args(etl.basic.function, (1, 2, 3, 4), {}) == {"a": 1, "b": 2, "args": [3, 4]}
    assert signatures.call_args(etl.basic.function, {"a": 1, "b": 2, "args": [3]}) == ((1, 2, 3), {})
    assert signatures.call_args(etl.basic.function, {"a": 1, "b": 2}) == ((), {"a": 1, "b": 2})
    found = signatures.schema(etl.basic.function, positional=True)
    assert found["properties"]["args"] == {
        "type": "array",
        "items": {"type": "integer"},
        "x-kind": "var_positional",
    }
    assert found["required"] == ["a", "b"]


def test_a_call_outside_of_jobs_is_one_of_the_function() -> None:
    assert etl.twice.call(4) == 8
    assert etl.transform.call({"a": 1}) == {"data": {"a": 3}}
    assert asyncio.run(etl.twice.call_async(4)) == 8


def test_a_call_that_would_stop_the_loop_is_refused() -> None:
    async def body() -> None:
        etl.twice.call(4)

    with pytest.raises(UsageError, match=r"use `await twice\(...\)`"):
        asyncio.run(body())
