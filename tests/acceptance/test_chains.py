"""Chains of three while workers are killed: each follower once, with what the one before has returned."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from core4.catalogue import Catalogue
from core4.database import Database
from core4.jobs import derived_id
from core4.orders import make_order
from core4.queues import JobQueue
from core4.store import JOURNAL, QUEUE
from tests.chaos.chained import LEDGER
from tests.helpers import FAST, ROOT, Command, eventually_async, program

CHAINS = int(os.environ.get("CORE4_TEST_CHAINS", "40"))  # 200 for the long one
KILLS = 4
NAMES = ["DEFAULT:first", "DEFAULT:second", "DEFAULT:third"]


@contextmanager
def worker(environ: dict[str, str], name: str) -> Iterator[Command]:
    """`core4 worker`, which may be dead when the block ends."""
    args: list[str | Path] = [
        program("core4"),
        "worker",
        ROOT / "tests" / "chaos" / "chained.py",
        "--name",
        name,
    ]
    command = Command(args, environ, cwd=ROOT)
    with command:
        command.wait_for("ready")
        yield command


@pytest.mark.row("F39")
@pytest.mark.row("F61")
async def test_each_follower_is_made_once_whoever_is_killed(
    mongo_url: str,
    database_name: str,
    database: Database,
    queue: JobQueue,
    catalogue: Catalogue,
    tmp_path: Path,
) -> None:
    ledger = tmp_path / "ledger"
    environ = {
        **FAST,
        "CORE4_MONGO_URL": mongo_url,
        "CORE4_MONGO_DATABASE": database_name,
        "CORE4_SLOTS": "6",
        "CORE4_MAX_CRASHES": "20",  # how often one job is hit is luck
        "PYTHONPATH": str(ROOT),
        LEDGER: str(ledger),
    }
    journal = database.collection(JOURNAL)

    async def ended(count: int) -> bool:
        return await journal.count_documents({"name": {"$in": NAMES}}) >= count

    with ExitStack() as workers:
        workers.enter_context(worker(environ, "survivor"))
        victim = workers.enter_context(worker(environ, "victim0"))
        entry = await catalogue.get(NAMES[0])
        assert entry is not None
        firsts = []
        for n in range(CHAINS):
            order = make_order(entry, {"key": f"k{n}", "ledger": str(ledger)}, args_cap=1000)
            firsts.append((await queue.enqueue(order)).id)
        for kill in range(KILLS):
            # Somewhere in the middle of it, each time a bit later.
            goal = (kill + 1) * 3 * CHAINS // (KILLS + 2)
            await eventually_async(partial(ended, goal), 120, what=f"{goal} ended")
            victim.process.kill()
            victim.process.wait()
            victim = workers.enter_context(worker(environ, f"victim{kill + 1}"))
        await eventually_async(partial(ended, 3 * CHAINS), 180, what="all have ended")

    assert await database.collection(QUEUE).count_documents({}) == 0
    rows = {row["_id"]: row for row in await journal.find({}).to_list(None)}
    assert len(rows) == 3 * CHAINS
    for first in firsts:
        second = derived_id(first, "after", 0)
        chain = [rows[first], rows[second], rows[derived_id(second, "after", 0)]]
        assert [row["name"] for row in chain] == NAMES
        assert {row["state"] for row in chain} == {"complete"}
        assert {row["chain_id"] for row in chain} == {first}
        results: list[Any] = [row["result"] for row in chain]
        assert [row["args"] for row in chain[1:]] == results[:2]
