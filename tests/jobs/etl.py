"""The tasks of easyjobs' own example, and some that fail: for the tests of tasks."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from core4 import task

ETL = "ETL"


def note(name: str, *more: Any) -> None:
    """A line in the ledger of the test: what, when, and with which arguments."""
    with open(os.environ["ETL_LEDGER"], "a", encoding="utf-8") as file:
        file.write(f"{name} {time.time()} {' '.join(map(str, more))}\n")


@task(namespace=ETL, run_after=["transform"], default_args={"kwargs": {"url": ["http://stats"]}})
async def extract(url: str) -> dict[str, Any]:
    note("extract", url)
    return {"data": {"a": 1, "b": 2, "c": 3}}


@task(namespace=ETL, run_after=["load"])
async def transform(data: dict[str, Any]) -> dict[str, Any]:
    for k in data.copy():
        data[k] = int(data[k]) + 2
    return {"data": data}


@task(namespace=ETL, on_failure="failure_notify", run_after=["compute"])
async def load(data) -> dict[str, Any]:  # type: ignore[no-untyped-def]
    return {"data": data}


@task(namespace=ETL)
async def failure_notify(job_failed) -> Any:  # type: ignore[no-untyped-def]
    note("failure_notify", job_failed["message"])
    return job_failed


@task(namespace=ETL)
async def deploy_environment() -> str:
    note("deploy_environment-begins")
    await _met("deploy_environment-begins", "prepare_db-begins")
    note("deploy_environment-ends")
    return "deploy_environment - completed"


@task(namespace=ETL)
async def prepare_db() -> str:
    note("prepare_db-begins")
    await _met("deploy_environment-begins", "prepare_db-begins")
    note("prepare_db-ends")
    return "prepare_db - completed"


async def _met(*names: str) -> None:
    """Both have begun: they run at the same time."""
    async with asyncio.timeout(30):
        while not all(name in Path(os.environ["ETL_LEDGER"]).read_text() for name in names):
            await asyncio.sleep(0.02)


@task(namespace=ETL, run_before=["deploy_environment", "prepare_db"])
async def configure_environment() -> str:
    note("configure_environment")
    return "configure_environment - finished"


@task(namespace=ETL, run_before=["configure_environment"])
def compute(data: dict[str, Any]) -> dict[str, Any]:
    note("compute")
    return {"computed": data, "pid": os.getpid()}


@task(namespace="A")
@task(namespace="B", priority=5)
def twice(n: int) -> int:
    """In two namespaces."""
    return n * 2


@task()
def basic(a: int, b: int, *args: int) -> list[int]:
    """As in easyjobs' first example."""
    return [a, b, *args]


def _attempts(name: str) -> int:
    note(name)
    return Path(os.environ["ETL_LEDGER"]).read_text().count(f"{name} ")


@task(namespace=ETL, on_failure="failure_notify", run_after=["twice_run"])
def fails_once(key: str) -> int:
    count = _attempts(f"fails_once-{key}")
    if count < 2:
        raise RuntimeError("the first time")
    return count


@task(namespace=ETL)
def twice_run(value: int) -> int:
    return value


@task(namespace=ETL, on_failure="failure_notify", run_after=["twice_run"])
def fails(key: str) -> None:
    _attempts(f"fails-{key}")
    raise RuntimeError("as always")


@task(namespace=ETL, retry_policy="never")
def never_again(key: str) -> None:
    _attempts(f"never_again-{key}")
    raise RuntimeError("only once")


@task(namespace=ETL, retry_policy="always", error_time=0, on_failure="failure_notify")
def stubborn(key: str) -> int:
    count = _attempts(f"stubborn-{key}")
    if count < 6:
        raise RuntimeError("again")
    return count


@task(namespace=ETL, run_before=["fails_before"])
def after_failure() -> None:
    note("after_failure")


@task(namespace=ETL, retry_policy="never")
def fails_before() -> None:
    raise RuntimeError("no environment")


@task(namespace=ETL, run_after=["not_there"])
def lost() -> None:
    pass


@task(namespace=ETL)
def submits() -> str:
    return twice.submit(4, namespace="A")
