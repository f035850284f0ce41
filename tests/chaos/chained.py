"""Tasks of the chaos run that hang together: a chain of three and a fan-in of three.

They note what the other chaos jobs note. A prerequisite gets no arguments: its ledger is in the environment.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from typing import Any

from core4 import task
from core4.context import current
from tests.chaos.ledger import note

LEDGER = "CHAOS_LEDGER"  # the variable that names it
CHAIN: dict[str, Any] = {"max_parallel": None, "attempts": 4, "error_time": 0.5}


async def _worked(ledger: str) -> str:
    """A little work; the token of the execution."""
    job, token = current(), uuid.uuid4().hex
    assert job is not None
    note(ledger, "start", job.job_id, job.attempt, token)
    await asyncio.sleep(0.1)
    note(ledger, "end", job.job_id, job.attempt, token)
    return token


async def _passed(key: str, ledger: str) -> dict[str, str]:
    """What the next one gets, this execution's token among it."""
    return {"key": key, "ledger": ledger, "token": await _worked(ledger)}


@task(run_after=["second"], **CHAIN)
async def first(key: str, ledger: str) -> dict[str, str]:
    return await _passed(key, ledger)


@task(run_after=["third"], **CHAIN)
async def second(key: str, ledger: str, token: str) -> dict[str, str]:
    return await _passed(key, ledger)


@task(**CHAIN)
async def third(key: str, ledger: str, token: str) -> dict[str, str]:
    return await _passed(key, ledger)


@task(run_before=["one", "two", "three"], **CHAIN)
async def gather(key: str, ledger: str) -> dict[str, str]:
    return await _passed(key, ledger)


@task(**CHAIN)
async def one() -> dict[str, str]:
    return {"token": await _worked(os.environ[LEDGER])}


@task(**CHAIN)
async def two() -> dict[str, str]:
    return {"token": await _worked(os.environ[LEDGER])}


@task(**CHAIN)
async def three() -> dict[str, str]:
    return {"token": await _worked(os.environ[LEDGER])}
