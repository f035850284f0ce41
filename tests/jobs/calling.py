"""Tasks that call others and wait for them: for the tests of lent slots."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from core4 import task
from core4.errors import CallFailed, EnqueueRefused
from tests.jobs import etl

CALL = "CALL"


@task(namespace=CALL)
async def pipeline() -> Any:
    """As in easyjobs' example: `compute` has prerequisites, and one of those has prerequisites."""
    call: Any = compute  # a plain function is awaited like any other
    return [await call(data={"test": n}) for n in range(2)]


@task(namespace=CALL)
def plain_pipeline() -> Any:
    """The same from a process."""
    return [compute.call(data={"test": n}) for n in range(2)]


@task(namespace=CALL, run_before=["configure_environment"])
def compute(data: dict[str, int]) -> dict[str, int]:
    return {"computed": data["test"]}


@task(namespace=CALL, run_before=["deploy_environment", "prepare_db"])
async def configure_environment() -> None:
    pass


@task(namespace=CALL)
async def deploy_environment() -> None:
    pass


@task(namespace=CALL)
def prepare_db() -> None:
    pass


@task(namespace=CALL)
async def add(a: int, b: int) -> int:
    return a + b


@task(namespace=CALL)
def double(n: int) -> int:
    return 2 * n


@task(namespace=CALL)
async def fan(n: int) -> list[int]:
    """Many at a time, of both kinds."""
    first = await asyncio.gather(*(add(i, 1) for i in range(n)))
    return list(await asyncio.gather(*(double.call_async(i) for i in first)))


@task(namespace=CALL, memory_limit="1 GiB")
async def fan_in_a_process(n: int) -> list[int]:
    return list(await asyncio.gather(*(add(i, 1) for i in range(n))))


@task(namespace=CALL)
async def fibonacci(n: int) -> int:
    return n if n < 2 else sum(await asyncio.gather(fibonacci(n - 1), fibonacci(n - 2)))


@task(namespace=CALL, retry_policy="never")
async def endless(n: int) -> int:
    return await endless(n + 1)


@task(namespace=CALL, retry_policy="never")
async def breaks(text: str) -> None:
    raise ValueError(text)


@task(namespace=CALL, retry_policy="never")
def dies() -> None:
    import os

    os._exit(3)


async def _told(awaitable: Any) -> list[Any]:
    try:
        return ["returned", await awaitable]
    except CallFailed as failed:
        return [failed.state, failed.error_cat, failed.message, failed.name, str(failed)]
    except EnqueueRefused as refused:
        return ["refused", refused.facts["reason"], refused.detail]


@task(namespace=CALL)
async def catches() -> list[list[Any]]:
    """What a caller is told of calls that come to nothing."""
    return [
        await _told(breaks("as told")),
        await _told(dies.call_async()),
        await _told(etl.after_failure.call_async()),
        await _told(add.call_async(1, "three")),
    ]


@task(namespace=CALL, retry_policy="never")
async def does_not_catch() -> None:
    await breaks("as told")


@task(namespace=CALL)
def catches_in_a_process() -> list[str | None]:
    try:
        breaks.call("from afar")
    except CallFailed as failed:
        return [failed.state, failed.error_cat, failed.message]
    return []


@task(namespace=CALL)
async def waits(gate: str) -> str:
    """Until the test lets it go."""
    while not Path(gate).exists():
        await asyncio.sleep(0.02)
    return Path(gate).read_text()


@task(namespace=CALL)
async def calls_waits(gate: str) -> str:
    return await waits(gate)


@task(namespace=CALL)
def calls_waits_in_a_process(gate: str) -> str:
    return waits.call(gate)  # type: ignore[no-any-return]


@task(namespace=CALL)
async def gives_up(gate: str, mark: str) -> str:
    """Stops waiting, and goes on."""
    call = asyncio.create_task(waits.call_async(gate))
    while not Path(mark).exists():
        await asyncio.sleep(0.02)
    call.cancel()
    await asyncio.wait({call})
    return f"cancelled {call.cancelled()}"


@task(namespace=CALL)
async def submits() -> str:
    return await add.submit_async(1, 2)


@task(namespace=CALL)
async def inside(folder: str, n: int) -> None:
    """Say for how long it runs, so that the test can count who does so at the same time."""
    await _counted(folder, f"inside-{n}")


@task(namespace=CALL)
async def around(folder: str, n: int) -> None:
    await _counted(folder, f"before-{n}")
    await inside(folder, n)
    await _counted(folder, f"after-{n}")


async def _counted(folder: str, name: str) -> None:
    begin = time.monotonic()
    await asyncio.sleep(0.05)
    Path(folder, name).write_text(f"{begin} {time.monotonic()}")
