"""Twenty claimers in four processes on five hundred jobs: each job is claimed once."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

from core4.jobs import JobOrder
from core4.queues import JobQueue
from tests.database import SmallDatabase
from tests.helpers import ROOT

JOBS, PROCESSES, CLAIMERS = 500, 4, 5


async def run_claimers(url: str, database: str, number: int) -> list[tuple[str, str]]:
    """One process of claimers to its end: (job, owner) of every claim."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.integration.claimer", database, str(CLAIMERS), f"claimer{number}-"),
        cwd=ROOT,
        env={**os.environ, "CLAIMER_URL": url},
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return [(line.split()[0], line.split()[1]) for line in out.decode().splitlines()]


@pytest.mark.row("S37", "M38")
@pytest.mark.timeout(400)
async def test_each_of_500_jobs_is_claimed_once(
    mongo_url: str, database: SmallDatabase, queue: JobQueue
) -> None:
    """No job has two holders, none is left, and the holder that is stored is the one that was told so."""
    database.every_index = True
    await queue.store.prepare()
    orders = (JobOrder(name="tests.Job", args={"n": n}) for n in range(JOBS))
    wanted = {str((await queue.enqueue(order)).id) for order in orders}

    runs = await asyncio.gather(*(run_claimers(mongo_url, database.name, n) for n in range(PROCESSES)))

    claims = [claim for run in runs for claim in run]
    assert len(claims) == JOBS
    assert {job for job, _ in claims} == wanted
    owners = {owner for _, owner in claims}
    stored = {(str(job.id), owner) for owner in owners for job in await queue.store.running(owner)}
    assert stored == set(claims)
