"""A task that schedules itself."""

from __future__ import annotations

from core4 import task


@task(namespace="CALL", schedule="* * * * * *", default_args={"args": [1], "kwargs": {"b": 2}})
async def ticks(a: int, b: int) -> int:
    return a + b
